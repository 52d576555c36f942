"""Many candidate plans -> scores, teacher-forced: how close is each to the full model on fixed tokens?

ESAP (EvoESAP, arXiv 2603.06003), with p_t the full model's next-token distribution at scored position t and q_t the
candidate's: ESAP = mean over t of sum_v min(p_t(v), q_t(v)) = 1 - mean total-variation distance, in [0, 1]. Positions
are those attended and labelled, unshifted; sums are token-weighted over sequences, in float64 and in their order.

A candidate is the model with its routers sliced (models/layers.py) and its experts merged (models/merging.py), so its
score is the exported checkpoint's. ERNIE-4.5 differs from the released search on purpose: that masks through the
correction bias and so keeps the full softmax's denominator, which no sliced checkpoint computes; the two agree when the
bias is zero.

The unit of work is a few neighbouring sequences, together about UNIT_TOKENS long, or one; it does not depend on the
number of processes. Where a model can be replayed layer by layer (models/replay.py), all candidates are swept through
it together (sweep.py); where not, each is a forward of its own (whole.py), and `method` says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.candidates.engine import Engine, EngineOptions, Values
from moeprune_ext.candidates.metrics import (
    METRICS,
    NEXT_TOKEN,
    OBJECTIVES,
    CandidateScore,
    SequenceSums,
    domain_means,
    objective_value,
)
from moeprune_ext.candidates.sweep import LayerSweep
from moeprune_ext.candidates.whole import WholeForwards
from moeprune_ext.data.batches import TokenBatch, as_domains, data_fingerprint, split_sequences
from moeprune_ext.models.active import fewer_active
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import evaluating
from moeprune_ext.models.replay import NotReplayable
from moeprune_ext.models.slicing import check_slicing

UNIT_TOKENS = 2048


class CandidateEvaluator:
    """Scores plans of one model on fixed batches against the unpruned model; the teacher pass happens here.

    Under torchrun (distributed.py) the sequences are dealt out over the processes; every process gets all scores.

    Args:
        model: a transformers model, or the MoeModel made of it.
        batches: see data.batches.as_domains: batches, or {domain: batches}.
        memory_budget: bytes beyond the model's own weights, on the model's device: the candidates' hidden states, what
            a layer needs to run, one layer's merged experts where candidates merge, a chunk of logits, and the
            teacher's hidden states.
        teacher_cache: where the teacher's hidden states are kept: "device", "host", "disk", or "auto", which puts them
            in host memory or on disk where they take more than a quarter of the budget.
        router: "auto" runs the fused kernel for routers whose formula it knows and whose logits are float32, and
            slices the others; "fused" takes it for half-precision logits too, where tied experts may be chosen
            otherwise; "sliced" never.
        method: "auto" sweeps all candidates through the layers together where the model can be replayed layer by
            layer, and warns where not; "whole" insists on one forward of the model per candidate.
        seed: of the `accept` metric's draws.
        least_units: the data is cut into at least so many units of work, if it has as many sequences: no more processes
            have something to do, and larger units of short sequences run faster.
        backend: of the operations, see ops/backend.py.

    Attributes:
        moe: the model.
        sequences: the batches' sequences, [1, S] each.
        domains: {domain: its sequences' numbers}; one domain, "all", where the data came in none.
        positions: attended and labelled positions.
        method: how candidates are run, and why.
        identity: what scores depend on beside the plans, as JSON values.

    Raises:
        ValueError: for a model without MoE layers or with a router that cannot be masked, for no data, for a domain
            with no position to score, when the teacher's own logits are NaN, and for a memory_budget that cannot hold
            one sequence, with the numbers.
    """

    def __init__(
        self,
        model: nn.Module | MoeModel,
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
        if method not in ("auto", "whole"):
            raise ValueError(f"method is {method!r}; choose from auto, whole")
        if least_units < 1:
            raise ValueError(f"least_units must be at least 1, got {least_units}")
        EngineOptions(memory_budget, teacher_cache, router)  # refused before the model is looked at
        self.moe = MoeModel.of(model)
        self.sequences: list[TokenBatch] = []
        self.domains: dict[str, list[int]] = {}
        for name, its_batches in as_domains(batches, self.moe.vocab_size).items():
            first = len(self.sequences)
            self.sequences += split_sequences(its_batches)
            self.domains[name] = list(range(first, len(self.sequences)))
        self.scored_positions = [int(sequence.scored.sum()) for sequence in self.sequences]
        self.positions = sum(self.scored_positions)
        if self.positions == 0:
            raise ValueError("there is nothing to score: no position is both attended and labelled")
        for name, numbers in self.domains.items():
            if not any(self.scored_positions[number] for number in numbers):
                raise ValueError(f"domain {name} has no position that is both attended and labelled; leave it out")
        self.predicted_positions = [int((s.next_token_labels >= 0).sum()) for s in self.sequences]
        self.data_fingerprint = data_fingerprint(self.sequences)
        longest = max(sequence.input_ids.shape[1] for sequence in self.sequences)
        self.unit = max(1, min(UNIT_TOKENS // longest, len(self.sequences) // least_units))
        check_slicing(self.moe.layers)
        self._map_router = functools.cache(mapped_layer)
        self._engine, self.method = self._choose_engine(
            method, EngineOptions(memory_budget, teacher_cache, router, seed, self.unit, backend)
        )
        self.identity = self._identity(seed)

    def _choose_engine(self, method: str, options: EngineOptions) -> tuple[Engine, str]:
        """Makes the engine, and says how it runs candidates, and why."""
        try:
            if method == "whole":
                raise NotReplayable("asked for")
            with evaluating(self.moe.model):
                sweep = LayerSweep(self.moe, self.sequences, options, self._map_router)
            return sweep, sweep.about + sweep.note
        except NotReplayable as reason:
            if method != "whole":
                warnings.warn(
                    f"{type(self.moe.model).__name__} cannot be swept layer by layer ({reason}); every candidate is a "
                    "forward of its own",
                    stacklevel=3,
                )
            whole = WholeForwards(self.moe, self.sequences, options, self._map_router)
            return whole, f"{whole.about}: {reason}"

    def _identity(self, seed: int) -> dict[str, Any]:
        """Runs the teacher, and returns what scores depend on, for refusing to resume another search."""
        lse = torch.zeros(len(self.sequences), dtype=torch.float64)
        with evaluating(self.moe.model):
            for number, value in self._engine.teacher(distributed.own_share(len(self.sequences), self.unit)).items():
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
            # None for one domain, which is all of the data.
            "domains": {name: len(its) for name, its in self.domains.items()} if len(self.domains) > 1 else None,
            "dtype": str(next(self.moe.model.parameters()).dtype),
            "method": self._engine.about,
            "accept_seed": seed,
            "teacher_log_sum_exp": float(lse.sum()) / self.positions,
        }

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.moe.model

    @property
    def layers(self) -> dict[int, MoeLayer]:
        """The model's MoE layers, by decoder layer."""
        return self.moe.layers

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""
        return self.moe.fingerprint

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """{decoder layer: what pruning must respect there}."""
        return self.moe.shapes

    def weights(self, metric: str) -> list[int]:
        """Returns the positions that each sequence contributes to a metric's mean."""
        return self.predicted_positions if metric in NEXT_TOKEN else self.scored_positions

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Refuses (ValueError, with the numbers) merges that memory_budget has no room for, before any work.

        Args:
            kept: {decoder layer: experts K' to which it merges}.
        """
        self._engine.check_merged(kept)

    def evaluate(self, plans: Sequence[PruningPlan], metrics: Sequence[str] = ("esap",)) -> list[CandidateScore]:
        """Scores plans; a score does not depend on the other plans of the call, up to rounding.

        Matrix products of another size round differently, below 1e-6 in float32.

        Args:
            plans: of this model.
            metrics: any of esap, kl_pq, kl_qp, top1_agree, accept, nll, label_top1.

        Returns:
            One CandidateScore per plan, in order.

        Raises:
            ValueError: before any work, for an unknown metric or a plan this model cannot carry out.
        """
        scored = self.sequence_sums(plans, metrics)
        means = {name: scored.sums[name].sum(1) / sum(self.weights(name)) for name in metrics}
        return [
            CandidateScore(
                **{name: float(values[row]) for name, values in means.items()},
                positions=self.positions,
                nan_rows=int(scored.nan_rows[row].sum()),
            )
            for row in range(len(plans))
        ]

    def fitness(self, plans: Sequence[PruningPlan], metric: str = "esap", objective: str = "mean") -> list[float]:
        """Returns what plans are compared by: a metric's mean, or that of the domain where it is worst.

        Args:
            plans: of this model.
            metric: as in `evaluate`.
            objective: "mean" or "worst".

        Raises:
            ValueError: as `evaluate`, and for an unknown objective.
        """
        self.check_objective(metric, objective)
        return self.objective_values(self.sequence_sums(plans, (metric,)).sums[metric], metric, objective).tolist()

    def objective_values(self, sums: Tensor, metric: str, objective: str = "mean") -> Tensor:
        """As `fitness`, float64 [C], of sums [C, N] over all sequences."""
        self.check_objective(metric, objective)
        return objective_value(metric, objective, sums, self._weights(metric), self.domains)

    def check_objective(self, metric: str, objective: str) -> None:
        """Raises ValueError for an objective that is unknown, or that a domain has no position for."""
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; choose from {', '.join(OBJECTIVES)}")
        if objective == "worst" and metric in NEXT_TOKEN:
            for name, numbers in self.domains.items():
                if not any(self.predicted_positions[number] for number in numbers):
                    raise ValueError(
                        f"domain {name} has no position whose next token is labelled, which {metric} needs"
                    )

    def by_domain(self, plans: Sequence[PruningPlan], metric: str = "esap") -> list[dict[str, float]]:
        """Returns each plan's {domain: token-weighted mean}; see `evaluate`."""
        means = domain_means(self.sequence_sums(plans, (metric,)).sums[metric], self._weights(metric), self.domains)
        return [{name: float(values[row]) for name, values in means.items()} for row in range(len(plans))]

    def _weights(self, metric: str) -> Tensor:
        return torch.tensor(self.weights(metric), dtype=torch.float64)

    def sequence_sums(
        self,
        plans: Sequence[PruningPlan],
        metrics: Sequence[str] = ("esap",),
        sequences: Sequence[int] | None = None,
    ) -> SequenceSums:
        """Sums each plan's metrics over each sequence.

        Args:
            plans: of this model.
            metrics: as in `evaluate`.
            sequences: numbers of those to score, in the order of the result's columns; None: all.

        Raises:
            ValueError: as `evaluate`.
        """
        self._check(plans, metrics)
        wanted = list(range(len(self.sequences)) if sequences is None else sequences)
        sums = torch.zeros(len(metrics), len(plans), len(wanted), dtype=torch.float64)
        nan_rows = torch.zeros(len(plans), len(wanted), dtype=torch.int64)
        own_share = set(distributed.own_share(len(self.sequences), self.unit))
        columns = {number: column for column, number in enumerate(wanted)}
        numbers = [number for number in wanted if number in own_share and plans]
        with evaluating(self.moe.model):
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

    def _check(self, plans: Sequence[PruningPlan], metrics: Sequence[str]) -> None:
        """Refuses (ValueError) what cannot be scored."""
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"unknown metrics {unknown}; choose from {', '.join(METRICS)}")
        if not metrics:
            raise ValueError(f"name at least one metric of {', '.join(METRICS)}")
        if set(NEXT_TOKEN) & set(metrics) and not any(self.predicted_positions):
            raise ValueError("nll and label_top1 need a position whose next token is labelled; the data has none")
        for plan in plans:
            check_plan(plan, self.layers, self.fingerprint, self._map_router)

    def _values(
        self, plans: Sequence[PruningPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[Values]:
        """Runs the plans that have equally many experts active together."""
        by_active: dict[int | None, list[int]] = {}
        for i, plan in enumerate(plans):
            by_active.setdefault(plan.active, []).append(i)
        for active, members in by_active.items():
            with fewer_active(self.layers, active):
                for number, chosen, values in self._engine.values([plans[i] for i in members], numbers, metrics):
                    yield number, [members[i] for i in chosen], values

    def _rows(self, number: int) -> tuple[Tensor, Tensor]:
        """Of a sequence's wanted rows: which are scored [T] bool, and their next-token labels [T] int64."""
        sequence = self.sequences[number]
        return sequence.scored[sequence.wanted], sequence.next_token_labels[sequence.wanted]
