"""What a model costs under a plan: experts stored, bytes of weights and of its KV cache, and operations per token.

Two savings are told apart: fewer experts stored, which is memory, and fewer of them active per token, which is
arithmetic. Only the sizes of tensors are read, so a model without weights (meta device) will do. The other way round,
`experts_that_fit` says how many experts a given memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.models.layers import MoeLayer, expert_tensors, router_tensors
from moeprune_ext.models.moe import MoeModel, plain_model, text_config

CONTEXT = 4096  # tokens of the sequence whose KV cache has to fit, unless a user says otherwise (our choice)
SIZES = {f"{letter}{end}": base**i for i, letter in enumerate("kmgt", 1) for end, base in (("b", 1000), ("ib", 1024))}
NO_KEYS = ("linear_attention", "conv", "mamba", "moe", "mlp")  # types of layers that hold no keys
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


@dataclass(frozen=True)
class StoredBytes:
    """What weights take as they are stored, where that is not what the model's dtype says: quantised ones.

    Attributes:
        total: bytes of all.
        experts: {decoder layer: bytes of one expert, its rows of the router included}.
    """

    total: int
    experts: dict[int, float]


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


def kv_cache_bytes(model: nn.Module | MoeModel, context: int) -> int:
    """Returns the bytes of the keys and values that attention keeps of one sequence, in the model's dtype.

    By the configuration, as transformers caches them: per token and layer 2 x num_key_value_heads x head_dim numbers,
    or kv_lora_rank + qk_rope_head_dim where attention is latent (MLA). A layer with a sliding window or chunks holds at
    most that many tokens, a layer without attention none. Approximate: the state of linear attention and convolutions,
    which does not grow with the text, and the keys of sparse attention's indexers are left out; what a runtime rounds
    up to blocks, too. What no common name in a configuration tells is not seen: DeepSeek-V4 compresses its keys and
    holds less than is counted; MiMo-V2's sliding layers have twice as many heads and hold more, in their window.

    Args:
        model: a transformers model, or the MoeModel made of it; on the meta device, too.
        context: tokens of the sequence.
    """
    config = text_config(model)
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [None] * count
    numbers = 0
    for kind, layer in zip(types, getattr(config, "per_layer_config", None) or [config] * count, strict=True):
        if kind not in NO_KEYS:
            bounded = kind is None or "sliding" in kind or "chunked" in kind
            windows = [getattr(layer, name, None) for name in ("sliding_window", "attention_chunk_size")]
            held = min([context, *(window for window in windows if window and bounded)])
            numbers += held * _key_value_width(layer)
    weight: Tensor = plain_model(model).get_input_embeddings().weight
    return numbers * weight.element_size()


def _key_value_width(config: Any) -> int:
    """Returns the numbers that one token adds to the cache of a layer with this configuration."""
    if latent := getattr(config, "kv_lora_rank", None):
        return int(latent + config.qk_rope_head_dim)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    key = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads * (key + (getattr(config, "v_head_dim", None) or key)))


def experts_that_fit(
    model: nn.Module | MoeModel,
    size: int,
    *,
    context: int = CONTEXT,
    shapes: Mapping[int, LayerShape] | None = None,
    stored: StoredBytes | None = None,
) -> int:
    """Returns the largest number of experts, over all layers, whose model fits into a memory with its KV cache.

    Every pruning plan of that many experts fits, whatever layers they stand in; where experts of layers differ in size,
    it is counted with the largest. Activations and a runtime's own memory are not counted: leave room for them.

    Args:
        model: a transformers model, or the MoeModel made of it; on the meta device, too. Weights count in its dtypes.
        size: bytes.
        context: tokens of one sequence, see `kv_cache_bytes`.
        shapes: {decoder layer: LayerShape} with the limits of every plan (`ExpertScores.shapes`); None: the routers'.
        stored: what the weights take instead.

    Raises:
        ValueError: if the fewest experts that can stay do not fit, with the bytes that they need.
    """
    moe = MoeModel.of(model)
    limits = moe.shapes if shapes is None else shapes
    kept = sum(limits[index].least_kept for index in moe.layers)
    cache = kv_cache_bytes(moe, context)
    weights: float = costs(moe).bytes if stored is None else stored.total
    units: list[tuple[float, int]] = []
    for index, layer in moe.layers.items():
        shape = limits[index]
        unit: float = _layer_bytes(layer, shape.unit, False) - _layer_bytes(layer, 0, False)
        expert = unit / shape.unit if stored is None else stored.experts[index]
        weights -= (shape.num_experts - shape.least_kept) * expert
        one = expert * shape.unit
        units += [(one, shape.unit)] * ((shape.most_kept - shape.least_kept) // shape.unit)
    if weights + cache > size:
        raise ValueError(
            f"{size / 2**30:,.4g} GiB do not hold the model: with the fewest experts that can stay ({kept}) its "
            f"weights take {weights / 2**30:,.4g} GiB and the KV cache of {context:,} tokens {cache / 2**30:,.4g} GiB"
        )
    left = size - weights - cache
    for one, experts in sorted(units, reverse=True):
        left -= one
        if left < 0:
            break
        kept += experts
    return kept


def expert_weights(layer: MoeLayer) -> int:
    """Returns the weights of the matrices of one expert of a layer."""
    return sum(prod(t.shape[1:]) for t, _ in _places(layer, False) if t.ndim > 2)


def head_weights(model: nn.Module | MoeModel) -> int:
    """Returns the weights of the embedding and of the head, a shared one once."""
    whole = MoeModel.of(model).model
    ends = [whole.get_input_embeddings(), whole.get_output_embeddings()]
    return sum({id(end.weight): end.weight.numel() for end in ends if end is not None}.values())


def bytes_of(size: str) -> int:
    """Returns the bytes of a size with its unit: "24GiB" (of 2^30 bytes), "24GB" (of 10^9), "16000 MiB".

    Raises:
        ValueError: for anything else; also for a number without a unit, which may be meant as bytes or as gigabytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", size.strip().lower())
    if match is None or match[2] not in SIZES or (number := float(match[1]) * SIZES[match[2]]) < 1:
        raise ValueError(f"{size!r} is not a size with a unit, such as 24GiB, 24GB or 16000MiB")
    return int(number)


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
    one = expert_weights(layer)
    matrices = [(t, axis) for t, axis in _places(layer, True) if min(t.shape) > 1 and t.ndim > 1]
    router = sum(_part(t, axis, 0 if mapped else count - kept) for t, axis in matrices)
    return router + active * one + (kept * count if mapped else 0)
