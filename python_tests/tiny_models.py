"""Tiny random models of the families the papers prune, for tests: seeded, a few kilobytes, every option in use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 97
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
_LATENT_SIZES = _SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
)

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        head_dim=8,
        norm_topk_prob=True,
    ),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **_SIZES,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=3,
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **_LATENT_SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_LATENT_SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_SIZES, num_local_experts=8, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 4
    ),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model whose biases and correction biases are random too, so that forgetting one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                tensor.normal_(0, 0.1)
            elif tensor.ndim == 2 and not tensor.any():  # routers that a transformers version leaves at zero
                tensor.normal_(0, 0.3)
    return model


def random_tokens(rows: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def rotation(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def logits_of(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The model's logits, of `random_tokens()` if no tokens are given."""
    with torch.no_grad():
        return model(random_tokens() if tokens is None else tokens, use_cache=False).logits
