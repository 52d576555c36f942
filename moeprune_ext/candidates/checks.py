"""What a sweep must prove before it is believed: that it computes what the model's own forward computes."""

from __future__ import annotations

import torch

from moeprune_ext import distributed
from moeprune_ext.artifacts.plan import PruningPlan, Treatment
from moeprune_ext.candidates.blocks import BlockRunner
from moeprune_ext.candidates.tree import grow, treatments
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.apply import planned
from moeprune_ext.models.layers import half_kept
from moeprune_ext.models.replay import NotReplayable
from moeprune_ext.models.routers import routed_layer
from moeprune_ext.ops.overlap import overlap


def check_masked(runner: BlockRunner, sequence: TokenBatch) -> None:
    """Compares pruned candidates that share a beginning with whole masked forwards of the model.

    Args:
        runner: of the model.
        sequence: a few tokens, [1, S].

    Raises:
        NotReplayable: where they differ, or where sweeping fails.
    """
    replay = runner.replay
    layers = replay.moe.layers
    full = treatments(layers)
    half = {index: Treatment(tuple(half_kept(layer))) for index, layer in layers.items()}
    mixed = {**half, max(layers): full[max(layers)]}
    inputs = replay.inputs(sequence.model_inputs(replay.moe.device))
    runner.tokens_at_once = 3 * sequence.input_ids.shape[1]
    tree = grow([half, mixed, full])
    try:
        last = runner.run(tree, [(inputs.hidden, inputs)])[0]
        swept = [replay.project(replay.head_inputs(last[leaf])) for leaf in tree.leaf.tolist()]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise NotReplayable(f"sweeping it fails: {' '.join(str(error).split())[:200]}") from error
    num_experts = {index: layer.shape.num_experts for index, layer in layers.items()}
    for candidate, logits in zip((half, mixed), swept, strict=False):  # the full model has been compared already
        plan = PruningPlan({index: list(treatment.kept) for index, treatment in candidate.items()}, num_experts)
        with planned(layers, plan):
            expected = replay.model(**sequence.model_inputs(replay.moe.device), use_cache=False).logits[0]
        replay.compare(logits, expected)


def ignores_what_follows(runner: BlockRunner, sequence: TokenBatch) -> bool:
    """Tells whether the logits of a sequence's first half are the same with the rest behind it."""
    replay = runner.replay
    ids = sequence.input_ids.to(replay.moe.device)
    half = max(1, ids.shape[1] // 2)
    tree = grow([treatments(replay.moe.layers)])
    logits = []
    for tokens in (ids[:, :half], ids):
        inputs = replay.inputs({"input_ids": tokens})
        last = runner.run(tree, [(inputs.hidden, inputs)])[0][0, :half]
        logits.append(replay.project(replay.head_inputs(last)))
    try:
        replay.compare(logits[1], logits[0])
    except NotReplayable:
        return False
    return True


def fused_difference(runner: BlockRunner, sequence: TokenBatch) -> float:
    """Returns 1 - ESAP between half-pruned models whose tied half-precision logits the kernel and slicing resolve."""
    replay = runner.replay
    layers = replay.moe.layers
    inputs = replay.inputs(sequence.model_inputs(replay.moe.device))
    tree = grow([{index: Treatment(tuple(half_kept(layer))) for index, layer in layers.items()}])
    sliced = BlockRunner(replay, {index: routed_layer(layer, "sliced") for index, layer in layers.items()})
    p, q = (
        replay.project(replay.head_inputs(one.run(tree, [(inputs.hidden, inputs)])[0][0])) for one in (sliced, runner)
    )
    return 1 - float(overlap(p, q)["esap"].mean())


def same_everywhere(problem: NotReplayable | None) -> None:
    """Raises NotReplayable in all processes if one of them has a problem, so that all use the same engine."""
    if bool(distributed.maximum_(torch.tensor([problem is not None], dtype=torch.float64))):
        raise problem or NotReplayable("another process cannot replay it")
