"""Pages about pruned checkpoints: what `prune` made, of one budget or several, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeprune_ext.artifacts.about import model_name
from moeprune_ext.artifacts.measured import HEADER, QUALITY, Measured, Row, cells, count_text, size_text
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.charts import Point, intervals, scatter
from moeprune_ext.files import read_json
from moeprune_ext.intervals import Interval
from moeprune_ext.report.page import Fact, Page, Section, Table
from moeprune_ext.report.plans import (
    choice_section,
    held_out_section,
    load_scores,
    made_section,
    plan_section,
    search_section,
)

PRODUCTS = "moeprune"  # folder of a pruning run's files, inside the checkpoint's directory


def prune_page(out: Path) -> Page:
    """Makes the page of one budget."""
    folder = out / PRODUCTS
    result, request = read_json(folder / "result.json"), read_json(folder / "request.json")
    measured = Measured.from_json(result)
    title = f"{model_name(out / PRODUCTS)}, {_removed(measured)} of its experts removed"
    found = _sections(out, measured, request)
    return Page(title, _verdict(measured), _facts(measured), found, result)


def _sections(out: Path, measured: Measured, request: dict[str, Any]) -> list[Section]:
    folder = out / PRODUCTS
    sections = [
        _worth_section(measured),
        plan_section(PruningPlan.load(folder / "plan.json"), load_scores(folder)),
        _domain_section(measured),
        choice_section(folder / "choice.json"),
        search_section(folder / "search"),
        held_out_section(folder / "held_out.json", "held-out", "The choice of the plan", "The last plans"),
        held_out_section(folder / "repair.json", "repair", "The repair", "The plan as it is and repaired in each way"),
        made_section(folder, request),
    ]
    return [section for section in sections if section is not None]


def _removed(measured: Measured) -> str:
    before, after = measured.rows[0].experts, measured.rows[-1].experts
    return f"{1 - after / before:.0%}"


def _baseline(measured: Measured) -> Row | None:
    """Returns the uniform plan's row, if there is one."""
    return next((row for row in measured.rows if row.model.startswith("uniform")), None)


def _verdict(measured: Measured) -> str:
    full, last, uniform = measured.rows[0], measured.rows[-1], _baseline(measured)
    size, loss = 1 - last.disk / full.disk, last.ratio.value - 1
    first = (
        f"With {last.experts} of {full.experts} experts, {size:.0%} smaller on disk: the full model would accept "
        f"{last.esap.value:.1%} of the pruned model's next tokens (95 % interval {_range(last.esap)})"
    )
    if uniform is not None:
        gain = measured.gain
        same = "" if gain.above_zero or gain.below_zero else ", which may be no difference"
        first += f", against {uniform.esap.value:.1%} after uniform pruning by REAP{same}"
    return f"{first}. Its perplexity is {abs(loss):.1%} {'higher' if loss >= 0 else 'lower'}."


def _range(interval: Interval) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _facts(measured: Measured) -> list[Fact]:
    full, last = measured.rows[0], measured.rows[-1]
    return [
        Fact("ESAP, held out", f"{last.esap.value:.4f}", f"{last.esap.low:.3f} to {last.esap.high:.3f}"),
        Fact("perplexity", f"{last.perplexity.value:.2f}", f"{last.ratio:.3f} times the full model's"),
        Fact("experts", f"{last.experts:,}", f"of {full.experts:,}"),
        Fact("on disk", size_text(last.disk), f"before: {size_text(full.disk)}"),
        Fact("memory, served", size_text(last.memory), f"before: {size_text(full.memory)}"),
        Fact("active parameters", count_text(last.active), f"before: {count_text(full.active)}"),
    ]


def _worth_section(measured: Measured) -> Section:
    points = [Point(row.model, row.esap.value, row.esap.low, row.esap.high) for row in measured.rows]
    paragraph = f"Measured on {measured.sequences} sequences that no choice depended on. {measured.gained}"
    table = Table(HEADER, [cells(row) for row in measured.rows], strong=len(measured.rows) - 1)
    says = "How often the full model would accept what each model proposes; the lines are 95 % intervals."
    chart = intervals("esap", "ESAP on held-out text", says, points, "ESAP")
    return Section("What it is worth", [paragraph], [table], [chart])


def _domain_section(measured: Measured) -> Section | None:
    """Shows the ESAP of every source of text; None where there is one."""
    domains = list(measured.rows[-1].domains)
    if len(domains) < 2:
        return None
    points = [
        Point(domain, row.domains[domain].value, row.domains[domain].low, row.domains[domain].high, row.model)
        for domain in domains
        for row in measured.rows[1:]
    ]
    worst = min(domains, key=lambda domain: measured.rows[-1].domains[domain].value)
    says = f"The checkpoint is weakest on {worst}: {measured.rows[-1].domains[worst].value:.4f}."
    chart = intervals("domains", "ESAP by source of text", says, points, "ESAP")
    return Section("Quality by domain", charts=[chart])


# ---- several budgets, and the demo


def budgets(out: Path) -> list[Path]:
    """Returns the finished runs in the folders of a directory, the largest checkpoint first."""
    runs = [path for path in out.iterdir() if (path / PRODUCTS / "result.json").is_file()] if out.is_dir() else []
    return sorted(runs, key=lambda path: -_measured(path).rows[-1].experts)


def _check_same(runs: list[Path]) -> None:
    """Raises ValueError for runs of different models or texts, which do not belong into one table."""
    requests = [read_json(run / PRODUCTS / "request.json") for run in runs]
    for run, request in zip(runs, requests, strict=True):
        for part in ("model", "test"):
            if request.get(part) != requests[0].get(part):
                raise ValueError(f"{runs[0]} and {run} are of another {part}; name one of them, or remove the other")


def _measured(out: Path) -> Measured:
    return Measured.from_json(read_json(out / PRODUCTS / "result.json"))


def sizes_page(out: Path) -> Page:
    """Makes the page of several budgets: size against quality, and the smallest checkpoint in full."""
    runs = budgets(out)
    _check_same(runs)
    smallest = prune_page(runs[-1])
    return Page(
        f"{model_name(runs[-1] / PRODUCTS)} at {len(runs)} sizes",
        smallest.verdict,
        smallest.facts,
        [_sizes_section(runs), *smallest.sections],
        {"budgets": [read_json(run / PRODUCTS / "result.json") for run in runs]},
    )


def _sizes_section(runs: list[Path]) -> Section:
    full = _measured(runs[0]).rows[0]
    lasts = [_measured(run).rows[-1] for run in runs]
    names = [f"{row.experts} experts" for row in lasts]
    header = ["checkpoint", "removed", "on disk", *QUALITY]
    rows = [["full", "0%", size_text(full.disk), *cells(full)[1:4]]]
    for run, row in zip(runs, lasts, strict=True):
        rows.append([run.name, f"{1 - row.experts / full.experts:.1%}", size_text(row.disk), *cells(row)[1:4]])
    points = [
        Point(name, row.esap.value, row.esap.low, row.esap.high)
        for name, row in zip(["full", *names], [full, *lasts], strict=True)
    ]
    sizes = [row.disk / 1e6 for row in [full, *lasts]]
    chart = scatter(
        "size-quality",
        "Size against quality",
        "Smaller is to the left, better is up; the lines are 95 % intervals.",
        ("MB on disk", sizes),
        points,
        "ESAP",
    )
    return Section("Sizes", [f"The sections after this one are about {runs[-1].name}."], [Table(header, rows)], [chart])


def demo_page(out: Path) -> Page:
    """Makes the demo's page: its table, and the smaller checkpoint in full."""
    rows, runs = read_json(out / "demo.json"), budgets(out)
    smallest = prune_page(runs[-1])
    names = list(rows[0]["perplexity"])
    header = ["model", "held-out ESAP", *(f"ppl {name}" for name in names), "arithmetic", "word order", "experts", "MB"]
    lines = [
        [
            row["model"],
            f"{row['esap']:.4f}",
            *(f"{row['perplexity'][name]:.2f}" for name in names),
            f"{row['exact_match']:.1%}",
            f"{row['multiple_choice']:.1%}",
            str(row["experts"]),
            f"{row['megabytes']:.1f}",
        ]
        for row in rows
    ]
    table = Section(
        "prune beside what others do",
        ["Every row is a checkpoint on disk, loaded again and measured on text and problems that nothing has seen."],
        [Table(header, lines, strong=len(lines) - 1)],
    )
    return Page(
        "moeprune demo: a trained model of 3.5 million parameters",
        smallest.verdict,
        smallest.facts,
        [table, _sizes_section(runs), *smallest.sections],
        {"demo": rows, "budgets": [read_json(run / PRODUCTS / "result.json") for run in runs]},
    )
