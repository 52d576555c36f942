"""GRAPE: layers with similar experts lose more of them; no search.

`expert_similarity` compares every two experts of a layer on the same tokens: that is the work. `plan_from_similarity`
then joins the two most similar groups of experts, whatever layer they stand in, until the budget is spent, and keeps
one expert of every group: seconds, for any number of budgets.

Source: arXiv 2604.06542. The similarity, the linkage, the guard's details and who leaves are our choice; see below.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, Units, check_scores, in_units
from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.calibration.samples import expert_outputs, sample_layers
from moeprune_ext.data.batches import as_batches, without_padding
from moeprune_ext.models.layers import MoeLayer, expert_tensors
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import evaluating
from moeprune_ext.ops.backend import row_chunks
from moeprune_ext.progress import View, track

SIMILARITIES = ("cka", "weights")
WHO = ("groups", "scores")
CHUNK_BYTES = 64 * 2**20  # of Gram matrices or weights in one matrix product
CONSTANT = 1e-5  # an expert whose outputs vary by less than this share of their length is dead


def grape(
    model: nn.Module | MoeModel,
    batches: Iterable[Any] | None,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: Budget,
    *,
    similarity: str = "cka",
    tokens: int = 1024,
    entropy: float = 0.9,
    who: str = "groups",
    merge: bool = False,
    seed: int = 0,
    progress: bool | View = False,
) -> PruningPlan:
    """Makes a plan that spends the uniform plan's budget where experts are most alike. Source: arXiv 2604.06542.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        batches: see `as_batches`; None where `similarity` is "weights".
        scores: ExpertScores or {decoder layer: [E]}; the best of a group of similar experts stays.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.
        similarity: see `expert_similarity`.
        tokens: see `expert_similarity`.
        entropy: see `plan_from_similarity`.
        who: see `plan_from_similarity`.
        merge: see `plan_from_similarity`.
        seed: draws the sample of tokens.
        progress: whether to show progress on stderr, or the View to show it on.

    Raises:
        ValueError: before any work, for scores of another model, and for what the two functions refuse.
    """
    moe = MoeModel.of(model)
    scores = ExpertScores.wrap(scores, shapes=moe.shapes, model=moe.fingerprint)
    check_scores(scores, moe.shapes, moe.fingerprint)
    check_request(scores, sparsity, tokens, entropy, who, merge)
    similarities = expert_similarity(moe, batches, similarity=similarity, tokens=tokens, seed=seed, progress=progress)
    return plan_from_similarity(similarities, scores, sparsity, entropy=entropy, who=who, merge=merge)


def check_request(scores: ExpertScores, sparsity: Budget, tokens: int, entropy: float, who: str, merge: bool) -> None:
    """Raises ValueError for what `grape` cannot do, without the model; the arguments are its own."""
    _units(scores, sparsity, entropy, who, merge)
    _check_tokens(tokens)


def _check_tokens(tokens: int) -> None:
    if tokens < 4:
        raise ValueError(f"the unbiased estimator needs at least 4 tokens, got tokens={tokens}")


# ---- how alike experts are


def expert_similarity(
    model: nn.Module | MoeModel,
    batches: Iterable[Any] | None,
    *,
    similarity: str = "cka",
    tokens: int = 1024,
    seed: int = 0,
    progress: bool | View = False,
) -> dict[int, Tensor]:
    """Measures how alike every two experts of a layer are.

    A dead expert, whose outputs are constant or whose weights are zero, is 1 to other dead ones and 0 to the living
    (our choice). Memory per layer: Gram matrices, E * n^2 * 4 B on the experts' device (0.5 GB for 128 experts and
    n = 1,024 tokens), one expert's outputs, and the sample (`sample_layers`). FLOPs per layer: 6 n H I E for the
    outputs, 2 n^2 H E for the Gram matrices, 2 E^2 n^2 for their products. Streamed layers are visited twice in all.
    Under torchrun the layers are dealt out, and every process gets all tables.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        batches: see `as_batches`; None where `similarity` is "weights".
        similarity: what is compared (both our choice).
            "cka": the experts' unweighted outputs on the same tokens, by linear CKA with the unbiased HSIC estimator
            (Song et al. 2012). It is about 0 for independent outputs; the biased one reads high where n < H.
            "weights": all of an expert's weights, by their cosine; needs no data.
        tokens: attended positions that experts are run on, the same for all; all where there are fewer.
        seed: draws the positions.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        {decoder layer: float64 [E, E]}, symmetric, at most 1, with a diagonal of 1.

    Raises:
        ValueError: for an unknown similarity, fewer than 4 tokens, or outputs that are NaN or infinite.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"unknown similarity {similarity!r}; choose from {', '.join(SIMILARITIES)}")
    _check_tokens(tokens)
    moe = MoeModel.of(model)
    layers = moe.layers
    samples = {}
    if similarity == "cka":
        checked = without_padding(as_batches(() if batches is None else batches, moe.vocab_size))
        if (attended := sum(int(batch.attention_mask.sum()) for batch in checked)) < 4:
            raise ValueError(f"the unbiased estimator needs at least 4 tokens, and the data has {attended}")
        samples = sample_layers(moe, layers, checked, tokens, seed=seed, progress=progress)
    indices = list(layers)
    tables = {i: torch.zeros(2 * (layer.shape.num_experts,), dtype=torch.float64) for i, layer in layers.items()}
    with evaluating(moe.model):
        for number in track(progress, distributed.own_share(len(layers)), "similarity", "layer"):
            layer = layers[indices[number]]
            moe.make_resident(layer.index)
            cka = similarity == "cka"
            products = _cka_products(layer, samples[layer.index].hidden) if cka else _weight_products(layer)
            tables[layer.index] = _cosines(products)
    return {index: distributed.sum_(table) for index, table in tables.items()}


def _cka_products(layer: MoeLayer, hidden: Tensor) -> Tensor:
    """Computes the HSIC of every two experts' outputs on hidden [n, H], up to one factor: float64 [E, E].

    The unbiased HSIC of Gram matrices K and L is <K~, L~> / (n (n - 3)) of the U-centred ones. So each is centred once,
    and all pairs are one matrix product.
    """
    count, n, device = layer.shape.num_experts, len(hidden), next(layer.experts.parameters()).device
    grams = torch.empty(count, n, n, dtype=torch.float32, device=device)
    for expert, outputs in enumerate(expert_outputs(layer, hidden.to(device))):
        _centred_gram_(grams[expert], outputs.float())
    return _products(grams.view(count, -1))


def _centred_gram_(gram: Tensor, outputs: Tensor) -> None:
    """Fills gram [n, n] with the U-centred Gram matrix of outputs [n, H]; with zeros for a dead expert.

    CKA depends on neither offset nor scale. Both are removed before the product, where they would cost float32 digits.
    Source of U-centring: Szekely & Rizzo 2014.
    """
    varying = outputs - outputs.mean(0)
    length = varying.norm()
    if length <= CONSTANT * outputs.norm():
        gram.zero_()
        return
    varying /= length
    torch.mm(varying, varying.T, out=gram)
    gram.fill_diagonal_(0)
    n = len(gram)
    sums = gram.sum(0, dtype=torch.float64)
    shares = (sums / (n - 2) - sums.sum() / (2 * (n - 1) * (n - 2))).float()
    gram -= shares[:, None]
    gram -= shares[None, :]
    gram.fill_diagonal_(0)


def _weight_products(layer: MoeLayer) -> Tensor:
    """Computes the inner products of the experts' weights, biases and scales included: float64 [E, E]."""
    tensors = [getattr(place.owner, place.name)[: layer.shape.num_experts] for place in expert_tensors(layer)]
    return torch.stack([_products(tensor.flatten(1)) for tensor in tensors]).sum(0)


def _products(rows: Tensor) -> Tensor:
    """Computes rows @ rows.T of [E, D], in float32 for a chunk of columns, summed in float64: [E, E] on the CPU."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in row_chunks(rows.shape[1], 4 * len(rows), CHUNK_BYTES):
        part = rows[:, columns].float()
        total += part @ part.T
    return total.cpu()


def _cosines(products: Tensor) -> Tensor:
    """Makes cosines of inner products [E, E]: 1 between dead experts, 0 between dead and living ones."""
    lengths = products.diagonal().sqrt()
    dead = lengths <= CONSTANT * lengths.max()
    cosines = ((products + products.T) / 2 / torch.outer(lengths, lengths)).clamp(-1, 1)
    cosines = torch.where(dead[:, None] | dead[None, :], (dead[:, None] & dead[None, :]).double(), cosines)
    return cosines.fill_diagonal_(1)


# ---- similarities -> plan


def plan_from_similarity(
    similarities: Mapping[int, Tensor],
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: Budget,
    *,
    entropy: float = 0.9,
    who: str = "groups",
    merge: bool = False,
) -> PruningPlan:
    """Joins the most similar groups of experts, in whatever layer, until the uniform plan's budget is spent.

    The similarity of two groups is the mean over their pairs (average linkage). Of equal ones those of the lower layer
    go first, then of the lower expert ids. Two protected experts never share a group. Where the router chooses among
    groups of its own, a step joins two groups of experts in each of them, and stands for the mean of these
    similarities, so that all keep equally many. Where multiples must be kept, a layer whose turn
    it is takes as many steps as that needs; what it must lose in every plan it loses first. All of this is our choice.

    Args:
        similarities: {decoder layer: [E, E]}, symmetric.
        scores: of the same layers. The best of a group stays, of equals the lower id. A plain mapping stands for
            routers that need one expert; `grape` asks the model.
        sparsity: share of the experts to remove, in [0, 1), or `Kept`.
        entropy: the guard against emptying one very redundant layer, in [0, 1]; 0 turns it off. H is the entropy of the
            distribution of removals over the layers that are neither frozen nor at capacity. Once there are two
            removals a layer and H / log(layers) is below `entropy`, the layer with most removals, of equals the lowest,
            is frozen. If every layer is frozen before the budget is spent, a warning says so, all thaw, and the guard
            is off. The guard is arXiv 2604.06542's idea, its details our choice.
        who: which experts leave a layer.
            "groups": all of a group but its best.
            "scores": those of the lowest scores, as many; for models whose similar experts are not the dispensable
            ones.
        merge: whether kept experts become the average of their group, weighted by the scores (equally where all are
            zero), in `PruningPlan.merges`. A protected expert stays as it is.

    Raises:
        ValueError: for an entropy outside [0, 1], an unknown `who`, a sparsity that cannot be, merge=True with negative
            scores or without groups, layers with different numbers of router groups, or similarities that do not fit
            the scores.
    """
    scores = ExpertScores.wrap(scores)
    units = _units(scores, sparsity, entropy, who, merge)
    if set(similarities) != set(scores):
        raise ValueError(f"similarities are of layers {sorted(similarities)}, scores of layers {sorted(scores)}")
    linkages = {layer: _linkages(layer, similarities[layer], scores) for layer in scores}
    removed = _spend(linkages, units, entropy)
    if who == "scores":
        return PruningPlan.from_pruned_counts(scores, removed)
    kept: dict[int, list[int]] = {}
    merges: dict[int, Merge] = {}
    for layer, parts in linkages.items():
        values, protected = scores[layer].tolist(), scores.protected.get(layer, frozenset())
        groups = {
            min(group, key=lambda e: (e not in protected, -values[e], e)): sorted(group)
            for linkage in parts
            for group in linkage.groups.values()
        }
        kept[layer] = sorted(groups)
        averages = {e: _shares(group, values) for e, group in groups.items() if len(group) > 1 and e not in protected}
        if merge and averages:
            merges[layer] = Merge.averages(kept[layer], averages, scores.shapes[layer].num_experts)
    num_experts = {layer: shape.num_experts for layer, shape in scores.shapes.items()}
    return PruningPlan(kept, num_experts, scores.model, scores.criterion, merges, mtp=dict(scores.mtp))


def _units(scores: ExpertScores, sparsity: Budget, entropy: float, who: str, merge: bool) -> Units:
    """Returns the budget in units; raises ValueError as the planner."""
    if who not in WHO:
        raise ValueError(f"unknown who={who!r}; choose from {', '.join(WHO)}")
    if merge and who != "groups":
        raise ValueError("only groups can be merged: merge needs who='groups'")
    if not 0 <= entropy <= 1:
        raise ValueError(f"entropy is a share of the greatest possible one, in [0, 1]; got {entropy}")
    if merge and (negative := [layer for layer, values in scores.items() if bool((values < 0).any())]):
        raise ValueError(f"merge=True weights experts by their scores, which are negative in layers {negative}")
    return in_units(scores, sparsity)


def _shares(group: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """Returns each expert's share of a group's scores; equal shares where all are zero."""
    total = math.fsum(values[expert] for expert in group)
    return {expert: values[expert] / total if total > 0 else 1 / len(group) for expert in group}


class _Linkage:
    """Average linkage among the experts of one router group of a layer.

    Not scipy's, which joins equally similar groups in the order in which its algorithm meets them, not of their ids.

    Attributes:
        groups: {lowest expert id: the group's ids}.
        closest: similarity and table rows of the two most similar groups, of equals those of the lowest ids; the
            similarity is -inf if no two may be joined.
    """

    def __init__(self, similarity: np.ndarray, first: int, protected: frozenset[int]) -> None:
        self._table, self._first = similarity.copy(), first
        apart = [expert - first for expert in protected if 0 <= expert - first < len(similarity)]
        self._table[np.ix_(apart, apart)] = -np.inf  # so is every mean over pairs of which one is -inf
        np.fill_diagonal(self._table, -np.inf)
        self.groups = {first + i: [first + i] for i in range(len(similarity))}
        self.closest = self._find()

    def _find(self) -> tuple[float, int, int]:
        i, j = divmod(int(self._table.argmax()), len(self._table))  # the first of equals, so i < j
        return float(self._table[i, j]), i, j

    def join(self) -> None:
        """Makes one group of the two most similar ones."""
        _, i, j = self.closest
        one, other = self.groups[self._first + i], self.groups.pop(self._first + j)
        mean = (len(one) * self._table[i] + len(other) * self._table[j]) / (len(one) + len(other))
        self._table[i], self._table[:, i] = mean, mean
        self._table[j], self._table[:, j] = -np.inf, -np.inf
        one += other
        self.closest = self._find()


def _linkages(layer: int, similarity: Tensor, scores: ExpertScores) -> list[_Linkage]:
    """Makes the linkage of every router group of a layer."""
    shape, table = scores.shapes[layer], torch.as_tensor(similarity).detach().to("cpu", torch.float64).numpy()
    if table.shape != (shape.num_experts, shape.num_experts):
        raise ValueError(f"layer {layer}: similarities {list(table.shape)} do not fit its {shape.num_experts} experts")
    if not np.isfinite(table).all() or not np.allclose(table, table.T, rtol=0, atol=1e-6):
        raise ValueError(f"layer {layer}: similarities must be finite and symmetric")
    size, protected = shape.num_experts // shape.n_group, scores.protected.get(layer, frozenset())
    starts = range(0, shape.num_experts, size)
    return [_Linkage(table[start : start + size, start : start + size], start, protected) for start in starts]


def _spend(linkages: Mapping[int, Sequence[_Linkage]], units: Units, entropy: float) -> dict[int, int]:
    """Spends units, each in the layer whose closest groups are most similar; returns {decoder layer: experts gone}."""
    removed = dict.fromkeys(linkages, 0)
    frozen: set[int] = set()

    def unfrozen() -> list[int]:
        most = {layer: units.pruned(layer, capacity) for layer, capacity in units.capacities.items()}
        return [layer for layer, count in removed.items() if layer not in frozen and count < most[layer]]

    def remove(layer: int, experts: int) -> None:
        for _ in range(experts // len(linkages[layer])):
            for linkage in linkages[layer]:
                linkage.join()
        removed[layer] += experts

    for layer, experts in units.least.items():
        remove(layer, experts)
    for step in range(units.budget):
        if not (layers := unfrozen()):
            warnings.warn(
                f"the entropy guard ({entropy:g}) froze every layer after {step} of {units.budget} steps; the rest "
                "is removed without it: lower `entropy` or the sparsity",
                stacklevel=3,
            )
            frozen, entropy = set(), 0.0
            layers = unfrozen()
        chosen = max(layers, key=lambda layer: sum(linkage.closest[0] for linkage in linkages[layer]))
        remove(chosen, units.unit)
        if layers := unfrozen():
            counts = [removed[layer] for layer in layers]
            if sum(counts) >= 2 * units.unit * len(counts) and _evenness(counts) < entropy:
                frozen.add(max(layers, key=removed.__getitem__))
    return removed


def _evenness(counts: Sequence[int]) -> float:
    """Returns the entropy of a distribution over layers as a share of the greatest possible; 1 for a single layer."""
    shares = [count / sum(counts) for count in counts if count]
    return -sum(p * math.log(p) for p in shares) / math.log(len(counts)) if len(counts) > 1 else 1.0
