"""Runs trees of candidates through a model's layers, one block of states after the other.

Candidates that agree up to a layer share one hidden state there, a *node*: its attention, norms and shared experts are
computed once, and so is every (token, expert) pair that several of its candidates route (models/experts.py). From the
first layer in which they differ each has a state of its own; states are run in blocks of a fixed number of tokens, so
that an expert's rows of a whole block are one matrix product. A layer's weights are needed once per sweep, whatever the
number of candidates and sequences. Merged experts are made once per layer: all states of one merge go through them,
then the next merge's are made in their place; candidates that merge share nothing beyond the layer's input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.artifacts.plan import Treatment
from moeprune_ext.candidates.tree import Level, Tree
from moeprune_ext.models.experts import PairOutputs, distinct_pairs, weighted_sum
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.merging import MapRouter, MergedExperts, mapped_layer, merged
from moeprune_ext.models.patches import ExpertsFunction, intercepted, replaced_forward
from moeprune_ext.models.replay import LayerInputs, Replay, tensors_in
from moeprune_ext.models.routers import RoutedLayer, many_masks
from moeprune_ext.models.scratch import Scratch


class BlockRunner:
    """Runs trees of candidates through a model's layers.

    Args:
        replay: the model, taken apart.
        routed: {decoder layer: how its router runs under many masks}.
        map_router: finds how a router maps its scores, for candidates that merge.

    Attributes:
        tokens_at_once: rows of hidden states in one call of a layer (one state at least).
        states: memory of the states that `run` returns: the next run overwrites them.
    """

    def __init__(self, replay: Replay, routed: Mapping[int, RoutedLayer], map_router: MapRouter = mapped_layer) -> None:
        self.replay = replay
        self.routed = dict(routed)
        self.tokens_at_once = 1
        self.states = Scratch()
        self._map_router = map_router
        self._scratch = scratch = Scratch()
        self._merge_buffers = merge_buffers = Scratch()
        self._pair_outputs = {index: PairOutputs(r.layer, scratch) for index, r in self.routed.items()}
        self._merged = functools.cache(lambda layer: MergedExperts(layer, merge_buffers, scratch))

    def run(
        self, tree: Tree, batches: Sequence[tuple[Tensor, LayerInputs]], first: int = 0, end: int | None = None
    ) -> list[Tensor]:
        """Runs decoder layers [first, end) for all candidates and batches; all batches advance layer by layer.

        Args:
            tree: the candidates.
            batches: hidden states [B, S, H] of B sequences in front of layer `first`, and the layers' other inputs,
                which must be the same for all B.
            first: number of a decoder layer.
            end: number of a decoder layer; None: all that follow.

        Returns:
            For each batch [B * M, S, H], every state after the last of these layers, by sequence, in `states`.
        """
        states = [hidden for hidden, _ in batches]
        for index in range(len(self.replay.layers))[first:end]:
            level = tree.levels.get(index)
            levels = [
                None if level is None else level.times(len(hidden), len(state) // len(hidden))
                for state, (hidden, _) in zip(states, batches, strict=True)
            ]
            before, states = states, []
            for number, (its_level, hidden, (_, inputs)) in enumerate(zip(levels, before, batches, strict=True)):
                states.append(self.layer(index, its_level, hidden, inputs, number))
            for merging in level.merging if level is not None else ():
                with self._held(index, merging):
                    for its_level, hidden, outputs, (_, inputs) in zip(levels, before, states, batches, strict=True):
                        self._fill(index, its_level, merging, hidden, outputs, inputs)
        return states

    @property
    def scratch_bytes(self) -> int:
        """Bytes of experts' outputs that are kept from call to call."""
        return self._scratch.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of all memory that is kept from one run to the next."""
        return self._scratch.nbytes + self.states.nbytes + self._merge_buffers.nbytes

    def release(self) -> None:
        """Gives that memory back."""
        for scratch in (self._scratch, self.states, self._merge_buffers):
            scratch.release()

    def layer(self, index: int, level: Level | None, states: Tensor, inputs: LayerInputs, number: int = 0) -> Tensor:
        """Runs one decoder layer for the states of masks; those of merges are left for `run` to fill in.

        Args:
            index: of the decoder layer.
            level: the states after it; None: the layer has no experts, every state goes on.
            states: [M, S, H].
            inputs: the layer's other inputs.
            number: of the batch, which has buffers of its own in `states`.

        Returns:
            [M', S, H].
        """
        count = len(states) if level is None else len(level.parent)
        outputs = self.states.take((number, index % 2), (count, *states.shape[1:]), states)  # two in turn
        self._fill(index, level, None, states, outputs, inputs)
        return outputs

    def _fill(
        self,
        index: int,
        level: Level | None,
        merging: Treatment | None,
        states: Tensor,
        outputs: Tensor,
        inputs: LayerInputs,
    ) -> None:
        """Computes the states of one treatment that merges, while it is held; None: those of all masks."""
        block = max(1, self.tokens_at_once // states.shape[1])
        if level is None or not level.merging:
            for start in range(0, len(outputs), block):
                rows = slice(start, start + block)
                outputs[rows] = self._block(index, level, rows, states, inputs)
        elif len(chosen := level.states_of(merging)):
            for rows in chosen.split(block):
                outputs[rows.to(outputs.device)] = self._block(index, level, rows, states, inputs)

    def _block(
        self, index: int, level: Level | None, rows: slice | Tensor, states: Tensor, inputs: LayerInputs
    ) -> Tensor:
        """Runs the layer for the states selected by `rows`."""
        if level is None:
            return self.replay.run(index, states[rows], inputs)
        parents = level.parent[rows]
        first = int(parents[0])
        together = parents.equal(torch.arange(first, first + len(parents)))
        hidden = states[first : first + len(parents)] if together else states.index_select(0, parents.to(states.device))
        with self._candidates(index, level, rows, inputs):
            return self.replay.run(index, hidden, inputs)

    @contextmanager
    def _held(self, index: int, merging: Treatment) -> Iterator[None]:
        """Inside, a layer's merged experts stand in memory."""
        assert merging.merge is not None
        self.replay.moe.make_resident(index)
        with self._merged(self.routed[index].layer).held(merging.merge):
            yield

    @contextmanager
    def _candidates(self, index: int, level: Level, rows: slice | Tensor, inputs: LayerInputs) -> Iterator[None]:
        """Inside, one call of the decoder layer computes a block of states, under their masks or under one merge."""
        routed = self.routed[index]
        layer = routed.layer
        parents = level.parent[rows]
        nodes, node_of = torch.unique_consecutive(parents, return_inverse=True)
        first_of = torch.searchsorted(parents, nodes)  # parents ascend
        used, of_state = torch.unique(level.treatment[rows], return_inverse=True)
        block_treatments = [level.treatments[number] for number in used.tolist()]
        merging = block_treatments[0]
        with ExitStack() as stack:
            if len(nodes) < len(parents):
                constants = {id(t) for t in tensors_in(inputs.arguments[index])}
                for module in _once_per_node(self.replay.layers[index], layer):
                    stack.enter_context(replaced_forward(module, _for_nodes(first_of, node_of, constants)))
            if merging.merge is not None:
                how = routed if merging.merge.router is None else self._map_router(layer)
                stack.enter_context(merged(how, merging, self._merged(layer)))
            else:
                if routed.places is not None:
                    stack.enter_context(intercepted(layer.experts, self._experts(layer, first_of, node_of)))
                stack.enter_context(many_masks(routed, [t.kept for t in block_treatments], of_state))
            yield

    def _experts(self, layer: MoeLayer, first_of: Tensor, node_of: Tensor) -> Callable[..., Tensor]:
        """Returns the experts' function that computes each pair of a node's states once."""
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


def _for_nodes(first_of: Tensor, node_of: Tensor, constants: set[int]) -> Callable[..., Any]:
    """Returns a forward that computes one state of every node and hands its result to all states of the node.

    Args:
        first_of: int64 [N], a state of each node.
        node_of: int64 [M], each state's node.
        constants: ids of tensors that all states share.
    """
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
        if isinstance(result, tuple):  # what follows the first, such as attention weights, is not used
            return (pick(result[0], node_of, nodes), *result[1:])
        return pick(result, node_of, nodes)

    return forward
