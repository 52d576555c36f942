"""Routing statistics, the one table behind every criterion: the data class and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.files import replacing

FORMAT = "moeprune.stats/1"
RARELY = 32  # tokens below which an expert's averages say little (our choice)


@dataclass(frozen=True)
class RoutingStats:
    """Sums over tokens behind every criterion. The statistics of two data shards add up (`a + b`) to those of both.

    Attributes:
        moments: {decoder layer: float64 [E, 3, 3]}; moments[e, a, b] is the sum of g^a * ||f_e||_2^b over the tokens
            routed to expert e, with gate weight g and expert output f_e.
        max_norm: {decoder layer: float32 [E]}, the largest ||f_e||_2.
        tokens: attended positions seen.
        shapes: {decoder layer: LayerShape}.
        model: fingerprint of the model.
        mtp: the same of multi-token-prediction layers, numbered on from the last decoder layer; None: not gathered.
    """

    moments: dict[int, Tensor]
    max_norm: dict[int, Tensor]
    tokens: int
    shapes: dict[int, LayerShape]
    model: str
    mtp: RoutingStats | None = None

    @property
    def tokens_per_expert(self) -> dict[int, Tensor]:
        """{decoder layer: int64 [E]}, tokens routed to each expert."""
        return {layer: table[:, 0, 0].long() for layer, table in self.moments.items()}

    def rarely_routed(self, fewer_than: int = RARELY) -> dict[int, list[int]]:
        """Returns {decoder layer: ids of experts that fewer tokens were routed to}; layers without any are left out."""
        rare = {i: (tokens < fewer_than).nonzero()[:, 0].tolist() for i, tokens in self.tokens_per_expert.items()}
        return {layer: experts for layer, experts in rare.items() if experts}

    def __add__(self, other: RoutingStats) -> RoutingStats:
        if (self.mtp is None) != (other.mtp is None):
            raise ValueError("cannot add statistics with and without multi-token-prediction layers")
        if self.model != other.model or self.shapes != other.shapes:
            raise ValueError(f"cannot add statistics of different models: {self.model} and {other.model}")
        return RoutingStats(
            {layer: table + other.moments[layer] for layer, table in self.moments.items()},
            {layer: torch.maximum(norm, other.max_norm[layer]) for layer, norm in self.max_norm.items()},
            self.tokens + other.tokens,
            self.shapes,
            self.model,
            None if self.mtp is None or other.mtp is None else self.mtp + other.mtp,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, beside the target and then renamed."""
        tensors: dict[str, Tensor] = {}
        metadata = {"format": FORMAT, "model": self.model}
        for prefix, stats in (("", self), ("mtp.", self.mtp)):
            if stats is not None:
                tensors |= {f"{prefix}moments.{layer}": table for layer, table in stats.moments.items()}
                tensors |= {f"{prefix}max_norm.{layer}": norm for layer, norm in stats.max_norm.items()}
                shapes = {str(layer): shape.recorded() for layer, shape in stats.shapes.items()}
                metadata |= {f"{prefix}tokens": str(stats.tokens), f"{prefix}shapes": json.dumps(shapes)}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Reads statistics; raises ValueError if the file holds none."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} holds no routing statistics (safetensors with format {FORMAT!r})")
                mtp = _read(file, metadata, "mtp.") if "mtp.shapes" in metadata else None
                return replace(_read(file, metadata, ""), mtp=mtp)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable file of routing statistics: {error}") from None


def _read(file: Any, metadata: Mapping[str, str], prefix: str) -> RoutingStats:
    """Reads the statistics whose names begin so from an open file."""
    shapes = {int(k): LayerShape(**v) for k, v in json.loads(metadata[f"{prefix}shapes"]).items()}
    return RoutingStats(
        {layer: file.get_tensor(f"{prefix}moments.{layer}") for layer in shapes},
        {layer: file.get_tensor(f"{prefix}max_norm.{layer}") for layer in shapes},
        int(metadata[f"{prefix}tokens"]),
        shapes,
        metadata["model"],
    )
