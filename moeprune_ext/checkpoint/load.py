"""Any export, or any plain MoE checkpoint, becomes a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune_ext.checkpoint.quantised import KEY, as_numbers, is_dequantised, with_exact_numbers
from moeprune_ext.checkpoint.read import Folder, from_pretrained, read_config, read_hf_config, recorded, refuse
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.modeling import CONFIG_KEY, auto_class, base_class, freeze_maps_, model_class
from moeprune_ext.models.moe import MoeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    folder: Folder, *, stream: str | None = None, device: str | torch.device | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads any export, uniform or not, and any plain MoE checkpoint.

    Nothing is downloaded and no code from the folder runs unless kwargs say so. Quantised weights are dequantised where
    transformers can (FP8 blocks, MXFP4, compressed-tensors), because kernels of packed ones bypass the router; the
    model takes the memory of its `dtype`, or with `stream` that of two layers.

    Args:
        folder: a Hugging Face directory.
        stream: for a model larger than the device: where decoder layers wait while they are not called, "host" for
            CPU memory or "disk" for the checkpoint (streaming.py).
        device: what the model is moved to; None: it stays where `from_pretrained` puts it.
        **kwargs: for `from_pretrained`; with `stream`, `dtype` alone.

    Raises:
        ValueError: for a directory that is not a model, and when weights are missing, damaged or do not fit.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if stream is not None:
        if unknown := sorted(set(kwargs) - {"dtype"}):
            raise ValueError(f"a streamed model takes device and dtype, not {', '.join(unknown)}")
        return load_streamed(folder, device="cpu" if device is None else device, source=stream, **kwargs)
    config = read_config(folder)
    loader: Any = AutoModelForCausalLM
    known = False
    try:
        hf_config = kwargs["config"] if "config" in kwargs else read_hf_config(folder)
        loader, known = auto_class(hf_config), True
    except ValueError:
        if CONFIG_KEY in config or not kwargs.get("trust_remote_code"):  # else of a class that the folder brings
            raise
    if dequantise := known and KEY not in kwargs and is_dequantised(config):
        base, plain = base_class(loader, hf_config)
        kwargs["config"] = as_numbers(plain, config)
        loader = model_class(base, recorded(config), _load_pretrained_model=staticmethod(partial(_dequantised, base)))
    elif CONFIG_KEY in config:
        base, kwargs["config"] = base_class(loader, hf_config)
        loader = model_class(base, recorded(config))
    model, problems = from_pretrained(loader, folder, **kwargs)
    refuse(folder, problems)
    if dequantise:
        vars(model).pop("_weight_conversions", None)  # by which older versions of transformers would save it quantised
        model.__class__ = model_class(base, recorded(config)) if CONFIG_KEY in config else base
    if CONFIG_KEY in config:
        freeze_maps_(model)
        _check_counts(folder, model, recorded(config))
    return model if device is None else model.to(device)


def _dequantised(
    base: Any, model: Any, state_dict: Any, files: Any, load_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Loads weights as the transformers class `base` does, FP8 ones with ragged blocks too."""
    with_exact_numbers(load_config.weight_mapping)
    return base._load_pretrained_model(model, state_dict, files, load_config, *args, **kwargs)


def load_tokenizer(model: Path) -> Any:
    """Loads a model directory's tokenizer; ValueError if it has none."""
    from transformers import AutoTokenizer  # takes seconds, which a refusal need not

    read_config(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way
        raise ValueError(f"{model} has no usable tokenizer: {str(error)[:200]}") from error
    if len(tokenizer) < 16:  # transformers makes up an empty one where the files are missing
        raise ValueError(f"{model} has no tokenizer files; copy the original model's tokenizer there")
    return tokenizer


def _check_counts(folder: Path, model: PreTrainedModel, record: Mapping[str, Any]) -> None:
    """Refuses (ValueError) a record that leaves layers other experts than it says."""
    expected = record.get("kept_per_layer")
    try:
        loaded = {str(index): layer.shape.num_experts for index, layer in MoeModel.of(model).layers.items()}
    except ValueError:
        loaded = {}
    if loaded != expected:
        raise ValueError(
            f"{folder}: config.json has a damaged {CONFIG_KEY!r} entry: it makes layers of {loaded} experts, and says "
            f"{expected}"
        )
