"""Budgets by number, steps and maxima: every method spends the uniform plan's budget within every layer's limits."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.budget import Kept, counts_of, in_units, uniform_counts, uniform_plan
from moeprune_ext.allocation.damages import Damages, damages, dp_plan
from moeprune_ext.allocation.evolve import SearchSpace
from moeprune_ext.allocation.grape import plan_from_similarity
from moeprune_ext.allocation.naee import naee_subsets
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.allocation.threshold import NORMALIZATIONS, global_plan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape


def scores_for(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {i: torch.rand(s.num_experts, generator=generator, dtype=torch.float64) for i, s in enumerate(shapes)}
    return ExpertScores(values, dict(enumerate(shapes)), "test", "model:0")


def limited(seed):
    """Scores of a few random layers under random limits that can be met, some experts protected, and a budget."""
    rng = random.Random(seed)
    groups, step = rng.choice([(1, 1), (1, 4), (1, 8), (2, 1), (2, 4), (4, 6)])
    equal = rng.random() < 0.5
    sizes = [groups * rng.randint(24 // groups, 60 // groups) for _ in range(rng.randint(1, 5))]
    shapes = [LayerShape(sizes[0] if equal else size, 1, groups, min_kept=groups) for size in sizes]
    protect = {0: rng.sample(range(shapes[0].num_experts), 3)} if rng.random() < 0.5 else {}
    scores = scores_for(*shapes, seed=seed).constrained(
        min_kept=rng.choice([0, 5]),
        multiple_of=step,
        max_kept=rng.choice([None, 24, 40]),
        protect=protect,
    )
    units = [(s.most_kept - s.least_kept) // s.unit for s in scores.shapes.values()]
    most = sum(shape.most_kept for shape in scores.shapes.values())
    return scores, Kept(most - next(iter(scores.shapes.values())).unit * rng.randint(0, sum(units)))


def assert_within(plan, scores, experts):
    assert sum(map(len, plan.kept.values())) == experts
    for layer, ids in plan.kept.items():
        shape = scores.shapes[layer]
        size = shape.num_experts // shape.n_group
        assert len(ids) % shape.step == 0 and len(ids) >= shape.min_kept
        assert shape.max_kept is None or len(ids) <= shape.max_kept
        assert len({sum(e // size == group for e in ids) for group in range(shape.n_group)}) == 1
        assert scores.protected.get(layer, frozenset()) <= set(ids)


def flat_damages(scores, rng):
    """Random damages, as if measured with no other limits than the routers'."""
    counts = {i: list(range(s.num_experts)) for i, s in scores.shapes.items()}
    return Damages(counts, {i: [0.0, *(rng.random() for _ in several[1:])] for i, several in counts.items()}, "esap")


@pytest.mark.parametrize("seed", range(40))
def test_every_method_keeps_exactly_the_number_asked_for_within_every_layers_limits(seed):
    scores, budget = limited(seed)
    rng = random.Random(seed)
    plans = [uniform_plan(scores, budget), dp_plan(flat_damages(scores, rng), scores, budget)]
    plans += [global_plan(scores, budget, normalize=normalize) for normalize in NORMALIZATIONS]
    tables = {}
    for layer, shape in scores.shapes.items():
        table = torch.rand(2 * (shape.num_experts,), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tables[layer] = (table + table.T) / 2
    plans += [plan_from_similarity(tables, scores, budget, who=who, entropy=0.0) for who in ("groups", "scores")]
    for plan in plans:
        assert_within(plan, scores, budget.experts)
        assert sum(plan.pruned_counts.values()) == sum(uniform_counts(scores, budget).values())
    space = SearchSpace.of(scores, EvolveSettings(budget, population=16, elites=2, seed=seed), plans)
    first = space.members(0, [], {})
    assert [space.plan(counts) for counts in first[: len(plans)]] == [
        mp.PruningPlan.from_pruned_counts(scores, plan.pruned_counts) for plan in plans
    ]
    for counts in [*first, *space.members(1, first[:2], {})]:
        assert_within(space.plan(counts), scores, budget.experts)


@pytest.mark.parametrize("seed", range(30))
def test_the_uniform_plan_of_a_number_is_the_most_even_one(seed):
    """No unit can move between layers and bring both together nearer to the same share of their experts."""
    scores, budget = limited(seed)
    counts = uniform_counts(scores, budget)
    total, experts = sum(counts.values()), sum(shape.num_experts for shape in scores.shapes.values())
    unevenness = {layer: counts[layer] - total * s.num_experts / experts for layer, s in scores.shapes.items()}
    unit = in_units(scores, budget).unit
    for giver, one in scores.shapes.items():
        for taker, other in scores.shapes.items():
            if giver != taker and counts[giver] > one.least_pruned and counts[taker] < other.capacity:
                before = unevenness[giver] ** 2 + unevenness[taker] ** 2
                after = (unevenness[giver] - unit) ** 2 + (unevenness[taker] + unit) ** 2
                assert after >= before - 1e-9


def test_a_sparsity_and_the_number_that_it_keeps_are_the_same_budget():
    scores = scores_for(*[LayerShape(10, 2, min_kept=2)] * 3)
    for sparsity in (0, 0.15, 0.25, 0.5, 0.8):
        plan = uniform_plan(scores, sparsity)
        assert uniform_plan(scores, Kept(sum(map(len, plan.kept.values())))) == plan
    assert uniform_counts(scores, Kept(20)) == {0: 4, 1: 3, 2: 3}


@pytest.mark.parametrize(
    ("experts", "step", "most", "sparsity", "pruned"),
    [
        (60, 8, None, 0, 4),  # 56 is the nearest multiple of 8
        (60, 8, None, 0.5, 28),  # 32 stay, not 24
        (61, 8, None, 0, 5),
        (60, 8, 40, 0.4, 28),  # the share is 36: of 32 and 40, equally near, the lower stays
        (64, 8, 32, 0.5, 32),
        (128, 1, 72, 0.5, 64),
    ],
)
def test_a_sparsity_is_rounded_to_what_a_layer_may_keep(experts, step, most, sparsity, pruned):
    scores = scores_for(LayerShape(experts, 2, min_kept=2)).constrained(multiple_of=step, max_kept=most)
    assert uniform_counts(scores, sparsity) == {0: pruned}


def test_layers_of_different_sizes_share_a_maximum():
    scores = scores_for(LayerShape(64, 2), LayerShape(128, 2)).constrained(max_kept=64)
    assert uniform_counts(scores, 0.4) == {0: 13, 1: 64}  # 26 and 51 by their shares, which 1 may not keep
    assert uniform_counts(scores, 0.5) == {0: 32, 1: 64}


@pytest.mark.parametrize(
    ("limits", "budget", "message"),
    [
        ({"multiple_of": 8}, Kept(50), "50 experts cannot be kept in all in multiples of 8 a layer: 48 or 56 can"),
        ({"multiple_of": 8}, Kept(121), "at most 112 can stay"),
        ({}, Kept(121), "121 experts cannot be kept in all: at most 120 can stay"),
        ({"max_kept": 40}, Kept(81), "at most 80 can stay"),
        ({"min_kept": 9, "multiple_of": 8}, Kept(24), "at least 32 must stay"),
        ({}, Kept(0), "at least 4 must stay"),
        ({"max_kept": 15}, 0.5, r"asks for 60 of 120 experts, but at least 90 must go.* at least 0\.75"),
        ({"multiple_of": 8}, 0.95, r"at most 104 can go.* at most 0\.8666"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(limits, budget, message):
    scores = scores_for(*[LayerShape(60, 2, min_kept=2)] * 2).constrained(**limits)
    with pytest.raises(ValueError, match=message):
        in_units(scores, budget)


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_numbers_in_a_refusal_can_be_met(seed):
    scores, _ = limited(seed)
    with pytest.raises(ValueError, match="can go.*at most") as refusal:
        uniform_counts(scores, 0.999)
    assert sum(uniform_counts(scores, float(str(refusal.value).split()[-1])).values()) > 0
    if any(shape.max_kept == 24 for shape in scores.shapes.values()):
        with pytest.raises(ValueError, match="must go.*at least") as refusal:
            uniform_counts(scores, 0.0)
        assert sum(uniform_counts(scores, float(str(refusal.value).split()[-1])).values()) > 0


def test_limits_that_contradict_each_other_are_refused_by_numbers():
    scores = scores_for(LayerShape(60, 2, min_kept=2), LayerShape(60, 2, min_kept=60, prunable=False))
    with pytest.raises(ValueError, match="layer 1 cannot keep at least 60 .* in multiples of 8: .* 60, the largest 56"):
        scores.constrained(multiple_of=8)
    with pytest.raises(ValueError, match="layer 0 cannot keep at least 9 .* at most 8, .* the largest 8"):
        scores.constrained(protect={0: range(9)}).constrained(max_kept=8)
    with pytest.raises(ValueError, match="at most 6, in multiples of 4: the least number is 8, the largest 4"):
        scores_for(LayerShape(8, 5, min_kept=5)).constrained(max_kept=6).constrained(multiple_of=4)
    for limits in ({"multiple_of": 0}, {"max_kept": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            scores.constrained(**limits)


def test_what_was_asked_for_before_stays():
    scores = scores_for(LayerShape(60, 2, 4, min_kept=4)).constrained(multiple_of=6, max_kept=48)
    shape = scores.constrained(multiple_of=4, max_kept=50, min_kept=20).shapes[0]
    assert (shape.step, shape.max_kept, shape.unit) == (12, 48, 12)
    assert (shape.least_kept, shape.most_kept, shape.least_pruned, shape.capacity) == (24, 48, 12, 36)


def test_files_hold_limits_only_where_there_are_any(tmp_path):
    scores = scores_for(LayerShape(8, 2, min_kept=2))
    scores.save(tmp_path / "plain.json")
    assert set(json.loads((tmp_path / "plain.json").read_text())["shapes"]["0"]) == {
        "num_experts",
        "top_k",
        "n_group",
        "min_kept",
        "prunable",
    }
    strict = scores.constrained(multiple_of=2, max_kept=6)
    strict.save(tmp_path / "strict.json")
    assert ExpertScores.load(tmp_path / "strict.json").shapes == strict.shapes


def test_counts_outside_a_layers_limits_are_no_plan():
    scores = scores_for(LayerShape(60, 2, min_kept=2)).constrained(multiple_of=8, max_kept=40)
    assert len(mp.PruningPlan.from_pruned_counts(scores, {0: 28}).kept[0]) == 32
    with pytest.raises(ValueError, match="at most 40 may stay, so 20 to 52 can go"):
        mp.PruningPlan.from_pruned_counts(scores, {})
    with pytest.raises(ValueError, match="a multiple of 8 .* must stay; prune 28 or 36"):
        mp.PruningPlan.from_pruned_counts(scores, {0: 30})
    plain = mp.PruningPlan.from_pruned_counts(scores_for(LayerShape(60, 2)), {0: 30})
    with pytest.raises(ValueError, match="prunes 30 experts; with 32 experts kept 28 must go"):
        counts_of(plain, scores, Kept(32))


# ---- with a model


@pytest.fixture(scope="module")
def small():
    model = tiny_model("olmoe")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return model, mp.CandidateEvaluator(model, [random_tokens(seed=7)]), scores


def test_damages_are_measured_where_a_layer_may_be(small):
    _, evaluator, scores = small
    measured = damages(evaluator, scores.constrained(multiple_of=3))  # 6 or 3 of 8 stay
    assert measured.counts == {layer: [0, 2, 5] for layer in range(4)}
    whole = damages(evaluator, scores)
    assert measured.at(2, [5])[0] == pytest.approx(whole.at(2, [5])[0], abs=1e-6)
    assert damages(evaluator, scores.constrained(multiple_of=3), steps=1).counts[0] == [0, 5]
    assert_within(dp_plan(measured, scores.constrained(multiple_of=3), Kept(18)), scores.constrained(multiple_of=3), 18)


SETTINGS = dict(population=6, generations=3, elites=2, seed=3)


def test_a_search_by_number_and_step_resumes_and_is_told_from_others(small, tmp_path):
    _, evaluator, scores = small
    strict = scores.constrained(multiple_of=2, max_kept=6)
    whole = mp.evolve(evaluator, strict, Kept(18), **SETTINGS)
    assert_within(whole.plan, strict, 18)
    mp.evolve(evaluator, strict, Kept(18), **SETTINGS | {"generations": 2}, out=tmp_path)
    assert mp.evolve(evaluator, strict, Kept(18), **SETTINGS, out=tmp_path).plan == whole.plan
    for other, budget, name in [
        (strict, Kept(20), "sparsity"),
        (scores.constrained(multiple_of=2), Kept(18), "least_pruned"),
        (scores.constrained(max_kept=6), Kept(18), "unit"),
    ]:
        with pytest.raises(ValueError, match=name):
            mp.evolve(evaluator, other, budget, **SETTINGS, out=tmp_path)


def test_naee_keeps_the_best_subsets_of_the_counts_that_limits_allow(small):
    model, _, scores = small
    strict = replace(scores, protected={}).constrained(multiple_of=3)
    plan = naee_subsets(model, [random_tokens()], uniform_counts(strict, Kept(21)))
    assert_within(plan, strict, 21)
    assert_within(mp.naee_plan(model, [random_tokens()], Kept(21)), scores, 21)
