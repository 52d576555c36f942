"""EEP's evaluations: a loop that merges and generates, as published, and ours, in one process, on the same candidates.

    python bench/eep.py [--examples 100] [--rounds 5] [--quick]

The embedded model (6 layers, 16 experts, top-4); fitness: token-exact match on arithmetic problems. The loop: for each
candidate, merge the experts' weights into the model by an einsum, map the router, decode every example greedily with a
KV cache, and compare. Plain: one prompt after the other, as a loop around `generate` is first written. Batched: prompts
of equal length together. Fastest: that, or all prompts in one batch padded on the left, and the faster of transformers'
experts functions. It may decode as many tokens as the longest answer has. Teacher-forced: the same with one forward of
all examples in the place of decoding. Ours: `TaskFitness`, calls of 30 masks, as a search starts, and of 4 children, as
it goes on: masks, then merges of its default rates. Times alternate; ratios are medians of the rounds' own. Answers of
the loop and of ours are compared example by example. Peak memory: tensors beyond the model, as memory.peak_bytes counts
them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import numpy as np
import torch
from measure import measure
from torch import Tensor, nn

import moeprune_ext as mp
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.data.tasks import Task
from moeprune_ext.demo.run import arithmetic_task, load_demo
from moeprune_ext.eep.fitness import TaskFitness, candidate_plan
from moeprune_ext.eep.operators import Layout, criterion_mask, given_mask, merge_child, mutate_mask, random_mask
from moeprune_ext.evaluate.quality import correct, generated_matches
from moeprune_ext.models.moe import find_moe_layers

SEARCH = {"starts: 30 masks": 30, "4 masks": 10, "4 merges": 160}  # evaluations of each kind in a default search


# ---- the loop


@contextmanager
def merged(model: Any, candidate: PruningPlan) -> Iterator[None]:
    """Inside, the model holds the candidate's experts and routes by its map."""
    layers = find_moe_layers(model)
    stored: list[tuple[nn.Module, str, Any]] = []
    for index, layer in layers.items():
        shares, router_map = candidate.merges[index].experts, candidate.merges[index].router
        for name in ("gate_up_proj", "down_proj"):
            stored.append((layer.experts, name, getattr(layer.experts, name)))
            summed = torch.einsum("ie,e...->i...", shares, getattr(layer.experts, name))
            setattr(layer.experts, name, nn.Parameter(summed, requires_grad=False))
        stored.append((layer.experts, "num_experts", layer.experts.num_experts))
        layer.experts.num_experts = len(shares)  # type: ignore[assignment]

        def route(hidden: Tensor, router: Any = layer.router, router_map: Tensor = router_map) -> tuple[Tensor, ...]:
            logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            weights, ids = (logits.softmax(-1) @ router_map.T).topk(router.top_k)
            return logits, weights / weights.sum(-1, keepdim=True), ids

        layer.router.forward = route  # type: ignore[method-assign]
    try:
        yield
    finally:
        for owner, name, value in stored:
            setattr(owner, name, value)
        for layer in layers.values():
            del layer.router.forward


def decoded_in_one_batch(model: Any, task: Task) -> list[bool]:
    """`generated_matches` with all prompts in one batch, padded on the left."""
    terminator = task.examples[0].options[0][-1]
    longest = max(len(example.prompt) for example in task.examples)
    ids = torch.full((len(task.examples), longest), terminator)
    attended = torch.zeros_like(ids)
    for row, example in enumerate(task.examples):
        ids[row, longest - len(example.prompt) :] = torch.tensor(example.prompt)
        attended[row, longest - len(example.prompt) :] = 1
    new = model.generate(
        ids,
        attention_mask=attended,
        do_sample=False,
        max_new_tokens=max(len(example.options[0]) for example in task.examples),
        eos_token_id=terminator,
        pad_token_id=terminator,
    )[:, longest:].tolist()
    answers = [example.options[0] for example in task.examples]
    return [tuple(row[: len(answer)]) == answer for row, answer in zip(new, answers, strict=True)]


def decoded_one_by_one(model: Any, task: Task) -> list[bool]:
    return [generated_matches(model, Task(task.name, (example,)))[0] for example in task.examples]


class Loop:
    """One candidate after the other."""

    def __init__(self, model: Any, task: Task, implementation: str, answer: Callable[[Any, Task], list[bool]]) -> None:
        self.model, self.task, self.implementation, self.answer = model, task, implementation, answer

    def __call__(self, candidates: list[PruningPlan]) -> list[list[bool]]:
        default = self.model.config._experts_implementation
        self.model.config._experts_implementation = self.implementation
        found = []
        with torch.no_grad():
            for candidate in candidates:
                with merged(self.model, candidate):
                    found.append(self.answer(self.model, self.task))
        self.model.config._experts_implementation = default
        return found


def fastest(
    model: Any, task: Task, candidate: PruningPlan, ways: dict[str, Callable[[Any, Task], list[bool]]]
) -> tuple[Loop, str]:
    """The fastest way to run it, and what every way takes."""
    default, found, said = model.config._experts_implementation, [], []
    for implementation in dict.fromkeys((default, "eager")):
        for name, answer in ways.items():
            contender = Loop(model, task, implementation, answer)
            contender([candidate])
            start = time.perf_counter()
            contender([candidate])
            found.append((time.perf_counter() - start, contender))
            said.append(f"{name}, experts {implementation}: {found[-1][0]:.3f} s")
    return min(found, key=lambda pair: pair[0])[1], "; ".join(said)


# ---- ours


def answered(fitness: TaskFitness, candidates: list[PruningPlan]) -> list[list[bool]]:
    """Per candidate and example, whether the answer is right."""
    evaluator = fitness.evaluator
    plans = [candidate_plan(candidate, evaluator, None) for candidate in candidates]
    hits = evaluator.sequence_sums(plans, ("label_top1",)).sums["label_top1"]
    right = hits == torch.tensor(evaluator.weights("label_top1"))
    return right[:, fitness.places].tolist()


def calls(layout: Layout, masks: list[PruningPlan], rng: np.random.Generator) -> dict[str, list[PruningPlan]]:
    """Candidates as a search's calls have them: children of the given masks."""
    starts = [*masks, *(random_mask(layout, rng) for _ in range(30 - len(masks)))]
    mutated = [mutate_mask(masks[i % len(masks)], layout, rng) for i in range(4)]
    merges = [merge_child(masks[:2] if i == 0 else [masks[i % 2]], layout, rng) for i in range(4)]
    for _ in range(3):  # a few generations on, when most matrices have been touched
        merges = [merge_child([parent], layout, rng) for parent in merges]
    return dict(zip(SEARCH, (starts, mutated, merges), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a dozen examples, one round: does it run at all?")
    arguments = parser.parse_args()
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, moeprune_ext {mp.__version__}; `python {' '.join(sys.argv)}`\n"
    )
    model, tokenizer = load_demo()
    task = arithmetic_task(tokenizer, 12 if arguments.quick else arguments.examples)
    fitness = TaskFitness(model, task)
    stats = mp.calibrate(model, [sequence.input_ids for sequence in fitness.evaluator.sequences])
    tokens = sum(sequence.input_ids.numel() for sequence in fitness.evaluator.sequences)
    print(f"{len(task.examples)} examples, {tokens:,} tokens with their answers. Ours: {fitness.evaluator.method}.\n")
    rng = np.random.default_rng(0)
    for keep in (8,) if arguments.quick else (8, 4):
        compare(arguments, model, task, fitness, stats, keep, rng)


def compare(
    arguments: argparse.Namespace,
    model: Any,
    task: Task,
    fitness: TaskFitness,
    stats: Any,
    keep: int,
    rng: np.random.Generator,
) -> None:
    layout = Layout.of({index: shape.num_experts for index, shape in fitness.evaluator.shapes.items()}, keep)
    criteria = ("weighted_ean", "frequency", "seer", "reap")
    masks = [given_mask(layout, criterion_mask(layout, mp.score_experts(stats, name))) for name in criteria]
    kinds = calls(layout, masks, rng)
    some = 2 if arguments.quick else 4
    two = {"prompts of equal length": generated_matches, "one padded batch": decoded_in_one_batch}
    decoding, ways = fastest(model, task, kinds["4 merges"][0], two)
    forcing, _ = fastest(model, task, kinds["4 merges"][0], {"teacher-forced": correct})
    one_by_one, batched = (
        Loop(model, task, decoding.implementation, answer) for answer in (decoded_one_by_one, generated_matches)
    )
    plain = {"plain": one_by_one, "batched": batched, "fastest": decoding, "teacher-forced": forcing}
    print(f"## {keep} of 16 experts kept\n\nThe loop, an evaluation (the fastest counts): {ways}.\n")
    titles = [f"{name}, evaluations/s" for name in plain] + ["ours"] + [f"over {name}" for name in plain]
    print(f"| call | {' | '.join(titles)} | answers that differ | right |")
    print("| " + "--- | " * (len(titles) + 3), flush=True)
    seconds: dict[str, list[float]] = {"native": [], "plain": [], "fastest": []}
    for kind, candidates in kinds.items():
        contenders: dict[str, Callable[[], object]] = {"native": lambda candidates=candidates: fitness(candidates)}
        counts = {name: 1 if name == "plain" else some for name in plain}
        for name, loop in plain.items():
            contenders[name] = lambda loop=loop, chosen=candidates[: counts[name]]: loop(chosen)
        times = measure(contenders, "cpu", 1 if arguments.quick else arguments.rounds, 120)
        rates = {name: counts[name] / times.median(name) for name in plain}
        ours = [second / len(candidates) for second in times.seconds["native"]]
        ratios = {
            name: [a / counts[name] / b for a, b in zip(times.seconds[name], ours, strict=True)] for name in plain
        }
        right, generated = torch.tensor(answered(fitness, candidates)), torch.tensor(decoding(candidates))
        differ = int((right != generated).sum())
        shares = sorted(right.float().mean(1).tolist())
        over = [f"{statistics.median(v):.2f}x ({min(v):.2f} to {max(v):.2f})" for v in ratios.values()]
        print(
            f"| {kind} | {' | '.join(f'{rate:.2f}' for rate in rates.values())} "
            f"| {len(candidates) / times.median('native'):.2f} | {' | '.join(over)} "
            f"| {differ} of {len(candidates) * len(task.examples)} | {shares[0]:.0%} to {shares[-1]:.0%} |",
            flush=True,
        )
        seconds["native"].append(SEARCH[kind] * times.median("native") / len(candidates))
        for name in ("plain", "fastest"):
            seconds[name].append(SEARCH[kind] / rates[name])
    device = torch.device("cpu")
    candidates = kinds["4 merges"]

    def whole() -> None:  # with what the evaluator keeps
        TaskFitness(model, task)(candidates)

    mib = [
        peak_bytes(work, device) / 2**20
        for work in (lambda: decoding(candidates[:1]), whole, lambda: fitness(candidates))
    ]
    print(
        f"\nThe {sum(SEARCH.values())} evaluations of a default search, by these rates: plain "
        f"{sum(seconds['plain']):.0f} s, fastest {sum(seconds['fastest']):.0f} s, ours {sum(seconds['native']):.0f} s. "
        f"Peak memory: fastest {mib[0]:.1f} MiB; ours {mib[1]:.1f} MiB with everything it keeps, {mib[2]:.1f} MiB "
        "during a call of 4 merges.\n"
    )


if __name__ == "__main__":
    main()
