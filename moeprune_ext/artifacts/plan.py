"""A plan: which experts each layer keeps, which of them are sums of others, and how many are active per token.

Every method ends in one, and everything downstream starts from one: masks, evaluation, pruning, export. A mask keeps
experts as they are. A merge makes K' new experts of a layer's E: GRAPE's averages stand in the places of kept experts
(arXiv 2604.06542), EEP's stand behind a router that maps its scores to them (arXiv 2407.00945). A repair (repair/)
gives the new experts other down projections; these weights are in a safetensors file beside the plan's JSON.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.files import reading_json, replacing, write_json

FORMAT = "moeprune.plan/2"
DOWN_FORMAT = "moeprune.down/1"


@dataclass(frozen=True, eq=False)
class Merge:
    """What stands in the place of one layer's experts. Merges of the same content are equal.

    Attributes:
        experts: W_EM, float32 [K', E]: new expert i is the sum over j of experts[i, j] times the weights of expert j.
        router: W_RM, float32 [K', E]: the router maps its scores s to pi = s @ W_RM^T and chooses among the K' (see
            `masked_router(router_map=...)`). None: the router is sliced to the plan's kept experts, in whose places,
            in this order, the new ones stand.
        down: [K', ...], the new experts' down projections as the experts module holds them, in the place of the sums'.
            None: the sums'.
    """

    experts: Tensor
    router: Tensor | None = None
    down: Tensor | None = None

    def __post_init__(self) -> None:
        for name, matrix in self.matrices.items():
            if matrix.ndim != 2 or matrix.shape != self.experts.shape or matrix.dtype != torch.float32:
                raise ValueError(f"{name} must be float32 [K', E], got {matrix.dtype} {tuple(matrix.shape)}")
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"{name} holds values that are not finite")
        if self.down is not None and (self.down.ndim != 3 or len(self.down) != len(self.experts)):
            raise ValueError(f"down must be {len(self.experts)} projections, got {tuple(self.down.shape)}")

    @classmethod
    def as_they_are(cls, kept: Sequence[int], num_experts: int, down: Tensor | None = None) -> Merge:
        """Makes the merge that leaves the kept experts as they are, but for the down projections if there are any."""
        return cls(torch.eye(num_experts)[list(kept)], None, down)

    @classmethod
    def averages(cls, kept: list[int], sums: Mapping[int, Mapping[int, float]], num_experts: int) -> Merge:
        """Makes the merge of kept experts, some of which become weighted sums.

        Args:
            kept: ascending ids of the experts kept.
            sums: {kept expert: {expert: share}}; kept experts not named stay as they are.
            num_experts: of the layer, E.

        Raises:
            ValueError: for a sum of an expert that is not kept or of one that the layer does not have, and for shares
                that are negative or not 1 in all.
        """
        for expert, shares in sums.items():
            fits = expert in kept and all(0 <= e < num_experts for e in shares)
            if not fits or min(shares.values(), default=-1) < 0 or not isclose(sum(shares.values()), 1, abs_tol=1e-6):
                raise ValueError(
                    f"expert {expert} cannot be merged from {dict(shares)}: it must be a kept one, the others experts "
                    "of its layer, and their shares not negative and 1 in all"
                )
        experts = torch.zeros(len(kept), num_experts)
        for row, expert in enumerate(kept):
            for other, share in sums.get(expert, {expert: 1.0}).items():
                experts[row, other] = share
        return cls(experts)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The matrices that there are, by name."""
        return {"experts": self.experts} | ({} if self.router is None else {"router": self.router})

    @property
    def sums(self) -> int:
        """New experts that are sums of several."""
        return int(((self.experts != 0).sum(1) > 1).sum())

    def keeps(self, kept: Sequence[int]) -> bool:
        """Whether the new experts are these as they are, but for their down projections, behind a sliced router."""
        return self.router is None and torch.equal(self.experts, torch.eye(self.experts.shape[1])[list(kept)])

    @property
    def only_down(self) -> bool:
        """Whether all are experts of the layer but for their down projections."""
        alone = ((self.experts == 1).any(1) & ((self.experts != 0).sum(1) == 1)).all()
        return self.down is not None and bool(alone)

    @cached_property
    def digest(self) -> str:
        """Identifies the content."""
        digest = hashlib.sha256(f"{tuple(self.experts.shape)}".encode())
        for matrix in self.matrices.values():
            digest.update(matrix.detach().cpu().contiguous().numpy().tobytes())
        if self.down is not None:
            digest.update(f"{tuple(self.down.shape)} {self.down.dtype}".encode())
            digest.update(self.down.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Merge) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class PruningPlan:
    """The experts that each layer has afterwards. Layers that are not named stay as they are.

    Attributes:
        kept: {decoder layer: ascending ids of the experts kept}; 0 to K' - 1 where a merge maps the router, because
            none stays as it is.
        num_experts: {decoder layer: experts before}.
        model: fingerprint of the model that the plan was made for, None when unknown.
        criterion: name of the scores behind it, for the record.
        merges: {decoder layer: Merge} of the layers whose new experts are sums.
        active: experts that every router selects per token; None: as many as the model's do.
        mtp: {multi-token-prediction layer: its experts' ids, the first to be pruned first}, where statistics say so;
            an export that stores equally many experts in every layer prunes these by it.
    """

    kept: dict[int, list[int]]
    num_experts: dict[int, int]
    model: str | None = None
    criterion: str | None = None
    merges: dict[int, Merge] = field(default_factory=dict)
    active: int | None = None
    mtp: dict[int, list[int]] = field(default_factory=dict)

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
        for layer, merge in self.merges.items():
            if layer not in self.kept:
                raise ValueError(f"a plan merges experts of layer {layer}, which it does not name")
            kept, before = len(self.kept[layer]), self.num_experts[layer]
            if tuple(merge.experts.shape) != (kept, before):
                raise ValueError(
                    f"layer {layer}: a merge of {list(merge.experts.shape)} cannot make {kept} experts of {before}"
                )
            if merge.router is not None and list(self.kept[layer]) != list(range(kept)):
                raise ValueError(f"layer {layer}: behind a mapped router experts are numbered from 0")
        for layer, order in self.mtp.items():
            if sorted(order) != list(range(len(order))):
                raise ValueError(f"multi-token-prediction layer {layer}: {order} is no order of its experts")

    @property
    def pruned_counts(self) -> dict[int, int]:
        """{decoder layer: experts that go}."""
        return {layer: self.num_experts[layer] - len(ids) for layer, ids in self.kept.items()}

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps equally many experts, so that a stock configuration can describe the result."""
        return len({len(ids) for ids in self.kept.values()}) == 1

    @property
    def sparsity(self) -> float:
        """Share of the routed experts of the layers named that are no longer stored."""
        return sum(self.pruned_counts.values()) / sum(self.num_experts.values())

    @property
    def repaired_layers(self) -> list[int]:
        """Decoder layers whose experts have other down projections."""
        return [layer for layer, merge in self.merges.items() if merge.down is not None]

    @property
    def unrepaired(self) -> PruningPlan:
        """The plan without its repair."""
        merges = {layer: replace(merge, down=None) for layer, merge in self.merges.items()}
        stays = {layer: merge for layer, merge in merges.items() if not merge.keeps(self.kept[layer])}
        return replace(self, merges=stays)

    @property
    def mapped_layers(self) -> list[int]:
        """Decoder layers whose routers map their scores."""
        return [layer for layer, merge in self.merges.items() if merge.router is not None]

    @classmethod
    def from_merges(
        cls,
        merges: Mapping[int, Merge],
        model: str | None = None,
        criterion: str | None = None,
        active: int | None = None,
    ) -> PruningPlan:
        """Makes the plan of layers that all map their routers; the arguments are the attributes."""
        kept = {layer: list(range(len(merge.experts))) for layer, merge in merges.items()}
        num_experts = {layer: merge.experts.shape[1] for layer, merge in merges.items()}
        return cls(kept, num_experts, model, criterion, dict(merges), active)

    @classmethod
    def from_pruned_counts(cls, scores: ExpertScores | Mapping[int, Tensor], pruned: Mapping[int, int]) -> PruningPlan:
        """Makes the plan that removes each layer's lowest-scoring experts; ties: the higher expert id goes first.

        Args:
            scores: of a plain {decoder layer: [E]} mapping only the number of experts is known, and the evaluator
                checks the plan against its model.
            pruned: {decoder layer: experts that go}; layers not named lose none.

        Raises:
            ValueError: for a count that cannot be.
        """
        scores = ExpertScores.wrap(scores)
        if unknown := sorted(set(pruned) - set(scores)):
            raise ValueError(f"there are no scores for layers {unknown}; the scored layers are {sorted(scores)}")
        kept = {}
        for layer in scores:
            count, shape = int(pruned.get(layer, 0)), scores.shapes[layer]
            if not shape.least_pruned <= count <= shape.capacity:
                most = f" and at most {shape.most_kept} may stay" if shape.least_pruned else ""
                raise ValueError(
                    f"layer {layer}: cannot prune {count} of {shape.num_experts} experts; the router needs "
                    f"{shape.min_kept}{most}, so {shape.least_pruned} to {shape.capacity} can go"
                )
            if beyond := (count - shape.least_pruned) % shape.unit:
                why = "of the groups of its router" if shape.unit == shape.n_group else "asked for"
                raise ValueError(
                    f"layer {layer}: cannot prune {count} of {shape.num_experts} experts, because a multiple of "
                    f"{shape.unit} ({why}) must stay; prune {count - beyond} or {count - beyond + shape.unit}"
                )
            gone = set(scores.pruning_order(layer)[:count])
            kept[layer] = [expert for expert in range(shape.num_experts) if expert not in gone]
        num_experts = {layer: shape.num_experts for layer, shape in scores.shapes.items()}
        return cls(kept, num_experts, scores.model, scores.criterion, mtp=dict(scores.mtp))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, beside the target and then renamed; matrices in the shortest numbers that read back alike.

        A repair's weights go first, to the safetensors file of the same name.
        """
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
        if self.mtp:
            content["mtp"] = {str(layer): order for layer, order in self.mtp.items()}
        if self.merges:
            content["merges"] = {
                str(layer): {name: _as_lists(matrix) for name, matrix in merge.matrices.items()}
                for layer, merge in self.merges.items()
                if not merge.keeps(self.kept[layer])
            }
        if self.repaired_layers:
            content["repair"] = {"file": _weights_file(path).name, "digest": self._save_down(_weights_file(path))}
        write_json(path, content, indent=None if self.merges else 1)

    def _save_down(self, file: Path) -> str:
        """Writes the repair's down projections, and returns what identifies them."""
        digest = hashlib.sha256("".join(merge.digest for merge in self.merges.values()).encode()).hexdigest()
        tensors = {
            f"down.{layer}": merge.down.contiguous() for layer, merge in self.merges.items() if merge.down is not None
        }
        with replacing(file) as beside:
            save_file(tensors, beside, metadata={"format": DOWN_FORMAT, "digest": digest})
        return digest

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads a plan.

        Raises:
            ValueError: for a file that is not one.
        """
        with reading_json(path, FORMAT, "pruning plan") as content:
            kept = {int(layer): [int(e) for e in ids] for layer, ids in content["kept"].items()}
            num_experts = {int(layer): int(n) for layer, n in content["num_experts"].items()}
            merges = {
                int(layer): Merge(**{name: torch.tensor(rows, dtype=torch.float32) for name, rows in matrices.items()})
                for layer, matrices in content.get("merges", {}).items()
            }
            for layer, down in _load_down(Path(path), content.get("repair")).items():
                merge = merges.get(layer) or Merge.as_they_are(kept[layer], num_experts[layer])
                merges[layer] = replace(merge, down=down)
            active = None if content.get("active") is None else int(content["active"])
            mtp = {int(layer): [int(e) for e in order] for layer, order in content.get("mtp", {}).items()}
            return cls(kept, num_experts, content.get("model"), content.get("criterion"), merges, active, mtp)


def _weights_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_name(path.name.removesuffix(".json") + ".safetensors")


def _load_down(path: Path, repair: dict[str, str] | None) -> dict[int, Tensor]:
    """Reads {decoder layer: down projections} of a plan's repair; {} if it has none."""
    if repair is None:
        return {}
    file = path.parent / repair["file"]
    try:
        with safe_open(file, framework="pt") as weights:
            if (weights.metadata() or {}).get("digest") != repair["digest"]:
                raise ValueError(f"{file} holds another repair's weights")
            return {int(name.removeprefix("down.")): weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}, which holds the repair's weights, cannot be read: {error}") from None


def _as_lists(matrix: Tensor) -> list[list[float]]:
    """Rows of numbers that become the same float32 again: the shortest such, 0.1 instead of 0.10000000149011612."""
    return [[float(str(value)) for value in row] for row in matrix.detach().cpu().numpy()]


@dataclass(frozen=True)
class Treatment:
    """What a plan does to one layer.

    Attributes:
        kept: ascending ids of the experts kept, all of them where the layer stays as it is.
        merge: what makes the kept experts; None: they stay as they are.
    """

    kept: tuple[int, ...]
    merge: Merge | None = None

    @property
    def order(self) -> tuple[bool, str, tuple[int, ...]]:
        """Sorts treatments, masks first; equal ones become neighbours."""
        return self.merge is not None, "" if self.merge is None else self.merge.digest, self.kept


class HasPlan(Protocol):
    """A search's result, which may stand wherever its plan may."""

    @property
    def plan(self) -> PruningPlan: ...


def plan_of(plan: PruningPlan | HasPlan) -> PruningPlan:
    """Returns the plan that is meant by a plan or by the result of a search."""
    return plan if isinstance(plan, PruningPlan) else plan.plan
