"""Similar experts are told apart from independent ones, and the budget is spent where they are."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeprune_ext as mp
from moeprune_ext.criteria import ExpertScores
from moeprune_ext.data import as_batches
from moeprune_ext.grape import expert_similarity, grape, plan_from_similarity
from moeprune_ext.masking import check_plan
from moeprune_ext.memory import peak_bytes
from moeprune_ext.moe import LayerShape, expert_tensors, find_moe_layers
from moeprune_ext.plan import uniform_counts
from moeprune_ext.samples import sample_layers
from moeprune_ext.streaming import load_streamed

module = importlib.import_module("moeprune_ext.grape")  # `moeprune_ext.grape` may be the function

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


def rotation(size, seed=0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def make_twins(layer, pairs, turn=None):
    """Expert j of every pair becomes a copy of i, with outputs rotated and three times as large if there is a turn."""
    for place in expert_tensors(layer):
        tensor = getattr(place.owner, place.name)
        for i, j in pairs:
            tensor[j] = tensor[i]
            if turn is not None and place.name.startswith("down"):
                along = 0 if place.name == "down_proj" and not layer.experts.is_transposed else tensor.ndim - 2
                tensor[j] = 3 * torch.tensordot(tensor[i], turn, dims=([along], [0])).movedim(-1, along)


def outputs_of(layer, hidden):
    """[E, n, H], by the experts' own forward, one expert at a time."""
    ones = torch.ones(len(hidden), 1)
    experts = range(layer.shape.num_experts)
    return torch.stack([layer.experts(hidden, torch.full((len(hidden), 1), e), ones) for e in experts])


def unbiased_hsic(x, y):
    """Song et al. 2012, equation 5, of linear kernels."""
    n = len(x)
    k, m = (z @ z.T - torch.diag((z @ z.T).diagonal()) for z in (x, y))
    one = torch.ones(n, dtype=x.dtype)
    cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return ((k @ m).trace() + cross) / (n * (n - 3))


def direct_cka(x, y):
    x, y = x.double(), y.double()
    return unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()


@pytest.fixture
def similarity_of(monkeypatch):
    """The similarity of experts whose outputs [8, 48, H] are given."""
    model = tiny_model("olmoe").requires_grad_(False)

    def similarity(outputs):
        monkeypatch.setattr(module, "expert_outputs", lambda layer, hidden: iter(outputs))
        return expert_similarity(model, [random_tokens(2, 24)], tokens=EVERY)[0]

    return similarity


# ---- samples


def test_a_sample_is_what_router_and_experts_are_given(family):
    layers = find_moe_layers(family)
    seen = {}
    hooks = [
        layer.experts.register_forward_hook(lambda _, given, __, i=i: seen.__setitem__(i, given[:3]))
        for i, layer in layers.items()
    ]
    family(random_tokens(), use_cache=False)
    for hook in hooks:
        hook.remove()
    samples = sample_layers(family, layers, as_batches([random_tokens()]), EVERY)
    some = sample_layers(family, layers, as_batches([random_tokens()]), 10, seed=3)
    for index, layer in layers.items():
        sample = samples[index]
        for found, expected in zip((sample.hidden, sample.expert_ids, sample.weights), seen[index], strict=True):
            assert torch.equal(found, expected)
        assert sample.router_input is sample.hidden
        rows = [int((sample.hidden == row).all(-1).nonzero()[0]) for row in some[index].hidden]
        assert len(set(rows)) == 10 and rows == sorted(rows)
        assert torch.equal(layer.router(some[index].router_input)[2], some[index].expert_ids)
    assert all(torch.equal(samples[i].hidden[rows], some[i].hidden) for i in layers), (
        "the same positions in every layer"
    )


def test_the_sample_does_not_depend_on_batching_or_padding(family):
    tokens = random_tokens(3, 20)
    padded = torch.zeros(3, 26, dtype=torch.int64)
    padded[:, 4:24] = tokens
    mask = torch.zeros(3, 26)
    mask[:, 4:24] = 1
    layers = find_moe_layers(family)
    ways = [[tokens], [tokens[:1], tokens[1:]], [{"input_ids": padded, "attention_mask": mask}]]
    found = [sample_layers(family, layers, as_batches(way), 16, seed=1) for way in ways]
    for other in found[1:]:
        for index, sample in found[0].items():
            assert len(sample.hidden) == 16
            torch.testing.assert_close(other[index].hidden, sample.hidden, rtol=1e-4, atol=1e-4)


# ---- similarity


def test_similarity_is_the_unbiased_cka_of_outputs(family):
    found = expert_similarity(family, [random_tokens()], tokens=EVERY)
    layers = find_moe_layers(family)
    assert list(found) == list(layers)
    samples = sample_layers(family, layers, as_batches([random_tokens()]), EVERY)
    for index, layer in layers.items():
        outputs, table = outputs_of(layer, samples[index].hidden), found[index]
        assert table.dtype == torch.float64 and torch.equal(table, table.T) and bool((table.diagonal() == 1).all())
        for i, j in ((0, 1), (2, 7), (5, 4)):
            assert float(table[i, j]) == pytest.approx(float(direct_cka(outputs[i], outputs[j])), abs=1e-5)


def test_independent_outputs_have_no_similarity_where_the_biased_estimator_sees_much(similarity_of):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(8, 48, 512, generator=generator)
    found = similarity_of(outputs)
    off_diagonal = found[~torch.eye(8, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 0.1
    x, y = (outputs[e] - outputs[e].mean(0) for e in (0, 1))
    biased = (x @ x.T * (y @ y.T)).sum() / ((x @ x.T).norm() * (y @ y.T).norm())
    assert float(biased) > 0.8


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_offset_scale_and_rotation_do_not_matter(similarity_of, scale):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(48, 32, generator=generator)
    other = torch.randn(48, 32, generator=generator)
    copies = [one, scale * one, one @ rotation(32), one + 1000, other, scale * other, other + one, one.flip(0)]
    found = similarity_of(torch.stack(copies))
    assert float(found[0, :4].min()) > 1 - 1e-4 and float(found[4, 5]) > 1 - 1e-6
    assert 0.2 < float(found[4, 6]) < 0.9 and abs(float(found[0, 7])) < 0.2
    assert float(found[0, 4]) == pytest.approx(float(direct_cka(one, other)), abs=1e-5)


def test_dead_experts_are_alike_and_like_no_other(similarity_of):
    outputs = torch.randn(8, 48, 32, generator=torch.Generator().manual_seed(0))
    outputs[[2, 5]] = 0
    outputs[7] = torch.randn(32)  # the same for every token
    found = similarity_of(outputs)
    for dead in (2, 5, 7):
        assert [float(found[dead, e]) for e in range(8)] == [1.0 if e in (2, 5, 7) else 0.0 for e in range(8)]
    assert bool(torch.isfinite(similarity_of(torch.zeros(8, 48, 32))).all())


def test_order_of_the_data_does_not_matter_when_all_of_it_is_taken(family):
    rows = random_tokens(4, 16)
    one = expert_similarity(family, [rows], tokens=EVERY)
    other = expert_similarity(family, [rows[2:], rows[1:2], rows[:1]], tokens=EVERY)
    for layer, table in one.items():
        torch.testing.assert_close(other[layer], table, rtol=0, atol=1e-5)


def test_similarity_of_weights_is_their_cosine(family):
    layers = find_moe_layers(family)
    found = expert_similarity(family, None, similarity="weights")
    for index, layer in layers.items():
        rows = torch.cat([getattr(p.owner, p.name).flatten(1) for p in expert_tensors(layer)], 1).double()
        rows = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[index], rows @ rows.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cka", "weights"])
def test_the_model_is_left_as_it_was(family, similarity):
    family.train()
    before = {name: tensor.clone() for name, tensor in family.state_dict().items()}
    grape(family, [random_tokens()], dict.fromkeys(find_moe_layers(family), torch.ones(8)), 0.25, similarity=similarity)
    assert all(module.training for module in family.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.state_dict().items())
    assert not any("forward" in module.__dict__ for module in family.modules())


@pytest.mark.parametrize("source", ["host", "disk"])
@pytest.mark.parametrize("similarity", ["cka", "weights"])
def test_streamed_models_have_the_same_similarity(family, similarity, source, tmp_path):
    family.save_pretrained(tmp_path)
    batches = [random_tokens(), random_tokens(2, 17, seed=4)]
    expected = expert_similarity(family, batches, similarity=similarity, tokens=32)
    streamed = load_streamed(tmp_path, source=source)
    for layer, table in expert_similarity(streamed, batches, similarity=similarity, tokens=32).items():
        torch.testing.assert_close(table, expected[layer], rtol=0, atol=1e-6)
    assert streamed.moeprune_stream.peak_bytes == max(streamed.moeprune_stream.layer_bytes.values())


def test_bfloat16_models_have_nearly_the_same_similarity(family, tmp_path):
    family.save_pretrained(tmp_path)
    model = mp.load(tmp_path, dtype=torch.bfloat16)
    expected = expert_similarity(family, [random_tokens()], tokens=EVERY)
    for layer, table in expert_similarity(model, [random_tokens()], tokens=EVERY).items():
        torch.testing.assert_close(table, expected[layer], rtol=0, atol=0.1)


def test_no_tensor_holds_the_outputs_of_all_experts():
    sizes = dict(hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OlmoeConfig(**sizes, num_experts=64, num_experts_per_tok=2)).eval()
    tokens = random_tokens(1, 48)
    peak = peak_bytes(lambda: expert_similarity(model, [tokens], tokens=48), torch.device("cpu"))
    grams, outputs = 64 * 48 * 48 * 4, 64 * 48 * 256 * 4
    assert grams <= peak < grams + outputs / 4


# ---- plans


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
sys.path.insert(0, {str(Path(__file__).parent)!r})
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
