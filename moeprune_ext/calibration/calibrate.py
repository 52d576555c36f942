"""Runs calibration text through a model once and gathers RoutingStats, the one table behind every criterion.

Each layer's experts compute their unweighted outputs f_e(x_t), for routed (token, expert) pairs only
(models/experts.py). Of every pair, the gate weight g that the model applies and ||f_e(x_t)||_2 go into
moments[e, a, b] += g^a ||f||^b.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.data.batches import TokenBatch, as_batches, without_padding
from moeprune_ext.models.experts import PairOutputs, distinct_pairs, weighted_sum
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.mtp import MtpLayer, running
from moeprune_ext.models.patches import ExpertsFunction, evaluating, intercepted
from moeprune_ext.models.replay import replay_of_streamed, run_batches
from moeprune_ext.models.scratch import Scratch
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.ops.routing_moments import routing_moments_
from moeprune_ext.progress import View, bar

PAIRS_AT_ONCE = 65_536  # routed pairs whose outputs [pairs, H] are alive at a time: 0.5 GB at H = 4096 in bfloat16


def calibrate(
    model: nn.Module | MoeModel,
    batches: Iterable[Any],
    *,
    mtp: Sequence[MtpLayer] = (),
    progress: bool | View = False,
) -> RoutingStats:
    """Runs the model over `batches` once and gathers RoutingStats of every MoE layer.

    Memory beside the model's own: 9 float64 per expert, and expert outputs of PAIRS_AT_ONCE routed pairs. Streamed
    layers are visited once; meanwhile the batches' hidden states wait in host memory. Under torchrun the batches are
    dealt out, and every process gets the statistics of all; they do not depend on the number of processes, of equally
    many threads, up to the rounding of float64 sums. The same sequences in other batches agree up to the rounding of
    the model's dtype. Source: arXiv 2606.15716 and 2510.13999.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        batches: see `as_batches`. Attended positions count, label masks do not.
        mtp: multi-token-prediction layers (`load_mtp`), which get statistics of their own.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        The statistics, for `score_experts`.

    Raises:
        ValueError: for a model without MoE layers, for no data, or if experts' outputs are NaN or infinite.
    """
    moe = MoeModel.of(model)
    layers = moe.layers
    batches = without_padding(as_batches(batches, moe.vocab_size))
    own_batches = [batches[number] for number in distributed.own_share(len(batches))]
    scratch = Scratch()
    tables = {index: MomentsTable(layer, scratch) for index, layer in layers.items()}
    more = {one.layer.index: MomentsTable(one.layer, scratch) for one in mtp}
    now: list[TokenBatch] = []

    def attend(batch: TokenBatch) -> None:
        now[:] = [batch]
        for table in tables.values():
            table.attended = batch.attention_mask.reshape(-1)

    def attend_mtp(attended: Tensor) -> None:
        for table in more.values():
            table.attended = attended

    replay = replay_of_streamed(moe, batches[0])
    with evaluating(moe.model), ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(intercepted(layer.experts, tables[index].observe))
        for one in mtp:
            stack.enter_context(intercepted(one.layer.experts, more[one.layer.index].observe))
        if mtp:
            stack.enter_context(running(moe, mtp, lambda: now[0], attend_mtp))
        line = stack.enter_context(bar(progress, "calibrate", len(own_batches), "batch"))
        run_batches(moe, replay, own_batches, line, before=attend)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    stats = _summed(tables, tokens, moe.shapes, moe.fingerprint)
    if not mtp:
        return stats
    return replace(stats, mtp=_summed(more, tokens, {one.layer.index: one.layer.shape for one in mtp}, moe.fingerprint))


def _summed(
    tables: Mapping[int, MomentsTable], tokens: int, shapes: Mapping[int, LayerShape], model: str
) -> RoutingStats:
    """Makes the statistics of all processes; raises ValueError for outputs that are no numbers."""
    moments = {index: distributed.sum_(table.moments.cpu()) for index, table in tables.items()}
    broken = [index for index, table in moments.items() if not bool(torch.isfinite(table).all())]
    if broken:
        raise ValueError(f"experts' outputs are NaN or infinite in layers {broken}: check the weights and the dtype")
    max_norm = {index: distributed.maximum_(table.max_norm.cpu()) for index, table in tables.items()}
    return RoutingStats(moments, max_norm, tokens, dict(shapes), model)


class MomentsTable:
    """Gathers one layer's statistics.

    Attributes:
        moments: float64 [E, 3, 3], as in RoutingStats.
        max_norm: float32 [E], as in RoutingStats.
        attended: bool [T], whether each position of the batch being run is attended.
    """

    def __init__(self, layer: MoeLayer, scratch: Scratch) -> None:
        self._index, self._count, self._router_rows = layer.index, layer.shape.num_experts, layer.router_rows
        self._device = next(layer.router.parameters()).device
        self._pair_outputs = PairOutputs(layer, scratch)
        self.moments = torch.zeros(self._count, 3, 3, dtype=torch.float64, device=self._device)
        self.max_norm = torch.zeros(self._count, dtype=torch.float32, device=self._device)
        self.attended = torch.empty(0, dtype=torch.bool)

    def observe(self, original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward: returns the same output, and adds every routed pair to the moments."""
        tokens, top_k = expert_ids.shape
        if tokens != self.attended.numel():
            raise ValueError(
                f"layer {self._index}: the experts saw {tokens} rows for {self.attended.numel()} positions; this model "
                "does not hand every position to its experts, so its statistics cannot be masked"
            )
        output = torch.empty_like(hidden)
        state = torch.zeros(1, dtype=torch.int64, device=hidden.device)
        for block in row_chunks(tokens, top_k, PAIRS_AT_ONCE):
            rows, counts, pair_of = distinct_pairs(expert_ids[block], state, state, self._router_rows)
            outputs = self._pair_outputs(original, hidden[block], rows, counts)
            gates = torch.empty(len(rows), dtype=weights.dtype, device=weights.device)
            gates[pair_of.flatten()] = weights[block].flatten()
            ids = torch.repeat_interleave(torch.tensor(counts, device=hidden.device))
            valid = self.attended[block].to(hidden.device)[rows]
            if self._router_rows > self._count:  # ids beyond the experts', and zero gates there, are no routed pairs
                valid &= (ids < self._count) & (gates != 0)
                ids = ids.clamp(max=self._count - 1)
            routing_moments_(self.moments, self.max_norm, ids, gates, outputs, valid=valid)
            output[block] = weighted_sum(outputs, pair_of, weights[block])
        return output
