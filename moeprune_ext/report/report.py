"""`write_report`: what kind of run a directory holds, and its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeprune_ext.report.checkpoints import PRODUCTS, budgets, demo_page, prune_page, sizes_page
from moeprune_ext.report.page import Page, write_page
from moeprune_ext.report.plans import search_page
from moeprune_ext.report.tasks import eep_page, eep_table_page

REPORT = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes one page about a run that `prune`, `search`, `eep` or `demo` left, and its pictures beside it.

    Args:
        run: the run's directory; of `prune` that of the checkpoint, or of several budgets.
        out: the file; None: report.html among the run's files.

    Raises:
        ValueError: for a directory without a finished run, before anything is written.
    """
    if run.name == PRODUCTS and (run / "request.json").exists():
        run = run.parent
    if not run.is_dir():
        raise ValueError(f"{run} is not a directory; name the directory of a run of prune, search, eep or demo")
    for is_there, page, place in _KINDS:
        if is_there(run):
            return write_page(page(run), out or place(run) / REPORT)
    raise ValueError(
        f"{run} holds no finished run: moeprune/result.json of prune, plan.json and search.json of search, result.json "
        "or table.json of eep, or demo.json; if a run was interrupted, the same command finishes it"
    )


def _here(run: Path) -> Path:
    return run


_KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Page], Callable[[Path], Path]]] = [
    (lambda run: (run / "demo.json").is_file() and bool(budgets(run)), demo_page, _here),
    (lambda run: (run / PRODUCTS / "result.json").is_file(), prune_page, lambda run: run / PRODUCTS),
    (lambda run: len(budgets(run)) > 0, sizes_page, _here),
    (lambda run: (run / "table.json").is_file(), eep_table_page, _here),
    (lambda run: (run / "result.json").is_file() and (run / "search.json").is_file(), eep_page, _here),
    (lambda run: (run / "search.json").is_file() and (run / "plan.json").is_file(), search_page, _here),
]
