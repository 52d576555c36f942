"""One table for the three operations on this machine's CPU: time, ratio to PyTorch, fraction of what memory allows.

    python bench/run.py [--quick] [--threads N]

Markdown to stdout, with date, versions and command. The contenders of a row run in one process, alternating, after
a warm-up; the numbers are medians over the rounds, the ratios medians of the rounds' own ratios, so that a neighbour
on the machine disturbs them less. "Of the limit" is the fraction of the read bandwidth measured in the same
rounds (the best of summing the operation's own input with torch, and of a copy of it, bytes read and written),
bytes counted once.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

import moeprune_ext as mp
from moeprune_ext import ops

Contenders = dict[str, Callable[[], object]]


def measure(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times["native"], strict=True))


def compiled(function: Callable, *arguments: object) -> Callable[[], object] | None:
    """The function under torch.compile, or None where no compiler works."""
    try:
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    except Exception as error:  # whatever the backend raises where it cannot build
        print(f"torch.compile does not work here: {type(error).__name__}", file=sys.stderr)
        return None
    return lambda: fast(*arguments)


def reads(*tensors: torch.Tensor) -> Contenders:
    """Two ways to read the tensors once; the faster is the limit."""
    words = [tensor.flatten().view(torch.float32) for tensor in tensors]
    halves = [word[: word.numel() // 2] for word in words]
    others = [word[word.numel() // 2 :][: half.numel()].clone() for word, half in zip(words, halves, strict=True)]
    return {
        "read by sum": lambda: [word.sum() for word in words],
        "read by copy": lambda: [other.copy_(half) for other, half in zip(others, halves, strict=True)],
    }


def row(name: str, times: dict[str, list[float]], eager: list[str], limit: list[str]) -> str:
    native = statistics.median(times["native"])
    best_eager = min(ratio(times, contender) for contender in eager)
    inductor = f"{ratio(times, 'compile'):.1f}x" if "compile" in times else "-"
    fraction = min(ratio(times, contender) for contender in limit)
    return f"| {name} | {native * 1e3:.2f} | {best_eager:.1f}x | {inductor} | {fraction:.2f} |"


def overlap_row(dtype: torch.dtype, rows: int, vocabulary: int, rounds: int, with_compile: bool) -> str:
    p = (torch.randn(rows, vocabulary) * 3).to(dtype)
    q = (p.float() + torch.randn(rows, vocabulary)).to(dtype)
    p_lse = ops.log_sum_exp(p)

    def eager(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.minimum(p.float().softmax(-1), q.float().softmax(-1)).sum(-1)

    contenders: Contenders = {
        "native": lambda: mp.overlap(p, q, p_lse=p_lse, backend="native"),
        "eager": lambda: eager(p, q),
        **reads(p, q),
    }
    inductor = compiled(eager, p, q) if with_compile else None
    if inductor:
        contenders["compile"] = inductor
    name = f"overlap, T={rows}, V={vocabulary}, {str(dtype).removeprefix('torch.')}"
    return row(name, measure(contenders, rounds), ["eager"], ["read by sum", "read by copy"])


def router_rows(n_rows: int, rounds: int) -> list[str]:
    n_experts, top_k = 128, 8
    logits, order = torch.randn(n_rows, n_experts) * 2, torch.randperm(n_experts)
    counts = list(range(n_experts - 63, n_experts + 1))
    ids = torch.empty(64, n_rows, top_k, dtype=torch.int64)
    weights = torch.empty(64, n_rows, top_k)

    def loop() -> None:
        for count in counts:
            pruned = torch.ones(n_experts, dtype=torch.bool)
            pruned[order[:count]] = False
            torch.topk(logits.masked_fill(pruned, -torch.inf).softmax(-1), top_k)

    def nested(some: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return mp.masked_router(logits, top_k=top_k, order=order, counts=some, backend="native")

    times = measure(
        {
            "native": lambda: nested(counts),
            "eager": loop,
            "one mask": lambda: nested(counts[-1:]),
            "write": lambda: (ids.fill_(1), weights.fill_(1)),
            "write fresh": lambda: (torch.empty_like(ids).fill_(1), torch.empty_like(weights).fill_(1)),
        },
        rounds,
    )
    name = f"masked_router, nested, N={n_rows}, E=128, K=8, C=64, float32"
    one, write, fresh = (ratio(times, contender) for contender in ("one mask", "write", "write fresh"))
    return [
        row(name, times, ["eager"], ["write fresh"]),
        f"| (its time over that of C = 1: {1 / one:.2f}; of writing the answers into memory in use: "
        f"{1 / write:.2f}, into new memory, as it does: {1 / fresh:.2f}) | | | | |",
    ]


def moments_row(dtype: torch.dtype, pairs: int, hidden: int, rounds: int) -> str:
    outputs = torch.randn(pairs, hidden).to(dtype)
    ids, gates = torch.randint(0, 128, (pairs,)), torch.rand(pairs)
    moments, max_norm = torch.zeros(128, 3, 3, dtype=torch.float64), torch.zeros(128)
    table = torch.zeros(128, 9, dtype=torch.float64)

    def eager(norm: Callable[[], torch.Tensor]) -> None:
        norms, g = norm().double(), gates.double()
        powers = torch.stack([torch.ones_like(g), g, g * g], -1)[:, :, None]
        values = torch.stack([torch.ones_like(norms), norms, norms * norms], -1)[:, None, :]
        table.index_add_(0, ids, (powers * values).flatten(1))

    def native() -> None:
        mp.routing_moments_(moments, max_norm, ids, gates, outputs, backend="native")

    times = measure(
        {
            "native": native,
            "vector_norm": lambda: eager(lambda: torch.linalg.vector_norm(outputs, dim=-1)),
            "in float32": lambda: eager(lambda: torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)),
            "after float()": lambda: eager(lambda: outputs.float().norm(dim=-1)),
            **reads(outputs),
        },
        rounds,
    )
    name = f"routing_moments_, S={pairs}, H={hidden}, {str(dtype).removeprefix('torch.')}"
    return row(name, times, ["vector_norm", "in float32", "after float()"], ["read by sum", "read by copy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds: does it run at all?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    quick = arguments.quick
    rounds = 3 if quick else 15
    size = 8 if quick else 1

    info = mp.build_info()
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {arguments.threads} threads, ", end=""
    )
    print(f"{info['cpu_isa']}, {info['compiler']}, torch {torch.__version__}, moeprune_ext {mp.__version__}; ", end="")
    print(f"`python {' '.join(sys.argv)}`\n")
    print("| operation | ms | PyTorch eager / native | torch.compile / native | of the limit |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        print(overlap_row(dtype, 1024 // size, 50_304, rounds, with_compile=not quick), flush=True)
    print(*router_rows(4096 // size, rounds), sep="\n", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        print(moments_row(dtype, 65_536 // size, 2048, rounds), flush=True)


if __name__ == "__main__":
    main()
