"""Racing: candidates that are clearly behind are dropped after a few sequences.

All candidates of a generation are scored on the same sequences, in one seeded order, in rounds of doubling length. The
elites' scores are known on all N sequences, and a candidate resembles one of them closely: its estimate is that elite's
mean plus the mean paired difference to it on the n sequences seen. After a round a candidate is dropped when its
estimate lies below the worst elite's mean by more than

    t * s / (w sqrt(n)) * sqrt(1 - n / N),

s the standard deviation of the sequences' differences about their common mean, w the mean number of positions in a
sequence, t Student's quantile with n - 1 degrees of freedom; the elite it is paired with is the one that makes s
smallest. The sequence is the unit, because tokens of one sequence depend on each other; sampling is without replacement
from the N that the full score is made of, hence the last factor; the level is divided over the rounds (our choices; how
often a drop was wrong is measured in bench/results).

The elites are the survivors of the generation before; where there are none, the candidates are paired with the best so
far on the sequences seen. Whoever is not dropped, so every elite to be, is scored on all sequences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune_ext.distributed import from_first

FIRST_ROUND = 4  # sequences: fewer leave Student's t hardly any power


@dataclass(frozen=True)
class Race:
    """How a generation's race went.

    sums: float64 [C, N], NaN where a candidate was not scored. seen: sequences scored, [C]; N for those that stayed.
    broken: [C], whether a score was NaN. spent: positions scored, over all candidates.
    """

    sums: Tensor
    seen: list[int]
    broken: list[bool]
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
    candidate that cannot be scored. weights: positions in each of the N sequences. elite_sums: float64 [e, N], of the
    elites that stand, without NaN; None: there are none yet. level: chance of dropping a candidate that is no worse
    than the worst elite, over all rounds.
    """
    total = len(weights)
    order = random.Random(f"{seed}:racing").sample(range(total), total)
    positions = torch.tensor(weights, dtype=torch.float64)
    plan = rounds(total)
    sums = torch.full((candidates, total), math.nan, dtype=torch.float64)
    seen, broken, spent = [0] * candidates, [False] * candidates, 0
    running = list(range(candidates))
    for before, now in zip([0, *plan], plan, strict=False):
        if not running:
            break
        fresh = sorted(order[before:now])
        scores = score(running, fresh)
        sums[torch.tensor(running)[:, None], torch.tensor(fresh)] = scores
        spent += len(running) * int(positions[fresh].sum())
        for candidate, row in zip(running, scores, strict=True):
            seen[candidate] = now
            broken[candidate] |= bool(row.isnan().any())
        if now == total:
            break
        looked_at = torch.tensor(order[:now])
        share = level / (len(plan) - 1)
        standing = sums[running][:, looked_at]
        # The first process decides for all, should they compute on unlike machines.
        keeps = from_first(lambda: _keeps(standing, positions, elite_sums, looked_at, elites, share))  # noqa: B023
        running = [candidate for candidate, kept in zip(running, keeps, strict=True) if kept]
    return Race(sums, seen, broken, spent)


def _keeps(
    sums: Tensor, weights: Tensor, elite_sums: Tensor | None, seen: Tensor, elites: int, level: float
) -> list[bool]:
    """Which candidates go on. sums: [c, n], on the sequences `seen` [n]; weights: [N]; elite_sums: [e, N]."""
    n, total = len(seen), len(weights)
    here = weights[seen]
    if not bool(here.sum() > 0):
        return [True] * len(sums)  # nothing was to be scored there
    if elite_sums is not None:
        means = elite_sums.sum(1) / weights.sum()
        partners, ahead = elite_sums[:, seen], means - means.min()  # of the worst elite
    else:
        ranked = sums.sum(1).nan_to_num(-math.inf).sort(descending=True, stable=True).indices
        partners = sums[ranked[min(elites, len(ranked)) - 1]][None]
        ahead = torch.zeros(1, dtype=torch.float64)
        if not bool(partners.isfinite().all()):  # fewer candidates have scores than elites are wanted
            return (~sums.isnan().any(1)).tolist()
    differences = sums[:, None] - partners  # [c, e, n]
    mean = differences.sum(-1) / here.sum()
    residuals = differences - mean[..., None] * here
    deviation = (residuals.square().sum(-1) / (n - 1)).sqrt() / here.mean()
    closest = deviation.argmin(1, keepdim=True)
    estimate = (mean + ahead).gather(1, closest)[:, 0]
    spread = deviation.gather(1, closest)[:, 0] * math.sqrt((1 - n / total) / n)
    return (estimate >= -student_quantile(1 - level, n - 1) * spread).tolist()  # a NaN is not


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
