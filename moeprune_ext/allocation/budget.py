"""The budget that every allocation spends, and the plan that spends it evenly.

A budget is a sparsity, or the number of experts that stay. All methods of a budget remove equally many experts in all:
as many as the most even plan, within the limits that the scores carry (`ExpertScores.constrained`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape


@dataclass(frozen=True)
class Kept:
    """A budget by the number of experts that stay; it may stand wherever a sparsity may.

    Attributes:
        experts: experts kept in all MoE layers together.
    """

    experts: int

    def __str__(self) -> str:
        return f"{self.experts} experts kept"


Budget = float | Kept  # a sparsity, the share of the experts to remove in [0, 1), or the experts that stay


@dataclass(frozen=True)
class Units:
    """A budget in units, which layers can exchange.

    Attributes:
        unit: experts of a unit: one, or more where a router's groups must stay equal or multiples must be kept.
        least: {decoder layer: experts that it loses in every plan}.
        capacities: {decoder layer: units that it can lose beyond these}.
        budget: units that must go in all beyond these.
    """

    unit: int
    least: dict[int, int]
    capacities: dict[int, int]
    budget: int

    def pruned(self, layer: int, units: int) -> int:
        """Returns the experts that a layer loses with so many units."""
        return self.least[layer] + units * self.unit


def uniform_counts(scores: ExpertScores, sparsity: Budget) -> dict[int, int]:
    """Returns how many experts each layer loses in the most even plan; their sum is the budget of every allocation.

    At a sparsity, a layer keeps the multiple of its unit that is nearest to its share, of two the lower; a unit is
    n_group experts, or what `constrained` asks for. With `Kept`, each layer loses its share by largest remainder, of
    equals the earlier layer more; so it does at a sparsity that leaves some layer more than it may keep. A layer whose
    experts are looked up by token loses none and adds nothing to a sparsity's budget (all our choice).

    Args:
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.

    Returns:
        {decoder layer: experts to prune}; at a sparsity a single layer may be asked for more than it can give.

    Raises:
        ValueError: for a sparsity outside [0, 1), or a sum that all layers together cannot lose, with the nearest that
            they can.
    """
    if isinstance(sparsity, Kept):
        return _most_even(scores, _experts_to_prune(scores, sparsity.experts))
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of experts to remove, at least 0 and below 1; got {sparsity}")
    counts = _nearest_counts(scores, sparsity)
    total, least = sum(counts.values()), sum(shape.least_pruned for shape in scores.shapes.values())
    prunable = [shape for shape in scores.shapes.values() if shape.prunable]
    capacity, experts = (sum(getattr(shape, name) for shape in prunable) for name in ("capacity", "num_experts"))

    def nearest(bound: int, direction: int) -> float:
        share = math.floor(direction * bound / experts * 1e4) * direction
        while (sum(_nearest_counts(scores, share / 1e4).values()) - bound) * direction > 0 and 0 < share < 9999:
            share -= direction  # rounding in every layer can add up
        return share / 1e4

    if total > capacity:
        raise ValueError(
            f"sparsity {sparsity} asks for {total} of {experts} experts, but at most {capacity} can go: the routers "
            f"select {scores.top_k} per token and need as many left, or more were asked to stay; use a sparsity of at "
            f"most {nearest(capacity, 1):g}"
        )
    if total < least:
        raise ValueError(
            f"sparsity {sparsity} asks for {total} of {experts} experts, but at least {least} must go, because fewer "
            f"were asked to stay in a layer; use a sparsity of at least {nearest(least, -1):g}"
        )
    if any(counts[layer] < shape.least_pruned for layer, shape in scores.shapes.items()):
        return _most_even(scores, total)
    return counts


def _nearest_counts(scores: ExpertScores, sparsity: float) -> dict[int, int]:
    """Returns {decoder layer: experts to prune}, each layer's share rounded so that a multiple of its unit stays."""
    counts = {}
    for layer, shape in scores.shapes.items():
        rest = shape.num_experts % shape.unit  # that must go for a multiple to stay
        # The tiny addition lifts products that end in a half in decimals and fall below it in binary, such as
        # 0.145 * 100 = 14.499999999999998.
        units = math.floor((sparsity * shape.num_experts - rest) / shape.unit + 0.5 + 1e-9)
        counts[layer] = rest + max(units, 0) * shape.unit if shape.prunable else 0
    return counts


def _experts_to_prune(scores: ExpertScores, kept: int) -> int:
    """Returns how many experts go where `kept` stay; raises ValueError, with the nearest possible, if that cannot be"""
    shapes, unit = scores.shapes.values(), _common_unit(scores)
    fewest, most = (sum(getattr(shape, name) for shape in shapes) for name in ("least_kept", "most_kept"))
    if fewest <= kept <= most and (most - kept) % unit == 0:
        return sum(shape.num_experts for shape in shapes) - kept
    if kept > most:
        nearest = f"at most {most} can stay"
    elif kept < fewest:
        nearest = f"at least {fewest} must stay, because routers need them or they were asked to"
    else:
        below = kept - (kept - most) % unit
        nearest = f"{below} or {below + unit} can"
    multiples = f" in multiples of {unit} a layer" if unit > 1 else ""
    raise ValueError(f"{kept} experts cannot be kept in all{multiples}: {nearest}")


def _most_even(scores: ExpertScores, total: int) -> dict[int, int]:
    """Returns {decoder layer: experts to prune} of a sum that can be, by largest remainder within the limits."""
    unit = _common_unit(scores)
    prunable = {layer: shape for layer, shape in scores.shapes.items() if shape.prunable}
    experts = sum(shape.num_experts for shape in prunable.values())
    counts = {layer: shape.least_pruned for layer, shape in scores.shapes.items()}
    # A unit goes next where most of a layer's share, total * E / experts, is left; in integers, so that equals are.
    units = sorted(
        (pruned * experts - total * shape.num_experts, layer)
        for layer, shape in prunable.items()
        for pruned in range(shape.least_pruned, shape.capacity, unit)
    )
    for _, layer in units[: (total - sum(counts.values())) // unit]:
        counts[layer] += unit
    return counts


def uniform_plan(
    scores: ExpertScores | Mapping[int, Tensor], sparsity: Budget, *, top_k: int = 1, n_group: int = 1
) -> PruningPlan:
    """Makes the plan that removes the same share of every layer's experts, lowest scores first.

    Args:
        scores: ExpertScores or {decoder layer: [E]}, higher = keep.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`; rounded as in `uniform_counts`.
        top_k: experts selected per token, where `scores` is a plain mapping.
        n_group: groups of the router, where `scores` is a plain mapping.

    Raises:
        ValueError: for a budget that cannot be spent, or a sparsity that a layer cannot lose.
    """
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    return PruningPlan.from_pruned_counts(scores, uniform_counts(scores, sparsity))


def _common_unit(scores: ExpertScores) -> int:
    """Returns the unit that layers can exchange; raises ValueError where they have different ones."""
    if len({shape.unit for shape in scores.shapes.values()}) != 1:
        groups = sorted({shape.n_group for shape in scores.shapes.values()})
        raise ValueError(f"layers with different numbers of router groups ({groups}) cannot exchange experts")
    return next(iter(scores.shapes.values())).unit


def in_units(scores: ExpertScores, sparsity: Budget) -> Units:
    """Returns a budget in units.

    Args:
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.

    Raises:
        ValueError: for layers with different units, and as `uniform_counts`.
    """
    unit = _common_unit(scores)
    least = {layer: scores.shapes[layer].least_pruned for layer in scores}
    capacities = {layer: (scores.shapes[layer].capacity - fewest) // unit for layer, fewest in least.items()}
    budget = sum(uniform_counts(scores, sparsity).values()) - sum(least.values())
    return Units(unit, least, capacities, budget // unit)


def counts_of(plan: PruningPlan, scores: ExpertScores, sparsity: Budget, name: str = "the plan") -> tuple[int, ...]:
    """Returns the units that each scored layer loses in a plan.

    Args:
        plan: an allocation of the budget.
        scores: of all layers.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.
        name: of the plan, for messages.

    Raises:
        ValueError: for a plan of another model, of other layers or experts, or of another budget.
    """
    check_same_model(plan.model, scores, f"{name} was made for")
    experts = {layer: scores.shapes[layer].num_experts for layer in scores}
    if plan.num_experts != experts:
        raise ValueError(f"{name} is for layers with {plan.num_experts} experts, the scores for {experts}")
    units, pruned = in_units(scores, sparsity), plan.pruned_counts
    if sum(pruned.values()) != (total := sum(units.least.values()) + units.budget * units.unit):
        at = f"with {sparsity}" if isinstance(sparsity, Kept) else f"at sparsity {sparsity}"
        raise ValueError(f"{name} prunes {sum(pruned.values())} experts; {at} {total} must go")
    counts = []
    for layer, capacity in units.capacities.items():
        count, rest = divmod(pruned[layer] - units.least[layer], units.unit)
        if rest or not 0 <= count <= capacity:
            beyond = f" beyond {units.least[layer]}" if units.least[layer] else ""
            raise ValueError(
                f"{name} prunes {pruned[layer]} experts of layer {layer}, which can lose multiples of {units.unit} up "
                f"to {capacity * units.unit}{beyond}"
            )
        counts.append(count)
    return tuple(counts)


def unscored(shapes: Mapping[int, LayerShape]) -> ExpertScores:
    """Returns scores that are all zero, for counts that only the layers' shapes decide."""
    zeros = {layer: torch.zeros(shape.num_experts, dtype=torch.float64) for layer, shape in shapes.items()}
    return ExpertScores(zeros, dict(shapes))


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
