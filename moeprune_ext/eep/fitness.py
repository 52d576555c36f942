"""A task as the fitness of candidates: all of them answer all examples in one teacher-forced sweep, without generation.

An example's options are sequences of their own, of which only the continuation is scored; an exact match is a sequence
whose every answer token has the largest logit (evaluate/quality.py says why that is greedy decoding), a multiple choice
the option of the highest log-likelihood. Source: EEP, arXiv 2407.00945, section 4 of whose search this scores; teacher
forcing in the place of generated text is our choice.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.data.tasks import Task, answered_right, right_likelihoods, rows_of, sequences
from moeprune_ext.eep.operators import simplified
from moeprune_ext.eep.search import Fitness
from moeprune_ext.evaluate.hopeless import hopeless_reason
from moeprune_ext.models.apply import full_plan
from moeprune_ext.models.moe import MoeModel

LEAST_UNITS = 4  # of work; answers are short, and few of them in a unit would leave a layer little to do


class _Scorer:
    """Holds a task's evaluator, and completes candidates of a search to plans of its model."""

    def __init__(self, model: nn.Module | MoeModel, task: Task, fitness: str, active: int | None, options: Any) -> None:
        self.task, self._active = task, active
        self.evaluator = CandidateEvaluator(model, sequences(task, fitness), **{"least_units": LEAST_UNITS, **options})

    def _plans(self, candidates: Sequence[PruningPlan]) -> list[PruningPlan]:
        return [candidate_plan(candidate, self.evaluator, self._active) for candidate in candidates]


class TaskFitness(_Scorer):
    """Scores candidates and plans by a task; to be called with a list of them.

    The score is the share of examples answered right, the tie the mean log-likelihood of the right answers, per answer.

    Args:
        model: a transformers model, or the MoeModel made of it.
        task: the examples.
        length_normalized: choices compare by log-likelihood per token.
        active: experts per token, fewer than the model's; None: as many.
        **options: see CandidateEvaluator.

    Attributes:
        evaluator: of the task's sequences.
        places: of every example's every option, one after the other, the number of its sequence in `evaluator`.

    Raises:
        ValueError: as CandidateEvaluator, when it is made and when it is called.
    """

    def __init__(
        self,
        model: nn.Module | MoeModel,
        task: Task,
        *,
        length_normalized: bool = False,
        active: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, task, "accuracy", active, options)
        self._length_normalized = length_normalized
        lengths = [len(prompt) + len(option) for prompt, option in rows_of(task)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        self.places = sorted(range(len(lengths)), key=order.__getitem__)

    def __call__(self, candidates: Sequence[PruningPlan]) -> list[Fitness]:
        """Returns each candidate's fitness."""
        sums = self.evaluator.sequence_sums(self._plans(candidates), ("nll", "label_top1")).sums
        weights = self.evaluator.weights("nll")
        lengths = [weights[place] for place in self.places]
        scores = []
        for nll, hits in zip(sums["nll"][:, self.places], sums["label_top1"][:, self.places], strict=True):
            likelihoods = (-nll).tolist()
            matches = [hit == length for hit, length in zip(hits.tolist(), lengths, strict=True)]
            right = answered_right(self.task, likelihoods, matches, length_normalized=self._length_normalized)
            total = sum(right_likelihoods(self.task, likelihoods))
            share = sum(right) / len(right) if total == total else math.nan
            scores.append(Fitness(share, total / len(right)))
        return scores


class AnswerFitness(_Scorer):
    """Scores candidates and plans by how they treat the tokens of the right answers; made and called as TaskFitness.

    Args:
        model: a transformers model, or the MoeModel made of it.
        task: the examples.
        metric: "esap", the acceptance against the full model at the positions that predict these tokens (our choice:
            unshifted, as ESAP is elsewhere, it would leave out the first of them); the score is the metric's value. Or
            "nll", per token; the score is exp(-nll), a share of 1 in the same order (our choice).
        active: experts per token, fewer than the model's; None: as many.
        **options: see CandidateEvaluator.
    """

    def __init__(
        self, model: nn.Module | MoeModel, task: Task, metric: str, *, active: int | None = None, **options: Any
    ) -> None:
        super().__init__(model, task, metric, active, options)
        self._metric = metric

    def __call__(self, candidates: Sequence[PruningPlan]) -> list[Fitness]:
        """Returns each candidate's fitness; it has no tie."""
        scores = self.evaluator.evaluate(self._plans(candidates), (self._metric,))
        values = [getattr(score, self._metric) for score in scores]
        return [Fitness(math.exp(-value) if self._metric == "nll" else value) for value in values]


def candidate_plan(candidate: PruningPlan, evaluator: CandidateEvaluator, active: int | None = None) -> PruningPlan:
    """Completes a candidate of a search to a plan of the evaluator's model; other plans are returned as they are.

    Args:
        candidate: a plan without a model and with a merge in each of its layers, or any other plan.
        evaluator: of the model.
        active: experts per token; None: the model's.
    """
    if candidate.model is not None or len(candidate.mapped_layers) < len(candidate.kept):
        return candidate
    return simplified(candidate, evaluator.shapes, evaluator.fingerprint, active)


def warn_if_hopeless(judge: TaskFitness | AnswerFitness) -> None:
    """Warns, on the first process, of a task that the full model fails at, with the likely cause.

    Args:
        judge: scores plans by the accuracy on the task.
    """
    moe = judge.evaluator.moe
    share = judge([full_plan(moe)])[0].score
    if distributed.is_first() and (reason := hopeless_reason(moe, judge.task, share)):
        warnings.warn(reason, stacklevel=3)
