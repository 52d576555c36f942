"""Which runtimes load an export, how, and why others do not.

What was tried, and with which versions: docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext.checkpoint.export import MLX_FILE, MLX_KEY
from moeprune_ext.checkpoint.read import Folder, read_config, read_hf_config, recorded, skeleton
from moeprune_ext.modeling import CONFIG_KEY, auto_class
from moeprune_ext.models.moe import MoeModel

UNEQUAL = "it takes one number of experts for all layers; export a uniform plan for it"
PADDABLE = {"deepseek_v3", "glm4_moe", "gpt_oss"}  # tried with `export --pad`
VLLM_TRIED = {  # architectures in docs/serving.md, with the plugin
    *("deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_vl_moe"),
}
ALONE_TRIED = {"dots1", "flex_olmo", "qwen3_moe"}  # ... by vLLM's Transformers backend
MLX_TRIED = {  # ... by mlx-lm
    *("deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "lfm2_moe", "minimax_m2", "mixtral", "olmoe"),
    *("phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
}
MAPS = "it has no routers that map their scores; prune instead of merging for it"
ONE_COUNT = {"step3p5", "step3p7"}  # vLLM's loader compares with the configuration's one count
OWN_NAMES = {"granitemoe", "granitemoehybrid", "granitemoeshared"}  # vLLM renames these routers' tensors one by one


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime loads an export.

    Attributes:
        name: of the runtime.
        loads: whether it does; None: if it loads the unpruned model, or if nobody has tried.
        how: what to run, or why it does not.
    """

    name: str
    loads: bool | None
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
    hf_config = read_hf_config(folder)
    record = recorded(config)
    MoeModel.of(skeleton(hf_config, config))  # raises ValueError for a model without experts
    loader = auto_class(hf_config).__name__
    code = ", trust_remote_code=True" if record else ""
    found = [
        Runtime("moeprune_ext", True, f'moeprune_ext.load("{folder}")'),
        Runtime("transformers", True, f'{loader}.from_pretrained("{folder}"{code})'),
    ]
    if not record:
        how = "as it loads the unpruned model, if it does"
        return found + [Runtime(name, None, how) for name in ("vLLM", "SGLang", "llama.cpp", "mlx-lm")]
    found += [_vllm(folder, config, record), _vllm_alone(folder, config, record)]
    return [*found, _sglang(config), _llama_cpp(config, record), _mlx(folder, config, record)]


def _vllm(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> Runtime:
    name = "vLLM, moeprune_ext installed beside it"
    if reason := refusal(config):
        return Runtime(name, False, reason)
    counts = _counts(record)
    scored = [rule["experts"] for rule in record["routers"].values()]
    sizes = expert_parallel_sizes(config, counts, (2, 4, 8, 16))
    expert = f"expert parallel {' or '.join(map(str, sizes))}" if sizes else "no expert parallelism"
    most = min(scored) if len(scored) == len(counts) else min(counts)
    how = f"vllm serve {folder} (--trust-remote-code where vLLM has no model of its own)"
    return _tried(config, VLLM_TRIED, Runtime(name, True, f"{how}; tensor parallel up to {most}, {expert}"))


def _vllm_alone(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> Runtime:
    name = "vLLM without us"
    if record["routers"] or isinstance(config.get("text_config"), dict):
        return Runtime(name, None, "not tried: vllm serve --model-impl transformers --trust-remote-code")
    how = f"vllm serve {folder} --model-impl transformers --trust-remote-code; its experts take the full model's memory"
    return _tried(config, ALONE_TRIED, Runtime(name, True, how))


def _tried(config: Mapping[str, Any], tried: Collection[str], runtime: Runtime) -> Runtime:
    """Returns what is said of a runtime, if the architecture was tried with plain weights; else that it was not."""
    kind = config.get("model_type")
    if kind in tried and "quantization_config" not in config:
        return runtime
    return replace(runtime, loads=None, how=f"{runtime.how}; not tried with {kind} and such weights")


def _sglang(config: Mapping[str, Any]) -> Runtime:
    name = "SGLang, moeprune_ext installed beside it"
    if reason := sglang_refusal(config):
        return Runtime(name, False, reason)
    return Runtime(name, None, "its plugin was never tried with a running SGLang; no expert parallelism")


def _llama_cpp(config: Mapping[str, Any], record: Mapping[str, Any]) -> Runtime:
    if record["routers"]:
        return Runtime("llama.cpp", False, MAPS)
    pads = config.get("model_type") in PADDABLE and "quantization_config" not in config
    pad = ", or a padded one (export --pad)" if pads else ""
    return Runtime("llama.cpp", False, UNEQUAL + pad)


def _mlx(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> Runtime:
    name = "mlx-lm"
    if record["routers"]:
        return Runtime(name, False, MAPS)
    if config.get(MLX_KEY) != MLX_FILE:
        how = "a model saved by transformers leaves it behind; export the plan again, or copy it from the export"
        return Runtime(name, False, f"config.json names no {MLX_FILE} as its {MLX_KEY}: {how}")
    how = f"mlx_lm.generate --model {folder} --trust-remote-code"
    return _tried(config, MLX_TRIED, Runtime(name, True, how))


def expert_parallel_sizes(config: Mapping[str, Any], counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Returns those sizes of expert parallelism that divide every layer's experts.

    vLLM deals out a remainder in some ways of communicating and not in others; GPT-OSS's weights it slices by the
    configuration's one count.
    """
    if config.get("model_type") == "gpt_oss":
        return []
    return [size for size in sizes if not any(count % size for count in counts)]


def refusal(config: Mapping[str, Any]) -> str | None:
    """Returns why vLLM cannot serve an export of this configuration, None if it can."""
    record = config[CONFIG_KEY]
    config = {**config, **(config.get("text_config") or {})}  # of a multimodal model its language part's
    counts, name = _counts(record), config.get("model_type")
    if record.get("routers") and name in OWN_NAMES:
        return f"vLLM renames {name}'s router tensors one by one, and knows none of the map; prune instead of merging"
    uneven = len(set(counts)) > 1
    if uneven and name in ONE_COUNT:
        return f"vLLM's loader of {name} takes one number of experts for all layers; export a uniform plan"
    method = (config.get("quantization_config") or {}).get("quant_method")
    if uneven and name == "gpt_oss" and method in ("mxfp4", "quark"):
        return "vLLM loads MXFP4 experts by one count for all layers; export a uniform plan, or dequantised weights"
    groups = config.get("n_group") or 1
    if groups > 1 and min(counts) <= groups:
        return (
            f"a layer keeps {min(counts)} experts in {groups} routing groups, and vLLM drops the groups where each has "
            "one expert; keep two in each (--min-kept-per-group 2)"
        )
    return None


def sglang_refusal(config: Mapping[str, Any]) -> str | None:
    """Returns why SGLang cannot serve an export of this configuration, None if it might."""
    record, name = config[CONFIG_KEY], config.get("model_type")
    if record.get("routers"):
        return MAPS
    if isinstance(config.get("text_config"), dict):
        return (
            "nobody has looked at how SGLang builds multimodal models with unequal layers; export a uniform plan for it"
        )
    if name in OWN_NAMES:
        return f"SGLang builds {name}'s layers by a function of its own; export a uniform plan for it"
    if name == "gpt_oss" and config.get("quantization_config"):
        return "SGLang loads MXFP4 experts by one count for all layers; export a uniform plan, or dequantised weights"
    return None


def _counts(record: Mapping[str, Any]) -> list[int]:
    return [int(count) for count in record["kept_per_layer"].values()]
