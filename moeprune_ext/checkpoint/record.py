"""What config.json records of an export whose layers the architecture's configuration cannot describe.

modeling.py says what the record means and makes a model of it; here it is made from a model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES, READS_CONFIG, MoeLayer, expert_tensors, router_tensors
from moeprune_ext.models.masking import expert_counters
from moeprune_ext.models.routers import RoutedLayer


def router_rule(routed: RoutedLayer, rows: int) -> dict[str, Any]:
    """modeling.map_router_'s rule for a router whose formula is known, mapped to so many experts."""
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


def differences(
    layers: Mapping[int, MoeLayer], kept: Mapping[int, int], mapped: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The record of a model that keeps so many experts in each layer, or merges to as many.

    layers: those of a model without weights, as the configuration alone describes it. mapped: {decoder layer:
    router_rule} of the layers that merge, whose routers keep the rule's "experts".
    """
    tensors: dict[str, list[int]] = {}
    integers: dict[str, int] = {}
    for index, stored in kept.items():
        layer = layers[index]
        scored = mapped[index]["experts"] if index in mapped else stored
        names = {id(module): f"{layer.name}.{name}".rstrip(".") for name, module in layer.block.named_modules()}
        for count, places in ((scored, router_tensors(layer)), (stored, expert_tensors(layer))):
            for place in places if count != layer.shape.num_experts else ():
                shape = list(getattr(place.owner, place.name).shape)
                shape[place.axis] = count + place.trailing
                tensors[f"{layer.name}.{place.path}"] = shape
        for count, modules in ((scored, [*layer.router.modules(), layer.block]), (stored, [layer.experts])):
            for counter in expert_counters(layer, modules) if count != layer.shape.num_experts else ():
                integers[f"{names[id(counter.owner)]}.{counter.name}"] = count + counter.trailing
        if type(layer.router).__name__ in READS_CONFIG and scored != layer.shape.num_experts:
            config = layer.router.config
            counts = [name for name in EXPERT_COUNT_NAMES if isinstance(getattr(config, name, None), int)]
            integers |= {f"{names[id(layer.router)]}.config.{name}": scored for name in counts}
    return {
        "kept_per_layer": {str(index): count for index, count in kept.items()},
        "tensors": tensors,
        "integers": integers,
        "routers": {f"{layers[index].name}.{layers[index].router_name}": dict(rule) for index, rule in mapped.items()},
    }
