"""How many experts are active per token: fewer of them for a while, or for good."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moeprune_ext.models.layers import TOP_K_NAMES, MoeLayer


def set_active_(layer: MoeLayer, active: int) -> None:
    """Makes the layer's router select `active` experts per token, from now on."""
    owners = [(module, name) for module in (layer.router, layer.block) for name in TOP_K_NAMES]
    counters = [(owner, name) for owner, name in owners if getattr(owner, name, None) == layer.active]
    if not counters:  # the router reads its configuration at every call: it gets one of its own
        layer.router.config = copy.copy(layer.router.config)
        counters = [(layer.router.config, "top_k_experts")]  # type: ignore[list-item]
    for owner, name in counters:
        setattr(owner, name, active)


def lowered(value: Any, active: int) -> Any:
    """Returns a configuration's value for experts per token with fewer of them; None for anything else.

    Args:
        value: a number, or a list of one for each layer.
        active: experts per token.
    """
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
