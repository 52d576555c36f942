"""Racing: candidates that are clearly behind are dropped after a few sequences.

All candidates of a generation are scored on the same sequences, in one seeded order, in rounds of doubling length. Each
candidate is paired with an elite, whose score on all N sequences is known. Its estimate is that elite's mean plus the
mean difference between the two on the n sequences scored so far. After a round a candidate is dropped when its estimate
lies below the worst elite's mean by more than

    t * s / (w sqrt(n)) * sqrt(1 - n / N),

where s is the standard deviation of the sequences' differences about their common mean, w the mean number of positions
in a sequence, and t Student's quantile with n - 1 degrees of freedom. The elite of the pair is the one that makes s
smallest. The unit is the sequence, because tokens of one sequence depend on each other. The last factor is there
because the n sequences are drawn without replacement from the N of the full score. The level is divided over the
rounds. These are our choices; bench/results has how often a drop was wrong.

The elites are the survivors of the generation before. Where there are none, the candidates are paired with the best so
far on the sequences scored. Candidates that are not dropped, and so every later elite, are scored on all sequences.
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
    """The outcome of a generation's race.

    Attributes:
        sums: float64 [C, N], NaN where a candidate was not scored.
        seen: [C], sequences each candidate was scored on; N for those that stayed.
        broken: [C], whether a score was NaN.
        spent: positions scored, over all candidates.
    """

    sums: Tensor
    seen: list[int]
    broken: list[bool]
    spent: int


def rounds(sequences: int) -> list[int]:
    """Returns how many sequences have been scored after each round, doubling up to all of them."""
    ends = [max(FIRST_ROUND, sequences // 16)]
    while ends[-1] < sequences:
        ends.append(2 * ends[-1])
    return [*ends[:-1], sequences]


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

    Args:
        score: (candidates, sequences) -> float64 [c, n], each candidate's sum over each sequence; larger is better, NaN
            for a candidate that cannot be scored.
        candidates: how many there are, C.
        weights: positions in each of the N sequences.
        elite_sums: float64 [e, N] without NaN, of the current elites; None where there are none yet.
        elites: plans that survive the generation.
        level: chance of dropping a candidate that is no worse than the worst elite, over all rounds.
        seed: decides the order of the sequences.
    """
    total = len(weights)
    order = random.Random(f"{seed}:racing").sample(range(total), total)
    positions = torch.tensor(weights, dtype=torch.float64)
    ends = rounds(total)
    sums = torch.full((candidates, total), math.nan, dtype=torch.float64)
    seen, broken, spent = [0] * candidates, [False] * candidates, 0
    running = list(range(candidates))
    for before, now in zip([0, *ends], ends, strict=False):
        if not running:
            break
        sequences = sorted(order[before:now])
        scores = score(running, sequences)
        sums[torch.tensor(running)[:, None], torch.tensor(sequences)] = scores
        spent += len(running) * int(positions[sequences].sum())
        for candidate, row in zip(running, scores, strict=True):
            seen[candidate] = now
            broken[candidate] |= bool(row.isnan().any())
        if now == total:
            break
        scored = torch.tensor(order[:now])
        running_sums, round_level = sums[running][:, scored], level / (len(ends) - 1)
        # The first process decides for all, since unlike machines may round differently.
        stays = from_first(lambda: _stays(running_sums, positions, elite_sums, scored, elites, round_level))  # noqa: B023
        running = [candidate for candidate, stay in zip(running, stays, strict=True) if stay]
    return Race(sums, seen, broken, spent)


def _stays(
    sums: Tensor, weights: Tensor, elite_sums: Tensor | None, scored: Tensor, elites: int, level: float
) -> list[bool]:
    """Decides which candidates go on after a round.

    Args:
        sums: float64 [c, n], the running candidates' sums over the sequences scored so far.
        weights: float64 [N], positions in each sequence.
        elite_sums: float64 [e, N], or None where there are no elites yet.
        scored: int64 [n], the sequences scored so far.
        elites: plans that survive the generation.
        level: chance of a wrong drop in this round.
    """
    n, total = len(scored), len(weights)
    positions = weights[scored]
    if not bool(positions.sum() > 0):
        return [True] * len(sums)  # these sequences have no position to score
    if elite_sums is not None:
        means = elite_sums.sum(1) / weights.sum()
        partners, ahead = elite_sums[:, scored], means - means.min()  # of the worst elite
    else:
        ranked = sums.sum(1).nan_to_num(-math.inf).sort(descending=True, stable=True).indices
        partners = sums[ranked[min(elites, len(ranked)) - 1]][None]
        ahead = torch.zeros(1, dtype=torch.float64)
        if not bool(partners.isfinite().all()):  # fewer candidates have scores than elites are wanted
            return (~sums.isnan().any(1)).tolist()
    differences = sums[:, None] - partners  # [c, e, n]
    mean = differences.sum(-1) / positions.sum()
    residuals = differences - mean[..., None] * positions
    deviation = (residuals.square().sum(-1) / (n - 1)).sqrt() / positions.mean()
    closest = deviation.argmin(1, keepdim=True)
    estimate = (mean + ahead).gather(1, closest)[:, 0]
    spread = deviation.gather(1, closest)[:, 0] * math.sqrt((1 - n / total) / n)
    return (estimate >= -student_quantile(1 - level, n - 1) * spread).tolist()  # False for NaN


def student_quantile(probability: float, freedom: int) -> float:
    """Returns the t with P(T <= t) = probability for Student's distribution with so many degrees of freedom."""
    from scipy.special import stdtrit  # takes 0.2 s, which only a race needs

    return float(stdtrit(freedom, probability))
