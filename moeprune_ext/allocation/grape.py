"""GRAPE: how many experts each layer loses follows from how alike its experts are, over all layers at once; no search.

Per layer, the similarity of every two experts on the same tokens; then, whatever layer they stand in, the two most
similar groups of experts are merged until the budget is spent, and one expert of every group stays. Similarities can be
kept and planned with again for other budgets: `expert_similarity` is the work, `plan_from_similarity` takes seconds.

Source: arXiv 2604.06542. Our choices: the similarity, the linkage, the guard's details and who leaves; see there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import check_scores, in_units
from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.calibration.samples import expert_outputs, sample_layers
from moeprune_ext.data.batches import as_batches, without_padding
from moeprune_ext.models.layers import MoeLayer, expert_tensors
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import evaluating
from moeprune_ext.ops.backend import row_chunks

SIMILARITIES = ("cka", "weights")


WHO = ("groups", "scores")


CHUNK_BYTES = 64 * 2**20  # of Gram matrices or weights in one matrix product


CONSTANT = 1e-5  # an expert whose outputs vary by less than this share of their length is dead


def grape(
    model: nn.Module | MoeModel,
    batches: Iterable[Any] | None,
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: float,
    *,
    similarity: str = "cka",
    tokens: int = 1024,
    entropy: float = 0.9,
    who: str = "groups",
    merge: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> PruningPlan:
    """A plan that spends the budget sum(plan.uniform_counts) where experts are most alike.

    batches, similarity, tokens, seed: see `expert_similarity`. scores: who stays in a group of similar experts.
    sparsity, entropy, who, merge: see `plan_from_similarity`. Raises ValueError, before any work, for scores of another
    model and for what these two refuse. Source: arXiv 2604.06542.
    """
    moe = MoeModel.of(model)
    scores = ExpertScores.wrap(scores, shapes=moe.shapes, model=moe.fingerprint)
    check_scores(scores, moe.shapes, moe.fingerprint)
    check_request(scores, sparsity, tokens, entropy, who, merge)
    found = expert_similarity(moe, batches, similarity=similarity, tokens=tokens, seed=seed, progress=progress)
    return plan_from_similarity(found, scores, sparsity, entropy=entropy, who=who, merge=merge)


def check_request(scores: ExpertScores, sparsity: float, tokens: int, entropy: float, who: str, merge: bool) -> None:
    """Refuses (ValueError) what `grape` cannot do, before the model is needed."""
    _limits(scores, sparsity, entropy, who, merge)
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
    progress: bool = False,
) -> dict[int, Tensor]:
    """{decoder layer: float64 [E, E]}: how alike every two experts of a layer are; symmetric, at most 1, itself 1.

    "cka": linear CKA with the unbiased HSIC estimator (Song et al. 2012, in its U-centred form; about 0 for independent
    outputs, where the biased one reads high for n < H) of the unweighted outputs on `tokens` attended positions that
    are the same for all experts (samples.py; drawn from `seed`). batches: see data.as_batches. "weights": the cosine of
    all of an expert's weights in a row; needs no data, and batches may be None (both our choice). An expert without
    variation (outputs that are constant, or zero weights) is dead: 1 to other dead ones, 0 to the living (our choice).

    Memory per layer: n x n Gram matrices in float32, E * n^2 * 4 B on the experts' device (0.5 GB for 128 experts and
    1,024 tokens), one expert's outputs, and the sample (samples.py). FLOPs per layer: 6 n H I E for the outputs, 2 n^2
    H E for the Gram matrices, 2 E^2 n^2 for their products. Streamed layers are visited twice in all. Under torchrun
    the layers are dealt out, and every process gets all. The model is left as it was.
    Raises ValueError for an unknown similarity, fewer than 4 tokens, or outputs that are NaN or infinite.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"unknown similarity {similarity!r}; choose from {', '.join(SIMILARITIES)}")
    if tokens < 4:
        raise ValueError(f"the unbiased estimator needs at least 4 tokens, got tokens={tokens}")
    moe = MoeModel.of(model)
    layers = moe.layers
    samples = {}
    if similarity == "cka":
        checked = without_padding(as_batches(() if batches is None else batches, moe.vocab_size))
        if (attended := sum(int(batch.attention_mask.sum()) for batch in checked)) < 4:
            raise ValueError(f"the unbiased estimator needs at least 4 tokens, and the data has {attended}")
        samples = sample_layers(moe, layers, checked, tokens, seed=seed, progress=progress)
    indices = list(layers)
    found = {i: torch.zeros(2 * (layer.shape.num_experts,), dtype=torch.float64) for i, layer in layers.items()}
    with evaluating(moe.model):
        for number in tqdm(distributed.own_share(len(layers)), desc="similarity", unit="layer", disable=not progress):
            layer = layers[indices[number]]
            moe.make_resident(layer.index)
            cka = similarity == "cka"
            products = _cka_products(layer, samples[layer.index].hidden) if cka else _weight_products(layer)
            found[layer.index] = _normalised(products)
    return {index: distributed.sum_(table) for index, table in found.items()}


def _cka_products(layer: MoeLayer, hidden: Tensor) -> Tensor:
    """Inner products of the experts' U-centred Gram matrices on hidden [n, H]: HSIC up to one factor, float64 [E, E].

    The unbiased HSIC of K and L is <K~, L~> / (n (n - 3)) of the U-centred ones, so each is centred once and all pairs
    are one matrix product, added up in float64.
    """
    count, n, device = layer.shape.num_experts, len(hidden), next(layer.experts.parameters()).device
    grams = torch.empty(count, n, n, dtype=torch.float32, device=device)
    for expert, outputs in enumerate(expert_outputs(layer, hidden.to(device))):
        _centred_gram_(grams[expert], outputs.float())
    return _products(grams.view(count, -1))


def _centred_gram_(gram: Tensor, outputs: Tensor) -> None:
    """Fills gram [n, n] with the U-centred Gram matrix of outputs [n, H] (Szekely & Rizzo 2014); zeros for a dead
    expert.

    CKA knows neither offset nor scale: both are taken off before the product, where float32 would lose digits.
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
    """Inner products of the experts' weights, biases and scales included: float64 [E, E]."""
    tensors = [getattr(place.owner, place.name)[: layer.shape.num_experts] for place in expert_tensors(layer)]
    return torch.stack([_products(tensor.flatten(1)) for tensor in tensors]).sum(0)


def _products(rows: Tensor) -> Tensor:
    """rows @ rows.T, [E, D] -> float64 [E, E] on the CPU: float32 products of some columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in row_chunks(rows.shape[1], 4 * len(rows), CHUNK_BYTES):
        part = rows[:, columns].float()
        total += part @ part.T
    return total.cpu()


def _normalised(products: Tensor) -> Tensor:
    """Inner products [E, E] -> cosines; dead experts are alike, and like no other."""
    lengths = products.diagonal().sqrt()
    dead = lengths <= CONSTANT * lengths.max()
    cosines = ((products + products.T) / 2 / torch.outer(lengths, lengths)).clamp(-1, 1)
    cosines = torch.where(dead[:, None] | dead[None, :], (dead[:, None] & dead[None, :]).double(), cosines)
    return cosines.fill_diagonal_(1)


# ---- similarities -> plan


def plan_from_similarity(
    similarities: Mapping[int, Tensor],
    scores: ExpertScores | Mapping[int, Tensor],
    sparsity: float,
    *,
    entropy: float = 0.9,
    who: str = "groups",
    merge: bool = False,
) -> PruningPlan:
    """Merges the most similar groups of experts, anywhere, until sum(plan.uniform_counts(scores, sparsity)) are gone.

    similarities: {decoder layer: [E, E]}, symmetric. scores: a plain mapping stands for routers that need one expert
    (`grape` asks the model). The similarity of two groups is the mean over their pairs (average linkage); equal ones:
    the lower layer first, then the lower expert ids. Of a group the expert with the highest score stays, of equals the
    lower id; two protected experts never share a group. Where the router chooses among groups of its own, a step merges
    two experts' groups in each of them (n_group removals) and stands for the mean of these similarities, so that all
    keep equally many.

    entropy: the guard against emptying one very redundant layer, in [0, 1]; 0 turns it off. Over the layers that are
    neither frozen nor at capacity, H is the entropy of their removals' distribution: once these are two per layer, and
    H / log(layers) is below `entropy`, the layer with most removals (of equals the lowest) is frozen as it is, and the
    others go on. If none is left before the budget is spent, the frozen ones thaw, the guard goes off, and a warning
    says so.

    who: which experts leave. "groups": all of a group but its best. "scores": the layer's lowest, so that only how many
    leave each layer is GRAPE's; for models whose similar experts are not the dispensable ones.

    merge: kept experts become the average of their group, weighted by the scores (equally where all are zero), in
    `PruningPlan.merges`; a protected one stays as it is.

    Everything from the linkage on is our choice; the entropy guard is arXiv 2604.06542's idea. Raises ValueError for an
    entropy outside [0, 1], an unknown `who`, a sparsity that cannot be, merge=True with negative scores or without
    groups, layers with different numbers of router groups, or similarities that do not fit the scores.
    """
    scores = ExpertScores.wrap(scores)
    capacities, steps = _limits(scores, sparsity, entropy, who, merge)
    if set(similarities) != set(scores):
        raise ValueError(f"similarities are of layers {sorted(similarities)}, scores of layers {sorted(scores)}")
    linkages = {layer: _linkages(layer, similarities[layer], scores) for layer in scores}
    _merge(linkages, capacities, steps, entropy)
    if who == "scores":
        left = {layer: sum(len(linkage.groups) for linkage in parts) for layer, parts in linkages.items()}
        pruned = {layer: shape.num_experts - left[layer] for layer, shape in scores.shapes.items()}
        return PruningPlan.from_pruned_counts(scores, pruned)
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
    return PruningPlan(kept, num_experts, scores.model, scores.criterion, merges)


def _limits(scores: ExpertScores, sparsity: float, entropy: float, who: str, merge: bool) -> tuple[dict[int, int], int]:
    """{layer: steps it can take} and steps to take in all; refuses what cannot be planned."""
    if who not in WHO:
        raise ValueError(f"unknown who={who!r}; choose from {', '.join(WHO)}")
    if merge and who != "groups":
        raise ValueError("only groups can be merged: merge needs who='groups'")
    if not 0 <= entropy <= 1:
        raise ValueError(f"entropy is a share of the greatest possible one, in [0, 1]; got {entropy}")
    if merge and (negative := [layer for layer, values in scores.items() if bool((values < 0).any())]):
        raise ValueError(f"merge=True weights experts by their scores, which are negative in layers {negative}")
    _, capacities, steps = in_units(scores, sparsity)
    return capacities, steps


def _shares(group: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    total = math.fsum(values[expert] for expert in group)
    return {expert: values[expert] / total if total > 0 else 1 / len(group) for expert in group}


class _Linkage:
    """Average linkage among the experts of one router group of a layer.

    groups: {lowest expert id: the group's ids}. closest: similarity and places of the two most similar groups, of
    equals the lowest ids; -inf where no two may be merged.
    """

    def __init__(self, similarity: np.ndarray, first: int, protected: frozenset[int]) -> None:
        self._table, self._first = similarity.copy(), first
        apart = [expert - first for expert in protected if 0 <= expert - first < len(similarity)]
        self._table[np.ix_(apart, apart)] = -np.inf  # and so is the mean of pairs with such a one among them
        np.fill_diagonal(self._table, -np.inf)
        self.groups = {first + i: [first + i] for i in range(len(similarity))}
        self.closest = self._find()

    def _find(self) -> tuple[float, int, int]:
        i, j = divmod(int(self._table.argmax()), len(self._table))  # the first of equals, so i < j
        return float(self._table[i, j]), i, j

    def merge(self) -> None:
        """Makes one group of the two most similar ones."""
        _, i, j = self.closest
        one, other = self.groups[self._first + i], self.groups.pop(self._first + j)
        mean = (len(one) * self._table[i] + len(other) * self._table[j]) / (len(one) + len(other))
        self._table[i], self._table[:, i] = mean, mean
        self._table[j], self._table[:, j] = -np.inf, -np.inf
        one += other
        self.closest = self._find()


def _linkages(layer: int, similarity: Tensor, scores: ExpertScores) -> list[_Linkage]:
    """One per router group."""
    shape, table = scores.shapes[layer], torch.as_tensor(similarity).detach().to("cpu", torch.float64).numpy()
    if table.shape != (shape.num_experts, shape.num_experts):
        raise ValueError(f"layer {layer}: similarities {list(table.shape)} do not fit its {shape.num_experts} experts")
    if not np.isfinite(table).all() or not np.allclose(table, table.T, rtol=0, atol=1e-6):
        raise ValueError(f"layer {layer}: similarities must be finite and symmetric")
    size, protected = shape.num_experts // shape.n_group, scores.protected.get(layer, frozenset())
    starts = range(0, shape.num_experts, size)
    return [_Linkage(table[start : start + size, start : start + size], start, protected) for start in starts]


def _merge(
    linkages: Mapping[int, Sequence[_Linkage]], capacities: Mapping[int, int], steps: int, entropy: float
) -> None:
    """Takes so many steps, each in the layer whose closest groups are the most similar of all."""
    removed = dict.fromkeys(linkages, 0)
    frozen: set[int] = set()

    def unfrozen() -> list[int]:
        return [layer for layer, count in removed.items() if layer not in frozen and count < capacities[layer]]

    for step in range(steps):
        if not (layers := unfrozen()):
            warnings.warn(
                f"the entropy guard ({entropy:g}) froze every layer after {step} of {steps} steps; the rest is removed "
                "without it: lower `entropy` or the sparsity",
                stacklevel=3,
            )
            frozen, entropy = set(), 0.0
            layers = unfrozen()
        chosen = max(layers, key=lambda layer: sum(linkage.closest[0] for linkage in linkages[layer]))
        for linkage in linkages[chosen]:
            linkage.merge()
        removed[chosen] += 1
        if layers := unfrozen():
            counts = [removed[layer] for layer in layers]
            if sum(counts) >= 2 * len(counts) and _evenness(counts) < entropy:
                frozen.add(max(layers, key=removed.__getitem__))


def _evenness(counts: Sequence[int]) -> float:
    """Entropy of a distribution over layers as a share of the greatest possible; 1 for a single layer."""
    shares = [count / sum(counts) for count in counts if count]
    return -sum(p * math.log(p) for p in shares) / math.log(len(counts)) if len(counts) > 1 else 1.0
