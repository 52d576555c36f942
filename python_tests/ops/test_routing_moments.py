"""routing_moments_: the table behind every criterion, by every implementation of the kernel."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeprune_ext import routing_moments_
from moeprune_ext.ops import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def empty_tables(experts):
    return torch.zeros(experts, 3, 3, dtype=torch.float64), torch.zeros(experts)


def tables(experts, *pairs, **options):
    moments, max_norm = empty_tables(experts)
    routing_moments_(moments, max_norm, *pairs, **options)
    return moments, max_norm


def random_pairs(count, hidden, experts, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (count,), generator=generator)
    gates = torch.rand(count, generator=generator)
    return ids, gates.to(dtype), torch.randn(count, hidden, generator=generator).to(dtype)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_of_three_pairs_worked_out_by_hand(core, backend):
    ids, gates = torch.tensor([1, 0, 1]), torch.tensor([0.5, 1.0, 0.25])
    outputs = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])  # norms 5, 0, 2
    moments, max_norm = empty_tables(3)
    moments[2, 0, 0], max_norm[1] = 7.0, 5.5  # what is there already stays
    routing_moments_(moments, max_norm, ids, gates, outputs, backend=backend)
    one = torch.tensor([[2.0, 7.0, 29.0], [0.75, 3.0, 13.5], [0.3125, 1.375, 6.5]])
    zero = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    torch.testing.assert_close(moments[1], one.double())
    torch.testing.assert_close(moments[0], zero.double())
    assert moments[2].sum() == 7.0
    assert max_norm.tolist() == [0.0, 5.5, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [0, 1, 2, 3, 31, 129, 2048, 2051, 5000])
def test_agrees_with_the_definition(core, dtype, hidden):
    ids, gates, outputs = random_pairs(70, hidden, 5, dtype=dtype)
    valid = torch.arange(70) % 6 != 0
    moments, max_norm = tables(5, ids.int(), gates, outputs, valid=valid, backend="native")
    expected, expected_max = empty_tables(5)
    reference.routing_moments_(expected, expected_max, ids, gates, outputs.double(), valid=valid)
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(max_norm, expected_max, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_and_repetition_do_not_change_a_bit(isa, threads, dtype):
    pairs = random_pairs(9001, 200, 13, dtype=dtype)  # three tiles of the smallest workspace
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(tables(13, *pairs))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_more_pairs_than_the_workspace_holds(core):
    ids, gates, outputs = random_pairs(9001, 20, 6)  # three tiles
    moments, max_norm = tables(6, ids, gates, outputs, backend="native")
    expected, expected_max = empty_tables(6)
    reference.routing_moments_(expected, expected_max, ids, gates, outputs.double())
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(max_norm, expected_max, rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 300), st.integers(1, 9), st.lists(st.integers(0, 300), max_size=4), st.integers(0, 99))
def test_tables_of_any_split_add_up(core, count, experts, cuts, seed):
    pairs = random_pairs(count, 17, experts, seed)
    moments, max_norm = tables(experts, *pairs)
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [tables(experts, *(x[first:last] for x in pairs)) for first, last in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(sum(part[0] for part in parts), moments, rtol=1e-12, atol=0)
    assert torch.equal(torch.stack([part[1] for part in parts]).amax(0), max_norm)
    in_place = empty_tables(experts)
    for first, last in zip(bounds, bounds[1:], strict=False):
        routing_moments_(*in_place, *(x[first:last] for x in pairs))
    torch.testing.assert_close(in_place[0], moments, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_an_id_outside_changes_nothing(backend, bad):
    ids, gates, outputs = random_pairs(50, 8, 4)
    moments, max_norm = tables(4, ids, gates, outputs)
    before = moments.clone(), max_norm.clone()
    ids[49] = bad
    with pytest.raises(ValueError, match=f"expert_ids contains {bad}; expected 0 <= id < E = 4"):
        routing_moments_(moments, max_norm, ids, gates, outputs, backend=backend)
    assert same_bits(before, (moments, max_norm))
    # Where the pair is not valid, its id is not looked at.
    routing_moments_(moments, max_norm, ids, gates, outputs, valid=torch.arange(50) < 49, backend=backend)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_norms_may_be_given_instead_of_outputs(core, backend):
    ids, gates, outputs = random_pairs(200, 33, 6)
    norms = outputs.double().norm(dim=-1)
    expected = tables(6, ids, gates, outputs, backend=backend)
    for dtype in (torch.float64, torch.float32):
        actual = tables(6, ids, gates, norms=norms.to(dtype), backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_gates_in_half_precision_count_at_their_value(core):
    ids, gates, outputs = random_pairs(100, 9, 3)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = gates.to(dtype)
        assert same_bits(tables(3, ids, rounded, outputs), tables(3, ids, rounded.double(), outputs))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views_give_the_bits_of_their_copies(core, dtype):
    ids, gates, outputs = random_pairs(120, 120, 5, dtype=dtype)
    expanded = ids[:1].expand(60), gates[:1].expand(60), outputs[:1].expand(60, 120)
    for view in (
        (ids[::2], gates[::2], outputs[::2, 7:90]),
        (ids[:120], gates, outputs.t()),
        (ids[60:], gates[60:], outputs[60:, ::3]),
        expanded,
    ):
        of_view = tables(5, *view, backend="native")
        assert same_bits(of_view, tables(5, *(x.contiguous() for x in view)))


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3e-23, 1e18, 0.0])
def test_norms_beyond_the_range_of_float32_squares(core, scale):
    ids, gates, outputs = random_pairs(40, 50, 3)
    outputs *= scale
    moments, max_norm = tables(3, ids, gates, outputs)
    expected, expected_max = empty_tables(3)
    reference.routing_moments_(expected, expected_max, ids, gates, outputs.double())
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(max_norm, expected_max, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_nan_and_infinity_stay_with_their_expert(core, backend):
    ids = torch.tensor([0, 1, 1, 2, 1])
    outputs = torch.ones(5, 20)
    outputs[2, 11], outputs[3, 0] = NAN, INF
    moments, max_norm = tables(3, ids, torch.ones(5), outputs, backend=backend)
    torch.testing.assert_close(moments[0, 0], torch.tensor([1.0, 20**0.5, 20.0], dtype=torch.float64))
    torch.testing.assert_close(max_norm[0], torch.tensor(20**0.5))
    assert moments[1, :, 1:].isnan().all() and max_norm[1].isnan()
    assert (moments[:, 0, 0] == torch.tensor([1.0, 3.0, 1.0])).all()
    assert (moments[2, :, 1:] == INF).all() and max_norm[2] == INF


def test_no_pairs_change_nothing(core):
    moments, max_norm = tables(3, *random_pairs(20, 4, 3))
    before = moments.clone(), max_norm.clone()
    none = torch.zeros(0, dtype=torch.int64)
    for backend in ("native", "torch"):
        routing_moments_(moments, max_norm, none, torch.zeros(0), torch.zeros(0, 4), backend=backend)
        routing_moments_(
            moments,
            max_norm,
            torch.tensor([9]),
            torch.ones(1),
            torch.ones(1, 4),
            valid=torch.tensor([False]),
            backend=backend,
        )
    assert same_bits(before, (moments, max_norm))
    routing_moments_(*empty_tables(0), none, torch.zeros(0), torch.zeros(0, 4))
    no_experts = empty_tables(0)
    routing_moments_(*no_experts, torch.tensor([0]), torch.ones(1), torch.ones(1, 4), valid=torch.tensor([False]))


def test_bad_requests_are_refused_by_name():
    ids, gates, outputs = random_pairs(5, 4, 3)
    moments, max_norm = empty_tables(3)
    for message, arguments, options in [
        ("moments has shape", (moments[:2], max_norm, ids, gates, outputs), {}),
        ("moments is torch.float32", (moments.float(), max_norm, ids, gates, outputs), {}),
        ("moments is", (moments.transpose(1, 2), max_norm, ids, gates, outputs), {}),
        ("max_norm is torch.float64", (moments, max_norm.double(), ids, gates, outputs), {}),
        ("expert_ids has shape", (moments, max_norm, ids[:, None], gates, outputs), {}),
        ("expert_ids has dtype", (moments, max_norm, ids.float(), gates, outputs), {}),
        ("gates has shape", (moments, max_norm, ids, gates[:4], outputs), {}),
        ("gates has dtype", (moments, max_norm, ids, ids, outputs), {}),
        ("outputs has shape", (moments, max_norm, ids, gates, outputs[:4]), {}),
        ("either outputs", (moments, max_norm, ids, gates), {}),
        ("either outputs", (moments, max_norm, ids, gates, outputs), {"norms": gates}),
        ("norms has shape", (moments, max_norm, ids, gates), {"norms": gates[:2]}),
        ("valid has shape", (moments, max_norm, ids, gates, outputs), {"valid": torch.ones(2).bool()}),
        ("valid has dtype", (moments, max_norm, ids, gates, outputs), {"valid": torch.ones(5)}),
        ("float64", (moments, max_norm, ids, gates, outputs.double()), {"backend": "native"}),
    ]:
        with pytest.raises(ValueError, match=message):
            routing_moments_(*arguments, **options)
    assert moments.sum() == 0 and max_norm.sum() == 0


def test_float64_outputs_keep_their_precision():
    ids, gates, outputs = random_pairs(30, 7, 2)
    outputs = outputs.double() + 1e-12
    moments, _ = tables(2, ids, gates, outputs)
    for expert in range(2):
        squares = outputs[ids == expert].square().sum()
        torch.testing.assert_close(moments[expert, 0, 2], squares, rtol=1e-14, atol=0)
