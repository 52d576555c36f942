"""EEP beside its baselines in one table: what each keeps, what it costs, and how much of the task is left.

Every row is measured on the same test split, which no search and no criterion has seen; criteria are calibrated, and
candidates scored, on the same training split. Searches keep their directories, so a table that was killed goes on.
Baselines: EEP's (random masks, frequency, soft activation, here `seer`; arXiv 2407.00945) and naee (arXiv 2402.14800).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from torch import nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.tasks import SPLITS, Task, split_task
from moeprune_ext.eep.eep import (
    PLAN,
    PRUNED_PLAN,
    EepResult,
    check_folder,
    check_mergeable,
    check_request,
    eep,
    known_settings,
)
from moeprune_ext.eep.fitness import TaskFitness, candidate_plan
from moeprune_ext.eep.operators import Layout, given_mask, random_mask
from moeprune_ext.eep.settings import PAPER, EepSettings
from moeprune_ext.eep.starts import starting_masks
from moeprune_ext.files import finite_or_none, write_json, write_text
from moeprune_ext.intervals import Interval, shares_right
from moeprune_ext.models.apply import full_plan
from moeprune_ext.models.costs import costs
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.progress import View
from moeprune_ext.tables import markdown_table

RANDOM_MASKS = 5
BASELINES = ("frequency", "seer", "naee")


@dataclass(frozen=True)
class TableRow:
    """One row of the table.

    Attributes:
        model: what was done.
        keep: experts kept per layer; None: all.
        active: experts per token.
        accuracy: {"train", "valid", "test": share of examples answered right}, of several masks the mean.
        spread: standard deviation on the test split over several masks (NaN where one has no accuracy), else None.
        interval: Wilson's 95 % interval of the test accuracy, over its examples; None of several masks.
        plan: the file to export, below the table's directory; None where there is none.
        experts: see costs.Costs, as for the next two.
        bytes: of weights.
        flops_per_token: of matrix products.
    """

    model: str
    keep: int | None
    active: int
    accuracy: Mapping[str, float]
    spread: float | None = None
    interval: Interval | None = None
    plan: str | None = None
    experts: int = field(kw_only=True)
    bytes: int = field(kw_only=True)
    flops_per_token: int = field(kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """Returns the row with None for an accuracy or a spread that is not a number."""
        accuracy = {split: finite_or_none(value) for split, value in self.accuracy.items()}
        spread = None if self.spread is None else finite_or_none(self.spread)
        interval = None if self.interval is None else self.interval.as_json()
        return {**asdict(self), "accuracy": accuracy, "spread": spread, "interval": interval}


def eep_table(
    model: nn.Module | MoeModel,
    task: Task,
    keep: Sequence[int],
    settings: EepSettings = EepSettings(),
    *,
    out: str | os.PathLike[str],
    valid: Task | None = None,
    test: Task | None = None,
    progress: bool | View = False,
    **options: Any,
) -> list[TableRow]:
    """Makes the rows of the table; table.json, table.md and every search's directory are written to `out`.

    Args:
        model: a transformers model, or the MoeModel made of it.
        task: what candidates are scored on.
        keep: budgets, experts kept per layer. For each: random masks (RANDOM_MASKS seeds), the BASELINES, EEP as `eep`
            does it, and with the paper's settings (settings.PAPER).
        settings: of the searches. Where `active` is fewer than the model's there are further rows: the full model, naee
            and EEP with so few.
        out: a directory.
        valid: see `eep`.
        test: see `eep`.
        progress: whether to show progress on stderr, or the View to show it on.
        **options: see CandidateEvaluator.

    Raises:
        ValueError: before anything is scored, as `eep`, and where `keep` names no budget.
    """
    moe = MoeModel.of(model)
    budgets = list(dict.fromkeys(keep))
    if not budgets:
        raise ValueError("keep names no budget; give numbers of experts to keep")
    plain = replace(settings, active=None)
    layouts = {k: check_request(moe.layers, k, plain)[0] for k in budgets}
    fewer = {check_request(moe.layers, k, settings)[1].active for k in budgets} - {None}
    check_folder(out)
    for layout in layouts.values() if settings.merge_iters else ():
        check_mergeable(moe.layers, layout)
    out = Path(out)
    splits = split_task(task, valid, test, settings.seed)
    for k, layout in layouts.items():
        for folder, search in _searches(k, plain, fewer).items():
            check_folder(out / folder, known_settings(moe, layout, splits[0], search))
    judges = judges_of(moe, splits, length_normalized=settings.length_normalized, **options)
    for layout in layouts.values() if settings.merge_iters else ():
        for judge in judges.values():
            judge.evaluator.check_merged(layout.by_layer(layout.keep))

    def searched(name: str, k: int, folder: str, **changes: Any) -> list[TableRow]:
        arguments = {**_searches(k, plain, fewer)[folder].arguments(), **changes, **options}
        result = eep(
            moe, splits[0], k, valid=splits[1], test=splits[2], out=out / folder, progress=progress, **arguments
        )
        return searched_rows(moe, result, k, f"{name}: ", f"{folder}/")

    rows = [measured_row(moe, judges, "full", None, [full_plan(moe, active)]) for active in (None, *fewer)]
    for k, layout in layouts.items():
        folder = f"keep-{k}"
        masks = starting_masks(moe, splits[0], layout, seed=settings.seed, out=out / folder, progress=progress)
        candidates = _baselines(layout, masks, settings.seed)
        for name, plans in candidates.items():
            rows.append(measured_row(moe, judges, name, k, _completed(plans, judges)))
        rows += searched("EEP", k, folder, starts=masks)
        rows += searched("EEP, paper's settings", k, f"{folder}-paper")
        for active in fewer:
            for mask in candidates.get("naee", ()):
                rows.append(measured_row(moe, judges, "naee", k, _completed([mask], judges, active)))
            rows += searched("EEP", k, f"{folder}-active-{active}", starts=masks)
    if distributed.is_first():
        write_json(out / "table.json", [row.as_json() for row in rows], indent=1)
        write_text(out / "table.md", format_table(rows) + "\n")
    return rows


def _searches(keep: int, plain: EepSettings, fewer: Collection[int | None]) -> dict[str, EepSettings]:
    """Returns the searches of a budget, {directory: settings}."""
    searches = {f"keep-{keep}": plain, f"keep-{keep}-paper": replace(plain, **PAPER)}
    return searches | {f"keep-{keep}-active-{active}": replace(plain, active=active) for active in fewer}


def _baselines(
    layout: Layout, masks: Mapping[str, Mapping[int, Sequence[int]]], seed: int
) -> dict[str, list[PruningPlan]]:
    """Returns the candidates beside which EEP is measured, by name."""
    drawn = [random_mask(layout, np.random.default_rng([seed, number])) for number in range(RANDOM_MASKS)]
    named = {name: [given_mask(layout, masks[name])] for name in BASELINES if name in masks}
    return {f"random, {RANDOM_MASKS} masks": drawn, **named}


def _completed(
    candidates: Sequence[PruningPlan], judges: Mapping[str, TaskFitness], active: int | None = None
) -> list[PruningPlan]:
    return [candidate_plan(candidate, judges["test"].evaluator, active) for candidate in candidates]


def judges_of(model: nn.Module | MoeModel, splits: Sequence[Task], **options: Any) -> dict[str, TaskFitness]:
    """Returns a scorer of each split by accuracy; options: see TaskFitness."""
    return {name: TaskFitness(model, split, **options) for name, split in zip(SPLITS, splits, strict=True)}


def measured_row(
    model: nn.Module | MoeModel,
    judges: Mapping[str, TaskFitness],
    name: str,
    keep: int | None,
    plans: Sequence[PruningPlan],
) -> TableRow:
    """Measures the row of one plan, or of several that cost the same."""
    right = {split: [one.score for one in judge(plans)] for split, judge in judges.items()}
    spread = None
    if len(plans) > 1:
        spread = nan if any(map(isnan, right["test"])) else stdev(right["test"])
    accuracy = {split: fmean(scores) for split, scores in right.items()}
    row = _row(model, plans[0], name, keep, accuracy, spread)
    return row if len(plans) > 1 else with_interval(row, len(judges["test"].task.examples))


def with_interval(row: TableRow, examples: int) -> TableRow:
    """Returns a row of one plan with the interval of its accuracy on a test split of so many examples."""
    return replace(row, interval=shares_right({"test": row.accuracy["test"]}, {"test": examples})["test"])


def result_rows(model: nn.Module | MoeModel, result: EepResult, keep: int) -> list[TableRow]:
    """Returns the full model's row, and those of what was found."""
    full = _row(model, full_plan(model), "full", None, result.accuracy["full"])
    return [with_interval(full, result.examples["test"]), *searched_rows(model, result, keep)]


def searched_rows(
    model: nn.Module | MoeModel, result: EepResult, keep: int, prefix: str = "", folder: str = ""
) -> list[TableRow]:
    """Returns the rows of what pruning alone found, and of what merging made of it, which may be the same mask."""
    rows = [
        replace(_row(model, plan, f"{prefix}{name}", keep, result.accuracy[which]), plan=f"{folder}{file}")
        for name, which, plan, file in (
            ("prune", "pruned", result.pruned_plan, PRUNED_PLAN),
            ("prune + merge", "best", result.plan, PLAN),
        )
    ]
    return [with_interval(row, result.examples["test"]) for row in rows]


def _row(
    model: nn.Module | MoeModel,
    plan: PruningPlan,
    name: str,
    keep: int | None,
    accuracy: Mapping[str, float],
    spread: float | None = None,
) -> TableRow:
    moe = MoeModel.of(model)
    active = plan.active or max(shape.top_k for shape in moe.shapes.values())
    return TableRow(name, keep, active, accuracy, spread, **vars(costs(moe, plan)))


def format_table(rows: Sequence[TableRow]) -> str:
    """Writes the rows as a Markdown table; MB: 10^6 bytes, MFLOPs: 10^6 floating-point operations.

    The test accuracy has its 95 % interval behind it, that of several masks their standard deviation, with ±.
    """
    lines = [
        [
            row.model,
            "all" if row.keep is None else str(row.keep),
            str(row.active),
            *(f"{row.accuracy[split]:.1%}" for split in SPLITS[:2]),
            _test_accuracy(row),
            str(row.experts),
            f"{row.bytes / 1e6:,.1f}",
            f"{row.flops_per_token / 1e6:,.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["model", "kept", "active", *SPLITS, "experts", "MB", "MFLOPs per token"], lines)


def _test_accuracy(row: TableRow) -> str:
    if row.interval is not None:
        return f"{row.interval:.1%}"
    return f"{row.accuracy['test']:.1%}" + (f" ± {row.spread:.1%}" if row.spread is not None else "")
