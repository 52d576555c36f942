"""Chooses a layer's experts by what the pruned layers before it give, at the counts of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.naee import least_missed, subset_errors
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.calibrate import MomentsTable
from moeprune_ext.calibration.criteria import CRITERIA, score_experts
from moeprune_ext.calibration.samples import LayerSample
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, Observe
from moeprune_ext.models.routers import routed_layer
from moeprune_ext.models.scratch import Scratch

NAEE_TOKENS = 1024  # rows on which naee judges subsets of a layer


class Chooser:
    """Scores one layer after the other, on the rows that its experts get.

    Args:
        moe: the model.
        plan: its counts stay.
        criterion: by which to choose, for all layers or by layer; None: the plan's.

    Attributes:
        recorded: what the choice depends on, as JSON.

    Raises:
        ValueError: for a criterion that cannot be computed layer by layer.
    """

    def __init__(self, moe: MoeModel, plan: PruningPlan, criterion: str | Mapping[int, str] | None) -> None:
        names = (plan.criterion or "") if criterion is None else criterion
        self._criteria = dict(names) if isinstance(names, Mapping) else dict.fromkeys(plan.kept, names)
        for index in plan.kept:
            if self._criteria.get(index) not in (*CRITERIA, "naee"):
                raise ValueError(
                    f"sequential needs a criterion for each layer, {', '.join(CRITERIA)} or naee; layer {index} has "
                    f"{self._criteria.get(index)!r}"
                )
        self._moe = moe
        self._table: MomentsTable | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.recorded = {str(index): name for index, name in self._criteria.items()}

    def observing(
        self, layer: MoeLayer, texts: Sequence[TokenBatch], is_fitted: Sequence[bool], then: Observe
    ) -> Observe:
        """Returns what replaces the experts' forward while the layer is looked at without a mask.

        Args:
            layer: to be scored.
            texts: this process's batches, in the order in which they come.
            is_fitted: whether each of them counts.
            then: observes besides.
        """
        table = self._table = MomentsTable(layer, Scratch())
        self._rows = []
        number = -1

        def observe(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            nonlocal number
            number += 1
            attended = texts[number].attention_mask.flatten()
            table.attended = attended if is_fitted[number] else torch.zeros_like(attended)
            if is_fitted[number] and self._criteria[layer.index] == "naee":
                self._rows.append(tuple(part[attended.to(part.device)].cpu() for part in (hidden, ids, weights)))  # type: ignore[arg-type]

            def counted(*call: Any) -> Tensor:
                return table.observe(original, *call)

            return then(counted, hidden, ids, weights)

        return observe

    def choose(self, layer: MoeLayer, count: int) -> list[int]:
        """Returns ascending ids of the experts that a layer keeps, `count` of them."""
        criterion, shape = self._criteria[layer.index], layer.shape
        if criterion == "naee":
            return distributed.from_first(lambda: self._naee(layer, count))
        assert self._table is not None
        moments = distributed.sum_(self._table.moments.cpu())
        stats = RoutingStats(
            {layer.index: moments}, {layer.index: self._table.max_norm.cpu()}, 0, {layer.index: shape}, ""
        )
        scores = score_experts(stats, criterion)
        plan = PruningPlan.from_pruned_counts(scores, {layer.index: shape.num_experts - count})
        return plan.kept[layer.index]

    def _naee(self, layer: MoeLayer, count: int) -> list[int]:
        """Keeps the subset whose output is closest to the layer's, on a sample of the first process's rows."""
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(hidden), generator=generator)[:NAEE_TOKENS].sort().values
        sample = LayerSample(hidden[chosen], ids[chosen], weights[chosen], hidden[chosen])
        errors = subset_errors(routed_layer(layer, "fused"), sample)
        gone = set(least_missed(errors, layer.shape, layer.shape.num_experts - count))
        return [expert for expert in range(layer.shape.num_experts) if expert not in gone]
