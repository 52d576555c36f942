"""The tensors of a pruned or merged checkpoint, made of the stored ones shard by shard."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.read import Checkpoint, Place
from moeprune_ext.models.merging import combined, weighted_average


class Siblings:
    """The stored experts' weights of the layers that merge some, read from any shard.

    Raises ValueError for weights that cannot be added up as they are stored.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[int]) -> None:
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
                self._names.setdefault((place.layer, _without_number(name)), {})[place.expert] = name

    def of(self, name: str, place: Place, experts: Sequence[int]) -> dict[int, Tensor]:
        """{expert: its tensor} for a tensor stored one by one."""
        names = self._names[place.layer, _without_number(name)]
        return {e: self._open(self._file_of[names[e]]).get_tensor(names[e]) for e in experts}

    def stacked(self, name: str, place: Place) -> Tensor:
        """[E, ...]: a tensor stored one by one, of all experts."""
        names = self._names[place.layer, _without_number(name)]
        whole: Tensor | None = None
        for row, expert in enumerate(sorted(names)):
            one = self._open(self._file_of[names[expert]]).get_tensor(names[expert])
            whole = one.new_empty(len(names), *one.shape) if whole is None else whole
            whole[row] = one
        assert whole is not None
        return whole


def _without_number(name: str) -> str:
    return re.sub(r"((?:^|\.)experts\.)\d+\.", r"\g<1>*.", name)


def _numbered(name: str, expert: int) -> str:
    return re.sub(r"((?:^|\.)experts\.)\d+\.", rf"\g<1>{expert}.", name)


def pruned_tensors(
    shard: Any,
    names: Sequence[str],
    checkpoint: Checkpoint,
    plan: PruningPlan,
    kept: Mapping[int, Sequence[int]],
    siblings: Siblings,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard that survive a plan, under their new names; kept experts that it merges are averages."""
    remaining = {index: layer.with_trailing(kept[index]) for index, layer in checkpoint.layers.items()}
    for name in names:
        place = checkpoint.places.get(name)
        if place is None:
            yield name, shard.get_tensor(name)
            continue
        sums = {} if place.is_router else plan.merged.get(place.layer, {})
        if place.expert is None:
            stored = shard.get_tensor(name)
            new = {expert: weighted_average({e: stored[e] for e in shares}, shares) for expert, shares in sums.items()}
            for expert, weight in new.items():
                stored[expert] = weight
            size = stored.shape[place.axis]
            rows = [*kept[place.layer], *range(size - place.trailing, size)]
            yield name, stored.index_select(place.axis, torch.tensor(rows))
        elif place.expert in remaining[place.layer]:
            shares = sums.get(place.expert)
            if shares is None:
                weight = shard.get_tensor(name)
            else:
                weight = weighted_average(siblings.of(name, place, list(shares)), shares)
            yield _numbered(name, remaining[place.layer].index(place.expert)), weight


def merged_tensors(
    shard: Any,
    names: Sequence[str],
    checkpoint: Checkpoint,
    plan: MergedPlan,
    mapped: Mapping[int, Mapping[str, Tensor]],
    siblings: Siblings,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard with every layer's experts merged as a plan says; new expert i stands where expert i
    stood. mapped: {layer: {name: value}}, the mapped routers' own parameters, which go beside the router.

    Memory: the shard, and where experts are stored one by one all of one projection of one layer, and their K' sums.
    """
    sums: dict[tuple[int, str], Tensor] = {}  # of the projection that was added up last
    for name in sorted(names, key=_without_number):  # so that a projection's experts follow each other
        place = checkpoint.places.get(name)
        merge = plan.merges.get(place.layer) if place is not None else None
        if place is None or merge is None:
            yield name, shard.get_tensor(name)
        elif place.is_router:
            yield name, shard.get_tensor(name)
            layer = checkpoint.layers[place.layer]
            if place.path == first_router_path(checkpoint, place.layer):
                # Beside the router as it is stored, which may be under another name than in the model.
                stored = name.removesuffix(place.path) if name.endswith(place.path) else f"{layer.name}."
                for own, value in mapped[place.layer].items():
                    yield f"{stored}{layer.router_name}.{own}", value
        elif place.expert is None:
            yield name, combined(shard.get_tensor(name), merge.experts)
        elif place.expert < len(merge.experts):
            key = place.layer, _without_number(name)
            if key not in sums:
                sums = {key: combined(siblings.stacked(name, place), merge.experts)}
            yield name, sums[key][place.expert].clone()


def first_router_path(checkpoint: Checkpoint, layer: int) -> str:
    return min(place.path for place in checkpoint.places.values() if place.layer == layer and place.is_router)
