"""Loads what verbs work on: a model, its tokenizer, data, scores. Writes plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import score_experts, super_experts
from moeprune_ext.checkpoint.load import load
from moeprune_ext.checkpoint.read import read_checkpoint, read_config
from moeprune_ext.cli.arguments import Common, Data, Limits, Scored, Streaming
from moeprune_ext.data.batches import TokenBatch, load_batches


def load_scores(options: Scored) -> ExpertScores:
    """Loads the scores of --scores, or makes them of --stats by --criterion, under the user's limits.

    Raises:
        ValueError: for both or neither of the two, and for scores of another model than the named one, whose weights
            are not loaded.
    """
    if options.scores is None:
        stats = load_stats(options)
        return constrained(score_experts(stats, parse_criterion(options.criterion), seed=options.seed), stats, options)
    if options.stats is not None:
        raise ValueError("give either --stats, with a --criterion, or --scores")
    scores = constrained(ExpertScores.load(options.scores), None, options)
    check_same_model(options.model, scores.model, options.scores)
    return scores


def load_stats(options: Scored) -> RoutingStats:
    """Loads the statistics of --stats.

    Raises:
        ValueError: if there are none, and for those of another model than the named one, whose weights are not loaded.
    """
    if options.stats is None:
        raise ValueError("give either --stats, with a --criterion, or --scores")
    stats = RoutingStats.load(options.stats)
    check_same_model(options.model, stats.model, options.stats)
    return stats


def check_same_model(model: Path, fingerprint: str | None, file: Path | None) -> None:
    """Raises ValueError if a file was made of another model than the named one, whose weights are not loaded."""
    if (needed := read_checkpoint(model).fingerprint) != fingerprint:
        raise ValueError(
            f"{file} was gathered from another model: its fingerprint is {fingerprint}, that of {model} is {needed}; "
            "calibrate this model"
        )


def constrained(scores: ExpertScores, stats: RoutingStats | None, limits: Limits) -> ExpertScores:
    """Returns the scores under --min-kept, --min-kept-per-group and --protect-super, which needs statistics."""
    if limits.protect_super and stats is None:
        raise ValueError("--protect-super looks for outliers in statistics: give it to `score`, which makes the scores")
    return scores.constrained(
        min_kept=limits.min_kept,
        min_kept_per_group=limits.min_kept_per_group,
        protect=super_experts(stats) if limits.protect_super and stats is not None else None,
    )


def parse_criterion(text: str) -> str | tuple[int, int, str]:
    """Returns a criterion's name, or the triple of `alpha,beta,reduce`."""
    if text.count(",") == 2:
        alpha, beta, reduce = (part.strip() for part in text.split(","))
        if alpha.isdigit() and beta.isdigit():
            return int(alpha), int(beta), reduce
    return text


def check_new_file(path: Path) -> None:
    """Raises ValueError if an output file could not be written, before the work that leads to it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a directory")


def load_tokenizer(model: Path) -> Any:
    """Loads a model directory's tokenizer; ValueError if it has none."""
    from transformers import AutoTokenizer  # takes seconds, which a refusal need not

    read_config(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ValueError(f"{model} has no usable tokenizer: {str(error)[:200]}") from error
    if len(tokenizer) < 16:  # transformers makes up an empty one where the files are missing
        raise ValueError(f"{model} has no tokenizer files; copy the original model's tokenizer there")
    return tokenizer


def load_model(model: Path, options: Common) -> Any:
    """Loads a model directory as --device, --dtype and, where the verb has it, --stream say."""
    device = _device(options.device)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    stream = options.stream if isinstance(options, Streaming) and options.stream != "no" else None
    return load(model, stream=stream, device=device, dtype=dtype).eval()


def _device(name: str) -> torch.device:
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


def load_data(options: Data, tokenizer: Any, *, labels: bool = True) -> list[TokenBatch]:
    """Loads --data as batches; labels=False where every token counts, as in calibration."""
    return load_batches(
        options.data,
        tokenizer,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        batch_size=options.batch_size,
        labels=labels,
    )


def load_domains(options: Data, tokenizer: Any) -> dict[str, list[TokenBatch]]:
    """Loads --data for scoring plans: {domain: batches}, a domain a source; each gets its share of --sequences."""
    paths = options.data
    if options.sequences < len(paths):
        raise ValueError(f"--sequences {options.sequences} is less than one for each of {len(paths)} sources")
    names = [path.name for path in paths]
    domains = {}
    for i, path in enumerate(paths):
        name = path.name if names.count(path.name) == 1 else str(path)
        share = options.sequences // len(paths) + (i < options.sequences % len(paths))
        domains[name] = load_data(replace(options, data=(path,), sequences=share), tokenizer)
    return domains


def write_plan(plan: PruningPlan, out: Path, **about: Any) -> tuple[Any, str]:
    """Saves a plan and returns what its verb prints; `about`: more entries of the JSON result."""
    if distributed.is_first():
        plan.save(out)
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    result = {"plan": str(out), "sparsity": plan.sparsity, "kept_per_layer": kept, **about}
    return result, f"kept per layer: {' '.join(map(str, kept.values()))}\nplan: {out}"
