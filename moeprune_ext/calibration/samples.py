"""One small sample of tokens, as every MoE layer meets it: what the experts are given, and what the router chooses.

Methods that compare experts by what they *would* compute (grape.py, naee.py) run every expert on the same tokens, which
is affordable for a few of them. So one pass over the data keeps the rows of a seeded sample of positions, the same in
every layer, and the experts are run on them afterwards, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.experts import PairOutputs
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, evaluating, intercepted, replaced_forward
from moeprune_ext.models.replay import replay_of_streamed, run_batches


@dataclass(frozen=True)
class LayerSample:
    """What one layer's router and experts met at n positions, in host memory and in the model's dtype.

    hidden: [n, H], the experts' input. expert_ids: int64 [n, K] and weights: [n, K], the router's choice as the experts
    got it. router_input: [n, H], the very same tensor where router and experts are given the same rows; None for a
    router that is called with anything but one tensor of a row per position.
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
    progress: bool = False,
) -> dict[int, LayerSample]:
    """Runs the model over the batches once and keeps {decoder layer: LayerSample} of `tokens` attended positions.

    The positions are drawn from `seed`, without replacement, over all attended positions of all batches; all are taken
    where there are fewer. They stay in order and do not depend on how the sequences are batched and padded; batches
    without any are not run. Memory: L * n * H elements on the host (201 MB for 48 layers, 1,024 tokens and H = 2,048
    in bfloat16), as much again where routers are given other rows. Under torchrun every process runs all batches (our
    choice: of one process's own, the sample could not be told). The model is left as it was. Raises ValueError for a
    model that does not hand every position to its experts.
    """
    used = [(batch, rows) for batch, rows in zip(batches, _choose(batches, tokens, seed), strict=True) if len(rows)]
    recorders = {index: _Recorder(layer, used) for index, layer in layers.items()}
    replay = replay_of_streamed(moe, used[0][0])
    with evaluating(moe.model), ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(replaced_forward(layer.router, recorders[index].router))
            stack.enter_context(intercepted(layer.experts, recorders[index].experts))
        bar = stack.enter_context(tqdm(total=len(used), desc="sample", unit="batch", disable=not progress))
        run_batches(moe, replay, [batch for batch, _ in used], bar)
    return {index: recorder.sample() for index, recorder in recorders.items()}


def _choose(batches: Sequence[TokenBatch], tokens: int, seed: int) -> list[Tensor]:
    """The sample's positions in each flattened batch, ascending."""
    attended = [batch.attention_mask.flatten().nonzero()[:, 0] for batch in batches]
    lengths = [len(positions) for positions in attended]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(sum(lengths), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[:tokens]] = True
    return [positions[mask] for positions, mask in zip(attended, chosen.split(lengths), strict=True)]


class _Recorder:
    """Keeps one layer's rows. Every batch calls a layer's router and experts once, in the batches' order."""

    def __init__(self, layer: MoeLayer, batches: Sequence[tuple[TokenBatch, Tensor]]) -> None:
        self._index, self._device = layer.index, next(layer.router.parameters()).device
        self._expected = [(batch.input_ids.numel(), rows) for batch, rows in batches]
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._router_input: Tensor | None = None

    def router(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands for the router's forward."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # Beside hidden states a router may be given vectors over experts, such as a correction bias.
        states = [tensor for tensor in tensors if tensor.ndim > 1]
        self._router_input = states[0].reshape(-1, states[0].shape[-1]) if len(states) == 1 else None
        return original(*args, **kwargs)

    def experts(self, original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Stands for the experts' forward."""
        call = len(self._parts)
        positions, rows = self._expected[call] if call < len(self._expected) else (0, torch.empty(0))
        if len(expert_ids) != positions:
            raise ValueError(
                f"layer {self._index}: the experts saw {len(expert_ids)} rows for {positions} positions; this model "
                "does not hand every position to its experts once, so its tokens cannot be sampled"
            )
        rows = rows.to(hidden.device)
        kept = hidden[rows].cpu()
        given, self._router_input = self._router_input, None  # nothing of the device's stays
        if given is not None:
            given = given[rows].cpu() if len(given) == positions else None
            given = kept if given is not None and torch.equal(given, kept) else given
        self._parts.append((kept, expert_ids[rows].cpu(), weights[rows].cpu(), given))
        return original(hidden, expert_ids, weights)

    def sample(self) -> LayerSample:
        hidden, expert_ids, weights, given = zip(*self._parts, strict=True)
        rows = torch.cat(hidden)
        router_input: Tensor | None = rows
        if any(own is not shared for own, shared in zip(given, hidden, strict=True)):
            router_input = None if any(part is None for part in given) else torch.cat(given)
        return LayerSample(rows, torch.cat(expert_ids), torch.cat(weights), router_input)


@torch.no_grad()
def expert_outputs(layer: MoeLayer, hidden: Tensor) -> Iterator[Tensor]:
    """Yields the unweighted outputs f_e(hidden) [n, H] of every expert e in turn, routed there or not.

    hidden: [n, H] on the experts' device; a streamed layer must be resident. What was yielded may be overwritten by the
    next. FLOPs: 6 * n * H * I * E for experts of three matrices [H, I]. Raises ValueError for outputs that are NaN or
    infinite.
    """
    outputs, rows = PairOutputs(layer), torch.arange(len(hidden), device=hidden.device)
    for expert in range(layer.shape.num_experts):
        counts = [0] * layer.shape.num_experts
        counts[expert] = len(hidden)
        found = outputs(layer.experts, hidden, rows, counts)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"outputs of expert {expert} of layer {layer.index} are NaN or infinite: check the weights and the "
                "dtype"
            )
        yield found
