"""How many experts each layer loses, without a search of candidates: a global threshold, or the best additive split.

Which experts leave a layer is the pruning order's business (plan.py). Here only the counts are decided, in *units*: one
expert, or n_group experts where a router's groups must stay equal. Both ways spend the uniform plan's budget.

- `global_plan` compares scores across layers, normalised per layer if asked: the lowest of the model leave.
- `damages` prunes each layer alone to each count and measures the loss; `dp_plan` splits a budget so that the sum of
  these losses is the least there is. One measuring serves every sparsity. Losses do not add up (the embedded model lost
  half to three quarters of the sum), so the result is a start for a search (evolve's `init_plans`) rather than its
  replacement. Layers' losses split by dynamic programming: SPDY, arXiv 2201.13096; numbers of experts, and ESAP for a
  layer's squared error, are our choice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from moeprune_ext.allocation.budget import check_scores, in_units, order_fingerprint
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import METRICS, to_maximise
from moeprune_ext.files import read_json, write_text

PLANS_AT_ONCE = 256  # measured in one sweep; more would hide the progress of a large model's hours (our choice)


FORMAT = "moeprune.damages/1"


Floats = npt.NDArray[np.float64]


# ---- measured damages


@dataclass(frozen=True)
class Damages:
    """What each layer's pruning costs when no other layer is pruned.

    counts: {decoder layer: numbers of experts pruned, ascending from 0}. values: {decoder layer: float64, as many}: the
    fitness lost at these counts, 0 at 0 and negative where pruning helps; infinite (or NaN, which counts as infinite)
    where the pruned model's logits gave no distribution. fitness: the metric, KL and nll as their increase. criterion,
    model, order, data: name of the scores, fingerprints of the model, the pruning orders and the data, None when
    unknown.
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
        if self.fitness not in METRICS:
            raise ValueError(f"unknown fitness {self.fitness!r}; choose from {', '.join(METRICS)}")
        for layer, counts in self.counts.items():
            if not counts or counts[0] != 0 or any(a >= b for a, b in zip(counts, counts[1:], strict=False)):
                raise ValueError(f"layer {layer}: counts must ascend from 0, got {counts}")
            if len(self.values[layer]) != len(counts) or self.values[layer][0] != 0:
                raise ValueError(
                    f"layer {layer}: expected {len(counts)} damages, the first of them 0, got {self.values[layer]}"
                )

    def at(self, layer: int, counts: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """float64, the damages at these counts, interpolated linearly between measured ones; infinite next to an
        infinite one. Beyond the largest measured count there is nothing to read: it is refused (ValueError)."""
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
        """What the plan would cost if damages of layers added up; ValueError for a plan of other layers or counts."""
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
            "damages": {
                str(layer): [value if math.isfinite(value) else None for value in values]
                for layer, values in self.values.items()
            },
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Damages:
        """Reads damages; raises ValueError for a file that holds none."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a file of damages (JSON with format {FORMAT!r})")
        try:
            counts = {int(layer): [int(n) for n in numbers] for layer, numbers in content["counts"].items()}
            values = {
                int(layer): [math.inf if value is None else float(value) for value in numbers]
                for layer, numbers in content["damages"].items()
            }
            known = (content.get(name) for name in ("criterion", "model", "order", "data"))
            return cls(counts, values, content["fitness"], *known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is a damaged file of damages: {error}") from None


def damages(
    evaluator: CandidateEvaluator,
    scores: ExpertScores | Mapping[int, Tensor],
    *,
    fitness: str = "esap",
    steps: int | None = None,
    progress: bool = False,
) -> Damages:
    """Prunes each layer alone to each count that it can lose and measures what that costs.

    fitness: any of the evaluator's metrics. steps: at most so many counts per layer beside 0, evenly spaced up to its
    capacity, for deep models with many experts: 48 layers that can lose 120 experts are 5,761 evaluations, 577 with
    steps=12. None measures every count. The plans of neighbouring layers are swept together, PLANS_AT_ONCE at a time.

    Raises ValueError, before any evaluation, for an unknown fitness, steps below 1, or scores of another model.
    """
    scores = ExpertScores.wrap(scores, shapes=evaluator.shapes, model=evaluator.fingerprint)
    check_scores(scores, evaluator.shapes, evaluator.fingerprint)
    if fitness not in METRICS:
        raise ValueError(f"unknown fitness {fitness!r}; choose from {', '.join(METRICS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is the number of counts to measure per layer, at least 1; got {steps}")
    counts = {layer: _grid(shape.capacity, shape.n_group, steps) for layer, shape in scores.shapes.items()}
    alone = [{layer: count} for layer, several in counts.items() for count in several[1:]]
    plans = [PruningPlan.from_pruned_counts(scores, pruned) for pruned in [{}, *alone]]
    values: list[float] = []
    with tqdm(total=len(plans), desc=f"damages {fitness}", unit="plan", disable=not progress) as bar:
        for start in range(0, len(plans), PLANS_AT_ONCE):
            found = evaluator.evaluate(plans[start : start + PLANS_AT_ONCE], (fitness,))
            values += [to_maximise(fitness, getattr(score, fitness)) for score in found]
            bar.update(len(found))
    whole, rest = values[0], iter(values[1:])
    lost = {layer: [0.0, *(whole - next(rest) for _ in several[1:])] for layer, several in counts.items()}
    order = order_fingerprint(scores)
    return Damages(counts, lost, fitness, scores.criterion, evaluator.fingerprint, order, evaluator.data_fingerprint)


def _grid(capacity: int, unit: int, steps: int | None) -> list[int]:
    """Counts to measure: multiples of `unit` from 0 to the capacity, all or evenly spaced."""
    units = capacity // unit
    parts = units if steps is None else min(steps, units)
    return [0, *(round(i * units / parts) * unit for i in range(1, parts + 1))]


def dp_plan(
    damages: Damages,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: float,
    *,
    top_k: int = 1,
    n_group: int = 1,
) -> PruningPlan:
    """The plan of the sparsity's budget whose damages have the least sum: exact, by dynamic programming.

    With best[b] the least sum at which the layers so far lose b units, one more layer gives best'[b] = min over n of
    best[b - n] + damage(n): O(layers * budget * capacity). Ties: a later layer loses fewer (our choice), decided from
    the last layer backwards. top_k and n_group describe the router when `scores` is a plain {layer: [E]} mapping;
    ExpertScores know their own. Raises ValueError for damages of other layers, another model or another pruning order,
    of fewer counts than the scores allow, for a sparsity that cannot be, and when every split has an infinite damage.
    """
    scores = ExpertScores.wrap(scores, top_k=top_k, n_group=n_group)
    if set(damages.counts) != set(scores):
        raise ValueError(f"the damages are of layers {sorted(damages.counts)}, the scores of {sorted(scores)}")
    if damages.model is not None and scores.model is not None and damages.model != scores.model:
        raise ValueError(
            f"the damages were measured on another model: fingerprint {damages.model}, the scores' is {scores.model}"
        )
    if damages.order is not None and damages.order != order_fingerprint(scores):
        raise ValueError(
            f"the damages were measured for another order of experts (criterion {damages.criterion}, the scores' is "
            f"{scores.criterion}); measure them with these scores"
        )
    unit, capacities, budget = in_units(scores, sparsity)
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    chosen: list[npt.NDArray[np.int64]] = []
    for layer, capacity in capacities.items():
        damage = damages.at(layer, unit * np.arange(capacity + 1))
        before, best, choice = best, best.copy(), np.zeros(budget + 1, np.int64)
        for n in range(1, min(capacity, budget) + 1):
            total = before[: budget + 1 - n] + damage[n]
            better = total < best[n:]
            best[n:][better], choice[n:][better] = total[better], n
        chosen.append(choice)
    if not math.isfinite(best[budget]):
        raise ValueError(
            f"every split of {budget * unit} experts meets NaN logits; use a lower sparsity or a dtype with more range"
        )
    counts, left = {}, budget
    for layer, choice in zip(reversed(list(capacities)), reversed(chosen), strict=True):
        counts[layer] = int(choice[left]) * unit
        left -= int(choice[left])
    return PruningPlan.from_pruned_counts(scores, counts)
