"""Puts a pruning mask on MoE layers and takes it off, or prunes them for good.

A *mask* slices the router: each of its per-expert tensors (and of its parent block's) is indexed by the kept experts,
its expert count is set, and the ids it returns are mapped back on their way into the experts. No expert's weights are
touched or copied, and what is computed is what the pruned checkpoint computes. *Pruning* slices the router and the
experts alike.

Source of the rule that a pruned expert is absent from the softmax: EvoESAP, arXiv 2603.06003.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.models.moe import (
    EXPERT_COUNT_NAMES,
    READS_CONFIG,
    ROW_COUNT_NAMES,
    MoeLayer,
    PerExpertTensor,
    router_tensors,
)
from moeprune_ext.models.patches import ExpertsFunction, intercepted


def slice_(tensors: list[PerExpertTensor], kept: Sequence[int]) -> None:
    for place in tensors:
        old = getattr(place.owner, place.name)
        rows = place.slices(kept, old.shape[place.axis])
        new = old.detach().index_select(place.axis, torch.tensor(rows, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(place.owner, place.name, new)


@dataclass(frozen=True)
class _Counter:
    """An attribute in which `owner` stores the number of experts, or (`trailing` > 0) of all the router's rows."""

    owner: Any
    name: str
    trailing: int


def expert_counters(layer: MoeLayer, modules: list[nn.Module]) -> list[_Counter]:
    names: dict[int, tuple[str, ...]] = {layer.shape.num_experts: EXPERT_COUNT_NAMES}
    if layer.trailing:
        names[layer.router_rows] = (*EXPERT_COUNT_NAMES, *ROW_COUNT_NAMES)
    return [
        _Counter(module, name, total - layer.shape.num_experts)
        for module in modules
        for total, known in names.items()
        for name in known
        if getattr(module, name, None) == total
    ]


def own_config(router: nn.Module, kept: int) -> Any:
    """The configuration that a router reads its expert count from, for it alone."""
    config = copy.copy(router.config)
    for name in EXPERT_COUNT_NAMES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, kept)
    return config


@contextmanager
def masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the layer routes over the kept experts only; afterwards it is as before."""
    tensors = router_tensors(layer)
    before = [getattr(place.owner, place.name) for place in tensors]
    counters = expert_counters(layer, [*layer.router.modules(), layer.block])
    config: Any = getattr(layer.router, "config", None)
    kept_ids = torch.tensor(layer.with_trailing(kept), device=before[0].device)

    def to_stored_ids(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return original(hidden, kept_ids.to(expert_ids.device)[expert_ids], weights)

    try:
        slice_(tensors, kept)
        for counter in counters:
            setattr(counter.owner, counter.name, len(kept) + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = own_config(layer.router, len(kept))
        with intercepted(layer.experts, to_stored_ids):
            yield
    finally:
        for counter in counters:
            setattr(counter.owner, counter.name, layer.shape.num_experts + counter.trailing)
        if type(layer.router).__name__ in READS_CONFIG:
            layer.router.config = config
        for place, tensor in zip(tensors, before, strict=True):
            setattr(place.owner, place.name, tensor)
