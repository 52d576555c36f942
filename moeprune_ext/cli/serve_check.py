"""`moeprune serve-check`: which runtimes load an export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.cli.arguments import Common, model_argument
from moeprune_ext.serving.check import runtimes
from moeprune_ext.tables import text_table

EXAMPLE = "moeprune serve-check pruned"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    model: Path = model_argument()


def run(options: Options) -> tuple[Any, str]:
    """Returns a row for every runtime."""
    rows = runtimes(options.model)
    said = {True: "yes", False: "no", None: "perhaps"}
    cells = [[row.name, said[row.loads], row.how] for row in rows]
    return [asdict(row) for row in rows], text_table(["runtime", "loads it", "how, or why not"], cells)
