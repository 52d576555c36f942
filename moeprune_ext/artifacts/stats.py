"""Routing statistics, the one table behind every criterion: the data class and its file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

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
    """

    moments: dict[int, Tensor]
    max_norm: dict[int, Tensor]
    tokens: int
    shapes: dict[int, LayerShape]
    model: str

    @property
    def tokens_per_expert(self) -> dict[int, Tensor]:
        """{decoder layer: int64 [E]}, tokens routed to each expert."""
        return {layer: table[:, 0, 0].long() for layer, table in self.moments.items()}

    def rarely_routed(self, fewer_than: int = RARELY) -> dict[int, list[int]]:
        """Returns {decoder layer: ids of experts that fewer tokens were routed to}; layers without any are left out."""
        rare = {i: (tokens < fewer_than).nonzero()[:, 0].tolist() for i, tokens in self.tokens_per_expert.items()}
        return {layer: experts for layer, experts in rare.items() if experts}

    def __add__(self, other: RoutingStats) -> RoutingStats:
        if self.model != other.model or self.shapes != other.shapes:
            raise ValueError(f"cannot add statistics of different models: {self.model} and {other.model}")
        return RoutingStats(
            {layer: table + other.moments[layer] for layer, table in self.moments.items()},
            {layer: torch.maximum(norm, other.max_norm[layer]) for layer, norm in self.max_norm.items()},
            self.tokens + other.tokens,
            self.shapes,
            self.model,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, beside the target and then renamed."""
        tensors = {f"moments.{layer}": table for layer, table in self.moments.items()}
        tensors |= {f"max_norm.{layer}": norm for layer, norm in self.max_norm.items()}
        shapes = {str(layer): shape.recorded() for layer, shape in self.shapes.items()}
        metadata = {"format": FORMAT, "model": self.model, "tokens": str(self.tokens), "shapes": json.dumps(shapes)}
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
                shapes = {int(k): LayerShape(**v) for k, v in json.loads(metadata["shapes"]).items()}
                moments = {layer: file.get_tensor(f"moments.{layer}") for layer in shapes}
                max_norm = {layer: file.get_tensor(f"max_norm.{layer}") for layer in shapes}
                tokens, model = int(metadata["tokens"]), metadata["model"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable file of routing statistics: {error}") from None
        return cls(moments, max_norm, tokens, shapes, model)
