"""A plan -> a checkpoint, streamed shard by shard.

A uniform plan becomes a stock checkpoint that any loader of the original reads: only the expert count, and the experts
per token where they are fewer, differ in its configuration. A non-uniform plan, and merged experts behind mapped
routers, keep the original configuration and add the key `moeprune`, which says how layers differ, and modeling.py,
which `load` uses, and transformers too under trust_remote_code: it builds the original model and reshapes each layer's
router and experts before the weights arrive. Without mapped routers, mlx_model.py does the same for mlx-lm. The result
is an ordinary model that can be calibrated, scored and searched again.

Experts that are stored quantised stay the bytes that they are, with their scales (quantised.py). What becomes of
multi-token-prediction layers: mtp.py. Memory: one shard at a time, and where merged experts are stored one by one those
of one projection of one layer, old and new.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from moeprune_ext import modeling
from moeprune_ext.artifacts.plan import HasPlan, PruningPlan, plan_of
from moeprune_ext.checkpoint.card import PICTURE, SOURCE_CARD, model_card, write_picture
from moeprune_ext.checkpoint.mtp import COUNTS as MTP_COUNTS
from moeprune_ext.checkpoint.mtp import PlannedMtp, planned_mtp
from moeprune_ext.checkpoint.padding import padded
from moeprune_ext.checkpoint.quantised import FILES, KEY, renumbered
from moeprune_ext.checkpoint.read import (
    INDEX,
    SINGLE,
    Checkpoint,
    Folder,
    read_checkpoint,
    read_hf_config,
    recorded,
    skeleton,
)
from moeprune_ext.checkpoint.record import (
    PER_LAYER,
    differences,
    experts_per_layer,
    mapped_parameters,
    router_rule,
)
from moeprune_ext.checkpoint.routers import stored_routers
from moeprune_ext.checkpoint.weights import PlannedWeights, Siblings
from moeprune_ext.files import read_json, write_json
from moeprune_ext.modeling import CONFIG_KEY, HINT, WEIGHTS_KEY
from moeprune_ext.models.active import lowered
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import EXPERT_COUNT_NAMES, TOP_K_CONFIG_NAMES
from moeprune_ext.models.moe import MoeModel

REPLACED = {"config.json", INDEX, "README.md", PICTURE, "pruning_plan.json"}  # written anew, not copied
MLX_KEY, MLX_FILE = "model_file", "mlx_model.py"  # where mlx-lm looks for code
CODE = ("modeling.py", MLX_FILE)  # beside modeling.py here


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def export(
    source: Folder,
    plan: PruningPlan | HasPlan,
    out: Folder,
    *,
    pad: bool = False,
    drop_mtp: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the pruned or merged checkpoint of a model directory to a new directory.

    Written are weights in the source's shards and names, config.json, the tokenizer, licence and other files as they
    are, the plan (pruning_plan.json; a repair's weights are among the others), and a model card; the source's own is
    kept as README.source.md.

    Args:
        source: a Hugging Face directory with safetensors weights, or an earlier export.
        plan: or the result of a search.
        out: must not exist, or be empty; it appears whole or not at all.
        pad: whether every layer is stored with as many experts as the largest keeps, absent ones as zeros that are
            never chosen (padding.py). The result is a stock checkpoint.
        drop_mtp: whether to leave out multi-token-prediction layers (mtp.py).
        say: is given a line about these layers, where there are some.

    Returns:
        The path of the new directory.

    Raises:
        ValueError: before `out` appears, for a directory that is not such a model, a plan for another model or of what
            its layers cannot do, tensor names that do not fit the architecture, or routers that cannot be padded.
    """
    source, out = Path(source), Path(out)
    check_new_folder(out)
    result = _result(read_checkpoint(source), plan_of(plan), pad, drop_mtp)
    config = _new_config(result)

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed export left
    beside.mkdir()
    if result.mtp.says:
        say(result.mtp.says)
    try:
        _write(beside, result, config)
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


@dataclass(frozen=True)
class _Result:
    """What an export is to hold.

    Attributes:
        checkpoint: the source.
        plan: what becomes of it.
        kept: {decoder layer: experts kept} of every layer.
        counts: {decoder layer: experts stored} of every layer: those kept, and in a padded export absent ones.
        rules: {decoder layer: router_rule} of the layers whose routers map their scores.
        weights: makes the tensors.
        mtp: what becomes of multi-token-prediction layers.
    """

    checkpoint: Checkpoint
    plan: PruningPlan
    kept: dict[int, int]
    counts: dict[int, int]
    rules: dict[int, dict[str, Any]]
    weights: PlannedWeights
    mtp: PlannedMtp

    @property
    def is_stock(self) -> bool:
        """Whether the architecture's own configuration can describe it."""
        return not self.rules and len(set(self.counts.values())) == 1


def _result(checkpoint: Checkpoint, plan: PruningPlan, pad: bool, drop_mtp: bool) -> _Result:
    """Checks that the plan can be carried out on the checkpoint; raises ValueError if not."""
    folder, layers = checkpoint.folder, checkpoint.layers
    if recorded(checkpoint.config).get("routers"):
        raise ValueError(
            f"{folder} holds merged experts behind mapped routers: make a plan for the model it was made of"
        )
    routers = stored_routers(checkpoint) if plan.mapped_layers else {}
    check_plan(plan, layers, checkpoint.fingerprint, lambda layer: routers[layer.index])
    stored, absent = padded(checkpoint, plan) if pad else (plan, {})
    kept = {index: list(range(layer.shape.num_experts)) for index, layer in layers.items()} | stored.kept
    counts = {index: len(ids) for index, ids in kept.items()}
    live = {index: count - len(absent.get(index, ())) for index, count in counts.items()}
    if routers and all(counts[index] == layer.shape.num_experts for index, layer in layers.items()):
        raise ValueError(
            "these merges leave every layer all of its experts, so other loaders would take the result for the "
            "original model and ignore its maps; merge to fewer experts"
        )
    rules = {index: router_rule(routers[index], counts[index]) for index in plan.mapped_layers}
    parameters = {index: mapped_parameters(routers[index], plan.merges[index]) for index in rules}
    equal = len({*counts.values()}) == 1 and not rules
    mtp = planned_mtp(checkpoint, plan.mtp, next(iter(counts.values())) if equal else None, drop_mtp)
    weights = PlannedWeights(
        replace(
            checkpoint,
            layers=layers | mtp.found.layers,
            roles=checkpoint.roles | mtp.found.roles,
            extra=mtp.left_out,
        ),
        stored,
        kept | mtp.kept,
        parameters,
        Siblings(checkpoint, stored.merges),
        absent,
    )
    result = _Result(checkpoint, plan, live, counts, rules, weights, mtp)
    theirs = [] if result.is_stock or CONFIG_KEY in checkpoint.config else [n for n in CODE if (folder / n).exists()]
    if theirs:
        raise ValueError(f"{folder} has a {theirs[0]} of its own, where the result needs ours; rename it there")
    return result


def _new_config(result: _Result) -> dict[str, Any]:
    """Makes the content of config.json."""
    checkpoint, active = result.checkpoint, result.plan.active
    config = copy.deepcopy(checkpoint.config)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if config.pop(CONFIG_KEY, None) is not None:
        config.pop(WEIGHTS_KEY, None)
        parts[-1].pop(PER_LAYER, None)
        config.pop(MLX_KEY, None)
    auto_map = {name: code for name, code in (config.pop("auto_map", None) or {}).items() if not _is_ours(code)}
    hf_config = read_hf_config(checkpoint.folder)
    if not result.is_stock:
        layers = MoeModel.of(skeleton(hf_config, {})).layers
        config[CONFIG_KEY] = differences(layers, result.counts, result.rules)
        config[WEIGHTS_KEY] = HINT
        if not result.rules:
            config[MLX_KEY] = MLX_FILE
            parts[-1][PER_LAYER] = experts_per_layer(layers, result.counts, hf_config.get_text_config())
        auto_map |= modeling.auto_map(hf_config)
    if auto_map:
        config["auto_map"] = auto_map
    for part in parts:
        if KEY in part:
            part[KEY] = _renumbered(result, part[KEY])
        part.update({name: 0 for name in MTP_COUNTS if result.mtp.left_out and part.get(name)})
    numbers: list[tuple[tuple[str, ...], int]] = []
    if result.is_stock:
        numbers.append((EXPERT_COUNT_NAMES, next(iter(result.counts.values()))))
    if active is not None:
        numbers.append((TOP_K_CONFIG_NAMES, active))
    defaults = hf_config.get_text_config().to_dict()
    for names, number in numbers:
        # Where no part says the number (a default left out), the language model's does, under the architecture's name.
        saying = [part for part in parts if any(name in part for name in names)]
        for part in saying or [parts[-1]]:
            before = part if saying else defaults
            part.update({name: new for name in names if (new := lowered(before.get(name), number)) is not None})
    return config


def _renumbered(result: _Result, said: Any) -> Any:
    """Returns what a quantisation's configuration says, with the experts' new numbers."""
    return renumbered(said, result.weights.kept, result.mtp.decoder)


def _is_ours(code: object) -> bool:
    """Whether an entry of auto_map, perhaps with a repository before it, names a class of modeling.py."""
    names = {f"modeling.{loader.__name__}" for loader in modeling.CLASSES.values()}
    return isinstance(code, str) and code.rpartition("--")[2] in names


def _write(folder: Path, result: _Result, config: dict[str, Any]) -> None:
    """Writes all files of an export to an empty directory."""
    checkpoint = result.checkpoint
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _check_config(folder, result, config)
    size = _write_weights(folder, result)
    skipped = REPLACED | ({*CODE} if CONFIG_KEY in checkpoint.config else set())
    for file in sorted(checkpoint.folder.iterdir()):
        if file.name in FILES:
            write_json(folder / file.name, _renumbered(result, read_json(file)), indent=2)
        elif file.is_file() and file.name not in skipped and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    if CONFIG_KEY in config:
        for name in CODE if config.get(MLX_KEY) == MLX_FILE else CODE[:1]:
            shutil.copyfile(Path(modeling.__file__).with_name(name), folder / name)
    # A repair's weights are in the shards; loaders that read every safetensors file must not find them twice.
    result.plan.unrepaired.save(folder / "pruning_plan.json")
    if (card := checkpoint.folder / "README.md").is_file() and not (folder / SOURCE_CARD).exists():
        shutil.copyfile(card, folder / SOURCE_CARD)
    text = model_card(
        checkpoint,
        result.plan,
        result.kept,
        result.counts,
        is_stock=result.is_stock,
        size=size,
        mtp=result.mtp.says,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_picture(folder, checkpoint, result.kept)


def _check_config(folder: Path, result: _Result, config: dict[str, Any]) -> None:
    """Refuses (ValueError) a config.json that does not describe exactly the experts to be written."""
    layers = MoeModel.of(skeleton(read_hf_config(folder), config)).layers
    described = {index: (layer.shape.num_experts, layer.shape.top_k) for index, layer in layers.items()}
    wanted = {
        index: (count, result.plan.active or result.checkpoint.layers[index].shape.top_k)
        for index, count in result.counts.items()
    }
    if described != wanted:
        raise ValueError(
            f"this architecture's configuration cannot describe the result: it gives {described} (experts, active "
            f"ones) per layer, wanted {wanted}"
        )


def _write_weights(folder: Path, result: _Result) -> int:
    """Writes the shards and their index; returns the bytes of all tensors."""
    total = 0
    weight_map: dict[str, str] = {}
    for file in result.checkpoint.shards:
        tensors = dict(result.weights.tensors(file))
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
        save_file(tensors, folder / file.name, metadata=metadata)
        (folder / file.name).chmod(0o644)  # as other files: safetensors lets only its owner read one
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file.name)
    if [file.name for file in result.checkpoint.shards] != [SINGLE]:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(index_text + "\n")
    return total
