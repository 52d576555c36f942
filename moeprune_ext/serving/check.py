"""Which runtimes load an export, how, and why others do not.

What was tried, and with which versions: docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.checkpoint.read import Folder, read_config, read_hf_config, recorded, skeleton
from moeprune_ext.models.moe import MoeModel

UNEQUAL = "it takes one number of experts for all layers; export a uniform plan for it"
MAPS = "it has no routers that map their scores; prune instead of merging for it"


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime loads an export.

    Attributes:
        name: of the runtime.
        loads: whether it does.
        how: what to run, or why it does not.
    """

    name: str
    loads: bool
    how: str


def runtimes(folder: Folder) -> list[Runtime]:
    """Says which runtimes load a model directory, by its configuration alone.

    Args:
        folder: an export, or any model directory.

    Raises:
        ValueError: for a directory that is no MoE model.
    """
    folder = Path(folder)
    config = read_config(folder)
    record = recorded(config)
    if record:
        counts = [int(count) for count in record["kept_per_layer"].values()]
    else:
        layers = MoeModel.of(skeleton(read_hf_config(folder), config)).layers
        counts = [layer.shape.num_experts for layer in layers.values()]
    stock = not record
    code = "" if stock else ", trust_remote_code=True"
    return [
        Runtime("moeprune_ext", True, f'moeprune_ext.load("{folder}")'),
        Runtime("transformers", True, f'AutoModelForCausalLM.from_pretrained("{folder}"{code})'),
        *([_vllm(folder, config, counts), _vllm_alone(folder, record)] if record else [_vllm_stock(folder)]),
        *(
            Runtime(name, stock, "as it loads the unpruned model" if stock else MAPS if record["routers"] else UNEQUAL)
            for name in ("SGLang", "llama.cpp", "mlx-lm")
        ),
    ]


def _vllm_stock(folder: Path) -> Runtime:
    return Runtime("vLLM", True, f"vllm serve {folder}")


def _vllm(folder: Path, config: Mapping[str, Any], counts: list[int]) -> Runtime:
    name = "vLLM, moeprune_ext installed beside it"
    if reason := refusal(config, counts):
        return Runtime(name, False, reason)
    sizes = [size for size in (2, 4, 8, 16) if not any(count % size for count in counts)]
    expert = f"expert parallel {' or '.join(map(str, sizes))}" if sizes else "no expert parallelism"
    return Runtime(name, True, f"vllm serve {folder}; tensor parallel up to {min(counts)}, {expert}")


def _vllm_alone(folder: Path, record: Mapping[str, Any]) -> Runtime:
    name = "vLLM without us"
    if record["routers"]:
        return Runtime(name, False, MAPS)
    how = f"vllm serve {folder} --model-impl transformers --trust-remote-code; its experts take the full model's memory"
    return Runtime(name, True, how)


def refusal(config: Mapping[str, Any], counts: list[int]) -> str | None:
    """Returns why vLLM cannot serve unequal layers of this configuration, None if it can."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    methods = [(part.get("quantization_config") or {}).get("quant_method") for part in parts]
    if "mxfp4" in methods and len(set(counts)) > 1:
        return (
            "vLLM loads MXFP4 experts by the configuration's one count; export a uniform plan, or dequantised weights"
        )
    groups = max(part.get("n_group") or 1 for part in parts)
    if groups > 1 and min(counts) <= groups:
        return (
            f"a layer keeps {min(counts)} experts in {groups} routing groups, and vLLM drops the groups where each has "
            "one expert; keep two in each (--min-kept-per-group 2)"
        )
    return None
