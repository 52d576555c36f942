"""Checkpoints that store weights quantised: FP8 blocks, MXFP4, compressed-tensors and others.

Calibration and searches see their weights as numbers: transformers' own rules dequantise while loading, or layer by
layer while streaming. An export takes the kept experts' bytes and scales as they are stored; what the configuration
says of single experts follows their new numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "quantization_config"
# Files beside config.json that say the same: of ModelOpt, GPTQ, and of others after them.
FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
# How a scale's name ends, or packed weights'. Without those of activations and caches, weights are what they are.
SCALE = re.compile(
    r"\.(?!input_|activation_|output_|[kqv]_)([a-z_]*_)?(scales?|scale_inv|scale_2|packed|qweight|qzeros)$"
)
NUMBERS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32)


def quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what a config.json says of quantised weights, None if there are none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get(KEY), dict):
            return dict(part[KEY])
    return None


def is_dequantised(config: Mapping[str, Any]) -> bool:
    """Whether transformers gives a checkpoint's quantised weights as numbers; False for weights that are numbers.

    Raises:
        ValueError: for weights of which it would give wrong ones.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    quantised = quantisation(config)
    if quantised is None:
        return False
    for name, group in (quantised.get("config_groups") or {}).items():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        odd = weights.get("strategy") in ("tensor_group", "block") or weights.get("actorder") in ("group", "dynamic")
        if odd or weights.get("symmetric") is False:
            raise ValueError(
                f"{name} of the quantised weights has global scales, zero points, blocks or an order of its own, which "
                "transformers leaves out for experts (5.24), so its numbers would be wrong; calibrate and search the "
                "model in its original precision, and export the plan from this one"
            )
    try:
        return getattr(AutoQuantizationConfig.from_dict(quantised | {"dequantize": True}), "dequantize", False) is True
    except Exception:  # each method validates in its own way, some only where a package is installed
        return False


def as_numbers(hf_config: Any, config: Mapping[str, Any]) -> Any:
    """Returns a copy of a configuration, by which transformers dequantises what it loads.

    Args:
        hf_config: as transformers sees it.
        config: the content of config.json, of quantised weights for which `is_dequantised`.
    """
    hf_config = copy.deepcopy(hf_config)
    hf_config.quantization_config = {**(quantisation(config) or {}), "dequantize": True}
    return hf_config


def with_exact_numbers(rules: Sequence[Any] | None) -> list[Any]:
    """Corrects transformers' rules of loading that dequantise (5.17 to 5.24), in place; returns them.

    FP8 matrices that end in part of a block, as DeepSeek-V3 has them: by transformers' rule all blocks of a matrix are
    equally large, which fails, or gives other numbers without a word. And what becomes of compressed-tensors' experts
    gets the parameter's dtype.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for rule in rules or ():
        operations = getattr(rule, "operations", [])
        for place, operation in enumerate(operations):
            if type(operation) is Fp8Dequantize:
                operations[place] = _ragged(Fp8Dequantize)(operation.hf_quantizer)
        if any(hasattr(operation, "hf_quantizer") for operation in operations):
            operations.insert(0, _complete())
            operations.append(_in_parameters_dtype())
    return list(rules or ())


def check_scales(folder: Path, unread: Iterable[str], model: Any) -> None:
    """Refuses (ValueError) scales of quantised weights that loading has left out.

    Args:
        folder: the checkpoint.
        unread: names that became no parameter.
        model: that was loaded; multi-token-prediction layers, which it does not have, do not count.
    """
    last = model.config.get_text_config().num_hidden_layers - 1
    layers = ((re.search(r"layers\.(\d+)\.", name), name) for name in unread if "mtp" not in name)
    scales = sorted(name for layer, name in layers if layer and int(layer[1]) <= last and SCALE.search(name))
    if scales:
        raise ValueError(
            f"{folder}: transformers does not read the scales of these quantised weights, so their numbers would be "
            f"wrong ({', '.join(scales[:3])}); calibrate and search the model in its original precision, and export "
            "the plan from this one"
        )


def _ragged(base: Any) -> Any:
    """Makes the subclass of transformers' Fp8Dequantize that knows ragged blocks."""

    def _dequantize_one(
        self: Any, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        sizes = quantized.shape[-2:]
        packs_two = quantized.dtype not in NUMBERS  # FP4; what is FP8 may have another dtype by now, without loss
        if block and not packs_two and any(size % one for size, one in zip(sizes, block, strict=True)):
            grid = [-(-size // one) for size, one in zip(sizes, block, strict=True)]
            if list(scales.shape[-2:]) != grid:
                raise ValueError(
                    f"a matrix of {list(sizes)} in blocks of {list(block)} has scales {list(scales.shape)}"
                )
            spread = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
            return (quantized.float() * spread[..., : sizes[0], : sizes[1]]).to(output_dtype or torch.bfloat16)
        return base._dequantize_one(self, quantized, scales, output_dtype)

    return type(base.__name__, (base,), {"_dequantize_one": _dequantize_one})


def _complete() -> Any:
    """Makes the operation that refuses experts of which some have scales and others have none."""
    from transformers.core_model_loading import ConversionOps

    class Complete(ConversionOps):
        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            numbers = {name: len(value) for name, value in input_dict.items() if isinstance(value, list)}
            if len({*numbers.values()}) > 1:
                raise ValueError(
                    f"{kwargs['full_layer_name']} is stored with different numbers of weights and scales: {numbers}"
                )
            return input_dict

    return Complete()


def _in_parameters_dtype() -> Any:
    """Makes the operation that gives a parameter's value its dtype."""
    from transformers.core_model_loading import ConversionOps

    class InParametersDtype(ConversionOps):
        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            dtype = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"]).dtype
            made = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            return {name: value.to(dtype) for name, value in made.items()}

    return InParametersDtype()


# ---- what configurations say of single experts


def renumbered(said: Any, kept: Mapping[int, Sequence[int]], decoder: int = 0) -> Any:
    """Returns what a quantisation's configuration says, with the experts' new numbers.

    Entries are names of modules, or patterns of them, in lists or as keys; those of removed experts are dropped.

    Args:
        said: any JSON value.
        kept: {decoder layer: ids of the experts kept}, of every MoE layer.
        decoder: number of decoder layers, on from which layers under `mtp.` are numbered in `kept`.

    Raises:
        ValueError: for an entry that names several experts at once, or an expert, but no layer.
    """
    if isinstance(said, dict):
        named = ((_renamed(key, kept, decoder), value) for key, value in said.items())
        return {key: renumbered(value, kept, decoder) for key, value in named if key is not None}
    if isinstance(said, list):
        entries = (
            _renamed(entry, kept, decoder) if isinstance(entry, str) else renumbered(entry, kept, decoder)
            for entry in said
        )
        return [entry for entry in entries if entry is not None]
    return said


def _renamed(name: str, kept: Mapping[int, Sequence[int]], decoder: int) -> str | None:
    """Returns the name, or pattern, of a module with its expert's new number; None if that expert is removed."""
    found = re.search(r"experts\\?\.(.*?)(?=\\?\.|$)", plain := name.replace("[.]", r"\."))
    if found is None or not re.search(r"\d", re.sub(r"^\*.*|\[0-9\]|\\d", "", found[1])):
        return name  # of all experts, or of something else
    layer = re.search(r"layers\\?\.(\d+)(?!\d)", plain[: found.start()])
    if not found[1].isdecimal() or layer is None:
        raise ValueError(
            f"the quantisation's configuration says {name!r}, which cannot follow the experts' new numbers; name "
            "layers and experts one by one there"
        )
    ids = kept.get(int(layer[1]) + (decoder if re.search(r"\bmtp\b", name) else 0))
    if ids is None:
        return name
    if int(found[1]) not in ids:
        return None
    return f"{plain[: found.start(1)]}{list(ids).index(int(found[1]))}{plain[found.end(1) :]}"
