"""What config.json records of a model whose layers the architecture's configuration cannot describe.

modeling.py says what the record means and makes a model of it; here it is made from a model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.layers import (
    EXPERT_COUNT_NAMES,
    READS_CONFIG,
    MoeLayer,
    expert_counters,
    expert_tensors,
    router_tensors,
)
from moeprune_ext.models.routers import RoutedLayer

PER_LAYER = "num_experts_per_layer"  # of config.json: a name by which other software knows unequal layers


def router_rule(routed: RoutedLayer, rows: int) -> dict[str, Any]:
    """Makes the rule by which `modeling.map_router_` maps a router of known formula to so many experts."""
    assert routed.spec is not None and routed.places is not None
    spec = routed.spec
    return {
        "score": spec.score,
        "rows": rows,
        "experts": routed.layer.shape.num_experts,
        "renormalize": spec.renormalize,
        "eps": spec.eps,
        "scale": spec.scale,
        "bias": spec.correction_bias is not None,
        "places": list(routed.places),
    }


def mapped_parameters(routed: RoutedLayer, merge: Merge) -> dict[str, Tensor]:
    """Returns a mapped router's own parameters, {name: float32}: W_RM, and the bias of its rows where there is one."""
    assert routed.spec is not None and merge.router is not None
    bias = routed.spec.correction_bias
    values = [merge.router.clone(), None if bias is None else merge.router @ bias.detach().cpu().float()]
    return {name: value for name, value in zip(MAPPED, values, strict=True) if value is not None}


def experts_per_layer(layers: Mapping[int, MoeLayer], counts: Mapping[int, int], config: Any) -> list[int]:
    """Makes the list that other software stores as PER_LAYER: a number for every decoder layer.

    Source: EvoESAP's checkpoints, https://github.com/ZongfangLiu/EvoESAP. Dense layers get the configuration's number.

    Args:
        layers: {decoder layer: MoeLayer} as the configuration alone describes it.
        counts: {decoder layer: experts stored}.
        config: of the language model.
    """
    number = max(layer.shape.num_experts for layer in layers.values())
    length = max(max(counts) + 1, getattr(config, "num_hidden_layers", 0))
    return [counts.get(index, number) for index in range(length)]


def differences(
    layers: Mapping[int, MoeLayer], counts: Mapping[int, int], rules: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Records how a model differs from what its configuration describes.

    Args:
        layers: {decoder layer: MoeLayer} of a model without weights, as the configuration alone describes it.
        counts: {decoder layer: experts stored}.
        rules: {decoder layer: router_rule} of the layers whose routers map the scores of the rule's "experts".

    Returns:
        What config.json holds under `modeling.CONFIG_KEY`.
    """
    tensors: dict[str, list[int]] = {}
    integers: dict[str, int] = {}
    for index, stored in counts.items():
        layer = layers[index]
        scored = rules[index]["experts"] if index in rules else stored
        names = {id(module): f"{layer.name}.{name}".rstrip(".") for name, module in layer.block.named_modules()}
        parts = (
            (scored, router_tensors(layer), [*layer.router.modules(), layer.block]),
            (stored, expert_tensors(layer), [layer.experts]),
        )
        for count, per_expert, modules in parts:
            if count == layer.shape.num_experts:
                continue
            for tensor in per_expert:
                shape = list(getattr(tensor.owner, tensor.name).shape)
                shape[tensor.axis] = count + tensor.trailing
                tensors[f"{layer.name}.{tensor.path}"] = shape
            for counter in expert_counters(layer, modules):
                integers[f"{names[id(counter.owner)]}.{counter.name}"] = count + counter.trailing
        if type(layer.router).__name__ in READS_CONFIG and scored != layer.shape.num_experts:
            config = layer.router.config
            for name in EXPERT_COUNT_NAMES:
                if isinstance(getattr(config, name, None), int):
                    integers[f"{names[id(layer.router)]}.config.{name}"] = scored
    return {
        "kept_per_layer": {str(index): count for index, count in counts.items()},
        "tensors": tensors,
        "integers": integers,
        "routers": {f"{layers[index].name}.{layers[index].router_name}": dict(rule) for index, rule in rules.items()},
    }
