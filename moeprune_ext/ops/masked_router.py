"""masked_router: routes under many masks or router maps at once (backend.py explains `backend`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import check_float, check_integer, check_same_device, check_shape, kernels, row_vector
from moeprune_ext.ops.reference import SCORES, RouterSpec

_DTYPE_CODES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/tensor.h


@torch.no_grad()
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Routes rows of logits as if pruned experts did not exist, under many masks or router maps at once.

    Candidates are given as one of

        keep [C, E]                 every row under every mask                  -> [C, N, K]
        keep, assigned [N]          row i under mask assigned[i]                -> [N, K]
        order [E], counts [C]       every row under every nested mask           -> [C, N, K]
        router_map [K', E]          every row by this map                       -> [N, K]
        router_map [C, K', E]       every row by every map                      -> [C, N, K]
        router_map, assigned [N]    row i by map assigned[i]                    -> [N, K]

    Under a mask only the kept experts take part in the softmax, the groups and the top-k. Experts are chosen by logit,
    or by score + correction bias; the lower id wins ties. This is what slicing the router computes. (It is our choice
    for ERNIE's softmax + bias too, whose released search keeps the denominator of the full softmax.) A NaN logit ranks
    first and makes the weights of a softmax NaN.

    A router map is EEP's W_RM (arXiv 2407.00945; for other routers than Mixtral's it is our choice). With s the
    router's scores of all E experts,

        pi = s @ router_map^T                                           [N, K']
        chosen by pi (+ router_map @ correction bias), the lower row first among equals
        weights = pi of the chosen, renormalised if the router does it; without that, the pi of a softmax are divided by
                  the mass of the experts that any row of the map refers to (by an entry other than 0);
                  then scale and weights_dtype

    A router that takes its softmax over the chosen logits is mapped as a renormalised softmax, which computes the same.
    Rows that are one-hot and distinct agree with the mask of their experts, with two exceptions: experts whose scores
    are equal by rounding, and softmax + correction bias, where the map chooses by the softmax over all experts.

    Entries, hence pi, may be negative: they are compared by value and divided by their sum whatever its sign, which
    may give infinite weights or NaN; the ids are distinct rows always. A score that is not finite makes NaN of each pi
    that refers to it, which ranks first. In a softmax all scores are NaN if one that is referred to is.

    Args:
        logits: [N, E] float32, bfloat16 or float16 (float64 goes to the reference), any strides.
        top_k: K, the number of experts chosen per row.
        keep: [C, E] bool, True where a mask keeps an expert.
        order: [E] int, a permutation of the experts, best first.
        counts: [C] int, in any order; mask c keeps the counts[c] first experts of `order`.
        router_map: [K', E] or [C, K', E] float32 (float64 with logits in float64), any strides; K' is the number of
            experts kept, top_k <= K' <= E.
        assigned: [N] int, the mask or map of each row.
        spec: the router's formula.
        backend: "auto", "native" or "torch".

    Returns:
        ids: int64, best first: the original expert ids, or with router_map its rows, in [0, K').
        weights: float32; float64 for logits in float64.

    Raises:
        ValueError: a mask keeps fewer than top_k experts (of a group-limited router: for some choice of groups);
            shapes, dtypes or devices do not fit; a row of router_map has only zeros; router_map goes with groups, or
            with softmax_over_chosen and a correction bias.
    """
    check_shape("logits", logits, ["N", "E"])
    check_float("logits", logits)
    n_experts = logits.shape[1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; expected 1 <= top_k <= E = {n_experts}")
    _check_spec(spec, n_experts)
    if sum(choice is not None for choice in (keep, order, router_map)) != 1 or (order is None) != (counts is None):
        raise ValueError("give the masks either as keep, or as order and counts, or else give a router_map")
    check_same_device("logits", logits, keep, order, router_map, assigned, spec.correction_bias)
    if counts is not None:
        counts = torch.as_tensor(counts, dtype=torch.int64, device=logits.device)
    candidates = _Candidates(keep, order, counts, router_map, assigned).checked(logits, top_k, spec)

    core = kernels(backend, logits)
    if core is not None and n_experts > core.MAX_EXPERTS:
        if backend == "native":
            raise ValueError(f"backend='native' routes at most {core.MAX_EXPERTS} experts, got {n_experts}")
        core = None
    if core is None:
        return reference.masked_router(logits, top_k=top_k, spec=spec, **vars(candidates))
    if router_map is not None:
        ids, weights = _run_mapped(core.mapped_router, logits, top_k, candidates, spec)
    else:
        ids, weights = _run_masked(core.masked_router, logits, top_k, candidates, spec)
    single = assigned is not None or (router_map is not None and router_map.dim() == 2)
    return (ids[0], weights[0]) if single else (ids, weights)


@dataclass(frozen=True)
class _Candidates:
    """The masks or router maps of one call, as `masked_router` takes them; counts are a tensor here."""

    keep: Tensor | None
    order: Tensor | None
    counts: Tensor | None
    router_map: Tensor | None
    assigned: Tensor | None

    def checked(self, logits: Tensor, top_k: int, spec: RouterSpec) -> _Candidates:
        """Turns nested masks into independent ones where the choice depends on more than membership.

        Raises:
            ValueError: the candidates do not fit the logits, or leave the router too few experts.
        """
        n_rows, n_experts = logits.shape
        if self.router_map is not None:
            _check_router_map(self.router_map, logits, top_k, spec)
            if self.assigned is not None and self.router_map.dim() == 2:
                raise ValueError("assigned goes with router_map [C, K', E]; a single map takes every row")
            _check_assigned(self.assigned, n_rows, len(self.router_map))
            return self
        if self.keep is not None:
            _check_keep(self.keep, n_experts)
            _check_assigned(self.assigned, n_rows, len(self.keep))
            _check_masks(self.keep, top_k, spec)
            return self
        assert self.order is not None and self.counts is not None
        if self.assigned is not None:
            raise ValueError("assigned goes with keep or router_map, not with order and counts")
        _check_nested(self.order, self.counts, top_k, n_experts)
        if spec.n_group == 1 and (spec.score != "softmax" or spec.correction_bias is None):
            return self
        rank = torch.empty_like(self.order, dtype=torch.int64)
        rank[self.order.long()] = torch.arange(n_experts, device=logits.device)
        keep = rank[None, :] < self.counts[:, None]
        _check_masks(keep, top_k, spec)
        return replace(self, keep=keep, order=None, counts=None)

    def walks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Describes the masks as walks (csrc/masked_router.h).

        Returns:
            lists: [walks, E] int32, experts in the order in which they are visited.
            stops: [walks, stops] int32, the numbers of experts after which a walk answers.
            slots: [walks, stops] int32, the indices of these answers.
        """
        if self.keep is not None:
            lists = _true_first(self.keep)
            stops = self.keep.sum(-1)[:, None]
            every = self.assigned is None
            slots = torch.arange(len(stops), device=stops.device)[:, None] if every else torch.zeros_like(stops)
        else:
            assert self.order is not None and self.counts is not None
            lists = self.order[None, :]
            stops, slots = (ranked[None, :] for ranked in self.counts.sort(stable=True))
        return lists.to(torch.int32).contiguous(), stops.to(torch.int32), slots.to(torch.int32)


def _true_first(flags: Tensor) -> Tensor:
    """[C, E] bool -> [C, E] int64: the indices of True in ascending order, then the others."""
    return (~flags).to(torch.int8).sort(dim=-1, stable=True).indices


def _run_masked(
    kernel: Callable[..., None], logits: Tensor, top_k: int, candidates: _Candidates, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """Runs the kernel that routes under masks. Returns ids and weights [slots, N, K]."""
    lists, stops, slots = candidates.walks()
    arguments, ids, weights = _router_arguments(logits, top_k, slots.numel(), candidates.assigned, spec)
    kernel(
        **arguments,
        lists=lists,
        stops=stops,
        slots=slots,
        correction_bias=row_vector(spec.correction_bias, logits, torch.float32),
        n_group=spec.n_group,
        topk_group=spec.topk_group,
        group_top2_sum=spec.group_score == "top2_sum",
    )
    return ids, weights


def _run_mapped(
    kernel: Callable[..., None], logits: Tensor, top_k: int, candidates: _Candidates, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    """Runs the kernel that routes by router maps. Returns ids and weights [slots, N, K]."""
    assert candidates.router_map is not None
    maps = candidates.router_map.detach()
    if maps.dim() == 2:
        maps = maps[None]
    referred = maps.any(-2)
    bias = row_vector(spec.correction_bias, logits, torch.float32)
    arguments, ids, weights = _router_arguments(logits, top_k, len(maps), candidates.assigned, spec)
    kernel(
        **arguments,
        maps=maps,
        experts=_true_first(referred).to(torch.int32),
        counts=referred.sum(-1, dtype=torch.int32),
        mapped_bias=None if bias is None else maps @ bias,
    )
    return ids, weights


def _router_arguments(
    logits: Tensor, top_k: int, n_candidates: int, assigned: Tensor | None, spec: RouterSpec
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Makes the arguments that both kernels take (csrc/router.h), the answers among them.

    Returns:
        arguments: by name.
        ids: [slots, N, K] int64, to be filled; one slot where rows are assigned, otherwise one for each candidate.
        weights: [slots, N, K] float32, likewise.
    """
    shape = (n_candidates if assigned is None else 1, logits.shape[0], top_k)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    arguments = dict(
        logits=logits.detach(),
        assigned=row_vector(assigned, logits, torch.int64),
        top_k=top_k,
        score=SCORES.index(spec.score),
        renormalize=spec.renormalize,
        eps=spec.eps,
        scale=spec.scale,
        weights_dtype=_DTYPE_CODES[spec.weights_dtype],
        ids=ids,
        weights=weights,
        threads=torch.get_num_threads(),
    )
    return arguments, ids, weights


def _check_spec(spec: RouterSpec, n_experts: int) -> None:
    """Raises ValueError unless the formula fits this number of experts."""
    if n_experts % spec.n_group:
        raise ValueError(f"spec.n_group is {spec.n_group}, which does not divide the {n_experts} experts")
    if spec.correction_bias is not None:
        check_shape("spec.correction_bias", spec.correction_bias, [n_experts])


def _check_masks(keep: Tensor, top_k: int, spec: RouterSpec) -> None:
    """Raises ValueError unless every mask of keep [C, E] leaves the router enough experts whatever it chooses."""
    kept = keep.sum(-1)
    if (kept < top_k).any():
        mask = int((kept < top_k).nonzero()[0])
        raise ValueError(
            f"mask {mask} keeps {int(kept[mask])} experts but the router selects {top_k} per token; "
            "keep more experts or lower top_k"
        )
    if spec.n_group == 1:
        return
    width = 2 if spec.group_score == "top2_sum" else 1
    per_group = keep.reshape(keep.shape[0], spec.n_group, -1).sum(-1)
    for mask, sizes in enumerate(per_group.tolist()):
        present = sorted(size for size in sizes if size)
        if len(present) < spec.topk_group:
            raise ValueError(
                f"mask {mask} keeps experts of {len(present)} groups but the router selects {spec.topk_group} groups"
            )
        if present[0] < width:
            raise ValueError(
                f"mask {mask} keeps {present[0]} expert of a group whose score is the sum of its best two; "
                "keep two or none"
            )
        if sum(present[: spec.topk_group]) < top_k:
            raise ValueError(
                f"mask {mask} keeps groups of {present} experts: {spec.topk_group} of them may hold "
                f"fewer than the {top_k} experts selected per token"
            )


def _check_keep(keep: Tensor, n_experts: int) -> None:
    """Raises ValueError unless `keep` is [C, E] bool."""
    check_shape("keep", keep, ["C", n_experts])
    if keep.dtype != torch.bool:
        raise ValueError(f"keep has dtype {keep.dtype}; expected bool")


def _check_assigned(assigned: Tensor | None, n_rows: int, n_candidates: int) -> None:
    """Raises ValueError unless `assigned`, if given, has a candidate for every row."""
    if assigned is None:
        return
    check_shape("assigned", assigned, [n_rows])
    check_integer("assigned", assigned)
    if n_rows and not (int(assigned.min()) >= 0 and int(assigned.max()) < n_candidates):
        raise ValueError(f"assigned must lie in [0, C = {n_candidates})")


def _check_router_map(router_map: Tensor, logits: Tensor, top_k: int, spec: RouterSpec) -> None:
    """Raises ValueError unless the map fits the logits and the router's formula."""
    n_experts = logits.shape[1]
    check_shape("router_map", router_map, ["K'", n_experts] if router_map.dim() == 2 else ["C", "K'", n_experts])
    if router_map.dtype != torch.float32 and not router_map.dtype == logits.dtype == torch.float64:
        raise ValueError(
            f"router_map has dtype {router_map.dtype}; expected float32, or float64 with logits in float64"
        )
    n_kept = router_map.shape[-2]
    if not top_k <= n_kept <= n_experts:
        raise ValueError(
            f"router_map has {n_kept} rows; expected top_k = {top_k} <= rows <= E = {n_experts}: "
            "a row for every expert kept"
        )
    if spec.n_group > 1:
        raise ValueError(
            f"router_map does not go with a group-limited router (spec.n_group = {spec.n_group}): its rows mix experts "
            "of several groups; prune such a router by masks"
        )
    if spec.score == "softmax_over_chosen" and spec.correction_bias is not None:
        raise ValueError(
            "router_map does not go with score='softmax_over_chosen' and a correction bias, which is made for logits, "
            "while the map mixes probabilities"
        )
    without = ~router_map.any(-1)
    if without.any():
        *candidate, row = without.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of router_map{candidate or ''} has only zeros: no token would prefer the expert; "
            "every row needs an entry"
        )


def _check_nested(order: Tensor, counts: Tensor, top_k: int, n_experts: int) -> None:
    """Raises ValueError unless order is a permutation of the experts and each prefix holds at least top_k."""
    check_shape("order", order, [n_experts])
    everyone = torch.arange(n_experts, device=order.device)
    if order.is_floating_point() or not torch.equal(order.sort().values.long(), everyone):
        raise ValueError(f"order must be a permutation of the {n_experts} expert ids")
    check_shape("counts", counts, ["C"])
    if len(counts) and not (top_k <= int(counts.min()) and int(counts.max()) <= n_experts):
        raise ValueError(
            f"counts range from {int(counts.min())} to {int(counts.max())}; "
            f"expected top_k = {top_k} <= count <= E = {n_experts}"
        )
