"""The settings of an EvoESAP search."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from moeprune_ext.allocation.budget import Budget
from moeprune_ext.allocation.patterns import DEFAULT_PATTERNS
from moeprune_ext.allocation.surrogate import SHARE
from moeprune_ext.candidates.metrics import METRICS, OBJECTIVES

FIDELITIES = ("full", "race")


@dataclass(frozen=True)
class EvolveSettings:
    """What a user can choose about a search; the defaults are the published ones (arXiv 2603.06003).

    A field's `help` is also the help of its command-line flag. `sparsity` and `seed` have none here: they mean the same
    in every verb.

    Attributes:
        sparsity: share of the experts to remove, at least 0 and below 1, or `Kept`.
        seed: seed of the patterns, the mutations and the order in which sequences are raced.

    Raises:
        ValueError: if no search can have these settings. Checked when the object is made.
    """

    sparsity: Budget = 0.5
    fitness: str = field(
        default="esap", metadata={"help": "what plans are compared by: esap, kl_qp, kl_pq, nll, accept or top1_agree"}
    )
    objective: str = field(
        default="mean",
        metadata={"help": "of the fitness: its mean over all text, or over the worst domain's", "choices": OBJECTIVES},
    )
    population: int = field(default=32, metadata={"help": "plans per generation"})
    generations: int = field(default=50, metadata={"help": "generations, the first one included"})
    elites: int = field(default=4, metadata={"help": "plans that survive a generation"})
    max_delta: int = field(default=4, metadata={"help": "most experts that one move takes from a layer to another"})
    max_steps: int = field(default=3, metadata={"help": "most moves between a plan and its child"})
    max_attempts: int = field(default=32, metadata={"help": "most tries to find a child's moves"})
    init_patterns: tuple[str, ...] = field(
        default=DEFAULT_PATTERNS, metadata={"help": "patterns of counts over layers that open the first generation"}
    )
    fidelity: str = field(
        default="full", metadata={"help": "race: drop clearly worse plans early", "choices": FIDELITIES}
    )
    race_level: float = field(default=0.05, metadata={"help": "chance of dropping a plan that is not worse"})
    screen: int = field(
        default=0,
        metadata={
            "help": "children drawn for each one scored, by predictions (32 did well); 0: score all, as published"
        },
    )
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_patterns", tuple(dict.fromkeys(self.init_patterns)))
        if self.fidelity not in FIDELITIES:
            raise ValueError(f"unknown fidelity {self.fidelity!r}; choose from {', '.join(FIDELITIES)}")
        if not 0 < self.race_level < 0.5:
            raise ValueError(f"race_level is the chance of a wrong drop, above 0 and below 0.5; got {self.race_level}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}; choose from {', '.join(OBJECTIVES)}")
        if self.objective == "worst" and self.fidelity == "race":
            raise ValueError("a race compares means over all sequences; with objective worst use fidelity full")
        if self.fitness not in METRICS:
            raise ValueError(f"unknown fitness {self.fitness!r}; choose from {', '.join(METRICS)}")
        if min(self.population, self.generations, self.elites) < 1 or self.elites > self.population:
            raise ValueError(
                "population, generations and elites must be at least 1, and elites at most population; got "
                f"{self.population}, {self.generations} and {self.elites}"
            )
        if self.screen < 0:
            raise ValueError(
                f"screen is the number of children drawn for each one scored, 0 to score all; got {self.screen}"
            )
        if min(self.max_delta, self.max_steps, self.max_attempts) < 1:
            raise ValueError("max_delta, max_steps and max_attempts must be at least 1")
        if unknown := [name for name in self.init_patterns if name not in DEFAULT_PATTERNS]:
            raise ValueError(f"unknown initial patterns {unknown}; choose from {', '.join(DEFAULT_PATTERNS)}")

    @property
    def children(self) -> int:
        """Children that a generation scores, at most; a screened one less than others."""
        children = self.population - self.elites
        return min(children, max(1, children // SHARE)) if self.screen else children

    def recorded(self) -> dict[str, Any]:
        """Returns what search.json holds: all but `generations`, which a resumed search may raise."""
        settings = asdict(self) | {
            "init_patterns": list(self.init_patterns),
            "race_level": self.race_level if self.fidelity == "race" else None,
            "screen": self.screen or None,
        }
        del settings["generations"]
        return settings
