"""EEP's search: first which experts stay, then how all of them merge into those that do.

Phase 1 starts from masks and mutates masks; phase 2 goes on from everything found so far with crossing and noise. No
candidate ever leaves the population; parents are those whose score is within a threshold of the best. Source: EEP,
arXiv 2407.00945, and its released code for what the text leaves open; eep_candidates.py has the operators.

The published loop makes one child, scores it, adds it to the population, and so on. Here `per_call` children come from
one population, because our evaluator scores siblings together (our choice); 1 is the published loop. On artificial
fitnesses 4 lost little to 1, and 8 and 16 more.

The search knows no model: whoever calls it says how candidates are scored. A child depends only on (seed, its number,
scores so far), so the journal (journal.py) holds scores alone, one line per call of `evaluate`: whoever finds it draws
the same candidates again, compares their fingerprints with the journal's, and goes on where it ends.
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
from tqdm import tqdm

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.eep.operators import Candidate, Layout, given_mask, merge_child, mutate_mask, normalized, random_mask

STARTS = ("criteria", "random")


TIE_BREAKS = ("log_likelihood", None)


MAX_ATTEMPTS = 32  # draws of a child until one is new; a small space of masks may have no new one left (our choice)


ROUNDING = 1e-9  # 0.27 and 0.24 are 3 points apart, though not in floating point


@dataclass(frozen=True)
class Fitness:
    """score: a share of 1, such as an accuracy; larger is better, not finite is worst. tie: what orders equal scores,
    such as the answers' log-likelihood; larger is better, None is worst."""

    score: float
    tie: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        return self.comparable, self.tie if self.tie is not None and math.isfinite(self.tie) else -math.inf

    @property
    def comparable(self) -> float:
        return self.score if math.isfinite(self.score) else -math.inf


Evaluate = Callable[[list[Candidate]], Sequence[Fitness]]


@dataclass(frozen=True)
class SearchOutcome:
    """pruned: the best of phase 1, a mask. best: the best of all.

    train, valid, test: fitness of `best` by the functions of that name, None where there was none; pruned_train and
    pruned_valid: those of `pruned`. evaluations: candidates scored on train, starts included. history: one record per
    call: {"call", "phase" ("start", "prune" or "merge"), "evaluated", "evaluations" (so far), "best" and "best_tie" (so
    far), "mean" (of this call's finite scores, None without one), "non_finite" (candidates of this call)}.
    """

    pruned: Candidate
    best: Candidate
    pruned_train: Fitness
    train: Fitness
    pruned_valid: Fitness | None
    valid: Fitness | None
    test: Fitness | None
    evaluations: int
    history: list[dict[str, Any]]


def search(
    evaluate: Evaluate,
    num_experts: Mapping[int, int],
    keep: int | Mapping[int, int],
    *,
    validate: Evaluate | None = None,
    test: Evaluate | None = None,
    rerank: int = 5,
    starts: str = "criteria",
    masks: Sequence[Mapping[int, Sequence[int]]] = (),
    start_count: int = 30,
    tie_break: str | None = "log_likelihood",
    prune_iters: int = 40,
    merge_iters: int = 160,
    per_call: int = 4,
    layer_groups: Sequence[Sequence[int]] | None = None,
    n_group: Mapping[int, int] | None = None,
    mutate_within: float = 3.0,
    cross_within: float = 1.0,
    cross_at_least: int = 2,
    touch: float = 0.25,
    redraw: float = 0.15,
    touch_merging: float = 0.25,
    touch_mapping: float = 0.25,
    cross: float = 0.3,
    from_first: float = 0.6,
    change: float = 0.25,
    scale: float = 0.065,
    normalize: float = 0.1,
    identity: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SearchOutcome:
    """Searches masks, then merges, that score highest.

    evaluate: scores candidates on the training split; never called with none. num_experts: {decoder layer: E}. keep:
    experts kept k', of every layer or per layer. layer_groups: a partition of the layers into those that share
    matrices; None: none do. n_group: {decoder layer: groups of its router}, each of which keeps as many.
    validate, rerank: the `rerank` best of each phase on train are scored on a validation split, in one call, whose
    winner is `best` and whose best mask is `pruned`. test: called once, on `best`. Neither is in the journal.

    Phase 1, `prune_iters` candidates: `start_count` starts, in one call, then mutated masks. With starts="criteria"
    (our choice, default) `masks` ({decoder layer: kept ids}, such as eep_candidates.criterion_mask's) are the first
    starts and random ones the rest; "random" is the paper's. Phase 2, `merge_iters` candidates: with probability
    `cross` two parents cross, otherwise one is copied; then noise; with probability `normalize` the rows of W_EM of
    all layers are divided by their sums (in phase 1 that would change nothing). touch, redraw: see
    eep_candidates.mutate_mask; touch_merging, touch_mapping, from_first, change, scale: see merge_child there.
    mutate_within, cross_within: parents' distance from the best in points, hundredths of a score. cross_at_least: so
    many of the best may cross, however far apart (our choice: the 2 that it takes; the released code's file: 6).
    tie_break: "log_likelihood" (our choice, default) orders equal scores by `tie`: in the ranking, and among parents,
    where the best by `tie` stands for all of its score; None is the paper's, all alike.
    per_call: children drawn from one population and scored in one call (our choice); 1 is the paper's.
    A child that was met before is drawn again, and costs nothing where no new one turns up (our choice).

    identity: JSON values that the scores depend on (model, data), recorded. out: a directory for `search.json`
    (settings), `history.jsonl` (scores, a line per call), `pruned.safetensors` and `best.safetensors`; a directory with
    a history is resumed, with more merge_iters if asked. Same seed and scores: same outcome, whenever it was killed.
    Where merge_iters cut a call short, more of them score its rest in a call of its own: scores that depend on their
    company in the last bits, as our evaluator's, then equal those of one longer search only up to rounding.

    Raises ValueError, before any evaluation, for settings that cannot be, and for a directory of another search; and at
    the end when no candidate had a finite score. Source: arXiv 2407.00945.
    """
    layout = Layout.of(num_experts, keep, layer_groups, n_group)
    if layout.n_group and merge_iters:
        raise ValueError("experts of a router with groups cannot be merged: use merge_iters=0")
    rates = {
        "touch": touch,
        "redraw": redraw,
        "touch_merging": touch_merging,
        "touch_mapping": touch_mapping,
        "cross": cross,
        "from_first": from_first,
        "change": change,
        "normalize": normalize,
    }
    sizes = {
        "start_count": start_count,
        "prune_iters": prune_iters,
        "per_call": per_call,
        "rerank": rerank,
    }
    check_settings(starts, tie_break, merge_iters=merge_iters, cross_at_least=cross_at_least, **sizes)
    if starts == "criteria" and not masks:
        raise ValueError('starts="criteria" needs the criteria\'s masks; give some, or use starts="random"')
    _check_rates(rates)
    if min(mutate_within, cross_within) < 0 or not scale > 0:
        raise ValueError("thresholds are at least 0 and scale above 0")
    given = [given_mask(layout, mask, f"masks[{i}]") for i, mask in enumerate(masks if starts == "criteria" else ())]
    settings = {
        **(identity or {}),
        **rates,
        **{name: value for name, value in sizes.items() if name != "rerank"},
        **layout_settings(layout),
        "starts": starts,
        "masks": [mask.fingerprint for mask in given],
        "tie_break": tie_break,
        "scale": scale,
        "mutate_within": mutate_within,
        "cross_within": cross_within,
        "cross_at_least": cross_at_least,
        "seed": seed,
    }
    journal = Journal(Path(out), settings) if out is not None else None
    known = _Population(tie_break is not None)

    def draw(phase: str, number: int, attempt: int, rng: np.random.Generator) -> Candidate:
        if phase == "start":
            return given[number] if number < len(given) and attempt == 0 else random_mask(layout, rng)
        if phase == "prune":
            (parent,) = known.draw_parents(1, mutate_within, 1, rng)
            return mutate_mask(parent, rng, layout.router_groups, touch=touch, redraw=redraw)
        if rng.random() < cross and len(known.candidates) > 1:
            parents = known.draw_parents(2, cross_within, cross_at_least, rng)
        else:
            parents = known.draw_parents(1, mutate_within, 1, rng)
        child = merge_child(
            parents[0],
            parents[1] if len(parents) == 2 else None,
            rng,
            touch_merging=touch_merging,
            touch_mapping=touch_mapping,
            from_first=from_first,
            change=change,
            scale=scale,
        )
        return normalized(child) if rng.random() < normalize else child

    history: list[dict[str, Any]] = []
    masks_scored = 0
    bar = tqdm(total=prune_iters + merge_iters, desc="eep", unit="candidate", disable=not progress)
    for call, (phase, numbers) in enumerate(_calls(start_count, prune_iters, merge_iters, per_call)):
        children: dict[Candidate, None] = {}
        for number in numbers:
            rng = np.random.default_rng(random.Random(f"{seed}:{number}").getrandbits(128))
            tries = (draw(phase, number, attempt, rng) for attempt in range(MAX_ATTEMPTS))
            if new := next((c for c in tries if c not in known.met and c not in children), None):
                children[new] = None
        bar.set_postfix_str(f"{phase}: {len(children)} candidates")
        fitness = _score_call(evaluate, list(children), call, phase, journal)
        known.add(children, fitness)
        if phase != "merge":
            masks_scored = len(known.candidates)
        history.append(_summary(call, phase, fitness, known))
        bar.update(len(numbers))
    bar.close()
    outcome = _choose(known, masks_scored, validate, test, rerank, history)
    if journal is not None and distributed.is_first():
        outcome.pruned.save(journal.folder / "pruned.safetensors")
        outcome.best.save(journal.folder / "best.safetensors")
    return outcome


def parents_within(fitness: Sequence[Fitness], points: float, at_least: int = 1) -> list[int]:
    """Places, in ascending order, of those whose score is within so many points (hundredths) of the best, and of the
    best `at_least` in any case (equals: the earlier)."""
    best_first = sorted(range(len(fitness)), key=lambda i: (-fitness[i].comparable, i))
    floor = fitness[best_first[0]].comparable - points / 100 - ROUNDING
    return sorted(i for place, i in enumerate(best_first) if place < at_least or fitness[i].comparable >= floor)


@dataclass
class _Population:
    """Everything scored so far, in the order of scoring. ordered: whether ties count."""

    ordered: bool
    candidates: list[Candidate] = field(default_factory=list)
    fitness: list[Fitness] = field(default_factory=list)
    met: set[Candidate] = field(default_factory=set)

    def add(self, candidates: Mapping[Candidate, None], fitness: Sequence[Fitness]) -> None:
        self.candidates += candidates
        self.met |= candidates.keys()
        self.fitness += fitness if self.ordered else [Fitness(one.score) for one in fitness]

    def best_first(self, places: Sequence[int]) -> list[int]:
        return sorted(places, key=lambda i: self.fitness[i].rank, reverse=True)  # stable: of equals the earlier

    def draw_parents(self, count: int, points: float, at_least: int, rng: np.random.Generator) -> list[Candidate]:
        """`count` different parents, uniformly; where ties count, the best of a drawn one's score stands for it."""
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


def layout_settings(layout: Layout) -> dict[str, Any]:
    """What search.json says of a layout."""
    return {
        "search": "eep",
        "groups": [list(group) for group in layout.groups],
        "num_experts": list(layout.num_experts),
        "keep": list(layout.keep),
        "n_group": list(layout.n_group) or None,
    }


def check_settings(starts: str, tie_break: str | None, *, merge_iters: int, cross_at_least: int, **sizes: int) -> None:
    """Refuses (ValueError) what no search can have; `search` calls it first. sizes: of those that are at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if merge_iters < 0 or cross_at_least < 2:
        raise ValueError(
            f"merge_iters is at least 0 and cross_at_least at least 2; got {merge_iters} and {cross_at_least}"
        )
    if starts not in STARTS:
        raise ValueError(f"unknown starts {starts!r}; choose from {', '.join(STARTS)}")
    if tie_break not in TIE_BREAKS:
        raise ValueError(f'unknown tie_break {tie_break!r}; choose "log_likelihood" or None')


def _check_rates(rates: Mapping[str, float]) -> None:
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} is a probability; got {rate}")
    if rates["touch"] == 0 or rates["touch_merging"] == rates["touch_mapping"] == 0:
        raise ValueError("a child changes something: touch, and touch_merging or touch_mapping, must be above 0")


def _calls(start_count: int, prune_iters: int, merge_iters: int, per_call: int) -> Iterator[tuple[str, range]]:
    """Each call's phase and the numbers of its children."""
    started, end = min(start_count, prune_iters), prune_iters + merge_iters
    yield "start", range(started)
    for phase, first, last in (("prune", started, prune_iters), ("merge", prune_iters, end)):
        for at in range(first, last, per_call):
            yield phase, range(at, min(at + per_call, last))


def _score_call(
    evaluate: Evaluate, children: list[Candidate], call: int, phase: str, journal: Journal | None
) -> list[Fitness]:
    """The children's fitness: from the journal what it knows (a call that more merge_iters make longer in part), the
    rest scored and journalled."""
    lines = journal.records.get(call, {}).get("scores", []) if journal is not None else []
    if any(line[0] != child.fingerprint for line, child in zip(lines, children, strict=False)):
        raise ValueError(
            f"call {call} of the history scores other candidates than this search draws, as another version of "
            "moeprune_ext or numpy would; use another directory"
        )
    lines = lines[: len(children)]
    if rest := children[len(lines) :]:
        fresh = _scored(evaluate, rest)
        lines = lines + [[c.fingerprint, _json(f.score), _json(f.tie)] for c, f in zip(rest, fresh, strict=True)]
        if journal is not None:
            journal.append({"generation": call, "phase": phase, "scores": lines})
    return [Fitness(math.nan if score is None else score, tie) for _, score, tie in lines]


def _scored(evaluate: Evaluate, candidates: list[Candidate]) -> list[Fitness]:
    fitness = list(evaluate(candidates))
    if len(fitness) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates were to be scored, the evaluation returned {len(fitness)}")
    return fitness


def _json(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _summary(call: int, phase: str, fitness: Sequence[Fitness], known: _Population) -> dict[str, Any]:
    finite = [one.score for one in fitness if math.isfinite(one.score)]
    best = max(known.fitness, key=lambda one: one.rank)
    return {
        "call": call,
        "phase": phase,
        "evaluated": len(fitness),
        "evaluations": len(known.candidates),
        "best": _json(best.score),
        "best_tie": best.tie,
        "mean": sum(finite) / len(finite) if finite else None,
        "non_finite": len(fitness) - len(finite),
    }


def _choose(
    known: _Population,
    masks_scored: int,
    validate: Evaluate | None,
    test: Evaluate | None,
    rerank: int,
    history: list[dict[str, Any]],
) -> SearchOutcome:
    """The best mask and the best of all, on the validation split where there is one."""
    phases = (range(masks_scored), range(masks_scored, len(known.candidates)))
    mask_places, merge_places = (known.best_first(phase)[:rerank] for phase in phases)
    finalists = known.best_first([*mask_places, *merge_places])
    if not math.isfinite(known.fitness[finalists[0]].score):
        raise ValueError("no candidate had a finite score; use a dtype with more range, such as bfloat16 or float32")
    valid: dict[int, Fitness] = {}
    if validate is not None:
        fitness = _scored(validate, [known.candidates[i] for i in finalists])
        valid = {i: one if known.ordered else Fitness(one.score) for i, one in zip(finalists, fitness, strict=True)}
        finalists.sort(key=lambda i: valid[i].rank, reverse=True)  # stable: of equals the better on train
        if not math.isfinite(valid[finalists[0]].score):
            raise ValueError("no candidate had a finite score on the validation split")
    best = finalists[0]
    pruned = next(i for i in finalists if i < masks_scored)
    return SearchOutcome(
        known.candidates[pruned],
        known.candidates[best],
        known.fitness[pruned],
        known.fitness[best],
        valid.get(pruned),
        valid.get(best),
        _scored(test, [known.candidates[best]])[0] if test is not None else None,
        len(known.candidates),
        history,
    )
