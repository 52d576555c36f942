"""Turns RoutingStats into a score per expert, higher = keep.

The criteria are one family (arXiv 2606.15716): S_e(alpha, beta, reduce) reduces gate^alpha * ||f_e(x)||^beta over the
tokens routed to expert e. Every published criterion below is one triple. It is read from the table of moments that
calibration gathers, so scoring by another criterion costs no further pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats

# name -> (alpha: power of the gate weight, beta: power of the activation norm, reduce)
CRITERIA: dict[str, tuple[int, int, str]] = {
    "frequency": (0, 0, "sum"),
    "seer": (1, 0, "sum"),  # SEER-MoE's soft counting; EEP's "soft activation"
    "ean": (0, 1, "sum"),  # expert activation norm
    "weighted_ean": (1, 1, "sum"),  # EvoESAP's code
    "weighted_ean_l2": (1, 2, "sum"),  # named in EvoESAP's code
    "reap": (1, 1, "mean"),  # REAP, arXiv 2510.13999
    "reap_l2": (1, 2, "mean"),  # named in EvoESAP's code
    "man": (0, 1, "mean"),  # arXiv 2606.15716
    "msan": (0, 2, "mean"),  # arXiv 2606.15716
}

SELECTION_PRINCIPLE = (
    "Which is best depends on the model. arXiv 2606.15716 advises man or msan for general text and reap, seer or "
    "frequency for one task; on the demo model that did not hold (bench/results/allocations-demo.md, choice-demo.md)."
)


def score_experts(
    stats: RoutingStats, criterion: str | tuple[int, int, str] = "reap", *, seed: int = 0
) -> ExpertScores:
    """Scores every expert of every layer. Source: arXiv 2606.15716.

    Args:
        stats: of `calibrate`.
        criterion: a name in CRITERIA; "random", EEP's baseline; or a triple (alpha, beta, "mean" | "sum") with alpha
            and beta in {0, 1, 2}. "mean" divides by the number of routed tokens.
        seed: draws the scores of "random".

    Returns:
        {decoder layer: float64 [E]}, higher = keep; an expert that no token was routed to scores 0.

    Raises:
        ValueError: for an unknown criterion.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        values = {
            layer: torch.rand(len(moments), generator=generator, dtype=torch.float64)
            for layer, moments in stats.moments.items()
        }
        mtp = {} if stats.mtp is None else score_experts(stats.mtp, "random", seed=seed)
        return ExpertScores(values, dict(stats.shapes), "random", stats.model, mtp=_orders(mtp))
    name, (alpha, beta, reduce) = triple_of(criterion)
    values = {}
    for layer, moments in stats.moments.items():
        total = moments[:, alpha, beta]
        values[layer] = total / moments[:, 0, 0].clamp(min=1) if reduce == "mean" else total.clone()
    mtp = {} if stats.mtp is None else score_experts(stats.mtp, criterion)
    return ExpertScores(values, dict(stats.shapes), name, stats.model, mtp=_orders(mtp))


def _orders(scores: ExpertScores | Mapping[int, Any]) -> dict[int, list[int]]:
    """Returns the pruning orders of multi-token-prediction layers, whose scores these are."""
    return {layer: scores.pruning_order(layer) for layer in scores} if isinstance(scores, ExpertScores) else {}


def triple_of(criterion: str | tuple[int, int, str]) -> tuple[str, tuple[int, int, str]]:
    """Returns a criterion's name and its triple; raises ValueError if there is no such criterion."""
    if isinstance(criterion, str):
        if criterion == "auto":
            raise ValueError(
                "criterion auto is chosen by scoring plans on text, which `search` does; name a criterion here: "
                f"{', '.join(CRITERIA)}"
            )
        if criterion not in CRITERIA:
            raise ValueError(
                f"unknown criterion {criterion!r}; choose one of {', '.join([*CRITERIA, 'random'])}, or a triple "
                '(alpha, beta, "mean" | "sum")'
            )
        return criterion, CRITERIA[criterion]
    try:
        alpha, beta, reduce = criterion
    except (TypeError, ValueError):
        raise ValueError(
            f'a criterion is a name or a triple (alpha, beta, "mean" | "sum"), got {criterion!r}'
        ) from None
    if alpha not in (0, 1, 2) or beta not in (0, 1, 2) or reduce not in ("mean", "sum"):
        raise ValueError(f'alpha and beta must be 0, 1 or 2 and reduce "mean" or "sum"; got {criterion!r}')
    return f"({alpha}, {beta}, {reduce})", (alpha, beta, reduce)


def super_experts(stats: RoutingStats, *, quantile: float = 0.995, share: float = 0.1) -> dict[int, list[int]]:
    """Finds outlier experts, which a plan had better keep.

    Source: Super Experts, arXiv 2507.23279, with the L2 norm of an output in the place of its largest element (our
    choice: it is what calibration keeps).

    Args:
        stats: of `calibrate`.
        quantile: an outlier's largest output norm is above this quantile of all experts'.
        share: an outlier's largest output norm is above this share of the largest of all experts.

    Returns:
        {decoder layer: ids of its outliers}; layers without any are left out.

    Raises:
        ValueError: for a quantile or a share outside [0, 1].
    """
    if not 0 <= quantile <= 1 or not 0 <= share <= 1:
        raise ValueError(f"quantile and share lie in [0, 1]; got {quantile} and {share}")
    norms = torch.cat([norm.double() for norm in stats.max_norm.values()])
    threshold = max(float(torch.quantile(norms, quantile)), share * float(norms.max()))
    outliers = {layer: (norm.double() > threshold).nonzero()[:, 0].tolist() for layer, norm in stats.max_norm.items()}
    return {layer: ids for layer, ids in outliers.items() if ids}


def rank_correlations(scores: Sequence[ExpertScores]) -> dict[int, Tensor]:
    """Measures how far criteria agree, by Spearman's rank correlation; tied experts share their mean rank.

    Returns:
        {decoder layer: float64 [C, C]}, of every two of the scores, in [-1, 1]; NaN where one of them is the same for
        all experts of the layer.
    """
    from scipy.stats import rankdata  # here, because it takes half a second that only this function needs

    correlations = {}
    for layer in scores[0]:
        ranks = torch.from_numpy(rankdata(torch.stack([one[layer] for one in scores]).numpy(), axis=1))
        ranks -= ranks.mean(1, keepdim=True)
        norms = ranks.norm(dim=1)
        correlations[layer] = ((ranks @ ranks.T) / torch.outer(norms, norms)).clamp(-1, 1)
    return correlations
