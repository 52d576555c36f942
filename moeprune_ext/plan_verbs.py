"""The verbs that make plans: `search`, `allocate`, `grape`. As in verbs.py, options -> (a result for JSON, a text).

Imports stand inside the verbs, so that `moeprune --help` and a refusal do not wait for transformers.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moeprune_ext import distributed
from moeprune_ext.options import check_new_file, load_data, load_model, load_scores, load_tokenizer

if TYPE_CHECKING:
    from moeprune_ext.plan import PruningPlan


def search(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.evaluator import CandidateEvaluator
    from moeprune_ext.evolve import check_settings, evolve
    from moeprune_ext.plan import PruningPlan, uniform_counts, uniform_plan

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
    from moeprune_ext.allocate import Damages, damages, dp_plan, global_plan, order_fingerprint
    from moeprune_ext.evaluator import CandidateEvaluator
    from moeprune_ext.naee import naee_plan
    from moeprune_ext.plan import uniform_counts, uniform_plan

    check_new_file(options.out)
    scores = load_scores(options)
    uniform_counts(scores, options.sparsity)
    measured = None
    if options.damages is not None and options.damages.exists():
        measured = Damages.load(options.damages)
        if measured.order != order_fingerprint(scores) or measured.fitness != options.fitness:
            raise ValueError(
                f"{options.damages} holds damages by {measured.fitness} of another criterion, protection or model "
                f"({measured.criterion}); name a new file to measure them"
            )
    elif options.damages is not None:
        check_new_file(options.damages)
    if needs_data := options.method == "naee" or (options.method == "dp" and measured is None):
        if not options.data:
            raise ValueError(f"--method {options.method} measures the model on text: give --data files")
        batches = load_data(options, load_tokenizer(options), labels=options.method == "dp")
    about: dict[str, Any] = {}
    if options.method == "naee":
        if scores.protected or options.min_kept or options.min_kept_per_group:
            raise ValueError("naee chooses subsets of its own: it takes no minima and protects no expert")
        plan = naee_plan(
            load_model(options), batches, options.sparsity, seed=options.seed, progress=distributed.is_first()
        )
    elif options.method == "dp":
        if needs_data:
            evaluator = CandidateEvaluator(
                load_model(options), batches, memory_budget=int(options.memory_budget * 2**30)
            )
            measured = damages(
                evaluator, scores, fitness=options.fitness, steps=options.steps, progress=distributed.is_first()
            )
            if options.damages is not None and distributed.is_first():
                measured.save(options.damages)
        assert measured is not None
        plan = dp_plan(measured, scores, options.sparsity)
        about = {"damages": str(options.damages) if options.damages else None, "additive_damage": measured.total(plan)}
    elif options.method == "global":
        plan = global_plan(scores, options.sparsity, normalize=options.normalize)
    else:
        plan = uniform_plan(scores, options.sparsity)
    return _written(plan, options, about)


def grape(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.grape import grape
    from moeprune_ext.plan import uniform_counts

    check_new_file(options.out)
    scores = load_scores(options)
    uniform_counts(scores, options.sparsity)
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
    return _written(plan, options, {"merged": sum(map(len, plan.merged.values()))})


def _written(plan: PruningPlan, options: argparse.Namespace, about: dict[str, Any]) -> tuple[Any, str]:
    if distributed.is_first():
        plan.save(options.out)
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    result = {"plan": str(options.out), "sparsity": plan.sparsity, "kept_per_layer": kept, **about}
    return result, f"kept per layer: {' '.join(map(str, kept.values()))}\nplan: {options.out}"
