"""A model streamed layer by layer computes what the ordinary model computes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.models.moe import MoeModel, find_moe_layers
from moeprune_ext.models.slicing import check_slicing

LAYERS = 4
SOURCES = ("host", "disk")


@pytest.mark.parametrize("layout", ["file", "shards"])
@pytest.mark.parametrize("source", SOURCES)
def test_logits_are_the_ordinary_models(family, source, layout):
    model, folder = family
    streamed = load_streamed(folder / layout, source=source)
    assert type(streamed) is type(model)
    for seed in (1, 2, 3):  # the second and third begin with the last layer resident
        assert torch.equal(logits_of(streamed, random_tokens(seed=seed)), logits_of(model, random_tokens(seed=seed)))


@pytest.mark.parametrize("source", SOURCES)
def test_masks_fingerprints_and_router_checks_do_not_notice_streaming(family, source):
    model, folder = family
    streamed = load_streamed(folder / "file", source=source)
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]))
    plan = mp.PruningPlan.from_pruned_counts(scores, {layer: 2 * (i % 3) for i, layer in enumerate(scores)})
    for _ in range(2):
        assert MoeModel.of(streamed).fingerprint == MoeModel.of(model).fingerprint
        layers = find_moe_layers(streamed)
        assert {i: layer.shape for i, layer in layers.items()} == {
            i: layer.shape for i, layer in find_moe_layers(model).items()
        }
        check_slicing(layers)
        with mp.applied(model, plan), mp.applied(streamed, plan):
            assert torch.equal(logits_of(streamed), logits_of(model))
        assert torch.equal(logits_of(streamed), logits_of(model)), "the mask must come off"


@pytest.mark.parametrize("source", SOURCES)
def test_statistics_are_the_ordinary_models(family, source):
    model, folder = family
    batches = [random_tokens(), random_tokens(seed=2)]
    streamed = mp.calibrate(load_streamed(folder / "shards", source=source), batches)
    ordinary = mp.calibrate(model, batches)
    assert streamed.model == ordinary.model and streamed.shapes == ordinary.shapes
    for layer, table in ordinary.moments.items():
        assert torch.equal(streamed.moments[layer], table)
        assert torch.equal(streamed.max_norm[layer], ordinary.max_norm[layer])


@pytest.mark.parametrize("source", SOURCES)
def test_exports_whose_layers_keep_different_numbers_of_experts_stream_too(family, source, tmp_path):
    model, folder = family
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]))
    plan = mp.PruningPlan.from_pruned_counts(scores, {layer: 2 * (i % 3) for i, layer in enumerate(scores)})
    out = mp.export(folder / "shards", plan, tmp_path / "out")
    streamed = load_streamed(out, source=source)
    assert torch.equal(logits_of(streamed), logits_of(mp.load(out)))
    kept = {index: layer.shape.num_experts for index, layer in find_moe_layers(streamed).items()}
    assert kept == {index: len(ids) for index, ids in plan.kept.items()}


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_converted_to_the_dtype_asked_for(family, source):
    _, folder = family
    ordinary = mp.load(folder / "file", dtype=torch.bfloat16)
    streamed = load_streamed(folder / "file", dtype=torch.bfloat16, source=source)
    assert {n: t.dtype for n, t in streamed.state_dict().items()} == {
        n: t.dtype for n, t in ordinary.state_dict().items()
    }
    assert torch.equal(logits_of(streamed), logits_of(ordinary))


@pytest.mark.parametrize("source", SOURCES)
def test_tied_embeddings_stay_tied(source, tmp_path):
    config = CONFIGS["qwen3_moe"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    streamed = load_streamed(tmp_path, source=source)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    assert torch.equal(logits_of(streamed), logits_of(model))


def test_layers_that_transformers_does_not_build_are_never_read(tmp_path):
    """As DeepSeek-V3 stores multi-token prediction: a layer past the last."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.4.mlp.gate.weight": torch.ones(8, 32)}, file, metadata={"format": "pt"})
    streamed = load_streamed(tmp_path, source="disk")
    assert sorted(streamed.moeprune_stream.layer_bytes) == list(range(LAYERS))
    assert torch.equal(logits_of(streamed), logits_of(model))


@pytest.mark.parametrize("source", SOURCES)
def test_load_can_stream(olmoe, source):
    model, folder = olmoe
    streamed = mp.load(folder, stream=source)
    assert streamed.moeprune_stream.device == torch.device("cpu")
    assert torch.equal(logits_of(streamed), logits_of(model))
    with pytest.raises(ValueError, match="not attn_implementation"):
        mp.load(folder, stream=source, attn_implementation="eager")
