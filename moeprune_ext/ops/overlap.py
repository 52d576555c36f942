"""overlap and its relatives as Python functions: validate, allocate, dispatch (see dispatch.py for `backend`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import DEFAULT_CHUNK_BYTES, check_float, check_shape, kernels, row_chunks, row_vector
from moeprune_ext.ops.reference import IGNORED_LABEL, METRICS


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
            check_shape(name, vector, [rows])
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


@torch.no_grad()
def log_sum_exp(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """log sum_v exp(logits[t, v]) of logits [T, V] as float64 [T], in one read: what `overlap` takes as
    `p_lse`.

    float64 because the logarithm may be far from 0, where float32 would cost the probabilities their
    accuracy.
    NaN for rows without a softmax (a NaN, a +inf or only -inf in the row).
    """
    check_shape("logits", logits, ["T", "V"])
    check_float("logits", logits)
    core = kernels(backend, logits)
    lse = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        raise ValueError("logits has no vocabulary (V = 0)")
    if core is not None:
        core.log_sum_exp(logits.detach(), lse, torch.get_num_threads())
        return lse
    for rows in row_chunks(logits.shape[0], logits.shape[1] * 16, DEFAULT_CHUNK_BYTES):
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
    check_shape("p_logits", p_logits, ["T", "V"])
    n_rows, vocabulary = p_logits.shape
    if q_logits.dim() == 2:
        q_logits = q_logits[None]
    check_shape("q_logits", q_logits, ["C", n_rows, vocabulary])
    check_float("p_logits", p_logits)
    check_float("q_logits", q_logits)
    if vocabulary == 0:
        raise ValueError("p_logits has no vocabulary (V = 0)")
    _check_overlap_rows(n_rows, vocabulary, p_lse, weight, labels, metrics)
    uniform = reference.draw_uniforms(seed, n_rows, p_logits.device) if "accept" in metrics else None
    return _overlap(p_logits, q_logits, p_lse, weight, labels, uniform, metrics, backend)


def _overlap_workspace(p_logits: Tensor, q_logits: Tensor, metrics: Sequence[str]) -> Tensor | None:
    """Room for exponentials that the CPU kernel would otherwise compute twice: those of a row of q, and of p where it
    meets several candidates, for each thread, but never more than 1 % of the inputs."""
    if p_logits.device.type != "cpu" or "esap" not in metrics or {"kl_pq", "kl_qp"} & set(metrics):
        return None
    rows = torch.get_num_threads() * (1 if q_logits.shape[0] == 1 else 2)
    row_size = p_logits.shape[1] * 33 // 32 + 2048  # in whole blocks, with what each is relative to
    input_bytes = p_logits.numel() * p_logits.element_size() + q_logits.numel() * q_logits.element_size()
    return torch.empty(min(rows * row_size, input_bytes // 400), dtype=torch.float32)


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
    core = kernels(backend, p_logits, q_logits)
    shape = q_logits.shape[:2]
    p_lse = row_vector(p_lse, p_logits, torch.float64)
    weight = row_vector(weight, p_logits, torch.float64)
    labels = row_vector(labels, p_logits, torch.int64)
    if core is not None:
        results = {metric: torch.empty(shape, dtype=torch.float32, device=p_logits.device) for metric in metrics}
        core.overlap(
            p_logits.detach(),
            q_logits.detach(),
            p_lse,
            weight,
            labels if "nll" in metrics else None,
            uniform,
            _overlap_workspace(p_logits, q_logits, metrics),
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
    for chunk in row_chunks(len(rows_read), row_bytes, DEFAULT_CHUNK_BYTES):
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


def _projection(head: Tensor | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """hidden [C, n, H] -> logits [C, n, V], a product for each candidate. Those of a weight are overwritten by the next
    call: memory fresh from the system for every chunk would cost a CPU a fifth of the product's time."""
    if not isinstance(head, Tensor):
        return lambda hidden: torch.stack([head(rows) for rows in hidden]) if len(hidden) > 1 else head(hidden[0])[None]
    weight, held = head.detach(), torch.empty(0, dtype=head.dtype, device=head.device)

    def project(hidden: Tensor) -> Tensor:
        nonlocal held
        candidates, rows, _ = hidden.shape
        if candidates * rows > len(held):
            held = torch.empty(candidates * rows, len(weight), dtype=weight.dtype, device=weight.device)
        logits = held[: candidates * rows].view(candidates, rows, len(weight))
        for source, target in zip(hidden, logits, strict=True):
            torch.mm(source, weight.T, out=target)
        return logits

    return project


@torch.no_grad()
def log_sum_exp_from_hidden(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    """`log_sum_exp` of head(hidden), [T, H] -> float64 [T], in chunks of rows as `overlap_from_hidden` makes them: the
    same products, so its p_lse belongs to exactly the logits that are compared there."""
    check_shape("hidden", hidden, ["T", "H"])
    project = _projection(head)
    lse = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    if len(hidden):
        for rows in row_chunks(len(hidden), bytes_in_flight(project(hidden[None, :1])[0], backend), chunk_bytes):
            lse[rows] = log_sum_exp(project(hidden[None, rows])[0], backend=backend)
    return lse


def bytes_in_flight(logits: Tensor, backend: str | None) -> int:
    """Of a row of p and of one candidate: logits, what the kernel keeps of them (1 %), vectors of the row, and, where
    `backend` leads to it (None: leave that out), the reference's temporaries."""
    temporaries = _reference_row_bytes(logits) if backend is not None and kernels(backend, logits) is None else 0
    return 2 * logits.shape[1] * logits.element_size() * 101 // 100 + 64 + temporaries


def _reference_row_bytes(logits: Tensor) -> int:
    """The reference holds about eight temporaries the size of its logits."""
    return 8 * logits.shape[-1] * (8 if logits.dtype == torch.float64 else 4)


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
    chunk_bytes: bound on the memory in flight (logits of p and of one candidate, for as many rows as fit; of more
        candidates where all rows do). The rows of a chunk do not depend on C, so a candidate's matrix products, hence
        its results, do not either.
    The other arguments and the results are those of `overlap`. Rows of weight 0 are not projected.

    Raises ValueError as `overlap` does, and if chunk_bytes does not hold a row of p and of q.
    """
    check_shape("p_hidden", p_hidden, ["T", "H"])
    n_rows, n_hidden = p_hidden.shape
    if q_hidden.dim() == 2:
        q_hidden = q_hidden[None]
    check_shape("q_hidden", q_hidden, ["C", n_rows, n_hidden])
    n_candidates = q_hidden.shape[0]
    vocabulary = None
    if isinstance(head, Tensor):
        check_shape("head", head, ["V", n_hidden])
        vocabulary = head.shape[0]
    p_project, q_project = _projection(head), _projection(head)
    _check_overlap_rows(n_rows, vocabulary, p_lse, weight, labels, metrics)
    uniform = reference.draw_uniforms(seed, n_rows, p_hidden.device) if "accept" in metrics else None
    wide = p_hidden.dtype == torch.float64
    out_dtype = torch.float64 if wide and backend != "native" else torch.float32
    results = {metric: torch.zeros(n_candidates, n_rows, dtype=out_dtype, device=p_hidden.device) for metric in metrics}
    rows_read = torch.arange(n_rows, device=p_hidden.device) if weight is None else weight.nonzero()[:, 0]
    if len(rows_read) == 0 or n_candidates == 0:
        return results

    probe = p_project(p_hidden[None, rows_read[:1]])[0]  # one row: the vocabulary and dtype of a callable head
    check_shape("head(hidden)", probe, [1, "V"])
    if probe.shape[1] == 0:
        raise ValueError("head(hidden) has no vocabulary (V = 0)")
    _check_overlap_rows(n_rows, probe.shape[1], p_lse, weight, labels, metrics)
    row_bytes = bytes_in_flight(probe, backend)
    least = bytes_in_flight(probe, None)
    if weight is not None:  # rows are left out: those read are copied
        copies = n_hidden * (p_hidden.element_size() + q_hidden.element_size())
        row_bytes, least = row_bytes + copies, least + copies
    if chunk_bytes < least:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; a row of p and of q takes {least} bytes, allow that")
    for chunk in row_chunks(len(rows_read), row_bytes, chunk_bytes):
        rows = chunk if weight is None else rows_read[chunk]
        p_logits = p_project(p_hidden[None, rows])[0]
        chunk_lse = log_sum_exp(p_logits, backend=backend) if p_lse is None else p_lse[rows]
        # As many candidates in one call of the kernel as there is room for; it shares what it computes of p.
        together = max(1, chunk_bytes // (row_bytes // 2 * len(p_logits)) - 1)
        for start in range(0, n_candidates, together):
            some = slice(start, start + together)
            values = _overlap(
                p_logits,
                q_project(q_hidden[some, rows]),
                chunk_lse,
                None if weight is None else weight[rows],
                None if labels is None else labels[rows],
                None if uniform is None else uniform[rows],
                metrics,
                backend,
            )
            for metric, value in values.items():
                results[metric][some, rows] = value.to(out_dtype)
    return results


def label_top1(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [T, V], labels [T] -> float32 [T]: 1 where the largest logit is the label's (of equals the first counts,
    as in greedy decoding), 0 elsewhere and where the label is negative, NaN where a logit is NaN."""
    hits = ((logits.argmax(-1) == labels) & (labels >= 0)).float()
    return torch.where(torch.isnan(logits).any(-1), torch.nan, hits)


def next_token(logits: Tensor, labels: Tensor, *, backend: str = "auto") -> dict[str, Tensor]:
    """logits [T, V], labels [T] -> {"nll": [T], as in `overlap`, "label_top1": see there}."""
    lse = log_sum_exp(logits, backend=backend)
    nll = lse - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].double()
    nll = torch.where((labels >= 0) | torch.isnan(lse), nll, 0.0)
    return {"nll": nll.to(torch.promote_types(logits.dtype, torch.float32)), "label_top1": label_top1(logits, labels)}
