"""Screens a generation's children: a model of the scores so far predicts which are worth scoring (our choice).

What a layer's losses cost hardly depends on the other layers, so the fitness of a plan is nearly a sum of one function
of each layer's count. Such a sum is fitted to the plans scored so far by ridge regression. A layer's function is
piecewise linear: a hinge max(0, n - j) for every count j, so that what is known of a count carries to its neighbours.

Many children are drawn, few are scored: those with the best predictions, and a few as they were drawn so that the model
keeps learning where it is wrong. Nothing is kept between generations, so a screened search resumes as any other. What
it saves: bench/results/screen.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.patterns import Counts

RIDGE = 1e-3  # of the mean squared length of a plan's features
SHARE = 2  # of so many children of a search without screening one is scored
EXPLORED = 4  # of so many scored children one is not chosen by its prediction


def screened(drawn: Sequence[Counts], scored: Mapping[Counts, float], wanted: int) -> list[Counts]:
    """Chooses the children that are worth scoring.

    Args:
        drawn: children, in the order in which they were drawn; repeated and scored ones are passed over.
        scored: {vector met so far: its score on all tokens, larger is better}; NaN (dropped in a race) and infinite
            ones are left out of the fit.
        wanted: children to choose.

    Returns:
        At most `wanted` vectors: a share of 1 / EXPLORED are the first drawn, the others those predicted best.
    """
    new = [child for child in dict.fromkeys(drawn) if child not in scored]
    explored = new[: wanted // EXPLORED]
    rest = new[len(explored) :]
    known = {vector: score for vector, score in scored.items() if math.isfinite(score)}
    if not known or not rest:
        return new[:wanted]

    def ranked() -> list[int]:
        return predicted(known, rest).sort(descending=True, stable=True).indices.tolist()

    # The first process decides for all, since unlike machines may round differently.
    return explored + [rest[i] for i in distributed.from_first(ranked)[: wanted - len(explored)]]


def predicted(scored: Mapping[Counts, float], vectors: Sequence[Counts]) -> Tensor:
    """Predicts scores by ridge regression on the scores so far.

    A plan's weight in the fit is 1 / (1 + d / median d), with d the distance of its score from the best: which of two
    bad plans is worse does not matter, and KL has long tails. FLOPs: n^3 / 3 + 2 n (n + m) F, with n plans scored, m to
    predict and F = layers * most units that a layer loses.

    Args:
        scored: {vector: finite score, larger is better}, at least one.
        vectors: [m] vectors of the same layers.

    Returns:
        float64 [m].
    """
    features = _hinges(torch.tensor([*scored, *vectors], dtype=torch.float64))
    target = torch.tensor(list(scored.values()), dtype=torch.float64)
    n, tiny = len(target), torch.finfo(torch.float64).tiny
    behind = target.max() - target
    weights = 1 / (1 + behind / behind.median().clamp(min=tiny))
    weights /= weights.mean()
    center = (weights * target).mean()
    features -= (weights[:, None] * features[:n]).mean(0)
    basis = weights.sqrt()[:, None] * features[:n]
    gram = basis @ basis.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + tiny)
    residual = weights.sqrt() * (target - center)
    solved = torch.cholesky_solve(residual[:, None], torch.linalg.cholesky(gram))
    return center + (features[n:] @ (basis.T @ solved))[:, 0]


def _hinges(counts: Tensor) -> Tensor:
    """Returns the hinges of every layer: float64 [n, layers] -> [n, layers * most units]."""
    most = max(1, int(counts.max()))
    return (counts[..., None] - torch.arange(most, dtype=torch.float64)).clamp(min=0).flatten(1) / most
