"""Where the streamed layers of a model stand on a GPU, and how they come there (streaming.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PIECE = 1 << 26  # bytes; page-locked memory is allocated in powers of two, so pieces of one such size waste little
ALIGNMENT = 256  # bytes, of a tensor in a GPU's buffer


def page_locked(tensor: Tensor) -> list[Tensor]:
    """Copies a tensor's bytes to page-locked memory, in pieces."""
    return [piece.pin_memory() for piece in tensor.contiguous().view(-1).view(torch.uint8).split(PIECE)]


class TwoBuffers:
    """Two buffers on a GPU: kernels read the layer in one while a stream of its own copies the next into the other.

    They are allocated once. Freed, a dropped layer's memory would return only when the kernels that read it have run,
    and the host runs far ahead of those: layers would pile up. So a copy waits, on the GPU, for the last reader of its
    buffer.

    Args:
        device: a GPU.
        layers: for each layer {name: meta tensor}.
    """

    def __init__(self, device: torch.device, layers: list[dict[str, Tensor]]) -> None:
        size = max(sum(tensor.nbytes + ALIGNMENT for tensor in tensors.values()) for tensors in layers)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._filled = [torch.cuda.Event(), torch.cuda.Event()]
        self._released = [torch.cuda.Event(), torch.cuda.Event()]
        self._next = 0  # the buffer to fill
        for buffer, released in zip(self._buffers, self._released, strict=True):
            released.record(torch.cuda.current_stream(device))  # the memory may have had another reader before
            buffer.record_stream(self._stream)  # and is not to be given away while a copy into it runs

    def fill(self, tensors: Mapping[str, Tensor | list[Tensor]], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begins to copy a layer into the buffer that is not being read.

        Args:
            tensors: {name: weights in CPU memory, or their page-locked pieces}.
            shapes: {name: meta tensor of the same shape and dtype}.

        Returns:
            {name: the tensor in the buffer}.
        """
        for filled in self._filled:
            filled.synchronize()  # once the copy before has ended, its page-locked memory is used again
        buffer, end, views = self._buffers[self._next], 0, {}
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[self._next])
            for name, source in tensors.items():
                start = end = end + -end % ALIGNMENT
                for piece in page_locked(source) if isinstance(source, Tensor) else source:
                    buffer[end : end + len(piece)].copy_(piece, non_blocking=True)
                    end += len(piece)
                views[name] = buffer[start:end].view(shapes[name].dtype).view(shapes[name].shape)
            self._filled[self._next].record(self._stream)
        return views

    def take(self) -> None:
        """Lets kernels read what was filled last."""
        torch.cuda.current_stream(self._device).wait_event(self._filled[self._next])
        self._next = 1 - self._next

    def release(self) -> None:
        """Says that no later kernel reads what was taken last."""
        self._released[1 - self._next].record(torch.cuda.current_stream(self._device))
