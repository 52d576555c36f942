"""One forward of the whole model per candidate and sequence, for models that cannot be taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.engine import EngineOptions, Values
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import planned
from moeprune_ext.models.merging import MapRouter
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.ops.overlap import label_top1, log_sum_exp, overlap


class WholeForwards:
    """An Engine of ordinary forwards.

    The teacher's logits are kept between calls within half of the budget and computed again in every call beyond it;
    candidates' logits of one sequence are held in blocks within the other half (one candidate at least).

    Args:
        moe: the model.
        sequences: all that are scored, [1, S] each.
        options: memory_budget, seed and backend are looked at.
        map_router: finds how a router maps its scores.
    """

    about = "whole forwards"

    def __init__(
        self, moe: MoeModel, sequences: Sequence[TokenBatch], options: EngineOptions, map_router: MapRouter
    ) -> None:
        self._moe, self._sequences, self._options, self._map_router = moe, sequences, options, map_router
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Nothing is refused: a merged model is made whatever the budget, which is for logits."""

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        """See Engine."""
        held, sums = 0, {}
        for number in numbers:
            logits = self._logits(number)
            lse = log_sum_exp(logits)
            sums[number] = float(lse.sum())
            held += logits.nbytes
            if held <= self._options.memory_budget // 2:
                self._kept[number] = (logits, lse)
        return sums

    def values(
        self, plans: Sequence[PruningPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[Values]:
        """See Engine."""
        for number in numbers:
            p = self._kept[number][0] if number in self._kept else self._logits(number)
            p_lse = self._kept[number][1] if number in self._kept else log_sum_exp(p)
            block = max(1, self._options.memory_budget // 2 // max(1, p.nbytes))
            for start in range(0, len(plans), block):
                chosen = list(range(len(plans)))[start : start + block]
                q = torch.empty(len(chosen), *p.shape, dtype=p.dtype, device=p.device)
                for row, plan in enumerate(chosen):
                    with planned(self._moe.layers, plans[plan], self._map_router):
                        q[row] = self._logits(number)
                yield number, chosen, self._compared(number, p, p_lse, q, metrics)

    def _compared(
        self, number: int, p: Tensor, p_lse: Tensor, q: Tensor, metrics: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Compares the teacher's logits p [T, V] with some candidates' q [C, T, V]: {metric: [C, T]}."""
        sequence, options = self._sequences[number], self._options
        labels = sequence.next_token_labels[sequence.wanted].to(p.device)
        values = {}
        if names := tuple(name for name in metrics if name != "label_top1"):
            seed = options.seed + number
            values = overlap(p, q, p_lse=p_lse, labels=labels, metrics=names, seed=seed, backend=options.backend)
        if "label_top1" in metrics:
            values["label_top1"] = torch.stack([label_top1(logits, labels) for logits in q])
        return values

    def _logits(self, number: int) -> Tensor:
        """Runs an ordinary forward without a KV cache: [T, V] logits at the positions that any metric reads."""
        sequence = self._sequences[number]
        logits: Tensor = self._moe.model(**sequence.model_inputs(self._moe.device), use_cache=False).logits
        return logits[sequence.wanted.to(logits.device)]
