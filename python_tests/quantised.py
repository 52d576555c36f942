"""Checkpoints with quantised experts, in the formats that hubs hold them in, made of tiny models' checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 16  # rows and columns of an FP8 block; the tiny models' 24 rows end in half a block


def fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    """Quantises as Qwen3-FP8 and DeepSeek-V3 are stored: one float32 scale for each block, ragged at the edges."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = weight.new_zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    values = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": scale}


def quantise(
    folder: Path,
    matches: Callable[[str], bool],
    quantised: Callable[[Tensor], dict[str, Tensor]],
    config: dict[str, Any],
) -> None:
    """Replaces matrices of a checkpoint in one file by what `quantised` makes of each, {ending of the name: tensor}.

    Args:
        folder: the checkpoint; it is changed in place.
        matches: tells by a stored name whether its matrix is replaced.
        quantised: makes the tensors of one matrix.
        config: what config.json says of it, quantization_config.
    """
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if name.endswith(".weight") and tensor.ndim == 2 and matches(name):
            parts = quantised(tensor)
            tensors |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"quantization_config": config}))


def is_linear(name: str) -> bool:
    """Whether FP8 checkpoints quantise it: attention and experts, not embeddings, head, routers and gates."""
    return ".layers." in name and not name.endswith(("gate.weight", "shared_expert_gate.weight")) and "norm" not in name


def fp8(folder: Path, leaves: str = "eh_proj", **further: Any) -> None:
    """Makes a checkpoint one with FP8 blocks; `leaves`: in the names of matrices that stay as they are."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    quantise(folder, lambda name: is_linear(name) and leaves not in name, fp8_blocks, config | further)


def unquantised_fp8(folder: Path) -> None:
    """Writes the numbers that FP8 blocks stand for in their place, in float32, independently of transformers."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    tensors = {}
    for name, tensor in stored.items():
        if not name.endswith("_scale_inv"):
            tensors[name] = tensor.float()
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            tensors[name] = tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def is_expert(name: str) -> bool:
    return ".experts." in name


def compressed_tensors(folder: Path, form: str = "pack-quantized", ignore: tuple[str, ...] = ()) -> None:
    """Quantises the experts with compressed-tensors' own compressors: INT4 in groups, NVFP4 or FP8."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    preset = {"pack-quantized": "W4A16", "nvfp4-pack-quantized": "NVFP4A16", "float-quantized": "FP8_DYNAMIC"}[form]
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["re:.*experts.*proj"])
    weights: Any = scheme.weights
    if form == "pack-quantized":
        weights.group_size = 8
    compressor: Any = BaseCompressor.get_value_from_registry(form)

    def compress(weight: Tensor) -> dict[str, Tensor]:
        group = weights.group_size or weight.shape[1]
        groups = weight.float().view(weight.shape[0], -1, group)
        state = {"weight": weight}
        further = {}
        if "nvfp4" in form:
            further["global_scale"] = generate_gparam(groups.min(), groups.max())
            state["weight_global_scale"] = further["global_scale"]
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights, **further)
        state["weight_scale"] = scale.to(weight.dtype) if "nvfp4" not in form else scale
        packed = compressor.compress(state | {"weight_zero_point": zero}, scheme)
        return {name: tensor.contiguous() for name, tensor in packed.items() if name != "weight_zero_point"}

    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json") | {"format": form}},
        "ignore": ["lm_head", *ignore],
    }
    quantise(folder, lambda name: is_expert(name) and name.removesuffix(".weight") not in ignore, compress, config)


def mxfp4(folder: Path) -> None:
    """Makes a GPT-OSS checkpoint one as the hub stores it: experts in random packed blocks and scales."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    generator = torch.Generator().manual_seed(0)
    for name in stored.keys() - tensors.keys():
        experts, columns, rows = stored[name].shape
        size = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, size, generator=generator, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    (folder / "config.json").write_text(json.dumps(config))
