"""The three operations, one file each; what `backend` means is in backend.py, what each computes in reference.py.

None is differentiable.
"""

from moeprune_ext.ops.backend import _C, build_info
from moeprune_ext.ops.reference import RouterSpec

__all__ = ["_C", "RouterSpec", "build_info"]
