"""overlap, how alike next-token distributions are, and its relatives (backend.py explains `backend`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeprune_ext.ops import reference
from moeprune_ext.ops.backend import (
    DEFAULT_CHUNK_BYTES,
    check_float,
    check_integer,
    check_shape,
    kernels,
    row_chunks,
    row_vector,
)
from moeprune_ext.ops.reference import IGNORED_LABEL, METRICS

Head = Tensor | Callable[[Tensor], Tensor]  # [V, H], or hidden states [n, H] -> logits [n, V]


@torch.no_grad()
def log_sum_exp(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """Computes log sum_v exp(logits[t, v]) in one read.

    Args:
        logits: [T, V] any float dtype.
        backend: "auto", "native" or "torch".

    Returns:
        [T] float64, what `overlap` takes as `p_lse`: the logarithm may be far from 0, where float32 would cost the
        probabilities their accuracy. NaN for rows without a softmax (with a NaN, a +inf, or -inf only).

    Raises:
        ValueError: `logits` has another shape or dtype, or V = 0.
    """
    check_shape("logits", logits, ["T", "V"])
    check_float("logits", logits)
    core = kernels(backend, logits)
    lse = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    if logits.shape[1] == 0:
        raise ValueError("logits has no vocabulary (V = 0)")
    if core is not None:
        core.log_sum_exp(logits=logits.detach(), lse=lse, threads=torch.get_num_threads())
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
    """Measures how alike a teacher's (p) and C candidates' (q) next-token distributions are, row by row.

    p and q are the softmaxes of the logits. The metrics are

        "esap"        sum_v min(p, q): the expected acceptance of speculative decoding (arXiv 2603.06003)
        "kl_pq"       sum_v p (log p - log q), in nats
        "kl_qp"       sum_v q (log q - log p), in nats
        "top1_agree"  1 where the most likely tokens agree (the lowest index among equals), else 0
        "nll"         -log q[label], in nats; 0 where the label is -100
        "accept"      min(1, p/q) at one token drawn from q: the first whose cumulative probability exceeds u, where u
                      is uniform and depends on `seed` and the row only, so that a candidate gets the same draw alone
                      or among others

    -inf is probability 0 (0 log 0 = 0; a KL is +inf where it must be). A row of p or q with NaN or +inf, or of -inf
    only, gives NaN in every metric. |error| <= 2e-6 against float64 for esap of float32 inputs up to V = 152k. The
    result of a row does not depend on the other rows, on the number of threads or on C.

    Args:
        p_logits: [T, V] float32, bfloat16 or float16 (float64 goes to the reference), any strides.
        q_logits: [C, T, V], or [T, V] for one candidate; likewise.
        p_lse: [T], `log_sum_exp(p_logits)`; saves a third of the arithmetic where p is compared again and again.
        weight: [T], multiplies a row's results; rows of weight 0 are not read and give 0.
        labels: [T] int, for "nll"; -100 where a row has no label.
        metrics: names of the metrics to compute.
        seed: of the draws of "accept".
        backend: "auto", "native" or "torch".

    Returns:
        {metric: [C, T]}, float32 (float64 for float64 inputs); C = 1 for q_logits [T, V].

    Raises:
        ValueError: shapes, dtypes, devices, labels or metrics do not fit.
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
    uniform = reference.draw_uniforms(seed, n_rows, p_logits.device) if "accept" in metrics else None
    vectors = _RowVectors(p_lse, weight, labels, uniform)
    vectors.check(n_rows, vocabulary, metrics)
    return _overlap(p_logits, q_logits, vectors, metrics, backend)


@torch.no_grad()
def overlap_from_hidden(
    p_hidden: Tensor,
    q_hidden: Tensor,
    head: Head,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    p_lse: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = ("esap",),
    seed: int = 0,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Computes `overlap` of head(p_hidden) and head(q_hidden), without ever holding all the logits.

    The other arguments and the results are those of `overlap`. Rows of weight 0 are not projected.

    Args:
        p_hidden: [T, H] any float dtype, last hidden states.
        q_hidden: [C, T, H], or [T, H] for one candidate; likewise.
        head: the output weight [V, H], or a callable from hidden states [n, H] to logits [n, V].
        chunk_bytes: bound on the memory in flight: logits of p and of one candidate, for as many rows as fit; of more
            candidates where all rows do. The rows of a chunk do not depend on C, so a candidate's matrix products,
            hence its results, do not either.

    Raises:
        ValueError: as `overlap`, and if chunk_bytes does not hold a row of p and of q.
    """
    check_shape("p_hidden", p_hidden, ["T", "H"])
    n_rows, n_hidden = p_hidden.shape
    if q_hidden.dim() == 2:
        q_hidden = q_hidden[None]
    check_shape("q_hidden", q_hidden, ["C", n_rows, n_hidden])
    vocabulary = None
    if isinstance(head, Tensor):
        check_shape("head", head, ["V", n_hidden])
        vocabulary = head.shape[0]
    uniform = reference.draw_uniforms(seed, n_rows, p_hidden.device) if "accept" in metrics else None
    vectors = _RowVectors(p_lse, weight, labels, uniform)
    vectors.check(n_rows, vocabulary, metrics)
    out_dtype = torch.float64 if p_hidden.dtype == torch.float64 and backend != "native" else torch.float32
    shape = q_hidden.shape[:2]
    results = {metric: torch.zeros(shape, dtype=out_dtype, device=p_hidden.device) for metric in metrics}
    rows_read = vectors.rows_read(n_rows, p_hidden.device)
    if len(rows_read) == 0 or len(q_hidden) == 0:
        return results

    p_project, q_project = _projection(head), _projection(head)
    probe = p_project(p_hidden[None, rows_read[:1]])[0]  # one row: the vocabulary and dtype of a callable head
    check_shape("head(hidden)", probe, [1, "V"])
    if probe.shape[1] == 0:
        raise ValueError("head(hidden) has no vocabulary (V = 0)")
    vectors.check(n_rows, probe.shape[1], metrics)
    # Where rows are left out, those read are copied.
    copies = 0 if weight is None else n_hidden * (p_hidden.element_size() + q_hidden.element_size())
    row_bytes, least = (bytes_in_flight(probe, engine) + copies for engine in (backend, None))
    if chunk_bytes < least:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; a row of p and of q takes {least} bytes, allow that")
    for chunk in row_chunks(len(rows_read), row_bytes, chunk_bytes):
        rows = chunk if weight is None else rows_read[chunk]
        p_logits = p_project(p_hidden[None, rows])[0]
        chunk_vectors = vectors.at(rows)
        if p_lse is None:
            chunk_vectors = replace(chunk_vectors, p_lse=log_sum_exp(p_logits, backend=backend))
        # As many candidates in one call of the kernel as there is room for; it shares what it computes of p.
        together = max(1, chunk_bytes // (row_bytes // 2 * len(p_logits)) - 1)
        for start in range(0, len(q_hidden), together):
            block = slice(start, start + together)
            values = _overlap(p_logits, q_project(q_hidden[block, rows]), chunk_vectors, metrics, backend)
            for metric, value in values.items():
                results[metric][block, rows] = value.to(out_dtype)
    return results


@torch.no_grad()
def log_sum_exp_from_hidden(
    hidden: Tensor, head: Head, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, backend: str = "auto"
) -> Tensor:
    """Computes `log_sum_exp` of head(hidden) in the same chunks of rows as `overlap_from_hidden`.

    The matrix products are the same too, so its p_lse belongs to exactly the logits that are compared there.

    Args:
        hidden: [T, H] any float dtype, last hidden states.
        head: the output weight [V, H], or a callable from hidden states [n, H] to logits [n, V].
        chunk_bytes: as for `overlap_from_hidden`.
        backend: "auto", "native" or "torch".

    Returns:
        [T] float64.
    """
    check_shape("hidden", hidden, ["T", "H"])
    project = _projection(head)
    lse = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    if len(hidden):
        for rows in row_chunks(len(hidden), bytes_in_flight(project(hidden[None, :1])[0], backend), chunk_bytes):
            lse[rows] = log_sum_exp(project(hidden[None, rows])[0], backend=backend)
    return lse


def bytes_in_flight(logits: Tensor, backend: str | None) -> int:
    """Counts the bytes in memory while a row of p is compared with one candidate.

    Args:
        logits: [n, V], such as are compared.
        backend: adds the reference's temporaries where it leads to the reference; None leaves them out.

    Returns:
        Bytes of the two rows of logits, of what the kernel keeps of them (1 %), and of the row's vectors.
    """
    temporaries = _reference_row_bytes(logits) if backend is not None and kernels(backend, logits) is None else 0
    return 2 * logits.shape[1] * logits.element_size() * 101 // 100 + 64 + temporaries


@dataclass(frozen=True)
class _RowVectors:
    """What belongs to the T rows of p and q beside their logits, each [T] or None."""

    p_lse: Tensor | None
    weight: Tensor | None
    labels: Tensor | None
    uniform: Tensor | None

    def check(self, n_rows: int, vocabulary: int | None, metrics: Sequence[str]) -> None:
        """Raises ValueError unless metrics and vectors fit n_rows rows of logits; labels only if V is not None."""
        if isinstance(metrics, str) or not metrics:
            raise ValueError(f"metrics is {metrics!r}; expected a non-empty sequence of names from {METRICS}")
        for metric in metrics:
            if metric not in METRICS:
                raise ValueError(f"metrics contains {metric!r}; expected names from {METRICS}")
        for name, vector in (("p_lse", self.p_lse), ("weight", self.weight), ("labels", self.labels)):
            if vector is not None:
                check_shape(name, vector, [n_rows])
        if "nll" not in metrics:
            return
        if self.labels is None:
            raise ValueError("metric 'nll' needs labels, int64 [T], with -100 where a row has none")
        check_integer("labels", self.labels, expected="int64")
        if vocabulary is None:
            return
        wrong = ((self.labels < 0) & (self.labels != IGNORED_LABEL)) | (self.labels >= vocabulary)
        if wrong.any():
            raise ValueError(
                f"labels contains {int(self.labels[wrong][0])}; expected -100 or 0 <= label < V = {vocabulary}"
            )

    def rows_read(self, n_rows: int, device: torch.device) -> Tensor:
        """Returns the indices, int64, of the rows whose weight is not 0."""
        return torch.arange(n_rows, device=device) if self.weight is None else self.weight.nonzero()[:, 0]

    def at(self, rows: slice | Tensor) -> _RowVectors:
        """Selects rows."""
        return _RowVectors(**{name: None if vector is None else vector[rows] for name, vector in vars(self).items()})

    def for_kernels(self, like: Tensor) -> _RowVectors:
        """Converts the vectors to the dtypes that the kernels read, on the device of `like`."""
        return _RowVectors(
            p_lse=row_vector(self.p_lse, like, torch.float64),
            weight=row_vector(self.weight, like, torch.float64),
            labels=row_vector(self.labels, like, torch.int64),
            uniform=row_vector(self.uniform, like, torch.float64),
        )


def _overlap(
    p_logits: Tensor, q_logits: Tensor, vectors: _RowVectors, metrics: Sequence[str], backend: str
) -> dict[str, Tensor]:
    """Computes `overlap` of p_logits [T, V] and q_logits [C, T, V], whose arguments have been checked."""
    core = kernels(backend, p_logits, q_logits)
    vectors = vectors.for_kernels(p_logits)
    if core is None:
        return _overlap_by_reference(p_logits, q_logits, vectors, metrics)
    shape = q_logits.shape[:2]
    results = {metric: torch.empty(shape, dtype=torch.float32, device=p_logits.device) for metric in metrics}
    core.overlap(
        p_logits=p_logits.detach(),
        q_logits=q_logits.detach(),
        **vars(vectors),
        workspace=_workspace(p_logits, q_logits, metrics),
        out=[results.get(metric) for metric in METRICS],
        threads=torch.get_num_threads(),
    )
    return results


def _workspace(p_logits: Tensor, q_logits: Tensor, metrics: Sequence[str]) -> Tensor | None:
    """Allocates room for exponentials that the CPU kernel would otherwise compute twice.

    They are those of a row of q, and of a row of p where it meets several candidates, for each thread. The room is
    never more than 1 % of the inputs.
    """
    if p_logits.device.type != "cpu" or "esap" not in metrics or {"kl_pq", "kl_qp"} & set(metrics):
        return None
    rows = torch.get_num_threads() * (1 if q_logits.shape[0] == 1 else 2)
    row_size = p_logits.shape[1] * 33 // 32 + 2048  # in whole blocks, with what each is relative to
    input_bytes = p_logits.numel() * p_logits.element_size() + q_logits.numel() * q_logits.element_size()
    return torch.empty(min(rows * row_size, input_bytes // 400), dtype=torch.float32)


def _overlap_by_reference(
    p_logits: Tensor, q_logits: Tensor, vectors: _RowVectors, metrics: Sequence[str]
) -> dict[str, Tensor]:
    """Runs the reference on chunks of rows and one candidate at a time; rows of weight 0 are left out."""
    dtype = torch.float64 if torch.float64 in (p_logits.dtype, q_logits.dtype) else torch.float32
    shape = q_logits.shape[:2]
    results = {metric: torch.zeros(shape, dtype=dtype, device=p_logits.device) for metric in metrics}
    rows_read = vectors.rows_read(shape[1], p_logits.device)
    row_bytes = max(_reference_row_bytes(p_logits), _reference_row_bytes(q_logits))
    for chunk in row_chunks(len(rows_read), row_bytes, DEFAULT_CHUNK_BYTES):
        rows = rows_read[chunk]
        for c, q_rows in enumerate(q_logits):
            values = reference.overlap(
                p_logits[rows].to(dtype), q_rows[rows].to(dtype), metrics=metrics, **vars(vectors.at(rows))
            )
            for metric, value in values.items():
                results[metric][c, rows] = value[0]
    return results


def _reference_row_bytes(logits: Tensor) -> int:
    """Counts the bytes of the reference's temporaries, about eight the size of its logits."""
    return 8 * logits.shape[-1] * (8 if logits.dtype == torch.float64 else 4)


def _projection(head: Head) -> Callable[[Tensor], Tensor]:
    """Makes a function from hidden states [C, n, H] to logits [C, n, V], one matrix product for each candidate.

    The logits of a weight are overwritten by the next call: memory fresh from the system for every chunk would cost a
    CPU a fifth of the product's time.
    """
    if not isinstance(head, Tensor):
        return lambda hidden: torch.stack([head(rows) for rows in hidden]) if len(hidden) > 1 else head(hidden[0])[None]
    weight, buffer = head.detach(), torch.empty(0, dtype=head.dtype, device=head.device)

    def project(hidden: Tensor) -> Tensor:
        nonlocal buffer
        candidates, rows, _ = hidden.shape
        if candidates * rows > len(buffer):
            buffer = torch.empty(candidates * rows, len(weight), dtype=weight.dtype, device=weight.device)
        logits = buffer[: candidates * rows].view(candidates, rows, len(weight))
        for source, target in zip(hidden, logits, strict=True):
            torch.mm(source, weight.T, out=target)
        return logits

    return project


def label_top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Says where the largest logit is the label's; of equals the first counts, as in greedy decoding.

    Args:
        logits: [T, V] any float dtype.
        labels: [T] int64; negative where a row has no label.

    Returns:
        [T] float32: 1 where it is, 0 where it is not or there is no label, NaN where a logit is NaN.
    """
    hits = ((logits.argmax(-1) == labels) & (labels >= 0)).float()
    return torch.where(torch.isnan(logits).any(-1), torch.nan, hits)


def next_token(logits: Tensor, labels: Tensor, *, backend: str = "auto") -> dict[str, Tensor]:
    """Compares logits with the tokens that follow.

    Args:
        logits: [T, V] any float dtype.
        labels: [T] int64; negative where a row has no label.
        backend: "auto", "native" or "torch".

    Returns:
        {"nll": [T], as in `overlap`, float32 or wider; "label_top1": [T], see there}.
    """
    lse = log_sum_exp(logits, backend=backend)
    nll = lse - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].double()
    nll = torch.where((labels >= 0) | torch.isnan(lse), nll, 0.0)
    return {"nll": nll.to(torch.promote_types(logits.dtype, torch.float32)), "label_top1": label_top1(logits, labels)}
