"""What a user can choose about a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import super_experts, triple_of

REPAIRS = ("auto", "layer", "hidden", "off")
SEQUENTIAL = ("auto", "on", "off")


@dataclass(frozen=True)
class TextSizes:
    """How much text a run uses, in sequences over all sources.

    Attributes:
        calibration_sequences: gather statistics, and are fitted by the repair.
        sequences: score plans; a quarter of them, at least 8, are never searched on and choose among the last plans.
        test_sequences: are looked at once, for the figures that are reported.
    """

    calibration_sequences: int = field(
        default=128, metadata={"help": "sequences that gather statistics and that repair fits", "least": 8}
    )
    sequences: int = field(
        default=64, metadata={"help": "sequences that score plans, the quarter held out included", "least": 16}
    )
    test_sequences: int = field(
        default=16, metadata={"help": "sequences that are looked at once, for the figures reported", "least": 8}
    )

    @property
    def total(self) -> int:
        """All sequences."""
        return self.calibration_sequences + self.sequences + self.test_sequences


@dataclass(frozen=True)
class SearchSettings(EvolveSettings):
    """The published search with screened children: better plans for fewer evaluations (bench/results/screen.md)."""

    screen: int = field(default=32, metadata=dict(EvolveSettings.__dataclass_fields__["screen"].metadata))


@dataclass(frozen=True)
class PruneSettings:
    """How a run chooses, searches and repairs.

    Attributes:
        search: settings of the search; `sparsity` there is the run's budget.
        refine: rounds of swaps of single experts after the search (allocation/refine.py); 0: none.
        criterion: "auto", "naee", or as in `score_experts`.
        repair: "layer" or "hidden" (see `repair`), "auto": whichever is better on held-out text, "off". Repair is left
            out where it is not better than none there.
        sequential: whether repair chooses experts anew, see `repair`; "auto": if that is better on held-out text.
        min_kept: fewest experts that any layer keeps.
        min_kept_per_group: the same for each group of grouped routers.
        multiple_of: every layer keeps a multiple of so many experts.
        max_kept: most experts that any layer keeps; None: all.
        protect_super: whether experts with extreme output norms stay.
        drop_mtp: whether multi-token-prediction layers are left out, which are kept otherwise (checkpoint/mtp.py).
        router: see CandidateEvaluator.
        memory_budget: bytes, see CandidateEvaluator.

    Raises:
        ValueError: for values that no run can have.
    """

    search: EvolveSettings = field(default_factory=SearchSettings)
    refine: int = 0
    criterion: str | tuple[int, int, str] = "auto"
    repair: str = "auto"
    sequential: str = "auto"
    min_kept: int = 0
    min_kept_per_group: int = 0
    multiple_of: int = 1
    max_kept: int | None = None
    protect_super: bool = False
    drop_mtp: bool = False
    router: str = "auto"
    memory_budget: int = 1 << 30

    def __post_init__(self) -> None:
        for name, value, names in (("repair", self.repair, REPAIRS), ("sequential", self.sequential, SEQUENTIAL)):
            if value not in names:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(names)}")
        if self.criterion not in ("auto", "naee", "random"):
            triple_of(self.criterion)  # raises ValueError for an unknown one
        if self.refine < 0:
            raise ValueError(f"refine is a number of rounds, 0 for none; got {self.refine}")
        if self.refine and self.search.objective == "worst":
            raise ValueError("refine compares means over all text, which objective worst does not; use refine=0")
        named = isinstance(self.criterion, str) and self.criterion != "random"
        if self.sequential == "on" and (self.protect_super or not named):
            raise ValueError(
                "sequential repair chooses experts anew by a named criterion and protects none; use auto or off"
            )

    def limited(self, scores: ExpertScores, stats: RoutingStats | None) -> ExpertScores:
        """Returns scores under the limits, for which protect_super needs statistics."""
        return scores.constrained(
            min_kept=self.min_kept,
            min_kept_per_group=self.min_kept_per_group,
            multiple_of=self.multiple_of,
            max_kept=self.max_kept,
            protect=super_experts(stats) if self.protect_super and stats is not None else None,
        )

    def recorded(self) -> dict[str, Any]:
        """Returns what a run's directory holds of them: all that its result depends on."""
        criterion = self.criterion if isinstance(self.criterion, str) else list(self.criterion)
        settings = {name: value for name, value in vars(self).items() if name not in ("memory_budget", "drop_mtp")}
        settings |= {"drop_mtp": True} if self.drop_mtp else {}
        generations = {"generations": self.search.generations}
        return {**settings, "criterion": criterion, "search": self.search.recorded() | generations}
