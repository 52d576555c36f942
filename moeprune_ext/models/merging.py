"""Layers with merged experts and a mapped router (merged_plan.py), for as long as they are evaluated.

The new weights exist while the layer runs, in one buffer that all merges of a search share: at most one layer's
experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.merged_plan import Merge
from moeprune_ext.models.experts import PairOutputs, distinct_pairs, weighted_sum
from moeprune_ext.models.moe import EXPERT_COUNT_NAMES, MoeLayer, expert_tensors
from moeprune_ext.models.patches import ExpertsFunction, fewer_active, intercepted, replaced_forward
from moeprune_ext.models.probing import half_kept
from moeprune_ext.models.routers import Kept, RoutedLayer, routed_layer, router_logits
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.ops.masked_router import masked_router


def weighted_average(weights: Mapping[int, Tensor], shares: Mapping[int, float]) -> Tensor:
    """sum over e of shares[e] * weights[e], in float32 or better, in the dtype of the weights."""
    dtype = next(iter(weights.values())).dtype
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([weights[expert].to(wide) * share for expert, share in shares.items()]).sum(0).to(dtype)


Replaced = list[tuple[Tensor, dict[int, Tensor]]]  # tensors, and the slices of experts that stood there


def merge_sums_(layer: MoeLayer, sums: Mapping[int, Mapping[int, float]], before: Replaced) -> None:
    """Replaces kept experts' weights by sums of experts'; what stood there is added to `before` first."""
    for place in expert_tensors(layer):
        tensor = getattr(place.owner, place.name).detach()
        new = {expert: weighted_average({e: tensor[e] for e in shares}, shares) for expert, shares in sums.items()}
        before.append((tensor, {expert: tensor[expert].clone() for expert in sums}))
        for expert, weight in new.items():
            tensor[expert] = weight


@contextmanager
def restored(before: Replaced, always: bool) -> Iterator[None]:
    """Puts back what `before` holds at the end: always, or after an exception only."""
    done = False
    try:
        yield
        done = True
    finally:
        for tensor, slices in before if always or not done else ():
            for expert, weight in slices.items():
                tensor[expert] = weight


@contextmanager
def _merged(layer: MoeLayer, sums: Mapping[int, Mapping[int, float]]) -> Iterator[None]:
    before: Replaced = []
    with restored(before, always=True):
        merge_sums_(layer, sums, before)
        yield


CHUNK_BYTES = 64 * 2**20  # of the layer's weights as float32, where they are of another dtype


Treatment = Kept | Merge  # of a layer by one candidate: a mask, or a merge


def mapped_layer(layer: MoeLayer) -> RoutedLayer:
    """How a layer's router can be mapped: by its formula, whatever the dtype of its logits.

    The formula is that of the model as it is, however few experts are active now; and with two of them at least, where
    the router can select two: of a single expert's weight, divided by itself, nothing is left to tell.
    """
    own = layer.shape.top_k
    telling = max(own, min(2, len(half_kept(layer))))
    for active in dict.fromkeys((telling, own)):
        with fewer_active({layer.index: layer}, active):
            found = routed_layer(layer, "fused")
        if found.places is not None:
            break
    return found


def order_of(treatment: Treatment) -> tuple[int, Any]:
    """Sorts treatments: alike ones become neighbours."""
    return (1, treatment.digest) if isinstance(treatment, Merge) else (0, treatment)


class MergedExperts:
    """Computes with a layer's merged experts, in `buffers` that layers share and that stay from call to call."""

    def __init__(self, routed: RoutedLayer, buffers: dict[str, Tensor], scratch: dict[str, Tensor]) -> None:
        self._layer, self._buffers = routed.layer, buffers
        self._pair_outputs = PairOutputs(routed.layer, scratch)
        self._held: Merge | None = None
        self._taken: Tensor | None = None  # of the merge held, see `_taken_as_they_are`

    def __call__(self, original: ExpertsFunction, merge: Merge, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], ids [T, K] in [0, K'), weights [T, K] -> [T, H]."""
        if self._held is not merge:
            with self.held(merge):
                return self(original, merge, hidden, ids, weights)
        count = len(merge.experts)
        if self._taken is not None:
            ids, count = self._taken.to(ids.device)[ids], self._layer.shape.num_experts
        if not self._pair_outputs.direct:
            return original(hidden, ids, weights)
        zero = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        rows, counts, pair_of = distinct_pairs(ids, zero, zero, count)
        return weighted_sum(self._pair_outputs(original, hidden, rows, counts), pair_of, weights)

    @contextmanager
    def held(self, merge: Merge) -> Iterator[None]:
        """Inside, calls with this merge find its experts made, once for all of them. Where each is one of the layer's
        as it is, none are made: the ids are the layer's own. The layer's weights must be where they are computed with.
        """
        _ = self._pair_outputs.direct  # compares with the module's own forward, before its weights change
        self._taken = _taken_as_they_are(merge.experts)
        try:
            with self.standing(merge) if self._taken is None else nullcontext():
                self._held = merge
                yield
        finally:
            self._held = None

    @contextmanager
    def standing(self, merge: Merge) -> Iterator[None]:
        """Inside, the experts module holds the merged experts."""
        experts: Any = self._layer.experts
        places = expert_tensors(self._layer)
        before = [getattr(place.owner, place.name) for place in places]
        count = self._layer.shape.num_experts
        counters = [name for name in EXPERT_COUNT_NAMES if getattr(experts, name, None) == count]
        try:
            for place, tensor in zip(places, before, strict=True):
                new = self._merged(place.name, tensor.detach(), merge.experts)
                setattr(place.owner, place.name, nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new)
            for name in counters:
                setattr(experts, name, len(merge.experts))
            yield
        finally:
            for place, tensor in zip(places, before, strict=True):
                setattr(place.owner, place.name, tensor)
            for name in counters:
                setattr(experts, name, count)

    def _merged(self, name: str, stored: Tensor, shares: Tensor) -> Tensor:
        """[E, ...] -> [K', ...], in the buffer of that name."""
        shape = (len(shares), *stored.shape[1:])
        held = self._buffers.get(name)
        size = stored[0].numel() * len(shares)
        if held is None or held.numel() < size or held.dtype != stored.dtype or held.device != stored.device:
            held = self._buffers[name] = torch.empty(size, dtype=stored.dtype, device=stored.device)
        return combined(stored, shares, held[:size].view(shape))


def combined(stored: Tensor, shares: Tensor, out: Tensor | None = None) -> Tensor:
    """stored [E, ...], shares float32 [K', E] -> [K', ...], in `out` if given: sums of experts' weights, in float32 or
    better, in the dtype of the weights; rows that take one expert as it is are copies."""
    new = stored.new_empty(len(shares), *stored.shape[1:]) if out is None else out
    rows, flat, shares = stored.flatten(1), new.view(len(shares), -1), shares.to(stored.device)
    if (taken := _taken_as_they_are(shares)) is not None:
        torch.index_select(rows, 0, taken, out=flat)
    elif stored.dtype in (torch.float32, torch.float64):
        torch.mm(shares.to(stored.dtype), rows, out=flat)
    else:
        for columns in row_chunks(rows.shape[1], 4 * len(rows), CHUNK_BYTES):
            flat[:, columns] = shares @ rows[:, columns].float()
    return new


def _taken_as_they_are(shares: Tensor) -> Tensor | None:
    """shares: W_EM [K', E] -> int64 [K'], the expert that each row is; None where a row is a sum of several."""
    return shares.argmax(1) if bool(((shares == 1).any(1) & ((shares != 0).sum(1) == 1)).all()) else None


def bytes_while_merged(layer: MoeLayer, count: int) -> int:
    """What `count` merged experts of a layer take while they stand, with the float32 that they are added up in."""
    tensors = [getattr(place.owner, place.name) for place in expert_tensors(layer)]
    held = sum(tensor[0].nbytes for tensor in tensors) * count
    wide = [tensor[0].numel() * 4 for tensor in tensors if tensor.dtype not in (torch.float32, torch.float64)]
    return held + max((min(CHUNK_BYTES, len(tensors[0]) * size) * 2 for size in wide), default=0)


@contextmanager
def treated(routed: RoutedLayer, merge: Merge, merged: MergedExperts) -> Iterator[None]:
    """Inside, the layer's block computes with a merge's experts and router: as routers.many_masks, for one merge."""
    layer = routed.layer

    def route(original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        assert routed.spec is not None and routed.places is not None and routed.logits_dtype is not None
        logits = router_logits(layer, hidden.reshape(-1, hidden.shape[-1]), routed.logits_dtype)
        router_map = merge.router.to(logits.device)[None]
        ids, weights = masked_router(logits, top_k=layer.active, router_map=router_map, spec=routed.spec)
        answer: list[Tensor] = [logits] * 3
        answer[routed.places[1]] = weights[0].to(routed.spec.weights_dtype or weights.dtype)
        answer[routed.places[2]] = ids[0]
        return tuple(answer)

    def compute(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return merged(original, merge, hidden, ids, weights)

    with replaced_forward(layer.router, route), intercepted(layer.experts, compute):
        yield
