"""`moeprune report`: one page about a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Common, flag
from moeprune_ext.report.report import write_report

EXAMPLE = "moeprune report RUN -o report.html"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    run: Path = flag("directory of a run of prune, search, eep or demo", positional=True)
    out: Path | None = flag("page to write; else report.html among the run's files", None, short="-o")


def run(options: Options) -> tuple[Any, str]:
    """Writes the page, and its pictures beside it."""
    if options.out is not None:
        io.check_new_file(options.out, force=True)  # a page can be made again
    out = write_report(options.run, options.out)
    pictures = out.with_name(f"{out.stem}-pictures")
    result = {"report": str(out), "pictures": sorted(str(path) for path in pictures.glob("*.png"))}
    return result, f"{out}\nIts pictures, as PNG, and their numbers, as CSV: {pictures}"
