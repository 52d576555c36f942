"""What a checkpoint directory holds: its configuration, MoE layers, shards, and which stored tensors belong to
experts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moeprune_ext.files import read_json
from moeprune_ext.masking import resize_
from moeprune_ext.moe import (
    MoeLayer,
    find_moe_layers,
    fingerprint_text,
    router_tensors,
    update_fingerprint,
)

CONFIG_KEY = "moeprune"  # in config.json of a checkpoint whose layers keep different numbers of experts
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Place:
    """What a stored tensor is to its layer: one expert's (`expert` its id), or sliced along `axis`."""

    layer: int
    expert: int | None = None
    axis: int = 0
    router_path: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, read without loading its weights.

    config: config.json as it is. layers: the MoE layers of a skeleton without weights. shards: {file: tensor names}.
    places: {tensor name: Place} of every per-expert tensor. extra: names of multi-token-prediction layers, which
    transformers does not build. fingerprint: as moe.model_fingerprint.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[int, MoeLayer]
    shards: dict[Path, list[str]]
    places: dict[str, Place]
    extra: frozenset[str]
    fingerprint: str


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a Hugging Face directory with safetensors weights, or an export.

    Raises ValueError for a directory that is not one, or whose tensor names do not fit its architecture.
    """
    config = read_config(folder)
    hf_config = read_hf_config(folder)
    layers = skeleton_layers(hf_config, config)
    shards = find_shards(folder)
    decoder_layers = hf_config.get_text_config().num_hidden_layers
    names = [name for stored in shards.values() for name in stored]
    extra = frozenset(name for name in names if _is_extra(name, decoder_layers))
    places = _locate(shards, layers, extra)
    return Checkpoint(folder, config, layers, shards, places, extra, _fingerprint(shards, places, layers, config))


def _is_extra(name: str, decoder_layers: int) -> bool:
    match = re.search(r"\blayers\.(\d+)\.", name)
    return re.search(r"(?:^|\.)mtp\.", name) is not None or (match is not None and int(match[1]) >= decoder_layers)


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model directory: it has no config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: it names no model_type")
    return config


def recorded_counts(raw: Mapping[str, Any]) -> dict[int, int]:
    try:
        return {int(layer): int(count) for layer, count in raw[CONFIG_KEY]["kept_per_layer"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"config.json has a damaged {CONFIG_KEY!r} entry: {raw[CONFIG_KEY]!r}") from None


def read_hf_config(folder: Path) -> Any:
    """The directory's configuration as transformers sees it; ValueError for whatever it does not accept."""
    from transformers import AutoConfig  # here, because it doubles the time to import this package

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each configuration class validates in its own way
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers does not accept config.json: {message[:300]}") from error


def skeleton_layers(config: Any, raw: Mapping[str, Any]) -> dict[int, MoeLayer]:
    """The MoE layers of the model that a configuration describes, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if CONFIG_KEY in raw:
        resize_recorded_(model, raw)
    return find_moe_layers(model)


def resize_recorded_(model: nn.Module, raw: Mapping[str, Any]) -> None:
    """Gives each layer of a model of the original size the expert count that config.json records."""
    counts, layers = recorded_counts(raw), find_moe_layers(model)
    for layer, count in counts.items():
        if layer not in layers or not layers[layer].shape.min_kept <= count <= layers[layer].shape.num_experts:
            raise ValueError(
                f"config.json records {count} experts for layer {layer}, which this architecture cannot have"
            )
    resize_(model, {layer: range(count) for layer, count in counts.items()})


def find_shards(folder: Path) -> dict[Path, list[str]]:
    """{weight file: tensor names} of a checkpoint; the single file comes first, as in transformers."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX} has no weight_map")
        files = [folder / name for name in dict.fromkeys(index["weight_map"].values())]
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


def _locate(
    shards: Mapping[Path, Sequence[str]], layers: Mapping[int, MoeLayer], extra: frozenset[str]
) -> dict[str, Place]:
    """Finds the per-expert tensors among the stored names, and checks that every layer's set is complete.

    Stored names may differ from module names in their prefix and in how experts are split (`experts.3.w1.weight` or one
    stacked `experts.gate_up_proj`), never in the layer number, the word `experts`, and the router's own leaf names.
    """
    places: dict[str, Place] = {}
    for file, names in shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                match = re.search(r"\blayers\.(\d+)\.(.+)", name)
                if match and name not in extra and int(match[1]) in layers:
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
                f"layer {index}: the checkpoint holds router tensors {found}, the architecture has {expected}; stored "
                "names that differ in this way are not supported yet"
            )
        ids = {place.expert for place in mine if place.expert is not None}
        stacked = any(place.expert is None and place.router_path is None for place in mine)
        if ids != set(range(layer.shape.num_experts)) and not (stacked and not ids):
            raise ValueError(
                f"layer {index}: the checkpoint holds {len(ids)} experts, but the configuration says "
                f"{layer.shape.num_experts}"
            )
    return places


def _place(tail: str, shape: Sequence[int], layer: MoeLayer) -> Place | None:
    if match := re.search(r"(?:^|\.)experts\.(\d+)\.", tail):
        return Place(layer.index, expert=int(match[1]))
    count = layer.shape.num_experts
    for tensor in router_tensors(layer):
        *_, parent, leaf = ("", *tensor.path.split("."))
        # `weight` and `bias` are anyone's; a correction bias is the router's wherever it is stored.
        wanted = f"{parent}.{leaf}" if leaf in {"weight", "bias"} else leaf
        if f".{tail}".endswith(f".{wanted}") and tensor.axis < len(shape) and shape[tensor.axis] == count:
            return Place(layer.index, axis=tensor.axis, router_path=tensor.path)
    if re.search(r"(?:^|\.)experts\.", tail) and shape and shape[0] == count:
        return Place(layer.index)
    return None


def _fingerprint(
    shards: Mapping[Path, Sequence[str]],
    places: Mapping[str, Place],
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
    model_type = text["model_type"] if isinstance(text, dict) and "model_type" in text else config["model_type"]
    return fingerprint_text(model_type, digest)


def loader_class(base: Any, raw: Mapping[str, Any], **methods: Any) -> Any:
    """A subclass whose models have the expert counts that config.json records before their weights arrive.

    It carries the base's name and module because transformers looks weight conversions up by them.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        if CONFIG_KEY in raw:
            resize_recorded_(self, raw)

    return type(base.__name__, (base,), {"__init__": __init__, "__module__": base.__module__, **methods})


def from_pretrained(loader: Any, folder: Path, **kwargs: Any) -> tuple[Any, list[str]]:
    """`loader.from_pretrained` without downloads, and which weights are missing or do not fit.

    ValueError, naming the directory, for whatever keeps it from loading.
    """
    options = {"local_files_only": True, **kwargs, "output_loading_info": True}
    try:
        model, report = loader.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model, sorted(report["missing_keys"]) + sorted(str(item) for item in report["mismatched_keys"])


def refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{folder}: weights are missing or do not fit: {', '.join(problems[:5])}")
