"""Padded exports: layers stored with as many experts as the largest keeps, for runtimes that know one number for all.

Absent experts are zeros, and a bias keeps them from ever being chosen. That is exact where the bias is part of the
logits (GPT-OSS), whatever is made of them, and where it is added to scores that do not depend on each other (a sigmoid,
as in DeepSeek-V3). Without a bias, and where one is added to a softmax over all experts, the absent ones would take a
share of it, so such routers are refused. (A copy of a kept expert's router row changes that softmax, too.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.checkpoint.read import Checkpoint, stored_tensors
from moeprune_ext.checkpoint.routers import stored_routers
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.routers import RoutedLayer

ABSENT = -1e4  # finite, so that no dtype and no runtime makes NaN of it

INDEPENDENT = ("sigmoid", "sqrtsoftplus")  # scores that a further expert does not change


def padded(checkpoint: Checkpoint, plan: PruningPlan) -> tuple[PruningPlan, dict[int, list[int]]]:
    """Makes the plan that stores equally many experts in every layer.

    Args:
        checkpoint: the model.
        plan: a plan for it, without mapped routers.

    Returns:
        The plan, in which absent experts are sums of nothing, and {decoder layer: ids of the absent experts}, whose
        entries in the layer's bias have to become ABSENT.

    Raises:
        ValueError: naming the layer, where absent experts could be chosen or would change what others weigh.
    """
    if plan.mapped_layers:
        raise ValueError("a padded export cannot hold routers that map their scores; export the plan before merging")
    kept = {index: list(range(layer.shape.num_experts)) for index, layer in checkpoint.layers.items()} | plan.kept
    most = max(map(len, kept.values()))
    short = {index: ids for index, ids in kept.items() if len(ids) < most}
    routers = stored_routers(checkpoint) if short else {}
    absent: dict[int, list[int]] = {}
    merges = dict(plan.merges)
    for index, ids in short.items():
        layer = checkpoint.layers[index]
        _check(checkpoint, routers[index])
        absent[index] = _absent(layer, ids, most)
        if len(ids) + len(absent[index]) < most:
            raise ValueError(f"layer {index} has {layer.shape.num_experts} experts, not {most}; pad the original model")
        kept[index] = sorted([*ids, *absent[index]])
        merges[index] = _with_nothing(merges.get(index), ids, kept[index], layer.shape.num_experts)
    counts = {index: layer.shape.num_experts for index, layer in checkpoint.layers.items()}
    return replace(plan, kept=kept, num_experts=counts, merges=merges), absent


def _check(checkpoint: Checkpoint, routed: RoutedLayer) -> None:
    """Refuses a router that could choose an absent expert, or whose weights would change."""
    layer = routed.layer
    name = f"{type(layer.router).__name__} (layer {layer.index})"
    biases = [
        stored
        for stored, role in checkpoint.roles.items()
        if role.layer == layer.index and role.is_router and role.expert is None and _is_vector(checkpoint, stored)
    ]
    if not _keeps_out(routed, biases) or layer.trailing:
        raise ValueError(
            f"{name} cannot be padded: it has no bias, of a known formula, that keeps absent experts out and leaves "
            "the others' weights as they are; export a uniform plan, or the uneven one without padding"
        )


def _keeps_out(routed: RoutedLayer, biases: Sequence[str]) -> bool:
    """Whether a large negative entry in the one bias makes an expert absent, exactly."""
    if routed.spec is None or len(biases) != 1:
        return False
    if routed.spec.correction_bias is not None:
        return routed.spec.score in INDEPENDENT
    return biases[0].endswith("bias")  # of the logits


def _is_vector(checkpoint: Checkpoint, name: str) -> bool:
    return any(len(stored.get_shape()) == 1 for _, stored in stored_tensors(checkpoint.shards, {name: None}))


def _absent(layer: MoeLayer, kept: Sequence[int], most: int) -> list[int]:
    """Returns the ids of removed experts in whose places nothing stands: the first ones, equally many in each group."""
    groups, count = layer.shape.n_group, layer.shape.num_experts
    size, more = count // groups, (most - len(kept)) // groups
    chosen = []
    for start in range(0, count, size):
        chosen += [expert for expert in range(start, start + size) if expert not in kept][:more]
    return chosen


def _with_nothing(merge: Merge | None, kept: Sequence[int], places: Sequence[int], count: int) -> Merge:
    """Returns the merge that leaves the kept experts what they are, and makes sums of nothing in the other places."""
    merge = merge or Merge.as_they_are(kept, count)
    rows = [places.index(expert) for expert in kept]
    experts = torch.zeros(len(places), count)
    experts[rows] = merge.experts
    down = None
    if merge.down is not None:
        down = merge.down.new_zeros(len(places), *merge.down.shape[1:])
        down[rows] = merge.down
    return Merge(experts, None, down)
