"""Candidates by common beginnings: those that agree up to a layer share one state there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan, Treatment
from moeprune_ext.models.layers import MoeLayer


def treatments(layers: Mapping[int, MoeLayer], plan: PruningPlan | None = None) -> dict[int, Treatment]:
    """Returns what a plan does to each MoE layer, {decoder layer: Treatment}; None leaves all as they are."""
    full = {index: Treatment(tuple(range(layer.shape.num_experts))) for index, layer in layers.items()}
    if plan is None:
        return full
    return full | {index: Treatment(tuple(kept), plan.merges.get(index)) for index, kept in plan.kept.items()}


@dataclass(frozen=True)
class Level:
    """The states after one MoE layer: one for each distinct choice of treatments up to it.

    Attributes:
        parent: int64 [M], the state before the layer that each comes from, ascending.
        treatment: int64 [M], its treatment, a number in `treatments`.
        treatments: those of this layer.
    """

    parent: Tensor
    treatment: Tensor
    treatments: tuple[Treatment, ...]

    @property
    def merging(self) -> list[Treatment]:
        """The treatments that merge experts."""
        return [treatment for treatment in self.treatments if treatment.merge is not None]

    def states_of(self, merging: Treatment | None) -> Tensor:
        """int64, ascending: the states of a treatment that merges; None: those of all masks."""
        chosen = [merging is t or (merging is None and t.merge is None) for t in self.treatments]
        return torch.tensor(chosen)[self.treatment].nonzero()[:, 0]

    def times(self, sequences: int, states_before: int) -> Level:
        """Returns the level of several sequences, the states of one after those of the other.

        Args:
            sequences: how many.
            states_before: states of one sequence in front of the layer.
        """
        if sequences == 1:
            return self
        offsets = torch.arange(sequences)[:, None] * states_before
        return Level((self.parent + offsets).flatten(), self.treatment.repeat(sequences), self.treatments)


@dataclass(frozen=True)
class Tree:
    """Candidates by common beginnings.

    Attributes:
        levels: {decoder layer: Level}.
        leaf: int64 [C], the state after the last layer that is each candidate's.
    """

    levels: dict[int, Level]
    leaf: Tensor

    @property
    def states(self) -> int:
        """Most states alive at once."""
        return max(len(level.parent) for level in self.levels.values())


def grow(candidates: Sequence[Mapping[int, Treatment]]) -> Tree:
    """Makes the tree of candidates, each {decoder layer: Treatment} of the same layers, in their order.

    The tree does not depend on the order of the candidates.
    """
    layers = list(candidates[0])
    keys = [tuple(candidate[layer] for layer in layers) for candidate in candidates]
    distinct = sorted(set(keys), key=lambda key: [treatment.order for treatment in key])
    levels: dict[int, Level] = {}
    before = [0] * len(distinct)
    for depth, layer in enumerate(layers):
        of_layer = tuple(dict.fromkeys(key[depth] for key in distinct))
        number_of = {treatment: number for number, treatment in enumerate(of_layer)}
        states = dict.fromkeys(key[: depth + 1] for key in distinct)
        state_of = {prefix: number for number, prefix in enumerate(states)}
        now = [state_of[key[: depth + 1]] for key in distinct]
        parent = dict(zip(now, before, strict=True))
        levels[layer] = Level(
            torch.tensor([parent[number] for number in range(len(states))]),
            torch.tensor([number_of[prefix[-1]] for prefix in states]),
            of_layer,
        )
        before = now
    leaves = {key: number for number, key in enumerate(distinct)}
    return Tree(levels, torch.tensor([leaves[key] for key in keys]))
