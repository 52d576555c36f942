"""A model as this package sees it: found once, carried everywhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.stats import LayerShape
from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.layers import MoeLayer, find_moe_layers, list_paths, router_tensors


def plain_model(model: Any) -> Any:
    """Returns the transformers model of a MoeModel, or of itself."""
    return model.model if isinstance(model, MoeModel) else model


def text_config(model: Any) -> Any:
    """Returns the configuration of a model's language part; `model` is a transformers model or a MoeModel."""
    return plain_model(model).config.get_text_config()


@dataclass(frozen=True, eq=False)
class MoeModel:
    """A transformers model and what this package knows of it, found once and carried everywhere.

    It describes the model as it was found: after `prune_` a new one is to be made.

    Attributes:
        model: the transformers model.
        layers: {decoder layer: MoeLayer}, in order.
    """

    model: Any
    layers: dict[int, MoeLayer]

    @classmethod
    def of(cls, model: Any) -> MoeModel:
        """Finds the MoE layers of a transformers model; a MoeModel is returned as it is.

        Raises:
            ValueError: for a model without MoE layers, and as `find_moe_layers`.
        """
        return model if isinstance(model, MoeModel) else cls(model, find_moe_layers(model))

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model by its type and its routers' weights, whatever dtype or device they are loaded in.

        The sign bits of all router weights are hashed: a conversion between float32, bfloat16 and float16 keeps them.
        Of a mapped router (modeling.py) the maps are hashed in full; they stay float32. Two checkpoints that differ
        only outside their routers look the same.
        """
        digest = hashlib.sha256()
        for index, layer in self.layers.items():
            for tensor in router_tensors(layer):
                update_fingerprint(digest, index, getattr(tensor.owner, tensor.name), exact=tensor.name in MAPPED)
        return fingerprint_text(text_config(self.model).model_type, digest)

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """{decoder layer: what pruning must respect there}."""
        return {index: layer.shape for index, layer in self.layers.items()}

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        size: int = text_config(self.model).vocab_size
        return size

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def stream(self) -> Any:
        """The LayerStream that brings layers to the device (checkpoint/streaming.py); None where all weights are
        there."""
        return getattr(self.model, "moeprune_stream", None)

    def make_resident(self, layer: int) -> None:
        """Brings a decoder layer's weights to the device, where the model's layers are streamed."""
        if self.stream is not None:
            self.stream.make_resident(layer)


def decoder_layers(moe: MoeModel) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of the model's decoder layers, dense ones included.

    Raises:
        ValueError: when the MoE layers do not stand in one list.
    """
    layers = moe.layers
    paths = list_paths(layers)
    stack = moe.model.get_submodule(path) if len(paths) == 1 and (path := paths[0]) else None
    if not isinstance(stack, nn.ModuleList) or max(layers) >= len(stack):
        raise ValueError(f"its MoE layers do not stand in one list of decoder layers but in {', '.join(sorted(paths))}")
    return path, stack


def update_fingerprint(digest: Any, index: int, tensor: Tensor, exact: bool = False) -> None:
    if tensor.is_meta:
        raise ValueError("the model's weights are not loaded (meta device)")
    tensor = tensor.detach()
    values = tensor.to("cpu", torch.float32) if exact else torch.signbit(tensor).to("cpu", torch.uint8)
    digest.update(f"{index}:{tuple(tensor.shape)}".encode() + values.numpy().tobytes())


def fingerprint_text(model_type: str, digest: Any) -> str:
    return f"{model_type}:{digest.hexdigest()[:16]}"
