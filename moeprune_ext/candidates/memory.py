"""How a memory budget is divided among what a sweep needs, by what a layer is measured to need.

The budget is divided once, at the start: logits in flight, the teacher's rows if they stay on the device, what a layer
call needs (which sets how many states one call takes), and the candidates' hidden states (which sets how many
candidates go together, and how many sequences where they wait for each other). None of it depends on the candidates or
on the number of processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeprune_ext.artifacts.plan import Treatment
from moeprune_ext.candidates.blocks import BlockRunner
from moeprune_ext.candidates.engine import Division, EngineOptions
from moeprune_ext.candidates.teacher import choose_place
from moeprune_ext.candidates.tree import Level, treatments
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.layers import half_kept
from moeprune_ext.models.replay import LayerInputs
from moeprune_ext.ops.overlap import bytes_in_flight

CPU_TOKENS_AT_ONCE, CUDA_TOKENS_AT_ONCE = 8_192, 65_536  # beyond these a layer call gains nothing
CPU_HEAD_BYTES, CUDA_HEAD_BYTES = 2**28, 2**31


def divide(
    runner: BlockRunner, sequences: Sequence[TokenBatch], lengths: Sequence[int], options: EngineOptions
) -> Division:
    """Divides a memory budget by what the longest sequence needs.

    Args:
        runner: of the model; its memory is released.
        sequences: all that are scored.
        lengths: tokens that each of them is run at.
        options: memory_budget, teacher_cache and backend.

    Raises:
        ValueError: for a budget that cannot hold one sequence, with the numbers.
    """
    replay, budget = runner.replay, options.memory_budget
    device = replay.moe.device
    longest = max(sequences, key=lambda sequence: sequence.input_ids.shape[1])
    length = longest.input_ids.shape[1]
    inputs = replay.inputs(longest.model_inputs(device))
    width, item = inputs.hidden.shape[-1], inputs.hidden.element_size()
    states = 2 * length * width * item
    per_token = -(-_layer_bytes(runner, inputs) // length)
    layer = per_token * length
    arguments = 2 * replay.argument_bytes(inputs)  # of this sequence and of the one before

    wanted = [int(sequence.wanted.sum()) for sequence in sequences]
    rows = [(size + w) * width * item + 8 * w for size, w in zip(lengths, wanted, strict=True)]
    place = choose_place(options.teacher_cache, sum(rows), device, budget)
    on_device = place == "device" or (place == "host" and device.type == "cpu")
    teacher = sum(rows) if on_device else max(rows)
    logits = replay.project(replay.head_inputs(inputs.hidden[0, :1]))
    head_least = 16 * bytes_in_flight(logits, options.backend)
    least = head_least + teacher + layer + states + arguments
    if budget < least:
        mib = [f"{size / 2**20:,.1f}" for size in (budget, layer, states + arguments, teacher, head_least)]
        raise ValueError(
            f"memory_budget is {mib[0]} MiB, too little for a sequence of {length} tokens: a decoder layer needs "
            f"{mib[1]}, a candidate's hidden states and masks {mib[2]}, the teacher's rows {mib[3]} ({place}) and "
            f"logits {mib[4]}; allow {least / 2**20 + 0.1:,.1f} MiB or shorten the sequences"
        )
    most_head, most_tokens = (CPU_HEAD_BYTES, CPU_TOKENS_AT_ONCE)
    if device.type != "cpu":
        most_head, most_tokens = (CUDA_HEAD_BYTES, CUDA_TOKENS_AT_ONCE)
    head = max(head_least, min(most_head, budget // 4, budget - least + head_least))
    rest = budget - head - teacher - arguments
    # In whole sequences, so that a byte more or less on another day groups alike.
    tokens = max(1, min(most_tokens, rest // 2 // per_token) // length) * length
    state_tokens = max(1, (rest - tokens * per_token) // (2 * width * item) // length) * length
    return Division(head, head_least // 16, tokens, state_tokens, 2 * width * item, place)


def _layer_bytes(runner: BlockRunner, inputs: LayerInputs) -> int:
    """Measures the most bytes that a layer's call for one state needs beside the states, kept memory included.

    On a GPU half of those for two states of one node: pairs that they share go through the experts' own function, which
    takes more.
    """
    replay = runner.replay
    layers, device = replay.moe.layers, replay.moe.device
    together = 1 if device.type == "cpu" else 2
    runner.tokens_at_once = together * inputs.hidden.shape[1]
    runner.release()  # so that all of it is seen
    hidden, outputs, most = inputs.hidden, inputs.hidden, 0

    def step() -> None:
        nonlocal outputs
        outputs = runner.layer(index, level, hidden, inputs)

    full = treatments(layers)
    for index in range(len(replay.layers)):
        level = None
        if index in layers:
            choices = (Treatment(tuple(half_kept(layers[index]))), full[index])
            level = Level(torch.zeros(together, dtype=torch.int64), torch.arange(together), choices)
        replay.moe.make_resident(index)  # weights are not what is measured
        before = runner.held_bytes
        most = max(most, peak_bytes(step, device) - (runner.held_bytes - before))
        hidden = outputs[:1].clone()
    state_bytes = inputs.hidden.nbytes  # copied where a node has several
    most += runner.scratch_bytes
    runner.release()
    return most // together + state_bytes


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Returns the most bytes of tensors on `device` that `work` holds at once beyond what was there before.

    On CUDA as its allocator counts; elsewhere storages are counted as operations return them, so what an operation
    needs inside is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Counting() as counting:
        work()
    return counting.peak


class _Counting(TorchDispatchMode):
    """Counts the bytes of storages that operations return, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _released(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key and key not in inputs and key not in self._known:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._released, key, size)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []
