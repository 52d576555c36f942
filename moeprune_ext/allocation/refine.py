"""Refines a plan by swaps of single experts, after the counts have been searched (our choice).

EvoESAP chooses how many experts each layer loses and leaves which ones to the pruning order. A swap prunes one kept
expert and restores one pruned, in the same layer or in another, so the total stays. Which ones is drawn around the
border of a layer's order: the experts whose fate the order decides by a hair are tried most, and any may be.

Rounds of children are raced on the search text (racing.py). More freedom fits the search text better than unseen text,
so nothing is decided here: the finalists are the plans that led after some round, the start first, for the caller to
choose from on text that was not searched on. What it gains: bench/results/refine.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.allocation.racing import race
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import LOWER_IS_BETTER, METRICS

BORDER = 0.3  # chance that the expert at the border is taken, else the next is asked
ATTEMPTS = 32  # tries for each child; a layer at its limit gives none
Kept = tuple[tuple[int, ...], ...]  # ascending ids of each layer


@dataclass(frozen=True)
class RefineSettings:
    """What a user can choose about a refinement.

    Attributes:
        seed: seed of the swaps and of the order in which sequences are raced.

    Raises:
        ValueError: if no refinement can have these settings. Checked when the object is made.
    """

    rounds: int = field(default=8, metadata={"help": "rounds of swaps of single experts after the counts"})
    children: int = field(default=16, metadata={"help": "plans that a round tries"})
    survivors: int = field(default=4, metadata={"help": "plans that a round's children are copies of"})
    fitness: str = "esap"
    race_level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.children, self.survivors) < 1:
            raise ValueError(
                "rounds, children and survivors of a refinement must be at least 1; got "
                f"{self.rounds}, {self.children} and {self.survivors}"
            )
        if self.fitness not in METRICS:
            raise ValueError(f"unknown fitness {self.fitness!r}; choose from {', '.join(METRICS)}")

    def recorded(self) -> dict[str, Any]:
        """Returns what search.json holds: all but `rounds`, which a resumed refinement may raise."""
        return {name: value for name, value in asdict(self).items() if name != "rounds"}


@dataclass(frozen=True)
class Refinement:
    """The outcome of a refinement.

    Attributes:
        finalists: the start, then every plan that was the best on the search text after some round.
        scores: fitness of each on the search text, as measured.
        token_evaluations: positions scored, over all plans.
    """

    finalists: list[PruningPlan]
    scores: list[float]
    token_evaluations: int


def refine(
    evaluator: CandidateEvaluator,
    plan: PruningPlan | HasPlan,
    scores: ExpertScores,
    *,
    rounds: int = RefineSettings.rounds,
    children: int = RefineSettings.children,
    survivors: int = RefineSettings.survivors,
    fitness: str = RefineSettings.fitness,
    race_level: float = RefineSettings.race_level,
    seed: int = RefineSettings.seed,
    out: str | os.PathLike[str] | None = None,
) -> Refinement:
    """Tries swaps of single experts on a plan, and returns the plans that led.

    Args:
        evaluator: scores plans on the search's text.
        plan: the start, of pruned experts only.
        scores: the order around whose border experts are swapped; protected experts stay.
        rounds: rounds of children; a resumed refinement may have more than before.
        children: plans that a round tries; fewer where there are no more swaps.
        survivors: plans that the next round's children are copies of.
        fitness: as in `evolve`.
        race_level: chance that a race drops a child that is not worse than the worst survivor.
        seed: same seed and machine: same plans, whatever the number of processes.
        out: directory for `search.json` and `history.jsonl`; one with a history is resumed.

    Raises:
        ValueError: for settings that cannot be, a plan that merges experts or is of other layers than the scores, one
            whose score is NaN, and the directory of another refinement.
    """
    settings = RefineSettings(rounds, children, survivors, fitness, race_level, seed)
    start = plan_of(plan)
    _check(start, scores)
    search = _Search(evaluator, start, scores, settings)
    identity = {**evaluator.identity, "start": [list(ids) for ids in search.start], **settings.recorded()}
    journal = Journal(Path(out), identity) if out is not None else None
    leaders, spent = [search.start], 0
    for number in range(rounds):
        drawn = search.draw(number)
        record = journal.records.get(number) if journal is not None else None
        if record is None:
            record = search.raced(drawn, number)
            if journal is not None:
                journal.append({"generation": number, **record})
        search.add(drawn, record)
        spent += record["token_evaluations"]
        if search.ranked()[0] != leaders[-1]:
            leaders.append(search.ranked()[0])
    total = sum(evaluator.weights(fitness))
    return Refinement(
        [start, *(search.plan(kept) for kept in leaders[1:])],
        [search.sign * float(search.sums[kept].sum()) / total for kept in leaders],
        spent,
    )


def _check(start: PruningPlan, scores: ExpertScores) -> None:
    """Raises ValueError for a plan that swaps cannot start from."""
    if start.merges or start.active is not None:
        raise ValueError("the plan merges experts or has fewer active; swaps start from a plan that only prunes")
    experts = {layer: scores.shapes[layer].num_experts for layer in scores}
    if start.num_experts != experts:
        raise ValueError(f"the plan is for layers with {start.num_experts} experts, the scores for {experts}")


@dataclass
class _Search:
    """The state of a refinement: a function of the rounds' records.

    Attributes:
        evaluator: scores plans.
        origin: the plan it starts from.
        scores: the order.
        settings: what the user chose.
        sums: {kept experts: float64 [N], sums over each sequence, larger is better}, of plans scored on all N.
        drawn: all that were drawn so far.
    """

    evaluator: CandidateEvaluator
    origin: PruningPlan
    scores: ExpertScores
    settings: RefineSettings
    sums: dict[Kept, Tensor] = field(default_factory=dict)
    drawn: set[Kept] = field(default_factory=set)

    def __post_init__(self) -> None:
        fitness = self.settings.fitness
        self.sign = -1.0 if fitness in LOWER_IS_BETTER else 1.0
        self.layers = list(self.scores)
        self.orders = {layer: self.scores.pruning_order(layer) for layer in self.layers}
        self.start: Kept = tuple(tuple(self.origin.kept[layer]) for layer in self.layers)
        self.sums[self.start] = self.sign * self.evaluator.sequence_sums([self.origin], (fitness,)).sums[fitness][0]
        if not bool(self.sums[self.start].isfinite().all()):
            raise ValueError(f"the plan to refine has no finite {fitness}; refine another one")
        self.drawn.add(self.start)

    def plan(self, kept: Kept) -> PruningPlan:
        """Returns the plan that keeps these experts."""
        by_layer = {layer: list(ids) for layer, ids in zip(self.layers, kept, strict=True)}
        return PruningPlan(
            by_layer, self.origin.num_experts, self.origin.model, self.origin.criterion, mtp=self.origin.mtp
        )

    def ranked(self) -> list[Kept]:
        """Returns the plans scored on all sequences, best first, equal ones in a fixed order."""
        return sorted(self.sums, key=lambda kept: (-float(self.sums[kept].sum()), kept))

    def draw(self, number: int) -> list[Kept]:
        """Returns a round's children, none of them drawn before."""
        rng = random.Random(f"{self.settings.seed}:refine:{number}")
        parents, children = self.ranked()[: self.settings.survivors], []
        for _ in range(ATTEMPTS * self.settings.children):
            child = rng.choice(parents)
            for _ in range(rng.choice((1, 1, 2))):
                child = self.swapped(child, rng)
            if child not in self.drawn:
                self.drawn.add(child)
                children.append(child)
            if len(children) == self.settings.children:
                break
        return children

    def swapped(self, kept: Kept, rng: random.Random) -> Kept:
        """Returns a copy that prunes one kept expert and restores a pruned one, or the same where the draw has none."""
        loser = rng.randrange(len(kept))
        gainer = loser if rng.random() < 0.5 else rng.randrange(len(kept))
        losing, gaining = self.layers[loser], self.layers[gainer]
        shape = self.scores.shapes[losing]
        if any(one.unit > 1 for one in self.scores.shapes.values()):  # counts come in multiples: they stay
            gainer, gaining = loser, losing
        most = self.scores.shapes[gaining].most_kept
        if gainer != loser and (len(kept[loser]) <= shape.least_kept or len(kept[gainer]) >= most):
            return kept
        held, protected = set(kept[loser]), self.scores.protected.get(losing, frozenset())
        leaves = _near_border([e for e in self.orders[losing] if e in held and e not in protected], rng)
        returning = [e for e in reversed(self.orders[gaining]) if e not in kept[gainer]]
        if shape.n_group > 1 and leaves is not None:
            size = shape.num_experts // shape.n_group
            returning = [e for e in returning if e // size == leaves // size]
        returns = _near_border(returning, rng)
        if leaves is None or returns is None or not shape.capacity:
            return kept
        changed = [set(ids) for ids in kept]
        changed[loser].remove(leaves)
        changed[gainer].add(returns)
        return tuple(tuple(sorted(ids)) for ids in changed)

    def raced(self, children: list[Kept], number: int) -> dict[str, Any]:
        """Returns a round's record: each child's sums over all sequences (None: dropped), and the positions scored."""
        settings, plans = self.settings, [self.plan(kept) for kept in children]
        elite_sums = torch.stack([self.sums[kept] for kept in self.ranked()[: settings.survivors]])

        def score(running: list[int], sequences: list[int]) -> Tensor:
            scored = self.evaluator.sequence_sums([plans[i] for i in running], (settings.fitness,), sequences)
            return self.sign * scored.sums[settings.fitness]

        outcome = race(
            score,
            len(children),
            self.evaluator.weights(settings.fitness),
            elite_sums,
            elites=len(elite_sums),
            level=settings.race_level,
            seed=settings.seed + number,
        )
        whole = outcome.sums.isfinite().all(1).tolist()
        rows = [sums.tolist() if complete else None for sums, complete in zip(outcome.sums, whole, strict=True)]
        return {"sums": rows, "token_evaluations": outcome.spent}

    def add(self, children: list[Kept], record: Mapping[str, Any]) -> None:
        """Adds a round's record, just made or read back from the journal."""
        for kept, sums in zip(children, record["sums"], strict=True):
            if sums is not None:
                self.sums[kept] = torch.tensor(sums, dtype=torch.float64)


def _near_border(experts: list[int], rng: random.Random) -> int | None:
    """Draws one of the experts, the first ones most often; None of none."""
    if not experts:
        return None
    at = 0
    while at + 1 < len(experts) and rng.random() > BORDER:
        at += 1
    return experts[at]
