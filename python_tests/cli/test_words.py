"""What verbs say: what they load and resume, warnings, what was gained, and what to do next."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

import moeprune_ext as mp
from moeprune_ext.cli import io
from moeprune_ext.cli.main import VERBS, main
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model directory with a space in its name, text, a task, and statistics."""
    folder = tmp_path_factory.mktemp("words")
    shutil.copytree(demo_folder(), folder / "the model")
    (folder / "text.txt").write_text(corpus.code_documents("calibration")[0])
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "stop": "\n"} for a in range(2, 6) for b in range(2)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    main(list(map(str, ["calibrate", folder / "the model", *data(folder), "-o", folder / "stats.safetensors"])))
    return folder


def data(folder):
    return ["--data", folder / "text.txt", "--sequence-length", 32, "--sequences", 16]


def run(capsys, *arguments):
    capsys.readouterr()
    main(list(map(str, arguments)))
    return capsys.readouterr()


def search(work, out):
    few = ["--population", 3, "--generations", 2, "--elites", 1, "--criterion", "seer"]
    return ["search", work / "the model", "--stats", work / "stats.safetensors", *few, *data(work), "-o", out]


def next_words(shown):
    """The words of the command in the last line."""
    last = shown.out.strip().splitlines()[-1]
    assert last.startswith("next: moeprune ")
    return shlex.split(last.removeprefix("next: moeprune "), comments=True)


def test_the_model_is_named_before_it_is_loaded_and_the_last_line_is_the_next_command(work, capsys, tmp_path):
    size = (work / "the model" / "model.safetensors").stat().st_size
    stats = tmp_path / "stats.safetensors"
    shown = run(capsys, "calibrate", work / "the model", *data(work), "-o", stats)
    assert f"loading {work / 'the model'} ({size / 1e6:,.1f} MB, bfloat16, cpu) ..." in shown.err
    assert next_words(shown)[:4] == ["search", str(work / "the model"), "--stats", str(stats)]
    plan = tmp_path / "plan.json"
    shown = run(capsys, "allocate", work / "the model", "--stats", stats, "-o", plan)
    assert "removes 48 of 96 experts (50.0%)" in shown.out and "loading" not in shown.err
    export = next_words(shown)
    assert export == ["export", str(work / "the model"), "--plan", str(plan), "-o", "pruned"]
    shown = run(capsys, *export[:-1], tmp_path / "pruned")
    assert "MB instead of" in shown.out
    assert next_words(shown)[:3] == ["eval", str(tmp_path / "pruned"), str(work / "the model")]
    assert next_words(run(capsys, "score", stats, "-o", tmp_path / "scores.json"))[0] == "allocate"


def test_a_search_says_that_it_resumes_what_it_gained_and_leaves_a_report(work, capsys, tmp_path):
    first = run(capsys, *search(work, tmp_path / "run"))
    assert "resuming" not in first.err
    lines = first.out.splitlines()
    assert (
        f"{tmp_path / 'run' / 'plan.json'}: removes 48 of 96 experts" in first.out
        and "token evaluations" not in first.out
    )
    assert f"report: {tmp_path / 'run' / 'report.html'}" in lines and (tmp_path / "run" / "report.html").exists()
    assert next_words(first) == ["export", str(work / "the model"), "--plan", str(tmp_path / "run"), "-o", "pruned"]
    assert mp.ExpertScores.load(tmp_path / "run" / "scores.json").criterion == "seer"
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert about["data"] == [str(work / "text.txt")] and about["model"] == str(work / "the model")
    again = run(capsys, *search(work, tmp_path / "run"))
    assert f"resuming {tmp_path / 'run'}: 2 of 2 generations done" in again.err


def test_a_search_with_other_memory_is_refused_by_the_name_of_the_option(work, capsys, tmp_path):
    run(capsys, *search(work, tmp_path / "run"))
    with pytest.raises(SystemExit):
        main(list(map(str, [*search(work, tmp_path / "run"), "--search-memory", 0.02])))
    assert "--search-memory" in capsys.readouterr().err.splitlines()[-1]


def test_eep_ends_with_what_the_task_lost_and_the_next_command(work, capsys, tmp_path):
    few = ["--prune-iters", 3, "--merge-iters", 1]
    ask = ["eep", work / "the model", "--task", work / "sums.jsonl", "--keep", 14, *few, "-o", tmp_path / "run"]
    shown = run(capsys, *ask)
    assert "of the test examples, where the full model answers" in shown.out
    assert (tmp_path / "run" / "report.html").exists()
    export = next_words(shown)
    assert export[0] == "export"
    assert "resuming" in run(capsys, *ask).err
    main([*export[:-1], str(tmp_path / "pruned")])
    assert mp.load(tmp_path / "pruned") is not None


WARNS = """
import warnings
from moeprune_ext.cli import info, main
def run(options):
    warnings.warn("the guard froze every layer: lower `entropy`", stacklevel=2)
    return {}, "done"
info.run = run
main.main(["info", "m"])
"""


def test_a_warning_is_one_line_with_the_verb_and_the_option():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert done.stderr == "moeprune info: warning: the guard froze every layer: lower --entropy\n"
    assert done.stdout == "done\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_groups_and_no_empty_default(capsys, verb):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert "(default: [])" not in shown and "(default: )" not in shown and "(default: ())" not in shown
    assert "\ngeneral:\n" in shown
    if verb in ("search", "prune"):
        titles = ["model and data:", "scores of experts:", "budget:", "limits of every plan:", "search:"]
        titles += ["memory and streaming:", "output:", "general:"]
        places = [shown.index(f"\n{title}\n") for title in titles]
        assert places == sorted(places)
        assert shown.index("\nsearch:\n") < shown.index("  --population") < shown.index("\nmemory and streaming:\n")


def test_files_are_overwritten_by_force_alone(work, capsys, tmp_path):
    plan = tmp_path / "plan.json"
    ask = ["allocate", work / "the model", "--stats", work / "stats.safetensors", "-o", plan, "--sparsity"]
    run(capsys, *ask, 0.25)
    with pytest.raises(SystemExit):
        main(list(map(str, [*ask, 0.5])))
    assert mp.PruningPlan.load(plan).sparsity == 0.25
    run(capsys, *ask, 0.5, "--force")
    assert mp.PruningPlan.load(plan).sparsity == 0.5


def test_a_refused_search_leaves_the_record_of_the_run_that_is_there(work, capsys, tmp_path):
    run(capsys, *search(work, tmp_path / "run"))
    before = (tmp_path / "run" / "about.json").read_bytes()
    with pytest.raises(SystemExit):
        run(capsys, *search(work, tmp_path / "run"), "--sparsity", 0.25)
    assert "belongs to another search" in capsys.readouterr().err
    assert (tmp_path / "run" / "about.json").read_bytes() == before


def test_a_directory_without_a_plan_is_refused_with_those_below_it_that_have_one(work, capsys, tmp_path):
    (tmp_path / "out" / "25" / "moeprune").mkdir(parents=True)
    (tmp_path / "out" / "25" / "moeprune" / "plan.json").touch()
    with pytest.raises(SystemExit) as ended:
        run(capsys, "export", work / "the model", "--plan", tmp_path / "out", "-o", tmp_path / "new")
    assert ended.value.code == 2 and str(tmp_path / "out" / "25" / "moeprune") in capsys.readouterr().err


@pytest.mark.parametrize("factor, fits", [(8, True), (2, False), (None, False)])
def test_positions_that_rope_scaling_adds_count(work, tmp_path, factor, fits):
    shutil.copytree(work / "the model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"max_position_embeddings": 32}
    if factor:
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32, "rope_theta": 1e4}
        config["rope_parameters"] = yarn
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    if fits:
        return io.check_longest(tmp_path / "model", 128, "the data", "shorten it")
    with pytest.raises(ValueError, match="positions"):
        io.check_longest(tmp_path / "model", 128, "the data", "shorten it")
