"""A plan -> a checkpoint, streamed shard by shard, and back.

A uniform plan becomes a stock checkpoint that any loader of the original reads: only the expert count, and the experts
per token where they are fewer, differ in its configuration (and multi-token-prediction layers, which the scores know
nothing of, are left out). A non-uniform plan, and merged experts behind mapped routers, keep the original configuration
and add the key `moeprune`, which says how layers differ, and modeling.py, which `load` uses, and transformers too under
trust_remote_code: it builds the original model and reshapes each layer's router and experts before the weights arrive.
The result is an ordinary model that can be calibrated, scored and searched again. Memory: one shard at a time, and
where merged experts are stored one by one those of one projection of one layer, old and new.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from moeprune_ext import modeling
from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.checkpoint.read import (
    INDEX,
    SINGLE,
    Checkpoint,
    Folder,
    read_checkpoint,
    read_hf_config,
    recorded,
    skeleton,
    stored_routers,
)
from moeprune_ext.checkpoint.record import differences, mapped_parameters, router_rule
from moeprune_ext.checkpoint.weights import PlannedWeights, Siblings
from moeprune_ext.modeling import CONFIG_KEY
from moeprune_ext.models.active import lowered
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES, TOP_K_CONFIG_NAMES
from moeprune_ext.models.moe import MoeModel

REPLACED = {"config.json", INDEX, "README.md", "pruning_plan.json"}  # written anew, not copied


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def export(source: Folder, plan: PruningPlan | HasPlan, out: Folder) -> Path:
    """Writes the pruned or merged checkpoint of a model directory to a new directory; returns its path.

    source: a Hugging Face directory with safetensors weights, or an earlier export. plan: or the result of a search.
    out: must not exist, or be empty; it appears whole or not at all. Written: weights in the source's shards and names,
    config.json, tokenizer and other files as they are, the plan (pruning_plan.json, or
    moeprune/merged_plan.safetensors), and a model card. Raises ValueError, before anything is written, for a directory
    that is not such a model, a plan for another model or of what its layers cannot do, or tensor names that do not fit
    the architecture.
    """
    source, out, plan = Path(source), Path(out), plan_of(plan)
    check_new_folder(out)
    checkpoint = read_checkpoint(source)
    if recorded(checkpoint.config).get("routers"):
        raise ValueError(
            f"{source} holds merged experts behind mapped routers: make a plan for the model it was made of"
        )
    result = _result(checkpoint, plan)
    if not result.is_stock and CONFIG_KEY not in checkpoint.config and (source / "modeling.py").exists():
        raise ValueError(f"{source} has a modeling.py of its own, where the result needs ours; rename it there")
    config = _new_config(checkpoint, plan, result)

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed export left
    beside.mkdir()
    try:
        _write_config(beside, checkpoint, config, plan, result)
        total = _write_weights(beside, checkpoint, result)
        skipped = REPLACED | ({"modeling.py"} if CONFIG_KEY in checkpoint.config else set())
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in skipped and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, beside / file.name)
        if CONFIG_KEY in config:
            shutil.copyfile(modeling.__file__, beside / "modeling.py")
        plan.save(beside / "pruning_plan.json")
        (beside / "README.md").write_text(_model_card(checkpoint, plan, result, total))
        if out.exists():
            out.rmdir()
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


@dataclass(frozen=True)
class _Result:
    """What an export is to hold.

    Attributes:
        kept: {decoder layer: ids of the experts kept} of every layer.
        mapped: {decoder layer: router_rule} of the layers whose routers map their scores.
        weights: makes the tensors.
    """

    kept: dict[int, list[int]]
    mapped: dict[int, dict[str, Any]]
    weights: PlannedWeights

    @property
    def counts(self) -> dict[int, int]:
        return {index: len(ids) for index, ids in self.kept.items()}

    @property
    def is_stock(self) -> bool:
        """Whether the architecture's own configuration can describe it."""
        return not self.mapped and len(set(self.counts.values())) == 1


def _result(checkpoint: Checkpoint, plan: PruningPlan) -> _Result:
    """Checks the plan against the checkpoint; raises ValueError for what cannot be."""
    layers = checkpoint.layers
    routers = stored_routers(checkpoint) if plan.mapped_layers else {}
    check_plan(plan, layers, checkpoint.fingerprint, lambda layer: routers[layer.index])
    kept = {index: list(range(layer.shape.num_experts)) for index, layer in layers.items()} | plan.kept
    if routers and all(len(kept[index]) == layer.shape.num_experts for index, layer in layers.items()):
        raise ValueError(
            "these merges leave every layer all of its experts, so other loaders would take the result for the "
            "original model and ignore its maps; merge to fewer experts"
        )
    mapped = {index: router_rule(routers[index], len(kept[index])) for index in plan.mapped_layers}
    parameters = {index: mapped_parameters(routers[index], plan.merges[index]) for index in mapped}
    siblings = Siblings(checkpoint, plan.merges)
    return _Result(kept, mapped, PlannedWeights(checkpoint, plan, kept, parameters, siblings))


def _write_weights(folder: Path, checkpoint: Checkpoint, result: _Result) -> int:
    """Writes the shards and their index; returns the bytes of all tensors."""
    total = 0
    weight_map: dict[str, str] = {}
    for file in checkpoint.shards:
        tensors = dict(result.weights.tensors(file))
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
        save_file(tensors, folder / file.name, metadata=metadata)
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file.name)
    if [file.name for file in checkpoint.shards] != [SINGLE]:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(index_text + "\n")
    return total


def check_new_folder(out: Path) -> None:
    """Refuses (ValueError) a path where a new directory cannot be made without touching what is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty directory; give a new one")


def _new_config(checkpoint: Checkpoint, plan: PruningPlan, result: _Result) -> dict[str, Any]:
    config = json.loads(json.dumps(checkpoint.config))
    config.pop(CONFIG_KEY, None)
    auto_map = {name: code for name, code in (config.pop("auto_map", None) or {}).items() if not _is_ours(code)}
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        if part.get("num_nextn_predict_layers"):
            part["num_nextn_predict_layers"] = 0  # its layers are not written
        for name in TOP_K_CONFIG_NAMES:
            if plan.active is not None and (value := lowered(part.get(name), plan.active)) is not None:
                part[name] = value
        for name in EXPERT_COUNT_NAMES if result.is_stock else ():
            if isinstance(part.get(name), int):
                part[name] = next(iter(result.counts.values()))
    if not result.is_stock:
        known = read_hf_config(checkpoint.folder)
        config[CONFIG_KEY] = differences(MoeModel.of(skeleton(known, {})).layers, result.counts, result.mapped)
        auto_map |= modeling.auto_map(known)
    return config | ({"auto_map": auto_map} if auto_map else {})


def _is_ours(code: object) -> bool:
    """Whether an entry of auto_map, perhaps with a repository before it, names a class of modeling.py."""
    names = {f"modeling.{one.__name__}" for one in modeling.CLASSES.values()}
    return isinstance(code, str) and code.rpartition("--")[2] in names


def _write_config(
    folder: Path, checkpoint: Checkpoint, config: dict[str, Any], plan: PruningPlan, result: _Result
) -> None:
    """config.json, which must describe exactly the experts that are written.

    Where it does not say a number itself (a default left out), it is told under the architecture's own name.
    """
    text = checkpoint.config.get("text_config")
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    told: list[tuple[tuple[str, ...], int]] = []
    if result.is_stock:
        told.append((EXPERT_COUNT_NAMES, next(iter(result.counts.values()))))
    if plan.active is not None:
        told.append((TOP_K_CONFIG_NAMES, plan.active))
    known = read_hf_config(folder).get_text_config().to_dict()
    for names, number in told:
        if not any(name in part for part in (config, text or {}) for name in names):
            part = config["text_config"] if isinstance(text, dict) else config
            told_here = {name: lowered(known.get(name), number) for name in names}
            part |= {name: value for name, value in told_here.items() if value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n")
    _check_config(folder, config, checkpoint, plan, result)


def _check_config(
    folder: Path, raw: Mapping[str, Any], checkpoint: Checkpoint, plan: PruningPlan, result: _Result
) -> None:
    layers = MoeModel.of(skeleton(read_hf_config(folder), raw)).layers
    described = {index: (layer.shape.num_experts, layer.shape.top_k) for index, layer in layers.items()}
    wanted = {
        index: (count, plan.active or checkpoint.layers[index].shape.top_k) for index, count in result.counts.items()
    }
    if described != wanted:
        raise ValueError(
            f"this architecture's configuration cannot describe the result: it gives {described} (experts, active "
            f"ones) per layer, wanted {wanted}"
        )


def _model_card(checkpoint: Checkpoint, plan: PruningPlan, result: _Result, total: int) -> str:
    layers, name = checkpoint.layers, checkpoint.folder.resolve().name
    before = sum(layer.shape.num_experts for layer in layers.values())
    after = sum(result.counts.values())
    loader = (
        f'{checkpoint.loader}.from_pretrained("<this directory>")'
        if result.is_stock
        else f'moeprune_ext.load("<this directory>")\n# or, with the modeling.py that is here:\n'
        f'{checkpoint.loader}.from_pretrained("<this directory>", trust_remote_code=True)'
    )
    if plan.mapped_layers:
        how = "merged from it without gradients (EEP)"
        changed = "Experts are sums of the original ones, and routers map their scores to them."
    else:
        how = f"criterion {plan.criterion or 'unknown'}"
        merges = sum(merge.sums for merge in plan.merges.values())
        changed = f"{merges} experts are averages of merged ones." if merges else "No weight was retrained or changed."
    if plan.active is not None:
        changed += f" Every token is given to {plan.active} experts."
    rows = "\n".join(f"| {i} | {layers[i].shape.num_experts} | {n} |" for i, n in result.counts.items())
    return (
        f"---\ntags:\n- moeprune\n- expert-pruning\n---\n\n# {name}, {after} of {before} experts\n\n"
        f"Made from `{name}` with moeprune_ext, {how}, "
        f"{1 - after / before:.1%} of the routed experts removed; weights take {total / 1e6:,.1f} MB. {changed} "
        f"The plan is in `pruning_plan.json`.\n\n```python\n{loader}\n```\n\n"
        f"| layer | experts before | kept |\n| --- | --- | --- |\n{rows}\n"
    )
