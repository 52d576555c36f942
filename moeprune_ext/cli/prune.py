"""`moeprune prune`: the whole way, from a model directory and text to the best pruned checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, unscored
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.checkpoint.read import Checkpoint, find_shards, read_checkpoint, read_hf_config, skeleton
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import (
    DATA,
    MEMORY,
    OUTPUT,
    REPAIR,
    SCORES,
    SEARCH,
    Budgeted,
    Common,
    Memory,
    Streaming,
    criteria_help,
    data_flag,
    flag,
    length_flag,
    model_argument,
    part,
)
from moeprune_ext.data.sources import Source
from moeprune_ext.models.routers import ROUTERS
from moeprune_ext.pipeline.estimate import Asked, estimate, estimate_text, measured_machine
from moeprune_ext.pipeline.prune import PruneResult, open_source, prune_to, report_text
from moeprune_ext.pipeline.run import FOLDER, Run
from moeprune_ext.pipeline.settings import REPAIRS, SEQUENTIAL, PruneSettings, SearchSettings, TextSizes
from moeprune_ext.pipeline.texts import flat
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
    sequence_length: int = length_flag()
    texts: TextSizes = part(DATA)
    criterion: str = flag(_criteria_help, "auto", group=SCORES)
    search: SearchSettings = part(SEARCH)
    refine: int = flag(
        "rounds of swaps of single experts after the search, judged on held-out text", 0, least=0, group=SEARCH
    )
    repair: str = flag(
        "refit kept experts' down projections without gradients, to what the full layer computes or to its hidden "
        "states; auto: what held-out text likes best; never worse than off there",
        "auto",
        choices=REPAIRS,
        group=REPAIR,
    )
    sequential: str = flag(
        "repair chooses experts anew by what the pruned layers before give; auto: if better on held-out text",
        "auto",
        choices=SEQUENTIAL,
        group=REPAIR,
    )
    drop_mtp: bool = flag("leave out multi-token-prediction layers, which are kept otherwise", False, group=OUTPUT)
    router: str = flag("fused: the kernel for half-precision logits too", "auto", choices=ROUTERS, group=MEMORY)
    dry_run: bool = flag(
        "print an estimate of time, memory and disk for this model and machine, and stop; writes nothing, needs no -o",
        False,
        group=OUTPUT,
    )
    out: Path | None = flag(
        "directory for the checkpoint; the stages' files are in its folder moeprune", None, short="-o"
    )


def run(options: Options) -> tuple[Any, str]:
    """Runs all stages, or goes on with them, for every budget asked for; with --dry-run, estimates them."""
    settings = _settings(options)
    if options.dry_run:
        return _estimated(options, settings)
    if options.out is None:
        raise ValueError("give -o, a directory for the checkpoint; only --dry-run needs none")
    with View() as view:
        first = distributed.is_first()
        results = _run(options, options.out, settings, view if first else False, view.say if first else _say_nothing)
    if len(results) == 1:
        return results[0].as_json(), "\n".join([report_text(results[0]), *_ending(results[0])])
    result = [one.as_json() for one in results]
    return result, _sizes(results) + f"\nreport: {_sizes_report(options.out, results)}"


def _settings(options: Options) -> PruneSettings:
    limits = ("min_kept", "min_kept_per_group", "multiple_of", "max_kept", "protect_super")
    return PruneSettings(
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


def _say_nothing(line: str) -> None:
    pass


def _run(
    options: Options, folder: Path, settings: PruneSettings, progress: bool | View, say: Callable[[str], None]
) -> list[PruneResult]:
    """Runs all budgets, one after the other."""
    checkpoint = read_checkpoint(options.model)
    budgets = _budgets(options, settings.limited(unscored(_shapes(checkpoint)), None).shapes)
    source = open_source(
        options.model,
        options.data,
        settings,
        options.texts,
        shared=folder / FOLDER,
        sequence_length=options.sequence_length,
        loader=lambda: io.load_model(options.model, options),
        dtype=options.dtype,
        progress=progress,
        say=say,
    )
    io.check_positions(options.model, [batch for part in vars(source.texts).values() for batch in flat(part)])
    outs = {budget: folder / name for budget, name in budgets.items()}
    for budget, out in outs.items():  # all of them are refused before the first runs
        found = finished_stages(out, shared=folder)
        Run(source, budget, out).check()
        if found:
            say(f"resuming {out}: {', '.join(found)} found")
    return [prune_to(source, budget, out) for budget, out in outs.items()]


def _shapes(checkpoint: Checkpoint) -> dict[int, LayerShape]:
    return {index: layer.shape for index, layer in checkpoint.layers.items()}


def finished_stages(out: Path, shared: Path) -> list[str]:
    """Returns the stages of a run whose products are there, in order; `shared`: where the statistics are."""
    products, journal = out / FOLDER, out / FOLDER / "search" / "history.jsonl"
    found = ["calibration"] if (shared / FOLDER / "stats.safetensors").exists() else []
    found += ["criterion"] if (products / "choice.json").exists() else []
    if (products / "searched.json").exists():
        found.append("search")
    elif journal.exists():
        found.append(f"{len(journal.read_text(encoding='utf-8').splitlines())} generations")
    repair, figures = (products / "plan.json").exists(), (products / "measured.json").exists()
    return found + ["repair"] * repair + ["checkpoint"] * (out / "config.json").exists() + ["figures"] * figures


def _ending(result: PruneResult) -> list[str]:
    """Returns the last lines: what was gained, the report, and what to do next."""
    before, after = result.measured.rows[0], result.measured.rows[-1]
    return [
        f"{result.out}: {after.disk / 1e6:,.1f} MB instead of {before.disk / 1e6:,.1f} MB on disk, {after.experts:,} "
        f"of {before.experts:,} experts; ESAP {after.esap.value:.4f} (1 = as the full model), perplexity "
        f"{after.perplexity.value:.2f} instead of {before.perplexity.value:.2f}",
        f"report: {result.report}",
        io.next_command("serve-check", result.out),
    ]


def _estimated(options: Options, settings: PruneSettings) -> tuple[Any, str]:
    """Estimates what the run of every budget costs; only the model's headers are read."""
    checkpoint = read_checkpoint(options.model)
    shapes = settings.limited(unscored(_shapes(checkpoint)), None).shapes
    for word in options.data:
        Source.parse(word)  # refuses a file that is not there
    positions = getattr(read_hf_config(options.model).get_text_config(), "max_position_embeddings", None)
    length = min(options.sequence_length, positions or options.sequence_length)
    device = io.device_of(options.device)
    dtype = io.stored_dtype(options.model) if options.dtype == "auto" else options.dtype
    empty = skeleton(read_hf_config(options.model), checkpoint.config)
    machine = measured_machine(empty, length, dtype, device, find_shards(options.model))
    asked = Asked(settings, options.texts, length, dtype, options.stream)
    found = {budget: estimate(empty, asked, machine, budget, shapes) for budget in _budgets(options, shapes)}
    result = {str(budget): one.as_json() for budget, one in found.items()}
    text = "\n\n".join(estimate_text(one, f"{options.model}, budget {budget}") for budget, one in found.items())
    text += "\nCounted for as much text as the run may use; it takes less time where --data holds less."
    return result, text


def _budgets(options: Options, shapes: Mapping[int, LayerShape]) -> dict[Budget, str]:
    """Returns {budget: its directory inside --out}."""
    if len(options.sparsity) < 2:
        one = options.sparsity[0] if options.sparsity else None
        flags = Budgeted(**{name: getattr(options, name) for name in ("experts", "fit", "context")}, sparsity=one)
        return {io.budget(flags, options.model, shapes): "."}
    for sparsity in options.sparsity:
        io.check_removes(sparsity, shapes)
    return {sparsity: f"{100 * sparsity:g}" for sparsity in options.sparsity}


def _sizes_report(out: Path, results: list[PruneResult]) -> Path:
    """Writes the page of several budgets, by the first process."""
    return io.report(out) if distributed.is_first() else results[0].report


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
                f"{row.perplexity.value:.2f}",
                str(result.out),
            ]
        )
    return "\n\n".join([markdown_table(header, lines), *(f"{r.out}\n{report_text(r)}" for r in results)])
