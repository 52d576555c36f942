"""EEP's search: first which experts stay, then how all of them merge into those that do.

Phase 1 starts from masks and mutates masks; phase 2 goes on from everything found so far with crossing and noise. No
candidate ever leaves the population; parents are those whose score is within a threshold of the best. Source: EEP,
arXiv 2407.00945, and its released code for what the text leaves open; operators.py has the operators.

The published loop makes one child, scores it, adds it to the population, and so on. Here `per_call` children come from
one population, because our evaluator scores siblings together (our choice); 1 is the published loop. On artificial
fitnesses 4 lost little to 1, and 8 and 16 more.

The search knows no model: whoever calls it says how candidates are scored. A child depends only on (seed, its number,
scores so far), so the journal holds scores alone, one line per call of `evaluate`: whoever finds it draws the same
candidates again, compares their fingerprints with the journal's, and goes on where it ends.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.eep.operators import (
    Layout,
    fingerprint,
    given_mask,
    merge_child,
    mutate_mask,
    normalized,
    random_mask,
)
from moeprune_ext.eep.settings import EepSettings
from moeprune_ext.files import finite_or_none, nan_if_none
from moeprune_ext.progress import View, bar

MAX_ATTEMPTS = 32  # draws of a child until one is new; a small space of masks may have no new one left (our choice)
ROUNDING = 1e-9  # 0.27 and 0.24 are 3 points apart, though not in floating point


@dataclass(frozen=True)
class Fitness:
    """What a candidate is worth.

    Attributes:
        score: a share of 1, such as an accuracy; larger is better, not finite is worst.
        tie: what orders equal scores, such as the answers' log-likelihood; larger is better, None is worst.
    """

    score: float
    tie: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts fitness, the worst first."""
        return self.comparable, self.tie if self.tie is not None and math.isfinite(self.tie) else -math.inf

    @property
    def comparable(self) -> float:
        """The score, or minus infinity where it is not finite."""
        return self.score if math.isfinite(self.score) else -math.inf


Evaluate = Callable[[list[PruningPlan]], Sequence[Fitness]]


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        pruned: the best candidate of phase 1, a mask.
        best: the best of all.
        pruned_train: fitness of `pruned` on the training split.
        train: fitness of `best` on the training split.
        pruned_valid: fitness of `pruned` on the validation split; None without one.
        valid: fitness of `best` on the validation split; None without one.
        evaluations: candidates scored on the training split, starts included.
        history: one record per call: {"call", "phase" ("start", "prune" or "merge"), "evaluated", "evaluations" (so
            far), "best" and "best_tie" (so far), "mean" (of this call's finite scores, None without one), "non_finite"
            (candidates of this call)}.
    """

    pruned: PruningPlan
    best: PruningPlan
    pruned_train: Fitness
    train: Fitness
    pruned_valid: Fitness | None
    valid: Fitness | None
    evaluations: int
    history: list[dict[str, Any]]


def search(
    evaluate: Evaluate,
    layout: Layout,
    settings: EepSettings,
    *,
    masks: Sequence[Mapping[int, Sequence[int]]] = (),
    validate: Evaluate | None = None,
    identity: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> SearchOutcome:
    """Searches masks, then merges, that score highest.

    Phase 1, `prune_iters` candidates: starts, in one call, then mutated masks. Phase 2, `merge_iters` candidates: two
    parents cross, or one is copied; then noise; then perhaps the rows of W_EM are divided by their sums. A child that
    was met before is drawn again, and costs nothing where no new one turns up (our choice).

    Args:
        evaluate: scores candidates on the training split; never called with none.
        layout: what is searched.
        settings: how.
        masks: {decoder layer: kept ids}, the first starts where settings.starts is "criteria".
        validate: scores the best of each phase again, in one call, whose winner is `best` and whose best mask is
            `pruned`; not in the journal.
        identity: JSON values that the scores depend on (model, data), recorded.
        out: a directory for `search.json` (settings) and `history.jsonl` (scores, a line per call); a directory with a
            history is resumed, with more merge_iters if asked. Same seed and scores: same outcome, whenever it was
            killed. Where merge_iters cut a call short, more of them score its rest in a call of its own: scores that
            depend on their company in the last bits, as our evaluator's, then equal those of one longer search only up
            to rounding.
        progress: whether to show progress on stderr, or the View to show it on.
        on_generation: called after each call of `evaluate`, on the first process, with its record of the history and
            "resumed": True where all of its scores were read back from `out`. They are on disk by then; what the
            function raises ends the search, which resumes there.

    Raises:
        ValueError: before any evaluation, for settings that cannot be and for a directory of another search; and at the
            end when no candidate had a finite score.
    """
    if layout.n_group and settings.merge_iters:
        raise ValueError("experts of a router with groups cannot be merged: use merge_iters=0")
    if settings.starts == "criteria" and not masks:
        raise ValueError('starts="criteria" needs the criteria\'s masks; give some, or use starts="random"')
    used = masks if settings.starts == "criteria" else ()
    starts = [given_mask(layout, mask, f"masks[{i}]") for i, mask in enumerate(used)]
    recorded = {
        **(identity or {}),
        **settings.recorded(),
        **layout_settings(layout),
        "masks": [fingerprint(mask, layout) for mask in starts],
    }
    journal = Journal(Path(out), recorded) if out is not None else None
    population = _Population(layout, settings)
    history: list[dict[str, Any]] = []
    masks_scored = 0
    total = settings.prune_iters + settings.merge_iters
    with bar(progress, "eep", total, "candidate") as line:
        for call, (phase, numbers) in enumerate(_calls(settings)):
            children = population.children(phase, numbers, starts)
            resumed = journal is not None and len(journal.records.get(call, {}).get("scores", [])) >= len(children) > 0
            fitness = _score_call(evaluate, children, call, phase, journal)
            population.add(children, fitness)
            if phase != "merge":
                masks_scored = len(population.candidates)
            history.append(_summary(call, phase, fitness, population))
            if (best := history[-1]["best"]) is not None:
                line.note(f"best {best:.4f}")
            line.advance(len(numbers))
            if on_generation is not None and distributed.is_first():
                on_generation({**history[-1], "resumed": resumed})
    return _choose(population, masks_scored, validate, history)


def layout_settings(layout: Layout) -> dict[str, Any]:
    """Returns what search.json says of a layout."""
    return {
        "search": "eep",
        "groups": [list(group) for group in layout.groups],
        "num_experts": list(layout.num_experts),
        "keep": list(layout.keep),
        "n_group": list(layout.n_group) or None,
    }


def parents_within(fitness: Sequence[Fitness], points: float, at_least: int = 1) -> list[int]:
    """Finds the candidates whose score is near the best.

    Args:
        fitness: of all.
        points: distance from the best, in hundredths of a score.
        at_least: so many of the best are among them in any case (equals: the earlier).

    Returns:
        Their numbers, ascending.
    """
    best_first = sorted(range(len(fitness)), key=lambda i: (-fitness[i].comparable, i))
    floor = fitness[best_first[0]].comparable - points / 100 - ROUNDING
    return sorted(i for rank, i in enumerate(best_first) if rank < at_least or fitness[i].comparable >= floor)


@dataclass
class _Population:
    """Everything scored so far, in the order of scoring."""

    layout: Layout
    settings: EepSettings
    candidates: list[PruningPlan] = field(default_factory=list)
    fitness: list[Fitness] = field(default_factory=list)
    met: set[str] = field(default_factory=set)  # fingerprints

    @property
    def ordered(self) -> bool:
        """Whether ties count."""
        return self.settings.tie_break is not None

    def comparable(self, fitness: Sequence[Fitness]) -> list[Fitness]:
        """Returns fitness as it counts here."""
        return list(fitness) if self.ordered else [Fitness(one.score) for one in fitness]

    def add(self, candidates: Mapping[str, PruningPlan], fitness: Sequence[Fitness]) -> None:
        """Takes in what was scored; candidates by fingerprint."""
        self.candidates += candidates.values()
        self.met |= candidates.keys()
        self.fitness += self.comparable(fitness)

    def best_first(self, numbers: Sequence[int]) -> list[int]:
        """Sorts candidates, of equals the earlier first."""
        return sorted(numbers, key=lambda i: self.fitness[i].rank, reverse=True)

    def children(self, phase: str, numbers: range, starts: Sequence[PruningPlan]) -> dict[str, PruningPlan]:
        """Draws the candidates of one call, {fingerprint: candidate}, that were not met before."""
        children: dict[str, PruningPlan] = {}
        for number in numbers:
            rng = np.random.default_rng(random.Random(f"{self.settings.seed}:{number}").getrandbits(128))
            for attempt in range(MAX_ATTEMPTS):
                start = starts[number] if phase == "start" and number < len(starts) and attempt == 0 else None
                child = self._draw(phase, rng) if start is None else start
                key = fingerprint(child, self.layout)
                if key not in self.met and key not in children:
                    children[key] = child
                    break
        return children

    def _draw(self, phase: str, rng: np.random.Generator) -> PruningPlan:
        layout, rates = self.layout, self.settings.rates
        if phase == "start":
            return random_mask(layout, rng)
        if phase == "prune":
            return mutate_mask(self._parents(1, rates.mutate_within, 1, rng)[0], layout, rng, rates)
        if rng.random() < rates.cross and len(self.candidates) > 1:
            parents = self._parents(2, rates.cross_within, self.settings.cross_at_least, rng)
        else:
            parents = self._parents(1, rates.mutate_within, 1, rng)
        child = merge_child(parents, layout, rng, rates)
        return normalized(child, layout) if rng.random() < rates.normalize else child

    def _parents(self, count: int, points: float, at_least: int, rng: np.random.Generator) -> list[PruningPlan]:
        """Draws different parents, uniformly; where ties count, the best of a drawn one's score stands for it."""
        eligible = parents_within(self.fitness, points, at_least)
        drawn: list[int] = []
        while len(drawn) < count:
            parent = eligible[rng.integers(len(eligible))]
            if self.ordered:
                score = self.fitness[parent].comparable
                parent = self.best_first([i for i in eligible if self.fitness[i].comparable == score])[0]
            eligible.remove(parent)
            drawn.append(parent)
        return [self.candidates[i] for i in drawn]


def _calls(settings: EepSettings) -> Iterator[tuple[str, range]]:
    """Yields each call's phase and the numbers of its children."""
    end = settings.prune_iters + settings.merge_iters
    started = min(settings.rates.start_count, settings.prune_iters)
    yield "start", range(started)
    for phase, first, last in (("prune", started, settings.prune_iters), ("merge", settings.prune_iters, end)):
        for at in range(first, last, settings.per_call):
            yield phase, range(at, min(at + settings.per_call, last))


def _score_call(
    evaluate: Evaluate, children: Mapping[str, PruningPlan], call: int, phase: str, journal: Journal | None
) -> list[Fitness]:
    """Returns the children's fitness: what the journal has (of a call that more merge_iters make longer, a part), and
    the rest scored and journalled."""
    lines = journal.records.get(call, {}).get("scores", []) if journal is not None else []
    if any(line[0] != key for line, key in zip(lines, children, strict=False)):
        raise ValueError(
            f"call {call} of the history scores other candidates than this search draws, as another version of "
            "moeprune_ext or numpy would; use another directory"
        )
    lines = lines[: len(children)]
    if rest := list(children.items())[len(lines) :]:
        fresh = _scored(evaluate, [child for _, child in rest])
        lines = lines + [
            [key, finite_or_none(f.score), None if f.tie is None else finite_or_none(f.tie)]
            for (key, _), f in zip(rest, fresh, strict=True)
        ]
        if journal is not None:
            journal.append({"generation": call, "phase": phase, "scores": lines})
    return [Fitness(nan_if_none(score), tie) for _, score, tie in lines]


def _scored(evaluate: Evaluate, candidates: list[PruningPlan]) -> list[Fitness]:
    fitness = list(evaluate(candidates))
    if len(fitness) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates were to be scored, the evaluation returned {len(fitness)}")
    return fitness


def _summary(call: int, phase: str, fitness: Sequence[Fitness], population: _Population) -> dict[str, Any]:
    """Returns a call's record in the history."""
    finite = [one.score for one in fitness if math.isfinite(one.score)]
    best = max(population.fitness, key=lambda one: one.rank)
    return {
        "call": call,
        "phase": phase,
        "evaluated": len(fitness),
        "evaluations": len(population.candidates),
        "best": finite_or_none(best.score),
        "best_tie": best.tie,
        "mean": sum(finite) / len(finite) if finite else None,
        "non_finite": len(fitness) - len(finite),
    }


def _choose(
    population: _Population, masks_scored: int, validate: Evaluate | None, history: list[dict[str, Any]]
) -> SearchOutcome:
    """Chooses the best mask and the best of all, on the validation split where there is one."""
    fitness, candidates = population.fitness, population.candidates
    phases = (range(masks_scored), range(masks_scored, len(candidates)))
    masks, merges = (population.best_first(phase)[: population.settings.rates.rerank] for phase in phases)
    finalists = population.best_first([*masks, *merges])
    if not math.isfinite(fitness[finalists[0]].score):
        raise ValueError("no candidate had a finite score; use a dtype with more range, such as bfloat16 or float32")
    valid: dict[int, Fitness] = {}
    if validate is not None:
        again = population.comparable(_scored(validate, [candidates[i] for i in finalists]))
        valid = dict(zip(finalists, again, strict=True))
        finalists.sort(key=lambda i: valid[i].rank, reverse=True)  # stable: of equals the better on train
        if not math.isfinite(valid[finalists[0]].score):
            raise ValueError("no candidate had a finite score on the validation split")
    best = finalists[0]
    pruned = next(i for i in finalists if i < masks_scored)
    return SearchOutcome(
        pruned=candidates[pruned],
        best=candidates[best],
        pruned_train=fitness[pruned],
        train=fitness[best],
        pruned_valid=valid.get(pruned),
        valid=valid.get(best),
        evaluations=len(candidates),
        history=history,
    )
