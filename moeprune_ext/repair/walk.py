"""Brings one MoE layer after the other what the pruned model gives it, on text.

Where the model can be taken apart (models/replay.py) the hidden states of all sequences wait in host memory between two
layers, so that a streamed layer visits the device once. Where it cannot, each look at a layer is a forward of the model
that ends at that layer's experts: half of the model for the average layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import planned
from moeprune_ext.models.moe import MoeModel, decoder_layers
from moeprune_ext.models.patches import ExpertsFunction, Observe, intercepted, replaced_forward
from moeprune_ext.models.replay import TRIED_TOKENS, LayerInputs, NotReplayable, Replay
from moeprune_ext.repair.checks import NotRepairable, check_experts, check_passes_through

Context = Callable[[], AbstractContextManager[Any]]
Then = Callable[[int, Tensor], None]  # number of a batch, and a decoder layer's output [B, S, H]


def _no_more(number: int, output: Tensor) -> None:
    """Does nothing with a decoder layer's output."""


class Walk(Protocol):
    """Visits layers in order; called in eval mode without gradients."""

    def look(self, index: int, observe: Observe, context: Context, then: Then = _no_more) -> None:
        """Gives the layer its input, batch by batch.

        Args:
            index: of a decoder layer with experts.
            observe: (original, hidden, ids, weights) in the place of the experts' forward.
            context: what else holds meanwhile, such as a mask.
            then: gets the decoder layer's outputs; not called where the decoder layers are not known.
        """

    def full(self, index: int, then: Then = _no_more) -> None:
        """Runs the layer on the unpruned model's states, where it was asked for them."""

    def leave(self, index: int, plan: PruningPlan) -> None:
        """Goes on behind the layer, as it is under a plan of that layer alone."""


def replay_to_repair(moe: MoeModel, layers: Sequence[int], with_full: bool, tried: TokenBatch) -> Replay | None:
    """Finds how a model can be walked, and refuses one that cannot be repaired.

    Args:
        moe: the model, in eval mode without gradients.
        layers: to be looked at.
        with_full: whether decoder layers' outputs are wanted, the pruned model's and the unpruned one's.
        tried: a few tokens of it are tried; the same in all processes, so that all decide alike.

    Returns:
        The model taken apart; None where it cannot be, and is run from its beginning.

    Raises:
        NotRepairable: where they are wanted, and cannot be had or say nothing of the experts.
    """
    tokens = tried.input_ids[:1, tried.attention_mask[0]][:, :TRIED_TOKENS]
    check_experts(moe, layers, tokens)
    try:
        replay = Replay(moe)
        replay.check({"input_ids": tokens.to(moe.device)})
    except NotReplayable as reason:
        if with_full:
            raise NotRepairable(
                f"{type(moe.model).__name__} cannot be run layer by layer ({reason}), so the full model's hidden "
                'states are not known beside the pruned one\'s; use target="layer"'
            ) from None
        return None
    if with_full:
        check_passes_through(moe, layers, replay, tokens)
    return replay


class ReplayWalk:
    """Walks layer by layer. Memory: the batches' hidden states on the host, twice with the unpruned model's."""

    def __init__(self, moe: MoeModel, replay: Replay, batches: Sequence[TokenBatch], with_full: bool) -> None:
        self._moe, self._replay, self._at = moe, replay, 0
        self._states: list[Tensor] = []
        self._inputs: list[LayerInputs] = []
        for batch in batches:
            captured = replay.inputs(batch.model_inputs(moe.device))
            self._states.append(captured.hidden.cpu())
            self._inputs.append(replace(captured, hidden=self._states[-1]))
        self._full = list(self._states) if with_full else None

    def look(self, index: int, observe: Observe, context: Context, then: Then = _no_more) -> None:
        """See Walk."""
        self._reach(index)
        with intercepted(self._moe.layers[index].experts, observe), context():
            self._run(index, self._states, then)

    def full(self, index: int, then: Then = _no_more) -> None:
        """See Walk."""
        assert self._full is not None
        self._reach(index)
        self._advance(index, self._full, then)

    def leave(self, index: int, plan: PruningPlan) -> None:
        """See Walk."""
        self._reach(index)
        self._moe.make_resident(index)
        with planned(self._moe.layers, plan, held=True):
            self._advance(index, self._states)
        self._at = index + 1

    def _reach(self, index: int) -> None:
        """Runs the layers in between, of which nothing is pruned."""
        for between in range(self._at, index):
            self._advance(between, self._states)
            if self._full is not None:
                self._advance(between, self._full)
        self._at = max(self._at, index)

    def _run(self, index: int, states: Sequence[Tensor], then: Then) -> None:
        for number, inputs in enumerate(self._inputs):
            then(number, self._replay.run(index, states[number].to(self._moe.device), inputs))

    def _advance(self, index: int, states: list[Tensor], then: Then = _no_more) -> None:
        """Runs a layer and puts its outputs in the states' place."""

        def keep(number: int, output: Tensor) -> None:
            states[number] = output.cpu()
            then(number, output)

        self._run(index, states, keep)


class _Reached(Exception):
    """Ends a forward where it has been looked at."""


class WholeWalk:
    """Walks by forwards of the whole model, up to the layer in question."""

    def __init__(self, moe: MoeModel, batches: Sequence[TokenBatch]) -> None:
        self._moe, self._batches = moe, batches
        self._done: PruningPlan | None = None  # of all layers left behind: they share one layer's buffers
        try:
            self._decoder: Sequence[nn.Module] | None = list(decoder_layers(moe)[1])
        except ValueError:
            self._decoder = None

    def look(self, index: int, observe: Observe, context: Context, then: Then = _no_more) -> None:
        """See Walk."""

        number = 0

        def and_end(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            observe(original, hidden, ids, weights)
            raise _Reached

        def layer_and_end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            output = original(*args, **kwargs)
            then(number, output if isinstance(output, Tensor) else output[0])
            raise _Reached

        backbone: Any = getattr(self._moe.model, "base_model", self._moe.model)
        with ExitStack() as stack:
            if self._done is not None:
                stack.enter_context(planned(self._moe.layers, self._done))
            if self._decoder is None:
                stack.enter_context(intercepted(self._moe.layers[index].experts, and_end))
            else:
                stack.enter_context(replaced_forward(self._decoder[index], layer_and_end))
                stack.enter_context(intercepted(self._moe.layers[index].experts, observe))
            stack.enter_context(context())
            for number, batch in enumerate(self._batches):  # noqa: B007, which `layer_and_end` reads
                with suppress(_Reached):
                    backbone(**batch.model_inputs(self._moe.device), use_cache=False)

    def full(self, index: int, then: Then = _no_more) -> None:
        """See Walk."""
        raise AssertionError("states were not asked for")

    def leave(self, index: int, plan: PruningPlan) -> None:
        """See Walk."""
        done = self._done
        self._done = plan
        if done is not None:
            counts = done.num_experts | plan.num_experts
            self._done = PruningPlan(done.kept | plan.kept, counts, merges=done.merges | plan.merges)
