"""EvoESAP: searches how many experts each layer loses, under a fixed total and a fixed pruning order inside each layer.

A candidate is a vector n = (n_1..n_L), sum = budget. First generation: one plan per initial pattern, the rest random.
Then, generation by generation: the elites survive, and each child is a copy of a random elite with a few level-switch
mutations, each moving some pruned experts from one layer to another. Source and default settings: arXiv 2603.06003.

A generation depends only on (seed, generation number, scores so far), so the state of a search is the list of scores:
an interrupted run replays its history file and goes on, and ends with the plan the uninterrupted run finds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from moeprune_ext.criteria import ExpertScores
from moeprune_ext.evaluator import METRICS, CandidateEvaluator, to_maximise
from moeprune_ext.files import read_json, write_text
from moeprune_ext.plan import PruningPlan, pruning_order, uniform_counts

DEFAULT_PATTERNS = (
    "uniform",
    "random",
    "up",
    "down",
    "mid",
    "mid-neg",
    "front-heavy",
    "back-heavy",
    "block-early",
    "block-late",
    "alt",
    "deep-flat",
)

Counts = tuple[int, ...]  # experts pruned per layer


@dataclass(frozen=True)
class SearchResult:
    """plan: the best plan found. score: its fitness metric's value (as measured: KL and nll are lower-better).

    history: one record per generation: {"generation", "evaluated" (plans newly scored), "best", "best_pruned",
    "mean", "nan" (plans whose logits had a NaN row, ranked last)}.
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
    fidelity: str = "full",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SearchResult:
    """Finds the non-uniform plan of best fitness at the uniform plan's budget.

    fitness: "esap" (default), "kl_qp", "kl_pq", "nll", "accept" or "top1_agree"; KL and nll are minimised. population,
    generations, elites: sizes; the defaults make population + (generations - 1) * (population - elites) = 1,404
    evaluations, repeated plans served from a cache. A child makes min(U{1..max_steps}, U{1..max_steps}) moves of
    U{1..max_delta} experts in at most max_attempts tries (in units of the router's groups where it has groups). out: a
    directory for `search.json` (settings), `history.jsonl` (every score, appended per generation) and `plan.json`; a
    directory with a history is resumed, with more generations if asked. Same seed and machine: same plan.
    Beyond the released code (our choices): a plan met twice in a generation counts once among the elites, and a
    population smaller than the list of patterns takes the first of them.

    Raises ValueError, before any evaluation, for settings or a budget that cannot be, and for a directory that belongs
    to another search, naming what differs.
    """
    scores = ExpertScores.wrap(scores, shapes=evaluator.shapes, model=evaluator.fingerprint)
    if fidelity != "full":
        raise ValueError(f'fidelity {fidelity!r} is not available; "full" scores every candidate on every token')
    check_settings(fitness, population, generations, elites)
    if min(max_delta, max_steps, max_attempts) < 1:
        raise ValueError("max_delta, max_steps and max_attempts must be at least 1")
    _check_scores(evaluator, scores)
    unit = scores.n_group
    layers = list(scores)
    capacities = [scores.shapes[layer].capacity // unit for layer in layers]
    budget = sum(uniform_counts(scores, sparsity).values()) // unit
    patterns = list(dict.fromkeys(init_patterns))
    if unknown := [name for name in patterns if name not in DEFAULT_PATTERNS]:
        raise ValueError(f"unknown initial patterns {unknown}; choose from {', '.join(DEFAULT_PATTERNS)}")
    settings = {
        **evaluator.identity,
        "order": _order_fingerprint(scores),
        "criterion": scores.criterion,
        "sparsity": sparsity,
        "fitness": fitness,
        "population": population,
        "elites": elites,
        "max_delta": max_delta,
        "max_steps": max_steps,
        "max_attempts": max_attempts,
        "init_patterns": patterns,
        "seed": seed,
    }
    journal = _Journal(Path(out), settings) if out is not None else None
    cache: dict[Counts, float] = journal.read() if journal is not None else {}

    def to_plan(counts: Counts) -> PruningPlan:
        return PruningPlan.from_pruned_counts(
            scores, {layer: n * unit for layer, n in zip(layers, counts, strict=True)}
        )

    def rank(counts: Counts) -> tuple[float, Counts]:
        return -to_maximise(fitness, cache[counts]), counts  # best first; equal scores in a fixed order

    history: list[dict[str, Any]] = []
    survivors: list[Counts] = []
    bar = tqdm(total=generations, desc=f"evolve {fitness}", unit="gen", disable=not progress)
    for generation in range(generations):
        rng = random.Random(f"{seed}:{generation}")
        if generation == 0:
            members = _first_generation(patterns, population, capacities, budget, rng)
        else:
            children = (rng.choice(survivors) for _ in range(population - elites))
            members = survivors + [mutate(c, capacities, rng, max_delta, max_steps, max_attempts) for c in children]
        new = [counts for counts in dict.fromkeys(members) if counts not in cache]
        if new:
            bar.set_postfix_str(f"{len(new)} candidates")
            results = evaluator.evaluate([to_plan(counts) for counts in new], (fitness,))
            cache |= {counts: getattr(result, fitness) for counts, result in zip(new, results, strict=True)}
            if journal is not None:
                journal.append(generation, {counts: cache[counts] for counts in new})
        ranked = sorted(dict.fromkeys(members), key=rank)
        survivors = ranked[:elites]
        history.append(_record(generation, len(new), [n * unit for n in ranked[0]], [cache[c] for c in ranked]))
        bar.update()
        bar.set_postfix_str(f"best {cache[ranked[0]]:.5f}")
    bar.close()
    best = survivors[0]
    if math.isnan(cache[best]):
        raise ValueError("every candidate gave NaN logits; use a dtype with more range, such as bfloat16 or float32")
    plan = to_plan(best)
    if journal is not None:
        plan.save(journal.folder / "plan.json")
    return SearchResult(plan, cache[best], history)


def check_settings(fitness: str, population: int, generations: int, elites: int) -> None:
    """Refuses (ValueError) sizes and a fitness that no search can have; `evolve` calls it first."""
    if fitness not in METRICS:
        raise ValueError(f"unknown fitness {fitness!r}; choose from {', '.join(METRICS)}")
    if min(population, generations, elites) < 1 or elites > population:
        raise ValueError(
            "population, generations and elites must be at least 1, and elites at most population; got "
            f"{population}, {generations} and {elites}"
        )


def _check_scores(evaluator: CandidateEvaluator, scores: ExpertScores) -> None:
    if scores.model is not None and scores.model != evaluator.fingerprint:
        raise ValueError(
            f"the scores were made for another model: their fingerprint is {scores.model}, the evaluator's is "
            f"{evaluator.fingerprint}; calibrate and score this model"
        )
    if dict(scores.shapes) != evaluator.shapes:
        raise ValueError("the scores' layers, expert counts or routers differ from the evaluator's model")
    if len({shape.n_group for shape in scores.shapes.values()}) != 1:
        raise ValueError("layers with different numbers of router groups cannot exchange experts")


def _first_generation(
    patterns: Sequence[str], population: int, capacities: Sequence[int], budget: int, rng: random.Random
) -> list[Counts]:
    names = [*patterns, *["random"] * population][:population]
    return [allocate(pattern_weights(name, len(capacities), rng), capacities, budget) for name in names]


def _record(generation: int, evaluated: int, best_pruned: list[int], scores: Sequence[float]) -> dict[str, Any]:
    """A generation's line in the history; `scores` from best to worst."""
    finite = [score for score in scores if math.isfinite(score)]
    return {
        "generation": generation,
        "evaluated": evaluated,
        "best": scores[0],
        "best_pruned": best_pruned,
        "mean": sum(finite) / len(finite) if finite else math.nan,
        "nan": sum(map(math.isnan, scores)),
    }


def pattern_weights(pattern: str, layers: int, rng: random.Random) -> list[float]:
    """A share of the budget per layer, as in EvoESAP's released code."""
    middle, quarter = (layers - 1) / 2, max(1, layers // 4)
    positions = range(layers)
    if pattern == "random":
        return [rng.random() + 1e-4 for _ in positions]
    shapes: dict[str, Sequence[float]] = {
        "uniform": [1.0] * layers,
        "up": [i + 1 for i in positions],
        "down": [layers - i for i in positions],
        "mid": [middle + 1 - abs(i - middle) for i in positions],
        "mid-neg": [1 + abs(i - middle) for i in positions],
        "front-heavy": [0.7**i + 1e-4 for i in positions],
        "back-heavy": [1.3**i for i in positions],
        "block-early": [2.0 if i < quarter else 1.0 for i in positions],
        "block-late": [2.0 if i >= layers - quarter else 1.0 for i in positions],
        "alt": [2.0 if i % 2 == 0 else 1.0 for i in positions],
        "deep-flat": [0.5 + 0.5 * (1 - abs(2 * i / max(1, layers - 1) - 1)) for i in positions],
    }
    return list(shapes[pattern])


def allocate(weights: Sequence[float], capacities: Sequence[int], budget: int) -> Counts:
    """Integers of sum `budget` in proportion to the weights, by largest remainder within the capacities.

    Shares are rounded down and capped; what is left goes one each to the layers below capacity by descending fraction,
    then layer index, and what is still left goes round robin from the first layer (EvoESAP's released code).
    """
    if not 0 <= budget <= sum(capacities):
        raise ValueError(f"cannot prune {budget} experts where at most {sum(capacities)} can go")
    total = sum(weights)
    shares = [budget * (weight / total) for weight in weights]
    counts = [min(int(share), capacity) for share, capacity in zip(shares, capacities, strict=True)]
    by_fraction = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    takers = [i for i in by_fraction if counts[i] < capacities[i]]
    left = budget - sum(counts)
    while left:
        for i in takers:
            if left and counts[i] < capacities[i]:
                counts[i] += 1
                left -= 1
        takers = list(range(len(counts)))
    return tuple(counts)


def mutate(
    parent: Counts,
    capacities: Sequence[int],
    rng: random.Random,
    max_delta: int,
    max_steps: int,
    max_attempts: int,
) -> Counts:
    """A copy of `parent` after min(U, U) level switches: U{1..max_delta} pruned experts move from one layer to
    another."""
    child = list(parent)
    wanted, done = min(rng.randint(1, max_steps), rng.randint(1, max_steps)), 0
    for _ in range(max_attempts):
        givers = [i for i, n in enumerate(child) if n > 0]
        takers = [i for i, n in enumerate(child) if n < capacities[i]]
        if done == wanted or not givers or not takers:
            break
        giver, taker, delta = rng.choice(givers), rng.choice(takers), rng.randint(1, max_delta)
        if giver != taker and child[giver] >= delta and child[taker] + delta <= capacities[taker]:
            child[giver] -= delta
            child[taker] += delta
            done += 1
    return tuple(child)


def _order_fingerprint(scores: ExpertScores) -> str:
    orders = [pruning_order(values, scores.shapes[layer].n_group) for layer, values in scores.items()]
    return hashlib.sha256(json.dumps(orders).encode()).hexdigest()[:16]


class _Journal:
    """A search's directory: settings written once, scores appended generation by generation."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._history = folder / "history.jsonl"
        recorded = folder / "search.json"
        if recorded.exists():
            before = read_json(recorded)
            before = before if isinstance(before, dict) else {}
            differing = [name for name in settings if before.get(name) != settings[name]]
            # This one is a sum that another number of threads rounds differently.
            teacher = "teacher_log_sum_exp"
            if teacher in differing and math.isclose(before.get(teacher, math.nan), settings[teacher], rel_tol=1e-5):
                differing.remove(teacher)
            if differing:
                changes = "; ".join(f"{name}: {before.get(name)!r} there, {settings[name]!r} now" for name in differing)
                raise ValueError(
                    f"{folder} belongs to another search ({changes}); use another directory or the same settings"
                )
        else:
            write_text(recorded, json.dumps(settings, indent=1) + "\n")

    def read(self) -> dict[Counts, float]:
        """Scores so far; a last line cut off by a crash is dropped."""
        if not self._history.exists():
            return {}
        text = self._history.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self._history, whole)
        cache: dict[Counts, float] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                for counts, score in json.loads(line)["scores"]:
                    cache[tuple(counts)] = math.nan if score is None else float(score)
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{self._history}:{number} is damaged; remove the directory and search again"
                ) from None
        return cache

    def append(self, generation: int, scores: Mapping[Counts, float]) -> None:
        listed = [[list(counts), None if math.isnan(score) else score] for counts, score in scores.items()]
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"generation": generation, "scores": listed}) + "\n")
            file.flush()
            os.fsync(file.fileno())
