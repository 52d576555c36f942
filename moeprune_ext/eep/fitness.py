"""A task as the fitness of candidates: all of them answer all examples in one teacher-forced sweep, without generation.

An example's options are sequences of their own, of which only the continuation is scored; an exact match is a sequence
whose every answer token has the largest logit (evaluate.py says why that is greedy decoding), a multiple choice the
option of the highest log-likelihood. Source: EEP, arXiv 2407.00945, section 4 of whose search this scores; teacher
forcing in the place of generated text is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.data.tasks import Task, _rows, sequences
from moeprune_ext.eep.operators import Candidate
from moeprune_ext.eep.search import Fitness

LEAST_UNITS = 4  # of work; answers are short, and few of them in a unit would leave a layer little to do


class TaskFitness:
    """Scores EEP's candidates, and pruning plans, by a task; to be called with a list of them.

    score: the share of examples answered right. tie: the mean log-likelihood of the right answers, per answer (both as
    `evaluate.correct` defines them). length_normalized: choices compare by log-likelihood per token. options: see
    CandidateEvaluator. active: experts per token, fewer than the model's; None: as many. places: of every example's
    every option, one after the other, the number of its sequence in `evaluator`.

    Raises ValueError as CandidateEvaluator does, when it is made and when it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        length_normalized: bool = False,
        active: int | None = None,
        **options: Any,
    ) -> None:
        self._task, self._length_normalized, self._active = task, length_normalized, active
        lengths = [len(prompt) + len(option) for prompt, option in _rows(task)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.places = sorted(range(len(lengths)), key=order.__getitem__)
        options = {"least_units": LEAST_UNITS, **options}
        self.evaluator = CandidateEvaluator(model, sequences(task, "accuracy"), **options)

    def __call__(self, candidates: Sequence[Candidate | Plan]) -> list[Fitness]:
        plans = [candidate_plan(candidate, self.evaluator, self._active) for candidate in candidates]
        sums = self.evaluator.sequence_sums(plans, ("nll", "label_top1")).sums
        weights = self.evaluator.weights("nll")
        lengths = [weights[place] for place in self.places]
        return [
            self._fitness((-nll).tolist(), hits.tolist(), lengths)
            for nll, hits in zip(sums["nll"][:, self.places], sums["label_top1"][:, self.places], strict=True)
        ]

    def _fitness(self, likelihoods: list[float], hits: list[float], lengths: list[int]) -> Fitness:
        right, total, at = 0, 0.0, 0
        for example in self._task.examples:
            span = range(at, at + len(example.options))
            at = span.stop
            if example.answer is None:
                right += hits[span.start] == lengths[span.start]
                total += likelihoods[span.start]
            else:
                values = [likelihoods[row] / (lengths[row] if self._length_normalized else 1) for row in span]
                best = max(range(len(values)), key=values.__getitem__)  # of equals the first; NaN is never larger
                right += best == example.answer and values[best] == values[best]
                total += likelihoods[span.start + example.answer]
        count = len(self._task.examples)
        return Fitness(right / count if total == total else float("nan"), total / count)


class AnswerFitness:
    """Scores EEP's candidates, and plans, by how they treat the tokens of the right answers; made and called as
    TaskFitness is.

    metric: "esap", the acceptance against the full model at the positions that predict these tokens (our choice:
    unshifted, as ESAP is elsewhere, it would leave out the first of them); the score is the metric's value. Or "nll",
    per token; the score is exp(-nll), a share of 1 in the same order (our choice). tie: None.
    """

    def __init__(self, model: nn.Module, task: Task, metric: str, *, active: int | None = None, **options: Any) -> None:
        self._metric, self._active = metric, active
        self.evaluator = CandidateEvaluator(model, sequences(task, metric), **{"least_units": LEAST_UNITS, **options})

    def __call__(self, candidates: Sequence[Candidate | Plan]) -> list[Fitness]:
        plans = [candidate_plan(candidate, self.evaluator, self._active) for candidate in candidates]
        values = [getattr(score, self._metric) for score in self.evaluator.evaluate(plans, (self._metric,))]
        return [Fitness(math.exp(-value) if self._metric == "nll" else value) for value in values]


def candidate_plan(candidate: Candidate | Plan, evaluator: CandidateEvaluator, active: int | None) -> Plan:
    """The plan that a candidate stands for; plans are as they are.

    active: experts per token, None: the model's. A mask's layers whose experts are looked up by token keep all.
    """
    if not isinstance(candidate, Candidate):
        return candidate
    if candidate.is_pruning:
        num_experts = {index: shape.num_experts for index, shape in evaluator.shapes.items()}
        whole = {i: list(range(num_experts[i])) for i, shape in evaluator.shapes.items() if not shape.prunable}
        kept = dict(sorted((candidate.kept | whole).items()))
        return PruningPlan(kept, {i: num_experts[i] for i in kept}, evaluator.fingerprint, "eep", active=active)
    router = candidate.router_map
    merges = {index: Merge(matrix, router[index]) for index, matrix in candidate.merge_map.items()}
    return MergedPlan(merges, evaluator.fingerprint, active)
