"""A plan on a model in memory: tried for a while, or carried out for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import HasPlan, Plan, PruningPlan, plan_of
from moeprune_ext.models.masking import masked
from moeprune_ext.models.merging import MergedExperts, _merged, mapped_layer, treated
from moeprune_ext.models.moe import MoeLayer, find_moe_layers, model_fingerprint
from moeprune_ext.models.patches import fewer_active
from moeprune_ext.models.routers import RoutedLayer


@contextmanager
def masks(layers: Mapping[int, MoeLayer], plan: PruningPlan) -> Iterator[None]:
    """apply.applied for layers already found and a plan already checked.

    Merged experts take the places of kept ones, whose own weights are held meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(fewer_active(layers, plan.active))
        for index, sums in plan.merged.items():
            stack.enter_context(_merged(layers[index], sums))
        for index, kept in plan.kept.items():
            if len(kept) < layers[index].shape.num_experts:
                stack.enter_context(masked(layers[index], kept))
        yield


def check_plan(plan: PruningPlan, layers: Mapping[int, MoeLayer], fingerprint: str | None) -> None:
    """Refuses a plan that this model cannot carry out, and says why (ValueError)."""
    if plan.model is not None and fingerprint is not None and plan.model != fingerprint:
        raise ValueError(
            f"this plan was made for another model: its fingerprint is {plan.model}, the model's is {fingerprint}; "
            "make the plan again from this model's own calibration"
        )
    if unknown := sorted(set(plan.kept) - set(layers)):
        raise ValueError(f"the plan names layers {unknown}, but the model's MoE layers are {sorted(layers)}")
    check_active(plan.active, layers)
    for index, kept in plan.kept.items():
        shape = layers[index].shape_with(plan.active)
        if plan.num_experts[index] != shape.num_experts:
            made_for = plan.num_experts[index]
            raise ValueError(
                f"layer {index}: the plan was made for {made_for} experts, the model has {shape.num_experts}"
            )
        if len(set(kept)) != len(kept) or not all(0 <= e < shape.num_experts for e in kept):
            raise ValueError(
                f"layer {index}: kept ids must be distinct and in [0, {shape.num_experts}), got {list(kept)}"
            )
        if len(kept) < shape.min_kept:
            raise ValueError(
                f"layer {index} keeps {len(kept)} experts, but its router needs at least {shape.min_kept} "
                f"(it selects {shape.top_k} per token); lower the sparsity"
            )
        if shape.n_group > 1 and len(kept) < shape.num_experts:
            size = shape.num_experts // shape.n_group
            per_group = [sum(1 for e in kept if e // size == g) for g in range(shape.n_group)]
            if len(set(per_group)) != 1:
                raise ValueError(
                    f"layer {index}: its router chooses among {shape.n_group} groups, which must keep equally many "
                    f"experts, but the plan keeps {per_group}"
                )


def check_active(active: int | None, layers: Mapping[int, MoeLayer]) -> None:
    """Refuses (ValueError) a number of experts per token that the routers of these layers cannot select."""
    for index, layer in layers.items():
        if active is not None and not layer.fewest_active <= active <= layer.shape.top_k:
            raise ValueError(
                f"layer {index}: {active} experts active per token; its router selects {layer.shape.top_k} and can be "
                f"made to select {layer.fewest_active} or more"
            )


def check_merges(plan: MergedPlan, routed: Mapping[int, RoutedLayer], fingerprint: str | None) -> None:
    """Refuses a plan that this model cannot carry out, and says why (ValueError). routed: as `mapped_layer` finds."""
    if plan.model is not None and fingerprint is not None and plan.model != fingerprint:
        raise ValueError(f"these merges are another model's: {plan.model}, this one is {fingerprint}")
    if unknown := sorted(set(plan.merges) - set(routed)):
        raise ValueError(f"the merges name layers {unknown}, but the model's MoE layers are {sorted(routed)}")
    check_active(plan.active, {index: one.layer for index, one in routed.items()})
    for index, merge in plan.merges.items():
        layer = routed[index].layer
        shape = layer.shape_with(plan.active)
        if merge.experts.shape[1] != shape.num_experts:
            raise ValueError(f"layer {index}: merges of {merge.experts.shape[1]} experts, it has {shape.num_experts}")
        if len(merge.experts) > shape.num_experts or not bool((merge.router != 0).any(1).all()):
            raise ValueError(
                f"layer {index}: {len(merge.experts)} merged experts of {shape.num_experts}: there must not be more "
                "than before, and each row of the router's map must refer to some"
            )
        if len(merge.experts) < shape.top_k:
            raise ValueError(
                f"layer {index}: {len(merge.experts)} merged experts, but its router selects {shape.top_k} per token"
            )
        if shape.n_group > 1 or layer.trailing:
            raise ValueError(f"layer {index}: a router of groups, or of more than experts, cannot be mapped")
        if routed[index].spec is None:
            raise ValueError(
                f"layer {index}: the formula of {type(layer.router).__name__} is not known, so it cannot be mapped"
            )


@contextmanager
def merged_model(routed: Mapping[int, RoutedLayer], plan: MergedPlan) -> Iterator[None]:
    """Inside, the model computes with a plan's merges; afterwards it is as before. The plan has been checked."""
    buffers: dict[str, Tensor] = {}
    scratch: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(fewer_active({index: one.layer for index, one in routed.items()}, plan.active))
        for index, merge in plan.merges.items():
            merged = MergedExperts(routed[index], buffers, scratch)
            stack.enter_context(treated(routed[index], merge, merged))
        yield


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


def _checked(plan: MergedPlan, model: nn.Module, layers: Mapping[int, MoeLayer]) -> dict[int, RoutedLayer]:
    routed = {index: mapped_layer(layer) for index, layer in layers.items()}
    check_merges(plan, routed, model_fingerprint(model, layers))
    return routed


# ---- what came out


def full_plan(model: nn.Module, active: int | None = None) -> PruningPlan:
    """The plan that keeps everything."""
    layers = find_moe_layers(model)
    experts = {index: layer.shape.num_experts for index, layer in layers.items()}
    kept = {index: list(range(count)) for index, count in experts.items()}
    return PruningPlan(kept, experts, model_fingerprint(model, layers), active=active)
