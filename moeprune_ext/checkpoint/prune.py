"""A plan carried out in memory for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import HasPlan, Plan, PruningPlan, plan_of
from moeprune_ext.checkpoint.read import skeleton
from moeprune_ext.checkpoint.record import differences, mapped_parameters, router_rule
from moeprune_ext.modeling import CONFIG_KEY, map_router_
from moeprune_ext.models.apply import _checked, check_plan
from moeprune_ext.models.masking import _own_config, _slice, expert_counters
from moeprune_ext.models.merging import Replaced, combined, merge_sums_, restored
from moeprune_ext.models.moe import (
    EXPERT_COUNT_NAMES,
    READS_CONFIG,
    TOP_K_CONFIG_NAMES,
    MoeLayer,
    expert_tensors,
    find_moe_layers,
    model_fingerprint,
    router_tensors,
)
from moeprune_ext.models.patches import lowered, set_active_


def resize_(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> None:
    """Slices router and experts of the named layers, with no check; works on meta tensors too (see export.load)."""
    layers = find_moe_layers(model)
    for index, ids in kept.items():
        layer = layers[index]
        if len(ids) < layer.shape.num_experts:
            _slice(router_tensors(layer) + expert_tensors(layer), ids)
            for counter in expert_counters(layer, [*layer.router.modules(), layer.block, layer.experts]):
                setattr(counter.owner, counter.name, len(ids) + counter.trailing)
            if type(layer.router).__name__ in READS_CONFIG:
                layer.router.config = _own_config(layer.router, len(ids))
    counts = {len(kept.get(index, range(layer.shape.num_experts))) for index, layer in layers.items()}
    if len(counts) == 1:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        before = {layer.shape.num_experts for layer in layers.values()}
        for owner in (config, model):  # some models hold the number themselves, for the load-balancing loss
            for name in EXPERT_COUNT_NAMES:
                if getattr(owner, name, None) in before:
                    setattr(owner, name, *counts)


def prune_(model: nn.Module, plan: Plan | HasPlan) -> None:
    """Carries out a plan, or the result of a search, in place: router and expert tensors are sliced, counts are set;
    merged experts get their weights, and mapped routers map.

    The configuration follows: its numbers where they can describe the result, else with a record of the differences, so
    that `load` reads what save_pretrained writes. Raises ValueError as `applied`, and for a model whose layers are
    streamed.
    """
    plan = plan_of(plan)
    if getattr(model, "moeprune_stream", None) is not None:
        raise ValueError("a streamed model cannot be pruned in place; export the plan and load the export")
    layers = find_moe_layers(model)
    if isinstance(plan, MergedPlan):
        routed = _checked(plan, model, layers)
        for index, merge in plan.merges.items():
            _replace_experts_(routed[index].layer, merge.experts)
            layer = routed[index].layer
            map_router_(layer.router, router_rule(routed[index], len(merge.experts)))
            for name, value in mapped_parameters(routed[index], merge).items():
                getattr(layer.router, name).data.copy_(value)
    else:
        check_plan(plan, layers, model_fingerprint(model, layers))
        _prune_(model, layers, plan)
    if plan.active is not None:
        _set_active_(model, layers, plan.active)
    _record_(model)


def _prune_(model: nn.Module, layers: Mapping[int, MoeLayer], plan: PruningPlan) -> None:
    before: Replaced = []
    with restored(before, always=False):
        for index, sums in plan.merged.items():
            merge_sums_(layers[index], sums, before)
    resize_(model, plan.kept)


def _replace_experts_(layer: MoeLayer, shares: Tensor) -> None:
    """Experts become sums of them; shares: W_EM, float32 [K', E]."""
    for place in expert_tensors(layer):
        old = getattr(place.owner, place.name)
        new = combined(old.detach(), shares)
        setattr(place.owner, place.name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for name in EXPERT_COUNT_NAMES:
        if getattr(layer.experts, name, None) == layer.shape.num_experts:
            setattr(layer.experts, name, len(shares))


def _set_active_(model: nn.Module, layers: Mapping[int, MoeLayer], active: int) -> None:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for layer in layers.values():
        set_active_(layer, active)
    for name in TOP_K_CONFIG_NAMES:
        if (value := lowered(getattr(config, name, None), active)) is not None:
            setattr(config, name, value)


def _record_(model: nn.Module) -> None:
    """Makes the configuration say how the model differs from it, as an export does; `load` reads a saved one."""
    config: Any = model.config
    for name in (CONFIG_KEY, "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    layers = find_moe_layers(model)
    counts = {index: layer.shape.num_experts for index, layer in layers.items()}
    rules = {index: getattr(layer.router, "moeprune_rule", None) for index, layer in layers.items()}
    mapped = {index: rule for index, rule in rules.items() if rule is not None}
    original = find_moe_layers(skeleton(config, {}))
    if mapped or counts != {index: layer.shape.num_experts for index, layer in original.items()}:
        setattr(config, CONFIG_KEY, differences(original, counts, mapped))
