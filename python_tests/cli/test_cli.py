"""The verbs, end to end on the embedded model, and what they say to a bad request."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.calibration.criteria import CRITERIA, super_experts
from moeprune_ext.cli.main import main
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model directory, text and task files, and the products of calibrate and search."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(demo_folder(), folder / "model")
    (folder / "text.txt").write_text(corpus.code_documents("calibration")[0])
    tasks = [{"prompt": "1+1=", "answer": "2", "stop": "\n"}, {"prompt": "a", "choices": ["b", "c"], "answer": 1}]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "stop": "\n"} for a in range(2, 6) for b in range(2)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    data = ["--data", str(folder / "text.txt"), "--sequence-length", "64", "--sequences", "3"]
    main(["calibrate", str(folder / "model"), *data, "-o", str(folder / "stats.safetensors")])
    search = ["--stats", str(folder / "stats.safetensors"), "--population", "4", "--generations", "2", "--elites", "1"]
    main(["search", str(folder / "model"), *search, *data, "-o", str(folder / "run")])
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    """The one line that a bad request gets on stderr; nothing on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert printed.out == "" and "Traceback" not in printed.err
    assert last.startswith("moeprune ") and last.count("error:") == 1
    return last


def test_info_counts_every_byte(work, capsys):
    result = run(capsys, "info", work / "model")
    stored = load_file(work / "model" / "model.safetensors")
    assert sum(result["bytes"].values()) == sum(t.nbytes for t in stored.values())
    assert [layer["num_experts"] for layer in result["layers"]] == [16] * 6
    experts = sum(t.nbytes for name, t in stored.items() if ".experts." in name)
    assert result["bytes"]["experts"] == experts and result["saved_by_pruning"]["50%"] == experts // 2


def test_score_prints_any_criterion(work, capsys):
    stats = mp.RoutingStats.load(work / "stats.safetensors")
    for text, criterion in (("msan", "msan"), ("2,1,mean", (2, 1, "mean"))):
        result = run(capsys, "score", work / "stats.safetensors", "--criterion", text)
        assert result["scores"]["3"] == mp.score_experts(stats, criterion)[3].tolist()


def test_score_says_how_far_criteria_agree(work, capsys):
    stats = mp.RoutingStats.load(work / "stats.safetensors")
    result = run(capsys, "score", work / "stats.safetensors", "--criterion", "man", "frequency", "0,0,sum")
    assert result["compared"][:3] == ["man", "frequency", "(0, 0, sum)"] and set(CRITERIA) <= set(result["compared"])
    assert set(result["criteria"]) == {"man", "frequency", "(0, 0, sum)"}
    for layer, matrix in result["rank_correlations"].items():
        matrix = torch.tensor(matrix, dtype=torch.float64)
        torch.testing.assert_close(matrix, matrix.T)
        torch.testing.assert_close(matrix.diagonal(), torch.ones(len(matrix), dtype=torch.float64))
        assert matrix[1, 2] == pytest.approx(1)  # frequency is that triple
        order = torch.stack([mp.score_experts(stats, name)[int(layer)] for name in ("man", "frequency")])
        ranks = order.argsort(1).argsort(1).double()
        if all(len(row.unique()) == len(row) for row in order):
            assert matrix[0, 1] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    main(["score", str(work / "stats.safetensors"), "--criterion", "man", "msan"])
    shown = capsys.readouterr().out
    assert shown.count("higher = keep") == 2 and "rank correlation" in shown


def test_minima_and_super_experts_bind_every_plan(work, capsys, tmp_path):
    stats = mp.RoutingStats.load(work / "stats.safetensors")
    outliers = super_experts(stats)
    assert outliers
    limits = ["--min-kept", 6, "--protect-super"]
    run(capsys, "score", work / "stats.safetensors", *limits, "-o", tmp_path / "scores.json")
    scores = mp.ExpertScores.load(tmp_path / "scores.json")
    assert {layer: set(ids) for layer, ids in scores.protected.items()} == {k: set(v) for k, v in outliers.items()}
    make = [work / "model", "--stats", work / "stats.safetensors", "--criterion", "frequency", *limits]
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 4]
    sizes = ["--population", 4, "--generations", 2, "--elites", 1]
    for verb in (["allocate", "--method", "global"], ["allocate", "--method", "dp"], ["grape"], ["search", *sizes]):
        out = tmp_path / "-".join(map(str, verb))
        asked = [*data, "-o", out] if verb[-1] != "global" else ["-o", out]
        result = run(capsys, verb[0], *make, *verb[1:], *asked)
        plan = mp.PruningPlan.load(result["plan"])
        assert plan.sparsity == 0.5 and min(map(len, plan.kept.values())) >= 6
        assert all(set(ids) <= set(plan.kept[layer]) for layer, ids in outliers.items())


def test_damages_are_measured_once_and_plans_join_a_search(work, capsys, tmp_path):
    make = [work / "model", "--stats", work / "stats.safetensors"]
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 4]
    measured = ["--method", "dp", "--damages", tmp_path / "damages.json"]
    first = run(capsys, "allocate", *make, *measured, "--steps", 4, *data, "-o", tmp_path / "dp.json")
    again = run(capsys, "allocate", *make, *measured, "--sparsity", 0.25, "-o", tmp_path / "dp25.json")  # no data
    assert first["sparsity"] == 0.5 and again["sparsity"] == 0.25
    assert again["additive_damage"] <= first["additive_damage"]
    naee = run(capsys, "allocate", *make, "--method", "naee", *data, "-o", tmp_path / "naee.json")
    assert set(naee["kept_per_layer"].values()) == {8}
    init = ["--init", tmp_path / "dp.json", tmp_path / "naee.json"]
    sizes = ["--population", 4, "--generations", 1, "--elites", 1]
    run(capsys, "search", *make, *sizes, *init, *data, "-o", tmp_path / "run")
    history = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[0])
    assert history["scores"][0][0] == [16 - n for n in first["kept_per_layer"].values()]


def test_naee_scores_order_a_search(work, capsys, tmp_path):
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 4]
    ask = ["score", work / "stats.safetensors", "--criterion", "naee", "--model", work / "model", *data]
    result = run(capsys, *ask, "-o", tmp_path / "naee.json")
    assert result["criterion"] == "naee"
    scores = mp.ExpertScores.load(tmp_path / "naee.json")
    make = [work / "model", "--scores", tmp_path / "naee.json"]
    run(capsys, "allocate", *make, "-o", tmp_path / "uniform.json")
    assert mp.PruningPlan.load(tmp_path / "uniform.json") == mp.uniform_plan(scores, 0.5)
    sizes = ["--population", 4, "--generations", 1, "--elites", 1]
    found = run(capsys, "search", *make, *sizes, *data, "-o", tmp_path / "run")
    assert mp.PruningPlan.load(found["plan"]).criterion == "naee"


def test_grape_merges_and_the_merged_model_is_exported(work, capsys, tmp_path):
    make = [work / "model", "--stats", work / "stats.safetensors", "--sparsity", 0.25]
    result = run(capsys, "grape", *make, "--similarity", "weights", "--merge", "-o", tmp_path / "plan.json")
    plan = mp.PruningPlan.load(tmp_path / "plan.json")
    assert plan.sparsity == 0.25 and result["merged"] == sum(merge.sums for merge in plan.merges.values()) > 0
    run(capsys, "export", work / "model", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.no_grad(), mp.applied(mp.load(work / "model", dtype=torch.float32), plan) as model:
        expected = model(tokens).logits
        got = mp.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    # The export averages in the stored dtype's precision.
    assert float((got - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert "averages" in (tmp_path / "out" / "README.md").read_text()


def test_calibration_reports_rarely_routed_experts(work, capsys, tmp_path):
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 2]
    result = run(capsys, "calibrate", work / "model", *data, "-o", tmp_path / "stats.safetensors")
    stats = mp.RoutingStats.load(tmp_path / "stats.safetensors")
    for layer, counts in stats.tokens_per_expert.items():
        few = {str(e): n for e, n in enumerate(counts.tolist()) if n < 32}
        assert result["rarely_routed"].get(str(layer), {}) == few
    main(["calibrate", str(work / "model"), *map(str, data), "-o", str(tmp_path / "stats.safetensors"), "--force"])
    assert "fewer than 32 tokens" in capsys.readouterr().out


def test_token_files_need_no_tokenizer(work, capsys, tmp_path):
    shutil.copytree(work / "model", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    ids = AutoTokenizer.from_pretrained(work / "model")((work / "text.txt").read_text())["input_ids"][: 4 * 32]
    save_file({"input_ids": torch.tensor(ids).view(4, 32)}, tmp_path / "tokens.safetensors")
    data = ["--data", tmp_path / "tokens.safetensors", "--sequences", 4, "--sequence-length", 32]
    stats = tmp_path / "stats.safetensors"
    assert run(capsys, "calibrate", tmp_path / "mute", *data, "-o", stats)["tokens"] == 128
    same = run(capsys, "eval", work / "model", "--data", work / "text.txt", *data[2:])
    assert run(capsys, "eval", tmp_path / "mute", *data)["perplexity"] == same["perplexity"]
    mixed = ["calibrate", tmp_path / "mute", *data[:2], work / "text.txt", "-o", tmp_path / "new.safetensors"]
    assert "no tokenizer files" in refusal(capsys, *mixed)


def test_sources_are_weighed_and_said(work, capsys, tmp_path):
    qa = [{"question": f"{a} + {a}?", "answer": str(a + a)} for a in range(9)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, qa)))
    data = ["--data", work / "text.txt", f"{tmp_path / 'qa.jsonl'}*3", "--sequence-length", 32, "--sequences", 8]
    main(list(map(str, ["calibrate", work / "model", *data, "-o", tmp_path / "stats.safetensors"])))
    said = capsys.readouterr().err
    assert f"{work / 'text.txt'}: text, 1 record, 2 sequences\n" in said
    assert f"{tmp_path / 'qa.jsonl'}: question/answer, the first 6 records, 6 sequences\n" in said


def test_search_export_eval_chain_gives_the_searched_model(work, capsys):
    plan = mp.PruningPlan.load(work / "run" / "plan.json")
    assert plan.sparsity == 0.5
    result = run(capsys, "export", work / "model", "--plan", work / "run", "-o", work / "pruned")
    assert result["sparsity"] == 0.5 and (work / "pruned" / "README.md").exists()
    stored = load_file(work / "pruned" / "model.safetensors")
    assert sum(".experts." in name for name in stored) == 3 * 48
    model = mp.load(work / "pruned")
    task = ["--task", work / "task.jsonl", "--data", work / "text.txt", "--sequence-length", 64, "--sequences", 2]
    result = run(capsys, "eval", work / "pruned", *task, "--dtype", "float32")
    assert result[str(work / "task.jsonl")]["examples"] == 2 and result["perplexity"] > 1
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_search_resumes(work, capsys):
    data = ["--data", work / "text.txt", "--sequence-length", 64, "--sequences", 3]
    search = ["search", work / "model", "--stats", work / "stats.safetensors", "--population", 4, "--elites", 1]
    before = (work / "run" / "history.jsonl").read_text()
    result = run(capsys, *search, "--generations", 2, *data, "-o", work / "run")
    assert (work / "run" / "history.jsonl").read_text() == before
    assert result["plan"] == str(work / "run" / "plan.json")
    assert "seed" in refusal(capsys, *search, "--generations", 2, *data, "-o", work / "run", "--seed", 9)


def test_streamed_calibration_and_raced_search(work, capsys, tmp_path):
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 8]
    stats = tmp_path / "stats.safetensors"
    assert run(capsys, "calibrate", work / "model", *data, "--stream", "disk", "-o", stats)["tokens"] == 256
    settings = ["--population", 6, "--generations", 3, "--elites", 2, "--fidelity", "race", "--race-level", 0.2]
    search = ["search", work / "model", "--stats", stats, *settings, *data, "--stream", "host", "--router", "sliced"]
    result = run(capsys, *search, "-o", tmp_path / "run")
    assert "layer sweep, routers sliced" in result["method"]
    assert mp.PruningPlan.load(result["plan"]).sparsity == 0.5
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    for name in ("token_evaluations", "token_evaluations_saved"):
        assert result[name] == sum(line[name] for line in lines)


@pytest.mark.parametrize("fixed", ["objective", "fidelity"])  # the two others cannot go together
def test_every_setting_of_a_search_is_a_flag(work, capsys, tmp_path, fixed):
    others = {"objective": {"fidelity": "race"}, "fidelity": {"objective": "worst"}}[fixed]
    settings = EvolveSettings(
        sparsity=0.25,
        fitness="kl_pq",
        population=5,
        generations=3,
        elites=2,
        max_delta=2,
        max_steps=1,
        max_attempts=8,
        init_patterns=("up", "alt"),
        race_level=0.1,
        screen=4,
        seed=7,
        **others,
    )
    values = dataclasses.asdict(settings)
    assert [name for name, value in values.items() if value == getattr(EvolveSettings, name)] == [fixed]
    flags = [["--" + name.replace("_", "-"), *(v if isinstance(v, tuple) else [v])] for name, v in values.items()]
    data = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 8]
    search = ["search", work / "model", "--stats", work / "stats.safetensors", *data, *sum(flags, [])]
    run(capsys, *search, "-o", tmp_path)
    recorded = json.loads((tmp_path / "search.json").read_text())
    assert recorded == recorded | settings.recorded()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == settings.generations


EEP = ["--prune-iters", 3, "--merge-iters", 2]


def test_eep_finds_a_plan_to_export(work, capsys, tmp_path):
    ask = ["eep", work / "model", "--task", work / "sums.jsonl", "--keep", 14, *EEP, "-o", tmp_path / "run"]
    result = run(capsys, *ask)
    assert result["examples"] == {"train": 4, "valid": 2, "test": 2} and result["evaluations"] == 5
    full, prune, merge = result["rows"]
    assert [row["keep"] for row in result["rows"]] == [None, 14, 14]
    assert full["experts"] == 6 * 16 and prune["experts"] == merge["experts"] == 6 * 14
    stored = load_file(work / "model" / "model.safetensors")
    assert full["bytes"] == sum(tensor.nbytes for tensor in stored.values()) > merge["bytes"] >= prune["bytes"]
    assert full["flops_per_token"] > prune["flops_per_token"] and full["active"] == merge["active"] == 4
    out = run(capsys, "export", work / "model", "--plan", result["plan"], "-o", tmp_path / "out")
    assert out["bytes"] == pytest.approx(merge["bytes"], rel=0.01)  # the file's header
    before = (tmp_path / "run" / "history.jsonl").read_text()
    assert run(capsys, *ask) == result and (tmp_path / "run" / "history.jsonl").read_text() == before
    main(list(map(str, ask)))
    shown = capsys.readouterr().out
    main([*map(str, ask[:-1]), str(tmp_path / "esap"), "--fitness", "esap"])
    assert "esap on test: full 1.0000, pruned " in capsys.readouterr().out
    assert shown.count("|") == 5 * 10 and "prune + merge" in shown and f"plan: {result['plan']}" in shown


@pytest.mark.filterwarnings("ignore:8 examples of the")  # that all splits are one
def test_fewer_active_experts_are_measured_without_a_search(work, capsys, tmp_path):
    task = work / "sums.jsonl"
    ask = ["eep", work / "model", "--task", task, "--valid", task, "--test", task, "--active", 1, "-o", tmp_path]
    result = run(capsys, *ask)
    full, fewer = result["rows"]
    assert full["active"] == 4 and fewer["active"] == 1 and full["bytes"] == fewer["bytes"]
    assert full["flops_per_token"] > fewer["flops_per_token"]
    plan = mp.PruningPlan.load(result["plan"])
    assert plan.active == 1 and plan.sparsity == 0 and sorted(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    model, tokenizer = mp.load(work / "model"), AutoTokenizer.from_pretrained(work / "model")
    with mp.applied(model, plan):
        expected = mp.accuracy(model, mp.load_task(task, tokenizer))
    assert fewer["accuracy"] == pytest.approx(dict.fromkeys(("train", "valid", "test"), expected))


def test_the_table_has_every_baseline_at_every_budget(work, capsys, tmp_path):
    ask = ["eep", work / "model", "--task", work / "sums.jsonl", "--table", "--keep", 15, 14, "--active", 1]
    result = run(capsys, *ask, "--prune-iters", 2, "--merge-iters", 1, "-o", tmp_path)
    names = ["random, 5 masks", "frequency", "seer", "naee", "EEP: prune", "EEP: prune + merge"]
    names += ["EEP, paper's settings: prune", "EEP, paper's settings: prune + merge"]
    names = [(name, 4) for name in names] + [("naee", 1), ("EEP: prune", 1), ("EEP: prune + merge", 1)]
    expected = [("full", None, 4), ("full", None, 1), *((name, k, active) for k in (15, 14) for name, active in names)]
    rows = result["rows"]
    assert [(row["model"], row["keep"], row["active"]) for row in rows] == expected
    assert rows == json.loads((tmp_path / "table.json").read_text())
    assert (tmp_path / "table.md").read_text().count("\n") == len(rows) + 2
    assert all((row["spread"] is not None) == row["model"].startswith("random") for row in rows)
    for row in rows:
        assert (row["plan"] is not None) == row["model"].startswith("EEP")
        assert row["plan"] is None or (tmp_path / row["plan"]).exists()
        assert row["experts"] == 6 * (row["keep"] or 16)
    settings = {row["plan"].split("/")[0] for row in rows if row["plan"]}
    searches = {name: json.loads((tmp_path / name / "search.json").read_text()) for name in settings}
    assert {name for name, search in searches.items() if search["starts"] == "random"} == {
        "keep-15-paper",
        "keep-14-paper",
    }
    assert {search["active"] for name, search in searches.items() if name.endswith("active-1")} == {1}


def bad_requests(work):
    model, stats, text = work / "model", work / "stats.safetensors", work / "text.txt"
    plan = work / "run" / "plan.json"
    data = ["--data", text, "--sequence-length", 64, "--sequences", 2]
    search = ["search", model, "--stats", stats, *data]
    eep = ["eep", model, "--task", work / "sums.jsonl"]
    out = ["-o", work / "out"]
    return {
        "no such model": (["info", work / "nowhere"], "config.json"),
        "not a model": (["calibrate", work, *data, *out], "config.json"),
        "dense model": (["info", work / "dense"], "no Mixture-of-Experts"),
        "no weights": (["info", work / "empty"], "safetensors"),
        "missing data": (["calibrate", model, "--data", work / "no.txt", *out], "no data file"),
        "empty data": (["calibrate", model, "--data", work / "empty.txt", *out], "empty.txt is empty"),
        "output is a directory": (["calibrate", model, *data, "-o", work / "run"], "is a directory"),
        "output below a file": (["calibrate", model, *data, "-o", text / "x"], "is not a directory"),
        "run is a file": ([*search, "-o", text], "is not a directory"),
        "run among a model's files": ([*search, "-o", model], "holds a model"),
        "a name on the Hub": (["info", "allenai/OLMoE-1B-7B-0924"], "hf download allenai/OLMoE-1B-7B-0924 --local-dir"),
        "elites over population": ([*search, "--elites", 40, *out], "elites at most population"),
        "NaN statistics": (["calibrate", work / "broken", *data, *out], "NaN"),
        "NaN accuracy": (["eval", work / "broken", "--task", work / "task.jsonl"], "NaN"),
        "no tokenizer": (["calibrate", work / "mute", *data, *out], "no tokenizer files"),
        "missing weights": (["eval", work / "partial", "--task", work / "task.jsonl"], "model.norm.weight"),
        "truncated weights": (["info", work / "truncated"], "safetensors"),
        "truncated weights, loaded": (["eval", work / "truncated", "--task", work / "task.jsonl"], "cannot be loaded"),
        "top-k over experts": (["info", work / "wide"], "selects 40"),
        "statistics of another model": (
            ["search", work / "other", "--stats", stats, *data, *out],
            "gathered from another model",
        ),
        "infeasible budget": ([*search, "--sparsity", 0.9, *out], "at most 0.75"),
        "sparsity of one": ([*search, "--sparsity", 1, *out], "below 1"),
        "unknown criterion": ([*search, "--criterion", "best", *out], "unknown criterion"),
        "impossible race": ([*search, "--fidelity", "race", "--race-level", 0.9, *out], "below 0.5"),
        "no memory": ([*search, "--search-memory", 1e-6, *out], "--search-memory is 0.0 MiB"),
        "a sparsity of nothing": ([*search, "--sparsity", 0.01, *out], "removes 0 of 96 experts"),
        "longer than the model's positions": (
            ["calibrate", model, "--data", work / "long.safetensors", *out],
            "2,100 tokens, but",
        ),
        "an example beyond the positions": (
            ["eep", model, "--task", work / "long.jsonl", "--keep", 8, *out],
            "2,048 positions",
        ),
        "a file that is there": (["calibrate", model, *data, "-o", stats], "give --force"),
        "a plan that is there": (["allocate", model, "--stats", stats, "-o", plan], "give --force"),
        "scores that are there": (["score", stats, "-o", plan], "give --force"),
        "unknown fitness": ([*search, "--fitness", "bleu", *out], "unknown fitness"),
        "plan for another model": (["export", work / "other", "--plan", plan, *out], "another model"),
        "top-k over kept": (["export", model, "--plan", work / "greedy.json", *out], "needs at least 4"),
        "stats are no stats": (["score", text], "routing statistics"),
        "nothing to measure": (["eval", model], "--task"),
        "NaN logits": (["search", work / "broken", "--stats", work / "broken.safetensors", *data, *out], "NaN"),
        "unknown device": (["eval", model, "--task", work / "task.jsonl", "--device", "gpu"], "unknown device"),
        "useless device": (["eval", model, "--task", work / "task.jsonl", "--device", "meta"], "unknown device"),
        "a weight of nothing": (["eval", model, "--data", f"{text}*0"], "positive number"),
        "no share of the data": (["eval", model, "--data", text, text, "--sequences", 1], "too few"),
        "sequence of nothing": (["calibrate", model, "--data", text, "--sequence-length", 0, *out], "at least 1"),
        "negative budget": ([*search, "--search-memory", "-1", *out], "above 0"),
        "several criteria, one file": (["score", stats, "--criterion", "man", "ean", *out], "one criterion"),
        "nothing left to prune": (["score", stats, "--min-kept", 17], "cannot keep 17"),
        "dp by an unknown fitness": (
            ["allocate", model, "--stats", stats, "--method", "dp", "--fitness", "bleu", *data, *out],
            "unknown fitness",
        ),
        "damages of other data": (
            ["allocate", model, "--stats", stats, "--method", "dp", "--damages", work / "damages.json", *data, *out],
            "other data",
        ),
        "naee without a model": (["score", stats, "--criterion", "naee", *data, *out], "--model"),
        "neither stats nor scores": (["allocate", model, *out], "--scores"),
        "both stats and scores": (["allocate", model, "--stats", stats, "--scores", plan, *out], "either --stats"),
        "a plan for scores": (["allocate", model, "--scores", plan, *out], "not a file of expert scores"),
        "minimum over budget": (["allocate", model, "--stats", stats, "--min-kept", 15, *out], "can go"),
        "dp without text": (["allocate", model, "--stats", stats, "--method", "dp", *out], "--data"),
        "naee with minima": (
            ["allocate", model, "--stats", stats, "--method", "naee", "--min-kept", 7, *data, *out],
            "subsets of its own",
        ),
        "grape without text": (["grape", model, "--stats", stats, *out], "--similarity weights"),
        "evenness above one": (["grape", model, "--stats", stats, "--entropy", 2, *data, *out], "entropy"),
        "init of another budget": ([*search, "--sparsity", 0.25, "--init", plan, *out], "prunes 48 experts"),
        "eep of nothing": ([*eep, *out], "give --keep"),
        "two budgets without a table": ([*eep, "--keep", 8, 4, *out], "several budgets are for --table"),
        "a table without budgets": ([*eep, "--table", *out], "--table needs budgets"),
        "fewer kept than active": ([*eep, "--keep", 2, *out], "needs at least 4"),
        "fewer kept than the table's full rows": (
            [*eep, "--keep", 2, "--active", 1, "--table", *out],
            "needs at least 4",
        ),
        "more active than selected": ([*eep, "--active", 5, *out], "its router selects 4"),
        "eep by an unknown fitness": ([*eep, "--keep", 8, "--fitness", "kl", *out], "unknown fitness"),
        "a task too small to cut": (
            ["eep", model, "--task", work / "task.jsonl", "--keep", 8, *out],
            "2 different examples, too few",
        ),
        "no such task": (["eep", model, "--task", work / "no.jsonl", "--keep", 8, *out], "no file"),
        "eep run is a file": ([*eep, "--keep", 8, "-o", text], "is not a directory"),
        "no search by a fitness": ([*eep, "--active", 1, "--fitness", "esap", *out], "--fitness would do nothing"),
        "no search of groups": ([*eep, "--active", 1, "--layer-groups", 2, *out], "--layer-groups would do nothing"),
        "no search in so many steps": (
            [*eep, "--active", 1, "--paper", "--prune-iters", 3, "--merge-iters", 0, *out],
            "--paper, --prune-iters, --merge-iters would do nothing",
        ),
        "as many active as selected": ([*eep, "--active", 4, *out], "the routers select as many already"),
        "a plan is there": ([*eep, "--active", 1, "-o", work / "run"], "holds plan.json and search.json"),
        "a router of groups": (["eep", work / "grouped", *eep[2:], "--keep", 4, *out], "a router of groups"),
        "a router of groups, table": (
            ["eep", work / "grouped", *eep[2:], "--table", "--keep", 4, 6, *out],
            "a router of groups",
        ),
        "output exists": (["export", model, "--plan", plan, "-o", work / "model"], "already exists"),
    }


@pytest.fixture(scope="module")
def wrong_models(work):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(work / "dense")
    (work / "empty").mkdir()
    shutil.copy(work / "model" / "config.json", work / "empty")
    (work / "empty.txt").write_text("")
    save_file({"input_ids": torch.ones(1, 2100, dtype=torch.int64)}, work / "long.safetensors")
    words = [{"prompt": "a " * 2100 + str(n), "answer": "b", "stop": "\n"} for n in range(8)]
    (work / "long.jsonl").write_text("\n".join(map(json.dumps, words)))
    for name, change in (("other", lambda t: -t), ("broken", lambda t: t * float("nan"))):
        shutil.copytree(work / "model", work / name)
        tensors = load_file(work / name / "model.safetensors")
        key = "model.layers.2.mlp.gate.weight" if name == "other" else "model.layers.1.input_layernorm.weight"
        save_file(tensors | {key: change(tensors[key])}, work / name / "model.safetensors", metadata={"format": "pt"})
    grouped = tiny_model("deepseek_v3")
    grouped.resize_token_embeddings(len(AutoTokenizer.from_pretrained(work / "model")))
    grouped.save_pretrained(work / "grouped")
    for file in (work / "model").glob("tokenizer*"):
        shutil.copy(file, work / "grouped")
    shutil.copy(work / "stats.safetensors", work / "broken.safetensors")
    for name in ("mute", "partial", "truncated", "wide"):
        shutil.copytree(work / "model", work / name)
    for file in (work / "mute").glob("tokenizer*"):
        file.unlink()
    tensors = load_file(work / "model" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, work / "partial" / "model.safetensors", metadata={"format": "pt"})
    whole = (work / "model" / "model.safetensors").read_bytes()
    (work / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((work / "model" / "config.json").read_text())
    (work / "wide" / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 40}))
    measured = ["--method", "dp", "--damages", work / "damages.json", "--steps", 1, "-o", work / "dp.json"]
    other = ["--data", work / "text.txt", "--sequence-length", 32, "--sequences", 1]
    main(list(map(str, ["allocate", work / "model", "--stats", work / "stats.safetensors", *measured, *other])))
    plan = json.loads((work / "run" / "plan.json").read_text())
    plan["kept"]["0"] = plan["kept"]["0"][:3]
    (work / "greedy.json").write_text(json.dumps(plan))


@pytest.mark.parametrize("case", sorted(bad_requests(__import__("pathlib").Path("x"))))
def test_bad_requests_get_one_line_and_leave_nothing(work, wrong_models, capsys, monkeypatch, case):
    arguments, message = bad_requests(work)[case]
    early = {
        "longer than the model's positions",
        "a sparsity of nothing",
        "infeasible budget",
        "init of another budget",
        "evenness above one",
        "dp by an unknown fitness",
    }
    if case in early or arguments[0] == "eep":
        load = "moeprune_ext.cli.io.load_model"
        monkeypatch.setattr(load, lambda *_: pytest.fail("the model was loaded"))
    before = sorted(work.rglob("*"))
    assert message in refusal(capsys, *arguments)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    "verb", ["demo", "info", "calibrate", "score", "search", "allocate", "grape", "eep", "export", "eval"]
)
def test_every_verb_has_help_with_an_example(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "example: moeprune " + verb in " ".join(shown.split())
    assert all(option in shown for option in ("--seed", "--device", "--dtype", "--json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serch"], "did you mean search?"),
        (["info", "m", "--sead", "3"], "unrecognized arguments: --sead 3; did you mean --seed?"),
        (["search", "m"], "required: --data, -o/--out"),
        (["search", "m", "--data", "-o", "x"], "--data: expected at least one"),
        (["eep", "m", "--task", "t", "--keep", "four", "-o", "x"], "'four' is not a whole number"),
    ],
)
def test_wrong_flags_get_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and message in printed.err
    assert printed.err.startswith(" ".join(["moeprune", *words[:1]][: 1 + (len(words) > 1)]) + ": error: ")
    assert printed.err.count("\n") == 1


def test_without_a_verb_there_is_help_and_versions_are_one_line(capsys):
    main([])
    assert "EvoESAP" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    shown = capsys.readouterr().out
    assert (
        stop.value.code == 0 and shown.startswith(f"moeprune_ext {mp.__version__}, torch ") and "transformers" in shown
    )


@pytest.mark.parametrize(("verb", "resumes"), [("search", True), ("export", False)])
def test_who_interrupts_is_told_whether_the_same_command_goes_on(capsys, monkeypatch, verb, resumes):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"moeprune_ext.cli.{verb}.run", interrupt)
    flags = {"search": ["m", "--data", "t", "-o", "x"], "export": ["m", "--plan", "p", "-o", "x"]}[verb]
    with pytest.raises(SystemExit) as stop:
        main([verb, *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 130 and ("the same command goes on" in said) == resumes and said.count("\n") == 1


def test_the_list_of_verbs_does_not_wait_for_torch():
    code = (
        "import sys; from moeprune_ext.cli.main import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "EvoESAP" in done.stdout and "'argparse'" in done.stdout and "'torch'" not in done.stdout
