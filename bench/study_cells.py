"""The measurements of the study (study.py): small cells, each of one part, one seed, and a few rows.

A seed draws all of a cell's text, its problems and questions, its random plans and its search. Everything of one seed
shares one Bench: the texts, the statistics, the full model's answers, and what has been measured already.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import moeprune_ext as mp
from moeprune_ext.allocation.evolve import SearchSpace, search
from moeprune_ext.allocation.grape import expert_similarity, plan_from_similarity
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.patterns import allocate, pattern_weights
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.data.tasks import Task, answer_batches, make_task
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import (
    PROBLEMS,
    QUESTIONS,
    SEARCHED_GENERATIONS,
    SEARCHED_POPULATION,
    SEQUENCE_LENGTH,
    SPARSITIES,
    demo_folder,
    demo_texts,
    domain_batches,
    word_order_task,
)
from moeprune_ext.demo.tasks import arithmetic_records
from moeprune_ext.eep.fitness import TaskFitness
from moeprune_ext.eep.settings import EepSettings
from moeprune_ext.eep.table import eep_table
from moeprune_ext.models.apply import full_plan
from moeprune_ext.pipeline.run import Run, Source
from moeprune_ext.pipeline.settings import PruneSettings, SearchSettings
from moeprune_ext.pipeline.texts import flat
from moeprune_ext.repair.repair import repair

Rows = dict[str, dict[str, float]]  # {row: {metric: value}}

CALIBRATIONS = {  # of part b, with the budgets that say something: a task loses next to nothing at 25 %
    "mixed text": (0.25, 0.5),
    "arithmetic text": (0.5, 0.75),
    "arithmetic answers": (0.5, 0.75),
}
REPAIRED = ("reap", 0.5)  # criterion and budget of part f


@dataclass(frozen=True)
class Sizes:
    """How much is measured; all figures of one study have the same.

    Attributes:
        problems: of the arithmetic test.
        questions: of the word order test.
        criteria: rows of part a.
        population: plans of a search's generation.
        generations: of a search.
        task_sequences: of arithmetic text that calibrates in part b.
        eep_examples: arithmetic problems of EEP's training and validation split.
        eep_kept: experts kept per layer in part d.
        eep_iterations: candidates that prune, and that merge.
        eep_seeds: seeds of part d, which takes most time.
        random_plans: plans of part e for each budget.
        plans_per_cell: of those.
        repair_sequences: of each domain, fitted in part f.
    """

    problems: int = PROBLEMS
    questions: int = QUESTIONS
    criteria: tuple[str, ...] = ("frequency", "seer", "weighted_ean", "reap", "man", "naee")
    population: int = SEARCHED_POPULATION
    generations: int = SEARCHED_GENERATIONS
    task_sequences: int = 48
    eep_examples: tuple[int, int] = (60, 100)
    eep_kept: tuple[int, ...] = (8, 4)
    eep_iterations: tuple[int, int] = (40, 160)
    eep_seeds: int = 3
    random_plans: int = 200
    plans_per_cell: int = 25
    repair_sequences: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


QUICK = Sizes(
    problems=12,
    questions=6,
    criteria=("reap", "naee"),
    population=4,
    generations=2,
    task_sequences=4,
    eep_examples=(8, 8),
    eep_kept=(4,),
    eep_iterations=(6, 4),
    eep_seeds=1,
    random_plans=6,
    plans_per_cell=6,
    repair_sequences=(1, 2),
)


@dataclass(frozen=True)
class Bench:
    """One seed's texts and tasks, and the measuring of plans on them.

    Attributes:
        model: the embedded model.
        tokenizer: of the model.
        sizes: how much is measured.
        seed: of everything random.
        folder: directory for what stages leave.
        known: {(plan, measure): metrics} measured before.
    """

    model: Any
    tokenizer: Any
    sizes: Sizes
    seed: int
    folder: Path
    known: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source:
        """The demo's text, with the evaluators of its parts."""
        settings = SearchSettings(population=self.sizes.population, generations=self.sizes.generations, seed=self.seed)
        return Source(
            checkpoint=read_checkpoint(demo_folder()),
            load=lambda: self.model,
            texts=demo_texts(self.tokenizer, self.seed),
            settings=PruneSettings(search=settings, repair="hidden", sequential="off"),
            shared=self.folder / "shared",
        )

    @cached_property
    def problems(self) -> dict[str, Task]:
        """Arithmetic, no problem in two splits: train and valid as EEP takes them, and what all parts are tested on."""
        train, valid = self.sizes.eep_examples
        records = arithmetic_records(train + valid + self.sizes.problems, self.seed)
        parts = {"train": records[:train], "valid": records[train : train + valid], "test": records[train + valid :]}
        return {name: make_task(f"arithmetic, {name}", part, self.tokenizer) for name, part in parts.items()}

    @cached_property
    def arithmetic(self) -> TaskFitness:
        """Answers the test problems."""
        return TaskFitness(self.source.moe, self.problems["test"])

    @cached_property
    def word_order(self) -> TaskFitness:
        """Answers the word order questions."""
        return TaskFitness(self.source.moe, word_order_task(self.tokenizer, self.sizes.questions, self.seed))

    @cached_property
    def _scores(self) -> dict[tuple[str, str], ExpertScores]:
        return {}

    def batches(self, calibration: str) -> list[TokenBatch]:
        """Returns the text of a calibration of part b."""
        if calibration == "mixed text":
            return flat(self.source.texts.calibration)
        if calibration == "arithmetic text":
            return domain_batches(self.tokenizer, "train", self.sizes.task_sequences, self.seed)["arithmetic"]
        return [batch for split in ("train", "valid") for batch in answer_batches(self.problems[split])]

    def scores(self, criterion: str, calibration: str = "mixed text") -> ExpertScores:
        """Scores the experts; a calibration is run once."""
        if (calibration, criterion) not in self._scores:
            batches = self.batches(calibration)
            stats = self.source.stats if calibration == "mixed text" else calibrate(self.source.moe, batches)
            for name in (*CRITERIA, "random"):
                self._scores[calibration, name] = score_experts(stats, name, seed=self.seed)
            self._scores[calibration, "naee"] = naee_scores(self.source.moe, batches, seed=self.seed)
        return self._scores[calibration, criterion]

    def measure(
        self, plans: Mapping[str, PruningPlan], measures: Sequence[str] = ("text", "generation", "choice")
    ) -> Rows:
        """Measures plans, those not measured before together.

        Args:
            plans: {row: plan}.
            measures: "text": esap, kl and nll on the test text; "generation": share of problems answered exactly;
                "choice": share of questions answered right.
        """
        run = {"text": self._text, "generation": self._generation, "choice": self._choice}
        for name in measures:
            new = {_key(plan): plan for plan in plans.values() if (_key(plan), name) not in self.known}
            for key, metrics in zip(new, run[name](list(new.values())) if new else (), strict=True):
                self.known[key, name] = metrics
        return {
            row: {metric: value for name in measures for metric, value in self.known[_key(plan), name].items()}
            for row, plan in plans.items()
        }

    def _text(self, plans: list[PruningPlan]) -> list[dict[str, float]]:
        return text_metrics(self.source.reporter, plans)

    def _generation(self, plans: list[PruningPlan]) -> list[dict[str, float]]:
        return [{"generation": one.score} for one in self.arithmetic(plans)]

    def _choice(self, plans: list[PruningPlan]) -> list[dict[str, float]]:
        return [{"choice": one.score} for one in self.word_order(plans)]


def _key(plan: PruningPlan) -> str:
    return str((plan.kept, sorted((layer, merge.digest) for layer, merge in plan.merges.items())))


def text_metrics(evaluator: mp.CandidateEvaluator, plans: Sequence[PruningPlan]) -> list[dict[str, float]]:
    """Returns ESAP, KL(full, pruned) and NLL of plans on an evaluator's text."""
    return [
        {"esap": score.esap or 0.0, "kl": score.kl_pq or 0.0, "nll": score.nll or 0.0}
        for score in evaluator.evaluate(plans, ("esap", "kl_pq", "nll"))
    ]


# ---- the parts' cells


def full(bench: Bench) -> Rows:
    """The full model."""
    return bench.measure({"full": full_plan(bench.source.moe)})


def allocations(bench: Bench, sparsity: float, criterion: str) -> Rows:
    """One criterion: the uniform plan, and EvoESAP's."""
    scores = bench.scores(criterion)
    space = SearchSpace.of(scores, replace(bench.source.settings.search, sparsity=sparsity))
    found = search(bench.source.searcher, space)
    return bench.measure({"uniform": mp.uniform_plan(scores, sparsity), "EvoESAP": found.plan})


def pruned(bench: Bench, sparsity: float) -> Rows:
    """What `moeprune prune` makes: it chooses the criterion, searches, and repairs."""
    out = bench.folder / f"prune-{100 * sparsity:.0f}"
    run = Run(bench.source, sparsity, out)
    run.check()
    rows = bench.measure({"prune": run.repaired(run.chosen()[0])})
    shutil.rmtree(out)
    return rows


def criteria(bench: Bench, calibration: str) -> Rows:
    """All criteria of one calibration, uniform."""
    plans = {
        f"{sparsity:.0%} {name}": mp.uniform_plan(bench.scores(name, calibration), sparsity)
        for sparsity in CALIBRATIONS[calibration]
        for name in (*CRITERIA, "naee", "random")
    }
    return bench.measure(plans, ("text", "generation") if calibration == "mixed text" else ("generation",))


def grape(bench: Bench, sparsity: float) -> Rows:
    """GRAPE beside uniform plans."""
    alike = expert_similarity(bench.source.moe, bench.batches("mixed text"), seed=bench.seed)
    by_reap = partial(plan_from_similarity, alike, bench.scores("reap"), sparsity)
    plans = {f"uniform, {name}": mp.uniform_plan(bench.scores(name), sparsity) for name in ("reap", "seer", "naee")}
    plans |= {
        "GRAPE": by_reap(),
        "GRAPE, groups merged": by_reap(merge=True),
        "GRAPE's counts, lowest reap scores leave": by_reap(who="scores"),
    }
    return bench.measure(plans)


def eep_rows(bench: Bench, keep: int) -> Rows:
    """EEP's table at one budget: shares of problems answered exactly."""
    prune_iters, merge_iters = bench.sizes.eep_iterations
    rows = eep_table(
        bench.source.moe,
        bench.problems["train"],
        [keep],
        EepSettings(prune_iters=prune_iters, merge_iters=merge_iters, seed=bench.seed),
        out=bench.folder / f"eep-{keep}",
        valid=bench.problems["valid"],
        test=bench.problems["test"],
    )
    return {row.model: dict(row.accuracy) for row in rows}


def random_plan(bench: Bench, sparsity: float, number: int) -> PruningPlan:
    """Draws a plan: a criterion's order or naee's, and random shares of the budget for the layers."""
    rng = random.Random(f"{bench.seed}:{sparsity}:{number}")
    scores = bench.scores(rng.choice((*CRITERIA, "naee")))
    space = SearchSpace.of(scores, replace(bench.source.settings.search, sparsity=sparsity))
    capacities = list(space.capacities.values())
    return space.plan(allocate(pattern_weights("random", len(capacities), rng), capacities, space.budget))


def random_plans(bench: Bench, sparsity: float, first: int) -> Rows:
    """Random plans' ESAP, KL and NLL on the search text, and what they answer."""
    numbers = range(first, min(first + bench.sizes.plans_per_cell, bench.sizes.random_plans))
    plans = {str(number): random_plan(bench, sparsity, number) for number in numbers}
    answered = bench.measure(plans, ("generation",))
    metrics = text_metrics(bench.source.searcher, list(plans.values()))
    return {row: {**seen, **answered[row]} for row, seen in zip(plans, metrics, strict=True)}


def repairs(bench: Bench, sequences: int) -> Rows:
    """One plan, repaired by so many sequences of each domain; 0: not repaired."""
    criterion, sparsity = REPAIRED
    plan = mp.uniform_plan(bench.scores(criterion), sparsity)
    if sequences:
        most = domain_batches(bench.tokenizer, "train", max(bench.sizes.repair_sequences), bench.seed)
        fitted = [batch.part(slice(0, sequences)) for batch in flat(most)]
        plan = repair(bench.source.moe, plan, fitted, held_out=flat(bench.source.texts.held_out), target="hidden").plan
    return bench.measure({str(sequences * SEQUENCE_LENGTH * len(corpus.DOMAINS)): plan})


Cells = dict[str, Callable[[Bench], Rows]]


def cells_of(part: str, sizes: Sizes, seed: int) -> Cells:
    """Returns what a part measures with one seed, {name of the cell: work}."""
    cells: Cells = {}
    if part == "a":
        cells["full"] = full
        for sparsity in SPARSITIES:
            percent = f"{sparsity:.0%}"
            cells |= {
                f"{percent} {name}": partial(allocations, sparsity=sparsity, criterion=name) for name in sizes.criteria
            }
            cells[f"{percent} prune"] = partial(pruned, sparsity=sparsity)
    elif part == "b":
        cells = {name: partial(criteria, calibration=name) for name in CALIBRATIONS}
    elif part == "c":
        cells = {f"{sparsity:.0%}": partial(grape, sparsity=sparsity) for sparsity in SPARSITIES}
    elif part == "d" and seed < sizes.eep_seeds:
        cells = {f"keep {keep}": partial(eep_rows, keep=keep) for keep in sizes.eep_kept}
    elif part == "e" and seed == 0:
        for sparsity in SPARSITIES:
            for first in range(0, sizes.random_plans, sizes.plans_per_cell):
                cells[f"{sparsity:.0%} {first}"] = partial(random_plans, sparsity=sparsity, first=first)
    elif part == "f":
        cells = {str(count): partial(repairs, sequences=count) for count in (0, *sizes.repair_sequences)}
    return cells
