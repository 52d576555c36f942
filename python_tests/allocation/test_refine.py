"""Swaps of single experts: what they keep, that they never end worse on the search text, resuming, refusals."""

import random
from collections import Counter

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.refine import RefineSettings, _Search, refine

SETTINGS = dict(rounds=3, children=6, survivors=2)


def prepared(kind):
    model = tiny_model(kind)
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.CandidateEvaluator(model, [random_tokens(rows=12, length=16, seed=7)]), scores


@pytest.fixture(scope="module")
def small():
    return prepared("olmoe")


def swaps(evaluator, scores, plan, number=400):
    search = _Search(evaluator, plan, scores, RefineSettings())
    rng = random.Random(0)
    return search, [search.swapped(search.start, rng) for _ in range(number)]


def test_a_swap_exchanges_one_kept_expert_for_one_pruned_anywhere(small):
    evaluator, scores = small
    search, found = swaps(evaluator, scores, mp.uniform_plan(scores, 0.5))
    changed = [kept for kept in found if kept != search.start]
    pairs = Counter()
    for kept in changed:
        lost = [(i, e) for i, ids in enumerate(search.start) for e in set(ids) - set(kept[i])]
        gained = [(i, e) for i, ids in enumerate(kept) for e in set(ids) - set(search.start[i])]
        assert len(lost) == len(gained) == 1
        pairs[lost[0][0] == gained[0][0]] += 1
    assert pairs[True] > 50 and pairs[False] > 50
    touched = {(i, e) for kept in changed for i, ids in enumerate(kept) for e in set(ids) ^ set(search.start[i])}
    assert len(touched) > 0.9 * sum(shape.num_experts for shape in scores.shapes.values())  # far from the border, too


def test_swaps_respect_multiples_and_the_most_a_layer_may_keep(small):
    evaluator, scores = small
    for limits in ({"multiple_of": 2, "max_kept": 6}, {"max_kept": 5}):
        limited = scores.constrained(**limits)
        search, found = swaps(evaluator, limited, mp.uniform_plan(limited, 0.5))
        assert any(kept != search.start for kept in found)
        for kept in found:
            assert all(len(ids) % limits.get("multiple_of", 1) == 0 and len(ids) <= limits["max_kept"] for ids in kept)


def test_protected_experts_and_the_fewest_to_keep_stay(small):
    evaluator, scores = small
    stricter = scores.constrained(min_kept=4, protect={2: range(3)})
    search, found = swaps(evaluator, stricter, mp.uniform_plan(stricter, 0.5))
    assert all(len(ids) >= 4 for kept in found for ids in kept)
    assert all({0, 1, 2} <= set(kept[2]) for kept in found)


def test_groups_of_a_router_keep_equally_many():
    evaluator, scores = prepared("deepseek_v3")
    search, found = swaps(evaluator, scores, mp.uniform_plan(scores, 0.5))
    assert len(set(found)) > 3
    for kept in found:
        for ids in kept:
            assert sum(e < 4 for e in ids) == sum(e >= 4 for e in ids)


@pytest.mark.parametrize("fitness", ["esap", "kl_pq"])
def test_every_finalist_leads_on_the_search_text_and_is_scored_as_the_evaluator_does(small, fitness):
    evaluator, scores = small
    start = mp.uniform_plan(scores, 0.5)
    result = refine(evaluator, start, scores, **SETTINGS, fitness=fitness)
    assert result.finalists[0] == start and len(result.finalists) > 1
    assert result.scores == sorted(result.scores, reverse=fitness == "esap")[::-1]
    for plan, score in zip(result.finalists, evaluator.evaluate(result.finalists, (fitness,)), strict=True):
        assert sum(plan.pruned_counts.values()) == sum(start.pruned_counts.values())
        assert getattr(score, fitness) == pytest.approx(result.scores[result.finalists.index(plan)], abs=1e-6)


def test_a_refinement_cut_off_anywhere_ends_with_the_same_plans(small, tmp_path):
    evaluator, scores = small
    start = mp.uniform_plan(scores, 0.5)
    whole = refine(evaluator, start, scores, **SETTINGS)
    for done in (1, 2, 3):
        folder = tmp_path / str(done)
        refine(evaluator, start, scores, **{**SETTINGS, "rounds": done}, out=folder)
        assert refine(evaluator, start, scores, **SETTINGS, out=folder) == whole
    with pytest.raises(ValueError, match="start"):
        refine(evaluator, mp.uniform_plan(scores, 0.25), scores, **SETTINGS, out=tmp_path / "1")
    assert refine(evaluator, start, scores, **SETTINGS, seed=1) != whole


def test_a_plan_without_room_for_swaps_is_its_own_only_finalist(small):
    evaluator, scores = small
    everything = mp.uniform_plan(scores, 0.0)
    assert refine(evaluator, everything, scores, **SETTINGS).finalists == [everything]


def test_what_cannot_be_refined_is_refused(small):
    evaluator, scores = small
    with pytest.raises(ValueError, match="at least 1; got 0, 16 and 4"):
        refine(evaluator, mp.uniform_plan(scores, 0.5), scores, rounds=0)
    with pytest.raises(ValueError, match="unknown fitness"):
        refine(evaluator, mp.uniform_plan(scores, 0.5), scores, fitness="speed")
    other = {layer: torch.rand(6) for layer in scores}
    with pytest.raises(ValueError, match="the plan is for layers"):
        refine(evaluator, mp.uniform_plan(other, 0.5), scores)
