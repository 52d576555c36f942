"""Draws the pictures of the documentation into docs/assets: `python docs/pictures.py`.

Every picture is a small SVG of text, boxes and lines, whose colours follow the reader's light or dark setting. The
demo's picture is drawn from bench/results/demo.md; the others show ideas, not measurements.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
STYLE = """<style>
text{font:13px system-ui,sans-serif;fill:#1d2430}.small{font-size:11px}.muted{fill:#667085}.bold{font-weight:600}
.one{fill:#2563eb}.two{fill:#d97706}.three{fill:#0f9d72}.grey{fill:#98a2b3}.soft{fill:#98a2b3;fill-opacity:.25}
.line{stroke:#667085;stroke-width:1.3;fill:none}.thick{stroke:#2563eb;stroke-width:2.4;fill:none}
.dash{stroke:#667085;stroke-width:1.3;stroke-dasharray:4 3;fill:none}
@media(prefers-color-scheme:dark){text{fill:#e6e9ef}.muted{fill:#98a2b3}.one{fill:#6b9bff}.two{fill:#f0a63c}
.three{fill:#34c796}.line,.dash{stroke:#98a2b3}.thick{stroke:#6b9bff}}
</style>"""


def text(x: float, y: float, words: object, look: str = "", anchor: str = "start") -> str:
    """Returns a line of text."""
    words = str(words).replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{look}">{words}</text>'


def box(x: float, y: float, width: float, height: float, look: str, radius: float = 2) -> str:
    """Returns a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{look}"/>'


def line(x1: float, y1: float, x2: float, y2: float, look: str = "line") -> str:
    """Returns a straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{look}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Returns a horizontal or vertical arrow."""
    across = y1 == y2
    sign = 5 if (x2 - x1) + (y2 - y1) > 0 else -5
    wings = [(x2 - sign, y2 - 4), (x2 - sign, y2 + 4)] if across else [(x2 - 4, y2 - sign), (x2 + 4, y2 - sign)]
    return line(x1, y1, x2, y2) + "".join(line(x, y, x2, y2) for x, y in wings)


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """Returns the SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}"><title>{title}</title>\n{STYLE}\n' + "\n".join(parts) + "\n</svg>\n"
    )


def demo_tables() -> tuple[dict[str, float], dict[str, list[int]]]:
    """Returns held-out ESAP by model, and experts kept by layer, from bench/results/demo.md."""
    content = (ROOT / "bench" / "results" / "demo.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in row.strip("| ").split("|")] for row in content.splitlines() if row.startswith("|")
    ]
    esap = {row[0]: float(row[1]) for row in rows if len(row) == 9 and re.fullmatch(r"[\d.]+", row[1])}
    kept = {row[0]: [int(cell) for cell in row[1:]] for row in rows if len(row) == 7 and row[1].isdigit()}
    return esap, kept


def demo() -> str:
    """Draws the demo's result: quality by method, and where the experts stay."""
    esap, kept = demo_tables()
    methods = {"uniform REAP": "grey", "EvoESAP by REAP": "two", "prune": "one"}
    parts = [text(10, 20, "Tokens of the pruned model that the full model accepts (ESAP, held-out text)", "bold")]
    for group, percent in enumerate(("25%", "50%")):
        top = 40 + 92 * group
        parts.append(text(10, top + 40, f"{percent} fewer", "muted"))
        for number, (method, look) in enumerate(methods.items()):
            value, y = esap[f"{method} {percent}"], top + 25 * number
            parts += [
                text(205, y + 14, method, "small", "end"),
                box(212, y, 330 * value, 19, look),
                text(218 + 330 * value, y + 14, f"{value:.3f}", "small"),
            ]
    parts.append(text(10, 248, "Experts kept per layer at 50% (16 are there)", "bold"))
    for layer in range(6):
        x = 40 + 92 * layer
        for number, (method, look) in enumerate(methods.items()):
            count = kept[f"{method} 50%"][layer]
            parts += [
                box(x + 24 * number, 350 - 5 * count, 21, 5 * count, look),
                text(x + 24 * number + 10.5, 345 - 5 * count, count, "small muted", "middle"),
            ]
        parts.append(text(x + 35, 367, f"layer {layer}", "small muted", "middle"))
    return picture(600, 380, "The demo's result: acceptance by method, and experts kept per layer", parts)


def scoring() -> str:
    """Draws the criteria as points of one family."""
    cells = {
        ("sum", 0, 0): "frequency",
        ("sum", 1, 0): "seer",
        ("sum", 0, 1): "ean",
        ("sum", 1, 1): "weighted_ean",
        ("sum", 1, 2): "weighted_ean_l2",
        ("mean", 1, 1): "reap",
        ("mean", 1, 2): "reap_l2",
        ("mean", 0, 1): "man",
        ("mean", 0, 2): "msan",
    }
    parts = [text(10, 20, "Every criterion is one choice of three things", "bold")]
    for panel, reduce in enumerate(("sum", "mean")):
        left = 100 + 300 * panel
        parts.append(text(left + 125, 48, f"{reduce} over the expert's tokens", "muted", "middle"))
        for beta in range(3):
            for alpha in range(2):
                name = cells.get((reduce, alpha, beta), "")
                x, y = left + 127 * alpha, 60 + 44 * beta
                parts.append(box(x, y, 122, 38, "soft"))
                parts.append(text(x + 61, y + 24, name, "", "middle"))
        parts += [text(left + 61, 210, "gate left out", "small muted", "middle")]
        parts += [text(left + 188, 210, "gate included", "small muted", "middle")]
    parts += [text(92, 84 + 44 * beta, label, "small muted", "end") for beta, label in enumerate(("1", "‖f‖", "‖f‖²"))]
    return picture(670, 224, "Criteria as choices of frequency, gate weight and activation norm", parts)


def esap() -> str:
    """Draws the overlap of two next-token distributions."""
    p, q = (0.40, 0.25, 0.15, 0.10, 0.06, 0.04), (0.25, 0.33, 0.08, 0.20, 0.06, 0.08)
    shared = sum(map(min, p, q))
    parts = [text(10, 20, "ESAP: the part that two next-token distributions share", "bold")]
    for number, (full, pruned) in enumerate(zip(p, q, strict=True)):
        x = 40 + 62 * number
        parts += [
            box(x, 190 - 350 * full, 22, 350 * full, "one"),
            box(x + 25, 190 - 350 * pruned, 22, 350 * pruned, "two"),
            line(x - 3, 190 - 350 * min(full, pruned), x + 50, 190 - 350 * min(full, pruned), "dash"),
            text(x + 23, 206, f"v{number + 1}", "small muted", "middle"),
        ]
    parts += [
        box(430, 60, 12, 12, "one"),
        text(448, 71, "p: full model"),
        box(430, 82, 12, 12, "two"),
        text(448, 93, "q: pruned model"),
        line(428, 110, 444, 110, "dash"),
        text(448, 115, "min(p, q)"),
        text(430, 150, f"sum of the minima: {shared:.2f}", "bold"),
        text(430, 168, "(an invented example)", "small muted"),
    ]
    return picture(620, 215, "ESAP as the overlap of two distributions", parts)


def grape() -> str:
    """Draws the layers' similarity matrices as blocks, with the pair that is merged next."""
    parts = [text(10, 20, "GRAPE: the most similar pair of any layer loses one expert", "bold")]
    shades = {(0, 1, 2): 0.75, (1, 0, 3): 0.95, (2, 1, 3): 0.6, (0, 0, 3): 0.4, (2, 0, 1): 0.35, (1, 1, 2): 0.5}
    for layer in range(3):
        x0, y0 = 40 + 150 * layer, 45
        parts.append(text(x0 + 58, y0 + 136, f"layer {layer}", "small muted", "middle"))
        for row in range(4):
            for column in range(4):
                pair = (layer, min(row, column), max(row, column))
                opacity = 1 if row == column else shades.get(pair, 0.12)
                look = "two" if pair == (1, 0, 3) else "one" if row != column else "grey"
                cell = box(x0 + 29 * column, y0 + 29 * row, 27, 27, look)
                parts.append(cell.replace("/>", f' fill-opacity="{opacity}"/>'))
    parts += [
        text(500, 70, "pair merged next", "small"),
        box(480, 60, 13, 13, "two"),
        text(500, 92, "similar: darker", "small"),
        box(480, 82, 13, 13, "one"),
        text(480, 124, "Only pairs inside a layer", "small muted"),
        text(480, 140, "are compared; all pairs", "small muted"),
        text(480, 156, "of all layers compete.", "small muted"),
    ]
    return picture(640, 192, "Similarity matrices of three layers, with the most similar pair marked", parts)


def eep() -> str:
    """Draws how experts become fewer, first by choice and then by sums."""
    parts = [text(10, 20, "EEP: first choose, then merge", "bold")]
    merged = {0: (0, 3), 1: (2, 1), 2: (4, 5)}
    for left, label, merge in ((30, "prune: rows of W are one-hot", False), (350, "merge: rows of W are sums", True)):
        parts.append(text(left + 130, 48, label, "muted", "middle"))
        for old in range(6):
            parts += [box(left + 44 * old, 60, 36, 24, "soft"), text(left + 44 * old + 18, 76, f"e{old}", "", "middle")]
        for new, (first, second) in merged.items():
            x = left + 22 + 88 * new
            parts += [line(left + 44 * first + 18, 84, x + 18, 140, "thick")]
            parts += [line(left + 44 * second + 18, 84, x + 18, 140, "dash")] * merge
            parts += [box(x, 140, 36, 24, "one"), text(x + 18, 182, f"new {new}", "small muted", "middle")]
    return picture(650, 195, "Experts are chosen by one-hot rows, then merged by weighted sums", parts)


def choice() -> str:
    """Draws which part of the text each stage sees."""
    parts = [text(10, 20, "Every decision is judged on text that it was not made on", "bold")]
    spans = {"calibration": (0, 250, "grey"), "search": (256, 150, "one"), "held out": (412, 60, "two")}
    spans["test"] = (478, 90, "three")
    for name, (x, width, look) in spans.items():
        parts += [box(20 + x, 40, width, 24, look), text(20 + x + width / 2, 82, name, "small", "middle")]
    stages = (
        ("statistics; what repair fits", "calibration"),
        ("criterion, counts per layer", "search"),
        ("which plan, which repair", "held out"),
        ("the figures reported", "test"),
    )
    for number, (stage, name) in enumerate(stages):
        x, width, look = spans[name]
        y = 100 + 26 * number
        parts += [box(20 + x, y, width, 16, look)]
        at, anchor = (26 + x + width, "start") if x < 300 else (14 + x, "end")
        parts.append(text(at, y + 13, stage, "small", anchor))
    return picture(620, 212, "Which part of the text each stage uses", parts)


def repair() -> str:
    """Draws what the repair of a layer fits."""
    parts = [text(10, 20, "Repair: one layer, least squares", "bold")]
    for y, label, look in ((40, "full layer", "grey"), (120, "pruned layer", "one")):
        parts += [box(130, y, 200, 44, "soft"), text(230, y + 27, label, "", "middle"), arrow(70, y + 22, 126, y + 22)]
        parts += [box(134, y + 4, 6, 36, look)]
    parts += [
        text(64, 67, "x", "", "end"),
        text(64, 147, "x", "", "end"),
        arrow(330, 62, 390, 62),
        arrow(330, 142, 390, 142),
        text(396, 67, "y*  what it should give"),
        text(396, 147, "y   what it gives"),
        arrow(402, 128, 402, 76),
        text(414, 106, "difference: fitted by new down", "two small"),
        text(414, 121, "projections of the kept experts", "two small"),
        text(10, 188, "Then the next layer, behind the repaired one.", "small muted"),
    ]
    return picture(640, 200, "The pruned layer's down projections are fitted to the full layer's output", parts)


def evaluator() -> str:
    """Draws candidates that share layers until they differ."""
    parts = [text(10, 20, "Candidates share their layers until they differ", "bold")]
    xs = [50 + 120 * layer for layer in range(5)]
    for layer, x in enumerate(xs[:-1]):
        parts.append(text(x + 60, 45, f"layer {layer}", "small muted", "middle"))
    nodes = {0: [110], 1: [110], 2: [80, 140], 3: [65, 95, 140], 4: [55, 82, 109, 150]}
    edges = [
        (0, 0, 0),
        (1, 0, 0),
        (1, 0, 1),
        (2, 0, 0),
        (2, 0, 1),
        (2, 1, 2),
        (3, 0, 0),
        (3, 1, 1),
        (3, 1, 2),
        (3, 2, 3),
    ]
    for layer, start, end in edges:
        parts.append(line(xs[layer], nodes[layer][start], xs[layer + 1], nodes[layer + 1][end], "thick"))
    for layer, ys in nodes.items():
        parts += [f'<circle cx="{xs[layer]}" cy="{y}" r="5" class="{"two" if layer == 4 else "one"}"/>' for y in ys]
    parts += [text(545, y + 4, f"candidate {number}", "small") for number, y in enumerate(nodes[4])]
    parts.append(text(10, 186, "Four candidates: 10 layers are computed instead of 16.", "small muted"))
    return picture(640, 198, "A tree of candidates over the layers of a model", parts)


def main() -> None:
    """Writes every picture."""
    ASSETS.mkdir(exist_ok=True)
    for draw in (demo, scoring, esap, grape, eep, choice, repair, evaluator):
        (ASSETS / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
