"""What the embedded model and the demo promise. `python bench/assess.py` prints the figures in full."""

import json
import subprocess
import sys
from statistics import mean

import assess
import pytest

import moeprune_ext as mp
from moeprune_ext.demo.run import SPARSITIES, arithmetic_task, demo_folder, load_demo


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load_demo()
    scores = mp.score_experts(mp.calibrate(model, assess.all_batches(tokenizer, "calibration", 16, 0)), "reap")
    return model, tokenizer, scores


def test_the_checkpoint_is_small_and_its_training_is_on_record():
    assert (demo_folder() / "model.safetensors").stat().st_size <= 8e6
    record = json.loads((demo_folder() / "training.json").read_text())
    assert {"seed", "seconds", "machine", "loss_curve"} <= set(record)
    assert record["loss_curve"][-1]["loss"] < record["loss_curve"][0]["loss"] / 3


def test_it_does_held_out_arithmetic_and_uniform_pruning_hurts(demo):
    model, tokenizer, scores = demo
    task = arithmetic_task(tokenizer, None)
    assert len(task.examples) >= 1000
    full = assess.exact_match_by_operation(model, task)
    assert full["all"] >= 0.9 and all(full[operation] >= 0.8 for operation in "+-*")
    with mp.applied(model, mp.uniform_plan(scores, 0.5)):
        pruned = assess.exact_match_by_operation(model, task)
    assert full["all"] - pruned["all"] >= 0.1


def test_code_and_arithmetic_take_different_experts_in_most_layers(demo):
    model, tokenizer, _ = demo
    divergence = assess.held_out_divergence(model, tokenizer)
    assert sum(value >= 0.1 for value in divergence.values()) > len(divergence) / 2, divergence


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_evoesap_beats_uniform_on_held_out_text(demo, sparsity):
    model, tokenizer, scores = demo
    searcher = mp.CandidateEvaluator(model, assess.all_batches(tokenizer, "calibration", 2, 1))
    judge = mp.CandidateEvaluator(model, assess.all_batches(tokenizer, "evaluation", 8, 0))
    plans = [mp.evolve(searcher, scores, sparsity, population=12, generations=3, seed=seed).plan for seed in range(5)]
    uniform, *found = (score.esap for score in judge.evaluate([mp.uniform_plan(scores, sparsity), *plans]))
    gains = [esap - uniform for esap in found]
    print(f"ESAP gains over uniform {uniform:.4f} at {sparsity:.0%}: {', '.join(f'{g:+.4f}' for g in gains)}")
    assert mean(gains) >= 0


def test_demo_prints_its_table_as_json(tmp_path):
    command = [sys.executable, "-m", "moeprune_ext.cli", "demo", "--json", "-o", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = json.loads(done.stdout)
    assert [row["model"] for row in rows] == ["full", "uniform 25%", "EvoESAP 25%", "uniform 50%", "EvoESAP 50%"]
    assert [row["experts"] for row in rows] == [96, 72, 72, 48, 48]
    assert rows[0]["esap"] == pytest.approx(1, abs=1e-6) and rows[2]["esap"] > rows[1]["esap"]
    assert rows[0]["megabytes"] > rows[1]["megabytes"] > rows[3]["megabytes"]
    for name in ("uniform-25", "evoesap-50"):
        assert mp.load(tmp_path / "demo" / name) is not None
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "already exists" in again.stderr
