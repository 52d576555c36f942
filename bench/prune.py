"""What each part of `moeprune prune` is worth, and what it costs.

    python bench/prune.py [--model DIR] [--seeds N] [--population P] [--generations G] [-o FILE]

On the embedded model, or another one with its tokenizer, on the demo's text (demo.run.demo_texts). Each row is a plan
measured on the test text: the uniform plan by REAP, EvoESAP by REAP, the criterion chosen without a search, the search
on top, the repair of the chosen plan without a search, and all of it. Seconds are CPU seconds of this process, beyond
calibration: those of a search alone (EvoESAP by REAP) and of prune's stages.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moeprune_ext.allocation.budget import uniform_plan
from moeprune_ext.allocation.evolve import SearchSpace, search
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.load import load
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.demo.run import SEARCHED_GENERATIONS, SEARCHED_POPULATION, arithmetic_task, demo_folder, demo_texts
from moeprune_ext.evaluate.quality import accuracy
from moeprune_ext.models.apply import applied
from moeprune_ext.pipeline.run import Run, Source
from moeprune_ext.pipeline.settings import PruneSettings, SearchSettings
from moeprune_ext.pipeline.texts import flat
from moeprune_ext.repair.repair import repair
from moeprune_ext.tables import markdown_table


@dataclass
class Clock:
    """CPU seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Does the work and adds its time to a part."""
        start = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        return result


def compare(
    model: Path, sparsity: float, settings: SearchSettings
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Returns {row: {metric: value}} and the seconds by part, of one seed."""
    network = load(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    seed = settings.seed
    clock, task = Clock(), arithmetic_task(tokenizer, 300, seed)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(
            read_checkpoint(model),
            lambda: network,
            demo_texts(tokenizer, seed),
            PruneSettings(search=settings, repair="hidden", sequential="off"),
            Path(folder),
        )
        run = Run(source, sparsity, Path(folder) / "out")
        run.check()
        scores = source.scores("reap")
        _ = source.searcher, source.judge, source.reporter  # the teachers, which every way needs
        space = SearchSpace.of(scores, replace(settings, sparsity=sparsity))
        evoesap = clock("search alone", lambda: search(source.searcher, space)).plan
        choice = clock("prune", run.choice)
        searched, _ = clock("prune", run.chosen)
        repaired = clock("prune", lambda: run.repaired(searched))
        unsearched = repair(
            source.moe, choice.plan, source.texts.fitted, held_out=flat(source.texts.held_out), target="hidden"
        ).plan
        plans: dict[str, PruningPlan] = {
            "uniform, REAP": uniform_plan(scores, sparsity),
            "EvoESAP by REAP": evoesap,
            "criterion chosen": choice.plan,
            "criterion chosen, search": searched,
            "criterion chosen, repair": unsearched,
            "prune": repaired,
        }
        rows = {}
        for name, plan in plans.items():
            score = source.reporter.evaluate([plan], ("esap", "kl_pq"))[0]
            with applied(source.moe, plan) as pruned:
                exact = accuracy(pruned, task)
            rows[name] = {"ESAP": score.esap or 0.0, "KL": score.kl_pq or 0.0, "arithmetic": exact}
    return rows, clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_folder(), help="model directory with the demo's tokenizer")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--population", type=int, default=SEARCHED_POPULATION)
    parser.add_argument("--generations", type=int, default=SEARCHED_GENERATIONS)
    parser.add_argument("-o", "--out", type=Path, help="append the Markdown to this file")
    arguments = parser.parse_args()
    text = [
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"`python {' '.join(sys.argv)}`\n"
    ]
    for sparsity in arguments.sparsities:
        results = [
            compare(
                arguments.model,
                sparsity,
                SearchSettings(population=arguments.population, generations=arguments.generations, seed=seed),
            )
            for seed in range(arguments.seeds)
        ]
        lines = []
        for name in results[0][0]:
            cells = [[rows[name][metric] for rows, _ in results] for metric in ("ESAP", "KL", "arithmetic")]
            esap, kl, exact = map(statistics.mean, cells)
            lines.append(
                [name, f"{esap:.4f} ({min(cells[0]):.4f} to {max(cells[0]):.4f})", f"{kl:.3f}", f"{exact:.1%}"]
            )
        header = ["plan", "test ESAP, mean (least to most)", "KL(p, q)", "arithmetic"]
        alone, whole = (statistics.mean(seconds[part] for _, seconds in results) for part in ("search alone", "prune"))
        text += [
            f"## {sparsity:.0%}, {arguments.seeds} seeds\n",
            markdown_table(header, lines),
            f"\nCPU seconds: a search alone {alone:.1f}, prune {whole:.1f} ({whole / alone:.1f} times).\n",
        ]
        print("\n".join(text[-3:]), flush=True)
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
