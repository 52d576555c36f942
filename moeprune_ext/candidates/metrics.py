"""The metrics of a candidate, their averages, and what an engine that computes them looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import PruningPlan

METRICS = ("esap", "kl_pq", "kl_qp", "top1_agree", "accept", "nll", "label_top1")


NEXT_TOKEN = ("nll", "label_top1")  # at positions whose next token is labelled


LOWER_IS_BETTER = frozenset({"kl_pq", "kl_qp", "nll"})


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's token-weighted means; a metric that was not asked for is None, one that met a NaN row is NaN.

    esap, kl_pq, kl_qp, top1_agree, accept: over `positions` attended and labelled positions. nll: over positions whose
    next token is attended and labelled, as is label_top1, the share of them whose largest logit is that token's.
    nan_rows: positions at which the candidate's logits gave no distribution.
    """

    esap: float | None = None
    kl_pq: float | None = None
    kl_qp: float | None = None
    top1_agree: float | None = None
    accept: float | None = None
    nll: float | None = None
    label_top1: float | None = None
    positions: int = 0
    nan_rows: int = 0


def to_maximise(metric: str, value: float) -> float:
    """A metric's value as something to maximise: KL and nll change sign, a NaN ranks last."""
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


@dataclass(frozen=True)
class SequenceSums:
    """Scores before averaging. sums: {metric: float64 [C, n]}, over a sequence's positions. nan_rows: int64 [C, n]."""

    sums: dict[str, Tensor]
    nan_rows: Tensor


class Engine(Protocol):
    """What computes candidates' rows, called in eval mode without gradients: SweptModel, or WholeForwards.

    about: how, as far as scores depend on it.
    """

    about: str

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        """Prepares these sequences; {sequence: the sum of the unpruned model's log-sum-exps, NaN where it is NaN}."""

    def values(
        self, plans: Sequence[PruningPlan | MergedPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        """Yields (sequence, numbers of some plans, {metric: [those plans, T]}) until every pair of the two was met."""

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Refuses (ValueError) merges into so many experts, {decoder layer: K'}, that there is no room for."""
