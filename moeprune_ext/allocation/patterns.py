"""EvoESAP's vectors of pruned experts: the first generation's patterns, and mutation."""

from __future__ import annotations

import random
from collections.abc import Sequence

Counts = tuple[int, ...]  # pruned experts of each layer, in units beyond what it must lose (budget.py's Units)

DEFAULT_PATTERNS = (
    "uniform",
    "random",
    "up",
    "down",
    "mid",
    "mid-neg",
    "front-heavy",
    "back-heavy",
    "block-early",
    "block-late",
    "alt",
    "deep-flat",
)


def first_generation(
    init_counts: Sequence[Counts],
    patterns: Sequence[str],
    population: int,
    capacities: Sequence[int],
    budget: int,
    rng: random.Random,
) -> list[Counts]:
    """Returns `population` vectors: init_counts, then one per pattern, then random ones."""
    names = [*patterns, *["random"] * population][: population - len(init_counts)]
    shares = (pattern_weights(name, len(capacities), rng) for name in names)
    return [*init_counts, *(allocate(weights, capacities, budget) for weights in shares)]


def pattern_weights(pattern: str, layers: int, rng: random.Random) -> list[float]:
    """Returns a share of the budget per layer, not normalised, as in EvoESAP's released code."""
    middle, quarter = (layers - 1) / 2, max(1, layers // 4)
    positions = range(layers)
    if pattern == "random":
        return [rng.random() + 1e-4 for _ in positions]
    shapes: dict[str, Sequence[float]] = {
        "uniform": [1.0] * layers,
        "up": [i + 1 for i in positions],
        "down": [layers - i for i in positions],
        "mid": [middle + 1 - abs(i - middle) for i in positions],
        "mid-neg": [1 + abs(i - middle) for i in positions],
        "front-heavy": [0.7**i + 1e-4 for i in positions],
        "back-heavy": [1.3**i for i in positions],
        "block-early": [2.0 if i < quarter else 1.0 for i in positions],
        "block-late": [2.0 if i >= layers - quarter else 1.0 for i in positions],
        "alt": [2.0 if i % 2 == 0 else 1.0 for i in positions],
        "deep-flat": [0.5 + 0.5 * (1 - abs(2 * i / max(1, layers - 1) - 1)) for i in positions],
    }
    return list(shapes[pattern])


def allocate(weights: Sequence[float], capacities: Sequence[int], budget: int) -> Counts:
    """Returns integers of sum `budget` in proportion to the weights, by largest remainder within the capacities.

    Shares are rounded down and capped. What is left goes one each to the layers below capacity by descending fraction,
    then layer index; what is still left goes round robin from the first layer (EvoESAP's released code).

    Args:
        weights: a share per layer, not normalised.
        capacities: the most that each layer can lose.
        budget: the sum.

    Raises:
        ValueError: for a budget above the capacities' sum.
    """
    if not 0 <= budget <= sum(capacities):
        raise ValueError(f"cannot prune {budget} experts where at most {sum(capacities)} can go")
    total = sum(weights)
    shares = [budget * (weight / total) for weight in weights]
    counts = [min(int(share), capacity) for share, capacity in zip(shares, capacities, strict=True)]
    by_fraction = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    takers = [i for i in by_fraction if counts[i] < capacities[i]]
    left = budget - sum(counts)
    while left:
        for i in takers:
            if left and counts[i] < capacities[i]:
                counts[i] += 1
                left -= 1
        takers = list(range(len(counts)))
    return tuple(counts)


def mutate(
    parent: Counts,
    capacities: Sequence[int],
    rng: random.Random,
    max_delta: int,
    max_steps: int,
    max_attempts: int,
) -> Counts:
    """Returns a copy of `parent` after some level switches, which move pruned experts from one layer to another.

    Args:
        parent: units that each layer loses.
        capacities: the most that each layer can lose.
        rng: source of every choice.
        max_delta: a switch moves U{1..max_delta} units.
        max_steps: the child makes min(U{1..max_steps}, U{1..max_steps}) switches, or fewer where tries run out.
        max_attempts: most tries.
    """
    child = list(parent)
    wanted, done = min(rng.randint(1, max_steps), rng.randint(1, max_steps)), 0
    for _ in range(max_attempts):
        givers = [i for i, n in enumerate(child) if n > 0]
        takers = [i for i, n in enumerate(child) if n < capacities[i]]
        if done == wanted or not givers or not takers:
            break
        giver, taker, delta = rng.choice(givers), rng.choice(takers), rng.randint(1, max_delta)
        if giver != taker and child[giver] >= delta and child[taker] + delta <= capacities[taker]:
            child[giver] -= delta
            child[taker] += delta
            done += 1
    return tuple(child)
