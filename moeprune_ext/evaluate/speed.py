"""Speed and memory of models beside each other: prefill and decode in alternating rounds.

Rounds alternate between the models, so that a machine that warms up or is shared slows both. Prefill is one forward of
the prompts that leaves a cache; decode is one token a step behind it, greedy, with nothing of `generate` around it.
"""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.files import finite_or_none
from moeprune_ext.intervals import Interval, exp_interval
from moeprune_ext.models.moe import plain_model, text_config


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed.

    Raises:
        ValueError: for fewer than one of anything.
    """

    batch: int = field(default=1, metadata={"help": "--speed: prompts that are run at once"})
    prompt: int = field(default=512, metadata={"help": "--speed: tokens of a prompt"})
    new: int = field(default=64, metadata={"help": "--speed: tokens decoded behind it"})
    rounds: int = field(default=5, metadata={"help": "--speed: rounds of each model, beside one that is not counted"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Speed:
    """What was measured of one model.

    Attributes:
        prefill: prompt tokens per second, of each round.
        decode: new tokens per second, of each round.
        weights: bytes of parameters and buffers.
        growth: bytes that a round needs on top. On CUDA: of the allocator's peak. On a CPU: of the process's resident
            memory, less what it keeps free from before, so that it is a lower bound. None where that cannot be read.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    weights: int
    growth: int | None

    def as_json(self) -> dict[str, Any]:
        """Returns rounds, medians and quartiles, and memory."""
        peak = None if self.growth is None else self.weights + self.growth
        places = ("median", "low_quartile", "high_quartile")
        spread = {
            f"{name}_{place}": finite_or_none(value)
            for name in ("prefill", "decode")
            for place, value in zip(places, quartiles(getattr(self, name)), strict=True)
        }
        return {**vars(self), "prefill": list(self.prefill), "decode": list(self.decode), **spread, "peak": peak}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def speed_ratio(rounds: Sequence[float], reference: Sequence[float]) -> Interval:
    """Returns the geometric mean of how many times as fast each round was as its neighbour, a bootstrap over rounds."""
    ratios = torch.tensor(rounds, dtype=torch.float64) / torch.tensor(reference, dtype=torch.float64)
    return exp_interval(ratios.log(), torch.ones_like(ratios))


def measure_speed(models: Sequence[Any], settings: SpeedSettings = SpeedSettings(), *, seed: int = 0) -> list[Speed]:
    """Times prefill and decode of loaded models in alternating rounds, and reads their memory.

    Args:
        models: transformers models, with experts or without.
        settings: what is timed.
        seed: of the random prompts, the same for all.

    Raises:
        ValueError: for prompts longer than a model's positions, before anything is run.
    """
    plain = [plain_model(model) for model in models]
    total = settings.prompt + settings.new
    for model in plain:
        positions = getattr(text_config(model), "max_position_embeddings", None)
        if positions is not None and total > positions:
            raise ValueError(
                f"{settings.prompt} tokens of a prompt and {settings.new} new ones make {total}, but the model has "
                f"{positions} positions; use a shorter prompt or fewer new tokens"
            )
    vocabulary = min(int(text_config(model).vocab_size) for model in plain)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (settings.batch, settings.prompt), generator=generator)
    growth = [_growth(model, functools.partial(_round, model, prompts, settings.new)) for model in plain]
    times: list[list[tuple[float, float]]] = [[] for _ in plain]
    for _ in range(settings.rounds):
        for own, model in zip(times, plain, strict=True):
            own.append(_round(model, prompts, settings.new))
    return [
        Speed(
            prefill=tuple(prompts.numel() / prefill for prefill, _ in own),
            decode=tuple(settings.batch * settings.new / decode for _, decode in own),
            weights=sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
            growth=bytes_more,
        )
        for model, own, bytes_more in zip(plain, times, growth, strict=True)
    ]


@torch.no_grad()
def _round(model: Any, prompts: Tensor, new: int) -> tuple[float, float]:
    """Returns the seconds of a prefill, and of `new` steps behind it."""
    device = next(model.parameters()).device
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens = prompts.to(device)
    started = _now(device)
    out = model(input_ids=tokens, use_cache=True, **last_only)
    prefilled = _now(device)
    cache = next(name for name in ("cache", "past_key_values") if name in out)  # renamed in transformers 5.40
    for _ in range(new):
        tokens = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=tokens, use_cache=True, **{cache: out[cache]}, **last_only)
    return prefilled - started, _now(device) - prefilled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _growth(model: Any, run: Callable[[], Any]) -> int | None:
    """Runs a round that is not timed; returns the bytes of its peak above what there was before."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    measurable, resident = _reset_peak(), _resident("VmRSS")
    run()
    peak = _resident("VmHWM")
    return max(0, peak - resident) if measurable and peak is not None and resident is not None else None


def _reset_peak() -> bool:
    """Sets the process's peak of resident memory back to now, which Linux can do; tells whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    """Returns an entry of the process's status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
