"""A layer sweep: all candidates of a generation go through the model together, one decoder layer after the other.

The sequences of a call are cut into *waves* of batches that advance together: one batch, or, where layers are streamed
or experts are merged for one layer at a time, as many as the memory for states holds. A batch is neighbouring sequences
of one unit whose layers are called with equal arguments. The teacher's states in front of the first MoE layer are where
every candidate starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.blocks import BlockRunner
from moeprune_ext.candidates.checks import check_masked, fused_difference, ignores_what_follows, same_everywhere
from moeprune_ext.candidates.engine import EngineOptions, Values
from moeprune_ext.candidates.head import Head
from moeprune_ext.candidates.memory import divide
from moeprune_ext.candidates.teacher import TeacherCache, TeacherRows
from moeprune_ext.candidates.tree import grow, treatments
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.merging import MapRouter, bytes_while_merged
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.replay import TRIED_TOKENS, LayerInputs, NotReplayable, Replay, alike
from moeprune_ext.models.routers import routed_layer
from moeprune_ext.ops.overlap import log_sum_exp_from_hidden


def padded_lengths(sequences: Sequence[TokenBatch], unit: int) -> list[int]:
    """Returns the lengths that sequences, [1, S] each, are run at.

    A unit's longest is the length of all of it, so that its sequences go through a layer together, where that adds less
    than a tenth and where no position is masked.
    """
    lengths = [sequence.input_ids.shape[1] for sequence in sequences]
    for start in range(0, len(lengths), unit):
        members = slice(start, start + unit)
        longest, count = max(lengths[members]), len(lengths[members])
        unmasked = all(bool(sequence.attention_mask.all()) for sequence in sequences[members])
        if unmasked and 10 * longest * count < 11 * sum(lengths[members]):
            lengths[members] = [longest] * count
    return lengths


class LayerSweep:
    """An Engine that sweeps all candidates through the layers together.

    Args:
        moe: the model.
        sequences: all that are scored, [1, S] each.
        options: see EngineOptions.
        map_router: finds how a router maps its scores.

    Attributes:
        about: how candidates are grouped, which scores depend on in their last bits.
        note: what else to say of it.
        division: of the memory budget.

    Raises:
        NotReplayable: with the reason, for a model that cannot be taken apart.
        ValueError: for a memory_budget that cannot hold one sequence, with the numbers.
    """

    def __init__(
        self, moe: MoeModel, sequences: Sequence[TokenBatch], options: EngineOptions, map_router: MapRouter
    ) -> None:
        self._moe, self._sequences, self._options = moe, sequences, options
        self._first = min(moe.layers)
        self._lengths = [sequence.input_ids.shape[1] for sequence in sequences]
        tokens = TokenBatch(*(part[:, :TRIED_TOKENS] for part in vars(sequences[0]).values()))
        routed = {}
        problem: NotReplayable | None = None
        try:
            self._replay = Replay(moe)
            self._replay.check(tokens.model_inputs(moe.device))
            routed = {index: routed_layer(layer, options.router) for index, layer in moe.layers.items()}
            self._runner = BlockRunner(self._replay, routed, map_router)
            check_masked(self._runner, tokens)
        except NotReplayable as reason:
            problem = reason
        same_everywhere(problem)
        padded, common = padded_lengths(sequences, options.unit), ""
        if padded != self._lengths and distributed.from_first(lambda: ignores_what_follows(self._runner, tokens)):
            self._lengths, common = padded, ", common lengths"
        self.division = distributed.from_first(lambda: divide(self._runner, sequences, self._lengths, options))
        self._runner.release()
        self._runner.tokens_at_once = self.division.tokens
        self._kinds: dict[int, int] = {}  # {sequence: the first of those around it whose layers are called alike}
        self._teacher = TeacherCache(self.division.teacher_place, moe.device)
        self._head = Head(self._replay, sequences, self._teacher, self.division, options)
        ways = " and ".join(sorted({layer.way for layer in routed.values()}))
        self.about = (
            f"layer sweep, routers {ways}, units of {options.unit}{common}, {self.division.tokens} tokens at once, "
            f"{self.division.state_tokens} held, {self.division.head >> 20} MiB of logits"
        )
        self.note = ""
        if any(layer.spec is not None and layer.logits_dtype != torch.float32 for layer in routed.values()):
            difference = fused_difference(self._runner, tokens)
            count = tokens.input_ids.numel()
            self.note = f"; fused and sliced routing differ by {difference:.1e} in ESAP on {count} tokens"

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        """See Engine; fills the teacher cache."""
        unpruned = grow([treatments(self._moe.layers)])
        sums = {}
        self._group_alike(numbers)
        # As much memory as three states: captured, begun and run.
        for wave in self._waves(numbers, 3, self.division.state_tokens):
            captured = []
            for batch in wave:
                inputs = [self._inputs(number) for number in batch]
                captured.append((torch.cat([one.hidden for one in inputs]), inputs[0]))
            starts = self._runner.run(unpruned, captured, 0, self._first)
            # The next run writes where these lie.
            begun = [(start.clone(), inputs) for start, (_, inputs) in zip(starts, captured, strict=True)]
            for batch, (start, _), last in zip(
                wave, begun, self._runner.run(unpruned, begun, self._first), strict=True
            ):
                for row, number in enumerate(batch):
                    head_inputs = self._head.inputs([number], last[None, row : row + 1])[0]
                    lse = log_sum_exp_from_hidden(
                        head_inputs,
                        self._replay.head,
                        chunk_bytes=self.division.head,
                        backend=self._options.backend,
                    )
                    sums[number] = float(lse.sum())
                    self._teacher[number] = TeacherRows(start[row : row + 1], head_inputs, lse)
        return sums

    def values(
        self, plans: Sequence[PruningPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[Values]:
        """See Engine."""
        candidates = [treatments(self._moe.layers, plan) for plan in plans]
        # Neighbours in this order share most; groups of them fit the memory for states.
        order = sorted(range(len(plans)), key=lambda i: [treatment.order for treatment in candidates[i].values()])
        merging = any(plan.merges for plan in plans)
        room = self._room(
            (index, len(merge.experts), merge.only_down) for plan in plans for index, merge in plan.merges.items()
        )
        group = max(1, room // max(self._lengths))
        for start in range(0, len(order), group):
            chosen = order[start : start + group]
            tree = grow([candidates[i] for i in chosen])
            for wave in self._waves(numbers, tree.states + 1, room, merging):
                begun = [(torch.cat([self._teacher[n].start for n in batch]), self._inputs(batch[0])) for batch in wave]
                for batch, last in zip(wave, self._runner.run(tree, begun, self._first), strict=True):
                    states = last.view(len(batch), -1, *last.shape[1:])
                    for number, values in self._head.compared(batch, states, metrics):
                        leaves = {name: value[tree.leaf.to(value.device)] for name, value in values.items()}
                        yield number, chosen, leaves
            if self._moe.stream is not None or merging:
                self._runner.release()  # the next wave may be cut otherwise

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """See Engine."""
        self._room((index, count, False) for index, count in kept.items())

    def _room(self, merged: Iterable[tuple[int, int, bool]]) -> int:
        """Returns the tokens of states that fit beside one layer's merged experts.

        Args:
            merged: a decoder layer, K', and whether only down projections are other ones.
        """
        layers = self._moe.layers
        size = max((bytes_while_merged(layers[index], count, down) for index, count, down in set(merged)), default=0)
        return self.division.room_beside(size, max(self._lengths))

    def _inputs(self, number: int) -> LayerInputs:
        """Captures what the layers are called with for one sequence, at the length that it is run at."""
        inputs = self._sequences[number].model_inputs(self._moe.device)
        if more := self._lengths[number] - inputs["input_ids"].shape[1]:
            inputs["input_ids"] = F.pad(inputs["input_ids"], (0, more))
        return self._replay.inputs(inputs)

    def _group_alike(self, numbers: Sequence[int]) -> None:
        """Groups neighbouring sequences whose layers get equal arguments, so that one stands for all of them."""
        before: tuple[int, LayerInputs] | None = None
        for number in numbers:
            inputs = self._inputs(number)
            same = (
                before is not None
                and before[1].hidden.shape == inputs.hidden.shape
                and alike(before[1].arguments, inputs.arguments)
            )
            self._kinds[number] = self._kinds[before[0]] if same and before is not None else number
            before = number, inputs

    def _waves(
        self, numbers: Sequence[int], states: int, room: int, merging: bool = False
    ) -> Iterator[list[list[int]]]:
        """Yields waves of batches of sequences.

        Args:
            numbers: of the sequences.
            states: of one sequence, alive at once.
            room: tokens of states that fit.
            merging: whether experts are merged.
        """
        unit, waits = self._options.unit, self._moe.stream is not None or merging
        wave: list[list[int]] = []
        held = most = 0
        for number in numbers:
            last = wave[-1] if wave else None
            if (
                last is not None
                and len(last) < most
                and last[-1] // unit == number // unit
                and self._kinds[last[-1]] == self._kinds[number]
            ):
                last.append(number)
                continue
            # A unit that does not fit one call is cut into equal parts; merges take the states one by one. Where a wave
            # ends, which depends on what else this process has to do, never cuts a batch.
            length = self._lengths[number]
            tokens = length * states
            in_call = length if merging else tokens
            most = -(-unit // max(-(-unit * in_call // self.division.tokens), -(-unit * tokens // room)))
            if wave and (not waits or held + most * tokens > room):
                yield wave
                wave, held = [], 0
            wave.append([number])
            held += most * tokens
        if wave:
            yield wave
