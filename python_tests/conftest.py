"""Fixtures of the kernel tests: every implementation of the kernels that this machine can run, and the number of
threads."""

import dataclasses
import functools
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from moeprune_ext import ops
from moeprune_ext.ops import backend as ops_backend
from moeprune_ext.ops.reference import RouterSpec

ISAS = ops.build_info()["cpu_isas"]
EMULATED = importlib.util.find_spec("moeprune_ext._C_emulated") is not None  # built with MOEPRUNE_EMULATOR=ON
CUDA = ops.build_info()["cuda_available"] and torch.cuda.is_available()
OPERATIONS = ("log_sum_exp", "masked_router", "overlap", "overlap_from_hidden", "routing_moments_")


# `pytest -m fast`: files whose tests take a second or a few, so that together they take less than a minute.
FAST = {
    "test_allocate.py",
    "test_costs.py",
    "test_criteria.py",
    "test_data.py",
    "test_eep_candidates.py",
    "test_fit.py",
    "test_golden.py",
    "test_intervals.py",
    "test_layouts.py",
    "test_masked_router.py",
    "test_merging.py",
    "test_plan.py",
    "test_progress.py",
    "test_router_map.py",
    "test_sources.py",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in FAST:
            item.add_marker(pytest.mark.fast)


def pytest_addoption(parser):
    parser.addoption("--write-models", type=Path, help="write the table of architectures (test_models.py) to this file")
    parser.addoption("--write-serving", type=Path, help="write the table of served exports (test_vllm.py) to this file")


def to_gpu(value):
    """Tensors with their strides and offsets, also inside of lists, specs and functions of tensors."""
    if isinstance(value, torch.Tensor):
        elements = value.untyped_storage().nbytes() // value.element_size()
        storage = torch.as_strided(value.detach(), (elements,), (1,), 0).cuda()
        return torch.as_strided(storage, value.shape, value.stride(), value.storage_offset())
    if isinstance(value, RouterSpec):
        return dataclasses.replace(value, correction_bias=to_gpu(value.correction_bias))
    if callable(value):
        return lambda *arguments: to_gpu(value(*(to_cpu(argument) for argument in arguments)))
    return value


def to_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_cpu(item) for item in value)
    return value


def on_gpu(operation):
    """The operation for tensors on the CPU, run by the CUDA kernels."""

    @functools.wraps(operation)
    def run(*arguments, backend="auto", **options):
        moved = [to_gpu(argument) for argument in arguments]
        options = {name: to_gpu(option) for name, option in options.items()}
        result = operation(*moved, backend="torch" if backend == "torch" else "native", **options)
        if operation.__name__.endswith("_"):  # works in place
            for before, after in zip(arguments, moved, strict=True):
                if isinstance(before, torch.Tensor) and before.is_contiguous():
                    before.copy_(after)
        return to_cpu(result)

    return run


@pytest.fixture(params=ISAS)
def isa(request):
    """The CPU kernels, once for every instruction set."""
    before = ops.build_info()["cpu_isa"]
    ops._C.set_isa(request.param)
    yield request.param
    ops._C.set_isa(before)


@pytest.fixture(params=[*ISAS, *["cuda-emulated"] * EMULATED, *["cuda"] * CUDA])
def core(request, monkeypatch):
    """All kernels: of the CPU, of CUDA emulated on the CPU, and of CUDA where there is a GPU. The operations under
    test take tensors on the CPU in any case."""
    if request.param == "cuda-emulated":
        emulated = importlib.import_module("moeprune_ext._C_emulated")
        monkeypatch.setattr(ops_backend, "_C", emulated)
        monkeypatch.setattr(ops, "_C", emulated)
        yield request.param
    elif request.param == "cuda":
        for owner in (ops, request.module):
            for name in OPERATIONS:
                if hasattr(owner, name):
                    monkeypatch.setattr(owner, name, on_gpu(getattr(owner, name)))
        yield request.param
    else:
        before = ops.build_info()["cpu_isa"]
        ops._C.set_isa(request.param)
        yield request.param
        ops._C.set_isa(before)


@pytest.fixture
def sized(core):
    """sized(n, m): n, or m where the kernels are emulated, which takes its time."""
    return lambda full, emulated: emulated if core == "cuda-emulated" else full


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
