"""`moeprune allocate`: a plan by any way but a search or GRAPE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, order_fingerprint, uniform_counts, uniform_plan, unscored
from moeprune_ext.allocation.damages import Damages, damages, dp_plan
from moeprune_ext.allocation.naee import naee_subsets
from moeprune_ext.allocation.threshold import NORMALIZATIONS, global_plan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import METRICS
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Budgeted, Data, Memory, Scored, Streaming, flag, force_flag
from moeprune_ext.data.batches import fingerprint_of

EXAMPLE = "moeprune allocate MODEL --stats stats.safetensors --sparsity 0.5 --method dp --data text.jsonl -o plan.json"


@dataclass(frozen=True, kw_only=True)
class Options(Memory, Streaming, Data, Budgeted, Scored):
    method: str = flag("how to allocate", "uniform", choices=("uniform", "global", "dp", "naee"))
    normalize: str = flag("global: what makes scores of layers comparable", "none", choices=NORMALIZATIONS)
    fitness: str = flag("dp: what a layer's pruning is measured by, as in search", "esap")
    steps: int | None = flag("dp: most counts to measure per layer; all of them if left out", None, least=1)
    damages: Path | None = flag("dp: file of what was measured, read if it exists, else written", None)
    out: Path = flag("plan file to write", short="-o")
    force: bool = force_flag()


def run(options: Options) -> tuple[Any, str]:
    """Writes the plan and returns how many experts each layer keeps."""
    io.check_new_file(options.out, options.force)
    if options.method == "naee":
        return io.write_plan(_naee(options), options.out, options.model)
    scores = io.load_scores(options)
    budget = io.budget(options, options.model, scores.shapes)
    if options.method == "dp":
        measured = _damages(options, scores, budget)
        plan = dp_plan(measured, scores, budget)
        file = str(options.damages) if options.damages else None
        return io.write_plan(plan, options.out, options.model, damages=file, additive_damage=measured.total(plan))
    if options.method == "global":
        plan = global_plan(scores, budget, normalize=options.normalize)
        return io.write_plan(plan, options.out, options.model)
    return io.write_plan(uniform_plan(scores, budget), options.out, options.model)


def _naee(options: Options) -> PruningPlan:
    """Makes naee's plan, for which the model runs."""
    if options.protect_super or options.min_kept or options.min_kept_per_group:
        raise ValueError("naee chooses subsets of its own: it takes no minima and protects no expert")
    if not options.data:
        raise ValueError("--method naee measures the model on text: give --data")
    shapes = {index: layer.shape for index, layer in read_checkpoint(options.model).layers.items()}
    limited = io.constrained(unscored(shapes), None, options)
    pruned = uniform_counts(limited, io.budget(options, options.model, limited.shapes))
    batches = io.load_data(options, io.tokenizer_of(options.model), labels=False, model=options.model)
    model = io.load_model(options.model, options)
    return naee_subsets(model, batches, pruned, seed=options.seed, progress=distributed.is_first())


def _damages(options: Options, scores: ExpertScores, budget: Budget) -> Damages:
    """Reads --damages where that file exists and fits, else measures, and writes it."""
    if options.fitness not in METRICS:
        raise ValueError(f"unknown fitness {options.fitness!r}; choose from {', '.join(METRICS)}")
    uniform_counts(scores, budget)  # refuses a budget that dp_plan could not spend, before anything is run
    batches = None
    if options.data:
        batches = io.load_data(options, io.tokenizer_of(options.model), model=options.model)
    if (file := options.damages) is not None:
        stored = distributed.from_first(lambda: Damages.load(file) if file.exists() else None)
        if stored is not None:
            if stored.order != order_fingerprint(scores) or stored.fitness != options.fitness:
                raise ValueError(
                    f"{file} holds damages by {stored.fitness} of another criterion, protection or model "
                    f"({stored.criterion}); name a new file to measure them"
                )
            if batches is not None and stored.data != fingerprint_of(batches):
                raise ValueError(f"{file} was measured on other data; leave --data out, or name a new file")
            return stored
        io.check_new_file(file)
    if batches is None:
        raise ValueError("--method dp measures the model on text: give --data")
    evaluator = CandidateEvaluator(io.load_model(options.model, options), batches, memory_budget=options.memory_bytes)
    measured = damages(evaluator, scores, fitness=options.fitness, steps=options.steps, progress=distributed.is_first())
    if file is not None and distributed.is_first():
        measured.save(file)
    return measured
