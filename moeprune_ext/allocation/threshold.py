"""One threshold of scores for the whole model decides how many experts each layer loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from moeprune_ext.allocation.budget import in_units
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores

NORMALIZATIONS = ("none", "mean", "max", "zscore")


# ---- a global threshold


def global_plan(
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: float,
    *,
    normalize: str = "none",
    top_k: int = 1,
    n_group: int = 1,
) -> PruningPlan:
    """The plan that removes the budget's lowest-scoring experts wherever they stand, within every layer's capacity.

    normalize: what makes scores of different layers comparable. "none" (default, our choice: of these the best on the
    embedded model in three of bench/allocations.py's four settings) takes them as they are; "mean" and "max" divide by
    the mean or the largest magnitude of the layer's scores, so that the scale of its activations drops out; "zscore"
    subtracts the mean and divides by the standard deviation, as FLAP does (arXiv 2312.11983). A layer of equal scores
    becomes all zeros under "zscore"; one of zeros stays so. A threshold can well be worse than the uniform plan.
    A unit of several experts has their mean (our choice). Ties: the layer that has lost fewer, then the earlier one
    (our choice), so layers with equal normalised scores end up with the uniform plan's counts.

    top_k and n_group describe the router when `scores` is a plain {layer: [E]} mapping; ExpertScores know their own.
    Raises ValueError for an unknown normalisation or a sparsity that cannot be. No model is run.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"unknown normalisation {normalize!r}; choose from {', '.join(NORMALIZATIONS)}")
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    unit, capacities, budget = in_units(scores, sparsity)
    candidates = []
    for layer, capacity in capacities.items():
        values = _normalized(scores[layer].double(), normalize)[scores.pruning_order(layer)].view(-1, unit).mean(1)
        # They ascend; the maximum so far says so even where rounding would not.
        ascending = values[:capacity].cummax(0).values.tolist()
        candidates += [(value, place, layer) for place, value in enumerate(ascending)]
    leaving = Counter(layer for _, _, layer in sorted(candidates)[:budget])
    return PruningPlan.from_pruned_counts(scores, {layer: units * unit for layer, units in leaving.items()})


def _normalized(values: Tensor, normalize: str) -> Tensor:
    if normalize == "none":
        return values
    if normalize == "zscore":
        values = values - values.mean()
        scale = values.square().mean().sqrt()
    else:
        scale = values.abs().mean() if normalize == "mean" else values.abs().max()
    return values / scale if scale > 0 else torch.zeros_like(values)
