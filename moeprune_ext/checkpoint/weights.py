"""The tensors of a planned checkpoint, made of the stored ones shard by shard."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.read import Checkpoint, Place
from moeprune_ext.models.merging import combined


class Siblings:
    """The stored experts' weights of the layers that merge some, read from any shard.

    Args:
        checkpoint: where they are stored.
        layers: decoder layers that merge.

    Raises:
        ValueError: for weights that cannot be added up as they are stored.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Collection[int]) -> None:
        self._file_of = {name: file for file, names in checkpoint.shards.items() for name in names}
        self._open = functools.cache(lambda file: safe_open(file, framework="pt"))
        # {(layer, stored name without the expert's number): {expert: stored name}}
        self._names: dict[tuple[int, str], dict[int, str]] = {}
        for name, place in checkpoint.places.items():
            if place.layer not in layers or place.is_router:
                continue
            dtype = self._open(self._file_of[name]).get_slice(name).get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"{name} is stored as {dtype}: quantised experts cannot be merged; dequantise them first"
                )
            if place.expert is not None:
                self._names.setdefault((place.layer, without_number(name)), {})[place.expert] = name

    def stacked(self, name: str, place: Place, count: int) -> Tensor:
        """Reads a tensor that is stored one by one, of the first `count` experts: [count, ...]."""
        names = self._names[place.layer, without_number(name)]
        stack: Tensor | None = None
        for expert in range(count):
            one = self._open(self._file_of[names[expert]]).get_tensor(names[expert])
            stack = one.new_empty(count, *one.shape) if stack is None else stack
            stack[expert] = one
        assert stack is not None
        return stack


def without_number(name: str) -> str:
    """Returns a stored tensor's name without its expert's number; it is the same for all experts."""
    return re.sub(r"((?:^|\.)experts\.)\d+\.", r"\g<1>*.", name)


def _numbered(name: str, expert: int) -> str:
    """Returns a stored tensor's name with another expert's number."""
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
    """

    checkpoint: Checkpoint
    plan: PruningPlan
    kept: Mapping[int, list[int]]
    router_parameters: Mapping[int, Mapping[str, Tensor]]
    siblings: Siblings

    def __post_init__(self) -> None:
        self._sums: tuple[tuple[int, str], Tensor] | None = None  # of the projection that was added up last

    def tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of one shard under their new names."""
        with safe_open(file, framework="pt") as shard:
            names = [name for name in self.checkpoint.shards[file] if name not in self.checkpoint.extra]
            for name in sorted(names, key=without_number):  # so that a projection's experts follow each other
                place = self.checkpoint.places.get(name)
                if place is None:
                    yield name, shard.get_tensor(name)
                elif place.is_router:
                    yield from self._router(shard, name, place)
                elif place.expert is None:
                    yield name, self._stacked(shard.get_tensor(name), place)
                else:
                    yield from self._single(shard, name, place, place.expert)

    def _router(self, shard: Any, name: str, place: Place) -> Iterator[tuple[str, Tensor]]:
        """A router's tensor: its kept rows, or all of them and beside them the map."""
        if place.layer not in self.router_parameters:
            yield name, self._rows(shard.get_tensor(name), place)
            return
        yield name, shard.get_tensor(name)
        layer = self.checkpoint.layers[place.layer]
        paths = [
            other.path for other in self.checkpoint.places.values() if other.layer == place.layer and other.is_router
        ]
        if place.path == min(paths):
            # Beside the router as it is stored, which may be under another name than in the model.
            stored = name.removesuffix(place.path) if name.endswith(place.path) else f"{layer.name}."
            for own, value in self.router_parameters[place.layer].items():
                yield f"{stored}{layer.router_name}.{own}", value

    def _rows(self, stored: Tensor, place: Place) -> Tensor:
        """The slices of kept experts, and those beyond the experts'."""
        size = stored.shape[place.axis]
        rows = [*self.kept[place.layer], *range(size - place.trailing, size)]
        return stored.index_select(place.axis, torch.tensor(rows))

    def _stacked(self, stored: Tensor, place: Place) -> Tensor:
        """A tensor of all experts."""
        merge = self.plan.merges.get(place.layer)
        if merge is None:
            return self._rows(stored, place)
        count = merge.experts.shape[1]
        new = combined(stored[:count], merge.experts)
        return new if not place.trailing else torch.cat([new, stored[count:]])

    def _single(self, shard: Any, name: str, place: Place, expert: int) -> Iterator[tuple[str, Tensor]]:
        """A tensor of one expert, if its place is kept."""
        remaining = self.checkpoint.layers[place.layer].with_trailing(self.kept[place.layer])
        if expert not in remaining:
            return
        merge, row = self.plan.merges.get(place.layer), remaining.index(expert)
        if merge is None or row >= len(merge.experts):
            yield _numbered(name, row), shard.get_tensor(name)
            return
        key = place.layer, without_number(name)
        if self._sums is None or self._sums[0] != key:
            self._sums = None  # given back before the next are made
            self._sums = key, combined(self.siblings.stacked(name, place, merge.experts.shape[1]), merge.experts)
        yield _numbered(name, row), self._sums[1][row].clone()
