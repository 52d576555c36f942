"""A repaired plan: what it computes everywhere it goes, how it is made again, and what is refused."""

import copy
import dataclasses

import every_model
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, logits_of, random_tokens, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.allocation.naee import naee_subsets
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.checkpoint.read import _is_transposed
from moeprune_ext.models.patches import intercepted
from moeprune_ext.models.routers import routed_layer

TOKENS = random_tokens(24, 24, seed=1)
SCORED = random_tokens(4, 24, seed=3)


def planned(family="olmoe", sparsity=0.5, criterion="reap"):
    """A model and its uniform plan."""
    model = tiny_model(family)
    return model, mp.uniform_plan(mp.score_experts(mp.calibrate(model, [TOKENS]), criterion), sparsity)


def same(one, other):
    """Whether two plans hold the same experts and the same new weights."""
    return one.kept == other.kept and one.merges == other.merges


def esap(model, other):
    full, pruned = (logits_of(m, SCORED).flatten(0, 1).double() for m in (model, other))
    return float(mp.reference.overlap(full, pruned)["esap"].mean())


def output_errors(model, plan, tokens=TOKENS):
    """{layer: squared error of what its experts give behind what the plan leaves of the layers before, relative to the
    mean square of the hidden state that the full layer gives}."""
    moe = mp.MoeModel.of(model)
    errors = {}
    for index, kept in plan.kept.items():
        before = {i: ids for i, ids in plan.kept.items() if i < index}
        parts = []
        for last in ({index: list(range(plan.num_experts[index]))}, {index: kept}):
            some = before | last
            merges = {i: merge for i, merge in plan.merges.items() if i < index or (i == index and last[i] == kept)}
            outputs = []

            def record(original, *call, into=outputs):
                into.append(original(*call))
                return into[-1]

            counts = {i: plan.num_experts[i] for i in some}
            states = []
            hook = model.model.layers[index].register_forward_hook(lambda *call, into=states: into.append(call[2]))
            behind = mp.applied(model, mp.PruningPlan(some, counts, merges=merges))
            with behind, intercepted(moe.layers[index].experts, record), torch.no_grad():
                model(tokens, use_cache=False)
            hook.remove()
            parts.append((outputs[0], states[0]))
        sizes = parts[0][1].flatten(0, 1).double().square().mean(-1)
        errors[index] = float(((parts[0][0] - parts[1][0]).double().square().sum(-1) / sizes).sum())
    return errors


# ---- what a repaired plan computes


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_score_equals_that_of_the_pruned_model_and_of_the_exported_checkpoint(family, tmp_path):
    model, plan = planned(family)
    repaired = mp.repair(model, plan, [TOKENS]).plan
    assert repaired.repaired_layers == list(plan.kept) and repaired.kept == plan.kept
    scores = [
        mp.CandidateEvaluator(model, [SCORED], method=method).evaluate([plan, repaired]) for method in ("auto", "whole")
    ]
    with mp.applied(model, plan):
        before = logits_of(model, SCORED)
    with mp.applied(model, repaired):
        masked = logits_of(model, SCORED)
    assert not torch.allclose(before, masked, atol=0.1), "the repair must show"
    pruned = copy.deepcopy(model)
    mp.prune_(pruned, repaired)
    model.save_pretrained(tmp_path / "full")
    mp.export(tmp_path / "full", repaired, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    for other in (pruned, plain):
        torch.testing.assert_close(logits_of(other, SCORED), masked, rtol=1e-4, atol=1e-4)
    for score in scores:
        assert score[1].esap == pytest.approx(esap(model, plain), abs=1e-5)


def test_what_stays_in_an_export_is_what_was_stored(tmp_path):
    model, plan = planned("qwen3_moe")
    repaired = mp.repair(model, plan, [TOKENS]).plan
    model.save_pretrained(tmp_path / "full")
    mp.export(tmp_path / "full", plan, tmp_path / "before")
    mp.export(tmp_path / "full", repaired, tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("down_proj" in name for name in changed)
    card = (tmp_path / "after" / "README.md").read_text()
    assert "refitted" in card and "4 layers" in card and "No weight was" not in card
    assert "No weight was retrained" in (tmp_path / "before" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_checkpoint_gives_the_score_that_was_found_in_float32(dtype, tmp_path):
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(tmp_path / "full")
    model = mp.load(tmp_path / "full", dtype=dtype)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [TOKENS])), 0.5)
    repaired = mp.repair(model, plan, [TOKENS]).plan
    assert {merge.down.dtype for merge in repaired.merges.values()} == {torch.bfloat16}
    score = mp.CandidateEvaluator(model, [SCORED]).evaluate([repaired])[0].esap
    exported = mp.load(mp.export(tmp_path / "full", repaired, tmp_path / "out"), dtype=dtype)
    assert score == pytest.approx(esap(model, exported), abs=1e-5 if dtype == torch.float32 else 1e-2)


def test_repairing_nothing_changes_nothing():
    model, plan = planned(sparsity=0.0)
    result = mp.repair(model, plan, [TOKENS])
    assert result.plan is plan and result.layers == {}


def test_layers_that_keep_everything_stay(tmp_path):
    model = tiny_model("olmoe")
    plan = mp.PruningPlan.from_pruned_counts(mp.score_experts(mp.calibrate(model, [TOKENS])), {1: 4, 3: 2})
    for target in ("layer", "hidden"):
        result = mp.repair(model, plan, [TOKENS], target=target)
        assert list(result.layers) == result.plan.repaired_layers == [1, 3]
    again = mp.CandidateEvaluator(model, [SCORED]).evaluate([plan, result.plan])
    assert again[0].esap != again[1].esap


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_every_layer_misses_less_and_the_errors_are_the_models_own(family):
    model, plan = planned(family)
    fit, held_out = TOKENS[:18], TOKENS[18:]
    result = mp.repair(model, plan, [fit], held_out=[held_out])
    for tokens, which in ((fit, "fitted"), (held_out, "held_out")):
        own = output_errors(model, result.plan, tokens)
        for index, layer in result.layers.items():
            before, after = getattr(layer, which)
            assert after < before and after == pytest.approx(own[index], rel=1e-3)


def test_the_model_is_left_as_it_was():
    model, plan = planned()
    model.train()
    before, logits = copy.deepcopy(model.state_dict()), logits_of(model)
    for settings in (dict(), dict(target="hidden", sequential=True)):
        mp.repair(model, plan, [TOKENS], **settings)
    assert model.training and torch.equal(logits_of(model), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hidden_states_come_closer_to_the_full_models_than_by_layers_alone():
    model, plan = planned()
    states = {}
    for target in ("layer", "hidden"):
        repaired = mp.repair(model, plan, [TOKENS], target=target, ridge=0.1).plan
        with mp.applied(model, repaired), torch.no_grad():
            states[target] = model.model(TOKENS, output_hidden_states=True).hidden_states[-2]
    with torch.no_grad():
        full = model.model(TOKENS, output_hidden_states=True).hidden_states[-2]
    errors = {target: float((state - full).square().sum()) for target, state in states.items()}
    assert errors["hidden"] < errors["layer"]


# ---- files


def test_a_saved_plan_is_the_same_plan_and_damage_is_refused(tmp_path):
    model, plan = planned("gpt_oss")
    repaired = mp.repair(model, plan, [TOKENS]).plan
    path = tmp_path / "plan.json"
    repaired.save(path)
    loaded = mp.PruningPlan.load(path)
    assert same(loaded, repaired) and loaded.criterion == repaired.criterion and loaded.model == repaired.model
    assert same(loaded.unrepaired, plan) and path.stat().st_size < 5000
    other = mp.repair(model, plan, [random_tokens(20, 24, seed=9)]).plan
    other.save(tmp_path / "other.json")
    weights = tmp_path / "plan.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another repair's weights"):
        mp.PruningPlan.load(path)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        mp.PruningPlan.load(path)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        mp.PruningPlan.load(path)


def test_new_weights_of_another_shape_than_the_models_are_refused(tmp_path):
    model, plan = planned()
    repaired = mp.repair(model, plan, [TOKENS]).plan
    merge = repaired.merges[0]
    for down in (merge.down[:, :, :-1], merge.down.transpose(1, 2)):
        wrong = dataclasses.replace(repaired, merges={0: dataclasses.replace(merge, down=down)})
        with pytest.raises(ValueError, match="layer 0: .*down projections"):
            mp.prune_(model, wrong)
        with pytest.raises(ValueError, match="layer 0: .*down projections"):
            mp.CandidateEvaluator(model, [SCORED]).evaluate([wrong])
        model.save_pretrained(tmp_path / "full")
        with pytest.raises(ValueError, match="layer 0: .*down projections"):
            mp.export(tmp_path / "full", wrong, tmp_path / "out")


@pytest.mark.parametrize("stream", ["host", "disk"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_streamed_model_gives_the_same_repair(family, stream, tmp_path):
    model, plan = planned(family)
    model.save_pretrained(tmp_path / "full")
    for target in ("layer", "hidden"):
        settings = dict(target=target, sequential=True, criterion={"host": "seer", "disk": "naee"}[stream])
        whole = mp.repair(model, plan, [TOKENS], **settings)
        streamed = mp.repair(mp.load(tmp_path / "full", stream=stream), plan, [TOKENS], **settings)
        assert streamed.plan.kept == whole.plan.kept
        for index, merge in whole.plan.merges.items():
            torch.testing.assert_close(streamed.plan.merges[index].down, merge.down, rtol=1e-3, atol=1e-4)


def test_a_model_that_cannot_be_taken_apart_gives_the_same_repair(monkeypatch):
    from moeprune_ext.models.replay import NotReplayable, Replay

    model, plan = planned("deepseek_v2")
    settings = dict(sequential=True, criterion="naee")
    replayed = mp.repair(model, plan, [TOKENS], **settings)

    def cannot(self, *_):
        raise NotReplayable("its layers do not stand in one list")

    monkeypatch.setattr(Replay, "check", cannot)
    whole = mp.repair(model, plan, [TOKENS], **settings)
    assert whole.plan.kept == replayed.plan.kept
    for index, merge in replayed.plan.merges.items():
        torch.testing.assert_close(whole.plan.merges[index].down, merge.down, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r'cannot be run layer by layer .*use target="layer"'):
        mp.repair(model, plan, [TOKENS], target="hidden")


# ---- again


def test_the_same_call_gives_the_same_bits():
    model, plan = planned()
    for target in ("layer", "hidden"):
        one, two = (mp.repair(model, plan, [TOKENS], target=target, sequential=True) for _ in range(2))
        assert same(one.plan, two.plan) and one.layers == two.layers


@pytest.mark.parametrize("target", ["layer", "hidden"])
def test_a_repair_that_was_killed_goes_on_to_the_same_weights(target, tmp_path):
    model, plan = planned()
    settings = dict(target=target, sequential=True)
    whole = mp.repair(model, plan, [TOKENS], **settings)
    first = mp.repair(model, plan, [TOKENS], out=tmp_path, **settings)
    assert same(first.plan, whole.plan)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:2]) + lines[2][:17])
    for index in (2, 3):
        (tmp_path / f"layer-{index}.safetensors").unlink()
    again = mp.repair(model, plan, [TOKENS], out=tmp_path, **settings)
    assert same(again.plan, whole.plan) and again.layers == whole.layers
    assert len(history.read_text().splitlines()) == 4
    (tmp_path / "layer-1.safetensors").unlink()
    with pytest.raises(ValueError, match="layer-1.safetensors is missing"):
        mp.repair(model, plan, [TOKENS], out=tmp_path, **settings)


def test_a_directory_of_other_settings_is_refused_by_name(tmp_path):
    model, plan = planned()
    mp.repair(model, plan, [TOKENS], out=tmp_path)
    _, other = planned(criterion="frequency", sparsity=0.25)
    for changed, name in (
        (dict(target="hidden"), "target"),
        (dict(ridge=0.5), "ridges"),
        (dict(passes=5), "passes"),
        (dict(sequential=True), "sequential"),
        (dict(held_out=[SCORED]), "held_out"),
    ):
        with pytest.raises(ValueError, match=name):
            mp.repair(model, plan, [TOKENS], out=tmp_path, **changed)
    with pytest.raises(ValueError, match="plan:"):
        mp.repair(model, other, [TOKENS], out=tmp_path)
    with pytest.raises(ValueError, match="data:"):
        mp.repair(model, plan, [SCORED], out=tmp_path)


# ---- text


def test_padding_and_batching_do_not_matter():
    model, plan = planned()
    padded = {"input_ids": torch.cat([TOKENS, torch.zeros_like(TOKENS[:, :5])], 1)}
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][:, -5:] = 0
    whole = mp.repair(model, plan, [TOKENS])
    for batches in ([padded], list(TOKENS.split(7))):
        other = mp.repair(model, plan, batches)
        for index, merge in whole.plan.merges.items():
            torch.testing.assert_close(other.plan.merges[index].down, merge.down, rtol=1e-3, atol=1e-4)


def test_every_fourth_sequence_is_held_out_where_no_text_is_given():
    model, plan = planned()
    judged = torch.arange(len(TOKENS)) % 4 == 3
    own = mp.repair(model, plan, [TOKENS])
    given = mp.repair(model, plan, [TOKENS[~judged]], held_out=[TOKENS[judged]])
    assert same(own.plan, given.plan)


# ---- sequential


@pytest.mark.parametrize("criterion", ["reap", "seer", "naee"])
def test_each_layer_is_scored_behind_the_pruned_and_repaired_ones(criterion):
    model, plan = planned()
    fit, held_out = TOKENS[:18], TOKENS[18:]
    got = mp.repair(model, plan, [fit], held_out=[held_out], sequential=True, criterion=criterion).plan
    assert got.pruned_counts == plan.pruned_counts and got.criterion == f"{criterion}, sequential"
    behind = copy.deepcopy(model)
    for index in plan.kept:
        count = plan.pruned_counts[index]
        if criterion == "naee":
            expected = naee_subsets(behind, [fit], {i: count * (i == index) for i in plan.kept}).kept[index]
        else:
            scores = mp.score_experts(mp.calibrate(behind, [fit]), criterion)
            expected = mp.PruningPlan.from_pruned_counts(scores, {index: count}).kept[index]
        assert got.kept[index] == expected
        # Computes what the pruned layer does, and still has the others' routers whole.
        layer = mp.MoeModel.of(behind).layers[index]
        alone = mp.PruningPlan({index: got.kept[index]}, {index: 8}, merges={index: got.merges[index]})
        mp.prune_(behind, alone)
        assert layer.experts.down_proj.shape[0] == 8 - count
    one_shot = mp.score_experts(mp.calibrate(model, [fit]), "reap" if criterion == "naee" else criterion)
    assert got.kept != mp.uniform_plan(one_shot, 0.5).kept


def test_naee_runs_routers_on_their_own_input():
    """A norm before the experts, as some families have, gives them other rows than the router."""
    model, plan = planned()
    fit, held_out = TOKENS[:18], TOKENS[18:]
    for layer in mp.MoeModel.of(model).layers.values():
        layer.experts.register_forward_pre_hook(lambda _, call: (call[0] * torch.linspace(-2, 2, 32), *call[1:]))
    counts = {index: count * (index == 0) for index, count in plan.pruned_counts.items()}
    first = naee_subsets(model, [fit], counts)
    got = mp.repair(model, plan, [fit], held_out=[held_out], sequential=True, criterion="naee").plan
    assert got.kept[0] == first.kept[0]


def test_layers_may_be_scored_by_criteria_of_their_own():
    model, plan = planned()
    by_layer = {0: "reap", 1: "frequency", 2: "reap", 3: "naee"}
    got = mp.repair(model, plan, [TOKENS], sequential=True, criterion=by_layer).plan
    assert got.criterion == "frequency and naee and reap, sequential"
    assert got.kept[0] == mp.repair(model, plan, [TOKENS], sequential=True).plan.kept[0]


# ---- what is refused


def test_what_cannot_be_repaired_is_refused_before_any_work(monkeypatch):
    model, plan = planned()

    def repair(*args, match, **settings):
        with pytest.raises(ValueError, match=match):
            mp.repair(*args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", lambda *_, **__: pytest.fail("work has started"))
        patched.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("work has started"))
        for ridge in (0, -1.0, float("nan"), float("inf"), "strong", [], [0.1, -1]):
            repair(model, plan, [TOKENS], ridge=ridge, match="ridge is .*above 0")
        repair(model, plan, [TOKENS], target="logits", match="choose from layer, hidden")
        repair(model, plan, [TOKENS], passes=0, match="passes must be at least 1")
        repair(model, plan, [TOKENS[:1]], match="two sequences at least")
        repair(model, plan, [TOKENS], held_out=[], match="no data")
        repair(model, plan, [], match="no data")
        averages = {0: Merge.averages(plan.kept[0], {plan.kept[0][0]: {plan.kept[0][0]: 0.5, 7: 0.5}}, 8)}
        repair(model, dataclasses.replace(plan, merges=averages), [TOKENS], match="merges experts")
        repair(model, dataclasses.replace(plan, active=1), [TOKENS], match="experts are active to 1")
        repair(model, dataclasses.replace(plan, model="other:0"), [TOKENS], match="made for another model")
        for criterion in ("best", {0: "reap"}):
            repair(model, plan, [TOKENS], sequential=True, criterion=criterion, match="a criterion for each layer")
        unknown = dataclasses.replace(routed_layer(mp.MoeModel.of(model).layers[0], "fused"), places=None)
        patched.setattr("moeprune_ext.allocation.naee.routed_layer", lambda *_: unknown)
        repair(model, plan, [TOKENS], sequential=True, criterion="naee", match="cannot be run on its own")
    repaired = mp.repair(model, plan, [TOKENS]).plan
    repair(model, repaired, [TOKENS], match="repaired already")


def test_experts_of_an_unknown_layout_and_quantised_ones_are_refused_by_name():
    model, plan = planned()
    experts = model.model.layers[2].mlp.experts
    true = experts.down_proj
    experts.act_fn, act = nn.Tanh(), experts.act_fn
    experts._apply_gate = lambda inner: inner[..., :24] * 2  # not what its forward computes
    type(experts).forward, forward = (lambda self, h, i, w: forward(self, h, i, w) * 1.5), type(experts).forward
    try:
        with pytest.raises(ValueError, match=r"OlmoeExperts \(layer 0\) does not end in a down projection"):
            mp.repair(model, plan, [TOKENS])
    finally:
        type(experts).forward = forward
        experts.act_fn = act
        del experts._apply_gate
    experts.down_proj = nn.Parameter(true.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer 2\) has quantised weights \(torch.float8_e4m3fn\)"):
        mp.repair(model, plan, [TOKENS])


def test_quantised_checkpoints_cannot_take_a_repaired_plan(tmp_path):
    model, plan = planned("mixtral")
    repaired = mp.repair(model, plan, [TOKENS]).plan
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if "experts" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(narrow, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="quantised experts cannot be merged, repaired or padded"):
        mp.export(tmp_path / "full", repaired, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_norm_behind_the_experts_refuses_hidden_states_as_the_target():
    model, plan = planned()
    block = model.model.layers[2].mlp
    block.register_forward_hook(lambda module, _, output: _scaled(output))
    mp.repair(model, plan, [TOKENS])
    with pytest.raises(ValueError, match=r'layer 2: .*use target="layer"'):
        mp.repair(model, plan, [TOKENS], target="hidden")


def _scaled(output):
    first = output[0] if isinstance(output, tuple) else output
    first = first / first.square().mean(-1, keepdim=True).sqrt()
    return (first, *output[1:]) if isinstance(output, tuple) else first


def test_the_command_line_exports_a_repaired_plan_whose_weights_are_in_the_checkpoint_alone(tmp_path):
    from moeprune_ext.cli.main import main

    model, plan = planned()
    model.save_pretrained(tmp_path / "full")
    repaired = mp.repair(model, plan, [TOKENS]).plan
    repaired.save(tmp_path / "plan.json")
    main(["export", str(tmp_path / "full"), "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")])
    assert esap(model, mp.load(tmp_path / "out")) == pytest.approx(
        mp.CandidateEvaluator(model, [SCORED]).evaluate([repaired])[0].esap, abs=1e-5
    )
    assert same(mp.PruningPlan.load(tmp_path / "out" / "pruning_plan.json"), plan)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_transposed_stored_projections_are_written_as_they_are_stored(tmp_path):
    """Qwen3-VL's hub checkpoints hold every expert's matrices transposed; transformers turns them on loading."""
    model = every_model.tiny("qwen3_vl_moe")
    tokens = every_model.tokens(24, 24, seed=5)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [tokens])), 0.5)
    repaired = mp.repair(model, plan, [tokens]).plan
    score = mp.CandidateEvaluator(model, [SCORED]).evaluate([repaired])[0].esap
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("experts.down_proj"))
    for turned in (False, True):
        if turned:
            stored = {k: v.transpose(1, 2).contiguous() if "mlp.experts" in k else v for k, v in stored.items()}
            save_file(stored, file, metadata={"format": "pt"})
        out = mp.export(tmp_path / "full", repaired, tmp_path / f"out-{turned}")
        assert load_file(out / "model.safetensors")[name].shape[1:] == stored[name].shape[1:]
        assert score == pytest.approx(esap(model, mp.load(out)), abs=1e-5)


def test_whether_a_stored_tensor_is_turned_is_read_off_the_conversion():
    from transformers.core_model_loading import Transpose, WeightConverter

    def turned(*operations):
        return _is_transposed(("a", WeightConverter("a", "b", operations=list(operations))))

    assert _is_transposed(None) is False
    assert turned(Transpose(1, 2)) is True  # whatever the shape
    assert turned(Transpose(1, 2, check_dims=True)) is None  # where the shape does not fit
    assert turned(Transpose(1, 2), Transpose(1, 2)) is False
