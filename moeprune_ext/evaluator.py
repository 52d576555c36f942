"""Many candidate plans -> scores, teacher-forced: how close is each masked model to the full one on fixed tokens?

ESAP (EvoESAP, arXiv 2603.06003), with p_t the full model's next-token distribution at scored position t and q_t the
candidate's: ESAP = mean over t of sum_v min(p_t(v), q_t(v)) = 1 - mean total-variation distance, in [0, 1]. Positions
are those attended and labelled, unshifted; sums are token-weighted over batches, in float64 and batch order.

A candidate is the model with its routers sliced (moe.py), so its score is the exported checkpoint's. ERNIE-4.5
differs from the released search on purpose: that masks through the correction bias and so keeps the full softmax's
denominator, which no sliced checkpoint computes; the two agree when the bias is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.data import TokenBatch, as_batches, data_fingerprint
from moeprune_ext.masking import check_plan, check_slicing, masks
from moeprune_ext.moe import LayerShape, find_moe_layers, model_fingerprint
from moeprune_ext.ops import log_sum_exp, overlap
from moeprune_ext.plan import PruningPlan

METRICS = ("esap", "kl_pq", "kl_qp", "top1_agree", "accept", "nll")
LOWER_IS_BETTER = frozenset({"kl_pq", "kl_qp", "nll"})


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's token-weighted means; a metric that was not asked for is None, one that met a NaN row is NaN.

    esap, kl_pq, kl_qp, top1_agree, accept: over `positions` attended and labelled positions. nll: over positions whose
    next token is attended and labelled. nan_rows: positions at which the candidate's logits gave no distribution.
    """

    esap: float | None = None
    kl_pq: float | None = None
    kl_qp: float | None = None
    top1_agree: float | None = None
    accept: float | None = None
    nll: float | None = None
    positions: int = 0
    nan_rows: int = 0


def to_maximise(metric: str, value: float) -> float:
    """A metric's value as something to maximise: KL and nll change sign, a NaN ranks last."""
    if math.isnan(value):
        return -math.inf
    return -value if metric in LOWER_IS_BETTER else value


class CandidateEvaluator:
    """Scores pruning plans of one model on fixed batches against the unpruned model; the teacher pass happens here.

    batches: see data.as_batches. memory_budget: bytes for logits: the teacher's are kept between calls when they fit in
    half of it and computed again in every call when not; candidates' logits of one batch are held in blocks within the
    other half (one candidate at least). seed: of the `accept` metric's draws. Raises ValueError for a model without MoE
    layers or with a router that cannot be masked, for no data, and when the teacher's own logits are NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        memory_budget: int = 1 << 30,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.layers = find_moe_layers(model)
        self.fingerprint = model_fingerprint(model, self.layers)
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.batches = as_batches(batches, config.vocab_size)
        self.data_fingerprint = data_fingerprint(self.batches)
        self.positions = sum(int(batch.scored.sum()) for batch in self.batches)
        if self.positions == 0:
            raise ValueError("there is nothing to score: no position is both attended and labelled")
        check_slicing(self.layers)
        self._memory_budget = memory_budget
        self._seed = seed
        self._backend = backend
        self._device = next(model.parameters()).device
        self._teacher: list[tuple[Tensor, Tensor] | None] = []
        held, lse_sum = 0, 0.0
        for number, batch in enumerate(self.batches):
            logits = self._logits(batch)
            lse = log_sum_exp(logits)
            if not bool(torch.isfinite(lse).all()):
                raise ValueError(
                    f"the unpruned model's logits are NaN or infinite on batch {number}: check the weights and dtype"
                )
            lse_sum += lse.sum().item()
            held += logits.nbytes
            self._teacher.append((logits, lse) if held <= memory_budget // 2 else None)
        # What a search's scores depend on beside the plans, for refusing to resume another search.
        self.identity: dict[str, Any] = {
            "model": self.fingerprint,
            "data": self.data_fingerprint,
            "dtype": str(next(model.parameters()).dtype),
            "accept_seed": seed,
            "teacher_log_sum_exp": lse_sum / self.positions,
        }

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """{decoder layer: what pruning must respect there}."""
        return {index: layer.shape for index, layer in self.layers.items()}

    def evaluate(self, plans: Sequence[PruningPlan], metrics: Sequence[str] = ("esap",)) -> list[CandidateScore]:
        """One CandidateScore per plan, in order; a score does not depend on the other plans of the call.

        metrics: any of esap, kl_pq, kl_qp, top1_agree, accept, nll.
        Raises ValueError, before any work, for an unknown metric or a plan this model cannot carry out.
        """
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"unknown metrics {unknown}; choose from {', '.join(METRICS)}")
        if not metrics:
            raise ValueError(f"name at least one metric of {', '.join(METRICS)}")
        if "nll" in metrics and not any(bool((batch.next_token_labels >= 0).any()) for batch in self.batches):
            raise ValueError("nll needs a position whose next token is labelled, and the data has none")
        for plan in plans:
            check_plan(plan, self.layers, self.fingerprint)
        sums = torch.zeros(len(plans), len(metrics), dtype=torch.float64)
        nan_rows = torch.zeros(len(plans), dtype=torch.int64)
        predicted = 0
        for number, batch in enumerate(self.batches):
            scored, labels = self._rows(batch)
            predicted += int((labels >= 0).sum())
            p, p_lse = self._teacher[number] or self._teacher_rows(batch)
            block = max(1, self._memory_budget // 2 // max(1, p.nbytes))
            for start in range(0, len(plans), block):
                chosen = plans[start : start + block]
                q = torch.empty(len(chosen), *p.shape, dtype=p.dtype, device=p.device)
                for i, plan in enumerate(chosen):
                    with masks(self.layers, plan):
                        q[i] = self._logits(batch)
                values = overlap(
                    p,
                    q,
                    p_lse=p_lse,
                    labels=labels,
                    metrics=tuple(metrics),
                    seed=self._seed + number,
                    backend=self._backend,
                )
                for m, name in enumerate(metrics):
                    rows = (labels >= 0) if name == "nll" else scored
                    sums[start : start + block, m] += values[name][:, rows].double().sum(-1).cpu()
                bad = torch.isnan(torch.stack([values[name] for name in metrics])).any(0)
                nan_rows[start : start + block] += bad.sum(-1).cpu()
        counts = [predicted if name == "nll" else self.positions for name in metrics]
        return [
            CandidateScore(
                **{name: (sums[i, m] / counts[m]).item() for m, name in enumerate(metrics)},
                positions=self.positions,
                nan_rows=int(nan_rows[i]),
            )
            for i in range(len(plans))
        ]

    def _rows(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Of the rows that `_logits` returns: which are scored [T] bool, and their next-token labels [T] int64."""
        labels = batch.next_token_labels
        wanted = batch.scored | (labels >= 0)
        return batch.scored[wanted].to(self._device), labels[wanted].to(self._device)

    def _logits(self, batch: TokenBatch) -> Tensor:
        """[T, V] logits at the positions any metric reads, from an ordinary forward without a KV cache."""
        wanted = batch.scored | (batch.next_token_labels >= 0)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                logits: Tensor = self.model(**batch.model_inputs(self._device), use_cache=False).logits
                return logits[wanted.to(logits.device)]
        finally:
            self.model.train(was_training)

    def _teacher_rows(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits = self._logits(batch)
        return logits, log_sum_exp(logits)
