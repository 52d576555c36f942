"""The study's statistics, its sentences, its resuming, and its page, which says what its numbers say."""

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import study
import torch
from scipy.stats import spearmanr
from study_cells import QUICK, Bench, Sizes, cells_of, random_plan
from study_numbers import Study, compared, counted, difference, interval_of, mean_interval, rank_correlation, says, side
from study_page import FORMAT, render
from study_tables import principle, tables_of

from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.files import read_json
from moeprune_ext.pipeline.settings import PruneSettings

DOCS = Path(study.__file__).parents[1] / "docs"


def cell(part, name, seed, **rows):
    return {"part": part, "name": name, "seed": seed, "seconds": 1.0, "rows": rows}


def two_rows(first, second):
    """Makes a study of two rows, one value a seed."""
    cells = [
        cell("c", "50%", seed, GRAPE={"esap": a}, uniform={"esap": b})
        for seed, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return Study({"cells": cells})


# ---- numbers


def test_the_t_interval_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(1000, 5))
    intervals = [mean_interval(list(values)) for values in draws]
    assert 0.93 <= sum(one.low <= 3.0 <= one.high for one in intervals) / 1000 <= 0.97


def test_one_seed_has_no_interval_and_decides_nothing():
    interval = mean_interval([0.7])
    assert interval.value == 0.7 and math.isnan(interval.low) and math.isnan(interval.high)
    assert side(difference([0.9], [0.1])) == 0


def test_a_difference_that_is_the_same_for_all_seeds_decides_nothing():
    gain = difference([0.986667, 0.983333, 0.99], [0.993333, 0.99, 0.996667])
    assert side(gain) == 0
    assert says("test", gain) == "-0.7 points, the same for all seeds"


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(1)
    outcome = rng.integers(0, 6, size=50).astype(float)
    predictor = outcome + rng.normal(size=50)
    assert rank_correlation(predictor, outcome, draws=1)[0] == pytest.approx(spearmanr(predictor, outcome).statistic)


def test_the_correlations_interval_covers_the_true_one_about_as_often_as_it_says():
    rho, covered = 0.6, 0
    true = 6 / math.pi * math.asin(rho / 2)  # Spearman's of a normal pair
    rng = np.random.default_rng(2)
    for _ in range(100):
        x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=80).T
        interval = interval_of(rank_correlation(x, y, draws=200))
        covered += interval.low <= true <= interval.high
    assert 0.85 <= covered / 100 <= 0.99


def test_correlations_of_a_predictor_and_its_negative_cancel_draw_by_draw():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 40))
    assert rank_correlation(x, y) == pytest.approx(-rank_correlation(-x, y))


# ---- sentences


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([0.90, 0.92, 0.91], [0.80, 0.81, 0.80], "better than uniform"),
        ([0.80, 0.81, 0.80], [0.90, 0.92, 0.91], "worse than uniform"),
        ([0.90, 0.80, 0.85], [0.80, 0.90, 0.86], "not to be told from uniform"),
    ],
)
def test_a_sentence_says_what_the_interval_says(first, second, verdict):
    sentence = compared(two_rows(first, second), "esap", ("c", "50%", "GRAPE"), {"uniform": ("c", "50%", "uniform")})
    assert sentence.startswith(verdict)


def test_criteria_are_counted_on_the_side_where_their_interval_is():
    numbers = two_rows([0.90, 0.92, 0.91], [0.80, 0.81, 0.80])
    one, other = ("c", "50%", "GRAPE"), ("c", "50%", "uniform")
    sentence = counted(numbers, "esap", {"up": (one, other), "down": (other, one), "same": (one, one)}, "it", "none")
    assert sentence == "better than it for up; worse for down; not to be told from it for same"


@pytest.mark.parametrize(("general", "specific", "holds"), [(0.9, 0.5, 1), (0.5, 0.9, -1), (0.7, 0.7, 0)])
def test_the_principle_is_judged_in_its_own_direction(general, specific, holds):
    def rows(seed):
        values = dict.fromkeys(("man", "msan"), general + 0.01 * (-1) ** seed)
        values |= dict.fromkeys(("reap", "seer", "frequency"), specific)
        return {f"50% {name}": {"generation": value} for name, value in values.items()}

    for calibration, sign in (("mixed text", 1), ("arithmetic answers", -1)):
        cells = [cell("b", calibration, seed, **rows(seed)) for seed in range(4)]
        assert principle(Study({"cells": cells}), calibration, "50%", "generation")[0] == (sign * holds,) * 2


# ---- running


def test_a_cell_that_is_there_is_not_measured_again(tmp_path):
    measured = []

    def work():
        measured.append(1)
        return {"full": {"esap": 0.5}}

    first = study.cell(tmp_path, "a", "50% reap", 3, work)
    assert study.cell(tmp_path, "a", "50% reap", 3, work) == first
    assert len(measured) == 1
    study.cell(tmp_path, "a", "50% reap", 4, work)
    assert len(measured) == 2


def test_a_cell_that_fails_leaves_no_file(tmp_path):
    def work():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        study.cell(tmp_path, "a", "full", 0, work)
    assert list(tmp_path.iterdir()) == []


def test_cells_of_another_model_or_of_other_sizes_are_refused(tmp_path):
    settings = {"model": "abc", **study.in_lists(Sizes())}
    study.refuse_other_study(tmp_path, settings)
    study.refuse_other_study(tmp_path, settings)
    with pytest.raises(ValueError, match="other model"):
        study.refuse_other_study(tmp_path, settings | {"model": "abd"})
    with pytest.raises(ValueError, match="other problems"):
        study.refuse_other_study(tmp_path, settings | study.in_lists(Sizes(problems=12)))


def test_the_json_text_holds_the_content(tmp_path):
    content = {"format": FORMAT, "about": {"seeds": 1}, "cells": [cell("a", "full", 0, full={"esap": 1.0})]}
    content["tables"] = {"a": [], "b": []}
    file = tmp_path / "study.json"
    file.write_text(study.as_text(content))
    assert read_json(file) == content


def test_content_of_another_format_is_refused():
    with pytest.raises(ValueError, match="format"):
        render({"format": "moeprune.plan/2"})


# ---- plans


@pytest.fixture
def bench(tmp_path):
    """Stands for a Bench of a model of 6 layers of 16 experts, without the model."""

    def scores(name):
        values = {
            layer: torch.rand(16, generator=torch.Generator().manual_seed(len(name) + layer)) for layer in range(6)
        }
        return ExpertScores(values, dict.fromkeys(values, LayerShape(16, 4, min_kept=4)), name)

    return SimpleNamespace(scores=scores, source=SimpleNamespace(settings=PruneSettings()), seed=0)


def test_random_plans_spend_the_budget_and_differ_and_are_drawn_again_by_their_number(bench):
    plans = [random_plan(bench, 0.5, number) for number in range(20)]
    assert {sum(plan.pruned_counts.values()) for plan in plans} == {48}
    assert len({str(plan.kept) for plan in plans}) == 20
    assert [plan.kept for plan in plans] == [random_plan(bench, 0.5, number).kept for number in range(20)]


def test_a_plan_is_measured_once(bench, monkeypatch, tmp_path):
    numbers = []

    def text(self, plans):
        numbers.append(len(plans))
        return [{"esap": float(len(plan.kept[0]))} for plan in plans]

    monkeypatch.setattr(Bench, "_text", text)
    measuring = Bench(None, None, QUICK, 0, tmp_path)
    a, b = (random_plan(bench, 0.5, number) for number in (0, 1))
    assert measuring.measure({"a": a}, ("text",)) == {"a": {"esap": float(len(a.kept[0]))}}
    both = measuring.measure({"b": b, "again": a}, ("text",))
    assert both == {"b": {"esap": float(len(b.kept[0]))}, "again": {"esap": float(len(a.kept[0]))}}
    assert numbers == [1, 1]


def test_every_random_plan_is_in_one_cell():
    sizes = Sizes(random_plans=60, plans_per_cell=25)
    assert list(cells_of("e", sizes, 0)) == ["25% 0", "25% 25", "25% 50", "50% 0", "50% 25", "50% 50"]
    assert cells_of("e", sizes, 1) == {} and cells_of("d", sizes, sizes.eep_seeds) == {}


# ---- the page


@pytest.fixture(scope="module")
def content():
    return read_json(DOCS / "study.json")


def test_the_page_is_what_its_numbers_say(content):
    assert (DOCS / "study.md").read_text(encoding="utf-8") == render(content)


def test_the_tables_in_the_json_are_those_of_the_cells(content):
    assert content["tables"] == {part: [asdict(table) for table in its] for part, its in tables_of(content).items()}


def test_every_table_says_n_and_every_part_is_there(content):
    tables = tables_of(content)
    assert list(tables) == list("abcdef")
    assert all(table.note.count("n = ") == 1 and "95 %" in table.note for its in tables.values() for table in its)
    assert all(table.found for its in tables.values() for table in its)
