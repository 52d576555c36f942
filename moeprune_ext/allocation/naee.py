"""naee: keeps the subset of a layer's experts whose routed output is closest to the whole layer's; a strong baseline.

Source: "Not All Experts are Equal", arXiv 2402.14800, which tries every subset of Mixtral's eight experts. A layer of
128 has too many, so above EXHAUSTIVE subsets experts are eliminated one by one, each time the one that costs least (our
choice).

Every subset is judged on the same sampled tokens (calibration/samples.py), without running an expert again. With G_t
the inner products [E, E] of all experts' outputs for token t, and d_t [E] the change of the token's gate weights under
a mask, the squared Frobenius norm of the output's error is the sum over t of d_t^T G_t d_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, uniform_counts, unscored
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.calibration.samples import LayerSample, expert_outputs, sample_layers
from moeprune_ext.data.batches import as_batches, without_padding
from moeprune_ext.models.layers import MoeLayer, masked
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import evaluating
from moeprune_ext.models.routers import RoutedLayer, routed_layer
from moeprune_ext.models.slicing import check_slicing
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.ops.masked_router import masked_router
from moeprune_ext.progress import View, track

EXHAUSTIVE = 20_000  # subsets of one layer up to which all are tried
CHUNK_BYTES = 256 * 2**20  # of expert outputs, or of gate weights under many masks, alive at a time

SubsetErrors = Callable[[Tensor], Tensor]  # masks, bool [C, E] -> squared errors, float64 [C]


def naee_plan(
    model: nn.Module | MoeModel,
    batches: Iterable[Any],
    sparsity: Budget,
    *,
    tokens: int = 1024,
    seed: int = 0,
    progress: bool | View = False,
) -> PruningPlan:
    """Makes the plan that removes the same share of every layer's experts and keeps each layer's best subset.

    The best subset has the smallest Frobenius norm of the routed output's error on the sampled tokens, each layer on
    its own with the unpruned model's inputs, masked as in the exported checkpoint. Up to EXHAUSTIVE subsets all are
    tried, and of equals the first in lexicographic order stays; above that, greedy backward elimination as in
    `naee_scores` (our choice). Where the router chooses among groups of its own, subsets keep equally many in each.

    Memory per layer: n * E^2 * 4 B for the inner products (67 MB for 128 experts and n = 1,024 tokens), CHUNK_BYTES,
    and the sample (`sample_layers`). FLOPs per layer: 6 n H I E for the outputs, 2 n E^2 H for their products, 2 n E^2
    for every subset tried (about m * (E - m / 2) of them to eliminate m of E greedily). Where half-precision logits
    tie, a row may go to another of the tied experts than in the model, as with the evaluator's router="fused". Under
    torchrun the layers are dealt out.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        batches: see `as_batches`.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.
        tokens: attended positions to judge on; all where there are fewer.
        seed: draws the positions.
        progress: whether to show progress on stderr, or the View to show it on.

    Raises:
        ValueError: before any work, for a sparsity that cannot be, or a router that cannot be run under many masks.
    """
    moe = MoeModel.of(model)
    pruned = uniform_counts(unscored(moe.shapes), sparsity)
    return naee_subsets(moe, batches, pruned, tokens=tokens, seed=seed, progress=progress)


def naee_subsets(
    model: nn.Module | MoeModel,
    batches: Iterable[Any],
    pruned: Mapping[int, int],
    *,
    tokens: int = 1024,
    seed: int = 0,
    progress: bool | View = False,
) -> PruningPlan:
    """As `naee_plan`, for other counts, such as `uniform_counts` of scores under a user's limits.

    Args:
        model: see `naee_plan`.
        batches: see `naee_plan`.
        pruned: {decoder layer: experts that leave}; layers not named lose none.
        tokens: see `naee_plan`.
        seed: see `naee_plan`.
        progress: see `naee_plan`.

    Raises:
        ValueError: for counts that a layer cannot lose, and as `naee_plan`.
    """
    moe = MoeModel.of(model)
    shapes = moe.shapes
    PruningPlan.from_pruned_counts(unscored(shapes), pruned)  # raises ValueError for what a layer cannot lose

    def choose(index: int, errors: SubsetErrors) -> Tensor:
        gone = torch.zeros(shapes[index].num_experts, dtype=torch.float64)
        gone[least_missed(errors, shapes[index], pruned.get(index, 0))] = 1
        return gone

    gone_by_layer = _by_layer(moe, batches, tokens, seed, progress, choose)
    kept = {index: (gone == 0).nonzero()[:, 0].tolist() for index, gone in gone_by_layer.items()}
    return PruningPlan(kept, {index: shape.num_experts for index, shape in shapes.items()}, moe.fingerprint, "naee")


def naee_scores(
    model: nn.Module | MoeModel,
    batches: Iterable[Any],
    *,
    tokens: int = 1024,
    seed: int = 0,
    progress: bool | View = False,
) -> ExpertScores:
    """Scores experts by the order in which greedy backward elimination removes them, for any allocation (our choice).

    The expert whose removal leaves the smallest error goes, of equals the higher id, until as many are left as the
    router needs. Where the router chooses among groups of its own, its groups lose one expert in turn, so that pruning
    a multiple of n_group follows this order. Memory and FLOPs as in `naee_plan`.

    Args:
        model: see `naee_plan`.
        batches: see `naee_plan`.
        tokens: see `naee_plan`.
        seed: see `naee_plan`.
        progress: see `naee_plan`.

    Returns:
        {decoder layer: float64 [E]}: 0 for the first to be removed; those that stay share the highest score.

    Raises:
        ValueError: for a router that cannot be run under many masks.
    """
    moe = MoeModel.of(model)
    shapes = moe.shapes

    def rank(index: int, errors: SubsetErrors) -> Tensor:
        gone = _eliminate(errors, shapes[index], shapes[index].capacity)
        ranks = torch.full((shapes[index].num_experts,), len(gone), dtype=torch.float64)
        ranks[gone] = torch.arange(len(gone), dtype=torch.float64)
        return ranks

    ranks_by_layer = _by_layer(moe, batches, tokens, seed, progress, rank)
    return ExpertScores(ranks_by_layer, shapes, "naee", moe.fingerprint)


def _by_layer(
    moe: MoeModel,
    batches: Iterable[Any],
    tokens: int,
    seed: int,
    progress: bool | View,
    judge: Callable[[int, SubsetErrors], Tensor],
) -> dict[int, Tensor]:
    """Judges every layer's experts.

    Args:
        moe: the model.
        batches: see `as_batches`.
        tokens: attended positions of the sample.
        seed: draws the sample.
        progress: whether to show progress on stderr, or the View to show it on.
        judge: (decoder layer, errors of its subsets) -> float64 [E].

    Returns:
        {decoder layer: what `judge` returns}; zeros for a layer that can lose none.
    """
    if tokens < 1:
        raise ValueError(f"tokens is the size of the sample, at least 1; got {tokens}")
    layers = {index: layer for index, layer in moe.layers.items() if layer.shape.capacity}
    checked = without_padding(as_batches(batches, moe.vocab_size))
    check_slicing(layers)
    routed = {index: routed_under_masks(layer) for index, layer in layers.items()}
    samples = sample_layers(moe, layers, checked, tokens, seed=seed, progress=progress)
    indices = list(layers)
    judged = {index: torch.zeros(shape.num_experts, dtype=torch.float64) for index, shape in moe.shapes.items()}
    problem: ValueError | None = None
    with evaluating(moe.model):
        for number in track(progress, distributed.own_share(len(layers)), "naee", "layer"):
            index = indices[number]
            moe.make_resident(index)
            try:
                judged[index] = judge(index, subset_errors(routed[index], samples[index]))
            except ValueError as error:
                problem = error
                break
    # All processes raise if one does, so that a caller that goes on without naee does so in all of them.
    if bool(distributed.maximum_(torch.tensor(problem is not None, dtype=torch.int64))):
        raise problem or ValueError("another process met a layer that naee does not support")
    return {index: distributed.sum_(values) for index, values in judged.items()}


# ---- choosing


def least_missed(errors: SubsetErrors, shape: LayerShape, pruned: int) -> list[int]:
    """Returns the ids of the `pruned` experts whose joint absence leaves the smallest error."""
    group_size, gone = shape.num_experts // shape.n_group, pruned // shape.n_group
    if pruned == 0:
        return []
    if math.comb(group_size, gone) ** shape.n_group > EXHAUSTIVE:
        return _eliminate(errors, shape, pruned)
    groups = [range(start, start + group_size) for start in range(0, shape.num_experts, group_size)]
    subsets = [list(chain(*parts)) for parts in product(*(combinations(group, group_size - gone) for group in groups))]
    masks = torch.zeros(len(subsets), shape.num_experts, dtype=torch.bool)
    masks.scatter_(1, torch.tensor(subsets), True)
    return (~masks[int(errors(masks).argmin())]).nonzero()[:, 0].tolist()


def _eliminate(errors: SubsetErrors, shape: LayerShape, count: int) -> list[int]:
    """Returns the ids of the first `count` experts that greedy backward elimination removes, in its order."""
    group_size, gone = shape.num_experts // shape.n_group, []
    keep = torch.ones(shape.num_experts, dtype=torch.bool)
    for step in range(count):
        group = torch.arange(group_size) + step % shape.n_group * group_size
        candidates = group[keep[group]].flip(0)  # of equals, the first is the higher id
        masks = keep.repeat(len(candidates), 1)
        masks[torch.arange(len(candidates)), candidates] = False
        gone.append(int(candidates[errors(masks).argmin()]))
        keep[gone[-1]] = False
    return gone


# ---- errors of subsets


def routed_under_masks(layer: MoeLayer) -> RoutedLayer:
    """Returns how a layer's router runs under many masks; raises ValueError for one that cannot."""
    routed = routed_layer(layer, "fused")
    grouped = layer.shape.n_group > 1  # groups lose experts in turn: unequal ones cannot be sliced, only fused
    if routed.places is None or layer.trailing or (grouped and routed.spec is None):
        raise ValueError(
            f"{type(layer.router).__name__} (layer {layer.index}) cannot be run on its own under many masks, as naee "
            "needs; score experts by another criterion"
        )
    return routed


def subset_errors(routed: RoutedLayer, sample: LayerSample) -> SubsetErrors:
    """Returns a resident layer's errors as a function of masks; raises ValueError if its router cannot be run again."""
    layer, count = routed.layer, routed.layer.shape.num_experts
    name = f"{type(layer.router).__name__} (layer {layer.index})"
    if sample.router_input is None:
        raise ValueError(f"{name} is called with more than hidden states, so naee cannot run it again")
    router_input = sample.router_input.to(next(layer.router.parameters()).device)
    grams = _token_grams(routed, sample)
    weights = _gate_weights(routed, router_input)
    full = weights(torch.ones(1, count, dtype=torch.bool))[0].to(grams.device)
    sampled = torch.zeros_like(full).scatter_(1, sample.expert_ids.to(full.device), sample.weights.to(full))
    agree = ((full - sampled).abs() <= 0.05 * sampled.abs().amax(-1, keepdim=True)).all(-1)
    if float(agree.float().mean()) < 0.8:  # not 1, because near a tie a row may go to another expert
        raise ValueError(f"{name}: its answer is not what the experts are given; naee does not support this model")

    def errors(masks: Tensor) -> Tensor:
        squared = torch.empty(len(masks), dtype=torch.float64)
        for chunk in row_chunks(len(masks), 3 * full.nbytes, CHUNK_BYTES):
            change = weights(masks[chunk]).to(grams.device).sub_(full).transpose(0, 1)  # [n, C, E]
            squared[chunk] = (torch.bmm(change, grams) * change).sum((0, 2), dtype=torch.float64).cpu()
        return squared

    return errors


def _token_grams(routed: RoutedLayer, sample: LayerSample) -> Tensor:
    """Computes the inner products of all experts' outputs for every token: float32 [n, E, E]."""
    layer, count = routed.layer, routed.layer.shape.num_experts
    hidden = sample.hidden.to(next(layer.experts.parameters()).device)
    grams = torch.empty(len(hidden), count, count, dtype=torch.float32, device=hidden.device)
    for rows in row_chunks(len(hidden), 4 * count * hidden.shape[1], CHUNK_BYTES):
        outputs = torch.empty(count, *hidden[rows].shape, dtype=torch.float32, device=hidden.device)
        for expert, output in enumerate(expert_outputs(layer, hidden[rows])):
            outputs[expert] = output
        by_token = outputs.transpose(0, 1)
        torch.bmm(by_token, by_token.transpose(1, 2), out=grams[rows])
    return grams


def _gate_weights(routed: RoutedLayer, router_input: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the factors of the experts' outputs as a function of masks: bool [C, E] -> float32 [C, n, E]."""
    layer, spec = routed.layer, routed.spec
    assert routed.places is not None
    place_of_logits, place_of_weights, place_of_ids = routed.places
    logits = layer.router(router_input)[place_of_logits]

    def weights_under(masks: Tensor) -> Tensor:
        masks = masks.to(logits.device)
        result = torch.zeros(len(masks), *logits.shape, dtype=torch.float32, device=logits.device)
        if spec is not None:
            ids, weights = masked_router(logits, top_k=layer.shape.top_k, keep=masks, spec=spec)
            return result.scatter_(2, ids, weights.float())
        for mask, dense in zip(masks, result, strict=True):
            kept = mask.nonzero()[:, 0]
            with masked(layer, kept.tolist()):
                answer = layer.router(router_input)
            dense.scatter_(1, kept[answer[place_of_ids]], answer[place_of_weights].float())
        return result

    return weights_under
