"""Decides how many experts each layer loses by one threshold of scores for the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from moeprune_ext.allocation.budget import Budget, in_units
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores

NORMALIZATIONS = ("none", "mean", "max", "zscore")


def global_plan(
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: Budget,
    *,
    normalize: str = "none",
    top_k: int = 1,
    n_group: int = 1,
) -> PruningPlan:
    """Makes the plan that removes the budget's lowest-scoring experts, whatever layers they stand in. Runs no model.

    The budget is the uniform plan's. Every layer keeps what its router needs and is within the scores'
    limits. A unit of several experts (one of each router group, or a step) has their mean score. Of equal scores the
    layer that has lost fewer goes first, then the earlier one, so layers with equal normalised scores get the uniform
    plan's counts (both our choice). A threshold can well be worse than the uniform plan.

    Args:
        scores: ExpertScores or {decoder layer: [E]}, higher = keep.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.
        normalize: what makes scores of different layers comparable.
            "none": scores as they are (default, our choice: of these the best on the embedded model in three of
            bench/allocations.py's four settings).
            "mean", "max": divided by the mean or the largest magnitude of the layer's scores, so that the scale of its
            activations drops out; all zeros stay so.
            "zscore": less the mean, divided by the standard deviation, as FLAP does (arXiv 2312.11983); equal scores
            become zeros.
        top_k: experts selected per token, where `scores` is a plain mapping.
        n_group: groups of the router, where `scores` is a plain mapping.

    Raises:
        ValueError: for an unknown normalisation or a sparsity that cannot be.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalisation {normalize!r}; choose from {', '.join(NORMALIZATIONS)}")
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    units = in_units(scores, sparsity)
    candidates = []
    for layer, capacity in units.capacities.items():
        choice = scores.pruning_order(layer)[units.least[layer] : units.pruned(layer, capacity)]
        values = _normalized(scores[layer].double(), normalize)[choice].view(-1, units.unit).mean(1)
        # In the pruning order scores ascend; the running maximum repairs what rounding broke.
        ascending = values.cummax(0).values.tolist()
        candidates += [(value, place, layer) for place, value in enumerate(ascending)]
    leaving = Counter(layer for _, _, layer in sorted(candidates)[: units.budget])
    return PruningPlan.from_pruned_counts(scores, {layer: units.pruned(layer, leaving[layer]) for layer in scores})


def _normalized(values: Tensor, normalize: str) -> Tensor:
    if normalize == "none":
        return values
    if normalize == "zscore":
        values = values - values.mean()
        scale = values.square().mean().sqrt()
    else:
        scale = values.abs().mean() if normalize == "mean" else values.abs().max()
    return values / scale if scale > 0 else torch.zeros_like(values)
