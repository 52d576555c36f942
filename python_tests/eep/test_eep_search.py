"""EEP's search: whose children it makes, how many it evaluates, resuming, splits, refusals."""

import dataclasses
import inspect
import json
import math

import numpy as np
import pytest

from moeprune_ext.eep import operators as ec
from moeprune_ext.eep.operators import Layout
from moeprune_ext.eep.search import Fitness, parents_within, search
from moeprune_ext.eep.settings import EepSettings, Rates

EXPERTS = {1: 8, 2: 8, 5: 8, 6: 8}
USEFULNESS = {layer: np.random.default_rng(layer).permutation(8) for layer in EXPERTS}
MASKS = [{layer: [0, 1, 2] for layer in EXPERTS}, {layer: [3, 5, 7] for layer in EXPERTS}]
GROUPED = [{layer: [1, 6] for layer in EXPERTS}]  # an expert of each half
SETTINGS = dict(masks=MASKS, start_count=5, prune_iters=12, merge_iters=14)


RATES = {field.name for field in dataclasses.fields(Rates)}
OPTIONS = {field.name for field in dataclasses.fields(EepSettings)} - {"layer_groups", "rates"}


def groups_of(candidate):
    """{W_EM and W_RM as a merge: the layers that share it}."""
    groups = {}
    for layer, merge in candidate.merges.items():
        groups.setdefault(id(merge), (merge, []))[1].append(layer)
    return list(groups.values())


def matrices(candidate):
    merges = [merge for merge, _ in groups_of(candidate)]
    return [*(merge.experts for merge in merges), *(merge.router for merge in merges)]


def same_rows(candidate):
    """What tells a candidate from others: its rows, in any order."""
    rows = []
    for layer, merge in candidate.merges.items():
        pairs = zip(merge.experts.numpy(), merge.router.numpy(), strict=True)
        rows.append((layer, tuple(sorted(a.tobytes() + b.tobytes() for a, b in pairs))))
    return tuple(rows)


def told(outcome):
    """An outcome as what can be compared."""
    return dataclasses.replace(outcome, pruned=same_rows(outcome.pruned), best=same_rows(outcome.best))


def usefulness(candidates):
    """A separable fitness: every expert has a value, and a matrix scores what its columns hold of it, in [0, 1]."""
    return [
        Fitness(
            float(np.mean([m.experts.numpy().sum(0) @ USEFULNESS[g[0]] / 21 for m, g in groups_of(c)])),
            float(c.merges[min(c.merges)].router[:, 0].sum()),
        )
        for c in candidates
    ]


def run(evaluate, num_experts, keep, *, layer_groups=None, n_group=None, **options):
    """A search whose layout, settings and rates are named together."""
    rates = Rates(**{name: options.pop(name) for name in RATES & options.keys()})
    settings = EepSettings(rates=rates, **{name: options.pop(name) for name in OPTIONS & options.keys()})
    return search(evaluate, Layout.of(num_experts, keep, layer_groups, n_group), settings, **options)


def search_usefulness(evaluate=usefulness, **changes):
    return run(evaluate, **{"num_experts": EXPERTS, "keep": 3, **SETTINGS, **changes})


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
        if any(a is b for a, b in zip(matrices(candidate), matrices(other), strict=True))
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
    result = run(asked, layers, 5, starts="random", start_count=6, normalize=0, **settings)
    start, *children = asked.calls
    found = [ancestors(child, start) for call in children for child in call]
    assert set().union(*found) == parents
    crossed = settings.get("cross") == 1
    assert all(len(places) == (2 if crossed else 1) for places in found)
    assert {record["phase"] for record in result.history[1:]} == {phase}


def test_merge_children_cross_and_are_normalised_as_often_as_they_should():
    asked = Recorder(lambda cs: [Fitness(0.5 if len(asked.calls) == 1 else 0.1) for _ in cs])
    options = dict(starts="random", start_count=10, prune_iters=10, merge_iters=600, tie_break=None)
    run(asked, dict.fromkeys(range(12), 20), 5, change=1, touch_mapping=0, **options)
    start, *children = asked.calls
    merged = [child for call in children for child in call]
    assert np.mean([len(ancestors(child, start)) == 2 for child in merged]) == pytest.approx(0.3, abs=0.06)
    unit_sums = [
        all(np.allclose(merge.experts.sum(1), 1, atol=1e-5) for merge, _ in groups_of(child)) for child in merged
    ]
    assert np.mean(unit_sums) == pytest.approx(0.1, abs=0.04)


def test_of_equal_scores_only_the_best_by_tie_has_children():
    ties = [None, -3.0, -1.0, math.nan, -2.0, -4.0]

    def found(tie_break):
        asked = Recorder(
            lambda cs: [Fitness(0.25, t) for t in ties] if len(asked.calls) == 1 else [Fitness(0.0) for _ in cs]
        )
        layers = dict.fromkeys(range(12), 50)
        options = dict(starts="random", start_count=6, prune_iters=40, merge_iters=0, tie_break=tie_break)
        result = run(asked, layers, 5, **options)
        start, *children = asked.calls
        best = next(i for i, candidate in enumerate(start) if candidate is result.best)
        return set().union(*(ancestors(c, start) for call in children for c in call)), best

    assert found("log_likelihood") == ({2}, 2)
    assert found(None) == (set(range(6)), 0)


# ---- the search


def test_the_best_mask_of_a_separable_fitness_is_found():
    result = search_usefulness(prune_iters=600, merge_iters=0, start_count=30, starts="random")
    assert result.best is result.pruned
    assert ec.kept_by(result.best) == {
        layer: sorted(np.argsort(values)[-3:].tolist()) for layer, values in USEFULNESS.items()
    }
    assert result.train == result.pruned_train and result.train.score == pytest.approx((7 + 6 + 5) / 21)


def test_merging_improves_on_the_best_mask():
    target = np.random.default_rng(0).dirichlet(np.ones(6), (2, 3))

    def evaluate(candidates):
        return [
            Fitness(
                1
                - float(
                    sum(((m.experts.numpy() - t) ** 2).sum() for (m, _), t in zip(groups_of(c), target, strict=True))
                    / 12
                )
            )
            for c in candidates
        ]

    result = run(evaluate, {0: 6, 1: 6}, 3, starts="random", merge_iters=600)
    assert ec.is_mask(result.pruned) and not ec.is_mask(result.best)
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
    result = run(asked, EXPERTS, 3, masks=MASKS)
    assert [len(call) for call in asked.calls] == [30, 4, 4, 2] + [4] * 40
    assert result.evaluations == 200 == len(set(map(same_rows, asked.candidates)))
    assert all(map(ec.is_mask, asked.candidates[:40])) and not any(map(ec.is_mask, asked.candidates[40:]))
    assert [r["evaluated"] for r in result.history] == [len(call) for call in asked.calls]
    assert [r["phase"] for r in result.history] == ["start"] + ["prune"] * 3 + ["merge"] * 40
    assert result.history[-1]["evaluations"] == 200 and result.history[-1]["best"] == result.train.score
    bests = [r["best"] for r in result.history]
    assert bests == sorted(bests)


def test_the_published_loop_makes_one_child_at_a_time():
    asked = Recorder()
    run(asked, EXPERTS, 3, starts="random", tie_break=None, per_call=1)
    assert [len(call) for call in asked.calls] == [30] + [1] * 170


def test_defaults_are_the_published_numbers():
    assert (EepSettings().prune_iters, EepSettings().merge_iters) == (40, 160)
    published = dict(start_count=30, touch=0.25, redraw=0.15, touch_merging=0.25)
    published |= dict(touch_mapping=0.25, cross=0.3, from_first=0.6, change=0.25, scale=0.065, normalize=0.1)
    published |= dict(mutate_within=3.0, cross_within=1.0)
    assert dataclasses.asdict(EepSettings().rates) == {**published, "rerank": 5}
    for operator in (ec.mutate_mask, ec.merge_child):
        assert inspect.signature(operator).parameters["rates"].default == EepSettings().rates


def test_given_masks_are_the_first_starts_and_random_ones_the_rest():
    with_masks, without = Recorder(), Recorder()
    doubled = [*MASKS, MASKS[0]]
    search_usefulness(with_masks, masks=doubled)
    search_usefulness(without, starts="random")
    assert list(map(ec.kept_by, with_masks.calls[0][:2])) == MASKS
    assert len(with_masks.calls[0]) == len(without.calls[0]) == 5
    assert list(map(same_rows, with_masks.calls[0][3:])) == list(map(same_rows, without.calls[0][3:]))
    assert MASKS[0] not in list(map(ec.kept_by, without.calls[0]))
    few = Recorder()
    search_usefulness(few, masks=doubled, prune_iters=1, merge_iters=0)
    assert [list(map(ec.kept_by, call)) for call in few.calls] == [[MASKS[0]]]


def test_a_space_smaller_than_the_budget_is_searched_once():
    asked = Recorder(lambda cs: [Fitness(ec.kept_by(c)[0][0] / 4) for c in cs])
    result = run(asked, {0: 3}, 2, starts="random", merge_iters=0)
    assert len(asked.candidates) == 3 == result.evaluations and ec.kept_by(result.best) == {0: [1, 2]}
    assert all(asked.calls)


def test_layers_of_a_group_share_their_matrices():
    groups = [[5, 1], [6, 2]]
    asked = Recorder()
    search_usefulness(asked, layer_groups=groups)
    for candidate in asked.candidates:
        assert [layers for _, layers in groups_of(candidate)] == [[1, 5], [2, 6]]
        assert list(candidate.merges) == [1, 2, 5, 6]


def test_every_mask_respects_the_groups_of_routers():
    asked = Recorder()
    n_group = {1: 2, 2: 1, 5: 2, 6: 1}
    search_usefulness(asked, keep=2, masks=GROUPED, n_group=n_group, prune_iters=30, merge_iters=0)
    halves = {layer: {sum(e < 4 for e in ec.kept_by(c)[layer]) for c in asked.candidates} for layer in EXPERTS}
    assert halves[1] == halves[5] == {1} and halves[2] == halves[6] == {0, 1, 2}


def test_layers_may_keep_different_numbers():
    keep = {1: 1, 2: 8, 5: 3, 6: 4}
    result = run(usefulness, EXPERTS, keep, **{**SETTINGS, "starts": "random"})
    assert {layer: len(ids) for layer, ids in ec.kept_by(result.pruned).items()} == keep


def test_a_candidate_without_a_finite_score_is_the_worst():
    def evaluate(candidates):
        finite = usefulness(candidates)
        return [Fitness(bad, 9.0) if i % 2 else one for i, (one, bad) in enumerate(zip(finite, [math.inf] * 99))]  # noqa: B905

    result = search_usefulness(evaluate)
    assert math.isfinite(result.train.score) and sum(r["non_finite"] for r in result.history) == 2 + 7 // 2 + 7
    with pytest.raises(ValueError, match="no candidate had a finite score"):
        search_usefulness(lambda cs: [Fitness(math.nan) for _ in cs])


def test_same_seed_same_outcome_and_another_seed_another_search():
    assert told(search_usefulness(seed=3)) == told(search_usefulness(seed=3))
    assert search_usefulness(seed=4).history != search_usefulness(seed=3).history


# ---- splits


def test_the_best_on_train_are_ranked_again_on_valid():
    train, validate = Recorder(), Recorder(lambda cs: [Fitness(-f.score, f.tie) for f in usefulness(cs)])
    result = search_usefulness(train, validate=validate, rerank=3)
    (finalists,) = validate.calls
    ranked = [
        sorted(part, key=lambda c: -usefulness([c])[0].score) for part in (train.candidates[:12], train.candidates[12:])
    ]
    assert sorted(map(same_rows, finalists)) == sorted(same_rows(c) for part in ranked for c in part[:3])
    assert result.pruned is ranked[0][2]  # the worst of the finalists on train
    assert result.best is min(finalists, key=lambda c: usefulness([c])[0].score)
    assert result.valid.score == -result.train.score and result.pruned_valid.score == -result.pruned_train.score


def test_equal_candidates_on_valid_are_ordered_by_train_and_not_finite_ones_are_last():
    equal = search_usefulness(validate=lambda cs: [Fitness(0.5) for _ in cs])
    assert same_rows(equal.best) == same_rows(search_usefulness().best) and equal.valid == Fitness(0.5)
    last = Recorder(lambda cs: [Fitness(math.nan)] * (len(cs) - 1) + [Fitness(0.1)])
    assert search_usefulness(validate=last).best is last.calls[0][-1]
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
            assert told(search_usefulness(asked, out=tmp_path)) == told(whole)
            assert [len(call) for call in asked.calls] == [r["evaluated"] for r in whole.history[kept:]]
            assert history.read_text() == "".join(lines)


@pytest.mark.parametrize("moment", range(7))
def test_a_search_that_died_in_an_evaluation_is_taken_up(tmp_path, moment):
    with pytest.raises(RuntimeError, match="killed"):
        search_usefulness(Recorder(until=moment), out=tmp_path)
    assert told(search_usefulness(out=tmp_path)) == told(search_usefulness())


@pytest.mark.parametrize("first", [0, 1, 8, 14])
def test_a_finished_search_can_be_extended_and_shortened(tmp_path, first):
    search_usefulness(merge_iters=first, out=tmp_path)
    asked = Recorder()
    longer = search_usefulness(asked, merge_iters=23, out=tmp_path)
    assert told(longer) == told(search_usefulness(merge_iters=23))
    assert len(asked.candidates) == 23 - first
    assert told(search_usefulness(merge_iters=first, out=tmp_path)) == told(search_usefulness(merge_iters=first))


def test_scores_that_are_not_finite_survive_the_journal(tmp_path):
    def evaluate(candidates):
        values = (math.nan, math.inf, -math.inf)
        return [Fitness(values[i % 3], values[i % 2]) if i % 4 else one for i, one in enumerate(usefulness(candidates))]

    whole = search_usefulness(evaluate, out=tmp_path)
    json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert told(search_usefulness(Recorder(until=0), out=tmp_path)) == told(whole)


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


def test_the_settings_say_that_it_is_eeps_beside_how_candidates_are_scored(tmp_path):
    search_usefulness(identity={"method": "layer sweep"}, out=tmp_path)
    settings = json.loads((tmp_path / "search.json").read_text())
    assert settings["search"] == "eep" and settings["method"] == "layer sweep"


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
        ({"keep": 2, "masks": GROUPED, "n_group": dict.fromkeys(EXPERTS, 2)}, "cannot be merged: use merge_iters=0"),
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
    with pytest.raises(ValueError, match=message):
        search_usefulness(asked, **change, out=tmp_path / "run")
    assert not asked.calls and not (tmp_path / "run").exists()


def test_an_evaluation_that_answers_too_few_is_an_error():
    with pytest.raises(ValueError, match="5 candidates were to be scored, the evaluation returned 4"):
        search_usefulness(lambda cs: usefulness(cs)[:-1])
