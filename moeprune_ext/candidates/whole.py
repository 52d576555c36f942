"""One forward of the whole model per candidate and sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import masks, merged_model
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.routers import RoutedLayer
from moeprune_ext.ops.overlap import label_top1, log_sum_exp, overlap


class WholeForwards:
    """One forward of the masked model per candidate and sequence, for models that cannot be taken apart.

    The teacher's logits are kept between calls within half of the budget and computed again in every call beyond it;
    candidates' logits of one sequence are held in blocks within the other half (one candidate at least).
    """

    def __init__(
        self, model: nn.Module, sequences: Sequence[TokenBatch], memory_budget: int, seed: int, backend: str
    ) -> None:
        self._model = model
        self._layers = find_moe_layers(model)
        self._sequences = sequences
        self._device = next(model.parameters()).device
        self._budget, self._seed, self._backend = memory_budget, seed, backend
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.about = "whole forwards"

    @cached_property
    def mapped(self) -> dict[int, RoutedLayer]:
        """How each layer's router can be mapped, found out when a plan first asks."""
        return {index: mapped_layer(layer) for index, layer in self._layers.items()}

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Nothing is refused: a merged model is made whatever the budget, which is for logits."""

    def _applied(self, plan: PruningPlan | MergedPlan) -> AbstractContextManager[None]:
        if isinstance(plan, MergedPlan):
            return merged_model(self.mapped, plan)
        return masks(self._layers, plan)

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        held, sums = 0, {}
        for number in numbers:
            logits = self._logits(number)
            lse = log_sum_exp(logits)
            sums[number] = float(lse.sum())
            held += logits.nbytes
            if held <= self._budget // 2:
                self._kept[number] = (logits, lse)
        return sums

    def values(
        self, plans: Sequence[PruningPlan | MergedPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        for number in numbers:
            p = self._kept[number][0] if number in self._kept else self._logits(number)
            p_lse = self._kept[number][1] if number in self._kept else log_sum_exp(p)
            sequence = self._sequences[number]
            labels = sequence.next_token_labels[sequence.wanted].to(p.device)
            block = max(1, self._budget // 2 // max(1, p.nbytes))
            for start in range(0, len(plans), block):
                chosen = list(range(len(plans)))[start : start + block]
                q = torch.empty(len(chosen), *p.shape, dtype=p.dtype, device=p.device)
                for i, plan in enumerate(chosen):
                    with self._applied(plans[plan]):
                        q[i] = self._logits(number)
                values = {}
                if compared := tuple(name for name in metrics if name != "label_top1"):
                    values = overlap(
                        p,
                        q,
                        p_lse=p_lse,
                        labels=labels,
                        metrics=compared,
                        seed=self._seed + number,
                        backend=self._backend,
                    )
                if "label_top1" in metrics:
                    values["label_top1"] = torch.stack([label_top1(logits, labels) for logits in q])
                yield number, chosen, values

    def _logits(self, number: int) -> Tensor:
        """[T, V] logits at the positions that any metric reads, from an ordinary forward without a KV cache."""
        sequence = self._sequences[number]
        logits: Tensor = self._model(**sequence.model_inputs(self._device), use_cache=False).logits
        return logits[sequence.wanted.to(logits.device)]
