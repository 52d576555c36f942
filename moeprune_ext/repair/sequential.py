"""Chooses a layer's experts by what the pruned layers before it give, at the counts of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.naee import least_missed, routed_under_masks, subset_errors
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.calibrate import MomentsTable
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.calibration.samples import Part, Recorder, as_sample, choose_positions
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.patches import ExpertsFunction, Observe, replaced_forward
from moeprune_ext.models.scratch import Scratch
from moeprune_ext.repair.walk import Context

NAEE_TOKENS = 1024  # positions on which naee judges subsets of a layer, as `naee_scores` does by default


class Chooser:
    """Scores one layer after the other, on the rows that its experts get.

    Args:
        plan: its counts stay.
        criterion: by which to choose, for all layers or by layer; None: the plan's.
        fit: all processes' batches to score on.
        layers: of the model, by decoder layer.

    Attributes:
        criterion: its name, for a plan's record.
        recorded: what the choice depends on, as JSON.

    Raises:
        ValueError: for a criterion that cannot be computed layer by layer, and for routers that naee cannot run.
    """

    def __init__(
        self,
        plan: PruningPlan,
        criterion: str | Mapping[int, str] | None,
        fit: Sequence[TokenBatch],
        layers: Mapping[int, MoeLayer],
    ) -> None:
        names = (plan.criterion or "") if criterion is None else criterion
        self._criteria = dict(names) if isinstance(names, Mapping) else dict.fromkeys(plan.kept, names)
        for index in plan.kept:
            if self._criteria.get(index) not in (*CRITERIA, "naee"):
                raise ValueError(
                    f"sequential needs a criterion for each layer, {', '.join(CRITERIA)} or naee; layer {index} has "
                    f"{self._criteria.get(index)!r}"
                )
            if self._criteria[index] == "naee" and plan.pruned_counts[index]:
                routed_under_masks(layers[index])
        self._positions = choose_positions(fit, NAEE_TOKENS, 0)
        self._table: MomentsTable | None = None
        self._recorder: Recorder | None = None
        self._numbers: Sequence[int] = ()
        named = sorted({self._criteria[index] for index in plan.kept})
        self.criterion = f"{' and '.join(named)}, sequential"
        self.recorded = {str(index): name for index, name in self._criteria.items()}

    def observing(
        self, layer: MoeLayer, texts: Sequence[TokenBatch], numbers: Sequence[int], then: Observe
    ) -> tuple[Observe, Context]:
        """Returns what replaces the experts' forward while the layer is looked at without a mask, and what else holds.

        Args:
            layer: to be scored.
            texts: this process's batches, in the order in which they come.
            numbers: of each of them among those to score on; those beyond do not count.
            then: observes besides.
        """
        self._numbers = numbers
        if self._criteria[layer.index] == "naee":
            none = torch.empty(0, dtype=torch.int64)
            scored = [self._positions[number] if number < len(self._positions) else none for number in numbers]
            recorder = self._recorder = Recorder(layer, list(zip(texts, scored, strict=True)))
            return (
                lambda original, *call: then(partial(recorder.experts, original), *call),
                lambda: replaced_forward(layer.router, recorder.router),
            )
        table = self._table = MomentsTable(layer, Scratch())
        coming = iter(zip(texts, numbers, strict=True))

        def observe(original: ExpertsFunction, *call: Tensor) -> Tensor:
            text, number = next(coming)
            table.attended = text.attention_mask.flatten() & (number < len(self._positions))
            return then(partial(table.observe, original), *call)

        return observe, nullcontext

    def choose(self, layer: MoeLayer, count: int) -> list[int]:
        """Returns ascending ids of the experts that a layer keeps, `count` of them."""
        criterion, shape = self._criteria[layer.index], layer.shape
        if criterion == "naee":
            assert self._recorder is not None
            own = dict(zip(self._numbers, self._recorder.parts, strict=True))
            everywhere = {number: part for parts in distributed.gathered(own) for number, part in parts.items()}
            return distributed.from_first(lambda: _least_missed(layer, count, everywhere))
        assert self._table is not None
        moments = distributed.sum_(self._table.moments.cpu())
        stats = RoutingStats(
            {layer.index: moments}, {layer.index: self._table.max_norm.cpu()}, 0, {layer.index: shape}, ""
        )
        scores = score_experts(stats, criterion)
        plan = PruningPlan.from_pruned_counts(scores, {layer.index: shape.num_experts - count})
        return plan.kept[layer.index]


def _least_missed(layer: MoeLayer, count: int, parts: Mapping[int, Part]) -> list[int]:
    """Keeps the subset whose output is closest to the layer's on sampled rows, {number of a batch: its rows}."""
    errors = subset_errors(routed_under_masks(layer), as_sample([parts[number] for number in sorted(parts)]))
    gone = set(least_missed(errors, layer.shape, layer.shape.num_experts - count))
    return [expert for expert in range(layer.shape.num_experts) if expert not in gone]
