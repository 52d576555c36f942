"""Looks numbers up in study.json, and says in words how two of them compare.

No sentence claims what the numbers do not say: each is made by comparing intervals, so that a rerun with other numbers
says something else. Two rows are compared seed by seed, and differ if the 95 % t-interval of the mean difference lies
on one side of 0. Correlations have percentile bootstrap intervals over plans.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, t

from moeprune_ext.intervals import DRAWS, PERCENTILES, Interval

METRICS = {  # {metric: (head of its column, digits, whether it is a share to show in percent)}
    "esap": ("ESAP", 4, False),
    "kl": ("KL", 3, False),
    "generation": ("generation", 1, True),
    "choice": ("choice", 1, True),
    "train": ("train", 1, True),
    "valid": ("valid", 1, True),
    "test": ("test", 1, True),
}
SAME = 1e-5  # below the differences that shares of examples can have, above what rounding makes
VERDICTS = {1: "better than", -1: "worse than", 0: "not to be told from"}  # by `side`

# ---- numbers


@dataclass(frozen=True)
class Study:
    """The content of study.json, to look numbers up in.

    Attributes:
        content: of the file.
    """

    content: dict[str, Any]

    def names(self, part: str) -> list[str]:
        """Returns the names of a part's cells."""
        return list(dict.fromkeys(cell["name"] for cell in self.content["cells"] if cell["part"] == part))

    def rows(self, part: str, name: str) -> list[str]:
        """Returns the rows of a cell."""
        return next(list(c["rows"]) for c in self.content["cells"] if (c["part"], c["name"]) == (part, name))

    def values(self, part: str, name: str, row: str, metric: str) -> list[float]:
        """Returns one number for each seed, by ascending seed."""
        cells = [cell for cell in self.content["cells"] if (cell["part"], cell["name"]) == (part, name)]
        return [cell["rows"][row][metric] for cell in sorted(cells, key=lambda cell: cell["seed"])]

    @property
    def seconds(self) -> float:
        """CPU time of all cells."""
        return sum(cell["seconds"] for cell in self.content["cells"])


Row = tuple[str, str, str]  # part, cell, row


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns a mean and its 95 % t-interval; NaN ends for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(PERCENTILES[1], len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Returns how much larger values are than a baseline's of the same seeds."""
    return mean_interval([a - b for a, b in zip(values, baseline, strict=True)])


def side(gain: Interval) -> int:
    """Returns 1 for an interval above 0, -1 for one below, 0 for one that holds 0 or says nothing.

    An interval without width says nothing: shares of a few hundred examples that differ by the same number of them in
    each of a few seeds give no estimate of how much the difference varies.
    """
    if not gain.high - gain.low > SAME:
        return 0
    return (gain.low > 0) - (gain.high < 0)


def rank_correlation(predictor: Sequence[float], outcome: Sequence[float], draws: int = DRAWS) -> np.ndarray:
    """Returns Spearman's rank correlation of all plans, then that of each bootstrap draw of plans: [1 + draws].

    The same number of plans gives the same draws, so that two predictors' correlations can be subtracted.
    """
    count = len(outcome)
    drawn = np.random.default_rng(0).integers(count, size=(draws, count))
    places = np.vstack([np.arange(count), drawn])
    a, b = (rankdata(np.asarray(values, dtype=float)[places], axis=1) for values in (predictor, outcome))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # NaN for a draw of equal values
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def interval_of(draws: np.ndarray) -> Interval:
    """Returns the first value with the percentiles of the others."""
    low, high = np.nanquantile(draws[1:], PERCENTILES) if np.isfinite(draws[1:]).any() else (math.nan, math.nan)
    return Interval(float(draws[0]), float(low), float(high))


# ---- words


def shown(metric: str, values: Sequence[float]) -> str:
    """Returns a cell of a table: the mean, and half the interval's width where there is one."""
    _, digits, share = METRICS[metric]
    interval, scale = mean_interval(values), 100 if share else 1
    text = f"{scale * interval.value:.{digits}f}" + ("%" if share else "")
    half = scale * (interval.high - interval.value)
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def says(metric: str, gain: Interval) -> str:
    """Returns a difference with its interval, shares in percentage points."""
    _, digits, share = METRICS[metric]
    value, low, high = ((100 if share else 1) * number for number in (gain.value, gain.low, gain.high))
    interval = "one seed" if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
    if gain.high - gain.low <= SAME:
        interval = "the same for all seeds"
    return f"{value:+.{digits}f}{' points' if share else ''}, {interval}"


def compared(study: Study, metric: str, one: Row, others: Mapping[str, Row]) -> str:
    """Returns what a row is beside others in a metric where larger is better: "better than ...; worse than ..."."""
    gains = {
        name: difference(study.values(*one, metric), study.values(*other, metric)) for name, other in others.items()
    }
    lists = {wanted: [name for name, gain in gains.items() if side(gain) == wanted] for wanted in VERDICTS}
    return "; ".join(
        f"{VERDICTS[wanted]} {', '.join(f'{name} ({says(metric, gains[name])})' for name in names)}"
        for wanted, names in lists.items()
        if names
    )


def counted(study: Study, metric: str, pairs: Mapping[str, tuple[Row, Row]], other: str, nothing: str) -> str:
    """Returns for which names the first row of a pair is better than the second, for which worse, for which neither.

    Args:
        study: the numbers.
        metric: where larger is better.
        pairs: {name: (first row, second row)}.
        other: what the second is called.
        nothing: what no name is called: "no criterion".
    """
    sides = {
        name: side(difference(study.values(*one, metric), study.values(*two, metric)))
        for name, (one, two) in pairs.items()
    }
    better, worse, neither = (
        ", ".join(name for name, value in sides.items() if value == wanted) or nothing for wanted in VERDICTS
    )
    return f"better than {other} for {better}; worse for {worse}; not to be told from it for {neither}"


def best(study: Study, metric: str, rows: dict[str, Row]) -> str:
    """Returns the name of the row of the largest mean."""
    return max(rows, key=lambda name: statistics.fmean(study.values(*rows[name], metric)))
