"""Which experts each layer keeps: the pruning order inside a layer, the budget across layers, and the plan as a file.

Every allocation method (uniform, EvoESAP, GRAPE) decides how many experts each layer loses; a criterion's scores
decide which. Because the order is fixed, kept sets are nested and a layer's mask is one integer. Source: EvoESAP,
arXiv 2603.06003.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from moeprune_ext.artifacts.merged_plan import MergedPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.files import read_json, write_text

FORMAT = "moeprune.plan/1"


@dataclass(frozen=True)
class PruningPlan:
    """The experts that survive.

    kept: {decoder layer: ascending expert ids}. num_experts: {decoder layer: experts before pruning}. model:
    fingerprint of the model the plan was made for, None when unknown. criterion: name of the scores behind the order,
    for the record. merged: {decoder layer: {kept expert: {expert: share}}}, kept experts whose weights become this sum
    of experts' weights, the shares adding up to 1; the others stay as they are. active: experts that every router
    selects per token, None: as many as the model's do.
    """

    kept: dict[int, list[int]]
    num_experts: dict[int, int]
    model: str | None = None
    criterion: str | None = None
    merged: dict[int, dict[int, dict[int, float]]] = field(default_factory=dict)
    active: int | None = None

    def __post_init__(self) -> None:
        if not self.kept:
            raise ValueError("a plan needs at least one layer")
        if set(self.kept) != set(self.num_experts):
            raise ValueError("a plan's `kept` and `num_experts` must name the same layers")
        for layer, ids in self.kept.items():
            count = self.num_experts[layer]
            if not ids or sorted(set(ids)) != list(ids) or ids[0] < 0 or ids[-1] >= count:
                raise ValueError(f"layer {layer}: kept ids must be ascending, distinct and in [0, {count}), got {ids}")
        if self.active is not None and not 1 <= self.active <= min(map(len, self.kept.values())):
            raise ValueError(f"a plan cannot have {self.active} experts active per token with those it keeps")
        for layer, sums in self.merged.items():
            if layer not in self.kept:
                raise ValueError(f"a plan merges experts of layer {layer}, which it does not name")
            for expert, shares in sums.items():
                known = expert in self.kept[layer] and all(0 <= e < self.num_experts[layer] for e in shares)
                if (
                    not known
                    or min(shares.values(), default=-1) < 0
                    or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6)
                ):
                    raise ValueError(
                        f"layer {layer}: expert {expert} cannot be merged from {shares}: it must be a kept one, the "
                        "others experts of its layer, and their shares not negative and 1 in all"
                    )

    @property
    def pruned_counts(self) -> dict[int, int]:
        return {layer: self.num_experts[layer] - len(ids) for layer, ids in self.kept.items()}

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps equally many experts, so that a stock configuration can describe the result."""
        return len({len(ids) for ids in self.kept.values()}) == 1

    @property
    def sparsity(self) -> float:
        """Share of the routed experts that the plan removes."""
        return sum(self.pruned_counts.values()) / sum(self.num_experts.values())

    @classmethod
    def from_pruned_counts(cls, scores: ExpertScores | Mapping[int, Tensor], pruned: Mapping[int, int]) -> PruningPlan:
        """The plan that removes the `pruned[layer]` lowest-scoring experts of each layer (layers not named lose none).

        Ties: the higher expert id goes first. With a plain mapping only the counts are checked against the number of
        experts; the evaluator checks the plan against its model. Raises ValueError for a count that cannot be.
        """
        scores = ExpertScores.wrap(scores)
        if unknown := sorted(set(pruned) - set(scores)):
            raise ValueError(f"there are no scores for layers {unknown}; the scored layers are {sorted(scores)}")
        kept = {}
        for layer, values in scores.items():
            count, shape = int(pruned.get(layer, 0)), scores.shapes[layer]
            if not 0 <= count <= shape.capacity:
                raise ValueError(
                    f"layer {layer}: cannot prune {count} of {shape.num_experts} experts; the router needs "
                    f"{shape.min_kept}, so 0 to {shape.capacity} can go"
                )
            if count % shape.n_group:
                below = count // shape.n_group * shape.n_group
                raise ValueError(
                    f"layer {layer}: cannot prune {count} experts from {shape.n_group} groups that must stay equal; "
                    f"prune {below} or {below + shape.n_group}"
                )
            gone = set(pruning_order(values, shape.n_group, scores.protected.get(layer, frozenset()))[:count])
            kept[layer] = [expert for expert in range(shape.num_experts) if expert not in gone]
        num_experts = {layer: shape.num_experts for layer, shape in scores.shapes.items()}
        return cls(kept, num_experts, scores.model, scores.criterion)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, beside the target and then renamed."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model,
            "criterion": self.criterion,
            "sparsity": round(self.sparsity, 6),
            "num_experts": {str(layer): n for layer, n in self.num_experts.items()},
            "kept": {str(layer): ids for layer, ids in self.kept.items()},
        }
        if self.active is not None:
            content["active"] = self.active
        if self.merged:
            content["merged"] = {
                str(layer): {
                    str(expert): {str(e): share for e, share in shares.items()} for expert, shares in sums.items()
                }
                for layer, sums in self.merged.items()
            }
        write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads a plan; raises ValueError for a file that is not one."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a pruning plan (a JSON file with format {FORMAT!r})")
        try:
            kept = {int(layer): [int(e) for e in ids] for layer, ids in content["kept"].items()}
            num_experts = {int(layer): int(n) for layer, n in content["num_experts"].items()}
            merged = {
                int(layer): {int(k): {int(e): float(share) for e, share in v.items()} for k, v in sums.items()}
                for layer, sums in content.get("merged", {}).items()
            }
            active = None if content.get("active") is None else int(content["active"])
            return cls(kept, num_experts, content.get("model"), content.get("criterion"), merged, active)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is a damaged pruning plan: {error}") from None


class HasPlan(Protocol):
    """A search's result, which may stand wherever its plan may: its `best_plan`, where it has one."""

    @property
    def plan(self) -> PruningPlan: ...


Plan = PruningPlan | MergedPlan


def plan_of(plan: Plan | HasPlan) -> Plan:
    """What is meant by a plan or a result of a search."""
    if isinstance(plan, PruningPlan | MergedPlan):
        return plan
    best: Plan | None = getattr(plan, "best_plan", None)
    return plan.plan if best is None else best


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a file of either kind of plan; raises ValueError for one that is neither."""
    try:
        with open(path, "rb") as file:
            is_json = file.read(64).lstrip()[:1] == b"{"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return PruningPlan.load(path) if is_json else MergedPlan.load(path)


def pruning_order(values: Tensor, n_group: int = 1, protected: frozenset[int] = frozenset()) -> list[int]:
    """Expert ids, first to be pruned first: the lowest score, ties the higher id; protected experts after all others.

    With groups: one ranking per group, interleaved rank by rank, so every prefix of a multiple of n_group takes equally
    many from each group (our choice).
    """
    count = len(values)
    size = count // n_group
    numbers = values.tolist()
    rankings = [
        sorted(range(g * size, (g + 1) * size), key=lambda expert: (expert in protected, numbers[expert], -expert))
        for g in range(n_group)
    ]
    return [ranking[place] for place in range(size) for ranking in rankings]
