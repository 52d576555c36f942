"""The pages of the documentation and their code blocks.

A comment on the line before a block says how it is tested:

    <!-- not run: REASON -->     not at all; test_code_blocks.py lists the reasons that are allowed
    <!-- parsed only -->         its commands are parsed by the real parser, its Python compiled and its calls checked
    <!-- run with: FLAGS -->     run, with flags added to its first moeprune command, so that it takes less time
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GENERATED = {"models.md", "study.md", "costs.md"}  # of docs/: written and tested elsewhere
BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*?) -->\n)?^```(?P<kind>bash|python)\n(?P<code>.*?)^```$", re.S | re.M)
NOT_RUN, PARSED, RUN_WITH = "not run: ", "parsed only", "run with: "


@dataclass(frozen=True)
class Block:
    """One block of code. `line` is where it starts."""

    kind: str
    code: str
    marker: str
    line: int


def pages() -> list[Path]:
    """README.md and every page of docs/ that is written by hand."""
    written = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).as_posix() not in GENERATED]
    return [ROOT / "README.md", *written]


def blocks(page: Path) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"], found["code"], found["marker"] or "", text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
    ]


def without_code(text: str) -> str:
    """A page's prose: what is left without fenced blocks, code spans and comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", text, flags=re.S)
