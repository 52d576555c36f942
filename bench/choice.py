"""Measures how a criterion had better be chosen: one for all layers, or one per layer, and at what cost.

    python bench/choice.py [--model DIR] [--sparsities 0.25 0.5] [--search 4 8] [--seeds N] [-o FILE]

The demo's data: calibration, search sequences (what choices see) and held-out text; --model names another model that
demo/train.py trained. Ways, each from the best plan of the way before it where it starts from one:

- uniform REAP, what other tools do;
- one criterion: the best of all criteria and naee's order, uniform and by the global threshold;
- per layer, staged: the mix that choose_criterion tries, taken in any case;
- coordinate steps: layer by layer every order is tried and the best kept, one round from the best criterion;
- choose_criterion: takes the mix if it passes its test against chance.

Evaluations count those of the best criterion, which all start from. Gains are over the one criterion, on the held-out
text, with a paired bootstrap interval over sequences.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.allocation.choice import CriterionChoice, choose_criterion
from moeprune_ext.allocation.mixing import Trials, mix_layers, mixed_plan
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.selection import gain_of
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.calibration.criteria import CRITERIA
from moeprune_ext.demo.run import (
    CALIBRATION_SEQUENCES,
    HELD_OUT_SEQUENCES,
    SPARSITIES,
    demo_folder,
    domain_batches,
)
from moeprune_ext.tables import markdown_table

Orders = dict[str, mp.ExpertScores]


@dataclass(frozen=True)
class Way:
    """What one way chooses.

    Attributes:
        plan: the plan.
        evaluations: plans scored on the search text so far.
        seconds: so far.
        about: more to say.
    """

    plan: PruningPlan
    evaluations: int
    seconds: float
    about: str = ""


def staged(trials: Trials, base: PruningPlan, orders: Orders) -> PruningPlan:
    """Returns the plan after one round of mix_layers, chosen on all sequences."""
    return mixed_plan(base, mix_layers(trials, base, orders)[0])


def coordinate_steps(trials: Trials, base: PruningPlan, orders: Orders) -> PruningPlan:
    """Returns the plan after every layer in turn has taken the order that is best, the others as they are."""
    for layer in base.kept:
        plans = [base] + [
            mixed_plan(base, {layer: (name, PruningPlan.from_pruned_counts(scores, base.pruned_counts).kept[layer])})
            for name, scores in orders.items()
        ]
        trials.score(plans)
        base = max(plans, key=trials.rank)
    return base


def choose(
    searcher: mp.CandidateEvaluator, stats: mp.RoutingStats, sparsity: float
) -> tuple[dict[str, Way], CriterionChoice]:
    """Returns every way's choice at one sparsity, and the choice that the package makes."""
    start = time.perf_counter()
    naee = naee_scores(searcher.moe, searcher.sequences)
    one = choose_criterion(searcher, stats, sparsity, more_scores=[naee], per_layer=False)
    single = Way(one.plan, one.evaluations, time.perf_counter() - start, str(one.scores.criterion)[6:])
    start = time.perf_counter()
    package = choose_criterion(searcher, stats, sparsity, more_scores=[naee])
    package_seconds = time.perf_counter() - start
    orders = {name: mp.score_experts(stats, name) for name in CRITERIA} | {"naee": naee}
    standing = {n: max(row["score"] for row in one.table if row["criterion"] == n) for n in orders}
    best = {name: orders[name] for name in sorted(orders, key=lambda n: -standing[n]) if name != single.about}
    ways = {
        "uniform REAP": Way(mp.uniform_plan(orders["reap"], sparsity), 0, 0.0),
        "one criterion": single,
    }
    few = {name: best[name] for name in list(best)[:3]}
    more: dict[str, Callable[[Trials], PruningPlan]] = {
        "per layer, staged": partial(staged, base=single.plan, orders=few),
        "coordinate steps, 4 orders": partial(coordinate_steps, base=single.plan, orders=few),
        "coordinate steps, all orders": partial(coordinate_steps, base=single.plan, orders=best),
    }
    for name, step in more.items():
        trials, start = Trials(searcher, "esap", "mean"), time.perf_counter()
        trials.score([single.plan])
        plan = step(trials)
        seconds = single.seconds + time.perf_counter() - start
        ways[name] = Way(plan, single.evaluations + len(trials.values) - 1, seconds)
    gain = "no mix found" if package.gain is None else f"mix gains {package.gain.low:+.4f} to {package.gain.high:+.4f}"
    about = f"({gain}, {'taken' if package.per_layer else 'not taken'})"
    ways["choose_criterion"] = Way(package.plan, package.evaluations, package_seconds, about)
    return ways, package


def table(searcher: mp.CandidateEvaluator, judge: mp.CandidateEvaluator, ways: dict[str, Way]) -> str:
    """Returns every way's scores in Markdown."""
    plans = [way.plan for way in ways.values()]
    search = searcher.fitness(plans)
    sums = judge.sequence_sums(plans).sums["esap"]
    held_out, single = judge.objective_values(sums, "esap").tolist(), list(ways).index("one criterion")
    rows = []
    for i, (name, way) in enumerate(ways.items()):
        gain = gain_of(judge, sums[[i, single]])
        cells = [f"{search[i]:.4f}", f"{held_out[i]:.4f}", f"{gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"]
        rows.append([f"{name} {way.about}".strip(), *cells, str(way.evaluations), f"{way.seconds:.1f}"])
    return markdown_table(["way", "search ESAP", "held-out ESAP", "held-out gain", "evaluations", "seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_folder(), help="the embedded model if left out")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--search", nargs="+", type=int, default=[4, 8], help="search sequences a domain")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the search text")
    parser.add_argument("-o", "--out", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    model: Any = mp.load(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    calibration = domain_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)
    stats = mp.calibrate(model, [batch for batches in calibration.values() for batch in batches])
    judge = mp.CandidateEvaluator(model, domain_batches(tokenizer, "evaluation", HELD_OUT_SEQUENCES, 0))
    texts: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        texts.append(text)
        if arguments.out is not None:
            arguments.out.write_text("\n".join(texts) + "\n")

    say(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, moeprune_ext {mp.__version__}; `python {' '.join(sys.argv)}`\n\n"
        f"{sum(len(s.input_ids[0]) for s in judge.sequences):,} held-out tokens in {len(judge.sequences)} sequences; "
        f"calibration of {stats.tokens:,} tokens."
    )
    for sparsity in arguments.sparsities:
        for sequences in arguments.search:
            for seed in range(1, 1 + arguments.seeds):
                data = domain_batches(tokenizer, "calibration", sequences, seed)
                searcher = mp.CandidateEvaluator(model, data)
                ways, package = choose(searcher, stats, sparsity)
                say(f"\n## {sparsity:.0%}, {sequences} search sequences a domain, draw {seed}\n")
                say(table(searcher, judge, ways))
                uniform = {row["criterion"]: row["score"] for row in package.table if row["allocation"] == "uniform"}
                glob = {row["criterion"]: row["score"] for row in package.table if row["allocation"] == "global"}
                pairs = (f"{name} {uniform[name]:.4f} / {glob[name]:.4f}" for name in uniform)
                say(f"\nSearch ESAP, uniform / global: {', '.join(pairs)}.")
                if package.per_layer:
                    say(f"Criteria of the layers: {', '.join(package.per_layer.values())}.")


if __name__ == "__main__":
    main()
