"""What a checkpoint directory holds: configuration, MoE layers, shards, and which stored tensors belong to experts."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune_ext.checkpoint.quantised import check_scales
from moeprune_ext.files import read_json
from moeprune_ext.modeling import CONFIG_KEY, MAPPED, WEIGHTS_KEY, auto_class, reshape_
from moeprune_ext.models.layers import MoeLayer, router_tensors
from moeprune_ext.models.moe import MoeModel, decoder_layers, fingerprint_text, text_config, update_fingerprint

Folder = str | os.PathLike[str]

# A checkpoint's weights stand in one file, or in several with an index.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Role:
    """What a stored tensor is to its decoder layer: one slice for each expert, or the tensor of one expert.

    Attributes:
        layer: the decoder layer.
        path: the parameter that it becomes or goes into, named inside the layer's block as in `PerExpertTensor`.
        expert: id of the one expert whose tensor it is; None: it has a slice for each.
        axis: the axis that counts experts.
        trailing: slices beyond the experts', which stay.
        is_router: whether it belongs to the routing decision.
        transposed: whether a matrix of an expert is stored as the transpose of the parameter's; None: where it does
            not fit otherwise.
    """

    layer: int
    path: str
    expert: int | None = None
    axis: int = 0
    trailing: int = 0
    is_router: bool = False
    transposed: bool | None = False


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, read without loading its weights.

    Attributes:
        folder: the directory.
        config: the content of config.json.
        layers: {decoder layer: MoeLayer} of a model without weights.
        shards: {weight file: stored names}.
        roles: {stored name: Role} of every per-expert tensor.
        extra: stored names of multi-token-prediction layers, which transformers does not build.
        fingerprint: as `MoeModel.fingerprint`.
        loader: name of the transformers class that loads it.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[int, MoeLayer]
    shards: dict[Path, list[str]]
    roles: dict[str, Role]
    extra: frozenset[str]
    fingerprint: str
    loader: str


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a Hugging Face directory with safetensors weights, or an export.

    Raises:
        ValueError: for a directory that is not one, or whose tensor names do not fit its architecture.
    """
    config = read_config(folder)
    hf_config = read_hf_config(folder)
    moe = MoeModel.of(skeleton(hf_config, config))
    shards = find_shards(folder)
    rename = renaming(moe.model, None)
    renamed = {name: rename(name) for names in shards.values() for name in names}
    targets = {name: target for name, (target, _) in renamed.items()}
    extra = past_the_last(targets, moe)
    known = {file: [name for name in names if name not in extra] for file, names in shards.items()}
    roles = find_roles(known, targets, moe.layers)
    roles = {name: replace(role, transposed=_is_transposed(renamed[name][1])) for name, role in roles.items()}
    check_roles(roles, moe.layers)
    fingerprint = _fingerprint(shards, roles, moe)
    return Checkpoint(folder, config, moe.layers, shards, roles, extra, fingerprint, auto_class(hf_config).__name__)


# ---- the configuration


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json; raises ValueError where there is none, or it is not a model's."""
    if not (folder / "config.json").is_file():
        name = str(folder)
        hub = f"; if it is a name on the Hub: hf download {name} --local-dir {folder.name}"
        hint = hub if name.count("/") == 1 and not name.startswith((".", "/")) and not folder.parent.exists() else ""
        raise ValueError(f"{folder} is not a Hugging Face model directory: it has no config.json{hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration: it names no model_type")
    return config


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an export's config.json records beside the configuration (modeling.py); {} for other checkpoints.

    Raises:
        ValueError: for a damaged record.
    """
    record = config.get(CONFIG_KEY, {})
    if not isinstance(record, dict) or (CONFIG_KEY in config and not isinstance(record.get("tensors"), dict)):
        raise ValueError(f"config.json has a damaged {CONFIG_KEY!r} entry: {str(record)[:200]}")
    return record


def read_hf_config(folder: Path) -> Any:
    """Reads the configuration as transformers sees it; raises ValueError for whatever it does not accept."""
    from transformers import AutoConfig  # here, because it doubles the time to import this package

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each configuration class validates in its own way
        message = " ".join(str(error).split())
        raise ValueError(f"{folder}: transformers does not accept config.json: {message[:300]}") from error
    vars(config).pop(WEIGHTS_KEY, None)
    return config


def skeleton(hf_config: Any, config: Mapping[str, Any]) -> Any:
    """Makes the model that a configuration describes, without weights.

    Args:
        hf_config: as transformers sees it.
        config: the content of config.json, of which the record of an export is used.
    """
    with torch.device("meta"):
        model = auto_class(hf_config).from_config(copy.deepcopy(hf_config))
    reshape_(model, recorded(config))
    return model


# ---- stored tensors


def find_shards(folder: Path) -> dict[Path, list[str]]:
    """Finds a checkpoint's weight files; a single file comes before an index, as in transformers.

    Returns:
        {weight file: stored names}.

    Raises:
        ValueError: where there are none, or one cannot be read.
    """
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


def stored_tensors(
    shards: Mapping[Path, Sequence[str]], wanted: Container[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields stored names and their tensors, as safetensors slices: a tensor is read when its slice is indexed.

    Args:
        shards: {weight file: stored names}; the order is kept.
        wanted: names to yield; None: all.

    Raises:
        ValueError: for a shard that is missing or damaged.
    """
    for file, names in shards.items():
        chosen = [name for name in names if wanted is None or name in wanted]
        if chosen:
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in chosen:
                        yield name, shard.get_slice(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} is missing or not a readable safetensors file: {error}") from None


def renaming(model: Any, rules: list[Any] | None) -> Callable[[str], tuple[str, Any]]:
    """Makes the function that tells what a stored tensor becomes.

    It decides as transformers' convert_and_load_state_dict_in_model.

    Args:
        model: with or without weights.
        rules: weight conversions of transformers; None: the model's own.

    Returns:
        Stored name -> (the parameter that it becomes or goes into, the (pattern, converter) that makes it, or None).
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


def past_the_last(targets: Mapping[str, str], moe: MoeModel) -> frozenset[str]:
    """Returns the stored names of layers that transformers does not build: multi-token prediction, past the last one.

    Args:
        targets: {stored name: the parameter that it becomes or goes into}.
        moe: the model without weights.
    """
    path, decoder = decoder_layers(moe)
    parameters = moe.model.state_dict()
    extra = []
    for name, target in targets.items():
        number = re.match(rf"{re.escape(path)}\.(\d+)\.", target)
        predicts = re.search(r"(?:^|\.)mtp(?:\.|_)", name) and target not in parameters
        if predicts or (number is not None and int(number[1]) >= len(decoder)):
            extra.append(name)
    return frozenset(extra)


def find_roles(
    shards: Mapping[Path, Sequence[str]], targets: Mapping[str, str], layers: Mapping[int, MoeLayer]
) -> dict[str, Role]:
    """Finds the per-expert tensors among the stored ones.

    Args:
        shards: {weight file: stored names}.
        targets: {stored name: the parameter that it becomes or goes into}.
        layers: {decoder layer: MoeLayer}.

    Returns:
        {stored name: Role}. Experts may be stored one by one (`experts.3.w1.weight`) or stacked.
    """
    blocks = {f"{layer.name}.": layer for layer in layers.values()}
    roles: dict[str, Role] = {}
    for name, stored in stored_tensors(shards):
        block = next((block for block in blocks if targets[name].startswith(block)), None)
        if block is not None:
            role = _role(name, targets[name].removeprefix(block), stored.get_shape(), blocks[block])
            if role is not None:
                roles[name] = role
    return roles


def _role(name: str, path: str, shape: Sequence[int], layer: MoeLayer) -> Role | None:
    """The role of a tensor with this stored name and shape that becomes `path` in the layer's block, if it has one."""
    count = layer.shape.num_experts
    for tensor in router_tensors(layer):
        if path == tensor.path and tensor.axis < len(shape) and shape[tensor.axis] == count + tensor.trailing:
            return Role(layer.index, path, axis=tensor.axis, trailing=tensor.trailing, is_router=True)
    if not path.startswith(f"{layer.experts_name}."):
        return None
    if match := re.search(r"(?:^|\.)experts\.(\d+)\.", name):
        return Role(layer.index, path, expert=int(match[1]))
    if shape and shape[0] in (count, count + layer.trailing):
        return Role(layer.index, path, trailing=shape[0] - count)
    return None


def _is_transposed(converted: tuple[str, Any] | None) -> bool | None:
    """Tells whether transformers transposes a stored tensor on loading.

    Args:
        converted: as `renaming` returns it.

    Returns:
        None for one that it transposes where the shape does not fit.
    """
    operations = [] if converted is None else converted[1].operations
    transposes = [operation for operation in operations if type(operation).__name__ == "Transpose"]
    return None if any(getattr(one, "check_dims", False) for one in transposes) else bool(len(transposes) % 2)


def check_roles(roles: Mapping[str, Role], layers: Mapping[int, MoeLayer]) -> None:
    """Refuses (ValueError) stored tensors that are not a whole router and all experts of every layer."""
    for index, layer in layers.items():
        of_layer = [role for role in roles.values() if role.layer == index]
        expected = sorted(tensor.path for tensor in router_tensors(layer))
        stored = sorted(role.path for role in of_layer if role.is_router)
        if stored != expected:
            raise ValueError(
                f"layer {index}: the checkpoint holds router tensors {stored}, the architecture has {expected}; stored "
                "names that differ in this way are not supported yet"
            )
        ids = {role.expert for role in of_layer if role.expert is not None}
        stacked = any(role.expert is None and not role.is_router for role in of_layer)
        complete = [set(range(layer.shape.num_experts)), set(range(layer.router_rows))]  # identity experts, too
        if ids not in complete and not (stacked and not ids):
            raise ValueError(
                f"layer {index}: the checkpoint holds {len(ids)} experts, but the configuration says "
                f"{layer.shape.num_experts}"
            )


def stored_router_tensors(
    shards: Mapping[Path, Sequence[str]], roles: Mapping[str, Role]
) -> dict[tuple[int, str], Tensor]:
    """Reads {(decoder layer, path in its block): tensor} of all routing decisions."""
    routers = {name: role for name, role in roles.items() if role.is_router}
    return {(routers[name].layer, routers[name].path): stored[...] for name, stored in stored_tensors(shards, routers)}


def _fingerprint(shards: Mapping[Path, Sequence[str]], roles: Mapping[str, Role], moe: MoeModel) -> str:
    """`MoeModel.fingerprint` of a model without weights, from the stored router tensors."""
    tensors = stored_router_tensors(shards, roles)
    digest = hashlib.sha256()
    for index, layer in moe.layers.items():
        for tensor in router_tensors(layer):
            update_fingerprint(digest, index, tensors[index, tensor.path], exact=tensor.name in MAPPED)
    return fingerprint_text(text_config(moe).model_type, digest)


# ---- loading


def from_pretrained(loader: Any, folder: Path, **kwargs: Any) -> tuple[Any, list[str]]:
    """Calls a transformers class's `from_pretrained` without downloads.

    Returns:
        The model, and the names of weights that are missing, do not fit, or map routers that the model does not map.

    Raises:
        ValueError: with the directory, for whatever keeps it from loading, and for scales that are left out.
    """
    options = {"local_files_only": True, **kwargs, "output_loading_info": True}
    try:
        model, report = loader.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, KeyError, ImportError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    unexpected = [name for name in report["unexpected_keys"] if name.rpartition(".")[2] in MAPPED]
    check_scales(folder, report["unexpected_keys"], model)
    return model, sorted([*report["missing_keys"], *map(str, report["mismatched_keys"]), *unexpected])


def refuse(folder: Path, problems: Sequence[str]) -> None:
    """Raises ValueError if there are any problems."""
    if problems:
        raise ValueError(f"{folder}: weights are missing or do not fit: {', '.join(problems[:5])}")
