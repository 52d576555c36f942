"""`moeprune search` by default: the criterion chosen by measurement, and the plan by text that was not searched on."""

import json
import random
import re
from itertools import islice

import pytest

import moeprune_ext as mp
from moeprune_ext.allocation import choice
from moeprune_ext.cli.main import main
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder

SIZES = ["--population", 4, "--generations", 2, "--elites", 2, "--sequence-length", 32]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Text of two domains, statistics, and a finished search on 20 sequences by the worst domain."""
    folder = tmp_path_factory.mktemp("auto")
    for domain in ("code", "arithmetic"):
        documents = islice(corpus.documents(domain, "calibration", random.Random(0)), 20)
        (folder / f"{domain}.txt").write_text("\n".join(documents)[:20_000])
    data = ["--data", folder / "code.txt", "--sequence-length", 32, "--sequences", 8]
    main(list(map(str, ["calibrate", demo_folder(), *data, "-o", folder / "stats.safetensors"])))
    main(list(map(str, [*asked(folder), "--objective", "worst", "-o", folder / "run"])))
    return folder


def asked(folder, *more, sequences=20):
    data = ["--data", folder / "code.txt", folder / "arithmetic.txt", "--sequences", sequences]
    return ["search", demo_folder(), "--stats", folder / "stats.safetensors", *SIZES, *data, *more]


def run(capsys, *arguments):
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_resumed_search_takes_the_same_order_and_plan_without_measuring(work, capsys, monkeypatch):
    first = {name: (work / "run" / name).read_text() for name in ("plan.json", "choice.json", "history.jsonl")}
    ask = [*asked(work), "--objective", "worst", "-o", work / "run"]
    for name in ("naee_scores", "choose_criterion"):
        monkeypatch.setattr(choice, name, lambda *_, **__: pytest.fail("the criterion was chosen already"))
    (work / "run" / "plan.json").unlink()  # as if killed after a generation
    (work / "run" / "history.jsonl").write_text(first["history.jsonl"].splitlines(keepends=True)[0])
    result = run(capsys, *ask)
    assert {name: (work / "run" / name).read_text() for name in first} == first
    assert result["objective"] == "worst" and result["criterion"].startswith("auto")
    assert {row["criterion"] for row in result["choice"]["table"]} >= {"reap", "seer", "naee"}
    assert json.loads((work / "run" / "held_out.json").read_text()) == result["held_out"]


def test_the_plan_written_is_the_winner_on_text_that_was_not_searched_on(work, capsys):
    result = run(capsys, *asked(work), "--objective", "worst", "-o", work / "run")
    held_out, plan = result["held_out"], mp.PruningPlan.load(result["plan"])
    assert held_out["sequences"] == 8 and held_out["says"] == result["note"]
    assert held_out["winner"] in (held_out["best"], held_out["baseline"])
    assert (held_out["winner"] == held_out["best"]) == (
        held_out["best"] == held_out["baseline"] or held_out["gain"]["low"] > 0
    )
    assert result["domains"] == pytest.approx(held_out["domains"][held_out["winner"]], abs=1e-6)
    assert set(result["domains"]) == {"code", "arithmetic"}
    assert held_out["scores"][held_out["winner"]] == pytest.approx(min(result["domains"].values()), abs=1e-6)
    assert [16 - len(ids) for ids in plan.kept.values()] and plan.sparsity == 0.5
    searched = json.loads((work / "run" / "search.json").read_text())
    assert searched["domains"] == {"code": 6, "arithmetic": 6} and searched["objective"] == "worst"
    main(list(map(str, [*asked(work), "--objective", "worst", "-o", work / "run"])))
    shown = capsys.readouterr().out
    assert "esap of the worst domain" in shown and "ESAP on held-out text: code 0." in shown
    assert result["note"] in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", 3], "seed: 0 there, 3 now"),
        (["--objective", "mean"], "objective: 'worst' there, 'mean' now"),
        (["--held-out-share", 0.6], "data"),
        (["--criterion", "seer"], "criterion: auto there, another now"),
        (["--min-kept", 7], "orders|capacities"),
        (["--held-out-share", 1], "below 1"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(work, capsys, change, message):
    before = {file: file.read_bytes() for file in (work / "run").rglob("*") if file.is_file()}
    with_worst = [*asked(work), "--objective", "worst", "-o", work / "run", *change]
    assert re.search(message, refusal(capsys, *with_worst))
    assert {file: file.read_bytes() for file in (work / "run").rglob("*") if file.is_file()} == before


def test_a_directory_of_a_named_criterion_is_refused_for_auto(work, capsys, tmp_path):
    few = asked(work, sequences=4)
    result = run(capsys, *few, "--criterion", "seer", "-o", tmp_path)
    assert result["choice"] is None and result["criterion"] == "seer" and not (tmp_path / "choice.json").exists()
    assert "criterion: a named one there, auto now" in refusal(capsys, *few, "-o", tmp_path)


def test_little_text_is_searched_on_whole_and_the_result_says_so(work, capsys, tmp_path):
    result = run(capsys, *asked(work, sequences=15), "--criterion", "seer", "-o", tmp_path / "few")
    assert result["held_out"] is None and "could be held out of 15 sequences (16 are needed)" in result["note"]
    assert mp.PruningPlan.load(result["plan"]).criterion == "seer"
    share = ["--criterion", "seer", "--held-out-share", 0]
    off = run(capsys, *asked(work, sequences=16), *share, "-o", tmp_path / "off")
    assert off["held_out"] is None and off["note"].startswith("Nothing is held out")
    searched = json.loads((tmp_path / "off" / "search.json").read_text())
    assert searched["domains"] == {"code": 8, "arithmetic": 8}


def test_a_layer_that_cannot_give_the_uniform_share_leaves_a_global_baseline(work, capsys, tmp_path):
    scores = mp.score_experts(mp.RoutingStats.load(work / "stats.safetensors"), "seer")
    scores.constrained(protect={2: range(12)}).save(tmp_path / "scores.json")
    ask = asked(work, "--scores", tmp_path / "scores.json", "-o", tmp_path / "run", sequences=16)
    result = run(capsys, *[word for word in ask if word not in ("--stats", work / "stats.safetensors")])
    assert result["uniform"] is None and result["held_out"]["baseline"] == "global"


def test_auto_is_refused_where_no_plan_is_scored(work, capsys, tmp_path):
    stats, out = work / "stats.safetensors", ["-o", tmp_path / "out"]
    for verb in (
        ["score", stats],
        ["allocate", demo_folder(), "--stats", stats],
        ["grape", demo_folder(), "--stats", stats],
    ):
        assert "auto is chosen by scoring plans" in refusal(capsys, *verb, "--criterion", "auto", *out)
    ask = asked(work, *out)
    refused = refusal(capsys, *[word for word in ask if word not in ("--stats", stats)])
    assert "give either --stats" in refused
    assert "too few for 2 sources" in refusal(capsys, *asked(work, *out, sequences=1))
    assert not (tmp_path / "out").exists()
