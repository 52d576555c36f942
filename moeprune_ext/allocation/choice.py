"""criterion="auto": the order in which layers lose experts is chosen by measurement, not by name.

The choice of the criterion is worth more than a search of the counts, and a few dozen plans decide it. First every
criterion's plans are scored, uniform and by a global threshold, in one sweep. Then a criterion per layer is tried
(mixing.py), and taken if it gains more than chance over the best single one. C criteria and L layers take at most
2 C + 6 L evaluations and mostly far fewer; coordinate steps take about C L a round. Orders stay fixed inside a layer,
so a search of counts works on top unchanged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, Kept, order_fingerprint, uniform_plan
from moeprune_ext.allocation.mixing import Trials, mix_layers, mixed_plan
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.threshold import global_plan
from moeprune_ext.artifacts.journal import refuse_other
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.files import finite_or_none, nan_if_none, reading_json, write_json
from moeprune_ext.intervals import Interval
from moeprune_ext.progress import View

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
        gain: of mixes of criteria over the best single one, on sequences that they were not chosen on, positive =
            better; None where no mix was found.
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
    sparsity: Budget,
    *,
    fitness: str = "esap",
    objective: str = "mean",
    limits: Limits = _unlimited,
    seed: int = 0,
    naee: ExpertScores | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
) -> CriterionChoice:
    """As `choose_criterion`, with naee's order, which is measured on the evaluator's text; kept in a file.

    Args:
        evaluator: see `choose_criterion`, as those below.
        stats: see there.
        sparsity: see there.
        fitness: see there.
        objective: see there.
        limits: see there.
        seed: see there; also draws naee's sample.
        naee: naee's order, if it has been measured on this text; None: it is measured.
        file: where the choice is kept; one that is there is taken instead of measuring again.
        progress: whether to show progress on stderr, or the View to show it on.

    Raises:
        ValueError: as `choose_criterion`, and for the file of a choice that was made for other settings.
    """
    scores = [limits(score_experts(stats, name)) for name in CRITERIA]
    orders = [order_fingerprint(one) for one in scores]
    capacities = [shape.capacity for shape in scores[0].shapes.values()]
    budget = asdict(sparsity) if isinstance(sparsity, Kept) else sparsity
    settings = {"sparsity": budget, "fitness": fitness, "objective": objective, "seed": seed}
    request = {**evaluator.identity, **settings, "orders": orders, "capacities": capacities}
    path = None if file is None else Path(file)
    if path is not None:
        kept = distributed.from_first(lambda: CriterionChoice.load(path, request) if path.exists() else None)
        if kept is not None:
            return kept
    more, notes = [], []
    try:
        more.append(naee or naee_scores(evaluator.moe, evaluator.sequences, seed=seed, progress=progress))
    except ValueError as refusal:
        notes.append(f"naee is left out: {refusal}")
    choice = choose_criterion(
        evaluator,
        stats,
        sparsity,
        more_scores=more,
        fitness=fitness,
        objective=objective,
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
    sparsity: Budget,
    *,
    more_scores: Sequence[ExpertScores] = (),
    fitness: str = "esap",
    objective: str = "mean",
    per_layer: bool = True,
    limits: Limits = _unlimited,
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
        per_layer: whether to try a criterion per layer, among the ORDERS best ones.
        limits: makes scores of a criterion stricter, as ExpertScores.constrained does.
        seed: of the bootstrap that compares the mix with the single criterion.
        notes: what the caller left out, for the record.

    Raises:
        ValueError: for a sparsity that cannot be, scores of another model, and if every plan gives NaN logits.
    """
    evaluator.check_objective(fitness, objective)
    scores = [limits(score_experts(stats, name)) for name in CRITERIA]
    scores += [replace(limits(given), mtp=given.mtp or scores[0].mtp) for given in more_scores]
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
        ranked = sorted((n for n in candidates if n != name), key=lambda n: -standing[n])[: ORDERS - 1]
        mix, even, odd = mix_layers(trials, plan, {n: candidates[n] for n in ranked})
        if mix:
            gain = trials.gain_elsewhere(plan, mixed_plan(plan, even), mixed_plan(plan, odd), seed)
        if gain is not None and gain.above_zero:
            plan, names = mixed_plan(plan, mix), {layer: mix[layer][0] if layer in mix else name for layer in chosen}
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


Row = tuple[str, str, PruningPlan]  # criterion, allocation, plan


def _rows(candidates: Mapping[str, ExpertScores], sparsity: Budget, notes: list[str]) -> tuple[list[Row], list[str]]:
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
