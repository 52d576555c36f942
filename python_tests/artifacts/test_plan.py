"""Budgets, orders and plans as files."""

import dataclasses
import json

import pytest
import torch

import moeprune_ext as mp
from moeprune_ext.allocation.budget import uniform_counts
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.artifacts.scores import ExpertScores, pruning_order
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.calibration.criteria import CRITERIA


def scores_for(*shapes):
    generator = torch.Generator().manual_seed(0)
    values = {i: torch.rand(s.num_experts, generator=generator, dtype=torch.float64) for i, s in enumerate(shapes)}
    return ExpertScores(values, dict(enumerate(shapes)), "test", "model:0")


def test_lowest_score_goes_first_and_ties_take_the_higher_id():
    assert pruning_order(torch.tensor([0.5, 0.1, 0.5, 0.1, 0.9])) == [3, 1, 2, 0, 4]


def test_kept_sets_are_nested():
    scores = scores_for(LayerShape(12, 2, min_kept=2))
    kept = [set(mp.PruningPlan.from_pruned_counts(scores, {0: n}).kept[0]) for n in range(11)]
    assert all(small < large for large, small in zip(kept, kept[1:], strict=False))


def test_every_even_prefix_of_a_grouped_order_keeps_groups_equal():
    order = pruning_order(torch.rand(12, generator=torch.Generator().manual_seed(3)), n_group=3)
    assert sorted(order) == list(range(12))
    for length in range(0, 13, 3):
        groups = [expert // 4 for expert in order[:length]]
        assert {groups.count(g) for g in range(3)} == {length // 3}


@pytest.mark.parametrize(
    ("experts", "groups", "sparsity", "pruned"),
    [(16, 1, 0.5, 8), (10, 1, 0.25, 3), (10, 1, 0.15, 2), (10, 1, 0.05, 1), (64, 8, 0.25, 16), (24, 8, 0.2, 8)],
)
def test_uniform_counts_round_half_up_in_units_of_groups(experts, groups, sparsity, pruned):
    shape = LayerShape(experts, 1, groups, min_kept=groups)
    assert uniform_counts(scores_for(shape), sparsity) == {0: pruned}


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, float("nan"), "half"])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        mp.uniform_plan(scores_for(LayerShape(8, 2, min_kept=2)), sparsity)


def test_too_high_a_sparsity_names_the_highest_possible():
    scores = scores_for(LayerShape(8, 2, min_kept=2), LayerShape(8, 2, min_kept=2))
    with pytest.raises(ValueError, match=r"at most 12 can go.*at most 0\.75"):
        mp.uniform_plan(scores, 0.9)
    assert mp.uniform_plan(scores, 0.75).pruned_counts == {0: 6, 1: 6}


def test_a_count_that_splits_groups_names_the_nearest_feasible_ones():
    scores = scores_for(LayerShape(16, 2, 4, min_kept=4))
    with pytest.raises(ValueError, match="prune 4 or 8"):
        mp.PruningPlan.from_pruned_counts(scores, {0: 5})


def test_plain_scores_are_accepted():
    plan = mp.uniform_plan({3: [0.1, 0.4, 0.3, 0.2]}, 0.5)
    assert plan.kept == {3: [1, 2]}
    with pytest.raises(ValueError, match="needs 3"):
        mp.PruningPlan.from_pruned_counts(ExpertScores.wrap({3: torch.rand(4)}, top_k=3), {3: 2})


def test_plans_scores_and_statistics_survive_their_files(tmp_path):
    scores = scores_for(LayerShape(8, 2, min_kept=2), LayerShape(6, 2, min_kept=2))
    plan = mp.PruningPlan.from_pruned_counts(scores, {0: 3, 1: 1})
    plan.save(tmp_path / "plan.json")
    assert mp.PruningPlan.load(tmp_path / "plan.json") == plan
    assert set(json.loads((tmp_path / "plan.json").read_text())["kept"]) == {"0", "1"}
    scores.save(tmp_path / "scores.json")
    again = ExpertScores.load(tmp_path / "scores.json")
    assert again.shapes == scores.shapes and again.model == scores.model
    assert all(torch.equal(again[layer], scores[layer]) for layer in scores)
    moments = {i: torch.rand(8, 3, 3, dtype=torch.float64) for i in range(2)}
    norms = {i: torch.rand(8) for i in range(2)}
    stats = mp.RoutingStats(moments, norms, 7, {i: LayerShape(8, 2) for i in range(2)}, "model:0")
    stats.save(tmp_path / "stats.safetensors")
    loaded = mp.RoutingStats.load(tmp_path / "stats.safetensors")
    assert loaded.tokens == 7 and loaded.shapes == stats.shapes and loaded.model == "model:0"
    assert torch.equal(loaded.moments[1], moments[1]) and torch.equal(loaded.max_norm[0], norms[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "scores.json", "stats.safetensors"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "moeprune.plan/1"}', '{"format": "moeprune.plan/2"}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    for read in (mp.PruningPlan.load, ExpertScores.load, mp.RoutingStats.load):
        with pytest.raises(ValueError, match="x.json"):
            read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="no file"):
        mp.PruningPlan.load(tmp_path / "missing.json")


def test_every_criterion_is_its_formula():
    """From made-up routing: two experts see tokens, the third none."""
    gates, norms = torch.tensor([0.2, 0.7, 0.5]).double(), torch.tensor([3.0, 1.0, 4.0]).double()
    experts = [0, 0, 1]
    moments = torch.zeros(3, 3, 3, dtype=torch.float64)
    for g, f, e in zip(gates, norms, experts, strict=True):
        for a in range(3):
            for b in range(3):
                moments[e, a, b] += g**a * f**b
    stats = mp.RoutingStats({0: moments}, {0: torch.zeros(3)}, 3, {0: LayerShape(3, 1)}, "m")
    by_hand = {
        "frequency": [2, 1],
        "seer": [0.9, 0.5],
        "ean": [4, 4],
        "weighted_ean": [0.6 + 0.7, 2],
        "weighted_ean_l2": [0.2 * 9 + 0.7, 0.5 * 16],
        "reap": [(0.6 + 0.7) / 2, 2],
        "reap_l2": [(1.8 + 0.7) / 2, 8],
        "man": [2, 4],
        "msan": [5, 16],
    }
    assert set(by_hand) == set(CRITERIA)
    for name, expected in by_hand.items():
        torch.testing.assert_close(mp.score_experts(stats, name)[0], torch.tensor([*expected, 0]).double())
    torch.testing.assert_close(
        mp.score_experts(stats, (2, 1, "mean"))[0][0], (0.04 * 3 + 0.49 * 1) / torch.tensor(2.0).double()
    )
    random = [mp.score_experts(stats, "random", seed=s)[0] for s in (0, 0, 1)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    for wrong in ("repa", (3, 0, "sum"), (1, 1, "max"), 7):
        with pytest.raises(ValueError):
            mp.score_experts(stats, wrong)


def test_statistics_of_shards_add_up_and_of_other_models_do_not():
    def stats(value, model="m"):
        table = torch.full((2, 3, 3), float(value), dtype=torch.float64)
        return mp.RoutingStats({0: table}, {0: torch.tensor([value, 1.0])}, value, {0: LayerShape(2, 1)}, model)

    both = stats(2) + stats(3)
    assert both.tokens == 5 and both.moments[0][0, 1, 1] == 5 and both.max_norm[0].tolist() == [3, 1]
    with pytest.raises(ValueError, match="different models"):
        stats(1) + stats(1, "other")


def test_merges_are_averages_of_named_layers():
    fine = dict(kept={0: [0, 2]}, num_experts={0: 3})
    average = Merge.averages([0, 2], {2: {1: 0.25, 2: 0.75}}, 3)
    assert average.experts.tolist() == [[1, 0, 0], [0, 0.25, 0.75]] and average.router is None
    mp.PruningPlan(**fine, merges={0: average})
    for merges in (
        {1: average},  # another layer
        {0: Merge(torch.ones(1, 3))},  # of as many experts as are kept
        {0: Merge(torch.ones(2, 4))},
    ):
        with pytest.raises(ValueError, match="merge"):
            mp.PruningPlan(**fine, merges=merges)
    with pytest.raises(ValueError, match="numbered from 0"):
        mp.PruningPlan(**fine, merges={0: Merge(torch.ones(2, 3), torch.ones(2, 3))})
    for sums in (
        {1: {1: 1.0}},  # a pruned expert
        {2: {1: 2.0, 2: -1.0}},
        {2: {1: 0.5}},
        {2: {}},
        {2: {3: 1.0}},
    ):
        with pytest.raises(ValueError, match="merge"):
            Merge.averages([0, 2], sums, 3)


def test_merges_are_read_back_to_the_last_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    merges = {
        0: Merge(torch.randn(2, 4, generator=generator) * 1e-20, torch.randn(2, 4, generator=generator)),
        3: Merge(torch.rand(3, 4, generator=generator)),
    }
    plan = mp.PruningPlan({0: [0, 1], 3: [0, 2, 3]}, {0: 4, 3: 4}, "m:1", "reap", merges, 2)
    plan.save(tmp_path / "plan.json")
    assert mp.PruningPlan.load(tmp_path / "plan.json") == plan
    assert plan.mapped_layers == [0]
    other = dataclasses.replace(plan, merges=merges | {3: Merge(merges[3].experts + 1e-7)})
    assert other != plan
