"""EEP's search: what its operators keep and change, whose children it makes, counts, resuming, splits, refusals."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moeprune_ext import eep_candidates as ec
from moeprune_ext.eep import Fitness, parents_within, search
from moeprune_ext.eep_candidates import Candidate, Layout

EXPERTS = {1: 8, 2: 8, 5: 8, 6: 8}
USEFULNESS = {layer: np.random.default_rng(layer).permutation(8) for layer in EXPERTS}
MASKS = [{layer: [0, 1, 2] for layer in EXPERTS}, {layer: [3, 5, 7] for layer in EXPERTS}]
SETTINGS = dict(masks=MASKS, start_count=5, prune_iters=12, merge_iters=14)


def usefulness(candidates):
    """A separable fitness: every expert has a value, and a matrix scores what its columns hold of it, in [0, 1]."""
    return [
        Fitness(
            float(np.mean([m.sum(0) @ USEFULNESS[g[0]] / 21 for m, g in zip(c.merging, c.groups, strict=True)])),
            float(c.mapping[0][:, 0].sum()),
        )
        for c in candidates
    ]


def search_usefulness(evaluate=usefulness, **changes):
    return search(evaluate, EXPERTS, 3, **{**SETTINGS, **changes})


class Recorder:
    """An evaluation that keeps what it was asked, and fails at call number `until`."""

    def __init__(self, evaluate=usefulness, until=math.inf):
        self.calls, self.evaluate, self.until = [], evaluate, until

    def __call__(self, candidates):
        if len(self.calls) == self.until:
            raise RuntimeError("killed")
        self.calls.append(list(candidates))
        return self.evaluate(candidates)

    @property
    def candidates(self):
        return [candidate for call in self.calls for candidate in call]


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


# ---- parents


def test_parents_are_those_within_the_threshold():
    fitness = [Fitness(score) for score in (0.7699, 0.80, 0.77, math.nan, 0.79, 0.78999)]
    assert parents_within(fitness, 3.0) == [1, 2, 4, 5]
    assert parents_within(fitness, 1.0) == [1, 4]
    assert parents_within(fitness, 0.0) == [1]
    assert parents_within(fitness, 0.0, at_least=3) == [1, 4, 5]
    assert parents_within([Fitness(0.27), Fitness(0.24)], 3.0) == [0, 1]  # though 0.27 - 0.03 > 0.24 in float64
    assert parents_within([Fitness(math.nan), Fitness(-math.inf)], 3.0) == [0, 1]


def ancestors(candidate, known):
    """Places in `known` of the candidates some of whose matrices this one has taken over untouched."""
    return {
        place
        for place, other in enumerate(known)
        if any(a is b for a, b in zip([*candidate.merging, *candidate.mapping], [*other.merging, *other.mapping]))  # noqa: B905
    }


@pytest.mark.parametrize(
    ("settings", "phase", "parents"),
    [
        (dict(prune_iters=30, merge_iters=0), "prune", {2, 3, 4}),
        (dict(prune_iters=6, merge_iters=24, cross=0), "merge", {2, 3, 4}),
        (dict(prune_iters=6, merge_iters=24, cross=1), "merge", {3, 4}),
        (dict(prune_iters=6, merge_iters=24, cross=1, cross_within=0.1), "merge", {3, 4}),  # it takes two
        (dict(prune_iters=6, merge_iters=24, cross=1, cross_within=0.1, cross_at_least=3), "merge", {2, 3, 4}),
        (dict(prune_iters=6, merge_iters=24, cross=0, mutate_within=0), "merge", {4}),
    ],
)
def test_children_have_the_parents_they_should(settings, phase, parents):
    """Six starts of known scores, whose children are all bad: all descend from starts within the threshold."""
    scores = [0.5, 0.76, 0.775, 0.795, 0.8, math.nan]
    asked = Recorder(lambda cs: [Fitness(s) for s in (scores if len(asked.calls) == 1 else [0.1] * len(cs))])
    layers = dict.fromkeys(range(12), 50)
    result = search(asked, layers, 5, starts="random", start_count=6, normalize=0, **settings)
    start, *children = asked.calls
    found = [ancestors(child, start) for call in children for child in call]
    assert set().union(*found) == parents
    crossed = settings.get("cross") == 1
    assert all(len(places) == (2 if crossed else 1) for places in found)
    assert {record["phase"] for record in result.history[1:]} == {phase}


def test_merge_children_cross_and_are_normalised_as_often_as_they_should():
    asked = Recorder(lambda cs: [Fitness(0.5 if len(asked.calls) == 1 else 0.1) for _ in cs])
    options = dict(starts="random", start_count=10, prune_iters=10, merge_iters=600, tie_break=None)
    search(asked, dict.fromkeys(range(12), 20), 5, change=1, touch_mapping=0, **options)
    start, *children = asked.calls
    merged = [child for call in children for child in call]
    assert np.mean([len(ancestors(child, start)) == 2 for child in merged]) == pytest.approx(0.3, abs=0.06)
    unit_sums = [all(np.allclose(matrix.sum(1), 1, atol=1e-5) for matrix in child.merging) for child in merged]
    assert np.mean(unit_sums) == pytest.approx(0.1, abs=0.04)


def test_of_equal_scores_only_the_best_by_tie_has_children():
    ties = [None, -3.0, -1.0, math.nan, -2.0, -4.0]

    def found(tie_break):
        asked = Recorder(
            lambda cs: [Fitness(0.25, t) for t in ties] if len(asked.calls) == 1 else [Fitness(0.0) for _ in cs]
        )
        layers = dict.fromkeys(range(12), 50)
        options = dict(starts="random", start_count=6, prune_iters=40, merge_iters=0, tie_break=tie_break)
        result = search(asked, layers, 5, **options)
        start, *children = asked.calls
        return set().union(*(ancestors(c, start) for call in children for c in call)), start.index(result.best)

    assert found("log_likelihood") == ({2}, 2)
    assert found(None) == (set(range(6)), 0)


# ---- the search


def test_the_best_mask_of_a_separable_fitness_is_found():
    result = search_usefulness(prune_iters=600, merge_iters=0, start_count=30, starts="random")
    assert result.best is result.pruned
    assert result.best.kept == {layer: sorted(np.argsort(values)[-3:].tolist()) for layer, values in USEFULNESS.items()}
    assert result.train == result.pruned_train and result.train.score == pytest.approx((7 + 6 + 5) / 21)


def test_merging_improves_on_the_best_mask():
    target = np.random.default_rng(0).dirichlet(np.ones(6), (2, 3))

    def evaluate(candidates):
        return [
            Fitness(1 - float(sum(((m - t) ** 2).sum() for m, t in zip(c.merging, target, strict=True)) / 12))
            for c in candidates
        ]

    result = search(evaluate, {0: 6, 1: 6}, 3, starts="random", merge_iters=600)
    assert result.pruned.is_pruning and not result.best.is_pruning
    assert 1 - result.train.score < 0.5 * (1 - result.pruned_train.score)
    assert evaluate([result.best, result.pruned]) == [result.train, result.pruned_train]


def test_flat_scores_are_climbed_by_their_ties():
    def flat(candidates):
        return [Fitness(0.0, fitness.score) for fitness in usefulness(candidates)]

    options = dict(prune_iters=150, merge_iters=0, starts="random")
    climbed, blind = search_usefulness(flat, **options), search_usefulness(flat, tie_break=None, **options)
    assert climbed.train.tie > usefulness([blind.best])[0].score + 0.05


def test_evaluations_are_as_many_as_asked_starts_included_and_no_candidate_twice():
    asked = Recorder()
    result = search(asked, EXPERTS, 3, masks=MASKS)
    assert [len(call) for call in asked.calls] == [30, 4, 4, 2] + [4] * 40
    assert result.evaluations == 200 == len(set(asked.candidates))
    assert all(c.is_pruning for c in asked.candidates[:40]) and not any(c.is_pruning for c in asked.candidates[40:])
    assert [r["evaluated"] for r in result.history] == [len(call) for call in asked.calls]
    assert [r["phase"] for r in result.history] == ["start"] + ["prune"] * 3 + ["merge"] * 40
    assert result.history[-1]["evaluations"] == 200 and result.history[-1]["best"] == result.train.score
    bests = [r["best"] for r in result.history]
    assert bests == sorted(bests)


def test_the_published_loop_makes_one_child_at_a_time():
    asked = Recorder()
    search(asked, EXPERTS, 3, starts="random", tie_break=None, per_call=1)
    assert [len(call) for call in asked.calls] == [30] + [1] * 170


def test_defaults_are_the_published_numbers():
    d = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    published = dict(prune_iters=40, merge_iters=160, start_count=30, touch=0.25, redraw=0.15, touch_merging=0.25)
    published |= dict(touch_mapping=0.25, cross=0.3, from_first=0.6, change=0.25, scale=0.065, normalize=0.1)
    published |= dict(mutate_within=3.0, cross_within=1.0)
    assert {name: d[name] for name in published} == published
    for operator in (ec.mutate_mask, ec.merge_child):
        own = {n: p.default for n, p in inspect.signature(operator).parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert own == {name: published[name] for name in own}


def test_given_masks_are_the_first_starts_and_random_ones_the_rest():
    with_masks, without = Recorder(), Recorder()
    doubled = [*MASKS, MASKS[0]]
    search_usefulness(with_masks, masks=doubled)
    search_usefulness(without, starts="random")
    assert [c.kept for c in with_masks.calls[0][:2]] == MASKS
    assert len(with_masks.calls[0]) == len(without.calls[0]) == 5
    assert with_masks.calls[0][3:] == without.calls[0][3:] and MASKS[0] not in [c.kept for c in without.calls[0]]
    few = Recorder()
    search_usefulness(few, masks=doubled, prune_iters=1, merge_iters=0)
    assert [[c.kept for c in call] for call in few.calls] == [[MASKS[0]]]


def test_a_space_smaller_than_the_budget_is_searched_once():
    asked = Recorder(lambda cs: [Fitness(c.kept[0][0] / 4) for c in cs])
    result = search(asked, {0: 3}, 2, starts="random", merge_iters=0)
    assert len(asked.candidates) == 3 == result.evaluations and result.best.kept == {0: [1, 2]}
    assert all(asked.calls)


def test_layers_of_a_group_share_their_matrices():
    groups = [[5, 1], [6, 2]]
    asked = Recorder()
    search_usefulness(asked, layer_groups=groups)
    for candidate in asked.candidates:
        assert candidate.groups == ((1, 5), (2, 6)) and len(candidate.merging) == 2
        maps = candidate.router_map
        assert list(maps) == [1, 2, 5, 6] and maps[1] is maps[5] and maps[2] is maps[6]


def test_layers_may_keep_different_numbers():
    keep = {1: 1, 2: 8, 5: 3, 6: 4}
    result = search(usefulness, EXPERTS, keep, **{**SETTINGS, "starts": "random"})
    assert {layer: len(ids) for layer, ids in result.pruned.kept.items()} == keep


def test_a_candidate_without_a_finite_score_is_the_worst():
    def evaluate(candidates):
        finite = usefulness(candidates)
        return [Fitness(bad, 9.0) if i % 2 else one for i, (one, bad) in enumerate(zip(finite, [math.inf] * 99))]  # noqa: B905

    result = search_usefulness(evaluate)
    assert math.isfinite(result.train.score) and sum(r["non_finite"] for r in result.history) == 2 + 7 // 2 + 7
    with pytest.raises(ValueError, match="no candidate had a finite score"):
        search_usefulness(lambda cs: [Fitness(math.nan) for _ in cs])


def test_same_seed_same_outcome_and_another_seed_another_search():
    assert search_usefulness(seed=3) == search_usefulness(seed=3)
    assert search_usefulness(seed=4).history != search_usefulness(seed=3).history


# ---- splits


def test_the_best_on_train_are_ranked_again_on_valid_and_only_the_winner_is_tested():
    train, validate = Recorder(), Recorder(lambda cs: [Fitness(-f.score, f.tie) for f in usefulness(cs)])
    test = Recorder(lambda cs: [Fitness(0.125) for _ in cs])
    result = search_usefulness(train, validate=validate, test=test, rerank=3)
    (finalists,) = validate.calls
    ranked = [
        sorted(part, key=lambda c: -usefulness([c])[0].score) for part in (train.candidates[:12], train.candidates[12:])
    ]
    assert sorted(c.fingerprint for c in finalists) == sorted(c.fingerprint for part in ranked for c in part[:3])
    assert result.pruned == ranked[0][2]  # the worst of the finalists on train
    assert result.best == min(finalists, key=lambda c: usefulness([c])[0].score)
    assert result.valid.score == -result.train.score and result.pruned_valid.score == -result.pruned_train.score
    assert test.calls == [[result.best]] and result.test == Fitness(0.125)


def test_equal_candidates_on_valid_are_ordered_by_train_and_not_finite_ones_are_last():
    equal = search_usefulness(validate=lambda cs: [Fitness(0.5) for _ in cs])
    assert equal.best == search_usefulness().best and equal.valid == Fitness(0.5) and equal.test is None
    last = Recorder(lambda cs: [Fitness(math.nan)] * (len(cs) - 1) + [Fitness(0.1)])
    assert search_usefulness(validate=last).best == last.calls[0][-1]
    with pytest.raises(ValueError, match="validation"):
        search_usefulness(validate=lambda cs: [Fitness(math.nan) for _ in cs])


# ---- resuming


def test_a_history_cut_at_any_line_or_inside_one_ends_with_the_same_outcome(tmp_path):
    whole = search_usefulness(out=tmp_path)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole.history) == 7
    for kept in range(len(lines) + 1):
        for rest in ("", lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else ""):
            history.write_text("".join(lines[:kept]) + rest)
            asked = Recorder()
            assert search_usefulness(asked, out=tmp_path) == whole
            assert [len(call) for call in asked.calls] == [r["evaluated"] for r in whole.history[kept:]]
            assert history.read_text() == "".join(lines)
    assert Candidate.load(tmp_path / "best.safetensors") == whole.best
    assert Candidate.load(tmp_path / "pruned.safetensors") == whole.pruned


@pytest.mark.parametrize("moment", range(7))
def test_a_search_that_died_in_an_evaluation_is_taken_up(tmp_path, moment):
    with pytest.raises(RuntimeError, match="killed"):
        search_usefulness(Recorder(until=moment), out=tmp_path)
    assert not (tmp_path / "best.safetensors").exists()
    assert search_usefulness(out=tmp_path) == search_usefulness()


@pytest.mark.parametrize("first", [0, 1, 8, 14])
def test_a_finished_search_can_be_extended_and_shortened(tmp_path, first):
    search_usefulness(merge_iters=first, out=tmp_path)
    asked = Recorder()
    longer = search_usefulness(asked, merge_iters=23, out=tmp_path)
    assert longer == search_usefulness(merge_iters=23)
    assert len(asked.candidates) == 23 - first
    assert search_usefulness(merge_iters=first, out=tmp_path) == search_usefulness(merge_iters=first)


def test_scores_that_are_not_finite_survive_the_journal(tmp_path):
    def evaluate(candidates):
        values = (math.nan, math.inf, -math.inf)
        return [Fitness(values[i % 3], values[i % 2]) if i % 4 else one for i, one in enumerate(usefulness(candidates))]

    whole = search_usefulness(evaluate, out=tmp_path)
    json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert search_usefulness(Recorder(until=0), out=tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"prune_iters": 13}, "prune_iters"),
        ({"per_call": 5}, "per_call"),
        ({"masks": MASKS[:1]}, "masks"),
        ({"scale": 0.1}, "scale"),
        ({"tie_break": None}, "tie_break"),
        ({"layer_groups": [[1, 2], [5, 6]]}, "groups"),
        ({"identity": {"data": "def"}}, "data"),
    ],
)
def test_another_searchs_directory_is_refused(tmp_path, change, named):
    search_usefulness(identity={"data": "abc"}, out=tmp_path)
    before = (tmp_path / "history.jsonl").read_text()
    with pytest.raises(ValueError, match=f"belongs to another search .*{named}"):
        search_usefulness(Recorder(until=0), **{"identity": {"data": "abc"}, **change}, out=tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == before


def test_a_history_of_other_candidates_is_refused(tmp_path):
    search_usefulness(out=tmp_path)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    record = json.loads(lines[3])
    record["scores"][1][0] = "0123456789abcdef"
    history.write_text("".join([*lines[:3], json.dumps(record) + "\n", *lines[4:]]))
    with pytest.raises(ValueError, match="call 3 of the history scores other candidates"):
        search_usefulness(Recorder(until=0), out=tmp_path)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "layer 1 has 8 experts and cannot keep 0"),
        ({"keep": 9}, "layer 1 has 8 experts and cannot keep 9"),
        ({"keep": 2.5}, "cannot keep 2.5"),
        ({"keep": {1: 3, 2: 3}}, r"`keep` names layers \[1, 2\], the model has \[1, 2, 5, 6\]"),
        ({"keep": {1: 3, 2: 4, 5: 3, 6: 3}, "layer_groups": [[1, 2], [5, 6]]}, r"layers \[1, 2\] cannot share"),
        ({"num_experts": {**EXPERTS, 5: 7}, "layer_groups": [[1, 5], [2, 6]]}, r"layers \[1, 5\] cannot share"),
        ({"num_experts": {}}, "no layers"),
        ({"layer_groups": [[1, 2], [5]]}, "every one of the layers"),
        ({"layer_groups": [[1, 2], [2, 5, 6]]}, "every one of the layers"),
        ({"layer_groups": [[1, 2, 5, 6], []]}, "every one of the layers"),
        ({"starts": "best"}, "unknown starts 'best'"),
        ({"masks": ()}, 'starts="criteria" needs'),
        ({"masks": [{1: [0, 1, 2]}]}, r"masks\[0\] is for layers \[1\]"),
        ({"masks": [*MASKS, {layer: [0, 1] for layer in EXPERTS}]}, r"masks\[2\] must keep 3 of 8"),
        ({"masks": [{layer: [0, 0, 1] for layer in EXPERTS}]}, "must keep 3 of 8"),
        ({"masks": [{layer: [0, 1, 8] for layer in EXPERTS}]}, "must keep 3 of 8"),
        ({"masks": [{**MASKS[0], 2: [1, 2, 3]}], "layer_groups": [[1, 2], [5, 6]]}, "other experts in layer 1"),
        ({"tie_break": "length"}, "unknown tie_break 'length'"),
        ({"prune_iters": 0}, "prune_iters must be at least 1"),
        ({"merge_iters": -1}, "merge_iters"),
        ({"per_call": 0}, "per_call must be at least 1"),
        ({"rerank": 0}, "rerank must be at least 1"),
        ({"cross_at_least": 1}, "cross_at_least"),
        ({"touch": 0}, "touch, and"),
        ({"touch_merging": 0, "touch_mapping": 0}, "touch_merging or touch_mapping"),
        ({"change": 1.5}, "change is a probability"),
        ({"scale": math.nan}, "scale above 0"),
    ],
)
def test_impossible_settings_are_refused_before_any_evaluation(tmp_path, change, message):
    asked = Recorder()
    options = {"num_experts": EXPERTS, "keep": 3, **SETTINGS, **change}
    with pytest.raises(ValueError, match=message):
        search(asked, **options, out=tmp_path / "run")
    assert not asked.calls and not (tmp_path / "run").exists()


def test_an_evaluation_that_answers_too_few_is_an_error():
    with pytest.raises(ValueError, match="5 candidates were to be scored, the evaluation returned 4"):
        search_usefulness(lambda cs: usefulness(cs)[:-1])
