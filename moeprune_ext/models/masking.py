"""Puts a pruning mask on an MoE layer and takes it off.

A *mask* slices the router: each of its per-expert tensors (and of its parent block's) is indexed by the kept experts,
its expert count is set, and the ids it returns are translated on their way into the experts. No expert's weights are
touched or copied, and what is computed is what the pruned checkpoint computes.

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

from moeprune_ext.models.layers import (
    EXPERT_COUNT_NAMES,
    READS_CONFIG,
    ROW_COUNT_NAMES,
    MoeLayer,
    PerExpertTensor,
    router_tensors,
)
from moeprune_ext.models.patches import ExpertsFunction, intercepted


def slice_(tensors: list[PerExpertTensor], kept: Sequence[int]) -> None:
    """Replaces tensors by their slices of the kept experts and of what lies beyond the experts."""
    for tensor in tensors:
        old = getattr(tensor.owner, tensor.name)
        rows = tensor.slices(kept, old.shape[tensor.axis])
        new = old.detach().index_select(tensor.axis, torch.tensor(rows, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(tensor.owner, tensor.name, new)


@dataclass(frozen=True)
class Counter:
    """An attribute `owner.name` that counts experts and `trailing` further rows of the router."""

    owner: Any
    name: str
    trailing: int


def expert_counters(layer: MoeLayer, modules: list[nn.Module]) -> list[Counter]:
    """Finds the attributes of some of a layer's modules that count its experts or its router's rows."""
    names: dict[int, tuple[str, ...]] = {layer.shape.num_experts: EXPERT_COUNT_NAMES}
    if layer.trailing:
        names[layer.router_rows] = (*EXPERT_COUNT_NAMES, *ROW_COUNT_NAMES)
    return [
        Counter(module, name, total - layer.shape.num_experts)
        for module in modules
        for total, known in names.items()
        for name in known
        if getattr(module, name, None) == total
    ]


def own_config(router: nn.Module, kept: int) -> Any:
    """Returns a copy of the configuration that a router reads its expert count from, with another count."""
    config = copy.copy(router.config)
    for name in EXPERT_COUNT_NAMES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, kept)
    return config


@contextmanager
def masked(layer: MoeLayer, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the layer routes over the kept experts only; afterwards it is as before."""
    tensors = router_tensors(layer)
    before = [getattr(tensor.owner, tensor.name) for tensor in tensors]
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
        for tensor, old in zip(tensors, before, strict=True):
            setattr(tensor.owner, tensor.name, old)
