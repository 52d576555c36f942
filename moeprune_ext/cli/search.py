"""`moeprune search`: EvoESAP, how many experts each layer should lose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import uniform_plan
from moeprune_ext.allocation.evolve import SearchSpace, search
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Budgeted, Data, Memory, Scored, Streaming, data_flag, flag
from moeprune_ext.models.routers import ROUTERS

EXAMPLE = "moeprune search MODEL --stats stats.safetensors --sparsity 0.5 --data text.jsonl -o RUN_DIR"


@dataclass(frozen=True, kw_only=True)
class Options(Memory, Streaming, Data, Budgeted, Scored):
    data: tuple[str, ...] = data_flag()
    init: tuple[Path, ...] = flag("plan files whose counts join the first generation", ())
    settings: EvolveSettings
    router: str = flag("fused: the kernel for half-precision logits too", "auto", choices=ROUTERS)
    out: Path = flag("directory for plan.json, history and settings", short="-o")


def run(options: Options) -> tuple[Any, str]:
    """Searches, or goes on with the search in --out, and returns the plan's figures beside the uniform plan's."""
    fitness = options.settings.fitness
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is not a directory")
    init_plans = [PruningPlan.load(path) for path in options.init]
    scores = io.load_scores(options)
    budget = io.budget(options, options.model, scores.shapes)
    space = SearchSpace.of(scores, replace(options.settings, sparsity=budget), init_plans)
    batches = io.load_data(options, io.tokenizer_of(options.model))
    model = io.load_model(options.model, options)
    evaluator = CandidateEvaluator(model, batches, memory_budget=options.memory_bytes, router=options.router)
    outcome = search(evaluator, space, out=options.out, progress=distributed.is_first())
    try:
        uniform = getattr(evaluator.evaluate([uniform_plan(scores, budget)], (fitness,))[0], fitness)
    except ValueError:  # some layer cannot give the uniform share; the search needs no uniform plan
        uniform = None
    kept = {str(layer): len(ids) for layer, ids in outcome.plan.kept.items()}
    spent, saved = (
        sum(record[name] for record in outcome.history) for name in ("token_evaluations", "token_evaluations_saved")
    )
    result = {
        "plan": str(options.out / "plan.json"),
        "fitness": fitness,
        "score": outcome.score,
        "uniform": uniform,
        "kept_per_layer": kept,
        "nan_candidates": sum(record["nan"] for record in outcome.history),
        "token_evaluations": spent,
        "token_evaluations_saved": saved,
        "method": evaluator.method,
    }
    beside = "" if uniform is None else f" (uniform plan: {uniform:.5f})"
    raced = f", {saved / (spent + saved):.0%} saved by racing" if saved else ""
    text = (
        f"{fitness} {outcome.score:.5f}{beside}\nkept per layer: {' '.join(map(str, kept.values()))}\n"
        f"{spent:,} token evaluations{raced}; {evaluator.method}\nplan: {options.out / 'plan.json'}"
    )
    return result, text
