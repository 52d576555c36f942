"""A model is looked through once, whoever is called with it."""

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tiny_tasks import make_task

import moeprune_ext as mp
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.models import moe as moe_module
from moeprune_ext.models.costs import costs


@pytest.fixture
def searches(monkeypatch):
    """How often layers were looked for."""
    calls, real = [], moe_module.find_moe_layers
    monkeypatch.setattr(moe_module, "find_moe_layers", lambda model: calls.append(model) or real(model))
    return calls


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


def test_public_functions_take_a_model_or_a_moe_model_and_look_for_layers_once(searches):
    model, batches = tiny_model("olmoe"), [random_tokens()]
    task = make_task(model, 8)

    def run(model):
        stats = mp.calibrate(model, batches)
        scores = mp.score_experts(stats, "reap")
        plan = mp.uniform_plan(scores, 0.5)
        evaluator = mp.CandidateEvaluator(model, batches)
        with mp.applied(model, plan) as applied:
            logits = applied(batches[0]).logits.detach()
        return {
            "moments": stats.moments,
            "esap": evaluator.evaluate([plan])[0].esap,
            "logits": logits,
            "grape": mp.grape(model, batches, scores, 0.25, tokens=64).kept,
            "naee": mp.naee_plan(model, batches, 0.5).kept,
            "naee scores": dict(naee_scores(model, batches)),
            "perplexity": mp.perplexity(model, batches),
            "accuracy": mp.accuracy(model, task),
            "costs": costs(model, plan),
            "eep": mp.eep(model, task, 4, prune_iters=2, merge_iters=1).plan,
        }

    plain = run(model)
    assert len(searches) > 1
    searches.clear()
    moe = mp.MoeModel.of(model)
    assert mp.MoeModel.of(moe) is moe
    assert same(run(moe), plain)
    assert len(searches) == 1


def test_a_moe_model_says_what_its_model_is():
    model = tiny_model("mixtral")
    moe = mp.MoeModel.of(model)
    assert moe.vocab_size == model.config.vocab_size and moe.device == torch.device("cpu") and moe.stream is None
    assert moe.shapes == {index: layer.shape for index, layer in moe.layers.items()}
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(moe, [random_tokens()])), 0.5)
    mp.prune_(moe, plan)
    assert {shape.num_experts for shape in mp.MoeModel.of(model).shapes.values()} == {4}
