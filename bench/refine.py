"""Does it pay to choose single experts after the counts? Swaps across the order, judged on text never searched on.

    python bench/refine.py [--model DIR] [--order naee] [--sparsities 0.5] [--seeds 5] [--steps 12] [-o FILE]

The start is EvoESAP's plan (screened children, the demo's settings), a seed each. Refinement: in each of `steps` rounds
16 children of up to four survivors make one or two swaps, are raced on the search text, and the best survive. A swap
prunes one kept expert and restores a pruned one, half of the time in the same layer, else in another; which ones is
drawn around the border of the layer's order (geometric, so that any expert may be drawn). The plans that were best
after some round are the finalists; a quarter of the sequences, never searched on, chooses among them and the start. The
refined plan, the last one (no choice), the start, and the plan of a search of counts that goes on for as many tokens as
the refinement took then meet test text that nothing was chosen by. Intervals: paired bootstrap over test sequences,
2,000 draws.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from assess import all_batches
from torch import Tensor
from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.allocation import evolve
from moeprune_ext.allocation.evolve import SearchSpace
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.allocation.refine import refine
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.checkpoint.load import load
from moeprune_ext.data.batches import TokenBatch, split_sequences
from moeprune_ext.demo.run import CALIBRATION_SEQUENCES, GENERATIONS, POPULATION, demo_folder


@dataclass(frozen=True)
class Texts:
    """Evaluators of the three texts.

    Attributes:
        search: what searches and swaps see.
        choice: the quarter that chooses among the finalists.
        test: what only the last table sees.
    """

    search: mp.CandidateEvaluator
    choice: mp.CandidateEvaluator
    test: mp.CandidateEvaluator


def interval(gains: Tensor, weights: list[int]) -> tuple[float, float, float]:
    """Returns a gain's mean over positions and its 95 % interval.

    Args:
        gains: float64 [N], sums over each test sequence.
        weights: [N] positions of each.
    """
    positions = torch.tensor(weights, dtype=torch.float64)
    draws = torch.randint(len(gains), (2000, len(gains)), generator=torch.Generator().manual_seed(0))
    means = gains[draws].sum(1) / positions[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(gains.sum() / positions.sum()), low, high


def compare(texts: Texts, scores: mp.ExpertScores, sparsity: float, seeds: int, steps: int) -> str:
    """Returns the table of one order and sparsity, in Markdown."""
    lines = [
        "| seed | search ESAP start / last | choice ESAP start / chosen / last | test ESAP start / chosen / last "
        "| chosen - start on test | last - start on test | longer search - start on test "
        "| tokens of the refinement / of the search | seconds |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    gains: dict[str, list[Tensor]] = {"chosen": [], "last": [], "longer search": []}
    weights = texts.test.weights("esap")
    for seed in range(seeds):
        settings = EvolveSettings(sparsity=sparsity, population=POPULATION, generations=GENERATIONS, seed=seed)
        space = SearchSpace.of(scores, settings)
        search = evolve.search(texts.search, space)
        begun = time.perf_counter()
        outcome = refine(texts.search, search, scores, rounds=steps, seed=seed)
        finalists, spent = outcome.finalists, outcome.token_evaluations
        seconds = time.perf_counter() - begun
        choice = [score.esap or 0.0 for score in texts.choice.evaluate(finalists)]
        best = max(range(len(finalists)), key=lambda i: choice[i])
        # As many tokens spent on counts instead.
        more = round(spent / (settings.children * sum(texts.search.weights("esap"))))
        longer = replace(space, settings=replace(settings, generations=GENERATIONS + more))
        quartet = [finalists[0], finalists[best], finalists[-1], evolve.search(texts.search, longer).plan]
        sums = texts.test.sequence_sums(quartet).sums["esap"]
        esap = (sums.sum(1) / sum(weights)).tolist()
        cost = sum(record["token_evaluations"] for record in search.history)
        cells = []
        for name, row in (("chosen", 1), ("last", 2), ("longer search", 3)):
            gains[name].append(sums[row] - sums[0])
            cells.append("{:+.4f} ({:+.4f} to {:+.4f})".format(*interval(gains[name][-1], weights)))
        lines.append(
            f"| {seed} | {outcome.scores[0]:.4f} / {outcome.scores[-1]:.4f} "
            f"| {choice[0]:.4f} / {choice[best]:.4f} / {choice[-1]:.4f} "
            f"| {' / '.join(f'{value:.4f}' for value in esap[:3])} | {' | '.join(cells)} "
            f"| {spent:,} / {cost:,} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    for name, rows in gains.items():
        mean, low, high = interval(torch.stack(rows).mean(0), weights)
        wins = statistics.mean(float(row.sum() > 0) for row in rows)
        lines.append(
            f"\n{name} - start on test text, mean over seeds: {mean:+.4f} ({low:+.4f} to {high:+.4f}), "
            f"{wins:.0%} of the seeds above 0."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="another model with the embedded one's tokenizer")
    parser.add_argument("--orders", nargs="+", default=["naee"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--search", type=int, default=12, help="sequences a domain, a quarter of them to choose by")
    parser.add_argument("--test", type=int, default=16, help="test sequences a domain")
    parser.add_argument("-o", "--out", type=Path, help="also append the tables here")
    arguments = parser.parse_args()
    model = load(arguments.model or demo_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder(), local_files_only=True)
    calibration = all_batches(tokenizer, "calibration", CALIBRATION_SEQUENCES, 0)
    sequences: list[TokenBatch] = split_sequences(all_batches(tokenizer, "calibration", arguments.search, 1))
    texts = Texts(
        mp.CandidateEvaluator(model, [s for i, s in enumerate(sequences) if i % 4 != 3]),
        mp.CandidateEvaluator(model, [s for i, s in enumerate(sequences) if i % 4 == 3]),
        mp.CandidateEvaluator(model, all_batches(tokenizer, "evaluation", arguments.test, 0)),
    )
    stats = mp.calibrate(model, calibration)

    def say(text: str) -> None:
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    say(
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"`python {' '.join(sys.argv)}`; {type(model).__name__}; sequences of 256 tokens: "
        f"{len(texts.search.sequences)} to search on, {len(texts.choice.sequences)} to choose by, "
        f"{len(texts.test.sequences)} of test\n"
    )
    for order in arguments.orders:
        scores = naee_scores(model, calibration) if order == "naee" else mp.score_experts(stats, order)
        for sparsity in arguments.sparsities:
            say(
                f"### {order}, {sparsity:.0%}\n\n{compare(texts, scores, sparsity, arguments.seeds, arguments.steps)}\n"
            )


if __name__ == "__main__":
    main()
