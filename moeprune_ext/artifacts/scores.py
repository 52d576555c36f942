"""A score per expert, higher = keep: the data class and its file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.files import reading_json, write_json

FORMAT = "moeprune.scores/1"


@dataclass(frozen=True)
class ExpertScores(Mapping[int, Tensor]):
    """A mapping {decoder layer: float64 [E]}, higher = keep, that knows the routers it is for.

    Attributes:
        values_by_layer: {decoder layer: float64 [E]}, finite.
        shapes: {decoder layer: LayerShape}; min_kept is raised where more experts are to stay than the router needs;
            step and max_kept are limits that a user sets.
        criterion: its name, None when unknown.
        model: fingerprint of the model, None when unknown.
        protected: {decoder layer: ids of experts that no plan may remove, whatever they score}.
        mtp: {multi-token-prediction layer: its experts' ids, the first to be pruned first}, numbered on from the last
            decoder layer; plans carry it, and no search counts these layers.
    """

    values_by_layer: dict[int, Tensor]
    shapes: dict[int, LayerShape]
    criterion: str | None = None
    model: str | None = None
    protected: dict[int, frozenset[int]] = field(default_factory=dict)
    mtp: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values_by_layer:
            raise ValueError("there are no scores: the mapping of layers is empty")
        for layer, values in self.values_by_layer.items():
            if values.shape != (self.shapes[layer].num_experts,):
                raise ValueError(
                    f"layer {layer}: expected {self.shapes[layer].num_experts} scores, got shape {tuple(values.shape)}"
                )
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"layer {layer}: scores must be finite")
        shapes = dict(self.shapes)
        for layer, ids in self.protected.items():
            shape = shapes.get(layer)
            if shape is None or not all(0 <= expert < shape.num_experts for expert in ids):
                raise ValueError(f"layer {layer}: there are no such experts to protect: {sorted(ids)}")
            group_size = shape.num_experts // shape.n_group
            fullest = max(sum(expert // group_size == group for expert in ids) for group in range(shape.n_group))
            shapes[layer] = replace(shape, min_kept=max(shape.min_kept, shape.n_group * fullest))
        for layer, shape in shapes.items():
            if shape.least_kept > shape.most_kept and (shape.step, shape.max_kept) != (1, None):
                needed = shape.min_kept if shape.prunable else shape.num_experts
                most = "" if shape.max_kept is None else f"at most {shape.max_kept}, "
                raise ValueError(
                    f"layer {layer} cannot keep at least {needed} of its {shape.num_experts} experts (needed by the "
                    f"router, protected or asked for), {most}in multiples of {shape.unit}: the least number is "
                    f"{shape.least_kept}, the largest {shape.most_kept}"
                )
        object.__setattr__(self, "shapes", shapes)  # so that no capacity asks for a protected expert

    def __getitem__(self, layer: int) -> Tensor:
        return self.values_by_layer[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.values_by_layer)

    def __len__(self) -> int:
        return len(self.values_by_layer)

    @property
    def top_k(self) -> int:
        """Experts selected per token (the most of any layer)."""
        return max(shape.top_k for shape in self.shapes.values())

    @property
    def n_group(self) -> int:
        """Groups of the router, 1 when it is not group-limited (the most of any layer)."""
        return max(shape.n_group for shape in self.shapes.values())

    def pruning_order(self, layer: int) -> list[int]:
        """Returns a layer's expert ids, the first to be pruned first."""
        protected = self.protected.get(layer, frozenset())
        return pruning_order(self[layer], self.shapes[layer].n_group, protected)

    def constrained(
        self,
        *,
        min_kept: int = 0,
        min_kept_per_group: int = 0,
        multiple_of: int = 1,
        max_kept: int | None = None,
        protect: Mapping[int, Iterable[int]] | None = None,
    ) -> ExpertScores:
        """Returns the same scores for plans within these limits; what was asked for before stays.

        Args:
            min_kept: fewest experts that a plan keeps in a layer.
            min_kept_per_group: fewest experts that a plan keeps in each group of a group-limited router.
            multiple_of: every layer keeps a multiple of so many experts, such as the size of expert parallelism. A
                layer whose own number is none has to lose some.
            max_kept: most experts that a plan keeps in a layer; None: all.
            protect: {decoder layer: ids of experts that no plan may remove}; `super_experts` finds some.

        Raises:
            ValueError: if a layer has fewer experts than it is to keep, or no number of experts is within all limits.
        """
        if multiple_of < 1 or (max_kept is not None and max_kept < 1):
            raise ValueError(f"multiple_of and max_kept are at least 1; got {multiple_of} and {max_kept}")
        protected = {
            layer: self.protected.get(layer, frozenset()) | frozenset((protect or {}).get(layer, ()))
            for layer in sorted({*self.protected, *(protect or {})})
        }
        shapes = {}
        for layer, shape in self.shapes.items():
            fewest = max(shape.min_kept, min_kept, shape.n_group * min_kept_per_group)
            if fewest > shape.num_experts:
                raise ValueError(
                    f"layer {layer} has {shape.num_experts} experts in {shape.n_group} groups and cannot keep {fewest}"
                )
            most = min((limit for limit in (shape.max_kept, max_kept) if limit is not None), default=None)
            shapes[layer] = replace(shape, min_kept=fewest, step=lcm(shape.step, multiple_of), max_kept=most)
        return replace(self, shapes=shapes, protected={layer: ids for layer, ids in protected.items() if ids})

    @classmethod
    def wrap(
        cls,
        scores: ExpertScores | Mapping[int, Tensor],
        *,
        top_k: int = 1,
        n_group: int = 1,
        shapes: Mapping[int, LayerShape] | None = None,
        model: str | None = None,
    ) -> ExpertScores:
        """Makes ExpertScores of a plain mapping; ExpertScores are returned as they are.

        Args:
            scores: ExpertScores, or {decoder layer: [E]}, for which the other arguments are.
            top_k: experts that every router selects per token, where `shapes` is None.
            n_group: groups of every router, where `shapes` is None.
            shapes: {decoder layer: LayerShape}, of the same layers as the scores.
            model: fingerprint of the model.

        Raises:
            ValueError: if the scores are no mapping, or do not fit the routers.
        """
        if isinstance(scores, ExpertScores):
            return scores
        if not isinstance(scores, Mapping):
            raise ValueError(f"scores must be a mapping {{layer: one score per expert}}, got {type(scores).__name__}")
        values = {int(layer): torch.as_tensor(v, dtype=torch.float64) for layer, v in sorted(scores.items())}
        if shapes is None:
            shapes = {}
            for layer, v in values.items():
                if v.ndim != 1 or len(v) % n_group:
                    raise ValueError(f"layer {layer}: {tuple(v.shape)} scores do not fit {n_group} equal groups")
                per_group = -(-top_k // n_group)
                shapes[layer] = LayerShape(len(v), top_k, n_group, min_kept=n_group * per_group)
        elif missing := sorted(set(values) ^ set(shapes)):
            raise ValueError(f"scores and the model's MoE layers differ at layers {missing}")
        return cls(values, dict(shapes), None, model)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "format": FORMAT,
            "criterion": self.criterion,
            "model": self.model,
            "shapes": {str(layer): shape.recorded() for layer, shape in self.shapes.items()},
            "scores": {str(layer): values.tolist() for layer, values in self.items()},
            "protected": {str(layer): sorted(ids) for layer, ids in self.protected.items()},
        } | ({"mtp": {str(layer): order for layer, order in self.mtp.items()}} if self.mtp else {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExpertScores:
        """Reads what `as_json` returned."""
        values = {int(k): torch.tensor(v, dtype=torch.float64) for k, v in content["scores"].items()}
        shapes = {int(k): LayerShape(**v) for k, v in content["shapes"].items()}
        protected = {int(k): frozenset(map(int, v)) for k, v in content.get("protected", {}).items()}
        mtp = {int(k): [int(expert) for expert in v] for k, v in content.get("mtp", {}).items()}
        return cls(values, shapes, content.get("criterion"), content.get("model"), protected, mtp)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, beside the target and then renamed."""
        write_json(path, self.as_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertScores:
        """Reads scores; raises ValueError if the file holds none."""
        with reading_json(path, FORMAT, "file of expert scores") as content:
            return cls.from_json(content)


def pruning_order(values: Tensor, n_group: int = 1, protected: frozenset[int] = frozenset()) -> list[int]:
    """Orders experts: the lowest score goes first, of equals the higher id; protected ones go after all others.

    With groups there is one ranking per group, interleaved rank by rank, so that every prefix of a multiple of n_group
    takes equally many from each group (our choice).

    Args:
        values: [E], scores.
        n_group: groups of the router that must keep equally many.
        protected: ids of experts that no plan may remove.

    Returns:
        Expert ids, first to be pruned first.
    """
    group_size, numbers = len(values) // n_group, values.tolist()
    rankings = [
        sorted(
            range(group * group_size, (group + 1) * group_size),
            key=lambda expert: (expert in protected, numbers[expert], -expert),
        )
        for group in range(n_group)
    ]
    return [ranking[rank] for rank in range(group_size) for ranking in rankings]
