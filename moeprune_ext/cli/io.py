"""Loads what verbs work on: a model, its tokenizer, data, scores. Writes plans."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, Kept, uniform_counts, unscored
from moeprune_ext.artifacts.journal import SETTINGS
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
from moeprune_ext.data.tasks import Task, rows_of
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
        ValueError: for --fit of a memory that holds no plan, and for a sparsity that removes nothing.
    """
    if options.experts is not None:
        return Kept(options.experts)
    if options.fit is None:
        sparsity = SPARSITY if options.sparsity is None else options.sparsity
        check_removes(sparsity, shapes)
        return sparsity
    config = read_config(model)
    empty, size, context = skeleton(read_hf_config(model), config), bytes_of(options.fit), options.context or CONTEXT
    stored = stored_bytes(read_checkpoint(model))  # quantised ones as they are, and layers that drafting servers load
    return Kept(experts_that_fit(empty, size, context=context, shapes=shapes, stored=stored))


def check_removes(sparsity: float, shapes: Mapping[int, LayerShape]) -> None:
    """Raises ValueError for a sparsity above 0 that is rounded to none, with the least that removes something."""
    if not 0 < sparsity < 1 or any(uniform_counts(unscored(shapes), sparsity).values()):
        return
    experts = sum(shape.num_experts for shape in shapes.values())
    steps = [shape.unit / shape.num_experts for shape in shapes.values() if shape.prunable]
    least = math.ceil(min(steps, default=1) / 2 * 1e4) / 1e4
    raise ValueError(
        f"--sparsity {sparsity:g} removes 0 of {experts:,} experts: each layer's share is rounded, and the smallest "
        f"that removes something is {least:g}; for fewer say how many stay, --experts"
    )


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


def check_new_file(path: Path, force: bool = False) -> None:
    """Raises ValueError if an output file could not be written, before the work that leads to it.

    Args:
        path: the file.
        force: whether it may exist, to be overwritten.
    """
    distributed.from_first(lambda: _check_new(path, force))  # before the first process writes it


def _check_new(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name a file")
    if path.exists() and not force:
        raise ValueError(f"{path} exists; name another file, or give --force to overwrite it")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written: {above} is not a directory")


def tokenizer_of(model: Path) -> Callable[[], Any]:
    """Returns a function that loads a model directory's tokenizer, once, when it is first called."""
    return cache(lambda: load_tokenizer(model))


def load_model(model: Path, options: Common) -> Any:
    """Loads a model directory as --device, --dtype and, where the verb has it, --stream say; says so on stderr."""
    device = device_of(options.device)
    stream = options.stream if isinstance(options, Streaming) and options.stream != "no" else None
    if distributed.is_first():
        say(_loading(model, options.dtype, device, stream))
    from transformers.utils import logging as transformers_logging  # takes seconds, which a refusal need not

    transformers_logging.disable_progress_bar()  # which would be drawn into our own, and where nobody looks
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return load(model, stream=stream, device=device, dtype=dtype).eval()


def _loading(model: Path, dtype: str, device: torch.device, stream: str | None) -> str:
    """Returns the line that says what is loaded: its size on disk, the dtype it will have, and where."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shown = stored_dtype(model) if dtype == "auto" else dtype
    place = str(device) if stream is None else f"{device}, layer by layer from {stream}"
    return f"loading {model} ({_size(size)}, {shown}, {place}) ..."


def stored_dtype(model: Path) -> str:
    """Returns the dtype that a model's configuration names."""
    named = getattr(read_hf_config(model), "dtype", None)
    return str(named or torch.float32).removeprefix("torch.")


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def device_of(name: str) -> torch.device:
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


def load_domains(
    options: Data, tokenizer: Callable[[], Any], *, labels: bool = True, model: Path | None = None
) -> dict[str, list[TokenBatch]]:
    """Loads --data as {domain: batches}, a domain a source, and says on stderr what was recognised.

    Args:
        options: the sources, and how much of them.
        tokenizer: loads the model's tokenizer; called only if a source needs it.
        labels: False where every token counts, as in calibration.
        model: directory of the model that reads the text; longer sequences than it has positions are refused.
    """
    domains = read_domains(
        options.data,
        tokenizer,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        batch_size=options.batch_size,
        labels=labels,
        say=say if distributed.is_first() else None,
    )
    if model is not None:
        check_positions(model, [batch for batches in domains.values() for batch in batches])
    return domains


def load_data(
    options: Data, tokenizer: Callable[[], Any], *, labels: bool = True, model: Path | None = None
) -> list[TokenBatch]:
    """As `load_domains`, of all sources one after the other."""
    domains = load_domains(options, tokenizer, labels=labels, model=model)
    return [batch for batches in domains.values() for batch in batches]


def check_positions(model: Path, batches: Iterable[TokenBatch]) -> None:
    """Raises ValueError for sequences that are longer than a model has positions, before its weights are loaded."""
    longest = max((batch.input_ids.shape[1] for batch in batches), default=0)
    check_longest(model, longest, f"the data has sequences of {longest:,} tokens", "use a smaller --sequence-length")


def check_task(model: Path, task: Task) -> None:
    """Raises ValueError for a task whose examples are longer than a model has positions."""
    longest = max(len(prompt) + len(option) for prompt, option in rows_of(task))
    check_longest(model, longest, f"{task.name} has an example of {longest:,} tokens", "shorten its prompts")


def check_longest(model: Path, longest: int, subject: str, advice: str) -> None:
    """Raises ValueError if a model has fewer positions than the longest sequence, as far as its configuration says."""
    config = read_hf_config(model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if isinstance(positions, int) and isinstance(factor, int | float) and isinstance(original, int):
        positions = max(positions, int(factor * original))  # as YaRN and its kin extend them
    if isinstance(positions, int) and longest > positions > 0:
        raise ValueError(
            f"{subject}, but {model} has {positions:,} positions (max_position_embeddings in config.json), beyond "
            f"which its figures mean nothing; {advice}"
        )


def say(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr)


def say_resumed(folder: Path, total: int, unit: str) -> None:
    """Says how far the search in a directory is, if one began there; `total`: of the units that will be done."""
    file = folder / "history.jsonl"
    if distributed.is_first() and (folder / SETTINGS).exists():
        done = file.read_text(encoding="utf-8").count("\n") if file.exists() else 0
        of_all = f" of {total}" if total else ""
        say(f"resuming {folder}: {done}{of_all} {unit} done")


def report(run: Path) -> Path:
    """Writes a run's page, by the first process, and returns where it is."""
    from moeprune_ext.report.report import write_report  # draws pictures, which take a second to import

    return write_report(run)


def next_command(*words: object) -> str:
    """Returns the line that says what to do next, quoted for a shell."""
    return f"next: moeprune {shlex.join(map(str, words))}"


def write_plan(plan: PruningPlan, out: Path, model: Path, **about: Any) -> tuple[Any, str]:
    """Saves a plan and returns what its verb prints.

    Args:
        plan: the plan.
        out: its file.
        model: directory of the model, for the next command.
        **about: more entries of the JSON result.
    """
    if distributed.is_first():
        plan.save(out)
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    result = {"plan": str(out), "sparsity": plan.sparsity, "kept_per_layer": kept, **about}
    lines = [
        f"kept per layer: {' '.join(map(str, kept.values()))}",
        f"{out}: {removed(plan)}. What that costs in quality is not measured yet.",
        next_command("export", model, "--plan", out, "-o", "pruned"),
    ]
    return result, "\n".join(lines)


def removed(plan: PruningPlan) -> str:
    """Returns how many experts a plan removes, in words."""
    kept, total = [len(ids) for ids in plan.kept.values()], sum(plan.num_experts.values())
    return f"removes {total - sum(kept):,} of {total:,} experts ({plan.sparsity:.1%})"
