"""routing_moments_ as a Python function: validate, allocate, dispatch (see dispatch.py for `backend`)."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import DEFAULT_CHUNK_BYTES, check_float, check_shape, kernels, row_chunks


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
