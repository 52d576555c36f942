"""overlap, overlap_from_hidden, log_sum_exp: behaviour of every implementation of the kernels."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeprune_ext import ops, overlap, overlap_from_hidden
from moeprune_ext.ops import backend as ops_backend
from moeprune_ext.ops import reference
from moeprune_ext.ops.overlap import log_sum_exp

ALL = ("esap", "kl_pq", "kl_qp", "top1_agree", "nll", "accept")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def logits(*shape, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_of_two_distributions_worked_out_by_hand(core, backend):
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.1, 0.8, 0.1]]).log()
    result = overlap(p, q, metrics=ALL, labels=torch.tensor([2]), backend=backend)
    close(result["esap"], torch.tensor([[0.1 + 0.25 + 0.1]]))
    close(
        result["kl_pq"],
        torch.tensor([[0.5 * math.log(5) + 0.25 * math.log(0.3125) + 0.25 * math.log(2.5)]]),
    )
    close(
        result["kl_qp"],
        torch.tensor([[0.1 * math.log(0.2) + 0.8 * math.log(3.2) + 0.1 * math.log(0.4)]]),
    )
    close(result["top1_agree"], torch.tensor([[0.0]]))
    close(result["nll"], torch.tensor([[-math.log(0.1)]]))
    assert min(abs(float(result["accept"]) - ratio) for ratio in (1.0, 0.25 / 0.8)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 31, 129, 151, 2048, 2049, 4099])
def test_agrees_with_the_definition_in_float64(core, dtype, vocabulary):
    p, q = logits(5, vocabulary, dtype=dtype), logits(3, 5, vocabulary, seed=1, dtype=dtype)
    labels = torch.arange(5) % vocabulary
    labels[3] = -100
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25])
    arguments = dict(labels=labels, weight=weight, metrics=ALL, seed=7)
    actual = overlap(p, q, backend="native", **arguments)
    expected = reference.overlap(p.double(), q.double(), **arguments)
    for metric in ALL:
        assert actual[metric].dtype == torch.float32 and actual[metric].shape == (3, 5)
        close(actual[metric], expected[metric])


@pytest.mark.parametrize("shape", ["peaked", "flat", "random", "nearly equal", "tied", "far from zero"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [50_304, 151_936])
def test_large_vocabularies_stay_within_2e_6(core, vocabulary, dtype, shape):
    p, q = logits(2, vocabulary), logits(2, vocabulary, seed=1)
    if shape == "peaked":
        p[:, 17], q[:, 17] = 40.0, 39.0
    elif shape == "flat":
        p, q = p * 1e-3, q * 1e-3
    elif shape == "tied":
        p, q = p.round(), q.round()
    elif shape == "far from zero":
        p, q = p + 4096, q - 4096
    elif shape == "nearly equal":
        q = p + 1e-2 * q
    p, q = p.to(dtype), q.to(dtype)
    actual = overlap(p, q)["esap"]
    expected = reference.overlap(p.double(), q.double())["esap"]
    assert (actual - expected).abs().max() <= 2e-6


def test_is_symmetric_and_one_for_equal_rows(core):
    p, q = logits(4, 50_304), logits(4, 50_304, seed=1)
    close(overlap(p, q)["esap"], overlap(q, p)["esap"], 1e-6)
    close(overlap(p, p)["esap"], torch.ones(1, 4), 1e-6)
    both = overlap(p, q, metrics=("kl_pq", "kl_qp"))
    swapped = overlap(q, p, metrics=("kl_pq", "kl_qp"))
    close(both["kl_pq"], swapped["kl_qp"])


@pytest.mark.parametrize("offset", [-4096.0, 512.0, 65_536.0])
def test_shifting_logits_changes_nothing(core, offset):
    p = (logits(3, 1000) * 64).round() / 64  # multiples of 1/64, so that the offset is exact
    q = (logits(3, 1000, seed=1) * 64).round() / 64
    labels = torch.tensor([1, 2, 3])
    before = overlap(p, q, metrics=ALL, labels=labels)
    after = overlap(p + offset, q - offset, metrics=ALL, labels=labels)
    for metric in ALL:
        close(after[metric], before[metric], 1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 70), st.integers(0, 4), st.integers(0, 3), st.floats(0, 60), st.integers(0, 99))
def test_metrics_lie_where_they_must(core, vocabulary, rows, candidates, scale, seed):
    p = logits(rows, vocabulary, seed=seed, scale=scale)
    q = logits(candidates, rows, vocabulary, seed=seed + 100, scale=scale)
    result = overlap(p, q, metrics=ALL, labels=torch.zeros(rows, dtype=torch.int64))
    for metric in ("esap", "top1_agree", "accept"):
        assert result[metric].shape == (candidates, rows)
        assert ((result[metric] >= 0) & (result[metric] <= 1 + 1e-6)).all()
    for metric in ("kl_pq", "kl_qp", "nll"):
        assert (result[metric] >= -1e-5).all()
    # Pinsker: total variation = 1 - esap <= sqrt(KL / 2)
    assert (1 - result["esap"] <= (result["kl_pq"].clamp(min=0) / 2).sqrt() + 1e-3).all()


def test_impossible_tokens_have_probability_zero(core):
    p = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, -INF], [-INF, 1.0, -INF]])
    q = torch.tensor([[0.0, -INF, -INF], [0.0, 0.0, 0.0], [-INF, 5.0, -INF]])
    result = overlap(p, q, metrics=ALL, labels=torch.tensor([1, 0, 1]))
    close(result["esap"], torch.tensor([[0.5, 2 / 3, 1.0]]))
    close(result["kl_pq"], torch.tensor([[INF, math.log(1.5), 0.0]]))
    close(result["kl_qp"], torch.tensor([[math.log(2), INF, 0.0]]))
    close(result["nll"], torch.tensor([[INF, math.log(3), 0.0]]))


def test_kl_is_infinite_even_where_the_possible_token_is_beyond_float32(core):
    p, q = torch.tensor([[0.0, -500.0]]), torch.tensor([[0.0, -INF]])
    result = overlap(p, q, metrics=("kl_pq", "kl_qp", "esap"))
    assert result["kl_pq"].item() == INF
    close(result["kl_qp"], torch.zeros(1, 1))
    close(result["esap"], torch.ones(1, 1))


@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
@pytest.mark.parametrize("where", ["p", "q"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_row_without_a_softmax_is_nan_and_spoils_no_other(core, bad, where, backend):
    p, q = logits(4, 300), logits(2, 4, 300, seed=1)
    labels = torch.tensor([0, 1, -100, 3])
    clean = overlap(p, q, metrics=ALL, labels=labels, backend=backend)
    target = p if where == "p" else q[1]
    if bad == "all -inf":
        target[2] = -INF
    else:
        target[2, 270] = bad
    result = overlap(p, q, metrics=ALL, labels=labels, backend=backend)
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    spoilt[1 if where == "q" else slice(None), 2] = True
    for metric in ALL:
        assert result[metric][spoilt].isnan().all()
        assert torch.equal(result[metric][~spoilt], clean[metric][~spoilt])


def test_a_nan_in_p_is_seen_although_its_log_sum_exp_is_given(core):
    p, q = logits(1, 300), logits(1, 300, seed=1)
    lse = log_sum_exp(p)
    p[0, 123] = NAN
    assert overlap(p, q, p_lse=lse)["esap"].isnan().all()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_of_weight_zero_are_zero_whatever_they_hold(core, backend):
    p, q = logits(3, 50), logits(2, 3, 50, seed=1)
    p[1], q[:, 1] = NAN, INF
    labels = torch.tensor([1, 2, 3])
    plain = overlap(p, q, metrics=ALL, labels=labels, backend=backend)
    weighted = overlap(p, q, weight=torch.tensor([2.0, 0.0, 0.5]), metrics=ALL, labels=labels, backend=backend)
    for metric in ALL:
        assert (weighted[metric][:, 1] == 0).all()
        close(weighted[metric][:, 0], 2 * plain[metric][:, 0])
        close(weighted[metric][:, 2], 0.5 * plain[metric][:, 2])


def test_a_given_log_sum_exp_changes_nothing(core):
    p, q = logits(6, 3000) + 300, logits(2, 6, 3000, seed=1)
    labels = torch.arange(6)
    lse = log_sum_exp(p)
    assert lse.dtype == torch.float64
    close(lse, torch.logsumexp(p.double(), -1), 1e-7)
    computed = overlap(p, q, metrics=ALL, labels=labels)
    given_ = overlap(p, q, p_lse=lse, metrics=ALL, labels=labels)
    for metric in ALL:
        assert torch.equal(computed[metric], given_[metric])


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_views_give_the_bits_of_their_copies(core, dtype):
    big_p, big_q = logits(12, 700, dtype=dtype), logits(3, 12, 700, seed=1, dtype=dtype)
    views = [
        (big_p[::2, 5:600], big_q[:, ::2, 5:600]),
        (big_p[:, ::3], big_q[::2, :, ::3]),
        (big_p.t()[:12, :], big_q.transpose(1, 2)[:, :12, :]),
        (big_p[:1].expand(12, 700), big_q[:1].expand(3, 12, 700)),
    ]
    for p, q in views:
        of_view = overlap(p, q, metrics=("esap", "kl_pq", "top1_agree"), backend="native")
        of_copy = overlap(p.contiguous(), q.contiguous(), metrics=("esap", "kl_pq", "top1_agree"))
        for metric, value in of_view.items():
            assert torch.equal(value, of_copy[metric])


def check_that_company_does_not_change_a_bit(p, q):
    labels = torch.arange(7)
    together = overlap(p, q, metrics=ALL, labels=labels, seed=3)
    alone = [overlap(p, q[c], metrics=ALL, labels=labels, seed=3) for c in range(5)]
    first_row = overlap(p[:1], q[:, :1], metrics=("esap", "kl_qp"))
    for metric in ALL:
        assert torch.equal(together[metric], torch.cat([one[metric] for one in alone]))
    assert torch.equal(first_row["kl_qp"], together["kl_qp"][:, :1])
    return together


def test_company_does_not_change_a_bit(core):
    check_that_company_does_not_change_a_bit(logits(7, 20_001), logits(5, 7, 20_001, seed=1))


def test_threads_do_not_change_a_bit(isa, threads):
    p, q = logits(7, 20_001), logits(5, 7, 20_001, seed=1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(check_that_company_does_not_change_a_bit(p, q))
    for metric in ALL:
        assert all(torch.equal(result[metric], results[0][metric]) for result in results)


@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("candidates", [1, 3])
def test_the_workspace_changes_no_bit(isa, threads, candidates, dtypes):
    """What there is no room to keep is computed again; maxima that rise along the row make that matter."""
    threads(1)
    slope = torch.linspace(-60, 60, 9000)
    p = (logits(2, 9000) + slope).to(dtypes[0])
    q = (logits(candidates, 2, 9000, seed=1) + slope).to(dtypes[1])
    results = []
    for size in (0, 1, 1025, 2100, 5000, 10_500, 40_000):
        result = torch.empty(candidates, 2)
        workspace = torch.empty(size)
        ops._C.overlap(p_logits=p, q_logits=q, workspace=workspace, out=[result] + [None] * 5, threads=1)
        results.append(result)
    assert all(torch.equal(result, results[0]) for result in results)
    close(results[0], reference.overlap(p.double(), q.double())["esap"])


def test_top1_takes_the_lowest_index_among_equals(core):
    p = torch.zeros(3, 5000)
    q = torch.zeros(3, 5000)
    p[0, [7, 4000]] = 1.0
    q[0, [4000, 4999]] = 1.0  # 7 against 4000
    p[1, [9, 4000]] = 1.0
    q[1, [9, 300]] = 1.0  # 9 on both sides
    assert overlap(p, q, metrics=("top1_agree",))["top1_agree"].tolist() == [[0.0, 1.0, 1.0]]
    with_lse = overlap(p, q, p_lse=log_sum_exp(p), metrics=("top1_agree",))
    assert with_lse["top1_agree"].tolist() == [[0.0, 1.0, 1.0]]


def test_the_mean_acceptance_of_draws_is_the_overlap(core, sized):
    draws = sized(20_000, 1_000)
    p, q = logits(1, 9, scale=1.5).expand(draws, 9), logits(1, 9, seed=1, scale=1.5).expand(draws, 9)
    result = overlap(p, q, metrics=("accept", "esap"), seed=5)
    spread = result["accept"].std() / draws**0.5
    assert abs(result["accept"].mean() - result["esap"].mean()) < 4 * spread
    assert not torch.equal(result["accept"], overlap(p, q, metrics=("accept",), seed=6)["accept"])


def test_draws_are_uniform_and_differ_by_seed():
    u = reference.draw_uniforms(0, 10_000)
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    counts = torch.histc(u, bins=10, min=0, max=1)
    assert ((counts - 1000).abs() < 150).all()  # 5 standard deviations
    assert torch.equal(u[:100], reference.draw_uniforms(0, 100))
    assert (u != reference.draw_uniforms(1, 10_000)).all()
    # SplitMix64's published first output for seed 0 is 0xE220A8397B1DCDAF
    assert u[0].item() == (0xE220A8397B1DCDAF >> 11) * 2.0**-53


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_empty_inputs_give_empty_results(core, backend):
    for rows, candidates in ((0, 2), (3, 0), (0, 0)):
        result = overlap(torch.zeros(rows, 5), torch.zeros(candidates, rows, 5), backend=backend)
        assert result["esap"].shape == (candidates, rows)


def test_float64_is_computed_in_float64():
    p, q = logits(3, 100).double(), logits(3, 100, seed=1).double()
    result = overlap(p, q)["esap"]
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)[None])
    with pytest.raises(ValueError, match="float64"):
        overlap(p, q, backend="native")


def test_bad_requests_are_refused_by_name():
    p, q = torch.zeros(3, 5), torch.zeros(2, 3, 5)
    for message, call in {
        "q_logits has shape": lambda: overlap(p, torch.zeros(2, 4, 5)),
        "p_logits has shape": lambda: overlap(torch.zeros(5), q),
        "no vocabulary": lambda: overlap(torch.zeros(3, 0), torch.zeros(3, 0)),
        "p_logits has dtype": lambda: overlap(p.long(), q),
        "'jaccard'": lambda: overlap(p, q, metrics=("jaccard",)),
        "metrics is": lambda: overlap(p, q, metrics="esap"),
        "needs labels": lambda: overlap(p, q, metrics=("nll",)),
        "labels contains 5": lambda: overlap(p, q, metrics=("nll",), labels=torch.tensor([0, 5, 1])),
        "labels contains -1": lambda: overlap(p, q, metrics=("nll",), labels=torch.tensor([0, -1, 1])),
        "weight has shape": lambda: overlap(p, q, weight=torch.ones(2)),
        "p_lse has shape": lambda: overlap(p, q, p_lse=torch.ones(4)),
        "backend is 'gpu'": lambda: overlap(p, q, backend="gpu"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_from_hidden_is_the_overlap_of_the_logits(core, backend):
    p, q, head = logits(9, 16, scale=1), logits(3, 9, 16, seed=1, scale=1), logits(40, 16, seed=2, scale=1)
    arguments = dict(
        metrics=ALL,
        labels=torch.arange(9),
        weight=torch.tensor([1.0, 0, 2, 1, 1, 0, 1, 1, 1]),
        seed=4,
    )
    expected = overlap(p @ head.t(), q @ head.t(), **arguments)
    for chunk_bytes in (600, 2000, 2**20):
        for given_head in (head, lambda hidden: hidden @ head.t()):
            actual = overlap_from_hidden(p, q, given_head, chunk_bytes=chunk_bytes, backend=backend, **arguments)
            for metric in ALL:
                close(actual[metric], expected[metric], 1e-5)


def test_from_hidden_bounds_its_logits_and_skips_rows_of_weight_zero():
    p, q = logits(10, 4, scale=1), logits(2, 10, 4, seed=1, scale=1)
    weight = torch.ones(10)
    weight[3] = 0
    p[3], q[:, 3] = 12345.0, 12345.0
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        assert not (hidden == 12345.0).any()
        return hidden @ torch.ones(4, 30)

    overlap_from_hidden(p, q, head, weight=weight, chunk_bytes=1100)
    row = 2 * 30 * 4 + 2 * 4 * 4  # logits and copied hidden states, of p and of q
    assert 1 < max(seen) <= 1100 // row
    with pytest.raises(ValueError, match="chunk_bytes is 100"):
        overlap_from_hidden(p, q, head, weight=weight, chunk_bytes=100)


def test_from_hidden_gives_a_candidate_the_same_bits_in_any_company(core):
    p, q, head = logits(9, 16, scale=1), logits(3, 9, 16, seed=1, scale=1), logits(40, 16, seed=2, scale=1)
    together = overlap_from_hidden(p, q, head, chunk_bytes=4000)["esap"]
    alone = overlap_from_hidden(p, q[1], head, chunk_bytes=4000)["esap"]
    assert torch.equal(together[1:2], alone)


def test_without_the_compiled_module_auto_warns_once_and_native_raises(monkeypatch):
    p, q = logits(2, 10), logits(2, 10, seed=1)
    expected = overlap(p, q)["esap"]
    monkeypatch.setattr(ops_backend, "_C", None)
    monkeypatch.setattr(ops_backend, "_warned", False)
    with pytest.warns(UserWarning, match="cannot be imported"):
        close(overlap(p, q)["esap"], expected)
    with pytest.raises(RuntimeError, match="reinstall"):
        overlap(p, q, backend="native")
    assert ops.build_info()["cpu_isa"] == "none"


@pytest.mark.parametrize("offset", [0, 30, 1000])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_offset_common_to_all_logits_costs_no_accuracy(core, backend, offset):
    p, q = logits(8, 5000, seed=3) + offset, logits(8, 5000, seed=4) + offset
    assert (overlap(p, p, backend=backend)["esap"] - 1).abs().max() <= 1e-6
    exact = reference.overlap(p.double(), q.double())["esap"]
    assert (overlap(p, q, backend=backend)["esap"] - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("columns", [128_256, 151_936, 152_064])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_flat_rows_of_any_width_overlap_themselves_perfectly(core, backend, columns):
    """Equal terms round the same way in every partial sum, which random rows do not show."""
    rows = torch.zeros(2, columns)
    rows[1, :256] = 3
    assert (overlap(rows, rows, backend=backend)["esap"] - 1).abs().max() <= 1e-6


def test_a_given_log_sum_exp_that_is_not_finite_gives_nan_in_every_metric(core):
    p = torch.tensor([[INF, 1.0, 2.0], [-INF] * 3])
    q = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    labels = torch.tensor([0, 1])
    for backend in ("native", "torch"):
        results = overlap(p, q, p_lse=torch.logsumexp(p, -1), labels=labels, metrics=ALL, backend=backend)
        assert all(values.isnan().all() for values in results.values()), backend


def test_a_head_without_a_vocabulary_is_refused():
    hidden = torch.randn(2, 3)
    with pytest.raises(ValueError, match="V = 0"):
        overlap_from_hidden(hidden, hidden, lambda h: h[:, :0], p_lse=torch.zeros(2))
