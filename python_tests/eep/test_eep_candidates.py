"""EEP's candidates: what they are, how they start, and what the two phases' operators do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moeprune_ext.eep import operators as ec
from moeprune_ext.eep.operators import Candidate, Layout


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
    return Candidate(
        layout.groups,
        tuple(np.full(shape, merging, np.float32) for shape in shapes),
        tuple(np.full(shape, mapping, np.float32) for shape in shapes),
    )


# ---- candidates


@properties
@given(layouts(), rngs)
def test_random_masks_keep_as_many_experts_as_they_should(layout, rng):
    mask = ec.random_mask(layout, rng)
    assert mask.is_pruning and all(m is w for m, w in zip(mask.merging, mask.mapping, strict=True))
    for group, keep, experts in zip(layout.groups, layout.keep, layout.num_experts, strict=True):
        for layer in group:
            ids = mask.kept[layer]
            assert ids == sorted(set(ids)) and len(ids) == keep and ids[0] >= 0 and ids[-1] < experts
            assert mask.merge_map[layer].shape == mask.router_map[layer].shape == (keep, experts)
            assert mask.merge_map[layer].nonzero()[:, 1].tolist() == ids
    assert ec.given_mask(layout, mask.kept) == mask


def test_every_mask_is_as_likely_to_start():
    layout, rng = Layout.of({0: 5}, 2), np.random.default_rng(0)
    met = [tuple(ec.random_mask(layout, rng).kept[0]) for _ in range(2000)]
    counts = [met.count(ids) for ids in set(met)]
    assert len(counts) == 10 and min(counts) > 150 and max(counts) < 250


def test_equal_candidates_are_those_with_the_same_rows():
    layout = Layout.of({0: 6, 1: 6}, 2)
    one, other = Candidate.of_mask(layout, [[0, 3], [1, 2]]), Candidate.of_mask(layout, [[3, 0], [1, 2]])
    assert one == other and hash(one) == hash(other) and one.fingerprint == other.fingerprint
    swapped = Candidate.of_mask(layout, [[1, 2], [0, 3]])
    rerouted = Candidate(one.groups, one.merging, other.mapping)  # expert 0's tokens go to expert 3
    assert len({one, other, swapped, rerouted}) == 3
    assert one.is_pruning and not rerouted.is_pruning
    with pytest.raises(ValueError, match="merges experts"):
        rerouted.kept  # noqa: B018


@pytest.mark.parametrize("rows", [[[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0.5]]])
def test_rows_that_are_not_distinct_and_one_hot_are_no_mask(rows):
    matrix = np.array(rows, np.float32)
    assert not Candidate(((0,),), (matrix,), (matrix,)).is_pruning


def test_matrices_are_read_only_copies():
    matrix = np.eye(2, 4, dtype=np.float32)
    candidate = Candidate(((0,),), (matrix,), (matrix,))
    before = candidate.fingerprint
    matrix[:] = 7
    candidate.merge_map[0].zero_()
    assert candidate.kept == {0: [0, 1]} and candidate.fingerprint == before
    with pytest.raises(ValueError, match="read-only"):
        candidate.merging[0][0, 0] = 2


@properties
@given(layouts(), rngs)
def test_a_saved_candidate_is_read_back_bit_for_bit(tmp_path_factory, layout, rng):
    path = tmp_path_factory.mktemp("eep") / "best.safetensors"
    saved = ec.merge_child(ec.random_mask(layout, rng), None, rng)
    saved.save(path)
    read = Candidate.load(path)
    assert read.groups == saved.groups and read == saved
    for one, other in zip([*read.merging, *read.mapping], [*saved.merging, *saved.mapping], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("content", ["missing", "text", "other safetensors", "damaged", "infinite"])
def test_files_that_are_no_candidate_are_refused(tmp_path, content):
    path, metadata = tmp_path / "best.safetensors", {"format": ec.FORMAT, "groups": "[[0]]"}
    if content == "text":
        path.write_text("{}")
    elif content == "other safetensors":
        save_file({"merging.0": np.eye(2, dtype=np.float32)}, path)
    elif content == "damaged":
        save_file({"merging.0": np.eye(2, dtype=np.float32)}, path, metadata)
    elif content == "infinite":
        matrix = np.full((2, 2), np.inf, np.float32)
        save_file({"merging.0": matrix, "mapping.0": matrix}, path, metadata)
    with pytest.raises(ValueError, match="best.safetensors is not a readable EEP candidate"):
        Candidate.load(path)


@pytest.mark.parametrize(
    ("groups", "merging", "mapping", "message"),
    [
        (((0,), (1,)), [(2, 4)], [(2, 4)], "two matrices for every group"),
        (((0,),), [(2, 4)], [(3, 4)], "experts kept, experts"),
        (((0,),), [(5, 4)], [(5, 4)], "experts kept, experts"),
        (((0, 1), (1,)), [(2, 4)] * 2, [(2, 4)] * 2, "each layer once"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(groups, merging, mapping, message):
    with pytest.raises(ValueError, match=message):
        Candidate(groups, tuple(map(np.ones, merging)), tuple(map(np.ones, mapping)))


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
    for layer, ids in mask.kept.items():
        best = scores[layer].view(parts, size).topk(keep).indices + size * torch.arange(parts)[:, None]
        assert ids == sorted(best.flatten().tolist())
    for candidate in (ec.random_mask(layout, rng), mask):
        for _ in range(4):
            for ids in candidate.kept.values():
                assert np.bincount(np.array(ids) // size, minlength=parts).tolist() == [keep] * parts
            candidate = ec.mutate_mask(candidate, rng, layout.router_groups, touch=1, redraw=0.7)


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
        child = ec.mutate_mask(parent, rng)
        assert child.is_pruning
        for mine, before in zip(child.merging, parent.merging, strict=True):
            assert mine is before or (mine != before).any()
        parent = child


def test_masks_mutate_as_often_as_they_should():
    layout, rng = Layout.of(dict.fromkeys(range(16), 1000), 4), np.random.default_rng(0)
    parent = ec.random_mask(layout, rng)
    children = [ec.mutate_mask(parent, rng) for _ in range(400)]
    rows = [
        [int((a != b).any(1).sum()) for a, b in zip(child.merging, parent.merging, strict=True)] for child in children
    ]
    changed = np.array(rows)  # an expert re-drawn is itself in one case of 997
    assert (changed > 0).mean() == pytest.approx(0.25 * (1 - 0.85**4), abs=0.015)
    assert changed.mean() == pytest.approx(0.25 * 4 * 0.15, abs=0.02)


def test_a_matrix_is_touched_even_where_there_is_one():
    layout, rng = Layout.of({0: 10_000}, 1), np.random.default_rng(0)
    parent = ec.random_mask(layout, rng)
    assert all(ec.mutate_mask(parent, rng, redraw=1).kept != parent.kept for _ in range(200))


def test_a_redrawn_row_may_become_any_expert_that_no_other_row_has():
    layout, rng = Layout.of({0: 5}, 2), np.random.default_rng(0)
    parent = Candidate.of_mask(layout, [[4, 1]])
    met = {tuple(ec.mutate_mask(parent, rng).merging[0].argmax(1).tolist()) for _ in range(500)}
    assert {(e, 1) for e in (0, 2, 3, 4)} | {(4, e) for e in (0, 1, 2, 3)} <= met


# ---- phase 2's operators


@properties
@given(layouts(), rngs)
def test_what_a_merge_does_not_touch_is_the_parents_and_something_always_is_touched(layout, rng):
    parent = constant(layout, 1, 2)
    child = ec.merge_child(parent, None, rng, change=1, scale=10)
    pairs = list(zip([*child.merging, *child.mapping], [*parent.merging, *parent.mapping], strict=True))
    assert not all(mine is before for mine, before in pairs)
    assert all(mine is before or (mine != before).all() for mine, before in pairs)


def test_merges_touch_and_change_as_often_and_as_much_as_they_should():
    layout, rng = Layout.of(dict.fromkeys(range(8), 40), 10), np.random.default_rng(0)
    parent = constant(layout, 1, 2)
    children = [ec.merge_child(parent, None, rng) for _ in range(400)]
    before = np.array([*parent.merging, *parent.mapping])
    moved = np.array([[*child.merging, *child.mapping] for child in children]) - before
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
    child = ec.merge_child(parent, None, rng, touch_merging=1, touch_mapping=0, change=1)
    assert child.mapping == parent.mapping
    assert all((matrix != 1).all() for matrix in child.merging)


def test_a_cross_takes_rows_of_both_parents_and_untouched_matrices_whole():
    layout, rng = Layout.of(dict.fromkeys(range(6), 7), 5), np.random.default_rng(0)
    first, second = constant(layout, 1, 2), constant(layout, -1, -2)
    from_first, mixed, whole = [], 0, []
    for _ in range(300):
        child = ec.merge_child(first, second, rng, change=0)
        for mine, a, b in zip(
            [*child.merging, *child.mapping],
            [*first.merging, *first.mapping],
            [*second.merging, *second.mapping],
            strict=True,
        ):
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
    child = ec.merge_child(constant(layout, 1, 2), constant(layout, -1, -2), rng, touch_merging=1, change=1)
    assert not np.isin(child.merging[0], (1, -1)).any()
    assert np.abs(np.abs(child.merging[0]) - 1).max() < 0.4


def test_normalisation_gives_rows_of_sum_one_but_where_a_sum_is_near_zero():
    merging = np.array([[1, 2, 1], [0.5, 0.5, -0.9996], [-1, -1, 0], [0.25, 0.75, 0]], np.float32)[:3]
    candidate = Candidate(((0,),), (merging,), (merging,))
    child = ec.normalized(candidate)
    assert child.merging[0].tolist() == [[0.25, 0.5, 0.25], merging[1].tolist(), [0.5, 0.5, 0]]
    assert child.mapping[0] is candidate.mapping[0]


@properties
@given(layouts(), rngs)
def test_normalising_twice_or_a_mask_changes_nothing(layout, rng):
    mask = ec.random_mask(layout, rng)
    assert all(a is b for a, b in zip(ec.normalized(mask).merging, mask.merging, strict=True))
    once = ec.normalized(ec.merge_child(mask, None, rng))
    for a, b in zip(ec.normalized(once).merging, once.merging, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
