"""The budget that every allocation spends, and the plan that spends it evenly."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape


def uniform_counts(scores: ExpertScores, sparsity: float) -> dict[int, int]:
    """Returns how many experts each layer loses at the same sparsity; their sum is the budget of every allocation.

    A layer loses round_half_up(sparsity * E / n_group) * n_group; one whose experts are looked up by token loses none
    and adds nothing to the budget (both our choice).

    Args:
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1).

    Returns:
        {decoder layer: experts to prune}; a single layer may be asked for more than it can give.

    Raises:
        ValueError: for a sparsity outside [0, 1), or a sum above all layers' capacity.
    """
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of experts to remove, at least 0 and below 1; got {sparsity}")
    counts = {
        # The tiny addition lifts products that end in a half in decimals and fall below it in binary, such as
        # 0.145 * 100 = 14.499999999999998.
        layer: math.floor(sparsity * shape.num_experts / shape.n_group + 0.5 + 1e-9) * shape.n_group
        if shape.prunable
        else 0
        for layer, shape in scores.shapes.items()
    }
    prunable = [shape for shape in scores.shapes.values() if shape.prunable]
    capacity, experts = (sum(getattr(shape, name) for shape in prunable) for name in ("capacity", "num_experts"))
    if sum(counts.values()) > capacity:
        raise ValueError(
            f"sparsity {sparsity} asks for {sum(counts.values())} of {experts} experts, but at most {capacity} can go: "
            f"the routers select {scores.top_k} per token and need as many left, or more were asked to stay; use a "
            f"sparsity of at most {math.floor(capacity / experts * 1e4) / 1e4:g}"
        )
    return counts


def uniform_plan(
    scores: ExpertScores | Mapping[int, Tensor], sparsity: float, *, top_k: int = 1, n_group: int = 1
) -> PruningPlan:
    """Makes the plan that removes the same share of every layer's experts, lowest scores first.

    Args:
        scores: ExpertScores or {decoder layer: [E]}, higher = keep.
        sparsity: share of the experts to remove, in [0, 1); a layer loses it rounded half up to a number of experts.
        top_k: experts selected per token, where `scores` is a plain mapping.
        n_group: groups of the router, where `scores` is a plain mapping.

    Raises:
        ValueError: for a sparsity that a layer cannot lose.
    """
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    return PruningPlan.from_pruned_counts(scores, uniform_counts(scores, sparsity))


def in_units(scores: ExpertScores, sparsity: float) -> tuple[int, dict[int, int], int]:
    """Returns a budget in units: one expert, or n_group experts where a router's groups must stay equal.

    Args:
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1).

    Returns:
        Experts of a unit; {decoder layer: units that it can lose}; units that must go in all.

    Raises:
        ValueError: for layers with different units, and as `uniform_counts`.
    """
    if len(groups := {shape.n_group for shape in scores.shapes.values()}) != 1:
        raise ValueError(f"layers with different numbers of router groups ({sorted(groups)}) cannot exchange experts")
    unit = groups.pop()
    budget = sum(uniform_counts(scores, sparsity).values())
    return unit, {layer: scores.shapes[layer].capacity // unit for layer in scores}, budget // unit


def counts_of(plan: PruningPlan, scores: ExpertScores, sparsity: float, name: str = "the plan") -> tuple[int, ...]:
    """Returns the units that each scored layer loses in a plan.

    Args:
        plan: an allocation of the budget.
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1).
        name: of the plan, for messages.

    Raises:
        ValueError: for a plan of another model, of other layers or experts, or of another budget.
    """
    check_same_model(plan.model, scores, f"{name} was made for")
    experts = {layer: scores.shapes[layer].num_experts for layer in scores}
    if plan.num_experts != experts:
        raise ValueError(f"{name} is for layers with {plan.num_experts} experts, the scores for {experts}")
    unit, capacities, budget = in_units(scores, sparsity)
    pruned = plan.pruned_counts
    if sum(pruned.values()) != budget * unit:
        raise ValueError(
            f"{name} prunes {sum(pruned.values())} experts; at sparsity {sparsity} {budget * unit} must go"
        )
    for layer, capacity in capacities.items():
        if pruned[layer] > capacity * unit or pruned[layer] % unit:
            raise ValueError(
                f"{name} prunes {pruned[layer]} experts of layer {layer}, which can lose multiples of {unit} up to "
                f"{capacity * unit}"
            )
    return tuple(pruned[layer] // unit for layer in capacities)


def order_fingerprint(scores: ExpertScores) -> str:
    """Identifies the pruning orders of all layers, protected experts included."""
    return hashlib.sha256(json.dumps([scores.pruning_order(layer) for layer in scores]).encode()).hexdigest()[:16]


def check_same_model(fingerprint: str | None, scores: ExpertScores, subject: str) -> None:
    """Raises ValueError, "`subject` another model", unless the fingerprint is the scores' or one is unknown."""
    if None not in (fingerprint, scores.model) and fingerprint != scores.model:
        raise ValueError(f"{subject} another model: fingerprint {fingerprint}, the scores' is {scores.model}")


def check_scores(scores: ExpertScores, shapes: Mapping[int, LayerShape], fingerprint: str) -> None:
    """Raises ValueError for scores of another model; they may ask for more experts to be kept than routers need.

    Args:
        scores: what a user gave.
        shapes: of the model, by decoder layer.
        fingerprint: of the model.
    """
    if scores.model is not None and scores.model != fingerprint:
        raise ValueError(
            f"the scores were made for another model: their fingerprint is {scores.model}, the model's is "
            f"{fingerprint}; calibrate and score this model"
        )
    if set(scores) != set(shapes):
        raise ValueError(f"the scores are of layers {sorted(scores)}, the model has {sorted(shapes)}")
    for layer, needed in shapes.items():
        shape = scores.shapes[layer]
        if (shape.num_experts, shape.top_k, shape.n_group) != (needed.num_experts, needed.top_k, needed.n_group):
            raise ValueError(f"layer {layer}: the scores are for {shape}, the model has {needed}")
        if shape.min_kept < needed.min_kept:
            raise ValueError(f"layer {layer}: the scores let {shape.min_kept} stay, the router needs {needed.min_kept}")
