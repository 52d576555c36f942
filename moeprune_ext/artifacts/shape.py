"""What pruning must respect in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """What pruning must respect in one layer: what its router needs, and what a user asks of every plan.

    Attributes:
        num_experts: routed experts stored, E.
        top_k: experts per token, K.
        n_group: groups of a group-limited router, each of which must keep equally many; else 1.
        min_kept: fewest experts that the router can work with.
        prunable: False where experts are looked up by token, so that none can go.
        step: the number kept must be a multiple of this (the size of expert parallelism).
        max_kept: most experts that may stay; None: all.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    min_kept: int = 1
    prunable: bool = True
    step: int = 1
    max_kept: int | None = None

    @property
    def unit(self) -> int:
        """The number kept is a multiple of this: of the groups and of the step."""
        return lcm(self.n_group, self.step)

    @property
    def least_kept(self) -> int:
        """Fewest experts that can stay."""
        return -(-self.min_kept // self.unit) * self.unit if self.prunable else self.num_experts

    @property
    def most_kept(self) -> int:
        """Most experts that can stay; below `least_kept` where the limits contradict each other."""
        most = self.num_experts if self.max_kept is None else min(self.num_experts, self.max_kept)
        return most // self.unit * self.unit

    @property
    def least_pruned(self) -> int:
        """Fewest experts that must be pruned; above 0 only under a step or a maximum."""
        return self.num_experts - self.most_kept

    @property
    def capacity(self) -> int:
        """Most experts that can be pruned, `least_pruned` and a multiple of `unit`."""
        return self.num_experts - self.least_kept

    def recorded(self) -> dict[str, Any]:
        """Returns the attributes as files hold them: the step and the maximum only where there is one."""
        return {name: value for name, value in vars(self).items() if (name, value) not in _NO_LIMITS}


_NO_LIMITS = (("step", 1), ("max_kept", None))
