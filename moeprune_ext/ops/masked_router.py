"""masked_router as a Python function: validate, allocate, dispatch (see dispatch.py for `backend`)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import check_float, check_shape, kernels, row_vector
from moeprune_ext.ops.reference import SCORES, RouterSpec

_DTYPE_CODES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/tensor.h


def _check_spec(spec: RouterSpec, n_experts: int) -> None:
    if n_experts % spec.n_group:
        raise ValueError(f"spec.n_group is {spec.n_group}, which does not divide the {n_experts} experts")
    if spec.correction_bias is not None:
        check_shape("spec.correction_bias", spec.correction_bias, [n_experts])


def _check_masks(keep: Tensor, top_k: int, spec: RouterSpec) -> None:
    """Every mask of keep [C, E] must leave the router enough experts whatever it chooses."""
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
    check_shape("keep", keep, ["C", n_experts])
    if keep.dtype != torch.bool:
        raise ValueError(f"keep has dtype {keep.dtype}; expected bool")


def _check_assigned(assigned: Tensor | None, n_rows: int, n_candidates: int) -> None:
    if assigned is None:
        return
    check_shape("assigned", assigned, [n_rows])
    if assigned.is_floating_point() or assigned.dtype == torch.bool:
        raise ValueError(f"assigned has dtype {assigned.dtype}; expected an integer dtype")
    if n_rows and not (int(assigned.min()) >= 0 and int(assigned.max()) < n_candidates):
        raise ValueError(f"assigned must lie in [0, C = {n_candidates})")


def _check_router_map(router_map: Tensor, logits: Tensor, top_k: int, spec: RouterSpec) -> None:
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


def _walks(
    keep: Tensor | None, order: Tensor | None, counts: Tensor | Sequence[int] | None, assigned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The masks as walks (csrc/masked_router.h): lists of experts, the stops at which each answers, and where to."""
    if keep is not None:
        lists = (~keep).to(torch.int8).sort(dim=-1, stable=True).indices  # kept ids first, ascending
        slots = torch.arange(keep.shape[0], device=keep.device)[:, None]
        return lists, keep.sum(-1)[:, None], slots if assigned is None else torch.zeros_like(slots)
    assert order is not None and isinstance(counts, Tensor)
    ascending = counts.sort(stable=True)
    return order[None, :], ascending.values[None, :], ascending.indices[None, :]


def _masked_router_native(
    core: ModuleType,
    logits: Tensor,
    top_k: int,
    walks: tuple[Tensor, Tensor, Tensor],
    assigned: Tensor | None,
    spec: RouterSpec,
) -> tuple[Tensor, Tensor]:
    lists, stops, slots = walks
    n_answers = slots.numel() if assigned is None else 1
    ids = torch.empty(n_answers, logits.shape[0], top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(n_answers, logits.shape[0], top_k, dtype=torch.float32, device=logits.device)
    core.masked_router(
        logits.detach(),
        lists.to(torch.int32).contiguous(),
        stops.to(torch.int32).contiguous(),
        slots.to(torch.int32).contiguous(),
        row_vector(assigned, logits, torch.int64),
        top_k,
        SCORES.index(spec.score),
        spec.renormalize,
        spec.eps,
        spec.scale,
        row_vector(spec.correction_bias, logits, torch.float32),
        spec.n_group,
        spec.topk_group,
        spec.group_score == "top2_sum",
        ids,
        weights,
        _DTYPE_CODES[spec.weights_dtype],
        torch.get_num_threads(),
    )
    return (ids, weights) if assigned is None else (ids[0], weights[0])


def _mapped_router_native(
    core: ModuleType, logits: Tensor, top_k: int, router_map: Tensor, assigned: Tensor | None, spec: RouterSpec
) -> tuple[Tensor, Tensor]:
    several = router_map.dim() == 3
    maps = router_map.detach() if several else router_map.detach()[None]
    referred = maps.any(-2)
    bias = row_vector(spec.correction_bias, logits, torch.float32)
    n_answers = len(maps) if assigned is None else 1
    ids = torch.empty(n_answers, logits.shape[0], top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(n_answers, logits.shape[0], top_k, dtype=torch.float32, device=logits.device)
    core.mapped_router(
        logits.detach(),
        maps,
        (~referred).to(torch.int8).sort(dim=-1, stable=True).indices.to(torch.int32),  # those referred to first
        referred.sum(-1, dtype=torch.int32),
        None if bias is None else maps @ bias,
        row_vector(assigned, logits, torch.int64),
        top_k,
        SCORES.index(spec.score),
        spec.renormalize,
        spec.eps,
        spec.scale,
        ids,
        weights,
        _DTYPE_CODES[spec.weights_dtype],
        torch.get_num_threads(),
    )
    return (ids, weights) if several and assigned is None else (ids[0], weights[0])


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

    logits: [N, E] float32, bfloat16 or float16 (float64 goes to the reference), any strides. With them, one of:
        keep [C, E] bool            every row under every mask              -> [C, N, K]
        keep, assigned [N] int      row i under mask assigned[i]            -> [N, K]
        order [E], counts [C]       nested masks: the counts[c] first of `order`, a permutation of the
                                    experts, best first; counts in any order          -> [C, N, K]
        router_map [K', E]          every row by this map, of K' experts kept -> [N, K]
        router_map [C, K', E]       every row by every map                  -> [C, N, K]
        router_map, assigned [N]    row i by map assigned[i]                -> [N, K]
    spec: the router's formula, see RouterSpec.
    Returns ids (int64, best first: the original expert ids, or with router_map its rows, in [0, K')) and
    weights (float32; float64 for float64 logits).

    Kept experts only take part: in the softmax, in the groups, in the top-k. Experts are chosen by logit, or
    by score + correction bias; the lower id wins ties. This is what slicing the router computes (our choice
    for ERNIE's softmax + bias too, whose released search keeps the full softmax's denominator).

    A NaN logit ranks first and makes the weights of a softmax NaN.

    router_map (float32, any strides; float64 only with float64 logits; top_k <= K' <= E) is EEP's W_RM
    (arXiv 2407.00945; other routers than Mixtral's: our choice). With s = the router's scores of all E experts,

        pi = s @ router_map^T                                           [N, K']
        chosen by pi (+ router_map @ correction bias), the lower row first among equals
        weights = pi of the chosen, renormalised if the router does it; without that, the pi of a softmax are divided by
                  the mass of the experts that any row of the map refers to (by an entry other than 0);
                  then scale and weights_dtype

    The router that takes its softmax over the chosen logits computes what a renormalised softmax does, and is mapped
    as one. Rows that are one-hot and distinct agree with the mask of their experts, but for experts whose scores are
    equal by rounding, and except softmax + correction bias, where the map chooses by the softmax over all experts.

    Entries, hence pi, may be negative: they are compared by value, and divided by their sum whatever its sign, which
    may give infinite weights or NaN; ids are distinct rows always. A score that is not finite makes NaN of each pi that
    refers to it, which ranks first. In a softmax all scores are NaN if one that is referred to is.

    Raises ValueError if a mask keeps fewer than top_k experts (for group-limited routers: in some choice of
    groups), on shapes and dtypes that do not fit, and on a router_map that has a row of zeros or goes with groups, or
    with softmax_over_chosen and a correction bias.
    """
    check_shape("logits", logits, ["N", "E"])
    check_float("logits", logits)
    n_rows, n_experts = logits.shape
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; expected 1 <= top_k <= E = {n_experts}")
    _check_spec(spec, n_experts)
    if sum(given is not None for given in (keep, order, router_map)) != 1 or (order is None) != (counts is None):
        raise ValueError("give the masks either as keep, or as order and counts, or else give a router_map")
    for tensor in (keep, order, router_map, assigned, spec.correction_bias):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"logits are on {logits.device} and another argument on {tensor.device}; move them to one device"
            )

    if router_map is not None:
        _check_router_map(router_map, logits, top_k, spec)
        if assigned is not None and router_map.dim() == 2:
            raise ValueError("assigned goes with router_map [C, K', E]; a single map takes every row")
        _check_assigned(assigned, n_rows, len(router_map))
    elif keep is not None:
        _check_keep(keep, n_experts)
        _check_assigned(assigned, n_rows, len(keep))
        _check_masks(keep, top_k, spec)
    else:
        assert order is not None and counts is not None
        if assigned is not None:
            raise ValueError("assigned goes with keep or router_map, not with order and counts")
        counts = torch.as_tensor(counts, dtype=torch.int64, device=logits.device)
        _check_nested(order, counts, top_k, n_experts)
        if spec.n_group > 1 or (spec.score == "softmax" and spec.correction_bias is not None):
            # The choice depends on the mask beyond membership: independent masks then.
            rank = torch.empty_like(order, dtype=torch.int64)
            rank[order.long()] = torch.arange(n_experts, device=order.device)
            keep, order = rank[None, :] < counts[:, None], None
            _check_masks(keep, top_k, spec)

    core = kernels(backend, logits)
    if core is not None and n_experts > core.MAX_EXPERTS:
        if backend == "native":
            raise ValueError(f"backend='native' routes at most {core.MAX_EXPERTS} experts, got {n_experts}")
        core = None
    if core is None:
        return reference.masked_router(
            logits,
            top_k=top_k,
            keep=keep,
            order=order,
            counts=counts,
            router_map=router_map,
            assigned=assigned,
            spec=spec,
        )
    if router_map is not None:
        return _mapped_router_native(core, logits, top_k, router_map, assigned, spec)
    return _masked_router_native(core, logits, top_k, _walks(keep, order, counts, assigned), assigned, spec)
