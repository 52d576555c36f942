"""What a layer's router answers, and one layer under many masks at once: each row is routed under its own mask.

Where a router's formula is known as a RouterSpec, all rows go through one call of `masked_router`; elsewhere the
router is sliced for each mask (layers.py) and given the rows of that mask. The formula is not looked up by the
router's name: `fit_spec` tries the specifications that its tensors allow until one gives the router's own answers.
Rows whose experts tie at the edge of the top-k may go to another of the tied experts, so "auto" takes the kernel only
for routers that compute their logits in float32; half-precision logits tie often.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune_ext.modeling import router_weight
from moeprune_ext.models.layers import MoeLayer, half_kept, masked, router_tensors
from moeprune_ext.models.patches import ExpertsFunction, intercepted, replaced_forward
from moeprune_ext.ops.masked_router import masked_router
from moeprune_ext.ops.reference import SCORES, RouterSpec

ROUTERS = ("auto", "fused", "sliced")


Kept = tuple[int, ...]  # ascending ids of the experts that a mask keeps


def probe(layer: MoeLayer, rows: int) -> Tensor:
    """Returns random hidden states [rows, H] on which a router can be tried; always the same."""
    weight = router_weight(layer.router)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)


def router_answer(layer: MoeLayer, hidden: Tensor) -> tuple[Tensor, ...] | None:
    """Returns the tensors that a layer's router answers; None where they cannot be had.

    A router that wants more than hidden states (its parent's correction bias, another shape) is called by its parent.

    Args:
        layer: of a model.
        hidden: [T, H].
    """
    answers: list[Any] = []

    def no_experts(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    with torch.no_grad():
        try:
            answers.append(layer.router(hidden))
        except (TypeError, RuntimeError, IndexError, ValueError):
            hook = layer.router.register_forward_hook(lambda module, inputs, output: answers.append(output))
            try:
                with intercepted(layer.experts, no_experts):
                    layer.block(hidden[None])
            except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
                return None
            finally:
                hook.remove()
    answer = answers[0] if answers else None
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return tuple(part for part in parts if isinstance(part, Tensor)) or None


@dataclass(frozen=True)
class RoutedLayer:
    """How to route one layer's rows under many masks.

    Attributes:
        layer: of a model.
        places: numbers of logits, weights and ids in the tuple that the router answers; None: it answers otherwise, and
            the whole block is run mask by mask.
        spec: the router's formula for the fused kernel; None: the router is sliced.
        logits_dtype: of the router's matrix product.
    """

    layer: MoeLayer
    places: tuple[int, int, int] | None
    spec: RouterSpec | None
    logits_dtype: torch.dtype | None = None

    @property
    def way(self) -> str:
        """How rows are routed, in words."""
        return "fused" if self.spec is not None else "sliced" if self.places is not None else "block by block"


def routed_layer(layer: MoeLayer, router: str = "auto") -> RoutedLayer:
    """Finds how a layer's router can be run under many masks.

    Args:
        layer: of a model.
        router: "auto", "fused" (wherever a specification fits, half-precision logits included) or "sliced".
    """
    by_itself = RoutedLayer(layer, None, None)
    hidden = probe(layer, 64)
    answer = router_answer(layer, hidden)
    places = None if answer is None else _places(answer, layer)
    if answer is None or places is None:
        return by_itself
    logits = answer[places[0]]
    spec = None
    # The kernel answers three parts; a router's further ones may be looked at.
    if len(answer) == 3 and (router == "fused" or (router == "auto" and logits.dtype == torch.float32)):
        spec = fit_spec(layer, places, hidden, answer)
        if spec is not None and (dtype := _weights_dtype(layer, places, hidden)) != torch.float32:
            spec = replace(spec, weights_dtype=dtype)
    if spec is None and not _takes_hidden_alone(layer.router):
        return by_itself
    return RoutedLayer(layer, places, spec, logits.dtype)


def _weights_dtype(layer: MoeLayer, places: tuple[int, int, int], hidden: Tensor) -> torch.dtype:
    """Returns the dtype of the weights that the router gives the experts.

    A router may compute in float32 in a model that does not.
    """
    dtype = next((p.dtype for p in layer.experts.parameters() if p.is_floating_point()), hidden.dtype)
    answer = router_answer(layer, hidden.to(dtype))
    return torch.float32 if answer is None else answer[places[1]].dtype


def _takes_hidden_alone(router: nn.Module) -> bool:
    """Tells whether a router is given hidden states only; what else a block passes on may count experts, too."""
    return len(inspect.signature(type(router).forward).parameters) == 2  # self and the hidden states


def _places(answer: tuple[Tensor, ...], layer: MoeLayer) -> tuple[int, int, int] | None:
    """Finds the numbers of logits [T, E], weights [T, K] and ids [T, K] in a router's answer."""
    count, top_k = layer.shape.num_experts, layer.active

    def of_width(width: int, floating: bool) -> list[int]:
        return [i for i, t in enumerate(answer) if t.shape[-1] == width and t.is_floating_point() == floating]

    logits, weights, ids = of_width(count, True), of_width(top_k, True), of_width(top_k, False)
    if not logits and layer.trailing:
        logits = of_width(layer.router_rows, True)
    if count == top_k and len(weights) == 2:  # every expert is chosen: by the order that all routers of this kind have
        logits, weights = weights[:1], weights[1:]
    return (logits[0], weights[0], ids[0]) if len(logits) == len(weights) == len(ids) == 1 else None


def router_logits(layer: MoeLayer, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the router's matrix product, [T, H] -> [T, E]."""
    bias = getattr(layer.router, "bias", None)
    bias = bias.to(dtype) if isinstance(bias, Tensor) else None
    return F.linear(hidden.to(dtype), router_weight(layer.router).to(dtype), bias)


def fit_spec(
    layer: MoeLayer, places: tuple[int, int, int], hidden: Tensor, answer: tuple[Tensor, ...]
) -> RouterSpec | None:
    """Finds the RouterSpec that gives a router's answers, with all experts and with half of them.

    Args:
        layer: of a model.
        places: see RoutedLayer.
        hidden: [T, H].
        answer: the router's, on `hidden`.

    Returns:
        None where no specification does.
    """
    logits, weights, ids = (answer[place] for place in places)
    if router_weight(layer.router).shape[0] != layer.shape.num_experts:
        return None
    if not torch.allclose(router_logits(layer, hidden, logits.dtype), logits, rtol=1e-5, atol=1e-6):
        return None
    half = tuple(half_kept(layer))
    with masked(layer, half):
        sliced = router_answer(layer, hidden)
    if sliced is None:
        return None
    kept = torch.tensor(half, device=ids.device)
    for spec in _specs(layer, weights.dtype):
        try:
            fits = _agree(_fused(spec, logits, layer, None), (ids, weights)) and _agree(
                _fused(spec, logits, layer, half), (kept[sliced[places[2]]], sliced[places[1]])
            )
        except ValueError:
            continue
        if fits:
            return spec
    return None


def _specs(layer: MoeLayer, weights_dtype: torch.dtype) -> Iterator[RouterSpec]:
    """Yields the specifications that a router with these tensors and numbers may have, simpler ones first."""
    router, block = layer.router, layer.block
    biases = [getattr(t.owner, t.name) for t in router_tensors(layer) if "correction_bias" in t.name]
    scales = [1.0] + [
        float(value)
        for module in (router, block)
        for name in ("routed_scaling_factor", "scaling_factor", "route_scale")
        if isinstance(value := getattr(module, name, None), int | float)
    ]
    groups: list[dict[str, Any]] = [{}]
    if layer.shape.n_group > 1:
        topk_group = next(v for m in (router, block) if isinstance(v := getattr(m, "topk_group", None), int))
        names = ("max", "top2_sum")
        groups = [{"n_group": layer.shape.n_group, "topk_group": topk_group, "group_score": name} for name in names]
    rounded = None if weights_dtype == torch.float32 else weights_dtype
    for score, renormalize, scale, bias, group in product(
        SCORES, (False, True), dict.fromkeys(scales), [*[b.flatten() for b in biases], None], groups
    ):
        yield RouterSpec(
            score=score,
            renormalize=renormalize,
            eps=1e-20 if renormalize and score == "sigmoid" else 0.0,
            scale=scale,
            correction_bias=bias,
            weights_dtype=rounded,
            **group,
        )


def _fused(spec: RouterSpec, logits: Tensor, layer: MoeLayer, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """Routes logits [T, E] by the kernel, over the kept experts or all: ids and weights [T, K]."""
    keep = torch.ones(1, layer.shape.num_experts, dtype=torch.bool, device=logits.device)
    if kept is not None:
        keep[:] = False
        keep[0, list(kept)] = True
    ids, weights = masked_router(logits, top_k=layer.active, keep=keep, spec=spec)
    return ids[0], weights[0]


def _agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Tells whether two (ids, weights) [T, K] choose the same experts with the same weights on nearly all rows."""
    dense = []
    for ids, weights in (a, b):
        table = torch.zeros(len(ids), int(max(a[0].max(), b[0].max())) + 1, dtype=torch.float32, device=ids.device)
        dense.append(table.scatter_(1, ids, weights.float()))
    tolerance = 1e-5 if b[1].dtype == torch.float32 else 1e-2
    rows = ((dense[0] - dense[1]).abs() <= tolerance * dense[1].abs().amax(-1, keepdim=True)).all(-1)
    return float(rows.float().mean()) >= (0.99 if b[1].dtype == torch.float32 else 0.8)


@contextmanager
def many_masks(routed: RoutedLayer, masks: Sequence[Kept], of_state: Tensor) -> Iterator[None]:
    """Inside, the layer's block takes M states [M, S, H] and routes each under its own mask.

    The experts see all rows in one call, except where the block runs mask by mask.

    Args:
        routed: the layer.
        masks: kept experts.
        of_state: int64 [M], on the CPU: each state's mask.
    """
    layer = routed.layer
    full = tuple(range(layer.shape.num_experts))
    if len(masks) == 1:  # one mask for all is what masked() is for; none at all is the model as it is
        if masks[0] == full:
            yield
        elif routed.spec is None:
            with masked(layer, masks[0]):
                yield
        else:
            with replaced_forward(layer.router, _route(routed, masks, of_state)):
                yield
    elif routed.places is not None:
        with replaced_forward(layer.router, _route(routed, masks, of_state)):
            yield
    else:
        with replaced_forward(layer.block, _mask_by_mask(layer, masks, of_state)):
            yield


def _route(routed: RoutedLayer, masks: Sequence[Kept], of_state: Tensor) -> Any:
    """Makes the router's forward in which every state's rows are routed under its own mask."""
    assert routed.places is not None
    layer, states = routed.layer, len(of_state)
    place_of_logits, place_of_weights, place_of_ids = routed.places

    def fused(original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        assert routed.spec is not None and routed.logits_dtype is not None
        logits = router_logits(layer, hidden.reshape(-1, hidden.shape[-1]), routed.logits_dtype)
        keep = torch.zeros(len(masks), layer.shape.num_experts, dtype=torch.bool)
        for mask, kept in enumerate(masks):
            keep[mask, list(kept)] = True
        assigned = of_state.repeat_interleave(len(logits) // states).to(logits.device)
        ids, weights = masked_router(
            logits, top_k=layer.active, keep=keep.to(logits.device), assigned=assigned, spec=routed.spec
        )
        answer: list[Tensor] = [logits] * 3
        answer[place_of_weights] = weights.to(routed.spec.weights_dtype or weights.dtype)
        answer[place_of_ids] = ids
        return tuple(answer)

    def sliced(original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        by_state = hidden.reshape(states, -1, hidden.shape[-1])
        answer: list[Tensor] = []
        for mask, kept in enumerate(masks):
            members = (of_state == mask).nonzero()[:, 0].to(hidden.device)
            with masked(layer, kept):
                # masked() replaces the experts' forward, not the router's: this calls the sliced router itself.
                part = list(original(by_state[members].flatten(0, 1), *args, **kwargs))
            rows = torch.tensor(layer.with_trailing(kept), device=hidden.device)
            part[place_of_ids] = rows[part[place_of_ids]]
            part[place_of_logits] = part[place_of_weights]  # of another width for every mask, and not looked at
            if not answer:
                answer = [p.new_empty(states, by_state.shape[1], p.shape[-1]) for p in part]
            for whole, piece in zip(answer, part, strict=True):
                whole[members] = piece.view(len(members), -1, piece.shape[-1])
        return tuple(whole.flatten(0, 1) for whole in answer)

    return fused if routed.spec is not None else sliced


def _mask_by_mask(layer: MoeLayer, masks: Sequence[Kept], of_state: Tensor) -> Any:
    """Makes the block's forward in which the states of one mask after the other go through the masked block."""

    def forward(original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer: list[Tensor] = []
        is_tuple = False
        for mask, kept in enumerate(masks):
            members = (of_state == mask).nonzero()[:, 0].to(hidden.device)
            with masked(layer, kept):
                part = original(hidden[members], *args, **kwargs)
            is_tuple = isinstance(part, tuple)
            part = part[:1] if is_tuple else (part,)  # of further outputs, a decoder layer uses none
            if not answer:
                answer = [p.new_empty(len(of_state), *p.shape[1:]) for p in part]
            for whole, piece in zip(answer, part, strict=True):
                whole[members] = piece
        return (*answer, None) if is_tuple else answer[0]

    return forward
