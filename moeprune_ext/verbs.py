"""What the verbs of `moeprune` do, one arrow of the pipeline each: options -> (a result for JSON, a text).

Imports stand inside the verbs, so that `moeprune --help` and a refusal do not wait for transformers.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2} | dict.fromkeys(
    ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"), 1
)


def info(options: argparse.Namespace) -> tuple[Any, str]:
    from safetensors import safe_open

    from moeprune_ext.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(options.model)
    sizes = {"experts": 0, "routers": 0, "everything else": 0}
    for file, names in checkpoint.shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                place = checkpoint.places.get(name)
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
        _table(["layer", "router", "experts", "top-k", "groups", "can prune"], rows),
    ]
    return result, "\n".join(lines)


def calibrate(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext import distributed
    from moeprune_ext.calibrate import calibrate

    _check_new_file(options.out)
    batches = _batches(options, _tokenizer(options))
    stats = calibrate(_model(options), batches, progress=distributed.is_first())
    if distributed.is_first():
        stats.save(options.out)
    routed = {layer: table[:, 0, 0] for layer, table in stats.moments.items()}
    idle = sum(int((counts == 0).sum()) for counts in routed.values())
    result = {"stats": str(options.out), "tokens": stats.tokens, "layers": len(routed), "experts_never_routed_to": idle}
    text = f"{options.out}: {stats.tokens:,} tokens, {len(routed)} MoE layers, {idle} experts never routed to"
    return result, text


def score(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.calibrate import RoutingStats
    from moeprune_ext.criteria import score_experts

    if options.out is not None:
        _check_new_file(options.out)
    scores = score_experts(RoutingStats.load(options.stats), _criterion(options.criterion), seed=options.seed)
    if options.out is not None:
        scores.save(options.out)
    listed = {str(layer): values.tolist() for layer, values in scores.items()}
    rows = []
    for layer, values in scores.items():
        best, worst = int(values.argmax()), int(values.argmin())
        rows.append(
            [str(layer), f"{values.mean():.4g}", f"{best} ({values[best]:.4g})", f"{worst} ({values[worst]:.4g})"]
        )
    text = f"{scores.criterion}, higher = keep\n" + _table(["layer", "mean", "best expert", "worst expert"], rows)
    return {"criterion": scores.criterion, "scores": listed}, text


def search(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext import distributed
    from moeprune_ext.calibrate import RoutingStats
    from moeprune_ext.checkpoint import read_checkpoint
    from moeprune_ext.criteria import score_experts
    from moeprune_ext.evaluator import CandidateEvaluator
    from moeprune_ext.evolve import check_settings, evolve
    from moeprune_ext.plan import uniform_counts, uniform_plan

    scores = score_experts(RoutingStats.load(options.stats), _criterion(options.criterion), seed=options.seed)
    # What can be refused without loading the weights is refused now.
    check_settings(
        options.fitness,
        options.population,
        options.generations,
        options.elites,
        options.fidelity,
        options.race_level,
    )
    uniform_counts(scores, options.sparsity)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"{options.out} is not a directory")
    if (fingerprint := read_checkpoint(options.model).fingerprint) != scores.model:
        raise ValueError(
            f"{options.stats} was gathered from another model: its fingerprint is {scores.model}, that of "
            f"{options.model} is {fingerprint}; calibrate this model"
        )
    batches = _batches(options, _tokenizer(options))
    budget = int(options.memory_budget * 2**30)
    evaluator = CandidateEvaluator(_model(options), batches, memory_budget=budget, router=options.router)
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


def export(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.checkpoint import CONFIG_KEY, read_config
    from moeprune_ext.export import export
    from moeprune_ext.plan import PruningPlan

    plan = PruningPlan.load(options.plan)
    out = export(options.model, plan, options.out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    uniform = CONFIG_KEY not in read_config(out)
    result = {"out": str(out), "bytes": size, "sparsity": plan.sparsity, "uniform": uniform}
    loader = "AutoModelForCausalLM.from_pretrained" if uniform else "moeprune_ext.load"
    return result, f"{out}: {plan.sparsity:.1%} of the experts removed, {size / 1e6:,.1f} MB; load it with {loader}"


def evaluate(options: argparse.Namespace) -> tuple[Any, str]:
    from moeprune_ext.evaluate import accuracy, harness_results, load_task, perplexity

    if not (options.task or options.data or options.lm_eval):
        raise ValueError("there is nothing to measure: give --task files, --data files or --lm-eval tasks")
    tokenizer = _tokenizer(options)
    tasks = {str(path): load_task(path, tokenizer) for path in options.task}
    batches = _batches(options, tokenizer) if options.data else None
    model = _model(options)
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
    from moeprune_ext.demo.run import as_json, format_table, run_demo
    from moeprune_ext.export import check_new_folder

    _quiet_transformers()

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if options.out is not None:
        check_new_folder(options.out)
        rows = run_demo(options.out, seed=options.seed, progress=True, say=say)
        kept = f"\nStatistics, plans and checkpoints are in {options.out}."
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


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )


def _criterion(text: str) -> str | tuple[int, int, str]:
    """A name, or a triple written alpha,beta,reduce."""
    if text.count(",") == 2:
        alpha, beta, reduce = (part.strip() for part in text.split(","))
        if alpha.isdigit() and beta.isdigit():
            return int(alpha), int(beta), reduce
    return text


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _check_new_file(path: Path) -> None:
    """Refuses an output file that could not be written, before the work that leads to it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a directory")


def _tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from moeprune_ext.checkpoint import read_config

    read_config(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ValueError(f"{options.model} has no usable tokenizer: {str(error)[:200]}") from error
    if len(tokenizer) < 16:  # transformers makes up an empty one where the files are missing
        raise ValueError(f"{options.model} has no tokenizer files; copy the original model's tokenizer there")
    return tokenizer


def _model(options: argparse.Namespace) -> Any:
    import torch

    from moeprune_ext.export import load

    device = _device(options.device)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    stream = getattr(options, "stream", "no")
    return load(options.model, stream=None if stream == "no" else stream, device=device, dtype=dtype).eval()


def _device(name: str) -> Any:
    import torch

    from moeprune_ext import distributed

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return distributed.local_device()
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device here")
    return device


def _batches(options: argparse.Namespace, tokenizer: Any) -> Any:
    from moeprune_ext.data import load_batches

    return load_batches(
        options.data,
        tokenizer,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        batch_size=options.batch_size,
    )
