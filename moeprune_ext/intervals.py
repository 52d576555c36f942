"""95 % intervals and standard errors: of means by a percentile bootstrap, of shares by Wilson's formula.

The bootstrap draws sequences, because tokens of one sequence depend on each other. Two plans are compared on the same
draws (paired), so that what is hard for both drops out of their difference. Accuracies take Wilson's interval instead:
where no example or every example is right, all draws are equal, and a bootstrap's interval would have width 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.files import finite_or_none, nan_if_none

DRAWS = 2000
PERCENTILES = (0.025, 0.975)
LEAST_IN_GROUP = 4


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval. `f"{interval:.1%}"` is "63.3% (57.8 to 68.9)".

    Attributes:
        value: as measured.
        low: 2.5th percentile of the draws; NaN where it is not known, as for a single sequence.
        high: 97.5th percentile.
        standard_error: standard deviation of the draws, of a share the binomial one; NaN where it is not known.
    """

    value: float
    low: float
    high: float
    standard_error: float = math.nan

    def __format__(self, form: str) -> str:
        """Writes the value with its interval, or alone where no interval is known; `form`: of each number."""
        if not form:
            return str(self)
        value, low, high = (format(number, form) for number in (self.value, self.low, self.high))
        if math.isnan(self.low) or math.isnan(self.high):
            return value
        return f"{value} ({low.removesuffix('%')} to {high.removesuffix('%')})"

    @property
    def above_zero(self) -> bool:
        """Whether all of the interval lies above 0."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether all of the interval lies below 0."""
        return self.high < 0

    def as_json(self) -> dict[str, float | None]:
        """Returns the numbers, None for those that are not finite."""
        return {name: finite_or_none(number) for name, number in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Interval:
        """Reads what `as_json` returned."""
        numbers = [content[name] for name in ("value", "low", "high")]
        return cls(*map(nan_if_none, [*numbers, content.get("standard_error")]))  # which earlier versions did not write


def resamples(
    count: int, *, groups: Sequence[Sequence[int]] | None = None, draws: int = DRAWS, seed: int = 0
) -> Tensor:
    """Draws with replacement, as many as there are: how often each of N is in each draw, float64 [draws, N].

    Args:
        count: sequences, N.
        groups: numbers of the sequences of each group; a group's are drawn among themselves, those of all groups
            smaller than LEAST_IN_GROUP together, because so few show no spread. None: one group.
        draws: how often.
        seed: same seed, same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    times = torch.zeros(draws, count, dtype=torch.float64)
    parts = [range(count)] if groups is None else [group for group in groups if len(group) >= LEAST_IN_GROUP]
    if groups is not None and (rest := [i for group in groups if len(group) < LEAST_IN_GROUP for i in group]):
        parts = [*parts, rest]
    for group in parts:
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
    return Interval(value, low, high, float(drawn[~drawn.isnan()].std()))


def bootstrap_interval(
    sums: Tensor,
    weights: Tensor | None = None,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Returns the interval of a token-weighted mean, sum(sums) / sum(weights).

    For a difference of accuracies: one value in {-1, 0, 1} an example, without weights.

    Args:
        sums: [N], over each sequence's positions.
        weights: [N], each sequence's positions; None: 1.
        groups: see `resamples`; of text whose share of each domain was chosen, the domains.
        draws: see `resamples`.
        seed: see `resamples`.
    """
    sums = torch.as_tensor(sums, dtype=torch.float64)
    weights = torch.ones_like(sums) if weights is None else torch.as_tensor(weights, dtype=torch.float64)

    def mean(times: Tensor) -> Tensor:
        return (times @ sums) / (times @ weights)

    return bootstrap(mean, len(sums), groups=groups, draws=draws, seed=seed)


def exp_interval(
    sums: Tensor,
    weights: Tensor,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Returns the interval of exp(sum(sums) / sum(weights)), such as a perplexity or a ratio of two.

    Args:
        sums: [N], over each sequence's positions: of the negative log-likelihood, or of a difference of two.
        weights: [N], each sequence's positions.
        groups: see `bootstrap_interval`.
        draws: see `resamples`.
        seed: see `resamples`.
    """
    sums, weights = (torch.as_tensor(tensor, dtype=torch.float64) for tensor in (sums, weights))

    def exp_mean(times: Tensor) -> Tensor:
        return torch.exp((times @ sums) / (times @ weights))

    return bootstrap(exp_mean, len(sums), groups=groups, draws=draws, seed=seed)


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


def wilson(right: int, count: int) -> Interval:
    """Returns a share with Wilson's 95 % interval, which is of use for 0 and for all of them, too.

    The standard error is the binomial one, sqrt(share (1 - share) / count).

    Args:
        right: examples answered right.
        count: examples.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} of {count} is no share; expected 0 to {count} of at least 1")
    share, z2 = right / count, 1.959963984540054**2
    centre, spread = share + z2 / (2 * count), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    low, high = ((centre + sign * spread) / (1 + z2 / count) for sign in (-1, 1))
    low, high = min(share, max(0.0, low)), max(share, min(1.0, high))  # rounding does not put the share outside
    return Interval(share, low, high, math.sqrt(share * (1 - share) / count))


def shares_right(accuracy: Mapping[str, float], examples: Mapping[str, int]) -> dict[str, Interval]:
    """Returns Wilson's intervals of measured accuracies, {split: interval}; NaN for an accuracy that is not finite.

    Args:
        accuracy: {split: share of its examples answered right}.
        examples: {split: how many it has}.
    """
    return {
        split: wilson(round(share * examples[split]), examples[split])
        if math.isfinite(share)
        else Interval(share, math.nan, math.nan)
        for split, share in accuracy.items()
    }
