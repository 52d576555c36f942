"""EvoESAP's vectors of pruned experts: the first generation's patterns, and mutation."""

from __future__ import annotations

import random
from collections.abc import Sequence

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


Counts = tuple[int, ...]  # experts pruned per layer


def _first_generation(
    given: Sequence[Counts],
    patterns: Sequence[str],
    population: int,
    capacities: Sequence[int],
    budget: int,
    rng: random.Random,
) -> list[Counts]:
    names = [*patterns, *["random"] * population][: population - len(given)]
    return [*given, *(allocate(pattern_weights(name, len(capacities), rng), capacities, budget) for name in names)]


def pattern_weights(pattern: str, layers: int, rng: random.Random) -> list[float]:
    """A share of the budget per layer, as in EvoESAP's released code."""
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
    """Integers of sum `budget` in proportion to the weights, by largest remainder within the capacities.

    Shares are rounded down and capped; what is left goes one each to the layers below capacity by descending fraction,
    then layer index, and what is still left goes round robin from the first layer (EvoESAP's released code).
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
    """A copy of `parent` after min(U, U) level switches: U{1..max_delta} pruned experts move from one layer to
    another."""
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
