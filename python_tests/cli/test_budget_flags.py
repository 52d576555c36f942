"""Budgets by number and by memory, and limits on every layer, in the verbs that make plans."""

import json
import shutil

import pytest
import quantised
from safetensors.torch import load_file
from tiny_models import random_tokens

import moeprune_ext as mp
from moeprune_ext.cli.main import main
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder
from moeprune_ext.models.costs import costs, experts_that_fit, kv_cache_bytes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The embedded model (6 layers of 16 experts, top-4), text, and its statistics."""
    folder = tmp_path_factory.mktemp("budgets")
    shutil.copytree(demo_folder(), folder / "model")
    (folder / "text.txt").write_text(corpus.code_documents("calibration")[0])
    mp.calibrate(mp.load(folder / "model"), [random_tokens()]).save(folder / "stats.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(work):
    return mp.load(work / "model")


def run(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def plans(work, out):
    """Arguments of every verb and method that makes a plan, but for its budget; `search` writes a directory."""
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 2]
    allocate = ["allocate", work / "model", "--stats", work / "stats.safetensors", "-o", out / "plan.json"]
    few = ["--population", 3, "--generations", 2, "--elites", 1]
    return {
        "uniform": allocate,
        "global": [*allocate, "--method", "global"],
        "dp": [*allocate, "--method", "dp", "--steps", 2, *data],
        "naee": ["allocate", work / "model", "--method", "naee", *data, "-o", out / "plan.json"],
        "grape": ["grape", *allocate[1:], "--similarity", "weights"],
        "search": ["search", *allocate[1:4], *data, *few, "-o", out],
    }


METHODS = ("uniform", "global", "dp", "naee", "grape", "search")


@pytest.mark.parametrize("method", METHODS)
def test_every_verb_keeps_the_number_asked_for_within_the_limits(work, capsys, tmp_path, method):
    limits = ["--experts", 51, "--multiple-of", 3, "--max-kept", 12]
    kept = run(capsys, *plans(work, tmp_path)[method], *limits)["kept_per_layer"]
    assert sum(kept.values()) == 51 and set(kept.values()) <= {6, 9, 12}
    if method in ("uniform", "naee"):
        assert kept == {"0": 6, "1": 9, "2": 9, "3": 9, "4": 9, "5": 9}
    assert {layer: len(ids) for layer, ids in mp.PruningPlan.load(tmp_path / "plan.json").kept.items()} == {
        int(layer): count for layer, count in kept.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", 50, "--multiple-of", 8], "50 experts cannot be kept in all in multiples of 8 a layer: 48 or 56"),
        (["--max-kept", 6], "sparsity 0.5 asks for 48 of 96 experts, but at least 60 must go"),
        (["--multiple-of", 5, "--max-kept", 4], "layer 0 cannot keep at least 4 of its 16 experts"),
        (["--fit", "100kB"], "fewest experts that can stay (24)"),
        (["--experts", 50, "--fit", "1GiB"], "--experts and --fit are different ways to say one budget"),
        (["--sparsity", 0.5, "--experts", 50], "--sparsity and --experts"),
        (["--fit", "24"], "'24' is not a size with a unit, such as 24GiB"),
        (["--context", 100], "give --fit, too"),
    ],
)
def test_impossible_budgets_are_refused_before_any_work(work, capsys, tmp_path, monkeypatch, method, flags, message):
    monkeypatch.setattr("moeprune_ext.cli.io.load_model", lambda *_: pytest.fail("the weights were loaded"))
    assert message in refusal(capsys, *plans(work, tmp_path)[method], *flags)
    assert not list(tmp_path.iterdir())


def test_as_many_experts_stay_as_fit_with_the_cache(work, model, capsys, tmp_path):
    whole = costs(model).bytes + kv_cache_bytes(model, 512)
    flags = ["--fit", f"{whole * 0.7 / 1000}kB", "--context", 512, "--force"]
    kept = run(capsys, *plans(work, tmp_path)["uniform"], *flags)["kept_per_layer"]
    plan = mp.PruningPlan.load(tmp_path / "plan.json")
    assert sum(kept.values()) == experts_that_fit(model, int(whole * 0.7), context=512) < 96
    one = (costs(model).bytes - costs(model, plan).bytes) / (96 - sum(kept.values()))
    taken = costs(model, plan).bytes + kv_cache_bytes(model, 512)
    assert taken <= whole * 0.7 < taken + one
    size = costs(model, plan).bytes + kv_cache_bytes(model, 4096)
    again = [*plans(work, tmp_path)["uniform"], "--force"]
    by_default = run(capsys, *again, "--fit", f"{size / 1000}kB")["kept_per_layer"]
    assert by_default == kept


def test_of_quantised_weights_those_fit_whose_export_takes_no_more(work, capsys, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    quantised.fp8(tmp_path / "model")
    flags = ["allocate", tmp_path / "model", "--stats", work / "stats.safetensors", "-o", tmp_path / "plan.json"]
    model = mp.load(tmp_path / "model")
    full = sum(t.nbytes for t in load_file(tmp_path / "model" / "model.safetensors").values())
    cache = kv_cache_bytes(model, 4096)
    size = int(0.7 * full) + cache
    kept = run(capsys, *flags, "--fit", f"{size / 1000}kB")["kept_per_layer"]
    out = mp.export(tmp_path / "model", mp.PruningPlan.load(tmp_path / "plan.json"), tmp_path / "out")
    taken = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    one = (full - taken) / (96 - sum(kept.values()))
    assert taken + cache <= size < taken + cache + one


def test_scores_carry_their_limits(work, capsys, tmp_path):
    limits = ["--multiple-of", 4, "--max-kept", 12]
    run(capsys, "score", work / "stats.safetensors", *limits, "-o", tmp_path / "scores.json")
    flags = ["allocate", work / "model", "--scores", tmp_path / "scores.json", "-o", tmp_path / "plan.json", "--force"]
    assert set(run(capsys, *flags, "--method", "global")["kept_per_layer"].values()) <= {4, 8, 12}
    assert "at least 24 must go" in refusal(capsys, *flags, "--sparsity", 0.1)


def test_a_search_by_number_resumes(work, capsys, tmp_path):
    search = [*plans(work, tmp_path)["search"], "--experts", 51]
    first = run(capsys, *search)
    assert json.loads((tmp_path / "search.json").read_text())["sparsity"] == {"experts": 51}
    assert run(capsys, *search, "--generations", 3)["score"] >= first["score"]
    assert "sparsity" in refusal(capsys, *plans(work, tmp_path)["search"], "--experts", 52)
