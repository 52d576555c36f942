"""`moeprune prune` on the command line."""

import json

import pytest
from safetensors.torch import load_file, save_file
from test_distributed import torchrun
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.cli.main import main

LENGTH = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    for number, name in enumerate(("first", "second")):
        save_file({"input_ids": random_tokens(40, LENGTH, seed=number)}, folder / f"{name}.safetensors")
    return folder


def asked(work, out):
    data = ["--data", work / "first.safetensors", work / "second.safetensors", "--sequence-length", LENGTH]
    sizes = ["--calibration-sequences", 16, "--sequences", 32, "--test-sequences", 8]
    few = ["--population", 4, "--generations", 2, "--elites", 1, "--repair", "layer", "--sequential", "off"]
    return list(map(str, ["prune", work / "model", *data, *sizes, *few, "--dtype", "float32", "-o", out]))


def run(capsys, *arguments):
    capsys.readouterr()
    main(list(map(str, arguments)))
    return capsys.readouterr()


def test_one_command_makes_a_checkpoint_and_says_what_it_is_worth(work, tmp_path, capsys):
    shown = run(capsys, *asked(work, tmp_path / "out"))
    assert "| full " in shown.out and "| this plan, repaired " in shown.out and "95 % interval" in shown.out
    assert f'moeprune_ext.load("{tmp_path / "out"}")' in shown.out or "vllm serve" in shown.out
    assert "calibrated on" in shown.err and "\r" not in shown.err  # no bars where nobody looks
    again = run(capsys, *asked(work, tmp_path / "out"), "--json")
    result = json.loads(again.out)
    assert result["sparsity"] == 0.5 and result["sequences"] == 8 and "calibrated on" not in again.err
    assert mp.load(tmp_path / "out") is not None
    exported = mp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert {str(layer): len(ids) for layer, ids in exported.kept.items()} == result["kept_per_layer"]


def test_several_sparsities_share_the_calibration(work, tmp_path, capsys):
    shown = run(capsys, *asked(work, tmp_path / "out"), "--sparsity", 0.25, 0.5)
    assert shown.err.count("calibrated on") == 1
    assert [(tmp_path / "out" / name / "config.json").exists() for name in ("25", "50")] == [True, True]
    assert shown.out.startswith("| removed |") and shown.out.count("| full ") == 2
    results = json.loads(run(capsys, *asked(work, tmp_path / "out"), "--sparsity", 0.25, 0.5, "--json").out)
    small, large = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("50", "25"))
    assert sum(t.nbytes for t in small.values()) < sum(t.nbytes for t in large.values())
    assert [result["sparsity"] for result in results] == [0.25, 0.5]


def test_statistics_of_other_text_are_not_taken(work, tmp_path, capsys):
    run(capsys, *asked(work, tmp_path / "out"), "--sparsity", 0.25, 0.375, "--objective", "worst")
    with pytest.raises(SystemExit):
        main([*asked(work, tmp_path / "out"), "--test-sequences", "9", "--sparsity", "0.3", "0.6"])
    assert "test: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_budget_by_number_or_by_memory(work, tmp_path, capsys):
    result = json.loads(run(capsys, *asked(work, tmp_path / "experts"), "--experts", 20, "--json").out)
    assert sum(result["kept_per_layer"].values()) == 20
    result = json.loads(run(capsys, *asked(work, tmp_path / "fit"), "--fit", "1GiB", "--json").out)
    assert result["sparsity"] == 0 and result["repaired_layers"] == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--experts", "3"], "--experts|experts"),
        (["--sparsity", "0.5", "--experts", "20"], "different ways to say one budget"),
        (["--criterion", "nonsense"], "unknown criterion"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--sequences", "4"], "at least 16"),
        (["--sparsity", "0.25", "0.95"], "can go"),
        (["--sequential", "on", "--protect-super"], "protects none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(work, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as stop:
        main([*asked(work, tmp_path / "out"), *more])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("moeprune prune: error: ") and any(part in line for part in says.split("|"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_any_number_of_processes_makes_the_same_checkpoint(work, tmp_path):
    for processes in (1, 2):
        done = torchrun(processes, "-m", "moeprune_ext.cli", *asked(work, tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tmp_path / name for name in ("1", "2"))
    plans = [mp.PruningPlan.load(out / "pruning_plan.json") for out in (one, two)]
    assert plans[0].kept == plans[1].kept
    weights = [load_file(out / "model.safetensors") for out in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() <= 1e-4 * max(1e-3, float(tensor.abs().max())), name
