"""Compares all ways to decide how many experts each layer loses, on equal terms, on the embedded model.

    python bench/allocations.py [--criteria reap man naee] [--sparsities 0.25 0.5] [--seeds N] [--quick] [-o FILE]

The demo's data: calibration, search sequences (what searches and damages see) and held-out text. Ways: uniform; a
global threshold by each normalisation; GRAPE, also with its groups merged, with its guard off, and with its counts but
the lowest scores leaving; naee; the best additive split of measured damages (DP); EvoESAP with the demo's settings,
from the released patterns alone and with one more plan among its first: the global threshold's, GRAPE's or DP's; and
EvoESAP from patterns for twice the generations, which costs about what DP's damages and a search cost together.
Evaluations are plans scored on the search sequences, those of the damages included (they serve every sparsity);
seconds likewise. Searches run over several seeds: means, with the least and the most.

The second table of each setting is the best plan so far after some generations: does a better start help at the end?
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from assess import all_batches

import moeprune_ext as mp
from moeprune_ext.allocation.damages import Damages, damages, dp_plan
from moeprune_ext.allocation.grape import expert_similarity, plan_from_similarity
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.threshold import NORMALIZATIONS, global_plan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import (
    CALIBRATION_SEQUENCES,
    GENERATIONS,
    HELD_OUT_SEQUENCES,
    POPULATION,
    SEARCH_SEQUENCES,
    SPARSITIES,
    load_demo,
)

WATCHED = (1, 2, 4, 8, 16)  # generations after which a search's best plan is looked at


@dataclass
class HeldOut:
    """Measures plans on text that no allocation has seen, each plan once.

    Attributes:
        evaluator: of the held-out text.
        results: {plan's key: ESAP and each domain's perplexity}.
    """

    evaluator: mp.CandidateEvaluator
    results: dict[str, tuple[float, list[float]]] = field(default_factory=dict)

    def __call__(self, plans: Sequence[PruningPlan]) -> list[tuple[float, list[float]]]:
        """Returns every plan's ESAP and each domain's perplexity."""
        new = list({_key(plan): plan for plan in plans if _key(plan) not in self.results}.values())
        sums = self.evaluator.sequence_sums(new, ("esap", "nll")).sums
        positions = torch.tensor(self.evaluator.weights("nll")).split(HELD_OUT_SEQUENCES)
        for i, plan in enumerate(new):
            parts = sums["nll"][i].split(HELD_OUT_SEQUENCES)  # a domain's sequences stand together
            perplexity = [float((p.sum() / n.sum()).exp()) for p, n in zip(parts, positions, strict=True)]
            self.results[_key(plan)] = float(sums["esap"][i].sum()) / self.evaluator.positions, perplexity
        return [self.results[_key(plan)] for plan in plans]


def _key(plan: PruningPlan) -> str:
    return str((plan.kept, sorted((layer, merge.digest) for layer, merge in plan.merges.items())))


@dataclass(frozen=True)
class Outcome:
    """What one way decides.

    Attributes:
        plan: the plan.
        esap: of the plan, on the search sequences.
        evaluations: plans scored on the search sequences to find it.
        seconds: to find it.
    """

    plan: PruningPlan
    esap: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Compares all ways on one model and its data.

    Attributes:
        model: the embedded model.
        calibration: the batches that statistics and similarities are of.
        searcher: evaluator of the search sequences.
        held_out: measures on held-out text.
        seeds: of the searches.
        generations: of a search.
    """

    model: Any
    calibration: list[TokenBatch]
    searcher: mp.CandidateEvaluator
    held_out: HeldOut
    seeds: range
    generations: int

    def timed(self, decide: Callable[[], PruningPlan], evaluations: int = 0, seconds: float = 0.0) -> Outcome:
        """Decides and measures; evaluations and seconds are those spent before."""
        start = time.perf_counter()
        plan = decide()
        seconds += time.perf_counter() - start
        esap = self.searcher.evaluate([plan])[0].esap
        assert esap is not None
        return Outcome(plan, esap, evaluations, seconds)

    def search(
        self, scores: mp.ExpertScores, sparsity: float, seed: int, generations: int, start: Outcome | None
    ) -> dict[int, Outcome]:
        """Returns {generation watched: the best plan so far} of one search, with the start's cost."""
        begun = time.perf_counter()
        init_plans = [] if start is None else [start.plan]
        settings = dict(population=POPULATION, generations=generations, screen=0, seed=seed, init_plans=init_plans)
        history = mp.evolve(self.searcher, scores, sparsity, **settings).history
        seconds, layers = time.perf_counter() - begun, list(scores)
        evaluations = [record["evaluated"] for record in history]
        before, before_seconds = (0, 0.0) if start is None else (start.evaluations, start.seconds)
        outcomes = {}
        for g in (g for g in WATCHED if g <= generations):
            plan = PruningPlan.from_pruned_counts(scores, dict(zip(layers, history[g - 1]["best_pruned"], strict=True)))
            share = sum(evaluations[:g]) / sum(evaluations)
            outcomes[g] = Outcome(
                plan, history[g - 1]["best"], before + sum(evaluations[:g]), before_seconds + share * seconds
            )
        return outcomes

    def compare(self, scores: mp.ExpertScores, sparsity: float, lost: Damages, lost_cost: tuple[int, float]) -> str:
        """Returns the tables of one criterion and sparsity, in Markdown.

        Args:
            scores: of the criterion.
            sparsity: share of the experts to remove.
            lost: the damages measured with these scores.
            lost_cost: evaluations and seconds of that measurement.
        """
        ways = {"uniform": [self.timed(lambda: mp.uniform_plan(scores, sparsity))]}
        for name in NORMALIZATIONS:
            plan = self.timed(lambda name=name: global_plan(scores, sparsity, normalize=name))  # type: ignore[misc]
            ways[f"global, {name}"] = [plan]
        alike = expert_similarity(self.model, self.calibration)
        grape = partial(plan_from_similarity, alike, scores, sparsity)
        ways["GRAPE"] = [self.timed(lambda: mp.grape(self.model, self.calibration, scores, sparsity))]
        ways["GRAPE, groups merged"] = [self.timed(lambda: grape(merge=True))]
        ways["GRAPE, guard off"] = [self.timed(lambda: grape(entropy=0.0))]
        ways["GRAPE's counts, lowest scores leave"] = [self.timed(lambda: grape(who="scores"))]
        ways["naee"] = [self.timed(lambda: mp.naee_plan(self.model, self.calibration, sparsity))]
        ways["DP"] = [self.timed(lambda: dp_plan(lost, scores, sparsity), *lost_cost)]
        starts: dict[str, Outcome | None] = {"patterns": None} | {
            name: ways[name][0] for name in ("global, none", "GRAPE", "DP")
        }
        searches = {
            name: [
                self.search(scores, sparsity, seed, self.generations * (1 if start else 2), start)
                for seed in self.seeds
            ]
            for name, start in starts.items()
            if self.seeds
        }
        for name, runs in searches.items():
            ways[f"EvoESAP from {name}"] = [run[self.generations] for run in runs]
        twice = 2 * self.generations
        if self.seeds:
            ways[f"EvoESAP from patterns, {twice} generations"] = [run[twice] for run in searches["patterns"]]
        lines = [
            f"\n## {scores.criterion}, {sparsity:.0%}\n",
            f"| allocation | search ESAP | held-out ESAP | {' | '.join(f'ppl {d}' for d in corpus.DOMAINS)} "
            "| evaluations | seconds |",
            "|---" + "|--:" * (4 + len(corpus.DOMAINS)) + "|",
            *(self._row(name, outcomes) for name, outcomes in ways.items()),
            *(self._best_so_far(searches, [g for g in WATCHED if g <= twice]) if self.seeds else ()),
            "\nPruned per layer, what the layers' damages add up to, and the ESAP that the plan loses:\n",
            *(
                f"- {name}: {list(outcomes[0].plan.pruned_counts.values())}, {lost.total(outcomes[0].plan):.4f}, "
                f"{1 - outcomes[0].esap:.4f}"
                for name, outcomes in ways.items()
            ),
        ]
        return "\n".join(lines)

    def _best_so_far(self, searches: dict[str, list[dict[int, Outcome]]], watched: list[int]) -> list[str]:
        """Returns the second table's lines: the searches' best plans so far after some generations."""
        return [
            "\nBest so far: mean search / held-out ESAP, and how many seeds are ahead of the same seeds' searches from "
            "patterns / behind on held-out text.\n",
            "| EvoESAP from | " + " | ".join(f"generation {g}" for g in watched) + " |",
            "|---" + "|--:" * len(watched) + "|",
            *(
                f"| {name} | " + " | ".join(self._so_far(runs, searches["patterns"], g) for g in watched) + " |"
                for name, runs in searches.items()
            ),
        ]

    def _row(self, name: str, outcomes: Sequence[Outcome]) -> str:
        judged = self.held_out([outcome.plan for outcome in outcomes])
        cells = [
            _spread([outcome.esap for outcome in outcomes]),
            _spread([esap for esap, _ in judged]),
            *(f"{statistics.mean(values):.2f}" for values in zip(*(p for _, p in judged), strict=True)),
            f"{statistics.mean(outcome.evaluations for outcome in outcomes):.0f}",
            f"{statistics.mean(outcome.seconds for outcome in outcomes):.1f}",
        ]
        return f"| {name} | " + " | ".join(cells) + " |"

    def _so_far(self, runs: list[dict[int, Outcome]], patterns: list[dict[int, Outcome]], generation: int) -> str:
        if generation not in runs[0]:
            return ""
        judged, baseline = (self.held_out([run[generation].plan for run in group]) for group in (runs, patterns))
        text = (
            f"{statistics.mean(run[generation].esap for run in runs):.4f} / {statistics.mean(e for e, _ in judged):.4f}"
        )
        if runs is patterns:
            return text
        gains = [a - b for (a, _), (b, _) in zip(judged, baseline, strict=True)]
        return f"{text} ({sum(g > 0 for g in gains)} / {sum(g < 0 for g in gains)})"


def _spread(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({min(values):.4f} to {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=["reap", "man", "naee"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, default=5, help="search seeds; 0: no searches")
    parser.add_argument("--quick", action="store_true", help="one seed, short searches: does it run at all?")
    parser.add_argument("-o", "--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    model, tokenizer = load_demo()
    calibration = all_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)
    bench = Bench(
        model,
        calibration,
        mp.CandidateEvaluator(model, all_batches(tokenizer, "calibration", SEARCH_SEQUENCES, 1)),
        HeldOut(mp.CandidateEvaluator(model, all_batches(tokenizer, "evaluation", HELD_OUT_SEQUENCES, 0))),
        range(1 if arguments.quick else arguments.seeds),
        2 if arguments.quick else GENERATIONS,
    )
    texts: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        texts.append(text)
        if arguments.out is not None:
            arguments.out.write_text("\n".join(texts) + "\n")

    say(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, moeprune_ext {mp.__version__}; `python {' '.join(sys.argv)}`\n\n"
        f"Embedded model; {SEARCH_SEQUENCES} search and {HELD_OUT_SEQUENCES} held-out sequences a domain; searches of "
        f"{bench.generations} generations of {POPULATION}, {len(bench.seeds)} seeds."
    )
    stats = mp.calibrate(model, calibration)
    for criterion in arguments.criteria:
        scores = naee_scores(model, calibration) if criterion == "naee" else mp.score_experts(stats, criterion)
        start = time.perf_counter()
        lost = damages(bench.searcher, scores)
        cost = 1 + sum(len(counts) - 1 for counts in lost.counts.values()), time.perf_counter() - start
        for sparsity in arguments.sparsities:
            say(bench.compare(scores, sparsity, lost, cost))


if __name__ == "__main__":
    main()
