"""What the plugins of serving runtimes share: the layers of an export, and the configuration while one is built.

A plugin wraps its runtime's function that builds decoder layers from one configuration. While layer i is built, the
configuration's expert counts are what the export records of layer i; afterwards they are the original ones again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from moeprune_ext.modeling import CONFIG_KEY
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES


@dataclass
class Layer:
    """A layer as recorded.

    Attributes:
        index: of the decoder layer.
        count: experts stored.
        rule: of a mapped router; None where the router has one row for each expert.
        router: the router, once the layer is there.
        config: that the layer is built from.
    """

    index: int
    count: int
    rule: Mapping[str, Any] | None
    router: Any = None
    config: Any = None

    @property
    def scored(self) -> int:
        """Experts that the router scores."""
        return self.count if self.rule is None else int(self.rule["experts"])


building: ContextVar[Layer | None] = ContextVar("moeprune_building", default=None)


def recorded_layers(hf_config: Any, text_config: Any) -> dict[int, Layer]:
    """Reads {decoder layer: Layer} from a configuration; {} for models that are no such export.

    Args:
        hf_config: of the whole model.
        text_config: that its decoder layers are built from.
    """
    record = getattr(hf_config, CONFIG_KEY, None) or {}
    rules = {index_of(path): rule for path, rule in record.get("routers", {}).items()}
    counts = {int(index): int(count) for index, count in record.get("kept_per_layer", {}).items()}
    return {index: Layer(index, count, rules.get(index), config=text_config) for index, count in counts.items()}


def index_of(path: str) -> int:
    """Returns the number of the decoder layer in a module's path, -1 if there is none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


@contextmanager
def own_counts(layer: Layer, copies: Sequence[Any] = ()) -> Iterator[None]:
    """Inside, the configuration says how many experts the layer's router scores, and `building` is the layer.

    Args:
        layer: to be built.
        copies: of the configuration, of which the layer may be built in its place.
    """
    before = [(config, counts_of(config)) for config in (layer.config, *copies)]
    token = building.set(layer)
    try:
        for config, counts in before:
            for name in counts:
                setattr(config, name, layer.scored)
        yield
    finally:
        for config, counts in reversed(before):  # the same one may be there twice
            for name, count in counts.items():
                setattr(config, name, count)
        building.reset(token)


def counts_of(config: Any) -> dict[str, int]:
    """Returns {name: number} of what a configuration says of its experts' number; {} if it has none."""
    return {name: getattr(config, name) for name in EXPERT_COUNT_NAMES if isinstance(getattr(config, name, None), int)}


@functools.cache  # once
def warn_of_version(logger: logging.Logger, runtime: str, version: str, tried: tuple[str, ...]) -> None:
    """Says so where a runtime's version is another than was tried."""
    if not version.startswith(tuple(f"{one}." for one in tried)):
        logger.warning(
            "moeprune_ext's plugin was tried with %s %s, this is %s: compare a few answers with transformers'",
            runtime,
            ", ".join(tried),
            version,
        )
