"""The multi-token-prediction layers of a checkpoint: found, loaded for calibration, and what becomes of their experts.

They are stored as decoder layers past the last (DeepSeek-V3, GLM-4.5), or under `mtp.` (Qwen3-Next). Here they are
numbered on from the last decoder layer; what is in them is found in a model that has so many layers more.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeprune_ext.checkpoint.quantised import as_numbers, is_dequantised, with_exact_numbers
from moeprune_ext.checkpoint.read import (
    Checkpoint,
    Folder,
    Role,
    check_roles,
    find_roles,
    find_shards,
    from_pretrained,
    past_the_last,
    read_config,
    read_hf_config,
    refuse,
    renaming,
    skeleton,
    stored_tensors,
)
from moeprune_ext.checkpoint.unread import Unread
from moeprune_ext.checkpoint.weights import PLAIN, numbered
from moeprune_ext.modeling import auto_class, base_class, model_class
from moeprune_ext.models.layers import MoeLayer
from moeprune_ext.models.moe import MoeModel, decoder_layers
from moeprune_ext.models.mtp import MtpLayer, can_run

# How the parts of a layer are named by DeepSeek-V3 and GLM-4.5, inside the layer, and by Qwen3-Next, beside it.
PARTS = {
    "embedding_norm": ("enorm", "pre_fc_norm_embedding"),
    "hidden_norm": ("hnorm", "pre_fc_norm_hidden"),
    "project": ("eh_proj", "fc"),
    "norm": ("shared_head.norm", "norm"),
}
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # under which configurations say how many there are
LISTS = ("layer_types", "mlp_layer_types")  # of a configuration, with an entry for each decoder layer


@dataclass(frozen=True)
class Mtp:
    """What a checkpoint holds beyond its decoder layers.

    Attributes:
        names: stored names.
        layers: {number: MoeLayer} of those layers that have experts.
        roles: {stored name: Role} of per-expert tensors.
        unknown: whether there are experts in them that are not understood, so that they stay whole or are left out.
        parts: {number: {part of an MtpLayer: stored name}}.
        model: without weights, of so many layers more; None where there are no experts.
        inside: stored name -> the name that it would have as a decoder layer's.
    """

    names: frozenset[str]
    layers: dict[int, MoeLayer] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    unknown: bool = False
    parts: dict[int, dict[str, str]] = field(default_factory=dict)
    model: Any = None
    inside: Callable[[str], str] = str

    @property
    def runs(self) -> bool:
        """Whether they can be run behind the model, which needs all their parts."""
        return bool(self.layers) and all(self.parts.values())


def find_mtp(folder: Path) -> Mtp:
    """Finds the multi-token-prediction layers of a checkpoint, without reading weights.

    Raises:
        ValueError: for a directory that is not an MoE model.
    """
    hf_config, shards = read_hf_config(folder), find_shards(folder)
    last = hf_config.get_text_config().num_hidden_layers - 1
    stored = [name for group in shards.values() for name in group]
    if not any("mtp" in name or int((re.findall(r"layers\.(\d+)\.", name) or [0])[0]) > last for name in stored):
        return Mtp(frozenset())
    moe = MoeModel.of(skeleton(hf_config, {}))
    path, decoder = decoder_layers(moe)
    rename = renaming(moe.model, None)
    names = past_the_last({name: rename(name)[0] for name in stored}, moe)
    if not any("experts." in name.replace("shared_experts.", "") for name in names):
        return Mtp(names)

    def inside(name: str) -> str:
        return re.sub(r"^(?:model\.)?mtp\.layers\.(\d+)\.", lambda m: f"{path}.{len(decoder) + int(m[1])}.", name)

    numbers = {int(found[1]) for name in names if (found := re.match(rf"{re.escape(path)}\.(\d+)\.", inside(name)))}
    try:
        longer = MoeModel.of(skeleton(_longer(hf_config, len(numbers)), {}))
        layers = {index: layer for index, layer in longer.layers.items() if index in numbers}
        rename = renaming(longer.model, None)
        targets = {name: rename(inside(name))[0] for name in names}
        roles = find_roles({file: [n for n in group if n in names] for file, group in shards.items()}, targets, layers)
        check_roles(roles, layers)
    except (ValueError, KeyError, AttributeError, IndexError):
        return Mtp(names, unknown=True)
    if not layers or {role.layer for role in roles.values()} != set(layers) or _lacks_some(roles, layers):
        return Mtp(names, unknown=True)
    plain = frozenset(name for name, stored in stored_tensors(shards, names) if stored.get_dtype() in PLAIN)
    parts = {index: _parts(plain, f"{path}.{index}.") for index in layers}
    return Mtp(names, layers, roles, parts=parts, model=longer.model, inside=inside)


def _lacks_some(roles: Mapping[str, Role], layers: Mapping[int, MoeLayer]) -> bool:
    """Whether a tensor is stored of some experts, and of others not."""
    numbers = Counter(numbered(name, "*") for name, role in roles.items() if role.expert is not None)
    counts = {layer.shape.num_experts for layer in layers.values()}
    return bool({*numbers.values()} - counts)


def _longer(hf_config: Any, more: int) -> Any:
    """Returns a copy of a configuration with so many decoder layers more, like the last."""
    longer = copy.deepcopy(hf_config)
    config = longer.get_text_config()
    for name in LISTS:
        if isinstance(kinds := getattr(config, name, None), list):
            setattr(config, name, [*kinds, *kinds[-1:] * more])
    config.num_hidden_layers += more
    return longer


def _parts(names: frozenset[str], prefix: str) -> dict[str, str]:
    """Finds what a layer has beside its decoder layer among names; {} where a part is missing (or is no number)."""
    found = {}
    for part, spellings in PARTS.items():
        for place in (
            f"{prefix}{spellings[0]}.weight",
            f"mtp.{spellings[1]}.weight",
            f"model.mtp.{spellings[1]}.weight",
        ):
            if place in names:
                found[part] = place
    return found if found.keys() == PARTS.keys() else {}


@dataclass(frozen=True)
class PlannedMtp:
    """What becomes of a checkpoint's multi-token-prediction layers in an export.

    Attributes:
        found: what there is.
        kept: {layer: ids of its experts kept}.
        left_out: stored names that are not written.
        says: a line about it; empty where there are no such layers.
        decoder: number of decoder layers.
    """

    found: Mtp
    kept: dict[int, list[int]]
    left_out: frozenset[str]
    says: str
    decoder: int = 0


def planned_mtp(
    checkpoint: Checkpoint, orders: Mapping[int, Sequence[int]], count: int | None, drop: bool
) -> PlannedMtp:
    """Decides what becomes of a checkpoint's multi-token-prediction layers.

    Runtimes build them from the configuration's one number of experts. Where layers keep equally many, that is the new
    number, so they are pruned like the others, if there are statistics of them, or left out; where layers differ, it is
    the old one, and they stay whole.

    Args:
        checkpoint: the source.
        orders: {layer: its experts' ids, the first to be pruned first}; `PruningPlan.mtp`.
        count: experts that every decoder layer stores; None where they differ, or map their routers.
        drop: whether to leave them out in any case.
    """
    if not checkpoint.extra:
        return PlannedMtp(Mtp(frozenset()), {}, frozenset(), "")
    found = find_mtp(checkpoint.folder)
    decoder = int(read_hf_config(checkpoint.folder).get_text_config().num_hidden_layers)
    whole = {index: list(range(layer.shape.num_experts)) for index, layer in found.layers.items()}
    name = "multi-token-prediction layers"
    if drop:
        return PlannedMtp(Mtp(found.names), {}, found.names, f"{name} are left out, as asked for", decoder)
    before = {layer.shape.num_experts for layer in checkpoint.layers.values()}
    if count is None or before == {count} or not (found.layers or found.unknown):
        return PlannedMtp(found, whole, frozenset(), f"{name} stay whole", decoder)
    if found.unknown or any(len(orders.get(index, ())) != len(ids) for index, ids in whole.items()):
        gathered = "there are no statistics of theirs in the plan (`calibrate` of this directory gathers them)"
        why = gathered if found.runs else "they are not of a known form, so that there are no statistics of theirs"
        says = f"{name} are left out: they would need {count} experts, too, and {why}"
        return PlannedMtp(Mtp(found.names), {}, found.names, says, decoder)
    kept = {index: sorted(list(orders[index])[len(ids) - count :]) for index, ids in whole.items()}
    most = max(map(len, whole.values()))
    return PlannedMtp(found, kept, frozenset(), f"{name} keep {count} of {most} experts, too", decoder)


def load_mtp(folder: Folder, model: nn.Module | MoeModel) -> list[MtpLayer]:
    """Loads a checkpoint's multi-token-prediction layers, to gather statistics of their experts with `calibrate`.

    Memory: theirs, each about that of a decoder layer.

    Args:
        folder: the checkpoint.
        model: loaded from it, on the device and of the dtype that the layers are to have.

    Returns:
        The layers that have experts, in order; [] if there are none, or they are not understood.

    Raises:
        ValueError: for weights that are missing or do not fit.
    """
    folder, moe = Path(folder), MoeModel.of(model)
    mtp = find_mtp(folder)
    if not mtp.runs or not can_run(moe):
        return []
    config = read_config(folder)
    base, hf_config = base_class(auto_class(mtp.model.config), mtp.model.config)
    if is_dequantised(config):
        hf_config = as_numbers(hf_config, config)
    shards = find_shards(folder)
    prefixes = tuple(f"{decoder_layers(moe)[0]}.{index}." for index in mtp.layers)

    def _load_pretrained_model(model: Any, _: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        with_exact_numbers(load_config.weight_mapping)
        state: dict[str, Any] = {
            name: Unread(list(tensor.shape))
            for name, tensor in model.state_dict().items()
            if not name.startswith(prefixes)
        }
        wanted = frozenset(name for name in mtp.names if mtp.inside(name).startswith(prefixes))
        state |= {mtp.inside(name): stored[...].clone() for name, stored in stored_tensors(shards, wanted)}
        return base._load_pretrained_model(model, state, files, load_config, *args, **kwargs)

    loader = model_class(base, {}, _load_pretrained_model=staticmethod(_load_pretrained_model))
    dtype = next(moe.model.parameters()).dtype
    longer, problems = from_pretrained(loader, folder, config=hf_config, dtype=dtype)
    refuse(folder, [name for name in problems if name.startswith(prefixes)])
    blocks, found = decoder_layers(MoeModel.of(longer))[1], MoeModel.of(longer).layers
    wanted = frozenset(name for parts in mtp.parts.values() for name in parts.values())
    weights = {name: stored[...].clone() for name, stored in stored_tensors(shards, wanted)}
    return [_made(found[index], blocks[index], mtp.parts[index], weights, moe) for index in mtp.layers]


@torch.no_grad()
def _made(
    layer: MoeLayer, block: Any, parts: Mapping[str, str], weights: Mapping[str, torch.Tensor], moe: MoeModel
) -> MtpLayer:
    """Puts a layer together on the model's device."""
    block.requires_grad_(False).eval().to(moe.device)
    dtype = next(moe.model.parameters()).dtype
    norms = {}
    for part in ("embedding_norm", "hidden_norm", "norm"):
        norms[part] = copy.deepcopy(block.input_layernorm)  # of the same kind
        norms[part].weight.copy_(weights[parts[part]])
    return MtpLayer(layer, block, project=weights[parts["project"]].to(moe.device, dtype), **norms)
