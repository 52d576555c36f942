"""`on_generation` of evolve and eep: when it is called, with what, and what an exception in it leaves behind."""

import pytest
from tiny_models import random_tokens, tiny_model
from tiny_tasks import make_task

import moeprune_ext as mp

MODEL = tiny_model("olmoe")
SIZES = dict(population=6, generations=4, elites=2)


@pytest.fixture(scope="module")
def evolve():
    """A search that takes a directory and a callback."""
    scores = mp.score_experts(mp.calibrate(MODEL, [random_tokens()]), "reap")
    evaluator = mp.CandidateEvaluator(MODEL, [random_tokens(seed=7)])
    return lambda out, **more: mp.evolve(evaluator, scores, 0.5, **SIZES, out=out, **more)


@pytest.fixture(scope="module")
def eep():
    task = make_task(MODEL)
    return lambda out, **more: mp.eep(MODEL, task, 4, prune_iters=8, merge_iters=6, out=out, **more)


@pytest.mark.parametrize("name", ["evolve", "eep"])
def test_every_record_of_the_history_is_told_in_order(name, request):
    records = []
    result = request.getfixturevalue(name)(None, on_generation=records.append)
    assert len(records) > 2 and records == [{**record, "resumed": False} for record in result.history]


@pytest.mark.parametrize("name", ["evolve", "eep"])
def test_an_exception_ends_the_search_which_resumes_behind_it(name, request, tmp_path):
    search = request.getfixturevalue(name)

    def stop_at_the_second(record):
        records.append(record)
        if len(records) == 2:
            raise RuntimeError("enough")

    records = []
    with pytest.raises(RuntimeError, match="enough"):
        search(tmp_path, on_generation=stop_at_the_second)
    records = []
    resumed = search(tmp_path, on_generation=records.append)
    whole = search(None)
    assert [record["resumed"] for record in records] == [True, True] + [False] * (len(records) - 2)
    assert [record["best"] for record in records] == pytest.approx([record["best"] for record in whole.history])
    assert resumed.plan.kept == whole.plan.kept
