"""Forwards replaced for a while, and how many experts are active."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.models.moe import TOP_K_NAMES, MoeLayer

ExpertsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, H], expert ids [T, K], weights [T, K]


def set_active_(layer: MoeLayer, active: int) -> None:
    """Makes the layer's router select so many experts per token, from now on."""
    owners = [(module, name) for module in (layer.router, layer.block) for name in TOP_K_NAMES]
    found = [(owner, name) for owner, name in owners if getattr(owner, name, None) == layer.active]
    if not found:  # read from the configuration at every call: one of its own
        layer.router.config = copy.copy(layer.router.config)
        found = [(layer.router.config, "top_k_experts")]  # type: ignore[list-item]
    for owner, name in found:
        setattr(owner, name, active)


def lowered(value: Any, active: int) -> Any:
    """What stands in a configuration for experts per token, a number or one for each layer, with fewer of them; None
    for anything else."""
    if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
        return [active] * len(value)
    return active if isinstance(value, int) and not isinstance(value, bool) else None


@contextmanager
def fewer_active(layers: Mapping[int, MoeLayer], active: int | None) -> Iterator[None]:
    """Inside, routers select `active` experts per token; None: as many as they do."""
    if active is None:
        yield
        return
    before = {index: (layer.active, getattr(layer.router, "config", None)) for index, layer in layers.items()}
    try:
        for layer in layers.values():
            set_active_(layer, active)
        yield
    finally:
        for index, (top_k, config) in before.items():
            set_active_(layers[index], top_k)
            if config is not None:
                layers[index].router.config = config


@contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module calls `function(original_forward, ...)`."""
    original = module.forward
    shadowed = "forward" in module.__dict__
    module.forward = functools.partial(function, original)
    try:
        yield
    finally:
        if shadowed:
            module.forward = original
        else:
            del module.forward


@contextmanager
def intercepted(
    experts: nn.Module, function: Callable[[ExpertsFunction, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Routes calls of one experts module through `function(original, hidden, expert_ids, weights)` for a while."""
    signature = inspect.signature(type(experts).forward.__get__(experts))  # its own, whatever stands before it now

    def forward(original: ExpertsFunction, *args: Any, **kwargs: Any) -> Tensor:
        hidden, expert_ids, weights = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        return function(original, hidden, expert_ids, weights)

    with replaced_forward(experts, forward):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode, whatever the model and its modules were in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
