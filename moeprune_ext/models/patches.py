"""Forwards replaced for a while."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ExpertsFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, H], expert ids [T, K], weights [T, K]
Observe = Callable[[ExpertsFunction, Tensor, Tensor, Tensor], Tensor]  # that function, and what it is called with


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
def intercepted(experts: nn.Module, function: Observe) -> Iterator[None]:
    """Inside, calling an experts module calls `function(original, hidden, expert_ids, weights)`."""
    signature = inspect.signature(type(experts).forward.__get__(experts))  # its own, whatever stands before it now

    def forward(original: ExpertsFunction, *args: Any, **kwargs: Any) -> Tensor:
        hidden, expert_ids, weights = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        return function(original, hidden, expert_ids, weights)

    with replaced_forward(experts, forward):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, there are no gradients and all modules are in eval mode; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
