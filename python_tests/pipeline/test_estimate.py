"""What a run will cost: counts that follow the model and what is asked for, and a dry run that leaves nothing."""

import json
from dataclasses import replace

import pytest
from tiny_models import tiny_model

from moeprune_ext.allocation.budget import Kept
from moeprune_ext.cli.main import main
from moeprune_ext.demo.run import demo_folder
from moeprune_ext.models.costs import costs
from moeprune_ext.pipeline.estimate import Asked, Machine, Size, duration, estimate
from moeprune_ext.pipeline.settings import PruneSettings, SearchSettings, TextSizes

MACHINE = Machine("made up", 1e12, 1e11, 1e9, reached=1.0)
ASKED = Asked(PruneSettings(), TextSizes(), 64, "float32")


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


def stages(found):
    return {stage.name: stage for stage in found.stages}


def test_forwards_count_what_costs_counts(model):
    size = Size.of(model, 0.5, None, "float32")
    assert size.forward == pytest.approx(costs(model).flops_per_token)
    assert size.weights == costs(model).bytes
    assert Size.of(model, 0.5, None, "bfloat16").weights == size.weights // 2
    assert Size.of(model, Kept(20), None, "float32").left < size.weights


def test_time_is_operations_over_the_rate_and_reading_over_the_disks(model):
    found = stages(estimate(model, ASKED, MACHINE, 0.5))
    search, texts = found["search"], TextSizes()
    searched = (texts.sequences - texts.sequences // 4) * 64
    assert search.flops == pytest.approx(718 * searched * costs(model).flops_per_token)
    assert search.seconds == pytest.approx(search.flops / 1e12)
    repair = found["repair"]
    assert repair.seconds == pytest.approx(repair.flops / 1e12 + repair.flops32 / 1e11)
    size = Size.of(model, 0.5, None, "float32")
    assert found["export"].seconds == pytest.approx((size.weights + size.left) / 1e9)
    twice = stages(estimate(model, ASKED, replace(MACHINE, reached=0.5), 0.5))
    assert twice["search"].seconds == pytest.approx(2 * search.seconds)


def test_stages_that_are_not_asked_for_cost_nothing(model):
    full = estimate(model, ASKED, MACHINE, 0.5)
    bare = replace(ASKED, settings=PruneSettings(criterion="reap", repair="off"))
    less = estimate(model, bare, MACHINE, 0.5)
    assert set(stages(full)) - set(stages(less)) == {"criterion", "repair"}
    assert less.seconds < full.seconds and sum(less.disk.values()) < sum(full.disk.values())
    unscreened = replace(ASKED, settings=PruneSettings(search=SearchSettings(screen=0)))
    assert "up to 1,404 plans" in stages(estimate(model, unscreened, MACHINE, 0.5))["search"].does


def test_streaming_trades_memory_for_passes_over_the_weights(model):
    held, streamed = (estimate(model, replace(ASKED, stream=how), MACHINE, 0.5) for how in ("no", "disk"))
    assert streamed.device["weights"] < held.device["weights"] and streamed.seconds > held.seconds
    gpu = replace(MACHINE, host=True)
    waiting = estimate(model, replace(ASKED, stream="host"), gpu, 0.5)
    assert waiting.host["weights of the waiting layers"] == costs(model).bytes
    assert waiting.device["weights"] > streamed.device["weights"]  # two layers instead of one


def test_qwen3_30b_counts_to_what_the_repair_bench_counted():
    size = Size(48, 128, 64, 2048, 768, 8, 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128), 0, 0, 2)
    forwards, fit = size.repair_flops(262_144)
    assert forwards == pytest.approx(4.29e15, rel=0.01) and forwards + fit == pytest.approx(1.52e16, rel=0.01)
    assert size.repair_bytes(262_144) / 2**20 == pytest.approx(8192 + 1024 + 1152)


def test_a_dry_run_says_that_it_estimates_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moeprune_ext.cli.io.load_model", lambda *_: pytest.fail("the weights were loaded"))
    (tmp_path / "text.txt").write_text("some text")
    ask = ["prune", str(demo_folder()), "--data", "text.txt", "--dry-run", "--dtype", "float32"]
    monkeypatch.chdir(tmp_path)
    main(ask)
    shown = capsys.readouterr().out
    assert "ESTIMATE, nothing was run" in shown and [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert "as much text as the run may use" in shown
    for name in ("calibrate", "criterion", "search", "repair", "export", "in all", "memory:", "disk:"):
        assert name in shown
    main([*ask, "--sparsity", "0.25", "0.5", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["0.25", "0.5"] and all(one["estimate"] is True for one in result.values())
    assert result["0.25"]["disk"]["checkpoint"] > result["0.5"]["disk"]["checkpoint"]
    assert all(stage["seconds"] > 0 for one in result.values() for stage in one["stages"])


def test_a_run_needs_a_directory_and_a_dry_run_text_that_is_there(capsys):
    for words, says in (([], "give -o"), (["--dry-run"], "there is no data file none.txt")):
        with pytest.raises(SystemExit) as stop:
            main(["prune", str(demo_folder()), "--data", "none.txt", *words])
        assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, "0.2 s"), (40, "40 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_shown_in_the_unit_that_reads_best(seconds, shown):
    assert duration(seconds) == shown
