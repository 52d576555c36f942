"""What the verbs of `moeprune` do, one arrow of the pipeline each: options -> (a result for JSON, a text).

The verbs that make plans stand in plan_verbs.py.
Imports stand inside the verbs, so that `moeprune --help` and a refusal do not wait for transformers.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.cli.io import (
    check_new_file,
    constrained,
    load_data,
    load_model,
    load_tokenizer,
    parse_criterion,
    quiet_transformers,
)
from moeprune_ext.tables import text_table

if TYPE_CHECKING:
    from moeprune_ext.artifacts.scores import ExpertScores
    from moeprune_ext.artifacts.stats import RoutingStats


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2} | dict.fromkeys(
    ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"), 1
)


def info(options: argparse.Namespace) -> tuple[Any, str]:
    from safetensors import safe_open

    from moeprune_ext.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(options.model)
    sizes = {"experts": 0, "routers": 0, "everything else": 0}
    for file, names in checkpoint.shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                place = checkpoint.roles.get(name)
                part = "everything else" if place is None else "routers" if place.is_router else "experts"
                stored = shard.get_slice(name)
                sizes[part] += math.prod(stored.get_shape()) * _BYTES[stored.get_dtype()]
    total = sum(sizes.values())
    layers = [
        {"layer": index, "router": type(layer.router).__name__, **vars(layer.shape), "can_prune": layer.shape.capacity}
        for index, layer in checkpoint.layers.items()
    ]
    saved = {f"{sparsity:.0%}": int(sizes["experts"] * sparsity) for sparsity in (0.25, 0.5)}
    result = {
        "model_type": checkpoint.config["model_type"],
        "fingerprint": checkpoint.fingerprint,
        "bytes": sizes,
        "saved_by_pruning": saved,
        "layers": layers,
    }
    rows = [
        [str(r["layer"]), r["router"], str(r["num_experts"]), str(r["top_k"]), str(r["n_group"]), str(r["can_prune"])]
        for r in layers
    ]
    lines = [
        f"{options.model}: {result['model_type']}, {len(layers)} MoE layers, fingerprint {checkpoint.fingerprint}",
        *(f"  {part:<16}{size / 1e6:>12,.1f} MB {size / total:>7.1%}" for part, size in sizes.items()),
        *(f"  pruning {share} of the experts saves {size / 1e6:,.1f} MB" for share, size in saved.items()),
        text_table(["layer", "router", "experts", "top-k", "groups", "can prune"], rows),
    ]
    return result, "\n".join(lines)


def calibrate(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.artifacts.stats import RARELY
    from moeprune_ext.calibration.calibrate import calibrate

    check_new_file(options.out)
    batches = load_data(options, load_tokenizer(options), labels=False)
    stats = calibrate(load_model(options), batches, progress=distributed.is_first())
    if distributed.is_first():
        stats.save(options.out)
    routed, rare = stats.tokens_per_expert, stats.rarely_routed()
    idle = sum(int((counts == 0).sum()) for counts in routed.values())
    result = {
        "stats": str(options.out),
        "tokens": stats.tokens,
        "layers": len(routed),
        "experts_never_routed_to": idle,
        "rarely_routed": {str(layer): {str(e): int(routed[layer][e]) for e in ids} for layer, ids in rare.items()},
    }
    lines = [f"{options.out}: {stats.tokens:,} tokens, {len(routed)} MoE layers, {idle} experts never routed to"]
    if rare:
        few = sum(map(len, rare.values()))
        lines.append(f"{few} experts saw fewer than {RARELY} tokens, so their averages say little; more text helps:")
    for layer, ids in rare.items():
        lines.append(f"  layer {layer}: " + ", ".join(f"{e} ({int(routed[layer][e])})" for e in ids))
    return result, "\n".join(lines)


def score(options: argparse.Namespace) -> tuple[Any, str]:
    import torch

    from moeprune_ext.artifacts.stats import RoutingStats
    from moeprune_ext.calibration.criteria import CRITERIA, rank_correlations, score_experts

    stats = RoutingStats.load(options.stats)
    names = list(dict.fromkeys(map(parse_criterion, options.criterion)))
    if options.out is not None:
        check_new_file(options.out)
        if len(names) > 1:
            raise ValueError(f"a scores file is of one criterion, not of {len(names)}: leave -o out or name one")
    if "naee" in names and not (options.model and options.data):
        raise ValueError("naee compares a layer's output with and without experts: give --model and --data")
    chosen = [constrained(_scores(stats, name, options), stats, options) for name in names]
    if options.out is not None and distributed.is_first():
        chosen[0].save(options.out)
    lines = []
    for scores in chosen:
        rows = []
        for layer, values in scores.items():
            best, worst = int(values.argmax()), int(values.argmin())
            rows.append(
                [str(layer), f"{values.mean():.4g}", f"{best} ({values[best]:.4g})", f"{worst} ({values[worst]:.4g})"]
            )
        lines += [f"{scores.criterion}, higher = keep"]
        lines += [text_table(["layer", "mean", "best expert", "worst expert"], rows), ""]
    if chosen[0].protected:
        lines += [f"never pruned: {_listed(chosen[0].protected)}", ""]

    compared = chosen + [score_experts(stats, name) for name in CRITERIA if name not in names]
    agreement = rank_correlations(compared)
    titles, first = [str(one.criterion) for one in compared], chosen[0]
    rows = [[str(layer), *(f"{x:.2f}" for x in matrix[0, 1:].tolist())] for layer, matrix in agreement.items()]
    mean = torch.stack(list(agreement.values()))[:, 0, 1:].nanmean(0).tolist()
    lines += [
        f"how far the others order a layer's experts as {first.criterion} does: rank correlation, 1 = alike",
        text_table(["layer", *titles[1:]], [*rows, ["mean", *(f"{x:.2f}" for x in mean)]]),
    ]
    criteria = {str(one.criterion): {str(i): v.tolist() for i, v in one.items()} for one in chosen}
    result = {
        "criterion": first.criterion,
        "scores": criteria[str(first.criterion)],
        "criteria": criteria,
        "protected": {str(layer): sorted(ids) for layer, ids in first.protected.items()},
        "compared": titles,
        "rank_correlations": {
            str(i): [[None if math.isnan(x) else x for x in row] for row in matrix.tolist()]
            for i, matrix in agreement.items()
        },
    }
    return result, "\n".join(lines)


def _scores(stats: RoutingStats, name: str | tuple[int, int, str], options: argparse.Namespace) -> ExpertScores:
    """By a criterion of the statistics, or by naee, for which the model runs."""
    from moeprune_ext.allocation.naee import naee_scores
    from moeprune_ext.calibration.criteria import score_experts
    from moeprune_ext.checkpoint.read import read_checkpoint

    if name != "naee":
        return score_experts(stats, name, seed=options.seed)
    if (fingerprint := read_checkpoint(options.model).fingerprint) != stats.model:
        raise ValueError(
            f"{options.stats} was gathered from another model ({stats.model}), {options.model} is {fingerprint}"
        )
    batches = load_data(options, load_tokenizer(options), labels=False)
    return naee_scores(load_model(options), batches, seed=options.seed, progress=distributed.is_first())


def _listed(experts: Mapping[int, Iterable[int]]) -> str:
    return "; ".join(f"layer {layer}: {', '.join(map(str, sorted(ids)))}" for layer, ids in experts.items())


def export(options: argparse.Namespace) -> tuple[Any, str]:
    pass
    from moeprune_ext.checkpoint.export import export
    from moeprune_ext.checkpoint.read import read_config
    from moeprune_ext.modeling import CONFIG_KEY

    plan = PruningPlan.load(options.plan)
    out = export(options.model, plan, options.out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stock = CONFIG_KEY not in read_config(out)
    result = {
        "out": str(out),
        "bytes": size,
        "sparsity": plan.sparsity,
        "active": plan.active,
        "uniform": stock,
    }
    loader = "from_pretrained" if stock else "moeprune_ext.load, or from_pretrained(..., trust_remote_code=True)"
    active = "" if plan.active is None else f", {plan.active} active per token"
    text = f"{out}: {plan.sparsity:.1%} of the experts removed{active}, {size / 1e6:,.1f} MB; load it with {loader}"
    return result, text


def evaluate(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.data.tasks import load_task
    from moeprune_ext.evaluate import accuracy, harness_results, perplexity

    if not (options.task or options.data or options.lm_eval):
        raise ValueError("there is nothing to measure: give --task files, --data files or --lm-eval tasks")
    tokenizer = load_tokenizer(options)
    tasks = {str(path): load_task(path, tokenizer) for path in options.task}
    batches = load_data(options, tokenizer) if options.data else None
    model = load_model(options)
    result: dict[str, Any] = {
        name: {
            "accuracy": accuracy(model, task, length_normalized=options.length_normalized),
            "examples": len(task.examples),
        }
        for name, task in tasks.items()
    }
    lines = [f"{name}: {value['accuracy']:.2%} of {value['examples']}" for name, value in result.items()]
    if batches is not None:
        result["perplexity"] = perplexity(model, batches)
        lines.append(f"perplexity: {result['perplexity']:.4f}")
    if options.lm_eval:
        result["lm_eval"] = harness_results(model, tokenizer, options.lm_eval.split(","))
        lines += [f"{name}: {values}" for name, values in result["lm_eval"].items()]
    return result, "\n".join(lines)


def demo(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.checkpoint.export import check_new_folder
    from moeprune_ext.demo.run import as_json, demo_folder, format_table, run_demo

    quiet_transformers()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if options.out is not None:
        check_new_folder(options.out)
        rows = run_demo(options.out, seed=options.seed, progress=True, say=say)
        kept = (
            f"\nStatistics, plans, checkpoints and tasks are in {options.out}; the embedded model is {demo_folder()}."
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = run_demo(Path(folder), seed=options.seed, progress=True, say=say)
        kept = ""
    text = (
        f"\n{format_table(rows)}\n\n"
        "ESAP: acceptance of the pruned model as a draft for the full one, on held-out text; ppl: perplexity;\n"
        "arithmetic: token-exact match on held-out problems; word order: four-way multiple choice; MB: weights on disk."
        f"{kept}\nNext, on your own model:  moeprune info /path/to/model"
    )
    return as_json(rows), text
