"""Many candidate plans -> scores, teacher-forced: how close is each masked model to the full one on fixed tokens?

ESAP (EvoESAP, arXiv 2603.06003), with p_t the full model's next-token distribution at scored position t and q_t the
candidate's: ESAP = mean over t of sum_v min(p_t(v), q_t(v)) = 1 - mean total-variation distance, in [0, 1]. Positions
are those attended and labelled, unshifted; sums are token-weighted over sequences, in float64 and in their order.

A candidate is the model with its routers sliced (masking.py), so its score is the exported checkpoint's. ERNIE-4.5
differs from the released search on purpose: that masks through the correction bias and so keeps the full softmax's
denominator, which no sliced checkpoint computes; the two agree when the bias is zero.

The unit of work is a few neighbouring sequences, together about UNIT_TOKENS long, or one; it does not depend on the
number of processes. Where a model can be replayed layer by layer (replay.py), all candidates are swept
through it together (sweep.py); where not, each is a forward of its own (`WholeForwards`), and `method` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.stats import LayerShape
from moeprune_ext.candidates.metrics import METRICS, NEXT_TOKEN, CandidateScore, Engine, SequenceSums
from moeprune_ext.candidates.sweep import SweptModel
from moeprune_ext.candidates.teacher import PLACES
from moeprune_ext.candidates.whole import WholeForwards
from moeprune_ext.data.batches import as_batches, data_fingerprint, split_sequences
from moeprune_ext.models.apply import check_merges, check_plan
from moeprune_ext.models.moe import find_moe_layers, model_fingerprint
from moeprune_ext.models.patches import evaluating, fewer_active
from moeprune_ext.models.probing import check_slicing
from moeprune_ext.models.replay import NotReplayable
from moeprune_ext.models.routers import ROUTERS

UNIT_TOKENS = 2048


class CandidateEvaluator:
    """Scores pruning plans of one model on fixed batches against the unpruned model; the teacher pass happens here.

    batches: see data.as_batches. memory_budget: bytes beyond the model's own weights, on the model's device: the
    candidates' hidden states, what a layer needs to run, one layer's merged experts where candidates merge, a chunk of
    logits, and the teacher's hidden states, which go to host memory or disk (teacher_cache="auto", or say "device",
    "host", "disk") where they take more than a quarter.
    router: "auto" runs the fused kernel for routers whose formula it knows and whose logits are float32, and slices the
    others; "fused" takes it for half-precision logits too, where tied experts may be chosen otherwise; "sliced" never.
    method: "auto" sweeps all candidates through the layers together where the model can be replayed layer by layer, and
    warns where not; "whole" insists on one forward of the model per candidate. seed: of the `accept` metric's draws.
    least_units: the data is cut into at least so many units of work, if it has as many sequences: no more processes
    have something to do, and larger units of short sequences run faster.

    Under torchrun (distributed.py) the sequences are dealt out over the processes; every process gets all scores.
    The attribute `method` says how candidates are run, and why.

    Raises ValueError for a model without MoE layers or with a router that cannot be masked, for no data, when the
    teacher's own logits are NaN, and for a memory_budget that cannot hold one sequence, with the numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        memory_budget: int = 1 << 30,
        teacher_cache: str = "auto",
        router: str = "auto",
        method: str = "auto",
        seed: int = 0,
        least_units: int = 16,
        backend: str = "auto",
    ) -> None:
        for name, value, known in (
            ("teacher_cache", teacher_cache, PLACES),
            ("router", router, ROUTERS),
            ("method", method, ("auto", "whole")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(known)}")
        if least_units < 1:
            raise ValueError(f"least_units must be at least 1, got {least_units}")
        self.model = model
        self.layers = find_moe_layers(model)
        self.fingerprint = model_fingerprint(model, self.layers)
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.sequences = split_sequences(as_batches(batches, config.vocab_size))
        self.scored_positions = [int(sequence.scored.sum()) for sequence in self.sequences]
        self.positions = sum(self.scored_positions)
        if self.positions == 0:
            raise ValueError("there is nothing to score: no position is both attended and labelled")
        self.predicted_positions = [int((s.next_token_labels >= 0).sum()) for s in self.sequences]
        self.data_fingerprint = data_fingerprint(self.sequences)
        longest = max(sequence.input_ids.shape[1] for sequence in self.sequences)
        self.unit = max(1, min(UNIT_TOKENS // longest, len(self.sequences) // least_units))
        check_slicing(self.layers)
        self._whole = WholeForwards(model, self.sequences, memory_budget, seed, backend)
        self._engine: Engine
        try:
            if method == "whole":
                raise NotReplayable("asked for")
            with evaluating(model):
                self._engine = SweptModel(
                    model, self.layers, self.sequences, self.unit, memory_budget, teacher_cache, router, seed, backend
                )
            self.method = self._engine.about + self._engine.note
        except NotReplayable as reason:
            if method != "whole":
                warnings.warn(
                    f"{type(model).__name__} cannot be swept layer by layer ({reason}); every candidate is a forward "
                    "of its own",
                    stacklevel=2,
                )
            self._engine = self._whole
            self.method = f"{self._engine.about}: {reason}"
        self.identity = self._identity(seed)

    def _identity(self, seed: int) -> dict[str, Any]:
        """What a search's scores depend on beside the plans, for refusing to resume another search."""
        mine = distributed.mine(len(self.sequences), self.unit)
        lse = torch.zeros(len(self.sequences), dtype=torch.float64)
        with evaluating(self.model):
            for number, value in self._engine.teacher(mine).items():
                lse[number] = value
        distributed.sum_(lse)
        if not bool(torch.isfinite(lse).all()):
            number = int((~torch.isfinite(lse)).nonzero()[0])
            raise ValueError(
                f"the unpruned model's logits are NaN or infinite on sequence {number}: check the weights and dtype"
            )
        return {
            "model": self.fingerprint,
            "data": self.data_fingerprint,
            "dtype": str(next(self.model.parameters()).dtype),
            "method": self._engine.about,
            "accept_seed": seed,
            "teacher_log_sum_exp": float(lse.sum()) / self.positions,
        }

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """{decoder layer: what pruning must respect there}."""
        return {index: layer.shape for index, layer in self.layers.items()}

    def weights(self, metric: str) -> list[int]:
        """Positions that each sequence contributes to a metric's mean."""
        return self.predicted_positions if metric in NEXT_TOKEN else self.scored_positions

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Refuses (ValueError, with the numbers), before any work, merges into so many experts of each layer, {decoder
        layer: K'}, that memory_budget has no room for."""
        self._engine.check_merged(kept)

    def evaluate(
        self, plans: Sequence[PruningPlan | MergedPlan], metrics: Sequence[str] = ("esap",)
    ) -> list[CandidateScore]:
        """One CandidateScore per plan, in order; a score does not depend on the other plans of the call, up to the
        rounding of matrix products of another size (below 1e-6 in float32).

        metrics: any of esap, kl_pq, kl_qp, top1_agree, accept, nll, label_top1. Pruning plans that also merge experts
        (PruningPlan.merged) take one forward of the model each, and one of the unpruned model in all.
        Raises ValueError, before any work, for an unknown metric or a plan this model cannot carry out.
        """
        found = self.sequence_sums(plans, metrics)
        means = {name: found.sums[name].sum(1) / sum(self.weights(name)) for name in metrics}
        return [
            CandidateScore(
                **{name: float(values[i]) for name, values in means.items()},
                positions=self.positions,
                nan_rows=int(found.nan_rows[i].sum()),
            )
            for i in range(len(plans))
        ]

    def sequence_sums(
        self,
        plans: Sequence[PruningPlan | MergedPlan],
        metrics: Sequence[str] = ("esap",),
        sequences: Sequence[int] | None = None,
    ) -> SequenceSums:
        """Each plan's sums over each of `sequences` (all of them by default), columns in their order.

        Raises ValueError as `evaluate` does.
        """
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"unknown metrics {unknown}; choose from {', '.join(METRICS)}")
        if not metrics:
            raise ValueError(f"name at least one metric of {', '.join(METRICS)}")
        if set(NEXT_TOKEN) & set(metrics) and not any(self.predicted_positions):
            raise ValueError("nll and label_top1 need a position whose next token is labelled; the data has none")
        for plan in plans:
            if isinstance(plan, MergedPlan):
                check_merges(plan, self._whole.mapped, self.fingerprint)
                continue
            check_plan(plan, self.layers, self.fingerprint)
            if plan.merged and getattr(self.model, "moeprune_stream", None) is not None:
                raise ValueError("a streamed model cannot hold merged experts: load it whole to evaluate this plan")
        wanted = list(range(len(self.sequences)) if sequences is None else sequences)
        sums = torch.zeros(len(metrics), len(plans), len(wanted), dtype=torch.float64)
        nan_rows = torch.zeros(len(plans), len(wanted), dtype=torch.int64)
        mine = set(distributed.mine(len(self.sequences), self.unit))
        columns = {number: column for column, number in enumerate(wanted)}
        numbers = [number for number in wanted if number in mine and plans]
        with evaluating(self.model):
            for number, chosen, values in self._values(plans, numbers, tuple(metrics)):
                scored, labels = self._rows(number)
                for m, name in enumerate(metrics):
                    rows = (labels >= 0) if name in NEXT_TOKEN else scored
                    sums[m, chosen, columns[number]] = values[name].cpu()[:, rows].double().sum(-1)
                bad = torch.isnan(torch.stack([values[name] for name in metrics])).any(0)
                nan_rows[chosen, columns[number]] = bad.sum(-1).cpu()
        distributed.sum_(sums)
        distributed.sum_(nan_rows)
        return SequenceSums(dict(zip(metrics, sums, strict=True)), nan_rows)

    def _values(
        self, plans: Sequence[PruningPlan | MergedPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        """From the engine that can: a sweep shares experts' outputs between pruning plans, so it takes none that also
        merge; and those together that have as many experts active."""
        whole, swept = [], {}  # type: tuple[list[int], dict[int | None, list[int]]]
        for i, plan in enumerate(plans):
            merges = isinstance(plan, PruningPlan) and bool(plan.merged)
            (whole if merges or self._engine is self._whole else swept.setdefault(plan.active, [])).append(i)
        for number, chosen, values in self._whole.values([plans[i] for i in whole], numbers, metrics) if whole else ():
            yield number, [whole[i] for i in chosen], values
        for active, mine in swept.items():
            with fewer_active(self.layers, active):
                for number, chosen, values in self._engine.values([plans[i] for i in mine], numbers, metrics):
                    yield number, [mine[i] for i in chosen], values

    def _rows(self, number: int) -> tuple[Tensor, Tensor]:
        """Of a sequence's wanted rows: which are scored [T] bool, and their next-token labels [T] int64."""
        sequence = self.sequences[number]
        return sequence.scored[sequence.wanted], sequence.next_token_labels[sequence.wanted]
