"""A search's speed and outcome: the published procedure and ours, in one process, on the same plans.

    python bench/search.py [--model demo|olmoe|qwen3-30b] [--device cpu|cuda] [--quick] [--seeds N] [--drop F]

Published: one forward of the masked model per candidate, the teacher's logits cached, softmax, softmax, minimum, sum in
PyTorch; the fastest of transformers' experts functions and of two batch sizes counts. Ours: the layer sweep. Candidates
are those of generations 0, 1, 5 and 20 of a recorded run of `evolve`; times of a generation alternate between the two,
ratios are medians of the rounds' own. Peak memory: tensors beyond the model, as memory.peak_bytes counts them.

demo: the embedded model; besides speed, the final ESAP of five seeds, at equal evaluations and at equal time, with and
without racing, and how often a drop was wrong. olmoe: a random model of OLMoE's layout (hidden 512, 8 layers, 64
experts, top-8, vocabulary 50,304, 2,048 tokens). qwen3-30b: a random Qwen3-30B-A3B of full size in bfloat16, for one
GPU of 80 GB or more; 4 of 64 sequences are timed; --drop F is the share of token evaluations that racing saved on the
demo model.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measure import measure
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

import moeprune_ext as mp
from moeprune_ext.allocation.racing import race, rounds
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.demo.run import domain_batches, load_demo

GENERATIONS = (0, 1, 5, 20)
SPARSITY = 0.5
RACE_LEVEL = 0.05


@dataclass
class Setting:
    """A model, the sequences it is scored on ([1, S] each), and fewer tokens on which the recorded run is made."""

    name: str
    model: Any
    scores: mp.ExpertScores
    sequences: list[Tensor]
    record_on: list[Tensor]
    device: str
    memory_budget: int = 1 << 30


def demo(arguments: argparse.Namespace) -> Setting:
    model, tokenizer = load_demo()

    def rows(split: str, per_domain: int, seed: int) -> list[Tensor]:
        batches = [b for bs in domain_batches(tokenizer, split, per_domain, seed).values() for b in bs]
        return [row[None, :128] for batch in batches for row in batch.input_ids]

    scores = mp.score_experts(mp.calibrate(model, rows("calibration", 16, 0)), "reap")
    sequences = rows("calibration", 4 if arguments.quick else 22, 1)[: 12 if arguments.quick else 64]
    return Setting(f"demo model, {len(sequences)} x 128 tokens", model, scores, sequences, sequences, "cpu")


def olmoe(arguments: argparse.Namespace) -> Setting:
    config = OlmoeConfig(
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50_304,
        max_position_embeddings=4096,
    )
    length = 256 if arguments.quick else 2048
    return random_model(f"OLMoE-like, {length} tokens", config, 1, length, torch.float32, arguments.device, 1 << 30)


def qwen3_30b(arguments: argparse.Namespace) -> Setting:
    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=2 if arguments.quick else 48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=32 if arguments.quick else 128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151_936,
        max_position_embeddings=4096,
    )
    count, length = (1, 128) if arguments.quick else (4, 2048)
    name = f"Qwen3-30B-A3B{' of two layers' if arguments.quick else ''}, random, bfloat16, {count} x {length} tokens"
    return random_model(name, config, count, length, torch.bfloat16, arguments.device, 6 << 30)


def random_model(
    name: str, config: PretrainedConfig, count: int, length: int, dtype: torch.dtype, device: str, budget: int
) -> Setting:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(2, config.vocab_size, (1, length), generator=generator) for _ in range(count)]
    scores = mp.score_experts(mp.calibrate(model, [sequences[0][:, :128]]), "reap")
    return Setting(name, model, scores, sequences, [sequences[0][:, :64]], device, budget)


# ---- the published procedure


class Published:
    """One masked forward per candidate and batch, and ESAP by four PyTorch operations on cached teacher logits."""

    def __init__(self, setting: Setting, implementation: str, batch_size: int) -> None:
        self.setting, self.implementation = setting, implementation
        rows = torch.cat(setting.sequences).to(setting.device)
        self.batches = rows.split(batch_size)
        self.teacher = [self.logits(batch) for batch in self.batches]

    def logits(self, batch: Tensor) -> Tensor:
        self.setting.model.config._experts_implementation = self.implementation
        with torch.no_grad():
            return self.setting.model(input_ids=batch, use_cache=False).logits

    def esap(self, plan: PruningPlan) -> float:
        total = 0.0
        with mp.applied(self.setting.model, plan):
            for batch, p in zip(self.batches, self.teacher, strict=True):
                q = self.logits(batch)
                total += float(torch.minimum(p.float().softmax(-1), q.float().softmax(-1)).sum(-1).double().sum())
        return total / sum(batch.numel() for batch in self.batches)


def fastest_published(setting: Setting, plan: PruningPlan) -> tuple[Published, str]:
    """The fastest way to run it, and what every way takes."""
    default = setting.model.config._experts_implementation
    found, ways = [], []
    for implementation in dict.fromkeys((default, "eager")):
        for batch_size in dict.fromkeys((1, min(8, len(setting.sequences)))):
            contender = Published(setting, implementation, batch_size)
            contender.esap(plan)
            start = time.perf_counter()
            contender.esap(plan)
            found.append((time.perf_counter() - start, contender))
            ways.append(f"experts {implementation}, batches of {batch_size}: {found[-1][0]:.3f} s")
    setting.model.config._experts_implementation = default
    return min(found, key=lambda pair: pair[0])[1], "; ".join(ways)


# ---- speed


def recorded_plans(setting: Setting, last: int) -> dict[int, list[PruningPlan]]:
    """{generation: plans newly met} of a run of evolve with the published settings."""
    with tempfile.TemporaryDirectory() as folder:
        evaluator = mp.CandidateEvaluator(setting.model, setting.record_on, memory_budget=setting.memory_budget)
        mp.evolve(evaluator, setting.scores, SPARSITY, generations=last + 1, screen=0, out=folder)
        lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    layers = list(setting.scores)
    return {
        line["generation"]: [
            PruningPlan.from_pruned_counts(setting.scores, dict(zip(layers, counts, strict=True)))
            for counts, _ in line["scores"]
        ]
        for line in lines
    }


def speed(setting: Setting, arguments: argparse.Namespace) -> float:
    """Prints a table; the published procedure's seconds per evaluation."""
    plans = recorded_plans(setting, 1 if arguments.quick else max(GENERATIONS))
    wanted = [g for g in GENERATIONS if plans.get(g)]  # a generation may meet nothing new
    published, ways = fastest_published(setting, plans[0][0])
    default = setting.model.config._experts_implementation
    evaluator = mp.CandidateEvaluator(setting.model, setting.sequences, memory_budget=setting.memory_budget)
    print(f"\n## {setting.name}\n\nPublished, an evaluation (the fastest counts): {ways}.\nOurs: {evaluator.method}.\n")
    print("| generation | plans | published, s/evaluation | ours | ratio | largest difference of a score |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    tokens = sum(s.numel() for s in setting.sequences)
    seconds, limit = [], 30 if setting.device == "cpu" else 15
    rounds_of = 2 if arguments.model == "olmoe" else 5  # its generations take half a minute
    for generation in wanted:
        some, every = plans[generation][:3], plans[generation]
        scored: dict[str, list[float]] = {}

        def theirs(some: list[PruningPlan] = some, scored: dict[str, list[float]] = scored) -> None:
            scored["published"] = [published.esap(plan) for plan in some]

        def ours(every: list[PruningPlan] = every, scored: dict[str, list[float]] = scored) -> None:
            setting.model.config._experts_implementation = default
            scored["ours"] = [float(score.esap) for score in evaluator.evaluate(every)]

        times = measure(
            {"native": ours, "published": theirs}, setting.device, 1 if arguments.quick else rounds_of, limit
        )
        ratios = [
            (a / len(some)) / (b / len(every))
            for a, b in zip(times.seconds["published"], times.seconds["native"], strict=True)
        ]
        seconds.append(times.median("published") / len(some))
        difference = max(abs(a - b) for a, b in zip(scored["published"], scored["ours"], strict=False))
        print(
            f"| {generation} | {len(every)} | {seconds[-1]:.3f} | {times.median('native') / len(every):.3f} "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | {difference:.1e} |",
            flush=True,
        )
    device = torch.device(setting.device)

    def whole() -> None:  # with what the evaluator keeps
        fresh = mp.CandidateEvaluator(setting.model, setting.sequences, memory_budget=setting.memory_budget)
        fresh.evaluate(plans[wanted[-1]])

    peak_ours = peak_bytes(whole, device)
    peak_theirs = peak_bytes(lambda: published.esap(plans[0][0]), device)
    cached = sum(p.nbytes for p in published.teacher)
    mib = [f"{size / 2**20:,.0f} MiB" for size in (peak_ours, setting.memory_budget, peak_theirs, cached)]
    print(
        f"\n{tokens:,} tokens an evaluation. Peak memory: ours {mib[0]} of a budget of {mib[1]}; published {mib[2]} "
        f"and {mib[3]} of cached logits."
    )
    setting.model.config._experts_implementation = default
    if setting.device == "cuda" and not arguments.quick:
        project(times.median("native") / len(every), tokens, arguments.drop)
    return statistics.median(seconds)


def project(seconds: float, tokens: int, drop: float) -> None:
    """From some of the sequences to the published search: 1,404 evaluations of 131,072 tokens."""
    whole = seconds * 131_072 / tokens
    print(
        f"\nAt 131,072 tokens: {whole:.2f} s an evaluation, {whole * 1404 / 60:.0f} minutes for 1,404 at full "
        f"fidelity; with the share of token evaluations that racing saved on the demo model, {drop:.0%}, "
        f"{whole * 1404 * (1 - drop) / 60:.0f} minutes (a projection)."
    )


# ---- outcome


@dataclass
class Run:
    """Best ESAP, evaluations and evaluator's seconds after every generation."""

    best: list[float]
    evaluations: list[int]
    seconds: list[float]
    token_share: float

    def best_after(self, seconds: float) -> float:
        reached = [b for b, s in zip(self.best, self.seconds, strict=True) if s <= seconds]
        return reached[-1] if reached else float("nan")


def run(evaluator: Any, setting: Setting, fidelity: str, seed: int, generations: int) -> Run:
    """One search, a generation at a time so that each can be timed."""
    best, evaluations, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for generation in range(generations):
            start = time.perf_counter()
            found = mp.evolve(
                evaluator,
                setting.scores,
                SPARSITY,
                generations=generation + 1,
                fidelity=fidelity,
                race_level=RACE_LEVEL,
                screen=0,
                seed=seed,
                out=folder,
            )
            seconds.append((seconds[-1] if seconds else 0.0) + time.perf_counter() - start)
            best.append(found.score)
            evaluations.append(sum(record["evaluated"] for record in found.history))
    spent = sum(record["token_evaluations"] for record in found.history)
    return Run(best, evaluations, seconds, spent / (evaluations[-1] * sum(evaluator.weights("esap"))))


class Recording:
    """Notes every candidate's sums over every sequence, for replaying races."""

    def __init__(self, evaluator: mp.CandidateEvaluator) -> None:
        self.real, self.rows = evaluator.sequence_sums, {}

    def __call__(self, plans: Any, metrics: Any = ("esap",), sequences: Any = None) -> Any:
        found = self.real(plans, metrics, sequences)
        if sequences is None:
            for plan, sums in zip(plans, found.sums["esap"], strict=True):
                self.rows[tuple(plan.pruned_counts.values())] = sums
        return found


def outcome(setting: Setting, published_seconds: float, arguments: argparse.Namespace) -> None:
    generations = 3 if arguments.quick else 10
    evaluator = mp.CandidateEvaluator(setting.model, setting.sequences, memory_budget=setting.memory_budget)
    real = evaluator.sequence_sums
    print(f"\n## Final ESAP, {setting.name}, {generations} generations of 32, sparsity {SPARSITY:.0%}\n")
    print(
        "Published reaches the same plans as full fidelity at the same number of evaluations (the table above); its "
        f"time is {published_seconds:.3f} s an evaluation. Level of racing: {RACE_LEVEL}.\n"
    )
    print(
        "| seed | evaluations | published, s | full, s | race, s | race: tokens | ESAP full | ESAP race "
        "| in race's time: published | full | speed-up full | race |"
    )
    print("| " + "--- | " * 12, flush=True)
    shares, drops = [], []
    for seed in range(1 if arguments.quick else arguments.seeds):
        recording = Recording(evaluator)
        evaluator.sequence_sums = recording
        full = run(evaluator, setting, "full", seed, generations)
        evaluator.sequence_sums = real
        raced = run(evaluator, setting, "race", seed, generations)
        theirs = Run(full.best, full.evaluations, [n * published_seconds for n in full.evaluations], 1.0)
        raced_time, their_time = raced.seconds[-1], theirs.seconds[-1]
        print(
            f"| {seed} | {full.evaluations[-1]}, {raced.evaluations[-1]} | {their_time:.0f} | {full.seconds[-1]:.0f} "
            f"| {raced_time:.0f} | {raced.token_share:.0%} | {full.best[-1]:.5f} | {raced.best[-1]:.5f} "
            f"| {theirs.best_after(raced_time):.5f} | {full.best_after(raced_time):.5f} "
            f"| {their_time / full.seconds[-1]:.2f}x | {their_time / raced_time:.2f}x |",
            flush=True,
        )
        shares.append(raced.token_share)
        drops.append(wrong_drops(recording.rows, evaluator.weights("esap"), seed))
    tried, deserving, wrong = (sum(counts) for counts in zip(*drops, strict=True))
    print(
        f"\nRacing saved {1 - statistics.mean(shares):.0%} of the token evaluations (rounds of "
        f"{', '.join(map(str, rounds(len(setting.sequences))))} sequences). Replayed over {tried} fully scored "
        f"candidates, of which {deserving} were no worse than the worst elite: {wrong} of these were dropped, "
        f"{wrong / deserving:.1%} (stated level: {RACE_LEVEL:.0%})."
    )


def wrong_drops(rows: dict[tuple[int, ...], Tensor], weights: list[int], seed: int) -> tuple[int, int, int]:
    """Races the candidates of a full-fidelity run, 28 at a time in the order they were met, against the best four so
    far: (candidates, those no worse than the worst of the four, those of them that were dropped)."""
    met = list(rows.items())
    elites = [sums for _, sums in sorted(met[:32], key=lambda item: -float(item[1].sum()))[:4]]
    deserving = wrong = 0
    for start in range(32, len(met), 28):
        sums = torch.stack([s for _, s in met[start : start + 28]])
        worst = min(float(e.sum()) for e in elites)
        found = race(
            lambda candidates, sequences, sums=sums: sums[candidates][:, sequences],
            len(sums),
            weights,
            torch.stack(elites),
            elites=4,
            level=RACE_LEVEL,
            seed=seed,
        )
        good = [float(s.sum()) >= worst for s in sums]
        deserving += sum(good)
        wrong += sum(g and seen < len(weights) for g, seen in zip(good, found.seen, strict=True))
        elites = sorted([*elites, *sums], key=lambda s: -float(s.sum()))[:4]
    return len(met) - 32, deserving, wrong


def main() -> None:
    settings: dict[str, Callable[[argparse.Namespace], Setting]] = {
        "demo": demo,
        "olmoe": olmoe,
        "qwen3-30b": qwen3_30b,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=tuple(settings), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run at all?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--drop", type=float, default=0.7, help="share of token evaluations that racing saves")
    arguments = parser.parse_args()
    random.seed(0)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, moeprune_ext "
        f"{mp.__version__}; `python {' '.join(sys.argv)}`"
    )
    setting = settings[arguments.model](arguments)
    seconds = speed(setting, arguments)
    if arguments.model == "demo":
        outcome(setting, seconds, arguments)


if __name__ == "__main__":
    main()
