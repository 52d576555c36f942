"""Intervals of means: a percentile bootstrap over sequences or examples.

The unit that is drawn is the sequence, because tokens of one sequence depend on each other. Two plans are compared on
the same draws (paired), so that what is hard for both drops out of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.files import finite_or_none, nan_if_none

DRAWS = 2000
PERCENTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval.

    Attributes:
        value: as measured.
        low: 2.5th percentile of the draws; NaN where it is not known, as for a single sequence.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether all of the interval lies above 0."""
        return self.low > 0

    def as_json(self) -> dict[str, float | None]:
        """Returns the three numbers, None for those that are not finite."""
        return {name: finite_or_none(number) for name, number in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Interval:
        """Reads what `as_json` returned."""
        return cls(*(nan_if_none(content[name]) for name in ("value", "low", "high")))


def resamples(
    count: int, *, groups: Sequence[Sequence[int]] | None = None, draws: int = DRAWS, seed: int = 0
) -> Tensor:
    """Draws with replacement, as many as there are: how often each of N is in each draw, float64 [draws, N].

    Args:
        count: sequences, N.
        groups: numbers of the sequences of each group; a group's are drawn among themselves. None: one group.
        draws: how often.
        seed: same seed, same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    times = torch.zeros(draws, count, dtype=torch.float64)
    for group in [range(count)] if groups is None else groups:
        members = torch.tensor(list(group))
        chosen = members[torch.randint(len(members), (draws, len(members)), generator=generator)]
        times.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))
    return times


def bootstrap(
    statistic: Callable[[Tensor], Tensor],
    count: int,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Returns the interval of any statistic of N sequences.

    Args:
        statistic: how often each sequence counts, float64 [D, N] -> the statistic [D]; NaN where it is not defined.
        count: see `resamples`, as the others.
    """
    value = float(statistic(torch.ones(1, count, dtype=torch.float64))[0])
    if count < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    drawn = statistic(resamples(count, groups=groups, draws=draws, seed=seed))
    low, high = torch.nanquantile(drawn, torch.tensor(PERCENTILES, dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def bootstrap_interval(sums: Tensor, weights: Tensor | None = None, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Returns the interval of a token-weighted mean, sum(sums) / sum(weights).

    For an accuracy: one value in {0, 1} an example, without weights. For a perplexity: of the negative log-likelihood,
    and exp of the three numbers.

    Args:
        sums: [N], over each sequence's positions.
        weights: [N], each sequence's positions; None: 1.
        draws: see `resamples`.
        seed: see `resamples`.
    """
    sums = torch.as_tensor(sums, dtype=torch.float64)
    weights = torch.ones_like(sums) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    return bootstrap(lambda times: (times @ sums) / (times @ weights), len(sums), draws=draws, seed=seed)


def paired_gain(
    sums: Tensor, baseline: Tensor, weights: Tensor | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Returns the interval of how much larger a mean is than a baseline's on the same sequences.

    Args:
        sums: [N], see `bootstrap_interval`.
        baseline: [N], the baseline's.
        weights: [N], the positions behind both.
        draws: see `resamples`.
        seed: see `resamples`.
    """
    gains = torch.as_tensor(sums, dtype=torch.float64) - torch.as_tensor(baseline, dtype=torch.float64)
    return bootstrap_interval(gains, weights, draws=draws, seed=seed)
