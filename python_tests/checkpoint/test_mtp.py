"""Multi-token-prediction layers: kept, pruned like the others by statistics of their own, or left out, and said so."""

import json
import re

import pytest
import quantised
import torch
from every_model import tiny
from mtp_models import with_mtp
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, random_tokens

import moeprune_ext as mp
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.checkpoint.mtp import find_mtp, load_mtp
from moeprune_ext.checkpoint.quantised import renumbered
from moeprune_ext.cli.main import main
from moeprune_ext.pipeline.prune import prune_checkpoint
from moeprune_ext.pipeline.settings import PruneSettings, TextSizes

FAMILIES = ["deepseek_v3", "glm4_moe", "qwen3_next"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param).eval()
    return folder / "full", model, *with_mtp(folder, model)


def norm_like(module, weight):
    """A norm of the module's kind with another weight."""
    made = type(module)(len(weight), eps=getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    made.weight.data.copy_(weight)
    return made


@torch.no_grad()
def expected_moments(model, longer, further, tokens):
    """Frequency and gate sums of the last layer's experts, step by step, with the model's own parts."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    block = longer.model.layers[-1]
    norm = {name: norm_like(block.input_layernorm, further[name]) for name in ("enorm", "hnorm")}
    joined = torch.cat([norm["enorm"](model.model.embed_tokens(tokens.roll(-1, 1))), norm["hnorm"](hidden)], -1)
    positions = torch.arange(tokens.shape[1])[None]
    calls = []
    experts = block.mlp.experts
    original = experts.forward
    experts.forward = lambda *call: calls.append(call) or original(*call)
    block(
        joined @ further["project"].T,
        attention_mask=None,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(hidden, positions),
    )
    del experts.forward
    _, ids, weights = calls[0]
    ids, weights = (part.view(*tokens.shape, -1)[:, :-1].flatten() for part in (ids, weights))  # the last has no next
    counts, sums = torch.zeros(experts.num_experts), torch.zeros(experts.num_experts)
    return counts.index_add(0, ids, torch.ones(len(ids))), sums.index_add(0, ids, weights.float())


def test_statistics_are_those_of_the_layer_behind_the_model(source):
    folder, model, longer, further = source
    loaded = mp.load(folder)
    stats = calibrate(loaded, [random_tokens()], mtp=load_mtp(folder, loaded))
    counts, sums = expected_moments(model, longer, further, random_tokens())
    (number,) = stats.mtp.moments
    assert number == model.config.num_hidden_layers
    assert torch.equal(stats.mtp.moments[number][:, 0, 0].float(), counts)
    torch.testing.assert_close(stats.mtp.moments[number][:, 1, 0].float(), sums, rtol=1e-4, atol=1e-5)
    alone = calibrate(loaded, [random_tokens()])
    assert alone.mtp is None
    for index, table in alone.moments.items():  # what is read behind the model changes nothing in it
        assert torch.equal(table, stats.moments[index])


def test_padding_and_ends_of_sequences_predict_nothing(source):
    """Batches of sequences, and the same ones in one batch with padding, count the same pairs."""
    folder, *_ = source
    loaded = mp.load(folder)
    mtp = load_mtp(folder, loaded)
    short, long = random_tokens(2, 9), random_tokens(2, 14, seed=3)
    together = torch.cat([torch.nn.functional.pad(short, (0, 5)), long])
    mask = torch.ones_like(together)
    mask[:2, 9:] = 0
    one = calibrate(loaded, [{"input_ids": together, "attention_mask": mask}], mtp=mtp)
    two = calibrate(loaded, [short, long], mtp=mtp)
    for index, table in two.mtp.moments.items():
        assert float(table[:, 0, 0].sum()) == (2 * 8 + 2 * 13) * loaded.config.num_experts_per_tok
        torch.testing.assert_close(one.mtp.moments[index], table, rtol=1e-3, atol=1e-3)


def test_streamed_models_have_the_same_statistics(source):
    folder, *_ = source
    plain, streamed = mp.load(folder), mp.load(folder, stream="disk")
    one, two = (calibrate(m, [random_tokens()], mtp=load_mtp(folder, m)) for m in (plain, streamed))
    for index, table in one.mtp.moments.items():
        torch.testing.assert_close(two.mtp.moments[index], table, rtol=1e-4, atol=1e-5)


def scored(folder, tmp_path, criterion="reap"):
    """Scores that went through their files."""
    model = mp.load(folder)
    calibrate(model, [random_tokens()], mtp=load_mtp(folder, model)).save(tmp_path / "stats.safetensors")
    mp.score_experts(mp.RoutingStats.load(tmp_path / "stats.safetensors"), criterion).save(tmp_path / "scores.json")
    return mp.ExpertScores.load(tmp_path / "scores.json")


def stored_mtp(folder, config):
    """{stored name: tensor} past the last decoder layer."""
    last = rf"^mtp\.|^model\.layers\.{config.num_hidden_layers}\."
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if re.search(last, name)}


def test_an_equal_number_in_every_layer_holds_for_them_too(source, tmp_path):
    """The configuration has one number: their best experts by the same criterion stay, renumbered, byte for byte."""
    folder, model, *_ = source
    scores = scored(folder, tmp_path)
    mp.uniform_plan(scores, 0.5).save(tmp_path / "plan.json")
    said = []
    out = mp.export(folder, mp.PruningPlan.load(tmp_path / "plan.json"), tmp_path / "out", say=said.append)
    ((number, order),) = scores.mtp.items()
    count = len(next(iter(mp.PruningPlan.load(tmp_path / "plan.json").kept.values())))
    kept = sorted(order[-count:])
    before, after = stored_mtp(folder, model.config), stored_mtp(out, model.config)
    assert said == [f"multi-token-prediction layers keep {count} of {len(order)} experts, too"]
    assert len(kept) < len(order) and f"keep {count} of {len(order)}" in (out / "README.md").read_text()
    for name, tensor in before.items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert is None:
            rows = kept if re.search(r"\.gate\.(weight|e_score_correction_bias)$", name) else slice(None)
            assert torch.equal(after[name], tensor[rows])
        elif int(expert[1]) in kept:
            new = f"{name[: expert.start(1)]}{kept.index(int(expert[1]))}{name[expert.end(1) :]}"
            assert torch.equal(after[new], tensor)
    assert (
        sum(".experts." in name for name in after) == sum(".experts." in name for name in before) // len(order) * count
    )
    config = json.loads((out / "config.json").read_text())
    assert config.get("num_nextn_predict_layers") == json.loads((folder / "config.json").read_text()).get(
        "num_nextn_predict_layers"
    )
    again = mp.load(out)
    assert [one.layer.shape.num_experts for one in load_mtp(out, again)] == [count]
    full = mp.load(folder)
    with mp.applied(full, mp.uniform_plan(scores, 0.5)):
        torch.testing.assert_close(logits_of(again), logits_of(full), rtol=1e-5, atol=1e-5)


def test_unequal_layers_leave_them_whole(source, tmp_path):
    """The configuration says the old number then, by which runtimes build them."""
    folder, model, *_ = source
    scores = scored(folder, tmp_path)
    layer = next(iter(scores))
    plan = mp.PruningPlan.from_pruned_counts(scores, {layer: scores.shapes[layer].n_group})
    said = []
    out = mp.export(folder, plan, tmp_path / "out", say=said.append)
    before, after = stored_mtp(folder, model.config), stored_mtp(out, model.config)
    assert said == ["multi-token-prediction layers stay whole"] and before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (mtp,) = load_mtp(out, mp.load(out))
    assert mtp.layer.shape.num_experts == scores.shapes[layer].num_experts


def test_without_statistics_or_on_request_they_are_left_out_and_it_is_said(source, tmp_path, capsys):
    folder, model, *_ = source
    without = mp.uniform_plan(mp.score_experts(mp.calibrate(mp.load(folder), [random_tokens()])), 0.5)
    without.save(tmp_path / "without.json")
    mp.uniform_plan(scored(folder, tmp_path), 0.5).save(tmp_path / "plan.json")
    flags = ["export", str(folder), "--plan"]
    main([*flags, str(tmp_path / "without.json"), "-o", str(tmp_path / "a")])
    assert "left out: they would need" in capsys.readouterr().out
    main([*flags, str(tmp_path / "plan.json"), "-o", str(tmp_path / "b"), "--drop-mtp"])
    assert "left out, as asked for" in capsys.readouterr().out
    for out in (tmp_path / "a", tmp_path / "b"):
        assert not stored_mtp(out, model.config)
        assert not json.loads((out / "config.json").read_text()).get("num_nextn_predict_layers")
        assert not find_mtp(out).names


def test_quantised_ones_are_read_and_sliced_like_the_others(tmp_path):
    """As published: what joins embedding and hidden state is not quantised."""
    with_mtp(tmp_path, tiny("deepseek_v3"), quantised.fp8)
    full = mp.load(tmp_path / "full", dtype=torch.float32)
    stats = mp.calibrate(full, [random_tokens()], mtp=mp.load_mtp(tmp_path / "full", full))
    scores = mp.score_experts(stats)
    out = mp.export(tmp_path / "full", mp.uniform_plan(scores, 0.5), tmp_path / "out")
    ((number, order),) = scores.mtp.items()
    kept = sorted(order[len(order) // 2 :])
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "full", out))
    for name in ("weight", "weight_scale_inv"):
        new, old = (f"model.layers.{number}.mlp.experts.{expert}.up_proj.{name}" for expert in (1, kept[1]))
        assert torch.equal(after[new].float(), before[old].float()) and after[new].dtype == before[old].dtype
    quantised.unquantised_fp8(tmp_path / "full")
    plain = mp.load(tmp_path / "full")
    expected = mp.calibrate(plain, [random_tokens()], mtp=mp.load_mtp(tmp_path / "full", plain)).mtp
    torch.testing.assert_close(stats.mtp.moments[number], expected.moments[number])


def test_what_is_not_of_a_known_form_is_left_out_and_says_why(tmp_path):
    """Here what joins embedding and hidden state is quantised, and one expert's matrix is missing."""
    with_mtp(tmp_path / "joint", tiny("deepseek_v3"), lambda folder: quantised.fp8(folder, leaves="nothing"))
    with_mtp(tmp_path / "lacks", tiny("deepseek_v3"))
    file = tmp_path / "lacks" / "full" / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.4.mlp.experts.3.up_proj.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    for folder in (tmp_path / "joint" / "full", tmp_path / "lacks" / "full"):
        model = mp.load(folder)
        assert mp.load_mtp(folder, model) == []
        said = []
        plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [random_tokens()])), 0.5)
        mp.export(folder, plan, folder.parent / "out", say=said.append)
        assert "left out" in said[0] and "not of a known form" in said[0]


def test_quantisation_names_them_from_zero():
    said = {"ignore": ["mtp.layers.0.mlp.experts.5.up_proj", "model.layers.0.mlp.experts.5.up_proj"]}
    assert renumbered(said, {0: [1, 2], 4: [3, 5]}, 4) == {"ignore": ["mtp.layers.0.mlp.experts.1.up_proj"]}


def test_prune_keeps_them(tmp_path):
    with_mtp(tmp_path, tiny("deepseek_v3"))
    save_file({"input_ids": random_tokens(40, 24)}, tmp_path / "text.safetensors")
    said = []
    options = {"texts": TextSizes(16, 32, 8), "sequence_length": 24, "repair": False, "say": said.append}
    search = EvolveSettings(population=4, generations=1, elites=2)
    data = [tmp_path / "text.safetensors"]
    for name, drop in (("kept", False), ("dropped", True)):
        settings = PruneSettings(criterion="reap", drop_mtp=drop)
        result = prune_checkpoint(
            tmp_path / "full", tmp_path / name, data=data, settings=settings, search=search, criterion="reap", **options
        )
        left = find_mtp(result.out)
        assert bool(left.names) != drop and bool(result.plan.mtp) != drop
    assert any("multi-token-prediction layers" in line for line in said)
