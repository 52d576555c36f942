"""Fewer active experts as stock checkpoints."""

import every_model
import pytest
import torch
from tiny_models import logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.models.moe import find_moe_layers

# Experts stored one by one (OLMoE, Qwen3, Mixtral, ERNIE with a correction bias) and stacked (GPT-OSS, with biases).
FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "ernie4_5_moe", "gpt_oss")
E, KEPT = 8, 4


@pytest.mark.parametrize("keep", [E, KEPT, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_active_experts_are_a_stock_checkpoint(name, keep, tmp_path):
    """Alone and with pruning, down to fewer experts than the full model gives each token."""
    model, tokens = tiny_model(name), random_tokens()
    model.save_pretrained(tmp_path / "full")
    kept = {index: list(range(E - keep, E)) for index in find_moe_layers(model)}
    plan = mp.PruningPlan(kept, dict.fromkeys(kept, E), active=1)
    score = mp.CandidateEvaluator(model, [tokens]).evaluate([plan])[0].esap
    full = logits_of(model, tokens)
    with mp.applied(model, plan):
        expected = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), full)
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=0, atol=1e-5)
    assert {layer.shape.top_k for layer in find_moe_layers(loaded).values()} == {1}
    assert loaded.config.num_experts_per_tok == 1
    overlap = mp.reference.overlap(full.flatten(0, 1).double(), expected.flatten(0, 1).double())
    assert float(overlap["esap"].mean()) == pytest.approx(score, abs=1e-5)
    mp.prune_(model, plan)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=1e-5)
    assert model.config.num_experts_per_tok == 1


def test_experts_per_token_may_be_listed_by_layer(tmp_path):
    config = every_model.tiny("hunyuan_v1_moe").config
    config.moe_topk = [2] * config.num_hidden_layers
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), every_model.tokens()
    model.save_pretrained(tmp_path / "full")
    plan = mp.PruningPlan({0: list(range(E))}, {0: E}, active=1)
    with mp.applied(model, plan):
        expected = logits_of(model, tokens)
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    torch.testing.assert_close(logits_of(mp.load(out), tokens), expected, rtol=0, atol=1e-5)
    mp.prune_(model, plan)
    assert model.config.moe_topk == [1] * config.num_hidden_layers
