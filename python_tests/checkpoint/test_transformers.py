"""Exports in transformers' hands: losses, offloading, casts, copies, and what is said where their code is missing."""

import copy
import importlib
import json
import pickle
import sys
import threading

import pytest
import torch
from tiny_models import logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.checkpoint.read import read_hf_config
from moeprune_ext.modeling import model_class
from moeprune_ext.models.moe import MoeModel, find_moe_layers

E = 8
# Those of the tests' families whose models have a load-balancing loss, stored one by one and stacked.
WITH_LOSS = ("ernie4_5_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
WAYS = ("ours", "transformers", "in memory")


def uneven_plan(model):
    """3, 6, 3, 6, ... experts, so that every number has two layers where there are four."""
    kept = {index: ([0, 3, 4], [1, 2, 3, 4, 5, 6])[i % 2] for i, index in enumerate(find_moe_layers(model))}
    return mp.PruningPlan(kept, dict.fromkeys(kept, E))


def merged_plan(model):
    """Every layer's experts become three sums of two each, whose routers map the scores of all."""
    rows = torch.zeros(3, E)
    rows[[0, 0, 1, 1, 2, 2], [0, 1, 2, 5, 4, 7]] = torch.tensor([0.6, 0.4, 0.7, 0.3, 0.5, 0.5])
    merges = dict.fromkeys(find_moe_layers(model), Merge(rows, (rows != 0).float()))
    return mp.PruningPlan.from_merges(merges, MoeModel.of(model).fingerprint)


PLANS = {"uneven": uneven_plan, "merged": merged_plan}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(folder, way, **options): with transformers, by the folder's own code, which is copied into a cache first."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load_(folder, way, **options):
        if way == "ours":
            return mp.load(folder, **options)
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **options)

    return load_


def exported(model, plan, folder):
    model.save_pretrained(folder / "full")
    return mp.export(folder / "full", plan, folder / "out")


def made(model, plan, way, load, tmp_path):
    """The pruned model, loaded from an export or changed in memory."""
    if way != "in memory":
        return load(exported(model, plan, tmp_path), way)
    pruned = copy.deepcopy(model)
    mp.prune_(pruned, plan)
    return pruned


def expected_balance(router_logits, top_k, mask):
    """The documented definition, written out: E sum_e f_e P_e of every group of equal layers, averaged by layers."""
    total = 0.0
    for width in {logits.shape[-1] for logits in router_logits}:
        group = [
            logits.detach().double()[mask.flatten().bool()] for logits in router_logits if logits.shape[-1] == width
        ]
        probabilities = torch.cat(group).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k).indices, 1.0)
        total += len(group) * width * float((chosen.mean(0) * probabilities.mean(0)).sum())
    return total / len(router_logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WITH_LOSS)
def test_layers_of_unequal_numbers_are_trained_with_a_balanced_load(name, way, load, tmp_path):
    model, tokens = tiny_model(name), random_tokens()
    plan = uneven_plan(model)
    pruned = made(model, plan, way, load, tmp_path).train()
    mask = torch.ones_like(tokens)
    mask[1, 15:] = 0
    for attention_mask in (None, mask):
        pruned.zero_grad()
        out = pruned(tokens, attention_mask=attention_mask, labels=tokens, output_router_logits=True, use_cache=False)
        assert [logits.shape[-1] for logits in out.router_logits] == [len(ids) for ids in plan.kept.values()]
        counted = mask if attention_mask is not None else torch.ones_like(tokens)
        expected = expected_balance(out.router_logits, 2, counted)
        assert float(out.aux_loss) == pytest.approx(expected, rel=1e-5)
        alone = pruned(tokens, attention_mask=attention_mask, labels=tokens, use_cache=False).loss
        assert float(out.loss - alone) == pytest.approx(pruned.router_aux_loss_coef * expected, rel=1e-2)
        out.aux_loss.backward()  # alone, so that no gradient comes from the predictions
        for layer in find_moe_layers(pruned).values():
            assert layer.router.weight.grad.abs().sum() > 0
    in_tuple = pruned(tokens, mask, labels=tokens, output_router_logits=True, use_cache=False, return_dict=False)
    assert torch.equal(in_tuple[0], out.loss) and torch.equal(in_tuple[1], out.aux_loss)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_equal_layers_get_transformers_own_loss(name):
    model, tokens = tiny_model(name), random_tokens()
    ours = copy.deepcopy(model)
    ours.__class__ = model_class(type(model), {})
    results = [m(tokens, labels=tokens, output_router_logits=True) for m in (ours, model)]
    assert "forward" in vars(type(ours)), "this test is about our function"
    assert torch.equal(results[0].aux_loss, results[1].aux_loss) and torch.equal(results[0].loss, results[1].loss)


@pytest.mark.parametrize("way", WAYS)
def test_mapped_routers_give_the_logits_of_their_scores_shares(way, load, tmp_path):
    model, tokens = tiny_model("olmoe"), random_tokens()
    plan = merged_plan(model)
    merged = made(model, plan, way, load, tmp_path).train()
    out = merged(tokens, labels=tokens, output_router_logits=True)
    layer = find_moe_layers(merged)[0]
    inputs = []
    hook = layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    merged(tokens)
    hook.remove()
    scores = torch.nn.functional.linear(inputs[0], layer.router.weight)
    scores = scores[:, plan.merges[0].router.any(0)].softmax(-1)
    shares = scores @ plan.merges[0].router[:, plan.merges[0].router.any(0)].T
    torch.testing.assert_close(out.router_logits[0].softmax(-1), shares / shares.sum(-1, keepdim=True))
    assert float(out.aux_loss) == pytest.approx(
        expected_balance(out.router_logits, 2, torch.ones_like(tokens)), rel=1e-5
    )
    out.loss.backward()
    for layer in find_moe_layers(merged).values():
        assert layer.router.weight.grad.abs().sum() > 0 and layer.router.router_map.grad is None


def test_models_of_others_keep_their_functions(tmp_path):
    """Also while one of ours runs, in another thread."""
    module = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    loss, forward = module.load_balancing_loss_func, module.OlmoeForCausalLM.forward
    model, tokens = tiny_model("olmoe"), random_tokens()
    pruned = copy.deepcopy(model)
    mp.prune_(pruned, uneven_plan(model))
    seen = []
    find_moe_layers(pruned)[0].router.register_forward_hook(lambda *_: seen.append(module.load_balancing_loss_func))
    values = {}

    def run(name, one):
        with torch.no_grad():
            values[name] = [float(one(tokens, output_router_logits=True).aux_loss) for _ in range(5)]

    threads = [threading.Thread(target=run, args=item) for item in (("pruned", pruned), ("full", model))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(set(results)) == 1 for results in values.values()) and len(values) == 2
    assert set(seen) == {loss} and module.load_balancing_loss_func is loss
    assert module.OlmoeForCausalLM.forward is forward and type(model) is module.OlmoeForCausalLM


def test_a_compiled_model_has_the_same_losses():
    model, tokens = tiny_model("olmoe"), random_tokens()
    mp.prune_(model, uneven_plan(model))
    with torch.no_grad():
        expected = model(tokens, labels=tokens, output_router_logits=True, use_cache=False)
        compiled = torch.compile(model, backend="eager")
        result = compiled(tokens, labels=tokens, output_router_logits=True, use_cache=False)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.aux_loss, expected.aux_loss)


@pytest.mark.parametrize("kind", PLANS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, tokens = tiny_model("qwen3_moe"), random_tokens()
    mp.prune_(model, PLANS[kind](model))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert model.is_gradient_checkpointing and len(gradients[0]) == len(gradients[1]) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("way", ["ours", "transformers"])
@pytest.mark.parametrize("kind", PLANS)
def test_weights_are_placed_and_offloaded_by_the_sizes_of_the_export(kind, way, load, tmp_path):
    model = tiny_model("qwen3_moe")
    out = exported(model, PLANS[kind](model), tmp_path)
    plain = load(out, way)
    expected = logits_of(plain)
    size = sum(p.nbytes for p in plain.parameters())
    assert size < 0.8 * sum(p.nbytes for p in model.parameters())
    for number, (options, places) in enumerate(
        (
            ({"device_map": {"": "cpu"}}, {"cpu"}),
            ({"device_map": "auto", "max_memory": {"cpu": int(1.02 * size)}}, {"cpu"}),
            ({"device_map": "auto", "max_memory": {"cpu": int(0.7 * size)}}, {"cpu", "disk"}),
            ({"device_map": "auto", "max_memory": {"cpu": 1}}, {"disk"}),
        )
    ):
        placed = load(out, way, **options, offload_folder=str(tmp_path / f"offloaded{number}"))
        assert set(getattr(placed, "hf_device_map", {"": "cpu"}).values()) == places
        assert torch.equal(logits_of(placed), expected)
        maps = [p for name, p in placed.named_parameters() if name.endswith("router_map")]
        assert len(maps) == (4 if kind == "merged" else 0)
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in maps)
    # An original model of this size would not be placed so.
    placed = load(
        tmp_path / "full", way, **options | {"max_memory": {"cpu": int(1.02 * size)}}, offload_folder=tmp_path
    )
    assert "disk" in placed.hf_device_map.values()


@pytest.mark.parametrize("kind", PLANS)
def test_every_way_to_move_a_model_keeps_its_maps(kind, load, tmp_path):
    """Cast, pickled, copied, saved and loaded, one after the other: maps are the same float32 numbers."""
    model = tiny_model("ernie4_5_moe")
    loaded = mp.load(exported(model, PLANS[kind](model), tmp_path))
    maps = {name: p.clone() for name, p in loaded.state_dict().items() if name.endswith(("router_map", "mapped_bias"))}
    assert bool(maps) == (kind == "merged")
    loaded.to(torch.bfloat16)
    expected = logits_of(loaded)
    pickled = pickle.loads(pickle.dumps(loaded))
    copied = copy.deepcopy(pickled)
    copied.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = [load(tmp_path / "again", way) for way in ("ours", "transformers")]
    again.append(load(tmp_path / "again", "ours", dtype=torch.bfloat16))
    exact = logits_of(again[0])  # `.to` rounds rotary tables, too, which loading makes anew
    for other in (pickled, copied, *again):
        assert torch.equal(logits_of(other), exact if other in again else expected)
        assert other.dtype == torch.bfloat16 and type(other).__name__ == type(model).__name__
        for name, value in maps.items():
            assert torch.equal(other.state_dict()[name], value) and value.dtype == torch.float32
    wide = pickled.to(torch.float32)
    assert all(torch.equal(wide.state_dict()[name], value) for name, value in maps.items())


@pytest.mark.parametrize("kind", PLANS)
def test_a_model_pruned_in_memory_is_saved_as_an_export(kind, load, tmp_path):
    model, tokens = tiny_model("olmoe"), random_tokens()
    plan = PLANS[kind](model)
    out = exported(model, plan, tmp_path)
    original = type(model)
    mp.prune_(model, plan)
    assert isinstance(model, original) and type(model).__name__ == original.__name__
    prompt = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    generated = model.generate(tokens[:, :6], **prompt)
    assert torch.equal(model.generate(tokens[:, :6], **prompt, use_cache=False), generated)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), logits_of(model))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling.py").read_text() == (out / "modeling.py").read_text()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "saved")]
    ours = ("moeprune", "auto_map", "transformers_weights", "num_experts_per_layer")
    assert [{key: config.get(key) for key in ours} for config in configs][::-1] == [
        {key: config.get(key) for key in ours} for config in configs
    ]
    for way in ("ours", "transformers"):
        again = load(tmp_path / "saved", way)
        torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=1e-6)
        assert torch.equal(again.generate(tokens[:, :6], **prompt), generated)


def test_a_model_pruned_to_equal_layers_is_stock_again(tmp_path):
    model = tiny_model("olmoe")
    original, out = type(model), exported(model, uneven_plan(model), tmp_path)
    loaded = mp.load(out)
    three = {index: list(range(3)) for index in range(4)}
    plan = mp.PruningPlan(three, {index: (3, 6)[index % 2] for index in range(4)})
    mp.export(out, plan, tmp_path / "stock")
    mp.prune_(loaded, plan)
    loaded.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "stock", tmp_path / "saved"):
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(loaded) is original
        config = json.loads((folder / "config.json").read_text())
        assert not {"moeprune", "auto_map", "transformers_weights", "num_experts_per_layer"} & config.keys()
        assert config["num_experts"] == 3 and not (folder / "modeling.py").exists()


@pytest.mark.parametrize("kind", PLANS)
def test_stock_classes_say_what_an_export_needs(kind, tmp_path):
    """Before they read weights, and also where sizes that do not fit would be filled with random numbers."""
    model = tiny_model("qwen3_moe")
    out = exported(model, PLANS[kind](model), tmp_path)
    mp.load(out).save_pretrained(tmp_path / "again")
    assert "model_file" not in json.loads((tmp_path / "again" / "config.json").read_text())  # its file is not there
    for folder in (out, tmp_path / "again"):
        for options in ({}, {"trust_remote_code": False}, {"ignore_mismatched_sizes": True}):
            for loader in (AutoModelForCausalLM, type(model)):
                if loader is type(model):
                    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
                with pytest.raises(
                    ValueError, match="layers differ: pass trust_remote_code=True to the model.* moeprune_ext.load"
                ):
                    loader.from_pretrained(folder, **options)
        assert not hasattr(read_hf_config(folder), "transformers_weights")


def test_unequal_layers_are_listed_as_other_software_lists_them(tmp_path):
    """One number for each decoder layer; a dense one, here the second, has the configuration's."""
    model = tiny_model("qwen2_moe")
    counts = {0: [0, 3, 4], 2: [1, 2, 3, 4, 5, 6]}
    plan = mp.PruningPlan(counts, dict.fromkeys(counts, E))
    out = exported(model, plan, tmp_path)
    assert json.loads((out / "config.json").read_text())["num_experts_per_layer"] == [3, E, 6, E]
    mp.prune_(model, plan)
    assert model.config.num_experts_per_layer == [3, E, 6, E]
    merged = mp.export(tmp_path / "full", merged_plan(tiny_model("qwen2_moe")), tmp_path / "merged")
    assert "num_experts_per_layer" not in json.loads((merged / "config.json").read_text())


def test_only_the_process_that_saves_leaves_code_and_a_hub_gets_it_too(tmp_path):
    model = tiny_model("qwen3_moe")
    loaded = mp.load(exported(model, PLANS["uneven"](model), tmp_path))
    loaded.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / "modeling.py").exists()
    loaded.save_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "saved")  # over itself
    assert {"config.json", "modeling.py"} <= {file.name for file in (tmp_path / "saved").iterdir()}
    assert not list((tmp_path / "saved").glob("*.partial"))
    with pytest.raises(ValueError, match="use model.push_to_hub"):
        loaded.save_pretrained(tmp_path / "sent", push_to_hub=True)
    assert not (tmp_path / "sent").exists()
