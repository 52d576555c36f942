"""What stands for weights that stay on the disk while transformers loads a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Unread:
    """Stands for a stored tensor that is not read yet: loading makes a meta tensor of it."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape

    def __getitem__(self, _: Any) -> Unread:
        return self

    def is_floating_point(self) -> bool:
        return True

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")
