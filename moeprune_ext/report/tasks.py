"""Pages about what EEP found for a task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moeprune_ext.artifacts.about import model_name
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.charts import Point, intervals, lines
from moeprune_ext.files import nan_if_none, read_json
from moeprune_ext.intervals import Interval, wilson
from moeprune_ext.report.page import Fact, Page, Section, Table
from moeprune_ext.report.plans import made_section, plan_section

NAMES = {"full": "full model", "pruned": "pruned", "best": "pruned and merged"}
SPLITS = {"train": "searched on", "valid": "ranks the best", "test": "looked at once"}


def eep_page(out: Path) -> Page:
    """Makes the page of one search for a task."""
    result, request = read_json(out / "result.json"), read_json(out / "search.json")
    plan, examples, right = PruningPlan.load(out / "plan.json"), result["examples"], result["accuracy"]
    names = dict(NAMES) if result["merges"] else {**NAMES, "best": "best"}
    test = {name: wilson(round(right[name]["test"] * examples["test"]), examples["test"]) for name in names}
    kept, before = sum(map(len, plan.kept.values())), sum(plan.num_experts.values())
    verdict = (
        f"With {kept} of {before} experts the model answers {test['best'].value:.1%} of {examples['test']} test "
        f"examples right (95 % interval {_range(test['best'])}); the full model answers {test['full'].value:.1%}."
    )
    facts = [
        Fact("right, test", f"{test['best'].value:.1%}", _range(test["best"])),
        Fact("full model", f"{test['full'].value:.1%}", _range(test["full"])),
        Fact("experts", f"{kept:,}", f"of {before:,}"),
        Fact("candidates scored", f"{result['evaluations']:,}"),
    ]
    rows = [[names[which], *(f"{right[which][split]:.1%}" for split in SPLITS)] for which in names]
    header = ["", *(f"{split}, {examples[split]} ({what})" for split, what in SPLITS.items())]
    points = [Point(names[which], test[which].value, test[which].low, test[which].high) for which in names]
    chart = intervals("accuracy", "Test examples answered right", "With 95 % intervals.", points, "share right")
    sections = [
        Section("What it is worth", tables=[Table(header, rows, strong=len(rows) - 1)], charts=[chart]),
        plan_section(plan, None),
        _search_section(out, str(result["fitness"])),
        made_section(out, request),
    ]
    found = [section for section in sections if section is not None]
    return Page(f"{model_name(out)} for one task", verdict, facts, found, result)


def _search_section(out: Path, fitness: str) -> Section | None:
    """Shows the best so far and the mean of every call."""
    file = out / "history.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
    if not records:
        return None
    count: list[int] = []
    best, mean, so_far = [], [], -math.inf
    for record in records:
        finite = [value for value in (nan_if_none(one[1]) for one in record["scores"]) if math.isfinite(value)]
        so_far = max([so_far, *finite])
        best.append(so_far)
        mean.append(sum(finite) / len(finite) if finite else math.nan)
        count.append((count[-1] if count else 0) + len(record["scores"]))
    merging = next((n for n, record in enumerate(records) if record["phase"] == "merge"), None)
    says = f"From {best[0]:.4f} with the starting masks to {best[-1]:.4f} after {count[-1]} candidates"
    says += f"; merging begins after {count[merging - 1]}." if merging else "."
    series = {"best so far": best, "mean of the call": mean}
    chart = lines("search-progress", "Search progress", says, ("candidates scored", count), series, fitness)
    return Section("The search", charts=[chart])


def eep_table_page(out: Path) -> Page:
    """Makes the page of EEP beside its baselines."""
    rows: list[dict[str, Any]] = read_json(out / "table.json")
    budgets = list(dict.fromkeys(row["keep"] for row in rows if row["keep"] is not None))
    full = rows[0]
    last = [row for row in rows if row["keep"] == budgets[-1]]
    best = max(last, key=lambda row: nan_if_none(row["accuracy"]["valid"]))
    verdict = (
        f"With {budgets[-1]} experts in every layer, {best['model']}, the best on the validation split, answers "
        f"{_interval(best):.1%} of the test examples right; the full model {_interval(full):.1%} (95 % intervals)."
    )
    header = ["model", "kept", "active", "train", "valid", "test (95 %)", "experts", "MB", "MFLOPs per token"]
    cells = [
        [
            row["model"],
            "all" if row["keep"] is None else str(row["keep"]),
            str(row["active"]),
            *(f"{nan_if_none(row['accuracy'][split]):.1%}" for split in ("train", "valid")),
            f"{_interval(row):.1%}",
            f"{row['experts']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['flops_per_token'] / 1e6:,.2f}",
        ]
        for row in rows
    ]
    charts = []
    for keep in budgets:
        chosen = [full, *(row for row in rows if row["keep"] == keep)]
        points = []
        for row in chosen:
            interval = _interval(row)
            active = "" if row["active"] == full["active"] else f", {row['active']} active"
            points.append(Point(f"{row['model']}{active}", interval.value, interval.low, interval.high))
        says = "Test examples answered right, with 95 % intervals."
        charts.append(intervals(f"keep-{keep}", f"{keep} experts in every layer", says, points, "share right"))
    facts = [
        Fact("right, test", f"{best['accuracy']['test']:.1%}", best["model"]),
        Fact("full model", f"{full['accuracy']['test']:.1%}"),
        Fact("experts", f"{best['experts']:,}", f"of {full['experts']:,}"),
        Fact("weights", f"{best['bytes'] / 1e6:,.1f} MB", f"before: {full['bytes'] / 1e6:,.1f} MB"),
    ]
    sections = [
        Section("EEP beside its baselines", tables=[Table(header, cells)], charts=charts),
        made_section(out, {}),
    ]
    return Page(f"{model_name(out)} for one task: EEP and baselines", verdict, facts, sections, {"rows": rows})


def _interval(row: dict[str, Any]) -> Interval:
    """Returns the interval of a row's test accuracy, NaN where the table has none."""
    if row.get("interval") is not None:
        return Interval.from_json(row["interval"])
    return Interval(nan_if_none(row["accuracy"]["test"]), math.nan, math.nan)


def _range(interval: Interval) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}"
