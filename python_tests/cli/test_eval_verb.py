"""`moeprune eval`: one model, two beside each other, their speed, the harness, and what a task is worth."""

import json
import sys
import types

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.cli.main import main
from moeprune_ext.data.batches import load_batches
from moeprune_ext.demo.run import demo_folder

LENGTH, SEQUENCES = 64, 6
QUESTIONS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "stop": "\n"} for a in range(2, 6) for b in range(2, 5)]
CHOICES = [
    {"prompt": "1+1=", "choices": [" import", "2\n"], "answer": 1},
    {"prompt": "a", "choices": ["b", "c", "d"], "answer": 1},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The embedded model's directory, a pruned export of it with its plan, a text and task files."""
    folder = tmp_path_factory.mktemp("eval")
    model, tokenizer = mp.load(demo_folder(), dtype=torch.float32), AutoTokenizer.from_pretrained(demo_folder())
    text = " ".join(f"def f{i}(x): return x + {i}\n" for i in range(200))
    (folder / "text.txt").write_text(text)
    for name, lines in (("sums", QUESTIONS), ("choices", CHOICES)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batches = load_batches([folder / "text.txt"], tokenizer, sequence_length=LENGTH, sequences=SEQUENCES)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, batches[:2]), "reap"), 0.5)
    mp.export(demo_folder(), plan, folder / "pruned")
    folder.joinpath("esap.json").write_text(json.dumps(mp.CandidateEvaluator(model, batches).evaluate([plan])[0].esap))
    return folder


@pytest.fixture
def data(work):
    return ["--data", work / "text.txt", "--sequence-length", LENGTH, "--sequences", SEQUENCES, "--dtype", "float32"]


def run(capsys, *arguments):
    capsys.readouterr()
    main(["eval", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, arguments)])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err.strip().splitlines()[-1]


def test_one_model_has_intervals_and_the_chance_level(work, data, capsys):
    task = work / "choices.jsonl"
    result = run(capsys, demo_folder(), *data, "--task", task)
    of_task, interval = result[str(task)], result["perplexity_interval"]
    assert of_task["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2) and of_task["examples"] == 2
    assert 0 <= of_task["accuracy_interval"]["low"] <= of_task["accuracy"] <= of_task["accuracy_interval"]["high"] <= 1
    assert interval["low"] < result["perplexity"] == interval["value"] < interval["high"]
    assert interval["standard_error"] > 0
    main(list(map(str, ["eval", demo_folder(), *data, "--task", task])))
    assert "chance 41.7%" in capsys.readouterr().out


def test_a_model_beside_itself_differs_in_nothing(work, data, capsys):
    task = work / "sums.jsonl"
    result = run(capsys, demo_folder(), demo_folder(), *data, "--task", task)
    answers, text = result[str(task)]["compared"], result["compared"]
    assert {answers["difference"][end] for end in ("value", "low", "high")} == {0} and answers["p_value"] == 1
    assert {text["ratio"][end] for end in ("value", "low", "high")} == {1}
    assert text["esap"]["value"] == pytest.approx(1, abs=1e-6) and text["kl_pq"]["value"] == pytest.approx(0, abs=1e-6)
    assert text["top1_agree"]["value"] == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_an_exports_esap_against_its_original_is_its_plans(work, data, capsys, by_name):
    reference = ["--reference", demo_folder()] if by_name else [demo_folder()]
    text = run(capsys, work / "pruned", *reference, *data)["compared"]
    assert text["esap"]["value"] == pytest.approx(json.loads((work / "esap.json").read_text()), abs=1e-5)
    assert text["esap"]["low"] < text["esap"]["value"] < text["esap"]["high"] < 1
    assert text["sequences"] == SEQUENCES and text["positions"] == SEQUENCES * LENGTH


def test_two_models_end_in_a_verdict(work, data, capsys):
    main(list(map(str, ["eval", work / "pruned", demo_folder(), *data, "--task", work / "sums.jsonl"])))
    shown = capsys.readouterr().out
    assert "McNemar p" in shown or "the same 12 examples" in shown
    assert "text: perplexity above the reference's" in shown and "ESAP" in shown


def test_speed_is_measured_of_both_in_alternation(work, capsys):
    sizes = ["--speed-prompt", 16, "--speed-new", 2, "--speed-rounds", 3, "--speed-batch", 2]
    speed = run(capsys, work / "pruned", demo_folder(), "--speed", *sizes)["speed"]
    for name in ("model", "reference"):
        assert len(speed[name]["prefill"]) == len(speed[name]["decode"]) == 3
        assert min(speed[name]["prefill"] + speed[name]["decode"]) > 0
        assert speed[name]["growth"] is None or speed[name]["peak"] == speed[name]["weights"] + speed[name]["growth"]
    assert speed["model"]["weights"] < speed["reference"]["weights"]
    assert speed["ratio"]["decode"]["low"] <= speed["ratio"]["decode"]["value"] <= speed["ratio"]["decode"]["high"]


def test_a_task_that_the_model_fails_at_is_called_so(work, tmp_path, capsys, recwarn):
    other_stop = [line | {"stop": "x"} for line in QUESTIONS]
    nonsense = [{"prompt": f"{i} q", "answer": "zebra", "stop": "\n"} for i in range(5)]
    run(capsys, demo_folder(), "--task", work / "sums.jsonl")
    assert not [warning for warning in recwarn if "right" in str(warning.message)]
    for lines, cause in ((other_stop, "if the token behind the answer does not count"), (nonsense, "prompt's format")):
        (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with pytest.warns(UserWarning, match=cause):
            assert run(capsys, demo_folder(), "--task", tmp_path / "task.jsonl")


def test_bad_requests_are_refused_before_a_model_is_loaded(work, data, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moeprune_ext.cli.io.load_model", lambda *_: pytest.fail("a model was loaded"))
    model = demo_folder()
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["return"])
    tokenizer.save_pretrained(other)
    tiny_model("qwen3_moe").config.save_pretrained(other)
    for arguments, says in (
        ([model], "nothing to measure"),
        ([model, model, model, "--speed"], "at most two"),
        ([model, model, "--reference", model, "--speed"], "same thing"),
        ([model, "--speed", "--speed-prompt", 10**6], "positions"),
        ([model, other, *data], "different tokens of --data"),
    ):
        assert says in refusal(capsys, *arguments)


@pytest.fixture
def harness(monkeypatch):
    """A stand-in with the harness's names: a task, what it reports, and no data set."""

    class TaskManager:
        all_tasks = ["arc_easy", "arc_challenge", "winogrande"]

        def match_tasks(self, names):
            return [task for task in self.all_tasks for name in names if name.endswith("*") and task[:3] == name[:3]]

    class Model:
        def __init__(self, pretrained, tokenizer):
            self.pretrained = pretrained

    def simple_evaluate(model, tasks):
        size = sum(tensor.numel() for tensor in model.pretrained.parameters())
        return {"results": {task: {"alias": task, "acc,none": size / 1e9, "acc_stderr,none": 0.25} for task in tasks}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Model},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_the_harnesss_figures_stand_in_a_table(harness, work, capsys):
    tasks = ["--lm-eval", "arc_*,winogrande"]
    result = run(capsys, work / "pruned", demo_folder(), *tasks)
    assert list(result["lm_eval"]) == list(result["lm_eval_reference"]) == ["arc_easy", "arc_challenge", "winogrande"]
    main(list(map(str, ["eval", work / "pruned", demo_folder(), *tasks])))
    shown = capsys.readouterr().out
    sizes = [result[name]["winogrande"]["acc,none"] for name in ("lm_eval", "lm_eval_reference")]
    line = next(line for line in shown.splitlines() if line.startswith("winogrande"))
    assert all(f"{size:.4f} ± 0.2500" in line for size in sizes)


def test_an_unknown_task_of_the_harness_is_named_with_its_neighbours(harness, capsys, monkeypatch):
    monkeypatch.setattr("moeprune_ext.cli.io.load_model", lambda *_: pytest.fail("a model was loaded"))
    says = refusal(capsys, demo_folder(), "--lm-eval", "arc_eazy")
    assert "no task 'arc_eazy'" in says and "arc_easy" in says
