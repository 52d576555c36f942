"""Costs: counted by hand, and against what an export stores."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.models.costs import costs
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
