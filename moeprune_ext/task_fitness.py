"""A task as the fitness of candidates: all of them answer all examples in one teacher-forced sweep, without generation.

An example's options are sequences of their own, of which only the continuation is scored; an exact match is a sequence
whose every answer token has the largest logit (evaluate.py says why that is greedy decoding), a multiple choice the
option of the highest log-likelihood. Source: EEP, arXiv 2407.00945, section 4 of whose search this scores; teacher
forcing in the place of generated text is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moeprune_ext.eep_search import Fitness
from moeprune_ext.eep_candidates import Candidate
from moeprune_ext.evaluate import Task
from moeprune_ext.evaluator import CandidateEvaluator
from moeprune_ext.merging import Merge, MergedPlan
from moeprune_ext.plan import PruningPlan


class TaskFitness:
    """Scores EEP's candidates, and pruning plans, by a task; to be called with a list of them.

    score: the share of examples answered right. tie: the mean log-likelihood of the right answers, per answer (both as
    `evaluate.correct` defines them). length_normalized: choices compare by log-likelihood per token. options: see
    CandidateEvaluator. active: experts per token, fewer than the model's; None: as many.

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
        rows = [(example.prompt, option) for example in task.examples for option in example.options]
        batches = []
        for prompt, continuation in rows:
            labels = torch.zeros(1, len(prompt) + len(continuation), dtype=torch.bool)
            labels[0, len(prompt) :] = True
            batches.append({"input_ids": torch.tensor([prompt + continuation]), "labels_mask": labels})
        self.evaluator = CandidateEvaluator(model, batches, **options)

    def __call__(self, candidates: Sequence[Candidate | PruningPlan]) -> list[Fitness]:
        plans = [self._plan(candidate) for candidate in candidates]
        sums = self.evaluator.sequence_sums(plans, ("nll", "label_top1")).sums
        lengths = self.evaluator.weights("nll")
        return [
            self._fitness((-nll).tolist(), hits.tolist(), lengths)
            for nll, hits in zip(sums["nll"], sums["label_top1"], strict=True)
        ]

    def _plan(self, candidate: Candidate | PruningPlan) -> PruningPlan | MergedPlan:
        if isinstance(candidate, PruningPlan):
            return candidate
        experts = {index: layer.shape.num_experts for index, layer in self.evaluator.layers.items()}
        if candidate.is_pruning and self._active is None:
            return PruningPlan(candidate.kept, {index: experts[index] for index in candidate.kept})
        router = candidate.router_map
        merges = {index: Merge(matrix, router[index], self._active) for index, matrix in candidate.merge_map.items()}
        return MergedPlan(merges)

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
