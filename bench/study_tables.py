"""The study's tables, made of cells (study_cells.py): their numbers, what n is, and what was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from study_numbers import (
    METRICS,
    VERDICTS,
    Row,
    Study,
    best,
    compared,
    counted,
    difference,
    interval_of,
    rank_correlation,
    says,
    shown,
    side,
)

from moeprune_ext.intervals import Interval
from moeprune_ext.tables import markdown_table

GENERAL, SPECIFIC = ("man", "msan"), ("reap", "seer", "frequency")  # arXiv 2606.15716's two recommendations
MEASURED = ("esap", "kl", "generation", "choice")
JUDGED = ("esap", "generation", "choice")  # of these the sentences speak


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: above it.
        header: of its columns.
        rows: its cells.
        note: what n is, and what the intervals are.
        found: the statements below it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str
    found: list[str]

    def as_markdown(self) -> str:
        """Returns the table with its note and what was found."""
        table = markdown_table(self.header, self.rows)
        found = "\n".join(f"- {statement}" for statement in self.found)
        return f"### {self.title}\n\n{table}\n\n{self.note}\n\nFound:\n\n{found}\n"


def measured_rows(study: Study, rows: dict[str, Row], metrics: Sequence[str] = MEASURED) -> list[list[str]]:
    """Returns a table's cells, one row a name."""
    return [[name, *(shown(m, study.values(*row, m)) for m in metrics)] for name, row in rows.items()]


def heads(metrics: Sequence[str] = MEASURED) -> list[str]:
    """Returns the heads of columns."""
    return [METRICS[metric][0] for metric in metrics]


EXAMPLES = {
    "esap": "{test[0]} test sequences of {test[1]:,} tokens in all (ESAP, KL)",
    "generation": "{problems} arithmetic problems (generation)",
    "choice": "{questions} word order questions (choice)",
}


def note(study: Study, part: str, name: str, metrics: Sequence[str]) -> str:
    """Returns the line that says n, and what is behind each of these metrics for every seed."""
    about = study.content["about"]
    seeds = sum((cell["part"], cell["name"]) == (part, name) for cell in study.content["cells"])
    examples = ", ".join(EXAMPLES[m].format(**about["texts"], **about["sizes"]) for m in metrics if m in EXAMPLES)
    return f"n = {seeds} seeds; for each {examples}. {INTERVALS}"


INTERVALS = "Mean ± half of the 95 % t-interval over seeds; differences below with their 95 % t-interval over seeds."


# ---- the parts


def budgets(study: Study, part: str) -> list[str]:
    """Returns the budgets that a part's cells begin with."""
    return list(dict.fromkeys(name.split()[0] for name in study.names(part) if "%" in name))


def part_a(study: Study) -> Iterator[Table]:
    """Criteria, allocations, and prune."""
    for percent in budgets(study, "a"):
        names = [n.split()[1] for n in study.names("a") if n.startswith(percent) and not n.endswith("prune")]
        kinds = ("uniform", "EvoESAP")
        others = {f"{kind} {name}": ("a", f"{percent} {name}", kind) for name in names for kind in kinds}
        prune, full = ("a", f"{percent} prune", "prune"), ("a", "full", "full")
        pairs = {name: (others[f"EvoESAP {name}"], others[f"uniform {name}"]) for name in names}
        found = []
        for metric in JUDGED:
            first = best(study, metric, others)
            rest = {f"the best other row {first}": others[first]} | ({} if metric == "esap" else {"full": full})
            found += [
                f"{METRICS[metric][0]}: EvoESAP is {counted(study, metric, pairs, 'uniform', 'no criterion')}.",
                f"{METRICS[metric][0]}: prune is {compared(study, metric, prune, rest)}.",
            ]
        rows = measured_rows(study, {"full": full, **others, "prune": prune})
        yield Table(f"{percent} pruned", ["plan", *heads()], rows, note(study, "a", "full", JUDGED), found)


PRINCIPLE = {1: "holds", -1: "is reversed", 0: "is not decided"}


def principle(study: Study, calibration: str, percent: str, metric: str) -> tuple[tuple[int, int], str]:
    """Says whether the recommended criteria are better than the others, by their means and by the best of each.

    Returns:
        1, -1 or 0 by the means, and by the best; and the sentence.
    """
    groups = (GENERAL, SPECIFIC) if calibration == "mixed text" else (SPECIFIC, GENERAL)
    rows = [{name: ("b", calibration, f"{percent} {name}") for name in group} for group in groups]
    means = [
        [statistics.fmean(seed) for seed in zip(*(study.values(*row, metric) for row in group.values()), strict=True)]
        for group in rows
    ]
    gain = difference(*means)
    firsts = [best(study, metric, group) for group in rows]
    best_gain = difference(*(study.values(*group[first], metric) for group, first in zip(rows, firsts, strict=True)))
    recommended, rest = (", ".join(group) for group in groups)
    return (side(gain), side(best_gain)), (
        f"{percent}, {METRICS[metric][0]}: by the means the principle {PRINCIPLE[side(gain)]} ({recommended} minus "
        f"{rest}: {says(metric, gain)}), by the best of each it {PRINCIPLE[side(best_gain)]} ({firsts[0]} minus "
        f"{firsts[1]}: {says(metric, best_gain)})."
    )


def part_b(study: Study) -> Iterator[Table]:
    """All criteria by calibration."""
    for calibration in study.names("b"):
        rows = study.rows("b", calibration)
        percents = list(dict.fromkeys(row.split()[0] for row in rows))
        metrics = ("esap", "generation") if calibration == "mixed text" else ("generation",)
        columns = [(percent, metric) for percent in percents for metric in metrics]
        values = {  # {criterion: {column: one number a seed}}
            name: {(p, m): study.values("b", calibration, f"{p} {name}", m) for p, m in columns}
            for name in dict.fromkeys(row.split()[1] for row in rows)
        }
        means = {
            name: statistics.fmean(v for (_, m), its in columns_of.items() if m == metrics[0] for v in its)
            for name, columns_of in values.items()
        }
        ranked = sorted(values, key=means.__getitem__, reverse=True)
        cells = [
            [name, str(place), *(shown(column[1], values[name][column]) for column in columns)]
            for place, name in enumerate(ranked, 1)
        ]
        header = ["criterion", "rank", *(f"{percent} {METRICS[metric][0]}" for percent, metric in columns)]
        sides, found = zip(*(principle(study, calibration, *column) for column in columns), strict=True)
        by_mean, by_best = zip(*sides, strict=True)
        counts = "; ".join(
            f"{words} in {by_mean.count(wanted)} by the groups' means, in {by_best.count(wanted)} by the best of each"
            for wanted, words in PRINCIPLE.items()
        )
        places = ", ".join(f"{name} {ranked.index(name) + 1}" for name in (*GENERAL, *SPECIFIC))
        found = [f"Of {len(columns)} columns the principle {counts}.", *found]
        found.append(f"Ranks of {len(ranked)}: {places}; the first is {ranked[0]}.")
        about = (
            f"Ranked by the mean of {METRICS[metrics[0]][0]} over the budgets. {note(study, 'b', calibration, metrics)}"
        )
        yield Table(f"Calibrated on {calibration}", header, cells, about, found)


def part_c(study: Study) -> Iterator[Table]:
    """GRAPE."""
    for percent in study.names("c"):
        rows = {row.replace("uniform, ", "uniform "): ("c", percent, row) for row in study.rows("c", percent)}
        uniform = {name: row for name, row in rows.items() if name.startswith("uniform")}
        grapes = [name for name in rows if name not in uniform]
        found = [
            f"{METRICS[metric][0]}: {name} is {compared(study, metric, rows[name], uniform)}."
            for name in grapes
            for metric in JUDGED
        ]
        about = note(study, "c", percent, JUDGED)
        yield Table(f"{percent} pruned", ["plan", *heads()], measured_rows(study, rows), about, found)


def part_d(study: Study) -> Iterator[Table]:
    """EEP's table."""
    about = study.content["about"]
    splits, (train, valid) = ("train", "valid", "test"), about["sizes"]["eep_examples"]
    for name in study.names("d"):
        rows = {row: ("d", name, row) for row in study.rows("d", name)}
        baselines = {row: its for row, its in rows.items() if not row.startswith(("EEP", "full"))}
        first = best(study, "test", baselines)
        ours, paper = "EEP: prune + merge", "EEP, paper's settings: prune + merge"
        beside = {"pruning alone": rows["EEP: prune"], "the paper's settings": rows[paper], "full": rows["full"]}
        baseline = {f"the best baseline {first}": rows[first]}
        found = [
            f"test: EEP: prune is {compared(study, 'test', rows['EEP: prune'], baseline)}.",
            f"test: {ours} is {compared(study, 'test', rows[ours], baseline | beside)}.",
            f"test: {paper} is {compared(study, 'test', rows[paper], baselines)}.",
        ]
        seeds = len(study.values("d", name, "full", "test"))
        examples = (
            f"{train} problems to search on, {valid} to rank the best again, {about['sizes']['problems']} to test"
        )
        title = f"{name.removeprefix('keep ')} of {about['model']['experts']} experts kept per layer"
        line = f"n = {seeds} seeds; for each {examples}. {INTERVALS}"
        yield Table(title, ["plan", *splits], measured_rows(study, rows, splits), line, found)


PREDICTORS = {"ESAP": ("esap", 1), "KL": ("kl", -1), "NLL": ("nll", -1)}


def part_e(study: Study) -> Iterator[Table]:
    """Rank correlations with generation."""
    sizes, (sequences, tokens) = study.content["about"]["sizes"], study.content["about"]["texts"]["search"]
    lines, found = [], []
    for percent in budgets(study, "e"):
        cells = [c for c in study.content["cells"] if c["part"] == "e" and c["name"].startswith(percent)]
        plans = [row for cell in cells for row in cell["rows"].values()]
        outcome = [plan["generation"] for plan in plans]
        drawn = {
            name: rank_correlation([sign * plan[metric] for plan in plans], outcome)
            for name, (metric, sign) in PREDICTORS.items()
        }
        spread = " / ".join(f"{100 * value:.0f}" for value in np.quantile(outcome, (0, 0.25, 0.5, 0.75, 1)))
        lines.append([percent, str(len(plans)), *(_correlation(interval_of(d)) for d in drawn.values()), spread])
        gains = {other: interval_of(drawn["ESAP"] - drawn[other]) for other in PREDICTORS if other != "ESAP"}
        words = (
            f"{VERDICTS[side(gain)]} {other} ({gain.value:+.2f}, {gain.low:+.2f} to {gain.high:+.2f})"
            for other, gain in gains.items()
        )
        first = max(drawn, key=lambda name: drawn[name][0])
        found.append(f"{percent}: the highest correlation is that of {first}; ESAP's is {', '.join(words)}.")
    about = (
        f"n = {sizes['random_plans']} plans for each budget, one seed; predictors on {sequences} search sequences "
        f"({tokens:,} tokens), generation on {sizes['problems']} problems. Spearman's rank correlation, the "
        "sign turned for KL and NLL, with its 95 % percentile bootstrap interval over plans; differences on the same "
        "draws. Last column: least, quartiles and most of the plans' shares of right answers, in percent."
    )
    header = ["pruned", "plans", *PREDICTORS, "generation of the plans"]
    yield Table("Rank correlation with generation", header, lines, about, found)


def _correlation(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def part_f(study: Study) -> Iterator[Table]:
    """Repair by calibration tokens."""
    rows = {f"{int(study.rows('f', n)[0]):,}": ("f", n, study.rows("f", n)[0]) for n in study.names("f")}
    amounts = list(rows)[1:]
    found = []
    for metric in JUDGED:
        pairs = {amount: (rows[amount], rows["0"]) for amount in amounts}
        steps = {amount: (rows[amount], rows[before]) for before, amount in zip(amounts, amounts[1:], strict=False)}
        found += [
            f"{METRICS[metric][0]}, by tokens: repair is {counted(study, metric, pairs, 'none', 'no number')}.",
            f"{METRICS[metric][0]}, by tokens: it is {counted(study, metric, steps, 'half as many', 'no number')}.",
        ]
    about = note(study, "f", study.names("f")[0], JUDGED)
    yield Table(
        "Uniform plan by reap, 50% pruned", ["tokens fitted", *heads()], measured_rows(study, rows), about, found
    )


PARTS: dict[str, tuple[str, Callable[[Study], Iterator[Table]]]] = {
    "a": ("Criteria, allocations, and prune", part_a),
    "b": ("Criteria by calibration: the unified formulation's principle", part_b),
    "c": ("GRAPE against uniform plans", part_c),
    "d": ("EEP's table", part_d),
    "e": ("What predicts generation", part_e),
    "f": ("Repair by calibration tokens", part_f),
}


def tables_of(content: dict[str, Any]) -> dict[str, list[Table]]:
    """Returns the tables of the parts that there are cells of."""
    study = Study(content)
    return {part: list(make(study)) for part, (_, make) in PARTS.items() if study.names(part)}
