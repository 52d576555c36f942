"""The unpruned model's side of every comparison: final hidden states and log-sum-exps, a thousandth of the logits.

Logits are made again from the hidden states, chunk by chunk, when they are compared. For each sequence: the hidden
states in front of the first MoE layer, from which every candidate starts, the head's inputs at the scored positions,
and their log-sum-exps. They are kept on the device, in host memory, or on disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PLACES = ("auto", "device", "host", "disk")


@dataclass(frozen=True)
class TeacherRows:
    """The unpruned model's rows of one sequence.

    Attributes:
        start: [1, S, H], hidden states in front of the first MoE layer.
        head_inputs: [T, H], at the wanted positions.
        lse: float64 [T], log-sum-exps of their logits.
    """

    start: Tensor
    head_inputs: Tensor
    lse: Tensor


def choose_place(wanted: str, size: int, device: torch.device, budget: int) -> str:
    """Chooses where the teacher's rows are kept.

    "auto" is on the device within a quarter of the budget, else in host memory where that is another memory and has
    twice the room, else on disk.

    Args:
        wanted: a name of PLACES.
        size: bytes of all rows.
        device: of the model.
        budget: bytes.

    Returns:
        "device", "host" or "disk".
    """
    if wanted != "auto":
        return "host" if wanted == "device" and device.type == "cpu" else wanted
    if size <= budget // 4:
        return "host" if device.type == "cpu" else "device"
    return "host" if device.type != "cpu" and 2 * size <= _free_host_bytes() else "disk"


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not known there
        return 0


class TeacherCache:
    """Keeps {sequence number: TeacherRows} in one place; files on disk go with the object.

    Args:
        place: from `choose_place`.
        device: where rows are wanted.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        self.place = place
        self._device = device
        self._held: dict[int, TeacherRows] = {}
        self._folder: Path | None = None
        if place == "disk":
            self._folder = Path(tempfile.mkdtemp(prefix="moeprune-teacher-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __setitem__(self, number: int, rows: TeacherRows) -> None:
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in vars(rows).items()}
        if self._folder is not None:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, self._folder / f"{number}.safetensors")
            return
        where = self._device if self.place == "device" else torch.device("cpu")
        self._held[number] = TeacherRows(**{name: tensor.to(where) for name, tensor in tensors.items()})

    def __getitem__(self, number: int) -> TeacherRows:
        if self._folder is not None:
            tensors = load_file(self._folder / f"{number}.safetensors", device=str(self._device))
            return TeacherRows(**tensors)
        rows = self._held[number]
        return TeacherRows(**{name: tensor.to(self._device) for name, tensor in vars(rows).items()})
