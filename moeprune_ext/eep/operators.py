"""What EEP searches, and how one candidate is made of others.

A candidate has two matrices with k' rows (experts kept) and E columns for each layer, or group of layers:

    expert merging W_EM:  w'_i = sum_j W_EM[i, j] * w_j        router mapping W_RM:  pi = scores @ W_RM^T

Phase 1 searches masks: rows one-hot and distinct, W_RM = W_EM (`random_mask`, `mutate_mask`). Phase 2 lets both
matrices become real (`merge_child`, `normalized`). Pure data and functions of a generator, without a model. Source:
EEP, arXiv 2407.00945; what its text leaves open follows its released code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from moeprune_ext.files import replacing

FORMAT = "moeprune.eep/1"


SMALLEST_SUM = 1e-3  # a row of W_EM whose sum is nearer to zero is not divided by it (our choice)


Matrix = npt.NDArray[np.float32]


Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layout:
    """groups: the layers that share matrices. num_experts, keep: E and k' of each group. n_group: the router's groups
    of experts there, each of which keeps as many; () where no router has groups."""

    groups: Groups
    num_experts: tuple[int, ...]
    keep: tuple[int, ...]
    n_group: tuple[int, ...] = ()

    @property
    def router_groups(self) -> tuple[int, ...]:
        return self.n_group or (1,) * len(self.groups)

    def by_layer(self, values: Sequence[int]) -> dict[int, int]:
        """A value for each group of layers, such as `keep`, as {decoder layer: value}."""
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
        """The layout of layers {decoder layer: E} that keep so many experts, each on its own unless grouped.

        n_group: {decoder layer: groups of its router}, None: without groups. Raises ValueError for less than one or
        more than E experts to keep, for numbers that a router's groups cannot share equally, for layer_groups that do
        not name every layer once, and for layers in one that differ in E, k' or n_group.
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


@dataclass(frozen=True, eq=False)
class Candidate:
    """Two float32 matrices [k', E] for every group of layers, read-only.

    merging: W_EM, mapping: W_RM, both in the order of `groups`. Equal, and of one hash, are candidates with the same
    rows in any order: they compute the same function.
    """

    groups: Groups
    merging: tuple[Matrix, ...]
    mapping: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if not len(self.groups) == len(self.merging) == len(self.mapping):
            raise ValueError("a candidate needs two matrices for every group of layers")
        layers = [layer for group in self.groups for layer in group]
        if not all(self.groups) or len(set(layers)) < len(layers):
            raise ValueError(f"a candidate's groups must name each layer once, got {self.groups}")
        object.__setattr__(self, "merging", tuple(map(_frozen, self.merging)))
        object.__setattr__(self, "mapping", tuple(map(_frozen, self.mapping)))
        for group, merging, mapping in zip(self.groups, self.merging, self.mapping, strict=True):
            if merging.shape != mapping.shape or merging.ndim != 2 or not 1 <= len(merging) <= merging.shape[1]:
                raise ValueError(
                    f"layers {list(group)}: both matrices must be [experts kept, experts], got {merging.shape} and "
                    f"{mapping.shape}"
                )
            if not (np.isfinite(merging).all() and np.isfinite(mapping).all()):
                raise ValueError(f"layers {list(group)}: a matrix is not finite")

    @classmethod
    def of_mask(cls, layout: Layout, rows: Sequence[Sequence[int]]) -> Candidate:
        """The candidate that keeps these distinct experts, per group, in the order of its rows."""
        matrices = tuple(_one_hot(ids, count) for ids, count in zip(rows, layout.num_experts, strict=True))
        return cls(layout.groups, matrices, matrices)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content, whatever the order of rows."""
        digest = hashlib.sha256(json.dumps(self.groups).encode())
        for merging, mapping in zip(self.merging, self.mapping, strict=True):
            digest.update(json.dumps(merging.shape).encode())
            for row in sorted(a.tobytes() + b.tobytes() for a, b in zip(merging, mapping, strict=True)):
                digest.update(row)
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def is_pruning(self) -> bool:
        """Whether the candidate is a mask: every row one-hot, experts distinct, W_RM = W_EM."""
        return all(
            np.array_equal(merging, mapping)
            and bool(np.isin(merging, (0, 1)).all() and (merging.sum(1) == 1).all() and (merging.sum(0) <= 1).all())
            for merging, mapping in zip(self.merging, self.mapping, strict=True)
        )

    @property
    def kept(self) -> dict[int, list[int]]:
        """{decoder layer: ascending ids of the experts kept}; ValueError when the candidate is no mask."""
        if not self.is_pruning:
            raise ValueError("this candidate merges experts, so it has no set of kept ones")
        ids = [sorted(matrix.argmax(1).tolist()) for matrix in self.merging]
        return {layer: list(ids[at]) for layer, at in self._places}

    @property
    def merge_map(self) -> dict[int, Tensor]:
        """{decoder layer: W_EM, float32 [k', E]}; layers of a group share the tensor."""
        tensors = [torch.tensor(matrix) for matrix in self.merging]
        return {layer: tensors[at] for layer, at in self._places}

    @property
    def router_map(self) -> dict[int, Tensor]:
        """{decoder layer: W_RM, float32 [k', E]}; layers of a group share the tensor."""
        tensors = [torch.tensor(matrix) for matrix in self.mapping]
        return {layer: tensors[at] for layer, at in self._places}

    @property
    def _places(self) -> list[tuple[int, int]]:
        return sorted((layer, at) for at, group in enumerate(self.groups) for layer in group)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors, beside the target and then renamed."""
        tensors = {f"merging.{at}": matrix for at, matrix in enumerate(self.merging)}
        tensors |= {f"mapping.{at}": matrix for at, matrix in enumerate(self.mapping)}
        with replacing(path) as beside:
            save_file(tensors, beside, {"format": FORMAT, "groups": json.dumps(self.groups)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Candidate:
        """Reads a candidate; raises ValueError for a file that is not one."""
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"it is not a safetensors file of format {FORMAT!r}")
                groups = tuple(tuple(int(layer) for layer in group) for group in json.loads(metadata["groups"]))
                names = [[f"{kind}.{at}" for at in range(len(groups))] for kind in ("merging", "mapping")]
                merging, mapping = (tuple(file.get_tensor(name) for name in row) for row in names)
            return cls(groups, merging, mapping)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable EEP candidate: {error}") from None


def _frozen(matrix: Matrix) -> Matrix:
    """The same object where it is read-only already, so that a child shares its parent's."""
    if matrix.dtype != np.float32 or matrix.flags.writeable:
        matrix = np.array(matrix, np.float32, order="C")
        matrix.setflags(write=False)
    return matrix


def _one_hot(ids: Sequence[int], num_experts: int) -> Matrix:
    matrix = np.zeros((len(ids), num_experts), np.float32)
    matrix[np.arange(len(ids)), list(ids)] = 1
    return _frozen(matrix)


# ---- where a search starts


def random_mask(layout: Layout, rng: np.random.Generator) -> Candidate:
    """k' of E experts per group of layers, every set equally likely; as many of each group of a router."""
    rows = []
    for num_experts, keep, parts in zip(layout.num_experts, layout.keep, layout.router_groups, strict=True):
        size = num_experts // parts
        drawn = [rng.choice(size, keep // parts, replace=False) + start for start in range(0, num_experts, size)]
        rows.append(sorted(np.concatenate(drawn).tolist()))
    return Candidate.of_mask(layout, rows)


def given_mask(layout: Layout, kept: Mapping[int, Sequence[int]], name: str = "the mask") -> Candidate:
    """The candidate that keeps {decoder layer: ids}; ValueError, naming it, where it does not fit the layout."""
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
    return Candidate.of_mask(layout, rows)


def criterion_mask(layout: Layout, scores: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """{decoder layer: ids}: in each group the k' experts of highest score; ties: the lower id stays. Of a router with
    groups each keeps its best.

    scores: {decoder layer: [E]}, higher = keep. Layers of a group add up, each divided by the mean magnitude of its
    scores (our choice), so that a layer of large activations does not decide alone.
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


def mutate_mask(
    parent: Candidate,
    rng: np.random.Generator,
    n_group: Sequence[int] | None = None,
    *,
    touch: float = 0.25,
    redraw: float = 0.15,
) -> Candidate:
    """A mask like its parent, a mask, but for some rows.

    A matrix is touched with probability `touch`, at least one always is; each row of a touched one is re-drawn with
    probability `redraw`, among the experts that no other row has, its own included (as in the released code). Matrices
    without a change are the parent's. n_group: of each matrix, the groups of the router, of which a re-drawn row stays
    in its own (our choice); None: without groups.
    """
    matrices = list(parent.merging)
    for at in np.flatnonzero(_touched(np.full(len(matrices), touch), rng)).tolist():
        ids, num_experts = matrices[at].argmax(1).tolist(), matrices[at].shape[1]
        size = num_experts // (n_group[at] if n_group is not None else 1)
        before = list(ids)
        for row in np.flatnonzero(rng.random(len(ids)) < redraw):
            first = ids[row] // size * size
            free = sorted(set(range(first, first + size)) - set(ids) | {ids[row]})
            ids[row] = free[rng.integers(len(free))]
        if ids != before:
            matrices[at] = _one_hot(ids, num_experts)
    return Candidate(parent.groups, tuple(matrices), tuple(matrices))


def _touched(probabilities: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Independent draws, repeated until one comes up."""
    while not (drawn := rng.random(len(probabilities)) < probabilities).any():
        pass
    return drawn


# ---- phase 2: merging


def merge_child(
    first: Candidate,
    second: Candidate | None,
    rng: np.random.Generator,
    *,
    touch_merging: float = 0.25,
    touch_mapping: float = 0.25,
    from_first: float = 0.6,
    change: float = 0.25,
    scale: float = 0.065,
) -> Candidate:
    """A copy of `first`, or a cross of `first` and `second`, with noise in some matrices.

    Every W_EM is touched with probability `touch_merging` and every W_RM with `touch_mapping`, at least one in all. A
    cross takes each row of a touched matrix, and each untouched matrix whole, from the first with probability
    `from_first`, else from the second. Then each entry of a touched matrix changes, with probability `change`, by
    N(0, scale^2).
    """
    count = len(first.groups)
    touched = _touched(np.repeat([touch_merging, touch_mapping], count), rng)
    matrices = [*first.merging, *first.mapping]
    if second is not None:
        matrices = _cross(matrices, [*second.merging, *second.mapping], touched, rng, from_first)
    for at in np.flatnonzero(touched):
        noise = rng.normal(0, scale, matrices[at].shape) * (rng.random(matrices[at].shape) < change)
        matrices[at] = matrices[at] + noise.astype(np.float32)
    return Candidate(first.groups, tuple(matrices[:count]), tuple(matrices[count:]))


def _cross(
    first: Sequence[Matrix],
    second: Sequence[Matrix],
    touched: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    from_first: float,
) -> list[Matrix]:
    return [
        np.where(rng.random((len(a), 1)) < from_first, a, b) if row_by_row else a if rng.random() < from_first else b
        for a, b, row_by_row in zip(first, second, touched, strict=True)
    ]


def normalized(candidate: Candidate) -> Candidate:
    """The rows of every W_EM divided by their sums; a row whose sum is nearer to zero than SMALLEST_SUM stays as it is
    (our choice). Matrices whose rows all have sum 1 are the given ones."""
    return Candidate(candidate.groups, tuple(map(_rows_over_sums, candidate.merging)), candidate.mapping)


def _rows_over_sums(matrix: Matrix) -> Matrix:
    sums = np.array([math.fsum(row) for row in matrix.tolist()])  # exact, so alike on every machine
    sums[np.abs(sums) < SMALLEST_SUM] = 1
    return matrix if (sums == 1).all() else (matrix / sums[:, None]).astype(np.float32)
