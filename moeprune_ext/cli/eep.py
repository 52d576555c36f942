"""`moeprune eep`: EEP, which experts a task needs, and how the others merge into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.artifacts.about import record
from moeprune_ext.artifacts.journal import SETTINGS
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.checkpoint.routers import stored_routers
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import DATA, SEARCH, Common, Memory, Streaming, flag, model_argument, part, setting
from moeprune_ext.data.batches import data_fingerprint
from moeprune_ext.data.tasks import SPLITS, Task, answer_batches, load_task, split_task
from moeprune_ext.eep.eep import PLAN, check_folder, check_mergeable, check_request, eep
from moeprune_ext.eep.fitness import warn_if_hopeless
from moeprune_ext.eep.settings import PAPER, EepSettings
from moeprune_ext.eep.table import TableRow, eep_table, format_table, judges_of, measured_row, result_rows
from moeprune_ext.models.apply import full_plan

EXAMPLE = "moeprune eep MODEL --task task.jsonl --keep 4 -o RUN_DIR"


@dataclass(frozen=True, kw_only=True)
class Searching:
    """Flags that say how to search, and mean nothing where --keep is left out."""

    fitness: str = setting(EepSettings, "fitness")
    layer_groups: int | None = setting(EepSettings, "layer_groups", least=1)
    paper: bool = flag("the published search: random starts, no order of equals", False)
    prune_iters: int = setting(EepSettings, "prune_iters", least=1)
    merge_iters: int = setting(EepSettings, "merge_iters", least=0)


@dataclass(frozen=True, kw_only=True)
class Options(Memory, Streaming, Common):
    model: Path = model_argument()
    task: Path = flag(
        "JSONL to search on: prompt, choices, answer; or prompt, answer, stop, the text that ends the answer. Without "
        "stop it is a newline if the prompts show solved examples one a line, else the end-of-text token",
        group=DATA,
    )
    valid: Path | None = flag("task file to rank the best again; else a quarter of --task", None, group=DATA)
    test: Path | None = flag("task file to measure what was found; else a quarter of --task", None, group=DATA)
    keep: tuple[int, ...] = flag("experts that stay in every layer; with --table several", (), least=1)
    active: int | None = flag("experts per token; without --keep nothing is searched, this is measured", None, least=1)
    searching: Searching = part(SEARCH)
    length_normalized: bool = setting(EepSettings, "length_normalized")
    table: bool = flag("EEP, also the paper's, beside the full model and all baselines", False)
    out: Path = flag("directory for plans, history, table", short="-o")

    @property
    def settings(self) -> EepSettings:
        """Returns the settings that the flags make; ValueError for those that cannot be."""
        searching = self.searching
        return EepSettings(
            fitness=searching.fitness,
            active=self.active,
            layer_groups=searching.layer_groups,
            prune_iters=searching.prune_iters,
            merge_iters=searching.merge_iters,
            length_normalized=self.length_normalized,
            seed=self.seed,
            **(PAPER if searching.paper else {}),
        )


def run(options: Options) -> tuple[Any, str]:
    """Searches, or measures the model with fewer active experts, and returns a table of rows."""
    settings = options.settings
    _check(options, settings)
    tokenizer = io.load_tokenizer(options.model)
    valid, test = (None if path is None else load_task(path, tokenizer) for path in (options.valid, options.test))
    splits = split_task(load_task(options.task, tokenizer), valid, test, options.seed)
    for split in splits:
        io.check_task(options.model, split)
    if not options.table:
        io.say_resumed(options.out, 0, "calls")
    measuring = {"length_normalized": options.length_normalized, "memory_budget": options.memory_bytes}
    model = io.load_model(options.model, options)
    if not options.keep:
        return _fewer_active(model, splits, options, measuring)
    common: dict[str, Any] = {"valid": splits[1], "test": splits[2], "out": options.out}
    common |= {"progress": distributed.is_first(), "memory_budget": options.memory_bytes}
    if options.table:
        rows = eep_table(model, splits[0], list(options.keep), settings, **common)
        _finish(options, splits)
        return _shown(options, rows, splits, {"table": str(options.out / "table.md"), **_report(options)})
    outcome = eep(model, splits[0], options.keep[0], **settings.arguments(), **common)
    rows = result_rows(model, outcome, options.keep[0])
    _finish(options, splits)
    return _shown(options, rows, splits, {**outcome.as_json(), "plan": str(options.out / PLAN), **_report(options)})


def _finish(options: Options, splits: Sequence[Task]) -> None:
    """Writes how the run was made, and the page about it."""
    files = [str(path) for path in (options.task, options.valid, options.test) if path is not None]
    fingerprints = {"model": read_checkpoint(options.model).fingerprint}
    fingerprints |= {name: data_fingerprint(answer_batches(split)) for name, split in zip(SPLITS, splits, strict=True)}
    record(options.out, model=options.model, seed=options.seed, data=files, fingerprints=fingerprints)
    if distributed.is_first():
        io.report(options.out)


def _report(options: Options) -> dict[str, str]:
    return {"report": str(options.out / "report.html")}


def _check(options: Options, settings: EepSettings) -> None:
    """Raises ValueError for everything that can be refused without loading the weights."""
    searching = options.searching
    if options.table and (not options.keep or searching.paper):
        raise ValueError("--table needs budgets, --keep N N, and has the paper's search beside ours: leave --paper out")
    if len(options.keep) > 1 and not options.table:
        raise ValueError(f"--keep {' '.join(map(str, options.keep))}: several budgets are for --table; name one")
    if not options.keep and options.active is None:
        raise ValueError("give --keep, the experts that stay, or --active, the experts per token, or both")
    io.check_run_folder(options.out)
    check_folder(options.out)
    checkpoint = read_checkpoint(options.model)
    layers = checkpoint.layers
    if not options.keep:
        all_kept = {index: layer.shape.num_experts for index, layer in layers.items() if layer.shape.prunable}
        _check_measurement(options, check_request(layers, all_kept, settings)[1].active)
    layouts = [check_request(layers, keep, settings)[0] for keep in options.keep]
    if options.table:
        for keep in options.keep:
            check_request(layers, keep, replace(settings, active=None))
    if options.keep and settings.merge_iters:
        routers = stored_routers(checkpoint)
        for layout in layouts:
            check_mergeable(layers, layout, lambda layer: routers[layer.index])


def _check_measurement(options: Options, active: int | None) -> None:
    """Raises ValueError for what a measurement without a search could not do, or would not look at.

    Args:
        options: without --keep.
        active: experts per token; None where the routers select as many as asked for.
    """
    idle = [field.name for field in fields(Searching) if getattr(options.searching, field.name) != field.default]
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"without --keep nothing is searched, so that {names} would do nothing; give --keep N")
    if active is None:
        raise ValueError(f"--active {options.active}: the routers select as many already; name fewer")
    if existing := [name for name in (PLAN, SETTINGS) if (options.out / name).exists()]:
        raise ValueError(f"{options.out} holds {' and '.join(existing)}; name another directory for {PLAN}")


def _fewer_active(model: Any, splits: Sequence[Task], options: Options, measuring: dict[str, Any]) -> tuple[Any, str]:
    """Measures the full model and the same with fewer experts active, and writes the latter as a plan."""
    judges = judges_of(model, splits, **measuring)
    warn_if_hopeless(judges["train"])
    plans = [full_plan(model), full_plan(model, options.active)]
    rows = [measured_row(model, judges, "full", None, [plan]) for plan in plans]
    if distributed.is_first():
        plans[1].save(options.out / PLAN)
    return _shown(options, rows, splits, {"plan": str(options.out / PLAN)})


def _shown(
    options: Options, rows: Sequence[TableRow], splits: Sequence[Task], about: dict[str, Any]
) -> tuple[Any, str]:
    """Returns the rows as the verb's result, what was gained, and the next command; `about`: more of the result."""
    train, valid, test = (len(split.examples) for split in splits)
    lines = [
        format_table(rows),
        f"Examples answered right: of {train} on which candidates are scored (train), {valid} that rank the best again "
        f"(valid), {test} by which nothing is chosen (test).",
        "MFLOPs: without attention's products of tokens with tokens.",
    ]
    if (fitness := about.get("fitness", "accuracy")) != "accuracy":
        values = {name: scores["test"] for name, scores in about["scores"].items()}
        shown = [f"{name} {math.nan if value is None else value:.4f}" for name, value in values.items()]
        lines.append(f"{fitness} on test: {', '.join(shown)}")
    lines += [f"{name}: {about[name]}" for name in ("plan", "table") if name in about]
    planned = [row for row in rows if row.plan is not None]
    if "table" not in about:  # the plan that the search chose
        planned = [row for row in planned if row.plan == PLAN]
    finite = [row for row in reversed(planned) if math.isfinite(row.accuracy["valid"])]
    best = max(finite, key=lambda row: row.accuracy["valid"]) if finite else rows[-1]
    plan = options.out if best.plan is None else options.out / best.plan
    lines.append(
        f"{plan}: {best.model} keeps {best.experts:,} of {rows[0].experts:,} experts and answers "
        f"{best.accuracy['test']:.1%} of the test examples, where the full model answers {rows[0].accuracy['test']:.1%}"
    )
    lines += [f"{name}: {about[name]}" for name in ("report",) if name in about]
    lines.append(io.next_command("export", options.model, "--plan", plan, "-o", "pruned"))
    examples = {"train": train, "valid": valid, "test": test}
    return {**about, "examples": examples, "rows": [row.as_json() for row in rows]}, "\n".join(lines)
