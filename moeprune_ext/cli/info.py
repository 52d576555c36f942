"""`moeprune info`: what a checkpoint holds, without loading its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moeprune_ext.checkpoint.read import Checkpoint, read_checkpoint
from moeprune_ext.checkpoint.weights import BYTES
from moeprune_ext.cli.arguments import Common, model_argument
from moeprune_ext.tables import text_table

EXAMPLE = "moeprune info MODEL"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    model: Path = model_argument()


def run(options: Options) -> tuple[Any, str]:
    """Returns the MoE layers and the bytes of each part."""
    checkpoint = read_checkpoint(options.model)
    sizes = _sizes(checkpoint)
    total = sum(sizes.values())
    layers = [
        {
            "layer": index,
            "router": type(layer.router).__name__,
            **layer.shape.recorded(),
            "can_prune": layer.shape.capacity,
        }
        for index, layer in checkpoint.layers.items()
    ]
    saved = {f"{sparsity:.0%}": int(sizes["experts"] * sparsity) for sparsity in (0.25, 0.5)}
    result = {
        "model_type": checkpoint.config["model_type"],
        "fingerprint": checkpoint.fingerprint,
        "bytes": sizes,
        "saved_by_pruning": saved,
        "layers": layers,
    }
    columns = ("layer", "router", "num_experts", "top_k", "n_group", "can_prune")
    rows = [[str(layer[name]) for name in columns] for layer in layers]
    lines = [
        f"{options.model}: {result['model_type']}, {len(layers)} MoE layers, fingerprint {checkpoint.fingerprint}",
        *(f"  {part:<16}{size / 1e6:>12,.1f} MB {size / total:>7.1%}" for part, size in sizes.items()),
        *(f"  pruning {share} of the experts saves {size / 1e6:,.1f} MB" for share, size in saved.items()),
        text_table(["layer", "router", "experts", "top-k", "groups", "can prune"], rows),
    ]
    return result, "\n".join(lines)


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the bytes of each part, from the shards' headers."""
    sizes = {"experts": 0, "routers": 0, "everything else": 0}
    for file, names in checkpoint.shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                role = checkpoint.roles.get(name)
                part = "everything else" if role is None else "routers" if role.is_router else "experts"
                stored = shard.get_slice(name)
                sizes[part] += math.prod(stored.get_shape()) * BYTES.get(stored.get_dtype(), 1)
    return sizes
