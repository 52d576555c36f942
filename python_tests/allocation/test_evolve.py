"""EvoESAP: patterns, moves, determinism, resuming after a kill, refusals."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.patterns import DEFAULT_PATTERNS, allocate, mutate, pattern_weights
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.artifacts.scores import ExpertScores, pruning_order

# Experts pruned per layer by the eleven deterministic patterns, 8 layers of 16 experts, top-4, half pruned: what the
# released code of EvoESAP allocates.
RELEASED = {
    "uniform": (8, 8, 8, 8, 8, 8, 8, 8),
    "up": (2, 4, 6, 8, 9, 11, 12, 12),
    "down": (12, 12, 11, 9, 8, 6, 4, 2),
    "mid": (3, 7, 10, 12, 12, 10, 7, 3),
    "mid-neg": (12, 9, 7, 4, 4, 7, 9, 12),
    "front-heavy": (12, 12, 12, 9, 7, 5, 4, 3),
    "back-heavy": (4, 5, 6, 7, 8, 10, 12, 12),
    "block-early": (12, 12, 7, 7, 7, 7, 6, 6),
    "block-late": (7, 7, 7, 7, 6, 6, 12, 12),
    "alt": (11, 5, 11, 5, 11, 5, 11, 5),
    "deep-flat": (6, 7, 9, 10, 10, 9, 7, 6),
}


@pytest.fixture(scope="module")
def small():
    model = tiny_model("olmoe")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.CandidateEvaluator(model, [random_tokens(seed=7)]), scores


SETTINGS = dict(sparsity=0.5, population=6, generations=4, elites=2)


def test_deterministic_patterns_are_the_released_ones():
    plans = {name: allocate(pattern_weights(name, 8, random.Random(0)), [12] * 8, 64) for name in RELEASED}
    assert plans == RELEASED
    assert set(RELEASED) | {"random"} == set(DEFAULT_PATTERNS)


@pytest.mark.parametrize("pattern", DEFAULT_PATTERNS)
@pytest.mark.parametrize("capacities", [[12] * 8, [12, 0, 4, 12, 7], [3], [60] * 48])
def test_every_pattern_spends_the_budget_exactly_within_capacity(pattern, capacities):
    for budget in (0, 1, sum(capacities) // 2, sum(capacities)):
        counts = allocate(pattern_weights(pattern, len(capacities), random.Random(0)), capacities, budget)
        assert sum(counts) == budget
        assert all(0 <= n <= capacity for n, capacity in zip(counts, capacities, strict=True))


def test_mutations_keep_the_budget_and_move_at_most_what_they_may():
    rng = random.Random(0)
    capacities = [6, 6, 2, 6, 0]
    parent = (3, 3, 1, 3, 0)
    children = [mutate(parent, capacities, rng, 4, 3, 32) for _ in range(500)]
    assert all(sum(c) == sum(parent) for c in children)
    assert all(0 <= n <= capacity for c in children for n, capacity in zip(c, capacities, strict=True))
    moved = [sum(abs(a - b) for a, b in zip(c, parent, strict=True)) // 2 for c in children]
    assert max(moved) <= 12 and len({m for m in moved}) > 3
    assert mutate((0, 0), [4, 4], rng, 4, 3, 32) == (0, 0)


def test_same_seed_same_plan_and_another_seed_another_search(small):
    evaluator, scores = small
    first, second = (mp.evolve(evaluator, scores, **SETTINGS, seed=3) for _ in range(2))
    assert first == second
    other = mp.evolve(evaluator, scores, **SETTINGS, seed=4)
    assert other.history != first.history


def test_result_is_the_best_plan_scored_and_never_worse_than_uniform(small):
    evaluator, scores = small
    result = mp.evolve(evaluator, scores, **SETTINGS)
    assert evaluator.evaluate([result.plan])[0].esap == pytest.approx(result.score, abs=1e-6)
    assert result.score >= evaluator.evaluate([mp.uniform_plan(scores, 0.5)])[0].esap
    bests = [record["best"] for record in result.history]
    assert bests == sorted(bests) and len(bests) == 4
    assert sum(result.plan.pruned_counts.values()) == 16


@pytest.mark.parametrize("fitness", ["kl_qp", "kl_pq", "nll", "accept", "top1_agree"])
def test_other_fitnesses_go_the_right_way(small, fitness):
    evaluator, scores = small
    result = mp.evolve(evaluator, scores, **SETTINGS, fitness=fitness)
    worst = result.history[0]["mean"]
    assert result.score <= worst if fitness in ("kl_qp", "kl_pq", "nll") else result.score >= worst


def test_the_default_settings_are_the_published_1404_evaluations_and_screening_takes_half():
    assert EvolveSettings().screen == 0
    for screen, evaluations in ((0, 1404), (32, 718)):
        settings = EvolveSettings(screen=screen)
        assert settings.population + (settings.generations - 1) * settings.children == evaluations


def test_grouped_routers_are_searched_in_whole_groups():
    model = tiny_model("deepseek_v3")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "man")
    assert scores.n_group == 2
    result = mp.evolve(mp.CandidateEvaluator(model, [random_tokens()]), scores, **SETTINGS)
    for ids in result.plan.kept.values():
        assert sum(e < 4 for e in ids) == sum(e >= 4 for e in ids) >= 2


def test_a_plain_mapping_takes_its_routers_from_the_evaluator(small):
    evaluator, scores = small
    plain = {layer: values.clone() for layer, values in scores.items()}
    assert mp.evolve(evaluator, plain, **SETTINGS).plan.kept == mp.evolve(evaluator, scores, **SETTINGS).plan.kept


def test_a_finished_search_resumes_to_the_same_plan_without_scoring_and_can_be_extended(small, tmp_path, monkeypatch):
    evaluator, scores = small
    first = mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path)
    assert mp.PruningPlan.load(tmp_path / "plan.json") == first.plan
    longer = {**SETTINGS, "generations": 6}
    unbroken = mp.evolve(evaluator, scores, **longer)
    assert mp.evolve(evaluator, scores, **longer, out=tmp_path).plan == unbroken.plan
    monkeypatch.setattr(evaluator, "evaluate", lambda *_: pytest.fail("everything was scored already"))
    assert mp.evolve(evaluator, scores, **longer, out=tmp_path).plan == unbroken.plan


@pytest.mark.parametrize("change", [{"seed": 1}, {"sparsity": 0.25}, {"population": 7}, {"fitness": "kl_pq"}])
def test_resuming_with_other_settings_is_refused_and_says_which(small, tmp_path, change):
    evaluator, scores = small
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 1}, out=tmp_path)
    with pytest.raises(ValueError, match=next(iter(change))):
        mp.evolve(evaluator, scores, **{**SETTINGS, **change}, out=tmp_path)


def test_given_plans_come_first_then_patterns_then_random_ones(small, tmp_path):
    evaluator, scores = small
    steep, flat = (mp.PruningPlan.from_pruned_counts(scores, c) for c in ({0: 6, 1: 6, 2: 4}, {0: 5, 1: 3, 2: 3, 3: 5}))
    result = mp.SearchResult(flat, 0.0, [])  # a search's result stands where its plan may
    first = {**SETTINGS, "generations": 1, "init_patterns": ["uniform", "up"]}
    mp.evolve(evaluator, scores, **first, init_plans=[steep, result], out=tmp_path / "given")
    mp.evolve(evaluator, scores, **first, out=tmp_path / "none")
    given, none = (
        [counts for counts, _ in json.loads((tmp_path / name / "history.jsonl").read_text())["scores"]]
        for name in ("given", "none")
    )
    assert given[:4] == [[6, 6, 4, 0], [5, 3, 3, 5], *none[:2]]
    assert len(given) == 6 and given[4:] == none[2:4]
    mp.evolve(evaluator, scores, **{**first, "population": 3}, init_plans=[steep, flat], out=tmp_path / "cut")
    cut = json.loads((tmp_path / "cut" / "history.jsonl").read_text())["scores"]
    assert [counts for counts, _ in cut] == given[:3]


def test_a_search_is_never_worse_than_a_plan_it_was_given(small):
    evaluator, scores = small
    best = mp.evolve(evaluator, scores, **SETTINGS, seed=1)
    again = mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 1}, seed=2, init_plans=[best])
    assert again.score >= best.score - 1e-6


def test_resuming_with_other_given_plans_or_limits_is_refused(small, tmp_path):
    evaluator, scores = small
    plans = [mp.PruningPlan.from_pruned_counts(scores, counts) for counts in ({0: 6, 1: 5, 2: 5}, {1: 5, 2: 5, 3: 6})]
    whole = mp.evolve(evaluator, scores, **SETTINGS, init_plans=plans)
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 2}, init_plans=plans, out=tmp_path)
    for others in ((), plans[:1], plans[::-1]):
        with pytest.raises(ValueError, match="init_plans"):
            mp.evolve(evaluator, scores, **SETTINGS, init_plans=others, out=tmp_path)
    with pytest.raises(ValueError, match=r"capacities: None there, \[6, 5, 6, 6\] now"):
        lowest = pruning_order(scores[1])[-3:]  # they would have stayed longest, so the order is the same
        mp.evolve(evaluator, scores.constrained(protect={1: lowest}), **SETTINGS, init_plans=plans, out=tmp_path)
    assert mp.evolve(evaluator, scores, **SETTINGS, init_plans=plans, out=tmp_path).plan == whole.plan


def test_a_directory_of_an_earlier_version_resumes(small, tmp_path):
    evaluator, scores = small
    whole = mp.evolve(evaluator, scores, **SETTINGS)
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 2}, out=tmp_path)
    settings = json.loads((tmp_path / "search.json").read_text())
    assert settings.pop("init_plans") is None and settings.pop("capacities") is None
    (tmp_path / "search.json").write_text(json.dumps(settings))
    assert mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path).plan == whole.plan


def test_stricter_scores_are_searched_within_their_limits(small):
    evaluator, scores = small
    stricter = scores.constrained(min_kept=3, protect={2: range(6)})
    plan = mp.evolve(evaluator, stricter, **SETTINGS).plan
    assert sum(plan.pruned_counts.values()) == 16 and max(plan.pruned_counts.values()) <= 5
    assert set(plan.kept[2]) >= set(range(6))


def test_resuming_with_other_data_is_refused(small, tmp_path):
    evaluator, scores = small
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 1}, out=tmp_path)
    other = mp.CandidateEvaluator(evaluator.model, [random_tokens(seed=8)])
    with pytest.raises(ValueError, match="data"):
        mp.evolve(other, scores, **SETTINGS, out=tmp_path)


def test_a_history_cut_off_in_mid_line_is_taken_up(small, tmp_path):
    evaluator, scores = small
    whole = mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path)
    text = (tmp_path / "history.jsonl").read_text()
    (tmp_path / "history.jsonl").write_text(text[: len(text) * 2 // 3])
    (tmp_path / "plan.json").unlink()
    assert mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path).plan == whole.plan
    assert mp.PruningPlan.load(tmp_path / "plan.json") == whole.plan


KILLED = """
import sys
sys.path[:0] = {tests!r}
from test_evolve import *
model = tiny_model("olmoe")
scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
evaluator = mp.CandidateEvaluator(model, [random_tokens(seed=7)])
result = mp.evolve(evaluator, scores, 0.5, population=6, generations=40, elites=2, out={out!r})
"""


@pytest.mark.parametrize("moment", ["settings written", 1, 5, 20])
def test_a_search_killed_at_any_moment_ends_with_the_same_plan(small, tmp_path, moment):
    """Killed right after its settings are on disk, or after so many generations."""
    evaluator, scores = small
    whole = mp.evolve(evaluator, scores, 0.5, population=6, generations=40, elites=2)
    script = KILLED.format(tests=[str(Path(__file__).parents[i]) for i in (0, 1)], out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    history, settings = tmp_path / "history.jsonl", tmp_path / "search.json"

    def reached():
        if moment == "settings written":
            return settings.exists()
        return history.exists() and history.read_text().count("\n") >= moment

    while process.poll() is None and not reached():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the search ended before it could be killed"
    assert not (tmp_path / "plan.json").exists()
    resumed = mp.evolve(evaluator, scores, 0.5, population=6, generations=40, elites=2, out=tmp_path)
    assert resumed.plan == whole.plan


def test_resuming_with_other_weights_or_dtype_is_refused(small, tmp_path):
    evaluator, scores = small
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 1}, out=tmp_path)
    tuned = copy.deepcopy(evaluator.model)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.5)  # the routers, and so the fingerprint, stay
    with pytest.raises(ValueError, match="teacher_log_sum_exp"):
        mp.evolve(mp.CandidateEvaluator(tuned, evaluator.sequences), scores, **SETTINGS, out=tmp_path)
    half = mp.CandidateEvaluator(copy.deepcopy(evaluator.model).bfloat16(), evaluator.sequences)
    with pytest.raises(ValueError, match="dtype"):
        mp.evolve(half, scores, **SETTINGS, out=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.9}, "at most 0.75"),
        ({"sparsity": 1.0}, "below 1"),
        ({"elites": 7}, "elites at most population"),
        ({"population": 0}, "at least 1"),
        ({"fitness": "bleu"}, "unknown fitness"),
        ({"init_patterns": ["sideways"]}, "sideways"),
        ({"init_plans": [{0: 6, 1: 6, 2: 4}, {0: 6}]}, r"init_plans\[1\] prunes 6 experts; at sparsity 0.5 16 must go"),
        ({"init_plans": [{0: 6, 1: 6, 2: 4}] * 7}, "7 init_plans do not fit a population of 6"),
    ],
)
def test_impossible_settings_are_refused_before_any_evaluation(small, tmp_path, settings, message):
    evaluator, scores = small
    if "init_plans" in settings:
        settings = {"init_plans": [mp.PruningPlan.from_pruned_counts(scores, c) for c in settings["init_plans"]]}
    with pytest.raises(ValueError, match=message):
        mp.evolve(evaluator, scores, **{**SETTINGS, **settings}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scores_and_plans_of_another_model_are_refused(small):
    evaluator, scores = small
    other = mp.score_experts(mp.calibrate(tiny_model("olmoe", seed=5), [random_tokens()]), "reap")
    with pytest.raises(ValueError, match="another model"):
        mp.evolve(evaluator, other, **SETTINGS)
    with pytest.raises(ValueError, match="another model"):
        evaluator.evaluate([mp.uniform_plan(other, 0.5)])


@pytest.mark.parametrize("fidelity", ["full", "race"])
@pytest.mark.parametrize("method", ["auto", "whole"])
def test_a_nan_candidate_ranks_last_and_a_nan_teacher_is_an_error(method, fidelity):
    """An expert of NaN weights that no token chooses as long as two others are left."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
        model.model.layers[0].mlp.experts.down_proj[3] = math.nan
    scores = {layer: torch.arange(8.0) for layer in range(4)}
    scores[0][3] = 9.0
    evaluator = mp.CandidateEvaluator(model, [random_tokens(rows=6)], method=method)
    wrapped = ExpertScores.wrap(scores, shapes=evaluator.shapes)
    plans = [mp.PruningPlan.from_pruned_counts(wrapped, counts) for counts in ({0: 6}, {1: 4})]
    bad, good = evaluator.evaluate(plans)
    assert math.isnan(bad.esap) and bad.nan_rows == bad.positions and 0 < good.esap < 1 and good.nan_rows == 0
    result = mp.evolve(evaluator, scores, **{**SETTINGS, "population": 12}, fidelity=fidelity)
    assert sum(record["nan"] for record in result.history) > 0
    assert result.plan.pruned_counts[0] < 6 and math.isfinite(result.score)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        mp.CandidateEvaluator(model, [random_tokens()], method=method)


def test_history_is_json(small, tmp_path):
    evaluator, scores = small
    result = mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sum(len(line["scores"]) for line in lines) == sum(record["evaluated"] for record in result.history)
