"""A plan -> a checkpoint, streamed shard by shard, and back.

A uniform plan becomes a stock checkpoint that any loader of the original reads: only the expert count in its configuration
differs. A non-uniform plan keeps the original configuration and adds the key `moeprune` with the experts each layer keeps;
`load` builds the original model, resizes each layer's router and experts before the weights arrive, and the result is an
ordinary model that can be calibrated, scored and searched again. Memory: one shard at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeprune_ext.files import read_json
from moeprune_ext.moe import (
    EXPERT_COUNT_NAMES,
    MoeLayer,
    check_plan,
    find_moe_layers,
    fingerprint_text,
    resize_,
    router_tensors,
    update_fingerprint,
)
from moeprune_ext.plan import PruningPlan

CONFIG_KEY = "moeprune"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class _Place:
    """What a stored tensor is to its layer: one expert's (`expert` its id), or sliced along `axis`."""

    layer: int
    expert: int | None = None
    axis: int = 0
    router_path: str | None = None


def export(source: Folder, plan: PruningPlan, out: Folder) -> Path:
    """Writes the pruned checkpoint of a model directory to a new directory; returns its path.

    source: a Hugging Face directory with safetensors weights, or an earlier export. out: must not exist, or be empty; it
    appears whole or not at all. Written: weights in the source's shards and names, config.json, tokenizer and other files
    as they are, pruning_plan.json, and a model card. Raises ValueError, before anything is written, for a directory that
    is not such a model, a plan for another model, or tensor names that do not fit the architecture.
    """
    source, out = Path(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not empty; give a new directory")
    config = _read_config(source)
    layers = _skeleton_layers(source, config)
    shards = _shards(source)
    places = _locate(shards, layers)
    check_plan(plan, layers, _fingerprint(shards, places, layers, config))
    kept = {
        index: plan.kept.get(index, list(range(layer.shape.num_experts))) for index, layer in layers.items()
    }

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        total, weight_map = 0, {}
        for file, names in shards.items():
            with safe_open(file, framework="pt") as shard:
                tensors = dict(_pruned(shard, names, places, kept))
                save_file(tensors, beside / file.name, metadata=shard.metadata() or {"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, file.name)
        if (source / INDEX).exists():
            index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            (beside / INDEX).write_text(index_text + "\n")
        for file in sorted(source.iterdir()):
            skipped = {"config.json", INDEX, "README.md", "pruning_plan.json"}
            if (
                file.is_file()
                and file not in shards
                and file.name not in skipped
                and file.suffix not in {".bin", ".pt", ".pth"}
            ):
                shutil.copyfile(file, beside / file.name)
        pruned_config = _pruned_config(config, layers, kept)
        (beside / "config.json").write_text(json.dumps(pruned_config, indent=2) + "\n")
        plan.save(beside / "pruning_plan.json")
        (beside / "README.md").write_text(_model_card(source, plan, layers, kept, total))
        _check_config(beside, pruned_config, kept)
        if out.exists():
            out.rmdir()
        beside.chmod(0o755)
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def load(folder: Folder, **kwargs: Any) -> PreTrainedModel:
    """Loads any export, uniform or not, and any plain MoE checkpoint; kwargs go to `from_pretrained`.

    Nothing is downloaded and no code from the folder runs unless kwargs say so. Raises ValueError for a directory that is
    not a model, and when weights are missing or do not fit.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    kwargs = {"local_files_only": True, **kwargs}
    if CONFIG_KEY not in raw:
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    counts = _recorded_counts(raw)
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder, local_files_only=True)
    base = AutoModelForCausalLM._model_mapping[type(config)]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        resize_(self, {layer: range(count) for layer, count in counts.items()})

    # The subclass carries the base's name because transformers looks weight conversions up by it.
    resized = type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__})
    kwargs.pop("output_loading_info", None)
    model, report = resized.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    problems = sorted(report["missing_keys"]) + sorted(str(item) for item in report["mismatched_keys"])
    if problems:
        raise ValueError(f"{folder}: weights are missing or do not fit: {', '.join(problems[:5])}")
    model.__class__ = base
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model directory: it has no config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: it names no model_type")
    return config


def _recorded_counts(raw: Mapping[str, Any]) -> dict[int, int]:
    try:
        return {int(layer): int(count) for layer, count in raw[CONFIG_KEY]["kept_per_layer"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"config.json has a damaged {CONFIG_KEY!r} entry: {raw[CONFIG_KEY]!r}") from None


def _skeleton_layers(folder: Path, raw: Mapping[str, Any]) -> dict[int, MoeLayer]:
    """The MoE layers of the model a directory describes, without weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if CONFIG_KEY in raw:
        resize_(model, {layer: range(count) for layer, count in _recorded_counts(raw).items()})
    return find_moe_layers(model)


def _shards(folder: Path) -> dict[Path, list[str]]:
    """{weight file: tensor names} of a checkpoint."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        files = [folder / name for name in dict.fromkeys(index["weight_map"].values())]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        raise ValueError(f"{folder} has no safetensors weights ({SINGLE} or {INDEX})")
    shards = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                shards[file] = list(shard.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    return shards


def _locate(shards: Mapping[Path, Sequence[str]], layers: Mapping[int, MoeLayer]) -> dict[str, _Place]:
    """Finds the per-expert tensors among the stored names, and checks that every layer's set is complete.

    Stored names may differ from module names in their prefix and in how experts are split (`experts.3.w1.weight` or one
    stacked `experts.gate_up_proj`), never in the layer number, the word `experts`, and the router's own leaf names.
    """
    places: dict[str, _Place] = {}
    for file, names in shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                match = re.search(r"\blayers\.(\d+)\.(.+)", name)
                if match and int(match[1]) in layers:
                    shape = shard.get_slice(name).get_shape()
                    place = _place(match[2], shape, layers[int(match[1])])
                    if place is not None:
                        places[name] = place
    for index, layer in layers.items():
        mine = [place for place in places.values() if place.layer == index]
        expected = sorted(tensor.path for tensor in router_tensors(layer))
        found = sorted(place.router_path for place in mine if place.router_path is not None)
        if found != expected:
            raise ValueError(
                f"layer {index}: the checkpoint holds router tensors {found}, the architecture has {expected}"
            )
        ids = {place.expert for place in mine if place.expert is not None}
        stacked = any(place.expert is None and place.router_path is None for place in mine)
        if ids != set(range(layer.shape.num_experts)) and not (stacked and not ids):
            raise ValueError(
                f"layer {index}: the checkpoint holds {len(ids)} experts, the configuration says {layer.shape.num_experts}"
            )
    return places


def _place(tail: str, shape: Sequence[int], layer: MoeLayer) -> _Place | None:
    if match := re.search(r"(?:^|\.)experts\.(\d+)\.", tail):
        return _Place(layer.index, expert=int(match[1]))
    count = layer.shape.num_experts
    for tensor in router_tensors(layer):
        *_, parent, leaf = ("", *tensor.path.split("."))
        # `weight` and `bias` are anyone's; a correction bias is the router's wherever it is stored.
        wanted = f"{parent}.{leaf}" if leaf in {"weight", "bias"} else leaf
        if f".{tail}".endswith(f".{wanted}") and tensor.axis < len(shape) and shape[tensor.axis] == count:
            return _Place(layer.index, axis=tensor.axis, router_path=tensor.path)
    if re.search(r"(?:^|\.)experts\.", tail) and shape and shape[0] == count:
        return _Place(layer.index)
    return None


def _fingerprint(
    shards: Mapping[Path, Sequence[str]],
    places: Mapping[str, _Place],
    layers: Mapping[int, MoeLayer],
    config: Mapping[str, Any],
) -> str:
    """moe.model_fingerprint, from the stored router tensors."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for file, names in shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                place = places.get(name)
                if place is not None and place.router_path is not None:
                    tensors[place.layer, place.router_path] = shard.get_tensor(name)
    digest = hashlib.sha256()
    for index, layer in layers.items():
        for tensor in router_tensors(layer):
            update_fingerprint(digest, index, tensors[index, tensor.path])
    text = config.get("text_config")
    model_type = (
        text["model_type"] if isinstance(text, dict) and "model_type" in text else config["model_type"]
    )
    return fingerprint_text(model_type, digest)


def _pruned(
    shard: Any, names: Sequence[str], places: Mapping[str, _Place], kept: Mapping[int, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard that survive, under their new names."""
    for name in names:
        place = places.get(name)
        if place is None:
            yield name, shard.get_tensor(name)
        elif place.expert is None:
            ids = torch.tensor(kept[place.layer])
            yield name, shard.get_tensor(name).index_select(place.axis, ids)
        elif place.expert in kept[place.layer]:
            new = list(kept[place.layer]).index(place.expert)
            yield re.sub(r"((?:^|\.)experts\.)\d+\.", rf"\g<1>{new}.", name), shard.get_tensor(name)


def _pruned_config(
    raw: Mapping[str, Any], layers: Mapping[int, MoeLayer], kept: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    config = json.loads(json.dumps(raw))
    config.pop(CONFIG_KEY, None)
    counts = {len(ids) for ids in kept.values()}
    if len(counts) > 1:
        config[CONFIG_KEY] = {"kept_per_layer": {str(index): len(ids) for index, ids in kept.items()}}
        return config
    for part in (config, config.get("text_config")):
        for name in EXPERT_COUNT_NAMES:
            if isinstance(part, dict) and isinstance(part.get(name), int):
                part[name] = next(iter(counts))
    return config


def _check_config(folder: Path, raw: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> None:
    """The written configuration must describe exactly the experts that were written."""
    with _quiet():
        described = {index: layer.shape.num_experts for index, layer in _skeleton_layers(folder, raw).items()}
    wanted = {index: len(ids) for index, ids in kept.items()}
    if described != wanted:
        raise ValueError(
            f"this architecture's configuration cannot describe the result: it gives {described} experts per layer, "
            f"wanted {wanted}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _model_card(
    source: Path,
    plan: PruningPlan,
    layers: Mapping[int, MoeLayer],
    kept: Mapping[int, Sequence[int]],
    total: int,
) -> str:
    before = sum(layer.shape.num_experts for layer in layers.values())
    after = sum(len(ids) for ids in kept.values())
    uniform = len({len(ids) for ids in kept.values()}) == 1
    loader = (
        'AutoModelForCausalLM.from_pretrained("<this directory>")'
        if uniform
        else 'moeprune_ext.load("<this directory>")  # layers keep different numbers of experts'
    )
    rows = "\n".join(
        f"| {index} | {layers[index].shape.num_experts} | {len(ids)} |" for index, ids in kept.items()
    )
    return (
        f"---\ntags:\n- moeprune\n- expert-pruning\n---\n\n# {source.resolve().name}, {after} of {before} experts\n\n"
        f"Pruned from `{source.resolve().name}` with moeprune_ext, criterion {plan.criterion or 'unknown'}, "
        f"{1 - after / before:.1%} of the routed experts removed; weights take {total / 1e6:,.1f} MB. No weight was "
        f"retrained or changed. The plan is in `pruning_plan.json`.\n\n```python\n{loader}\n```\n\n"
        f"| layer | experts before | kept |\n| --- | --- | --- |\n{rows}\n"
    )
