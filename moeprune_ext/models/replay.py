"""A model taken apart at its decoder layers, so that one layer can be run for many hidden states, then the next.

The layers' other inputs (attention masks, rotary tables) are captured from one ordinary forward, without a KV cache, in
which every decoder layer hands its input on: they depend on the positions, not on the hidden states. The way from the
last layer's output to the logits is the model's own forward with the layers passed over. Nothing here knows a model by
name, so `Replay` is tried at the start: what it computes must be what the model computes (`Replay.check`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.moe import MoeModel, decoder_layers
from moeprune_ext.models.patches import evaluating, replaced_forward
from moeprune_ext.progress import Bar

# How far a replayed forward may be from the model's own, relative to its largest logit. In half precision the products
# of another batch size round differently.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}


TRIED_TOKENS = 64  # of one sequence, in the comparison


class NotReplayable(Exception):
    """Why a model cannot be run layer by layer."""


@dataclass(frozen=True)
class LayerInputs:
    """What one sequence's decoder layers are called with.

    Attributes:
        hidden: [1, S, H], the first layer's input.
        arguments: per layer, the rest of its call.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def alike(a: Any, b: Any) -> bool:
    """Tells whether two arguments are the same tensors and values, so that one batch may have both sequences."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    return type(a) is type(b) and bool(a == b)


class _Captured(Exception):
    """Ends a forward once the last layer's arguments are known."""


class Replay:
    """Runs a model's decoder layers one by one; to be called in eval mode without gradients (patches.evaluating).

    Args:
        moe: the model.

    Attributes:
        moe: the model.
        layers: its decoder layers, dense ones included.
        head: the weight [V, H] of a plain linear head, or else a function from last hidden states [n, H] to logits
            [n, V]; either takes what `head_inputs` returns.

    Raises:
        NotReplayable: for a model without one list of decoder layers.
    """

    def __init__(self, moe: MoeModel) -> None:
        self.moe, self.model = moe, moe.model
        try:
            self.layers: Sequence[nn.Module] = list(decoder_layers(moe)[1])
        except ValueError as error:
            raise NotReplayable(str(error)) from None
        self._device, self._dtype = moe.device, next(moe.model.parameters()).dtype
        self._output_tails: list[tuple[Any, ...] | None] = [None] * len(self.layers)
        self._head_module: nn.Module | None = None
        self.head: Tensor | Callable[[Tensor], Tensor] = self.logits
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    def inputs(self, model_inputs: dict[str, Tensor]) -> LayerInputs:
        """Captures what the layers are called with for one sequence ([1, S] token ids); no layer runs.

        Tensors equal to those of the sequence before are kept once.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []
        compared: dict[tuple[int, int], Tensor] = {}

        def capture(index: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            hidden, args, kwargs = _split(args, kwargs)
            if index == 0:
                first.append(hidden)
            before = None if self._arguments is None else self._arguments[index]
            calls.append(_keep_once((args, kwargs), before, compared))
            if index == len(self.layers) - 1:
                raise _Captured
            return self._output(index, hidden)

        with _all_replaced(self.layers, capture), suppress(_Captured):
            self.model(**model_inputs, use_cache=False)
        if len(calls) != len(self.layers):
            raise NotReplayable(f"its forward calls {len(calls)} of {len(self.layers)} decoder layers in order")
        self._arguments = calls
        return LayerInputs(first[0], calls)

    @staticmethod
    def argument_bytes(inputs: LayerInputs) -> int:
        """Returns the bytes of a sequence's other inputs; layers mostly share them."""
        return sum({t.data_ptr(): t.nbytes for t in tensors_in(inputs.arguments)}.values())

    def run(self, index: int, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Runs one decoder layer on hidden states [B, S, H], each a state of the same sequence."""
        args, kwargs = inputs.arguments[index]
        output = self.layers[index](hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """Turns rows of the last layer's output, [n, H], into what `head` takes (after the final norm), [n, H]."""
        if self._head_module is None:
            return hidden
        captured: list[Tensor] = []

        def capture(_: Any, normed: Tensor) -> Tensor:
            captured.append(normed)
            return normed[..., :1]  # what a head would make of it is not looked at

        with replaced_forward(self._head_module, capture):
            self._after_layers(hidden)
        return captured[0][:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Turns rows of the last layer's output, [n, H], into logits [n, V], by the model's own way."""
        return self._after_layers(hidden)[:, 0]

    def project(self, head_inputs: Tensor) -> Tensor:
        """Turns the head's inputs [n, H] into logits [n, V]."""
        return head_inputs @ self.head.T if isinstance(self.head, Tensor) else self.head(head_inputs)

    def _after_layers(self, hidden: Tensor) -> Tensor:
        """Runs the model's forward with its layers passed over; every row is a sequence of one token."""
        last = len(self.layers) - 1

        def give(index: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            return self._output(index, hidden[:, None] if index == last else _split(args, kwargs)[0])

        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self._device)
        with _all_replaced(self.layers, give):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _output(self, index: int, hidden: Tensor) -> Any:
        tail = self._output_tails[index]
        return hidden if tail is None else (hidden, *tail)

    def check(self, model_inputs: dict[str, Tensor]) -> None:
        """Compares the replay of a sequence with the model's own forward: alone, twice side by side, and backwards.

        It learns on the way what the layers return and whether the head is one matrix product.

        Args:
            model_inputs: of one sequence, [1, S].

        Raises:
            NotReplayable: with the reason, when the two differ.
        """
        outputs: list[Any] = []
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        projected: list[Tensor] = []

        def record(original: Any, *args: Any, **kwargs: Any) -> Any:
            outputs.append(original(*args, **kwargs))
            return outputs[-1]

        hooks = []
        if isinstance(head, nn.Linear):
            hooks.append(head.register_forward_hook(lambda *call: projected.append(call[-1])))
        try:
            with _all_replaced(self.layers, lambda i, *call, **kw: record(*call, **kw)):
                expected = self.model(**model_inputs, use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != len(self.layers):
            raise NotReplayable(f"its forward makes {len(outputs)} calls of {len(self.layers)} decoder layers")
        for index, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                if not isinstance(output, tuple) or not isinstance(output[0], Tensor):
                    raise NotReplayable(f"decoder layer {index} returns {type(output).__name__}, not hidden states")
                self._output_tails[index] = output[1:]
        if isinstance(head, nn.Linear) and head.bias is None and projected:
            logits = projected[0][0]
            if logits.dtype == expected.dtype and torch.equal(logits, expected):
                self._head_module, self.head = head, head.weight

        try:
            inputs = self.inputs(model_inputs)
            # Other tokens, too, because what layers hand on beside hidden states has been learnt from these.
            other = {**model_inputs, "input_ids": model_inputs["input_ids"].flip(1)}
            other_inputs = self.inputs(other)
            states = [inputs.hidden, torch.cat([inputs.hidden, inputs.hidden])]
            other_state = other_inputs.hidden
            for index in range(len(self.layers)):
                states = [self.run(index, hidden, inputs) for hidden in states]
                other_state = self.run(index, other_state, other_inputs)
            for row in torch.cat(states):
                head_inputs = self.head_inputs(row)
                if head_inputs.dtype != row.dtype or head_inputs.shape != row.shape:
                    raise NotReplayable("its head takes other hidden states than its layers give")
                self.compare(self.project(head_inputs), expected)
            expected = self.model(**other, use_cache=False).logits[0]
            self.compare(self.project(self.head_inputs(other_state[0])), expected)
        except NotReplayable:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise NotReplayable(f"replaying it fails: {' '.join(str(error).split())[:200]}") from error

    def compare(self, got: Tensor, expected: Tensor) -> None:
        """Raises NotReplayable when two logits [S, V] of the same sequence differ."""
        got, expected = got.detach(), expected.detach()
        if not bool(torch.isfinite(expected).all()):
            return  # the evaluator refuses such a teacher with a better message
        # Near a tie a router may fall to the other expert, in half precision on many rows: those may differ.
        share = 99 if self._dtype in (torch.float32, torch.float64) else 50
        differences = (got.float() - expected.float()).abs_().amax(-1).sort().values
        worst = float(differences[(len(differences) * share - 1) // 100]) / max(1.0, float(expected.abs().max()))
        if not worst <= TOLERANCE[self._dtype]:
            raise NotReplayable(f"replaying its layers gives other logits, by {worst:.2g} of the largest")


@contextmanager
def _all_replaced(layers: Sequence[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    """Every layer's forward is `function(index, original, ...)` inside."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, functools.partial(function, index)))
        yield


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Parts a layer's call into its hidden states and the rest."""
    if args:
        return args[0], args[1:], dict(kwargs)
    if "hidden_states" not in kwargs:
        raise NotReplayable("its decoder layers take no hidden_states")
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _keep_once(value: Any, before: Any, compared: dict[tuple[int, int], Tensor]) -> Any:
    """Returns `value` with every tensor that equals its counterpart in `before` replaced by that one.

    Args:
        value: nested tuples, lists and dicts.
        before: likewise, of the sequence before.
        compared: pairs that have been compared; layers mostly share their arguments.
    """
    if isinstance(value, Tensor):
        pair = id(value), id(before)
        if pair not in compared:
            same = isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype
            compared[pair] = before if same and torch.equal(before, value) else value
        return compared[pair]
    if isinstance(value, tuple | list):
        parts = before if isinstance(before, tuple | list) and len(before) == len(value) else [None] * len(value)
        return type(value)([_keep_once(v, part, compared) for v, part in zip(value, parts, strict=True)])
    if isinstance(value, dict):
        others = before if isinstance(before, dict) else {}
        return {name: _keep_once(v, others.get(name), compared) for name, v in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def replay_of_streamed(moe: MoeModel, batch: TokenBatch) -> Replay | None:
    """Takes a model apart whose layers are streamed; returns None where they are not, or where it cannot be.

    Args:
        moe: the model.
        batch: a few tokens of it are tried.
    """
    if moe.stream is None:
        return None
    tokens = batch.input_ids[:1, batch.attention_mask[0]][:, :TRIED_TOKENS]
    try:
        replay = Replay(moe)
        with evaluating(moe.model):
            replay.check({"input_ids": tokens.to(moe.device)})
    except NotReplayable:
        return None
    return replay


def run_batches(
    moe: MoeModel,
    replay: Replay | None,
    batches: Sequence[TokenBatch],
    line: Bar,
    *,
    before: Callable[[TokenBatch], None] = lambda batch: None,
) -> None:
    """Runs every batch through the decoder layers, for whoever observes them; no logits are computed.

    Args:
        moe: the model.
        replay: from `replay_of_streamed`. With it all batches go through one layer, then through the next, so that each
            layer is brought in once; their hidden states wait in host memory.
        batches: of tokens.
        line: of progress.
        before: called ahead of a batch, or of its part in a layer.
    """
    device = moe.device
    if replay is None:
        backbone = getattr(moe.model, "base_model", moe.model)
        for batch in batches:
            before(batch)
            backbone(**batch.model_inputs(device), use_cache=False)
            line.advance()
        return
    states: list[Tensor] = []
    inputs: list[LayerInputs] = []
    for batch in batches:
        captured = replay.inputs(batch.model_inputs(device))
        states.append(captured.hidden.cpu())
        inputs.append(replace(captured, hidden=states[-1]))
    line.reset(len(replay.layers), "layer")
    for index in range(len(replay.layers)):
        for number, batch in enumerate(batches):
            before(batch)
            states[number] = replay.run(index, states[number].to(device), inputs[number]).cpu()
        line.advance()
