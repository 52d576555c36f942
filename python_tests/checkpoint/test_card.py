"""The model card: what of the source's it keeps, and what it says of loading."""

import json

import pytest
from huggingface_hub import metadata_load
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.serving.check import runtimes

SOURCE = (
    "---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE\nlanguage:\n- en\ntags:\n- chat\n---\n# Source\n"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model = tiny_model("olmoe")
    model.save_pretrained(folder)
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return folder, scores


def exported(source, out, plan=None):
    folder, scores = source
    return mp.export(folder, plan or mp.uniform_plan(scores, 0.5), out)


def test_licence_and_language_are_the_sources_and_its_files_stay(source, tmp_path):
    (source[0] / "README.md").write_text(SOURCE)
    (source[0] / "LICENSE").write_text("terms")
    config = json.loads((source[0] / "config.json").read_text())
    (source[0] / "config.json").write_text(json.dumps(config | {"_name_or_path": "allenai/OLMoE"}))
    out = exported(source, tmp_path / "out")
    metadata = metadata_load(out / "README.md")
    assert metadata["license"] == "other" and metadata["license_name"] == "tongyi" and metadata["language"] == ["en"]
    assert metadata["base_model"] == "allenai/OLMoE" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation" and "moeprune" in metadata["tags"]
    assert (out / "README.source.md").read_text() == SOURCE and (out / "LICENSE").read_text() == "terms"
    again = mp.export(
        out, mp.uniform_plan(mp.score_experts(mp.calibrate(mp.load(out), [random_tokens()])), 0.25), tmp_path / "again"
    )
    assert (again / "README.source.md").read_text() == SOURCE  # the first source's, not our own card
    assert metadata_load(again / "README.md")["license"] == "other"


@pytest.mark.parametrize("card", ["no metadata", "---\n: [\n---\n", "---\n- a list\n---\n", ""])
def test_a_card_without_metadata_is_kept_all_the_same(source, tmp_path, card):
    (source[0] / "README.md").write_text(card)
    out = exported(source, tmp_path / "out")
    assert (out / "README.source.md").read_text() == card
    assert "license" not in metadata_load(out / "README.md")


def test_the_card_and_the_check_say_what_loads_an_export(source, tmp_path):
    folder, scores = source
    uniform = exported(source, tmp_path / "uniform")
    uneven = exported(source, tmp_path / "uneven", mp.PruningPlan.from_pruned_counts(scores, {0: 4, 2: 2, 3: 1}))
    assert "trust_remote_code" not in (uniform / "README.md").read_text()
    assert "trust_remote_code=True" in (uneven / "README.md").read_text()
    for stock in (uniform, folder):
        assert [runtime.loads for runtime in runtimes(stock)] == [True, True, None, None, None, None]
    loads = {runtime.name: runtime for runtime in runtimes(uneven)}
    assert loads["transformers"].loads and not loads["llama.cpp"].loads
    vllm = loads["vLLM, moeprune_ext installed beside it"]
    assert vllm.loads and "tensor parallel up to 4" in vllm.how and "no expert parallelism" in vllm.how
    config = json.loads((uneven / "config.json").read_text())
    (uneven / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    of_quantised = {runtime.name: runtime for runtime in runtimes(uneven)}
    for name in ("vLLM, moeprune_ext installed beside it", "vLLM without us", "mlx-lm"):
        assert of_quantised[name].loads is None and "not tried" in of_quantised[name].how


def test_serve_check_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        runtimes(tmp_path)
