"""A layer sweep: all candidates of a generation go through the model together, one decoder layer after the other.

A candidate is the experts that it keeps in each MoE layer, or makes of them (merging.py). Candidates that agree up to
a layer share one hidden state there, a *node*: its attention, norms and shared experts are computed once, and so is
every (token, expert) pair that several of its candidates route (experts.py). From the first layer in which they differ,
each has a state of its own; states are run in blocks of a fixed number of tokens, so that an expert's rows of a whole
block are one matrix product. A layer's weights are needed once per sweep, whatever the number of candidates and
sequences. Merged experts are made once per layer: all states that one merge treats go through them, then the next's
are made in their place; what candidates that merge share ends with the layer's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.merged_plan import Merge
from moeprune_ext.models.experts import PairOutputs, distinct_pairs, weighted_sum
from moeprune_ext.models.merging import MergedExperts, Treatment, mapped_layer, order_of, treated
from moeprune_ext.models.moe import MoeLayer
from moeprune_ext.models.patches import ExpertsFunction, intercepted, replaced_forward
from moeprune_ext.models.replay import LayerInputs, Replay, tensors_in
from moeprune_ext.models.routers import RoutedLayer, many_masks


@dataclass(frozen=True)
class Level:
    """The states after one MoE layer: one for each distinct choice of kept experts up to it.

    parent: [M], the state before the layer that each comes from, ascending. mask: [M], its mask or merge, among
    `masks`.
    """

    parent: Tensor
    mask: Tensor
    masks: tuple[Treatment, ...]

    @property
    def merges(self) -> list[Merge]:
        return [treatment for treatment in self.masks if isinstance(treatment, Merge)]

    def treated_by(self, merge: Merge | None) -> Tensor:
        """int64, ascending: the states that this merge makes, or that masks do."""
        chosen = [merge is t or (merge is None and not isinstance(t, Merge)) for t in self.masks]
        return torch.tensor(chosen)[self.mask].nonzero()[:, 0]

    def times(self, sequences: int, states_before: int) -> Level:
        """The level for several sequences' states, one sequence's after the other's."""
        if sequences == 1:
            return self
        offsets = torch.arange(sequences)[:, None] * states_before
        return Level((self.parent + offsets).flatten(), self.mask.repeat(sequences), self.masks)


@dataclass(frozen=True)
class Tree:
    """Candidates by common beginnings. levels: {decoder layer: Level}. leaf: [C], each candidate's last state."""

    levels: dict[int, Level]
    leaf: Tensor

    @property
    def states(self) -> int:
        """Most states alive at once."""
        return max(len(level.parent) for level in self.levels.values())


def grow(candidates: Sequence[Mapping[int, Treatment]], layers: Sequence[int]) -> Tree:
    """The tree of candidates, each {decoder layer: ids kept, or a merge}; it does not depend on their order."""
    keys = [tuple(candidate[layer] for layer in layers) for candidate in candidates]
    distinct = sorted(set(keys), key=lambda key: [order_of(treatment) for treatment in key])
    levels: dict[int, Level] = {}
    before = [0] * len(distinct)
    for depth, layer in enumerate(layers):
        masks = tuple(dict.fromkeys(key[depth] for key in distinct))
        states = dict.fromkeys(key[: depth + 1] for key in distinct)
        number = {prefix: i for i, prefix in enumerate(states)}
        now = [number[key[: depth + 1]] for key in distinct]
        parent = {state: old for state, old in zip(now, before, strict=True)}
        levels[layer] = Level(
            torch.tensor([parent[i] for i in range(len(states))]),
            torch.tensor([masks.index(prefix[-1]) for prefix in states]),
            masks,
        )
        before = now
    places = {key: i for i, key in enumerate(distinct)}
    return Tree(levels, torch.tensor([places[key] for key in keys]))


class Sweep:
    """Runs trees of candidates through a model's layers.

    tokens_at_once: rows of hidden states in one call of a layer (one state at least).
    """

    def __init__(self, replay: Replay, routed: Mapping[int, RoutedLayer], tokens_at_once: int) -> None:
        self.replay = replay
        self.routed = dict(routed)
        self.tokens_at_once = tokens_at_once
        self._scratch: dict[str, Tensor] = {}
        self._pair_outputs = {index: PairOutputs(r.layer, self._scratch) for index, r in self.routed.items()}
        self._buffers: dict[int, Tensor] = {}
        self._merge_buffers: dict[str, Tensor] = {}  # one layer's merged experts
        self._merged: dict[int, tuple[RoutedLayer, MergedExperts]] = {}

    def run(
        self, tree: Tree, batches: Sequence[tuple[Tensor, LayerInputs]], first: int = 0, end: int | None = None
    ) -> list[Tensor]:
        """[B * M, S, H] for each batch: every state's hidden states after decoder layers [first, end), by sequence.

        batches: hidden states [B, S, H] of B sequences before the first of them, and the layers' other inputs, which
        must be the same for all B. All advance layer by layer together. The next run writes where the result lies.
        """
        states = [hidden for hidden, _ in batches]
        for index in range(len(self.replay.layers))[first:end]:
            level = tree.levels.get(index)
            levels = [
                None if level is None else level.times(len(hidden), len(state) // len(hidden))
                for state, (hidden, _) in zip(states, batches, strict=True)
            ]
            before, states = states, []
            for number, (mine, hidden, (_, inputs)) in enumerate(zip(levels, before, batches, strict=True)):
                states.append(self.layer(index, mine, hidden, inputs, number))
            for merge in level.merges if level is not None else ():
                with self._held(index, merge):
                    for mine, hidden, outputs, (_, inputs) in zip(levels, before, states, batches, strict=True):
                        self._fill(index, mine, merge, hidden, outputs, inputs)
        return states

    @property
    def scratch_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._scratch.values())

    @property
    def held_bytes(self) -> int:
        """Memory that is kept from one run to the next: scratch, and the states' buffers."""
        held = [*self._buffers.values(), *self._merge_buffers.values()]
        return self.scratch_bytes + sum(tensor.nbytes for tensor in held)

    def release(self) -> None:
        """Gives that memory back."""
        self._scratch.clear()
        self._buffers.clear()
        self._merge_buffers.clear()

    def layer(self, index: int, level: Level | None, states: Tensor, inputs: LayerInputs, number: int) -> Tensor:
        """One layer of `run`: [M, S, H] -> [M', S, H], in the buffers of batch `number`; states that a merge makes are
        left for `run` to fill in."""
        count = len(states) if level is None else len(level.parent)
        _, length, width = states.shape
        # Two buffers a sequence in turn: memory fresh from the system costs a pass over it.
        outputs = self._buffer(2 * number + index % 2, count * length * width, states).view(count, length, width)
        self._fill(index, level, None, states, outputs, inputs)
        return outputs

    def _fill(
        self,
        index: int,
        level: Level | None,
        merge: Merge | None,
        states: Tensor,
        outputs: Tensor,
        inputs: LayerInputs,
    ) -> None:
        """The states that a merge makes, while it is held; those that masks make, where it is None."""
        block = max(1, self.tokens_at_once // states.shape[1])
        if level is None or not level.merges:
            for start in range(0, len(outputs), block):
                mine = slice(start, start + block)
                outputs[mine] = self._block(index, level, mine, states, inputs)
        elif len(chosen := level.treated_by(merge)):
            for some in chosen.split(block):
                outputs[some.to(outputs.device)] = self._block(index, level, some, states, inputs)

    def _block(
        self, index: int, level: Level | None, mine: slice | Tensor, states: Tensor, inputs: LayerInputs
    ) -> Tensor:
        """The states that `mine` says, after the layer."""
        if level is None:
            return self.replay.run(index, states[mine], inputs)
        parents = level.parent[mine]
        first = int(parents[0])
        together = parents.equal(torch.arange(first, first + len(parents)))
        hidden = states[first : first + len(parents)] if together else states.index_select(0, parents.to(states.device))
        with self._candidates(index, level, mine, inputs):
            return self.replay.run(index, hidden, inputs)

    @contextmanager
    def _held(self, index: int, merge: Merge) -> Iterator[None]:
        """Inside, a layer's merged experts are there."""
        stream = getattr(self.replay.model, "moeprune_stream", None)
        if stream is not None:
            stream.make_resident(index)
        with self._merging(index)[1].held(merge):
            yield

    def _buffer(self, name: int, size: int, like: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size]

    @contextmanager
    def _candidates(self, index: int, level: Level, mine: slice | Tensor, inputs: LayerInputs) -> Iterator[None]:
        """Inside, one call of the decoder layer computes a block of states, each under its own mask, or all under one
        merge."""
        routed = self.routed[index]
        parents = level.parent[mine]
        nodes, node_of = torch.unique_consecutive(parents, return_inverse=True)
        first_of = torch.searchsorted(parents, nodes)  # parents ascend
        used, of_state = torch.unique(level.mask[mine], return_inverse=True)
        masks = [level.masks[i] for i in used.tolist()]
        with ExitStack() as stack:
            if len(nodes) < len(parents):
                constants = {id(t) for t in tensors_in(inputs.arguments[index])}
                for module in _once_per_node(self.replay.layers[index], routed.layer):
                    stack.enter_context(replaced_forward(module, _for_nodes(first_of, node_of, constants)))
            if isinstance(masks[0], Merge):
                mapped, merged = self._merging(index)
                stack.enter_context(treated(mapped, masks[0], merged))
            else:
                kept = [mask for mask in masks if not isinstance(mask, Merge)]
                if routed.places is not None:
                    experts = routed.layer.experts
                    stack.enter_context(intercepted(experts, self._experts(routed.layer, first_of, node_of)))
                stack.enter_context(many_masks(routed, kept, of_state))
            yield

    def _merging(self, index: int) -> tuple[RoutedLayer, MergedExperts]:
        if index not in self._merged:
            mapped = mapped_layer(self.routed[index].layer)
            self._merged[index] = mapped, MergedExperts(mapped, self._merge_buffers, self._scratch)
        return self._merged[index]

    def _experts(self, layer: MoeLayer, first_of: Tensor, node_of: Tensor) -> Any:
        pair_outputs = self._pair_outputs[layer.index]

        def function(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            shares = len(first_of) < len(node_of)
            if not shares and not pair_outputs.direct:
                return original(hidden, ids, weights)
            device = hidden.device
            rows, counts, pair_of = distinct_pairs(ids, first_of.to(device), node_of.to(device), layer.router_rows)
            return weighted_sum(pair_outputs(original, hidden, rows, counts), pair_of, weights)

        return function


def _once_per_node(decoder_layer: nn.Module, layer: MoeLayer) -> list[nn.Module]:
    """The modules with matrices whose work does not depend on the mask: attention, shared experts."""
    around = [m for m in decoder_layer.children() if not any(part is layer.block for part in m.modules())]
    if decoder_layer is layer.block:
        around = []
    inside = [m for m in layer.block.children() if m is not layer.router and m is not layer.experts]
    return [m for m in around + inside if any(p.ndim >= 2 for p in m.parameters())]


def _for_nodes(first_of: Tensor, node_of: Tensor, constants: set[int]) -> Any:
    """A module's forward computed for one state of every node, its result handed to all states of the node."""
    states, nodes = len(node_of), len(first_of)

    def pick(value: Any, index: Tensor, before: int) -> Any:
        if isinstance(value, Tensor):
            if id(value) in constants or value.ndim < 2 or value.shape[0] % before or value.shape[0] == 1:
                return value
            if value.ndim == 2:  # rows of all states in one
                return value.view(before, -1, value.shape[-1])[index.to(value.device)].flatten(0, 1)
            return value[index.to(value.device)] if value.shape[0] == before else value
        if isinstance(value, tuple | list):
            return type(value)(pick(v, index, before) for v in value)
        if isinstance(value, dict):
            return {name: pick(v, index, before) for name, v in value.items()}
        return value

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*pick(args, first_of, states), **pick(kwargs, first_of, states))
        if isinstance(result, tuple):  # what follows the first, attention weights for one, is not looked at
            return (pick(result[0], node_of, nodes), *result[1:])
        return pick(result, node_of, nodes)

    return forward
