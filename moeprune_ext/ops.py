"""The three operations: one import for all of them. None is differentiable.

overlap (ops_overlap.py), masked_router (ops_routing.py) and routing_moments_ (ops_moments.py); what `backend` means is
in dispatch.py, what each computes is in reference.py.
"""

from moeprune_ext.dispatch import _C, build_info
from moeprune_ext.ops_moments import routing_moments_
from moeprune_ext.ops_overlap import log_sum_exp, log_sum_exp_from_hidden, overlap, overlap_from_hidden
from moeprune_ext.ops_routing import masked_router
from moeprune_ext.reference import RouterSpec

__all__ = [
    "_C",
    "RouterSpec",
    "build_info",
    "log_sum_exp",
    "log_sum_exp_from_hidden",
    "masked_router",
    "overlap",
    "overlap_from_hidden",
    "routing_moments_",
]
