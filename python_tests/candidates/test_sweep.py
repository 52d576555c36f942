"""The layer sweep: the scores of whole masked forwards, whatever is shared, in whatever order, in whatever memory."""

import warnings
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.allocation.patterns import allocate, mutate, pattern_weights
from moeprune_ext.artifacts.plan import Treatment
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.candidates.tree import grow
from moeprune_ext.demo.run import domain_batches, load_demo
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.routers import routed_layer

ALL = ("esap", "kl_pq", "kl_qp", "nll", "top1_agree", "accept")
GOLDEN = ("olmoe-tiny", "qwen3-moe-tiny")


def generation(scores, count=12, seed=0):
    """Plans as a search makes them: two patterns and their children."""
    import random

    rng = random.Random(seed)
    unit = scores.n_group
    capacities = [shape.capacity // unit for shape in scores.shapes.values()]
    parents = [
        allocate(pattern_weights(name, len(capacities), rng), capacities, sum(capacities) // 2)
        for name in ("uniform", "up")
    ]
    plans = parents + [mutate(rng.choice(parents), capacities, rng, 2, 3, 32) for _ in range(count - 2)]
    return [
        mp.PruningPlan.from_pruned_counts(scores, {layer: n * unit for layer, n in zip(scores, plan, strict=True)})
        for plan in plans
    ]


def prepared(model, tokens=None):
    tokens = [random_tokens(rows=3, length=40)] if tokens is None else tokens
    scores = mp.score_experts(mp.calibrate(model, tokens), "reap")
    return scores, tokens


def golden_model(name):
    from pathlib import Path

    folder = Path(__file__).parents[1] / "golden" / name
    inputs = load_file(folder / "inputs.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), [
        {n: t for n, t in inputs.items() if n in ("input_ids", "attention_mask", "labels_mask")}
    ]


def assert_same(a, b, metrics=ALL, tolerance=1e-5):
    for one, other in zip(a, b, strict=True):
        for name in metrics:
            if name not in ("top1_agree", "accept"):  # a tie of argmax or of a draw moves these by whole positions
                assert getattr(one, name) == pytest.approx(getattr(other, name), abs=tolerance), name
        assert (one.positions, one.nan_rows) == (other.positions, other.nan_rows)


@pytest.mark.parametrize("family", [*CONFIGS, *GOLDEN])
@pytest.mark.parametrize("router", ["auto", "sliced"])
def test_sweep_scores_equal_those_of_one_masked_forward_each(family, router):
    model, tokens = golden_model(family) if family in GOLDEN else (tiny_model(family), None)
    scores, tokens = prepared(model, tokens)
    plans = generation(scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swept = mp.CandidateEvaluator(model, tokens, router=router)
    assert swept.method.startswith("layer sweep") and ("fused" if router == "auto" else "sliced") in swept.method
    whole = mp.CandidateEvaluator(model, tokens, method="whole")
    assert whole.method.startswith("whole forwards")
    assert_same(swept.evaluate(plans, ALL), whole.evaluate(plans, ALL))


def test_sweep_scores_equal_those_of_whole_forwards_on_the_demo_model():
    model, tokenizer = load_demo()
    batches = [b for bs in domain_batches(tokenizer, "calibration", 1).values() for b in bs]
    scores, _ = prepared(model, batches)
    plans = generation(scores, count=6)
    swept, whole = (mp.CandidateEvaluator(model, batches, method=method) for method in ("auto", "whole"))
    assert_same(swept.evaluate(plans, ("esap", "kl_pq")), whole.evaluate(plans, ("esap", "kl_pq")), ("esap", "kl_pq"))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_a_score_does_not_depend_on_order_company_or_memory(family):
    model = tiny_model(family)
    scores, tokens = prepared(model)
    plans = generation(scores)
    evaluator = mp.CandidateEvaluator(model, tokens)
    metrics = ("esap", "kl_pq", "nll")
    together = evaluator.evaluate(plans, metrics)
    backwards = evaluator.evaluate(plans[::-1], metrics)[::-1]
    alone = [evaluator.evaluate([plan], metrics)[0] for plan in plans]
    tight = mp.CandidateEvaluator(model, tokens, memory_budget=smallest_budget(model, tokens))
    for other in (backwards, alone, tight.evaluate(plans, metrics)):
        assert_same(together, other, metrics, 1e-6)
    assert evaluator.evaluate([plans[0], plans[0]])[1].esap == evaluator.evaluate([plans[0]])[0].esap


def smallest_budget(model, tokens):
    """What the refusal of one byte says is enough, in bytes."""
    with pytest.raises(ValueError, match="memory_budget is 0.0 MiB.*allow") as refusal:
        mp.CandidateEvaluator(model, tokens, memory_budget=1)
    return int((float(str(refusal.value).split("allow ")[1].split(" ")[0].replace(",", "")) + 0.1) * 2**20)


def test_ragged_padded_and_masked_sequences():
    model = tiny_model("olmoe")
    scores, _ = prepared(model)
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[0, 18:], mask[1, :7], mask[2, 5:9] = 0, 0, 0  # right and left padding, and a hole
    labels = torch.zeros_like(mask)
    labels[:, 12:20] = 1
    batches = [{"input_ids": random_tokens(4), "attention_mask": mask, "labels_mask": labels}, random_tokens(2, 9, 5)]
    swept, whole = (mp.CandidateEvaluator(model, batches, method=method) for method in ("auto", "whole"))
    plans = generation(scores, 5)
    assert_same(swept.evaluate(plans, ALL), whole.evaluate(plans, ALL))
    parts = swept.sequence_sums(plans, ("esap", "nll"), [4, 1])
    every = swept.sequence_sums(plans, ("esap", "nll"))
    for name in ("esap", "nll"):
        assert torch.allclose(parts.sums[name], every.sums[name][:, [4, 1]], atol=1e-5)


def test_common_beginnings_are_computed_once():
    """Four candidates that differ in the last of four layers only, and one that differs in the third."""
    model = tiny_model("qwen2_moe")  # its layer 1 is dense
    scores, tokens = prepared(model, [random_tokens(rows=1)])
    counts = [{0: 4, 2: 2, 3: n} for n in (0, 2, 4, 6)] + [{0: 4, 2: 3, 3: 2}]
    plans = [mp.PruningPlan.from_pruned_counts(scores, c) for c in counts]
    evaluator = mp.CandidateEvaluator(model, tokens)
    rows = Counter()
    hooks = []
    for index, layer in enumerate(model.model.layers):
        shared = getattr(layer.mlp, "shared_expert", layer.mlp)
        for name, module in ((f"attention {index}", layer.self_attn.q_proj), (f"shared {index}", shared.gate_proj)):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: rows.update({name: args[0].numel() // args[0].shape[-1] // 24})
                )
            )
    evaluator.evaluate(plans)
    for hook in hooks:
        hook.remove()
    # All prune the first layer alike, so the second, a dense one, has one state; the tree parts at layers 2 and 3.
    assert {n: rows[f"attention {n}"] for n in range(4)} == {0: 1, 1: 1, 2: 1, 3: 2}
    assert {n: rows[f"shared {n}"] for n in range(4)} == {0: 1, 1: 1, 2: 1, 3: 2}


def test_the_tree_has_one_state_for_each_common_beginning():
    kept = [((0, 1), (2, 3)), ((0, 2), (2, 3)), ((0, 1), (1, 3)), ((0, 1), (2, 3))]
    candidates = [{0: Treatment(first), 1: Treatment(second)} for first, second in kept]
    tree = grow(candidates)
    assert [len(level.parent) for level in tree.levels.values()] == [2, 3]
    assert tree.levels[1].parent.tolist() == [0, 0, 1] and tree.states == 3
    assert tree.leaf[0] == tree.leaf[3] and len(set(tree.leaf.tolist())) == 3
    for candidate, leaf in zip(candidates, tree.leaf.tolist(), strict=True):
        level = tree.levels[1]
        assert level.treatments[level.treatment[leaf]] == candidate[1]
        above = tree.levels[0]
        assert above.treatments[above.treatment[level.parent[leaf]]] == candidate[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_router_is_known_by_trying_it(family):
    layers = find_moe_layers(tiny_model(family))
    assert {routed_layer(layer).way for layer in layers.values()} == {"fused"}
    half = find_moe_layers(tiny_model(family).bfloat16())
    ways = {routed_layer(layer).way for layer in half.values()}
    # these compute their logits in float32 whatever the model's dtype
    assert ways == ({"fused"} if family in ("ernie4_5_moe", "deepseek_v2", "deepseek_v3") else {"sliced"})
    assert {routed_layer(layer, "fused").way for layer in half.values()} == {"fused"}


def test_the_fused_kernel_for_half_precision_logits_says_how_far_it_is_from_slicing():
    model = tiny_model("qwen3_moe").bfloat16()
    tokens = [random_tokens()]
    fused = mp.CandidateEvaluator(model, tokens, router="fused")
    apart = fused.method.split("fused and sliced routing differ by ")[1]
    assert "in ESAP on 24 tokens" in apart and 0 <= float(apart.split(" ")[0]) < 0.2
    assert "differ by" not in fused.identity["method"]  # a figure of this machine is no part of a search's identity
    assert "differ by" not in mp.CandidateEvaluator(model, tokens).method
    assert "differ by" not in mp.CandidateEvaluator(tiny_model("qwen3_moe"), tokens, router="fused").method


def test_a_router_of_unknown_formula_is_sliced(monkeypatch):
    model = tiny_model("olmoe")
    router_class = type(model.model.layers[0].mlp.gate)
    real = router_class.forward

    def squared(self, hidden):
        logits, weights, ids = real(self, hidden)
        return logits, weights.square(), ids

    monkeypatch.setattr(router_class, "forward", squared)
    scores, tokens = prepared(model)
    plans = generation(scores, 6)
    swept, whole = (mp.CandidateEvaluator(model, tokens, method=method) for method in ("auto", "whole"))
    assert "sliced" in swept.method
    assert_same(swept.evaluate(plans), whole.evaluate(plans), ("esap",))


def test_a_router_without_the_usual_answer_runs_block_by_block(monkeypatch):
    """The block chooses, by a correction bias of its own; the router gives logits only."""
    model = tiny_model("qwen3_moe")
    router_class, block_class = type(model.model.layers[0].mlp.gate), type(model.model.layers[0].mlp)
    monkeypatch.setattr(router_class, "forward", lambda self, hidden: torch.nn.functional.linear(hidden, self.weight))

    def forward(self, hidden):
        flat = hidden.view(-1, hidden.shape[-1])
        probabilities = self.gate(flat).sigmoid()
        ids = (probabilities + self.e_score_correction_bias).topk(self.gate.top_k).indices
        return self.experts(flat, ids, probabilities.gather(1, ids)).view_as(hidden)

    monkeypatch.setattr(block_class, "forward", forward)
    monkeypatch.setattr(
        "moeprune_ext.candidates.evaluator.check_slicing", lambda layers: None
    )  # it wants ids of the router
    for layer in model.model.layers:
        layer.mlp.register_buffer("e_score_correction_bias", torch.randn(8))
    scores, tokens = prepared(model)
    plans = generation(scores, 6)
    swept, whole = (mp.CandidateEvaluator(model, tokens, method=method) for method in ("auto", "whole"))
    assert "block by block" in swept.method
    assert_same(swept.evaluate(plans), whole.evaluate(plans), ("esap",))


def test_a_model_that_cannot_be_replayed_is_run_whole_and_says_so(monkeypatch):
    model = tiny_model("olmoe")
    first, norm = model.model.layers[0], model.model.norm
    first_forward, norm_forward, carried = first.forward, norm.forward, {}

    def keeps(*args, **kwargs):
        carried["first"] = first_forward(*args, **kwargs)
        return carried["first"]

    def adds(hidden):
        """The first layer's output joins the last one's: state that goes past the layers' arguments."""
        return norm_forward(hidden + carried["first"] if hidden.shape == carried["first"].shape else hidden)

    monkeypatch.setattr(first, "forward", keeps)
    monkeypatch.setattr(norm, "forward", adds)
    scores, tokens = prepared(model)
    with pytest.warns(UserWarning, match="cannot be swept layer by layer.*other logits"):
        evaluator = mp.CandidateEvaluator(model, tokens)
    assert evaluator.method.startswith("whole forwards: replaying")
    assert 0 < evaluator.evaluate(generation(scores, 2))[0].esap < 1


def test_scaled_and_capped_logits_go_the_model_s_own_way(monkeypatch):
    model = tiny_model("olmoe")
    real = type(model).forward

    def capped(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.logits = 0.5 * torch.tanh(output.logits / 0.5)
        return output

    monkeypatch.setattr(type(model), "forward", capped)
    scores, tokens = prepared(model)
    plans = generation(scores, 4)
    swept, whole = (mp.CandidateEvaluator(model, tokens, method=method) for method in ("auto", "whole"))
    assert swept.method.startswith("layer sweep")
    assert_same(swept.evaluate(plans, ("esap", "nll")), whole.evaluate(plans, ("esap", "nll")), ("esap", "nll"))


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_the_teacher_may_be_kept_anywhere(place):
    model = tiny_model("olmoe")
    scores, tokens = prepared(model)
    plans = generation(scores, 3)
    evaluator = mp.CandidateEvaluator(model, tokens, teacher_cache=place)
    expected = mp.CandidateEvaluator(model, tokens).evaluate(plans)
    assert evaluator.evaluate(plans) == evaluator.evaluate(plans) == expected


def test_peak_memory_stays_within_the_budget():
    model = tiny_model("olmoe")
    scores, tokens = prepared(model, [random_tokens(rows=4, length=300)])
    plans = generation(scores, 24)
    least = smallest_budget(model, tokens)
    made, results = [], []

    def work(budget):
        made.append(mp.CandidateEvaluator(model, tokens, memory_budget=budget))
        results.append(made[-1].evaluate(plans))

    for budget in (least, 2 * least, 5 * least):
        peak = peak_bytes(lambda: work(budget), torch.device("cpu"))  # noqa: B023
        assert peak <= budget, f"{peak} bytes in a budget of {budget}"
    for result in results[1:]:
        assert_same(results[0], result, ("esap",), 1e-6)


@pytest.mark.parametrize("wrong", [{"router": "best"}, {"teacher_cache": "tape"}, {"method": "magic"}])
def test_unknown_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*choose from"):
        mp.CandidateEvaluator(tiny_model("olmoe"), [random_tokens()], **wrong)


def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen2_moe").train()
    tokens = random_tokens()
    before = model.eval()(input_ids=tokens).logits
    model.train()
    scores, _ = prepared(model)
    mp.CandidateEvaluator(model, [tokens]).evaluate(generation(scores, 4))
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model.eval()(input_ids=tokens).logits, before)
