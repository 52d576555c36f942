"""Does screening children save evaluations at equal quality? Plain, screened and raced searches, paired over seeds.

    python bench/screen.py [--model DIR] [--orders reap naee] [--sparsities 0.25 0.5] [--seeds 5] [--first-seed 0]
                           [--population 16] [--generations 8] [--search N] [--held-out N] [-o FILE]

The model is the embedded one, or one in DIR that shares its tokenizer and corpus; data as in bench/allocations.py.
Every plan is scored once and remembered, so that searches that meet the same plan share its score; the evaluations and
tokens in the tables are those that each search alone needs (its history's). Columns: ESAP on the search text and on
held-out text, means over seeds with the least and the most; seeds on which a search is better than plain, equal,
worse; evaluations, and tokens as a share of the plain search's; and the evaluations and tokens that a search needs to
reach the plain search's last search ESAP with the same seed (it goes on to four times as many generations), against
what the plain search had spent when it reached it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from assess import all_batches
from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.metrics import SequenceSums
from moeprune_ext.checkpoint.load import load
from moeprune_ext.demo.run import (
    CALIBRATION_SEQUENCES,
    GENERATIONS,
    HELD_OUT_SEQUENCES,
    POPULATION,
    SEARCH_SEQUENCES,
    demo_folder,
)

LONGER = 4  # times the generations of the plain search, within which a screened one may reach its score
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"screen": 0},
    "plain, raced": {"screen": 0, "fidelity": "race"},
    "screen 32": {"screen": 32},
    "screen 32, raced": {"screen": 32, "fidelity": "race"},
}


@dataclass
class Remembering:
    """An evaluator that scores a plan once, on all sequences, and remembers.

    Attributes:
        evaluator: scores plans.
        sums: {kept experts: float64 [N], ESAP's sum over each sequence}.
    """

    evaluator: mp.CandidateEvaluator
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.evaluator, name)

    def sequence_sums(
        self, plans: Sequence[PruningPlan], metrics: Sequence[str] = ("esap",), sequences: Sequence[int] | None = None
    ) -> SequenceSums:
        """As CandidateEvaluator's, for ESAP."""
        new = list({str(plan.kept): plan for plan in plans if str(plan.kept) not in self.sums}.values())
        for plan, sums in zip(new, self.evaluator.sequence_sums(new).sums["esap"], strict=True):
            self.sums[str(plan.kept)] = sums
        rows = torch.stack([self.sums[str(plan.kept)] for plan in plans])
        rows = rows if sequences is None else rows[:, list(sequences)]
        return SequenceSums({"esap": rows}, torch.zeros(rows.shape, dtype=torch.int64))

    def evaluate(self, plans: Sequence[PruningPlan], metrics: Sequence[str] = ("esap",)) -> list[mp.CandidateScore]:
        """As CandidateEvaluator's, for ESAP."""
        sums = self.sequence_sums(plans).sums["esap"].sum(1)
        return [mp.CandidateScore(esap=float(value) / self.evaluator.positions) for value in sums]


@dataclass(frozen=True)
class Outcome:
    """One search.

    Attributes:
        best: search ESAP of the best plan after each generation.
        evaluations: plans scored up to each generation.
        tokens: positions scored up to each generation.
        held_out: ESAP of the last plan on held-out text.
    """

    best: list[float]
    evaluations: list[int]
    tokens: list[int]
    held_out: float

    def reaching(self, score: float) -> int | None:
        """Returns the generation after which the best plan is as good as `score`, None where it never is."""
        return next((g for g, best in enumerate(self.best) if best >= score - 1e-9), None)


def searched(
    searcher: Remembering, held_out: Remembering, scores: mp.ExpertScores, sparsity: float, **settings: Any
) -> Outcome:
    """Searches and measures."""
    result = mp.evolve(searcher, scores, sparsity, **settings)  # type: ignore[arg-type]
    totals = {
        name: torch.tensor([record[name] for record in result.history]).cumsum(0).tolist()
        for name in ("evaluated", "token_evaluations")
    }
    esap = held_out.evaluate([result.plan])[0].esap
    assert esap is not None
    best = [record["best"] for record in result.history]
    return Outcome(best, totals["evaluated"], totals["token_evaluations"], esap)


def table(
    searcher: Remembering,
    held_out: Remembering,
    scores: mp.ExpertScores,
    sparsity: float,
    seeds: range,
    population: int,
    generations: int,
    ways: Sequence[str],
) -> str:
    """Returns the rows of one order and sparsity, in Markdown."""
    common = {"population": population}
    plain = [
        searched(searcher, held_out, scores, sparsity, seed=seed, generations=generations, **common, **WAYS["plain"])
        for seed in seeds
    ]
    lines = [
        "| search | search ESAP | held-out ESAP | seeds better / equal / worse, search and held-out "
        "| evaluations | tokens | evaluations to reach plain's | tokens to reach |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for way in ways:
        runs, ratios, token_ratios = [], [], []
        for seed, rival in zip(seeds, plain, strict=True):
            settings = {"seed": seed, **common, **WAYS[way]}
            run = searched(searcher, held_out, scores, sparsity, generations=generations, **settings)
            runs.append(run)
            first = rival.reaching(rival.best[-1])  # the plain search had it then, too
            assert first is not None
            generation, longer = run.reaching(rival.best[-1]), run
            if generation is None:
                longer = searched(searcher, held_out, scores, sparsity, generations=LONGER * generations, **settings)
                generation = longer.reaching(rival.best[-1])
            if generation is not None:
                ratios.append((longer.evaluations[generation], rival.evaluations[first]))
                token_ratios.append(longer.tokens[generation] / rival.tokens[first])
        token_share = sum(run.tokens[-1] for run in runs) / sum(run.tokens[-1] for run in plain)
        reached = f"{len(ratios)} of {len(runs)}"
        mine, theirs = (statistics.mean(values) for values in zip(*ratios, strict=True)) if ratios else (0, 1)
        lines.append(
            f"| {way} | {spread([run.best[-1] for run in runs])} | {spread([run.held_out for run in runs])} "
            f"| {signs([(a.best[-1], b.best[-1]) for a, b in zip(runs, plain, strict=True)])}, "
            f"{signs([(a.held_out, b.held_out) for a, b in zip(runs, plain, strict=True)])} "
            f"| {statistics.mean(run.evaluations[-1] for run in runs):.0f} | {token_share:.0%} "
            f"| {mine:.0f} against {theirs:.0f} ({reached}) "
            f"| {statistics.mean(token_ratios) if token_ratios else float('nan'):.0%} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Returns the mean, the least and the most."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def signs(pairs: Sequence[tuple[float, float]]) -> str:
    """Counts pairs whose first is larger, equal, smaller."""
    rounded = [round(a - b, 9) for a, b in pairs]
    return f"{sum(d > 0 for d in rounded)} / {sum(d == 0 for d in rounded)} / {sum(d < 0 for d in rounded)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="another model with the embedded one's tokenizer")
    parser.add_argument("--orders", nargs="+", default=["reap", "naee"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--population", type=int, default=POPULATION)
    parser.add_argument("--generations", type=int, default=GENERATIONS)
    parser.add_argument("--search", type=int, default=SEARCH_SEQUENCES, help="search sequences a domain")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_SEQUENCES, help="held-out sequences a domain")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("-o", "--out", type=Path, help="also append the tables here")
    arguments = parser.parse_args()
    model = load(arguments.model or demo_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder(), local_files_only=True)
    calibration = all_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)
    searcher = Remembering(mp.CandidateEvaluator(model, all_batches(tokenizer, "calibration", arguments.search, 1)))
    held_out = Remembering(mp.CandidateEvaluator(model, all_batches(tokenizer, "evaluation", arguments.held_out, 0)))
    stats = mp.calibrate(model, calibration)

    def say(text: str) -> None:
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    say(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"`python {' '.join(sys.argv)}`; {type(model).__name__}, {arguments.search} search and {arguments.held_out} "
        f"held-out sequences a domain, {arguments.seeds} seeds, {arguments.generations} generations of "
        f"{arguments.population}\n"
    )
    for order in arguments.orders:
        scores = naee_scores(model, calibration) if order == "naee" else mp.score_experts(stats, order)
        for sparsity in arguments.sparsities:
            start = time.perf_counter()
            rows = table(
                searcher,
                held_out,
                scores,
                sparsity,
                range(arguments.first_seed, arguments.first_seed + arguments.seeds),
                arguments.population,
                arguments.generations,
                arguments.ways,
            )
            say(f"### {order}, {sparsity:.0%}\n\n{rows}\n\n{time.perf_counter() - start:.0f} s in all.\n")


if __name__ == "__main__":
    main()
