"""Tiny random models of many architectures, plans for them, and what transformers says: for tests of real servers."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge

PROMPTS, NEW = 12, 24
SIZES = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
)
QWEN = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1)
DEEPSEEK = dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=64)
FAMILIES = {
    "qwen3_moe": dict(**QWEN, head_dim=32, norm_topk_prob=True),
    "qwen2_moe": dict(**QWEN, shared_expert_intermediate_size=64),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "glm4_moe": dict(**DEEPSEEK, head_dim=32, n_group=1, topk_group=1, first_k_dense_replace=1),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=32),
    "ernie4_5_moe": dict(
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=3,
    ),
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=2),
    "dots1": dict(**DEEPSEEK, head_dim=32, n_group=1, topk_group=1, first_k_dense_replace=1),
    "flex_olmo": dict(num_experts=8, num_experts_per_tok=2),
}
DEEPSEEK_V3 = dict(
    **DEEPSEEK,
    num_key_value_heads=4,
    kv_lora_rank=512,
    q_lora_rank=32,
    qk_rope_head_dim=64,
    qk_nope_head_dim=32,
    v_head_dim=32,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    topk_method="noaux_tc",  # as in the published configuration, which vLLM reads and transformers does not
    scoring_func="sigmoid",
)
MORE = {  # of which vLLM's CPU backend computes some otherwise than transformers, without any pruning too
    "deepseek_v3": DEEPSEEK_V3,
    "phimoe": dict(num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True),
    "qwen3_next": dict(
        **QWEN,
        head_dim=32,
        shared_expert_intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    ),
    "minimax_m2": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=32, rotary_dim=32),
    "lfm2_moe": dict(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"] * 2,
        tie_word_embeddings=True,
    ),
}
KINDS = ("uniform", "uneven", "merged")
# What this vLLM computes otherwise than transformers on a CPU, without any pruning too (Qwen3-Next wants bfloat16):
ZERO_BIAS = "ernie4_5_moe"  # its CPU router drops the correction bias of softmax routing


def model_of(family, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **(FAMILIES | MORE)[family], **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and "rotary" not in name:
                tensor.normal_(0, 0.0 if family == ZERO_BIAS and "correction" in name else 0.05)
            elif tensor.ndim >= 2 and "embed" not in name:
                tensor.normal_(0, 0.15 if "norm" not in name else 0.02)
    return model


def save_published(model, folder):
    """Saves a model with the names that published configurations have, which transformers 5 no longer writes."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", "default") != "default"
    config |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": rope if scaled else None}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config["model_type"] == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    if config["model_type"] == "minimax_m2":
        config |= {"shared_intermediate_size": 0, "scoring_func": "sigmoid"}
    if config["model_type"] == "dots1":
        config["scoring_func"] = "sigmoid"
    file.write_text(json.dumps(config, indent=2))
    return folder


def plan_of(kind, model):
    """Uniform, uneven, or uneven and behind maps."""
    shapes = mp.MoeModel.of(model).shapes
    tokens = torch.randint(2, 256, (8, 32), generator=torch.Generator().manual_seed(1))
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap")
    if kind == "uniform":
        return mp.uniform_plan(scores, 0.25)
    step = {index: shape.n_group for index, shape in shapes.items()}
    pruned = {index: (4, 2, 0, 2)[number % 4] // step[index] * step[index] for number, index in enumerate(shapes)}
    plan = mp.PruningPlan.from_pruned_counts(scores, pruned)
    if kind == "uneven":
        return plan
    generator, merges = torch.Generator().manual_seed(2), {}
    for index, kept in plan.kept.items():
        both = torch.eye(shapes[index].num_experts)[kept], torch.eye(shapes[index].num_experts)[kept]
        experts, router = (m + 0.2 * torch.rand(m.shape, generator=generator) for m in both)
        if len(kept) < shapes[index].num_experts:
            merges[index] = Merge(experts, router)
    return mp.PruningPlan.from_merges(merges)


def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 30, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(2, 256, (length,), generator=generator).tolist() for length in lengths]


def greedy(model):
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts()]
