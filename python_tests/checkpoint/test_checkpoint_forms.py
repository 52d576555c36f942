"""Checkpoints as they are stored: sharded, with layers and code of their own, quantised, with defaults left out."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeprune_ext as mp


def test_export_reads_sharded_checkpoints(tmp_path):
    model = tiny_model("olmoe")
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [random_tokens()])), 0.25)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    tokens = random_tokens(seed=2)
    logits = [logits_of(mp.load(mp.export(tmp_path / s, plan, tmp_path / f"out-{s}")), tokens) for s in ("one", "many")]
    assert torch.equal(*logits)
    index = json.loads((tmp_path / "out-many" / "model.safetensors.index.json").read_text())
    assert {f.name for f in (tmp_path / "out-many").glob("*.safetensors")} == set(index["weight_map"].values())


def test_layers_without_experts_past_the_last_are_kept_and_stray_weights_left_out(tmp_path):
    """As ERNIE's multi-token prediction, and others that transformers does not build; with experts: test_mtp.py."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "full")
    file = tmp_path / "full" / "model.safetensors"
    tensors = load_file(file)
    extra = {"model.layers.4.mlp.gate.weight": torch.ones(8, 32), "mtp.layers.0.mlp.gate.weight": torch.ones(8, 32)}
    extra |= {"model.mtp_block.0.mlp.gate.weight": torch.ones(8, 32), "model.mtp_emb_norm.0.weight": torch.ones(32)}
    save_file(tensors | extra, file, metadata={"format": "pt"})
    save_file(extra, tmp_path / "full" / "consolidated.safetensors")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]))
    out = mp.export(tmp_path / "full", mp.uniform_plan(scores, 0.5), tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in extra.items())
    assert {oct(f.stat().st_mode & 0o777) for f in out.iterdir()} == {"0o644"}  # others may read weights, too
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert type(mp.load(out)) is type(model)


def test_configurations_that_leave_out_the_default_count_are_exported(tmp_path):
    """As the hub has them: OLMoE's 64 experts are its default."""
    config = OlmoeConfig(**{**CONFIGS["olmoe"]().to_dict(), "num_experts": 64, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "full")
    raw = json.loads((tmp_path / "full" / "config.json").read_text())
    del raw["num_experts"]
    (tmp_path / "full" / "config.json").write_text(json.dumps(raw))
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [random_tokens()])), 0.5)
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    with mp.applied(model, plan):
        masked = logits_of(model, random_tokens())
    pruned = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(pruned, random_tokens()), masked, rtol=0, atol=1e-5)


def test_code_beside_a_checkpoint_runs_if_it_is_trusted(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "own.py").write_text(
        "from transformers import OlmoeConfig, OlmoeForCausalLM\n"
        "class OwnConfig(OlmoeConfig):\n    pass\n"
        "class OwnModel(OlmoeForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert type(mp.load(tmp_path)) is type(model)
    own = mp.load(tmp_path, trust_remote_code=True)
    assert type(own).__name__ == "OwnModel"
    assert torch.equal(logits_of(own, random_tokens()), logits_of(model, random_tokens()))


def test_a_killed_export_leaves_nothing_in_the_way(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "full")
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [random_tokens()])), 0.5)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    mp.export(tmp_path / "full", plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "out"]
