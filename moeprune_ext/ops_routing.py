"""masked_router and routing_moments_ as Python functions: validate, allocate, dispatch (see dispatch.py for
`backend`)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from moeprune_ext import reference
from moeprune_ext.dispatch import DEFAULT_CHUNK_BYTES, check_float, check_shape, kernels, row_chunks, row_vector
from moeprune_ext.reference import SCORES, RouterSpec

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


def _check_keep(keep: Tensor, assigned: Tensor | None, n_rows: int, n_experts: int) -> None:
    check_shape("keep", keep, ["C", n_experts])
    if keep.dtype != torch.bool:
        raise ValueError(f"keep has dtype {keep.dtype}; expected bool")
    if assigned is not None:
        check_shape("assigned", assigned, [n_rows])
        if assigned.is_floating_point() or assigned.dtype == torch.bool:
            raise ValueError(f"assigned has dtype {assigned.dtype}; expected an integer dtype")
        if n_rows and not (int(assigned.min()) >= 0 and int(assigned.max()) < keep.shape[0]):
            raise ValueError(f"assigned must lie in [0, C = {keep.shape[0]})")


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


@torch.no_grad()
def masked_router(
    logits: Tensor,
    *,
    top_k: int,
    keep: Tensor | None = None,
    order: Tensor | None = None,
    counts: Tensor | Sequence[int] | None = None,
    assigned: Tensor | None = None,
    spec: RouterSpec = RouterSpec(),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Routes rows of logits as if pruned experts did not exist, under many masks at once.

    logits: [N, E] float32, bfloat16 or float16 (float64 goes to the reference), any strides. Masks, one of:
        keep [C, E] bool            every row under every mask              -> [C, N, K]
        keep, assigned [N] int      row i under mask assigned[i]            -> [N, K]
        order [E], counts [C]       nested masks: the counts[c] first of `order`, a permutation of the
                                    experts, best first; counts in any order          -> [C, N, K]
    spec: the router's formula, see RouterSpec.
    Returns ids (int64, the original expert ids, best first) and weights (float32; float64 for float64
    logits).

    Kept experts only take part: in the softmax, in the groups, in the top-k. Experts are chosen by logit, or
    by score + correction bias; the lower id wins ties. This is what slicing the router computes (our choice
    for ERNIE's softmax + bias too, whose released search keeps the full softmax's denominator).

    A NaN logit ranks first and makes the weights of a softmax NaN.

    Raises ValueError if a mask keeps fewer than top_k experts (for group-limited routers: in some choice of
    groups), and on shapes and dtypes that do not fit.
    """
    check_shape("logits", logits, ["N", "E"])
    check_float("logits", logits)
    n_rows, n_experts = logits.shape
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}; expected 1 <= top_k <= E = {n_experts}")
    _check_spec(spec, n_experts)
    if (keep is None) == (order is None) or (order is None) != (counts is None):
        raise ValueError("give the masks either as keep, or as order and counts")
    for tensor in (keep, order, assigned, spec.correction_bias):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(
                f"logits are on {logits.device} and another argument on {tensor.device}; move them to one device"
            )

    if keep is not None:
        _check_keep(keep, assigned, n_rows, n_experts)
        _check_masks(keep, top_k, spec)
    else:
        assert order is not None and counts is not None
        if assigned is not None:
            raise ValueError("assigned goes with keep, not with order and counts")
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
            logits, top_k=top_k, keep=keep, order=order, counts=counts, assigned=assigned, spec=spec
        )

    return _masked_router_native(core, logits, top_k, _walks(keep, order, counts, assigned), assigned, spec)


def _check_pairs(
    moments: Tensor,
    max_norm: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    outputs: Tensor | None,
    norms: Tensor | None,
    valid: Tensor | None,
) -> None:
    check_shape("max_norm", max_norm, ["E"])
    n_experts = max_norm.shape[0]
    check_shape("moments", moments, [n_experts, 3, 3])
    for name, table, dtype in (("moments", moments, torch.float64), ("max_norm", max_norm, torch.float32)):
        if table.dtype != dtype or not table.is_contiguous():
            raise ValueError(f"{name} is {table.dtype} with strides {table.stride()}; expected contiguous {dtype}")
    check_shape("expert_ids", expert_ids, ["S"])
    n_pairs = expert_ids.shape[0]
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids has dtype {expert_ids.dtype}; expected int32 or int64")
    check_shape("gates", gates, [n_pairs])
    check_float("gates", gates)
    if (outputs is None) == (norms is None):
        raise ValueError("give either outputs [S, H] or norms [S]")
    if outputs is not None:
        check_shape("outputs", outputs, [n_pairs, "H"])
        check_float("outputs", outputs)
    if norms is not None:
        check_shape("norms", norms, [n_pairs])
        check_float("norms", norms)
    if valid is not None:
        check_shape("valid", valid, [n_pairs])
        if valid.dtype != torch.bool:
            raise ValueError(f"valid has dtype {valid.dtype}; expected bool")
    for tensor in (moments, max_norm, gates, outputs, norms, valid):
        if tensor is not None and tensor.device != expert_ids.device:
            raise ValueError(
                f"expert_ids are on {expert_ids.device} and another argument on {tensor.device}; "
                "move them to one device"
            )
    outside = (expert_ids < 0) | (expert_ids >= n_experts)
    if valid is not None:
        outside &= valid
    if outside.any():
        raise ValueError(f"expert_ids contains {int(expert_ids[outside][0])}; expected 0 <= id < E = {n_experts}")


@torch.no_grad()
def routing_moments_(
    moments: Tensor,
    max_norm: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    outputs: Tensor | None = None,
    *,
    norms: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Adds S routed (token, expert) pairs to the table that every pruning criterion is an index into, in
    place.

        moments[e, a, b] += sum over pairs of e of gate^a * ||output||_2^b,   a, b in {0, 1, 2}
        max_norm[e]       = max(max_norm[e], ||output||_2)

    moments: [E, 3, 3] float64; max_norm: [E] float32; both contiguous.
    expert_ids: [S] int32 or int64; gates: [S], the coefficient that the model applies, any float dtype.
    outputs: [S, H] unweighted expert outputs, read once; or norms: [S] their norms, any float dtype.
    valid: [S] bool; pairs where it is False are not counted, and their ids not looked at.

    Deterministic: same input, same bits, whatever the number of threads. The tables of two splits of the
    same pairs add up to the table of all, within 1e-12 relative. A NaN output makes its expert's moments and
    max_norm NaN.
    On CUDA the check of the ids synchronises with the device once. Sources: arXiv 2606.15716, 2510.13999
    (methods: scoring).

    Raises ValueError on an id outside [0, E) and on shapes and dtypes that do not fit, before anything is
    changed.
    """
    _check_pairs(moments, max_norm, expert_ids, gates, outputs, norms, valid)
    n_pairs = expert_ids.shape[0]
    if n_pairs == 0:
        return

    # The norms' and gates' own dtypes are all handled; the kernels' limits concern the outputs.
    core = kernels(backend, outputs if outputs is not None else max_norm)
    if core is not None:
        # What a tile of pairs keeps between reading its outputs and adding up: norms in float64 and, on CUDA, ids.
        # It stays under 1 % of the outputs, and on the CPU in the cache.
        on_cpu = gates.device.type == "cpu"
        input_bytes = 0 if outputs is None else outputs.shape[1] * outputs.element_size() * n_pairs
        tile = min(n_pairs, 65_536) if on_cpu else n_pairs * 5 // 4 + 8
        workspace = torch.empty(max(64, min(tile, input_bytes // 800)), dtype=torch.float64, device=gates.device)
        core.routing_moments(
            moments,
            max_norm,
            expert_ids,
            gates.detach(),
            None if outputs is None else outputs.detach(),
            None if norms is None else norms.detach(),
            valid,
            workspace,
            torch.get_num_threads(),
        )
        return
    row_bytes = 8 * (outputs.shape[1] if outputs is not None else 1) + 256
    for rows in row_chunks(n_pairs, row_bytes, DEFAULT_CHUNK_BYTES):
        reference.routing_moments_(
            moments,
            max_norm,
            expert_ids[rows],
            gates[rows],
            None if outputs is None else outputs[rows],
            norms=None if norms is None else norms[rows],
            valid=None if valid is None else valid[rows],
        )
