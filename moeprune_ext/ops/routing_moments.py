"""routing_moments_: the statistics of routed pairs behind every pruning criterion (backend.py explains `backend`)."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import (
    DEFAULT_CHUNK_BYTES,
    check_float,
    check_same_device,
    check_shape,
    kernels,
    row_chunks,
)


def _check_pairs(
    moments: Tensor,
    max_norm: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    outputs: Tensor | None,
    norms: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments of `routing_moments_` fit together."""
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
    check_same_device("expert_ids", expert_ids, moments, max_norm, gates, outputs, norms, valid)
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
    """Adds S routed (token, expert) pairs, in place, to the table from which every pruning criterion is computed.

        moments[e, a, b] += sum over pairs of e of gate^a * ||output||_2^b,   a, b in {0, 1, 2}
        max_norm[e]       = max(max_norm[e], ||output||_2)

    Deterministic: the same input gives the same bits, whatever the number of threads. The tables of two splits of the
    same pairs add up to the table of all, within 1e-12 relative. A NaN output makes its expert's moments and max_norm
    NaN. On CUDA the check of the ids synchronises with the device once. Sources: arXiv 2606.15716, 2510.13999.

    Args:
        moments: [E, 3, 3] float64, contiguous.
        max_norm: [E] float32, contiguous.
        expert_ids: [S] int32 or int64, in [0, E).
        gates: [S] any float dtype, the coefficients that the model applies.
        outputs: [S, H] any float dtype, the unweighted outputs of the experts, read once.
        norms: [S] any float dtype, the norms of the outputs, instead of `outputs`.
        valid: [S] bool; pairs where it is False do not count, and their ids are not read.
        backend: "auto", "native" or "torch".

    Raises:
        ValueError: an id is outside [0, E), or shapes, dtypes or devices do not fit. Nothing is changed then.
    """
    _check_pairs(moments, max_norm, expert_ids, gates, outputs, norms, valid)
    n_pairs = expert_ids.shape[0]
    if n_pairs == 0:
        return

    # All dtypes of norms and gates are handled; the kernels' limits concern the outputs.
    core = kernels(backend, outputs if outputs is not None else max_norm)
    if core is not None:
        core.routing_moments(
            moments=moments,
            max_norm=max_norm,
            expert_ids=expert_ids,
            gates=gates.detach(),
            outputs=None if outputs is None else outputs.detach(),
            norms=None if norms is None else norms.detach(),
            valid=valid,
            workspace=_workspace(gates, outputs),
            threads=torch.get_num_threads(),
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


def _workspace(gates: Tensor, outputs: Tensor | None) -> Tensor:
    """Allocates what the kernel keeps of a tile of pairs: norms in float64 and, on CUDA, experts.

    It stays under 1 % of the outputs and, on the CPU, in the cache.
    """
    n_pairs = len(gates)
    tile = min(n_pairs, 65_536) if gates.device.type == "cpu" else n_pairs * 5 // 4 + 8
    output_bytes = 0 if outputs is None else outputs.shape[1] * outputs.element_size() * n_pairs
    return torch.empty(max(64, min(tile, output_bytes // 800)), dtype=torch.float64, device=gates.device)
