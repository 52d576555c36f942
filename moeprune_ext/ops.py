"""The three operations as Python functions: validate, allocate, dispatch.

`backend="auto"` takes the compiled CPU kernels where they apply (float32, bfloat16 or float16 tensors on the
CPU) and `moeprune_ext.reference` elsewhere: for float64, and for CUDA tensors, because the CUDA kernels have
not been verified on hardware yet. `backend="native"` insists on the kernels, the CUDA ones included, and
raises where they do not apply; `backend="torch"` insists on the reference. No operation is differentiable.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune_ext import reference
from moeprune_ext.reference import IGNORED_LABEL, METRICS, SCORES, RouterSpec

_C: ModuleType | None = None
_import_error: ImportError | None = None
try:  # after torch, so that both share one OpenMP pool
    _C = importlib.import_module("moeprune_ext._C")
except ImportError as error:
    _import_error = error

__all__ = [
    "RouterSpec",
    "build_info",
    "log_sum_exp",
    "masked_router",
    "overlap",
    "overlap_from_hidden",
    "routing_moments_",
]

DEFAULT_CHUNK_BYTES = 256 * 2**20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_CODES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/tensor.h
_warned = False


def build_info() -> dict[str, Any]:
    """What was compiled in and what runs: version, cuda (compiled in), cuda_archs, cuda_runtime (version or
    None), cuda_available (a device can be used), cpu_isa (in use), cpu_isas (usable here), openmp, compiler.

    Without the compiled module: cpu_isa is "none" and compiler None.
    """
    if _C is not None:
        return dict(_C.build_info())
    return {
        "version": importlib.metadata.version("moeprune_ext"),
        "cuda": False,
        "cuda_archs": [],
        "cuda_runtime": None,
        "cuda_available": False,
        "cpu_isa": "none",
        "cpu_isas": [],
        "openmp": False,
        "compiler": None,
    }


def _kernels(backend: str, *tensors: Tensor) -> ModuleType | None:
    """The compiled module if it is to be used for tensors of these dtypes and devices, None for the
    reference."""
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'native' or 'torch'")
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors are on {tensors[0].device} and on {tensor.device}; move them to one device")
    if backend == "torch":
        return None
    if _C is None:
        if backend == "native":
            raise RuntimeError(
                "backend='native', but moeprune_ext._C cannot be imported; reinstall the package"
            ) from _import_error
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                f"moeprune_ext._C cannot be imported ({_import_error}); using slower PyTorch code",
                stacklevel=3,
            )
        return None
    device = tensors[0].device.type
    refused = [tensor.dtype for tensor in tensors if tensor.dtype not in _FLOATS]
    if backend == "auto":
        return None if refused or device != "cpu" else _C
    if refused:
        raise ValueError(f"backend='native' takes float32, bfloat16 and float16, got {refused[0]}; use backend='auto'")
    if device not in ("cpu", "cuda") or (device == "cuda" and not _C.build_info()["cuda"]):
        raise ValueError(f"backend='native' has no kernels for device {device!r} in this build")
    return _C


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    shape = list(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or s == e for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; expected [{', '.join(map(str, expected))}]")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (*_FLOATS, torch.float64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")


def _to(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A per-row vector (small beside the logits) in the dtype that the kernels read."""
    if tensor is None:
        return None
    if tensor.device != like.device:
        raise ValueError(f"tensors are on {like.device} and on {tensor.device}; move them to one device")
    return tensor.detach().to(dtype).contiguous()


# ---------------------------------------------------------------------------------------------------- overlap


def _check_overlap_rows(
    rows: int,
    vocabulary: int | None,
    p_lse: Tensor | None,
    weight: Tensor | None,
    labels: Tensor | None,
    metrics: Sequence[str],
) -> None:
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics is {metrics!r}; expected a non-empty sequence of names from {METRICS}")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics contains {metric!r}; expected names from {METRICS}")
    for name, vector in (("p_lse", p_lse), ("weight", weight), ("labels", labels)):
        if vector is not None:
            _check_shape(name, vector, [rows])
    if "nll" in metrics:
        if labels is None:
            raise ValueError("metric 'nll' needs labels, int64 [T], with -100 where a row has none")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels has dtype {labels.dtype}; expected int64")
        if vocabulary is not None:
            wrong = ((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= vocabulary)
            if wrong.any():
                raise ValueError(
                    f"labels contains {int(labels[wrong][0])}; expected -100 or 0 <= label < V = {vocabulary}"
                )


def _row_chunks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


@torch.no_grad()
def log_sum_exp(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """log sum_v exp(logits[t, v]) of logits [T, V] as float64 [T], in one read: what `overlap` takes as
    `p_lse`.

    float64 because the logarithm may be far from 0, where float32 would cost the probabilities their
    accuracy.
    NaN for rows without a softmax (a NaN, a +inf or only -inf in the row).
    """
    _check_shape("logits", logits, ["T", "V"])
    _check_float("logits", logits)
    core = _kernels(backend, logits)
    lse = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        raise ValueError("logits has no vocabulary (V = 0)")
    if core is not None:
        core.log_sum_exp(logits.detach(), lse, torch.get_num_threads())
        return lse
    for rows in _row_chunks(logits.shape[0], logits.shape[1] * 16, DEFAULT_CHUNK_BYTES):
        lse[rows] = reference.log_sum_exp(logits[rows])
    return lse


@torch.no_grad()
def overlap(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    p_lse: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = ("esap",),
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """How alike a teacher's (p) and C candidates' (q) next-token distributions are, row by row.

    p_logits: [T, V]; q_logits: [C, T, V], or [T, V] for one candidate. float32, bfloat16 or float16 (float64
        goes to the reference), any strides; p and q below are their softmaxes.
    p_lse: [T], `log_sum_exp(p_logits)`; saves a third of the arithmetic where p is compared again and again.
    weight: [T], multiplies a row's results; rows of weight 0 are not read and give 0.
    labels: [T] int, for "nll"; -100: no label, nll 0.
    metrics: any of
        "esap"        sum_v min(p, q): the expected acceptance of speculative decoding (arXiv 2603.06003)
        "kl_pq"       sum_v p (log p - log q), in nats
        "kl_qp"       sum_v q (log q - log p), in nats
        "top1_agree"  1 where the most likely tokens agree (the lowest index among equals), else 0
        "nll"         -log q[label], in nats
        "accept"      min(1, p/q) at one token drawn from q: the first whose cumulative probability exceeds u,
                      u uniform and depending on `seed` and the row only, so that a candidate gets the same
                      draw alone or among others.
    Returns {metric: [C, T]}, float32 (float64 for float64 inputs); C = 1 for q_logits [T, V].

    -inf is probability 0 (0 log 0 = 0; a KL is +inf where it must be). A row of p or q with NaN or +inf, or
    of -inf only, gives NaN in every metric. |error| <= 2e-6 against float64 for esap of float32 inputs up to
    V = 152k. The result of a row does not depend on the other rows, on the number of threads or on C.

    Raises ValueError on shapes, dtypes, labels or metrics that do not fit.
    """
    _check_shape("p_logits", p_logits, ["T", "V"])
    n_rows, vocabulary = p_logits.shape
    if q_logits.dim() == 2:
        q_logits = q_logits[None]
    _check_shape("q_logits", q_logits, ["C", n_rows, vocabulary])
    _check_float("p_logits", p_logits)
    _check_float("q_logits", q_logits)
    if vocabulary == 0:
        raise ValueError("p_logits has no vocabulary (V = 0)")
    _check_overlap_rows(n_rows, vocabulary, p_lse, weight, labels, metrics)
    uniform = reference.draw_uniforms(seed, n_rows, p_logits.device) if "accept" in metrics else None
    return _overlap(p_logits, q_logits, p_lse, weight, labels, uniform, metrics, backend)


def _overlap(
    p_logits: Tensor,
    q_logits: Tensor,
    p_lse: Tensor | None,
    weight: Tensor | None,
    labels: Tensor | None,
    uniform: Tensor | None,
    metrics: Sequence[str],
    backend: str,
) -> dict[str, Tensor]:
    core = _kernels(backend, p_logits, q_logits)
    shape = q_logits.shape[:2]
    p_lse = _to(p_lse, p_logits, torch.float64)
    weight = _to(weight, p_logits, torch.float64)
    labels = _to(labels, p_logits, torch.int64)
    if core is not None:
        results = {metric: torch.empty(shape, dtype=torch.float32, device=p_logits.device) for metric in metrics}
        core.overlap(
            p_logits.detach(),
            q_logits.detach(),
            p_lse,
            weight,
            labels if "nll" in metrics else None,
            uniform,
            [results.get(metric) for metric in METRICS],
            torch.get_num_threads(),
        )
        return results

    wide = torch.float64 in (p_logits.dtype, q_logits.dtype)
    dtype = torch.float64 if wide else torch.float32
    results = {metric: torch.zeros(shape, dtype=dtype, device=p_logits.device) for metric in metrics}
    # Rows of weight 0 are left out. The reference holds about eight temporaries the size of its logits.
    rows_read = torch.arange(shape[1], device=p_logits.device) if weight is None else weight.nonzero()[:, 0]
    row_bytes = 8 * p_logits.shape[1] * (8 if wide else 4)
    for chunk in _row_chunks(len(rows_read), row_bytes, DEFAULT_CHUNK_BYTES):
        rows = rows_read[chunk]
        for c in range(shape[0]):
            values = reference.overlap(
                p_logits[rows].to(dtype),
                q_logits[c][rows].to(dtype),
                p_lse=None if p_lse is None else p_lse[rows],
                weight=None if weight is None else weight[rows],
                labels=None if labels is None else labels[rows],
                metrics=metrics,
                uniform=None if uniform is None else uniform[rows],
            )
            for metric, value in values.items():
                results[metric][c, rows] = value[0]
    return results


@torch.no_grad()
def overlap_from_hidden(
    p_hidden: Tensor,
    q_hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    p_lse: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = ("esap",),
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """`overlap` of head(p_hidden) and head(q_hidden), without ever holding all the logits.

    p_hidden: [T, H]; q_hidden: [C, T, H], or [T, H] for one candidate: last hidden states, any float dtype.
    head: the output weight [V, H], or a callable from hidden states [n, H] to logits [n, V].
    chunk_bytes: bound on the logits in flight (p's and one candidate's, for as many rows as fit). The rows
        of a chunk do not depend on C, so a candidate's matrix products, hence its results, do not either.
    The other arguments and the results are those of `overlap`. Rows of weight 0 are not projected.

    Raises ValueError as `overlap` does, and if chunk_bytes does not hold two rows of logits.
    """
    _check_shape("p_hidden", p_hidden, ["T", "H"])
    n_rows, n_hidden = p_hidden.shape
    if q_hidden.dim() == 2:
        q_hidden = q_hidden[None]
    _check_shape("q_hidden", q_hidden, ["C", n_rows, n_hidden])
    n_candidates = q_hidden.shape[0]
    project: Callable[[Tensor], Tensor]
    vocabulary = None
    if isinstance(head, Tensor):
        head_weight = head
        _check_shape("head", head_weight, ["V", n_hidden])
        vocabulary = head_weight.shape[0]

        def project(hidden: Tensor) -> Tensor:
            return F.linear(hidden, head_weight)
    else:
        project = head
    _check_overlap_rows(n_rows, vocabulary, p_lse, weight, labels, metrics)
    uniform = reference.draw_uniforms(seed, n_rows, p_hidden.device) if "accept" in metrics else None
    wide = p_hidden.dtype == torch.float64
    out_dtype = torch.float64 if wide and backend != "native" else torch.float32
    results = {metric: torch.zeros(n_candidates, n_rows, dtype=out_dtype, device=p_hidden.device) for metric in metrics}
    rows_read = torch.arange(n_rows, device=p_hidden.device) if weight is None else weight.nonzero()[:, 0]
    if len(rows_read) == 0 or n_candidates == 0:
        return results

    probe = project(p_hidden[rows_read[:1]])  # one row: the vocabulary and dtype of a callable head
    _check_shape("head(hidden)", probe, [1, "V"])
    _check_overlap_rows(n_rows, probe.shape[1], p_lse, weight, labels, metrics)
    row_bytes = 2 * probe.shape[1] * probe.element_size()
    if chunk_bytes < row_bytes:
        raise ValueError(
            f"chunk_bytes is {chunk_bytes}; two rows of logits take {row_bytes} bytes, allow at least that"
        )
    for chunk in _row_chunks(len(rows_read), row_bytes, chunk_bytes):
        rows = rows_read[chunk]
        p_logits = project(p_hidden[rows])
        chunk_lse = log_sum_exp(p_logits, backend=backend) if p_lse is None else p_lse[rows]
        for c in range(n_candidates):
            values = _overlap(
                p_logits,
                project(q_hidden[c, rows])[None],
                chunk_lse,
                None if weight is None else weight[rows],
                None if labels is None else labels[rows],
                None if uniform is None else uniform[rows],
                metrics,
                backend,
            )
            for metric, value in values.items():
                results[metric][c, rows] = value[0].to(out_dtype)
    return results


# ---------------------------------------------------------------------------------------------- masked router


def _check_spec(spec: RouterSpec, n_experts: int) -> None:
    if n_experts % spec.n_group:
        raise ValueError(f"spec.n_group is {spec.n_group}, which does not divide the {n_experts} experts")
    if spec.correction_bias is not None:
        _check_shape("spec.correction_bias", spec.correction_bias, [n_experts])


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
    _check_shape("logits", logits, ["N", "E"])
    _check_float("logits", logits)
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
        _check_shape("keep", keep, ["C", n_experts])
        if keep.dtype != torch.bool:
            raise ValueError(f"keep has dtype {keep.dtype}; expected bool")
        if assigned is not None:
            _check_shape("assigned", assigned, [n_rows])
            if assigned.is_floating_point() or assigned.dtype == torch.bool:
                raise ValueError(f"assigned has dtype {assigned.dtype}; expected an integer dtype")
            if n_rows and not (int(assigned.min()) >= 0 and int(assigned.max()) < keep.shape[0]):
                raise ValueError(f"assigned must lie in [0, C = {keep.shape[0]})")
        _check_masks(keep, top_k, spec)
    else:
        assert order is not None and counts is not None
        if assigned is not None:
            raise ValueError("assigned goes with keep, not with order and counts")
        _check_shape("order", order, [n_experts])
        if order.is_floating_point() or not torch.equal(
            order.sort().values.long(), torch.arange(n_experts, device=order.device)
        ):
            raise ValueError(f"order must be a permutation of the {n_experts} expert ids")
        counts = torch.as_tensor(counts, dtype=torch.int64, device=logits.device)
        _check_shape("counts", counts, ["C"])
        if len(counts) and not (top_k <= int(counts.min()) and int(counts.max()) <= n_experts):
            raise ValueError(
                f"counts range from {int(counts.min())} to {int(counts.max())}; "
                f"expected top_k = {top_k} <= count <= E = {n_experts}"
            )
        if spec.n_group > 1 or (spec.score == "softmax" and spec.correction_bias is not None):
            # The choice depends on the mask beyond membership: independent masks then.
            rank = torch.empty_like(order, dtype=torch.int64)
            rank[order.long()] = torch.arange(n_experts, device=order.device)
            keep, order = rank[None, :] < counts[:, None], None
            _check_masks(keep, top_k, spec)

    core = _kernels(backend, logits)
    if core is not None and n_experts > core.MAX_EXPERTS:
        if backend == "native":
            raise ValueError(f"backend='native' routes at most {core.MAX_EXPERTS} experts, got {n_experts}")
        core = None
    if core is None:
        return reference.masked_router(
            logits, top_k=top_k, keep=keep, order=order, counts=counts, assigned=assigned, spec=spec
        )

    # A walk is a list of experts with stops at which it answers (csrc/masked_router.h).
    if keep is not None:
        lists = (~keep).to(torch.int8).sort(dim=-1, stable=True).indices  # kept ids first, ascending
        stops = keep.sum(-1)[:, None]
        slots = torch.arange(keep.shape[0], device=logits.device)[:, None]
        if assigned is not None:
            slots = torch.zeros_like(slots)
    else:
        assert order is not None and isinstance(counts, Tensor)
        lists = order[None, :]
        ascending = counts.sort(stable=True)
        stops, slots = ascending.values[None, :], ascending.indices[None, :]
    n_answers = slots.numel() if assigned is None else 1
    ids = torch.empty(n_answers, n_rows, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(n_answers, n_rows, top_k, dtype=torch.float32, device=logits.device)
    core.masked_router(
        logits.detach(),
        lists.to(torch.int32).contiguous(),
        stops.to(torch.int32).contiguous(),
        slots.to(torch.int32).contiguous(),
        _to(assigned, logits, torch.int64),
        top_k,
        SCORES.index(spec.score),
        spec.renormalize,
        spec.eps,
        spec.scale,
        _to(spec.correction_bias, logits, torch.float32),
        spec.n_group,
        spec.topk_group,
        spec.group_score == "top2_sum",
        ids,
        weights,
        _DTYPE_CODES[spec.weights_dtype],
        torch.get_num_threads(),
    )
    return (ids, weights) if assigned is None else (ids[0], weights[0])


# -------------------------------------------------------------------------------------------- routing moments


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
    _check_shape("max_norm", max_norm, ["E"])
    n_experts = max_norm.shape[0]
    _check_shape("moments", moments, [n_experts, 3, 3])
    for name, table, dtype in (("moments", moments, torch.float64), ("max_norm", max_norm, torch.float32)):
        if table.dtype != dtype or not table.is_contiguous():
            raise ValueError(f"{name} is {table.dtype} with strides {table.stride()}; expected contiguous {dtype}")
    _check_shape("expert_ids", expert_ids, ["S"])
    n_pairs = expert_ids.shape[0]
    if expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert_ids has dtype {expert_ids.dtype}; expected int32 or int64")
    _check_shape("gates", gates, [n_pairs])
    _check_float("gates", gates)
    if (outputs is None) == (norms is None):
        raise ValueError("give either outputs [S, H] or norms [S]")
    if outputs is not None:
        _check_shape("outputs", outputs, [n_pairs, "H"])
        _check_float("outputs", outputs)
    if norms is not None:
        _check_shape("norms", norms, [n_pairs])
        _check_float("norms", norms)
    if valid is not None:
        _check_shape("valid", valid, [n_pairs])
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
    if n_pairs == 0:
        return

    # The norms' and gates' own dtypes are all handled; the kernels' limits concern the outputs.
    core = _kernels(backend, outputs if outputs is not None else max_norm)
    if core is not None:
        # One norm per pair of a tile; a tile is what keeps the workspace under 1 % of the outputs, in sane
        # bounds.
        input_bytes = 0 if outputs is None else outputs.shape[1] * outputs.element_size() * n_pairs
        tile = min(n_pairs, max(4096, min(65_536, input_bytes // 800)))
        workspace = torch.empty(tile, dtype=torch.float64, device=gates.device)
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
    for rows in _row_chunks(n_pairs, row_bytes, DEFAULT_CHUNK_BYTES):
        reference.routing_moments_(
            moments,
            max_norm,
            expert_ids[rows],
            gates[rows],
            None if outputs is None else outputs[rows],
            norms=None if norms is None else norms[rows],
            valid=None if valid is None else valid[rows],
        )
