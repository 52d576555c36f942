"""EEP for a task: which experts stay, and how all of them merge into those that do, as a plan to export.

The task is cut into three parts. Candidates are scored on the first; the best of them are ranked again on the second;
the third is looked at once, at the end, and its figures are those to report. The search itself is in search.py.
Source: EEP, arXiv 2407.00945.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import check_known
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import fingerprint_of
from moeprune_ext.data.tasks import SPLITS, Task, sequences, split_task
from moeprune_ext.eep.fitness import AnswerFitness, TaskFitness, candidate_plan, warn_if_hopeless
from moeprune_ext.eep.operators import Layout, given_mask, is_mask
from moeprune_ext.eep.search import Fitness, SearchOutcome, layout_settings, search
from moeprune_ext.eep.settings import EepSettings
from moeprune_ext.eep.starts import starting_masks
from moeprune_ext.files import finite_or_none, write_json
from moeprune_ext.intervals import shares_right
from moeprune_ext.models.apply import check_active, check_mappable, full_plan
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.merging import MapRouter, mapped_layer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.progress import View

PLAN, PRUNED_PLAN, RESULT = "plan.json", "pruned_plan.json", "result.json"

Mask = Mapping[int, Sequence[int]]  # {decoder layer: ids of the experts kept}
MakeScorer = Callable[[str, str], "TaskFitness | AnswerFitness"]  # of a split, by a fitness


@dataclass(frozen=True, eq=False)
class EepResult:
    """What was found, and what it is worth.

    Attributes:
        plan: the best plan: a mask, or merges; `export` and `applied` take the result for it.
        pruned_plan: the best mask, what pruning alone found.
        merge_map: {decoder layer: float32 [k', E]}, W_EM of the best; one-hot rows where it is a mask.
        router_map: {decoder layer: float32 [k', E]}, W_RM of the best; likewise.
        fitness: what was searched by.
        scores: {"full" (the model as it is), "pruned" (the mask), "best": {"train", "valid", "test": value}}, by the
            fitness, as measured: an accuracy, an ESAP, or the nll per answer token, which is lower-better.
        accuracy: likewise the share of examples answered right, whatever the fitness.
        examples: how many each split has.
        evaluations: candidates scored on train.
        seed: of the search.
        history: see search.SearchOutcome; of the fitness nll it shows exp(-nll), which is what the search compares.
    """

    plan: PruningPlan
    pruned_plan: PruningPlan
    merge_map: dict[int, Tensor]
    router_map: dict[int, Tensor]
    fitness: str
    scores: dict[str, dict[str, float]]
    accuracy: dict[str, dict[str, float]]
    examples: dict[str, int]
    evaluations: int
    seed: int
    history: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """The best's fitness on the training split."""
        return self.scores["best"]["train"]

    @property
    def valid_score(self) -> float:
        """The best's fitness on the validation split."""
        return self.scores["best"]["valid"]

    @property
    def test_score(self) -> float:
        """The best's fitness on the test split."""
        return self.scores["best"]["test"]

    @property
    def pruned_score(self) -> float:
        """The mask's fitness on the training split."""
        return self.scores["pruned"]["train"]

    @property
    def pruned_valid_score(self) -> float:
        """The mask's fitness on the validation split."""
        return self.scores["pruned"]["valid"]

    @property
    def pruned_test_score(self) -> float:
        """The mask's fitness on the test split."""
        return self.scores["pruned"]["test"]

    def as_json(self) -> dict[str, Any]:
        """Returns what result.json holds: everything but plans and history; None for what is not finite."""
        return {
            "fitness": self.fitness,
            "merges": bool(self.plan.merges),
            "scores": _finite(self.scores),
            "accuracy": _finite(self.accuracy),
            "accuracy_intervals": {
                name: {split: interval.as_json() for split, interval in shares_right(values, self.examples).items()}
                for name, values in self.accuracy.items()
            },
            "examples": self.examples,
            "evaluations": self.evaluations,
            "active": self.plan.active,
            "seed": self.seed,
        }


def eep(
    model: nn.Module | MoeModel,
    task: Task,
    keep: int | Mapping[int, int] = 4,
    fitness: str = EepSettings.fitness,
    *,
    valid: Task | None = None,
    test: Task | None = None,
    active: int | None = EepSettings.active,
    layer_groups: int | Sequence[Sequence[int]] | None = EepSettings.layer_groups,
    starts: str | Mapping[str, Mask] = EepSettings.starts,
    tie_break: str | None = EepSettings.tie_break,
    per_call: int = EepSettings.per_call,
    cross_at_least: int = EepSettings.cross_at_least,
    prune_iters: int = EepSettings.prune_iters,
    merge_iters: int = EepSettings.merge_iters,
    length_normalized: bool = EepSettings.length_normalized,
    seed: int = EepSettings.seed,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> EepResult:
    """Searches the experts, then the merges, with which the model does a task best (arXiv 2407.00945).

    Warns before the search of a task that the full model fails at, with the likely cause. Under torchrun the sequences
    are dealt out over the processes.

    Args:
        model: a transformers model, or the MoeModel made of it.
        task: what candidates are scored on.
        keep: experts that stay, of every layer or {decoder layer: k'}; layers whose experts are looked up by token keep
            all.
        fitness: "accuracy" (of multiple choice, or of token-exact answers), "esap" or "nll" of the right answers'
            tokens: how near the model stays to the full one there, or how likely it finds them. For parents' thresholds
            nll counts as exp(-nll) (our choice).
        valid: a task of its own to rank the best again; None: a quarter of `task`, equal examples in one part.
        test: likewise, to measure what was found.
        active: experts per token, fewer than the model's; None: as many.
        layer_groups: layers that share matrices, which shrinks the search of a deep model: lists of decoder layers, or
            how many neighbours share.
        starts: "criteria": the masks of every criterion on the training examples, and naee's where layers share nothing
            and its router can be run alone, are the first of 30 starts; "random" is the paper's; or {name: {decoder
            layer: ids}}, masks of your own in the place of the criteria's.
        tie_break: see EepSettings, as for the next two.
        per_call: children scored in one call.
        cross_at_least: candidates that may cross.
        prune_iters: candidates that prune, starts included.
        merge_iters: candidates that merge; 0 prunes only, which works for every router; merging needs a router of known
            formula without groups.
        length_normalized: choices compare by log-likelihood per token.
        seed: of the splits and the search.
        out: a directory for plan.json (the best), pruned_plan.json (the best mask), result.json (what each is worth),
            and the search's files; a directory with a history is resumed.
        progress: whether to show progress on stderr, or the View to show it on.
        on_generation: called after each call of candidates that are scored together; see search.search.
        **options: see CandidateEvaluator; memory_budget holds for the split being scored. `**PAPER` sets what the paper
            does.

    Raises:
        ValueError: before any candidate is scored, for settings that cannot be, for a task too small to cut, for a
            router that cannot be merged, for merges that memory_budget cannot hold, and for a directory of another
            search.
    """
    kind, masks = (starts, {}) if isinstance(starts, str) else ("criteria", starts)
    settings = EepSettings(
        fitness=fitness,
        active=active,
        layer_groups=layer_groups,
        starts=kind,
        tie_break=tie_break,
        per_call=per_call,
        cross_at_least=cross_at_least,
        prune_iters=prune_iters,
        merge_iters=merge_iters,
        length_normalized=length_normalized,
        seed=seed,
    )
    moe = MoeModel.of(model)
    layout, settings = check_request(moe.layers, keep, settings)
    for name, mask in masks.items():
        given_mask(layout, mask, f"starts[{name!r}]")
    if settings.merge_iters:
        check_mergeable(moe.layers, layout)
    parts = dict(zip(SPLITS, split_task(task, valid, test, seed), strict=True))
    recorded = known_settings(moe, layout, parts["train"], settings)
    check_folder(out, recorded)
    make = _scorers(moe, layout, parts, settings, options)
    scorers = {split: make(split, fitness) for split in SPLITS}
    for split in SPLITS:  # plans are measured by accuracy at the end: what it cannot have is refused now
        judge = scorers[split] if fitness == "accuracy" else make(split, "accuracy")
        if split == "train":
            warn_if_hopeless(judge)
    if starts == "criteria":
        masks = starting_masks(moe, parts["train"], layout, seed=seed, out=out, progress=progress)
    outcome = search(
        scorers["train"],
        layout,
        settings,
        masks=list(masks.values()),
        validate=scorers["valid"],
        identity={**recorded, **scorers["train"].evaluator.identity},
        out=out,
        progress=progress,
        on_generation=on_generation,
    )
    result = _measured(outcome, settings, scorers, make)
    if out is not None and distributed.is_first():
        result.plan.save(Path(out) / PLAN)
        result.pruned_plan.save(Path(out) / PRUNED_PLAN)
        write_json(Path(out) / RESULT, result.as_json(), indent=1)
    return result


# ---- what is asked for


def check_request(
    layers: Mapping[int, MoeLayer], keep: int | Mapping[int, int], settings: EepSettings
) -> tuple[Layout, EepSettings]:
    """Makes the layout of a search, before the weights are needed.

    Args:
        layers: of a model, whose weights need not be loaded.
        keep: see `eep`.
        settings: see EepSettings.

    Returns:
        The layout, and the settings, whose `active` is None where the routers select as many as asked for.

    Raises:
        ValueError: for a request that cannot be.
    """
    active = settings.active
    check_active(active, layers)
    if all(layer.shape.top_k == active for layer in layers.values()):
        settings, active = replace(settings, active=None), None
    shapes = {index: layer.shape_with(active) for index, layer in layers.items() if layer.shape.prunable}
    if not shapes:
        raise ValueError("the model's experts are all looked up by token, so none can go")
    groups = settings.layer_groups
    if isinstance(groups, int):
        order = sorted(shapes)
        groups = [order[at : at + groups] for at in range(0, len(order), groups)]
    layout = Layout.of(
        {index: shape.num_experts for index, shape in shapes.items()},
        keep,
        groups,
        {index: shape.n_group for index, shape in shapes.items()},
    )
    for index, kept in layout.by_layer(layout.keep).items():
        if kept < shapes[index].min_kept:
            raise ValueError(
                f"layer {index} cannot keep {kept} experts: its router needs at least {shapes[index].min_kept} (it "
                f"selects {shapes[index].top_k} per token); keep more, or have fewer active"
            )
    return layout, settings


def check_mergeable(layers: Mapping[int, MoeLayer], layout: Layout, map_router: MapRouter = mapped_layer) -> None:
    """Refuses (ValueError), with the reason, a model whose routers cannot map their scores.

    Args:
        layers: of the model.
        layout: of the search.
        map_router: finds how a layer's router can map its scores.
    """
    try:
        for index in layout.by_layer(layout.keep):
            check_mappable(layers[index], layers[index].shape, map_router)
    except ValueError as reason:
        raise ValueError(f"{reason}; merge_iters=0 prunes only") from None


def check_folder(out: str | os.PathLike[str] | None, known: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError if `out` is a file, or holds a search with other settings than those known of this one."""
    if out is None:
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is not a directory")
    check_known(Path(out), known or {})


def known_settings(moe: MoeModel, layout: Layout, train: Task, settings: EepSettings) -> dict[str, Any]:
    """Returns what search.json says of a search as far as it is known before any work."""
    data = fingerprint_of(sequences(train, settings.fitness))
    return {"model": moe.fingerprint, "data": data, **layout_settings(layout), **settings.recorded()}


# ---- what came out


def _scorers(
    moe: MoeModel, layout: Layout, parts: Mapping[str, Task], settings: EepSettings, options: Mapping[str, Any]
) -> MakeScorer:
    """Returns a function that makes the scorer of a split, and refuses merges that it has no room for."""

    def make(split: str, fitness: str) -> TaskFitness | AnswerFitness:
        scorer: TaskFitness | AnswerFitness
        if fitness == "accuracy":
            normalized = settings.length_normalized
            scorer = TaskFitness(moe, parts[split], length_normalized=normalized, active=settings.active, **options)
        else:
            scorer = AnswerFitness(moe, parts[split], fitness, active=settings.active, **options)
        if settings.merge_iters:
            scorer.evaluator.check_merged(layout.by_layer(layout.keep))
        return scorer

    return make


def _measured(
    outcome: SearchOutcome,
    settings: EepSettings,
    scorers: Mapping[str, TaskFitness | AnswerFitness],
    make: MakeScorer,
) -> EepResult:
    """Measures the full model, the best mask and the best plan on every split."""
    pruned, train, valid = outcome.pruned, outcome.pruned_train, outcome.pruned_valid
    if is_mask(outcome.best):  # a merge may turn out to be a mask, too
        pruned, train, valid = outcome.best, outcome.train, outcome.valid
    assert valid is not None and outcome.valid is not None
    evaluator = scorers["train"].evaluator
    plans = {
        "full": full_plan(evaluator.moe),
        "pruned": candidate_plan(pruned, evaluator, settings.active),
        "best": candidate_plan(outcome.best, evaluator, settings.active),
    }
    searched: dict[str, dict[str, Fitness]] = {
        "train": {"pruned": train, "best": outcome.train},
        "valid": {"pruned": valid, "best": outcome.valid},
        "test": {},
    }
    by_fitness = {split: _complete(scorers[split], plans, searched[split]) for split in SPLITS}
    by_accuracy = by_fitness
    if settings.fitness != "accuracy":
        by_accuracy = {split: _complete(make(split, "accuracy"), plans, {}) for split in SPLITS}
    merges = outcome.best.merges
    return EepResult(
        plan=plans["best"],
        pruned_plan=plans["pruned"],
        merge_map={layer: merge.experts for layer, merge in merges.items()},
        router_map={layer: merge.router for layer, merge in merges.items() if merge.router is not None},
        fitness=settings.fitness,
        scores={
            name: {split: _as_measured(settings.fitness, by_fitness[split][name].score) for split in SPLITS}
            for name in plans
        },
        accuracy={name: {split: by_accuracy[split][name].score for split in SPLITS} for name in plans},
        examples={split: len(scorer.task.examples) for split, scorer in scorers.items()},
        evaluations=outcome.evaluations,
        seed=settings.seed,
        history=outcome.history,
    )


def _complete(
    scorer: TaskFitness | AnswerFitness, plans: Mapping[str, PruningPlan], known: Mapping[str, Fitness]
) -> dict[str, Fitness]:
    """Returns the fitness of all plans, of which some is known."""
    rest = {name: plan for name, plan in plans.items() if name not in known}
    return {**known, **dict(zip(rest, scorer(list(rest.values())), strict=True))}


def _as_measured(fitness: str, score: float) -> float:
    """Turns what the search maximises into the fitness as it is measured."""
    if fitness != "nll" or math.isnan(score):
        return score
    return -math.log(score) if score > 0 else math.inf


def _finite(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: {split: finite_or_none(value) for split, value in values.items()} for name, values in scores.items()}
