"""A checkpoint's routers with their stored weights, without the rest of the model."""

from __future__ import annotations

from torch import Tensor, nn

from moeprune_ext.checkpoint.read import Checkpoint, stored_router_tensors
from moeprune_ext.models.layers import router_tensors
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.models.routers import RoutedLayer


def stored_routers(checkpoint: Checkpoint) -> dict[int, RoutedLayer]:
    """Finds how each layer's router can be mapped, with its stored weights, in float32.

    Returns:
        {decoder layer: RoutedLayer}. `spec` is None for a router whose formula is not known, or that has more weights
        than those of experts.
    """
    tensors = stored_router_tensors(checkpoint.shards, checkpoint.roles)
    routers = {}
    for index, layer in checkpoint.layers.items():
        router = layer.router.to_empty(device="cpu").float()
        complete = True
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            stored = tensors.get((index, f"{layer.router_name}.{name}"))
            complete = complete and stored is not None
            if stored is not None:
                tensor.data.copy_(stored)
        for of_block in router_tensors(layer):
            if of_block.owner is layer.block:  # which gives it to the router
                _set(layer.block, of_block.name, tensors[index, of_block.path].float())
        routers[index] = mapped_layer(layer) if complete else RoutedLayer(layer, None, None)
    return routers


def _set(owner: nn.Module, name: str, value: Tensor) -> None:
    """Puts a value in a parameter's or a buffer's place."""
    is_parameter = name in dict(owner.named_parameters(recurse=False))
    setattr(owner, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
