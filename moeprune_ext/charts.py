"""Charts: plain numbers to a picture, as SVG for a page, as PNG, and their numbers as CSV.

A Chart is drawn twice for a page, for wide and for narrow screens. Colours of the SVG are CSS variables (`--ink`,
`--muted`, `--grid`, `--one` to `--three`), so that a page decides on light and dark. matplotlib is imported when a
chart is drawn.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of each colour: what stands for it while an SVG is drawn, and how it looks in a PNG.
COLOURS = {
    "ink": ("#010203", "#1d2430"),
    "muted": ("#040506", "#667085"),
    "grid": ("#070809", "#e3e7ee"),
    "one": ("#0a0b0c", "#2563eb"),
    "two": ("#0d0e0f", "#d97706"),
    "three": ("#101112", "#0f9d72"),
    "soft": ("#131415", "#bfd3fb"),
}
WIDE, NARROW = 8.6, 4.1  # inches; a page shows them at about 860 and 360 pixels, so that their text is equally large
WRAP = 34, 16  # letters of a line's name, of the wide and the narrow picture
KEPT, PRUNED = (37, 99, 235), (217, 119, 6)  # of a heat map, whose cells are pixels and look well on light and dark


@dataclass(frozen=True)
class Chart:
    """A picture, its numbers, and what it shows in a sentence.

    Attributes:
        name: of its files.
        title: names what is shown.
        says: what there is to see, in a sentence.
        header: names of the numbers' columns.
        rows: the numbers; None where there is none.
        draw: draws it on axes, in colours {name: value}; told whether the picture is narrow.
        height: in inches, of the wide and the narrow picture.
        left: inches left of the axes, likewise, for the names of lines. (Letting matplotlib find them out takes twice
            the time.)
        legend: entries of the legend.
    """

    name: str
    title: str
    says: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    draw: Callable[[Axes, Mapping[str, str], bool], None]
    height: tuple[float, float] = (2.9, 2.7)
    left: tuple[float, float] = (0.68, 0.62)
    legend: int = 1

    @property
    def csv(self) -> str:
        """The numbers as CSV, in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return text.getvalue()

    def svg(self, narrow: bool = False) -> str:
        """Returns an <svg> element to be put into a page."""
        sentinels = {name: sentinel for name, (sentinel, _) in COLOURS.items()}
        text = self._drawn("svg", sentinels, narrow).decode("utf-8")
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)  # a page says how wide
        text = re.sub(r"font-family: [^;]*;", "", text)
        for name, sentinel in sentinels.items():
            text = text.replace(sentinel, f"var(--{name})")
        label = self.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """Returns the wide picture on white."""
        return self._drawn("png", {name: colour for name, (_, colour) in COLOURS.items()}, narrow=False)

    def _drawn(self, kind: str, colours: Mapping[str, str], narrow: bool) -> bytes:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        style: dict[Any, Any] = {
            "text.parse_math": False,  # a name may have dollar signs
            "svg.fonttype": "none",  # text stays text, in the page's font
            "svg.hashsalt": f"{self.name}-{narrow}",  # same numbers, same file; no id twice in a page
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.edgecolor": colours["grid"],
            "axes.labelcolor": colours["muted"],
            "text.color": colours["ink"],
            "xtick.color": colours["muted"],
            "ytick.color": colours["muted"],
            "legend.frameon": False,
            "legend.fontsize": 8.5,
        }
        with rc_context(style):
            width, height = NARROW if narrow else WIDE, self.height[narrow]
            top = 0.12 + 0.2 * math.ceil(self.legend / (2 if narrow else 4))
            figure = Figure(figsize=(width, height))
            left = self.left[narrow]
            axes = figure.add_axes((left / width, 0.5 / height, 1 - (left + 0.12) / width, 1 - (0.5 + top) / height))
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
            self.draw(axes, colours, narrow)
            file = io.BytesIO()
            if kind == "svg":
                figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            else:
                figure.savefig(file, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return file.getvalue()


def kept_per_layer(kept: Mapping[int, int], experts: Mapping[int, int]) -> Chart:
    """Shows how many experts each layer keeps, beside as many in every layer.

    Args:
        kept: {decoder layer: experts kept}.
        experts: {decoder layer: experts before}.
    """
    layers, total = list(kept), sum(kept.values())
    share = total / sum(experts[layer] for layer in layers)
    uniform = [share * experts[layer] for layer in layers]
    least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    even = len(set(kept.values())) == 1
    says = (
        f"Every layer keeps {kept[least]} experts."
        if even
        else f"Layer {most} keeps most ({kept[most]} of {experts[most]}), layer {least} fewest "
        f"({kept[least]} of {experts[least]}); a uniform plan would keep {share * experts[layers[0]]:.4g} of each."
    )

    def draw(axes: Axes, colour: Mapping[str, str], narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        places = range(len(layers))
        axes.bar(places, [experts[layer] for layer in layers], color=colour["grid"], width=0.82, label="before")
        axes.bar(places, [kept[layer] for layer in layers], color=colour["one"], width=0.82, label="kept")
        for place, height in zip(places, uniform, strict=True):
            axes.plot(
                [place - 0.41, place + 0.41],
                [height] * 2,
                color=colour["two"],
                linewidth=2,
                label="uniform" if place == 0 else None,
            )
        if len(layers) <= (12 if narrow else 30):
            for place, layer in zip(places, layers, strict=True):
                axes.annotate(
                    str(kept[layer]), (place, 0), (0, 3), textcoords="offset points", ha="center", color="#ffffff"
                )
        step = math.ceil(len(layers) / (12 if narrow else 24))
        axes.set_xticks(list(places)[::step], [str(layer) for layer in layers[::step]])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("experts")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.2)

    rows = [(layer, experts[layer], kept[layer], level) for layer, level in zip(layers, uniform, strict=True)]
    return Chart(
        "kept-per-layer",
        "Experts kept per layer",
        says,
        ("layer", "experts_before", "kept", "uniform"),
        rows,
        draw,
    )


def heat_map(scores: Mapping[int, Sequence[float]], kept: Mapping[int, Sequence[int]]) -> Chart:
    """Shows the experts of each layer by score, and which of them stay.

    Args:
        scores: {decoder layer: score of each expert}, higher = keep.
        kept: {decoder layer: numbers of the experts kept}.
    """
    layers = list(scores)
    width = max(len(values) for values in scores.values())
    rows, cells = [], [[(0, 0, 0, 0)] * width for _ in layers]
    out_of_order = 0
    for y, layer in enumerate(layers):
        values, stays = list(scores[layer]), set(kept[layer])
        order = sorted(range(len(values)), key=lambda expert: -values[expert])
        best = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
        for x, expert in enumerate(order):
            share = min(1.0, max(0.0, values[expert] / best)) if math.isfinite(values[expert]) else 1.0
            red, green, blue = KEPT if expert in stays else PRUNED
            cells[y][x] = (red, green, blue, round(255 * (0.22 + 0.78 * share)))
            rows.append((layer, expert, values[expert], expert in stays))
        out_of_order += len(stays - set(order[: len(stays)]))
    says = "Each row is a layer, its experts from the highest score to the lowest; the stronger the colour, the higher."
    if out_of_order:
        says += f" {out_of_order} experts stay although others of their layer have higher scores."

    def draw(axes: Axes, colour: Mapping[str, str], narrow: bool) -> None:
        import numpy as np
        from matplotlib.patches import Patch

        axes.imshow(np.array(cells, dtype=np.uint8), aspect="auto", interpolation="none")
        step = math.ceil(len(layers) / (16 if narrow else 24))
        axes.set_yticks(range(len(layers))[::step], [str(layer) for layer in layers[::step]])
        axes.set_ylabel("decoder layer")
        axes.set_xlabel("experts of the layer, by score")
        axes.set_xticks([0, width - 1], ["1", str(width)])
        handles = [
            Patch(color=f"#{bytes(rgb).hex()}", label=name) for rgb, name in ((KEPT, "kept"), (PRUNED, "pruned"))
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handlelength=1)
        axes.spines["bottom"].set_visible(False)

    height = 1.3 + min(6.0, 0.24 * len(layers))
    header = ("layer", "expert", "score", "kept")
    return Chart("experts-by-score", "Experts by score", says, header, rows, draw, (height, height))


@dataclass(frozen=True)
class Point:
    """A value with its interval, of an `intervals` chart.

    Attributes:
        name: of the line.
        value: NaN where there is none.
        low: end of the 95 % interval; NaN: not known.
        high: likewise.
        group: colour by group, in their order.
        strong: whether to stress it.
    """

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    group: str = ""
    strong: bool = False


def intervals(name: str, title: str, says: str, points: Sequence[Point], axis: str) -> Chart:
    """Shows values with their intervals, one line each, the first on top; several points of one name share a line."""
    names = list(dict.fromkeys(point.name for point in points))
    groups = list(dict.fromkeys(point.group for point in points))

    def draw(axes: Axes, colour: Mapping[str, str], narrow: bool) -> None:
        palette = ["one", "two", "three", "muted"]
        shift = 0.26 if len(groups) > 1 else 0.0
        for number, group in enumerate(groups):
            members = [point for point in points if point.group == group]
            places = [names.index(point.name) + shift * (number - (len(groups) - 1) / 2) for point in members]
            shade = colour[palette[number % len(palette)]]
            for point, place in zip(members, places, strict=True):
                if math.isfinite(point.low):
                    axes.plot([point.low, point.high], [place] * 2, color=shade, linewidth=2.5, solid_capstyle="round")
            values = [point.value for point in members]
            axes.plot(values, places, "o", color=shade, markersize=6, label=group or None)
            for point, place in zip(members, places, strict=True):
                if point.strong:
                    axes.plot([point.value], [place], "o", color=colour["two"], markersize=8)
                if len(groups) == 1 and math.isfinite(point.value):
                    text = f"{point.value:.4g}"
                    axes.annotate(text, (point.value, place), (0, 6), textcoords="offset points", ha="center")
        axes.set_yticks(range(len(names)), [_wrapped(one, WRAP[narrow]) for one in names])
        axes.tick_params(axis="y", labelcolor=colour["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x", color=colour["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.08)
        axes.set_xlabel(axis)
        if any(groups):
            _legend(axes, narrow)

    per_line = 0.34 + 0.12 * (len(groups) - 1)
    height = 1.0 + per_line * len(names) + (0.25 if any(groups) else 0)
    rows = [(p.name, p.group, *(_none(x) for x in (p.value, p.low, p.high))) for p in points]
    header = ("name", "group", "value", "low", "high")
    left = tuple(0.25 + 0.075 * max(len(line) for one in names for line in _wrapped(one, n).split("\n")) for n in WRAP)
    legend = len(groups) if any(groups) else 0
    return Chart(name, title, says, header, rows, draw, (height, height + 0.3), (left[0], left[1]), legend)


def lines(
    name: str,
    title: str,
    says: str,
    x: tuple[str, Sequence[float]],
    series: Mapping[str, Sequence[float]],
    axis: str,
) -> Chart:
    """Shows numbers over numbers, a line for each series.

    Args:
        name: of the files.
        title: names what is shown.
        says: what there is to see.
        x: name and values of the horizontal axis.
        series: {name: values}, NaN where there is none.
        axis: name of the vertical axis.
    """

    def draw(axes: Axes, colour: Mapping[str, str], narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        for shade, (label, values) in zip(("one", "two", "three", "muted"), series.items(), strict=False):
            marker = "o" if len(values) <= 20 else ""
            axes.plot(x[1], values, color=colour[shade], linewidth=2, marker=marker, markersize=4.5, label=label)
        axes.grid(axis="y", color=colour["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(x[0])
        axes.set_ylabel(axis)
        if all(float(value).is_integer() for value in x[1]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, narrow)

    columns = [x[1], *series.values()]
    rows = [tuple(_none(value) for value in row) for row in zip(*columns, strict=True)]
    return Chart(name, title, says, (x[0], *series), rows, draw)


def scatter(
    name: str, title: str, says: str, x: tuple[str, Sequence[float]], points: Sequence[Point], axis: str
) -> Chart:
    """Shows values with their intervals over numbers, each named, joined by a line in the order of the numbers.

    Args:
        name: of the files.
        title: names what is shown.
        says: what there is to see.
        x: name of the horizontal axis, and each point's place on it.
        points: values, intervals and names.
        axis: name of the vertical axis.
    """

    def draw(axes: Axes, colour: Mapping[str, str], narrow: bool) -> None:
        order = sorted(range(len(points)), key=lambda i: x[1][i])
        axes.plot([x[1][i] for i in order], [points[i].value for i in order], color=colour["soft"], linewidth=2)
        for place, point in zip(x[1], points, strict=True):
            if math.isfinite(point.low):
                axes.plot([place] * 2, [point.low, point.high], color=colour["one"], linewidth=2.5)
            axes.plot([place], [point.value], "o", color=colour["one"], markersize=7)
            axes.annotate(point.name, (place, point.value), (8, -12), textcoords="offset points")
        axes.grid(axis="y", color=colour["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.2, y=0.15)
        axes.set_xlabel(x[0])
        axes.set_ylabel(axis)

    ends = [[_none(number) for number in (point.value, point.low, point.high)] for point in points]
    rows = [(point.name, place, *its) for place, point, its in zip(x[1], points, ends, strict=True)]
    return Chart(name, title, says, ("name", x[0], "value", "low", "high"), rows, draw)


def _legend(axes: Axes, narrow: bool) -> None:
    columns = 2 if narrow else 4
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, handlelength=1.2)


def _none(value: float) -> float | None:
    return value if isinstance(value, int) or math.isfinite(value) else None


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text
