"""RoutingStats -> a score per expert, higher = keep.

One family (arXiv 2606.15716): S_e(alpha, beta, reduce) = reduce over tokens routed to e of gate^alpha *
||f_e(x)||^beta. Every published criterion below is one triple, so it is an index into the table of moments that
calibration gathers, and scoring by another criterion costs no further pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moeprune_ext.calibrate import RoutingStats
from moeprune_ext.files import read_json, write_text
from moeprune_ext.moe import LayerShape

# name -> (alpha: power of the gate weight, beta: power of the activation norm, reduce)
CRITERIA: dict[str, tuple[int, int, str]] = {
    "frequency": (0, 0, "sum"),
    "seer": (1, 0, "sum"),  # SEER-MoE's soft counting; EEP's "soft activation"
    "ean": (0, 1, "sum"),  # expert activation norm
    "weighted_ean": (1, 1, "sum"),  # EvoESAP's code
    "weighted_ean_l2": (1, 2, "sum"),  # named in EvoESAP's code
    "reap": (1, 1, "mean"),  # REAP, arXiv 2510.13999
    "reap_l2": (1, 2, "mean"),  # named in EvoESAP's code
    "man": (0, 1, "mean"),  # arXiv 2606.15716
    "msan": (0, 2, "mean"),  # arXiv 2606.15716
}

SELECTION_PRINCIPLE = (
    "For task-agnostic pruning prefer criteria that average over routed tokens and leave the gate out (man, msan); "
    "for task-specific pruning routing frequency and gate weight may stay in (reap, seer, frequency). arXiv 2606.15716."
)

FORMAT = "moeprune.scores/1"


@dataclass(frozen=True)
class ExpertScores(Mapping[int, Tensor]):
    """A mapping {decoder layer: float64 [E]}, higher = keep, that knows the routers it is for.

    shapes: {decoder layer: LayerShape}, min_kept raised where the user wants more kept than the router needs.
    criterion: its name. model: the model's fingerprint, None when unknown. protected: {decoder layer: ids of experts
    that no plan may remove, whatever they score}.
    """

    values_by_layer: dict[int, Tensor]
    shapes: dict[int, LayerShape]
    criterion: str | None = None
    model: str | None = None
    protected: dict[int, frozenset[int]] = field(default_factory=dict)

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
            size = shape.num_experts // shape.n_group
            fullest = max(sum(e // size == group for e in ids) for group in range(shape.n_group))
            shapes[layer] = replace(shape, min_kept=max(shape.min_kept, shape.n_group * fullest))
        object.__setattr__(self, "shapes", shapes)  # plans that cannot remove them are all that capacities allow

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

    def constrained(
        self,
        *,
        min_kept: int = 0,
        min_kept_per_group: int = 0,
        protect: Mapping[int, Iterable[int]] | None = None,
    ) -> ExpertScores:
        """The same scores for plans that keep at least so many experts per layer, and per group of group-limited
        routers, and never remove the experts `protect` {layer: ids} (`super_experts` finds some).

        Whatever was asked for before stays. Raises ValueError for more than a layer has.
        """
        protected = {
            layer: self.protected.get(layer, frozenset()) | frozenset((protect or {}).get(layer, ()))
            for layer in sorted({*self.protected, *(protect or {})})
        }
        shapes = {}
        for layer, shape in self.shapes.items():
            wanted = max(shape.min_kept, min_kept, shape.n_group * min_kept_per_group)
            if wanted > shape.num_experts:
                raise ValueError(
                    f"layer {layer} has {shape.num_experts} experts in {shape.n_group} groups and cannot keep {wanted}"
                )
            shapes[layer] = replace(shape, min_kept=wanted)
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
        """ExpertScores as they are; a plain {layer: [E]} mapping with the given routers (`shapes`, else top_k,
        n_group)."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, beside the target and then renamed."""
        content = {
            "format": FORMAT,
            "criterion": self.criterion,
            "model": self.model,
            "shapes": {str(layer): vars(shape) for layer, shape in self.shapes.items()},
            "scores": {str(layer): values.tolist() for layer, values in self.items()},
            "protected": {str(layer): sorted(ids) for layer, ids in self.protected.items()},
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertScores:
        """Reads scores; raises ValueError for a file that is not one."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a file of expert scores (JSON with format {FORMAT!r})")
        try:
            values = {int(k): torch.tensor(v, dtype=torch.float64) for k, v in content["scores"].items()}
            shapes = {int(k): LayerShape(**v) for k, v in content["shapes"].items()}
            protected = {int(k): frozenset(map(int, v)) for k, v in content.get("protected", {}).items()}
            return cls(values, shapes, content.get("criterion"), content.get("model"), protected)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is a damaged file of expert scores: {error}") from None


def score_experts(
    stats: RoutingStats, criterion: str | tuple[int, int, str] = "reap", *, seed: int = 0
) -> ExpertScores:
    """Scores every expert of every layer by a criterion's name or a triple (alpha, beta, "mean" | "sum").

    alpha, beta in {0, 1, 2}. "mean" divides by the number of routed tokens; an expert never routed to scores 0.
    "random" is EEP's baseline, drawn from `seed`. Returns float64 [E] per layer, higher = keep. Raises ValueError for
    an unknown criterion. Source: arXiv 2606.15716.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        values = {
            layer: torch.rand(len(moments), generator=generator, dtype=torch.float64)
            for layer, moments in stats.moments.items()
        }
        return ExpertScores(values, dict(stats.shapes), "random", stats.model)
    name, (alpha, beta, reduce) = _triple(criterion)
    values = {}
    for layer, moments in stats.moments.items():
        total = moments[:, alpha, beta]
        values[layer] = total / moments[:, 0, 0].clamp(min=1) if reduce == "mean" else total.clone()
    return ExpertScores(values, dict(stats.shapes), name, stats.model)


def _triple(criterion: str | tuple[int, int, str]) -> tuple[str, tuple[int, int, str]]:
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(
                f"unknown criterion {criterion!r}; choose one of {', '.join([*CRITERIA, 'random'])}, or a triple "
                '(alpha, beta, "mean" | "sum")'
            )
        return criterion, CRITERIA[criterion]
    try:
        alpha, beta, reduce = criterion
    except (TypeError, ValueError):
        raise ValueError(
            f'a criterion is a name or a triple (alpha, beta, "mean" | "sum"), got {criterion!r}'
        ) from None
    if alpha not in (0, 1, 2) or beta not in (0, 1, 2) or reduce not in ("mean", "sum"):
        raise ValueError(f'alpha and beta must be 0, 1 or 2 and reduce "mean" or "sum"; got {criterion!r}')
    return f"({alpha}, {beta}, {reduce})", (alpha, beta, reduce)


def super_experts(stats: RoutingStats, *, quantile: float = 0.995, share: float = 0.1) -> dict[int, list[int]]:
    """Outlier experts that a plan had better keep: {decoder layer: ids}, layers without one left out.

    An expert is one when its largest output norm is above this quantile of all experts' and above this share of the
    largest. Source: Super Experts, arXiv 2507.23279, with the L2 norm of an output in the place of its largest element
    (our choice: it is what calibration keeps).
    """
    if not 0 <= quantile <= 1 or not 0 <= share <= 1:
        raise ValueError(f"quantile and share lie in [0, 1]; got {quantile} and {share}")
    norms = torch.cat([norm.double() for norm in stats.max_norm.values()])
    threshold = max(float(torch.quantile(norms, quantile)), share * float(norms.max()))
    found = {layer: (norm.double() > threshold).nonzero()[:, 0].tolist() for layer, norm in stats.max_norm.items()}
    return {layer: ids for layer, ids in found.items() if ids}


def rank_correlations(scores: Sequence[ExpertScores]) -> dict[int, Tensor]:
    """How far criteria agree: {decoder layer: float64 [C, C]}, Spearman's rank correlation of each two, in [-1, 1].

    Tied experts share their mean rank; NaN where a criterion scores all experts of the layer alike.
    """
    correlations = {}
    for layer in scores[0]:
        ranks = torch.stack([_ranks(one[layer]) for one in scores])
        ranks -= ranks.mean(1, keepdim=True)
        norms = ranks.norm(dim=1)
        correlations[layer] = ((ranks @ ranks.T) / torch.outer(norms, norms)).clamp(-1, 1)
    return correlations


def _ranks(values: Tensor) -> Tensor:
    below = (values[None, :] < values[:, None]).sum(1)
    alike = (values[None, :] == values[:, None]).sum(1)
    return below.double() + (alike.double() - 1) / 2
