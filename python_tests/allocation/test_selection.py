"""Honest selection: how data is split, how domains count, and that what may be chance is not chosen."""

import json
import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.selection import HeldOut, rank_held_out, split_held_out
from moeprune_ext.data.batches import as_batches

DATA = {"a": [random_tokens(8, 24, 7)], "b": [random_tokens(5, 16, 8), random_tokens(3, 12, 9)]}


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def scores(model):
    return mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")


@pytest.fixture(scope="module")
def evaluator(model):
    return mp.CandidateEvaluator(model, DATA)


@pytest.fixture(scope="module")
def plans(scores):
    prune = {"uniform": dict.fromkeys(range(4), 4), "light": {0: 1}, "early": {0: 6, 1: 6, 2: 4}}
    return {name: mp.PruningPlan.from_pruned_counts(scores, counts) for name, counts in prune.items()}


@pytest.mark.parametrize("metric", ["esap", "kl_pq", "nll"])
def test_domain_means_are_those_of_each_domain_alone(model, evaluator, plans, metric):
    assert evaluator.domains == {"a": list(range(8)), "b": list(range(8, 16))}
    together = evaluator.by_domain(list(plans.values()), metric)
    worst = evaluator.fitness(list(plans.values()), metric, "worst")
    for name, batches in DATA.items():
        alone = mp.CandidateEvaluator(model, batches).evaluate(list(plans.values()), (metric,))
        assert [means[name] for means in together] == pytest.approx([getattr(s, metric) for s in alone], abs=1e-6)
    choose = min if metric == "esap" else max
    assert worst == [choose(means.values()) for means in together]
    means = [getattr(score, metric) for score in evaluator.evaluate(list(plans.values()), (metric,))]
    assert evaluator.fitness(list(plans.values()), metric) == means


def test_data_without_domains_is_one_domain(model, plans):
    one = mp.CandidateEvaluator(model, {"input_ids": random_tokens()})
    assert one.domains == {"all": [0, 1, 2]} and one.identity["domains"] is None
    assert one.fitness([plans["early"]], "esap", "worst") == one.fitness([plans["early"]])


def test_wrong_domains_are_refused_by_name(model, evaluator, plans):
    with pytest.raises(ValueError, match="domain b: batch 0: input_ids must be"):
        mp.CandidateEvaluator(model, {"a": [random_tokens()], "b": [torch.zeros(3)]})
    mute = {"input_ids": random_tokens(), "labels_mask": torch.zeros(3, 24)}
    with pytest.raises(ValueError, match="domain b has no position"):
        mp.CandidateEvaluator(model, {"a": [random_tokens()], "b": [mute]})
    with pytest.raises(ValueError, match="unknown objective 'least'"):
        evaluator.fitness([plans["light"]], "esap", "least")
    single = mp.CandidateEvaluator(model, {"a": [random_tokens()], "b": [random_tokens(2, 1)]})
    with pytest.raises(ValueError, match="domain b has no position whose next token"):
        single.fitness([plans["light"]], "nll", "worst")


def test_a_search_by_the_worst_domain_ends_with_its_best(evaluator, scores, tmp_path):
    settings = dict(sparsity=0.5, population=6, generations=3, elites=3, objective="worst")
    result = mp.evolve(evaluator, scores, **settings, out=tmp_path)
    assert result.score == pytest.approx(min(evaluator.by_domain([result.plan])[0].values()), abs=1e-6)
    assert json.loads((tmp_path / "search.json").read_text())["objective"] == "worst"
    mean = mp.evolve(evaluator, scores, **{**settings, "objective": "mean"})
    first = [[min(by.values()) for by in evaluator.by_domain(r.finalists)] for r in (result, mean)]
    assert first[0][0] >= first[1][0] - 1e-6
    with pytest.raises(ValueError, match="objective: 'worst' there, 'mean' now"):
        mp.evolve(evaluator, scores, **{**settings, "objective": "mean"}, out=tmp_path)
    with pytest.raises(ValueError, match="compares means"):
        mp.evolve(evaluator, scores, **settings, fidelity="race")
    with pytest.raises(ValueError, match="domains"):
        mp.evolve(mp.CandidateEvaluator(evaluator.model, evaluator.sequences), scores, **settings, out=tmp_path)


def test_finalists_are_the_last_elites_best_first(evaluator, scores):
    result = mp.evolve(evaluator, scores, 0.5, population=6, generations=3, elites=3)
    assert result.finalists[0] == result.plan and len(result.finalists) == 3
    found = evaluator.fitness(result.finalists)
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(result.score, abs=1e-6)


def test_the_end_of_every_domain_is_held_out_and_nothing_is_in_both():
    domains = {name: as_batches(random_tokens(rows, 8, seed=rows)) for name, rows in (("a", 40), ("b", 11), ("c", 3))}
    searched, held = split_held_out(domains)
    assert {name: len(its) for name, its in held.items()} == {"a": 10, "b": 3, "c": 1}
    for name, batches in domains.items():
        rows = torch.cat([sequence.input_ids for sequence in [*searched[name], *held[name]]])
        assert torch.equal(rows, batches[0].input_ids)
    searched, held = split_held_out({name: domains[name] for name in ("b", "c")} | {"d": domains["c"]}, share=0.1)
    assert sum(map(len, held.values())) == 8 and min(map(len, [*searched.values(), *held.values()])) >= 1


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        ([8, 7], 0.25, "15 sequences; holding out 8 of them needs at least 16"),
        ([20, 1], 0.25, "domain 1 has 1 sequences"),
        ([20], 1.0, "between 0 and 1"),
    ],
)
def test_too_little_to_hold_out_is_refused_with_numbers(rows, share, message):
    with pytest.raises(ValueError, match=message):
        split_held_out({str(i): as_batches(random_tokens(n, 8)) for i, n in enumerate(rows)}, share)


@pytest.mark.parametrize(("metric", "objective"), [("esap", "mean"), ("kl_pq", "worst")])
def test_a_clear_winner_is_chosen_and_its_gain_is_the_difference(evaluator, plans, metric, objective):
    result = rank_held_out(evaluator, plans, metric=metric, objective=objective)
    found = dict(zip(plans, evaluator.fitness(list(plans.values()), metric, objective), strict=True))
    assert result.scores == pytest.approx(found, abs=1e-6)
    assert result.winner == result.best == "light" and result.sequences == 16
    sign = 1 if metric == "esap" else -1
    assert result.gain.value == pytest.approx(sign * (found["light"] - found["uniform"]), abs=1e-6)
    assert 0 < result.gain.low < result.gain.value < result.gain.high
    assert result.domains["early"] == pytest.approx(evaluator.by_domain([plans["early"]])[0], abs=1e-6)
    assert "light gains" in result.says and "16 held-out sequences" in result.says
    assert result == rank_held_out(evaluator, plans, metric=metric, objective=objective)
    assert HeldOut.from_json(json.loads(json.dumps(result.as_json()))) == result


def test_a_gain_that_may_be_chance_is_not_taken(evaluator, scores):
    """Two plans that differ in one expert, whose order on single sequences changes."""
    counts = dict.fromkeys(range(4), 4)
    near = {f"{i}": mp.PruningPlan.from_pruned_counts(scores, {**counts, i: 5, (i + 1) % 4: 3}) for i in range(4)}
    plans = {"uniform": mp.PruningPlan.from_pruned_counts(scores, counts), **near}
    result = rank_held_out(evaluator, plans)
    assert (result.winner == "uniform") == (result.best == "uniform" or result.gain.low <= 0)
    same = {"uniform": plans["uniform"], "search 1": plans["uniform"]}
    assert rank_held_out(evaluator, same).says.startswith("search 1 is not better than uniform")
    few = mp.CandidateEvaluator(evaluator.model, [random_tokens(2, 6, 3)])
    chances = [rank_held_out(few, {"uniform": plans["uniform"], name: plan}) for name, plan in near.items()]
    kept = [result for result in chances if result.best != "uniform" and result.winner == "uniform"]
    assert kept and all("includes 0: the simpler plan, uniform, is kept" in result.says for result in kept)


def test_plans_of_nan_rank_last_and_a_baseline_of_nan_is_left(scores):
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
        model.model.layers[0].mlp.experts.down_proj[3] = math.nan
    order = {layer: torch.arange(8.0) for layer in range(4)}
    order[0][3] = 9.0
    evaluator = mp.CandidateEvaluator(model, [random_tokens(rows=4)])
    scores = mp.ExpertScores.wrap(order, shapes=evaluator.shapes)
    bad, good = (mp.PruningPlan.from_pruned_counts(scores, counts) for counts in ({0: 6}, {1: 4}))
    result = rank_held_out(evaluator, {"uniform": bad, "search 1": good})
    assert result.winner == "search 1" and "uniform has no finite esap" in result.says
    assert rank_held_out(evaluator, {"uniform": good, "search 1": bad}).winner == "uniform"
    with pytest.raises(ValueError, match="every plan gives NaN"):
        rank_held_out(evaluator, {"uniform": bad})


def test_a_ranking_without_its_baseline_or_on_one_sequence_is_refused(evaluator, plans):
    with pytest.raises(ValueError, match="'uniform' is not among"):
        rank_held_out(evaluator, {"light": plans["light"]})
    with pytest.raises(ValueError, match="at least 2"):
        rank_held_out(mp.CandidateEvaluator(evaluator.model, [random_tokens(1)]), plans)
