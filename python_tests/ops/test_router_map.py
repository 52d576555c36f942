"""masked_router with a router_map (EEP): one-hot rows are a mask, other rows mix the router's scores."""

import math

import pytest
import torch

from moeprune_ext import RouterSpec, masked_router
from moeprune_ext.ops import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_over_chosen")
INF, NAN = float("inf"), float("nan")


def random(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_maps(*shape, seed=0, positive=False):
    """One-hot rows of distinct experts, a quarter of all entries then changed, as EEP mutates them."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(shape)
    for candidate in maps.view(-1, *shape[-2:]):
        candidate[range(shape[-2]), torch.randperm(shape[-1], generator=generator)[: shape[-2]]] = 1.0
    noise = torch.randn(shape, generator=generator) * 0.3
    touched = torch.rand(shape, generator=generator) < 0.25
    return maps + torch.where(touched, noise.abs() if positive else noise, 0.0)


def one_hot(experts, n_experts):
    return torch.eye(n_experts)[experts]


def assert_same(actual, expected, tolerance=2e-6):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1].double(), expected[1].double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def specs(n_experts):
    """Every family that a map goes with."""
    bias = random(n_experts, seed=5, scale=0.3)
    return [
        RouterSpec(score=score, renormalize=renormalize, eps=1e-3, scale=2.5, correction_bias=correction_bias)
        for score in SCORES
        for renormalize in (False, True)
        for correction_bias in (None, bias)[: 1 if score == "softmax_over_chosen" else 2]
    ]


def named(spec):
    return f"{spec.score}{' biased' * (spec.correction_bias is not None)}{' renormalised' * spec.renormalize}"


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_of_one_row_worked_out_by_hand(core, backend):
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5), math.log(4)]])  # probabilities 1, 2, 5, 4 in 12
    router_map = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, -1.0], [0.0, 0.5, 0.0, 1.0]])
    ids, weights = masked_router(logits, top_k=2, router_map=router_map, backend=backend)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[5 / 7, 2 / 7]]))  # nothing refers to the third expert
    spec = RouterSpec(renormalize=True, scale=3.0)
    _, weights = masked_router(logits, top_k=2, router_map=router_map, spec=spec, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[3 * 5 / 7, 3 * 2 / 7]]))
    spec = RouterSpec(correction_bias=torch.tensor([1.0, 0.0, 9.0, 0.0]))
    ids, weights = masked_router(logits, top_k=2, router_map=router_map, spec=spec, backend=backend)
    assert ids.tolist() == [[0, 2]]  # 1/12 + 1, 2/12, 5/12
    torch.testing.assert_close(weights, torch.tensor([[1 / 7, 5 / 7]]))


@pytest.mark.parametrize("spec", specs(24), ids=named)
def test_the_definition_is_the_formula(spec):
    """Written down with the softmax over all experts and the mass, which the definition does not use."""
    logits, router_map = random(50, 24).double(), random_maps(9, 24, positive=True).double()
    router_map[:, ::5] = 0
    router_map[router_map.sum(-1) == 0, 1] = 1
    if spec.score.startswith("softmax"):
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() if spec.score == "sigmoid" else (1 + logits.exp()).log().sqrt()
    pi = scores @ router_map.T
    choice = pi if spec.correction_bias is None else pi + router_map @ spec.correction_bias.double()
    ids = choice.topk(4).indices
    if spec.score == "softmax":
        pi = pi / scores[:, (router_map != 0).any(0)].sum(-1, keepdim=True)
    weights = pi.gather(-1, ids)
    if spec.renormalize or spec.score == "softmax_over_chosen":
        eps = spec.eps if spec.score != "softmax_over_chosen" else spec.eps if spec.renormalize else 0.0
        total = weights.sum(-1, keepdim=True)
        weights = weights / total / (1 + eps) if spec.score == "softmax_over_chosen" else weights / (total + eps)
    assert_same(masked_router(logits, top_k=4, router_map=router_map, spec=spec), (ids, weights * spec.scale), 1e-12)


@pytest.mark.parametrize("spec", specs(61), ids=named)
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees_with_the_definition_in_float64(core, spec, dtype):
    logits = random(37, 61, dtype=dtype)
    maps = random_maps(3, 30, 61, positive=True)
    maps[1, :, ::3] = 0
    maps[1, :, 1] += 0.1
    for form in (
        dict(router_map=maps),
        dict(router_map=maps[1]),
        dict(router_map=maps, assigned=torch.arange(37) % 3),
    ):
        actual = masked_router(logits, top_k=7, spec=spec, backend="native", **form)
        assert actual[0].dtype == torch.int64 and actual[1].dtype == torch.float32
        assert_same(actual, reference.masked_router(logits.double(), top_k=7, spec=spec, **form), 5e-6)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("spec", specs(32), ids=named)
def test_distinct_one_hot_rows_are_the_mask_of_their_experts(core, spec, backend):
    if spec.score == "softmax" and spec.correction_bias is not None:
        pytest.skip("ERNIE's bias is added to the softmax over all experts")
    logits = random(200, 32)
    generator = torch.Generator().manual_seed(1)
    kept = [torch.randperm(32, generator=generator)[:20] for _ in range(3)]
    maps = torch.stack([one_hot(experts, 32) for experts in kept])
    keep = maps.sum(-2) > 0
    ids, weights = masked_router(logits, top_k=4, router_map=maps, spec=spec, backend=backend)
    experts = torch.stack([row[of_map] for row, of_map in zip(kept, ids, strict=True)])
    assert_same((experts, weights), masked_router(logits, top_k=4, keep=keep, spec=spec, backend=backend), 1e-6)


def test_the_identity_is_the_router_itself(core):
    logits = random(40, 16)
    for spec in specs(16):
        whole = masked_router(logits, top_k=3, keep=torch.ones(1, 16, dtype=torch.bool), spec=spec)
        mapped = masked_router(logits, top_k=3, router_map=torch.eye(16), spec=spec, backend="native")
        assert_same(mapped, (whole[0][0], whole[1][0]), 1e-6)  # softmax + bias, too: all experts are there


@pytest.mark.parametrize("score", SCORES)
def test_negative_entries_are_compared_by_value(core, score):
    logits, maps = random(60, 40), random_maps(4, 20, 40)
    maps[3] -= 1  # hardly a pi is positive
    spec = RouterSpec(score=score)
    actual = masked_router(logits, top_k=5, router_map=maps, spec=spec, backend="native")
    expected = reference.masked_router(logits.double(), top_k=5, router_map=maps, spec=spec)
    assert torch.equal(actual[0], expected[0])
    if score != "softmax_over_chosen":  # nor are the weights divided by a sum that may vanish
        assert_same(actual, expected, 1e-5)
        assert (actual[1][3] < 0).any()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_weights_are_divided_by_their_sum_whatever_its_sign(core, backend):
    router_map = torch.tensor([[-1.0, 0.0], [0.0, -3.0]])
    spec = RouterSpec(score="sigmoid", renormalize=True)
    ids, weights = masked_router(torch.zeros(1, 2), top_k=2, router_map=router_map, spec=spec, backend=backend)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    router_map = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    ids, weights = masked_router(torch.zeros(1, 2), top_k=2, router_map=router_map, spec=spec, backend=backend)
    assert ids.tolist() == [[1, 0]] and weights.tolist() == [[INF, -INF]]


@pytest.mark.parametrize("spec", specs(48), ids=named)
def test_a_map_gives_the_same_bits_alone_and_among_others(core, spec):
    logits, maps = random(70, 48), random_maps(5, 16, 48)
    logits[::3, 5] = 90  # far above what some maps refer to
    maps[::2, :, 5] = 0
    maps[:, :, 6] += 0.01
    ids, weights = masked_router(logits, top_k=4, router_map=maps, spec=spec, backend="native")
    assigned = torch.arange(70) * 3 % 5
    by_row = masked_router(logits, top_k=4, router_map=maps, assigned=assigned, spec=spec, backend="native")
    for c in range(5):
        alone = masked_router(logits, top_k=4, router_map=maps[c], spec=spec, backend="native")
        mine = assigned == c
        for together, rows, single in zip((ids, weights), by_row, alone, strict=True):
            assert together[c].equal(single) and rows[mine].equal(single[mine])


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [1e4, INF, -INF, NAN])
def test_an_expert_that_nothing_refers_to_does_not_touch_the_others(core, score, value, backend):
    logits, router_map = random(9, 16), random_maps(8, 16, positive=True)
    router_map[:, 3] = 0
    router_map[:, 4] += 0.1
    expected = masked_router(logits, top_k=4, router_map=router_map, spec=RouterSpec(score=score), backend=backend)
    logits[::2, 3] = value
    actual = masked_router(logits, top_k=4, router_map=router_map, spec=RouterSpec(score=score), backend=backend)
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("spec", specs(16), ids=named)
def test_nan_and_infinite_logits_never_yield_a_repeated_or_unknown_row(core, spec):
    logits = random(90, 16)
    generator = torch.Generator().manual_seed(4)
    for value in (NAN, -NAN, INF, -INF):
        logits[torch.rand(90, 16, generator=generator) < 0.05] = value
    logits[-2], logits[-1] = -INF, NAN
    maps = torch.stack([random_maps(8, 16, positive=True), one_hot(torch.arange(8), 16), one_hot([9] * 8, 16)])
    actual = masked_router(logits, top_k=4, router_map=maps, spec=spec, backend="native")
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 8 for row in actual[0].flatten(0, 1).tolist())
    assert_same(actual, reference.masked_router(logits, top_k=4, router_map=maps, spec=spec), 5e-6)
    assert actual[1][:, logits.isfinite().all(-1)].isfinite().all()


def test_a_score_that_is_not_finite_ranks_first_where_it_is_referred_to(core):
    logits = torch.tensor([[0.0, 1.0, NAN, 2.0]])
    spec = RouterSpec(score="sigmoid")
    ids, weights = masked_router(logits, top_k=2, router_map=torch.eye(4)[1:], spec=spec, backend="native")
    assert ids.tolist() == [[1, 2]] and weights[0, 0].isnan()
    torch.testing.assert_close(weights[0, 1], torch.tensor(2.0).sigmoid())


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_lower_row_wins_ties(core, backend, top_k):
    router_map = torch.zeros(12, 12)
    router_map[:, 0] = torch.tensor([1.0, 2, 1, 2, 2, 1, 2, 1, 1, 1, 1, 2])
    for spec in (RouterSpec(), RouterSpec(score="sigmoid", correction_bias=torch.ones(12))):
        ids, _ = masked_router(torch.zeros(33, 12), top_k=top_k, router_map=router_map, spec=spec, backend=backend)
        assert ids.tolist() == [[1, 3, 4][:top_k]] * 33
    zeros_of_both_signs = torch.tensor([[0.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])[:, [0, 1, 1]] * 0.5
    zeros_of_both_signs[:, 2] = 0
    ids, _ = masked_router(torch.zeros(1, 3), top_k=2, router_map=zeros_of_both_signs, backend=backend)
    assert ids.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("experts", "rows", "top_k"),
    [(1, 1, 1), (2, 2, 2), (3, 2, 1), (8, 2, 1), (7, 7, 7), (64, 9, 4), (65, 64, 8), (129, 67, 6), (200, 151, 151)]
    + [(1024, 33, 10), (1024, 1024, 8)],
)
def test_any_number_of_experts_and_rows(core, experts, rows, top_k):
    logits, maps = random(35, experts), random_maps(2, rows, experts)
    if core.startswith("cuda") and top_k > 64:
        with pytest.raises(ValueError, match="top_k and n_group up to 64"):
            masked_router(logits, top_k=top_k, router_map=maps, backend="native")
        return
    actual = masked_router(logits, top_k=top_k, router_map=maps, backend="native")
    assert_same(actual, reference.masked_router(logits.double(), top_k=top_k, router_map=maps), 1e-5)


def test_strided_logits_and_maps_give_the_bits_of_their_copies(core):
    big, wide = random(80, 200), random_maps(6, 40, 128)
    logits = (big[::2, 10:74], big[:, :128:2], big.t()[:64, :64].t(), big[:1, :64].expand(9, 64))
    maps = (wide[::2, 8:, :64], wide[:, :, ::2], wide[..., :64].transpose(0, 1).contiguous().transpose(0, 1))
    for x, router_map in [(x, maps[0]) for x in logits] + [(logits[0], m) for m in maps]:
        router_map = router_map + torch.zeros(1).expand(router_map.shape)  # the same strides
        router_map[..., 0] += 0.5
        of_views = masked_router(x, top_k=8, router_map=router_map, backend="native")
        of_copies = masked_router(x.contiguous(), top_k=8, router_map=router_map.contiguous(), backend="native")
        assert all(torch.equal(a, b) for a, b in zip(of_views, of_copies, strict=True))


def test_threads_do_not_change_a_bit(isa, threads):
    logits, maps = random(700, 64), random_maps(6, 40, 64)
    answers = []
    for count in (1, 2, 3):
        threads(count)
        answers.append(masked_router(logits, top_k=8, router_map=maps))
    for ids, weights in answers[1:]:
        assert torch.equal(ids, answers[0][0]) and torch.equal(weights, answers[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e-7, -1e6])
def test_weights_are_rounded_as_torch_rounds(core, dtype, scale):
    logits, router_map = random(100, 32), random_maps(20, 32)
    ids, exact = masked_router(logits, top_k=5, router_map=router_map, spec=RouterSpec(scale=scale))
    _, rounded = masked_router(
        logits, top_k=5, router_map=router_map, spec=RouterSpec(scale=scale, weights_dtype=dtype)
    )
    assert torch.equal(rounded, exact.to(dtype).float())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_no_rows_and_no_maps_give_empty_answers(core, backend):
    nobody = torch.zeros(0, dtype=torch.int64)
    for logits, form, shape in (
        (torch.zeros(0, 8), dict(router_map=torch.eye(8)), (0, 2)),
        (torch.zeros(0, 8), dict(router_map=torch.eye(8)[None]), (1, 0, 2)),
        (torch.zeros(3, 8), dict(router_map=torch.zeros(0, 4, 8)), (0, 3, 2)),
        (torch.zeros(0, 8), dict(router_map=torch.eye(8)[None], assigned=nobody), (0, 2)),
        (torch.zeros(0, 8), dict(router_map=torch.zeros(0, 4, 8), assigned=nobody), (0, 2)),
    ):
        ids, weights = masked_router(logits, top_k=2, backend=backend, **form)
        assert ids.shape == weights.shape == shape


def test_float64_goes_to_the_definition():
    logits, router_map = random(5, 8).double(), random_maps(4, 8)
    for of_dtype in (router_map, router_map.double()):
        _, weights = masked_router(logits, top_k=2, router_map=of_dtype)
        assert weights.dtype == torch.float64
        assert_same((_, weights), masked_router(logits.float(), top_k=2, router_map=router_map))


def test_bad_requests_are_refused_by_name():
    logits, eye = torch.zeros(3, 8), torch.eye(8)
    hole = torch.stack([eye, eye])
    hole[1, 5, 5] = 0
    for message, arguments in {
        "or else give a router_map": dict(router_map=eye, keep=torch.ones(1, 8, dtype=torch.bool)),
        r"router_map has shape \[8, 7\]; expected \[K', 8\]": dict(router_map=eye[:, :7]),
        r"router_map has shape \[8\]": dict(router_map=eye[0]),
        "router_map has dtype torch.bfloat16; expected float32": dict(router_map=eye.bfloat16()),
        "router_map has dtype torch.float64": dict(router_map=eye.double()),
        "router_map has 3 rows; expected top_k = 4 <= rows <= E = 8": dict(router_map=eye[:3]),
        "router_map has 9 rows": dict(router_map=torch.ones(9, 8)),
        "group-limited router": dict(router_map=eye, spec=RouterSpec(n_group=2, topk_group=1)),
        "softmax_over_chosen' and a correction bias": dict(
            router_map=eye, spec=RouterSpec("softmax_over_chosen", correction_bias=torch.zeros(8))
        ),
        r"row 5 of router_map\[1\] has only zeros": dict(router_map=hole),
        "row 5 of router_map has only zeros": dict(router_map=hole[1]),
        "a single map takes every row": dict(router_map=eye, assigned=torch.zeros(3).long()),
        r"assigned must lie in \[0, C = 2\)": dict(router_map=torch.stack([eye, eye]), assigned=torch.arange(3)),
        "correction_bias has shape": dict(router_map=eye, spec=RouterSpec(correction_bias=torch.zeros(4))),
    }.items():
        with pytest.raises(ValueError, match=message):
            masked_router(logits, top_k=4, **arguments)
