"""The verbs that make plans: `search`, `allocate`, `grape`, `eep`; as in verbs.py, options -> (a result for JSON, a
text).

Imports stand inside the verbs, so that `moeprune --help` and a refusal do not wait for transformers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeprune_ext import distributed
from moeprune_ext.cli.io import check_new_file, load_data, load_model, load_scores, load_tokenizer

if TYPE_CHECKING:
    from moeprune_ext.allocation.damages import Damages
    from moeprune_ext.artifacts.plan import PruningPlan
    from moeprune_ext.artifacts.scores import ExpertScores
    from moeprune_ext.data.tasks import Task
    from moeprune_ext.eep.table import TableRow


# Options of `eep` that say how to search, as they are by default.
SEARCHING: dict[str, Any] = {
    "fitness": "accuracy",
    "layer_groups": None,
    "paper": False,
    "prune_iters": 40,
    "merge_iters": 160,
}


def search(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.allocation.budget import uniform_counts, uniform_plan
    from moeprune_ext.allocation.evolve import check_init_plans, check_settings, evolve
    from moeprune_ext.artifacts.plan import PruningPlan
    from moeprune_ext.candidates.evaluator import CandidateEvaluator

    # What can be refused without loading the weights is refused now.
    check_settings(
        options.fitness,
        options.population,
        options.generations,
        options.elites,
        options.fidelity,
        options.race_level,
    )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is not a directory")
    given = [PruningPlan.load(path) for path in options.init]
    scores = load_scores(options)
    uniform_counts(scores, options.sparsity)
    check_init_plans(given, scores, options.sparsity, options.population)
    batches = load_data(options, load_tokenizer(options))
    budget = int(options.memory_budget * 2**30)
    evaluator = CandidateEvaluator(load_model(options), batches, memory_budget=budget, router=options.router)
    found = evolve(
        evaluator,
        scores,
        options.sparsity,
        fitness=options.fitness,
        population=options.population,
        generations=options.generations,
        elites=options.elites,
        fidelity=options.fidelity,
        race_level=options.race_level,
        init_plans=given,
        seed=options.seed,
        out=options.out,
        progress=distributed.is_first(),
    )
    try:
        uniform = getattr(
            evaluator.evaluate([uniform_plan(scores, options.sparsity)], (options.fitness,))[0], options.fitness
        )
    except ValueError:  # some layer cannot give the uniform share; the search needs no uniform plan
        uniform = None
    kept = {str(layer): len(ids) for layer, ids in found.plan.kept.items()}
    result = {
        "plan": str(options.out / "plan.json"),
        "fitness": options.fitness,
        "score": found.score,
        "uniform": uniform,
        "kept_per_layer": kept,
        "nan_candidates": sum(record["nan"] for record in found.history),
        "token_evaluations": sum(record["token_evaluations"] for record in found.history),
        "token_evaluations_saved": sum(record["token_evaluations_saved"] for record in found.history),
        "method": evaluator.method,
    }
    beside = "" if uniform is None else f" (uniform plan: {uniform:.5f})"
    spent, saved = result["token_evaluations"], result["token_evaluations_saved"]
    raced = f", {saved / (spent + saved):.0%} saved by racing" if saved else ""
    text = (
        f"{options.fitness} {found.score:.5f}{beside}\nkept per layer: {' '.join(map(str, kept.values()))}\n"
        f"{spent:,} token evaluations{raced}; {evaluator.method}\nplan: {options.out / 'plan.json'}"
    )
    return result, text


def allocate(options: argparse.Namespace) -> tuple[Any, str]:
    """One plan by any way but a search or GRAPE."""
    from moeprune_ext.allocation.budget import uniform_counts, uniform_plan
    from moeprune_ext.allocation.damages import dp_plan
    from moeprune_ext.allocation.threshold import global_plan

    check_new_file(options.out)
    if options.method == "naee":
        return _written(_naee(options), options, {})
    scores = load_scores(options)
    uniform_counts(scores, options.sparsity)
    if options.method == "dp":
        measured = _damages(options, scores)
        plan = dp_plan(measured, scores, options.sparsity)
        file = str(options.damages) if options.damages else None
        return _written(plan, options, {"damages": file, "additive_damage": measured.total(plan)})
    if options.method == "global":
        return _written(global_plan(scores, options.sparsity, normalize=options.normalize), options, {})
    return _written(uniform_plan(scores, options.sparsity), options, {})


def _naee(options: argparse.Namespace) -> PruningPlan:
    from moeprune_ext.allocation.naee import naee_plan

    if options.protect_super or options.min_kept or options.min_kept_per_group:
        raise ValueError("naee chooses subsets of its own: it takes no minima and protects no expert")
    if not options.data:
        raise ValueError("--method naee measures the model on text: give --data files")
    batches = load_data(options, load_tokenizer(options), labels=False)
    return naee_plan(load_model(options), batches, options.sparsity, seed=options.seed, progress=distributed.is_first())


def _damages(options: argparse.Namespace, scores: ExpertScores) -> Damages:
    """Read from --damages where that file exists and fits, else measured, and written there."""
    from moeprune_ext.allocation.budget import order_fingerprint
    from moeprune_ext.allocation.damages import Damages, damages
    from moeprune_ext.candidates.evaluator import CandidateEvaluator
    from moeprune_ext.candidates.metrics import METRICS
    from moeprune_ext.data.batches import fingerprint_of

    if options.fitness not in METRICS:
        raise ValueError(f"unknown fitness {options.fitness!r}; choose from {', '.join(METRICS)}")
    batches = load_data(options, load_tokenizer(options)) if options.data else None
    if (file := options.damages) is not None:
        found = distributed.from_first(lambda: Damages.load(file) if file.exists() else None)
        if found is not None:
            if found.order != order_fingerprint(scores) or found.fitness != options.fitness:
                raise ValueError(
                    f"{file} holds damages by {found.fitness} of another criterion, protection or model "
                    f"({found.criterion}); name a new file to measure them"
                )
            if batches is not None and found.data != fingerprint_of(batches):
                raise ValueError(f"{file} was measured on other data; leave --data out, or name a new file")
            return found
        check_new_file(file)
    if batches is None:
        raise ValueError("--method dp measures the model on text: give --data files")
    evaluator = CandidateEvaluator(load_model(options), batches, memory_budget=int(options.memory_budget * 2**30))
    measured = damages(evaluator, scores, fitness=options.fitness, steps=options.steps, progress=distributed.is_first())
    if file is not None and distributed.is_first():
        measured.save(file)
    return measured


def grape(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.allocation.grape import check_request, grape

    check_new_file(options.out)
    scores = load_scores(options)
    check_request(scores, options.sparsity, options.tokens, options.entropy, options.who, options.merge)
    if options.similarity == "cka" and not options.data:
        raise ValueError("cka compares experts' outputs on text: give --data files, or --similarity weights")
    batches = load_data(options, load_tokenizer(options), labels=False) if options.similarity == "cka" else None
    plan = grape(
        load_model(options),
        batches,
        scores,
        options.sparsity,
        similarity=options.similarity,
        tokens=options.tokens,
        entropy=options.entropy,
        who=options.who,
        merge=options.merge,
        seed=options.seed,
        progress=distributed.is_first(),
    )
    return _written(
        plan, options, {"merged": sum(int((m.experts != 0).sum(1).gt(1).sum()) for m in plan.merges.values())}
    )


def _written(plan: PruningPlan, options: argparse.Namespace, about: dict[str, Any]) -> tuple[Any, str]:
    if distributed.is_first():
        plan.save(options.out)
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    result = {"plan": str(options.out), "sparsity": plan.sparsity, "kept_per_layer": kept, **about}
    return result, f"kept per layer: {' '.join(map(str, kept.values()))}\nplan: {options.out}"


def eep(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.checkpoint.read import read_checkpoint, stored_routers
    from moeprune_ext.data.tasks import load_task, split_task
    from moeprune_ext.eep.eep import PAPER, check_folder, check_mergeable, check_request, eep
    from moeprune_ext.eep.table import eep_table, result_rows

    # What can be refused without loading the weights is refused now.
    budgets = options.keep or []
    if options.table and (not budgets or options.paper):
        raise ValueError("--table needs budgets, --keep N N, and has the paper's search beside ours: leave --paper out")
    if len(budgets) > 1 and not options.table:
        raise ValueError(f"--keep {' '.join(map(str, budgets))}: several budgets are for --table; name one")
    if not budgets and options.active is None:
        raise ValueError("give --keep, the experts that stay, or --active, the experts per token, or both")
    check_folder(options.out)
    checkpoint = read_checkpoint(options.model)
    layers = checkpoint.layers
    asked: dict[str, Any] = {"layer_groups": options.layer_groups, "fitness": options.fitness}
    everything = {index: layer.shape.num_experts for index, layer in layers.items() if layer.shape.prunable}
    layouts = []
    for keep in budgets or [everything]:
        layout, active = check_request(layers, keep, active=options.active, **asked)
        layouts.append(layout)
        if options.table:
            check_request(layers, keep, **asked)
    if not budgets:
        _check_measurement(options, active)
    elif options.merge_iters:
        routed = stored_routers(checkpoint)
        for layout in layouts:
            check_mergeable(routed, layout)
    tokenizer = load_tokenizer(options)
    valid, test = (None if path is None else load_task(path, tokenizer) for path in (options.valid, options.test))
    splits = split_task(load_task(options.task, tokenizer), valid, test, options.seed)
    measuring: dict[str, Any] = {
        "length_normalized": options.length_normalized,
        "memory_budget": int(options.memory_budget * 2**30),
    }
    model = load_model(options)
    if not budgets:
        return _fewer_active(model, splits, options, measuring)
    settings: dict[str, Any] = {
        "valid": splits[1],
        "test": splits[2],
        "active": options.active,
        "prune_iters": options.prune_iters,
        "merge_iters": options.merge_iters,
        "seed": options.seed,
        "out": options.out,
        "progress": distributed.is_first(),
        **asked,
        **measuring,
    }
    if options.table:
        rows = eep_table(model, splits[0], budgets, **settings)
        return _rows_of(rows, splits, {"table": str(options.out / "table.md")})
    found = eep(model, splits[0], budgets[0], **settings, **(PAPER if options.paper else {}))
    rows = result_rows(model, found, budgets[0])
    return _rows_of(rows, splits, {**found.as_json(), "plan": str(options.out / found.file)})


def _check_measurement(options: argparse.Namespace, active: int | None) -> None:
    """Refuses what a measurement without a search could not do, or would not look at. active: None where the routers
    select as many as asked for."""
    from moeprune_ext.artifacts.journal import SETTINGS
    from moeprune_ext.eep.eep import PLAN

    if given := [name for name, default in SEARCHING.items() if getattr(options, name) != default]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"without --keep nothing is searched, so that {names} would do nothing; give --keep N")
    if active is None:
        raise ValueError(f"--active {options.active}: the routers select as many already; name fewer")
    if held := [name for name in (PLAN, SETTINGS) if (options.out / name).exists()]:
        raise ValueError(f"{options.out} holds {' and '.join(held)}; name another directory for {PLAN}")


def _fewer_active(
    model: Any, splits: Sequence[Task], options: argparse.Namespace, measuring: dict[str, Any]
) -> tuple[Any, str]:
    """Without a search: the full model, and the same with fewer experts active, as a plan."""
    from moeprune_ext.eep.eep import PLAN
    from moeprune_ext.eep.table import judges_of, measured_row
    from moeprune_ext.models.apply import full_plan

    judges = judges_of(model, splits, **measuring)
    plans = [full_plan(model), full_plan(model, options.active)]
    rows = [measured_row(model, judges, "full", None, [plan]) for plan in plans]
    if distributed.is_first():
        plans[1].save(options.out / PLAN)
    return _rows_of(rows, splits, {"plan": str(options.out / PLAN)})


def _rows_of(rows: Sequence[TableRow], splits: Sequence[Task], about: dict[str, Any]) -> tuple[Any, str]:
    from moeprune_ext.eep.table import format_table

    train, valid, test = (len(split.examples) for split in splits)
    lines = [
        format_table(rows),
        f"Examples answered right: of {train} on which candidates are scored (train), {valid} that rank the best again "
        f"(valid), {test} by which nothing is chosen (test).",
        "MFLOPs: without attention's products of tokens with tokens.",
    ]
    if (fitness := about.get("fitness", "accuracy")) != "accuracy":
        worth = [f"{name} {math.nan if of['test'] is None else of['test']:.4f}" for name, of in about["scores"].items()]
        lines.append(f"{fitness} on test: {', '.join(worth)}")
    lines += [f"{name}: {about[name]}" for name in ("plan", "table") if name in about]
    examples = {"train": train, "valid": valid, "test": test}
    return {**about, "examples": examples, "rows": [row.as_json() for row in rows]}, "\n".join(lines)
