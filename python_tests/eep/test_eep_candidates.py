"""EEP's candidates: what they are, how they start, and what the two phases' operators do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.eep import operators as ec
from moeprune_ext.eep.operators import Layout
from moeprune_ext.eep.settings import Rates


@st.composite
def layouts(draw):
    groups = draw(st.integers(1, 4))
    sizes = [draw(st.tuples(st.integers(1, 3), st.integers(1, 9))) for _ in range(groups)]
    keeps = [draw(st.integers(1, experts)) for _, experts in sizes]
    at = iter(range(100))
    layers = [tuple(next(at) for _ in range(count)) for count, _ in sizes]
    return Layout(tuple(layers), tuple(experts for _, experts in sizes), tuple(keeps))


properties = settings(max_examples=50, deadline=None)
rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def constant(layout, merging, mapping):
    shapes = list(zip(layout.keep, layout.num_experts, strict=True))
    merging, mapping = ([torch.full(shape, float(value)) for shape in shapes] for value in (merging, mapping))
    return ec.candidate_of(layout, merging, mapping)


def matrices(candidate, layout):
    return [*ec.merging_of(candidate, layout), *ec.mapping_of(candidate, layout)]


def mask_of(layout, rows):
    """Keeps the experts of `rows`, in this order."""
    one_hot = [torch.eye(experts)[ids] for ids, experts in zip(rows, layout.num_experts, strict=True)]
    return ec.candidate_of(layout, one_hot, one_hot)


# ---- candidates


@properties
@given(layouts(), rngs)
def test_random_masks_keep_as_many_experts_as_they_should(layout, rng):
    mask = ec.random_mask(layout, rng)
    assert ec.is_mask(mask)
    assert all(m is w for m, w in zip(ec.merging_of(mask, layout), ec.mapping_of(mask, layout), strict=True))
    for group, keep, experts in zip(layout.groups, layout.keep, layout.num_experts, strict=True):
        for layer in group:
            ids = ec.kept_by(mask)[layer]
            assert ids == sorted(set(ids)) and len(ids) == keep and ids[0] >= 0 and ids[-1] < experts
            assert mask.merges[layer].experts.shape == mask.merges[layer].router.shape == (keep, experts)
            assert mask.merges[layer].experts.nonzero()[:, 1].tolist() == ids
    assert ec.given_mask(layout, ec.kept_by(mask)) == mask


def test_every_mask_is_as_likely_to_start():
    layout, rng = Layout.of({0: 5}, 2), np.random.default_rng(0)
    met = [tuple(ec.kept_by(ec.random_mask(layout, rng))[0]) for _ in range(2000)]
    counts = [met.count(ids) for ids in set(met)]
    assert len(counts) == 10 and min(counts) > 150 and max(counts) < 250


def test_equal_candidates_are_those_with_the_same_rows():
    layout = Layout.of({0: 6, 1: 6}, 2)
    one, other = mask_of(layout, [[0, 3], [1, 2]]), mask_of(layout, [[3, 0], [1, 2]])
    assert ec.fingerprint(one, layout) == ec.fingerprint(other, layout)
    swapped = mask_of(layout, [[1, 2], [0, 3]])
    # Expert 0's tokens go to expert 3.
    rerouted = ec.candidate_of(layout, ec.merging_of(one, layout), ec.mapping_of(other, layout))
    assert len({ec.fingerprint(candidate, layout) for candidate in (one, other, swapped, rerouted)}) == 3
    assert ec.is_mask(one) and not ec.is_mask(rerouted)


@pytest.mark.parametrize("rows", [[[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0.5]]])
def test_rows_that_are_not_distinct_and_one_hot_are_no_mask(rows):
    matrix = torch.tensor(rows).float()
    assert not ec.is_mask(ec.candidate_of(Layout.of({0: 3}, 2), [matrix], [matrix]))


def test_a_candidate_is_simplified_to_the_mask_that_it_is():
    shapes = {0: LayerShape(4, 1), 1: LayerShape(6, 2), 2: LayerShape(6, 2, min_kept=6, prunable=False)}
    layout = Layout.of({0: 4, 1: 6}, 2)
    mask = mask_of(layout, [[3, 0], [1, 2]])
    plan = ec.simplified(mask, shapes, "m:1", 1)
    assert plan.kept == {0: [0, 3], 1: [1, 2], 2: [0, 1, 2, 3, 4, 5]} and not plan.merges
    assert (plan.model, plan.active, plan.criterion) == ("m:1", 1, "eep")
    merge = ec.merge_child([mask], layout, np.random.default_rng(0), Rates(change=1))
    plan = ec.simplified(merge, shapes, "m:1")
    assert plan.merges == merge.merges and plan.kept == {0: [0, 1], 1: [0, 1]} and plan.model == "m:1"


def test_a_criterions_mask_keeps_the_best_of_each_layer_or_group():
    scores = {0: torch.tensor([1.0, 3.0, 3.0, 2.0]), 1: torch.tensor([900.0, 0.0, 500.0, 800.0])}
    alone, grouped = Layout.of({0: 4, 1: 4}, 1), Layout.of({0: 4, 1: 4}, 1, [[0, 1]])
    assert ec.criterion_mask(alone, scores) == {0: [1], 1: [0]}
    # Shares of the layer's mean: 0.44 1.33 1.33 0.89 and 1.64 0 0.91 1.45; layer 1 alone would keep expert 0.
    assert ec.criterion_mask(grouped, scores) == {0: [3], 1: [3]}
    assert ec.criterion_mask(grouped, {0: scores[0], 1: torch.zeros(4)}) == {0: [1], 1: [1]}


@properties
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), rngs)
def test_masks_of_routers_with_groups_keep_as_many_in_each(layers, parts, keep, rng):
    size = keep + int(rng.integers(3))
    everywhere = [dict.fromkeys(range(layers), n) for n in (parts * size, parts * keep, parts)]
    layout = Layout.of(everywhere[0], everywhere[1], None, everywhere[2])
    scores = {layer: torch.from_numpy(rng.random(parts * size)) for layer in range(layers)}
    mask = ec.given_mask(layout, ec.criterion_mask(layout, scores))
    for layer, ids in ec.kept_by(mask).items():
        best = scores[layer].view(parts, size).topk(keep).indices + size * torch.arange(parts)[:, None]
        assert ids == sorted(best.flatten().tolist())
    for candidate in (ec.random_mask(layout, rng), mask):
        for _ in range(4):
            for ids in ec.kept_by(candidate).values():
                assert np.bincount(np.array(ids) // size, minlength=parts).tolist() == [keep] * parts
            candidate = ec.mutate_mask(candidate, layout, rng, Rates(touch=1, redraw=0.7))


def test_what_groups_of_a_router_cannot_share_is_refused():
    with pytest.raises(ValueError, match="layer 0: its router's 2 groups cannot keep equally many of 3"):
        Layout.of({0: 8, 1: 8}, 3, None, {0: 2, 1: 1})
    with pytest.raises(ValueError, match=r"layers \[0, 1\] cannot share matrices"):
        Layout.of({0: 8, 1: 8}, 4, [[0, 1]], {0: 2, 1: 1})
    layout = Layout.of({0: 8}, 2, None, {0: 2})
    with pytest.raises(ValueError, match="equally many experts of 2 groups in layer 0"):
        ec.given_mask(layout, {0: [1, 3]})


# ---- phase 1's operator


@properties
@given(layouts(), rngs)
def test_a_mutated_mask_is_a_mask_and_what_did_not_change_is_the_parents(layout, rng):
    parent = ec.random_mask(layout, rng)
    for _ in range(5):
        child = ec.mutate_mask(parent, layout, rng)
        assert ec.is_mask(child)
        for mine, before in zip(ec.merging_of(child, layout), ec.merging_of(parent, layout), strict=True):
            assert mine is before or (mine != before).any()
        parent = child


def test_masks_mutate_as_often_as_they_should():
    layout, rng = Layout.of(dict.fromkeys(range(16), 1000), 4), np.random.default_rng(0)
    parent = ec.random_mask(layout, rng)
    children = [ec.mutate_mask(parent, layout, rng) for _ in range(400)]
    rows = [
        [
            int((a != b).any(1).sum())
            for a, b in zip(ec.merging_of(child, layout), ec.merging_of(parent, layout), strict=True)
        ]
        for child in children
    ]
    changed = np.array(rows)  # an expert re-drawn is itself in one case of 997
    assert (changed > 0).mean() == pytest.approx(0.25 * (1 - 0.85**4), abs=0.015)
    assert changed.mean() == pytest.approx(0.25 * 4 * 0.15, abs=0.02)


def test_a_matrix_is_touched_even_where_there_is_one():
    layout, rng = Layout.of({0: 10_000}, 1), np.random.default_rng(0)
    parent = ec.random_mask(layout, rng)
    assert all(
        ec.kept_by(ec.mutate_mask(parent, layout, rng, Rates(redraw=1))) != ec.kept_by(parent) for _ in range(200)
    )


def test_a_redrawn_row_may_become_any_expert_that_no_other_row_has():
    layout, rng = Layout.of({0: 5}, 2), np.random.default_rng(0)
    parent = mask_of(layout, [[4, 1]])
    met = {tuple(ec.mutate_mask(parent, layout, rng).merges[0].experts.argmax(1).tolist()) for _ in range(500)}
    assert {(e, 1) for e in (0, 2, 3, 4)} | {(4, e) for e in (0, 1, 2, 3)} <= met


# ---- phase 2's operators


@properties
@given(layouts(), rngs)
def test_what_a_merge_does_not_touch_is_the_parents_and_something_always_is_touched(layout, rng):
    parent = constant(layout, 1, 2)
    child = ec.merge_child([parent], layout, rng, Rates(change=1, scale=10))
    pairs = list(zip(matrices(child, layout), matrices(parent, layout), strict=True))
    assert not all(mine is before for mine, before in pairs)
    assert all(mine is before or (mine != before).all() for mine, before in pairs)


def test_merges_touch_and_change_as_often_and_as_much_as_they_should():
    layout, rng = Layout.of(dict.fromkeys(range(8), 40), 10), np.random.default_rng(0)
    parent = constant(layout, 1, 2)
    children = [ec.merge_child([parent], layout, rng) for _ in range(400)]
    before = torch.stack(matrices(parent, layout)).numpy()
    moved = np.array([torch.stack(matrices(child, layout)).numpy() for child in children]) - before
    touched = (moved != 0).any((-1, -2))
    for half in (touched[:, :8], touched[:, 8:]):  # W_EM and W_RM
        assert half.mean() == pytest.approx(0.25 / (1 - 0.75**16), abs=0.03)
    together = (touched[:, :8] & touched[:, 8:]).mean()
    assert together == pytest.approx(0.25**2, abs=0.02)
    entries = moved[touched]
    assert (entries != 0).mean() == pytest.approx(0.25, abs=0.005)
    assert entries[entries != 0].std() == pytest.approx(0.065, rel=0.01)
    assert entries[entries != 0].mean() == pytest.approx(0, abs=0.001)


def test_each_kind_of_matrix_has_its_own_probability():
    layout, rng = Layout.of(dict.fromkeys(range(3), 4), 2), np.random.default_rng(0)
    parent = constant(layout, 1, 2)
    child = ec.merge_child([parent], layout, rng, Rates(touch_merging=1, touch_mapping=0, change=1))
    assert all(a is b for a, b in zip(ec.mapping_of(child, layout), ec.mapping_of(parent, layout), strict=True))
    assert all((matrix != 1).all() for matrix in ec.merging_of(child, layout))


def test_a_cross_takes_rows_of_both_parents_and_untouched_matrices_whole():
    layout, rng = Layout.of(dict.fromkeys(range(6), 7), 5), np.random.default_rng(0)
    first, second = constant(layout, 1, 2), constant(layout, -1, -2)
    from_first, mixed, whole = [], 0, []
    for _ in range(300):
        child = ec.merge_child([first, second], layout, rng, Rates(change=0))
        for mine, a, b in zip(*(matrices(one, layout) for one in (child, first, second)), strict=True):
            if mine is a or mine is b:
                whole.append(mine is a)
            else:
                rows = (mine == a).all(1)
                assert (rows | (mine == b).all(1)).all()
                from_first += rows.tolist()
                mixed += 0 < rows.sum() < 5
    assert mixed > 100
    assert np.mean(from_first) == pytest.approx(0.6, abs=0.03)
    assert np.mean(whole) == pytest.approx(0.6, abs=0.03)
    assert len(from_first) / 5 / (300 * 12) == pytest.approx(0.25, abs=0.03)


def test_a_crossed_child_mutates_too():
    layout, rng = Layout.of({0: 9}, 5), np.random.default_rng(0)
    child = ec.merge_child(
        [constant(layout, 1, 2), constant(layout, -1, -2)], layout, rng, Rates(touch_merging=1, change=1)
    )
    merging = child.merges[0].experts.numpy()
    assert not np.isin(merging, (1, -1)).any()
    assert np.abs(np.abs(merging) - 1).max() < 0.4


def test_normalisation_gives_rows_of_sum_one_but_where_a_sum_is_near_zero():
    layout, merging = Layout.of({0: 3}, 3), torch.tensor([[1, 2, 1], [0.5, 0.5, -0.9996], [-1, -1, 0]])
    candidate = ec.candidate_of(layout, [merging], [merging])
    child = ec.normalized(candidate, layout)
    assert child.merges[0].experts.tolist() == [[0.25, 0.5, 0.25], merging[1].tolist(), [0.5, 0.5, 0]]
    assert child.merges[0].router is candidate.merges[0].router


@properties
@given(layouts(), rngs)
def test_normalising_twice_or_a_mask_changes_nothing(layout, rng):
    mask = ec.random_mask(layout, rng)
    same = zip(ec.merging_of(ec.normalized(mask, layout), layout), ec.merging_of(mask, layout), strict=True)
    assert all(a is b for a, b in same)
    once = ec.normalized(ec.merge_child([mask], layout, rng), layout)
    twice = ec.normalized(once, layout)
    for a, b in zip(ec.merging_of(twice, layout), ec.merging_of(once, layout), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
