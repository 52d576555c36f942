"""A plan on a model in memory, for a while; and what of a plan a model cannot carry out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from moeprune_ext.artifacts.plan import HasPlan, Merge, PruningPlan, Treatment, plan_of
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.models.active import fewer_active
from moeprune_ext.models.experts import DOWN
from moeprune_ext.models.layers import MoeLayer, masked
from moeprune_ext.models.merging import MapRouter, MergedExperts, mapped_layer, merged
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.routers import routed_layer
from moeprune_ext.models.scratch import Scratch


@contextmanager
def applied(model: nn.Module | MoeModel, plan: PruningPlan | HasPlan) -> Iterator[Any]:
    """Applies a plan for a while: inside, the model computes what the exported checkpoint computes.

    Afterwards it is untouched. No memory is taken for masks. Merged experts exist for one layer at a time and are made
    anew whenever their layer is called, so a long generation is better done with an export.

    Args:
        model: a transformers model, or the MoeModel made of it.
        plan: or the result of a search.

    Yields:
        The transformers model.

    Raises:
        ValueError: for a plan that belongs to another model, keeps too few experts, or maps a router whose formula is
            not known.
    """
    moe, plan = MoeModel.of(model), plan_of(plan)
    check_plan(plan, moe.layers, moe.fingerprint)
    with planned(moe.layers, plan):
        yield moe.model


@contextmanager
def planned(
    layers: Mapping[int, MoeLayer], plan: PruningPlan, map_router: MapRouter = mapped_layer, *, held: bool = False
) -> Iterator[None]:
    """`applied`, for a plan that has been checked.

    Args:
        layers: of the model, by decoder layer.
        plan: what to apply.
        map_router: finds how a router maps its scores; give one that remembers where plans are many.
        held: whether merged experts are made once, for a plan of one layer, which is resident; otherwise they are made
            anew whenever their layer is called.
    """
    buffers, scratch = Scratch(), Scratch()
    with ExitStack() as stack:
        stack.enter_context(fewer_active(layers, plan.active))
        for index, kept in plan.kept.items():
            layer, merge = layers[index], plan.merges.get(index)
            if merge is not None:
                routed = routed_layer(layer, "sliced") if merge.router is None else map_router(layer)
                experts = MergedExperts(layer, buffers, scratch)
                stack.enter_context(merged(routed, Treatment(tuple(kept), merge), experts))
                if held:
                    stack.enter_context(experts.held(merge))
            elif len(kept) < layer.shape.num_experts:
                stack.enter_context(masked(layer, kept))
        yield


def full_plan(model: nn.Module | MoeModel, active: int | None = None) -> PruningPlan:
    """Returns the plan that keeps everything, with `active` experts per token if that is given."""
    moe = MoeModel.of(model)
    experts = {index: shape.num_experts for index, shape in moe.shapes.items()}
    kept = {index: list(range(count)) for index, count in experts.items()}
    return PruningPlan(kept, experts, moe.fingerprint, active=active)


# ---- what cannot be


def check_plan(
    plan: PruningPlan,
    layers: Mapping[int, MoeLayer],
    fingerprint: str | None,
    map_router: MapRouter = mapped_layer,
) -> None:
    """Refuses a plan that a model cannot carry out.

    Args:
        plan: what is to be done.
        layers: of the model, by decoder layer.
        fingerprint: of the model; None: not compared.
        map_router: finds how a layer's router can map its scores; called for layers that the plan maps.

    Raises:
        ValueError: with the layer, what is wrong, and what to do.
    """
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
        merge = plan.merges.get(index)
        if merge is not None and merge.down is not None:
            _check_down(layers[index], merge.down)
        if merge is not None and merge.router is not None:
            _check_map(layers[index], shape, merge, map_router)
        else:
            _check_kept(index, shape, kept)


def _check_kept(index: int, shape: LayerShape, kept: Sequence[int]) -> None:
    """Refuses (ValueError) a set of experts with which a layer's sliced router cannot work."""
    if len(kept) < shape.min_kept:
        raise ValueError(
            f"layer {index} keeps {len(kept)} experts, but its router needs at least {shape.min_kept} "
            f"(it selects {shape.top_k} per token); lower the sparsity"
        )
    if shape.n_group > 1 and len(kept) < shape.num_experts:
        size = shape.num_experts // shape.n_group
        per_group = [sum(1 for expert in kept if expert // size == group) for group in range(shape.n_group)]
        if len(set(per_group)) != 1:
            raise ValueError(
                f"layer {index}: its router chooses among {shape.n_group} groups, which must keep equally many "
                f"experts, but the plan keeps {per_group}"
            )


def _check_down(layer: MoeLayer, down: Tensor) -> None:
    """Refuses (ValueError) a repair's weights that are not laid out as a layer's own."""
    own = getattr(layer.experts, DOWN, None)
    if own is None or own.ndim != 3 or own.shape[1:] != down.shape[1:]:
        raise ValueError(
            f"layer {layer.index}: the plan's new down projections are {tuple(down.shape[1:])}, those of "
            f"{type(layer.experts).__name__} {'unknown' if own is None else tuple(own.shape[1:])}; repair this model's "
            "own plan"
        )


def _check_map(layer: MoeLayer, shape: LayerShape, merge: Merge, map_router: MapRouter) -> None:
    """Refuses (ValueError) a map that a layer's router cannot be given."""
    assert merge.router is not None
    count = len(merge.experts)
    if not bool((merge.router != 0).any(1).all()):
        raise ValueError(f"layer {layer.index}: each row of the router's map must refer to some expert")
    if count < shape.top_k:
        raise ValueError(f"layer {layer.index}: {count} merged experts, but its router selects {shape.top_k} per token")
    check_mappable(layer, shape, map_router)


def check_mappable(layer: MoeLayer, shape: LayerShape, map_router: MapRouter = mapped_layer) -> None:
    """Refuses (ValueError) a layer whose router cannot map its scores.

    Args:
        layer: of a model.
        shape: its shape under the plan.
        map_router: see `check_plan`.
    """
    if shape.n_group > 1 or layer.trailing:
        raise ValueError(f"layer {layer.index}: a router of groups, or of more than experts, cannot be mapped")
    if map_router(layer).spec is None:
        raise ValueError(
            f"layer {layer.index}: the formula of {type(layer.router).__name__} is not known, so it cannot be mapped"
        )


def check_active(active: int | None, layers: Mapping[int, MoeLayer]) -> None:
    """Refuses (ValueError) a number of experts per token that the routers of these layers cannot select."""
    for index, layer in layers.items():
        if active is not None and not layer.fewest_active <= active <= layer.shape.top_k:
            raise ValueError(
                f"layer {index}: {active} experts active per token; its router selects {layer.shape.top_k} and can be "
                f"made to select {layer.fewest_active} or more"
            )
