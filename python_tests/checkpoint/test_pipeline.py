"""Every family the papers prune: mask, prune, export, reload, and the same numbers each way."""

import copy
import dataclasses
import importlib

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.models.moe import MoeModel, find_moe_layers
from moeprune_ext.models.slicing import check_slicing

FAMILIES = sorted(CONFIGS)


def uneven_counts(shapes):
    """0, 2, 4, 0, ... experts pruned: multiples of every group size, different between layers."""
    return {layer: (0, 2, 4)[i % 3] for i, layer in enumerate(shapes)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model = tiny_model(request.param)
    stats = mp.calibrate(model, [random_tokens()])
    return request.param, model, stats


@pytest.fixture(scope="module")
def plans(family):
    _, _, stats = family
    scores = mp.score_experts(stats, "reap")
    return {
        "uniform": mp.uniform_plan(scores, 0.5),
        "uneven": mp.PruningPlan.from_pruned_counts(scores, uneven_counts(scores)),
    }


def test_statistics_are_what_the_layer_computes(family):
    """The moments rebuild the experts' own output: sum over pairs of g * f is the layer's result."""
    name, model, stats = family
    tokens = random_tokens()
    seen = {}
    hooks = [
        layer.experts.register_forward_hook(
            lambda _, inputs, output, i=index: seen.__setitem__(i, (*inputs[:3], output.clone()))
        )
        for index, layer in find_moe_layers(model).items()
    ]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    for index, layer in find_moe_layers(model).items():
        hidden, ids, gates, _ = seen[index]
        expected = torch.zeros_like(stats.moments[index])
        for token in range(len(hidden)):
            for k in range(ids.shape[1]):
                one = torch.ones(1, 1)
                with torch.no_grad():
                    output = layer.experts(hidden[token : token + 1], ids[token : token + 1, k : k + 1], one)
                g, f = gates[token, k].double(), output.double().norm()
                powers = torch.stack([g**a * f**b for a in range(3) for b in range(3)])
                expected[ids[token, k]] += powers.view(3, 3)
        torch.testing.assert_close(stats.moments[index], expected, rtol=1e-4, atol=1e-6)


def test_calibration_leaves_the_model_as_it_was(family):
    _, model, _ = family
    tokens = random_tokens(seed=5)
    before = logits_of(model, tokens)
    mp.calibrate(model, [tokens])
    assert torch.equal(logits_of(model, tokens), before)


def test_masked_model_computes_what_the_pruned_model_computes(family, plans):
    _, model, _ = family
    tokens = random_tokens(seed=2)
    full = logits_of(model, tokens)
    for plan in plans.values():
        pruned = copy.deepcopy(model)
        mp.prune_(pruned, plan)
        with mp.applied(model, plan):
            masked = logits_of(model, tokens)
        torch.testing.assert_close(masked, logits_of(pruned, tokens), rtol=0, atol=1e-5)
        assert not torch.allclose(masked, full, atol=1e-3)
        assert torch.equal(logits_of(model, tokens), full), "the mask must come off"
        kept = {index: layer.shape.num_experts for index, layer in find_moe_layers(pruned).items()}
        assert kept == {index: len(ids) for index, ids in plan.kept.items()}


@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_score_equals_exported_checkpoint(family, plans, kind, tmp_path):
    name, model, _ = family
    plan = plans[kind]
    model.save_pretrained(tmp_path / "full")
    out = mp.export(tmp_path / "full", plan, tmp_path / "pruned")
    # a uniform plan gives a stock checkpoint, which loads with no help from us
    reloaded = AutoModelForCausalLM.from_pretrained(out) if kind == "uniform" else mp.load(out)
    tokens = random_tokens(seed=3)
    evaluator = mp.CandidateEvaluator(model, [tokens])
    score = evaluator.evaluate([plan], ("esap", "kl_pq", "nll"))[0]
    p, q = logits_of(model, tokens).flatten(0, 1), logits_of(reloaded, tokens).flatten(0, 1)
    direct = mp.reference.overlap(p.double(), q.double(), metrics=("esap", "kl_pq"))
    assert score.esap == pytest.approx(float(direct["esap"].mean()), abs=1e-5)
    assert score.kl_pq == pytest.approx(float(direct["kl_pq"].mean()), abs=1e-5)
    nll = torch.nn.functional.cross_entropy(logits_of(reloaded, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert score.nll == pytest.approx(float(nll), abs=1e-5)


def test_merged_experts_are_averages_wherever_a_plan_is_carried_out(family, plans, tmp_path):
    """Under a mask, pruned in memory, exported and in the evaluator, whether stored one by one or stacked."""
    _, model, _ = family
    uneven = plans["uneven"]
    first = next(layer for layer, count in uneven.pruned_counts.items() if count)
    gone = next(e for e in range(8) if e not in uneven.kept[first])
    into, other = uneven.kept[first][:2]
    average = Merge.averages(uneven.kept[first], {into: {into: 0.6, gone: 0.3, other: 0.1}}, 8)
    plan = dataclasses.replace(uneven, merges={first: average})
    tokens = random_tokens(seed=6)
    full = logits_of(model, tokens)
    with mp.applied(model, plan):
        merged = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), full), "the weights must come back"
    with mp.applied(model, uneven):
        assert not torch.allclose(logits_of(model, tokens), merged, atol=1e-3)

    pruned = copy.deepcopy(model)
    mp.prune_(pruned, plan)
    weights, before = (find_moe_layers(m)[first].experts.down_proj for m in (pruned, model))
    expected = 0.6 * before[into] + 0.3 * before[gone] + 0.1 * before[other]
    torch.testing.assert_close(weights[uneven.kept[first].index(into)], expected)
    torch.testing.assert_close(logits_of(pruned, tokens), merged, rtol=0, atol=1e-5)

    plan.save(tmp_path / "plan.json")
    model.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    reloaded = mp.load(mp.export(tmp_path / "full", mp.PruningPlan.load(tmp_path / "plan.json"), tmp_path / "out"))
    torch.testing.assert_close(logits_of(reloaded, tokens), merged, rtol=0, atol=1e-5)
    direct = mp.reference.overlap(full.flatten(0, 1).double(), merged.flatten(0, 1).double())["esap"].mean()
    scores = mp.CandidateEvaluator(model, [tokens]).evaluate([uneven, plan])
    assert scores[1].esap == pytest.approx(float(direct), abs=1e-5) != scores[0].esap


def test_reloaded_uneven_model_can_be_calibrated_scored_searched_and_exported_again(family, plans, tmp_path):
    name, model, _ = family
    model.save_pretrained(tmp_path / "full")
    mp.export(tmp_path / "full", plans["uneven"], tmp_path / "once")
    reloaded = mp.load(tmp_path / "once")
    assert isinstance(reloaded, type(model))
    stats = mp.calibrate(reloaded, [random_tokens()])
    assert {layer: len(t) for layer, t in stats.moments.items()} == {i: len(k) for i, k in plans["uneven"].kept.items()}
    scores = mp.score_experts(stats, "man")
    evaluator = mp.CandidateEvaluator(reloaded, [random_tokens(seed=4)])
    again = mp.evolve(evaluator, scores, 0.25, population=4, generations=2, elites=1).plan
    mp.export(tmp_path / "once", again, tmp_path / "twice")
    twice = mp.load(tmp_path / "twice")
    score = evaluator.evaluate([again])[0].esap
    tokens = random_tokens(seed=4)
    p, q = logits_of(reloaded, tokens).flatten(0, 1), logits_of(twice, tokens).flatten(0, 1)
    assert score == pytest.approx(float(mp.reference.overlap(p.double(), q.double())["esap"].mean()), abs=1e-5)


def test_bfloat16_score_agrees_with_bfloat16_checkpoint(family, plans, tmp_path):
    family[1].save_pretrained(tmp_path / "full")
    model = mp.load(tmp_path / "full", dtype=torch.bfloat16)  # not .bfloat16(), which rounds rotary tables too
    tokens = random_tokens(seed=3)
    evaluator = mp.CandidateEvaluator(model, [tokens])
    for kind, plan in plans.items():
        mp.export(tmp_path / "full", plan, tmp_path / kind)
        reloaded = mp.load(tmp_path / kind, dtype=torch.bfloat16)
        p, q = logits_of(model, tokens).flatten(0, 1), logits_of(reloaded, tokens).flatten(0, 1)
        direct = float(mp.reference.overlap(p.double(), q.double())["esap"].mean())
        assert evaluator.evaluate([plan])[0].esap == pytest.approx(direct, abs=1e-3)


def test_fingerprint_survives_dtypes_and_tells_models_apart(family, tmp_path):
    name, model, _ = family
    fingerprint = MoeModel.of(model).fingerprint
    assert MoeModel.of(copy.deepcopy(model).bfloat16()).fingerprint == fingerprint
    assert MoeModel.of(copy.deepcopy(model).half()).fingerprint == fingerprint
    assert MoeModel.of(tiny_model(name, seed=1)).fingerprint != fingerprint


def test_a_plan_for_another_expert_count_is_refused(tmp_path):
    model = tiny_model("olmoe")
    plan = mp.PruningPlan.from_pruned_counts({layer: [0.1, 0.2, 0.3, 0.4] for layer in range(4)}, {0: 1})
    for attempt in (
        lambda: mp.CandidateEvaluator(model, [random_tokens()]).evaluate([plan]),
        lambda: mp.prune_(model, plan),
    ):
        with pytest.raises(ValueError, match="made for 4 experts, the model has 8"):
            attempt()


def test_a_search_result_stands_for_its_plan(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]))
    result = mp.evolve(evaluator, scores, 0.5, population=4, generations=1, elites=1)
    pruned = mp.load(mp.export(tmp_path / "full", result, tmp_path / "pruned"))
    with mp.applied(model, result):
        masked = logits_of(model, random_tokens())
    torch.testing.assert_close(masked, logits_of(pruned, random_tokens()), rtol=0, atol=1e-5)


def test_a_failure_on_the_way_leaves_no_merged_weight_behind(monkeypatch):
    model = tiny_model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {layer: list(range(8)) for layer in range(4)}
    average = Merge.averages(list(range(8)), {0: {0: 0.5, 1: 0.5}}, 8)
    plan = mp.PruningPlan(kept, dict.fromkeys(kept, 8), merges=dict.fromkeys(kept, average))
    merging = importlib.import_module("moeprune_ext.models.merging")
    calls, real = [], merging.combined

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) % 4 == 3:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(merging, "combined", failing)

    def run_applied():
        with mp.applied(model, plan):
            model(random_tokens())

    for attempt in (lambda: mp.prune_(model, plan), run_applied):
        with pytest.raises(MemoryError):
            attempt()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_two_stacks_of_experts_are_not_mixed():
    model, other = tiny_model("olmoe"), tiny_model("olmoe")
    model.model.layers[1].mlp = torch.nn.Identity()  # a dense layer
    model.model.tower = torch.nn.Module()
    model.model.tower.layers = torch.nn.ModuleList([torch.nn.Identity(), other.model.layers[1]])
    with pytest.raises(ValueError, match="several stacks"):
        find_moe_layers(model)


@pytest.mark.parametrize("fault", ["ids", "weights", "choice"])
def test_a_router_that_slices_into_something_else_is_refused(fault, monkeypatch):
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    check_slicing(layers)
    router = type(layers[0].router)
    forward = router.forward

    def wrong(self, hidden):
        logits, weights, ids = forward(self, hidden)
        if logits.shape[-1] < 8:  # sliced
            if fault == "ids":
                ids = (ids + 1) % logits.shape[-1]
            elif fault == "weights":
                weights = torch.cat([weights[:, :1], 2 * weights[:, 1:]], -1)
            else:
                ids = logits.topk(2, largest=False).indices
        return logits, weights, ids

    monkeypatch.setattr(router, "forward", wrong)
    with pytest.raises(ValueError, match="slicing does not mask"):
        check_slicing(layers)


def test_teacher_scores_itself_perfectly(family):
    _, model, stats = family
    scores = mp.score_experts(stats, "frequency")
    nothing = mp.PruningPlan.from_pruned_counts(scores, {})
    score = mp.CandidateEvaluator(model, [random_tokens()]).evaluate([nothing], ("esap", "kl_pq", "top1_agree"))[0]
    assert score.esap == pytest.approx(1, abs=1e-6)
    assert score.kl_pq == pytest.approx(0, abs=1e-6)
    assert score.top1_agree == 1


def test_vocabulary_is_checked():
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="vocabulary"):
        mp.calibrate(model, [torch.full((1, 4), VOCABULARY)])
