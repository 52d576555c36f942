"""EvoESAP: searches how many experts each layer loses, under a fixed total and a fixed pruning order inside each layer.

A candidate is a vector n = (n_1..n_L), sum = budget. First generation: one plan per initial pattern, the rest random;
plans from elsewhere may join (our choice). Then, generation by generation: the elites survive, and each child is a copy
of a random elite with a few level-switch mutations, each moving some pruned experts from one layer to another. Source
and default settings: arXiv 2603.06003. Many children are drawn and few are scored (surrogate.py, our choice).

A generation depends only on (seed, generation number, scores so far), so the state of a search is the list of scores
(artifacts/journal.py): an interrupted run replays its history file and goes on, and ends with the plan that the
uninterrupted run finds. With fidelity="race" a generation's children are raced (racing.py). Every elite, and so the
plan that is returned, has been scored on all tokens.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, check_scores, counts_of, in_units, order_fingerprint
from moeprune_ext.allocation.patterns import Counts, first_generation, mutate
from moeprune_ext.allocation.racing import race
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.allocation.surrogate import screened
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import LOWER_IS_BETTER, to_maximise
from moeprune_ext.files import nan_if_none
from moeprune_ext.progress import View, bar


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        plan: the best plan.
        score: its fitness as measured: KL and nll are lower-better.
        history: one record per generation: {"generation", "evaluated" (plans newly scored), "dropped" (those of them
            that a race dropped), "token_evaluations" and "token_evaluations_saved" (scored positions, over all plans),
            "best", "best_pruned", "mean" (of the plans scored on all tokens), "nan" (plans whose logits had a NaN row,
            ranked last)}.
        finalists: the last elites, best first, of those with scores; `plan` is the first of them. A choice among them
            on text that was not searched on is more honest (selection.py).
    """

    plan: PruningPlan
    score: float
    history: list[dict[str, Any]]
    finalists: list[PruningPlan] = field(default_factory=list)


def evolve(
    evaluator: CandidateEvaluator,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: Budget = EvolveSettings.sparsity,
    *,
    fitness: str = EvolveSettings.fitness,
    objective: str = EvolveSettings.objective,
    population: int = EvolveSettings.population,
    generations: int = EvolveSettings.generations,
    elites: int = EvolveSettings.elites,
    max_delta: int = EvolveSettings.max_delta,
    max_steps: int = EvolveSettings.max_steps,
    max_attempts: int = EvolveSettings.max_attempts,
    init_patterns: Sequence[str] = EvolveSettings.init_patterns,
    init_plans: Sequence[PruningPlan | HasPlan] = (),
    fidelity: str = EvolveSettings.fidelity,
    race_level: float = EvolveSettings.race_level,
    screen: int = EvolveSettings.screen,
    seed: int = EvolveSettings.seed,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Finds the non-uniform plan of best fitness at the uniform plan's budget.

    Args:
        evaluator: scores candidates on the search's text.
        scores: {layer: [E]}, higher = keep; the order in which a layer loses experts.
        sparsity: share of the experts to remove, or `Kept`.
        fitness: "esap", "kl_qp", "kl_pq", "nll", "accept" or "top1_agree"; KL and nll are minimised.
        objective: "mean" over all text, or "worst": the mean of the evaluator's domain where it is worst.
        population: plans per generation. The defaults make population + (generations - 1) * (population - elites) =
            1,404 evaluations, with screening 718; repeated plans are served from a cache. Where more plans and patterns
            are given than fit, the first of them are taken (our choice).
        generations: generations; a resumed search may have more than before.
        elites: plans that survive a generation; equal plans count once (our choice).
        max_delta: a move takes U{1..max_delta} experts, in units of the router's groups where it has groups, and of
            the multiples that layers keep (`constrained`).
        max_steps: a child makes min(U{1..max_steps}, U{1..max_steps}) moves.
        max_attempts: most tries to find those moves.
        init_patterns: names of DEFAULT_PATTERNS.
        init_plans: plans of the same budget that join the first generation, before the patterns. How many experts each
            layer loses is taken from them; which ones follows from `scores`.
        fidelity: "full" scores every candidate on every token; "race" drops a candidate once it is clearly worse than
            the worst elite on the sequences scored so far (racing.py).
        race_level: chance that a race drops a candidate that is not worse.
        screen: half as many children are scored, those predicted best of `screen` times as many (surrogate.py); 0:
            all, as published.
        seed: same seed and machine: same plan, whatever the number of processes.
        out: directory for `search.json` (settings), `history.jsonl` (every score, one line a generation) and
            `plan.json`; a directory with a history is resumed.
        progress: whether to show progress on stderr, or the View to show it on.
        on_generation: called after each generation, on the first process, with its record of SearchResult.history and
            "resumed": True for a generation that was read back from `out`, so that a tracker gets the whole curve. The
            generation is on disk by then; what the function raises ends the search, which resumes there.

    Raises:
        ValueError: before any evaluation, for settings or a budget that cannot be, and for the directory of another
            search, naming what differs.
    """
    settings = EvolveSettings(
        sparsity=sparsity,
        fitness=fitness,
        objective=objective,
        population=population,
        generations=generations,
        elites=elites,
        max_delta=max_delta,
        max_steps=max_steps,
        max_attempts=max_attempts,
        init_patterns=tuple(init_patterns),
        fidelity=fidelity,
        race_level=race_level,
        screen=screen,
        seed=seed,
    )
    scores = ExpertScores.wrap(scores, shapes=evaluator.shapes, model=evaluator.fingerprint)
    space = SearchSpace.of(scores, settings, init_plans)
    result = search(evaluator, space, out=out, progress=progress, on_generation=on_generation)
    if out is not None and distributed.is_first():
        result.plan.save(Path(out) / "plan.json")
    return result


@dataclass(frozen=True)
class SearchSpace:
    """The vectors that a search chooses from, known before the model's weights are.

    Attributes:
        scores: the order in which each layer loses experts.
        settings: what the user chose.
        unit: experts that leave a layer together, as in `Units`: 1 without groups and multiples.
        least: {layer: experts that it loses in every plan}.
        capacities: {layer: units it can lose beyond these}.
        budget: units that all layers lose together beyond these.
        init_counts: vectors of the plans that join the first generation.
    """

    scores: ExpertScores
    settings: EvolveSettings
    unit: int
    least: dict[int, int]
    capacities: dict[int, int]
    budget: int
    init_counts: list[Counts]

    @classmethod
    def of(
        cls, scores: ExpertScores, settings: EvolveSettings, init_plans: Sequence[PruningPlan | HasPlan] = ()
    ) -> SearchSpace:
        """Makes the space of a search.

        Raises:
            ValueError: for a budget that the scores' layers cannot spend, or plans that cannot join the search.
        """
        units = in_units(scores, settings.sparsity)
        init_counts = []
        for i, plan in enumerate(map(plan_of, init_plans)):
            if plan.mapped_layers:
                raise ValueError(
                    f"init_plans[{i}] merges experts; a search of pruning counts starts from pruning plans"
                )
            init_counts.append(counts_of(plan, scores, settings.sparsity, f"init_plans[{i}]"))
        if len(init_counts) > settings.population:
            raise ValueError(f"{len(init_counts)} init_plans do not fit a population of {settings.population}")
        return cls(scores, settings, units.unit, units.least, units.capacities, units.budget, init_counts)

    def pruned(self, counts: Counts) -> list[int]:
        """Returns how many experts each layer loses."""
        return [least + count * self.unit for least, count in zip(self.least.values(), counts, strict=True)]

    def plan(self, counts: Counts) -> PruningPlan:
        """Returns the plan of a vector."""
        return PruningPlan.from_pruned_counts(self.scores, dict(zip(self.capacities, self.pruned(counts), strict=True)))

    def members(self, generation: int, survivors: list[Counts], scored: Mapping[Counts, float]) -> list[Counts]:
        """Returns a generation's vectors: the elites of the generation before and their children.

        Args:
            generation: its number.
            survivors: the elites of the generation before.
            scored: {vector scored before: its score on all tokens, larger is better, or NaN}, to screen children by.
        """
        settings, capacities = self.settings, list(self.capacities.values())
        rng = random.Random(f"{settings.seed}:{generation}")
        if generation == 0:
            return first_generation(
                self.init_counts, settings.init_patterns, settings.population, capacities, self.budget, rng
            )
        wanted = settings.children * (settings.screen or 1)
        moves = settings.max_delta, settings.max_steps, settings.max_attempts
        children = [mutate(rng.choice(survivors), capacities, rng, *moves) for _ in range(wanted)]
        return survivors + (screened(children, scored, settings.children) if settings.screen else children)

    def recorded(self, evaluator: CandidateEvaluator) -> dict[str, Any]:
        """Returns what search.json holds: everything that the scores of a generation depend on."""
        stricter = self.scores.shapes != evaluator.shapes  # the scores let fewer experts go than the routers do
        return {
            **evaluator.identity,
            "order": order_fingerprint(self.scores),
            "criterion": self.scores.criterion,
            # None where a directory of an earlier version has no such entry, so that it still resumes.
            "init_plans": [self.pruned(counts) for counts in self.init_counts] or None,
            "capacities": self.pruned(tuple(self.capacities.values())) if stricter else None,
            "least_pruned": list(self.least.values()) if any(self.least.values()) else None,
            "unit": self.unit if any(shape.step > 1 for shape in self.scores.shapes.values()) else None,
            **self.settings.recorded(),
        }


def search(
    evaluator: CandidateEvaluator,
    space: SearchSpace,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> SearchResult:
    """Searches a space; see `evolve`. Writes no plan.json: the caller may choose another of the finalists."""
    check_scores(space.scores, evaluator.shapes, evaluator.fingerprint)
    settings = space.settings
    journal = Journal(Path(out), space.recorded(evaluator)) if out is not None else None
    archive = _Archive(settings.fitness)
    history: list[dict[str, Any]] = []
    survivors: list[Counts] = []
    with bar(progress, f"evolve {settings.fitness}", settings.generations, "gen") as line:
        for generation in range(settings.generations):
            members = space.members(generation, survivors, archive.measured())
            record = journal.records.get(generation) if journal is not None else None
            resumed = record is not None
            if record is None:
                candidates = [counts for counts in dict.fromkeys(members) if counts not in archive.scores]
                if settings.fidelity == "race":
                    record = _raced(evaluator, space, archive, candidates, survivors)
                else:
                    record = _scored(evaluator, space, candidates)
                if journal is not None:
                    journal.append({"generation": generation, **record})
            archive.add(record)
            ranked = sorted(dict.fromkeys(members), key=archive.rank)
            survivors = ranked[: settings.elites]
            history.append(_summary(generation, record, ranked, archive, space))
            line.note(f"best {archive.scores[ranked[0]]:.4f}")
            line.advance()
            if on_generation is not None and distributed.is_first():
                on_generation({**history[-1], "resumed": resumed})
    best = [n for n in survivors if n not in archive.dropped and not math.isnan(archive.scores[n])]
    if not best:
        raise ValueError("every candidate gave NaN logits; use a dtype with more range, such as bfloat16 or float32")
    finalists = [space.plan(counts) for counts in best]
    return SearchResult(finalists[0], archive.scores[best[0]], history, finalists)


@dataclass
class _Archive:
    """Every vector scored so far.

    Attributes:
        fitness: the metric that the scores are of.
        scores: {vector: score}; of a dropped one on the sequences that it was scored on.
        dropped: vectors that a race dropped.
        sums: {vector: float64 [N]}, sums over each sequence of vectors that a race scored on all N.
    """

    fitness: str
    scores: dict[Counts, float] = field(default_factory=dict)
    dropped: set[Counts] = field(default_factory=set)
    sums: dict[Counts, Tensor] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a generation's record, just made or read back from the journal."""
        for counts, score in record["scores"]:
            self.scores[tuple(counts)] = nan_if_none(score)
        for counts, score, _ in record.get("dropped", ()):
            self.scores[tuple(counts)] = nan_if_none(score)
            self.dropped.add(tuple(counts))
        for (counts, _), sums in zip(record["scores"], record.get("sequence_sums", ()), strict=False):
            self.sums[tuple(counts)] = torch.tensor([nan_if_none(x) for x in sums], dtype=torch.float64)

    def measured(self) -> dict[Counts, float]:
        """Returns {vector: its score on all tokens, larger is better}; NaN of a dropped one."""
        return {
            counts: math.nan if counts in self.dropped else to_maximise(self.fitness, score)
            for counts, score in self.scores.items()
        }

    def rank(self, counts: Counts) -> tuple[bool, float, Counts]:
        """Sorts best first: vectors scored on all tokens before dropped ones, equal scores in a fixed order."""
        return counts in self.dropped, -to_maximise(self.fitness, self.scores[counts]), counts


def _none_if_nan(value: float) -> float | None:
    """Returns a score as the journal holds it; an infinite KL is one that ranks before NaN."""
    return None if math.isnan(value) else value


def _scored(evaluator: CandidateEvaluator, space: SearchSpace, candidates: list[Counts]) -> dict[str, Any]:
    """Scores candidates on every token and returns the generation's record."""
    fitness = space.settings.fitness
    plans = [space.plan(counts) for counts in candidates]
    values = evaluator.fitness(plans, fitness, space.settings.objective) if plans else []
    return {
        "scores": [[list(counts), _none_if_nan(value)] for counts, value in zip(candidates, values, strict=True)],
        "token_evaluations": len(candidates) * sum(evaluator.weights(fitness)),
        "token_evaluations_saved": 0,
    }


def _raced(
    evaluator: CandidateEvaluator,
    space: SearchSpace,
    archive: _Archive,
    candidates: list[Counts],
    survivors: list[Counts],
) -> dict[str, Any]:
    """Races candidates against the elites and returns the generation's record, with the sums that later races need."""
    settings = space.settings
    fitness, sign = settings.fitness, -1.0 if settings.fitness in LOWER_IS_BETTER else 1.0
    weights = evaluator.weights(fitness)
    plans = [space.plan(counts) for counts in candidates]

    def score(running: list[int], sequences: list[int]) -> Tensor:
        return sign * evaluator.sequence_sums([plans[i] for i in running], (fitness,), sequences).sums[fitness]

    elite_sums = [
        sign * archive.sums[counts]
        for counts in survivors
        if counts not in archive.dropped and math.isfinite(archive.scores[counts])
    ]
    outcome = race(
        score,
        len(candidates),
        weights,
        torch.stack(elite_sums) if len(elite_sums) == settings.elites else None,
        elites=settings.elites,
        level=settings.race_level,
        seed=settings.seed,
    )
    record: dict[str, Any] = {"scores": [], "sequence_sums": [], "dropped": []}
    for counts, sums, seen, broken in zip(candidates, outcome.sums * sign, outcome.seen, outcome.broken, strict=True):
        is_scored = ~sums.isnan()
        positions = sum(weight for weight, scored in zip(weights, is_scored.tolist(), strict=True) if scored)
        mean = math.nan if broken or not positions else float(sums[is_scored].sum() / positions)
        if seen == len(weights):
            record["scores"].append([list(counts), _none_if_nan(mean)])
            record["sequence_sums"].append([_none_if_nan(x) for x in sums.tolist()])
        else:
            record["dropped"].append([list(counts), _none_if_nan(mean), seen])
    record["token_evaluations"] = outcome.spent
    record["token_evaluations_saved"] = len(candidates) * sum(weights) - outcome.spent
    return record


def _summary(
    generation: int, record: Mapping[str, Any], ranked: list[Counts], archive: _Archive, space: SearchSpace
) -> dict[str, Any]:
    """Returns a generation's line in the result's history; `ranked`: its members, best first."""
    dropped = len(record.get("dropped", ()))
    fully_scored = [archive.scores[counts] for counts in ranked if counts not in archive.dropped]
    finite = [score for score in fully_scored if math.isfinite(score)]
    return {
        "generation": generation,
        "evaluated": len(record["scores"]) + dropped,
        "dropped": dropped,
        "token_evaluations": record["token_evaluations"],
        "token_evaluations_saved": record["token_evaluations_saved"],
        "best": archive.scores[ranked[0]],
        "best_pruned": space.pruned(ranked[0]),
        "mean": sum(finite) / len(finite) if finite else math.nan,
        "nan": sum(math.isnan(archive.scores[counts]) for counts in ranked),
    }
