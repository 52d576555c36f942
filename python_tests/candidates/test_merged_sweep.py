"""How merges go through a sweep: each made once a layer, in one buffer, and short sequences in large batches."""

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from test_merging import random_merge
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.candidates.sweep import padded_lengths
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.models.layers import expert_tensors
from moeprune_ext.models.merging import MergedExperts
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.ops.overlap import next_token, overlap

LENGTHS = (20, 21, 21, 20, 22, 22, 19, 20, 21, 22, 22, 21)
ANSWERS = ("nll", "label_top1")


def short_sequences(lengths=LENGTHS):
    """Of which the last four tokens are answers."""
    batches = []
    for number, length in enumerate(lengths):
        labels = torch.zeros(1, length, dtype=torch.bool)
        labels[0, -4:] = True
        batches.append({"input_ids": random_tokens(1, length, number), "labels_mask": labels})
    return batches


def merges(model, count=3, seed=0):
    layers = find_moe_layers(model)
    return [
        mp.PruningPlan.from_merges({index: random_merge(100 * (seed + n) + index) for index in layers})
        for n in range(count)
    ]


def mask(model, batches, criterion="reap"):
    return mp.uniform_plan(mp.score_experts(mp.calibrate(model, batches), criterion), 0.5)


@pytest.fixture
def standing(monkeypatch):
    """Every merge that is made: its layer, and the bytes of all buffers then. Two at a time fail."""
    made, real, now = [], MergedExperts._standing, []

    @contextmanager
    def standing_alone(self, merge):
        assert not now, "a merge must be gone before the next is made"
        now.append(merge)
        with real(self, merge):
            made.append((self._layer.index, self._buffers.nbytes))
            yield
        now.clear()

    monkeypatch.setattr(MergedExperts, "_standing", standing_alone)
    return made


@pytest.mark.parametrize("metrics", [ANSWERS, ("esap", "nll")])
@pytest.mark.parametrize("company", ["merges", "masks too"])
def test_every_merge_is_made_once_a_layer_in_one_buffer(standing, metrics, company):
    """Whatever the number of sequences, units and batches; a merge that two candidates share, once for both."""
    model, batches = tiny_model("qwen2_moe"), short_sequences()
    plans = merges(model)
    plans.append(mp.PruningPlan.from_merges({**plans[0].merges, 3: plans[1].merges[3]}))
    if company == "masks too":
        plans.append(mask(model, batches))
    evaluator = mp.CandidateEvaluator(model, batches, least_units=4)
    evaluator.evaluate(plans, metrics)
    layers = find_moe_layers(model)
    assert [index for index, _ in standing] == [index for index in layers for _ in range(3)]
    one_layer = max(
        sum(getattr(t.owner, t.name)[:4].nbytes for t in expert_tensors(layer)) for layer in layers.values()
    )
    assert {size for _, size in standing} == {one_layer}


def test_experts_taken_as_they_are_are_not_made(standing):
    model, batches = tiny_model("olmoe"), short_sequences()
    plan = mask(model, batches)
    identity = torch.eye(8)
    mapped = {}
    for index, ids in plan.kept.items():
        router = random_merge(index).router
        mapped[index] = Merge(identity[ids], router)
    evaluator = mp.CandidateEvaluator(model, batches)
    as_they_are = evaluator.evaluate([mp.PruningPlan.from_merges(mapped)], ANSWERS)[0]
    assert standing == []
    nearly = {i: Merge(m.experts + 1e-9 * (m.experts == 0), m.router) for i, m in mapped.items()}
    made = evaluator.evaluate([mp.PruningPlan.from_merges(nearly)], ANSWERS)[0]
    assert len(standing) == len(mapped)
    assert made.nll == pytest.approx(as_they_are.nll, abs=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe"])
def test_short_sequences_score_as_each_candidate_alone_and_as_whole_forwards(family):
    """Run at common lengths, with masks beside merges."""
    model, batches = tiny_model(family), short_sequences()
    plans = [*merges(model), mask(model, batches), mask(model, batches, "man")]
    metrics = ("esap", *ANSWERS)
    swept = mp.CandidateEvaluator(model, batches, least_units=3)
    assert swept.method.startswith("layer sweep") and "units of 4" in swept.method
    whole = mp.CandidateEvaluator(model, batches, method="whole")
    expected = whole.sequence_sums(plans, metrics)
    for asked in (metrics, ANSWERS):
        together = swept.sequence_sums(plans, asked)
        for name in asked:
            torch.testing.assert_close(together.sums[name], expected.sums[name], rtol=0, atol=1e-4)
        for i, plan in enumerate(plans):
            alone = swept.sequence_sums([plan], asked)
            for name in asked:
                torch.testing.assert_close(alone.sums[name][0], together.sums[name][i], rtol=0, atol=1e-5)


def test_a_unit_scores_the_same_bits_whatever_else_its_process_has():
    model, batches = tiny_model("olmoe"), short_sequences()
    plans = [*merges(model), mask(model, batches)]
    evaluator = mp.CandidateEvaluator(model, batches, least_units=3)
    every = evaluator.sequence_sums(plans, ANSWERS)
    for start in (0, 4, 8):
        unit = list(range(start, start + 4))
        alone = evaluator.sequence_sums(plans, ANSWERS, unit)
        for name in ANSWERS:
            assert torch.equal(alone.sums[name], every.sums[name][:, unit])


def test_neighbours_of_about_a_length_are_one_batch():
    """Twelve sequences in three units of four: three calls of a layer, not one for each of their lengths."""
    model, batches = tiny_model("olmoe"), short_sequences()
    evaluator = mp.CandidateEvaluator(model, batches, least_units=3)
    shapes = []
    model.model.layers[2].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["hidden_states"].shape[:2])), with_kwargs=True
    )
    evaluator.evaluate(merges(model, 1), ANSWERS)
    assert shapes == [(4, 21), (4, 22), (4, 22)]


def test_lengths_are_common_where_that_adds_little_and_nothing_is_masked():
    def sequence(length, hole=False):
        attended = torch.ones(1, length, dtype=torch.bool)
        attended[0, 1] = not hole
        return TokenBatch(torch.ones(1, length, dtype=torch.int64), attended, attended)

    def lengths(sizes, unit, hole=None):
        return padded_lengths([sequence(size, i == hole) for i, size in enumerate(sizes)], unit)

    assert lengths([20, 22, 21, 50, 20], 3) == [22, 22, 22, 50, 20]
    assert lengths([20, 22, 21], 1) == [20, 22, 21]
    assert lengths([20, 22, 21], 3, hole=1) == [20, 22, 21]
    assert lengths([10, 13], 2) == [10, 13]


def test_a_search_begun_at_lengths_of_their_own_is_not_resumed_at_common_ones():
    def method(lengths):
        return mp.CandidateEvaluator(tiny_model("olmoe"), short_sequences(lengths), least_units=1).identity["method"]

    assert ", common lengths" in method((20, 21)) and ", common lengths" not in method((21, 21))


def test_a_model_whose_positions_see_what_follows_keeps_every_length(monkeypatch):
    model, batches = tiny_model("olmoe"), short_sequences()
    first = model.model.layers[0]
    forward = first.forward
    monkeypatch.setattr(
        first, "forward", lambda hidden, *a, **k: forward(hidden + hidden.mean(1, keepdim=True), *a, **k)
    )
    swept, whole = (mp.CandidateEvaluator(model, batches, least_units=3, method=m) for m in ("auto", "whole"))
    assert swept.method.startswith("layer sweep")
    plans = merges(model, 2)
    a, b = (evaluator.sequence_sums(plans, ANSWERS).sums["nll"] for evaluator in (swept, whole))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def smallest_budget(model, batches):
    """The evaluator that has hardly room for one state, and its budget in bytes."""
    with pytest.raises(ValueError, match="allow") as refusal:
        mp.CandidateEvaluator(model, batches, memory_budget=1)
    budget = int((float(str(refusal.value).split("allow ")[1].split(" ")[0].replace(",", "")) - 0.2) * 2**20)
    while True:
        try:
            return mp.CandidateEvaluator(model, batches, memory_budget=budget), budget
        except ValueError:
            budget += 2**14


def test_merges_stay_within_the_budget_or_are_refused_with_the_numbers():
    model, batches = tiny_model("olmoe"), [random_tokens(rows=4, length=120)]
    evaluator, least = smallest_budget(model, batches)
    everyone = {index: Merge(torch.full((8, 8), 1 / 8), torch.eye(8)) for index in find_moe_layers(model)}
    with pytest.raises(
        ValueError, match=r"leaves 0.0\d MiB .* one layer would take 0.07 MiB .*: 0.0\d MiB are missing"
    ) as refusal:
        evaluator.evaluate([mp.PruningPlan.from_merges(everyone)])
    with pytest.raises(ValueError) as known_before:
        evaluator.check_merged(dict.fromkeys(everyone, 8))
    assert str(known_before.value) == str(refusal.value)
    mp.CandidateEvaluator(model, batches, memory_budget=least, method="whole").check_merged(dict.fromkeys(everyone, 8))
    plans, results = merges(model, 8), []
    for budget in (2 * least, 5 * least):

        def work(budget=budget):
            results.append(mp.CandidateEvaluator(model, batches, memory_budget=budget).evaluate(plans))

        assert peak_bytes(work, torch.device("cpu")) <= budget
    assert [s.esap for s in results[0]] == pytest.approx([s.esap for s in results[1]], abs=1e-6)


def averages(model, batches):
    """Plans that average experts behind sliced routers; they agree in the first layer, where the last one ends."""
    plan = mask(model, batches)
    first, plans = min(plan.kept), []
    for share in (0.25, 0.75):
        merges = {}
        for index, kept in plan.kept.items():
            gone = next(e for e in range(8) if e not in kept)
            part = 0.5 if index == first else share
            merges[index] = Merge.averages(kept, {kept[1]: {kept[1]: part, gone: 1 - part}}, 8)
        plans.append(dataclasses.replace(plan, merges=merges))
    return [*plans, dataclasses.replace(plan, merges={first: plans[0].merges[first]})]


@pytest.mark.parametrize("router", ["auto", "sliced"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_averages_are_swept_beside_masks_and_maps(family, router, tmp_path):
    """As whole forwards and as the exported checkpoint score, streamed or not."""
    model, batches = tiny_model(family).requires_grad_(False), short_sequences()
    plans = [mask(model, batches), *averages(model, batches), *(merges(model) if family == "olmoe" else ())]
    swept = mp.CandidateEvaluator(model, batches, router=router, least_units=3)
    assert swept.method.startswith("layer sweep")
    scores = swept.evaluate(plans, ("esap", "nll"))
    whole = mp.CandidateEvaluator(model, batches, method="whole").evaluate(plans, ("esap", "nll"))
    model.save_pretrained(tmp_path / "full")
    streamed = mp.CandidateEvaluator(load_streamed(tmp_path / "full", source="disk"), batches, least_units=3)
    for other in (whole, streamed.evaluate(plans, ("esap", "nll"))):
        assert [s.esap for s in scores] == pytest.approx([s.esap for s in other], abs=1e-5)
        assert [s.nll for s in scores] == pytest.approx([s.nll for s in other], abs=1e-5)
    assert scores[0].esap != scores[1].esap != scores[2].esap
    exported = mp.load(mp.export(tmp_path / "full", plans[1], tmp_path / "out"))
    assert math.log(mp.perplexity(exported, batches)) == pytest.approx(scores[1].nll, abs=1e-5)


@pytest.mark.parametrize("source", ["host", "disk"])
def test_streamed_layers_visit_once_for_all_merges(source, tmp_path):
    model, batches = tiny_model("olmoe").requires_grad_(False), short_sequences()
    model.save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, source=source)
    stream = streamed.moeprune_stream
    plans = [*merges(model), mask(model, batches)]
    evaluator = mp.CandidateEvaluator(streamed, batches, least_units=3)
    before = stream.bytes_streamed
    found = evaluator.evaluate(plans, ANSWERS)
    assert stream.bytes_streamed - before <= sum(stream.layer_bytes.values())
    expected = mp.CandidateEvaluator(model, batches, least_units=3).evaluate(plans, ANSWERS)
    assert [s.nll for s in found] == pytest.approx([s.nll for s in expected], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_next_token_is_what_overlap_says_of_the_same_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 33, generator=generator).to(dtype)
    logits[3, 5], logits[4, 5], logits[5, 6] = float("nan"), float("inf"), float("-inf")
    labels = torch.tensor([0, 32, -100, 5, -100, 6, int(logits[6].argmax()), 2, 3])
    found = next_token(logits, labels)
    expected = overlap(logits, logits, labels=labels, metrics=("nll",))["nll"][0]
    torch.testing.assert_close(found["nll"], expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert found["label_top1"][6] == 1 and found["label_top1"][2] == 0 and found["label_top1"][3].isnan()


def test_least_units_below_one_is_refused():
    with pytest.raises(ValueError, match="least_units must be at least 1"):
        mp.CandidateEvaluator(tiny_model("olmoe"), [random_tokens()], least_units=0)
