"""GRAPE: the budget is spent where experts are alike."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, random_tokens, rotation, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.budget import uniform_counts
from moeprune_ext.allocation.grape import expert_similarity, grape, plan_from_similarity
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import LayerShape
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.moe import expert_tensors, find_moe_layers

FAMILIES = sorted(CONFIGS)
EVERY = 10**6  # tokens: all there are
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny_model(request.param).requires_grad_(False)


def scores_of(values, shape=None, **kwargs):
    """Scores {layer: list}; every router keeps one expert unless `shape` says otherwise."""
    tensors = {layer: torch.tensor(v, dtype=torch.float64) for layer, v in values.items()}
    return ExpertScores(tensors, {layer: shape or LayerShape(len(v), 1) for layer, v in tensors.items()}, **kwargs)


def symmetric(table):
    table = torch.as_tensor(table, dtype=torch.float64)
    table = torch.triu(table, 1)
    return table + table.T + torch.eye(len(table), dtype=torch.float64)


def random_similarity(experts, seed, level=0.0):
    generator = torch.Generator().manual_seed(seed)
    return symmetric(level + 0.5 * torch.rand(experts, experts, generator=generator, dtype=torch.float64))


def clones(experts):
    return torch.ones(experts, experts, dtype=torch.float64)


def make_twins(layer, pairs, turn=None):
    """Expert j of every pair becomes a copy of i, with outputs rotated and three times as large if there is a turn."""
    for place in expert_tensors(layer):
        tensor = getattr(place.owner, place.name)
        for i, j in pairs:
            tensor[j] = tensor[i]
            if turn is not None and place.name.startswith("down"):
                along = 0 if place.name == "down_proj" and not layer.experts.is_transposed else tensor.ndim - 2
                tensor[j] = 3 * torch.tensordot(tensor[i], turn, dims=([along], [0])).movedim(-1, along)


def test_copies_of_experts_go_first(family):
    """One layer's experts are pairs of twins that differ in the scale and the direction of their outputs."""
    layers = find_moe_layers(family)
    chosen = list(layers)[1]
    make_twins(layers[chosen], PAIRS, rotation(32))
    generator = torch.Generator().manual_seed(0)
    scores = {index: torch.rand(8, generator=generator, dtype=torch.float64) for index in layers}
    similar = expert_similarity(family, [random_tokens()], tokens=EVERY)
    others = similar[chosen].clone()
    for i, j in PAIRS:
        assert float(others[i, j]) > 1 - 1e-5
        others[i, j] = others[j, i] = 0
    highest = max(float((table - torch.eye(8)).max()) for layer, table in similar.items() if layer != chosen)
    assert max(highest, float((others - torch.eye(8)).max())) < 0.99
    plan = grape(family, [random_tokens()], scores, 0.125, tokens=EVERY, entropy=0)
    budget = sum(
        uniform_counts(ExpertScores.wrap(scores, shapes={i: la.shape for i, la in layers.items()}), 0.125).values()
    )
    assert plan.pruned_counts[chosen] == min(4, budget) and sum(plan.pruned_counts.values()) == budget
    kept = set(plan.kept[chosen])
    for pair in PAIRS:
        worse, better = sorted(pair, key=lambda expert: float(scores[chosen][expert]))
        assert better in kept
        assert worse not in kept or budget < 4


@pytest.mark.parametrize("similarity", ["cka", "weights"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_plans_export_and_load_as_what_the_mask_computes(family, similarity, sparsity, tmp_path):
    family.save_pretrained(tmp_path / "full")
    tokens = random_tokens(seed=2)
    scores = mp.score_experts(mp.calibrate(family, [tokens]), "man")
    plan = grape(family, [tokens], scores, sparsity, similarity=similarity)
    assert plan.model == scores.model and plan.criterion == "man" and not plan.merged
    assert sum(plan.pruned_counts.values()) == sum(uniform_counts(scores, sparsity).values())
    exported = mp.load(mp.export(tmp_path / "full", plan, tmp_path / "out"))
    with torch.no_grad():
        with mp.applied(family, plan):
            expected = family(tokens, use_cache=False).logits
        torch.testing.assert_close(exported(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("entropy", [0, 0.9])
@pytest.mark.filterwarnings("ignore:the entropy guard")
def test_the_budget_is_met_exactly_and_groups_stay_equal(sparsity, groups, entropy):
    shape = LayerShape(16, 2, groups, min_kept=4)
    scores = scores_of({layer: torch.rand(16).tolist() for layer in (0, 2, 3)}, shape)
    similar = {layer: random_similarity(16, layer, level=0.2 * layer) for layer in scores}
    plan = plan_from_similarity(similar, scores, sparsity, entropy=entropy)
    assert sum(plan.pruned_counts.values()) == sum(uniform_counts(scores, sparsity).values())
    size = 16 // groups
    for kept in plan.kept.values():
        assert len(kept) >= 4
        assert len({sum(expert // size == group for expert in kept) for group in range(groups)}) == 1


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_plans_of_group_limited_routers_can_be_carried_out(name, sparsity):
    model = tiny_model(name)
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]))
    for entropy in (0, 0.9):
        check_plan(grape(model, [random_tokens()], scores, sparsity, entropy=entropy), find_moe_layers(model), None)


def test_groups_are_compared_by_the_mean_over_their_pairs():
    """By the nearest pair instead, 2 would join 0 and 1 before 3."""
    similar = symmetric([[0, 0.9, 0.1, 0], [0, 0, 0.8, 0], [0, 0, 0, 0.5], [0, 0, 0, 0]])
    scores = scores_of({0: [4, 3, 2, 1]})
    kept = {s: plan_from_similarity({0: similar}, scores, s).kept[0] for s in (0.25, 0.5, 0.74)}
    assert kept == {0.25: [0, 2, 3], 0.5: [0, 2], 0.74: [0]}


def test_all_layers_compete():
    scores = scores_of({0: [1, 2, 3, 4], 3: [1, 2, 3, 4]})
    similar = {0: symmetric([[0, 0.2, 0.2, 0.2]] * 4), 3: symmetric([[0, 0.3, 0.3, 0.3]] * 4)}
    assert plan_from_similarity(similar, scores, 0.25).kept == {0: [0, 1, 2, 3], 3: [2, 3]}


def test_the_highest_score_of_a_group_stays_and_ties_keep_the_lower_id():
    similar = {0: symmetric([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.9], [0, 0, 0, 0]])}
    assert plan_from_similarity(similar, scores_of({0: [1, 2, 5, 3]}), 0.5).kept[0] == [1, 2]
    assert plan_from_similarity(similar, scores_of({0: [1, 1, 1, 1]}), 0.5).kept[0] == [0, 2]


def test_equal_similarities_are_merged_in_the_order_of_layers_and_experts():
    scores = scores_of({0: [4, 3, 2, 1], 1: [4, 3, 2, 1]})
    plan = plan_from_similarity({0: clones(4), 1: clones(4)}, scores, 0.25, entropy=0)
    assert plan.kept == {0: [0, 3], 1: [0, 1, 2, 3]}


def test_the_guard_saves_a_layer_of_clones_from_being_emptied():
    scores = scores_of({layer: torch.rand(16).tolist() for layer in range(3)}, LayerShape(16, 2, min_kept=2))
    similar = {0: random_similarity(16, 0), 1: clones(16), 2: random_similarity(16, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = plan_from_similarity(similar, scores, 0.3, entropy=0).pruned_counts
        guarded = plan_from_similarity(similar, scores, 0.3).pruned_counts
    assert without[1] == 14 == scores.shapes[1].capacity
    assert guarded[1] == 6  # two removals per layer, when the guard first looks
    assert sum(without.values()) == sum(guarded.values()) == 15


def test_a_guard_that_freezes_everything_thaws_with_a_warning():
    scores = scores_of({0: [1.0] * 8, 1: [1.0] * 8})
    similar = {0: clones(8), 1: random_similarity(8, 0)}
    with pytest.warns(UserWarning, match="froze every layer after 11 of 12 steps"):
        plan = plan_from_similarity(similar, scores, 0.75, entropy=1)
    assert plan.pruned_counts == {0: 5, 1: 7}


def test_protected_experts_stay_and_never_share_a_group():
    scores = scores_of({0: range(8), 1: range(8)}).constrained(protect={0: [0, 1, 2]})
    plan = plan_from_similarity({0: clones(8), 1: random_similarity(8, 0)}, scores, 0.5, entropy=0)
    assert plan.kept[0] == [0, 1, 2] and plan.pruned_counts == {0: 5, 1: 3}
    bare = scores_of({0: range(8), 1: range(8)}, protected={0: frozenset({0, 1, 2})})
    assert plan_from_similarity({0: clones(8), 1: random_similarity(8, 0)}, bare, 0.5, entropy=0).kept == plan.kept


def test_minima_asked_for_are_kept():
    scores = scores_of({0: range(8), 1: range(8)}).constrained(min_kept=3)
    assert plan_from_similarity({0: clones(8), 1: random_similarity(8, 0)}, scores, 0.5, entropy=0).pruned_counts == {
        0: 5,
        1: 3,
    }


def test_merging_averages_a_group_by_its_scores():
    similar = {0: symmetric([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.9], [0, 0, 0, 0]]), 4: torch.eye(4)}
    values = {0: [1.0, 3.0, 0.0, 0.0], 4: [1.0, 1.0, 1.0, 1.0]}
    plan = plan_from_similarity(similar, scores_of(values), 0.25, merge=True)
    assert plan.merged == {0: {1: {0: 0.25, 1: 0.75}, 2: {2: 0.5, 3: 0.5}}}
    assert plan.kept == plan_from_similarity(similar, scores_of(values), 0.25).kept
    apart = scores_of(values).constrained(protect={0: [1]})
    assert plan_from_similarity(similar, apart, 0.25, merge=True).merged == {0: {2: {2: 0.5, 3: 0.5}}}
    with pytest.raises(ValueError, match="negative in layers"):
        plan_from_similarity(similar, scores_of(values | {4: [-1, 1, 1, 1]}), 0.25, merge=True)


def test_merged_twins_are_the_expert_they_were(tmp_path):
    model = tiny_model("olmoe").requires_grad_(False)
    layers = find_moe_layers(model)
    make_twins(layers[1], PAIRS)
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "frequency")
    plan = grape(model, [random_tokens()], scores, 0.125, tokens=EVERY, entropy=0, merge=True)
    assert list(plan.merged) == [1] and sorted(plan.merged[1]) == plan.kept[1]
    for expert, shares in plan.merged[1].items():
        assert set(shares) in map(set, PAIRS)
        for place in expert_tensors(layers[1]):
            tensor = getattr(place.owner, place.name)
            torch.testing.assert_close(sum(share * tensor[e] for e, share in shares.items()), tensor[expert])
    plan.save(tmp_path / "plan.json")
    assert mp.PruningPlan.load(tmp_path / "plan.json") == plan


def test_sixty_layers_of_256_experts_spend_the_budget():
    scores = scores_of({layer: torch.rand(256).tolist() for layer in range(60)}, LayerShape(256, 8, min_kept=8))
    plan = plan_from_similarity({layer: random_similarity(256, layer) for layer in scores}, scores, 0.5)
    assert sum(plan.pruned_counts.values()) == 60 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(similarity="cosine"), "unknown similarity 'cosine'; choose from cka, weights"),
        (dict(tokens=3), "at least 4 tokens"),
        (dict(entropy=1.5), "entropy is a share"),
        (dict(entropy=float("nan")), "entropy is a share"),
        (dict(sparsity=1.0), "at least 0 and below 1"),
        (dict(sparsity=0.9), "asks for"),
        (dict(batches=None), "no data"),
        (dict(batches=[torch.tensor([[5, 6, 7]])]), "the data has 3"),
        (dict(scores={0: torch.ones(8)}), "differ at layers"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_any_work(options, message, monkeypatch):
    model = tiny_model("olmoe")
    for part in (model, model.base_model):
        monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("it ran"))
    scores = {layer: torch.ones(8) for layer in range(4)}
    given = dict(batches=[random_tokens()], scores=scores, sparsity=0.25) | options
    with pytest.raises(ValueError, match=message):
        grape(model, **given)


def test_scores_of_another_model_are_refused():
    scores = mp.score_experts(mp.calibrate(tiny_model("olmoe", seed=1), [random_tokens()]))
    with pytest.raises(ValueError, match="made for another model"):
        grape(tiny_model("olmoe"), [random_tokens()], scores, 0.25)


def test_similarities_must_fit_the_scores():
    scores = scores_of({0: range(8), 1: range(8)})
    for similar, message in (
        ({0: clones(8)}, "similarities are of layers"),
        ({0: clones(8), 1: clones(7)}, "do not fit its 8 experts"),
        ({0: clones(8), 1: torch.full((8, 8), torch.nan)}, "finite and symmetric"),
        ({0: clones(8), 1: torch.arange(64.0).view(8, 8)}, "finite and symmetric"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_from_similarity(similar, scores, 0.25)
    uneven = ExpertScores(dict(scores), {0: LayerShape(8, 1), 1: LayerShape(8, 1, 2, min_kept=2)})
    with pytest.raises(ValueError, match="different numbers of router groups"):
        plan_from_similarity({0: clones(8), 1: clones(8)}, uneven, 0.25)


def test_broken_weights_are_named():
    model = tiny_model("olmoe").requires_grad_(False)
    find_moe_layers(model)[3].experts.down_proj[5] = torch.nan
    with pytest.raises(ValueError, match="expert 5 of layer 3 are NaN"):
        expert_similarity(model, [random_tokens()])


def test_processes_find_the_same_plan(tmp_path):
    script = tmp_path / "plan.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from moeprune_ext import distributed
from moeprune_ext.grape import grape
from moeprune_ext.naee import naee_plan
from tiny_models import random_tokens, tiny_model

distributed.join()
model, batches = tiny_model("olmoe"), [random_tokens(), random_tokens(2, 20, 4)]
plans = grape(model, batches, {{layer: torch.arange(8.0) for layer in range(4)}}, 0.25), naee_plan(model, batches, 0.25)
for number, plan in enumerate(plans):
    plan.save(f"{tmp_path}/{{distributed.world()[1]}}-{{distributed.world()[0]}}-{{number}}.json")
distributed.leave()
""")
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--max-restarts=1", script], env=environment, check=True, timeout=300)
    for number in (0, 1):
        alone, *others = ((tmp_path / f"{name}-{number}.json").read_text() for name in ("1-0", "2-0", "2-1"))
        assert others == [alone, alone]


def test_the_lowest_scores_may_leave_where_grape_says_how_many():
    torch.manual_seed(3)
    similarities = {layer: (m + m.T) / 2 for layer, m in ((i, torch.rand(8, 8, dtype=torch.float64)) for i in range(3))}
    scores = mp.ExpertScores.wrap({layer: torch.rand(8, dtype=torch.float64) for layer in range(3)})
    groups, lowest = (plan_from_similarity(similarities, scores, 0.5, who=who) for who in ("groups", "scores"))
    assert lowest.pruned_counts == groups.pruned_counts and lowest.kept != groups.kept
    assert lowest == mp.PruningPlan.from_pruned_counts(scores, groups.pruned_counts)
    with pytest.raises(ValueError, match="only groups can be merged"):
        plan_from_similarity(similarities, scores, 0.5, who="scores", merge=True)
    with pytest.raises(ValueError, match="unknown who"):
        plan_from_similarity(similarities, scores, 0.5, who="worst")
