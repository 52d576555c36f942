"""Racing: who is dropped, how often wrongly, what is saved, and that elites are always scored on everything."""

import math

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext.allocation.racing import race, rounds, student_quantile

SEQUENCES = 64


def test_student_quantiles_are_the_tables():
    table = {(1, 0.975): 12.7062, (2, 0.975): 4.30265, (3, 0.9875): 4.17653, (7, 0.95): 1.89458, (63, 0.975): 1.99834}
    for (freedom, probability), value in table.items():
        assert student_quantile(probability, freedom) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 5, 12, 64, 100, 1000])
def test_rounds_end_with_all_sequences_and_grow(sequences):
    plan = rounds(sequences)
    assert plan[-1] == sequences and plan == sorted(set(plan))
    assert len(plan) <= 6 and (sequences < 5 or plan[0] >= 4)


def made_up(generator, candidates, weights, spread=0.05):
    """Sums over sequences of candidates whose means differ and which rise and fall with the sequence together."""
    level = 0.7 + 0.1 * torch.randn(len(weights), generator=generator, dtype=torch.float64)
    mean = spread * torch.randn(candidates, 1, generator=generator, dtype=torch.float64)
    own = 0.02 * torch.randn(candidates, len(weights), generator=generator, dtype=torch.float64)
    return (level + mean + own) * weights


def generations(seed, count, candidates=28, elites=4):
    """Races of a made-up search: (sums of the candidates, elites' sums, sequence weights) for each generation."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(50, 200, (SEQUENCES,), generator=generator).double()
    best = None
    for _ in range(count):
        sums = made_up(generator, candidates, weights)
        yield sums, best, weights
        every = sums if best is None else torch.cat([best, sums])
        best = every[every.sum(1).argsort(descending=True)[:elites]]


def test_the_measured_rate_of_wrong_drops_is_at_most_the_stated_level():
    """Over 2,000 fully scored candidates, among those no worse than the worst elite: they are what must not be lost."""
    for level in (0.05, 0.2):
        tried = deserving = wrong = spent = 0
        for seed in range(8):
            for number, (sums, best, weights) in enumerate(generations(seed, 10)):
                found = race(
                    lambda c, s, sums=sums: sums[c][:, s], len(sums), weights.int().tolist(), best,
                    elites=4, level=level, seed=100 * seed + number,
                )  # fmt: skip
                bar = sums.sum(1).sort(descending=True).values[3] if best is None else best.sum(1).min()
                good = sums.sum(1) >= bar
                tried += len(sums)
                deserving += int(good.sum())
                wrong += sum(bool(g) and seen < SEQUENCES for g, seen in zip(good, found.seen, strict=True))
                spent += found.spent
        assert tried >= 2000 and deserving >= 50
        assert wrong / deserving <= level
        assert spent < 0.5 * tried * int(weights.sum())  # and it does drop


def test_elites_and_their_equals_are_never_dropped():
    weights = [10] * 20
    sums = torch.full((6, 20), 7.0, dtype=torch.float64)
    assert race(lambda c, s: sums[c][:, s], 6, weights, None, elites=2, level=0.05, seed=0).seen == [20] * 6
    assert race(lambda c, s: sums[c][:, s], 6, weights, sums[:2], elites=2, level=0.05, seed=0).seen == [20] * 6


def test_a_clear_loser_costs_one_round_and_what_was_scored_is_reported():
    weights = list(range(1, 33))
    good = torch.arange(1, 33).double() * 0.8
    sums = torch.stack([good, good * 0.5, good * 0.99 + 0.01])
    asked = []

    def score(candidates, sequences):
        asked.append((candidates, sequences))
        return sums[candidates][:, sequences]

    found = race(score, 3, weights, good[None].repeat(2, 1), elites=2, level=0.05, seed=3)
    assert found.seen[0] == 32 and found.seen[1] == 4
    assert found.spent == sum(len(c) * sum(weights[s] for s in sequences) for c, sequences in asked)
    scored = ~found.sums.isnan()
    assert scored.sum(1).tolist() == found.seen and torch.equal(found.sums[scored], sums[scored])
    again = race(score, 3, weights, good[None].repeat(2, 1), elites=2, level=0.05, seed=3)
    assert again.seen == found.seen and asked[0] == asked[len(asked) // 2]


def test_a_candidate_without_scores_is_dropped_at_once_and_no_rival_to_others():
    sums = torch.rand(5, 16, dtype=torch.float64)
    sums[1] = math.nan
    found = race(lambda c, s: sums[c][:, s], 5, [1] * 16, None, elites=4, level=0.05, seed=0)
    assert found.seen[1] == 4 and max(found.seen) == 16
    lonely = race(lambda c, s: sums[c][:, s], 5, [1] * 16, None, elites=5, level=0.05, seed=0)
    assert lonely.seen == [16, 4, 16, 16, 16]


def test_a_race_of_nobody_and_scores_that_are_infinite_or_weightless():
    nobody = race(lambda c, s: pytest.fail("nobody to score"), 0, [1] * 16, None, elites=4, level=0.05, seed=0)
    assert (nobody.seen, nobody.spent) == ([], 0)
    sums = torch.rand(5, 16, dtype=torch.float64)
    sums[3] = -math.inf  # a KL of +inf
    found = race(lambda c, s: sums[c][:, s], 5, [1] * 16, None, elites=5, level=0.05, seed=0)
    assert [found.seen[i] for i in (0, 1, 2, 4)] == [16] * 4 and not any(found.broken)
    weights = [0] * 12 + [1] * 4  # rounds in which nothing is scored decide nothing
    same = torch.zeros(5, 16, dtype=torch.float64)
    assert min(race(lambda c, s: same[c][:, s], 5, weights, None, elites=4, level=0.05, seed=1).seen) == 16


@pytest.fixture(scope="module")
def searched():
    model = tiny_model("olmoe")
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    return mp.CandidateEvaluator(model, [random_tokens(rows=24, length=16, seed=7)]), scores


SETTINGS = dict(sparsity=0.5, population=16, generations=6, elites=3, fidelity="race")


@pytest.mark.parametrize("fitness", ["esap", "kl_pq", "nll"])
def test_a_raced_search_returns_a_fully_scored_plan_and_says_what_it_saved(searched, fitness):
    evaluator, scores = searched
    result = mp.evolve(evaluator, scores, **SETTINGS, fitness=fitness)
    assert getattr(evaluator.evaluate([result.plan], (fitness,))[0], fitness) == pytest.approx(result.score, abs=1e-6)
    spent = sum(record["token_evaluations"] for record in result.history)
    saved = sum(record["token_evaluations_saved"] for record in result.history)
    evaluated = sum(record["evaluated"] for record in result.history)
    assert saved > 0 and spent + saved == evaluated * sum(evaluator.weights(fitness))
    assert sum(record["dropped"] for record in result.history) > 0
    full = mp.evolve(evaluator, scores, **{**SETTINGS, "fidelity": "full"}, fitness=fitness)
    assert all(record["token_evaluations_saved"] == record["dropped"] == 0 for record in full.history)
    assert abs(full.score - result.score) < 0.02


def test_a_raced_search_is_deterministic_and_resumes_to_the_same_history(searched, tmp_path):
    evaluator, scores = searched
    whole = mp.evolve(evaluator, scores, **SETTINGS)
    assert mp.evolve(evaluator, scores, **SETTINGS) == whole
    mp.evolve(evaluator, scores, **{**SETTINGS, "generations": 3}, out=tmp_path)
    history = tmp_path / "history.jsonl"
    text = history.read_text()
    history.write_text(text[: text.rfind("\n", 0, -2) + 20])  # killed while it wrote the third generation
    assert mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path) == whole
    assert mp.evolve(evaluator, scores, **SETTINGS, out=tmp_path) == whole  # nothing left to do
    with pytest.raises(ValueError, match="race_level: 0.05 there, 0.1 now"):
        mp.evolve(evaluator, scores, **SETTINGS, race_level=0.1, out=tmp_path)
    with pytest.raises(ValueError, match="fidelity: 'race' there, 'full' now"):
        mp.evolve(evaluator, scores, **{**SETTINGS, "fidelity": "full"}, out=tmp_path)


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_a_raced_search_with_hardly_any_plans_to_find(searched, sparsity):
    """No budget: one plan. Nearly the whole capacity: fewer plans than a generation, and generations without any."""
    evaluator, scores = searched
    result = mp.evolve(evaluator, scores, **{**SETTINGS, "sparsity": sparsity, "elites": 8, "generations": 8})
    assert math.isfinite(result.score)
    assert evaluator.evaluate([result.plan])[0].esap == pytest.approx(result.score, abs=1e-6)


def test_candidates_that_give_nan_are_counted_and_never_returned(searched):
    evaluator, scores = searched

    class Broken:
        """Every candidate meets a NaN on one of the first sequences of the race."""

        def __getattr__(self, name):
            return getattr(evaluator, name)

        def sequence_sums(self, plans, metrics, sequences):
            found = evaluator.sequence_sums(plans, metrics, sequences)
            found.sums["esap"][:, -1] = math.nan
            return found

    with pytest.raises(ValueError, match="every candidate gave NaN"):
        mp.evolve(Broken(), scores, **SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"fidelity": "fast"}, "choose from full, race"), ({"race_level": 0.7}, "below 0.5")]
)
def test_impossible_races_are_refused(searched, tmp_path, wrong, message):
    evaluator, scores = searched
    with pytest.raises(ValueError, match=message):
        mp.evolve(evaluator, scores, **{**SETTINGS, **wrong}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
