"""After the last layer: candidates' hidden states -> logits at the positions that are wanted -> metrics.

Logits are made in chunks, a product for each candidate whatever their number. Where a metric looks at the candidate
alone, sequences with few wanted positions go through together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moeprune_ext.candidates.engine import Division, EngineOptions
from moeprune_ext.candidates.metrics import NEXT_TOKEN
from moeprune_ext.candidates.teacher import TeacherCache
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.replay import Replay
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.ops.overlap import next_token, overlap_from_hidden


class Head:
    """Makes logits of sequences and compares them with the teacher's and with the tokens.

    Args:
        replay: the model, taken apart.
        sequences: all that are scored, [1, S] each.
        teacher: the unpruned model's rows.
        division: of the memory budget.
        options: seed and backend are looked at.
    """

    def __init__(
        self,
        replay: Replay,
        sequences: Sequence[TokenBatch],
        teacher: TeacherCache,
        division: Division,
        options: EngineOptions,
    ) -> None:
        self._replay, self._sequences, self._teacher, self._division = replay, sequences, teacher, division
        self._seed, self._backend = options.seed, options.backend

    def inputs(self, numbers: Sequence[int], last: Tensor) -> Tensor:
        """Makes the head's inputs at the wanted positions of some sequences.

        Args:
            numbers: of B sequences that together have T wanted positions, T <= S.
            last: [B, M, S, H], the last layer's output; the first sequence's part is overwritten with the result.

        Returns:
            [M, T, H], one sequence's rows after the other's, a view of `last`.
        """
        wanted = [self._sequences[n].wanted[0].nonzero()[:, 0].to(last.device) for n in numbers]
        _, count_of_states, length, width = last.shape
        count = sum(map(len, wanted))
        together = max(1, self._division.tokens // length)
        for start in range(0, count_of_states, together):
            block = last[:, start : start + together]
            chosen = torch.cat([states[:, at] for states, at in zip(block, wanted, strict=True)], 1)
            rows = self._replay.head_inputs(chosen.flatten(0, 1))
            block[0, :, :count] = rows.view(-1, count, width)
        return last[0, :, :count]

    def compared(
        self, numbers: list[int], states: Tensor, metrics: tuple[str, ...]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields each sequence and its {metric: [M, T]}.

        Args:
            numbers: of B sequences.
            states: [B, M, S, H], after the last layer; they are overwritten.
            metrics: names.
        """
        if not set(metrics) <= set(NEXT_TOKEN):
            for number, last in zip(numbers, states, strict=True):
                yield number, self._compare(number, last, metrics)
            return
        # The teacher is not looked at: as many sequences go through the head together as have room in the first's.
        sizes = [int(self._sequences[n].wanted.sum()) for n in numbers]
        start = 0
        while start < len(numbers):
            end = start + 1
            while end < len(numbers) and sum(sizes[start : end + 1]) <= states.shape[2]:
                end += 1
            labels = torch.cat([self._labels(n) for n in numbers[start:end]]).to(states.device)
            values = self._next_token(self.inputs(numbers[start:end], states[start:end]), labels)
            for i, n in enumerate(numbers[start:end], start):
                at = sum(sizes[start:i])
                yield n, {name: values[name][:, at : at + sizes[i]] for name in metrics}
            start = end

    def _labels(self, number: int) -> Tensor:
        sequence = self._sequences[number]
        return sequence.next_token_labels[sequence.wanted]

    def _compare(self, number: int, last: Tensor, metrics: tuple[str, ...]) -> dict[str, Tensor]:
        teacher, labels = self._teacher[number], self._labels(number).to(last.device)
        head_inputs = self.inputs([number], last[None])
        values = {}
        if compared := tuple(name for name in metrics if name != "label_top1"):
            values = overlap_from_hidden(
                teacher.head_inputs,
                head_inputs,
                self._replay.head,
                chunk_bytes=self._division.head,
                p_lse=teacher.lse,
                labels=labels,
                metrics=compared,
                seed=self._seed + number,
                backend=self._backend,
            )
        if "label_top1" in metrics:
            values["label_top1"] = self._next_token(head_inputs, labels)["label_top1"]
        return values

    def _next_token(self, head_inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scores labels [T] by head inputs [M, T, H]: nll and label_top1, [M, T], as ops/overlap.py defines them."""
        by_state: list[dict[str, Tensor]] = []
        for hidden in head_inputs:  # a product for each candidate, whatever their number
            parts = [
                next_token(self._replay.project(hidden[rows]), labels[rows], backend=self._backend)
                for rows in row_chunks(len(labels), self._division.row_bytes, self._division.head)
            ]
            by_state.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return {name: torch.stack([values[name] for values in by_state]) for name in by_state[0]}
