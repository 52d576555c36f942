"""What the plugin does to vLLM's functions, with stand-ins for them; the real ones: test_vllm.py."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from torch import nn

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.modeling import CONFIG_KEY
from moeprune_ext.serving import vllm as plugin
from moeprune_ext.serving.check import refusal
from moeprune_ext.serving.layers import Layer, own_counts

RULE = {"score": "softmax", "rows": 3, "experts": 8, "renormalize": True, "eps": 0.0, "scale": 2.5, "bias": False}


def factory(
    num_experts,
    top_k,
    prefix="",
    custom_routing_function=None,
    use_grouped_topk=True,
    e_score_correction_bias="bias",
    apply_routed_scale_to_output=False,
):
    given = dict(num_experts=num_experts, top_k=top_k, custom=custom_routing_function)
    return given | dict(grouped=use_grouped_topk, bias=e_score_correction_bias)


@pytest.mark.parametrize("args, kwargs", [((8, 2), {}), ((8,), {"top_k": 2}), ((), {"num_experts": 8, "top_k": 2})])
def test_experts_are_as_many_as_recorded_however_the_factory_is_called(args, kwargs, monkeypatch):
    monkeypatch.setattr(plugin, "_current_layers", lambda: {})
    wrapped = plugin._own_experts(factory)
    assert wrapped(*args, **kwargs)["num_experts"] == 8  # of a model without a record
    layer = Layer(3, 5, None, config=SimpleNamespace(num_experts=8, n_routed_experts=None))
    with own_counts(layer):
        made = wrapped(*args, **kwargs)
        assert layer.config.num_experts == 5
    assert made["num_experts"] == 5 and made["top_k"] == 2 and made["custom"] is None
    assert layer.config.num_experts == 8 and wrapped(*args, **kwargs)["num_experts"] == 8


def test_behind_a_map_routers_score_all_experts_and_choose_among_the_stored(monkeypatch):
    wrapped = plugin._own_experts(factory)
    layer = Layer(0, 3, RULE, config=SimpleNamespace(num_local_experts=8))
    with own_counts(layer):
        assert layer.config.num_local_experts == 8
        made = wrapped(num_experts=8, top_k=2)
        scaled = wrapped(num_experts=8, top_k=2, apply_routed_scale_to_output=True)
    assert made["num_experts"] == 3 and not made["grouped"] and made["bias"] is None
    layer.router = SimpleNamespace(router_map=torch.eye(8)[:3])
    logits = torch.randn(5, 8)
    (weights, ids), (plain, _) = (one["custom"](None, logits, 2, True) for one in (made, scaled))
    assert ids.dtype == torch.int32 and int(ids.max()) < 3
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 2.5))  # the rule's scale, unless the runner scales
    torch.testing.assert_close(plain * 2.5, weights)


def test_only_the_transformers_backend_is_given_counts_by_the_layers_name(monkeypatch):
    monkeypatch.setattr(plugin, "_current_layers", lambda: {0: Layer(0, 5, None)})
    wrapped = plugin._own_experts(factory)
    assert wrapped(8, 2, prefix="mtp.layers.0.mlp.experts")["num_experts"] == 8  # a draft's own layer

    def backend(num_experts, prefix, routed_experts_cls):
        return num_experts

    assert plugin._own_experts(backend)(8, prefix="model.layers.0.mlp.experts", routed_experts_cls=object) == 5
    assert plugin._own_experts(backend)(8, prefix="model.layers.1.mlp.experts", routed_experts_cls=object) == 8


def test_layers_are_built_one_by_one_under_their_own_counts(monkeypatch):
    config, seen = SimpleNamespace(num_experts=8), []
    layers = {1: Layer(1, 3, None, config=config), 2: Layer(2, 6, None, config=config)}
    monkeypatch.setattr(plugin, "_current_layers", lambda: layers)

    def make_layers(num_hidden_layers, layer_fn, prefix):
        return [layer_fn(prefix=f"{prefix}.{i}") for i in range(num_hidden_layers)]

    plugin._own_layers(make_layers)(4, lambda prefix: seen.append((prefix, config.num_experts)), "model.layers")
    assert seen == [("model.layers.0", 8), ("model.layers.1", 3), ("model.layers.2", 6), ("model.layers.3", 8)]
    assert config.num_experts == 8


def test_the_router_is_the_one_matrix_with_a_row_for_every_expert():
    layer = Layer(0, 3, RULE)
    block = nn.ModuleDict({"gate": nn.Linear(4, 8), "proj": nn.Linear(4, 4)})
    assert plugin._map_router(block, layer) is block["gate"]
    assert block["gate"].router_map.shape == (3, 8) and block["gate"].router_map.dtype == torch.float32
    for other in (
        nn.ModuleDict({"proj": nn.Linear(4, 4)}),
        nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)}),
    ):
        with pytest.raises(ValueError, match="could be its router"):
            plugin._map_router(other, layer)


def test_maps_choose_as_in_the_export(tmp_path):
    model, tokens = tiny_model("ernie4_5_moe"), random_tokens()
    model.save_pretrained(tmp_path / "full")
    generator = torch.Generator().manual_seed(0)
    merges = {
        index: Merge(*(torch.eye(8)[:3] + 0.3 * torch.rand(3, 8, generator=generator) for _ in range(2)))
        for index in mp.MoeModel.of(model).layers
    }
    loaded = mp.load(mp.export(tmp_path / "full", mp.PruningPlan.from_merges(merges), tmp_path / "out"))
    record, calls = getattr(loaded.config, CONFIG_KEY), {}
    for path in record["routers"]:
        module = loaded.get_submodule(path)
        module.register_forward_hook(lambda _, args, answer, path=path: calls.update({path: (args, answer)}))
    with torch.no_grad():
        loaded(tokens)
    assert calls
    for path, (args, answer) in calls.items():
        rule, router = record["routers"][path], loaded.get_submodule(path)
        logits = args[0].reshape(-1, args[0].shape[-1]).float() @ router.weight.float().T
        weights, ids = plugin._choose(
            Layer(0, 3, rule, router), rule, None, logits, answer[rule["places"][2]].shape[1], True
        )
        assert torch.equal(ids.long(), answer[rule["places"][2]])
        torch.testing.assert_close(weights, answer[rule["places"][1]], rtol=0, atol=1e-6)


def test_without_vllm_nothing_happens_but_a_warning(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.config", None)  # as where it cannot be imported
    with caplog.at_level("WARNING", logger=plugin.logger.name):
        plugin.register()
    assert "does not know this version of vLLM" in caplog.text


# ---- what is refused


def parallel(**options):
    sizes = {"tensor_parallel_size": 1, "data_parallel_size": 1, "prefill_context_parallel_size": 1}
    return SimpleNamespace(**{"enable_eplb": False, "enable_expert_parallel": False, **sizes, **options})


def export_config(counts, model_type="olmoe", routers=(), **more):
    record = {"kept_per_layer": {str(i): n for i, n in enumerate(counts)}, "routers": dict.fromkeys(routers, RULE)}
    return {"model_type": model_type, CONFIG_KEY: record, **more}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "multiples of 2 experts in every layer"),
        ({"enable_expert_parallel": True, "prefill_context_parallel_size": 2}, "multiples of 2 experts"),
        ({"tensor_parallel_size": 4}, "greater than the 2 experts of layer 1"),
        ({"enable_eplb": True}, "EPLB"),
    ],
)
def test_ways_of_serving_that_unequal_layers_do_not_allow_are_refused(options, message):
    layers = {i: Layer(i, n, None) for i, n in enumerate((4, 2, 3))}
    plugin.check(parallel(), export_config((4, 2, 3)), layers)
    with pytest.raises(ValueError, match=message):
        plugin.check(parallel(**options), export_config((4, 2, 3)), layers)


def test_divisible_layers_are_served_by_expert_parallelism_but_not_gpt_oss():
    layers = {i: Layer(i, n, None) for i, n in enumerate((4, 2))}
    two = parallel(enable_expert_parallel=True, tensor_parallel_size=2)
    plugin.check(two, export_config((4, 2)), layers)
    for changes, kind in (({}, "gpt_oss"), ({"enable_ep_weight_filter": True}, "olmoe")):
        with pytest.raises(ValueError, match="multiples|weight filter"):
            plugin.check(SimpleNamespace(**{**vars(two), **changes}), export_config((4, 2), kind), layers)


@pytest.mark.parametrize(
    "config, message",
    [
        (export_config((4, 2), "outer", text_config={"model_type": "step3p5"}), "one number"),
        (export_config((4, 4), "granitemoe", ["model.layers.0.gate"]), "prune instead"),
        (export_config((4, 2), "step3p5"), "one number"),
        (export_config((4, 2), "gpt_oss", quantization_config={"quant_method": "mxfp4"}), "MXFP4"),
        (export_config((4, 2), "deepseek_v2", n_group=2), "routing groups"),
    ],
)
def test_exports_that_vllm_cannot_build_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        plugin.check(parallel(), config, {})
    assert refusal(export_config((4, 2))) is None


def test_a_language_parts_copy_of_the_configuration_gets_record_and_counts(monkeypatch):
    """A vision part's does not, nor one of a model that is not ours."""

    class Config(SimpleNamespace):
        """One that can be referred to weakly."""

    def whole(hf_config):
        return Config(model_config=Config(hf_config=hf_config, hf_text_config=copy.copy(hf_config)))

    monkeypatch.setattr(plugin, "_copies", [])
    made = plugin._own_copy(lambda self, hf_config: whole(copy.copy(hf_config)))
    outer, language, vision = Config(), Config(num_experts=8), Config(depth=2)
    assert not hasattr(made(whole(outer), language).model_config.hf_config, "moeprune")
    outer.moeprune = {"kept_per_layer": {"0": 5}}
    copied = made(whole(outer), language).model_config
    assert copied.hf_config.moeprune == outer.moeprune and not hasattr(language, "moeprune")
    configs = language, copied.hf_config, copied.hf_text_config
    assert not hasattr(made(whole(outer), vision).model_config.hf_config, "moeprune")
    layer, seen = Layer(0, 5, None, config=language), []
    monkeypatch.setattr(plugin, "_current_layers", lambda: {0: layer})
    build = plugin._own_layers(lambda count, layer_fn, prefix: [layer_fn(prefix=f"{prefix}.{i}") for i in range(count)])
    build(1, lambda prefix: seen.extend(config.num_experts for config in configs), "language_model.model.layers")
    assert seen == [5, 5, 5] and [config.num_experts for config in configs] == [8, 8, 8]
