"""`moeprune prune`: the whole way, from a model directory and text to the best pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, unscored
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import (
    Budgeted,
    Common,
    Memory,
    Streaming,
    criteria_help,
    data_flag,
    flag,
    model_argument,
)
from moeprune_ext.models.routers import ROUTERS
from moeprune_ext.pipeline.prune import PruneResult, open_source, prune_to, report_text
from moeprune_ext.pipeline.run import FOLDER, Run
from moeprune_ext.pipeline.settings import REPAIRS, SEQUENTIAL, PruneSettings, SearchSettings, TextSizes
from moeprune_ext.progress import View
from moeprune_ext.tables import markdown_table

EXAMPLE = "moeprune prune MODEL --sparsity 0.5 --data text.jsonl -o OUT"


def _criteria_help() -> str:
    return f"auto: the best by measurement, of all layers or per layer; or naee, {criteria_help()}"


@dataclass(frozen=True, kw_only=True)
class Options(Memory, Streaming, Budgeted, Common):
    model: Path = model_argument()
    data: tuple[str, ...] = data_flag()
    sparsity: tuple[float, ...] = flag(  # type: ignore[assignment]
        "share of the experts to remove; several: a checkpoint each, OUT/25, OUT/50 (default: 0.5)", ()
    )
    sequence_length: int = flag("tokens per sequence", 2048, least=1)
    texts: TextSizes
    criterion: str = flag(_criteria_help, "auto")
    search: SearchSettings
    refine: int = flag("rounds of swaps of single experts after the search, judged on held-out text", 0, least=0)
    repair: str = flag(
        "refit kept experts' down projections without gradients, to what the full layer computes or to its hidden "
        "states; auto: what held-out text likes best; never worse than off there",
        "auto",
        choices=REPAIRS,
    )
    sequential: str = flag(
        "repair chooses experts anew by what the pruned layers before give; auto: if better on held-out text",
        "auto",
        choices=SEQUENTIAL,
    )
    drop_mtp: bool = flag("leave out multi-token-prediction layers, which are kept otherwise", False)
    router: str = flag("fused: the kernel for half-precision logits too", "auto", choices=ROUTERS)
    out: Path = flag("directory for the checkpoint; the stages' files are in its folder moeprune", short="-o")


def run(options: Options) -> tuple[Any, str]:
    """Runs all stages, or goes on with them, for every budget asked for."""
    limits = ("min_kept", "min_kept_per_group", "multiple_of", "max_kept", "protect_super")
    settings = PruneSettings(
        search=replace(options.search, seed=options.seed),
        refine=options.refine,
        criterion=io.parse_criterion(options.criterion),
        repair=options.repair,
        sequential=options.sequential,
        drop_mtp=options.drop_mtp,
        router=options.router,
        memory_budget=options.memory_bytes,
        **{name: getattr(options, name) for name in limits},
    )

    with View() as view:
        first = distributed.is_first()
        results = _run(options, settings, view if first else False, view.say if first else lambda line: None)
    if len(results) == 1:
        return results[0].as_json(), report_text(results[0])
    return [result.as_json() for result in results], _sizes(results)


def _run(
    options: Options, settings: PruneSettings, progress: bool | View, say: Callable[[str], None]
) -> list[PruneResult]:
    """Runs all budgets, one after the other."""
    source = open_source(
        options.model,
        options.data,
        settings,
        options.texts,
        shared=options.out / FOLDER,
        sequence_length=options.sequence_length,
        loader=lambda: io.load_model(options.model, options),
        dtype=options.dtype,
        progress=progress,
        say=say,
    )
    shapes = settings.limited(unscored({i: layer.shape for i, layer in source.checkpoint.layers.items()}), None).shapes
    budgets = _budgets(options, shapes)
    for budget, out in budgets.items():  # all of them are refused before the first runs
        Run(source, budget, out).check()
    return [prune_to(source, budget, out) for budget, out in budgets.items()]


def _budgets(options: Options, shapes: Mapping[int, Any]) -> dict[Budget, Path]:
    """Returns {budget: its directory}."""
    if len(options.sparsity) < 2:
        one = options.sparsity[0] if options.sparsity else None
        flags = Budgeted(**{name: getattr(options, name) for name in ("experts", "fit", "context")}, sparsity=one)
        return {io.budget(flags, options.model, shapes): options.out}
    return {sparsity: options.out / f"{100 * sparsity:g}" for sparsity in options.sparsity}


def _sizes(results: list[PruneResult]) -> str:
    """Returns the size-quality table, and each budget's report."""
    header = ["removed", "experts", "on disk", "ESAP", "95 % interval", "perplexity", "checkpoint"]
    lines = []
    for result in results:
        row = result.measured.rows[-1]
        lines.append(
            [
                f"{result.plan.sparsity:.1%}",
                str(row.experts),
                f"{row.disk / 1e6:,.1f} MB",
                f"{row.esap.value:.4f}",
                f"{row.esap.low:.3f} to {row.esap.high:.3f}",
                f"{row.perplexity:.2f}",
                str(result.out),
            ]
        )
    return "\n\n".join([markdown_table(header, lines), *(f"{r.out}\n{report_text(r)}" for r in results)])
