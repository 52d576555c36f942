"""How many bytes a piece of work needs at its peak, by doing it once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Division:
    """What a memory budget allows. head: bytes for logits in flight, of which a row takes row_bytes. tokens: in one
    call of a layer. state_tokens: of hidden states that the sweep holds, token_bytes each. teacher_place: see
    teacher.py."""

    head: int
    row_bytes: int
    tokens: int
    state_tokens: int
    token_bytes: int
    teacher_place: str


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors on `device` that `work` holds at once beyond what was there before.

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
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _released(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key and key not in given and key not in self._known:
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
