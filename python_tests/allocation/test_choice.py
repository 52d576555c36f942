"""criterion="auto": what is compared, what a mix of criteria must prove, and how a choice is kept."""

import json
from itertools import product

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation import choice
from moeprune_ext.allocation.choice import CriterionChoice, auto_criterion, choose_criterion
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.threshold import global_plan
from moeprune_ext.calibration.criteria import CRITERIA
from moeprune_ext.candidates.metrics import SequenceSums, objective_value


@pytest.fixture(scope="module")
def small():
    model = tiny_model("olmoe")
    evaluator = mp.CandidateEvaluator(model, {"a": [random_tokens(seed=7)], "b": [random_tokens(seed=8)]})
    return evaluator, mp.calibrate(model, [random_tokens()])


@pytest.mark.parametrize(("fitness", "objective"), [("esap", "mean"), ("kl_pq", "worst")])
def test_the_best_of_all_criteria_and_allocations_is_taken(small, fitness, objective):
    evaluator, stats = small
    naee = naee_scores(evaluator.moe, evaluator.sequences)
    found = choose_criterion(
        evaluator, stats, 0.5, more_scores=[naee], fitness=fitness, objective=objective, per_layer=False
    )
    scores = {name: mp.score_experts(stats, name) for name in CRITERIA} | {"naee": naee}
    plans = {
        (name, how): make(one, 0.5)
        for name, one in scores.items()
        for how, make in (("uniform", mp.uniform_plan), ("global", global_plan))
    }
    expected = dict(zip(plans, evaluator.fitness(list(plans.values()), fitness, objective), strict=True))
    table = {(row["criterion"], row["allocation"]): row["score"] for row in found.table}
    assert table == pytest.approx(expected, abs=1e-5)
    best = (max if fitness == "esap" else min)(table, key=table.get)
    assert found.score == table[best] and found.plan.kept == plans[best].kept and found.per_layer is None
    assert found.scores.criterion == found.plan.criterion == f"auto: {best[0]}" and found.gain is None
    assert all(found.scores.pruning_order(layer) == scores[best[0]].pruning_order(layer) for layer in found.scores)
    assert found.evaluations == len({json.dumps(list(plan.kept.items())) for plan in plans.values()})


class Additive:
    """An evaluator of an invented model: a layer is worth most with the experts that are good in it.

    `noise` is what a change of any layer adds to some sequences and takes from as many others.
    """

    def __init__(self, stats, good, noise=0.0, sequences=12):
        self.stats, self.good, self.noise = stats, good, noise
        self.domains = {"all": list(range(sequences))}
        self.sequences = list(range(sequences))
        self.sweeps = []

    def weights(self, metric):
        return [10] * len(self.sequences)

    def check_objective(self, metric, objective):
        pass

    def objective_values(self, sums, metric, objective):
        return objective_value(metric, objective, sums, torch.full((len(self.sequences),), 10.0), self.domains)

    def sequence_sums(self, plans, metrics):
        self.sweeps.append(len(plans))
        rows = []
        for plan in plans:
            worth = sum(len(set(self.good[layer]) & set(ids)) for layer, ids in plan.kept.items()) / 10
            swing = self.noise * sum(sum(ids) for ids in plan.kept.values()) / 10
            rows.append([worth + swing * (-1) ** (i // 2) for i in self.sequences])
        sums = torch.tensor(rows, dtype=torch.float64)
        return SequenceSums({metrics[0]: sums}, torch.zeros(sums.shape, dtype=torch.int64))


@pytest.fixture(scope="module")
def invented(small):
    """Statistics, and two orders, each of which is right in three of the four layers."""
    _, stats = small
    kept = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [0, 2, 4, 6], 3: [1, 3, 5, 7]}

    def order(name, right):
        values = {
            layer: torch.tensor([float((e in kept[layer]) == (layer in right)) for e in range(8)]) for layer in kept
        }
        return mp.ExpertScores({i: v.double() for i, v in values.items()}, dict(stats.shapes), name, stats.model)

    return stats, kept, [order("first", {0, 1, 2}), order("second", {1, 2, 3})]


def test_layers_take_the_criterion_that_is_right_for_them_in_few_evaluations(invented):
    stats, kept, orders = invented
    evaluator = Additive(stats, kept)
    found = choose_criterion(evaluator, stats, 0.5, more_scores=orders)
    assert found.plan.kept == kept and found.scores.criterion == "auto per layer"
    assert found.per_layer == {0: "first", 1: "first", 2: "first", 3: "second"}
    assert found.gain.above_zero and found.gain.value == pytest.approx(0.04)
    assert len(evaluator.sweeps) <= 3 and found.evaluations == sum(evaluator.sweeps) <= 2 * 11 + 6 * 4
    uniform = mp.uniform_plan(found.scores, 0.5)
    assert uniform == found.plan  # a search of counts starts from this order
    single = choose_criterion(Additive(stats, kept), stats, 0.5, more_scores=orders, per_layer=False)
    assert single.scores.criterion == "auto: first" and single.score < found.score


def test_a_mix_that_may_be_chance_is_not_taken(invented):
    stats, kept, orders = invented
    found = choose_criterion(Additive(stats, kept, noise=3.0), stats, 0.5, more_scores=orders)
    assert found.per_layer is None and found.gain.value > 0 >= found.gain.low
    assert found.scores.criterion.startswith("auto: ")


@pytest.mark.parametrize("objective", ["mean", "worst"])
def test_one_sequence_chooses_a_criterion_but_no_mix(invented, objective):
    stats, kept, orders = invented
    evaluator = Additive(stats, kept, sequences=1)
    found = choose_criterion(evaluator, stats, 0.5, more_scores=orders, objective=objective)
    assert found.scores.criterion == "auto: first" and found.per_layer is None


def test_a_layer_that_cannot_give_the_uniform_share_leaves_the_global_plans(small):
    evaluator, stats = small
    found = choose_criterion(evaluator, stats, 0.5, limits=lambda scores: scores.constrained(protect={1: range(6)}))
    assert {row["allocation"] for row in found.table} == {"global"} and len(found.table) == len(CRITERIA)
    assert len(found.notes) == 1 and found.notes[0].startswith("no uniform plans: layer 1")
    assert set(range(6)) <= set(found.plan.kept[1]) and found.plan.sparsity == 0.5
    assert found.plan == mp.PruningPlan.from_pruned_counts(found.scores, found.plan.pruned_counts)


def test_impossible_choices_are_refused(small, invented):
    evaluator, stats = small
    with pytest.raises(ValueError, match="at most 0.75"):
        choose_criterion(evaluator, stats, 0.9)
    with pytest.raises(ValueError, match="two of the scores are of one criterion"):
        choose_criterion(evaluator, stats, 0.5, more_scores=[mp.score_experts(stats, "seer")])
    with pytest.raises(ValueError, match="unknown objective"):
        choose_criterion(evaluator, stats, 0.5, objective="least")
    other = mp.calibrate(tiny_model("olmoe", seed=5), [random_tokens()])
    with pytest.raises(ValueError, match="another model"):
        choose_criterion(evaluator, other, 0.5)
    broken = Additive(stats, invented[1], noise=float("nan"))
    with pytest.raises(ValueError, match="every candidate gave NaN"):
        choose_criterion(broken, stats, 0.5)
    with pytest.raises(ValueError, match="criterion auto is chosen by scoring plans on text"):
        mp.score_experts(stats, "auto")


def test_grouped_routers_get_a_choice_without_naee_where_it_refuses(monkeypatch):
    model = tiny_model("deepseek_v3")
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    stats = mp.calibrate(model, [random_tokens()])

    def refuses(*_, **__):
        raise ValueError("its router is strange")

    monkeypatch.setattr(choice, "naee_scores", refuses)
    found = auto_criterion(evaluator, stats, 0.25)
    assert found.notes == ["naee is left out: its router is strange"]
    assert {row["criterion"] for row in found.table} == set(CRITERIA)
    for ids in found.plan.kept.values():
        assert sum(e < 4 for e in ids) == sum(e >= 4 for e in ids)


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_choice_reads_back_as_it_was_written(invented, tmp_path, per_layer):
    stats, kept, orders = invented
    found = choose_criterion(Additive(stats, kept), stats, 0.5, more_scores=orders, per_layer=per_layer, notes=["so"])
    found.save(tmp_path / "choice.json", {"seed": 3})
    again = CriterionChoice.load(tmp_path / "choice.json", {"seed": 3})
    assert again.as_json() == found.as_json() and again.plan == found.plan and again.per_layer == found.per_layer
    with pytest.raises(ValueError, match="seed: 3 there, 4 now"):
        CriterionChoice.load(tmp_path / "choice.json", {"seed": 4})
    (tmp_path / "choice.json").write_text("{}")
    with pytest.raises(ValueError, match="not a choice of a criterion"):
        CriterionChoice.load(tmp_path / "choice.json")


def test_a_choice_that_is_there_is_taken_and_another_request_refused(small, tmp_path, monkeypatch):
    evaluator, stats = small
    file = tmp_path / "choice.json"
    first = auto_criterion(evaluator, stats, 0.5, file=file)
    assert "naee" in {row["criterion"] for row in first.table}
    monkeypatch.setattr(evaluator, "sequence_sums", lambda *_: pytest.fail("everything was scored already"))
    again = auto_criterion(evaluator, stats, 0.5, file=file)
    assert again.as_json() == first.as_json()
    changes = [("sparsity", {"sparsity": 0.25}), ("seed", {"seed": 1}), ("fitness", {"fitness": "kl_pq"})]
    changes += [("orders", {"limits": lambda scores: scores.constrained(protect={0: [0, 1]})})]
    for name, change in changes:
        with pytest.raises(ValueError, match=f"another search .*{name}"):
            auto_criterion(evaluator, stats, **{"sparsity": 0.5, "file": file, **change})


def test_products_of_criteria_are_never_worse_than_the_best_one(small):
    evaluator, stats = small
    for sparsity, objective in product((0.25, 0.5), ("mean", "worst")):
        found = choose_criterion(evaluator, stats, sparsity, objective=objective)
        assert found.score >= max(row["score"] for row in found.table)
        assert evaluator.fitness([found.plan], "esap", objective)[0] == pytest.approx(found.score, abs=1e-6)
