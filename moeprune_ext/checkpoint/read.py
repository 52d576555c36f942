"""What a checkpoint directory holds: its configuration, MoE layers, shards, and which stored tensors belong to
experts."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moeprune_ext.files import read_json
from moeprune_ext.modeling import CONFIG_KEY, MAPPED, auto_class, reshape_
from moeprune_ext.models.layers import MoeLayer, router_tensors
from moeprune_ext.models.merging import mapped_layer
from moeprune_ext.models.moe import MoeModel, decoder_layers, fingerprint_text, text_config, update_fingerprint
from moeprune_ext.models.routers import RoutedLayer

INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Place:
    """What a stored tensor is to its layer: one expert's (`expert` its id), or sliced along `axis`, where `trailing`
    slices beyond the experts' stay. path: what it becomes in the layer's block, as in moe.PerExpertTensor."""

    layer: int
    path: str
    expert: int | None = None
    axis: int = 0
    trailing: int = 0
    is_router: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, read without loading its weights.

    config: config.json as it is. layers: the MoE layers of a skeleton without weights. shards: {file: tensor names}.
    places: {tensor name: Place} of every per-expert tensor. extra: names of multi-token-prediction layers, which
    transformers does not build. fingerprint: as moe.model_fingerprint. loader: the transformers class that loads it.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[int, MoeLayer]
    shards: dict[Path, list[str]]
    places: dict[str, Place]
    extra: frozenset[str]
    fingerprint: str
    loader: str


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a Hugging Face directory with safetensors weights, or an export.

    Raises ValueError for a directory that is not one, or whose tensor names do not fit its architecture.
    """
    config = read_config(folder)
    hf_config = read_hf_config(folder)
    model = skeleton(hf_config, config)
    moe = MoeModel.of(model)
    layers = moe.layers
    shards = find_shards(folder)
    rename = renaming(model, None)
    becomes = {name: rename(name)[0] for stored in shards.values() for name in stored}
    extra = _extra(becomes, moe)
    places = _locate(shards, becomes, layers, extra)
    fingerprint = _fingerprint(shards, places, layers, model)
    return Checkpoint(folder, config, layers, shards, places, extra, fingerprint, auto_class(hf_config).__name__)


def _extra(becomes: Mapping[str, str], moe: MoeModel) -> frozenset[str]:
    """Names of layers that the architecture does not have: multi-token prediction, past the last decoder layer."""
    path, decoder = decoder_layers(moe)
    parameters = moe.model.state_dict()
    found = []
    for name, target in becomes.items():
        past = re.match(rf"{re.escape(path)}\.(\d+)\.", target)
        predicts = re.search(r"(?:^|\.)mtp(?:\.|_)", name) and target not in parameters
        if predicts or (past is not None and int(past[1]) >= len(decoder)):
            found.append(name)
    return frozenset(found)


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model directory: it has no config.json")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: it names no model_type")
    return config


def recorded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of an export says that its configuration cannot (modeling.py); {} of any other checkpoint."""
    found = raw.get(CONFIG_KEY, {})
    if not isinstance(found, dict) or (CONFIG_KEY in raw and not isinstance(found.get("tensors"), dict)):
        raise ValueError(f"config.json has a damaged {CONFIG_KEY!r} entry: {str(found)[:200]}")
    return found


def read_hf_config(folder: Path) -> Any:
    """The directory's configuration as transformers sees it; ValueError for whatever it does not accept."""
    from transformers import AutoConfig  # here, because it doubles the time to import this package

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class validates in its own way
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers does not accept config.json: {message[:300]}") from error


def skeleton(config: Any, raw: Mapping[str, Any]) -> Any:
    """The model that a configuration describes, without weights."""
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config))
    reshape_(model, recorded(raw))
    return model


def renaming(model: Any, rules: list[Any] | None) -> Callable[[str], tuple[str, Any]]:
    """Stored tensor's name -> (the parameter that it becomes or goes into, the (pattern, converter) that makes it or
    None), as transformers' convert_and_load_state_dict_in_model decides.

    rules: the model's weight conversions; None: its own.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = copy.deepcopy(get_model_conversion_mapping(model) if rules is None else rules)  # they remember being used
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> tuple[str, Any]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        return target, None if pattern is None else (pattern, by_pattern[pattern])

    return rename


def stored_routers(checkpoint: Checkpoint) -> dict[int, RoutedLayer]:
    """How each layer's router can be mapped, found out with its stored weights, in float32.

    Of a router whose formula is not known, or that has more weights than those of experts, the `spec` is None.
    """
    missing = {}
    for index, layer in checkpoint.layers.items():
        router = layer.router.to_empty(device="cpu").float()
        tensors = [*router.named_parameters(), *router.named_buffers()]
        missing[index] = {f"{layer.router_name}.{name}": tensor for name, tensor in tensors}
    for file, names in checkpoint.shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                place = checkpoint.places.get(name)
                if place is not None and place.is_router and place.path in missing[place.layer]:
                    missing[place.layer].pop(place.path).data.copy_(shard.get_tensor(name))
    return {
        index: RoutedLayer(layer, None, None) if missing[index] else mapped_layer(layer)
        for index, layer in checkpoint.layers.items()
    }


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
    shards: Mapping[Path, Sequence[str]],
    becomes: Mapping[str, str],
    layers: Mapping[int, MoeLayer],
    extra: frozenset[str],
) -> dict[str, Place]:
    """Finds the per-expert tensors among the stored names, and checks that every layer's set is complete.

    becomes: {stored name: parameter}. Experts may be stored one by one (`experts.3.w1.weight`) or stacked.
    """
    blocks = {f"{layer.name}.": layer for layer in layers.values()}
    places: dict[str, Place] = {}
    for file, names in shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                layer = next((layer for path, layer in blocks.items() if becomes[name].startswith(path)), None)
                if layer is not None and name not in extra:
                    path = becomes[name][len(layer.name) + 1 :]
                    place = _place(name, path, shard.get_slice(name).get_shape(), layer)
                    if place is not None:
                        places[name] = place
    for index, layer in layers.items():
        mine = [place for place in places.values() if place.layer == index]
        expected = sorted(tensor.path for tensor in router_tensors(layer))
        found = sorted(place.path for place in mine if place.is_router)
        if found != expected:
            raise ValueError(
                f"layer {index}: the checkpoint holds router tensors {found}, the architecture has {expected}; stored "
                "names that differ in this way are not supported yet"
            )
        ids = {place.expert for place in mine if place.expert is not None}
        stacked = any(place.expert is None and not place.is_router for place in mine)
        complete = [set(range(layer.shape.num_experts)), set(range(layer.router_rows))]  # identity experts, too
        if ids not in complete and not (stacked and not ids):
            raise ValueError(
                f"layer {index}: the checkpoint holds {len(ids)} experts, but the configuration says "
                f"{layer.shape.num_experts}"
            )
    return places


def _place(name: str, path: str, shape: Sequence[int], layer: MoeLayer) -> Place | None:
    """name: as stored. path: below the layer's block, what it becomes."""
    count = layer.shape.num_experts
    for tensor in router_tensors(layer):
        if path == tensor.path and tensor.axis < len(shape) and shape[tensor.axis] == count + tensor.trailing:
            return Place(layer.index, path, axis=tensor.axis, trailing=tensor.trailing, is_router=True)
    if not path.startswith(f"{layer.experts_name}."):
        return None
    if match := re.search(r"(?:^|\.)experts\.(\d+)\.", name):
        return Place(layer.index, path, expert=int(match[1]))
    if shape and shape[0] in (count, count + layer.trailing):
        return Place(layer.index, path, trailing=shape[0] - count)
    return None


def _fingerprint(
    shards: Mapping[Path, Sequence[str]], places: Mapping[str, Place], layers: Mapping[int, MoeLayer], model: nn.Module
) -> str:
    """moe.model_fingerprint, from the stored router tensors."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for file, names in shards.items():
        with safe_open(file, framework="pt") as shard:
            for name in names:
                place = places.get(name)
                if place is not None and place.is_router:
                    tensors[place.layer, place.path] = shard.get_tensor(name)
    digest = hashlib.sha256()
    for index, layer in layers.items():
        for tensor in router_tensors(layer):
            update_fingerprint(digest, index, tensors[index, tensor.path], exact=tensor.name in MAPPED)
    return fingerprint_text(text_config(model).model_type, digest)


def from_pretrained(loader: Any, folder: Path, **kwargs: Any) -> tuple[Any, list[str]]:
    """`loader.from_pretrained` without downloads, and which weights are missing or do not fit, or are of routers that
    the model does not map.

    ValueError, naming the directory, for whatever keeps it from loading.
    """
    options = {"local_files_only": True, **kwargs, "output_loading_info": True}
    try:
        model, report = loader.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    unexpected = [name for name in report["unexpected_keys"] if name.rpartition(".")[2] in MAPPED]
    problems = [*report["missing_keys"], *map(str, report["mismatched_keys"]), *unexpected]
    return model, sorted(problems)


def refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"{folder}: weights are missing or do not fit: {', '.join(problems[:5])}")


Folder = str | os.PathLike[str]
