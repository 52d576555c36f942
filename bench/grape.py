"""Times GRAPE's similarity and naee's elimination on one layer of Qwen3-30B-A3B, and says what all 48 need.

    python bench/grape.py [--tokens 1024] [--dtype float32|bfloat16] [--device cpu|cuda] [--quick]

A random layer of full size (hidden H = 2,048, E = 128 experts of intermediate I = 768, top-8), behind an attention of
one small head and a vocabulary of 1,024, so that the layer is what is timed. Per layer, with n tokens:

- expert outputs, every expert on every token      6 n H I E FLOPs
- Gram matrices [n, n] of the outputs              2 n^2 H E
- inner products of all pairs of Gram matrices     2 E^2 n^2
- naee: inner products of outputs per token        2 n E^2 H
- naee: eliminating m of E experts                 2 n E^2 for each of m (2 E - m + 1) / 2 subsets

Bytes per layer: Gram matrices 4 E n^2 (naee: 4 n E^2 and a chunk of 256 MiB); held for all layers: the sample, L n H
elements, and the similarities, 8 L E^2. Peak memory: tensors beyond the model, as memory.peak_bytes counts them.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moeprune_ext as mp
from moeprune_ext.allocation.grape import expert_similarity, plan_from_similarity
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.candidates.memory import peak_bytes

LAYERS = 48


def random_layer(arguments: argparse.Namespace) -> Any:
    """Makes a model of one random layer."""
    config = Qwen3MoeConfig(
        hidden_size=256 if arguments.quick else 2048,
        moe_intermediate_size=96 if arguments.quick else 768,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=32 if arguments.quick else 128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=1024,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Returns seconds, and seconds of CPU time, which is less on a machine that others use, too."""
    start, cores = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cores


def plan_seconds(experts: int) -> float:
    """Returns the CPU seconds of planning LAYERS layers from random similarities."""
    generator = torch.Generator().manual_seed(0)
    similar, values = {}, {}
    for layer in range(LAYERS):
        table = torch.rand(experts, experts, generator=generator, dtype=torch.float64)
        similar[layer] = (table + table.T) / 2
        values[layer] = torch.rand(experts, generator=generator, dtype=torch.float64)
    scores = ExpertScores(values, dict.fromkeys(values, LayerShape(experts, 8, min_kept=8)))
    return timed(lambda: plan_from_similarity(similar, scores, 0.5), "cpu")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller layer and 128 tokens: does it run at all?")
    arguments = parser.parse_args()
    n = 128 if arguments.quick else arguments.tokens
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, moeprune_ext "
        f"{mp.__version__}; `python {' '.join(sys.argv)}`\n"
    )
    model = random_layer(arguments)
    config, device = model.config, torch.device(arguments.device)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    data = [torch.randint(2, config.vocab_size, (1, n), generator=torch.Generator().manual_seed(1))]

    outputs, grams, products = 6 * n * hidden * inner * experts, 2 * n**2 * hidden * experts, 2 * experts**2 * n**2
    removed = experts - config.num_experts_per_tok
    by_token, subsets = 2 * n * experts**2 * hidden, removed * (2 * experts - removed + 1) // 2
    work: dict[str, tuple[Callable[[], object], int]] = {
        "cka": (lambda: expert_similarity(model, data, tokens=n), outputs + grams + products),
        "weights": (
            lambda: expert_similarity(model, None, similarity="weights"),
            6 * hidden * inner * experts**2,
        ),
        "naee": (lambda: naee_scores(model, data, tokens=n), outputs + by_token + subsets * 2 * n * experts**2),
    }
    print(f"E = {experts}, H = {hidden}, I = {inner}, n = {n}, {arguments.dtype}\n")
    print(f"| a layer | seconds | of CPU cores | GFLOP | GFLOP/s | peak, MiB | {LAYERS} layers, minutes |")
    print("| " + "--- | " * 7, flush=True)
    for name, (function, flops) in work.items():
        peak = peak_bytes(function, device)
        seconds, cores = timed(function, arguments.device)
        print(
            f"| {name} | {seconds:.2f} | {cores:.2f} | {flops / 1e9:,.0f} | {flops / seconds / 1e9:,.0f} "
            f"| {peak / 2**20:,.0f} | {LAYERS * seconds / 60:.1f} |",
            flush=True,
        )
    sample = LAYERS * n * hidden * (2 if arguments.dtype == "bfloat16" else 4)
    mib = [f"{size / 2**20:,.0f} MiB" for size in (4 * experts * n**2, sample, 4 * experts * n * hidden)]
    tera = [f"{LAYERS * flops / 1e12:,.2f} T" for flops in (outputs, grams, products)]
    print(
        f"\nFLOPs of {LAYERS} layers: expert outputs {tera[0]}, Gram matrices {tera[1]}, their products {tera[2]}.\n"
        f"Bytes: Gram matrices {mib[0]}, one layer's at a time; sample {mib[1]}. All experts' outputs of a layer, "
        f"which are never held, would be {mib[2]}.\n"
        f"Planning {LAYERS} layers of {experts} experts at 50 %: {plan_seconds(experts):.2f} s."
    )


if __name__ == "__main__":
    main()
