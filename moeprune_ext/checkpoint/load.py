"""Any export, or any plain MoE checkpoint, becomes a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune_ext.checkpoint.read import Folder, from_pretrained, read_config, read_hf_config, recorded, refuse
from moeprune_ext.modeling import CONFIG_KEY, auto_class, base_class, freeze_maps_, model_class
from moeprune_ext.models.moe import MoeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _check_counts(folder: Path, model: PreTrainedModel, raw: Mapping[str, Any]) -> None:
    """Refuses a record that leaves layers other experts than it says."""
    try:
        found = {str(index): layer.shape.num_experts for index, layer in MoeModel.of(model).layers.items()}
    except ValueError:
        found = {}
    if found != recorded(raw).get("kept_per_layer"):
        raise ValueError(
            f"{folder}: config.json has a damaged {CONFIG_KEY!r} entry: it makes layers of {found} experts, and says "
            f"{recorded(raw).get('kept_per_layer')}"
        )


def load(
    folder: Folder, *, stream: str | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads any export, uniform or not, and any plain MoE checkpoint; kwargs go to `from_pretrained`.

    stream: for a model larger than the device, where its decoder layers wait while they are not called: in "host"
    memory or on "disk", in the checkpoint (streaming.py; of the kwargs it takes `dtype`). device: where the model goes,
    if it is to be moved from where `from_pretrained` puts it.
    Nothing is downloaded and no code from the folder runs unless kwargs say so. MXFP4 weights (GPT-OSS) are
    dequantised, because their packed kernels bypass the router. Raises ValueError for a directory that is not a
    model, and when weights are missing, damaged or do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    from moeprune_ext.checkpoint.streaming import load_streamed

    folder = Path(folder)
    if stream is not None:
        if unknown := sorted(set(kwargs) - {"dtype"}):
            raise ValueError(f"a streamed model takes device and dtype, not {', '.join(unknown)}")
        return load_streamed(folder, device="cpu" if device is None else device, source=stream, **kwargs)
    raw = read_config(folder)
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        kwargs.setdefault("quantization_config", Mxfp4Config(dequantize=True))
    loader: Any = AutoModelForCausalLM
    try:
        config = kwargs["config"] if "config" in kwargs else read_hf_config(folder)
        loader = auto_class(config)
    except ValueError:
        if CONFIG_KEY in raw or not kwargs.get("trust_remote_code"):  # else of a class that the folder brings
            raise
    if CONFIG_KEY in raw:
        base, kwargs["config"] = base_class(loader, config)
        loader = model_class(base, recorded(raw))
    model, problems = from_pretrained(loader, folder, **kwargs)
    refuse(folder, problems)
    if CONFIG_KEY in raw:
        freeze_maps_(model)
        _check_counts(folder, model, raw)
    return model if device is None else model.to(device)
