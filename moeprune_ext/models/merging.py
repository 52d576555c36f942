"""Layers whose experts are sums of their experts, for as long as they are evaluated or for good.

The new weights exist while the layer runs, in one buffer that all merges of a search share: at most one layer's
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.plan import Merge, Treatment
from moeprune_ext.models.active import fewer_active
from moeprune_ext.models.experts import DOWN, PairOutputs, distinct_pairs, weighted_sum
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES, MoeLayer, expert_tensors, half_kept
from moeprune_ext.models.patches import ExpertsFunction, intercepted, replaced_forward
from moeprune_ext.models.routers import Kept, RoutedLayer, many_masks, routed_layer, router_logits
from moeprune_ext.models.scratch import Scratch
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.ops.masked_router import masked_router

MapRouter = Callable[[MoeLayer], RoutedLayer]  # finds how a layer's router can map its scores, as `mapped_layer`
CHUNK_BYTES = 64 * 2**20  # of the layer's weights as float32, where they are of another dtype


def mapped_layer(layer: MoeLayer) -> RoutedLayer:
    """Finds how a layer's router can map its scores: by its formula, whatever the dtype of its logits.

    The formula is that of the model as it is, however few experts are active now. It is looked for with two active
    experts at least, where the router can select two: a single expert's weight, divided by itself, tells nothing.

    Returns:
        The layer with its `spec`, which is None where the formula is not known.
    """
    own = layer.shape.top_k
    telling = max(own, min(2, len(half_kept(layer))))
    for active in dict.fromkeys((telling, own)):
        with fewer_active({layer.index: layer}, active):
            routed = routed_layer(layer, "fused")
        if routed.places is not None:
            break
    return routed


class MergedExperts:
    """Computes with a layer's merged experts.

    Args:
        layer: whose experts are merged.
        buffers: memory for one layer's new experts, which layers share.
        scratch: memory for experts' outputs, which layers share.
    """

    def __init__(self, layer: MoeLayer, buffers: Scratch, scratch: Scratch) -> None:
        self._layer, self._buffers = layer, buffers
        self._pair_outputs = PairOutputs(layer, scratch)
        self._held: Merge | None = None
        self._same: Tensor | None = None  # of the merge held: see `experts_as_they_are`

    def __call__(
        self, original: ExpertsFunction, treatment: Treatment, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Runs routed rows through the new experts.

        Args:
            original: the experts' own forward.
            treatment: with the merge.
            hidden: [T, H].
            ids: [T, K], the layer's own ids where the router is sliced, else in [0, K').
            weights: [T, K].

        Returns:
            [T, H].
        """
        merge = treatment.merge
        assert merge is not None
        if self._held is not merge:
            with self.held(merge):
                return self(original, treatment, hidden, ids, weights)
        count, trailing = len(merge.experts), self._layer.trailing
        if merge.router is None:
            ids = self._rows(treatment.kept, ids.device)[ids]
        if self._same is not None:
            count = self._layer.shape.num_experts
            experts = [*self._same.tolist(), *range(count, count + trailing)]
            ids = torch.tensor(experts, device=ids.device)[ids]
        if torch.is_grad_enabled() or not self._pair_outputs.direct:
            return original(hidden, ids, weights)
        zero = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        rows, counts, pair_of = distinct_pairs(ids, zero, zero, count + trailing)
        return weighted_sum(self._pair_outputs(original, hidden, rows, counts), pair_of, weights)

    def _rows(self, kept: Kept, device: torch.device) -> Tensor:
        """int64 [E + trailing]: the row of the merge that stands in each kept expert's place."""
        rows = torch.zeros(self._layer.router_rows, dtype=torch.int64)
        stays = self._layer.with_trailing(kept)
        rows[stays] = torch.arange(len(stays))
        return rows.to(device)

    @contextmanager
    def held(self, merge: Merge) -> Iterator[None]:
        """Inside, calls with this merge find its experts made, once for all of them.

        Where each is one of the layer's experts as it is, none are made: ids are translated instead, and only down
        projections may be other ones. The layer's weights must be where they are computed with.
        """
        _ = self._pair_outputs.direct  # compares with the module's own forward, before its weights change
        self._same = experts_as_they_are(merge.experts)
        try:
            with self._standing(merge) if self._same is None else self._refitted(self._same, merge.down):
                self._held = merge
                yield
        finally:
            self._held = None

    @contextmanager
    def _standing(self, merge: Merge) -> Iterator[None]:
        """Inside, the experts module holds the merged experts."""
        tensors = expert_tensors(self._layer)
        before = [getattr(tensor.owner, tensor.name) for tensor in tensors]
        count = self._layer.shape.num_experts
        counters = expert_count_names(self._layer)
        try:
            for tensor, stored in zip(tensors, before, strict=True):
                new = self._buffers.take(tensor.name, (len(merge.experts), *stored.shape[1:]), stored)
                if tensor.name == DOWN and merge.down is not None:
                    new.copy_(merge.down)
                else:
                    combined(stored.detach(), merge.experts, new)
                setattr(
                    tensor.owner, tensor.name, nn.Parameter(new, False) if isinstance(stored, nn.Parameter) else new
                )
            for name in counters:
                setattr(self._layer.experts, name, len(merge.experts))
            yield
        finally:
            for tensor, stored in zip(tensors, before, strict=True):
                setattr(tensor.owner, tensor.name, stored)
            for name in counters:
                setattr(self._layer.experts, name, count)

    @contextmanager
    def _refitted(self, same: Tensor, down: Tensor | None) -> Iterator[None]:
        """Inside, these experts of the layer have other down projections; all others stand where they were."""
        if down is None:
            yield
            return
        experts: Any = self._layer.experts
        stored = experts.down_proj
        try:
            new = self._buffers.take(DOWN, tuple(stored.shape), stored).copy_(stored.detach())
            new[same.to(new.device)] = down.to(new)
            experts.down_proj = nn.Parameter(new, False)
            yield
        finally:
            experts.down_proj = stored


def expert_count_names(layer: MoeLayer) -> list[str]:
    """Names under which the experts module stores how many it holds."""
    return [name for name in EXPERT_COUNT_NAMES if getattr(layer.experts, name, None) == layer.shape.num_experts]


def combined(stored: Tensor, shares: Tensor, out: Tensor | None = None) -> Tensor:
    """Adds up experts' weights, in float32 or better; rows that take one expert as it is are copies.

    Args:
        stored: [E, ...], a tensor of all experts.
        shares: W_EM, float32 [K', E].
        out: [K', ...], where the result goes; None: into new memory.

    Returns:
        [K', ...], in the dtype of `stored`.
    """
    new = stored.new_empty(len(shares), *stored.shape[1:]) if out is None else out
    rows, flat, shares = stored.flatten(1), new.view(len(shares), -1), shares.to(stored.device)
    if (same := experts_as_they_are(shares)) is not None:
        torch.index_select(rows, 0, same, out=flat)
    elif stored.dtype in (torch.float32, torch.float64):
        torch.mm(shares.to(stored.dtype), rows, out=flat)
    else:
        for columns in row_chunks(rows.shape[1], 4 * len(rows), CHUNK_BYTES):
            flat[:, columns] = shares @ rows[:, columns].float()
    return new


def experts_as_they_are(shares: Tensor) -> Tensor | None:
    """Returns int64 [K'], the expert that each row of W_EM [K', E] is; None where a row is a sum of several."""
    return shares.argmax(1) if bool(((shares == 1).any(1) & ((shares != 0).sum(1) == 1)).all()) else None


def bytes_while_merged(layer: MoeLayer, count: int, only_down: bool = False) -> int:
    """Bytes that `count` merged experts of a layer take, with the float32 in which they are added up.

    Args:
        layer: of the experts.
        count: K'.
        only_down: whether all are experts of the layer but for their down projections.
    """
    if only_down:
        return layer.experts.down_proj.nbytes  # type: ignore[return-value]
    tensors = [getattr(tensor.owner, tensor.name) for tensor in expert_tensors(layer)]
    held = sum(tensor[0].nbytes for tensor in tensors) * count
    wide = [tensor[0].numel() * 4 for tensor in tensors if tensor.dtype not in (torch.float32, torch.float64)]
    return held + max((min(CHUNK_BYTES, len(tensors[0]) * size) * 2 for size in wide), default=0)


@contextmanager
def merged(routed: RoutedLayer, treatment: Treatment, experts: MergedExperts) -> Iterator[None]:
    """Inside, the layer's block computes with a merge's experts, behind its sliced or mapped router.

    Args:
        routed: how the layer's router is sliced; as `mapped_layer` finds where the merge maps it.
        treatment: with the merge.
        experts: of the same layer.
    """
    layer, merge = routed.layer, treatment.merge
    assert merge is not None

    def compute(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(original, treatment, hidden, ids, weights)

    def route(original: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        assert merge.router is not None and routed.spec is not None
        assert routed.places is not None and routed.logits_dtype is not None
        logits = router_logits(layer, hidden.reshape(-1, hidden.shape[-1]), routed.logits_dtype)
        router_map = merge.router.to(logits.device)[None]
        ids, weights = masked_router(logits, top_k=layer.active, router_map=router_map, spec=routed.spec)
        answer: list[Tensor] = [logits] * 3
        answer[routed.places[1]] = weights[0].to(routed.spec.weights_dtype or weights.dtype)
        answer[routed.places[2]] = ids[0]
        return tuple(answer)

    with ExitStack() as stack:
        # First, so that a sliced router's ids arrive as the layer's own.
        stack.enter_context(intercepted(layer.experts, compute))
        if merge.router is None:
            stack.enter_context(many_masks(routed, [treatment.kept], torch.zeros(1, dtype=torch.int64)))
        else:
            stack.enter_context(replaced_forward(layer.router, route))
        yield


Replaced = list[tuple[Tensor, Tensor, Tensor]]  # a tensor, its rows that were replaced, and what stood there


def merge_rows_(layer: MoeLayer, kept: Sequence[int], merge: Merge, before: Replaced) -> None:
    """Puts a merge's sums in the places of the kept experts, for good.

    Args:
        layer: whose weights change.
        kept: the places, one for each row of the merge.
        merge: the sums.
        before: what stood there is added to it first, in host memory, so that `undone_on_failure` can put it back.
    """
    identity = torch.eye(layer.shape.num_experts)
    sums = [row for row, expert in enumerate(kept) if not torch.equal(merge.experts[row], identity[expert])]
    for tensor in expert_tensors(layer):
        stored = getattr(tensor.owner, tensor.name).detach()
        refitted = tensor.name == DOWN and merge.down is not None
        if not (changed := list(range(len(kept))) if refitted else sums):
            continue
        new = merge.down if refitted else combined(stored, merge.experts[changed])
        assert new is not None
        rows = torch.tensor([kept[row] for row in changed], device=stored.device)
        before.append((stored, rows, stored[rows].cpu()))
        stored[rows] = new.to(stored)


@contextmanager
def undone_on_failure(before: Replaced) -> Iterator[None]:
    """Puts back what `before` holds if an exception ends the block."""
    try:
        yield
    except BaseException:
        for tensor, rows, weights in reversed(before):
            tensor[rows] = weights.to(tensor.device)
        raise
