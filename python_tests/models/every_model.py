"""A tiny random model of every Mixture-of-Experts architecture of the installed transformers.

The list is not written down: it is every causal or multimodal language model that transformers can make, whose
configuration counts experts and whose module has a class of them. Configurations are shrunk by the names of their
sizes; ODD has what a name cannot tell.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

logging.set_verbosity_error()  # default configurations that do not fit together

VOCABULARY = 97
LAYERS = 4

# Sizes by the names that configurations give them: the first pattern that matches the whole name.
SIZES: dict[str, Any] = {
    r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input|ngram_vocab_size_base": VOCABULARY,
    r"(moe_|out_|text_|audio_)?hidden_size|adapter_(in|out)_dim|d_model|projection_dim|output_dim|ple_embed_dim": 32,
    r"num_hidden_layers|encoder_layers": LAYERS,
    r"depth|n(um)?_layers": 2,  # longcat_flash's layers hold two of the decoder's
    r"(swa_|encoder_)?(num_)?(attention_)?heads|num_sliding_attention_heads": 4,
    r"(swa_)?num_key_value_heads": 2,
    r"(swa_|index_)?head_dim|kv_channels|qk_(rope|nope)_head_dim|v_head_dim|linear_(key_|value_)?head_dim": 8,
    r"qk_head_dim|index_topk": 16,
    r"linear_num_(value_)?heads": 4,
    r"linear_num_key_heads|index_n_heads|heads_per_ngram|split_ngram_parts": 2,
    r"(kv|q|o|gated_norm)_lora_rank|gated_norm_rank|hc_lowrank|o_groups|d_rel": 8,
    r"max_position_embeddings": 128,
    r"(moe_)?num_experts|num_local_experts|n_routed_experts|num_routed_experts": 8,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts": 2,
    r"n_shared_experts|(moe_)?num_shared_experts": 1,
    r".*intermediate_size(_mlp)?|.*ffn_hidden_size|share_expert_dim|.*ffn_dim": 24,
    r"n_group|num_expert_group|n_groups|mamba_n_groups": 2,
    r"topk_group": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"moe_layer_end_index": LAYERS - 1,
    r"initializer_range": 0.3,
    r"(bos|eos|pad)_token_id": 1,
    r"(image|video|audio)_token_(id|index)|image_(start|end|break)_token_(id|index)|vision_.*_token_id": 2,
    r"sliding_window(_size)?|keep_window_size|attention_chunk_size|index_block_size|block_size|rel_extent": 64,
    r".*chunk_size": 16,
    r"mamba_d_state|ssm_state_size|mamba_dt_rank|mamba_(num|n)_heads|mamba_(d_head|head_dim)": 8,
    r"image_size|n_mel_bins": 16,
    r"(spatial_)?patch_size": 4,
    r"num_nextn_predict_layers": 0,
}
# None in a configuration may mean "not used"; these sizes are needed.
NEEDED = (
    r"head_dim|n_group|topk_group|num_experts_per_tok|sliding_window|.*_experts|moe_intermediate_size|top_k_experts"
)

_MIXED = ["full_attention", "sliding_attention"] * 2
_SPARSE = ["dense", *["sparse"] * (LAYERS - 1)]
# What a name does not tell: configuration keys of the language model, by model type.
ODD: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": _SPARSE},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "gemma4_text": {"enable_moe_block": True, "layer_types": _MIXED},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {"head_dim": 16},
    "muse_spark_audio": {"hidden_sizes": [8] * 4},
    "dots3_note_vision_encoder": {"mlp_layer_types": _SPARSE, "per_layer_config": {}},
    "radio": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Other settings of a type that published models have: DeepSeek-MoE and V2-Lite choose among all experts,
# and so do Kimi-K2 and GLM-4.5, in one group.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2, greedy": ("deepseek_v2", {"topk_method": "greedy", "n_group": 1, "norm_topk_prob": False}),
    "deepseek_v3, one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "ernie4_5_moe, dense in between": ("ernie4_5_moe", {"moe_layer_interval": 2, "num_hidden_layers": 6}),
    "qwen2_moe, dense in between": ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
}
AUTO_CLASSES = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM)


def tokens(rows: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def model_types() -> tuple[str, ...]:
    """Model types whose configuration counts experts and whose language model's module has a class of them."""
    found = []
    for model_type in sorted(CONFIG_MAPPING):
        try:
            default = CONFIG_MAPPING[model_type]()
            text = default.get_text_config()
        except Exception:  # every class validates in its own way; assistants of other models have no defaults
            continue
        auto = _auto_class(type(default))
        if auto is None or "expert" not in json.dumps(text.to_dict(), default=str):
            continue
        classes = [
            mapping[type(c)]
            for mapping in (auto._model_mapping, MODEL_MAPPING)
            for c in (default, text)
            if type(c) in mapping
        ]
        names = {name for one in classes if isinstance(one, type) for name in vars(sys.modules[one.__module__])}
        if any(re.search(r"Experts$", name) for name in names):
            found.append(model_type)
    return tuple(sorted([*found, *VARIANTS]))


def _auto_class(config: type[PreTrainedConfig]) -> Any:
    return next((auto for auto in AUTO_CLASSES if config in auto._model_mapping), None)


def tiny(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model, biases and routers random too. model_type: also a name in VARIANTS."""
    model_type, settings = VARIANTS.get(model_type, (model_type, {}))
    default = CONFIG_MAPPING[model_type]()
    config = type(default)(**shrunk(default) | settings)
    torch.manual_seed(seed)
    model = _auto_class(type(config)).from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # DeepSeek-V4's experts by token
                tensor.copy_(torch.stack([torch.randperm(8)[: tensor.shape[1]] for _ in range(len(tensor))]))
            elif name.endswith("balancing_biases"):  # of Zaya: loading sets the last to -1, whatever was stored
                tensor[:-1].normal_(0, 0.1)
            elif "bias" in name and tensor.is_floating_point():
                tensor.normal_(0, 0.1)
            elif (
                tensor.ndim == 2 and tensor.is_floating_point() and not tensor.any()
            ):  # routers that a transformers version leaves at zero
                tensor.normal_(0, 0.3)
    return model


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """Keyword arguments of a small configuration of the same class."""
    values = default.to_dict()
    small = {}
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number or (value is None and re.fullmatch(NEEDED, key)):
            size = next((size for name, size in SIZES.items() if re.fullmatch(name, key)), None)
            if size is not None:
                small[key] = size
    if values.get("kv_lora_rank") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= ODD.get(default.model_type, {})
    for name in default.sub_configs or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            small[name] = {**shrunk(part), "model_type": part.model_type}
    return small
