"""What EEP searches, and how one candidate is made of others.

A candidate is a plan that merges in every layer: two matrices with k' rows (experts kept) and E columns for each layer,
or for each group of layers, which share them:

    expert merging W_EM:  w'_i = sum_j W_EM[i, j] * w_j        router mapping W_RM:  pi = scores @ W_RM^T

Phase 1 searches masks: rows one-hot and distinct, W_RM = W_EM (`random_mask`, `mutate_mask`). Phase 2 lets both
matrices become real (`merge_child`, `normalized`). No candidate changes once it is made, and a child's untouched
matrices are its parent's. `simplified` makes of a mask the plan that keeps experts as they are. Pure data and functions
of a generator, without a model. Source: EEP, arXiv 2407.00945; what its text leaves open follows its released code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moeprune_ext.artifacts.plan import Merge, PruningPlan
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.eep.settings import PUBLISHED, Rates

SMALLEST_SUM = 1e-3  # a row of W_EM whose sum is nearer to zero is not divided by it (our choice)


@dataclass(frozen=True)
class Layout:
    """Which layers share matrices, and how large these are.

    Attributes:
        groups: the layers that share matrices.
        num_experts: experts E of each group.
        keep: experts k' that each group keeps.
        n_group: groups of the router there, each of which keeps as many; () where no router has groups.
    """

    groups: tuple[tuple[int, ...], ...]
    num_experts: tuple[int, ...]
    keep: tuple[int, ...]
    n_group: tuple[int, ...] = ()

    @property
    def router_groups(self) -> tuple[int, ...]:
        """Groups of the router of each group of layers."""
        return self.n_group or (1,) * len(self.groups)

    def by_layer(self, values: Sequence[int]) -> dict[int, int]:
        """Turns a value for each group of layers, such as `keep`, into {decoder layer: value}."""
        pairs = zip(self.groups, values, strict=True)
        return dict(sorted((layer, value) for group, value in pairs for layer in group))

    @classmethod
    def of(
        cls,
        num_experts: Mapping[int, int],
        keep: int | Mapping[int, int],
        layer_groups: Sequence[Sequence[int]] | None = None,
        n_group: Mapping[int, int] | None = None,
    ) -> Layout:
        """Makes the layout of some layers.

        Args:
            num_experts: {decoder layer: E}.
            keep: experts k' that every layer keeps, or {decoder layer: k'}.
            layer_groups: the layers that share matrices; None: none do.
            n_group: {decoder layer: groups of its router}; None: without groups.

        Raises:
            ValueError: for less than one or more than E experts to keep, for numbers that a router's groups cannot
                share equally, for layer_groups that do not name every layer once, and for layers in one that differ in
                E, k' or n_group.
        """
        layers = sorted(num_experts)
        if not layers:
            raise ValueError("there are no layers to search")
        kept = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(layers, keep)
        if sorted(kept) != layers:
            raise ValueError(f"`keep` names layers {sorted(kept)}, the model has {layers}")
        parts = dict(n_group) if n_group is not None else dict.fromkeys(layers, 1)
        for layer in layers:
            if not 1 <= kept[layer] <= num_experts[layer] or kept[layer] != int(kept[layer]):
                raise ValueError(f"layer {layer} has {num_experts[layer]} experts and cannot keep {kept[layer]}")
            if kept[layer] % parts[layer]:
                raise ValueError(
                    f"layer {layer}: its router's {parts[layer]} groups cannot keep equally many of {kept[layer]} "
                    "experts; keep a multiple"
                )
        groups = [sorted(group) for group in layer_groups] if layer_groups is not None else [[one] for one in layers]
        if sorted(layer for group in groups for layer in group) != layers or not all(groups):
            raise ValueError(f"layer_groups must name every one of the layers {layers} once; got {groups}")
        groups.sort()
        for group in groups:
            if len(sizes := {(kept[layer], num_experts[layer], parts[layer]) for layer in group}) > 1:
                raise ValueError(
                    f"layers {group} cannot share matrices: they keep {sorted(sizes)} (kept, experts, groups of the "
                    "router); group layers of equal sizes"
                )
        firsts = [group[0] for group in groups]
        return cls(
            tuple(tuple(group) for group in groups),
            tuple(num_experts[layer] for layer in firsts),
            tuple(kept[layer] for layer in firsts),
            tuple(parts[layer] for layer in firsts) if any(parts[layer] > 1 for layer in layers) else (),
        )


# ---- a candidate's matrices


def candidate_of(layout: Layout, merging: Sequence[Tensor], mapping: Sequence[Tensor]) -> PruningPlan:
    """Makes a candidate of W_EM and W_RM, float32 [k', E] each, for every group of layers."""
    merges: dict[int, Merge] = {}
    for group, experts, router in zip(layout.groups, merging, mapping, strict=True):
        merges |= dict.fromkeys(group, Merge(experts, router))
    return PruningPlan.from_merges(dict(sorted(merges.items())), criterion="eep")


def merging_of(candidate: PruningPlan, layout: Layout) -> list[Tensor]:
    """Returns W_EM of every group of layers."""
    return [candidate.merges[group[0]].experts for group in layout.groups]


def mapping_of(candidate: PruningPlan, layout: Layout) -> list[Tensor]:
    """Returns W_RM of every group of layers."""
    routers = [candidate.merges[group[0]].router for group in layout.groups]
    return [router for router in routers if router is not None]


def fingerprint(candidate: PruningPlan, layout: Layout) -> str:
    """Identifies a candidate, whatever the order of its rows: the same rows compute the same function."""
    digest = hashlib.sha256(json.dumps(layout.groups).encode())
    for merging, mapping in zip(merging_of(candidate, layout), mapping_of(candidate, layout), strict=True):
        digest.update(json.dumps(tuple(merging.shape)).encode())
        rows = zip(merging.numpy(), mapping.numpy(), strict=True)
        for row in sorted(a.tobytes() + b.tobytes() for a, b in rows):
            digest.update(row)
    return digest.hexdigest()[:16]


def is_mask(candidate: PruningPlan) -> bool:
    """Tells whether a candidate only prunes: every row one-hot, experts distinct, W_RM = W_EM."""
    return all(
        merge.router is not None
        and torch.equal(merge.experts, merge.router)
        and bool(torch.isin(merge.experts, torch.tensor([0.0, 1.0])).all())
        and bool((merge.experts.sum(1) == 1).all() and (merge.experts.sum(0) <= 1).all())
        for merge in candidate.merges.values()
    )


def kept_by(candidate: PruningPlan) -> dict[int, list[int]]:
    """Returns {decoder layer: ascending ids of the experts kept} of a candidate that is a mask."""
    return {layer: sorted(merge.experts.argmax(1).tolist()) for layer, merge in candidate.merges.items()}


def simplified(
    candidate: PruningPlan, shapes: Mapping[int, LayerShape], model: str | None = None, active: int | None = None
) -> PruningPlan:
    """Makes the plan that a candidate stands for: the same merges, or the mask that keeps experts as they are.

    Args:
        candidate: of a search.
        shapes: of all MoE layers of the model; a mask's layers whose experts are looked up by token keep all.
        model: fingerprint of the model.
        active: experts per token; None: the model's.
    """
    if not is_mask(candidate):
        return PruningPlan.from_merges(candidate.merges, model, candidate.criterion, active)
    whole = {layer: list(range(shape.num_experts)) for layer, shape in shapes.items() if not shape.prunable}
    kept = dict(sorted((kept_by(candidate) | whole).items()))
    return PruningPlan(
        kept, {layer: shapes[layer].num_experts for layer in kept}, model, candidate.criterion, active=active
    )


def _mask_of(layout: Layout, rows: Sequence[Sequence[int]]) -> PruningPlan:
    """Makes the candidate that keeps these distinct experts of each group of layers, in the order of its rows."""
    matrices = [_one_hot(ids, count) for ids, count in zip(rows, layout.num_experts, strict=True)]
    return candidate_of(layout, matrices, matrices)


def _one_hot(ids: Sequence[int], num_experts: int) -> Tensor:
    matrix = torch.zeros(len(ids), num_experts)
    matrix[torch.arange(len(ids)), torch.tensor(list(ids))] = 1
    return matrix


# ---- where a search starts


def random_mask(layout: Layout, rng: np.random.Generator) -> PruningPlan:
    """Draws k' of E experts per group of layers, every set equally likely; as many of each group of a router."""
    rows = []
    for num_experts, keep, parts in zip(layout.num_experts, layout.keep, layout.router_groups, strict=True):
        size = num_experts // parts
        drawn = [rng.choice(size, keep // parts, replace=False) + start for start in range(0, num_experts, size)]
        rows.append(sorted(np.concatenate(drawn).tolist()))
    return _mask_of(layout, rows)


def given_mask(layout: Layout, kept: Mapping[int, Sequence[int]], name: str = "the mask") -> PruningPlan:
    """Makes the candidate that keeps {decoder layer: ids}; ValueError, naming it, where it does not fit the layout."""
    if sorted(kept) != sorted(layer for group in layout.groups for layer in group):
        raise ValueError(f"{name} is for layers {sorted(kept)}, the search for {layout.groups}")
    rows = []
    for group, num_experts, keep, parts in zip(
        layout.groups, layout.num_experts, layout.keep, layout.router_groups, strict=True
    ):
        ids = sorted(kept[group[0]])
        if any(sorted(kept[layer]) != ids for layer in group):
            raise ValueError(f"{name} keeps other experts in layer {group[0]} than in others of its group {group}")
        if len(set(ids)) != keep or len(ids) != keep or ids[0] < 0 or ids[-1] >= num_experts:
            raise ValueError(f"{name} must keep {keep} of {num_experts} experts in layer {group[0]}, got {ids}")
        if np.ptp(np.bincount(np.array(ids) // (num_experts // parts), minlength=parts)):
            raise ValueError(f"{name} must keep equally many experts of {parts} groups in layer {group[0]}, got {ids}")
        rows.append(ids)
    return _mask_of(layout, rows)


def criterion_mask(layout: Layout, scores: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """Keeps the k' experts of highest score in each group of layers; ties: the lower id stays.

    Layers of a group add up, each divided by the mean magnitude of its scores (our choice), so that a layer of large
    activations does not decide alone. Of a router with groups each keeps its best.

    Args:
        layout: of the search.
        scores: {decoder layer: [E]}, higher = keep.

    Returns:
        {decoder layer: ascending ids}.
    """
    kept: dict[int, list[int]] = {}
    for group, keep, parts in zip(layout.groups, layout.keep, layout.router_groups, strict=True):
        values = torch.stack([torch.as_tensor(scores[layer], dtype=torch.float64) for layer in group])
        if len(group) > 1:
            values = values / values.abs().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        by_part = values.sum(0).view(parts, -1)
        best = by_part.sort(descending=True, stable=True).indices[:, : keep // parts]
        ids = (best + torch.arange(parts)[:, None] * by_part.shape[1]).flatten().sort().values.tolist()
        kept |= {layer: ids for layer in group}
    return kept


# ---- phase 1: masks


def mutate_mask(parent: PruningPlan, layout: Layout, rng: np.random.Generator, rates: Rates = PUBLISHED) -> PruningPlan:
    """Makes a mask like its parent, a mask, but for some rows.

    A matrix is touched with probability `touch`, at least one always is; each row of a touched one is drawn again with
    probability `redraw`, among the experts that no other row has, its own included (as in the released code). Of a
    router with groups a row stays in its own (our choice).
    """
    matrices = merging_of(parent, layout)
    for at in np.flatnonzero(_touched(np.full(len(matrices), rates.touch), rng)).tolist():
        ids, num_experts = matrices[at].argmax(1).tolist(), matrices[at].shape[1]
        size = num_experts // layout.router_groups[at]
        before = list(ids)
        for row in np.flatnonzero(rng.random(len(ids)) < rates.redraw):
            first = ids[row] // size * size
            free = sorted(set(range(first, first + size)) - set(ids) | {ids[row]})
            ids[row] = free[rng.integers(len(free))]
        if ids != before:
            matrices[at] = _one_hot(ids, num_experts)
    return candidate_of(layout, matrices, matrices)


def _touched(probabilities: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draws independently, again until one comes up."""
    while not (drawn := rng.random(len(probabilities)) < probabilities).any():
        pass
    return drawn


# ---- phase 2: merging


def merge_child(
    parents: Sequence[PruningPlan], layout: Layout, rng: np.random.Generator, rates: Rates = PUBLISHED
) -> PruningPlan:
    """Makes a copy of one parent, or a cross of two, with noise in some matrices.

    Every W_EM is touched with probability `touch_merging` and every W_RM with `touch_mapping`, at least one in all. A
    cross takes each row of a touched matrix, and each untouched matrix whole, from the first with probability
    `from_first`, else from the second. Then each entry of a touched matrix changes, with probability `change`, by
    N(0, scale^2).
    """
    count = len(layout.groups)
    touched = _touched(np.repeat([rates.touch_merging, rates.touch_mapping], count), rng)
    matrices, *others = ([*merging_of(parent, layout), *mapping_of(parent, layout)] for parent in parents)
    for second in others:
        matrices = [
            _rows_of_both(a, b, rng, rates) if row_by_row else a if rng.random() < rates.from_first else b
            for a, b, row_by_row in zip(matrices, second, touched, strict=True)
        ]
    for at in np.flatnonzero(touched).tolist():
        shape = tuple(matrices[at].shape)
        noise = rng.normal(0, rates.scale, shape) * (rng.random(shape) < rates.change)
        matrices[at] = matrices[at] + torch.from_numpy(noise.astype(np.float32))
    return candidate_of(layout, matrices[:count], matrices[count:])


def _rows_of_both(first: Tensor, second: Tensor, rng: np.random.Generator, rates: Rates) -> Tensor:
    return torch.where(torch.from_numpy(rng.random((len(first), 1)) < rates.from_first), first, second)


def normalized(candidate: PruningPlan, layout: Layout) -> PruningPlan:
    """Divides the rows of every W_EM by their sums.

    A row whose sum is nearer to zero than SMALLEST_SUM stays as it is (our choice). Matrices whose rows all have sum 1
    are the given ones.
    """
    merging = [_rows_over_sums(matrix) for matrix in merging_of(candidate, layout)]
    return candidate_of(layout, merging, mapping_of(candidate, layout))


def _rows_over_sums(matrix: Tensor) -> Tensor:
    sums = np.array([math.fsum(row) for row in matrix.tolist()])  # exact, so alike on every machine
    sums[np.abs(sums) < SMALLEST_SUM] = 1
    return matrix if (sums == 1).all() else torch.from_numpy((matrix.numpy() / sums[:, None]).astype(np.float32))
