"""What mlx_model.py does to mlx-lm's models, with stand-ins for mlx; the real ones: test_mlx.py."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.serving.check import runtimes

WIDTH = 3


class Model:
    """As mlx-lm's models are: layers in a list of an inner part, and `sanitize` stacks the configured experts."""

    def __init__(self, config):
        self.count = config.get("num_experts", 8)
        self.inner = {"layers": [{"router": torch.empty(self.count, WIDTH)} for _ in range(3)]}
        for layer in self.inner["layers"]:
            layer["up"] = torch.empty(self.count, WIDTH, WIDTH)

    @property
    def layers(self):
        return self.inner["layers"]

    def named_modules(self):
        return [("inner", self.inner)]

    def parameters(self):
        return {
            f"model.layers.{i}.mlp.{name}.weight": array
            for i, layer in enumerate(self.layers)
            for name, array in layer.items()
        }

    def sanitize(self, weights):
        for i in range(len(self.layers)):
            one = [weights.pop(f"model.layers.{i}.mlp.experts.{e}.up.weight") for e in range(self.count)]
            weights[f"model.layers.{i}.mlp.up.weight"] = torch.stack(one)
        return weights


class Layer(dict):
    def parameters(self):
        return self


@pytest.fixture
def mlx_model(monkeypatch):
    class Args:
        @staticmethod
        def from_dict(config):
            return config

    class WithLayers(Model):
        def __init__(self, config):
            super().__init__(config)
            self.inner["layers"] = [Layer(layer) for layer in self.inner["layers"]]

    modules = {
        "mlx": {},
        "mlx.core": {"contiguous": lambda array: array.contiguous()},
        "mlx.utils": {"tree_flatten": lambda parameters: list(parameters.items())},
        "mlx_lm": {},
        "mlx_lm.utils": {"_get_classes": lambda config: (WithLayers, Args)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mlx"].core = sys.modules["mlx.core"]
    file = Path(mp.__file__).with_name("mlx_model.py")
    spec = importlib.util.spec_from_file_location("custom_model", file)  # as mlx-lm does
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def config(counts, **more):
    return {"num_experts": 8, "moeprune": {"kept_per_layer": {str(i): n for i, n in counts.items()}}, **more}


def test_each_layer_has_its_own_experts_and_gets_them(mlx_model):
    counts = {0: 2, 1: 4, 2: 3}
    model = mlx_model.Model(mlx_model.ModelArgs.from_dict(config(counts)))
    assert [layer["up"].shape[0] for layer in model.layers] == [2, 4, 3]
    assert [layer["router"].shape[0] for layer in model.layers] == [2, 4, 3]
    stored = {
        f"model.layers.{i}.mlp.experts.{e}.up.weight": torch.full((WIDTH, WIDTH), 10.0 * i + e)
        for i, count in counts.items()
        for e in range(count)
    }
    result = model.sanitize(stored)
    for i, count in counts.items():
        assert result[f"model.layers.{i}.mlp.up.weight"][:, 0, 0].tolist() == [10.0 * i + e for e in range(count)]


def test_architectures_without_such_a_number_and_maps_are_refused(mlx_model):
    sizes = config({0: 2, 1: 4, 2: 3}, model_type="other")
    sizes["experts"] = sizes.pop("num_experts")
    with pytest.raises(ValueError, match="does not take its number of experts"):
        mlx_model.Model(sizes)
    mapped = config({0: 2})
    mapped["moeprune"]["routers"] = {"model.layers.0.mlp.gate": {}}
    with pytest.raises(ValueError, match="map their scores"):
        mlx_model.Model(mapped)


# ---- the export, and what serve-check says of it


@pytest.fixture
def full(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    return model, tmp_path / "full"


def uneven(model):
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.PruningPlan.from_pruned_counts(scores, {0: 1, 1: 3, 2: 0, 3: 2})


def says(folder):
    return {row.name.split(",")[0]: row for row in runtimes(folder)}


def test_uneven_exports_bring_the_file_and_their_uniform_exports_do_not(full, tmp_path):
    model, folder = full
    out = mp.export(folder, uneven(model), tmp_path / "uneven")
    assert json.loads((out / "config.json").read_text())["model_file"] == "mlx_model.py"
    assert (out / "mlx_model.py").read_text() == Path(mp.__file__).with_name("mlx_model.py").read_text()
    pruned = mp.load(out)
    scores = mp.score_experts(mp.calibrate(pruned, [random_tokens()]), "reap")
    level = mp.PruningPlan.from_pruned_counts(scores, {0: 2, 1: 0, 2: 3, 3: 1})
    again = mp.export(out, level, tmp_path / "level")
    assert "model_file" not in json.loads((again / "config.json").read_text())
    assert not (again / "mlx_model.py").exists() and not (again / "modeling.py").exists()


def test_a_file_of_the_sources_own_under_that_name_is_not_overwritten(full, tmp_path):
    model, folder = full
    (folder / "mlx_model.py").write_text("their own")
    with pytest.raises(ValueError, match="mlx_model.py of its own"):
        mp.export(folder, uneven(model), tmp_path / "out")


def test_serve_check_says_what_was_tried(full, tmp_path):
    model, folder = full
    rows = says(mp.export(folder, uneven(model), tmp_path / "uneven"))
    assert rows["mlx-lm"].loads and "--trust-remote-code" in rows["mlx-lm"].how
    assert rows["SGLang"].loads is None and "never tried" in rows["SGLang"].how
    assert rows["llama.cpp"].loads is False and "--pad" not in rows["llama.cpp"].how
    merges = {i: Merge(torch.eye(8)[:3], torch.eye(8)[:3]) for i in mp.MoeModel.of(model).layers}
    out = mp.export(folder, mp.PruningPlan.from_merges(merges), tmp_path / "merged")
    assert not (out / "mlx_model.py").exists()
    rows = says(out)
    for name in ("mlx-lm", "SGLang", "llama.cpp"):
        assert rows[name].loads is False and "map their scores" in rows[name].how
