"""The subset that naee keeps is the one whose masked layer, literally run, comes closest."""

import dataclasses
import importlib
from itertools import combinations

import pytest
import torch
from tiny_models import CONFIGS, random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.naee import naee_plan, naee_scores, naee_subsets
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import masked
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.routers import routed_layer

module = importlib.import_module("moeprune_ext.allocation.naee")

FAMILIES = sorted(CONFIGS)
EVERY = 10**6  # tokens: all there are


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny_model(request.param).requires_grad_(False)


def literal_errors(model, index, subsets):
    """{subset: norm of what the block's routed output lacks when the block itself is run under that mask}."""
    layer, found = find_moe_layers(model)[index], {}
    given = []
    hook = layer.block.register_forward_hook(lambda _, args, __: given.append(args[0]))
    model(random_tokens(), use_cache=False)
    hook.remove()
    hook = layer.experts.register_forward_hook(lambda _, __, output: given.append(output))
    layer.block(given[0])
    for subset in subsets:
        with masked(layer, subset):
            layer.block(given[0])
        found[subset] = float((given[-1] - given[1]).double().norm())
    hook.remove()
    return found


def subsets_of(shape, kept):
    size = shape.num_experts // shape.n_group
    groups = [range(start, start + size) for start in range(0, shape.num_experts, size)]
    subsets = combinations(range(shape.num_experts), kept)
    return [s for s in subsets if len({len(set(s) & set(group)) for group in groups}) == 1]


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_the_kept_subset_is_the_best_of_all_masked_layers(family, sparsity):
    plan = naee_plan(family, [random_tokens()], sparsity, tokens=EVERY)
    check_plan(plan, find_moe_layers(family), mp.calibrate(family, [random_tokens()]).model)
    assert plan.is_uniform and plan.sparsity == sparsity and plan.criterion == "naee"
    for index, layer in find_moe_layers(family).items():
        errors = literal_errors(family, index, subsets_of(layer.shape, len(plan.kept[index])))
        best = min(errors, key=errors.get)
        assert tuple(plan.kept[index]) == best, (errors[tuple(plan.kept[index])], errors[best])


def test_layers_may_lose_different_numbers():
    model = tiny_model("qwen3_moe")
    plan = naee_subsets(model, [random_tokens()], {0: 2, 1: 4, 3: 6})
    alone = {pruned: naee_plan(model, [random_tokens()], pruned / 8).kept for pruned in (2, 4, 6)}
    assert plan.kept == {0: alone[2][0], 1: alone[4][1], 2: list(range(8)), 3: alone[6][3]}
    with pytest.raises(ValueError, match="layer 1: cannot prune 7 of 8 experts"):
        naee_subsets(model, [random_tokens()], {1: 7})


def test_errors_of_masks_are_those_of_the_masked_layer(family, monkeypatch):
    """The numbers themselves, not only their order; with a sample, a part of them."""
    found = {}
    judge = module._eliminate
    monkeypatch.setattr(
        module, "_eliminate", lambda errors, *rest: found.setdefault(len(found), errors) and judge(errors, *rest)
    )
    naee_scores(family, [random_tokens()], tokens=EVERY)
    for (index, layer), errors in zip(find_moe_layers(family).items(), found.values(), strict=True):
        subsets = subsets_of(layer.shape, 6)
        masks = torch.zeros(len(subsets), 8, dtype=torch.bool).scatter_(1, torch.tensor(subsets), True)
        literal = torch.tensor(list(literal_errors(family, index, subsets).values()), dtype=torch.float64)
        torch.testing.assert_close(errors(masks).sqrt(), literal, rtol=1e-3, atol=1e-5)
        assert float(errors(torch.ones(1, 8, dtype=torch.bool))) == pytest.approx(0, abs=1e-8)


def test_elimination_takes_the_cheapest_step_every_time(family):
    """A step's choice is literally run; in group-limited routers every second choice, when groups are equal."""
    scores = naee_scores(family, [random_tokens()], tokens=EVERY)
    for index, layer in find_moe_layers(family).items():
        assert sorted(scores[index].tolist())[: layer.shape.capacity] == list(range(layer.shape.capacity))
        if layer.shape.n_group > 1:
            continue
        order = scores[index].argsort().tolist()
        for done in range(layer.shape.capacity):
            left = sorted(order[done:])
            smaller = {e: tuple(x for x in left if x != e) for e in left}
            errors = literal_errors(family, index, smaller.values())
            assert order[done] == min(left, key=lambda expert: errors[smaller[expert]])


def test_greedy_plans_are_prefixes_of_the_scores_order(family, monkeypatch):
    monkeypatch.setattr(module, "EXHAUSTIVE", 0)
    scores = naee_scores(family, [random_tokens()], tokens=20, seed=2)
    assert scores.criterion == "naee"
    for sparsity in (0.25, 0.5):
        plan = naee_plan(family, [random_tokens()], sparsity, tokens=20, seed=2)
        assert plan.kept == mp.uniform_plan(scores, sparsity).kept and plan.model == scores.model


def test_exhaustive_search_is_never_worse_than_greedy(family, monkeypatch):
    exhaustive = naee_plan(family, [random_tokens()], 0.5, tokens=EVERY)
    monkeypatch.setattr(module, "EXHAUSTIVE", 0)
    greedy = naee_plan(family, [random_tokens()], 0.5, tokens=EVERY)
    for index in exhaustive.kept:
        pair = [tuple(plan.kept[index]) for plan in (exhaustive, greedy)]
        errors = literal_errors(family, index, dict.fromkeys(pair))
        assert errors[pair[0]] <= errors[pair[1]] * (1 + 1e-4)


def test_experts_that_are_never_chosen_go_first():
    """Where the softmax is over the chosen experts; over all, one that is never chosen has its part in the others'."""
    model = tiny_model("gpt_oss").requires_grad_(False)
    for layer in find_moe_layers(model).values():
        layer.router.bias[[1, 4, 5]] = -1e4
    routed = mp.calibrate(model, [random_tokens()]).tokens_per_expert
    for index, values in naee_scores(model, [random_tokens()], tokens=EVERY).items():
        never = (routed[index] == 0).nonzero()[:, 0].tolist()
        assert {1, 4, 5} <= set(never)
        assert values.argsort().tolist()[: len(never)] == never[::-1], "of equals, the higher id"


def test_elimination_of_independent_costs_is_their_order():
    costs = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0, 2.0, 8.0, 7.0], dtype=torch.float64)

    def errors(masks):
        return ((~masks).double() * costs).sum(-1)

    assert module._eliminate(errors, LayerShape(8, 1), 7) == [1, 5, 3, 2, 0, 7, 6]
    assert module._eliminate(errors, LayerShape(8, 1, 2, min_kept=2), 6) == [1, 5, 3, 7, 2, 6]
    for pruned, gone in ((2, [1, 5]), (4, [1, 2, 3, 5])):
        assert module.least_missed(errors, LayerShape(8, 1), pruned) == gone
    assert module.least_missed(errors, LayerShape(8, 1, 2), 4) == [1, 3, 5, 7]  # 2 and 3 cost the same, 2 stays


@pytest.mark.parametrize("name", [f for f in FAMILIES if not f.startswith("deepseek")])
def test_sliced_routers_give_the_same_plan(name, monkeypatch):
    """Routers whose formula is not known are sliced for every mask."""
    model = tiny_model(name).requires_grad_(False)
    expected = naee_plan(model, [random_tokens()], 0.25)
    monkeypatch.setattr(module, "routed_layer", lambda layer, _: routed_layer(layer, "sliced"))
    assert naee_plan(model, [random_tokens()], 0.25) == expected


@pytest.mark.parametrize("source", ["host", "disk"])
def test_streamed_models_have_the_same_plan(family, source, tmp_path):
    family.save_pretrained(tmp_path)
    batches = [random_tokens(), random_tokens(2, 17, seed=4)]
    expected = naee_scores(family, batches, tokens=32)
    found = naee_scores(load_streamed(tmp_path, source=source), batches, tokens=32)
    assert all(torch.equal(values, expected[layer]) for layer, values in found.items())


def test_bfloat16_models_have_plans_nearly_as_good(family, tmp_path):
    family.save_pretrained(tmp_path)
    plan = naee_plan(mp.load(tmp_path, dtype=torch.bfloat16), [random_tokens()], 0.5, tokens=EVERY)
    for index, layer in find_moe_layers(family).items():
        errors = literal_errors(family, index, subsets_of(layer.shape, 4))
        assert errors[tuple(plan.kept[index])] <= 1.2 * min(errors.values())


def test_plans_export_and_load_as_what_the_mask_computes(family, tmp_path):
    family.save_pretrained(tmp_path / "full")
    tokens = random_tokens(seed=2)
    plan = naee_plan(family, [tokens], 0.5)
    exported = mp.load(mp.export(tmp_path / "full", plan, tmp_path / "out"))
    with torch.no_grad():
        with mp.applied(family, plan):
            expected = family(tokens, use_cache=False).logits
        torch.testing.assert_close(exported(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_requests_that_cannot_be_are_refused_before_any_work(monkeypatch):
    model = tiny_model("olmoe")
    for part in (model, model.base_model):
        monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("it ran"))
    for arguments, options, message in (
        (([random_tokens()], 1.0), {}, "at least 0 and below 1"),
        (([random_tokens()], 0.9), {}, "asks for"),
        (([random_tokens()], 0.5), dict(tokens=0), "at least 1"),
        (([], 0.5), {}, "no data"),
    ):
        with pytest.raises(ValueError, match=message):
            naee_plan(model, *arguments, **options)
    monkeypatch.setattr(module, "routed_layer", lambda layer, _: dataclasses.replace(routed_layer(layer), places=None))
    with pytest.raises(ValueError, match=r"OlmoeTopKRouter \(layer 0\) cannot be run on its own"):
        naee_scores(model, [random_tokens()])


def test_routers_whose_answer_is_changed_on_its_way_are_refused():
    model = tiny_model("olmoe").requires_grad_(False)
    block = find_moe_layers(model)[2].block
    block.experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], 2 * args[2]))
    with pytest.raises(ValueError, match=r"OlmoeTopKRouter \(layer 2\): its answer is not what the experts are given"):
        naee_plan(model, [random_tokens()], 0.25)
