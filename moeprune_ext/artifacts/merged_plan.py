"""Which experts each layer makes of those it has, and how its router is mapped to them: EEP's result, as a file.

A merge makes K' new experts of a layer's E, each a sum of them, weight by weight: w'_i = sum_j W_EM[i, j] w_j; and maps
the router: pi = s @ W_RM^T of its own scores s, chosen and weighted as `masked_router(router_map=...)` says. Source:
EEP, arXiv 2407.00945.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune_ext.files import replacing

FORMAT = "moeprune.merge/1"


@dataclass(frozen=True, eq=False)
class Merge:
    """What stands for one layer's experts and router.

    experts: W_EM, float32 [K', E]. router: W_RM, float32 [K', E]. Merges of the same content are equal.
    """

    experts: Tensor
    router: Tensor

    def __post_init__(self) -> None:
        for name, matrix in (("experts", self.experts), ("router", self.router)):
            if matrix.ndim != 2 or matrix.shape != self.experts.shape or matrix.dtype != torch.float32:
                raise ValueError(f"{name} must be float32 [K', E], got {matrix.dtype} {tuple(matrix.shape)}")
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"{name} holds values that are not finite")

    @cached_property
    def digest(self) -> str:
        parts = [matrix.detach().cpu().contiguous().numpy().tobytes() for matrix in (self.experts, self.router)]
        return hashlib.sha256(b"".join(parts) + f"{tuple(self.experts.shape)}".encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Merge) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class MergedPlan:
    """Merges of a model's layers, {decoder layer: Merge}; layers not named stay as they are.

    model: the model's fingerprint, None when unknown. active: experts that every router selects per token, None: as
    many as the model's do.
    """

    merges: dict[int, Merge]
    model: str | None = None
    active: int | None = None

    def __post_init__(self) -> None:
        if not self.merges:
            raise ValueError("a plan needs at least one layer")
        fewest = min(len(merge.experts) for merge in self.merges.values())
        if self.active is not None and not 1 <= self.active <= fewest:
            raise ValueError(f"a plan cannot have {self.active} experts active per token of {fewest}")

    @property
    def sparsity(self) -> float:
        """Share of the routed experts of the layers named that are no longer stored."""
        before = sum(merge.experts.shape[1] for merge in self.merges.values())
        return 1 - sum(len(merge.experts) for merge in self.merges.values()) / before

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors, `LAYER.experts` and `LAYER.router`, beside the target and then renamed."""
        tensors = {}
        for layer, merge in self.merges.items():
            for name, matrix in (("experts", merge.experts), ("router", merge.router)):
                tensors[f"{layer}.{name}"] = matrix.detach().cpu().clone(memory_format=torch.contiguous_format)
        metadata = {"format": FORMAT, "model": self.model or "", "active": str(self.active or "")}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MergedPlan:
        """Reads a plan; raises ValueError for a file that is not one."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"it is not a safetensors file of format {FORMAT!r}")
                names: list[str] = list(file.keys())
                layers = sorted({int(name.partition(".")[0]) for name in names})
                merges = {
                    layer: Merge(file.get_tensor(f"{layer}.experts"), file.get_tensor(f"{layer}.router"))
                    for layer in layers
                }
            return cls(merges, metadata["model"] or None, int(metadata["active"]) if metadata["active"] else None)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable plan of merged experts: {error}") from None
