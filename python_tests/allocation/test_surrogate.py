"""Screened children: what the additive fit can know, which children it lets through, and searches that use it."""

import math
import random

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.patterns import DEFAULT_PATTERNS, first_generation, mutate
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.allocation.surrogate import predicted, screened

CAPACITIES = [12] * 8
SETTINGS = dict(sparsity=0.5, population=8, generations=5, elites=2, screen=8)


def additive(counts):
    """A score whose damages are convex in each layer's count, another curve in each layer."""
    return 1 - sum((1 + layer % 3) * (n / 12) ** 2 for layer, n in enumerate(counts)) / 20


def some_vectors(number, seed=0):
    return first_generation([], DEFAULT_PATTERNS, number, CAPACITIES, 48, random.Random(seed))


def children_of(vectors, number, seed=0):
    rng = random.Random(seed)
    return [mutate(rng.choice(vectors), CAPACITIES, rng, 4, 3, 32) for _ in range(number)]


@pytest.fixture(scope="module")
def small():
    model = tiny_model("olmoe")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.CandidateEvaluator(model, [random_tokens(rows=12, length=16, seed=7)]), scores


def test_sums_of_layers_are_predicted_at_counts_never_seen():
    scored = {counts: additive(counts) for counts in some_vectors(60)}
    unseen = [counts for counts in children_of(list(scored), 200) if counts not in scored]
    truth = torch.tensor([additive(counts) for counts in unseen], dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack([predicted(scored, unseen), truth]))[0, 1]) > 0.98


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_the_scale_of_the_fitness_changes_no_choice(factor):
    scored = {counts: additive(counts) for counts in some_vectors(20)}
    drawn = children_of(list(scored), 60)
    chosen = screened(drawn, scored, 9)
    assert screened(drawn, {counts: factor * score for counts, score in scored.items()}, 9) == chosen


def test_chosen_children_are_new_distinct_and_mostly_the_better_ones():
    scored = {counts: additive(counts) for counts in some_vectors(30)}
    drawn = children_of(list(scored), 200) + list(scored)
    chosen = screened(drawn, scored, 8)
    assert len(set(chosen)) == 8 and not set(chosen) & set(scored)
    new = sorted({counts for counts in drawn if counts not in scored}, key=additive, reverse=True)
    assert sum(counts in new[: len(new) // 4] for counts in chosen) >= 6
    assert chosen[:2] == list(dict.fromkeys(counts for counts in drawn if counts not in scored))[:2]  # explored


def test_scores_that_are_no_numbers_leave_the_fit():
    scored = {counts: additive(counts) for counts in some_vectors(30)}
    drawn = children_of(list(scored), 60)
    broken = {
        counts: bad for counts, bad in zip(children_of(list(scored), 2, seed=9), (math.nan, -math.inf), strict=True)
    }
    drawn = [counts for counts in drawn if counts not in broken]
    assert screened(drawn, scored | broken, 8) == screened(drawn, scored, 8)
    assert screened(drawn, broken, 8) == list(dict.fromkeys(drawn))[:8]  # nothing to fit: as drawn


def test_equal_scores_choose_nothing_but_fit():
    scored = dict.fromkeys(some_vectors(20), 0.5)
    drawn = children_of(list(scored), 60)
    assert torch.allclose(predicted(scored, drawn), torch.tensor(0.5, dtype=torch.float64))
    assert len(screened(drawn, scored, 8)) == 8


def test_a_screened_search_scores_half_as_many_children(small):
    evaluator, scores = small
    for settings, children in ((EvolveSettings(screen=32), 14), (EvolveSettings(), 28), (EvolveSettings(elites=32), 0)):
        assert settings.children == children
    assert EvolveSettings(population=5, elites=4, screen=8).children == 1
    history = mp.evolve(evaluator, scores, **SETTINGS).history
    assert [record["evaluated"] for record in history[1:]] == [3] * 4


@pytest.mark.parametrize("fidelity", ["full", "race"])
def test_a_screened_search_cut_off_anywhere_ends_with_the_same_plan(small, tmp_path, fidelity):
    evaluator, scores = small
    settings = {**SETTINGS, "fidelity": fidelity}
    whole = mp.evolve(evaluator, scores, **settings, out=tmp_path / "whole")
    lines = (tmp_path / "whole" / "history.jsonl").read_text().splitlines(keepends=True)
    for done in range(len(lines)):
        folder = tmp_path / str(done)
        folder.mkdir()
        (folder / "search.json").write_text((tmp_path / "whole" / "search.json").read_text())
        (folder / "history.jsonl").write_text("".join(lines[:done]))
        assert mp.evolve(evaluator, scores, **settings, out=folder) == whole
    with pytest.raises(ValueError, match="screen: 8 there, None now"):
        mp.evolve(evaluator, scores, **{**settings, "screen": 0}, out=tmp_path / "whole")


def test_no_child_is_chosen_twice_even_if_a_race_dropped_it(small):
    evaluator, scores = small
    history = mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 8}, fidelity="race", race_level=0.4).history
    assert sum(record["dropped"] for record in history) > 0
    assert all(record["evaluated"] == 3 for record in history[1:])


def test_a_negative_number_of_children_is_refused():
    with pytest.raises(ValueError, match="screen is the number of children drawn"):
        EvolveSettings(screen=-1)
