"""The operations, one file each; reference.py defines what each computes, backend.py which code runs it.

None is differentiable.
"""

from moeprune_ext.ops.backend import _C, build_info
from moeprune_ext.ops.reference import RouterSpec

__all__ = ["_C", "RouterSpec", "build_info"]
