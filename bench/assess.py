"""Measures what the embedded model promises: `python bench/assess.py`, about six minutes on two cores.

Prints Markdown: exact match on every held-out problem by operation, for the full and the uniformly pruned model; how
far the routing of code and of arithmetic differ in each layer; and EvoESAP against uniform on held-out text over
several search seeds. Its output, for the model in this repository, is in TRAINING.md. Exits with 1 when a promise is
broken.
"""

from __future__ import annotations

import argparse
import sys
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeprune_ext.allocation.budget import uniform_plan
from moeprune_ext.allocation.evolve import evolve
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.calibrate import calibrate
from moeprune_ext.calibration.criteria import score_experts
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.data.tasks import Task
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import (
    CALIBRATION_SEQUENCES,
    GENERATIONS,
    HELD_OUT_SEQUENCES,
    POPULATION,
    SEARCH_SEQUENCES,
    SPARSITIES,
    arithmetic_task,
    domain_batches,
    load_demo,
)
from moeprune_ext.evaluate.quality import correct
from moeprune_ext.models.apply import applied


def exact_match_by_operation(model: PreTrainedModel, task: Task) -> dict[str, float]:
    """Returns {operation, or "all": share of held-out problems answered exactly}; task: arithmetic_task(.., None)."""
    results = correct(model, task)
    shares, at = {"all": mean(results)}, 0
    for operation in corpus.OPERATIONS:
        count = len(corpus.problems("held_out", operation))
        shares[operation] = mean(results[at : at + count])
        at += count
    return shares


def routing_divergence(a: RoutingStats, b: RoutingStats) -> dict[int, float]:
    """Compares the shares of routed tokens that experts get: {layer: Jensen-Shannon divergence in bits}."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * torch.log2(p.clamp(min=1e-300))).sum()

    divergence = {}
    for layer, table in a.moments.items():
        p, q = (counts / counts.sum() for counts in (table[:, 0, 0], b.moments[layer][:, 0, 0]))
        divergence[layer] = float(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    return divergence


def held_out_divergence(model: PreTrainedModel, tokenizer: Any) -> dict[int, float]:
    """Returns the routing_divergence of evaluation code and held-out arithmetic, 32 sequences each."""
    batches = domain_batches(tokenizer, "evaluation", 32)
    return routing_divergence(calibrate(model, batches["code"]), calibrate(model, batches["arithmetic"]))


def all_batches(tokenizer: Any, split: str, sequences: int, seed: int) -> list[TokenBatch]:
    """Returns the batches of all domains, one domain after the other."""
    return [batch for batches in domain_batches(tokenizer, split, sequences, seed).values() for batch in batches]


def gains(
    model: PreTrainedModel, tokenizer: Any, scores: ExpertScores, sparsity: float, seeds: range
) -> list[tuple[float, float, float, float]]:
    """Returns, for each search seed, ESAP and exact match of the uniform plan and of EvoESAP's, on held-out text."""
    searcher = CandidateEvaluator(model, all_batches(tokenizer, "calibration", SEARCH_SEQUENCES, 1))
    judge = CandidateEvaluator(model, all_batches(tokenizer, "evaluation", HELD_OUT_SEQUENCES, 0))
    task = arithmetic_task(tokenizer, None)

    def measure(plan: PruningPlan) -> tuple[float, float]:
        esap = judge.evaluate([plan])[0].esap or 0.0
        with applied(model, plan):
            return esap, mean(correct(model, task))

    uniform = measure(uniform_plan(scores, sparsity))
    rows = []
    for seed in seeds:
        found = evolve(searcher, scores, sparsity, population=POPULATION, generations=GENERATIONS, seed=seed)
        rows.append((*uniform, *measure(found.plan)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="search seeds")
    seeds = range(parser.parse_args().seeds)
    broken: list[str] = []

    def promise(kept: bool, text: str) -> None:
        if not kept:
            broken.append(text)

    model, tokenizer = load_demo()
    scores = score_experts(calibrate(model, all_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)), "reap")
    task = arithmetic_task(tokenizer, None)
    print(f"Token-exact match, {len(task.examples):,} held-out problems after {corpus.SHOTS} solved ones:\n")
    print("| model | all | " + " | ".join(corpus.OPERATIONS) + " |\n|---|--:|" + "--:|" * len(corpus.OPERATIONS))
    matches = {}
    for sparsity in (0.0, *SPARSITIES):
        with applied(model, uniform_plan(scores, sparsity)):
            shares = matches[sparsity] = exact_match_by_operation(model, task)
        name = f"uniform REAP {sparsity:.0%}" if sparsity else "full"
        print(f"| {name} | " + " | ".join(f"{shares[k]:.1%}" for k in ("all", *corpus.OPERATIONS)) + " |")
    promise(matches[0]["all"] >= 0.9, "exact match of the full model >= 90 %")
    promise(min(matches[0][o] for o in corpus.OPERATIONS) >= 0.8, "exact match of each operation >= 80 %")
    promise(matches[0]["all"] - matches[0.5]["all"] >= 0.1, "uniform pruning at 50 % loses >= 10 points")

    divergence = held_out_divergence(model, tokenizer)
    print(
        "\nJensen-Shannon divergence between the routing of held-out code and of arithmetic, bits per layer: ", end=""
    )
    print(", ".join(f"{value:.3f}" for value in divergence.values()))
    promise(sum(v >= 0.1 for v in divergence.values()) > len(divergence) / 2, "divergence >= 0.1 bit in most layers")

    for sparsity in SPARSITIES:
        rows = gains(model, tokenizer, scores, sparsity, seeds)
        print(f"\nEvoESAP against uniform at {sparsity:.0%}, held-out ESAP and exact match, by search seed:\n")
        print(
            "| seed | uniform ESAP | EvoESAP ESAP | gain | uniform match | EvoESAP match |\n|--:|--:|--:|--:|--:|--:|"
        )
        for seed, (before, match_before, after, match_after) in zip(seeds, rows, strict=True):
            print(
                f"| {seed} | {before:.4f} | {after:.4f} | {after - before:+.4f} | "
                f"{match_before:.1%} | {match_after:.1%} |"
            )
        esap_gain = mean(row[2] - row[0] for row in rows)
        match_gain = mean(row[3] - row[1] for row in rows)
        print(f"\nMean gain: ESAP {esap_gain:+.4f}, exact match {100 * match_gain:+.1f} points.", flush=True)
        promise(esap_gain >= 0, f"mean ESAP gain at {sparsity:.0%} >= 0")
    if broken:
        sys.exit(f"promises not kept: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
