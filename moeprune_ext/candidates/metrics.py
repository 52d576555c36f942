"""The metrics of a candidate, and their token-weighted means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("esap", "kl_pq", "kl_qp", "top1_agree", "accept", "nll", "label_top1")
NEXT_TOKEN = ("nll", "label_top1")  # at positions whose next token is labelled; the teacher is not looked at
LOWER_IS_BETTER = frozenset({"kl_pq", "kl_qp", "nll"})
OBJECTIVES = ("mean", "worst")  # over all sequences together, or the worst domain's mean


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's token-weighted means; a metric that was not asked for is None, one that met a NaN row is NaN.

    Attributes:
        esap: expected speculative acceptance, over `positions` attended and labelled positions, as the next four.
        kl_pq: KL(teacher || candidate), in nats.
        kl_qp: KL(candidate || teacher), in nats.
        top1_agree: share of positions with the same largest logit.
        accept: acceptance of tokens drawn from the candidate.
        nll: negative log-likelihood of next tokens that are attended and labelled, in nats.
        label_top1: share of those positions whose largest logit is the next token's.
        positions: attended and labelled positions.
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
    """Returns a metric's value as something to maximise: KL and nll change sign, a NaN ranks last."""
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


@dataclass(frozen=True)
class SequenceSums:
    """Scores before averaging, of C plans on n sequences.

    Attributes:
        sums: {metric: float64 [C, n]}, over a sequence's positions.
        nan_rows: int64 [C, n].
    """

    sums: dict[str, Tensor]
    nan_rows: Tensor


def domain_means(sums: Tensor, weights: Tensor, domains: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Returns {domain: [...]}, the token-weighted mean over its sequences.

    Args:
        sums: float64 [..., N], a metric's sum over each sequence.
        weights: float64 [..., N], the positions behind each sum.
        domains: {domain: its sequences' numbers}.
    """
    return {
        name: sums[..., list(numbers)].sum(-1) / weights[..., list(numbers)].sum(-1)
        for name, numbers in domains.items()
    }


def objective_value(
    metric: str, objective: str, sums: Tensor, weights: Tensor, domains: Mapping[str, Sequence[int]]
) -> Tensor:
    """Returns what plans are compared by, [...]; NaN where a sum that counts is NaN.

    Args:
        metric: of METRICS.
        objective: "mean": over all sequences; "worst": the worst domain's mean, the greatest where lower is better.
        sums: see domain_means.
        weights: see domain_means.
        domains: see domain_means.
    """
    if objective == "mean":
        return sums.sum(-1) / weights.sum(-1)
    means = torch.stack(list(domain_means(sums, weights, domains).values()))
    return means.amax(0) if metric in LOWER_IS_BETTER else means.amin(0)
