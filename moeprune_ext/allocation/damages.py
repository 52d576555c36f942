"""Measures what each layer's pruning costs alone, and splits a budget over the layers so that the costs' sum is least.

`damages` prunes each layer alone to each count and measures the loss. `dp_plan` finds the best split of a budget; one
measurement serves every sparsity. Losses do not add up (the embedded model lost half to three quarters of the sum), so
the result is a start for a search (evolve's `init_plans`) rather than its replacement.

Source of splitting layers' losses by dynamic programming: SPDY, arXiv 2201.13096. Numbers of experts in the place of
weights, and ESAP in the place of a layer's squared error, are our choice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moeprune_ext.allocation.budget import Budget, check_same_model, check_scores, in_units, order_fingerprint
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import METRICS, to_maximise
from moeprune_ext.files import finite_or_none, reading_json, write_json
from moeprune_ext.progress import View, bar

PLANS_AT_ONCE = 256  # measured in one sweep; more would hide the progress of a large model's hours (our choice)
FORMAT = "moeprune.damages/1"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Damages:
    """What each layer's pruning costs when no other layer is pruned.

    Attributes:
        counts: {decoder layer: numbers of experts pruned, ascending from 0}.
        values: {decoder layer: fitness lost at each of these counts}. 0 at 0; negative where pruning helps; infinite
            (or NaN, which counts as infinite) where the pruned model's logits gave no distribution.
        fitness: the metric. Of metrics where lower is better (KL, nll) the values are the increase.
        criterion: name of the scores, None when unknown.
        model: fingerprint of the model, None when unknown.
        order: fingerprint of the pruning orders, None when unknown.
        data: fingerprint of the data, None when unknown.
    """

    counts: dict[int, list[int]]
    values: dict[int, list[float]]
    fitness: str
    criterion: str | None = None
    model: str | None = None
    order: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if not self.counts or set(self.counts) != set(self.values):
            raise ValueError("damages need `counts` and `values` of the same layers, at least one")
        _check_fitness(self.fitness)
        for layer, counts in self.counts.items():
            if not counts or counts[0] != 0 or any(a >= b for a, b in zip(counts, counts[1:], strict=False)):
                raise ValueError(f"layer {layer}: counts must ascend from 0, got {counts}")
            if len(self.values[layer]) != len(counts) or self.values[layer][0] != 0:
                raise ValueError(
                    f"layer {layer}: expected {len(counts)} damages, the first of them 0, got {self.values[layer]}"
                )

    def at(self, layer: int, counts: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """Returns a layer's damages at some counts, interpolated linearly between the measured ones.

        Args:
            layer: decoder layer.
            counts: numbers of experts pruned.

        Returns:
            float64, one a count; infinite between a count and an infinite neighbour.

        Raises:
            ValueError: for a count beyond the largest measured one.
        """
        wanted = np.asarray(counts)
        measured, values = np.array(self.counts[layer]), np.array(self.values[layer], dtype=np.float64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() <= measured[-1]:
            raise ValueError(
                f"layer {layer}: damages were measured for 0 to {measured[-1]} pruned experts, not for {wanted.max()}; "
                "measure with the scores that the plan is for"
            )
        finite = np.isfinite(values)
        damage: Floats = np.interp(wanted, measured, np.where(finite, values, 0.0))
        damage[np.interp(wanted, measured, ~finite) > 0] = math.inf
        return damage

    def total(self, plan: PruningPlan) -> float:
        """Adds up what each layer's pruning in a plan costs; raises ValueError if its layers or counts are others."""
        if set(plan.kept) != set(self.counts):
            raise ValueError(f"the plan is for layers {sorted(plan.kept)}, the damages for {sorted(self.counts)}")
        return float(sum(self.at(layer, [count])[0] for layer, count in plan.pruned_counts.items()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, beside the target and then renamed; an infinite damage is null."""
        content = {
            "format": FORMAT,
            "fitness": self.fitness,
            "criterion": self.criterion,
            "model": self.model,
            "order": self.order,
            "data": self.data,
            "counts": {str(layer): counts for layer, counts in self.counts.items()},
            "damages": {str(layer): list(map(finite_or_none, values)) for layer, values in self.values.items()},
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Damages:
        """Reads damages; raises ValueError if the file holds none."""
        with reading_json(path, FORMAT, "file of damages") as content:
            counts = {int(layer): [int(n) for n in numbers] for layer, numbers in content["counts"].items()}
            values = {
                int(layer): [math.inf if value is None else float(value) for value in numbers]
                for layer, numbers in content["damages"].items()
            }
            origin = (content.get(name) for name in ("criterion", "model", "order", "data"))
            return cls(counts, values, content["fitness"], *origin)


def _check_fitness(fitness: str) -> None:
    if fitness not in METRICS:
        raise ValueError(f"unknown fitness {fitness!r}; choose from {', '.join(METRICS)}")


def damages(
    evaluator: CandidateEvaluator,
    scores: ExpertScores | Mapping[int, Tensor],
    *,
    fitness: str = "esap",
    steps: int | None = None,
    progress: bool | View = False,
) -> Damages:
    """Prunes each layer alone to each count that it can lose, and measures what that costs.

    Args:
        evaluator: scores the plans, PLANS_AT_ONCE in a sweep.
        scores: whose pruning orders say which experts leave, and whose limits say how many; ExpertScores or
            {decoder layer: [E]}.
        fitness: any of the evaluator's metrics.
        steps: counts measured per layer beside 0, at most, evenly spaced up to the layer's capacity; None: every count.
            48 layers that can lose 120 experts are 5,761 evaluations, 577 with steps=12.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        The damages, for `dp_plan`.

    Raises:
        ValueError: before any evaluation, for an unknown fitness, steps below 1, or scores of another model.
    """
    scores = ExpertScores.wrap(scores, shapes=evaluator.shapes, model=evaluator.fingerprint)
    check_scores(scores, evaluator.shapes, evaluator.fingerprint)
    _check_fitness(fitness)
    if steps is not None and steps < 1:
        raise ValueError(f"steps is the number of counts to measure per layer, at least 1; got {steps}")
    counts = {layer: _grid(shape, steps) for layer, shape in scores.shapes.items()}
    unlimited = replace(scores, shapes=evaluator.shapes)  # no layer but one loses what it must
    alone = [{layer: count} for layer, pruned in counts.items() for count in pruned[1:]]
    plans = [PruningPlan.from_pruned_counts(unlimited, pruned_counts) for pruned_counts in [{}, *alone]]
    values: list[float] = []
    with bar(progress, f"damages {fitness}", len(plans), "plan") as line:
        for start in range(0, len(plans), PLANS_AT_ONCE):
            measured = evaluator.evaluate(plans[start : start + PLANS_AT_ONCE], (fitness,))
            values += [to_maximise(fitness, getattr(score, fitness)) for score in measured]
            line.advance(len(measured))
    unpruned, rest = values[0], iter(values[1:])
    lost = {layer: [0.0, *(unpruned - next(rest) for _ in pruned[1:])] for layer, pruned in counts.items()}
    order = order_fingerprint(scores)
    return Damages(counts, lost, fitness, scores.criterion, evaluator.fingerprint, order, evaluator.data_fingerprint)


def _grid(shape: LayerShape, steps: int | None) -> list[int]:
    """Returns the counts to measure: 0, and those that the layer can lose, all or evenly spaced up to the capacity."""
    counts = [0] * (shape.least_pruned > 0) + [*range(shape.least_pruned, shape.capacity + 1, shape.unit)]
    parts = len(counts) - 1 if steps is None else min(steps, len(counts) - 1)
    return [0, *(counts[round(i * (len(counts) - 1) / parts)] for i in range(1, parts + 1))]


def dp_plan(
    damages: Damages,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: Budget,
    *,
    top_k: int = 1,
    n_group: int = 1,
) -> PruningPlan:
    """Finds the plan of the sparsity's budget whose damages have the least sum: exact, by dynamic programming.

    With best[b] the least sum at which the layers so far lose b units, one more layer gives best'[b] = min over n of
    best[b - n] + damage(n): O(layers * budget * capacity). Of equal splits, a later layer loses fewer, decided from the
    last layer backwards (our choice).

    Args:
        damages: measured with the same scores.
        scores: ExpertScores or {decoder layer: [E]}.
        sparsity: share of the experts to remove, or `Kept`, as in `uniform_plan`.
        top_k: experts selected per token, where `scores` is a plain mapping.
        n_group: groups of the router, where `scores` is a plain mapping.

    Raises:
        ValueError: for damages of other layers, another model or another pruning order, or of fewer counts than the
            scores allow; for a sparsity that cannot be; if every split has an infinite damage.
    """
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    if set(damages.counts) != set(scores):
        raise ValueError(f"the damages are of layers {sorted(damages.counts)}, the scores of {sorted(scores)}")
    check_same_model(damages.model, scores, "the damages were measured on")
    if damages.order is not None and damages.order != order_fingerprint(scores):
        raise ValueError(
            f"the damages were measured for another order of experts (criterion {damages.criterion}, the scores' is "
            f"{scores.criterion}); measure them with these scores"
        )
    units = in_units(scores, sparsity)
    budget = units.budget
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    chosen: list[npt.NDArray[np.int64]] = []
    for layer, capacity in units.capacities.items():
        damage = damages.at(layer, [units.pruned(layer, n) for n in range(capacity + 1)])
        before, best, choice = best, best + damage[0], np.zeros(budget + 1, np.int64)
        for n in range(1, min(capacity, budget) + 1):
            total = before[: budget + 1 - n] + damage[n]
            better = total < best[n:]
            best[n:][better], choice[n:][better] = total[better], n
        chosen.append(choice)
    if not math.isfinite(best[budget]):
        raise ValueError(
            f"every split of {sum(units.least.values()) + budget * units.unit} experts meets NaN logits; use a lower "
            "sparsity or a dtype with more range"
        )
    counts, left = {}, budget
    for layer, choice in zip(reversed(list(units.capacities)), reversed(chosen), strict=True):
        counts[layer] = units.pruned(layer, int(choice[left]))
        left -= int(choice[left])
    return PruningPlan.from_pruned_counts(scores, counts)
