"""Brings one MoE layer after the other what the pruned model gives it, on text.

Where the model can be taken apart (models/replay.py) the hidden states of all sequences wait in host memory between two
layers, so that a streamed layer visits the device once. Where it cannot, each look at a layer is a forward of the model
that ends at that layer's experts: half of the model for the average layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import planned
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, Observe, intercepted
from moeprune_ext.models.replay import TRIED_TOKENS, LayerInputs, NotReplayable, Replay

Context = Callable[[], AbstractContextManager[Any]]


class Walk(Protocol):
    """Visits layers in order; called in eval mode without gradients.

    Attributes:
        has_states: whether a layer's output, and the unpruned model's states, are known.
    """

    has_states: bool

    def look(self, index: int, observe: Observe, context: Context) -> Iterator[tuple[int, Tensor | None]]:
        """Gives the layer its input, batch by batch.

        Args:
            index: of a decoder layer with experts.
            observe: (original, hidden, ids, weights) in the place of the experts' forward.
            context: what else holds meanwhile, such as a mask.

        Yields:
            Number of the batch, after its experts have run, and the decoder layer's output [B, S, H] or None.
        """

    def full(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Runs the layer on the unpruned model's states and yields (number of the batch, output [B, S, H])."""

    def leave(self, index: int, plan: PruningPlan) -> None:
        """Goes on behind the layer, as it is under a plan of that layer alone."""


def walk_of(moe: MoeModel, batches: Sequence[TokenBatch], with_full: bool) -> Walk:
    """Finds how a model can be walked.

    Args:
        moe: the model.
        batches: this process's.
        with_full: whether the unpruned model's states are wanted, too.

    Raises:
        ValueError: where they are wanted and cannot be had.
    """
    tokens = batches[0].part(slice(0, 1)).input_ids[:, batches[0].attention_mask[0]][:, :TRIED_TOKENS]
    try:
        replay = Replay(moe)
        replay.check({"input_ids": tokens.to(moe.device)})
        return ReplayWalk(moe, replay, batches, with_full)
    except NotReplayable as reason:
        if with_full:
            raise ValueError(
                f"{type(moe.model).__name__} cannot be run layer by layer ({reason}), so the full model's hidden "
                'states are not known beside the pruned one\'s; use target="layer"'
            ) from None
    return WholeWalk(moe, batches)


class ReplayWalk:
    """Walks layer by layer. Memory: the batches' hidden states on the host, twice with the unpruned model's."""

    has_states = True

    def __init__(self, moe: MoeModel, replay: Replay, batches: Sequence[TokenBatch], with_full: bool) -> None:
        self._moe, self._replay, self._at = moe, replay, 0
        self._states: list[Tensor] = []
        self._inputs: list[LayerInputs] = []
        for batch in batches:
            captured = replay.inputs(batch.model_inputs(moe.device))
            self._states.append(captured.hidden.cpu())
            self._inputs.append(replace(captured, hidden=self._states[-1]))
        self._full = list(self._states) if with_full else None

    def look(self, index: int, observe: Observe, context: Context) -> Iterator[tuple[int, Tensor | None]]:
        """See Walk."""
        self._reach(index)
        with intercepted(self._moe.layers[index].experts, observe), context():
            yield from self._run(index, self._states)

    def full(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """See Walk."""
        assert self._full is not None
        for number, output in self._run(index, self._full):
            self._full[number] = output.cpu()
            yield number, output

    def leave(self, index: int, plan: PruningPlan) -> None:
        """See Walk."""
        self._reach(index)
        with planned(self._moe.layers, plan):
            for number, output in self._run(index, self._states):
                self._states[number] = output.cpu()
        self._at = index + 1

    def _reach(self, index: int) -> None:
        """Runs the layers in between, which have no experts."""
        for between in range(self._at, index):
            for states in (self._states, self._full):
                if states is not None:
                    for number, output in self._run(between, states):
                        states[number] = output.cpu()
        self._at = index

    def _run(self, index: int, states: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for number, inputs in enumerate(self._inputs):
            yield number, self._replay.run(index, states[number].to(self._moe.device), inputs)


class _Reached(Exception):
    """Ends a forward behind the layer that is looked at."""


class WholeWalk:
    """Walks by forwards of the whole model, up to the layer in question."""

    has_states = False

    def __init__(self, moe: MoeModel, batches: Sequence[TokenBatch]) -> None:
        self._moe, self._batches = moe, batches
        self._done: list[PruningPlan] = []

    def look(self, index: int, observe: Observe, context: Context) -> Iterator[tuple[int, Tensor | None]]:
        """See Walk."""

        def and_end(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            observe(original, hidden, ids, weights)
            raise _Reached

        backbone: Any = getattr(self._moe.model, "base_model", self._moe.model)
        with ExitStack() as stack:
            for plan in self._done:
                stack.enter_context(planned(self._moe.layers, plan))
            stack.enter_context(intercepted(self._moe.layers[index].experts, and_end))
            stack.enter_context(context())
            for number, batch in enumerate(self._batches):
                with suppress(_Reached):
                    backbone(**batch.model_inputs(self._moe.device), use_cache=False)
                yield number, None

    def full(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Has no states; `walk_of` does not choose it where they are wanted."""
        raise ValueError("the unpruned model's states are not known")

    def leave(self, index: int, plan: PruningPlan) -> None:
        """See Walk."""
        self._done.append(plan)
