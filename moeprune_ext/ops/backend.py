"""Which code runs an operation, and the checks the operations share.

`backend="auto"` takes the compiled CPU kernels where they apply (float32, bfloat16 or float16 tensors on the CPU) and
reference.py elsewhere: for float64, and for CUDA tensors, because the CUDA kernels have not been verified on hardware
yet. `backend="native"` insists on the kernels, the CUDA ones included, and raises where they do not apply;
`backend="torch"` insists on the reference.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PACKAGE, COMPILED = "moeprune_ext", "moeprune_ext._C"


def _load_compiled(source: Path) -> ModuleType:
    """Imports the compiled module, which torch must precede, so that both share one OpenMP pool.

    Python started inside a source checkout takes the package from there, where nothing is compiled. Then the module of
    the installed package is taken, if its version is the checkout's.

    Args:
        source: the folder of this package.

    Raises:
        ImportError: with what to do, where there is no module, or one of another version.
    """
    try:
        return importlib.import_module(COMPILED)
    except ImportError as error:
        reason = str(error)
    advice = f"run `pip install .` in {source.parent}"
    for installed in importlib.metadata.distributions(name=PACKAGE):
        file = _compiled_file(installed)
        if file is None:
            continue
        if (ours := _source_version(source)) not in (None, installed.version):
            advice = f"the installed one is version {installed.version}, this source {ours}: {advice}"
            continue
        spec = importlib.util.spec_from_file_location(COMPILED, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[COMPILED] = module
        return module
    raise ImportError(f"{reason}; {advice}")


def _compiled_file(installed: importlib.metadata.Distribution) -> Path | None:
    """Returns the compiled module's file of an installed package; None where it has none."""
    names = {f"{PACKAGE}/_C{suffix}" for suffix in EXTENSION_SUFFIXES}
    files = [Path(str(file.locate())) for file in installed.files or () if file.as_posix() in names]
    return next((file for file in files if file.is_file()), None)


def _source_version(source: Path) -> str | None:
    """Returns the version in the pyproject.toml beside the package; None where there is none."""
    file = source.parent / "pyproject.toml"
    found = re.search(r'^version = "([^"]+)"$', file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return found[1] if found else None


_C: ModuleType | None = None
_import_error: ImportError | None = None
try:
    _C = _load_compiled(Path(__file__).resolve().parents[1])
except ImportError as error:
    _import_error = error


DEFAULT_CHUNK_BYTES = 256 * 2**20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_warned = False


def build_info() -> dict[str, Any]:
    """Says what was compiled in and what runs.

    Returns:
        A dictionary of
            version: of the package,
            cuda: whether CUDA kernels were compiled in,
            cuda_archs: the compute capabilities that they were compiled for,
            cuda_runtime: the version of the CUDA runtime, or None,
            cuda_available: whether a device can be used,
            cpu_isa: the instruction set in use; "none" without the compiled module,
            cpu_isas: the instruction sets that this processor can run,
            openmp: whether the kernels were built with OpenMP,
            compiler: name and version; None without the compiled module.
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
    """Chooses between the compiled module and the reference.

    Args:
        backend: "auto", "native" or "torch", as described at the top of this file.
        tensors: the operation's large tensors; all are on one device.

    Returns:
        The compiled module, or None where the reference is to be used.

    Raises:
        ValueError: `backend` is unknown, the tensors are on several devices, or "native" has no kernels for them.
        RuntimeError: "native" is asked for and the compiled module cannot be imported.
    """
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'native' or 'torch'")
    for tensor in tensors:
        _check_device(tensor, tensors[0])
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
                f"moeprune_ext._C cannot be imported ({_import_error}); using slower PyTorch code",
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
    """Raises ValueError unless the tensor has the expected shape; a name stands for any size."""
    shape = list(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or s == e for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; expected [{', '.join(map(str, expected))}]")


def check_float(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor's dtype is one of the floats that operations take."""
    if tensor.dtype not in (*_FLOATS, torch.float64):
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")


def check_integer(name: str, tensor: Tensor, expected: str = "an integer dtype") -> None:
    """Raises ValueError unless the tensor's dtype is an integer one."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {expected}")


def check_same_device(name: str, tensor: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError unless the other arguments that are given are on the device of the tensor `name`."""
    for other in others:
        if other is not None and other.device != tensor.device:
            raise ValueError(
                f"{name} are on {tensor.device} and another argument on {other.device}; move them to one device"
            )


def row_vector(vector: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Makes a vector contiguous and of the dtype that the kernels read; None stays None.

    Raises:
        ValueError: the vector is not on the device of `like`.
    """
    if vector is None:
        return None
    _check_device(vector, like)
    return vector.detach().to(dtype).contiguous()


def row_chunks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    """Yields slices that cover `rows` rows, each of at most `chunk_bytes` bytes but at least one row."""
    step = max(1, chunk_bytes // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _check_device(tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"tensors are on {first.device} and on {tensor.device}; move them to one device")
