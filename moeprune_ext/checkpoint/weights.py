"""The tensors of a planned checkpoint, made of the stored ones shard by shard."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.padding import ABSENT
from moeprune_ext.checkpoint.read import Checkpoint, Role, stored_tensors
from moeprune_ext.models.costs import StoredBytes
from moeprune_ext.models.experts import DOWN
from moeprune_ext.models.merging import combined

PLAIN = ("F64", "F32", "F16", "BF16")  # how safetensors names the dtypes of numbers
# ... and the bytes of an element of any dtype that takes more than one.
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}


def quantised_experts(checkpoint: Checkpoint, layers: Collection[int] | None = None) -> str | None:
    """Names a tensor of experts that is no plain number, and how it is stored; None if there is none.

    Args:
        checkpoint: where the experts are stored.
        layers: decoder layers to look at; None: all.
    """
    experts = [
        name
        for name, role in checkpoint.roles.items()
        if not role.is_router and (layers is None or role.layer in layers)
    ]
    for name, stored in stored_tensors(checkpoint.shards, frozenset(experts)):
        if (dtype := stored.get_dtype()) not in PLAIN:
            return f"{name} is stored as {dtype}"
    return None


def stored_bytes(checkpoint: Checkpoint) -> StoredBytes:
    """Returns what a checkpoint's weights take as they are stored; no weights are read."""
    total, experts = 0, dict.fromkeys(checkpoint.layers, 0.0)
    for name, stored in stored_tensors(checkpoint.shards):
        shape, dtype = stored.get_shape(), stored.get_dtype()
        size = prod(shape) * BYTES.get(dtype, 1)
        total += size
        if (role := checkpoint.roles.get(name)) is not None:
            one_of = checkpoint.layers[role.layer].shape.num_experts if role.expert is not None else shape[role.axis]
            experts[role.layer] += size / one_of
    return StoredBytes(total, experts)


class Siblings:
    """The stored experts' weights of the layers that merge some, read from any shard.

    Args:
        checkpoint: where they are stored.
        layers: decoder layers that merge.

    Raises:
        ValueError: for weights that cannot be added up as they are stored.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Collection[int]) -> None:
        self._shards = checkpoint.shards
        # {(layer, stored name without the expert's number): {expert: stored name}}
        self._names: dict[tuple[int, str], dict[int, str]] = {}
        roles = {name: role for name, role in checkpoint.roles.items() if role.layer in layers and not role.is_router}
        if odd := quantised_experts(checkpoint, layers):
            raise ValueError(
                f"{odd}: quantised experts cannot be merged, repaired or padded; make a dequantised copy and export "
                f'the plan from that: moeprune_ext.load("{checkpoint.folder}").save_pretrained("copy")'
            )
        for name, role in roles.items():
            if role.expert is not None:
                self._names.setdefault((role.layer, numbered(name, "*")), {})[role.expert] = name

    def stacked(self, name: str, layer: int, count: int) -> Tensor:
        """Reads a tensor that is stored one by one, of the first `count` experts: [count, ...]."""
        names = self._names[layer, numbered(name, "*")]
        experts = {names[expert]: expert for expert in range(count)}
        stack: Tensor | None = None
        for expert_name, stored in stored_tensors(self._shards, experts):
            tensor = stored[...]
            stack = tensor.new_empty(count, *tensor.shape) if stack is None else stack
            stack[experts[expert_name]] = tensor
        assert stack is not None
        return stack


def numbered(name: str, expert: int | str) -> str:
    """Returns a stored tensor's name with another expert's number; with "*" it is the same for all experts."""
    return re.sub(r"((?:^|\.)experts\.)\d+\.", rf"\g<1>{expert}.", name)


@dataclass
class PlannedWeights:
    """Makes the tensors that a plan leaves of a checkpoint.

    Memory: a shard, and where merged experts are stored one by one all of one projection of one layer, and their sums.

    Attributes:
        checkpoint: where the weights are stored.
        plan: what becomes of them.
        kept: {decoder layer: ids of the experts kept} of every layer.
        router_parameters: {decoder layer: {name: value}}, what mapped routers have beside what is stored.
        siblings: experts' weights in any shard.
        absent: {decoder layer: ids of kept experts that are none}, which routers must never choose (padding.py).
    """

    checkpoint: Checkpoint
    plan: PruningPlan
    kept: Mapping[int, list[int]]
    router_parameters: Mapping[int, Mapping[str, Tensor]]
    siblings: Siblings
    absent: Mapping[int, Sequence[int]]

    def __post_init__(self) -> None:
        self._sums: tuple[tuple[int, str], Tensor] | None = None  # of the projection that was added up last

    def tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of one shard under their new names."""
        names = [name for name in self.checkpoint.shards[file] if name not in self.checkpoint.extra]
        names.sort(key=lambda name: numbered(name, "*"))  # so that a projection's experts follow each other
        for name, stored in stored_tensors({file: names}):
            role = self.checkpoint.roles.get(name)
            if role is None:
                yield name, stored[...]
            elif role.is_router:
                yield from self._router(name, role, stored[...])
            elif role.expert is None:
                yield name, self._stacked(role, stored[...])
            else:
                yield from self._single(name, role, role.expert, stored)

    def _router(self, name: str, role: Role, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A router's tensor: its kept rows, or all of them and beside them the map."""
        if role.layer not in self.router_parameters:
            yield name, self._rows(role, stored)
            return
        yield name, stored
        layer = self.checkpoint.layers[role.layer]
        paths = [r.path for r in self.checkpoint.roles.values() if r.layer == role.layer and r.is_router]
        if role.path == min(paths):
            # Beside the router as it is stored, which may be under another name than in the model.
            prefix = name.removesuffix(role.path) if name.endswith(role.path) else f"{layer.name}."
            for parameter, value in self.router_parameters[role.layer].items():
                yield f"{prefix}{layer.router_name}.{parameter}", value

    def _rows(self, role: Role, stored: Tensor) -> Tensor:
        """The slices of kept experts, and those beyond the experts'."""
        size = stored.shape[role.axis]
        rows = [*self.kept[role.layer], *range(size - role.trailing, size)]
        remaining = stored.index_select(role.axis, torch.tensor(rows))
        if role.is_router and stored.ndim == 1 and role.layer in self.absent:
            remaining[[rows.index(expert) for expert in self.absent[role.layer]]] = ABSENT
        return remaining

    def _stacked(self, role: Role, stored: Tensor) -> Tensor:
        """A tensor of all experts."""
        merge = self.plan.merges.get(role.layer)
        if merge is None:
            return self._rows(role, stored)
        count = merge.experts.shape[1]
        down = self._down(role, stored[0], slice(None))
        sums = combined(stored[:count], merge.experts) if down is None else down
        return sums if not role.trailing else torch.cat([sums, stored[count:]])

    def _down(self, role: Role, stored: Tensor, rows: slice) -> Tensor | None:
        """Returns some of a repaired layer's down projections [n, ...], laid out and typed as one that is stored.

        None for other tensors.

        Raises:
            ValueError: for a layout that the stored one does not show.
        """
        merge = self.plan.merges[role.layer]
        if merge.down is None or role.is_router or role.path.rpartition(".")[2] != DOWN:
            return None
        transposed = merge.down.shape[1:] != stored.shape if role.transposed is None else role.transposed
        down = merge.down[rows].transpose(1, 2) if transposed else merge.down[rows]
        if down.shape[1:] != stored.shape:
            raise ValueError(
                f"layer {role.layer}: a repaired down projection is {tuple(down.shape[1:])}, the stored one "
                f"{tuple(stored.shape)}; this checkpoint's layout is not supported by repair"
            )
        return down.to(stored.dtype).contiguous()

    def _single(self, name: str, role: Role, expert: int, stored: Any) -> Iterator[tuple[str, Tensor]]:
        """A tensor of one expert, where something stands in its place: read, or a sum."""
        remaining = self.checkpoint.layers[role.layer].with_trailing(self.kept[role.layer])
        if expert not in remaining:
            return
        merge, row = self.plan.merges.get(role.layer), remaining.index(expert)
        if merge is None or row >= len(merge.experts):
            yield numbered(name, row), stored[...]
            return
        if (down := self._down(role, stored[...], slice(row, row + 1))) is not None:
            yield numbered(name, row), down[0].clone()
            return
        if merge.keeps(self.kept[role.layer]):
            yield numbered(name, row), stored[...]
            return
        key = role.layer, numbered(name, "*")
        if self._sums is None or self._sums[0] != key:
            self._sums = None  # given back before the next are made
            self._sums = key, combined(self.siblings.stacked(name, role.layer, merge.experts.shape[1]), merge.experts)
        yield numbered(name, row), self._sums[1][row].clone()
