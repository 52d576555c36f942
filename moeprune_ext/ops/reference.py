"""The definition of the operations in plain PyTorch.

The tests compare the kernels in csrc/ with this file, which therefore prefers the literal spelling to the fast one: a
pruned expert is sliced away, a draw walks the cumulative distribution. Everything works on any device; float64 inputs
are computed in float64, all others in float32. Inputs are trusted here; the files beside this one check them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("esap", "kl_pq", "kl_qp", "top1_agree", "nll", "accept")
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_over_chosen")
GROUP_SCORES = ("max", "top2_sum")
IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class RouterSpec:
    """How a router turns logits into top-k experts and their weights.

    Attributes:
        score: of an expert, from its logit, one of SCORES; a softmax runs over the kept experts only.
            "softmax_over_chosen" (GPT-OSS) chooses by the logits and takes the softmax of the chosen ones.
        renormalize: whether weights are divided by (sum of the chosen weights + eps).
        eps: see renormalize; 1e-20 in DeepSeek-V3.
        scale: multiplies the weights last.
        correction_bias: [E] or None, added to the score to *choose*, never to the weight.
        n_group: number of equal groups of consecutive experts; 1 for a router without groups.
        topk_group: number of the best groups among whose experts the router chooses.
        group_score: "max", the score of a group's best kept expert, or "top2_sum", the sum of its best two.
        weights_dtype: the dtype to which the model rounds the weights; they are returned as float32 all the same.
    """

    score: str = "softmax"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    correction_bias: Tensor | None = None
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    weights_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"RouterSpec.score is {self.score!r}; expected one of {SCORES}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"RouterSpec.group_score is {self.group_score!r}; expected one of {GROUP_SCORES}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"RouterSpec has topk_group={self.topk_group} and n_group={self.n_group}; "
                "expected 1 <= topk_group <= n_group"
            )
        if self.correction_bias is not None and self.correction_bias.dim() != 1:
            raise ValueError(f"RouterSpec.correction_bias has shape {list(self.correction_bias.shape)}; expected [E]")
        if self.weights_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"RouterSpec.weights_dtype is {self.weights_dtype}; expected None, float32, bfloat16 or float16"
            )


def draw_uniforms(seed: int, rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Makes the draws behind the metric `accept`: SplitMix64 of (seed, row).

    They depend on the seed and the row only, so a candidate gets the same draws alone or among others.

    Args:
        seed: any integer.
        rows: number of draws.
        device: of the result.

    Returns:
        [rows] float64 in [0, 1).
    """

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def xor_shift(z: Tensor, bits: int) -> Tensor:
        return z ^ ((z >> bits) & (2 ** (64 - bits) - 1))  # >> of int64 copies the sign: mask it off

    z = torch.arange(1, rows + 1, dtype=torch.int64) * signed(0x9E3779B97F4A7C15) + signed(seed)
    z = xor_shift(z, 30) * signed(0xBF58476D1CE4E5B9)
    z = xor_shift(z, 27) * signed(0x94D049BB133111EB)
    z = xor_shift(z, 31)
    return (((z >> 11) & (2**53 - 1)).double() * 2.0**-53).to(device)


def log_sum_exp(logits: Tensor) -> Tensor:
    """logits [..., V] -> [...] float64; NaN where the softmax does not exist (NaN, +inf or only -inf in a row)."""
    x = _computed(logits)
    highest = x.amax(-1, keepdim=True)
    lse = highest[..., 0].double() + (x - highest).exp().sum(-1, dtype=torch.float64).log()
    return torch.where(lse.isfinite(), lse, torch.nan)


def _log_probabilities(x: Tensor, lse: Tensor) -> Tensor:
    """Computes x - lse with lse in two parts, so that an offset common to all logits costs no accuracy."""
    lse = torch.where(lse.isfinite(), lse.double(), torch.nan)
    high = lse.to(x.dtype)
    return (x - high[..., None]) - (lse - high.double()).to(x.dtype)[..., None]


def overlap(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    p_lse: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = ("esap",),
    seed: int = 0,
    uniform: Tensor | None = None,
) -> dict[str, Tensor]:
    """p_logits [T, V], q_logits [C, T, V] or [T, V] -> {metric: [C, T]}; see `moeprune_ext.overlap`.

    Args:
        uniform: [T], the draws behind `accept`; draw_uniforms(seed, T) unless the rows are part of a larger set.
    """
    p_logits = _computed(p_logits)
    q_logits = _computed(q_logits if q_logits.dim() == 3 else q_logits[None])
    log_p = _log_probabilities(p_logits, log_sum_exp(p_logits) if p_lse is None else p_lse)[None]  # [1, T, V]
    log_q = _log_probabilities(q_logits, log_sum_exp(q_logits))  # [C, T, V]
    p, q = log_p.exp(), log_q.exp()
    undefined = log_p.isnan().any(-1) | log_q.isnan().any(-1)  # [C, T]

    results: dict[str, Tensor] = {}
    for metric in metrics:
        if metric == "esap":
            value = torch.minimum(p, q).sum(-1)
        elif metric == "kl_pq":
            value = _kl(p, log_p, log_q)
        elif metric == "kl_qp":
            value = _kl(q, log_q, log_p)
        elif metric == "top1_agree":
            value = (_first_argmax(p_logits) == _first_argmax(q_logits)).to(q.dtype)
        elif metric == "nll":
            assert labels is not None
            scored = labels != IGNORED_LABEL
            index = labels.where(scored, 0).expand(q.shape[:2])[..., None]
            value = torch.where(scored, -log_q.gather(-1, index)[..., 0], 0.0)
        else:  # accept: the first token whose cumulative probability under q exceeds u
            u = draw_uniforms(seed, q.shape[1], q.device) if uniform is None else uniform
            cumulative = q.double().cumsum(-1)
            last = (q > 0).long().cumsum(-1).argmax(-1)  # where rounding keeps the total below u
            token = torch.minimum((cumulative <= u[:, None]).sum(-1), last)[..., None]
            ratio = log_p.expand_as(log_q).gather(-1, token) - log_q.gather(-1, token)
            value = ratio.exp().clamp(max=1.0)[..., 0]
        value = torch.where(undefined, torch.nan, value)
        if weight is not None:
            value = torch.where(weight == 0, 0.0, value * weight.to(value.dtype))
        results[metric] = value
    return results


def overlap_from_hidden(
    p_hidden: Tensor,
    q_hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    *,
    p_lse: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = ("esap",),
    seed: int = 0,
) -> dict[str, Tensor]:
    """p_hidden [T, H], q_hidden [C, T, H] or [T, H] -> {metric: [C, T]}: overlap of head(p) and head(q)."""
    logits = (lambda hidden: F.linear(hidden, head)) if isinstance(head, Tensor) else head
    return overlap(
        logits(p_hidden),
        logits(q_hidden),
        p_lse=p_lse,
        weight=weight,
        labels=labels,
        metrics=metrics,
        seed=seed,
    )


def masked_router(
    logits: Tensor,
    *,
    top_k: int,
    keep: Tensor | None = None,
    order: Tensor | None = None,
    counts: Tensor | Sequence[int] | None = None,
    router_map: Tensor | None = None,
    assigned: Tensor | None = None,
    spec: RouterSpec = RouterSpec(),
) -> tuple[Tensor, Tensor]:
    """logits [N, E] -> ids and weights, [C, N, K] or [N, K]; see `moeprune_ext.masked_router`."""
    logits = _computed(logits)
    route: Callable[[Tensor, Tensor, int, RouterSpec], tuple[Tensor, Tensor]] = _route
    if router_map is not None:
        route = _route_mapped
        candidates = list(router_map if router_map.dim() == 3 else router_map[None])
    elif keep is not None:
        candidates = [mask.nonzero()[:, 0] for mask in keep]
    else:
        assert order is not None and counts is not None
        candidates = [order[: int(count)].sort().values.to(torch.int64) for count in counts]

    n_rows = logits.shape[0]
    if assigned is not None:
        ids = torch.zeros(n_rows, top_k, dtype=torch.int64, device=logits.device)
        weights = logits.new_zeros(n_rows, top_k)
        for c, candidate in enumerate(candidates):
            rows = (assigned == c).nonzero()[:, 0]
            if len(rows):
                ids[rows], weights[rows] = route(logits[rows], candidate, top_k, spec)
        return ids, weights
    if not candidates:
        shape = (0, n_rows, top_k)
        return torch.zeros(shape, dtype=torch.int64, device=logits.device), logits.new_zeros(shape)
    if router_map is not None and router_map.dim() == 2:
        return route(logits, router_map, top_k, spec)
    routed = [route(logits, candidate, top_k, spec) for candidate in candidates]
    return torch.stack([ids for ids, _ in routed]), torch.stack([weights for _, weights in routed])


def routing_moments_(
    moments: Tensor,
    max_norm: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    outputs: Tensor | None = None,
    *,
    norms: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """moments [E, 3, 3] += gate^a * ||output||^b of S pairs; see `moeprune_ext.routing_moments_`."""
    if norms is None:
        assert outputs is not None
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float64)
    ids, gates, norms = expert_ids.long(), gates.double(), norms.double()
    if valid is not None:
        ids, gates, norms = ids[valid], gates[valid], norms[valid]
    one = torch.ones_like(gates)
    gate_powers = torch.stack([one, gates, gates * gates], dim=-1)
    norm_powers = torch.stack([one, norms, norms * norms], dim=-1)
    table = gate_powers[:, :, None] * norm_powers[:, None, :]  # [S, 3, 3]
    if moments.is_cuda:  # index_add_ there adds in any order; index_put_ sorts first, so it is deterministic
        moments.index_put_((ids,), table, accumulate=True)
    else:
        moments.index_add_(0, ids, table)
    max_norm.scatter_reduce_(0, ids, norms.to(max_norm.dtype), reduce="amax", include_self=True)


def _computed(values: Tensor) -> Tensor:
    """Converts to the dtype that is computed in."""
    return values if values.dtype == torch.float64 else values.float()


def _kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Computes KL(a || b), with 0 log 0 = 0, and +inf where b is impossible and a is not."""
    terms = a * (log_a - log_b)
    terms = torch.where(log_b == -torch.inf, torch.inf, terms)
    return torch.where(log_a == -torch.inf, 0.0, terms).sum(-1)


def _first_argmax(values: Tensor) -> Tensor:
    """Finds the lowest index of the largest value (torch.argmax does not promise which of equals)."""
    index = torch.arange(values.shape[-1], device=values.device)
    is_largest = values == values.amax(-1, keepdim=True)
    return torch.where(is_largest, index, values.shape[-1]).amin(-1)


def _route(logits: Tensor, kept: Tensor, top_k: int, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Routes every row of logits [N, E] among the experts in `kept` (ascending ids): ids and weights [N, K]."""
    n_experts = logits.shape[1]
    logits = logits[:, kept]
    scores = logits if spec.score == "softmax_over_chosen" else _scores(logits, spec)
    # Every score grows with the logit, so without a bias the logits give the same choice, free of rounding ties.
    choice = logits
    if spec.correction_bias is not None:
        scores_for_choice = choice = scores + spec.correction_bias[kept].to(scores)
    else:
        scores_for_choice = scores if spec.group_score == "top2_sum" else logits

    ranked = choice.sort(dim=-1, descending=True, stable=True).indices
    if spec.n_group > 1:
        group_of = kept // (n_experts // spec.n_group)
        group_scores = logits.new_full((logits.shape[0], spec.n_group), -torch.inf)
        width = 2 if spec.group_score == "top2_sum" else 1
        present = group_of.unique().tolist()
        for group in present:
            group_scores[:, group] = scores_for_choice[:, group_of == group].topk(width).values.sum(-1)
        # Only groups that keep an expert take part, however low their scores.
        best = group_scores[:, present].sort(dim=-1, descending=True, stable=True).indices[:, : spec.topk_group]
        chosen_groups = torch.tensor(present, device=logits.device)[best]
        allowed = (group_of[None, :, None] == chosen_groups[:, None, :]).any(-1)
        first = allowed.gather(-1, ranked).long().sort(dim=-1, descending=True, stable=True).indices
        ranked = ranked.gather(-1, first)

    chosen = ranked[:, :top_k]
    weights = scores.gather(-1, chosen)
    if spec.score == "softmax_over_chosen":
        weights = weights.softmax(-1)
    return kept[chosen], _finished(weights, spec)


def _route_mapped(logits: Tensor, router_map: Tensor, top_k: int, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Routes every row of logits [N, E] by router_map [K', E]: its rows' indices and weights [N, K].

    The softmax runs over the experts that any row of the map refers to, as it runs over the kept ones under a mask:
    this is the softmax over all divided by the mass of those referred to. Where weights are renormalised the mass
    makes no difference.
    """
    router_map = router_map.to(logits)
    referred = (router_map != 0).any(0)
    pi = choice = _mapped(_scores(logits[:, referred], spec), router_map[:, referred])
    if spec.correction_bias is not None:
        if spec.score == "softmax":  # the bias is made for the probabilities among all experts
            choice = _mapped(_scores(logits, spec), router_map)
        choice = choice + router_map @ spec.correction_bias.to(logits)
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = pi.gather(-1, chosen)
    if spec.score == "softmax_over_chosen":  # of the chosen logits: their probabilities, to sum 1
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, _finished(weights, spec)


def _mapped(scores: Tensor, router_map: Tensor) -> Tensor:
    """Computes scores [N, E] @ router_map^T, where an entry of 0 leaves the expert out.

    A score that is not finite makes NaN of what refers to it, and only of that.
    """
    finite = scores.isfinite()
    referring = F.linear((~finite).to(scores), (router_map != 0).to(scores)) > 0
    return F.linear(scores.where(finite, 0), router_map).masked_fill(referring, torch.nan)


def _scores(logits: Tensor, spec: RouterSpec) -> Tensor:
    """Computes the scores of the experts, probabilities for both kinds of softmax."""
    if spec.score == "sigmoid":
        return logits.sigmoid()
    if spec.score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits.softmax(-1)


def _finished(weights: Tensor, spec: RouterSpec) -> Tensor:
    """Renormalises, scales and rounds the weights of the chosen [N, K] as the router does."""
    if spec.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + spec.eps)
    weights = weights * spec.scale
    if spec.weights_dtype is not None:
        weights = weights.to(spec.weights_dtype).to(weights.dtype)
    return weights
