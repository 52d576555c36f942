"""Candidates that merge experts and map routers: in a sweep, in whole forwards, and by the definition."""

import math

import every_model
import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.models.active import fewer_active
from moeprune_ext.models.apply import planned
from moeprune_ext.models.merging import MergedExperts, mapped_layer
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.scratch import Scratch

RENORMALISED = ["mixtral", "qwen3_moe", "gpt_oss"]
FAMILIES = [*RENORMALISED, "olmoe", "qwen2_moe"]  # mapped as section 4 of the method says, equal to masks if one-hot
E, KEPT = 8, 4


def one_hot(ids):
    return torch.nn.functional.one_hot(torch.tensor(ids), E).float()


def random_merge(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = sorted(torch.randperm(E, generator=generator)[:KEPT].tolist())
    noise = [0.2 * torch.rand(KEPT, E, generator=generator) for _ in range(2)]
    return Merge(one_hot(ids) + noise[0], one_hot(ids) + noise[1])


def logits_of(model, tokens):
    with torch.no_grad():
        return torch.cat([model(row, use_cache=False).logits for row in tokens.split(1)])


def by_definition(model, plan, tokens):
    """The model's logits with every merge carried out by hand: weights added up, scores mapped by the reference."""
    layers = find_moe_layers(model)
    with torch.no_grad():
        for index, merge in plan.merges.items():
            layer, routed = layers[index], mapped_layer(layers[index])
            places = [n for n, p in layer.experts.named_parameters() if p.shape[0] == E]
            merged = {n: torch.einsum("ie,e...->i...", merge.experts, getattr(layer.experts, n)) for n in places}

            def forward(hidden, *_, layer=layer, merge=merge, routed=routed):
                flat = hidden.reshape(-1, hidden.shape[-1])
                weight = next(p for p in layer.router.parameters() if p.ndim == 2)
                scores = torch.nn.functional.linear(flat, weight, getattr(layer.router, "bias", None))
                ids, weights = mp.reference.masked_router(
                    scores, top_k=layer.shape.top_k, router_map=merge.router, spec=routed.spec
                )
                return scores, weights, ids

            layer.router.forward = forward
            for name, tensor in merged.items():
                setattr(layer.experts, name, torch.nn.Parameter(tensor))
            layer.experts.num_experts = KEPT
    return logits_of(model, tokens)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    tokens = random_tokens(seed=2)
    return request.param, tokens


@pytest.fixture(scope="module")
def plans(family):
    layers = find_moe_layers(tiny_model(family[0]))
    return [mp.PruningPlan.from_merges({index: random_merge(7 * n + index) for index in layers}) for n in range(3)]


def test_merged_model_computes_what_merging_by_hand_does(family, plans):
    name, tokens = family
    model = tiny_model(name)
    full = logits_of(model, tokens)
    layers = find_moe_layers(model)
    for plan in plans:
        with planned(layers, plan):
            merged = logits_of(model, tokens)
        expected = by_definition(tiny_model(name), plan, tokens)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(merged, full, atol=1e-3)
        assert torch.equal(logits_of(model, tokens), full), "everything must be put back"


def test_scores_in_a_sweep_are_those_of_whole_forwards(family, plans):
    """Together with masks, in any company and order."""
    name, tokens = family
    model = tiny_model(name)
    masks = [mp.uniform_plan(mp.score_experts(mp.calibrate(model, [tokens]), c), 0.5) for c in ("reap", "man")]
    mixed = [plans[0], masks[0], plans[1], masks[1], plans[2], plans[0]]
    metrics = ("esap", "kl_pq", "nll", "label_top1")
    swept = mp.CandidateEvaluator(model, [tokens])
    whole = mp.CandidateEvaluator(model, [tokens], method="whole")
    assert swept.method.startswith("layer sweep")
    got, expected = swept.evaluate(mixed, metrics), whole.evaluate(mixed, metrics)
    for a, b in zip(got, expected, strict=True):
        for metric in metrics:
            assert getattr(a, metric) == pytest.approx(getattr(b, metric), abs=1e-5)
    alone = swept.evaluate([plans[1]], metrics)[0]
    assert alone.esap == pytest.approx(got[2].esap, abs=1e-6)
    assert got[0] == got[5]


def test_one_hot_merges_are_masks(family):
    name, tokens = family
    model = tiny_model(name)
    evaluator = mp.CandidateEvaluator(model, [tokens])
    scores = mp.score_experts(mp.calibrate(model, [tokens]), "reap")
    plan = mp.PruningPlan.from_pruned_counts(scores, {layer: 4 if layer % 2 else 2 for layer in scores})
    merges = {layer: Merge(one_hot(ids), one_hot(ids)) for layer, ids in plan.kept.items()}
    mask, merged = evaluator.evaluate([plan, mp.PruningPlan.from_merges(merges)], ("esap", "nll"))
    assert merged.esap == pytest.approx(mask.esap, abs=1e-6)
    assert merged.nll == pytest.approx(mask.nll, abs=1e-5)


def test_fewer_active_experts_are_a_smaller_top_k(family):
    """Alone: the identity with a smaller top-k is the model configured with it."""
    name, tokens = family
    model, smaller = tiny_model(name), tiny_model(name)
    for layer in find_moe_layers(smaller).values():
        layer.router.top_k = 1
    everyone = one_hot(range(E))
    plan = mp.PruningPlan.from_merges({index: Merge(everyone, everyone) for index in find_moe_layers(model)}, active=1)
    with planned(find_moe_layers(model), plan):
        torch.testing.assert_close(logits_of(model, tokens), logits_of(smaller, tokens), rtol=0, atol=1e-5)


def test_a_router_is_mapped_by_its_own_formula_however_few_experts_are_active(tmp_path):
    """Flint's: a sigmoid, renormalised, of which one active expert tells nothing."""
    model, data = every_model.tiny("flint"), [every_model.tokens(4, 24)]
    layers = find_moe_layers(model)
    plan = mp.PruningPlan.from_merges({index: random_merge(index) for index in layers}, active=1)
    expected = mp.CandidateEvaluator(model, data, method="whole").evaluate([plan], ("nll",))[0].nll
    swept = mp.CandidateEvaluator(model, data)
    assert swept.method.startswith("layer sweep")
    assert swept.evaluate([plan], ("nll",))[0].nll == pytest.approx(expected, abs=1e-5)
    model.save_pretrained(tmp_path / "model")
    with mp.applied(model, plan):
        assert math.log(mp.perplexity(model, data)) == pytest.approx(expected, abs=1e-5)
    exported = mp.load(mp.export(tmp_path / "model", plan, tmp_path / "out"), dtype=torch.float32)
    assert math.log(mp.perplexity(exported, data)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("kind", "score"), [("flint", "sigmoid"), ("mixtral", "softmax")])
def test_a_router_of_one_expert_a_token_is_told_by_the_formula_of_its_kind(kind, score):
    model = every_model.tiny(kind)
    with fewer_active(find_moe_layers(model), 1):
        layers = find_moe_layers(model)  # as of a model whose router selects one
        for layer in layers.values():
            spec = mapped_layer(layer).spec
            assert spec.score == score and spec.renormalize and layer.shape.top_k == layer.active == 1


def test_bfloat16_sums_are_rounded_once(plans, family):
    model = tiny_model(family[0]).bfloat16()
    index, merge = next(iter(plans[0].merges.items()))
    layer = find_moe_layers(model)[index]
    stored = layer.experts.down_proj.detach()
    expected = torch.einsum("ie,e...->i...", merge.experts.double(), stored.double()).bfloat16()
    with MergedExperts(layer, Scratch(), Scratch()).held(merge):
        torch.testing.assert_close(layer.experts.down_proj.detach(), expected, rtol=2e-2, atol=1e-6)
        assert layer.experts.num_experts == KEPT
    assert layer.experts.down_proj.detach().equal(stored) and layer.experts.num_experts == E


def test_merges_that_cannot_be_are_refused_before_work():
    model = tiny_model("olmoe")
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    good = random_merge(0)
    few = Merge(good.experts[:1], good.router[:1])
    narrow = Merge(good.experts[:, :6].contiguous(), good.router[:, :6].contiguous())
    cases = {
        "made for another": mp.PruningPlan.from_merges({0: good}, model="other:0"),
        r"names layers \[9\]": mp.PruningPlan.from_merges({9: good}),
        "1 merged experts, but its router selects 2": mp.PruningPlan.from_merges({0: few}),
        "made for 6 experts, the model has 8": mp.PruningPlan.from_merges({0: narrow}),
        "3 experts active": mp.PruningPlan.from_merges({0: good}, active=3),
    }
    for message, plan in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluator.evaluate([plan])
    grouped = mp.CandidateEvaluator(tiny_model("deepseek_v3"), [random_tokens()])
    with pytest.raises(ValueError, match="groups"):
        grouped.evaluate([mp.PruningPlan.from_merges({1: good})])
    with pytest.raises(ValueError, match="float32"):
        Merge(good.experts.double(), good.router)
    with pytest.raises(ValueError, match="5 experts active per token"):
        mp.PruningPlan.from_merges({0: good}, active=5)


def test_a_sweep_finds_which_answers_are_right():
    """Log-likelihoods and token-exact matches per sequence are those of `accuracy`."""
    model = tiny_model("olmoe")
    tokens = random_tokens(rows=5, length=12, seed=4)
    labels = torch.zeros_like(tokens)
    labels[:, 9:] = 1
    labels[4, 8:] = 1
    logits = logits_of(model, tokens)
    tokens[0, 10:] = logits[0, 9:11].argmax(-1)  # a beginning of greedy decoding, of which the rest follows
    evaluator = mp.CandidateEvaluator(model, [{"input_ids": tokens, "labels_mask": labels}])
    nothing = mp.PruningPlan({0: list(range(8))}, {0: 8})
    found = evaluator.sequence_sums([nothing], ("nll", "label_top1"))
    logits = logits_of(model, tokens).double().log_softmax(-1)
    for row in range(5):
        at = [t for t in range(11) if labels[row, t + 1]]
        likelihood = sum(float(logits[row, t, tokens[row, t + 1]]) for t in at)
        hits = sum(int(logits[row, t].argmax() == tokens[row, t + 1]) for t in at)
        assert float(found.sums["nll"][0, row]) == pytest.approx(-likelihood, abs=1e-4)
        assert float(found.sums["label_top1"][0, row]) == hits
        assert evaluator.weights("label_top1")[row] == len(at)
