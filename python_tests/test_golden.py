"""Our figures against those of the authors' released code, on two tiny random models (python_tests/golden).

esap_golden.json: EvoESAP's `score_candidate`; reap_stats_golden.safetensors: REAP's `update_pruning_state`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moeprune_ext as mp

GOLDEN = Path(__file__).parent / "golden"
METRIC_OF = {"esp-dataset": "esap", "kl-baseline": "kl_qp", "kl-pq-b": "kl_pq"}


@pytest.fixture(scope="module", params=["olmoe-tiny", "qwen3-moe-tiny"])
def golden(request):
    folder = GOLDEN / request.param
    inputs = load_file(folder / "inputs.safetensors")
    scores = {layer: row.double() for layer, row in enumerate(inputs.pop("saliency"))}
    return folder, mp.load(folder, dtype=torch.float32), inputs, scores


def test_candidate_scores_match_the_released_search(golden):
    folder, model, inputs, scores = golden
    expected = json.loads((folder / "esap_golden.json").read_text())["results"]
    evaluator = mp.CandidateEvaluator(model, [inputs])
    assert {entry["fitness"] for entry in expected} == set(METRIC_OF)
    for entry in expected:
        pruned = {int(layer): n for layer, n in entry["pruned_per_layer"].items()}
        plan = mp.PruningPlan.from_pruned_counts(scores, pruned)
        metric = METRIC_OF[entry["fitness"]]
        score = getattr(evaluator.evaluate([plan], (metric,))[0], metric)
        assert score == pytest.approx(entry["score"], rel=1e-5), (metric, pruned)


def test_statistics_match_the_released_observer(golden):
    folder, model, inputs, _ = golden
    expected = load_file(folder / "reap_stats_golden.safetensors")
    stats = mp.calibrate(model, [inputs])
    for layer in range(4):
        table = stats.moments[layer]
        pairs = {
            "expert_frequency": table[:, 0, 0],
            "weighted_expert_frequency_sum": table[:, 1, 0],
            "ean_sum": table[:, 0, 1],
            "weighted_ean_sum": table[:, 1, 1],
            "ean_mean": mp.score_experts(stats, "man")[layer],
            "reap": mp.score_experts(stats, "reap")[layer],
        }
        for name, ours in pairs.items():
            theirs = expected[f"layer{layer}.{name}"].double()
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=0, msg=lambda m, where=f"layer {layer} {name}": f"{where}: {m}"
            )
    assert stats.tokens == int(expected["layer0.total_tokens"])


def test_pruned_counts_of_the_released_patterns(golden):
    folder, _, _, _ = golden
    from moeprune_ext.allocation.patterns import allocate, pattern_weights

    for entry in json.loads((folder / "esap_golden.json").read_text())["results"]:
        if entry["pattern"] != "random":
            weights = pattern_weights(entry["pattern"], 4, None)
            assert list(allocate(weights, [12] * 4, 32)) == list(entry["pruned_per_layer"].values()), entry["pattern"]
