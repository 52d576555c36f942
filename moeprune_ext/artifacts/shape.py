"""What pruning must respect in a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """What pruning must respect in one layer.

    Attributes:
        num_experts: routed experts stored, E.
        top_k: experts per token, K.
        n_group: groups of a group-limited router, each of which must keep equally many; else 1.
        min_kept: fewest experts that the router can work with.
        prunable: False where experts are looked up by token, so that none can go.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    min_kept: int = 1
    prunable: bool = True

    @property
    def capacity(self) -> int:
        """Most experts that can be pruned, a multiple of n_group."""
        if not self.prunable:
            return 0
        return (self.num_experts - self.min_kept) // self.n_group * self.n_group
