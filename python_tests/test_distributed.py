"""Several processes under torchrun: the same statistics, scores and plans, whatever their number, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeprune_ext as mp
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder

TESTS = str(Path(__file__).parent)

SEARCH = f"""
import os, signal, sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
import moeprune_ext as mp
from moeprune_ext import distributed
from tiny_models import random_tokens, tiny_model

out, fidelity, killed_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.join()
model = tiny_model("olmoe")
stats = mp.calibrate(model, [random_tokens(2, 24, seed) for seed in range(5)])
evaluator = mp.CandidateEvaluator(model, [random_tokens(10, 24, 7), random_tokens(3, 17, 8)])
real = evaluator.sequence_sums

def dies_once(*arguments):
    history = out / "history.jsonl"
    if killed_after and distributed.world()[0] == 1 and history.exists() and not (out / "killed").exists():
        if history.read_text().count("\\n") >= killed_after:
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

evaluator.sequence_sums = dies_once
scores = mp.score_experts(stats, "reap")
mp.evolve(evaluator, scores, 0.5, population=8, generations=6, elites=2, fidelity=fidelity, out=out)
if distributed.is_first():
    stats.save(out / "stats.safetensors")
distributed.leave()
"""


def torchrun(processes, *arguments, restarts=1):
    """Once more where it fails: on a busy machine processes may not find each other in time when they start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads in every process of every run
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "search.py"
    path.write_text(SEARCH)
    return path


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    """What one process finds: {fidelity: directory}."""
    found = {}
    for fidelity in ("full", "race"):
        found[fidelity] = tmp_path_factory.mktemp("alone") / fidelity
        assert torchrun(1, script, found[fidelity], fidelity, 0).returncode == 0
    return found


@pytest.mark.parametrize(("processes", "fidelity"), [(2, "full"), (3, "race")])
def test_any_number_of_processes_gives_the_same_plan_bit_for_bit(script, alone, tmp_path, processes, fidelity):
    done = torchrun(processes, script, tmp_path, fidelity, 0)
    assert done.returncode == 0, done.stderr
    for name in ("plan.json", "history.jsonl", "search.json"):
        assert (tmp_path / name).read_text() == (alone[fidelity] / name).read_text(), name
    one, several = (mp.RoutingStats.load(folder / "stats.safetensors") for folder in (alone[fidelity], tmp_path))
    assert one.tokens == several.tokens == 240
    for layer, table in one.moments.items():
        assert torch.allclose(table, several.moments[layer], rtol=1e-12, atol=0)
        assert torch.equal(one.max_norm[layer], several.max_norm[layer])


def test_a_killed_worker_is_restarted_and_the_search_ends_with_the_same_plan(script, alone, tmp_path):
    done = torchrun(2, script, tmp_path, "race", 2, restarts=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and f"exitcode: -{int(signal.SIGKILL)}" in done.stderr
    for name in ("plan.json", "history.jsonl"):
        assert (tmp_path / name).read_text() == (alone["race"] / name).read_text(), name


def test_the_command_line_under_torchrun_prints_once_and_refuses_once(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.code_documents("calibration")[0])
    data = ["--data", text, "--sequence-length", 64, "--sequences", 3]
    stats = tmp_path / "stats.safetensors"
    moeprune = ["-m", "moeprune_ext.cli"]
    done = torchrun(2, *moeprune, "calibrate", demo_folder(), *data, "-o", stats, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 192
    settings = ["--population", 4, "--generations", 2, "--elites", 1, "--fidelity", "race", "--race-level", 0.1]
    search = [*moeprune, "search", demo_folder(), "--stats", stats, *settings, *data, "--json"]
    done = torchrun(2, *search, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert mp.PruningPlan.load(result["plan"]).sparsity == 0.5
    assert torchrun(1, *search, "-o", tmp_path / "alone").returncode == 0
    for name in ("choice.json", "history.jsonl", "plan.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "alone" / name).read_text(), name
    refused = torchrun(2, *search, "-o", tmp_path / "run", "--seed", 5, restarts=0)
    assert refused.returncode != 0 and "seed: 0 there, 5 now" in refused.stderr and refused.stdout == ""


def test_eep_finds_the_same_by_any_number_of_processes(tmp_path):
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "stop": "\n"} for a in range(2, 6) for b in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    ask = ["eep", demo_folder(), "--task", tmp_path / "sums.jsonl", "--keep", 14, "--prune-iters", 4]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = torchrun(processes, "-m", "moeprune_ext.cli", *ask, "--merge-iters", 4, "-o", out, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["evaluations"] == 8
    for name in ("starts.json", "search.json", "history.jsonl", "plan.json", "result.json"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text(), name


REPAIR = f"""
import sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
import moeprune_ext as mp
from moeprune_ext import distributed
from tiny_models import random_tokens, tiny_model

out, target, criterion = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.join()
model, text = tiny_model("gpt_oss"), [random_tokens(10, 24, 7), random_tokens(3, 17, 8)]
plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, text), "reap"), 0.5)
settings = dict(target=target, sequential=True, criterion=criterion, out=out)
result = mp.repair(model, plan, text, **settings)
assert mp.repair(model, plan, text, **settings).plan.merges == result.plan.merges
if distributed.is_first():
    result.plan.save(out / "plan.json")
distributed.leave()
"""


@pytest.mark.parametrize(("target", "criterion"), [("layer", "naee"), ("hidden", "seer")])
def test_repair_is_the_same_by_any_number_of_processes(tmp_path, target, criterion):
    script = tmp_path / "repair.py"
    script.write_text(REPAIR)
    plans = []
    for processes in (1, 2):
        done = torchrun(processes, script, tmp_path / str(processes), target, criterion)
        assert done.returncode == 0, done.stderr
        plans.append(mp.PruningPlan.load(tmp_path / str(processes) / "plan.json"))
    one, two = plans
    assert one.kept == two.kept and one.repaired_layers == two.repaired_layers != []
    for layer in one.repaired_layers:
        torch.testing.assert_close(one.merges[layer].down, two.merges[layer].down, rtol=1e-4, atol=1e-5)
