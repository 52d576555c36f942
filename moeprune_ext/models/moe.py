"""A model as this package sees it: its MoE layers, found once and carried everywhere.

Nothing here knows a model by name.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.modeling import MAPPED
from moeprune_ext.models.layers import MoeLayer, expert_axis, expert_count, layer_shape, router_tensors, trailing_rows


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


# ---- how its MoE layers are found


def find_moe_layers(model: nn.Module) -> dict[int, MoeLayer]:
    """Finds a model's MoE layers, {decoder layer: MoeLayer}, in order; `MoeModel.of` is where it is called.

    Raises:
        ValueError: when there is none, when a layer's router cannot be told, or when a mask is applied.
    """
    layers: dict[int, MoeLayer] = {}
    for name, experts in model.named_modules():
        if not _is_experts(experts):
            continue
        parent_name, _, experts_name = name.rpartition(".")
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", parent_name)
        if not numbers:
            continue
        index = int(numbers[0])
        if index in layers:
            raise ValueError(
                f"decoder layer {index} has two experts modules ({layers[index].name} and {name}): with several stacks "
                "of experts behind one configuration this model is not supported; where one of them is a language "
                "model of its own, pass that"
            )
        if len(inspect.signature(type(experts).forward).parameters) < 4:  # self, hidden states, expert ids, weights
            raise ValueError(
                f"{name} ({type(experts).__name__}) is not called with hidden states, expert ids and gate weights, so "
                "what it computes for one expert cannot be asked for; this model is not supported"
            )
        block = model.get_submodule(parent_name)
        router_name, router = _find_router(block, experts, parent_name)
        shape = layer_shape(block, router, experts, parent_name)
        trailing = trailing_rows(router, shape.num_experts)
        layers[index] = MoeLayer(index, parent_name, block, router, experts, router_name, experts_name, shape, trailing)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module holds stacked expert weights behind a "
            "router; expert pruning needs an MoE model such as OLMoE, Qwen3-MoE, Mixtral or DeepSeek"
        )
    if len(paths := list_paths(layers)) > 1:
        raise ValueError(
            f"{type(model).__name__} has MoE layers in several stacks ({', '.join(paths)}), of which it cannot be told "
            "which is its language model's; where one of them is a model of its own, pass that"
        )
    return dict(sorted(layers.items()))


def list_paths(layers: Mapping[int, MoeLayer]) -> list[str]:
    """Returns the paths of the lists in which the layers stand."""
    return sorted({re.split(r"(?:^|\.)\d+(?=\.|$)", layer.name)[0] for layer in layers.values()})


def _is_experts(module: nn.Module) -> bool:
    count = expert_count(module)
    return count is not None and any(p.ndim == 3 and p.shape[0] == count for p in module.parameters(recurse=False))


def _find_router(block: nn.Module, experts: nn.Module, name: str) -> tuple[str, nn.Module]:
    count = expert_count(experts)
    assert count is not None
    routers = [
        (child_name, child)
        for child_name, child in block.named_children()
        if child is not experts
        and re.search(r"router|gate", type(child).__name__, re.IGNORECASE)
        and any(expert_axis(t, count, trailing_rows(child, count)) is not None for t in child.parameters())
    ]
    if len(routers) != 1:
        classes = sorted({type(child).__name__ for child in block.children()})
        raise ValueError(
            f"{name} has {len(routers)} routers over its {count} experts (modules: {', '.join(classes)}); either this "
            "model's router is not supported, or a mask is applied to it now"
        )
    return routers[0]
