"""A whole run: what it ends with, that it goes on wherever it was killed, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import quantised
import torch
from every_model import tiny
from safetensors.torch import load_file, save_file
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM

import moeprune_ext as mp
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.ops import reference
from moeprune_ext.pipeline.prune import prune_checkpoint, report_text
from moeprune_ext.pipeline.settings import PruneSettings, TextSizes

SIZES = TextSizes(calibration_sequences=16, sequences=32, test_sequences=8)
SEARCH = EvolveSettings(population=6, generations=3, elites=2)
LENGTH = 24


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a model and two sources of tokens."""
    folder = tmp_path_factory.mktemp("prune")
    tiny_model("olmoe").save_pretrained(folder / "model")
    for number, name in enumerate(("first", "second")):
        save_file({"input_ids": random_tokens(40, LENGTH, seed=number)}, folder / f"{name}.safetensors")
    return folder


def prune(work, out, **changes):
    options = {"sparsity": 0.5, "search": SEARCH, "texts": SIZES, "sequence_length": LENGTH, "dtype": torch.float32}
    options["data"] = [work / "first.safetensors", work / "second.safetensors"]
    return prune_checkpoint(work / "model", out, **{**options, **changes})


@pytest.fixture(scope="module")
def finished(work):
    return prune(work, work / "finished")


def content(folder):
    """Every file of a directory but the logs of what was done, whatever its kind."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_checkpoint_has_the_esap_that_was_printed(work, finished):
    full, pruned = mp.load(work / "model", dtype=torch.float32), mp.load(finished.out, dtype=torch.float32)
    tokens = [load_file(work / f"{name}.safetensors")["input_ids"][:28][-4:] for name in ("first", "second")]
    with torch.no_grad():
        p, q = (model(torch.cat(tokens), use_cache=False).logits.flatten(0, 1) for model in (full, pruned))
    expected = reference.overlap(p.double(), q[None].double())["esap"].mean()
    last = finished.measured.rows[-1]
    assert last.esap.value == pytest.approx(float(expected), abs=1e-5)
    assert last.esap.low < last.esap.value < last.esap.high
    assert last.esap.value == pytest.approx(
        sum(its.value for its in last.domains.values()) / 2, abs=1e-6
    )  # of equally long domains
    loss = torch.nn.functional.cross_entropy(
        q.view(8, LENGTH, -1)[:, :-1].flatten(0, 1), torch.cat(tokens)[:, 1:].flatten()
    )
    assert last.perplexity.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert last.perplexity.low < last.perplexity.value < last.perplexity.high


def test_a_uniform_result_is_a_stock_checkpoint(work, tmp_path):
    result = prune(
        work, tmp_path / "out", search=EvolveSettings(population=1, generations=1, elites=1), criterion="seer"
    )
    assert result.plan.is_uniform and result.plan.repaired_layers
    model = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    again = mp.load(result.out, dtype=torch.float32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    full = mp.load(work / "model", dtype=torch.float32)
    evaluated = mp.CandidateEvaluator(full, [random_tokens(4, LENGTH)]).evaluate([result.plan])[0].esap
    with torch.no_grad():
        p, q = (m(random_tokens(4, LENGTH), use_cache=False).logits.flatten(0, 1) for m in (full, model))
    assert evaluated == pytest.approx(float(reference.overlap(p.double(), q[None].double())["esap"].mean()), abs=1e-5)


def test_the_table_compares_full_uniform_and_this_plan(work, finished):
    rows = finished.measured.rows
    assert [row.model for row in rows[:3]] == ["full", "uniform, reap", "this plan"]
    assert rows[0].esap.value == pytest.approx(1, abs=1e-6) and rows[0].experts == 2 * rows[1].experts
    assert rows[0].disk > rows[1].disk == rows[2].disk and rows[0].memory > rows[1].memory
    assert rows[0].active > rows[2].active or rows[0].active == rows[2].active  # a router loses rows
    assert all(row.model in finished.table for row in rows)
    assert finished.report == finished.out / "moeprune" / "report.html" and finished.report.exists()
    said = report_text(finished)
    assert finished.table in said and "moeprune_ext.load" in said
    weights = sum(file.stat().st_size for file in finished.out.glob("*.safetensors"))
    assert rows[-1].disk == weights
    result = json.loads((finished.out / "moeprune" / "result.json").read_text())
    assert result == json.loads(json.dumps(finished.as_json()))


def test_repair_is_taken_only_where_held_out_text_does_not_get_worse(finished):
    scores = json.loads((finished.out / "moeprune" / "repair.json").read_text())["scores"]
    assert set(scores) >= {"none", "layer", "hidden", "layer-sequential", "hidden-sequential"}
    best = max(scores, key=scores.get)
    assert scores[best] >= scores["none"] and bool(finished.plan.repaired_layers) == (best != "none")


def test_a_finished_run_is_read_again_without_its_model(work, finished, monkeypatch):
    monkeypatch.setattr("moeprune_ext.pipeline.prune.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    before = content(finished.out)
    again = prune(work, finished.out)
    assert again.as_json() == finished.as_json() and content(finished.out) == before


# What each stage leaves, in order; a run killed in a stage has the files of those before it.
STAGES = {
    "calibrate": [],
    "choose": ["stats.safetensors"],
    "search": ["stats.safetensors", "choice.json"],
    "rank": ["stats.safetensors", "choice.json", "search"],
    "repair": ["stats.safetensors", "choice.json", "search", "searched.json", "held_out.json"],
    "measure": ["stats.safetensors", "choice.json", "searched.json", "held_out.json", "plan.json", "plan.safetensors"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_any_stage_goes_on_to_the_same_checkpoint(work, finished, tmp_path, stage):
    out = tmp_path / "out"
    for name in ["request.json", *STAGES[stage]]:
        source, target = finished.out / "moeprune" / name, out / "moeprune" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    if stage == "search":  # a generation is done, and a line is cut off
        history = (finished.out / "moeprune" / "search" / "history.jsonl").read_text().splitlines(keepends=True)
        (out / "moeprune" / "search").mkdir()
        shutil.copy(finished.out / "moeprune" / "search" / "search.json", out / "moeprune" / "search")
        (out / "moeprune" / "search" / "history.jsonl").write_text(history[0] + history[1][:20])
    result = prune(work, out)
    assert result.plan.kept == finished.plan.kept
    weights = {path.name for path in finished.out.glob("*.safetensors")}
    assert weights == {path.name for path in out.glob("*.safetensors")}
    for name in weights:
        assert (out / name).read_bytes() == (finished.out / name).read_bytes()
    rows = [{**row, "disk": 0} for row in result.as_json()["rows"]]
    assert rows == [{**row, "disk": 0} for row in finished.as_json()["rows"]]


def test_a_run_killed_while_the_checkpoint_is_moved_goes_on(work, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    beside = out / "moeprune" / "checkpoint"
    beside.mkdir()
    for name in ("config.json", "README.md"):  # not moved yet; the weights are
        (out / name).rename(beside / name)
    prune(work, out)

    def without_its_place(files):
        return {name: data for name, data in files.items() if "report" not in name and "result.json" not in name}

    assert without_its_place(content(out)) == without_its_place(content(finished.out))
    assert not beside.exists()


def test_nothing_pruned_changes_no_weight(work, tmp_path):
    result = prune(work, tmp_path / "out", sparsity=0.0, search=EvolveSettings(population=1, generations=1, elites=1))
    before, after = (load_file(folder / "model.safetensors") for folder in (work / "model", result.out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert result.measured.rows[-1].esap.value == pytest.approx(1, abs=1e-6)


def test_another_budget_setting_or_text_is_refused_by_name(work, finished, tmp_path):
    with pytest.raises(ValueError, match="sparsity|search"):
        prune(work, finished.out, sparsity=0.25)
    with pytest.raises(ValueError, match="criterion: 'auto' there, 'seer' now"):
        prune(work, finished.out, criterion="seer")
    with pytest.raises(ValueError, match="test: "):
        prune(work, finished.out, texts=TextSizes(16, 32, 12))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not the directory of a run"):
        prune(work, tmp_path / "full")


def test_what_cannot_be_is_refused_before_the_weights_are_read(work, tmp_path, monkeypatch):
    monkeypatch.setattr("moeprune_ext.pipeline.prune.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="can go"):
        prune(work, tmp_path / "out", sparsity=0.9)
    with pytest.raises(ValueError, match="needs 32 at least"):
        prune_checkpoint(
            work / "model",
            tmp_path / "out",
            data=[work / "first.safetensors"],
            sequence_length=LENGTH,
            texts=TextSizes(4, 4, 4),
        )
    with pytest.raises(ValueError, match="repair is 'all'"):
        prune(work, tmp_path / "out", repair="all")
    with pytest.raises(ValueError, match="no config.json"):
        prune_checkpoint(tmp_path, tmp_path / "out", data=[work / "first.safetensors"])
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_repaired_as_asked_is_refused_before_other_work(tmp_path, work, monkeypatch):
    tiny("flex_olmo").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("moeprune_ext.pipeline.run.calibrate", lambda *args, **kwargs: pytest.fail("it calibrates"))
    with pytest.raises(ValueError, match='use target="layer"'):
        prune(tmp_path, tmp_path / "out", data=[work / "first.safetensors"], repair="hidden")


@pytest.mark.parametrize("stream", [None, "disk"])
def test_quantised_experts_stay_the_bytes_that_they_are(work, tmp_path, stream):
    """FP8, streamed too: repair is left out, and says so; asked for by name it is refused before other work."""
    tiny_model("olmoe").save_pretrained(tmp_path / "model")
    quantised.fp8(tmp_path / "model")
    said = []
    data = {"data": [work / "first.safetensors"], "stream": stream}
    result = prune(tmp_path, tmp_path / "out", say=said.append, **data)
    assert any("repair is left out" in line and "F8_E4M3" in line for line in said) and not result.plan.merges
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", result.out))
    for name in ("weight", "weight_scale_inv"):
        new, old = (f"model.layers.1.mlp.experts.{expert}.up_proj.{name}" for expert in (1, result.plan.kept[1][1]))
        assert torch.equal(after[new].float(), before[old].float()) and after[new].dtype == before[old].dtype
    with pytest.raises(ValueError, match="quantised experts cannot be repaired"):
        prune(tmp_path, tmp_path / "other", repair="layer", **data)


def test_a_triple_is_a_criterion_and_its_run_goes_on(work, tmp_path):
    options = {
        "criterion": (1, 1, "mean"),
        "repair": False,
        "search": EvolveSettings(population=2, generations=1, elites=1),
    }
    first = prune(work, tmp_path / "out", **options)
    assert first.plan.criterion == "(1, 1, mean)" and not first.plan.repaired_layers
    assert prune(work, tmp_path / "out", **options).plan == first.plan


@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_options_reach_their_stages(work, tmp_path, objective):
    settings = PruneSettings(
        multiple_of=2, max_kept=6, refine=1 if objective == "mean" else 0, sequential="on", search=EvolveSettings()
    )
    search = EvolveSettings(population=4, generations=2, elites=1, objective=objective, fidelity="full")
    result = prune(work, tmp_path / "out", settings=settings, search=search, repair="layer")
    counts = [len(ids) for ids in result.plan.kept.values()]
    assert all(count % 2 == 0 and count <= 6 for count in counts) and sum(counts) == 16
    assert result.held_out.objective == objective
    scores = json.loads((Path(result.out) / "moeprune" / "repair.json").read_text())["scores"]
    assert set(scores) == {"none", "layer-sequential"}
