"""`moeprune calibrate`: a model and text to routing statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.artifacts.stats import RARELY
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.checkpoint.mtp import load_mtp
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import (
    DATA,
    Common,
    Data,
    Streaming,
    data_flag,
    flag,
    force_flag,
    model_argument,
    sequences_flag,
)

EXAMPLE = "moeprune calibrate MODEL --data text.jsonl -o stats.safetensors"


@dataclass(frozen=True, kw_only=True)
class Options(Streaming, Data, Common):
    model: Path = model_argument()
    data: tuple[str, ...] = data_flag()
    sequences: int = sequences_flag(128)
    drop_mtp: bool = flag(
        "gather no statistics of multi-token-prediction layers, which take a layer's memory", False, group=DATA
    )
    out: Path = flag("statistics file to write", short="-o")
    force: bool = force_flag()


def run(options: Options) -> tuple[Any, str]:
    """Writes the statistics and returns which experts the text hardly reached."""
    io.check_new_file(options.out, options.force)
    batches = io.load_data(options, io.tokenizer_of(options.model), labels=False, model=options.model)
    model = io.load_model(options.model, options)
    mtp = [] if options.drop_mtp else load_mtp(options.model, model)
    stats = calibrate(model, batches, mtp=mtp, progress=distributed.is_first())
    if distributed.is_first():
        stats.save(options.out)
    routed, rare = stats.tokens_per_expert, stats.rarely_routed()
    idle = sum(int((counts == 0).sum()) for counts in routed.values())
    result = {
        "stats": str(options.out),
        "tokens": stats.tokens,
        "layers": len(routed),
        "mtp_layers": len(mtp),
        "experts_never_routed_to": idle,
        "rarely_routed": {str(layer): {str(e): int(routed[layer][e]) for e in ids} for layer, ids in rare.items()},
    }
    lines = [f"{options.out}: {stats.tokens:,} tokens, {len(routed)} MoE layers, {idle} experts never routed to"]
    if mtp:
        lines.append(f"and {len(mtp)} multi-token-prediction layers")
    if rare:
        count = sum(map(len, rare.values()))
        lines.append(f"{count} experts saw fewer than {RARELY} tokens, so their averages say little; more text helps:")
    for layer, ids in rare.items():
        lines.append(f"  layer {layer}: " + ", ".join(f"{e} ({int(routed[layer][e])})" for e in ids))
    search = ("search", options.model, "--stats", options.out, "--sparsity", 0.5, "--data", *options.data)
    lines.append(io.next_command(*search, "-o", "run"))
    return result, "\n".join(lines)
