"""`moeprune export`: a plan to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.export import export
from moeprune_ext.checkpoint.read import find_shards, read_config
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import DATA, OUTPUT, Common, flag, model_argument
from moeprune_ext.modeling import CONFIG_KEY
from moeprune_ext.report.card import add_found

EXAMPLE = "moeprune export MODEL --plan RUN_DIR/plan.json -o OUT_DIR"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    model: Path = model_argument()
    plan: Path = flag("plan file of any verb, or the directory of a run", group=DATA)
    out: Path = flag("new directory for the checkpoint", short="-o")
    pad: bool = flag(
        "store every layer with as many experts as the largest keeps, absent ones as zeros that are never chosen",
        False,
        group=OUTPUT,
    )
    drop_mtp: bool = flag("leave out multi-token-prediction layers, which are kept otherwise", False, group=OUTPUT)


def run(options: Options) -> tuple[Any, str]:
    """Writes the pruned checkpoint and returns its size and how to load it."""
    file = _plan_file(options.plan)
    plan = PruningPlan.load(file)
    notes: list[str] = []
    out = export(options.model, plan, options.out, pad=options.pad, drop_mtp=options.drop_mtp, say=notes.append)
    add_found(file, plan, out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stock = CONFIG_KEY not in read_config(out)
    result = {"out": str(out), "bytes": size, "sparsity": plan.sparsity, "active": plan.active, "uniform": stock}
    result["notes"] = notes
    before = sum(file.stat().st_size for file in find_shards(options.model))
    loader = "from_pretrained" if stock else "moeprune_ext.load, or from_pretrained(..., trust_remote_code=True)"
    active = "" if plan.active is None else f", {plan.active} active per token"
    sizes = f"{size / 1e6:,.1f} MB instead of {before / 1e6:,.1f} MB on disk"
    text = f"{out}: {plan.sparsity:.1%} of the experts removed{active}, {sizes}; load it with {loader}"
    command = io.next_command("eval", out, options.model, "--data", "text.jsonl")
    return result, "\n".join([text, *notes, f"{command}   # what it is worth beside the model"])


def _plan_file(path: Path) -> Path:
    """Returns the plan's file where a run's directory is named, which is where `search`, `eep` and `prune` leave it."""
    places = (path / "plan.json", path / "moeprune" / "plan.json")
    if not path.is_dir():
        return path
    if found := next((place for place in places if place.is_file()), None):
        return found
    below = sorted(str(place.parent) for place in path.glob("*/moeprune/plan.json"))
    hint = f"; name one of {', '.join(below)}" if below else "; name a plan file, or the directory of a finished run"
    raise ValueError(f"{path} holds neither plan.json nor moeprune/plan.json{hint}")
