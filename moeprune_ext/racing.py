"""Racing: candidates that are clearly behind are dropped after a few sequences.

All candidates of a generation are scored on the same sequences, in one seeded order, in rounds of doubling length.
After a round a candidate is dropped when its paired difference to the worst current elite is negative beyond

    t * s / (w sqrt(n)) * sqrt(1 - n / N),

n of N sequences seen, s the standard deviation of the sequences' differences about their common mean, w the mean number
of positions in a sequence, t Student's quantile with n - 1 degrees of freedom. The sequence is the unit, because tokens
of one sequence depend on each other; sampling is without replacement from the N that the full score is made of, hence
the last factor; the level is divided over the rounds. The form is our choice.

The current elites are the survivors of the generation before; where there are none, the best so far on the sequences
seen. Whoever is not dropped, so every elite to be, is scored on all sequences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_ROUND = 4  # sequences: fewer leave Student's t hardly any power


@dataclass(frozen=True)
class Race:
    """How a generation's race went.

    sums: float64 [C, N], NaN where a candidate was not scored. seen: sequences scored, [C]; N for those that stayed.
    spent: positions scored, over all candidates.
    """

    sums: Tensor
    seen: list[int]
    spent: int


def rounds(sequences: int) -> list[int]:
    """Sequences seen after each round, doubling up to all of them."""
    found = [max(FIRST_ROUND, sequences // 16)]
    while found[-1] < sequences:
        found.append(2 * found[-1])
    return [*found[:-1], sequences] if len(found) > 1 else [sequences]


def race(
    score: Callable[[list[int], list[int]], Tensor],
    candidates: int,
    weights: Sequence[int],
    elite_sums: Tensor | None,
    *,
    elites: int,
    level: float,
    seed: int,
) -> Race:
    """Scores candidates 0..C-1, dropping those that are clearly worse than the worst current elite.

    score: (candidates, sequences) -> float64 [c, n], each one's sum over each sequence, larger is better, NaN for a
    candidate that cannot be scored. weights: positions in each of the N sequences. elite_sums: float64 [elites, N], of
    the elites that stand; None: there are none yet. level: chance of dropping a candidate that is no worse than the
    elite it is compared with, over all rounds.
    """
    total = len(weights)
    order = random.Random(f"{seed}:racing").sample(range(total), total)
    positions = torch.tensor(weights, dtype=torch.float64)
    plan = rounds(total)
    sums = torch.full((candidates, total), math.nan, dtype=torch.float64)
    seen, spent = [0] * candidates, 0
    running = list(range(candidates))
    for before, now in zip([0, *plan], plan, strict=False):
        fresh = sorted(order[before:now])
        sums[torch.tensor(running)[:, None], torch.tensor(fresh)] = score(running, fresh)
        spent += len(running) * int(positions[fresh].sum())
        for candidate in running:
            seen[candidate] = now
        if now == total:
            break
        looked_at = torch.tensor(order[:now])
        standing = sums[running][:, looked_at]
        running = [
            candidate
            for candidate, kept in zip(
                running,
                _keeps(
                    standing,
                    positions[looked_at],
                    None if elite_sums is None else elite_sums[:, looked_at],
                    elites,
                    level / max(1, len(plan) - 1),
                    1 - now / total,
                ),
                strict=True,
            )
            if kept
        ]
        if not running:
            break
    return Race(sums, seen, spent)


def _keeps(
    sums: Tensor, weights: Tensor, elite_sums: Tensor | None, elites: int, level: float, unseen: float
) -> list[bool]:
    """Which candidates go on after n sequences. sums: [c, n]; weights: [n]; elite_sums: [e, n]; unseen: 1 - n / N."""
    means = sums.sum(1) / weights.sum()
    if elite_sums is not None:
        rival = elite_sums[elite_sums.sum(1).argmin()]
    else:
        ranked = means.nan_to_num(-math.inf).sort(descending=True, stable=True).indices
        rival = sums[ranked[min(elites, len(ranked)) - 1]]
    if bool(rival.isnan().any()):  # no elite to compare with
        return [True] * len(sums) if elite_sums is None else (~means.isnan()).tolist()
    n = len(weights)
    differences = sums - rival
    mean = differences.sum(1) / weights.sum()
    residuals = differences - mean[:, None] * weights
    deviation = (residuals.square().sum(1) / (n - 1)).sqrt() / weights.mean()
    bound = student_quantile(1 - level, n - 1) * deviation * math.sqrt(unseen / n)
    return (mean >= -bound).tolist()  # a NaN is not


def student_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability >= 0.5 of Student's distribution with a whole number of degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan2(t, math.sqrt(freedom))
    square = math.cos(theta) ** 2
    term = math.cos(theta) if freedom % 2 else 1.0
    total = 0.0
    start = 1 if freedom % 2 else 0
    for k in range(start, freedom - 1, 2):
        total += term
        term *= square * (k + 1) / (k + 2)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if freedom % 2 else math.sin(theta) * total
    return 0.5 + inside / 2
