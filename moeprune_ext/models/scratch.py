"""Memory that is used again: fresh memory from the system costs a pass over it at every call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Hands out buffers by name. Whoever makes a Scratch owns what lies in it, and knows when it is overwritten."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}

    def take(self, name: Hashable, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns an uninitialised tensor in the buffer of that name, which grows where it is too small.

        Args:
            name: of the buffer; the same name gives the same memory, whatever was in it.
            shape: of the tensor.
            like: a tensor of the wanted dtype and device.
        """
        size = prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            held = self._held[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(*shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def release(self) -> None:
        """Gives all of it back."""
        self._held.clear()
