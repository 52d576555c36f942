"""EvoESAP: searches how many experts each layer loses, under a fixed total and a fixed pruning order inside each layer.

A candidate is a vector n = (n_1..n_L), sum = budget. First generation: one plan per initial pattern, the rest random;
plans from elsewhere may join (our choice). Then, generation by generation: the elites survive, and each child is a copy
of a random elite with a few level-switch mutations, each moving some pruned experts from one layer to another. Source
and default settings: arXiv 2603.06003.

A generation depends only on (seed, generation number, scores so far), so the state of a search is the list of scores
(journal.py): an interrupted run replays its history file and goes on, and ends with the plan the uninterrupted run
finds. With fidelity="race" a generation's children are raced (racing.py); every elite, and so the plan that is
returned, has been scored on all tokens.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import check_scores, counts_of, in_units, order_fingerprint
from moeprune_ext.allocation.patterns import DEFAULT_PATTERNS, Counts, _first_generation, mutate
from moeprune_ext.allocation.racing import race
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import LOWER_IS_BETTER, METRICS, to_maximise

FIDELITIES = ("full", "race")


@dataclass(frozen=True)
class SearchResult:
    """plan: the best plan found. score: its fitness metric's value (as measured: KL and nll are lower-better).

    history: one record per generation: {"generation", "evaluated" (plans newly scored), "dropped" (those of them that a
    race dropped), "token_evaluations" and "token_evaluations_saved" (scored positions, over all plans), "best",
    "best_pruned", "mean" (of the plans scored on all tokens), "nan" (plans whose logits had a NaN row, ranked last)}.
    """

    plan: PruningPlan
    score: float
    history: list[dict[str, Any]]


def evolve(
    evaluator: CandidateEvaluator,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: float = 0.5,
    *,
    fitness: str = "esap",
    population: int = 32,
    generations: int = 50,
    elites: int = 4,
    max_delta: int = 4,
    max_steps: int = 3,
    max_attempts: int = 32,
    init_patterns: Sequence[str] = DEFAULT_PATTERNS,
    init_plans: Sequence[PruningPlan | HasPlan] = (),
    fidelity: str = "full",
    race_level: float = 0.05,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SearchResult:
    """Finds the non-uniform plan of best fitness at the uniform plan's budget.

    fitness: "esap" (default), "kl_qp", "kl_pq", "nll", "accept" or "top1_agree"; KL and nll are minimised. population,
    generations, elites: sizes; the defaults make population + (generations - 1) * (population - elites) = 1,404
    evaluations, repeated plans served from a cache. A child makes min(U{1..max_steps}, U{1..max_steps}) moves of
    U{1..max_delta} experts in at most max_attempts tries (in units of the router's groups where it has groups).
    init_plans: plans of the same budget that join the first generation, before the patterns; how many experts each
    layer loses is taken from them, which ones is for the scores to say.
    fidelity: "full" scores every candidate on every token; "race" drops a candidate once it is clearly worse than the
    worst elite on the sequences seen, where race_level is the chance of dropping one that is not (racing.py).
    out: a directory for `search.json` (settings), `history.jsonl` (every score, appended per generation) and
    `plan.json`; a directory with a history is resumed, with more generations if asked. Same seed and machine: same
    plan, whatever the number of processes.
    Beyond the released code (our choices): a plan met twice in a generation counts once among the elites, and a
    population smaller than the list of plans and patterns takes the first of them.

    Raises ValueError, before any evaluation, for settings or a budget that cannot be, and for a directory that belongs
    to another search, naming what differs.
    """
    scores = ExpertScores.wrap(scores, shapes=evaluator.shapes, model=evaluator.fingerprint)
    check_settings(fitness, population, generations, elites, fidelity, race_level)
    if min(max_delta, max_steps, max_attempts) < 1:
        raise ValueError("max_delta, max_steps and max_attempts must be at least 1")
    check_scores(scores, evaluator.shapes, evaluator.fingerprint)
    unit, limits, budget = in_units(scores, sparsity)
    layers, capacities = list(limits), list(limits.values())
    given = check_init_plans(init_plans, scores, sparsity, population)
    patterns = list(dict.fromkeys(init_patterns))
    if unknown := [name for name in patterns if name not in DEFAULT_PATTERNS]:
        raise ValueError(f"unknown initial patterns {unknown}; choose from {', '.join(DEFAULT_PATTERNS)}")
    settings = {
        **evaluator.identity,
        "order": order_fingerprint(scores),
        "criterion": scores.criterion,
        "sparsity": sparsity,
        "fitness": fitness,
        "population": population,
        "elites": elites,
        "max_delta": max_delta,
        "max_steps": max_steps,
        "max_attempts": max_attempts,
        "init_patterns": patterns,
        # None, as where a directory of an earlier version says nothing of them, so that it still resumes.
        "init_plans": [[n * unit for n in counts] for counts in given] or None,
        "capacities": None if scores.shapes == evaluator.shapes else [n * unit for n in capacities],
        "fidelity": fidelity,
        "race_level": race_level if fidelity == "race" else None,
        "seed": seed,
    }
    journal = Journal(Path(out), settings) if out is not None else None

    def to_plan(counts: Counts) -> PruningPlan:
        return PruningPlan.from_pruned_counts(
            scores, {layer: n * unit for layer, n in zip(layers, counts, strict=True)}
        )

    known = _Known(fitness)
    history: list[dict[str, Any]] = []
    survivors: list[Counts] = []
    bar = tqdm(total=generations, desc=f"evolve {fitness}", unit="gen", disable=not progress)
    for generation in range(generations):
        rng = random.Random(f"{seed}:{generation}")
        if generation == 0:
            members = _first_generation(given, patterns, population, capacities, budget, rng)
        else:
            children = (rng.choice(survivors) for _ in range(population - elites))
            members = survivors + [mutate(c, capacities, rng, max_delta, max_steps, max_attempts) for c in children]
        record = journal.records.get(generation) if journal is not None else None
        if record is None:
            new = [counts for counts in dict.fromkeys(members) if counts not in known.scores]
            bar.set_postfix_str(f"{len(new)} candidates")
            plans = [to_plan(counts) for counts in new]
            if fidelity == "race":
                record = _raced(evaluator, known, new, plans, survivors, elites, race_level, seed)
            else:
                record = _scored(evaluator, known, new, plans)
            if journal is not None:
                journal.append({"generation": generation, **record})
        known.add(record)
        ranked = sorted(dict.fromkeys(members), key=known.rank)
        survivors = ranked[:elites]
        history.append(_summary(generation, record, ranked, known, unit))
        bar.update()
        bar.set_postfix_str(f"best {known.scores[ranked[0]]:.5f}")
    bar.close()
    best = survivors[0]
    if math.isnan(known.scores[best]) or best in known.dropped:
        raise ValueError("every candidate gave NaN logits; use a dtype with more range, such as bfloat16 or float32")
    plan = to_plan(best)
    if journal is not None and distributed.is_first():
        plan.save(journal.folder / "plan.json")
    return SearchResult(plan, known.scores[best], history)


@dataclass
class _Known:
    """What a search has found out. scores: of every plan met, of a dropped one on the sequences it was scored on.
    sums: float64 [N] of plans scored on all N sequences, where plans race."""

    fitness: str
    scores: dict[Counts, float] = field(default_factory=dict)
    dropped: set[Counts] = field(default_factory=set)
    sums: dict[Counts, Tensor] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """A generation's record, just made or read back."""
        for counts, score in record["scores"]:
            self.scores[tuple(counts)] = math.nan if score is None else float(score)
        for counts, score, _ in record.get("dropped", ()):
            self.scores[tuple(counts)] = math.nan if score is None else float(score)
            self.dropped.add(tuple(counts))
        for (counts, _), sums in zip(record["scores"], record.get("sequence_sums", ()), strict=False):
            self.sums[tuple(counts)] = torch.tensor([math.nan if x is None else x for x in sums], dtype=torch.float64)

    def rank(self, counts: Counts) -> tuple[bool, float, Counts]:
        """Sorts best first: plans scored on all tokens before dropped ones, equal scores in a fixed order."""
        return counts in self.dropped, -to_maximise(self.fitness, self.scores[counts]), counts


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _scored(
    evaluator: CandidateEvaluator, known: _Known, new: list[Counts], plans: list[PruningPlan]
) -> dict[str, Any]:
    """Scores new plans on every token; the generation's record."""
    results = evaluator.evaluate(plans, (known.fitness,)) if plans else []
    values = [getattr(result, known.fitness) for result in results]
    return {
        "scores": [[list(counts), _json_number(value)] for counts, value in zip(new, values, strict=True)],
        "token_evaluations": len(new) * sum(evaluator.weights(known.fitness)),
        "token_evaluations_saved": 0,
    }


def _raced(
    evaluator: CandidateEvaluator,
    known: _Known,
    new: list[Counts],
    plans: list[PruningPlan],
    survivors: list[Counts],
    elites: int,
    level: float,
    seed: int,
) -> dict[str, Any]:
    """Races new plans against the elites; the generation's record, with the sums that later races compare with."""
    fitness, sign = known.fitness, -1.0 if known.fitness in LOWER_IS_BETTER else 1.0
    weights = evaluator.weights(fitness)

    def score(candidates: list[int], sequences: list[int]) -> Tensor:
        return sign * evaluator.sequence_sums([plans[i] for i in candidates], (fitness,), sequences).sums[fitness]

    standing = [sign * known.sums[c] for c in survivors if c not in known.dropped and math.isfinite(known.scores[c])]
    found = race(
        score,
        len(new),
        weights,
        torch.stack(standing) if len(standing) == elites else None,
        elites=elites,
        level=level,
        seed=seed,
    )
    record: dict[str, Any] = {"scores": [], "sequence_sums": [], "dropped": []}
    for counts, sums, seen, broken in zip(new, found.sums * sign, found.seen, found.broken, strict=True):
        met = ~sums.isnan()
        positions = sum(w for w, here in zip(weights, met.tolist(), strict=True) if here)
        mean = math.nan if broken or not positions else float(sums[met].sum() / positions)
        if seen == len(weights):
            record["scores"].append([list(counts), _json_number(mean)])
            record["sequence_sums"].append([_json_number(x) for x in sums.tolist()])
        else:
            record["dropped"].append([list(counts), _json_number(mean), seen])
    record["token_evaluations"] = found.spent
    record["token_evaluations_saved"] = len(new) * sum(weights) - found.spent
    return record


def _summary(
    generation: int, record: Mapping[str, Any], ranked: list[Counts], known: _Known, unit: int
) -> dict[str, Any]:
    """A generation's line in the result's history; `ranked`: its members, best first."""
    dropped = len(record.get("dropped", ()))
    whole = [known.scores[counts] for counts in ranked if counts not in known.dropped]
    finite = [score for score in whole if math.isfinite(score)]
    return {
        "generation": generation,
        "evaluated": len(record["scores"]) + dropped,
        "dropped": dropped,
        "token_evaluations": record["token_evaluations"],
        "token_evaluations_saved": record["token_evaluations_saved"],
        "best": known.scores[ranked[0]],
        "best_pruned": [n * unit for n in ranked[0]],
        "mean": sum(finite) / len(finite) if finite else math.nan,
        "nan": sum(math.isnan(known.scores[counts]) for counts in ranked),
    }


def check_init_plans(
    plans: Sequence[PruningPlan | HasPlan], scores: ExpertScores, sparsity: float, population: int
) -> list[Counts]:
    """What the plans take from each layer; refuses (ValueError) those that cannot join a search of this budget."""
    given = []
    for i, plan in enumerate(map(plan_of, plans)):
        if not isinstance(plan, PruningPlan):
            raise ValueError(f"init_plans[{i}] merges experts; a search of pruning counts starts from pruning plans")
        given.append(counts_of(plan, scores, sparsity, f"init_plans[{i}]"))
    if len(given) > population:
        raise ValueError(f"{len(given)} init_plans do not fit a population of {population}")
    return given


def check_settings(
    fitness: str, population: int, generations: int, elites: int, fidelity: str = "full", race_level: float = 0.05
) -> None:
    """Refuses (ValueError) sizes, a fitness or a fidelity that no search can have; `evolve` calls it first."""
    if fidelity not in FIDELITIES:
        raise ValueError(f"unknown fidelity {fidelity!r}; choose from {', '.join(FIDELITIES)}")
    if not 0 < race_level < 0.5:
        raise ValueError(f"race_level is the chance of a wrong drop, above 0 and below 0.5; got {race_level}")
    if fitness not in METRICS:
        raise ValueError(f"unknown fitness {fitness!r}; choose from {', '.join(METRICS)}")
    if min(population, generations, elites) < 1 or elites > population:
        raise ValueError(
            "population, generations and elites must be at least 1, and elites at most population; got "
            f"{population}, {generations} and {elites}"
        )
