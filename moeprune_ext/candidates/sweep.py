"""A model whose candidates are swept together, within a memory budget: teacher, sweep and head put to work.

The budget is divided once, at the start, by what a layer is measured to need: logits in flight, the teacher's rows if
they stay on the device, what a layer call needs (which sets how many states one call takes), and the candidates' hidden
states (which sets how many candidates go together, and how many sequences where they wait for each other: where layers
are streamed, or experts are merged for one layer at a time). None of it depends on the candidates or on the number of
processes; while plans merge experts, those of one layer take their part of what states have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.head import Head
from moeprune_ext.candidates.memory import Division, peak_bytes
from moeprune_ext.candidates.teacher import TeacherCache, TeacherRows, choose_place
from moeprune_ext.candidates.tree import Level, Sweep, grow
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import masks
from moeprune_ext.models.merging import Treatment, bytes_while_merged, order_of
from moeprune_ext.models.moe import MoeLayer
from moeprune_ext.models.probing import half_kept
from moeprune_ext.models.replay import TRIED_TOKENS, LayerInputs, NotReplayable, Replay, alike
from moeprune_ext.models.routers import routed_layer
from moeprune_ext.ops.overlap import bytes_in_flight, log_sum_exp_from_hidden, overlap

CPU_TOKENS_AT_ONCE, CUDA_TOKENS_AT_ONCE = 8_192, 65_536  # beyond these a layer call gains nothing


CPU_HEAD_BYTES, CUDA_HEAD_BYTES = 2**28, 2**31


def padded_lengths(sequences: Sequence[TokenBatch], unit: int) -> list[int]:
    """The lengths that sequences, [1, S] each, are run at: a unit's longest for all of it, so that they can go through
    a layer together, where that adds less than a tenth and where no position is masked."""
    lengths = [sequence.input_ids.shape[1] for sequence in sequences]
    for start in range(0, len(lengths), unit):
        mine = slice(start, start + unit)
        longest, count = max(lengths[mine]), len(lengths[mine])
        whole = all(bool(sequence.attention_mask.all()) for sequence in sequences[mine])
        if whole and 10 * longest * count < 11 * sum(lengths[mine]):
            lengths[mine] = [longest] * count
    return lengths


class SweptModel:
    """An evaluator.Engine. Raises NotReplayable, with the reason, for a model that cannot be taken apart.

    about: how candidates are grouped, which scores depend on in their last bits. note: what else to say of it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, MoeLayer],
        sequences: Sequence[TokenBatch],
        unit: int,
        memory_budget: int,
        teacher_cache: str,
        router: str,
        seed: int,
        backend: str,
    ) -> None:
        self._model, self._layers, self._sequences = model, dict(layers), sequences
        self._unit, self._seed, self._backend = unit, seed, backend
        self._device = next(model.parameters()).device
        self._streamed = getattr(model, "moeprune_stream", None) is not None
        self._first = min(self._layers)
        self._lengths = [sequence.input_ids.shape[1] for sequence in sequences]
        longest = max(sequences, key=lambda sequence: sequence.input_ids.shape[1])
        few = TokenBatch(*(part[:, :TRIED_TOKENS] for part in vars(sequences[0]).values()))
        problem: NotReplayable | None = None
        try:
            self._replay = Replay(model, self._layers)
            self._replay.check(few.model_inputs(self._device))
            routed = {index: routed_layer(layer, router) for index, layer in self._layers.items()}
            self._sweep = Sweep(self._replay, routed, 1)
            self._check_masked(few)
        except NotReplayable as reason:
            problem = reason
        # All processes or none.
        if bool(distributed.maximum_(torch.tensor([problem is not None], dtype=torch.float64))):
            raise problem or NotReplayable("another process cannot replay it")
        padded, common = padded_lengths(sequences, unit), ""
        if padded != self._lengths and distributed.from_first(lambda: self._ignores_what_follows(few)):
            self._lengths, common = padded, ", common lengths"
        self.division = distributed.from_first(lambda: self._divide(longest, memory_budget, teacher_cache))
        self._sweep.release()
        self._sweep.tokens_at_once = self.division.tokens
        self._kinds: dict[int, int] = {}  # sequences of one kind are neighbours whose layers are called alike
        self._teacher = TeacherCache(self.division.teacher_place, self._device)
        self._head = Head(self._replay, sequences, self._teacher, self.division, seed, backend)
        ways = " and ".join(sorted({r.way for r in routed.values()}))
        self.about = (
            f"layer sweep, routers {ways}, units of {unit}{common}, {self.division.tokens} tokens at once, "
            f"{self.division.state_tokens} held, {self.division.head >> 20} MiB of logits"
        )
        self.note = ""
        if any(r.spec is not None and r.logits_dtype != torch.float32 for r in routed.values()):
            apart = self._fused_difference(few)
            self.note = f"; fused and sliced routing differ by {apart:.1e} in ESAP on {few.input_ids.numel()} tokens"

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        """Fills the teacher cache for these sequences; the sums of their log-sum-exps."""
        alone = grow([self._kept(None)], list(self._layers))
        sums = {}
        self._tell_kinds(numbers)
        # As much memory as three states: captured, begun and run.
        for wave in self._waves(numbers, 3, self.division.state_tokens):
            captured = []
            for batch in wave:
                inputs = [self._inputs(number) for number in batch]
                captured.append((torch.cat([one.hidden for one in inputs]), inputs[0]))
            starts = self._sweep.run(alone, captured, 0, self._first)
            # The next run writes where these lie.
            begun = [(start.clone(), inputs) for start, (_, inputs) in zip(starts, captured, strict=True)]
            for batch, (start, _), last in zip(wave, begun, self._sweep.run(alone, begun, self._first), strict=True):
                for i, n in enumerate(batch):
                    head_inputs = self._head.inputs([n], last[None, i : i + 1])[0]
                    lse = log_sum_exp_from_hidden(
                        head_inputs, self._replay.head, chunk_bytes=self.division.head, backend=self._backend
                    )
                    sums[n] = float(lse.sum())
                    self._teacher[n] = TeacherRows(start[i : i + 1], head_inputs, lse)
        return sums

    def values(
        self, plans: Sequence[PruningPlan | MergedPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
        """See evaluator.Engine."""
        candidates = [self._kept(plan) for plan in plans]
        layers = list(self._layers)
        # Neighbours in this order share most; groups of them fit the memory for states.
        order = sorted(range(len(plans)), key=lambda i: [order_of(candidates[i][layer]) for layer in layers])
        merging = any(isinstance(plan, MergedPlan) for plan in plans)
        merged = {(i, len(m.experts)) for plan in plans if isinstance(plan, MergedPlan) for i, m in plan.merges.items()}
        room = self._room(merged)
        group = max(1, room // max(self._lengths))
        for start in range(0, len(order), group):
            chosen = order[start : start + group]
            tree = grow([candidates[i] for i in chosen], layers)
            for wave in self._waves(numbers, tree.states + 1, room, merging):
                begun = [(torch.cat([self._teacher[n].start for n in batch]), self._inputs(batch[0])) for batch in wave]
                for batch, last in zip(wave, self._sweep.run(tree, begun, self._first), strict=True):
                    states = last.view(len(batch), -1, *last.shape[1:])
                    for n, values in self._head.compared(batch, states, metrics):
                        yield n, chosen, {name: value[tree.leaf.to(value.device)] for name, value in values.items()}
            if self._streamed or merging:
                self._sweep.release()  # the next wave may be cut otherwise

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """See evaluator.Engine."""
        self._room(kept.items())

    def _room(self, merged: Iterable[tuple[int, int]]) -> int:
        """Tokens of states that fit beside the merged experts, (decoder layer, K'), of one layer. Raises ValueError
        where not even one sequence's do."""
        size = max((bytes_while_merged(self._layers[index], count) for index, count in merged), default=0)
        longest, held = max(self._lengths), self.division.state_tokens
        room = (held - -(-size // self.division.token_bytes)) // longest * longest
        if room < longest:
            own, there = longest * self.division.token_bytes, held * self.division.token_bytes
            mib = [f"{n / 2**20:,.2f} MiB" for n in (there, size, own, size + own - there)]
            raise ValueError(
                f"memory_budget leaves {mib[0]} for hidden states; the merged experts of one layer would take {mib[1]} "
                f"of it, and a candidate's states need {mib[2]}: {mib[3]} are missing"
            )
        return room

    def _inputs(self, number: int) -> LayerInputs:
        inputs = self._sequences[number].model_inputs(self._device)
        if more := self._lengths[number] - inputs["input_ids"].shape[1]:
            inputs["input_ids"] = F.pad(inputs["input_ids"], (0, more))
        return self._replay.inputs(inputs)

    def _tell_kinds(self, numbers: Sequence[int]) -> None:
        """Once, so that later a batch's first sequence stands for it."""
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
        """Batches of sequences that advance together: one, or where layers are streamed or experts merged as many as
        the states' memory holds.

        A batch is neighbours of one unit and kind, up to a full layer call.
        """
        unit = self._unit
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
            if wave and (not (self._streamed or merging) or held + most * tokens > room):
                yield wave
                wave, held = [], 0
            wave.append([number])
            held += most * tokens
        if wave:
            yield wave

    def _kept(self, plan: PruningPlan | MergedPlan | None) -> dict[int, Treatment]:
        """What a plan does to each layer."""
        full: dict[int, Treatment] = {
            index: tuple(range(layer.shape.num_experts)) for index, layer in self._layers.items()
        }
        if isinstance(plan, MergedPlan):
            return full | plan.merges
        return full if plan is None else full | {index: tuple(kept) for index, kept in plan.kept.items()}

    def _check_masked(self, sequence: TokenBatch) -> None:
        """Compares pruned candidates that share a beginning with whole masked forwards of the model."""
        full = {index: tuple(range(layer.shape.num_experts)) for index, layer in self._layers.items()}
        half = {index: tuple(half_kept(layer)) for index, layer in self._layers.items()}
        mixed = {**half, max(self._layers): full[max(self._layers)]}
        candidates = [half, mixed, full]
        inputs = self._replay.inputs(sequence.model_inputs(self._device))
        self._sweep.tokens_at_once = 3 * sequence.input_ids.shape[1]
        tree = grow(candidates, list(self._layers))
        try:
            last = self._sweep.run(tree, [(inputs.hidden, inputs)])[0]
            got = [self._replay.project(self._replay.head_inputs(last[leaf])) for leaf in tree.leaf.tolist()]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise NotReplayable(f"sweeping it fails: {' '.join(str(error).split())[:200]}") from error
        for candidate, logits in zip(candidates[:2], got, strict=False):  # the full model has been compared already
            plan = PruningPlan(
                {index: list(ids) for index, ids in candidate.items()},
                {index: layer.shape.num_experts for index, layer in self._layers.items()},
            )
            with masks(self._layers, plan):
                expected = self._model(**sequence.model_inputs(self._device), use_cache=False).logits[0]
            self._replay.compare(logits, expected)

    def _ignores_what_follows(self, sequence: TokenBatch) -> bool:
        """Whether the logits of a sequence's first half are the same with the rest behind it."""
        ids = sequence.input_ids.to(self._device)
        half = max(1, ids.shape[1] // 2)
        tree = grow([self._kept(None)], list(self._layers))
        logits = []
        for tokens in (ids[:, :half], ids):
            inputs = self._replay.inputs({"input_ids": tokens})
            last = self._sweep.run(tree, [(inputs.hidden, inputs)])[0][0, :half]
            logits.append(self._replay.project(self._replay.head_inputs(last)))
        try:
            self._replay.compare(logits[1], logits[0])
        except NotReplayable:
            return False
        return True

    def _fused_difference(self, sequence: TokenBatch) -> float:
        """1 - ESAP between half-pruned models whose tied half-precision logits the kernel and slicing resolve."""
        inputs = self._replay.inputs(sequence.model_inputs(self._device))
        tree = grow([{index: tuple(half_kept(layer)) for index, layer in self._layers.items()}], list(self._layers))
        sliced = Sweep(self._replay, {i: routed_layer(layer, "sliced") for i, layer in self._layers.items()}, 1)
        p, q = (
            self._replay.project(self._replay.head_inputs(sweep.run(tree, [(inputs.hidden, inputs)])[0][0]))
            for sweep in (sliced, self._sweep)
        )
        return 1 - float(overlap(p, q)["esap"].mean())

    def _divide(self, longest: TokenBatch, budget: int, teacher_cache: str) -> Division:
        length = longest.input_ids.shape[1]
        inputs = self._replay.inputs(longest.model_inputs(self._device))
        width, item = inputs.hidden.shape[-1], inputs.hidden.element_size()
        states = 2 * length * width * item
        per_token = -(-self._layer_bytes(inputs) // length)
        layer = per_token * length
        arguments = 2 * self._replay.argument_bytes(inputs)  # of this sequence and of the one before

        wanted = [int(sequence.wanted.sum()) for sequence in self._sequences]
        rows = [(size + w) * width * item + 8 * w for size, w in zip(self._lengths, wanted, strict=True)]
        place = choose_place(teacher_cache, sum(rows), self._device, budget)
        on_device = place == "device" or (place == "host" and self._device.type == "cpu")
        teacher = sum(rows) if on_device else max(rows)
        logits = self._replay.project(self._replay.head_inputs(inputs.hidden[0, :1]))
        head_least = 16 * bytes_in_flight(logits, self._backend)
        least = head_least + teacher + layer + states + arguments
        if budget < least:
            mib = [f"{size / 2**20:,.1f}" for size in (budget, layer, states + arguments, teacher, head_least)]
            raise ValueError(
                f"memory_budget is {mib[0]} MiB, too little for a sequence of {length} tokens: a decoder layer needs "
                f"{mib[1]}, a candidate's hidden states and masks {mib[2]}, the teacher's rows {mib[3]} ({place}) and "
                f"logits {mib[4]}; allow {least / 2**20 + 0.1:,.1f} MiB or shorten the sequences"
            )
        on_cpu = self._device.type == "cpu"
        most_head = CPU_HEAD_BYTES if on_cpu else CUDA_HEAD_BYTES
        head = max(head_least, min(most_head, budget // 4, budget - least + head_least))
        rest = budget - head - teacher - arguments
        most = CPU_TOKENS_AT_ONCE if on_cpu else CUDA_TOKENS_AT_ONCE
        # In whole sequences, so that a byte more or less on another day groups alike.
        tokens = max(1, min(most, rest // 2 // per_token) // length) * length
        state_tokens = max(1, (rest - tokens * per_token) // (2 * width * item) // length) * length
        return Division(head, head_least // 16, tokens, state_tokens, 2 * width * item, place)

    def _layer_bytes(self, inputs: LayerInputs) -> int:
        """Most bytes beside the states that a layer's call for one state needs, with what the sweep keeps from call to
        call. On a GPU half of those for two states of one node: pairs that they share go through the experts' own
        function, which takes more."""
        together = 1 if self._device.type == "cpu" else 2
        self._sweep.tokens_at_once = together * inputs.hidden.shape[1]
        self._sweep.release()  # so that all of it is seen
        stream = getattr(self._model, "moeprune_stream", None)
        hidden, outputs, most = inputs.hidden, inputs.hidden, 0

        def step() -> None:
            nonlocal outputs
            outputs = self._sweep.layer(index, level, hidden, inputs, 0)

        full = self._kept(None)
        for index in range(len(self._replay.layers)):
            level = None
            if index in self._layers:
                masks = (tuple(half_kept(self._layers[index])), full[index])
                level = Level(torch.zeros(together, dtype=torch.int64), torch.arange(together), masks)
            if stream is not None:
                stream.make_resident(index)  # weights are not what is measured
            before = self._sweep.held_bytes
            most = max(most, peak_bytes(step, self._device) - (self._sweep.held_bytes - before))
            hidden = outputs[:1].clone()
        state_bytes = inputs.hidden.nbytes  # copied where a node has several
        return (most + self._sweep.scratch_bytes) // together + state_bytes
