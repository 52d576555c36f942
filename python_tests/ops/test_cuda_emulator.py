"""The emulation of CUDA (csrc/emulator/cuda_emulator.h) finds planted bugs, and finds none in the kernels."""

import pytest
import torch

from moeprune_ext import RouterSpec, masked_router, overlap, routing_moments_
from moeprune_ext.ops.overlap import log_sum_exp

emulated = pytest.importorskip(
    "moeprune_ext._C_emulated", reason="built without MOEPRUNE_EMULATOR", exc_type=ImportError
)

SCHEDULES = range(6)  # ascending, descending, shuffled


@pytest.fixture(autouse=True)
def default_settings():
    yield
    emulated.set_schedule(0)
    emulated.set_device()


def results(kernel, **shape):
    """What the kernel writes under each schedule, with NaN as -1."""
    values = []
    for seed in SCHEDULES:
        emulated.set_schedule(seed)
        values.append(tuple(torch.tensor(emulated.run_kernel(kernel, **shape)).nan_to_num(-1.0).tolist()))
    return values


@pytest.mark.parametrize(
    ("kernel", "shape", "expected"),
    [
        ("mirror", dict(blocks=3), [255.0 - i for i in range(256)] * 3),
        ("dynamic", dict(blocks=2), [2.0] * 512),
        ("warps", dict(blocks=1), [sum(range(w * 32, w * 32 + 32)) * 1.0 for w in range(8) for _ in range(32)]),
        ("neighbours", dict(blocks=4, cluster=2), [(i ^ 256) * 1.0 for i in range(1024)]),
        ("neighbours", dict(blocks=8, cluster=8), [(i + 256) % 2048 * 1.0 for i in range(2048)]),
        ("neighbours", dict(blocks=2, cluster=1), [i * 1.0 for i in range(512)]),
    ],
)
def test_correct_kernels_compute_the_same_under_every_schedule(kernel, shape, expected):
    assert results(kernel, **shape) == [tuple(expected)] * len(SCHEDULES)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [("mirror without barrier", {}), ("neighbours without barrier before", dict(blocks=4, cluster=4))],
)
def test_a_missing_barrier_shows_as_results_that_depend_on_the_schedule(kernel, shape):
    assert len(set(results(kernel, **shape))) > 1


def test_shared_memory_starts_as_nan_in_every_block():
    emulated.run_kernel("mirror", blocks=3)
    assert torch.tensor(emulated.run_kernel("uninitialised", blocks=3)).isnan().all()


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    ("kernel", "cluster", "message"),
    [
        ("barrier for half", 1, r"deadlock: .* waits at __syncthreads .*thread 128 of block .* has ended"),
        ("two barriers", 1, r"deadlock: .* waits at __syncthreads .* waits at __syncthreads"),
        ("lane missing", 1, r"deadlock: .* __shfl_xor_sync .*0xffffffff, but thread 5 of block .* has ended"),
        ("not in mask", 1, "calls __shfl_xor_sync without being in the mask"),
        ("outside mask", 1, "reads lane 16, which is not among them"),
        ("misaligned", 1, "thread 7 of block .* loads 16 bytes from a misaligned address"),
        ("beyond shared", 1, "written beyond its shared memory"),
        ("stopped block", 4, "deadlock: .* waits at cluster_sync .* has ended"),
        ("neighbours without barrier after", 4, "shared memory of a block that has ended"),
    ],
)
def test_planted_bugs_are_found(kernel, cluster, message, seed):
    emulated.set_schedule(seed)
    with pytest.raises(RuntimeError, match=message):
        emulated.run_kernel(kernel, blocks=4, cluster=cluster)
    assert emulated.run_kernel("mirror")[0] == 255  # and the next kernel runs as if nothing had happened


def test_launches_that_no_device_accepts_are_refused():
    with pytest.raises(RuntimeError, match="not a multiple of the cluster"):
        emulated.run_kernel("neighbours", blocks=6, cluster=4)
    with pytest.raises(RuntimeError, match="a cluster has 1 to 8 blocks"):
        emulated.run_kernel("neighbours", blocks=9, cluster=9)
    assert emulated.run_kernel("neighbours", blocks=0, cluster=4) == []
    emulated.set_device(major=8)
    with pytest.raises(RuntimeError, match="no clusters"):
        emulated.run_kernel("neighbours", blocks=4, cluster=4)
    emulated.set_device(shared_per_block=1000)
    with pytest.raises(RuntimeError, match="more shared memory than the device"):
        emulated.run_kernel("dynamic")
    emulated.set_device(shared_per_block=1500)  # enough for the dynamic memory, but not for the static as well
    with pytest.raises(RuntimeError, match="more shared memory than the device"):
        emulated.run_kernel("mirror")


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def overlaps():
    p, q = numbers(3, 3001, seed=0), numbers(2, 3, 3001, seed=1)
    metrics = ("esap", "kl_pq", "kl_qp", "top1_agree", "nll", "accept")
    several = overlap(p, q, metrics=metrics, labels=torch.arange(3))
    return [
        *several.values(),
        overlap(p, q, p_lse=log_sum_exp(p))["esap"],
        overlap(p[:, ::2], q[:, :, ::2])["esap"],
    ]


def routes():
    logits, order = numbers(50, 64, seed=2).bfloat16(), torch.arange(64).flip(0)
    keep = torch.arange(64) % torch.tensor([[2], [5], [7]]) != 0
    return [
        *masked_router(logits, top_k=8, order=order, counts=[64, 8, 33]),
        *masked_router(logits, top_k=4, keep=keep),
        *masked_router(logits, top_k=4, keep=keep, assigned=torch.arange(50) % 3),
    ]


def mapped_routes():
    logits, maps = numbers(50, 70, seed=2).bfloat16(), numbers(3, 12, 70, seed=7)
    maps[1, :, ::2] = 0
    logits[40, 3] = float("inf")
    form = dict(router_map=maps, top_k=4)
    logits[:, 0], maps[2, :, 0] = 90, 0  # far above what the last map refers to
    answers = [
        *masked_router(logits, **form),
        *masked_router(logits, **form, assigned=torch.arange(50) % 3),
        *masked_router(logits, **form, spec=RouterSpec(correction_bias=numbers(70, seed=8))),
        *masked_router(logits, **form, spec=RouterSpec("sqrtsoftplus")),
    ]
    return [answer.nan_to_num(-1) for answer in answers]


def moments():
    ids = torch.arange(4500) * 7 % 5
    tables = torch.zeros(5, 3, 3, dtype=torch.float64), torch.zeros(5)
    routing_moments_(*tables, ids, numbers(4500, seed=3), numbers(4500, 40, seed=4).half())
    routing_moments_(*tables, ids[:70], numbers(70, seed=5), norms=numbers(70, seed=6), valid=ids[:70] > 1)
    return tables


@pytest.mark.parametrize("core", ["cuda-emulated"], indirect=True)
@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("operation", [overlaps, routes, mapped_routes, moments])
def test_the_schedule_does_not_change_a_bit(core, operation, major):
    emulated.set_device(major=major, shared_per_block=(99 if major == 8 else 227) * 1024)
    first = operation()
    for seed in SCHEDULES:
        emulated.set_schedule(seed)
        assert all(torch.equal(a, b) for a, b in zip(operation(), first, strict=True))


@pytest.mark.parametrize("core", ["cuda-emulated"], indirect=True)
def test_whether_a_block_takes_one_router_map_or_all_changes_no_bit(core):
    logits, maps = numbers(16 * 32 + 5, 10, seed=0), numbers(4, 6, 10, seed=1)
    logits[::2, 3], maps[::2, :, 3] = 200, 0  # far above what every other map refers to, in half of the rows
    answers = []
    for multiprocessors in (132, 1):
        emulated.set_device(multiprocessors=multiprocessors)
        for seed in range(4):
            emulated.set_schedule(seed)
            answers.append(masked_router(logits, top_k=2, router_map=maps))
    expected = masked_router(logits.double(), top_k=2, router_map=maps)
    for ids, weights in answers:
        assert torch.equal(ids, expected[0]) and torch.equal(weights, answers[0][1])
    torch.testing.assert_close(answers[0][1].double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("core", ["cuda-emulated"], indirect=True)
def test_scores_that_do_not_fit_shared_memory_are_refused(core):
    emulated.set_device(major=8, shared_per_block=99 * 1024)
    masked_router(numbers(3, 512, seed=0), top_k=8, router_map=numbers(9, 512, seed=1))
    with pytest.raises(ValueError, match="1024 experts with a router_map need more shared memory than the GPU has"):
        masked_router(numbers(3, 1024, seed=0), top_k=8, router_map=numbers(9, 1024, seed=1))


@pytest.mark.parametrize("core", ["cuda-emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3001, 30_000])  # one block to a row, and a cluster
def test_whether_a_cluster_takes_one_candidate_or_all_changes_no_bit(core, dtype, vocabulary):
    p, q = numbers(3, vocabulary, seed=0).to(dtype), numbers(5, 3, vocabulary, seed=1).to(dtype)
    wide = torch.zeros(5, 3, 2 * vocabulary, dtype=dtype)
    wide[:, :, ::2] = q
    for metrics in (("esap",), ("esap", "kl_pq", "kl_qp", "top1_agree")):
        answers = []
        for multiprocessors in (132, 1):  # many leave room for a cluster to each pair of rows
            for seed in (0, 1, 2):
                emulated.set_device(multiprocessors=multiprocessors)
                emulated.set_schedule(seed)
                answers.append(torch.stack([*overlap(p, q, metrics=metrics).values()]))
        answers.append(torch.stack([*overlap(p, wide[:, :, ::2], metrics=metrics).values()]))
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        torch.testing.assert_close(
            answers[0].double(),
            torch.stack([*overlap(p.double(), q.double(), metrics=metrics).values()]),
            rtol=1e-5,
            atol=2e-6,
        )
