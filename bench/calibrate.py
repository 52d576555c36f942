"""Measures calibration's speed and memory, against an observer that runs every expert on every token.

    python bench/calibrate.py [--model demo|olmoe] [--rounds N] [--quick] [-o FILE]

Markdown to stdout, and to FILE with -o. Everything runs in one process on the same tokens, alternating; times are
medians over the rounds, ratios medians of the rounds' own. Who takes part:

- ours: `moeprune_ext.calibrate`; once more without adding up moments, so that the difference is what statistics cost.
- observer: what published ones do (REAP's, from which EvoESAP's is derived): the layer's own forward, then a hook runs
  every expert on every token and reduces the outputs of the tokens routed to it. They keep an experts x tokens x hidden
  tensor meanwhile; "one at a time" reduces every expert's outputs before the next. Ours is compared with the faster.
- forward: the model without any statistics, with the faster of transformers' experts functions, which the observer uses
  too.

Nobody computes logits. Before anything is timed, the observer's statistics must agree with ours. Peak memory: tensors
beyond the model, as memory.peak_bytes counts them, in a run of its own.

demo: the embedded model, 32 x 128 tokens. olmoe: one random layer of OLMoE-1B-7B's shape (hidden 2,048, 64 experts of
1,024, top-8), 2,048 tokens; some minutes and 4 GB on two cores.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from measure import Times, measure, seconds_of
from search import random_model
from torch import Tensor
from transformers import OlmoeConfig

import moeprune_ext as mp
from moeprune_ext.candidates.memory import peak_bytes
from moeprune_ext.demo.run import domain_batches, load_demo
from moeprune_ext.models.moe import find_moe_layers
from moeprune_ext.models.patches import evaluating

TARGETS = {"demo": None, "olmoe": 3.0}  # the observer's time over ours
SECONDS = 300.0  # of rounds, at most, for as long as three fit
CPU = torch.device("cpu")
# The observer's statistics and where they stand in ours: the powers of gate weight and activation norm.
POWERS = {"frequency": (0, 0), "gate_sum": (1, 0), "ean_sum": (0, 1), "weighted_ean_sum": (1, 1)}


def demo(quick: bool) -> tuple[str, Any, list[Tensor]]:
    model, tokenizer = load_demo()
    domains = domain_batches(tokenizer, "calibration", 2 if quick else 11, 0).values()
    rows = torch.cat([batch.input_ids[:, :128] for batches in domains for batch in batches])[: 4 if quick else 32]
    return f"demo model, {len(rows)} x 128 tokens, batches of 8", model, list(rows.split(8))


def olmoe(quick: bool) -> tuple[str, Any, list[Tensor]]:
    config = OlmoeConfig(
        hidden_size=128 if quick else 2048,
        intermediate_size=64 if quick else 1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50_304,
        max_position_embeddings=4096,
    )
    length = 128 if quick else 2048
    case = random_model(f"OLMoE-like, one layer, {length:,} tokens", config, 1, length, torch.float32, "cpu", 0)
    return case.name, case.model, case.sequences


# ---- who takes part


def forward(model: Any, batches: Iterable[Tensor], implementation: str) -> None:
    before = model.config._experts_implementation
    model.config._experts_implementation = implementation
    with evaluating(model):
        for batch in batches:
            model.base_model(input_ids=batch, use_cache=False)
    model.config._experts_implementation = before


def observe(model: Any, batches: Iterable[Tensor], implementation: str, keep: bool) -> dict[int, dict[str, Tensor]]:
    """Runs the model with the observer.

    Args:
        model: a transformers model.
        batches: of token ids.
        implementation: transformers' experts function for the layers' own forward.
        keep: whether the outputs of all experts for all tokens are held until they are reduced.

    Returns:
        {decoder layer: {statistic: float64 [E]}}.
    """
    layers = find_moe_layers(model)
    statistics_by_layer = {
        index: {name: torch.zeros(layer.shape.num_experts, dtype=torch.float64) for name in POWERS}
        for index, layer in layers.items()
    }

    def hook(index: int, experts: Any, arguments: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
        hidden, ids, weights = arguments
        outputs: Iterable[Tensor] = (expert_output(experts, expert, hidden) for expert in range(experts.num_experts))
        if keep:
            activations = hidden.new_zeros(experts.num_experts, *hidden.shape)
            for expert, output in enumerate(outputs):
                activations[expert] = output
            outputs = activations
        for expert, output in enumerate(outputs):
            chosen = ids == expert
            routed = chosen.any(-1)
            norms, gates = torch.linalg.vector_norm(output[routed], dim=-1), weights[chosen]
            values = {"frequency": routed, "gate_sum": gates, "ean_sum": norms, "weighted_ean_sum": norms * gates}
            for name, value in values.items():
                statistics_by_layer[index][name][expert] += value.sum()

    with ExitStack() as stack:
        for index, layer in layers.items():
            stack.callback(layer.experts.register_forward_hook(partial(hook, index)).remove)
        forward(model, batches, implementation)
    return statistics_by_layer


def expert_output(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    gate, up = F.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


def ours_without_moments(model: Any, batches: list[Tensor]) -> None:
    with mock.patch.object(import_module("moeprune_ext.calibration.calibrate"), "routing_moments_"):
        mp.calibrate(model, batches)


def largest_difference(stats: mp.RoutingStats, observed: dict[int, dict[str, Tensor]]) -> float:
    """Returns the largest difference of any statistic of any expert, relative to the layer's largest value."""
    return max(
        float((table[:, a, b] - observed[layer][name]).abs().max() / table[:, a, b].max())
        for layer, table in stats.moments.items()
        for name, (a, b) in POWERS.items()
    )


def fastest_forward(model: Any, batches: list[Tensor]) -> str:
    """Returns the name of the faster of transformers' experts functions."""
    ways = dict.fromkeys((model.config._experts_implementation, "eager"))
    for way in ways:
        forward(model, batches, way)
    return min(ways, key=lambda way: seconds_of(lambda: forward(model, batches, way), "cpu"))


# ---- the table


def table(model: Any, batches: list[Tensor], rounds: int, target: float | None) -> Iterable[str]:
    implementation = fastest_forward(model, batches)
    difference = largest_difference(mp.calibrate(model, batches), observe(model, batches, implementation, keep=False))
    if not difference < 1e-4:
        raise SystemExit(f"the observer's statistics are not ours, by {difference:.1e} of a layer's largest")
    contenders: dict[str, Callable[[], object]] = {
        "native": partial(mp.calibrate, model, batches),
        "native, no moments": partial(ours_without_moments, model, batches),
        "observer, all kept": partial(observe, model, batches, implementation, keep=True),
        "observer, one at a time": partial(observe, model, batches, implementation, keep=False),
        "forward": partial(forward, model, batches, implementation),
    }
    times = measure(contenders, "cpu", rounds, SECONDS)
    tokens = sum(batch.numel() for batch in batches)
    yield "| | tokens/s | time over ours | peak memory |"
    yield "| --- | --- | --- | --- |"
    for name, contender in contenders.items():
        yield (
            f"| {name.replace('native', 'ours')} | {tokens / times.median(name):,.0f} | {ratio_cell(times, name)} "
            f"| {peak_bytes(contender, CPU) / 2**20:,.0f} MiB |"
        )
    moments = statistics.median(
        1 - without / ours
        for ours, without in zip(times.seconds["native"], times.seconds["native, no moments"], strict=True)
    )
    faster = times.over_native(times.named("observer"))
    verdict = "" if target is None else f"; target {target:.0f}x: {'met' if faster >= target else '**missed**'}"
    yield (
        f"\n{len(times.seconds['native'])} rounds; experts function of the forward: {implementation}. Largest "
        f"difference of a statistic: {difference:.1e} of its layer's largest. Adding up moments takes {moments:.1%} of "
        "our time.\n"
        f"The faster observer takes {faster:.2f}x our time{verdict}."
    )


def ratio_cell(times: Times, name: str) -> str:
    ratios = [a / b for a, b in zip(times.seconds[name], times.seconds["native"], strict=True)]
    return f"{times.over_native([name]):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    models = {"demo": demo, "olmoe": olmoe}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=tuple(models), default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small and short: does it run at all?")
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, moeprune_ext {mp.__version__}, float32; `python {' '.join(sys.argv)}`"
    )
    name, model, batches = models[arguments.model](arguments.quick)
    say(f"\n## {name}\n")
    target = None if arguments.quick else TARGETS[arguments.model]
    for line in table(model, batches, 1 if arguments.quick else arguments.rounds, target):
        say(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
