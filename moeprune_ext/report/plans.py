"""Sections about a plan and how it was found, and the page of `search`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune_ext.allocation.choice import CriterionChoice
from moeprune_ext.allocation.selection import HeldOut
from moeprune_ext.artifacts.about import model_name, read_about
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.metrics import LOWER_IS_BETTER, to_maximise
from moeprune_ext.charts import Point, heat_map, intervals, kept_per_layer, lines
from moeprune_ext.files import nan_if_none, read_json
from moeprune_ext.intervals import Interval
from moeprune_ext.report.page import Fact, Page, Section, Table


def plan_section(plan: PruningPlan, scores: ExpertScores | None) -> Section:
    """Shows how many experts every layer keeps, and which."""
    kept = {layer: len(ids) for layer, ids in plan.kept.items()}
    charts = [kept_per_layer(kept, plan.num_experts)]
    if scores is not None and set(plan.kept) <= set(scores):
        values = {layer: scores[layer].tolist() for layer in plan.kept}
        charts.append(heat_map(values, plan.kept))
    merged = f" {len(plan.mapped_layers)} layers merge experts." if plan.mapped_layers else ""
    named = f"Criterion: {_criterion(plan.criterion)}." if plan.criterion else ""
    return Section("What was kept", [f"{named}{merged}".strip()] if named or merged else [], charts=charts)


def _criterion(name: str) -> str:
    chosen = name.startswith("auto")
    return f"{name.removeprefix('auto').removeprefix(':').strip()}, chosen by measurement" if chosen else name


def load_scores(folder: Path) -> ExpertScores | None:
    """Loads the scores that a run was searched by, if it left them."""
    file = folder / "scores.json"
    return ExpertScores.load(file) if file.exists() else None


def choice_section(file: Path) -> Section | None:
    """Compares the criteria that a run measured; None where one was named."""
    if not file.exists():
        return None
    choice = CriterionChoice.load(file)
    asked = read_json(file).get("request", {})
    fitness, objective = str(asked.get("fitness", "esap")), str(asked.get("objective", "mean"))
    best = max(choice.table, key=lambda row: to_maximise(fitness, row["score"]))
    points = [Point(str(row["criterion"]), row["score"], group=str(row["allocation"])) for row in choice.table]

    def rank(name: str) -> float:
        return -max(to_maximise(fitness, point.value) for point in points if point.name == name)

    order = sorted({point.name for point in points}, key=rank)
    points.sort(key=lambda point: (order.index(point.name), point.group != "uniform"))
    says = (
        f"On the search's text {best['criterion']} is best, {best['allocation']}; {choice.evaluations} plans were "
        "scored. uniform: the same share of every layer; global: one threshold for all layers."
    )
    notes = list(choice.notes)
    if choice.per_layer and choice.gain is not None:
        notes.append(
            "A mix of criteria over the layers was taken: it gains "
            f"{choice.gain.value:+.4f} ({choice.gain.low:+.4f} to {choice.gain.high:+.4f}) on sequences that it was "
            "not chosen on."
        )
    elif choice.gain is not None:
        notes.append(
            f"A mix of criteria over the layers gains {choice.gain.value:+.4f} ({choice.gain.low:+.4f} to "
            f"{choice.gain.high:+.4f}) on sequences that it was not chosen on, and was not taken."
        )
    chart = intervals("criteria", "Criteria compared", says, points, _axis(fitness, objective))
    return Section("The criterion", notes, charts=[chart])


def search_section(folder: Path) -> Section | None:
    """Shows how a search went: the best so far and the median of each generation, and what it spent."""
    records = _history(folder)
    if not records:
        return None
    settings = read_json(folder / "search.json")
    fitness, objective = str(settings.get("fitness", "esap")), str(settings.get("objective", "mean"))
    best, median, spent, saved = [], [], [], []
    so_far = -math.inf
    for record in records:
        scores = [to_maximise(fitness, nan_if_none(pair[1])) for pair in record["scores"]]
        finite = [score for score in scores if math.isfinite(score)]
        so_far = max([so_far, *finite])
        best.append(to_maximise(fitness, so_far) if fitness in LOWER_IS_BETTER else so_far)
        median.append(to_maximise(fitness, statistics.median(finite)) if finite else math.nan)
        spent.append(record["token_evaluations"])
        saved.append(record["token_evaluations_saved"])
    evaluated = sum(len(record["scores"]) + len(record.get("dropped", ())) for record in records)
    dropped = sum(len(record.get("dropped", ())) for record in records)
    generations = [record["generation"] for record in records]
    says = (
        f"From {best[0]:.4f} in the first generation to {best[-1]:.4f} after {len(records)}, on the text that is "
        "searched on; the median is of each generation's newly scored plans."
    )
    raced = (
        f" Racing dropped {dropped} of them early and saved {sum(saved) / (sum(saved) + sum(spent)):.0%} of the work."
        if sum(saved)
        else ""
    )
    paragraphs = [f"{evaluated} plans were scored, on {sum(spent):,} tokens in all.{raced}"]
    over = ("generation", generations)
    progress = lines(
        "search-progress",
        "Search progress",
        says,
        over,
        {"best so far": best, "median": median},
        _axis(fitness, objective),
    )
    columns = (*progress.header, "tokens_scored", "tokens_saved")
    rows = [(*row, *tokens) for row, tokens in zip(progress.rows, zip(spent, saved, strict=True), strict=True)]
    charts = [replace(progress, header=columns, rows=rows)]
    if sum(saved):
        total = [sum(spent[: i + 1]) / 1e6 for i in range(len(spent))]
        without = [one + sum(saved[: i + 1]) / 1e6 for i, one in enumerate(total)]
        says = "Tokens scored so far, and what would have been scored without racing."
        series = {"spent": total, "without racing": without}
        charts.append(lines("search-cost", "What the search spent", says, over, series, "million tokens"))
    return Section("The search", paragraphs, charts=charts)


def held_out_section(file: Path, name: str, title: str, what: str) -> Section | None:
    """Shows plans ranked on text that was not searched on.

    Args:
        file: of a HeldOut.
        name: of the chart.
        title: of the section.
        what: the plans that are ranked.
    """
    if not file.exists():
        return None
    ranked = HeldOut.from_json(read_json(file))
    if len(ranked.scores) < 2:
        return None
    points = [Point(plan, score, strong=plan == ranked.winner) for plan, score in ranked.scores.items()]
    says = f"{what}, on {ranked.sequences} held-out sequences; the one in orange was taken."
    chart = intervals(name, "Plans on held-out text", says, points, _axis(ranked.metric, ranked.objective))
    return Section(title, [ranked.says], charts=[chart])


def made_section(folder: Path, request: Mapping[str, Any]) -> Section:
    """Says how the run was made, so that it can be made again."""
    about = read_about(folder)
    rows: list[list[str]] = []
    if about:
        rows += [["model", str(about.get("model"))], ["seed", str(about.get("seed"))]]
        rows += [["text", ", ".join(about.get("data", []))]] if about.get("data") else []
        rows += [[f"fingerprint, {part}", value] for part, value in about.get("fingerprints", {}).items()]
        for entry in about.get("commands", []):
            rows.append(["started", f"{entry.get('started')}, {entry.get('processes', 1)} process(es)"])
            rows.append(["versions", ", ".join(f"{name} {one}" for name, one in entry.get("versions", {}).items())])
    known = {part: value for part, value in request.items() if part not in about.get("fingerprints", {})}
    rows += [[name.replace("_", " "), _plain(value)] for name, value in known.items()]
    commands = "\n".join(str(entry.get("command")) for entry in about.get("commands", []))
    return Section("How it was made", tables=[Table((), rows)], code=commands)


def _axis(metric: str, objective: str = "mean") -> str:
    """Returns a metric's name as an axis shows it."""
    name = {"esap": "ESAP", "nll": "negative log-likelihood", "kl_pq": "KL(full, pruned)"}.get(metric, metric)
    return name if objective == "mean" else f"{name} of the worst domain"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _history(folder: Path) -> list[dict[str, Any]]:
    file = folder / "history.jsonl"
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]


def search_page(out: Path) -> Page:
    """Makes the page of a search."""
    request, plan = read_json(out / "search.json"), PruningPlan.load(out / "plan.json")
    held = out / "held_out.json"
    ranked = read_json(held) if held.exists() else None
    fitness = str(request.get("fitness", "esap"))
    kept, before = sum(map(len, plan.kept.values())), sum(plan.num_experts.values())
    verdict = f"A plan that keeps {kept} of {before} experts."
    facts = [Fact("experts", f"{kept:,}", f"of {before:,}")]
    if ranked is not None:
        score, gain = ranked["scores"][ranked["winner"]], Interval.from_json(ranked["gain"])
        verdict += f" {ranked['says']}"
        facts += [
            Fact(f"{_axis(fitness, ranked['objective'])}, held out", f"{score:.4f}", f"{ranked['sequences']} sequences")
        ]
        if ranked["winner"] != ranked["baseline"]:
            about = f"{gain.low:+.4f} to {gain.high:+.4f}"
            facts.append(Fact(f"better than {ranked['baseline']} by", f"{gain.value:+.4f}", about))
    else:
        verdict += " Nothing was held out, so that its score, of the text that was searched on, is too good."
    sections = [
        plan_section(plan, load_scores(out)),
        choice_section(out / "choice.json"),
        search_section(out),
        held_out_section(held, "held-out", "The choice of the plan", "The last plans"),
        made_section(out, request),
    ]
    data = {"plan": {str(layer): len(ids) for layer, ids in plan.kept.items()}, "held_out": ranked}
    return Page(f"A search on {model_name(out)}", verdict, facts, [one for one in sections if one is not None], data)
