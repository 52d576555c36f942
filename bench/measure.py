"""Times and memory of contenders: functions without arguments that do the same work in different ways.

The contenders of a case run in one process, alternating, after a warm-up. Times are medians over the rounds, and a
ratio is the median of the rounds' own ratios, so that a neighbour on the machine disturbs it less.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

Contenders = dict[str, Callable[[], object]]
MIN_ROUNDS = 3


class Times:
    """Seconds of every contender in every round."""

    def __init__(self, seconds: dict[str, list[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def over_native(self, names: Iterable[str], pick: Callable = min) -> float:
        """How many times native's time the fastest (pick=max: the slowest) of the named contenders takes."""
        return pick(
            statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds["native"], strict=True))
            for name in names
        )

    def named(self, prefix: str) -> list[str]:
        return [name for name in self.seconds if name.startswith(prefix)]


def seconds_of(contender: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        contender()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    contender()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def measure(contenders: Contenders, device: str, rounds: int, seconds: float) -> Times:
    """Up to `rounds` rounds, fewer (but MIN_ROUNDS) where they would take longer than `seconds`."""
    for contender in contenders.values():
        seconds_of(contender, device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and (time.perf_counter() - start) * (done + 1) / done > seconds:
            break
        for name, contender in contenders.items():
            times[name].append(seconds_of(contender, device))
    return Times(times)


def memory_of(contender: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes that torch allocates for a call: at its peak beyond the result, and for the result.

    Complete for the kernels too, which allocate through torch only.
    """
    contender()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = contender()
        torch.cuda.synchronize()
        after, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del result
        return peak - after, after
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = contender()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result  # alive until here, so that it is what the call leaves allocated
    return peak - now, now


def compiled(function: Callable, *arguments: object) -> Callable[[], object] | None:
    """The function under torch.compile, or None where no compiler works."""
    torch.compiler.reset()  # or a function's ninth shape would silently run eagerly
    try:
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    except Exception as error:  # whatever the backend raises where it cannot build
        print(f"torch.compile does not work here: {type(error).__name__}", file=sys.stderr)
        return None
    return lambda: fast(*arguments)


def copy(n_bytes: int, device: str) -> Callable[[], object]:
    """Moves so many bytes, half read and half written."""
    source, target = torch.ones(2, max(1, n_bytes // 8), dtype=torch.float32, device=device)
    return lambda: target.copy_(source)


def reads(*tensors: torch.Tensor) -> Contenders:
    """Ways to read the tensors once; the fastest `read` is the limit, `sum` what a reader would write.

    On a GPU the limit is the copy.
    """
    device = tensors[0].device.type
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    ways: Contenders = {"read: copy": copy(n_bytes, device), "sum": lambda: [tensor.sum() for tensor in tensors]}
    if device == "cpu":
        words = [tensor.flatten().view(torch.float32) for tensor in tensors]
        ways["read: float32 words"] = lambda: [word.sum() for word in words]
    return ways
