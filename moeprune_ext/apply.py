"""A plan on a model in memory: tried for a while, or carried out for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from moeprune_ext.differences import mapped_parameters, router_rule
from moeprune_ext.masking import Replaced, check_plan, masks, merge_sums_, resize_, restored
from moeprune_ext.merged_plan import MergedPlan
from moeprune_ext.merging import check_merges, combined, mapped_layer, merged_model
from moeprune_ext.modeling import map_router_
from moeprune_ext.moe import (
    EXPERT_COUNT_NAMES,
    TOP_K_CONFIG_NAMES,
    MoeLayer,
    expert_tensors,
    find_moe_layers,
    model_fingerprint,
    set_active_,
)
from moeprune_ext.plan import HasPlan, Plan, PruningPlan, plan_of
from moeprune_ext.routers import RoutedLayer


@contextmanager
def applied(model: nn.Module, plan: Plan | HasPlan) -> Iterator[nn.Module]:
    """The model under a plan, or the result of a search: inside it computes what the exported checkpoint computes;
    afterwards it is untouched.

    No memory is taken for masks. Merged experts of a MergedPlan exist for one layer at a time and are made anew
    whenever their layer is called, so a long generation is better done with an export. Raises ValueError when the plan
    belongs to another model, keeps too few experts, or maps a router whose formula is not known.
    """
    plan = plan_of(plan)
    layers = find_moe_layers(model)
    if isinstance(plan, MergedPlan):
        with merged_model(_checked(plan, model, layers), plan):
            yield model
        return
    check_plan(plan, layers, model_fingerprint(model, layers))
    if plan.merged and getattr(model, "moeprune_stream", None) is not None:
        raise ValueError("a streamed model cannot hold merged experts; export the plan and load the export")
    with masks(layers, plan):
        yield model


def prune_(model: nn.Module, plan: Plan | HasPlan) -> None:
    """Carries out a plan, or the result of a search, in place: router and expert tensors are sliced, counts are set;
    merged experts get their weights, and mapped routers map.

    The configuration's numbers follow where they can describe the result. Raises ValueError as `applied`, and for a
    model whose layers are streamed.
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


def _checked(plan: MergedPlan, model: nn.Module, layers: Mapping[int, MoeLayer]) -> dict[int, RoutedLayer]:
    routed = {index: mapped_layer(layer) for index, layer in layers.items()}
    check_merges(plan, routed, model_fingerprint(model, layers))
    return routed


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
    before = {layer.shape.top_k for layer in layers.values()}
    for layer in layers.values():
        set_active_(layer, active)
    for name in TOP_K_CONFIG_NAMES:
        if getattr(config, name, None) in before:
            setattr(config, name, active)
