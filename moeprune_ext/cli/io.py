"""From the command line's options to what the verbs work on: a model, its tokenizer, data, scores.

Imports stand inside the functions, so that `moeprune --help` and a refusal do not wait for transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprune_ext.artifacts.scores import ExpertScores
    from moeprune_ext.artifacts.stats import RoutingStats


def load_scores(options: argparse.Namespace) -> ExpertScores:
    """The scores that --stats and --criterion make, or --scores holds, under the user's minima and protection.

    Refuses those of another model than the named one, without loading its weights.
    """
    from moeprune_ext.artifacts.scores import ExpertScores
    from moeprune_ext.artifacts.stats import RoutingStats
    from moeprune_ext.calibration.criteria import score_experts
    from moeprune_ext.checkpoint.read import read_checkpoint

    if (options.stats is None) == (options.scores is None):
        raise ValueError("give either --stats, with a --criterion, or --scores")
    stats = None if options.stats is None else RoutingStats.load(options.stats)
    if stats is None:
        scores = ExpertScores.load(options.scores)
    else:
        scores = score_experts(stats, parse_criterion(options.criterion), seed=options.seed)
    scores = constrained(scores, stats, options)
    if (fingerprint := read_checkpoint(options.model).fingerprint) != scores.model:
        raise ValueError(
            f"{options.stats or options.scores} was gathered from another model: its fingerprint is {scores.model}, "
            f"that of {options.model} is {fingerprint}; calibrate this model"
        )
    return scores


def constrained(scores: ExpertScores, stats: RoutingStats | None, options: argparse.Namespace) -> ExpertScores:
    """The scores under --min-kept, --min-kept-per-group and --protect-super, which needs statistics."""
    from moeprune_ext.calibration.criteria import super_experts

    if options.protect_super and stats is None:
        raise ValueError("--protect-super looks for outliers in statistics: give it to `score`, which makes the scores")
    return scores.constrained(
        min_kept=options.min_kept,
        min_kept_per_group=options.min_kept_per_group,
        protect=super_experts(stats) if options.protect_super and stats is not None else None,
    )


def parse_criterion(text: str) -> str | tuple[int, int, str]:
    """A name, or a triple written alpha,beta,reduce."""
    if text.count(",") == 2:
        alpha, beta, reduce = (part.strip() for part in text.split(","))
        if alpha.isdigit() and beta.isdigit():
            return int(alpha), int(beta), reduce
    return text


def quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_new_file(path: Path) -> None:
    """Refuses an output file that could not be written, before the work that leads to it."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a directory")


def load_tokenizer(options: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from moeprune_ext.checkpoint.read import read_config

    read_config(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ValueError(f"{options.model} has no usable tokenizer: {str(error)[:200]}") from error
    if len(tokenizer) < 16:  # transformers makes up an empty one where the files are missing
        raise ValueError(f"{options.model} has no tokenizer files; copy the original model's tokenizer there")
    return tokenizer


def load_model(options: argparse.Namespace) -> Any:
    import torch

    from moeprune_ext.checkpoint.load import load

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


def load_data(options: argparse.Namespace, tokenizer: Any, *, labels: bool = True) -> Any:
    """--data as batches; labels=False where every token counts, as in calibration."""
    from moeprune_ext.data.batches import load_batches

    return load_batches(
        options.data,
        tokenizer,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        batch_size=options.batch_size,
        labels=labels,
    )
