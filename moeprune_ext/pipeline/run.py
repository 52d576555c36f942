"""One run to one budget: calibrate, choose the criterion, search, rank on held-out text, repair, export, measure.

Every stage's product is a file under OUT/moeprune/, and a stage whose product is there is not done again; inside a
stage the search and the repair go on where they were. So a run that is killed anywhere goes on when it is asked for
again, and ends with the same checkpoint. Several budgets share what does not depend on one: the model, the text, the
statistics, and the teacher (Source).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, in_units, unscored
from moeprune_ext.allocation.choice import CriterionChoice, auto_criterion
from moeprune_ext.allocation.evolve import SearchSpace, search
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.refine import refine
from moeprune_ext.allocation.selection import HeldOut, rank_held_out, simple_plans
from moeprune_ext.artifacts.journal import refuse_other
from moeprune_ext.artifacts.measured import Measured
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.calibration.criteria import score_experts
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.checkpoint.export import export
from moeprune_ext.checkpoint.mtp import load_mtp
from moeprune_ext.checkpoint.read import Checkpoint
from moeprune_ext.checkpoint.weights import quantised_experts
from moeprune_ext.files import read_json, write_json
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.pipeline.measure import measure
from moeprune_ext.pipeline.settings import PruneSettings
from moeprune_ext.pipeline.texts import Domains, Texts, flat
from moeprune_ext.progress import View
from moeprune_ext.repair.checks import NotRepairable
from moeprune_ext.repair.repair import TARGETS, check_repairable, repair

FOLDER = "moeprune"  # of a run's products, inside its output directory


@dataclass(frozen=True)
class Source:
    """What all budgets of a model share; the model is loaded when a stage first needs it.

    Attributes:
        checkpoint: the model's directory, read without its weights.
        dtype: that the model is loaded in, for the record.
        load: loads the model.
        texts: the parts of the text.
        settings: how to prune.
        shared: directory for the statistics.
        progress: whether to show progress bars.
        say: is given a line after every stage.
    """

    checkpoint: Checkpoint
    load: Callable[[], Any]
    texts: Texts
    settings: PruneSettings
    shared: Path
    dtype: str = "auto"
    progress: bool | View = False
    say: Callable[[str], None] = lambda line: None

    def check(self) -> None:
        """Refuses (ValueError) a directory of statistics of another model or text; begins it otherwise."""
        asked = {"model": self.checkpoint.fingerprint, "dtype": self.dtype, "seed": str(self.settings.search.seed)}
        asked |= self.texts.fingerprints()
        file = self.shared / "source.json"
        if file.exists():
            refuse_other(self.shared, read_json(file), asked)
        else:
            write_json(file, asked, indent=1)

    @cached_property
    def moe(self) -> MoeModel:
        """The model."""
        return MoeModel.of(self.load())

    @cached_property
    def stats(self) -> RoutingStats:
        """Statistics of the calibration text, from their file if they are there."""
        file = self.shared / "stats.safetensors"
        if distributed.from_first(file.exists):
            return RoutingStats.load(file)
        has_mtp = self.checkpoint.extra and not self.settings.drop_mtp
        mtp = load_mtp(self.checkpoint.folder, self.moe) if has_mtp else []
        stats = calibrate(self.moe, flat(self.texts.calibration), mtp=mtp, progress=self.progress)
        if distributed.is_first():
            stats.save(file)
        self.say(f"calibrated on {stats.tokens:,} tokens")
        return stats

    @cached_property
    def searcher(self) -> CandidateEvaluator:
        """Scores plans on the search's text."""
        return self._evaluator(self.texts.search)

    @cached_property
    def judge(self) -> CandidateEvaluator:
        """Scores plans on the text that chooses."""
        return self._evaluator(self.texts.held_out)

    @cached_property
    def reporter(self) -> CandidateEvaluator:
        """Scores plans on the test text."""
        return self._evaluator(self.texts.test)

    @cached_property
    def naee(self) -> ExpertScores | None:
        """naee's order on the search's text; None where the router is none that naee knows."""
        file = self.shared / "naee.json"
        if distributed.from_first(file.exists):
            return ExpertScores.load(file)
        try:
            scores = naee_scores(
                self.moe, self.searcher.sequences, seed=self.settings.search.seed, progress=self.progress
            )
        except ValueError:  # the choice says which router it is
            return None
        if distributed.is_first():
            scores.save(file)
        return scores

    def _evaluator(self, domains: Domains) -> CandidateEvaluator:
        settings = self.settings
        return CandidateEvaluator(
            self.moe, domains, memory_budget=settings.memory_budget, router=settings.router, seed=settings.search.seed
        )

    def scores(self, criterion: str | tuple[int, int, str]) -> ExpertScores:
        """Scores experts by a criterion, under the limits."""
        if criterion == "naee":
            samples = flat(self.texts.calibration)
            scores = naee_scores(self.moe, samples, seed=self.settings.search.seed, progress=self.progress)
            scores = replace(scores, mtp=score_experts(self.stats).mtp)  # of which naee says nothing
        else:
            scores = score_experts(self.stats, criterion, seed=self.settings.search.seed)
        return self.settings.limited(scores, self.stats)


@dataclass(frozen=True)
class Run:
    """One budget's run.

    Attributes:
        source: what it shares with other budgets.
        budget: how many experts go.
        out: the checkpoint's directory.
    """

    source: Source
    budget: Budget
    out: Path

    def check(self) -> None:
        """Begins the run's directory.

        Raises:
            ValueError: for a budget that cannot be, and a directory of another run, or with other files.
        """
        shapes = {index: layer.shape for index, layer in self.source.checkpoint.layers.items()}
        in_units(self.source.settings.limited(unscored(shapes), None), self.budget)
        settings = replace(self.source.settings, search=replace(self.source.settings.search, sparsity=self.budget))
        asked = {"model": self.source.checkpoint.fingerprint, **self.source.texts.fingerprints(), **settings.recorded()}
        asked["dtype"] = self.source.dtype

        def begin() -> None:
            file = self.products / "request.json"
            if file.exists():
                refuse_other(self.out, read_json(file), asked)
            elif self.out.exists() and (not self.out.is_dir() or not self._is_begun()):
                raise ValueError(f"{self.out} exists and is not the directory of a run; give a new one")
            else:
                write_json(file, asked, indent=1)
            self.source.check()

        distributed.from_first(begin)

    def _is_begun(self) -> bool:
        """Whether a directory holds no more than a run that was killed while it began, or statistics of several."""
        others = [path for path in self.out.iterdir() if path != self.products]
        begun = (".request.json", ".source.json", "source.json", "stats.safetensors", "naee.json")
        inside = list(self.products.iterdir()) if self.products.is_dir() else []
        return not others and all(path.name.startswith(begun) for path in inside)

    def finish(self) -> tuple[PruningPlan, HeldOut, Measured]:
        """Does the stages that are not done, and returns the plan, how it was chosen, and what it is worth."""
        self._check_repair()
        plan, held_out = self.chosen()
        repaired = self.repaired(plan)
        self._export(repaired)
        measured = self._stage(
            "measured.json",
            lambda: measure(
                self.source.reporter, self.source.checkpoint.folder, self.out, plan, repaired, self._default
            ),
            Measured.from_json,
        )
        return repaired, held_out, measured

    @property
    def products(self) -> Path:
        """The directory of the stages' files."""
        return self.out / FOLDER

    @property
    def _default(self) -> PruningPlan | None:
        """The uniform plan by the default criterion, what a user would get otherwise; None if there is none."""
        plans = simple_plans(self.source.scores("reap"), self.budget)
        return plans.get("uniform")

    def _stage(self, name: str, work: Callable[[], Any], read: Callable[[Any], Any]) -> Any:
        """Returns what a stage's file holds, or does the stage and writes it."""
        file = self.products / name
        content = distributed.from_first(lambda: read_json(file) if file.exists() else None)
        if content is not None:
            return read(content)
        result = work()
        if distributed.is_first():
            write_json(file, result.as_json(), indent=1)
        return result

    # ---- stages

    def chosen(self) -> tuple[PruningPlan, HeldOut]:
        """Chooses a criterion, searches counts, and takes the plan that the held-out text confirms."""
        file, about = self.products / "searched.json", self.products / "held_out.json"
        if distributed.from_first(lambda: file.exists() and about.exists()):
            return PruningPlan.load(file), HeldOut.from_json(read_json(about))
        source, settings = self.source, self.source.settings
        choice, scores = None, None
        if settings.criterion == "auto":
            choice = self.choice()
            scores = choice.scores
            source.say(f"criterion {scores.criterion}, of {choice.evaluations} plans scored")
        else:
            scores = source.scores(settings.criterion)
        if distributed.is_first():
            scores.save(self.products / "scores.json")  # for the report
        simple = simple_plans(scores, self.budget, choice.plan if choice else None)
        joining = [simple["global"]] if choice is not None and "global" in simple else []
        space = SearchSpace.of(scores, replace(settings.search, sparsity=self.budget), joining)
        outcome = search(source.searcher, space, out=self.products / "search", progress=source.progress)
        source.say(f"searched: {settings.search.fitness} {outcome.score:.4f} on the search text")
        plans = simple | {f"search {i}": plan for i, plan in enumerate(outcome.finalists, 1)}
        if settings.refine:
            refined = refine(
                source.searcher,
                outcome.plan,
                scores,
                rounds=settings.refine,
                fitness=settings.search.fitness,
                seed=settings.search.seed,
                out=self.products / "refine",
            )
            plans |= {f"refined {i}": plan for i, plan in enumerate(refined.finalists[1:], 1)}
        ranked = rank_held_out(
            source.judge,
            plans,
            baseline=next(iter(simple)),
            simple=list(simple)[1:],
            metric=settings.search.fitness,
            objective=settings.search.objective,
            seed=settings.search.seed,
        )
        source.say(ranked.says)
        plan = plans[ranked.winner]
        if distributed.is_first():
            plan.save(file)
            write_json(about, ranked.as_json(), indent=1)
        return plan, ranked

    def choice(self) -> CriterionChoice:
        """Chooses the criterion, or reads what was chosen."""
        source, settings = self.source, self.source.settings
        return auto_criterion(
            source.searcher,
            source.stats,
            self.budget,
            fitness=settings.search.fitness,
            objective=settings.search.objective,
            limits=lambda scores: settings.limited(scores, source.stats),
            seed=settings.search.seed,
            naee=source.naee,
            file=self.products / "choice.json",
            progress=source.progress,
        )

    def repaired(self, plan: PruningPlan) -> PruningPlan:
        """Repairs the plan in the ways asked for, and takes the one that the held-out text likes best, or none."""
        source, settings = self.source, self.source.settings
        file = self.products / "plan.json"
        if distributed.from_first(file.exists):
            self._clean_repairs()
            return PruningPlan.load(file)
        fitness, objective = settings.search.fitness, settings.search.objective
        plans, texts = {"none": plan}, source.texts
        for name, options in self._ways(plan).items():
            try:
                result = repair(
                    source.moe,
                    plan,
                    texts.fitted,
                    held_out=flat(texts.held_out),
                    out=self.products / f"repair-{name}",
                    progress=source.progress,
                    **options,
                )
            except NotRepairable as refusal:
                if settings.repair != "auto":
                    raise
                source.say(f"repair {name} is left out: {refusal}")
                continue
            plans[name] = result.plan
        ranked = rank_held_out(source.judge, plans, baseline="none", metric=fitness, objective=objective)
        if len(plans) > 1:
            source.say(f"repair: {ranked.best}, {fitness} {ranked.scores[ranked.best]:.4f} on held-out text")
        if distributed.is_first():
            write_json(self.products / "repair.json", ranked.as_json(), indent=1)
            plans[ranked.best].save(file)
        distributed.from_first(file.exists)  # the others go on when it is there
        plan = PruningPlan.load(file)  # with its weights mapped from there
        self._clean_repairs()
        return plan

    def _check_repair(self) -> None:
        """Refuses a model that cannot be repaired as asked for before any other work."""
        settings, done = self.source.settings, self.products / "plan.json"
        if settings.repair in TARGETS and not distributed.from_first(done.exists):
            if odd := quantised_experts(self.source.checkpoint):
                raise ValueError(
                    f"{odd}: quantised experts cannot be repaired; use --repair off, or a dequantised copy"
                )
            check_repairable(self.source.moe, settings.repair, self.source.texts.fitted)

    def _clean_repairs(self) -> None:
        """Removes the repairs' directories: the plan has the weights."""
        if distributed.is_first():
            for folder in self.products.glob("repair-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _ways(self, plan: PruningPlan) -> dict[str, dict[str, Any]]:
        """Returns {name: arguments} of the repairs to try."""
        settings = self.source.settings
        if settings.repair == "off" or not any(plan.pruned_counts.values()):
            return {}
        if odd := quantised_experts(self.source.checkpoint):
            self.source.say(f"repair is left out, so that quantised experts stay the bytes that they are ({odd})")
            return {}
        targets = TARGETS if settings.repair == "auto" else (settings.repair,)
        ways: dict[str, dict[str, Any]] = {target: {"target": target} for target in targets}
        criterion = self._criteria()
        if settings.sequential == "off" or (criterion is None and settings.sequential == "auto"):
            return ways
        anew = {
            f"{target}-sequential": {**way, "sequential": True, "criterion": criterion} for target, way in ways.items()
        }
        return anew if settings.sequential == "on" else ways | anew

    def _criteria(self) -> str | dict[int, str] | None:
        """Returns the criterion of every layer, None where experts cannot be scored anew by it."""
        settings, file = self.source.settings, self.products / "choice.json"
        if settings.criterion != "auto":
            named = settings.criterion if isinstance(settings.criterion, str) else None
            return None if settings.protect_super or named == "random" else named
        if settings.protect_super:
            return None
        choice = CriterionChoice.load(file)
        return choice.per_layer or str(choice.scores.criterion).removeprefix("auto: ")

    def _export(self, plan: PruningPlan) -> None:
        """Writes the checkpoint beside the stages' files; config.json comes last and says that it is whole."""
        if not distributed.is_first() or (self.out / "config.json").exists():
            return
        beside = self.products / "checkpoint"
        if not beside.exists():
            drop = self.source.settings.drop_mtp
            export(self.source.checkpoint.folder, plan, beside, drop_mtp=drop, say=self.source.say)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(self.out / path.name)
        beside.rmdir()
