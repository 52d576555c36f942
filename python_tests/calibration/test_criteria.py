"""Scores: what users ask to keep, outlier experts, and how far criteria agree."""

import math

import pytest
import torch

import moeprune_ext as mp
from moeprune_ext.artifacts.scores import pruning_order
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.calibration.criteria import rank_correlations, super_experts


def scores_of(values, *, n_group=1, top_k=1):
    tensors = {layer: torch.tensor(v, dtype=torch.float64) for layer, v in values.items()}
    return mp.ExpertScores.wrap(tensors, top_k=top_k, n_group=n_group)


def stats_of(moments, max_norm):
    shapes = {layer: LayerShape(len(table), 1) for layer, table in moments.items()}
    return mp.RoutingStats(moments, max_norm, 100, shapes, "test:0")


def test_protected_experts_outlive_all_others_and_cap_what_can_go():
    scores = scores_of({0: [0.1, 0.2, 0.3, 0.4], 3: [4, 3, 2, 1]}).constrained(protect={0: [0, 1, 2]})
    assert scores.shapes[0].capacity == 1 and scores.shapes[3].capacity == 3
    assert mp.PruningPlan.from_pruned_counts(scores, {0: 1, 3: 3}).kept == {0: [0, 1, 2], 3: [0]}
    with pytest.raises(ValueError, match="layer 0: cannot prune 2"):
        mp.PruningPlan.from_pruned_counts(scores, {0: 2})


def test_protection_binds_however_it_is_said():
    tensors = {0: torch.arange(8.0, dtype=torch.float64)}
    by_hand = mp.ExpertScores(tensors, {0: LayerShape(8, 1)}, protected={0: frozenset({0, 1, 2})})
    assert by_hand == mp.ExpertScores(tensors, {0: LayerShape(8, 1)}).constrained(protect={0: [0, 1, 2]})
    assert by_hand.shapes[0].capacity == 5


@pytest.mark.parametrize("n_group", [1, 2, 4])
def test_protection_keeps_router_groups_equal(n_group):
    """Two protected experts of one group: every group keeps two."""
    scores = scores_of({0: list(range(8))}, n_group=n_group).constrained(protect={0: [0, 1]})
    capacity = scores.shapes[0].capacity
    assert capacity == 8 - 2 * n_group
    kept = mp.PruningPlan.from_pruned_counts(scores, {0: capacity}).kept[0]
    assert {0, 1} <= set(kept)
    size = 8 // n_group
    assert [sum(e // size == group for e in kept) for group in range(n_group)] == [2] * n_group


def test_minima_add_up_to_the_strictest():
    scores = scores_of({0: [1.0] * 8, 1: [1.0] * 16}, n_group=2)
    assert scores.constrained(min_kept=5).shapes[0].capacity == 2  # 3 would leave unequal groups
    both = scores.constrained(min_kept=4).constrained(min_kept_per_group=3)
    assert [shape.min_kept for shape in both.shapes.values()] == [6, 6]
    assert both.constrained(min_kept=1).shapes == both.shapes, "what was asked for before stays"
    with pytest.raises(ValueError, match="layer 0 has 8 experts in 2 groups and cannot keep 10"):
        scores.constrained(min_kept_per_group=5)
    with pytest.raises(ValueError, match="no such experts to protect"):
        scores.constrained(protect={0: [8]})


def test_constrained_scores_survive_their_file(tmp_path):
    scores = scores_of({0: [1, 2, 3], 2: [3, 2, 1]}).constrained(min_kept=2, protect={2: [2]})
    scores.save(tmp_path / "scores.json")
    loaded = mp.ExpertScores.load(tmp_path / "scores.json")
    assert loaded.protected == {2: frozenset({2})} and loaded.shapes == scores.shapes


def test_pruning_order_puts_protected_experts_last_in_their_group():
    values = torch.tensor([0.0, 5, 1, 2, 3, 4])
    assert pruning_order(values, 1, frozenset({0, 2})) == [3, 4, 5, 1, 0, 2]
    assert pruning_order(values, 2, frozenset({0})) == [2, 3, 1, 4, 0, 5]


def test_super_experts_are_few_extreme_and_anywhere():
    """Both conditions bind: above the quantile of all experts, and not small against the largest."""
    norms = {0: torch.linspace(1, 2, 100), 1: torch.linspace(1, 2, 100)}
    norms[1][7] = 90.0
    norms[0][3] = 5.0
    stats = stats_of({layer: torch.zeros(100, 3, 3, dtype=torch.float64) for layer in norms}, norms)
    assert super_experts(stats) == {1: [7]}  # 5.0 is above the quantile, but not a tenth of 90
    assert super_experts(stats, share=0.05, quantile=0.98) == {0: [3], 1: [7]}
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        super_experts(stats, quantile=2)


def test_every_criterion_comes_from_one_table():
    """No further pass: the moments alone, and additive over shards where the criterion sums."""
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(50, generator=generator, dtype=torch.float64)
    norms = torch.rand(50, generator=generator, dtype=torch.float64) + 1
    expert = torch.randint(0, 4, (50,), generator=generator)
    moments = torch.zeros(5, 3, 3, dtype=torch.float64)  # the fifth is never routed to
    for g, f, e in zip(gates, norms, expert, strict=True):
        moments[e] += torch.outer(g ** torch.arange(3), f ** torch.arange(3))
    stats = stats_of({0: moments}, {0: torch.ones(5)})
    for alpha in range(3):
        for beta in range(3):
            for reduce in ("sum", "mean"):
                values = mp.score_experts(stats, (alpha, beta, reduce))[0]
                for e in range(4):
                    mine = (gates**alpha * norms**beta)[expert == e]
                    assert values[e] == pytest.approx(float(mine.sum() if reduce == "sum" else mine.mean()))
                assert values[4] == 0


def test_rank_correlation_is_spearmans():
    a, b = [1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5]
    both = rank_correlations([scores_of({0: a}), scores_of({0: b})])[0]
    assert both[0, 1] == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert both.diagonal().tolist() == pytest.approx([1, 1])
    monotone = rank_correlations([scores_of({0: a}), scores_of({0: [math.exp(x) for x in a]})])[0]
    assert monotone[0, 1] == pytest.approx(1)
    reverse = rank_correlations([scores_of({0: a}), scores_of({0: a[::-1]})])[0]
    assert reverse[0, 1] == pytest.approx(-1)


def test_rank_correlation_gives_ties_their_mean_rank_and_nan_to_constants():
    a, b = [1.0, 1, 2, 3], [1.0, 2, 2, 3]
    ranks = torch.tensor([[0.5, 0.5, 2, 3], [0, 1.5, 1.5, 3]], dtype=torch.float64)
    found = rank_correlations([scores_of({0: a}), scores_of({0: b}), scores_of({0: [7.0] * 4})])[0]
    assert found[0, 1] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert math.isnan(found[0, 2])
