"""Merged experts and mapped routers as checkpoints: loaded by us and by transformers alone."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import every_model
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.models import merging
from moeprune_ext.models.moe import MoeModel, find_moe_layers

# Experts stored one by one (OLMoE, Qwen3, Mixtral, ERNIE with a correction bias) and stacked (GPT-OSS, with biases).
FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "ernie4_5_moe", "gpt_oss")
E, KEPT = 8, 4


def merged_plan(model, active=None, seed=0):
    """Every layer merges, each otherwise; among the rows a copy and an expert that no row refers to."""
    generator = torch.Generator().manual_seed(seed)
    merges = {}
    for index in find_moe_layers(model):
        keep = torch.eye(E)[sorted(torch.randperm(E, generator=generator)[:KEPT].tolist())]
        noise = [0.3 * torch.randn(KEPT, E, generator=generator) for _ in range(2)]
        noise[0][0] = 0
        noise[1][:, 5] = -keep[:, 5]
        merges[index] = Merge(keep + noise[0], (keep + noise[1].abs() * (keep + noise[1] != 0)))
    return mp.PruningPlan.from_merges(merges, MoeModel.of(model).fingerprint, active=active)


def logits_of(model, tokens):
    with torch.no_grad():
        return torch.cat([model(row, use_cache=False).logits for row in tokens.split(1)])


def from_transformers(folder, monkeypatch, tmp_path, auto=AutoModelForCausalLM):
    """With the folder's own code, which transformers copies into a cache first."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return auto.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


@pytest.mark.parametrize("active", [None, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_computes_what_the_search_scored(name, active, tmp_path, monkeypatch):
    model, tokens = tiny_model(name), random_tokens()
    plan = merged_plan(model, active)
    model.save_pretrained(tmp_path / "full")
    score = mp.CandidateEvaluator(model, [tokens]).evaluate([plan])[0].esap
    full = logits_of(model, tokens)
    with mp.applied(model, plan):
        expected = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), full), "the model must be as it was"
    out = mp.export(tmp_path / "full", plan, tmp_path / "merged")
    ours, theirs = mp.load(out), from_transformers(out, monkeypatch, tmp_path)
    for loaded in (ours, theirs):
        got = logits_of(loaded, tokens)
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)
        overlap = mp.reference.overlap(full.flatten(0, 1).double(), got.flatten(0, 1).double())
        assert float(overlap["esap"].mean()) == pytest.approx(score, abs=1e-5)
        assert type(loaded).__name__ == type(model).__name__
        assert {layer.shape.num_experts for layer in find_moe_layers(loaded).values()} == {KEPT}
    prompt = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with mp.applied(model, plan):
        generated = model.generate(tokens[:, :6], **prompt)
    assert ours.generate(tokens[:, :6], **prompt).equal(generated)
    assert theirs.generate(tokens[:, :6], **prompt).equal(generated)
    pruned = copy.deepcopy(model)
    mp.prune_(pruned, plan)
    torch.testing.assert_close(logits_of(pruned, tokens), expected, rtol=0, atol=5e-5)


def test_the_modeling_file_needs_nothing_of_ours(tmp_path):
    """In a process that cannot import moeprune_ext, the folder alone is enough."""
    model, tokens = tiny_model("olmoe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    out = mp.export(tmp_path / "full", merged_plan(model), tmp_path / "merged")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    code = f"""
import sys
sys.modules["moeprune_ext"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
tokens = load_file({str(tmp_path / "tokens.safetensors")!r})["tokens"]
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
with torch.no_grad():
    save_file({{"logits": model(tokens, use_cache=False).logits}}, {str(tmp_path / "logits.safetensors")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = logits_of(mp.load(out), tokens)
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=0, atol=1e-4)
    # What it saved is such a folder again.
    assert (tmp_path / "again" / "modeling.py").read_text() == (out / "modeling.py").read_text()
    assert torch.equal(logits_of(mp.load(tmp_path / "again"), tokens), expected)


def test_a_plan_of_different_counts_loads_with_transformers_alone_too(tmp_path, monkeypatch):
    model, tokens = tiny_model("qwen3_moe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    kept = {0: [0, 3, 4], 1: [1, 2, 3, 4, 5, 6], 3: [0, 7]}
    plan = mp.PruningPlan(kept, dict.fromkeys(kept, E), active=1)
    with mp.applied(model, plan):
        expected = logits_of(model, tokens)
    out = mp.export(tmp_path / "full", plan, tmp_path / "uneven")
    for loaded in (mp.load(out), from_transformers(out, monkeypatch, tmp_path)):
        torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=0, atol=1e-5)
        assert [layer.shape.num_experts for layer in find_moe_layers(loaded).values()] == [3, 6, E, 2]
    headless = from_transformers(out, monkeypatch, tmp_path, AutoModel)  # as vLLM's Transformers backend has it
    with torch.no_grad():
        hidden = torch.cat([headless(row, use_cache=False).last_hidden_state for row in tokens.split(1)])
    torch.testing.assert_close(loaded.lm_head(hidden), expected, rtol=0, atol=1e-5)
    assert mp.PruningPlan.load(out / "pruning_plan.json") == plan
    for options in ({}, {"trust_remote_code": False}, {"ignore_mismatched_sizes": True}):  # it is no stock checkpoint
        with pytest.raises(ValueError, match="layers differ: pass trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(out, **options)


def test_bfloat16_weights_are_sums_in_float32_and_maps_stay_float32(tmp_path):
    model = tiny_model("mixtral").bfloat16()
    plan = merged_plan(model)
    model.save_pretrained(tmp_path / "full")
    out = mp.export(tmp_path / "full", plan, tmp_path / "merged")
    loaded = mp.load(out)
    assert loaded.dtype == torch.bfloat16
    for index, merge in plan.merges.items():
        before, after = find_moe_layers(model)[index], find_moe_layers(loaded)[index]
        exact = torch.einsum("ie,e...->i...", merge.experts.double(), before.experts.down_proj.detach().double())
        # one rounding to bfloat16, of at most half a unit in the last place
        torch.testing.assert_close(after.experts.down_proj.detach().double(), exact, rtol=2**-8, atol=1e-6)
        assert after.router.router_map.dtype == torch.float32
        assert torch.equal(after.router.router_map, merge.router)


def test_shards_and_experts_in_any_order(tmp_path):
    """A layer's experts in several shards: the sums need all of them, and each lands where its number stood."""
    model, tokens = tiny_model("olmoe"), random_tokens()
    plan = merged_plan(model)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    outs = [mp.export(tmp_path / name, plan, tmp_path / f"{name}-out") for name in ("one", "many")]
    assert torch.equal(*[logits_of(mp.load(out), tokens) for out in outs])
    assert len(list(outs[1].glob("*.safetensors"))) == len(list((tmp_path / "many").glob("*.safetensors")))


def pruned_again(loaded, tokens):
    """A plan for a loaded export, calibrated, applied and scored, and its logits."""
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(loaded, [tokens]), "reap"), 0.5)
    with mp.applied(loaded, plan):
        masked = logits_of(loaded, tokens)
    score = mp.CandidateEvaluator(loaded, [tokens]).evaluate([plan])[0].esap
    overlap = mp.reference.overlap(logits_of(loaded, tokens).flatten(0, 1).double(), masked.flatten(0, 1).double())
    assert float(overlap["esap"].mean()) == pytest.approx(score, abs=1e-5)
    return plan, masked


def test_a_merged_model_can_be_streamed_calibrated_and_pruned_in_memory(tmp_path):
    model, tokens = tiny_model("ernie4_5_moe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    out = mp.export(tmp_path / "full", merged_plan(model), tmp_path / "merged")
    loaded, streamed = mp.load(out), mp.load(out, stream="disk")
    torch.testing.assert_close(logits_of(streamed, tokens), logits_of(loaded, tokens), rtol=0, atol=1e-6)
    plan, masked = pruned_again(loaded, tokens)
    # Fewer rows of the same maps: the merges without those experts.
    rows = {
        index: Merge(m.experts[plan.kept[index]], m.router[plan.kept[index]])
        for index, m in merged_plan(model).merges.items()
    }
    with mp.applied(model, mp.PruningPlan.from_merges(rows)):
        torch.testing.assert_close(masked, logits_of(model, tokens), rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="the model it was made of"):
        mp.export(out, plan, tmp_path / "twice")


def save_and_load_again(model, folder, monkeypatch, tmp_path):
    """What save_pretrained writes, as we load it and as transformers does."""
    model.save_pretrained(folder)
    return mp.load(folder), from_transformers(folder, monkeypatch, tmp_path)


def test_loaded_exports_can_be_saved_again(tmp_path, monkeypatch):
    """By us or by transformers, and of a language model that was loaded out of a model of text and images."""
    tokens = every_model.tokens()
    for model_type in ("olmoe", "qwen3_5_moe"):
        model = every_model.tiny(model_type)
        model.save_pretrained(tmp_path / model_type / "full")
        out = mp.export(
            tmp_path / model_type / "full",
            merged_plan(mp.load(tmp_path / model_type / "full")),
            tmp_path / model_type / "out",
        )
        loaded = mp.load(out)
        expected = logits_of(loaded, tokens)
        assert not any(p.requires_grad for name, p in loaded.named_parameters() if "router_map" in name)
        for again in save_and_load_again(loaded, tmp_path / model_type / "again", monkeypatch, tmp_path):
            torch.testing.assert_close(logits_of(again, tokens), expected, rtol=0, atol=1e-6)


def test_a_model_of_text_and_images_keeps_both(tmp_path, monkeypatch):
    """An export that its own multimodal class loads under trust_remote_code, with the language model's logits."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tokens = every_model.tokens()
    for model_type in ("qwen3_5_moe", "qwen3_vl_moe"):
        model = every_model.tiny(model_type)
        source = tmp_path / model_type
        model.save_pretrained(source / "full")
        alone = mp.load(source / "full")
        uneven = mp.PruningPlan({0: [0, 1, 5], 1: [2, 3, 4, 6]}, {0: E, 1: E})
        for name, plan in (("merged", merged_plan(alone)), ("uneven", uneven)):
            out = mp.export(source / "full", plan, source / name)
            whole = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
            assert type(whole).__name__.endswith("ForConditionalGeneration")
            torch.testing.assert_close(logits_of(whole, tokens), logits_of(mp.load(out), tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["uneven", "merged", "uniform"])
def test_a_model_pruned_in_place_can_be_saved_and_loaded(kind, tmp_path):
    model, tokens = tiny_model("mixtral"), random_tokens()
    uneven = mp.PruningPlan({0: [0, 3, 4], 2: [1, 7]}, {0: E, 2: E})
    mp.prune_(model, merged_plan(model) if kind == "merged" else uneven)
    if kind == "uniform":  # in two steps: what the first recorded no longer holds
        counts = {index: layer.shape.num_experts for index, layer in find_moe_layers(model).items()}
        mp.prune_(model, mp.PruningPlan({index: [0, 1] for index in counts}, counts))
        assert not hasattr(model.config, "moeprune") and model.config.num_local_experts == 2
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(mp.load(tmp_path / "saved"), tokens), logits_of(model, tokens))


def test_each_stored_expert_is_read_once_for_each_shard(tmp_path, monkeypatch):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    module = importlib.import_module("moeprune_ext.checkpoint.weights")
    calls = []
    monkeypatch.setattr(module, "combined", lambda *args: calls.append(args) or merging.combined(*args))
    mp.export(tmp_path / "full", merged_plan(model), tmp_path / "out")
    assert len(calls) == 4 * 3  # layers, projections


def test_maps_tell_merged_models_apart(tmp_path):
    """Two merges of one model are two models: a plan for one is refused by the other."""
    model, tokens = tiny_model("olmoe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    outs = [mp.export(tmp_path / "full", merged_plan(model, seed=seed), tmp_path / f"{seed}") for seed in (0, 1)]
    first, second = map(mp.load, outs)
    assert read_checkpoint(outs[0]).fingerprint == MoeModel.of(first).fingerprint != MoeModel.of(second).fingerprint
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(first, [tokens]), "reap"), 0.5)
    with pytest.raises(ValueError, match="another model"), mp.applied(second, plan):
        pass


def test_ernies_router_gives_half_precision_weights(tmp_path):
    """It computes in float32 in a model that does not: what is scored rounds as the export does."""
    tiny_model("ernie4_5_moe").bfloat16().save_pretrained(tmp_path / "full")
    model, tokens = mp.load(tmp_path / "full"), random_tokens()
    plan = merged_plan(model)
    with mp.applied(model, plan):
        applied = logits_of(model, tokens)
    out = mp.load(mp.export(tmp_path / "full", plan, tmp_path / "out"))
    assert torch.equal(applied, logits_of(out, tokens))


def test_a_single_numbered_shard_keeps_its_index(tmp_path):
    model, tokens = tiny_model("olmoe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    weights = tmp_path / "full" / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(tmp_path / "full" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "full" / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = merged_plan(model)
    with mp.applied(model, plan):
        expected = logits_of(model, tokens)
    loaded = mp.load(mp.export(tmp_path / "full", plan, tmp_path / "out"))
    torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=0, atol=5e-5)


def test_a_merged_router_whose_matrix_lies_deeper_can_be_searched_again(tmp_path):
    model, tokens = every_model.tiny("hunyuan_v1_moe"), every_model.tokens()
    model.save_pretrained(tmp_path / "full")
    loaded = mp.load(mp.export(tmp_path / "full", merged_plan(model), tmp_path / "out"))
    pruned_again(loaded, tokens)


def test_plans_of_merges_are_read_back(tmp_path):
    plan = merged_plan(tiny_model("olmoe"), active=1)
    plan.save(tmp_path / "merged.json")
    assert mp.PruningPlan.load(tmp_path / "merged.json") == plan
    pruning = mp.PruningPlan({0: [1, 2]}, {0: 8}, active=2)
    pruning.save(tmp_path / "plan.json")
    assert mp.PruningPlan.load(tmp_path / "plan.json") == pruning
    save_file({"0.experts": torch.eye(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no plan")
    for name in ("other.safetensors", "text", "absent"):
        with pytest.raises(ValueError, match=name):
            mp.PruningPlan.load(tmp_path / name)


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    grouped = tiny_model("deepseek_v3")
    grouped.save_pretrained(tmp_path / "grouped")
    good = merged_plan(model)
    few = mp.PruningPlan.from_merges({0: Merge(good.merges[0].experts[:1], good.merges[0].router[:1])})
    everyone = {index: list(range(E)) for index in range(4)}
    cases = [
        ("full", mp.PruningPlan.from_merges(good.merges, "other:0"), "another model"),
        ("full", few, "selects 2"),
        ("full", mp.PruningPlan.from_merges({i: Merge(torch.eye(E), torch.eye(E)) for i in range(4)}), "fewer experts"),
        (
            "full",
            mp.PruningPlan.from_merges({0: Merge(good.merges[0].experts, torch.zeros(KEPT, E))}),
            "must refer to some",
        ),
        ("full", mp.PruningPlan({0: [0]}, {0: E}), "needs at least 2"),
        ("full", mp.PruningPlan(everyone, dict.fromkeys(everyone, E), active=3), "3 experts active"),
        ("grouped", mp.PruningPlan.from_merges({1: good.merges[1]}), "groups"),
    ]
    for source, plan, message in cases:
        with pytest.raises(ValueError, match=message):
            mp.export(tmp_path / source, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    with pytest.raises(ValueError, match="distinct and in"):  # more than before
        mp.PruningPlan.from_merges({0: Merge(torch.ones(9, E), torch.ones(9, E))})
    with pytest.raises(ValueError, match="5 experts active"):
        mp.PruningPlan({0: [0, 1]}, {0: E}, active=5)
    with pytest.raises(ValueError, match="not finite"):
        Merge(torch.full((KEPT, E), torch.nan), torch.ones(KEPT, E))
    (tmp_path / "full" / "modeling.py").write_text("their own")
    with pytest.raises(ValueError, match="modeling.py of its own"):
        mp.export(tmp_path / "full", good, tmp_path / "out")


def test_damaged_records_are_refused(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    out = mp.export(tmp_path / "full", merged_plan(model), tmp_path / "merged")
    good = json.loads((out / "config.json").read_text())
    path = "model.layers.0.mlp.experts.down_proj"
    record = good["moeprune"]
    rule = record["routers"]["model.layers.0.mlp.gate"]
    for damage in (
        record | {"routers": {}},
        record | {"integers": {}},
        record | {"integers": {"model.layers.0.mlp.experts.num_experts": "4"}},
        record | {"routers": {"model.layers.0.mlp.gate": rule | {"places": [0, 1, 9]}}},
        record | {"routers": {"model.layers.0.mlp.gate": rule | {"rows": -1}}},
        record | {"routers": {"model.norm": rule}},
        {"tensors": {path: [-1, 32, 24]}},
        {"tensors": {path: [99, 32, 24]}},
        {"tensors": {"model.layers.9.mlp.experts.down_proj": [4, 32, 24]}},
        {"tensors": {}, "integers": {"model.layers.0.mlp.gate.weight": 3}},
        {"tensors": {}, "routers": {"model.layers.0.mlp.gate": {"score": "other"}}},
        {"tensors": None},
        [],
    ):
        (out / "config.json").write_text(json.dumps(good | {"moeprune": damage}))
        with pytest.raises(ValueError, match="moeprune|router_map"):
            mp.load(out)


@pytest.mark.parametrize("merges", [True, False])
def test_exports_are_pickled_copied_and_cast_as_other_models(merges, tmp_path):
    """Maps stay float32, as they were found."""
    model, tokens = tiny_model("ernie4_5_moe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    counts = {1: [0, 3, 4], 2: [1, 2, 3, 4, 5, 6]}
    plan = merged_plan(model) if merges else mp.PruningPlan(counts, dict.fromkeys(counts, E))
    loaded = mp.load(mp.export(tmp_path / "full", plan, tmp_path / "out"))
    expected = logits_of(loaded, tokens)
    again = pickle.loads(pickle.dumps(loaded))
    for other in (again, copy.deepcopy(loaded)):
        assert torch.equal(logits_of(other, tokens), expected) and type(other).__name__ == type(loaded).__name__
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(mp.load(tmp_path / "again"), tokens), expected)
    maps = {name: value.clone() for name, value in loaded.state_dict().items() if name.endswith("router_map")}
    loaded.to(torch.bfloat16)
    assert bool(maps) == merges and loaded.lm_head.weight.dtype == torch.bfloat16
    for name, value in maps.items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.isfinite(logits_of(loaded, tokens)).all()
