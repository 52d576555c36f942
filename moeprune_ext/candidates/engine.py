"""What an engine is: it computes the rows of many candidates' metrics, on some sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.teacher import PLACES
from moeprune_ext.models.routers import ROUTERS

Values = tuple[int, list[int], dict[str, Tensor]]  # a sequence, numbers of some plans, {metric: [those plans, T]}


@dataclass(frozen=True)
class EngineOptions:
    """How engines work.

    Attributes:
        memory_budget: bytes beyond the model's own weights, on the model's device.
        teacher_cache: where the teacher's rows are kept: a name of teacher.PLACES.
        router: how routers run under many masks: a name of routers.ROUTERS.
        seed: of the `accept` metric's draws.
        unit: neighbouring sequences that are a unit of work.
        backend: of the operations, see ops/backend.py.
    """

    memory_budget: int = 1 << 30
    teacher_cache: str = "auto"
    router: str = "auto"
    seed: int = 0
    unit: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, value, names in (("teacher_cache", self.teacher_cache, PLACES), ("router", self.router, ROUTERS)):
            if value not in names:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(names)}")


@dataclass(frozen=True)
class Division:
    """What a memory budget allows.

    Attributes:
        head: bytes for logits in flight.
        row_bytes: bytes that a row of logits takes meanwhile.
        tokens: in one call of a layer.
        state_tokens: tokens of hidden states that the sweep holds.
        token_bytes: bytes of a token's hidden states.
        teacher_place: where the teacher's rows are kept, see teacher.py.
    """

    head: int
    row_bytes: int
    tokens: int
    state_tokens: int
    token_bytes: int
    teacher_place: str

    def room_beside(self, merged_bytes: int, longest: int) -> int:
        """Returns the tokens of states that fit beside one layer's merged experts, in whole sequences.

        Args:
            merged_bytes: of the merged experts.
            longest: tokens of the longest sequence.

        Raises:
            ValueError: where not even the states of one sequence fit, with the numbers.
        """
        room = (self.state_tokens - -(-merged_bytes // self.token_bytes)) // longest * longest
        if room < longest:
            own, there = longest * self.token_bytes, self.state_tokens * self.token_bytes
            mib = [f"{n / 2**20:,.2f} MiB" for n in (there, merged_bytes, own, merged_bytes + own - there)]
            raise ValueError(
                f"memory_budget leaves {mib[0]} for hidden states; the merged experts of one layer would take {mib[1]} "
                f"of it, and a candidate's states need {mib[2]}: {mib[3]} are missing"
            )
        return room


class Engine(Protocol):
    """Computes candidates' rows; called in eval mode without gradients.

    Attributes:
        about: how it works, as far as scores depend on it.
    """

    about: str

    def teacher(self, numbers: Sequence[int]) -> dict[int, float]:
        """Prepares these sequences.

        Returns:
            {sequence: the sum of the unpruned model's log-sum-exps, NaN where it is NaN}.
        """

    def values(
        self, plans: Sequence[PruningPlan], numbers: Sequence[int], metrics: tuple[str, ...]
    ) -> Iterator[Values]:
        """Yields values until every plan has met every sequence; the plans have equally many experts active."""

    def check_merged(self, kept: Mapping[int, int]) -> None:
        """Refuses (ValueError) merges into so many experts, {decoder layer: K'}, that there is no room for."""
