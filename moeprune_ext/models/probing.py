"""What a layer's router answers on random hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeprune_ext.modeling import router_weight
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.patches import ExpertsFunction, intercepted


def half_kept(layer: MoeLayer) -> list[int]:
    """Returns the ids of about half of a layer's experts, as many in every group as its router needs."""
    count, groups = layer.shape.num_experts, layer.shape.n_group
    size = count // groups
    keep = max(-(-layer.shape.min_kept // groups), (size + 1) // 2)
    return [g * size + i for g in range(groups) for i in range(size - keep, size)]


def probe(layer: MoeLayer, rows: int) -> Tensor:
    """Returns random hidden states [rows, H] on which a router can be tried; always the same."""
    weight = router_weight(layer.router)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, weight.shape[1], generator=generator).to(weight.device, weight.dtype)


def router_answer(layer: MoeLayer, hidden: Tensor) -> tuple[Tensor, ...] | None:
    """Returns the tensors that a layer's router answers; None where they cannot be had.

    A router that wants more than hidden states (its parent's correction bias, another shape) is called by its parent.

    Args:
        layer: of a model.
        hidden: [T, H].
    """
    answers: list[Any] = []

    def no_experts(original: ExpertsFunction, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    with torch.no_grad():
        try:
            answers.append(layer.router(hidden))
        except (TypeError, RuntimeError, IndexError, ValueError):
            hook = layer.router.register_forward_hook(lambda module, inputs, output: answers.append(output))
            try:
                with intercepted(layer.experts, no_experts):
                    layer.block(hidden[None])
            except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
                return None
            finally:
                hook.remove()
    answer = answers[0] if answers else None
    parts = answer if isinstance(answer, tuple | list) else [answer]
    return tuple(part for part in parts if isinstance(part, Tensor)) or None
