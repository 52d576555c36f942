"""Loads what verbs work on: a model, its tokenizer, data, scores. Writes plans."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, Kept
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import score_experts, super_experts
from moeprune_ext.checkpoint.load import load, load_tokenizer
from moeprune_ext.checkpoint.read import read_checkpoint, read_config, read_hf_config, skeleton
from moeprune_ext.checkpoint.weights import stored_bytes
from moeprune_ext.cli.arguments import Budgeted, Common, Data, Limits, Scored, Streaming
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.data.batches import load_domains as read_domains
from moeprune_ext.models.costs import CONTEXT, bytes_of, experts_that_fit

SPARSITY = 0.5  # of the experts go, where no budget is given


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
    """Returns the scores under the limits, of which --protect-super needs statistics."""
    if limits.protect_super and stats is None:
        raise ValueError("--protect-super looks for outliers in statistics: give it to `score`, which makes the scores")
    return scores.constrained(
        min_kept=limits.min_kept,
        min_kept_per_group=limits.min_kept_per_group,
        multiple_of=limits.multiple_of,
        max_kept=limits.max_kept,
        protect=super_experts(stats) if limits.protect_super and stats is not None else None,
    )


def budget(options: Budgeted, model: Path, shapes: Mapping[int, LayerShape]) -> Budget:
    """Returns the budget of --sparsity, --experts or --fit.

    Args:
        options: the flags.
        model: directory; of --fit its files say what the weights take, which are not loaded.
        shapes: {decoder layer: what every plan must respect}, as in the scores under the limits.

    Raises:
        ValueError: for --fit of a memory that holds no plan.
    """
    if options.experts is not None:
        return Kept(options.experts)
    if options.fit is None:
        return SPARSITY if options.sparsity is None else options.sparsity
    config = read_config(model)
    empty, size, context = skeleton(read_hf_config(model), config), bytes_of(options.fit), options.context or CONTEXT
    stored = stored_bytes(read_checkpoint(model))  # quantised ones as they are, and layers that drafting servers load
    return Kept(experts_that_fit(empty, size, context=context, shapes=shapes, stored=stored))


def parse_criterion(text: str) -> str | tuple[int, int, str]:
    """Returns a criterion's name, or the triple of `alpha,beta,reduce`."""
    if text.count(",") == 2:
        alpha, beta, reduce = (part.strip() for part in text.split(","))
        if alpha.isdigit() and beta.isdigit():
            return int(alpha), int(beta), reduce
    return text


def check_run_folder(out: Path) -> None:
    """Raises ValueError for what cannot be a run's directory: a file, and a model's directory."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory")
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model, among whose files a run had better not write; name another directory")


def check_new_file(path: Path) -> None:
    """Raises ValueError if an output file could not be written, before the work that leads to it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a directory")


def tokenizer_of(model: Path) -> Callable[[], Any]:
    """Returns a function that loads a model directory's tokenizer, once, when it is first called."""
    return cache(lambda: load_tokenizer(model))


def load_model(model: Path, options: Common) -> Any:
    """Loads a model directory as --device, --dtype and, where the verb has it, --stream say."""
    from transformers.utils import logging as transformers_logging  # takes seconds, which a refusal need not

    transformers_logging.disable_progress_bar()  # which would be drawn into our own, and where nobody looks
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


def load_domains(options: Data, tokenizer: Callable[[], Any], *, labels: bool = True) -> dict[str, list[TokenBatch]]:
    """Loads --data as {domain: batches}, a domain a source, and says on stderr what was recognised.

    Args:
        options: the sources, and how much of them.
        tokenizer: loads the model's tokenizer; called only if a source needs it.
        labels: False where every token counts, as in calibration.
    """
    return read_domains(
        options.data,
        tokenizer,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        batch_size=options.batch_size,
        labels=labels,
        say=_say if distributed.is_first() else None,
    )


def load_data(options: Data, tokenizer: Callable[[], Any], *, labels: bool = True) -> list[TokenBatch]:
    """As `load_domains`, of all sources one after the other."""
    return [batch for batches in load_domains(options, tokenizer, labels=labels).values() for batch in batches]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def write_plan(plan: PruningPlan, out: Path, **about: Any) -> tuple[Any, str]:
    """Saves a plan and returns what its verb prints; `about`: more entries of the JSON result."""
    if distributed.is_first():
        plan.save(out)
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    result = {"plan": str(out), "sparsity": plan.sparsity, "kept_per_layer": kept, **about}
    return result, f"kept per layer: {' '.join(map(str, kept.values()))}\nplan: {out}"
