"""Quantised checkpoints: calibrated and searched as numbers, streamed layer by layer, sliced byte for byte."""

import dataclasses
import hashlib
import json
import re

import pytest
import quantised
import torch
from every_model import tiny
from safetensors.torch import load_file
from tiny_models import CONFIGS, logits_of, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import Merge
from moeprune_ext.checkpoint.quantised import renumbered

IGNORED = "model.layers.2.mlp.experts.5.down_proj"


def saved(folder, family, **sizes):
    """Writes a tiny bfloat16 model of other sizes than the usual ones."""
    torch.manual_seed(0)
    config = type(CONFIGS[family]())(**(CONFIGS[family]().to_dict() | sizes | {"dtype": "bfloat16"}))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def fp8(folder, family):
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    quantised.fp8(folder)
    return folder


def mxfp4(folder):
    quantised.mxfp4(saved(folder, "gpt_oss", hidden_size=64, intermediate_size=32, head_dim=16))
    return folder


def int4(folder, form="pack-quantized"):
    sizes = dict(hidden_size=64, moe_intermediate_size=32, head_dim=16)
    quantised.compressed_tensors(saved(folder, "qwen3_moe", **sizes), form)
    return folder


FORMS = {
    "fp8-qwen3_moe": lambda folder: fp8(folder, "qwen3_moe"),
    "fp8-deepseek_v3": lambda folder: fp8(folder, "deepseek_v3"),
    "fp8-mixtral": lambda folder: fp8(folder, "mixtral"),
    "mxfp4-gpt_oss": mxfp4,
    "int4-qwen3_moe": int4,
    "int4-fp8": lambda folder: int4(folder, "float-quantized"),  # compressed-tensors, too: FP8, a scale for each row
}


@pytest.fixture(scope="module", params=sorted(FORMS))
def source(request, tmp_path_factory):
    if request.param.startswith("int4") and not has_dequantising_of_compressed_tensors():
        pytest.skip("this version of transformers does not dequantise compressed-tensors while it loads")
    return FORMS[request.param](tmp_path_factory.mktemp(request.param) / "full")


def has_dequantising_of_compressed_tensors():
    from transformers.integrations import compressed_tensors

    return hasattr(compressed_tensors, "CompressedTensorsDequantize")


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def kept_bytes(stored, plan):
    """{name in the export: digest} of experts' tensors, of those that are stored, one by one or for all experts."""
    digests = {}
    for name, tensor in stored.items():
        found = re.search(r"layers\.(\d+)\..*\.experts\.(\d+)?", name)
        ids = list(plan.kept.get(int(found[1]), range(8))) if found else []
        if found and found[2] is None:
            digests[name] = digest(tensor[ids])
        elif found and int(found[2]) in ids:
            digests[f"{name[: found.start(2)]}{ids.index(int(found[2]))}{name[found.end(2) :]}"] = digest(tensor)
    return digests


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe"])
def test_fp8_blocks_are_loaded_as_the_numbers_that_they_stand_for(tmp_path, family):
    """Blocks that end in the middle, too, which transformers' own rule takes for smaller blocks."""
    fp8(tmp_path / "full", family)
    loaded = mp.load(tmp_path / "full", dtype=torch.float32)
    quantised.unquantised_fp8(tmp_path / "full")
    plain = mp.load(tmp_path / "full")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert type(loaded) is type(plain) and not hasattr(loaded.config, "quantization_config")
    assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))


def test_scales_that_do_not_fit_the_blocks_are_refused(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "full")
    quantised.fp8(tmp_path / "full", weight_block_size=[7, 7])
    with pytest.raises(ValueError, match=r"blocks of \[7, 7\]|cannot be loaded|missing or do not fit"):
        mp.load(tmp_path / "full")


@pytest.mark.parametrize("stream", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_streamed_layers_are_dequantised_one_by_one(source, stream, dtype):
    """From the host, too: a layer waits there as it is stored, which takes less than what is made of it."""
    streamed = mp.load(source, stream=stream, dtype=dtype)
    assert torch.equal(logits_of(streamed), logits_of(mp.load(source, dtype=dtype)))
    stream = streamed.moeprune_stream
    assert stream.peak_bytes == max(stream.layer_bytes.values()) < sum(stream.layer_bytes.values())


def test_a_streamed_layer_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    fp8(tmp_path / "full", "qwen3_moe")
    file = tmp_path / "full" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    quantised.save_file(tensors, file, metadata={"format": "pt"})
    streamed = mp.load(tmp_path / "full", stream="disk")
    with pytest.raises(
        ValueError, match=r"full: model\.layers\.2\.mlp\.experts\.down_proj cannot be made.*weight.?': 7"
    ):
        logits_of(streamed)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_exports_hold_the_kept_experts_bytes_and_score_as_the_search_did(source, tmp_path, shape):
    config = json.loads((source / "config.json").read_text())
    full = mp.load(source)
    scores = mp.score_experts(mp.calibrate(full, [random_tokens()]))
    counts = {2: 4, 3: 2}  # groups of two stay whole
    plan = mp.uniform_plan(scores, 0.5) if shape == "uniform" else mp.PruningPlan.from_pruned_counts(scores, counts)
    (tmp_path / "full").mkdir()
    for file in source.iterdir():
        (tmp_path / "full" / file.name).write_bytes(file.read_bytes())
    gone = next(expert for expert in range(8) if expert not in plan.kept[2])
    names = [f"model.layers.2.mlp.experts.{expert}.down_proj" for expert in (plan.kept[2][1], gone)]
    config["quantization_config"].setdefault("modules_to_not_convert", []).extend(names)
    (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    (tmp_path / "full" / "quantize_config.json").write_text(json.dumps({"dynamic": {f"-:{names[0]}": {}}}))
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")

    after = load_file(out / "model.safetensors")
    expected = kept_bytes(load_file(source / "model.safetensors"), plan)
    assert expected == {name: digest(tensor) for name, tensor in after.items() if ".experts." in name}

    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said.pop("modules_to_not_convert")[-1] == "model.layers.2.mlp.experts.1.down_proj"
    assert names[1] not in said and said == {k: v for k, v in config["quantization_config"].items() if k in said}
    others = json.loads((out / "quantize_config.json").read_text())
    assert others == {"dynamic": {"-:model.layers.2.mlp.experts.1.down_proj": {}}}

    direct = [logits_of(model, random_tokens(seed=2)).flatten(0, 1).double() for model in (full, mp.load(out))]
    found = mp.CandidateEvaluator(full, [random_tokens(seed=2)]).evaluate([plan])[0].esap
    assert found == pytest.approx(float(mp.reference.overlap(*direct)["esap"].mean()), abs=1e-3)


def test_quantised_experts_are_not_added_up(source, tmp_path):
    """Nor repaired nor padded; the plan is exported from a copy in plain numbers instead, as the refusal says."""
    full = mp.load(source)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(full, [random_tokens()])), 0.5)
    merges = {i: Merge.averages(ids, {ids[0]: {ids[0]: 0.5, ids[1]: 0.5}}, 8) for i, ids in plan.kept.items()}
    merged = dataclasses.replace(plan, merges=merges)
    with pytest.raises(ValueError, match="quantised experts cannot be merged") as refusal:
        mp.export(source, merged, tmp_path / "refused")
    assert f'moeprune_ext.load("{source}").save_pretrained' in str(refusal.value)
    full.save_pretrained(tmp_path / "copy")
    out = mp.export(tmp_path / "copy", merged, tmp_path / "out")
    with mp.applied(full, merged):
        expected = logits_of(full)
    assert torch.allclose(logits_of(mp.load(out)), expected, atol=0.1)


def test_compressed_tensors_keeps_what_it_ignores_by_its_new_number(tmp_path):
    sizes = dict(hidden_size=64, moe_intermediate_size=32, head_dim=16)
    scores = mp.score_experts(mp.calibrate(mp.load(saved(tmp_path / "full", "qwen3_moe", **sizes)), [random_tokens()]))
    plan = mp.uniform_plan(scores, 0.5)
    plan = dataclasses.replace(plan, kept=plan.kept | {2: [1, 5, 6]})
    quantised.compressed_tensors(tmp_path / "full", ignore=(IGNORED,))
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head",
        "model.layers.2.mlp.experts.1.down_proj",
    ]
    before, after = load_file(tmp_path / "full" / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after["model.layers.2.mlp.experts.1.down_proj.weight"], before[f"{IGNORED}.weight"])


def test_global_scales_of_experts_are_not_left_out_in_silence(tmp_path):
    """NVFP4: transformers drops them. Such a checkpoint is not loaded, but pruned by a plan made for the original."""
    sizes = dict(hidden_size=64, moe_intermediate_size=32, head_dim=16)
    saved(tmp_path / "full", "qwen3_moe", **sizes)
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(mp.load(tmp_path / "full"), [random_tokens()])), 0.5)
    quantised.compressed_tensors(tmp_path / "full", "nvfp4-pack-quantized")
    for stream in (None, "disk"):
        with pytest.raises(ValueError, match="its numbers would be wrong"):
            mp.load(tmp_path / "full", stream=stream)
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    before, after = load_file(tmp_path / "full" / "model.safetensors"), load_file(out / "model.safetensors")
    for part in ("weight_packed", "weight_scale", "weight_global_scale"):
        new, old = (f"model.layers.1.mlp.experts.{expert}.up_proj.{part}" for expert in (2, plan.kept[1][2]))
        assert digest(after[new]) == digest(before[old])


def test_entries_for_single_experts_follow_their_numbers():
    kept = {3: [1, 5]}
    said = {
        "ignore": ["lm_head", "model.layers.3.mlp.experts.5.up_proj", "model.layers.3.mlp.experts.15.up_proj"],
        "dynamic": {r"-:model\.layers\.3\.mlp\.experts\.5\..*": {"bits": 8}, "+:.*experts.*": {"bits": 4}},
        "modules_to_not_convert": [
            "model.layers.3.mlp.experts.2",
            "model.layers.4.mlp.experts.2",
            r".*experts\.[0-9]+",
            r"re:.*experts\.([0-9]+)\..*",
            r"re:.*experts.*w1",
        ],
        "targets": [r"re:model.layers.3[.]mlp[.]experts[.]5[.].*", ["Linear", {"a": None}]],
        "bits": 4,
    }
    assert renumbered(said, kept) == {
        "ignore": ["lm_head", "model.layers.3.mlp.experts.1.up_proj"],
        "dynamic": {r"-:model\.layers\.3\.mlp\.experts\.1\..*": {"bits": 8}, "+:.*experts.*": {"bits": 4}},
        "modules_to_not_convert": [
            "model.layers.4.mlp.experts.2",
            r".*experts\.[0-9]+",
            r"re:.*experts\.([0-9]+)\..*",
            r"re:.*experts.*w1",
        ],
        "targets": [r"re:model.layers.3\.mlp\.experts\.1\..*", ["Linear", {"a": None}]],
        "bits": 4,
    }


@pytest.mark.parametrize(
    "entry",
    [
        "re:.*mlp.experts.5.up_proj",
        r"re:layers\.3\..*experts\.(1|2)\..*",
        "experts.[12].",
        r"re:model\.layers\.3\.mlp\.experts\.1[0-5]\..*",
        "model.layers.3.mlp.experts.5*",
    ],
)
def test_entries_that_cannot_follow_are_refused(entry):
    with pytest.raises(ValueError, match="cannot follow the experts' new numbers"):
        renumbered({"ignore": [entry]}, {3: [1, 5]})


def test_what_cannot_be_dequantised_is_not_streamed(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    (tmp_path / "full" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="quantised by awq, which transformers cannot dequantise while"):
        mp.load(tmp_path / "full", stream="disk")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_transformers_keeps_uneven_fp8_as_it_is_stored(tmp_path, monkeypatch, family):
    """On a GPU it does; here only the loading is tried, which is made to believe in one."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    saved(tmp_path / "full", family, hidden_size=32, intermediate_size=32, moe_intermediate_size=32)
    quantised.fp8(tmp_path / "full")
    scores = mp.score_experts(mp.calibrate(mp.load(tmp_path / "full"), [random_tokens()]))
    plan = mp.PruningPlan.from_pruned_counts(scores, {2: 4, 3: 2})
    out = mp.export(tmp_path / "full", plan, tmp_path / "out")
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    stored = load_file(out / "model.safetensors")
    for layer in (1, 2, 3):
        block = model.model.layers[layer].mlp
        count = len(plan.kept[layer])
        for name in ("weight", "weight_scale_inv"):
            made = getattr(block.experts, "down_proj" + name.removeprefix("weight"))
            assert made.dtype in (torch.float8_e4m3fn, torch.float32) and len(made) == count
            down = [
                name for name in stored if f"layers.{layer}." in name and re.search(r"experts\.1\.(down_proj|w2)", name)
            ]
            expert = next(stored[one] for one in down if one.endswith(f".{name}"))
            assert digest(made[1].data) == digest(expert)


@pytest.mark.parametrize("method", ["modelopt", "fp8", None])
@pytest.mark.parametrize("stream", [None, "disk"])
def test_scales_that_transformers_does_not_read_are_not_left_out_in_silence(tmp_path, method, stream):
    """FP8 with names of its own (ModelOpt, AutoFP8), or without a word in config.json."""
    tiny_model("olmoe").save_pretrained(tmp_path / "full")

    def quantise(weight):
        scales = {"weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(1.0)}
        return {"weight": (weight / 0.5).to(torch.float8_e4m3fn), **scales}

    quantised.quantise(tmp_path / "full", quantised.is_linear, quantise, {"quant_method": method})
    if method is None:
        config = json.loads((tmp_path / "full" / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not read the scales|cannot dequantise"):
        mp.load(tmp_path / "full", stream=stream)


def test_experts_of_which_some_have_no_scale_are_refused(tmp_path):
    if not has_dequantising_of_compressed_tensors():
        pytest.skip("this version of transformers does not dequantise compressed-tensors while it loads")
    saved(tmp_path / "full", "qwen3_moe", hidden_size=64, moe_intermediate_size=32, head_dim=16)
    quantised.compressed_tensors(tmp_path / "full", "float-quantized", ignore=(IGNORED,))
    with pytest.raises(ValueError, match="cannot be loaded"):
        mp.load(tmp_path / "full")
    streamed = mp.load(tmp_path / "full", stream="disk")
    with pytest.raises(ValueError, match="different numbers of weights and scales"):
        logits_of(streamed)


def test_a_language_model_of_a_multimodal_configuration_is_dequantised(tmp_path):
    """Qwen3.5: the configuration that is loaded is the inner one, the quantisation is said by the outer one."""
    tiny("qwen3_5_moe").to(torch.bfloat16).save_pretrained(tmp_path / "full")
    quantised.fp8(tmp_path / "full")
    loaded = mp.load(tmp_path / "full", dtype=torch.float32)
    streamed = logits_of(mp.load(tmp_path / "full", dtype=torch.float32, stream="disk"))
    quantised.unquantised_fp8(tmp_path / "full")
    expected = logits_of(mp.load(tmp_path / "full", dtype=torch.float32))
    assert torch.equal(logits_of(loaded), expected) and torch.equal(streamed, expected)
