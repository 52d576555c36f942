"""criterion="auto": the order in which layers lose experts is chosen by measurement, not by name.

The choice of the criterion is worth more than a search of the counts, and a few dozen plans decide it. First every
criterion's plans are scored, uniform and by a global threshold, in one sweep. Then a criterion per layer is tried
(our choice of how): in the best plan, one layer at a time takes the order of another of the best criteria, all in one
sweep; the layers that gain most are changed together, the best one, the best two and so on, in another sweep. C
criteria and L layers take at most 2 C + (orders - 1) L + L evaluations, where coordinate steps take about C L a round.
The mix is taken only if it gains more than chance over the best single criterion (a paired bootstrap over sequences).
Orders stay fixed inside a layer, so a search of counts works on top unchanged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import order_fingerprint, uniform_plan
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.selection import gain_of
from moeprune_ext.allocation.threshold import global_plan
from moeprune_ext.artifacts.journal import refuse_other
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import to_maximise
from moeprune_ext.files import finite_or_none, nan_if_none, reading_json, write_json
from moeprune_ext.intervals import Interval

FORMAT = "moeprune.choice/1"
ORDERS = 4  # criteria whose orders a layer may take

Limits = Callable[[ExpertScores], ExpertScores]


def _unlimited(scores: ExpertScores) -> ExpertScores:
    return scores


@dataclass(frozen=True)
class CriterionChoice:
    """The order to search on, and how it was chosen.

    Attributes:
        scores: the order; its criterion is "auto: NAME" or "auto per layer". Where layers have different criteria, only
            the order inside a layer means something.
        plan: the best plan of this budget so far, by that order.
        score: of the plan, on the search's text.
        table: a row per criterion and allocation: {"criterion", "allocation" ("uniform" or "global"), "score"}.
        per_layer: {decoder layer: criterion}; None where one criterion serves all layers.
        gain: of the best mix of criteria over the best single one, positive = better; None where none was tried.
        evaluations: plans scored.
        notes: what was left out, and why.
    """

    scores: ExpertScores
    plan: PruningPlan
    score: float
    table: list[dict[str, Any]]
    per_layer: dict[int, str] | None
    gain: Interval | None
    evaluations: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, None for numbers that are not finite."""
        return {
            "format": FORMAT,
            "scores": self.scores.as_json(),
            "pruned": {str(layer): count for layer, count in self.plan.pruned_counts.items()},
            "score": finite_or_none(self.score),
            "table": [{**row, "score": finite_or_none(row["score"])} for row in self.table],
            "per_layer": self.per_layer and {str(layer): name for layer, name in self.per_layer.items()},
            "gain": self.gain and self.gain.as_json(),
            "evaluations": self.evaluations,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CriterionChoice:
        """Reads what `as_json` returned."""
        scores, per_layer, gain = ExpertScores.from_json(content["scores"]), content["per_layer"], content["gain"]
        return cls(
            scores=scores,
            plan=PruningPlan.from_pruned_counts(scores, {int(k): int(n) for k, n in content["pruned"].items()}),
            score=nan_if_none(content["score"]),
            table=[{**row, "score": nan_if_none(row["score"])} for row in content["table"]],
            per_layer=per_layer and {int(layer): str(name) for layer, name in per_layer.items()},
            gain=gain and Interval.from_json(gain),
            evaluations=int(content["evaluations"]),
            notes=[str(note) for note in content["notes"]],
        )

    def save(self, path: str | os.PathLike[str], request: Mapping[str, Any] | None = None) -> None:
        """Writes JSON; `request`: everything that the choice depends on, for `load`."""
        write_json(path, {**self.as_json(), "request": dict(request or {})})

    @classmethod
    def load(cls, path: str | os.PathLike[str], request: Mapping[str, Any] | None = None) -> CriterionChoice:
        """Reads a choice.

        Raises:
            ValueError: for a file that is none, and one that was made for another request, naming what differs.
        """
        with reading_json(path, FORMAT, "choice of a criterion") as content:
            choice, recorded = cls.from_json(content), dict(content["request"])
        refuse_other(Path(path).parent, recorded, request or {})
        return choice


def auto_criterion(
    evaluator: CandidateEvaluator,
    stats: RoutingStats,
    sparsity: float,
    *,
    fitness: str = "esap",
    objective: str = "mean",
    per_layer: bool = True,
    limits: Limits = _unlimited,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CriterionChoice:
    """As `choose_criterion`, with naee's order, which is measured on the evaluator's text; kept in a file.

    Args:
        evaluator: see `choose_criterion`, as all but the last two.
        stats: of the same model.
        sparsity: share of the experts to remove.
        fitness: what plans are compared by.
        objective: "mean" or "worst".
        per_layer: whether to try a criterion per layer.
        limits: makes scores of a criterion stricter.
        seed: also draws naee's sample.
        file: where the choice is kept; one that is there is taken instead of measuring again.
        progress: whether to show progress bars on stderr.

    Raises:
        ValueError: as `choose_criterion`, and for the file of a choice that was made for other settings.
    """
    orders = [order_fingerprint(limits(score_experts(stats, name))) for name in CRITERIA]
    settings = {"sparsity": sparsity, "fitness": fitness, "objective": objective, "per_layer": per_layer, "seed": seed}
    request = {**evaluator.identity, **settings, "orders": orders}
    path = None if file is None else Path(file)
    if path is not None:
        kept = distributed.from_first(lambda: CriterionChoice.load(path, request) if path.exists() else None)
        if kept is not None:
            return kept
    more, notes = [], []
    try:
        more.append(naee_scores(evaluator.moe, evaluator.sequences, seed=seed, progress=progress))
    except ValueError as refusal:
        notes.append(f"naee is left out: {refusal}")
    choice = choose_criterion(
        evaluator,
        stats,
        sparsity,
        more_scores=more,
        fitness=fitness,
        objective=objective,
        per_layer=per_layer,
        limits=limits,
        seed=seed,
        notes=notes,
    )
    if path is not None and distributed.is_first():
        choice.save(path, request)
    return choice


def choose_criterion(
    evaluator: CandidateEvaluator,
    stats: RoutingStats,
    sparsity: float,
    *,
    more_scores: Sequence[ExpertScores] = (),
    fitness: str = "esap",
    objective: str = "mean",
    per_layer: bool = True,
    limits: Limits = _unlimited,
    orders: int = ORDERS,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> CriterionChoice:
    """Chooses the criterion, for all layers or per layer, whose plans of one budget are best on the evaluator's text.

    Candidates are all of CRITERIA and `more_scores`, uniform and by the global threshold. Of equal plans the uniform
    one and the earlier criterion are named. Under torchrun all processes get the same choice.

    Args:
        evaluator: scores plans on the search's text.
        stats: of `calibrate`, of the same model.
        sparsity: share of the experts to remove.
        more_scores: of other criteria, such as `naee_scores`.
        fitness: what plans are compared by, a metric of the evaluator.
        objective: "mean" or "worst": over all sequences, or in the worst domain.
        per_layer: whether to try a criterion per layer.
        limits: makes scores of a criterion stricter, as ExpertScores.constrained does.
        orders: criteria that a layer may choose among, the best ones.
        seed: of the bootstrap that compares the mix with the single criterion.
        notes: what the caller left out, for the record.

    Raises:
        ValueError: for a sparsity that cannot be, scores of another model, and if every plan gives NaN logits.
    """
    evaluator.check_objective(fitness, objective)
    scores = [limits(score_experts(stats, name)) for name in CRITERIA] + [limits(given) for given in more_scores]
    candidates = {str(one.criterion): one for one in scores}
    if len(candidates) < len(scores):
        raise ValueError(f"two of the scores are of one criterion: {', '.join(str(one.criterion) for one in scores)}")
    trials = Trials(evaluator, fitness, objective)
    rows, notes = _rows(candidates, sparsity, list(notes))
    trials.score([plan for _, _, plan in rows])
    best = max(rows, key=lambda row: (trials.rank(row[2]), row[1] == "uniform"))
    name, _, plan = best
    if math.isnan(trials.value(plan)):
        raise ValueError("every candidate gave NaN logits; use a dtype with more range, such as bfloat16 or float32")
    chosen, names, gain = replace(candidates[name], criterion=f"auto: {name}"), None, None
    if per_layer:
        standing = {n: max(trials.rank(plan) for other, _, plan in rows if other == n) for n in candidates}
        ranked = sorted((n for n in candidates if n != name), key=lambda n: -standing[n])[: orders - 1]
        mix = mix_layers(trials, plan, {n: candidates[n] for n in ranked})
        if mix:
            mixed_plan = with_kept(plan, {layer: kept for layer, (_, kept) in mix.items()})
            gain = trials.gain(mixed_plan, plan, seed)
            if gain.above_zero:
                plan, names = mixed_plan, {layer: mix[layer][0] if layer in mix else name for layer in chosen}
                values = {layer: candidates[names[layer]][layer] for layer in chosen}
                chosen = replace(chosen, values_by_layer=values, criterion="auto per layer")
    return CriterionChoice(
        scores=chosen,
        plan=replace(plan, criterion=chosen.criterion),
        score=trials.value(plan),
        table=[{"criterion": n, "allocation": how, "score": trials.value(plan)} for n, how, plan in rows],
        per_layer=names,
        gain=gain,
        evaluations=len(trials.values),
        notes=notes,
    )


Kept = tuple[tuple[int, ...], ...]
Row = tuple[str, str, PruningPlan]  # criterion, allocation, plan


def _rows(candidates: Mapping[str, ExpertScores], sparsity: float, notes: list[str]) -> tuple[list[Row], list[str]]:
    """Makes every candidate's plans, and adds to the notes why some are not there."""
    rows = []
    for name, scores in candidates.items():
        try:
            rows.append((name, "uniform", uniform_plan(scores, sparsity)))
        except ValueError as refusal:  # a layer cannot give the uniform share; a sparsity that cannot be fails below
            if (note := f"no uniform plans: {refusal}") not in notes:
                notes.append(note)
        rows.append((name, "global", global_plan(scores, sparsity)))
    return rows, notes


@dataclass
class Trials:
    """Plans scored so far, each once.

    Attributes:
        evaluator: of the search's text.
        metric: that plans are compared by.
        objective: "mean" or "worst".
        values: {experts kept in each layer: score}.
        sums: {experts kept in each layer: float64 [N], over each sequence}.
    """

    evaluator: CandidateEvaluator
    metric: str
    objective: str
    values: dict[Kept, float] = field(default_factory=dict)
    sums: dict[Kept, Tensor] = field(default_factory=dict)

    def score(self, plans: Sequence[PruningPlan]) -> None:
        """Scores the plans that are new, all in one sweep."""
        new = {_kept(plan): plan for plan in plans if _kept(plan) not in self.values}
        if not new:
            return
        sums = self.evaluator.sequence_sums(list(new.values()), (self.metric,)).sums[self.metric]
        # The first process decides for all, since unlike machines may round differently.
        values = distributed.from_first(
            lambda: self.evaluator.objective_values(sums, self.metric, self.objective).tolist()
        )
        self.values |= zip(new, values, strict=True)
        self.sums |= zip(new, sums, strict=True)

    def value(self, plan: PruningPlan) -> float:
        """Returns a plan's score."""
        return self.values[_kept(plan)]

    def rank(self, plan: PruningPlan) -> float:
        """Returns a plan's score as something to maximise."""
        return to_maximise(self.metric, self.value(plan))

    def gain(self, plan: PruningPlan, baseline: PruningPlan, seed: int) -> Interval:
        """Returns the interval of a plan's gain over another."""
        pair = torch.stack([self.sums[_kept(plan)], self.sums[_kept(baseline)]])
        return distributed.from_first(
            lambda: gain_of(self.evaluator, pair, metric=self.metric, objective=self.objective, seed=seed)
        )


def _kept(plan: PruningPlan) -> Kept:
    return tuple(tuple(ids) for ids in plan.kept.values())


def with_kept(plan: PruningPlan, kept: Mapping[int, list[int]]) -> PruningPlan:
    return replace(plan, kept={**plan.kept, **kept})


def mix_layers(
    trials: Trials, base: PruningPlan, others: Mapping[str, ExpertScores]
) -> dict[int, tuple[str, list[int]]]:
    """Finds the layers of a plan that had better follow another criterion.

    Args:
        trials: scores plans.
        base: the plan; every layer loses as many experts afterwards.
        others: the other criteria, the best first.

    Returns:
        {decoder layer: (criterion, experts kept)}; empty where no single change is for the better.
    """
    changes: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, scores in others.items():
        for layer, kept in PruningPlan.from_pruned_counts(scores, base.pruned_counts).kept.items():
            if kept != base.kept[layer]:
                changes.setdefault((layer, tuple(kept)), name)
    plans = {change: with_kept(base, {change[0]: list(change[1])}) for change in changes}
    trials.score(list(plans.values()))
    gains = {change: trials.rank(plan) - trials.rank(base) for change, plan in plans.items()}
    best: dict[int, tuple[int, tuple[int, ...]]] = {}  # {layer: its change that gains most}
    for change in sorted((change for change in gains if gains[change] > 0), key=lambda change: -gains[change]):
        best.setdefault(change[0], change)
    mixes = [
        {layer: (changes[change], list(change[1])) for layer, change in list(best.items())[:count]}
        for count in range(1, len(best) + 1)
    ]
    mixed = [with_kept(base, {layer: kept for layer, (_, kept) in mix.items()}) for mix in mixes]
    trials.score(mixed)
    return max(zip(mixes, mixed, strict=True), key=lambda pair: trials.rank(pair[1]))[0] if mixes else {}
