"""What cannot be repaired, found on a few tokens before work starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.models.experts import PairOutputs, has_post_expert_norm
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, Observe, intercepted
from moeprune_ext.models.replay import Replay

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How far a layer's output may be from what the experts' change says, relative to the change.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.1}


class NotRepairable(ValueError):
    """What cannot be repaired, or not in this way."""


def check_experts(moe: MoeModel, layers: Sequence[int], tokens: Tensor) -> None:
    """Refuses experts whose down projections are not known, and models that do not call them once for every position.

    Args:
        moe: the model.
        layers: decoder layers to be repaired.
        tokens: int64 [1, S], run through the model once.

    Raises:
        NotRepairable: naming the experts' class and the layer.
    """
    calls = dict.fromkeys(layers, 0)

    def looking_at(layer: MoeLayer) -> Observe:
        def observe(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            _check_layout(layer)  # while a streamed layer is here
            calls[layer.index] += 1 if len(ids) == tokens.numel() else 2
            return original(hidden, ids, weights)

        return observe

    backbone: Any = getattr(moe.model, "base_model", moe.model)
    with ExitStack() as stack:
        for index in layers:
            stack.enter_context(intercepted(moe.layers[index].experts, looking_at(moe.layers[index])))
        backbone(input_ids=tokens.to(moe.device), use_cache=False)
    if wrong := [index for index, count in calls.items() if count != 1]:
        raise NotRepairable(
            f"layer {wrong[0]}: its experts are not given every position once; this model cannot be repaired"
        )


def _check_layout(layer: MoeLayer) -> None:
    experts: Any = layer.experts
    name = f"{type(experts).__name__} (layer {layer.index})"
    weights = [parameter for parameter in experts.parameters() if parameter.ndim > 1]
    if odd := sorted({str(parameter.dtype) for parameter in weights if parameter.dtype not in FLOATS}):
        raise NotRepairable(
            f"{name} has quantised weights ({', '.join(odd)}), which cannot be repaired; dequantise them"
        )
    if not PairOutputs(layer).is_standard or has_post_expert_norm(experts):
        raise NotRepairable(
            f"{name} does not end in a down projection of the known layout, so it cannot be repaired; export the plan "
            "as it is"
        )


def check_passes_through(moe: MoeModel, layers: Sequence[int], replay: Replay, tokens: Tensor) -> None:
    """Refuses layers whose output does not change by just what the experts' output changes by.

    Such are layers with a norm, a gate or a factor behind the experts.

    Args:
        moe: the model.
        layers: decoder layers to be repaired.
        replay: of the model.
        tokens: int64 [1, S], run through every layer.

    Raises:
        NotRepairable: naming the layer.
    """
    inputs = replay.inputs({"input_ids": tokens.to(moe.device)})
    hidden = inputs.hidden
    changes: list[Tensor] = []

    def changed(original: ExpertsFunction, *call: Tensor) -> Tensor:
        result = original(*call)
        noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result) * result.abs().max()
        changes.append(noise.float())
        return result + noise

    for index in range(max(layers) + 1):
        output = replay.run(index, hidden, inputs)
        if index in layers:
            with intercepted(moe.layers[index].experts, changed):
                difference = replay.run(index, hidden, inputs).float() - output.float()
            change = changes.pop().reshape(difference.shape)
            if bool((difference - change).norm() > TOLERANCE[output.dtype] * change.norm()):
                raise NotRepairable(
                    f"layer {index}: what its experts give does not pass into the layer's output as it is (there is a "
                    'norm or a factor behind them), so its hidden states cannot be the target; use target="layer"'
                )
        hidden = output
