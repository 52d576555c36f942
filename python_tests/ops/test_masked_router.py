"""masked_router: a pruned expert is absent, on every path and by every implementation of the kernel."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from moeprune_ext import RouterSpec, masked_router
from moeprune_ext.ops import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_over_chosen")
INF, NAN = float("inf"), float("nan")


def random(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def random_masks(masks, experts, at_least, seed=0):
    """Bool [masks, experts], each keeping between at_least and all experts."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(masks, experts, dtype=torch.bool)
    for mask in keep:
        kept = int(torch.randint(at_least, experts + 1, (1,), generator=generator))
        mask[torch.randperm(experts, generator=generator)[:kept]] = True
    return keep


def prefixes(order, counts):
    keep = torch.zeros(len(counts), len(order), dtype=torch.bool)
    for mask, count in zip(keep, counts, strict=True):
        mask[order[:count]] = True
    return keep


def assert_same(actual, expected, tolerance=2e-6):
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1].double(), expected[1].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_of_one_row_worked_out_by_hand(core, backend):
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5), math.log(3)]])
    keep = torch.tensor([[True, True, True, True], [True, True, False, True]])
    ids, weights = masked_router(logits, top_k=2, keep=keep, backend=backend)
    assert ids.tolist() == [[[2, 3]], [[3, 1]]]
    torch.testing.assert_close(weights, torch.tensor([[[5 / 11, 3 / 11]], [[3 / 6, 2 / 6]]]))
    ids, weights = masked_router(
        logits, top_k=2, keep=keep, spec=RouterSpec(renormalize=True, eps=1.0, scale=3.0), backend=backend
    )
    torch.testing.assert_close(weights[1, 0], 3 * torch.tensor([3 / 6, 2 / 6]) / (5 / 6 + 1))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees_with_the_definition_in_float64(core, score, biased, renormalize, dtype):
    logits = random(37, 61, dtype=dtype)
    bias = random(61, seed=5, scale=0.3) if biased else None
    spec = RouterSpec(score=score, renormalize=renormalize, eps=1e-3, scale=2.5, correction_bias=bias)
    keep = random_masks(6, 61, 7)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(1))
    for masks in (
        dict(keep=keep),
        dict(keep=keep, assigned=torch.arange(37) % 6),
        dict(order=order, counts=[61, 7, 30, 30, 8]),
    ):
        actual = masked_router(logits, top_k=7, spec=spec, backend="native", **masks)
        assert actual[0].dtype == torch.int64 and actual[1].dtype == torch.float32
        assert_same(actual, reference.masked_router(logits.double(), top_k=7, spec=spec, **masks), 5e-6)


def brute_force(logits, kept, top_k, spec):
    """One row in plain Python: the best groups by their kept experts, then the best experts of those."""
    experts = len(logits)
    total = sum(math.exp(logits[e]) for e in kept)
    score = {
        e: math.exp(logits[e]) / total if spec.score == "softmax" else 1 / (1 + math.exp(-logits[e])) for e in kept
    }
    bias = spec.correction_bias.tolist() if spec.correction_bias is not None else [0.0] * experts
    choice = {e: score[e] + bias[e] for e in kept}
    size = experts // spec.n_group
    groups = {}
    for e in kept:
        groups.setdefault(e // size, []).append(choice[e])
    width = 2 if spec.group_score == "top2_sum" else 1
    rank = sorted(groups, key=lambda g: (-sum(sorted(groups[g])[-width:]), g))[: spec.topk_group]
    ids = sorted((e for e in kept if e // size in rank), key=lambda e: (-choice[e], e))[:top_k]
    return ids, [score[e] for e in ids]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("biased", [False, True])
def test_group_limited_choice_is_the_brute_force_one(core, backend, score, group_score, biased):
    logits = random(25, 24)
    bias = random(24, seed=3, scale=0.5) if biased else None
    spec = RouterSpec(score=score, n_group=6, topk_group=3, group_score=group_score, correction_bias=bias)
    keep = torch.ones(3, 24, dtype=torch.bool)
    keep[1, 2::4] = keep[1, 1::4] = False  # two experts of each group of four
    keep[2, :4] = keep[2, 5::4] = False  # the first group gone, three in the others
    ids, weights = masked_router(logits, top_k=5, keep=keep, spec=spec, backend=backend)
    for mask in range(3):
        kept = keep[mask].nonzero()[:, 0].tolist()
        for row in range(25):
            expected = brute_force(logits[row].tolist(), kept, 5, spec)
            assert ids[mask, row].tolist() == expected[0]
            torch.testing.assert_close(weights[mask, row], torch.tensor(expected[1]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
def test_nested_masks_are_the_shared_masks_of_the_same_experts(core, score, biased):
    logits = random(40, 128)
    spec = RouterSpec(score=score, correction_bias=random(128, seed=2, scale=0.2) if biased else None)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    counts = [128, 8, 64, 9, 64, 127]
    nested = masked_router(logits, top_k=8, order=order, counts=torch.tensor(counts), spec=spec)
    assert_same(nested, masked_router(logits, top_k=8, keep=prefixes(order, counts), spec=spec), 1e-6)


def test_assigned_rows_are_the_rows_of_the_shared_answer(core):
    logits, keep = random(50, 32), random_masks(4, 32, 4)
    assigned = torch.arange(50) * 7 % 4
    ids, weights = masked_router(logits, top_k=4, keep=keep, assigned=assigned)
    all_ids, all_weights = masked_router(logits, top_k=4, keep=keep)
    rows = torch.arange(50)
    assert torch.equal(ids, all_ids[assigned, rows]) and torch.equal(weights, all_weights[assigned, rows])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_lower_id_wins_ties_on_every_path(core, score, backend):
    logits = torch.zeros(3, 16)
    logits[1, 8:] = -0.0  # equal to +0
    logits[2, [3, 12]] = 1.0
    order = torch.arange(15, -1, -1)  # worst case: higher ids are met first
    spec = RouterSpec(score=score)
    expected = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 12, 0, 1]]
    shared, _ = masked_router(logits, top_k=4, keep=torch.ones(1, 16, dtype=torch.bool), spec=spec, backend=backend)
    nested, _ = masked_router(logits, top_k=4, order=order, counts=[16, 13], spec=spec, backend=backend)
    assert shared[0].tolist() == expected and nested[0].tolist() == expected
    assert nested[1].tolist() == [[3, 4, 5, 6], [3, 4, 5, 6], [3, 12, 4, 5]]
    tied_groups = RouterSpec(score=score, n_group=4, topk_group=2)
    ids, _ = masked_router(logits, top_k=4, keep=torch.ones(1, 16, dtype=torch.bool), spec=tied_groups, backend=backend)
    assert ids[0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [3, 12, 0, 1]]


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_pruned_expert_far_above_the_kept_ones_does_not_touch_them(core, renormalize):
    logits = random(5, 16)
    without = logits.clone()
    logits[:, 3] = 1e4
    without[:, 3] = -1e4
    spec = RouterSpec(renormalize=renormalize)
    order = torch.tensor([0, 1, 2, *range(4, 16), 3])
    keep = prefixes(order, [15])
    for masks in (dict(keep=keep), dict(order=order, counts=[15, 16])):
        ids, weights = masked_router(logits, top_k=4, spec=spec, **masks)
        assert_same((ids[0], weights[0]), [x[0] for x in masked_router(without, top_k=4, spec=spec, keep=keep)])


def test_an_impossible_expert_weighs_nothing(core):
    logits = torch.tensor([[0.0, -INF, -INF, 1.0], [-INF, -INF, -INF, -INF]])
    ids, weights = masked_router(logits, top_k=3, order=torch.tensor([1, 2, 0, 3]), counts=[4, 3])
    assert ids[:, 0].tolist() == [[3, 0, 1], [0, 1, 2]]
    torch.testing.assert_close(weights[1, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert weights[:, 1].isnan().all()  # a softmax of nothing


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_and_infinite_logits_never_yield_a_pruned_or_repeated_expert(core, score, backend, groups):
    logits = random(60, 16)
    generator = torch.Generator().manual_seed(4)
    for value in (NAN, -NAN, INF, -INF):
        logits[torch.rand(60, 16, generator=generator) < 0.1] = value
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, ::4] = False
    spec = RouterSpec(score=score, n_group=groups, topk_group=min(groups, 2), renormalize=True)
    ids, weights = masked_router(logits, top_k=4, keep=keep, spec=spec, backend=backend)
    for mask in range(2):
        assert keep[mask][ids[mask]].all()
        assert all(len(set(row)) == 4 for row in ids[mask].tolist())
    clean = logits.isfinite().all(-1)
    assert weights[:, clean].isfinite().all()


@pytest.mark.parametrize(
    "experts,top_k", [(1, 1), (2, 2), (3, 1), (7, 7), (64, 2), (64, 4), (64, 6), (129, 8), (151, 151), (512, 10)]
)
def test_any_number_of_experts(core, experts, top_k):
    logits = random(17, experts)
    keep = torch.cat([torch.ones(1, experts, dtype=torch.bool), random_masks(2, experts, top_k)])
    if core.startswith("cuda") and top_k > 64:
        with pytest.raises(ValueError, match="top_k and n_group up to 64"):
            masked_router(logits, top_k=top_k, keep=keep)
        return
    actual = masked_router(logits, top_k=top_k, keep=keep)
    assert_same(actual, reference.masked_router(logits.double(), top_k=top_k, keep=keep))


@pytest.mark.parametrize("step", [0.5, 5.0, 40.0, -40.0])
@pytest.mark.parametrize("renormalize", [False, True])
def test_logits_that_rise_or_fall_along_the_walk(core, step, renormalize):
    """The denominator of a walk is carried relative to an offset that rises with the logits."""
    logits = torch.arange(96) * step + random(5, 96)
    order, counts = torch.arange(96), [96, 8, 9, 40, 41, 95]
    spec = RouterSpec(renormalize=renormalize)
    actual = masked_router(logits, top_k=8, order=order, counts=counts, spec=spec)
    assert_same(actual, reference.masked_router(logits.double(), top_k=8, order=order, counts=counts, spec=spec))


@pytest.mark.parametrize("rows", [2056, 2051])
def test_answers_beyond_the_caches(isa, rows):
    """Large answers are written past the caches: the same bits as those of a part of the rows."""
    logits, order, counts = random(rows, 96), torch.randperm(96), range(32, 97)
    ids, weights = masked_router(logits, top_k=8, order=order, counts=counts)
    assert ids.numel() > 2**20
    for start in range(0, rows, 1000):
        part = slice(start, start + 1000)
        part_ids, part_weights = masked_router(logits[part], top_k=8, order=order, counts=counts)
        assert torch.equal(ids[:, part], part_ids) and torch.equal(weights[:, part], part_weights)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_no_rows_and_no_masks_give_empty_answers(core, backend):
    none = torch.zeros(0, 8, dtype=torch.bool)
    order = torch.arange(8)
    for logits, masks, shape in (
        (torch.zeros(0, 8), dict(keep=torch.ones(2, 8, dtype=torch.bool)), (2, 0, 2)),
        (torch.zeros(3, 8), dict(keep=none), (0, 3, 2)),
        (torch.zeros(3, 8), dict(order=order, counts=[]), (0, 3, 2)),
        (torch.zeros(0, 8), dict(keep=none, assigned=torch.zeros(0, dtype=torch.int64)), (0, 2)),
    ):
        ids, weights = masked_router(logits, top_k=2, backend=backend, **masks)
        assert ids.shape == weights.shape == shape


def test_strided_logits_give_the_bits_of_their_copy(core):
    big = random(80, 200)
    keep = random_masks(3, 64, 8)
    for view in (big[::2, 10:74], big[:, :128:2], big.t()[:64, :64].t(), big[:1, :64].expand(9, 64)):
        of_view = masked_router(view, top_k=8, keep=keep, backend="native")
        of_copy = masked_router(view.contiguous(), top_k=8, keep=keep)
        assert all(torch.equal(a, b) for a, b in zip(of_view, of_copy, strict=True))


def test_threads_do_not_change_a_bit(isa, threads):
    logits, order = random(500, 128), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    answers = []
    for count in (1, 2, 3):
        threads(count)
        answers.append(masked_router(logits, top_k=8, order=order, counts=list(range(64, 129))))
    for ids, weights in answers[1:]:
        assert torch.equal(ids, answers[0][0]) and torch.equal(weights, answers[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e-7, 1e6])
def test_weights_are_rounded_as_torch_rounds(core, dtype, scale):
    logits, keep = random(100, 32, scale=4.0), torch.ones(1, 32, dtype=torch.bool)
    ids, exact = masked_router(logits, top_k=8, keep=keep, spec=RouterSpec(scale=scale))
    _, rounded = masked_router(logits, top_k=8, keep=keep, spec=RouterSpec(scale=scale, weights_dtype=dtype))
    assert torch.equal(rounded, exact.to(dtype).float())


def sliced(router, kept):
    """The router of a checkpoint that has only the kept experts."""
    for owner in (router, getattr(router, "moe_statics", None)):
        for name, tensor in list((owner.state_dict(keep_vars=True) if owner else {}).items()):
            if "." in name:
                continue
            experts_first = tensor.shape[0] == router.num_experts
            value = tensor[kept] if experts_first else tensor[..., kept]
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(owner, name, torch.nn.Parameter(value) if is_parameter else value)
    router.num_experts = len(kept)
    return router


SMALL = dict(hidden_size=32, num_experts_per_tok=4)
FAMILIES = {
    "olmoe": (lambda: OlmoeTopKRouter(OlmoeConfig(num_experts=16, **SMALL)), RouterSpec()),
    "olmoe renormalised": (
        lambda: OlmoeTopKRouter(OlmoeConfig(num_experts=16, norm_topk_prob=True, **SMALL)),
        RouterSpec(renormalize=True),
    ),
    "mixtral": (
        lambda: MixtralTopKRouter(MixtralConfig(num_local_experts=16, **SMALL)),
        RouterSpec(renormalize=True),
    ),
    "gpt-oss": (
        lambda: GptOssTopKRouter(GptOssConfig(num_local_experts=16, **SMALL)),
        RouterSpec(score="softmax_over_chosen"),
    ),
    "ernie": (
        lambda: Ernie4_5_MoeTopKRouter(Ernie4_5_MoeConfig(hidden_size=32, moe_num_experts=16, moe_k=4)),
        RouterSpec(renormalize=True, correction_bias=random(16, seed=9, scale=0.1)),
    ),
    "deepseek v2": (
        lambda: DeepseekV2TopkRouter(
            DeepseekV2Config(
                n_routed_experts=16,
                n_group=4,
                topk_group=2,
                topk_method="group_limited_greedy",
                routed_scaling_factor=16.0,
                **SMALL,
            )
        ),
        RouterSpec(n_group=4, topk_group=2, scale=16.0),
    ),
    "deepseek v3": (
        lambda: DeepseekV3TopkRouter(
            DeepseekV3Config(n_routed_experts=16, n_group=4, topk_group=2, routed_scaling_factor=2.5, **SMALL)
        ),
        RouterSpec(
            score="sigmoid",
            renormalize=True,
            eps=1e-20,
            scale=2.5,
            n_group=4,
            topk_group=2,
            group_score="top2_sum",
            correction_bias=random(16, seed=9, scale=0.1),
        ),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_is_what_the_sliced_router_of_the_family_computes(core, family, backend):
    build, spec = FAMILIES[family]
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 1::4] = False  # three of each group of four
    hidden = random(30, 32, seed=6, scale=1.0)
    with torch.no_grad():
        for mask in range(2):
            router = build()
            for name, tensor in router.state_dict(keep_vars=True).items():
                tensor.data = random(*tensor.shape, seed=8, scale=0.4)
                if spec.correction_bias is not None and "bias" in name:
                    tensor.data = spec.correction_bias.reshape(tensor.shape)
            logits = F.linear(hidden, router.weight, getattr(router, "bias", None))
            kept = keep[mask].nonzero()[:, 0]
            _, their_weights, their_ids = sliced(router, kept)(hidden)
            ids, weights = masked_router(logits, top_k=4, keep=keep[mask : mask + 1], spec=spec, backend=backend)
            # Some routers return their choice unsorted: compare expert by expert.
            theirs = torch.zeros(30, 16).scatter(1, kept[their_ids], their_weights)
            torch.testing.assert_close(torch.zeros(30, 16).scatter(1, ids[0], weights[0]), theirs)


def test_bad_requests_are_refused_by_name():
    logits, keep = torch.zeros(3, 8), torch.ones(2, 8, dtype=torch.bool)
    few = keep.clone()
    few[1, 2:] = False
    order = torch.arange(8)
    lone = keep.clone()
    lone[0, 1:4] = False
    groups = RouterSpec(n_group=2, topk_group=1)
    pairs = RouterSpec(n_group=2, topk_group=2, group_score="top2_sum")
    missing = keep.clone()
    missing[0, :4] = False
    for message, masks in {
        "mask 1 keeps 2 experts but the router selects 4": dict(keep=few),
        "either as keep, or as order and counts": dict(),
        "either as keep": dict(keep=keep, order=order, counts=[8]),
        "keep has shape": dict(keep=keep[:, :4]),
        "keep has dtype": dict(keep=keep.int()),
        "permutation": dict(order=torch.zeros(8, dtype=torch.int64), counts=[8]),
        "counts range from 3": dict(order=order, counts=[3, 8]),
        "counts range from 8 to 9": dict(order=order, counts=[8, 9]),
        r"assigned must lie in \[0, C = 2\)": dict(keep=keep, assigned=torch.tensor([0, 1, 2])),
        "assigned goes with keep": dict(order=order, counts=[8], assigned=torch.zeros(3).long()),
        "assigned has shape": dict(keep=keep, assigned=torch.zeros(2).long()),
        "does not divide": dict(keep=keep, spec=RouterSpec(n_group=3)),
        "may hold fewer": dict(keep=lone, spec=groups),
        "groups but the router selects 2": dict(keep=missing, spec=pairs),
        "sum of its best two": dict(keep=lone, spec=pairs),
        "correction_bias has shape": dict(keep=keep, spec=RouterSpec(correction_bias=torch.zeros(4))),
    }.items():
        with pytest.raises(ValueError, match=message):
            masked_router(logits, top_k=4, **masks)
    for top_k in (0, 9):
        with pytest.raises(ValueError, match="top_k"):
            masked_router(logits, top_k=top_k, keep=keep)
    for message, arguments in {
        "score": dict(score="argmax"),
        "group_score": dict(group_score="mean"),
        "topk_group": dict(n_group=2, topk_group=3),
        "weights_dtype": dict(weights_dtype=torch.int32),
    }.items():
        with pytest.raises(ValueError, match=message):
            RouterSpec(**arguments)


@pytest.mark.parametrize(("group_score", "top_k"), [("max", 1), ("top2_sum", 2)])
def test_a_nan_logit_ranks_its_group_first(core, group_score, top_k):
    rows = torch.tensor([[NAN, 0.0, 5.0, 1.0], [0.0, NAN, 5.0, 1.0]])
    spec = RouterSpec(score="sigmoid", n_group=2, topk_group=1, group_score=group_score)
    keep = torch.ones(1, 4, dtype=torch.bool)
    ids, _ = masked_router(rows, top_k=top_k, keep=keep, spec=spec, backend="native")
    expected, _ = reference.masked_router(rows, top_k=top_k, keep=keep, spec=spec)
    assert torch.equal(ids, expected) and ids.max() < 2


def test_a_bias_may_choose_experts_of_vanishing_probability(core):
    rows = torch.tensor([[95.0, 0.0, 0.0, 0.0]])
    spec = RouterSpec(renormalize=True, correction_bias=torch.tensor([-10.0, 0.0, 0.0, 0.0]))
    keep = torch.ones(1, 4, dtype=torch.bool)
    ids, weights = masked_router(rows, top_k=2, keep=keep, spec=spec, backend="native")
    assert ids.tolist() == [[[1, 2]]]
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5]]]))
