"""A page: what it says, its charts and tables; written as one HTML file, with every picture and its numbers beside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from moeprune_ext.charts import Chart
from moeprune_ext.files import replacing, write_text

ROWS_SHOWN = 400  # of a chart's numbers on the page; the CSV has all


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: of the columns.
        rows: cells; the first of a row names it.
        strong: number of the row to stress; None: none.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page, under a heading of its own.

    Attributes:
        title: the heading.
        paragraphs: text.
        tables: shown under the text.
        charts: shown under the tables.
        code: a block to copy, such as a command.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    code: str = ""


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page: its name, the number, what it was before."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything a report says.

    Attributes:
        title: of the page.
        verdict: the result in a sentence or two.
        facts: the numbers that matter most.
        sections: in the order of reading.
        data: what the tables show, as JSON values; on the page for machines.
    """

    title: str
    verdict: str
    facts: Sequence[Fact]
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def charts(self) -> list[Chart]:
        """All charts."""
        return [chart for section in self.sections for chart in section.charts]


def write_page(page: Page, out: Path) -> Path:
    """Writes a page as `out`, and in the folder NAME-pictures beside it a PNG and a CSV file of each chart."""
    names = [chart.name for chart in page.charts]
    if len(set(names)) < len(names):
        raise ValueError(f"two charts of a page have one name: {sorted(names)}")
    pictures = out.with_name(f"{out.stem}-pictures")
    if names:
        pictures.mkdir(parents=True, exist_ok=True)
    for chart in page.charts:
        write_text(pictures / f"{chart.name}.csv", chart.csv)
        with replacing(pictures / f"{chart.name}.png") as beside:
            beside.write_bytes(chart.png())
    write_text(out, html(page))
    return out


def html(page: Page) -> str:
    """Returns the page as HTML that needs no other file."""
    from jinja2 import Environment  # takes as long as what it does

    source = files("moeprune_ext.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"csv_link": _csv_link, "cell": _cell}
    return environment.from_string(source).render(page=page, rows_shown=ROWS_SHOWN) + "\n"


def _csv_link(chart: Chart) -> str:
    return "data:text/csv;base64," + base64.b64encode(chart.csv.encode("utf-8")).decode("ascii")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
