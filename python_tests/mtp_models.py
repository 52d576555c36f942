"""Checkpoints with multi-token-prediction layers, made of models without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

DEEPSEEK = {"enorm": "enorm", "hnorm": "hnorm", "project": "eh_proj", "norm": "shared_head.norm"}
NEXT = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "project": "fc", "norm": "norm"}


def with_mtp(
    folder: Path, model: PreTrainedModel, quantise: Callable[[Path], None] = lambda folder: None
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Writes a model with one layer more, stored as its family stores multi-token-prediction layers.

    Args:
        folder: the checkpoint is its folder `full`.
        model: of DeepSeek-V3's, GLM-4.5's or Qwen3-Next's architecture.
        quantise: of the checkpoint, in place.

    Returns:
        A model in which the layer is the last decoder layer, and its other weights.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    count = config.num_hidden_layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, [*getattr(config, name), getattr(config, name)[-1]])
    config.num_hidden_layers += 1
    torch.manual_seed(7)
    longer: Any = AutoModelForCausalLM.from_config(config).eval()
    longer.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():  # a router that a version leaves at zero chooses the same experts for all tokens
        for name, tensor in longer.model.layers[-1].named_parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.3 if "gate.weight" in name else 0.15)
    longer.save_pretrained(folder / "longer")
    model.save_pretrained(folder / "full")
    stored = load_file(folder / "longer" / "model.safetensors")
    last = {name: tensor for name, tensor in stored.items() if name.startswith(f"model.layers.{count}.")}
    size = config.hidden_size
    further = {name: torch.rand(size) + 0.5 for name in ("enorm", "hnorm", "norm")}
    further["project"] = torch.randn(size, 2 * size) * 0.3
    beside = config.model_type == "qwen3_next"
    if beside:
        last = {f"mtp.layers.0.{name.removeprefix(f'model.layers.{count}.')}": tensor for name, tensor in last.items()}
        last |= {f"mtp.{NEXT[part]}.weight": tensor for part, tensor in further.items()}
    else:
        last |= {f"model.layers.{count}.{DEEPSEEK[part]}.weight": tensor for part, tensor in further.items()}
        last[f"model.layers.{count}.embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
        last[f"model.layers.{count}.shared_head.head.weight"] = model.get_output_embeddings().weight.detach().clone()
    file = folder / "full" / "model.safetensors"
    save_file(load_file(file) | last, file, metadata={"format": "pt"})
    said = json.loads((folder / "full" / "config.json").read_text())
    if not beside:
        said["num_nextn_predict_layers"] = 1
    (folder / "full" / "config.json").write_text(json.dumps(said))
    quantise(folder / "full")
    return longer, further
