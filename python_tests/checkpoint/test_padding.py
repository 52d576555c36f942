"""Padded exports: stock checkpoints that compute what the uneven plan computes, and what cannot be padded."""

import every_model
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge

FAMILIES = ("deepseek_v3", "gpt_oss", "glm4_moe", "minimax_m2")


def model_of(family):
    if family in ("deepseek_v3", "gpt_oss"):
        return tiny_model(family)
    model = every_model.tiny(family)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(0, 0.1)
    return model


def uneven(model, tokens, fewest=2):
    """Layers lose as many experts as they can, half of that, none, in turn."""
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap").constrained(min_kept_per_group=fewest)
    pruned = {}
    for number, (index, shape) in enumerate(scores.shapes.items()):
        most = shape.capacity // shape.n_group
        pruned[index] = (most, most // 2, most)[number % 3] * shape.n_group
    return mp.PruningPlan.from_pruned_counts(scores, pruned)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_what_the_uneven_plan_does(family, repaired, tmp_path):
    model = model_of(family)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(2, min(90, vocabulary), (8, 24), generator=torch.Generator().manual_seed(0))
    plan = uneven(model, tokens)
    assert not plan.is_uniform
    if repaired:
        plan = mp.repair(model, plan, [tokens]).plan
        assert plan.repaired_layers
    model.save_pretrained(tmp_path / "full")
    with mp.applied(model, plan):
        expected = logits(model, tokens)
    out = mp.export(tmp_path / "full", plan, tmp_path / "out", pad=True)
    assert not (out / "modeling.py").exists()
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(stock, tokens), expected, rtol=0, atol=5e-5)
    most = max(map(len, plan.kept.values()))
    assert {layer.shape.num_experts for layer in mp.MoeModel.of(stock).layers.values()} == {most}
    assert mp.PruningPlan.load(out / "pruning_plan.json").kept == plan.kept
    assert "keeps them from being chosen" in (out / "README.md").read_text()


def test_kept_experts_are_the_stored_bytes_and_absent_ones_zeros(tmp_path):
    model, tokens = tiny_model("deepseek_v3"), random_tokens()
    plan = uneven(model, tokens)
    model.save_pretrained(tmp_path / "full")
    before = load_file(tmp_path / "full" / "model.safetensors")
    after = load_file(mp.export(tmp_path / "full", plan, tmp_path / "out", pad=True) / "model.safetensors")
    most, zeros = max(map(len, plan.kept.values())), 0
    for index, kept in plan.kept.items():
        name = f"model.layers.{index}.mlp.experts.{{}}.down_proj.weight"
        stored = [after[name.format(row)] for row in range(most)]
        zeros += sum(not tensor.any() for tensor in stored)
        rows = iter(stored)
        for expert in kept:  # in their order, with nothing between them
            tensor = next(rows)
            while not tensor.any():
                tensor = next(rows)
            assert torch.equal(tensor, before[name.format(expert)])
        assert name.format(most) not in after
    assert zeros == sum(most - len(kept) for kept in plan.kept.values()) > 0


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "ernie4_5_moe", "deepseek_v2"])
def test_routers_in_which_absent_experts_would_count_are_refused(family, tmp_path):
    model, tokens = tiny_model(family), random_tokens()
    plan = uneven(model, tokens)
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"\(layer \d\) cannot be padded"):
        mp.export(tmp_path / "full", plan, tmp_path / "out", pad=True)
    assert not (tmp_path / "out").exists()


def test_routers_that_map_their_scores_are_refused(tmp_path):
    tiny_model("gpt_oss").save_pretrained(tmp_path / "full")
    maps = mp.PruningPlan.from_merges({1: Merge(torch.eye(8)[:4], torch.eye(8)[:4])})
    with pytest.raises(ValueError, match="map their scores"):
        mp.export(tmp_path / "full", maps, tmp_path / "out", pad=True)


def test_a_uniform_plan_needs_no_padding(tmp_path):
    model, tokens = tiny_model("olmoe"), random_tokens()
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [tokens]), "reap"), 0.5)
    model.save_pretrained(tmp_path / "full")
    outs = [mp.export(tmp_path / "full", plan, tmp_path / str(pad), pad=pad) for pad in (False, True)]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
