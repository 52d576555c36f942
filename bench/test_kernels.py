"""pytest-benchmark groups: native, eager and torch.compile for every case of cases.py, with fewer rows, on the CPU.

pytest bench --benchmark-only       times (a few minutes)
pytest bench --benchmark-disable    does every contender run, and does native agree with eager? (seconds)
"""

import pytest
import torch
from cases import OLMOE, all_cases
from measure import compiled, memory_of

from moeprune_ext.ops.reference import METRICS


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = all_cases("cpu", shrink=64 if metafunc.config.getoption("benchmark_disable") else 8)
        metafunc.parametrize("case", cases, ids=[case.name.replace(", ", "-") for case in cases], scope="module")


@pytest.fixture(scope="module")
def work(case):
    torch.manual_seed(0)
    return case.build()


def tensors(answer):
    return answer if isinstance(answer, tuple) else (answer,)


def assert_agrees(actual, expected, rtol):
    """Nearly everywhere, for eager leaves the choice among equals open; and except for `accept`, the last of all
    metrics: a draw may fall on the next token by eager's rounding."""
    for a, b in list(zip(tensors(actual), tensors(expected), strict=True))[: len(METRICS) - 1]:
        outside = ~torch.isclose(a.double(), b.double().view_as(a), rtol=rtol, atol=rtol)
        assert outside.double().mean() <= 1e-3


@pytest.mark.parametrize("contender", ["native", "eager", "compile"])
def test_speed(benchmark, case, work, contender):
    if contender == "compile":
        if benchmark.disabled and OLMOE.name not in case.name:
            pytest.skip("one model's compilation is enough to see that it works")
        function = compiled(*work.compiles) if work.compiles else None
    else:
        function = next(f for name, f in work.contenders.items() if name.startswith(contender))
    if function is None:
        pytest.skip("nothing to compile, or no compiler")
    benchmark.group = case.name
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


def test_native_agrees_with_every_eager_spelling(case):
    torch.manual_seed(0)
    work = case.build()  # anew, for some contenders add to what they are given
    expected = work.contenders.pop("native")()
    for contender in work.contenders.values():
        assert_agrees(contender(), expected, case.rtol)


def test_memory_of_counts_what_is_allocated_beyond_the_result():
    a, b = torch.ones(2, 1000, 1000)
    size = a.nbytes

    def in_sizes(contender):
        return [round(n_bytes / size, 2) for n_bytes in memory_of(contender, "cpu")]  # but for vectors and scalars

    assert in_sizes(lambda: a + b) == [0, 1]
    assert in_sizes(lambda: (a + b) * 2) == [1, 1]
    assert in_sizes(lambda: a.add_(b)) == [0, 0]
    assert in_sizes(lambda: torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1)) == [3, 0]
