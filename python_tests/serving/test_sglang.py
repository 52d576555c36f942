"""What the plugin does around SGLang's functions, with stand-ins for them: nobody has run it with a real one."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from moeprune_ext.modeling import CONFIG_KEY
from moeprune_ext.serving import sglang as plugin
from moeprune_ext.serving.check import sglang_refusal


class Config(SimpleNamespace):
    def to_dict(self):
        return dict(vars(self))


@pytest.fixture
def options(monkeypatch):
    """Stands in for the parts of SGLang that the plugin imports; the server's options."""
    server = SimpleNamespace(ep_size=1, enable_eplb=False, ep_num_redundant_experts=0)
    hooks = []
    registry = SimpleNamespace(register=lambda target, hook, kind: hooks.append((target, hook, kind)))
    modules = {
        "sglang": {"__version__": "0.0"},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": SimpleNamespace(AROUND="around")},
        "sglang.srt.runtime_context": {"get_server_args": lambda: server},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    server.hooks = hooks
    plugin._warn.cache_clear()
    return server


def export(counts, **more):
    record = {"kept_per_layer": {str(i): n for i, n in counts.items()}, "routers": {}}
    config = Config(model_type="mixtral", num_local_experts=8, **{CONFIG_KEY: record}, **more)
    return SimpleNamespace(hf_config=config, hf_text_config=config)


def stack(num_hidden_layers, layer_fn, pp_rank=None, pp_size=None, prefix=""):
    """SGLang's `make_layers`, as it calls `layer_fn`."""
    return nn.ModuleList([layer_fn(idx=i, prefix=f"{prefix}.{i}") for i in range(num_hidden_layers)])


def build(model_config, load_config=None):
    """SGLang's `_initialize_model`, of a model with three layers."""
    config = model_config.hf_config
    return plugin.make_layers(stack, 3, lambda idx, prefix: nn.Linear(4, config.num_local_experts), prefix="layers")


def test_each_layer_has_its_own_number_of_experts_and_it_says_that_nobody_tried_it(options, caplog):
    made = export({1: 3, 2: 5})
    with caplog.at_level(logging.WARNING, logger=plugin.logger.name):
        layers = plugin.initialize_model(build, made, "load config")
    assert [layer.out_features for layer in layers] == [8, 3, 5]
    assert made.hf_config.num_local_experts == 8
    assert "never tried" in caplog.text and "0.5.23" in caplog.text


def test_models_that_are_not_ours_are_built_as_before(options, caplog):
    config = Config(model_type="mixtral", num_local_experts=8)
    layers = plugin.initialize_model(build, SimpleNamespace(hf_config=config, hf_text_config=config))
    assert [layer.out_features for layer in layers] == [8, 8, 8] and not caplog.text


def test_it_asks_for_both_hooks(options):
    plugin.register()
    assert options.hooks == [
        ("sglang.srt.model_loader.loader._initialize_model", plugin.initialize_model, "around"),
        ("sglang.srt.utils.common.make_layers", plugin.make_layers, "around"),
    ]


def test_without_sglang_nothing_happens_but_a_warning(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    with caplog.at_level("WARNING", logger=plugin.logger.name):
        plugin.register()
    assert "does not know this version of SGLang" in caplog.text


@pytest.mark.parametrize("option", ["ep_size", "enable_eplb", "ep_num_redundant_experts"])
def test_ways_of_serving_that_read_one_number_are_refused(option, options):
    setattr(options, option, 2)
    with pytest.raises(ValueError, match="expert parallelism"):
        plugin.initialize_model(build, export({1: 3}))


def test_models_whose_layers_it_does_not_reach_are_refused(options):
    with pytest.raises(ValueError, match="a function of its own"):
        plugin.initialize_model(lambda model_config: nn.Linear(4, 8), export({1: 3}))

    def fused(model_config):
        layers = build(model_config)
        layers[0].num_fused_shared_experts = 1
        return layers

    with pytest.raises(ValueError, match="disable-shared-experts-fusion"):
        plugin.initialize_model(fused, export({1: 3}))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"text_config": {}}, "multimodal"),
        ({"model_type": "granitemoe"}, "granitemoe"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({CONFIG_KEY: {"kept_per_layer": {"0": 4}, "routers": {"model.layers.0.gate": {}}}}, "map their scores"),
    ],
)
def test_exports_that_it_cannot_build_are_refused_by_name(more, message, options):
    config = export({0: 4, 1: 2}).hf_config.to_dict() | more
    assert message in sglang_refusal(config)
    made = Config(**config)
    with pytest.raises(ValueError, match=message):
        plugin.initialize_model(build, SimpleNamespace(hf_config=made, hf_text_config=made))
