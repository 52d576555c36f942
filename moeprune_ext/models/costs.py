"""What a model costs under a plan: experts stored, bytes of weights, and floating-point operations per token.

Two savings are told apart: fewer experts stored, which is memory, and fewer of them active per token, which is
arithmetic. Only the sizes of tensors are read, so a model without weights (meta device) will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.models.layers import MoeLayer, expert_tensors, router_tensors
from moeprune_ext.models.moe import MoeModel

MAP_BYTES = 4  # of an entry of a router's map, and of a bias mapped by it: float32 in a model of any dtype


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        experts: routed experts stored, over all layers.
        bytes: of parameters and of buffers that are stored, shared ones once.
        flops_per_token: 2 x the weights of the matrices that one token passes; see `costs`.
    """

    experts: int
    bytes: int
    flops_per_token: int


def costs(model: nn.Module | MoeModel, plan: PruningPlan | None = None) -> Costs:
    """Returns the costs of the model under a plan, or as it is.

    FLOPs per token: 2 x the weights of every matrix (two axes or more, no bias) outside of experts, without embeddings,
    which are looked up, and with the head, be it the embedding's or its own; of each layer's router the rows that are
    left, or all of them and its map; and `top_k`, or the plan's `active`, experts of it. Of a multimodal model all
    matrices count, those of its towers too. Left out: attention's products of tokens with tokens, which grow with the
    text's length, and what is not a matrix product.

    Args:
        model: a transformers model, or the MoeModel made of it; on the meta device, too.
        plan: None: the model as it is.

    Raises:
        ValueError: for a model without MoE layers and for a plan of layers that it does not have.
    """
    moe = MoeModel.of(model)
    layers, whole = moe.layers, moe.model
    counts = {index: layer.shape.num_experts for index, layer in layers.items()}
    if plan is not None:
        if unknown := sorted(set(plan.kept) - set(layers)):
            raise ValueError(f"the plan names layers {unknown}, but the model's MoE layers are {sorted(layers)}")
        counts |= {index: len(ids) for index, ids in plan.kept.items()}
    mapped = plan.mapped_layers if plan is not None else []
    planned = [(layers[index], count, index in mapped) for index, count in counts.items()]
    per_expert = {id(t) for layer in layers.values() for router in (True, False) for t, _ in _places(layer, router)}
    stored = {id(tensor): tensor for tensor in _stored(whole)}.values()
    active = plan.active if plan is not None else None
    no_matrix = {id(module.weight) for module in whole.modules() if isinstance(module, nn.Embedding)}
    for module in whole.modules():  # a bias may have an axis of one in front
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        no_matrix |= {id(tensor) for name, tensor in tensors if name.endswith("bias")}
    apart = per_expert | no_matrix
    dense = sum(t.numel() for t in stored if t.ndim > 1 and t.is_floating_point() and id(t) not in apart)
    head = whole.get_output_embeddings()
    if head is not None and id(head.weight) in no_matrix:
        dense += head.weight.numel()
    return Costs(
        sum(counts.values()),
        sum(t.nbytes for t in stored if id(t) not in per_expert) + sum(_layer_bytes(*layer) for layer in planned),
        2 * (dense + sum(_layer_weights(*layer, active or layer[0].shape.top_k) for layer in planned)),
    )


def _stored(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _places(layer: MoeLayer, of_router: bool) -> list[tuple[Tensor, int]]:
    """The stored tensors with a slice per expert, and the axis of these slices."""
    places = router_tensors(layer) if of_router else expert_tensors(layer)
    stored = [place for place in places if place.name not in place.owner._non_persistent_buffers_set]
    return [(getattr(place.owner, place.name), place.axis) for place in stored]


def _part(tensor: Tensor, axis: int, gone: int) -> int:
    """Elements that are left without so many slices."""
    return tensor.numel() // tensor.shape[axis] * (tensor.shape[axis] - gone)


def _layer_bytes(layer: MoeLayer, kept: int, mapped: bool) -> int:
    count = layer.shape.num_experts
    experts = sum(t.element_size() * _part(t, axis, count - kept) for t, axis in _places(layer, False))
    gone = 0 if mapped else count - kept  # a mapped router scores all experts
    router = sum(t.element_size() * _part(t, axis, gone) for t, axis in _places(layer, True))
    biases = sum("correction_bias" in place.name for place in router_tensors(layer))
    return experts + router + (MAP_BYTES * kept * (count + biases) if mapped else 0)


def _layer_weights(layer: MoeLayer, kept: int, mapped: bool, active: int) -> int:
    """Weights that a token passes in a layer's router and experts."""
    count = layer.shape.num_experts
    one = sum(prod(t.shape[1:]) for t, _ in _places(layer, False) if t.ndim > 2)
    matrices = [(t, axis) for t, axis in _places(layer, True) if min(t.shape) > 1 and t.ndim > 1]
    router = sum(_part(t, axis, 0 if mapped else count - kept) for t, axis in matrices)
    return router + active * one + (kept * count if mapped else 0)
