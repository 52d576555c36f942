"""A plan -> a checkpoint, streamed shard by shard, and back.

A uniform plan becomes a stock checkpoint that any loader of the original reads: only the expert count in its
configuration differs (and multi-token-prediction layers, which the scores know nothing of, are left out). A non-uniform
plan keeps the original configuration and adds the key `moeprune` with the number of experts each layer keeps; `load`
builds the original model, resizes each layer's router and experts before the weights arrive, and the result is an
ordinary model that can be calibrated, scored and searched again. Memory: one shard at a time.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune_ext.checkpoint import (
    CONFIG_KEY,
    INDEX,
    Checkpoint,
    Place,
    auto_class,
    from_pretrained,
    loader_class,
    read_checkpoint,
    read_config,
    read_hf_config,
    refuse,
    skeleton,
)
from moeprune_ext.masking import check_plan, weighted_average
from moeprune_ext.moe import EXPERT_COUNT_NAMES, find_moe_layers
from moeprune_ext.plan import HasPlan, PruningPlan, plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPLACED = {"config.json", INDEX, "README.md", "pruning_plan.json"}  # written anew, not copied
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
Folder = str | os.PathLike[str]


def export(source: Folder, plan: PruningPlan | HasPlan, out: Folder) -> Path:
    """Writes the pruned checkpoint of a model directory to a new directory; returns its path.

    source: a Hugging Face directory with safetensors weights, or an earlier export. out: must not exist, or be empty;
    it appears whole or not at all. Written: weights in the source's shards and names, config.json, tokenizer and
    other files as they are, pruning_plan.json, and a model card. Raises ValueError, before anything is written, for a
    directory that is not such a model, a plan for another model, or tensor names that do not fit the architecture.
    """
    source, out, plan = Path(source), Path(out), plan_of(plan)
    check_new_folder(out)
    checkpoint = read_checkpoint(source)
    layers, shards = checkpoint.layers, checkpoint.shards
    check_plan(plan, layers, checkpoint.fingerprint)
    kept = {index: plan.kept.get(index, list(range(layer.shape.num_experts))) for index, layer in layers.items()}
    config = _pruned_config(checkpoint.config, kept)
    merged = _Merged(checkpoint, plan)

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed export left
    beside.mkdir()
    try:
        _write_config(beside, checkpoint, config, kept)
        total = 0
        weight_map: dict[str, str] = {}
        for file, names in shards.items():
            with safe_open(file, framework="pt") as shard:
                stored = [name for name in names if name not in checkpoint.extra]
                tensors = dict(_pruned(shard, stored, checkpoint, kept, merged))
                save_file(tensors, beside / file.name, metadata=shard.metadata() or {"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, file.name)
        if len(shards) > 1:
            index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            (beside / INDEX).write_text(index_text + "\n")
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in REPLACED and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, beside / file.name)
        plan.save(beside / "pruning_plan.json")
        (beside / "README.md").write_text(_model_card(checkpoint, plan, kept, total))
        if out.exists():
            out.rmdir()
        beside.replace(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def check_new_folder(out: Path) -> None:
    """Refuses (ValueError) a path where a new directory cannot be made without touching what is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty directory; give a new one")


def load(
    folder: Folder, *, stream: str | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads any export, uniform or not, and any plain MoE checkpoint; kwargs go to `from_pretrained`.

    stream: for a model larger than the device, where its decoder layers wait while they are not called: in "host"
    memory or on "disk", in the checkpoint (streaming.py; of the kwargs it takes `dtype`). device: where the model goes,
    if it is to be moved from where `from_pretrained` puts it.
    Nothing is downloaded and no code from the folder runs unless kwargs say so. MXFP4 weights (GPT-OSS) are
    dequantised, because their packed kernels bypass the router. Raises ValueError for a directory that is not a
    model, and when weights are missing, damaged or do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    from moeprune_ext.streaming import load_streamed

    folder = Path(folder)
    if stream is not None:
        if unknown := sorted(set(kwargs) - {"dtype"}):
            raise ValueError(f"a streamed model takes device and dtype, not {', '.join(unknown)}")
        return load_streamed(folder, device="cpu" if device is None else device, source=stream, **kwargs)
    raw = read_config(folder)
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        kwargs.setdefault("quantization_config", Mxfp4Config(dequantize=True))
    loader: Any = AutoModelForCausalLM
    if CONFIG_KEY in raw or not kwargs.get("trust_remote_code"):  # else of a class that the folder brings
        config = kwargs["config"] if "config" in kwargs else read_hf_config(folder)
        loader = auto_class(config)
    if CONFIG_KEY in raw:
        base = loader._model_mapping[type(config)]
        of_text = base.config_class is not type(config)  # a language model alone, of a model of text and more
        kwargs["config"] = config.get_text_config() if of_text else config
        loader = loader_class(base, raw)
    model, problems = from_pretrained(loader, folder, **kwargs)
    refuse(folder, problems)
    if CONFIG_KEY in raw:
        model.__class__ = loader.__base__
    return model if device is None else model.to(device)


class _Merged:
    """Weights of the merged experts of a plan, put together from stored tensors of any shard.

    Raises ValueError for weights that cannot be averaged as they are stored.
    """

    def __init__(self, checkpoint: Checkpoint, plan: PruningPlan) -> None:
        self._sums = plan.merged
        self._file_of = {name: file for file, names in checkpoint.shards.items() for name in names}
        self._open = functools.cache(lambda file: safe_open(file, framework="pt"))
        # {(layer, stored name without the expert's number): {expert: stored name}}
        self._siblings: dict[tuple[int, str], dict[int, str]] = {}
        for name, place in checkpoint.places.items():
            if place.layer not in self._sums or place.is_router:
                continue
            dtype = self._open(self._file_of[name]).get_slice(name).get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(
                    f"{name} is stored as {dtype}: quantised experts cannot be merged; dequantise them first"
                )
            if place.expert is not None:
                self._siblings.setdefault((place.layer, _without_number(name)), {})[place.expert] = name

    def one(self, name: str, place: Place, own: Tensor) -> Tensor:
        """An expert stored by itself: `own`, or the average that takes its place."""
        shares = self._sums.get(place.layer, {}).get(place.expert)  # type: ignore[arg-type]
        if shares is None:
            return own
        names = self._siblings[place.layer, _without_number(name)]
        return weighted_average({e: self._open(self._file_of[names[e]]).get_tensor(names[e]) for e in shares}, shares)

    def stacked(self, place: Place, own: Tensor) -> Tensor:
        """All experts of a layer in one tensor, the merged ones replaced."""
        sums = {} if place.is_router else self._sums.get(place.layer, {})
        new = {expert: weighted_average({e: own[e] for e in shares}, shares) for expert, shares in sums.items()}
        if new:
            own = own.clone()
        for expert, weight in new.items():
            own[expert] = weight
        return own


def _without_number(name: str) -> str:
    return re.sub(r"((?:^|\.)experts\.)\d+\.", r"\g<1>*.", name)


def _pruned(
    shard: Any, names: Sequence[str], checkpoint: Checkpoint, kept: Mapping[int, Sequence[int]], merged: _Merged
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard that survive, under their new names."""
    remaining = {index: layer.with_trailing(kept[index]) for index, layer in checkpoint.layers.items()}
    for name in names:
        place = checkpoint.places.get(name)
        if place is None:
            yield name, shard.get_tensor(name)
        elif place.expert is None:
            stored = merged.stacked(place, shard.get_tensor(name))
            size = stored.shape[place.axis]
            rows = [*kept[place.layer], *range(size - place.trailing, size)]
            yield name, stored.index_select(place.axis, torch.tensor(rows))
        elif place.expert in remaining[place.layer]:
            new = remaining[place.layer].index(place.expert)
            renamed = re.sub(r"((?:^|\.)experts\.)\d+\.", rf"\g<1>{new}.", name)
            yield renamed, merged.one(name, place, shard.get_tensor(name))


def _pruned_config(raw: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    config = json.loads(json.dumps(raw))
    config.pop(CONFIG_KEY, None)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("num_nextn_predict_layers"):
            part["num_nextn_predict_layers"] = 0  # its layers are not written
    counts = {len(ids) for ids in kept.values()}
    if len(counts) > 1:
        config[CONFIG_KEY] = {"kept_per_layer": {str(index): len(ids) for index, ids in kept.items()}}
        return config
    for part in (config, config.get("text_config")):
        for name in EXPERT_COUNT_NAMES:
            if isinstance(part, dict) and isinstance(part.get(name), int):
                part[name] = next(iter(counts))
    return config


def _write_config(
    folder: Path, checkpoint: Checkpoint, config: dict[str, Any], kept: Mapping[int, Sequence[int]]
) -> None:
    """config.json, which must describe exactly the experts that are written.

    Where it does not say a uniform count itself (a default left out), it is told under the architecture's own name.
    """
    text = checkpoint.config.get("text_config")
    counts = {len(ids) for ids in kept.values()}
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    if len(counts) == 1 and not any(name in part for part in (config, text or {}) for name in EXPERT_COUNT_NAMES):
        known = read_hf_config(folder).get_text_config().to_dict()
        part = config["text_config"] if isinstance(text, dict) else config
        part |= {name: next(iter(counts)) for name in EXPERT_COUNT_NAMES if isinstance(known.get(name), int)}
        path.write_text(json.dumps(config, indent=2) + "\n")
    _check_config(folder, config, kept)


def _check_config(folder: Path, raw: Mapping[str, Any], kept: Mapping[int, Sequence[int]]) -> None:
    described = {
        index: layer.shape.num_experts
        for index, layer in find_moe_layers(skeleton(read_hf_config(folder), raw)).items()
    }
    wanted = {index: len(ids) for index, ids in kept.items()}
    if described != wanted:
        raise ValueError(
            f"this architecture's configuration cannot describe the result: it gives {described} experts per layer, "
            f"wanted {wanted}"
        )


def _model_card(checkpoint: Checkpoint, plan: PruningPlan, kept: Mapping[int, Sequence[int]], total: int) -> str:
    layers, name = checkpoint.layers, checkpoint.folder.resolve().name
    before = sum(layer.shape.num_experts for layer in layers.values())
    after = sum(len(ids) for ids in kept.values())
    uniform = len({len(ids) for ids in kept.values()}) == 1
    loader = (
        f'{checkpoint.loader}.from_pretrained("<this directory>")'
        if uniform
        else 'moeprune_ext.load("<this directory>")  # layers keep different numbers of experts'
    )
    merges = sum(len(sums) for sums in plan.merged.values())
    changed = f"{merges} experts are averages of merged ones." if merges else "No weight was retrained or changed."
    rows = "\n".join(f"| {index} | {layers[index].shape.num_experts} | {len(ids)} |" for index, ids in kept.items())
    return (
        f"---\ntags:\n- moeprune\n- expert-pruning\n---\n\n# {name}, {after} of {before} experts\n\n"
        f"Pruned from `{name}` with moeprune_ext, criterion {plan.criterion or 'unknown'}, "
        f"{1 - after / before:.1%} of the routed experts removed; weights take {total / 1e6:,.1f} MB. {changed} "
        f"The plan is in `pruning_plan.json`.\n\n```python\n{loader}\n```\n\n"
        f"| layer | experts before | kept |\n| --- | --- | --- |\n{rows}\n"
    )
