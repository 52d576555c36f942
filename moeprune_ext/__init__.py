"""moeprune_ext: prune Mixture-of-Experts language models without gradients."""

from moeprune_ext import reference
from moeprune_ext.ops import (
    RouterSpec,
    build_info,
    masked_router,
    overlap,
    overlap_from_hidden,
    routing_moments_,
)

__version__: str = build_info()["version"]

__all__ = [
    "RouterSpec",
    "__version__",
    "build_info",
    "masked_router",
    "overlap",
    "overlap_from_hidden",
    "reference",
    "routing_moments_",
]
