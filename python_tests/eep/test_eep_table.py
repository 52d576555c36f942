"""EEP's table: resumed, refused before any work, and rows without a number."""

import math

import pytest
from tiny_models import tiny_model
from tiny_tasks import make_task

import moeprune_ext as mp
from moeprune_ext.data.tasks import SPLITS
from moeprune_ext.eep import fitness as tf
from moeprune_ext.eep import starts as eep_starts
from moeprune_ext.eep.search import Fitness
from moeprune_ext.eep.settings import PAPER, EepSettings
from moeprune_ext.eep.table import eep_table, format_table, measured_row
from moeprune_ext.models.apply import full_plan


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def task(model):
    return make_task(model)


def test_a_table_goes_on_where_its_searches_are(model, task, tmp_path, monkeypatch):
    ask = dict(settings=EepSettings(active=1, prune_iters=2, merge_iters=1), out=tmp_path)
    rows = eep_table(model, task, [4], **ask)
    monkeypatch.setattr(eep_starts, "calibrate", lambda *_, **__: pytest.fail("the starts are known"))
    assert eep_table(model, task, [4], **ask) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": []}, "keep names no budget"),
        ({"keep": [4, 1]}, "layer 0 cannot keep 1 experts"),
        ({"prune_iters": 0}, "prune_iters must be at least 1"),
        ({"merge_iters": -1}, "merge_iters is at least 0"),
        ({"model": "deepseek_v3", "keep": [4, 6]}, "a router of groups.*merge_iters=0 prunes only"),
        ({"prune_iters": 3}, "keep-5-paper belongs to another search .*prune_iters"),
        ({"task": "another"}, "keep-5-paper belongs to another search .*data"),
    ],
)
def test_a_table_that_cannot_be_finished_is_refused_before_any_work(
    model, task, tmp_path, monkeypatch, change, message
):
    mp.eep(model, task, 5, out=tmp_path / "keep-5-paper", prune_iters=2, merge_iters=0, **PAPER)
    monkeypatch.setattr(tf, "CandidateEvaluator", lambda *_, **__: pytest.fail("an evaluator was made"))
    monkeypatch.setattr(eep_starts, "calibrate", lambda *_, **__: pytest.fail("the model was calibrated"))
    meant = {"another": make_task(model, seed=8), "deepseek_v3": tiny_model("deepseek_v3")}
    change = {name: meant.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    ask = {"model": model, "task": task, "keep": [4, 5], "prune_iters": 2, "merge_iters": 1, **change}
    with pytest.raises(ValueError, match=message):
        settings = EepSettings(prune_iters=ask.pop("prune_iters"), merge_iters=ask.pop("merge_iters"))
        eep_table(**ask, settings=settings, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["keep-5-paper"]


def test_masks_one_of_which_gives_no_number_have_no_spread(model):
    def judge(plans):
        return [Fitness(math.nan if place == 1 else place / 8) for place in range(len(plans))]

    row = measured_row(model, dict.fromkeys(SPLITS, judge), "random", 4, [full_plan(model)] * 3)
    assert math.isnan(row.spread) and math.isnan(row.accuracy["test"])
    assert row.as_json()["spread"] is None and "nan%" in format_table([row])
    judges = dict.fromkeys(SPLITS, lambda plans: [Fitness(0.25), Fitness(0.75)])
    assert measured_row(model, judges, "random", 4, [full_plan(model)] * 2).spread == pytest.approx(0.5 / 2**0.5)
