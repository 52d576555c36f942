"""Samples a few tokens as every MoE layer gets them: the experts' input and the router's choice.

Methods that compare experts by what they *would* compute (allocation/grape.py, naee.py) run every expert on the same
tokens, which is affordable for a few. One pass over the data keeps the rows of a seeded sample of positions, the same
in every layer; the experts run on them afterwards, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.experts import PairOutputs
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, evaluating, intercepted, replaced_forward
from moeprune_ext.models.replay import replay_of_streamed, run_batches
from moeprune_ext.progress import View, bar


@dataclass(frozen=True)
class LayerSample:
    """What one layer's router and experts get at n positions, in host memory and in the model's dtype.

    Attributes:
        hidden: [n, H], the experts' input.
        expert_ids: int64 [n, K], the router's choice.
        weights: [n, K], its gate weights.
        router_input: [n, H], the same tensor as `hidden` where router and experts get the same rows; None if the router
            is not called with one tensor of a row per position.
    """

    hidden: Tensor
    expert_ids: Tensor
    weights: Tensor
    router_input: Tensor | None


def sample_layers(
    moe: MoeModel,
    layers: Mapping[int, MoeLayer],
    batches: Sequence[TokenBatch],
    tokens: int,
    *,
    seed: int = 0,
    progress: bool | View = False,
) -> dict[int, LayerSample]:
    """Runs the model over the batches once and keeps what some layers get at a sample of positions.

    Memory: L * n * H elements on the host (201 MB for 48 layers, 1,024 tokens and H = 2,048 in bfloat16), as much again
    where routers get other rows than experts. Under torchrun every process runs all batches, because the sample is
    drawn from all of them (our choice).

    Args:
        moe: the model; it is left as it was.
        layers: of the model, those to sample.
        batches: the data; batches without a sampled position are not run.
        tokens: positions to draw, without replacement, from all attended positions; all where there are fewer. They
            stay in order, and do not depend on how the sequences are batched and padded.
        seed: draws the positions.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        {decoder layer: its sample}.

    Raises:
        ValueError: for a model that does not hand every position to its experts.
    """
    used = [
        (batch, rows) for batch, rows in zip(batches, choose_positions(batches, tokens, seed), strict=True) if len(rows)
    ]
    recorders = {index: Recorder(layer, used) for index, layer in layers.items()}
    replay = replay_of_streamed(moe, used[0][0])
    with evaluating(moe.model), ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(replaced_forward(layer.router, recorders[index].router))
            stack.enter_context(intercepted(layer.experts, recorders[index].experts))
        line = stack.enter_context(bar(progress, "sample", len(used), "batch"))
        run_batches(moe, replay, [batch for batch, _ in used], line)
    return {index: as_sample(recorder.parts) for index, recorder in recorders.items()}


def choose_positions(batches: Sequence[TokenBatch], tokens: int, seed: int) -> list[Tensor]:
    """Draws attended positions, as `sample_layers` does: those of each flattened batch, ascending."""
    attended = [batch.attention_mask.flatten().nonzero()[:, 0] for batch in batches]
    lengths = [len(positions) for positions in attended]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[:tokens]] = True
    return [positions[mask] for positions, mask in zip(attended, chosen.split(lengths), strict=True)]


Part = tuple[Tensor, Tensor, Tensor, Tensor | None]  # of one batch: hidden, expert ids, weights, router's input


class Recorder:
    """Keeps one layer's rows. Every batch calls the layer's router once, then its experts, in the batches' order.

    Args:
        layer: whose rows are kept.
        batches: the batches, and the positions to keep of each.

    Attributes:
        parts: the rows of each batch so far.
    """

    def __init__(self, layer: MoeLayer, batches: Sequence[tuple[TokenBatch, Tensor]]) -> None:
        self._index, self._device = layer.index, next(layer.router.parameters()).device
        self._expected = [(batch.input_ids.numel(), rows) for batch, rows in batches]
        self.parts: list[Part] = []
        self._router_input: Tensor | None = None

    def router(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Replaces the router's forward: notes its input for `experts`, which follows."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # Besides hidden states a router may get vectors over experts, such as a correction bias.
        states = [tensor for tensor in tensors if tensor.ndim > 1]
        self._router_input = states[0].reshape(-1, states[0].shape[-1]) if len(states) == 1 else None
        return original(*args, **kwargs)

    def experts(self, original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward: keeps the sampled rows."""
        call = len(self.parts)
        positions, rows = self._expected[call] if call < len(self._expected) else (0, torch.empty(0))
        if len(expert_ids) != positions:
            raise ValueError(
                f"layer {self._index}: the experts saw {len(expert_ids)} rows for {positions} positions; this model "
                "does not hand every position to its experts once, so its tokens cannot be sampled"
            )
        rows = rows.to(hidden.device)
        sampled = hidden[rows].cpu()
        router_input, self._router_input = self._router_input, None  # no tensor of the device is kept
        if router_input is not None:
            router_input = router_input[rows].cpu() if len(router_input) == positions else None
            router_input = sampled if router_input is not None and torch.equal(router_input, sampled) else router_input
        self.parts.append((sampled, expert_ids[rows].cpu(), weights[rows].cpu(), router_input))
        return original(hidden, expert_ids, weights)


def as_sample(parts: Sequence[Part]) -> LayerSample:
    """Joins the rows of several batches."""
    hidden, expert_ids, weights, router_inputs = zip(*parts, strict=True)
    rows = torch.cat(hidden)
    router_input: Tensor | None = rows
    if any(own is not shared for own, shared in zip(router_inputs, hidden, strict=True)):
        router_input = None if any(part is None for part in router_inputs) else torch.cat(router_inputs)
    return LayerSample(rows, torch.cat(expert_ids), torch.cat(weights), router_input)


@torch.no_grad()
def expert_outputs(layer: MoeLayer, hidden: Tensor) -> Iterator[Tensor]:
    """Runs every expert on the same rows, routed there or not. FLOPs: 6 n H I E for experts of three matrices [H, I].

    Args:
        layer: a resident layer, where layers are streamed.
        hidden: [n, H] on the experts' device.

    Yields:
        The unweighted outputs f_e(hidden) [n, H] of every expert e in turn; the next one may overwrite them.

    Raises:
        ValueError: for outputs that are NaN or infinite.
    """
    outputs, rows = PairOutputs(layer), torch.arange(len(hidden), device=hidden.device)
    for expert in range(layer.shape.num_experts):
        counts = [0] * layer.shape.num_experts
        counts[expert] = len(hidden)
        output = outputs(layer.experts, hidden, rows, counts)
        if not bool(torch.isfinite(output).all()):
            raise ValueError(
                f"outputs of expert {expert} of layer {layer.index} are NaN or infinite: check the weights and the "
                "dtype"
            )
        yield output
