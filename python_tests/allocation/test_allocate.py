"""Global thresholds, measured damages and their best split."""

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.budget import check_scores, counts_of, order_fingerprint
from moeprune_ext.allocation.damages import Damages, damages, dp_plan
from moeprune_ext.allocation.threshold import NORMALIZATIONS, global_plan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import LayerShape


def scores_for(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {i: torch.rand(s.num_experts, generator=generator, dtype=torch.float64) for i, s in enumerate(shapes)}
    return ExpertScores(values, dict(enumerate(shapes)), "test", "model:0")


@pytest.fixture(scope="module")
def small():
    model = tiny_model("olmoe")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.CandidateEvaluator(model, [random_tokens(seed=7)]), scores


@pytest.fixture(scope="module")
def measured(small):
    return damages(*small)


# ---- a global threshold


def by_hand(*layers):
    return ExpertScores.wrap({i: torch.tensor(values) for i, values in enumerate(layers)}, top_k=1)


@pytest.mark.parametrize(
    ("normalize", "other", "pruned"),
    [
        ("none", [10, 50, 100, 840], {0: 2, 1: 0}),
        ("mean", [10, 50, 100, 840], {0: 0, 1: 2}),  # 0.4, 0.8, ... and 0.04, 0.2, ...
        ("zscore", [10, 50, 100, 840], {0: 1, 1: 1}),  # -1.34, -0.45, ... and -0.70, -0.58, ...
        ("mean", [200, 200, 200, 1000], {0: 1, 1: 1}),  # 0.4, 0.8, ... and 0.5, 0.5, ...
        ("max", [200, 200, 200, 1000], {0: 0, 1: 2}),  # 0.25, 0.5, ... and 0.2, 0.2, ...
    ],
)
def test_the_normalisation_decides_which_layer_has_the_lowest_scores(normalize, other, pruned):
    assert global_plan(by_hand([1.0, 2, 3, 4], other), 0.25, normalize=normalize).pruned_counts == pruned


@pytest.mark.parametrize("normalize", sorted(set(NORMALIZATIONS) - {"none"}))
@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.75])
def test_layers_with_equal_normalised_scores_get_the_uniform_plan(normalize, sparsity):
    pattern = torch.tensor([2.0, 5, 2, 2, 9, 0, 2, 5], dtype=torch.float64)
    scores = ExpertScores.wrap({i: pattern * 2.0**i for i in range(5)}, top_k=2)
    assert global_plan(scores, sparsity, normalize=normalize) == mp.uniform_plan(scores, sparsity)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_scores_all_zero_or_all_equal_are_no_obstacle(normalize):
    scores = ExpertScores.wrap({0: torch.zeros(4), 1: torch.ones(4), 2: torch.zeros(4)})
    assert sum(global_plan(scores, 0.5, normalize=normalize).pruned_counts.values()) == 6


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_the_budget_is_spent_exactly_within_capacities_and_on_the_lowest_scores(normalize, seed):
    shapes = [LayerShape(8, 2, min_kept=2), LayerShape(12, 2, min_kept=11), LayerShape(6, 2, min_kept=2)]
    scores = scores_for(*shapes, seed=seed)
    plan = global_plan(scores, 0.4, normalize=normalize)
    assert sum(plan.pruned_counts.values()) == sum(math.floor(0.4 * s.num_experts + 0.5) for s in shapes)
    assert all(plan.pruned_counts[i] <= shape.capacity for i, shape in enumerate(shapes))
    if normalize == "none":
        gone = [float(scores[i][e]) for i in scores for e in range(len(scores[i])) if e not in plan.kept[i]]
        could = [
            float(min(scores[i][plan.kept[i]])) for i in scores if plan.pruned_counts[i] < scores.shapes[i].capacity
        ]
        assert max(gone) < min(could)


def test_groups_lose_equally_many_and_a_unit_is_worth_its_mean():
    shapes = [LayerShape(6, 1, 2, min_kept=2)] * 2
    # Units of layer 0: (0.1, 0.9) and (1, 1); of layer 1: (0.4, 0.4) and (0.45, 0.45). The lowest score is in layer 0.
    values = {0: torch.tensor([0.1, 1.0, 1.0, 1.0, 0.9, 1.0]), 1: torch.tensor([0.4, 0.45, 2.0, 2.0, 0.45, 0.4])}
    plan = global_plan(ExpertScores(values, dict(enumerate(shapes))), 0.2, normalize="none")
    assert plan.pruned_counts == {0: 0, 1: 4} and plan.kept[1] == [2, 3]


def test_protected_experts_stay_however_low_they_score():
    scores = by_hand([0.0, 2, 3, 4], [5.0, 6, 7, 8]).constrained(protect={0: [0, 1]})
    plan = global_plan(scores, 0.5, normalize="none")
    assert plan.kept == {0: [0, 1], 1: [2, 3]}


def test_thresholds_refuse_what_cannot_be():
    scores = by_hand([1.0, 2], [3.0, 4])
    with pytest.raises(ValueError, match="softmax.*none, mean, max, zscore"):
        global_plan(scores, 0.5, normalize="softmax")
    with pytest.raises(ValueError, match="at most 2 can go"):
        global_plan(scores, 0.9)
    mixed = scores_for(LayerShape(4, 1), LayerShape(4, 1, 2, min_kept=2))
    with pytest.raises(ValueError, match=r"router groups \(\[1, 2\]\)"):
        global_plan(mixed, 0.5)


# ---- measuring


def test_damages_are_the_losses_of_plans_that_prune_one_layer(small, measured):
    evaluator, scores = small
    assert measured.counts == {layer: list(range(7)) for layer in range(4)}
    for layer, n in [(0, 6), (1, 1), (3, 4)]:
        alone = evaluator.evaluate([mp.PruningPlan.from_pruned_counts(scores, {layer: n})])[0].esap
        assert measured.at(layer, [n])[0] == pytest.approx(1 - alone, abs=1e-5)
    assert all(values[0] == 0 and min(values[1:]) > 0 for values in measured.values.values())


@pytest.mark.parametrize("fitness", ["kl_qp", "nll", "top1_agree"])
def test_a_damage_is_what_the_fitness_loses_whichever_way_it_counts(small, fitness):
    evaluator, scores = small
    found = damages(evaluator, scores, fitness=fitness, steps=1)
    whole, pruned = (
        getattr(score, fitness)
        for score in evaluator.evaluate(
            [mp.PruningPlan.from_pruned_counts(scores, pruned) for pruned in ({}, {2: 6})], (fitness,)
        )
    )
    worse = pruned - whole if fitness in ("kl_qp", "nll") else whole - pruned
    assert found.at(2, [6])[0] == pytest.approx(worse, abs=1e-5)
    assert worse > 0 or fitness == "nll"  # a random model is no worse at predicting random text


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [0, 6]), (2, [0, 3, 6]), (4, [0, 2, 3, 4, 6]), (6, list(range(7))), (99, list(range(7)))],
)
def test_steps_are_evenly_spaced_and_reach_the_capacity(small, measured, steps, expected):
    found = damages(*small, steps=steps)
    assert found.counts == dict.fromkeys(range(4), expected)
    for layer in found.counts:
        np.testing.assert_allclose(found.values[layer], measured.at(layer, expected), atol=1e-5)


def test_groups_are_measured_in_whole_units_and_minima_are_respected():
    model = tiny_model("deepseek_v3")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "man")
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    assert damages(evaluator, scores).counts == {layer: [0, 2, 4] for layer in (1, 2, 3)}
    stricter = scores.constrained(min_kept=6)
    found = damages(evaluator, stricter)
    assert found.counts == {layer: [0, 2] for layer in (1, 2, 3)}
    plan = dp_plan(found, stricter, 0.25)
    assert plan.pruned_counts == {1: 2, 2: 2, 3: 2}


def test_a_layer_that_may_lose_none_is_measured_at_zero_only(small):
    evaluator, scores = small
    found = damages(evaluator, scores.constrained(protect={2: range(8)}), steps=1)
    assert found.counts[2] == [0] and found.values[2] == [0.0]
    assert dp_plan(found, scores.constrained(protect={2: range(8)}), 0.5).pruned_counts[2] == 0


def test_measuring_in_several_sweeps_gives_the_same(small, measured, monkeypatch):
    monkeypatch.setattr("moeprune_ext.allocation.damages.PLANS_AT_ONCE", 10)
    again = damages(*small)
    for layer, values in measured.values.items():
        np.testing.assert_allclose(again.values[layer], values, atol=1e-5)


def test_a_count_whose_logits_are_nan_costs_infinitely_much():
    """An expert of NaN weights that no token chooses as long as two others are left."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
        model.model.layers[0].mlp.experts.down_proj[3] = math.nan
    scores = {layer: torch.arange(8.0) for layer in range(4)}
    scores[0][3] = 9.0
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    found = damages(evaluator, scores)
    assert found.values[0][6] == math.inf and math.isfinite(found.values[0][5])
    wrapped = ExpertScores.wrap(scores, shapes=evaluator.shapes)
    assert dp_plan(found, wrapped, 0.5).pruned_counts[0] < 6
    with pytest.raises(ValueError, match="24 experts meets NaN"):
        dp_plan(found, wrapped, 0.75)


def test_measuring_refuses_before_any_evaluation(small, monkeypatch):
    evaluator, scores = small
    monkeypatch.setattr(evaluator, "evaluate", lambda *_: pytest.fail("nothing may be scored"))
    with pytest.raises(ValueError, match="bleu"):
        damages(evaluator, scores, fitness="bleu")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        damages(evaluator, scores, steps=0)
    with pytest.raises(ValueError, match="another model"):
        damages(evaluator, dataclasses.replace(scores, model="other"))


def test_scores_may_ask_for_more_than_the_router_but_not_for_less_or_another_router(small):
    evaluator, scores = small
    check_scores(scores.constrained(min_kept=5, protect={1: [3]}), evaluator.shapes, evaluator.fingerprint)
    for change, message in [
        (dict(min_kept=1), "let 1 stay, the router needs 2"),
        (dict(top_k=3), "layer 1"),
        (dict(n_group=2), "layer 1"),
    ]:
        shapes = scores.shapes | {1: dataclasses.replace(scores.shapes[1], **change)}
        with pytest.raises(ValueError, match=message):
            check_scores(dataclasses.replace(scores, shapes=shapes), evaluator.shapes, evaluator.fingerprint)
    fewer = ExpertScores({0: scores[0]}, {0: scores.shapes[0]})
    with pytest.raises(ValueError, match=r"layers \[0\], the model has \[0, 1, 2, 3\]"):
        check_scores(fewer, evaluator.shapes, evaluator.fingerprint)


# ---- between measured counts, and files


def test_interpolation_is_exact_on_linear_damages_and_infinite_beside_an_infinite_one():
    line = Damages({0: [0, 3, 4, 10]}, {0: [0.0, 0.75, 1.0, 2.5]}, "esap")
    np.testing.assert_array_equal(line.at(0, range(11)), 0.25 * np.arange(11))
    broken = Damages({0: [0, 2, 4, 6]}, {0: [0.0, 1.0, math.nan, 3.0]}, "esap")
    np.testing.assert_array_equal(broken.at(0, range(7)), [0, 0.5, 1, math.inf, math.inf, math.inf, 3])
    with pytest.raises(ValueError, match="0 to 10 pruned experts, not for 11"):
        line.at(0, [11])
    with pytest.raises(ValueError, match=r"layers \[1\], the damages for \[0\]"):
        line.total(mp.PruningPlan({1: [0]}, {1: 11}))


def test_damages_survive_their_file(tmp_path, measured):
    broken = dataclasses.replace(measured, values=measured.values | {2: [0.0, 1.0, math.inf, *[2.0] * 4]})
    for number, found in enumerate((measured, broken, Damages({5: [0]}, {5: [0.0]}, "nll"))):
        found.save(tmp_path / f"{number}.json")
        assert Damages.load(tmp_path / f"{number}.json") == found
        json.loads((tmp_path / f"{number}.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"0": [0, 2, 1]}},
        {"counts": {"0": [1, 2, 3]}},
        {"counts": {"0": [0, 1]}},
        {"counts": {"1": [0, 1, 2]}},
        {"counts": {}, "damages": {}},
        {"counts": 3},
        {"damages": {"0": [0.5, 1.0, 2.0]}},
        {"damages": {"0": ["x", 1.0, 2.0]}},
        {"fitness": "bleu"},
        {"fitness": None},
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change):
    Damages({0: [0, 1, 2]}, {0: [0.0, 1.0, 2.0]}, "esap").save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=r"x\.json is a damaged file"):
        Damages.load(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["", "[1]", '{"format": "moeprune.scores/1"}'])
def test_files_of_another_kind_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not"):
        Damages.load(tmp_path / "x.json")


# ---- the best split


def random_damages(rng, scores):
    """Neither monotone nor positive, a tenth of them infinite; multiples of 1/8, so that sums are exact."""
    counts = {i: list(range(0, s.capacity + 1, s.n_group)) for i, s in scores.shapes.items()}
    values = {
        i: [0.0, *(math.inf if rng.random() < 0.1 else rng.randint(-8, 24) / 8 for _ in several[1:])]
        for i, several in counts.items()
    }
    return Damages(counts, values, "esap", model="model:0")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_the_best_split_is_the_best_of_all_splits(seed, groups):
    rng = random.Random(f"{seed}:{groups}")
    shapes = []
    for _ in range(4):
        experts = groups * rng.randint(2, 5)
        shapes.append(LayerShape(experts, 1, groups, min_kept=groups * rng.randint(1, experts // groups)))
    scores = scores_for(*shapes, seed=seed)
    sparsity = rng.choice([0.1, 0.25, 0.4])
    found = random_damages(rng, scores)
    try:
        budget = sum(mp.plan.uniform_counts(scores, sparsity).values())
    except ValueError:
        with pytest.raises(ValueError, match="can go"):
            dp_plan(found, scores, sparsity)
        return
    totals = [
        sum(
            found.values[i][counts.index(n)]
            for i, (n, counts) in enumerate(zip(split, found.counts.values(), strict=True))
        )
        for split in itertools.product(*found.counts.values())
        if sum(split) == budget
    ]
    if min(totals) == math.inf:
        with pytest.raises(ValueError, match="NaN"):
            dp_plan(found, scores, sparsity)
        return
    plan = dp_plan(found, scores, sparsity)
    assert sum(plan.pruned_counts.values()) == budget
    assert found.total(plan) == min(totals)


def test_layers_that_cost_nothing_go_first_and_of_equal_splits_later_layers_lose_fewer():
    scores = scores_for(*[LayerShape(5, 1)] * 3)
    counts = {i: list(range(5)) for i in range(3)}
    steep, flat = [0.0, 1.0, 2.0, 3.0, 4.0], [0.0] * 5
    assert dp_plan(Damages(counts, {0: steep, 1: flat, 2: steep}, "esap"), scores, 0.2).pruned_counts == {
        0: 0,
        1: 3,
        2: 0,
    }
    tied = Damages(counts, dict.fromkeys(range(3), steep), "esap")
    assert dp_plan(tied, scores, 0.4).pruned_counts == {0: 4, 1: 2, 2: 0}


def test_one_measuring_serves_every_sparsity_and_stricter_minima(small, measured):
    scores = small[1]
    totals = []
    for sparsity in (0, 0.25, 0.5, 0.75):
        plan = dp_plan(measured, scores, sparsity)
        assert sum(plan.pruned_counts.values()) == 32 * sparsity
        assert measured.total(plan) <= measured.total(mp.uniform_plan(scores, sparsity)) + 1e-12
        assert plan == mp.PruningPlan.from_pruned_counts(scores, plan.pruned_counts)
        totals.append(measured.total(plan))
    assert totals[0] == 0
    even = dp_plan(measured, scores.constrained(min_kept=4), 0.5)
    assert set(even.pruned_counts.values()) == {4}


class Additive:
    """An evaluator whose ESAP is one minus a loss of each layer alone."""

    def __init__(self, shapes, lost):
        self.shapes, self.lost, self.fingerprint, self.data_fingerprint = shapes, lost, "model:0", "data:0"

    def evaluate(self, plans, metrics=("esap",)):
        return [
            mp.CandidateScore(esap=1 - sum(self.lost[layer][n] for layer, n in plan.pruned_counts.items()))
            for plan in plans
        ]


@pytest.mark.parametrize("seed", range(5))
def test_where_losses_of_layers_add_up_no_plan_of_the_budget_beats_the_split(seed):
    scores = scores_for(*[LayerShape(6, 2, min_kept=2)] * 4, seed=seed)
    rng = random.Random(seed)
    evaluator = Additive(scores.shapes, [[0.0, *(rng.random() / 4 for _ in range(4))] for _ in range(4)])
    found = damages(evaluator, scores)
    plan = dp_plan(found, scores, 0.5)
    every = [
        mp.PruningPlan.from_pruned_counts(scores, dict(enumerate(split)))
        for split in itertools.product(range(5), repeat=4)
        if sum(split) == 12
    ]
    best = max(score.esap for score in evaluator.evaluate(every))
    assert evaluator.evaluate([plan])[0].esap == pytest.approx(best, abs=1e-12)
    assert 1 - found.total(plan) == pytest.approx(best, abs=1e-12)


def test_a_large_model_is_split_within_seconds():
    scores = scores_for(*[LayerShape(256, 8, min_kept=8)] * 60)
    found = Damages(
        {i: list(range(249)) for i in range(60)},
        {i: [0.0, *np.random.default_rng(i).random(248).cumsum().tolist()] for i in range(60)},
        "esap",
    )
    assert sum(dp_plan(found, scores, 0.5).pruned_counts.values()) == 60 * 128


def test_a_split_refuses_damages_of_something_else(small, measured):
    scores = small[1]
    with pytest.raises(ValueError, match="another model"):
        dp_plan(dataclasses.replace(measured, model="other"), scores, 0.5)
    with pytest.raises(ValueError, match="another order"):
        dp_plan(measured, scores.constrained(protect={0: [mp.plan.pruning_order(scores[0])[0]]}), 0.5)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\], the scores of \[0\]"):
        dp_plan(measured, ExpertScores({0: scores[0]}, {0: scores.shapes[0]}), 0.5)
    with pytest.raises(ValueError, match="at most 24 can go"):
        dp_plan(measured, scores, 0.9)
    plain = {layer: values for layer, values in scores.items()}  # says nothing of its routers
    with pytest.raises(ValueError, match="measured for 0 to 6 pruned experts, not for 7"):
        dp_plan(measured, plain, 0.5)


# ---- orders and given plans


def test_the_order_fingerprint_knows_protection():
    scores = by_hand([1.0, 2, 3, 4])
    assert order_fingerprint(scores) == order_fingerprint(by_hand([10.0, 20, 30, 40]))
    assert order_fingerprint(scores) != order_fingerprint(scores.constrained(protect={0: [0]}))


def test_a_plan_is_an_allocation_only_if_it_spends_the_budget_within_the_scores_limits():
    shapes = [LayerShape(8, 2, 2, min_kept=4)] * 2
    scores = scores_for(*shapes)
    plan = mp.PruningPlan.from_pruned_counts(scores, {0: 4, 1: 0})
    assert counts_of(plan, scores, 0.25) == (2, 0)
    for changed, sparsity, message in [
        (plan, 0.5, "prunes 4 experts; at sparsity 0.5 8 must go"),
        (dataclasses.replace(plan, model="other"), 0.25, "another model"),
        (mp.PruningPlan({0: [1]}, {0: 4}), 0.25, "layers with"),
        (mp.PruningPlan({0: [0, 1, 2, 3, 4], 1: list(range(7))}, {0: 8, 1: 8}), 0.25, "3 experts of layer 0"),
        (mp.PruningPlan({0: [0, 1], 1: list(range(6))}, {0: 8, 1: 8}), 0.5, "6 experts of layer 0.* 2 up to 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            counts_of(changed, scores, sparsity)
