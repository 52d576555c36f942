"""`moeprune demo`: the whole flow on the embedded model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.checkpoint.export import check_new_folder
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Common, flag
from moeprune_ext.files import write_json
from moeprune_ext.progress import View

EXAMPLE = "moeprune demo"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    out: Path | None = flag("keep statistics, plans and checkpoints in this directory", None, short="-o")


def run(options: Options) -> tuple[Any, str]:
    """Runs the demo and returns the rows of its table."""
    from transformers.utils import logging as transformers_logging  # takes seconds, which a refusal need not

    from moeprune_ext.demo.run import as_json, demo_folder, format_intervals, format_table, run_demo

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    files = ""
    with View() as view, tempfile.TemporaryDirectory() as folder:
        if options.out is not None:
            check_new_folder(options.out)
            files = f"\nStatistics, plans, checkpoints, tasks: {options.out}; the embedded model: {demo_folder()}."
        rows = run_demo(options.out or Path(folder), seed=options.seed, progress=view, say=view.say)
    if options.out is not None:
        write_json(options.out / "demo.json", as_json(rows), indent=1)
        files += f"\nreport: {io.report(options.out)}"
    text = (
        f"\n{format_table(rows)}\n\n{format_intervals(rows)}\n\n"
        "ESAP: acceptance of the pruned model as a draft for the full one, on held-out text; ppl: perplexity;\n"
        "arithmetic: token-exact match on held-out problems; word order: four-way multiple choice; MB: weights on disk."
        f"{files}\nNext, on your own model:  moeprune prune /path/to/model --sparsity 0.5 --data text.jsonl -o pruned"
    )
    return as_json(rows), text
