"""Costs: counted by hand, and against what an export stores."""

import pytest
import torch
from every_model import tiny, tokens
from safetensors.torch import load_file
from tiny_models import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeprune_ext as mp
from moeprune_ext.allocation.budget import Kept, uniform_plan, unscored
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.models.costs import bytes_of, costs, experts_that_fit, kv_cache_bytes
from moeprune_ext.models.moe import find_moe_layers

# The tiny OLMoE: 4 layers, hidden size 32, 4 heads of 8 (2 for keys and values), 8 experts of width 24, 2 per token.
ATTENTION = 32 * 32 + 16 * 32 + 16 * 32 + 32 * 32
EXPERT = 3 * 32 * 24
HEAD = 97 * 32
NORMS = 4 * (2 * 32 + 32 + 16) + 32  # two a layer and those of queries and keys, one at the end


def pruning(model, keep, active=None):
    shapes = {index: layer.shape for index, layer in find_moe_layers(model).items()}
    kept = {}
    for index, shape in shapes.items():
        size = shape.num_experts // shape.n_group
        kept[index] = [g * size + e for g in range(shape.n_group) for e in range(keep // shape.n_group)]
    return mp.PruningPlan(kept, {index: shape.num_experts for index, shape in shapes.items()}, active=active)


def merging(model, keep, active=None):
    matrix = torch.rand(keep, 8, generator=torch.Generator().manual_seed(0)) / 8
    return mp.PruningPlan.from_merges({index: Merge(matrix, matrix) for index in find_moe_layers(model)}, active=active)


@pytest.mark.parametrize(
    ("make", "kept", "active", "router", "map_weights"),
    [
        (None, 8, 2, 8 * 32, 0),
        (lambda model: pruning(model, 3), 3, 2, 3 * 32, 0),
        (lambda model: pruning(model, 8, active=1), 8, 1, 8 * 32, 0),
        (lambda model: pruning(model, 1, active=1), 1, 1, 32, 0),
        (lambda model: merging(model, 3), 3, 2, 8 * 32, 3 * 8),
        (lambda model: merging(model, 3, active=1), 3, 1, 8 * 32, 3 * 8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_are_those_counted_by_hand(make, kept, active, router, map_weights, dtype):
    model = tiny_model("olmoe").to(dtype)
    found = costs(model, make and make(model))
    assert found.experts == 4 * kept
    assert found.flops_per_token == 2 * (4 * (ATTENTION + router + map_weights + active * EXPERT) + HEAD)
    stored = 4 * (ATTENTION + router + kept * EXPERT) + 2 * HEAD + NORMS  # the embedding is as large as the head
    assert found.bytes == stored * dtype.itemsize + 4 * 4 * map_weights


def test_a_head_that_is_the_embedding_is_stored_once_and_multiplied_with():
    config = OlmoeConfig(**{**CONFIGS["olmoe"]().to_dict(), "tie_word_embeddings": True})
    tied, untied = costs(AutoModelForCausalLM.from_config(config)), costs(tiny_model("olmoe"))
    assert tied.flops_per_token == untied.flops_per_token and tied.bytes == untied.bytes - 4 * HEAD


def test_a_dense_layer_and_a_shared_expert_count_in_full():
    """Qwen2-MoE: layer 1 is dense, of width 24; the others have a shared expert of width 16 behind a gate."""
    attention = ATTENTION  # its biases are no matrices
    moe = attention + 8 * 32 + 2 * EXPERT + 3 * 32 * 16 + 32
    assert costs(tiny_model("qwen2_moe")).flops_per_token == 2 * (3 * moe + attention + EXPERT + HEAD)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_costs_are_those_of_the_export(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    plans = [pruning(model, 4)] + ([] if "deepseek" in family else [merging(model, 4)])
    for plan in plans:
        out = mp.export(tmp_path / "model", plan, tmp_path / f"merging-{bool(plan.merges)}")
        stored = load_file(out / "model.safetensors")
        assert costs(model, plan).bytes == sum(tensor.nbytes for tensor in stored.values())
        assert costs(mp.load(out)) == costs(model, plan)


def test_a_skeleton_without_weights_costs_the_same():
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    model = tiny_model("mixtral")
    for plan in (None, pruning(model, 4), merging(model, 4)):
        assert costs(skeleton, plan) == costs(model, plan)


def test_a_plan_of_layers_that_the_model_lacks_is_refused():
    plan = mp.PruningPlan({9: [0, 1]}, {9: 8})
    with pytest.raises(ValueError, match=r"the plan names layers \[9\]"):
        costs(tiny_model("olmoe"), plan)


# ---- the KV cache, and what fits

# Heads of their own; a window; windows, chunks or linear attention in turn; layers whose heads differ; latent.
CACHED = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "llama4_text",
    "gemma4_text",
    "qwen3_next",
    "lfm2_moe",
    "nemotron_h",
    "longcat_flash",
    "deepseek_v3",
)


def cached(model, context):
    """The keys and values that transformers caches, and the most heads of any."""
    with torch.no_grad():
        layers = model(tokens(1, context), use_cache=True).past_key_values.layers
    tensors = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    tensors = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
    return sum(tensor.nbytes for tensor in tensors), max(tensor.shape[1] for tensor in tensors)


@pytest.mark.parametrize("model_type", CACHED)
def test_the_cache_is_the_one_that_transformers_holds(model_type):
    model = tiny(model_type)
    for context in (50, 100):  # windows are of 64
        held, heads = cached(model, context)
        if getattr(model.config.get_text_config(), "kv_lora_rank", None) and heads > 1:
            pytest.skip("this transformers expands the latent vectors before it caches them")
        expected = kv_cache_bytes(model, context)
        # A window's layer of transformers holds one token less between two steps than its window.
        assert held <= expected <= held * 64 / 63 and (context > 64 or held == expected)
    assert kv_cache_bytes(model.to(torch.bfloat16), 50) * 2 == kv_cache_bytes(tiny(model_type), 50)


def fits(model, kept):
    """The bytes of every layer keeping `kept` experts, and of the cache of 100 tokens."""
    return costs(model, pruning(model, kept)).bytes + kv_cache_bytes(model, 100)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])  # groups lose two at a time
def test_as_many_experts_fit_as_take_the_size(family):
    model = tiny_model(family)
    layers = len(find_moe_layers(model))
    unit = 2 if family == "deepseek_v3" else 1
    assert experts_that_fit(model, fits(model, 6), context=100) == 6 * layers
    assert experts_that_fit(model, fits(model, 6) - 1, context=100) == 6 * layers - unit
    assert experts_that_fit(model, 2**40, context=100) == 8 * layers
    assert experts_that_fit(model, fits(model, 6), context=200) < 6 * layers


def test_every_plan_of_as_many_experts_fits():
    """Also where experts of layers differ in size: with one layer in float64 the smaller ones are not counted on."""
    model = tiny_model("olmoe")
    shapes = {index: layer.shape for index, layer in find_moe_layers(model).items()}
    find_moe_layers(model)[2].experts.double()
    size = fits(model, 5)
    kept = experts_that_fit(model, size, context=100)
    for dearest in (0, 2):
        counts = {index: 2 for index in shapes}
        left = kept - sum(counts.values())
        for index in [dearest, *(i for i in shapes if i != dearest)]:
            counts[index] += min(left, 6)
            left -= min(left, 6)
        plan = mp.PruningPlan({index: list(range(n)) for index, n in counts.items()}, {index: 8 for index in shapes})
        assert costs(model, plan).bytes + kv_cache_bytes(model, 100) <= size
    assert kept < 20


def test_what_fits_is_within_the_limits_and_needs_no_weights():
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIGS["olmoe"]())
    model = tiny_model("olmoe")
    scores = unscored(mp.MoeModel.of(skeleton).shapes).constrained(multiple_of=3)
    size = fits(model, 6) - 1
    kept = experts_that_fit(skeleton, size, context=100, shapes=scores.shapes)
    assert kept == 21 and costs(model, uniform_plan(scores, Kept(kept))).bytes < size
    assert experts_that_fit(skeleton, 2**40, shapes=scores.shapes) == 24
    with pytest.raises(ValueError, match=r"fewest experts that can stay \(12\) .* KV cache of 100 tokens"):
        experts_that_fit(skeleton, fits(model, 3) - 1, context=100, shapes=scores.shapes)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("16000 MiB", 16000 * 2**20), ("1.5tib", 3 * 2**39), ("3kB", 3000)],
)
def test_sizes_have_units_of_two_kinds(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "-1GB", "GB", "1e3GB", "0GB", "", "24 bytes"])
def test_sizes_without_a_clear_unit_are_refused(text):
    with pytest.raises(ValueError, match="such as 24GiB"):
        bytes_of(text)
