"""What cannot be streamed is refused, with the file or the argument that is wrong."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

import moeprune_ext as mp
from moeprune_ext.checkpoint.prune import slice_layers_
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.models.moe import MoeModel

SOURCES = ("host", "disk")


def test_missing_and_damaged_shards_are_named_before_loading(olmoe):
    _, folder = olmoe
    shard = sorted(folder.glob("*.safetensors"))[5]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shard.name):
        load_streamed(folder, source="disk")
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_streamed(folder, source="host")


def test_a_shard_that_goes_away_later_is_named_by_the_forward_that_needs_it(olmoe):
    model, folder = olmoe
    streamed = load_streamed(folder, source="disk")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = folder / weight_map["model.layers.2.self_attn.q_proj.weight"]
    shard.rename(folder / "away")
    for _ in range(2):
        with pytest.raises(ValueError, match=shard.name):
            logits_of(streamed)
    (folder / "away").rename(shard)
    assert torch.equal(logits_of(streamed), logits_of(model))


@pytest.mark.parametrize("lost", ["layers.2.mlp.experts.3.up_proj", "layers.1.mlp.gate.weight", "model.norm.weight"])
def test_weights_missing_from_the_checkpoint_are_refused(lost, tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_streamed(tmp_path, source="disk")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"source": "cloud"}, "source must be one of host, disk"),
        ({"dtype": "bfloat16"}, "dtype must be 'auto' or a floating torch dtype"),
        ({"dtype": torch.int8}, "dtype must be 'auto' or a floating torch dtype"),
        ({"device": "abacus"}, "device must be"),
        ({"device": "meta"}, "not to meta"),
        ({"device": "cuda:99"}, "not to cuda:99"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_streamed(tmp_path / "nowhere", **bad)


def test_folders_that_cannot_be_streamed_are_refused(olmoe, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_streamed(tmp_path / "nowhere")
    _, folder = olmoe
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        load_streamed(folder)
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no Mixture-of-Experts layers"):
        load_streamed(tmp_path / "dense")


@pytest.mark.parametrize("source", SOURCES)
def test_copying_and_pruning_in_place_are_refused(olmoe, source):
    model, folder = olmoe
    streamed = load_streamed(folder, source=source)
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(streamed)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [random_tokens()])), 0.5)
    with pytest.raises(ValueError, match="export the plan"):
        mp.prune_(streamed, plan)
    slice_layers_(MoeModel.of(streamed), plan.kept)  # whoever goes past that refusal
    for _ in range(2):
        with pytest.raises(ValueError, match="export the plan"):
            logits_of(streamed)
