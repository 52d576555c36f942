"""Fixtures of the kernel tests: every instruction set of this machine, and the number of threads."""

import pytest
import torch

from moeprune_ext import ops


@pytest.fixture(params=ops.build_info()["cpu_isas"])
def isa(request):
    before = ops.build_info()["cpu_isa"]
    ops._C.set_isa(request.param)
    yield request.param
    ops._C.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
