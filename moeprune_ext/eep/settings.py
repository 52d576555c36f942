"""The settings of an EEP search, and the published numbers that no user sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FITNESSES = ("accuracy", "esap", "nll")
STARTS = ("criteria", "random")
TIE_BREAKS = ("log_likelihood", None)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


@dataclass(frozen=True)
class Rates:
    """How often and how far children differ from their parents: arXiv 2407.00945 and its released code.

    Attributes:
        start_count: candidates of the first call; they count among `prune_iters`.
        mutate_within: a parent's distance from the best, in points (hundredths of a score).
        cross_within: likewise, of two parents that cross.
        touch: probability that a mask's matrix is touched; at least one always is.
        redraw: probability that a row of a touched mask is drawn again.
        touch_merging: probability that W_EM of a group is touched.
        touch_mapping: likewise, W_RM.
        cross: probability that a merge has two parents.
        from_first: probability that a row, or an untouched matrix, is the first parent's.
        change: probability that an entry of a touched matrix changes.
        scale: standard deviation of the change.
        normalize: probability that the rows of all W_EM are divided by their sums.
        rerank: best candidates of each phase that are scored again on the validation split.
    """

    start_count: int = 30
    mutate_within: float = 3.0
    cross_within: float = 1.0
    touch: float = 0.25
    redraw: float = 0.15
    touch_merging: float = 0.25
    touch_mapping: float = 0.25
    cross: float = 0.3
    from_first: float = 0.6
    change: float = 0.25
    scale: float = 0.065
    normalize: float = 0.1
    rerank: int = 5

    def __post_init__(self) -> None:
        for name in ("start_count", "rerank"):
            _check_count(name, getattr(self, name))
        names = ("touch", "redraw", "touch_merging", "touch_mapping", "cross", "from_first", "change", "normalize")
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability; got {getattr(self, name)}")
        if self.touch == 0 or self.touch_merging == self.touch_mapping == 0:
            raise ValueError("a child changes something: touch, and touch_merging or touch_mapping, must be above 0")
        if min(self.mutate_within, self.cross_within) < 0 or not self.scale > 0:
            raise ValueError("thresholds are at least 0 and scale above 0")


PUBLISHED = Rates()


@dataclass(frozen=True)
class EepSettings:
    """What a user can choose about a search. A field's `help` is also the help of its command-line flag.

    Attributes:
        active: experts per token, fewer than the model's; None: as many.
        starts: "criteria" (our choice, default): masks of the criteria are the first starts; "random": the paper's.
        tie_break: "log_likelihood" (our choice, default) orders equal scores by the answers' log-likelihood, in the
            ranking and among parents, where the best by it stands for all of its score; None is the paper's.
        per_call: children drawn from one population and scored in one call (our choice); 1 is the paper's.
        cross_at_least: so many of the best may cross, however far apart (our choice: the 2 that it takes; the released
            code's file: 6).
        seed: of everything random.
        rates: published numbers that no user sets.

    Raises:
        ValueError: if no search can have these settings. Checked when the object is made.
    """

    fitness: str = field(
        default="accuracy", metadata={"help": "accuracy, or esap or nll of the right answers: what the search improves"}
    )
    active: int | None = None
    layer_groups: int | Sequence[Sequence[int]] | None = field(
        default=None, metadata={"help": "so many neighbouring layers share what is searched"}
    )
    starts: str = "criteria"
    tie_break: str | None = "log_likelihood"
    per_call: int = 4
    cross_at_least: int = 2
    prune_iters: int = field(default=40, metadata={"help": "candidates that prune, starts included"})
    merge_iters: int = field(default=160, metadata={"help": "candidates that merge; 0: prune only"})
    length_normalized: bool = field(default=False, metadata={"help": "compare choices by log-likelihood per token"})
    seed: int = 0
    rates: Rates = PUBLISHED

    def __post_init__(self) -> None:
        if self.fitness not in FITNESSES:
            raise ValueError(f"unknown fitness {self.fitness!r}; choose from {', '.join(FITNESSES)}")
        if isinstance(self.layer_groups, int) and self.layer_groups < 1:
            raise ValueError(
                f"layer_groups is how many neighbouring layers share matrices, at least 1; got {self.layer_groups}"
            )
        if self.starts not in STARTS:
            raise ValueError(f"unknown starts {self.starts!r}; choose from {', '.join(STARTS)}")
        if self.tie_break not in TIE_BREAKS:
            raise ValueError(f'unknown tie_break {self.tie_break!r}; choose "log_likelihood" or None')
        for name in ("prune_iters", "per_call"):
            _check_count(name, getattr(self, name))
        if self.merge_iters < 0 or self.cross_at_least < 2:
            raise ValueError(
                "merge_iters is at least 0 and cross_at_least at least 2; got "
                f"{self.merge_iters} and {self.cross_at_least}"
            )

    def arguments(self) -> dict[str, Any]:
        """Returns the settings as the arguments of `eep`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rates"}

    def recorded(self) -> dict[str, Any]:
        """Returns what search.json holds: all but `merge_iters`, which a resumed search may raise, and the layout's."""
        apart = ("layer_groups", "merge_iters", "rates")
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return settings | {name: value for name, value in asdict(self.rates).items() if name != "rerank"}


# The published search as far as it differs from the defaults: eep(model, task, keep=4, **PAPER).
PAPER: dict[str, Any] = {"starts": "random", "tie_break": None, "per_call": 1, "cross_at_least": 6}
