"""EEP beside its baselines in one table: what each keeps, what it costs, and how much of the task is left.

Every row is measured on the same test split, which no search and no criterion has seen; criteria are calibrated, and
candidates scored, on the same training split. Searches keep their directories, so a table that was killed goes on.
Baselines: EEP's (random masks, frequency, soft activation, here `seer`; arXiv 2407.00945) and naee (arXiv 2402.14800).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from torch import nn

from moeprune_ext import distributed
from moeprune_ext.data.tasks import SPLITS, Task, split_task
from moeprune_ext.eep.eep import (
    OURS,
    PAPER,
    PLAN,
    EepResult,
    check_folder,
    check_mergeable,
    check_request,
    eep,
    known_settings,
)
from moeprune_ext.eep.fitness import TaskFitness, candidate_plan
from moeprune_ext.eep.operators import given_mask, random_mask
from moeprune_ext.eep.search import check_settings
from moeprune_ext.eep.starts import starting_masks
from moeprune_ext.files import write_text
from moeprune_ext.models.apply import full_plan
from moeprune_ext.models.costs import costs
from moeprune_ext.models.layers import find_moe_layers
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.tables import markdown_table

RANDOM_MASKS = 5


BASELINES = ("frequency", "seer", "naee")


@dataclass(frozen=True)
class TableRow:
    """model: what was done. keep: experts kept per layer, None: all. active: experts per token.

    accuracy: {"train", "valid", "test": share of examples answered right}, of several masks the mean. spread: standard
    deviation on the test split over these (NaN where one has no accuracy), else None. plan: the file to export, below
    the table's directory; None where there is none. experts, bytes, flops_per_token: see costs.Costs.
    """

    model: str
    keep: int | None
    active: int
    accuracy: Mapping[str, float]
    spread: float | None = None
    plan: str | None = None
    experts: int = field(kw_only=True)
    bytes: int = field(kw_only=True)
    flops_per_token: int = field(kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """None for an accuracy or a spread that is not a number."""
        accuracy = {split: None if isnan(value) else value for split, value in self.accuracy.items()}
        spread = None if self.spread is None or isnan(self.spread) else self.spread
        return {**asdict(self), "accuracy": accuracy, "spread": spread}


def eep_table(
    model: nn.Module,
    task: Task,
    keep: Sequence[int],
    *,
    out: str | os.PathLike[str],
    valid: Task | None = None,
    test: Task | None = None,
    active: int | None = None,
    fitness: str = "accuracy",
    layer_groups: int | Sequence[Sequence[int]] | None = None,
    length_normalized: bool = False,
    seed: int = 0,
    progress: bool = False,
    prune_iters: int = 40,
    merge_iters: int = 160,
    **options: Any,
) -> list[TableRow]:
    """The rows of the table; table.json, table.md and every search's directory are written to `out`.

    keep: budgets, experts kept per layer. For each: random masks (RANDOM_MASKS seeds), the BASELINES, EEP as `eep` does
    it, and with the paper's settings (eep.PAPER). active: experts per token, for further rows: the full model, naee,
    and EEP searched with so few. The other arguments are `eep`'s, as are the errors, all before anything is scored.
    """
    layers = find_moe_layers(model)
    budgets = list(dict.fromkeys(keep))
    if not budgets:
        raise ValueError("keep names no budget; give numbers of experts to keep")
    asked: dict[str, Any] = {"layer_groups": layer_groups, "fitness": fitness}
    layouts = {k: check_request(layers, k, **asked)[0] for k in budgets}
    fewer = {check_request(layers, k, active=active, **asked)[1] for k in budgets} - {None}
    check_settings("criteria", None, merge_iters=merge_iters, cross_at_least=2, prune_iters=prune_iters)
    check_folder(out)
    if merge_iters:
        routed = {index: mapped_layer(layer) for index, layer in layers.items()}
        for layout in layouts.values():
            check_mergeable(routed, layout)
    out = Path(out)
    train, valid, test = split_task(task, valid, test, seed)
    measured: dict[str, Any] = {"seed": seed, "length_normalized": length_normalized, "prune_iters": prune_iters}
    for k, layout in layouts.items():
        for folder, settings in _searches(k, fewer).items():
            check_folder(out / folder, known_settings(model, layout, train, fitness, **measured, **settings))
    judges = judges_of(model, (train, valid, test), length_normalized=length_normalized, **options)
    evaluator = judges["test"].evaluator
    for layout in layouts.values() if merge_iters else ():
        for judge in judges.values():
            judge.evaluator.check_merged(layout.by_layer(layout.keep))

    def searched(name: str, k: int, folder: str, **changes: Any) -> list[TableRow]:
        result = eep(
            model,
            train,
            k,
            valid=valid,
            test=test,
            merge_iters=merge_iters,
            out=out / folder,
            progress=progress,
            **asked,
            **measured,
            **{**_searches(k, fewer)[folder], **changes},
            **options,
        )
        return searched_rows(model, result, k, f"{name}: ", f"{folder}/")

    rows = [measured_row(model, judges, "full", None, [full_plan(model, few)]) for few in (None, *fewer)]
    for k, layout in layouts.items():
        folder = f"keep-{k}"
        masks = starting_masks(model, train, layout, seed=seed, out=out / folder, progress=progress)
        drawn = [random_mask(layout, np.random.default_rng([seed, number])) for number in range(RANDOM_MASKS)]
        candidates = {f"random, {RANDOM_MASKS} masks": drawn}
        candidates |= {name: [given_mask(layout, masks[name])] for name in BASELINES if name in masks}
        for name, of in candidates.items():
            rows.append(measured_row(model, judges, name, k, [candidate_plan(one, evaluator, None) for one in of]))
        rows += searched("EEP", k, folder, starts=masks)
        rows += searched("EEP, paper's settings", k, f"{folder}-paper")
        for few in fewer:
            for mask in candidates.get("naee", ()):
                rows.append(measured_row(model, judges, "naee", k, [candidate_plan(mask, evaluator, few)]))
            rows += searched("EEP", k, f"{folder}-active-{few}", starts=masks)
    if distributed.is_first():
        write_text(out / "table.json", json.dumps([row.as_json() for row in rows], indent=1) + "\n")
        write_text(out / "table.md", format_table(rows) + "\n")
    return rows


def _searches(keep: int, fewer: Collection[int | None]) -> dict[str, dict[str, Any]]:
    """{directory: settings} of a budget's searches."""
    found = {f"keep-{keep}": OURS, f"keep-{keep}-paper": PAPER}
    return found | {f"keep-{keep}-active-{few}": {**OURS, "active": few} for few in fewer}


def judges_of(model: nn.Module, splits: Sequence[Task], **options: Any) -> dict[str, TaskFitness]:
    return {name: TaskFitness(model, split, **options) for name, split in zip(SPLITS, splits, strict=True)}


def measured_row(
    model: nn.Module, judges: Mapping[str, TaskFitness], name: str, keep: int | None, plans: Sequence[Plan]
) -> TableRow:
    """The row of one plan, or of several that cost the same."""
    right = {split: [one.score for one in judge(plans)] for split, judge in judges.items()}
    spread = None
    if len(plans) > 1:
        spread = nan if any(map(isnan, right["test"])) else stdev(right["test"])
    return TableRow(
        name,
        keep,
        _active(model, plans[0]),
        {split: fmean(scores) for split, scores in right.items()},
        spread,
        **vars(costs(model, plans[0])),
    )


def result_rows(model: nn.Module, result: EepResult, keep: int) -> list[TableRow]:
    """The full model's row, and those of what was found."""
    active = _active(model, full_plan(model))
    full = TableRow("full", None, active, result.accuracy["full"], **vars(costs(model)))
    return [full, *searched_rows(model, result, keep)]


def searched_rows(model: nn.Module, result: EepResult, keep: int, prefix: str = "", folder: str = "") -> list[TableRow]:
    """What pruning alone found, and what merging made of it, which may be the same mask."""
    return [
        TableRow(
            f"{prefix}{name}",
            keep,
            _active(model, plan),
            result.accuracy[which],
            plan=f"{folder}{file}",
            **vars(costs(model, plan)),
        )
        for name, which, plan, file in (
            ("prune", "pruned", result.plan, PLAN),
            ("prune + merge", "best", result.best_plan, result.file),
        )
    ]


def _active(model: nn.Module, plan: Plan) -> int:
    return plan.active or max(layer.shape.top_k for layer in find_moe_layers(model).values())


def format_table(rows: Sequence[TableRow]) -> str:
    """The rows as a Markdown table; MB: 10^6 bytes, MFLOPs: 10^6 floating-point operations."""
    lines = [
        [
            row.model,
            "all" if row.keep is None else str(row.keep),
            str(row.active),
            *(f"{row.accuracy[split]:.1%}" for split in SPLITS[:2]),
            f"{row.accuracy['test']:.1%}" + (f" ± {row.spread:.1%}" if row.spread is not None else ""),
            str(row.experts),
            f"{row.bytes / 1e6:,.1f}",
            f"{row.flops_per_token / 1e6:,.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["model", "kept", "active", *SPLITS, "experts", "MB", "MFLOPs per token"], lines)
