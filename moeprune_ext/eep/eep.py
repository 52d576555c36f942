"""EEP for a task: which experts stay, and how all of them merge into those that do, as a plan to export.

The task is cut into three parts. Candidates are scored on the first; the best of them are ranked again on the second;
the third is looked at once, at the end, and its figures are those to report. The search itself is eep_search.py's.
Source: EEP, arXiv 2407.00945.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import check_known
from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.data.batches import fingerprint_of
from moeprune_ext.data.tasks import SPLITS, Task, sequences, split_task
from moeprune_ext.eep.fitness import AnswerFitness, TaskFitness, candidate_plan
from moeprune_ext.eep.operators import Layout, given_mask
from moeprune_ext.eep.search import Fitness, SearchOutcome, check_settings, layout_settings, search
from moeprune_ext.eep.starts import starting_masks
from moeprune_ext.files import write_text
from moeprune_ext.models.apply import check_active, full_plan
from moeprune_ext.models.layers import MoeLayer, find_moe_layers
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.models.routers import RoutedLayer

FITNESSES = ("accuracy", "esap", "nll")


PLAN, MERGED, RESULT = "plan.json", "merged.safetensors", "result.json"


# How `eep` searches by default, and the published search as far as it differs: eep(model, task, keep=4, **PAPER).
OURS: dict[str, Any] = {"starts": "criteria", "tie_break": "log_likelihood", "per_call": 4, "cross_at_least": 2}


PAPER: dict[str, Any] = {"starts": "random", "tie_break": None, "per_call": 1, "cross_at_least": 6}


@dataclass(frozen=True, eq=False)
class EepResult:
    """What was found, and what it is worth.

    plan: the best mask, what pruning alone found. best_plan: the best of all, which `export` and `applied` take: the
    same mask, or merges. merge_map, router_map: {decoder layer: float32 [k', E]}, W_EM and W_RM of the best; one-hot
    rows where it is a mask.
    scores: {"full" (the model as it is), "pruned" (the mask), "best": {"train", "valid", "test": value}}, by the
    fitness, as measured: an accuracy, an ESAP, or the nll per answer token, which is lower-better. accuracy: likewise
    the share of examples answered right, whatever the fitness. examples: how many each split has. evaluations:
    candidates scored on train. history: see eep_search.SearchOutcome; of the fitness nll it shows exp(-nll), which is
    what the search compares.
    """

    plan: PruningPlan
    best_plan: Plan
    router_map: dict[int, Tensor]
    merge_map: dict[int, Tensor]
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
        return self.scores["best"]["valid"]

    @property
    def test_score(self) -> float:
        return self.scores["best"]["test"]

    @property
    def pruned_score(self) -> float:
        """The mask's fitness on the training split."""
        return self.scores["pruned"]["train"]

    @property
    def pruned_valid_score(self) -> float:
        return self.scores["pruned"]["valid"]

    @property
    def pruned_test_score(self) -> float:
        return self.scores["pruned"]["test"]

    @property
    def file(self) -> str:
        """Name of the file, in the search's directory, that holds the best plan."""
        return PLAN if isinstance(self.best_plan, PruningPlan) else MERGED

    def as_json(self) -> dict[str, Any]:
        """What result.json holds: everything but the plans and the history; None for what is not finite."""
        return {
            "export": self.file,
            "fitness": self.fitness,
            "scores": _finite(self.scores),
            "accuracy": _finite(self.accuracy),
            "examples": self.examples,
            "evaluations": self.evaluations,
            "active": self.best_plan.active,
            "seed": self.seed,
        }


def eep(
    model: nn.Module,
    task: Task,
    keep: int | Mapping[int, int] = 4,
    fitness: str = "accuracy",
    *,
    valid: Task | None = None,
    test: Task | None = None,
    active: int | None = None,
    layer_groups: int | Sequence[Sequence[int]] | None = None,
    starts: str | Mapping[str, Mapping[int, Sequence[int]]] = "criteria",
    tie_break: str | None = "log_likelihood",
    per_call: int = 4,
    cross_at_least: int = 2,
    prune_iters: int = 40,
    merge_iters: int = 160,
    length_normalized: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> EepResult:
    """Searches the experts, then the merges, with which the model does a task best.

    task: what candidates are scored on. valid, test: tasks of their own; those not given are cut from `task`, each a
    quarter of it, drawn by `seed`, equal examples in one part. keep: experts that stay, of every layer or {decoder
    layer: k'}; layers whose experts are looked up by token keep all. active: experts per token, fewer than the model's;
    None: as many. layer_groups: layers that share matrices, which shrinks the search of a deep model: lists of decoder
    layers, or how many neighbours share.
    fitness: "accuracy" (of multiple choice, or of token-exact answers; ties by the right answers' log-likelihood),
    "esap" or "nll" of the right answers' tokens: how near the model stays to the full one there, or how likely it
    finds them. For parents' thresholds nll counts as exp(-nll) (our choice).
    starts="criteria" (our choice, default): the masks of every criterion of criteria.py on the training examples, and
    naee's where layers share nothing and its router can be run alone, are the first of 30 starts; "random" is the
    paper's; or {name: {decoder layer: ids}} are masks of your own in the place of the criteria's. tie_break, per_call,
    cross_at_least, prune_iters, merge_iters: see eep_search.search; `**PAPER` sets what the paper does. merge_iters=0
    prunes only, which works for every router; merging needs one of known formula without groups.
    length_normalized: choices compare by log-likelihood per token. options: see CandidateEvaluator; memory_budget holds
    for the split being scored.
    out: a directory for plan.json (the best mask), merged.safetensors (the merges, where they are better), result.json
    (what each is worth), and eep_search's files; a directory with a history is resumed. Under torchrun the sequences
    are dealt out over the processes.

    Raises ValueError, before any candidate is scored, for settings that cannot be, for a task too small to cut, for a
    router that cannot be merged, for merges that memory_budget cannot hold, and for a directory of another search.
    Source: arXiv 2407.00945.
    """
    layers = find_moe_layers(model)
    layout, active = check_request(layers, keep, active=active, layer_groups=layer_groups, fitness=fitness)
    settings: dict[str, Any] = {"prune_iters": prune_iters, "per_call": per_call, "cross_at_least": cross_at_least}
    kind = starts if isinstance(starts, str) else "criteria"
    masks: Mapping[str, Mapping[int, Sequence[int]]] = starts if isinstance(starts, Mapping) else {}
    check_settings(kind, tie_break, merge_iters=merge_iters, **settings)
    for name, mask in masks.items():
        given_mask(layout, mask, f"starts[{name!r}]")
    if merge_iters:
        check_mergeable({index: mapped_layer(layer) for index, layer in layers.items()}, layout)
    parts = dict(zip(SPLITS, split_task(task, valid, test, seed), strict=True))
    known = known_settings(
        model,
        layout,
        parts["train"],
        fitness,
        active=active,
        length_normalized=length_normalized,
        starts=kind,
        tie_break=tie_break,
        seed=seed,
        **settings,
    )
    check_folder(out, known)

    def scorer(split: str, by: str) -> TaskFitness | AnswerFitness:
        made: TaskFitness | AnswerFitness
        if by == "accuracy":
            made = TaskFitness(model, parts[split], length_normalized=length_normalized, active=active, **options)
        else:
            made = AnswerFitness(model, parts[split], by, active=active, **options)
        if merge_iters:
            made.evaluator.check_merged(layout.by_layer(layout.keep))
        return made

    if fitness != "accuracy":  # by which plans are measured at the end: what it cannot have is refused now
        for split in SPLITS:
            scorer(split, "accuracy")
    scorers = {split: scorer(split, fitness) for split in SPLITS}
    if starts == "criteria":
        masks = starting_masks(model, parts["train"], layout, seed=seed, out=out, progress=progress)
    outcome = search(
        scorers["train"],
        layout.by_layer(layout.num_experts),
        layout.by_layer(layout.keep),
        validate=scorers["valid"],
        starts=kind,
        masks=list(masks.values()),
        tie_break=tie_break,
        layer_groups=layout.groups,
        n_group=layout.by_layer(layout.router_groups),
        identity={**known, **scorers["train"].evaluator.identity},
        merge_iters=merge_iters,
        seed=seed,
        out=out,
        progress=progress,
        **settings,
    )
    plans, known = _plans(outcome, scorers["train"].evaluator, active)
    found = {split: _complete(scorers[split], plans, known[split]) for split in SPLITS}
    right = found
    if fitness != "accuracy":
        right = {split: _complete(scorer(split, "accuracy"), plans, {}) for split in SPLITS}
    best, pruned = plans["best"], plans["pruned"]
    assert isinstance(pruned, PruningPlan)
    result = EepResult(
        pruned,
        best,
        outcome.best.router_map,
        outcome.best.merge_map,
        fitness,
        {name: {split: _in_units(fitness, found[split][name].score) for split in SPLITS} for name in plans},
        {name: {split: right[split][name].score for split in SPLITS} for name in plans},
        {split: len(part.examples) for split, part in parts.items()},
        outcome.evaluations,
        seed,
        outcome.history,
    )
    if out is not None and distributed.is_first():
        _write(Path(out), result)
    return result


# ---- what is asked for


def check_request(
    layers: Mapping[int, MoeLayer],
    keep: int | Mapping[int, int],
    *,
    active: int | None = None,
    layer_groups: int | Sequence[Sequence[int]] | None = None,
    fitness: str = "accuracy",
) -> tuple[Layout, int | None]:
    """The layout of a search, and `active` where it is less than what the routers select; ValueError for a request that
    cannot be. layers: of a model, whose weights need not be loaded."""
    if fitness not in FITNESSES:
        raise ValueError(f"unknown fitness {fitness!r}; choose from {', '.join(FITNESSES)}")
    check_active(active, layers)
    if all(layer.shape.top_k == active for layer in layers.values()):
        active = None
    shapes = {index: layer.shape_with(active) for index, layer in layers.items() if layer.shape.prunable}
    if not shapes:
        raise ValueError("the model's experts are all looked up by token, so none can go")
    groups = layer_groups
    if isinstance(groups, int):
        if groups < 1:
            raise ValueError(f"layer_groups is how many neighbouring layers share matrices, at least 1; got {groups}")
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
    return layout, active


def check_mergeable(routed: Mapping[int, RoutedLayer], layout: Layout) -> None:
    """Refuses (ValueError), with the reason, a model whose routers cannot be mapped; routed: as merging.mapped_layer or
    checkpoint.stored_routers find."""
    eye = {layer: torch.eye(count) for layer, count in layout.by_layer(layout.num_experts).items()}
    plan = MergedPlan({layer: Merge(matrix, matrix) for layer, matrix in eye.items()})
    try:
        check_merges(plan, routed, None)
    except ValueError as reason:
        raise ValueError(f"{reason}; merge_iters=0 prunes only") from None


def check_folder(out: str | os.PathLike[str] | None, known: Mapping[str, Any] | None = None) -> None:
    """Refuses (ValueError) what is no directory, and that of a search that differs in what is known of this one."""
    if out is None:
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is not a directory")
    check_known(Path(out), known or {})


def known_settings(
    model: nn.Module, layout: Layout, train: Task, fitness: str, *, active: int | None = None, **asked: Any
) -> dict[str, Any]:
    """What search.json says of a search as far as it is known before any work; asked: its length_normalized, starts,
    tie_break, per_call, cross_at_least, prune_iters and seed."""
    data = fingerprint_of(sequences(train, fitness))
    scored = {"model": model_fingerprint(model), "data": data, "fitness": fitness, "active": active}
    return {**scored, **layout_settings(layout), **asked}


def _plans(
    outcome: SearchOutcome, evaluator: CandidateEvaluator, active: int | None
) -> tuple[dict[str, Plan], dict[str, dict[str, Fitness]]]:
    """The full model's, the best mask's and the best plan, and what the search knows of them on each split."""
    pruned, train, valid = outcome.pruned, outcome.pruned_train, outcome.pruned_valid
    if outcome.best.is_pruning:  # a merge may turn out to be a mask, too
        pruned, train, valid = outcome.best, outcome.train, outcome.valid
    assert valid is not None and outcome.valid is not None
    plans: dict[str, Plan] = {
        "full": full_plan(evaluator.model),
        "pruned": candidate_plan(pruned, evaluator, active),
        "best": candidate_plan(outcome.best, evaluator, active),
    }
    known = {
        "train": {"pruned": train, "best": outcome.train},
        "valid": {"pruned": valid, "best": outcome.valid},
        "test": {},
    }
    return plans, known


def _complete(
    scorer: TaskFitness | AnswerFitness, plans: Mapping[str, Plan], known: Mapping[str, Fitness]
) -> dict[str, Fitness]:
    """The fitness of all plans, of which some is known."""
    rest = {name: plan for name, plan in plans.items() if name not in known}
    return {**known, **dict(zip(rest, scorer(list(rest.values())), strict=True))}


def _in_units(fitness: str, score: float) -> float:
    """What the search maximises -> the fitness as it is measured."""
    if fitness != "nll" or math.isnan(score):
        return score
    return -math.log(score) if score > 0 else math.inf


def _write(folder: Path, result: EepResult) -> None:
    result.plan.save(folder / PLAN)
    if isinstance(result.best_plan, MergedPlan):
        result.best_plan.save(folder / MERGED)
    else:
        (folder / MERGED).unlink(missing_ok=True)  # of a shorter search
    write_text(folder / RESULT, json.dumps(result.as_json(), indent=1) + "\n")


def _finite(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: {split: x if math.isfinite(x) else None for split, x in of.items()} for name, of in scores.items()}
