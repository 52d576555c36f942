"""A criterion per layer: which layers of a plan had better lose experts in another criterion's order (our choice).

One layer at a time takes another order, all in one sweep. The layers that gain most are then changed together, the best
one, the best two and so on, in another sweep. The best of these mixes gains on the text that it was chosen on in any
case. So two more are chosen, each on one half of the sequences, and tell by what they gain on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.selection import gain_of
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import objective_value, to_maximise
from moeprune_ext.intervals import Interval

ALL, EVEN, ODD = range(3)  # the sequences that plans are compared on: all, every second one of a domain, the others

Kept = tuple[tuple[int, ...], ...]
Mix = dict[int, tuple[str, list[int]]]  # {decoder layer: (criterion, experts kept)}


@dataclass
class Trials:
    """Plans scored so far, each once.

    Attributes:
        evaluator: of the search's text.
        metric: that plans are compared by.
        objective: "mean" or "worst".
        values: {experts kept in each layer: its scores on ALL, EVEN and ODD}.
        sums: {experts kept in each layer: float64 [N], over each sequence}.
    """

    evaluator: CandidateEvaluator
    metric: str
    objective: str
    values: dict[Kept, list[float]] = field(default_factory=dict)
    sums: dict[Kept, Tensor] = field(default_factory=dict)

    def score(self, plans: Sequence[PruningPlan]) -> None:
        """Scores the plans that are new, all in one sweep."""
        new = {_kept(plan): plan for plan in plans if _kept(plan) not in self.values}
        if not new:
            return
        sums = self.evaluator.sequence_sums(list(new.values()), (self.metric,)).sums[self.metric]
        # The first process decides for all, since unlike machines may round differently.
        values = distributed.from_first(
            lambda: torch.stack([self._on(sums, part) for part in (ALL, EVEN, ODD)], 1).tolist()
        )
        self.values |= zip(new, values, strict=True)
        self.sums |= zip(new, sums, strict=True)

    def _on(self, sums: Tensor, part: int) -> Tensor:
        """Returns what plans are compared by, [C], on a part of the sequences."""
        counted = self.mask(part)
        weights = counted * torch.tensor(self.evaluator.weights(self.metric), dtype=torch.float64)
        domains = {name: its for name, its in self.evaluator.domains.items() if weights[its].sum() > 0}
        if not domains:  # half of a single sequence
            return torch.full((len(sums),), torch.nan, dtype=torch.float64)
        return objective_value(self.metric, self.objective, counted * sums, weights, domains)

    def mask(self, part: int) -> Tensor:
        """Returns float64 [N], 1 for the sequences of a part."""
        counted = torch.zeros(len(self.evaluator.sequences), dtype=torch.float64)
        for numbers in self.evaluator.domains.values():
            counted[{ALL: numbers, EVEN: numbers[::2], ODD: numbers[1::2]}[part]] = 1
        return counted

    def value(self, plan: PruningPlan) -> float:
        """Returns a plan's score."""
        return self.values[_kept(plan)][ALL]

    def rank(self, plan: PruningPlan, part: int = ALL) -> float:
        """Returns a plan's score on a part of the sequences, as something to maximise."""
        return to_maximise(self.metric, self.values[_kept(plan)][part])

    def gain_elsewhere(self, base: PruningPlan, even: PruningPlan, odd: PruningPlan, seed: int) -> Interval:
        """Returns what plans chosen on EVEN and ODD gain over another, each on the half that it was not chosen on."""
        sums = torch.where(self.mask(EVEN) > 0, self.sums[_kept(odd)], self.sums[_kept(even)])
        pair = torch.stack([sums, self.sums[_kept(base)]])
        return distributed.from_first(
            lambda: gain_of(self.evaluator, pair, metric=self.metric, objective=self.objective, seed=seed)
        )


def _kept(plan: PruningPlan) -> Kept:
    return tuple(tuple(ids) for ids in plan.kept.values())


def mixed_plan(base: PruningPlan, mix: Mapping[int, tuple[str, list[int]]]) -> PruningPlan:
    """Returns the plan with the layers of a mix changed."""
    return replace(base, kept={**base.kept, **{layer: kept for layer, (_, kept) in mix.items()}})


def mix_layers(trials: Trials, base: PruningPlan, others: Mapping[str, ExpertScores]) -> list[Mix]:
    """Finds the layers of a plan that had better follow another criterion.

    Args:
        trials: scores plans; `base` has been scored.
        base: the plan; every layer loses as many experts afterwards.
        others: the other criteria, the best first.

    Returns:
        The mix chosen on ALL, on EVEN and on ODD sequences; empty where no single change is for the better.
    """
    changes: dict[tuple[int, tuple[int, ...]], Mix] = {}
    for name, scores in others.items():
        for layer, kept in PruningPlan.from_pruned_counts(scores, base.pruned_counts).kept.items():
            if kept != base.kept[layer]:
                changes.setdefault((layer, tuple(kept)), {layer: (name, kept)})
    single = [(mix, mixed_plan(base, mix)) for mix in changes.values()]
    trials.score([plan for _, plan in single])
    choices = []  # of each part: the best change, the best two layers' and so on
    for part in (ALL, EVEN, ODD):
        gains = [(trials.rank(plan, part) - trials.rank(base, part), mix) for mix, plan in single]
        growing: list[Mix] = [{}]
        for gain, mix in sorted(gains, key=lambda pair: -pair[0]):
            if gain > 0 and not mix.keys() & growing[-1].keys():  # of a layer's changes the one that gains most
                growing.append(growing[-1] | mix)
        choices.append([(mix, mixed_plan(base, mix)) for mix in growing])
    trials.score([plan for growing in choices for _, plan in growing])
    return [
        max(growing, key=lambda pair: trials.rank(pair[1], part))[0]  # noqa: B023
        for part, growing in enumerate(choices)
    ]
