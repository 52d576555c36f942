"""Tasks in the sweep: the right answers that `correct` finds, for every candidate; EEP's search on the demo model."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_tasks import greedy

import moeprune_ext as mp
from moeprune_ext.data.tasks import Example, Task
from moeprune_ext.demo.run import arithmetic_task, load_demo
from moeprune_ext.eep.fitness import TaskFitness, candidate_plan
from moeprune_ext.eep.operators import Layout, candidate_of, criterion_mask, given_mask, is_mask, merge_child
from moeprune_ext.eep.search import search
from moeprune_ext.eep.settings import EepSettings, Rates
from moeprune_ext.evaluate.quality import correct, generated_matches
from moeprune_ext.models.apply import planned
from moeprune_ext.models.moe import find_moe_layers


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def task(model):
    """Exact matches, of which the model has some right, and choices of several lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(2, 90, (count,), generator=generator).tolist())

    examples = []
    for number in range(12):
        prompt = ids(3 + number % 4)
        if number % 3 == 0:
            examples.append(Example(prompt, (greedy(model, prompt, 2 + number % 2),), None))
        elif number % 3 == 1:
            examples.append(Example(prompt, (ids(2),), None))
        else:
            examples.append(Example(prompt, tuple(ids(1 + n) for n in range(3)), number % 3))
    return Task("mixed", tuple(examples))


def random_candidate(seed, keep=4):
    layout = Layout.of(dict.fromkeys(range(4), 8), keep)
    generator = torch.Generator().manual_seed(seed)
    ids = [sorted(torch.randperm(8, generator=generator)[:keep].tolist()) for _ in range(4)]
    mask = given_mask(layout, dict(enumerate(ids)))
    noise = [[0.2 * torch.rand(keep, 8, generator=generator) for _ in range(4)] for _ in range(2)]
    one_hot = [merge.experts for merge in mask.merges.values()]
    merging, mapping = ([m + n for m, n in zip(one_hot, kind, strict=True)] for kind in noise)
    return mask, candidate_of(layout, merging, mapping)


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("active", [None, 1])
def test_right_answers_are_those_of_the_candidate_run_alone(model, task, length_normalized, active):
    fitness = TaskFitness(model, task, length_normalized=length_normalized, active=active)
    candidates = [candidate for seed in range(3) for candidate in random_candidate(seed)]
    found = fitness(candidates)
    for candidate, got in zip(candidates, found, strict=True):
        plan = mp.PruningPlan.from_merges(candidate.merges, active=active)
        with planned(find_moe_layers(model), plan):
            expected = correct(model, task, length_normalized=length_normalized)
        assert got.score == pytest.approx(sum(expected) / len(expected))
    assert [f.tie for f in found] == pytest.approx([fitness([c])[0].tie for c in candidates], abs=1e-4)


def test_exact_match_in_the_sweep_is_greedy_generation_with_merged_experts():
    """On the demo model: masks and merges, scored without generating, against what they generate."""
    model, tokenizer = load_demo()
    task = arithmetic_task(tokenizer, 60, seed=7)
    fitness = TaskFitness(model, task)
    layout = Layout.of(dict.fromkeys(fitness.evaluator.layers, 16), 10)
    stats = mp.calibrate(model, [s.input_ids for s in fitness.evaluator.sequences])
    mask = given_mask(layout, criterion_mask(layout, mp.score_experts(stats, "weighted_ean")))
    rng = np.random.default_rng(0)
    candidates = [mask, *(merge_child([mask], layout, rng, Rates(scale=0.25)) for _ in range(3))]
    scores = [one.score for one in fitness(candidates)]
    for candidate, score in zip(candidates, scores, strict=True):
        with mp.applied(model, candidate_plan(candidate, fitness.evaluator, None)):
            forced, generated = correct(model, task), generated_matches(model, task)
        assert forced == generated
        assert score == pytest.approx(sum(generated) / 60)
    assert min(scores) < 0.95 and max(scores) > 0.3, "both outcomes must occur, or this shows nothing"


def test_the_unpruned_model_scores_its_accuracy(model, task):
    nothing = mp.PruningPlan({0: list(range(8))}, {0: 8})
    assert TaskFitness(model, task)([nothing])[0].score == pytest.approx(mp.accuracy(model, task))
    assert mp.accuracy(model, task) >= 4 / 12


def test_eep_on_the_demo_model_beats_its_starts(tmp_path):
    """A short search on arithmetic: the best mask is no worse than a criterion's, the best merge than the best mask."""
    model, tokenizer = load_demo()
    task = arithmetic_task(tokenizer, 24)
    fitness = TaskFitness(model, task)
    stats = mp.calibrate(model, [s.input_ids for s in fitness.evaluator.sequences])
    layout = Layout.of(dict.fromkeys(fitness.evaluator.layers, 16), 8)
    masks = [criterion_mask(layout, mp.score_experts(stats, name)) for name in ("frequency", "seer", "reap", "ean")]
    outcome = search(
        fitness,
        layout,
        EepSettings(prune_iters=10, merge_iters=8, rates=Rates(start_count=6)),
        masks=masks,
        identity=fitness.evaluator.identity,
        out=tmp_path,
    )
    starts = fitness([given_mask(layout, mask) for mask in masks])
    assert is_mask(outcome.pruned) and outcome.evaluations == 18
    best_start = max(starts, key=lambda start: start.rank)
    for better, worse in ((outcome.pruned_train, best_start), (outcome.train, outcome.pruned_train)):
        # A likelihood is not the same to the last digit in other company.
        assert (better.score, better.tie + 1e-5) >= worse.rank
    assert fitness([outcome.best])[0].score == pytest.approx(outcome.train.score)
