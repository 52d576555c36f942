"""mp.eep: what it finds is what it says, on tiny models; splits, starts, resuming, refusals."""

import json
import math

import pytest
import torch
from tiny_models import tiny_model
from tiny_tasks import make_task

import moeprune_ext as mp
from moeprune_ext.calibration.criteria import CRITERIA
from moeprune_ext.candidates import sweep
from moeprune_ext.data.tasks import SPLITS, Example, Task, split_task
from moeprune_ext.eep import fitness as tf
from moeprune_ext.eep import starts as eep_starts
from moeprune_ext.eep.operators import Layout
from moeprune_ext.eep.settings import PAPER

SHORT = dict(prune_iters=12, merge_iters=10)
TINY = dict(prune_iters=4, merge_iters=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def task(model):
    return make_task(model)


@pytest.fixture(scope="module")
def found(model, task, tmp_path_factory):
    """One search by each fitness: {fitness: (result, directory)}."""
    folders = {name: tmp_path_factory.mktemp("run") / name for name in ("accuracy", "esap", "nll")}
    return {name: (mp.eep(model, task, 4, name, out=out, **SHORT), out) for name, out in folders.items()}


@pytest.fixture(scope="module")
def full(model, task):
    """The full model's distributions at the positions that predict an answer's tokens: {example: [T, V]}."""
    return {example: answer_distributions(model, example).exp() for example in task.examples}


def answer_distributions(model, example):
    answer = example.options[example.answer or 0]
    with torch.no_grad():
        logits = model(torch.tensor([example.prompt + answer]), use_cache=False).logits[0]
    return logits[len(example.prompt) - 1 : -1].double().log_softmax(-1)


def measured(model, task, fitness, full):
    """A fitness computed from logits, example by example."""
    if fitness == "accuracy":
        return mp.accuracy(model, task)
    total, count = 0.0, 0
    for example in task.examples:
        rows, answer = answer_distributions(model, example), example.options[example.answer or 0]
        if fitness == "nll":
            total -= float(rows.gather(1, torch.tensor(answer)[:, None]).sum())
        else:
            total += float(torch.minimum(rows.exp(), full[example]).sum())
        count += len(answer)
    return total / count


# ---- what is found


@pytest.mark.parametrize("fitness", ["accuracy", "esap", "nll"])
def test_scores_are_those_of_the_plans_on_the_splits(model, task, full, found, fitness):
    result, _ = found[fitness]
    splits = dict(zip(SPLITS, split_task(task, None, None, 0), strict=True))
    assert result.examples == {"train": 8, "valid": 4, "test": 4}
    for name, plan in (("pruned", result.pruned_plan), ("best", result)):  # a result stands for its best plan
        with mp.applied(model, plan):
            for split, part in splits.items():
                assert result.scores[name][split] == pytest.approx(measured(model, part, fitness, full), abs=1e-5)
                assert result.accuracy[name][split] == pytest.approx(mp.accuracy(model, part))
    for split, part in splits.items():
        assert result.scores["full"][split] == pytest.approx(measured(model, part, fitness, full), abs=1e-5)
        assert result.accuracy["full"][split] == mp.accuracy(model, part) == 1.0
    best, pruned = result.scores["best"], result.scores["pruned"]
    assert (result.score, result.valid_score, result.test_score) == tuple(best.values())
    assert (result.pruned_score, result.pruned_valid_score, result.pruned_test_score) == tuple(pruned.values())


@pytest.mark.parametrize(("fitness", "sign"), [("accuracy", 1), ("esap", 1), ("nll", -1)])
def test_merging_is_chosen_where_it_is_better_on_the_validation_split(found, fitness, sign):
    result, _ = found[fitness]
    assert sign * result.valid_score >= sign * result.pruned_valid_score
    assert result.evaluations == 22 and result.history[-1]["evaluations"] == 22
    best = result.history[-1]["best"]
    assert sign * (-math.log(best) if fitness == "nll" else best) >= sign * result.score - 1e-6


def test_plans_and_maps_say_the_same(found):
    kinds = set()
    for result, _ in found.values():
        assert {len(ids) for ids in result.pruned_plan.kept.values()} == {4} and result.pruned_plan.is_uniform
        assert not result.pruned_plan.merges
        assert list(result.router_map) == list(result.merge_map) == list(result.plan.kept) == [0, 1, 2, 3]
        maps = [*result.router_map.values(), *result.merge_map.values()]
        assert all(m.shape == (4, 8) and m.dtype == torch.float32 for m in maps)
        kinds.add(bool(result.plan.merges))
        for layer, merge in result.plan.merges.items():
            assert torch.equal(merge.experts, result.merge_map[layer])
            assert torch.equal(merge.router, result.router_map[layer])
    assert True in kinds


def test_files_hold_the_result(found):
    for result, out in found.values():
        assert mp.PruningPlan.load(out / "plan.json") == result.plan
        assert mp.PruningPlan.load(out / "pruned_plan.json") == result.pruned_plan
        about = json.loads((out / "result.json").read_text())
        assert about["scores"] == result.scores and about["accuracy"] == result.accuracy
        assert about["merges"] == bool(result.plan.merges) and about["fitness"] == result.fitness


def test_the_exported_checkpoint_does_what_was_measured(model, task, full, found, tmp_path):
    model.save_pretrained(tmp_path / "model")
    result, _ = found["esap"]
    exported = mp.load(mp.export(tmp_path / "model", result, tmp_path / "out"), dtype=torch.float32)
    test = split_task(task, None, None, 0)[2]
    assert result.plan.merges
    assert measured(exported, test, "esap", full) == pytest.approx(result.test_score, abs=1e-5)


def test_fewer_active_experts_need_fewer_kept(model, task, full):
    result = mp.eep(model, task, 1, "esap", active=1, prune_iters=4, merge_iters=6)
    assert result.pruned_plan.active == result.plan.active == 1
    assert {len(ids) for ids in result.pruned_plan.kept.values()} == {1}
    test = split_task(task, None, None, 0)[2]
    for plan, score in ((result.pruned_plan, result.pruned_test_score), (result.plan, result.test_score)):
        with mp.applied(model, plan):
            assert measured(model, test, "esap", full) == pytest.approx(score, abs=1e-5)
    assert result.scores["full"]["test"] == pytest.approx(1, abs=1e-5)  # the model as it is


def test_as_many_active_as_the_model_has_is_no_change(model, task):
    result = mp.eep(model, task, 4, active=2, prune_iters=2, merge_iters=0)
    assert result.plan.active is None


@pytest.mark.parametrize(("groups", "shared"), [(3, [[0, 1, 2], [3]]), ([[0, 3], [1, 2]], [[0, 3], [1, 2]])])
def test_layers_of_a_group_share_what_is_found(model, task, tmp_path, groups, shared):
    result = mp.eep(model, task, 4, "esap", layer_groups=groups, out=tmp_path, **TINY)
    for group in shared:
        assert len({tuple(result.pruned_plan.kept[layer]) for layer in group}) == 1
        for layer in group[1:]:
            assert torch.equal(result.merge_map[layer], result.merge_map[group[0]])
            assert torch.equal(result.router_map[layer], result.router_map[group[0]])
    assert json.loads((tmp_path / "search.json").read_text())["groups"] == shared
    assert "naee" not in json.loads((tmp_path / "starts.json").read_text())["masks"]  # its masks are of single layers


def test_layers_may_keep_different_numbers(model, task):
    keep = {0: 8, 1: 2, 2: 5, 3: 4}
    result = mp.eep(model, task, keep, prune_iters=11, merge_iters=2)
    assert {layer: len(ids) for layer, ids in result.plan.kept.items()} == keep
    assert {layer: len(rows) for layer, rows in result.router_map.items()} == keep


def test_routers_with_groups_are_pruned_group_by_group():
    model = tiny_model("deepseek_v3")  # two groups of four experts
    task = make_task(model, 8)
    result = mp.eep(model, task, 4, prune_iters=14, merge_iters=0)
    assert result.pruned_plan == result.plan and list(result.plan.kept) == [1, 2, 3]
    for ids in result.plan.kept.values():
        assert sum(expert < 4 for expert in ids) == sum(expert >= 4 for expert in ids) == 2
    with mp.applied(model, result):
        assert mp.accuracy(model, split_task(task, None, None, 0)[2]) == pytest.approx(result.test_score)


# ---- splits


def test_splits_are_seeded_and_disjoint_and_equal_examples_stay_together(task):
    doubled = Task("doubled", task.examples + task.examples[:8])
    splits = split_task(doubled, None, None, 3)
    sets = [set(split.examples) for split in splits]
    assert [len(one) for one in sets] == [8, 4, 4] and set().union(*sets) == set(task.examples)
    assert sum(len(split.examples) for split in splits) == 24
    assert splits == split_task(doubled, None, None, 3) != split_task(doubled, None, None, 4)
    for split in splits:  # in the task's order
        places = [doubled.examples.index(example) for example in dict.fromkeys(split.examples)]
        assert places == sorted(places)


def test_given_splits_stay_as_they_are(model, task):
    valid = make_task(model, 3, seed=9)
    train, found, test = split_task(task, valid, None, 0)
    assert found is valid and len(test.examples) == 4
    assert set(train.examples) | set(test.examples) == set(task.examples)
    whole = split_task(task, valid, make_task(model, 2, seed=10), 0)[0]
    assert whole.examples == task.examples
    with pytest.warns(UserWarning, match="16 examples of the test split are in the train split"):
        assert split_task(task, valid, task, 0)[0].examples == task.examples


def test_nothing_of_the_test_split_reaches_the_search(model, task, tmp_path):
    train, valid, test = split_task(task, None, None, 0)
    one = mp.eep(model, train, 4, valid=valid, test=test, out=tmp_path / "one", **TINY)
    other = mp.eep(model, train, 4, valid=valid, test=make_task(model, 5, seed=7), out=tmp_path / "two", **TINY)
    assert one.pruned_plan == other.pruned_plan and one.plan == other.plan and one.history == other.history
    for name in ("history.jsonl", "search.json", "starts.json", "plan.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ---- starts


def test_the_search_starts_from_what_the_criteria_keep(model, task, found):
    _, out = found["accuracy"]
    masks = json.loads((out / "starts.json").read_text())["masks"]
    train = split_task(task, None, None, 0)[0]
    rows = [torch.tensor([e.prompt + e.options[e.answer or 0]]) for e in train.examples]
    stats = mp.calibrate(model, rows)
    assert set(masks) == {"naee", *CRITERIA}
    for name in CRITERIA:
        plan = mp.uniform_plan(mp.score_experts(stats, name), 0.5)
        assert {int(layer): ids for layer, ids in masks[name].items()} == plan.kept
    naee = mp.naee_plan(model, rows, 0.5)
    assert {int(layer): ids for layer, ids in masks["naee"].items()} == naee.kept
    every = [mp.PruningPlan({int(i): ids for i, ids in m.items()}, dict.fromkeys(range(4), 8)) for m in masks.values()]
    scores = [fitness.score for fitness in tf.TaskFitness(model, train)(every)]
    assert json.loads((out / "history.jsonl").read_text().splitlines()[0])["phase"] == "start"
    assert found["accuracy"][0].history[0]["best"] >= max(scores)


def test_own_masks_are_starts(model, task):
    mine = {"mine": {layer: [0, 2, 4, 6] for layer in range(4)}}
    result = mp.eep(model, task, 4, starts=mine, prune_iters=1, merge_iters=0)
    assert result.plan.kept == mine["mine"] and result.evaluations == 1


def test_the_papers_settings_start_at_random_one_child_at_a_time(model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(eep_starts, "calibrate", lambda *_, **__: pytest.fail("nothing is calibrated"))
    mp.eep(model, task, 4, prune_iters=3, merge_iters=3, out=tmp_path, **PAPER)
    settings = json.loads((tmp_path / "search.json").read_text())
    expected = {"starts": "random", "tie_break": None, "per_call": 1, "cross_at_least": 6, "masks": []}
    assert {name: settings[name] for name in expected} == expected
    assert [json.loads(line)["phase"] for line in (tmp_path / "history.jsonl").open()] == ["start"] + ["merge"] * 3


def test_a_router_without_naee_is_searched_from_the_criteria_alone(model, task, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("cannot be run on its own")

    monkeypatch.setattr(eep_starts, "naee_subsets", refuse)
    with pytest.warns(UserWarning, match="without naee's mask: cannot be run on its own"):
        mp.eep(model, task, 4, prune_iters=2, merge_iters=0, out=tmp_path)
    assert set(json.loads((tmp_path / "starts.json").read_text())["masks"]) == set(CRITERIA)


# ---- resuming


def same(one, other):
    return all(getattr(one, name) == getattr(other, name) for name in ("plan", "pruned_plan", "scores", "history"))


def test_a_killed_search_goes_on_and_a_finished_one_can_be_extended(model, task, found, tmp_path, monkeypatch):
    whole, _ = found["esap"]
    calls = []
    real = tf.AnswerFitness.__call__

    def dies(self, candidates):
        calls.append(len(candidates))
        if len(calls) == 2:
            raise RuntimeError("killed")
        return real(self, candidates)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(tf.AnswerFitness, "__call__", dies)
        mp.eep(model, task, 4, "esap", out=tmp_path, **SHORT)
    assert calls == [12, 4] and not (tmp_path / "plan.json").exists()

    monkeypatch.setattr(eep_starts, "calibrate", lambda *_, **__: pytest.fail("the starts are known"))
    masks_only = mp.eep(model, task, 4, "esap", prune_iters=12, merge_iters=0, out=tmp_path)
    assert masks_only.pruned_plan == whole.pruned_plan and masks_only.plan == masks_only.pruned_plan
    assert not mp.PruningPlan.load(tmp_path / "plan.json").merges
    assert same(mp.eep(model, task, 4, "esap", out=tmp_path, **SHORT), whole)
    assert mp.PruningPlan.load(tmp_path / "plan.json").merges

    mp.eep(model, task, 4, "esap", prune_iters=12, merge_iters=0, out=tmp_path)
    assert not mp.PruningPlan.load(tmp_path / "plan.json").merges  # not left of a longer search


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fitness": "esap"}, "fitness"),
        ({"active": 1}, "active"),
        ({"length_normalized": True}, "length_normalized"),
        ({"seed": 1}, "seed"),
        ({"keep": 5}, "keep"),
        ({"task": "another"}, "data"),
        ({"starts": "random"}, "starts"),
    ],
)
def test_another_searchs_directory_is_refused_and_left_as_it_is(model, task, found, monkeypatch, change, named):
    _, out = found["accuracy"]
    monkeypatch.setattr(tf, "CandidateEvaluator", lambda *_, **__: pytest.fail("an evaluator was made"))
    change = {name: make_task(model, seed=8) if name == "task" else value for name, value in change.items()}
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to another search .*{named}"):
        mp.eep(model, **{"task": task, "keep": 4, "out": out, **SHORT, **change})
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_starts_of_a_search_that_never_began_are_replaced(model, task, tmp_path, monkeypatch):
    layout = Layout.of(dict.fromkeys(range(4), 8), 5)
    eep_starts.starting_masks(model, task, layout, out=tmp_path)
    mp.eep(model, task, 4, out=tmp_path, prune_iters=2, merge_iters=0)
    assert json.loads((tmp_path / "starts.json").read_text())["about"]["layout"][1] == [4] * 4
    monkeypatch.setattr(eep_starts, "calibrate", lambda *_, **__: pytest.fail("the starts are known"))
    mp.eep(model, task, 4, out=tmp_path, prune_iters=2, merge_iters=0)


def test_no_starts_are_written_beside_another_search(model, task, tmp_path):
    mp.eep(model, task, 4, out=tmp_path, prune_iters=2, merge_iters=0, **PAPER)
    eep_starts.starting_masks(model, task, Layout.of(dict.fromkeys(range(4), 8), 4), out=tmp_path)
    assert not (tmp_path / "starts.json").exists()


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1}, "layer 0 cannot keep 1 experts: its router needs at least 2"),
        ({"keep": 9}, "has 8 experts and cannot keep 9"),
        ({"keep": {0: 4}}, r"`keep` names layers \[0\]"),
        ({"active": 3}, "3 experts active per token; its router selects 2"),
        ({"active": 0}, "0 experts active"),
        ({"fitness": "bleu"}, "unknown fitness 'bleu'; choose from accuracy, esap, nll"),
        ({"layer_groups": 0}, "at least 1; got 0"),
        ({"layer_groups": [[0, 1]]}, "every one of the layers"),
        ({"starts": "best"}, "unknown starts"),
        ({"starts": {"mine": {0: [0, 1, 2, 3]}}}, r"starts\['mine'\] is for layers \[0\]"),
        ({"tie_break": "length"}, "unknown tie_break"),
        ({"prune_iters": 0}, "prune_iters must be at least 1"),
        ({"merge_iters": -1}, "merge_iters is at least 0"),
        ({"per_call": 0}, "per_call must be at least 1"),
        ({"cross_at_least": 1}, "cross_at_least at least 2"),
        ({"task": "few"}, "3 different examples, too few to cut"),
        ({"test": "empty"}, "the test split, none, has no examples"),
        ({"out": "file"}, "is not a directory"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(model, task, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(tf, "CandidateEvaluator", lambda *_, **__: pytest.fail("an evaluator was made"))
    (tmp_path / "file").touch()
    meant = {"few": Task("few", task.examples[:3] * 5), "empty": Task("none", ()), "file": tmp_path / "file"}
    change = {name: meant.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        mp.eep(model, **{"task": task, "keep": 4, "out": tmp_path / "run", **change})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fitness", ["accuracy", "esap"])
@pytest.mark.parametrize("lacking", [4, 10])  # sequences: right answers, by which nll and ESAP are told, are fewer
def test_merges_without_room_are_refused_before_a_candidate_is_scored(model, task, monkeypatch, fitness, lacking):
    def room(self, merged, real=sweep.LayerSweep._room):
        merged = list(merged)
        if len(self._lengths) >= lacking and merged:
            raise ValueError("are missing")
        return real(self, merged)

    monkeypatch.setattr(sweep.LayerSweep, "_room", room)
    for scorer in (tf.TaskFitness, tf.AnswerFitness):
        monkeypatch.setattr(scorer, "__call__", lambda *_: pytest.fail("candidates were scored"))
    with pytest.raises(ValueError, match="are missing"):
        mp.eep(model, task, 4, fitness, prune_iters=2, merge_iters=1)


def test_merging_behind_a_router_that_cannot_be_mapped_is_refused(monkeypatch):
    monkeypatch.setattr(tf, "CandidateEvaluator", lambda *_, **__: pytest.fail("an evaluator was made"))
    model = tiny_model("deepseek_v3")
    task = Task("any", tuple(Example((i,), ((i + 1,),), None) for i in range(2, 10)))
    with pytest.raises(ValueError, match="a router of groups.*merge_iters=0 prunes only"):
        mp.eep(model, task, 4)
    with pytest.raises(ValueError, match="2 groups cannot keep equally many of 5"):
        mp.eep(model, task, 5, merge_iters=0)
