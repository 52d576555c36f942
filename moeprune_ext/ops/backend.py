"""Which code runs an operation, and the checks the operations share.

`backend="auto"` takes the compiled CPU kernels where they apply (float32, bfloat16 or float16 tensors on the CPU) and
`moeprune_ext.reference` elsewhere: for float64, and for CUDA tensors, because the CUDA kernels have not been verified
on hardware yet. `backend="native"` insists on the kernels, the CUDA ones included, and raises where they do not
apply; `backend="torch"` insists on the reference.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_C: ModuleType | None = None


_import_error: ImportError | None = None


try:  # after torch, so that both share one OpenMP pool
    _C = importlib.import_module("moeprune_ext._C")
except ImportError as error:
    _import_error = error


DEFAULT_CHUNK_BYTES = 256 * 2**20


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_warned = False


def build_info() -> dict[str, Any]:
    """What was compiled in and what runs: version, cuda (compiled in), cuda_archs, cuda_runtime (version or
    None), cuda_available (a device can be used), cpu_isa (in use), cpu_isas (usable here), openmp, compiler.

    Without the compiled module: cpu_isa is "none" and compiler None.
    """
    if _C is not None:
        return dict(_C.build_info())
    return {
        "version": importlib.metadata.version("moeprune_ext"),
        "cuda": False,
        "cuda_archs": [],
        "cuda_runtime": None,
        "cuda_available": False,
        "cpu_isa": "none",
        "cpu_isas": [],
        "openmp": False,
        "compiler": None,
    }


def kernels(backend: str, *tensors: Tensor) -> ModuleType | None:
    """The compiled module if it is to be used for tensors of these dtypes and devices, None for the
    reference."""
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'native' or 'torch'")
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors are on {tensors[0].device} and on {tensor.device}; move them to one device")
    if backend == "torch":
        return None
    if _C is None:
        if backend == "native":
            raise RuntimeError(
                "backend='native', but moeprune_ext._C cannot be imported; reinstall the package"
            ) from _import_error
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                f"moeprune_ext._C cannot be imported ({_import_error}); using slower PyTorch code. Inside the source "
                "checkout its moeprune_ext/ hides the installed package: work elsewhere, or `pip install -e .`",
                stacklevel=3,
            )
        return None
    device = tensors[0].device.type
    refused = [tensor.dtype for tensor in tensors if tensor.dtype not in _FLOATS]
    if backend == "auto":
        return None if refused or device != "cpu" else _C
    if refused:
        raise ValueError(f"backend='native' takes float32, bfloat16 and float16, got {refused[0]}; use backend='auto'")
    if device not in ("cpu", "cuda") or (device == "cuda" and not _C.build_info()["cuda"]):
        raise ValueError(f"backend='native' has no kernels for device {device!r} in this build")
    return _C


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    shape = list(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or s == e for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; expected [{', '.join(map(str, expected))}]")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (*_FLOATS, torch.float64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")


def row_vector(tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A per-row vector (small beside the logits) in the dtype that the kernels read."""
    if tensor is None:
        return None
    if tensor.device != like.device:
        raise ValueError(f"tensors are on {like.device} and on {tensor.device}; move them to one device")
    return tensor.detach().to(dtype).contiguous()


def row_chunks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
