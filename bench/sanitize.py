"""Every operation and path of the compiled core on small ragged inputs, compared with the definitions.

    compute-sanitizer --tool memcheck --kernel-regex kns=moeprune python bench/sanitize.py [--device cuda|cpu] [--quick]

Small because a sanitizer slows kernels down a hundredfold; ragged because that is where kernels go wrong. The tests
prove more; what matters here is that every kernel runs, with tails, strides, masks and every dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import moeprune_ext as mp
from moeprune_ext.ops import reference
from moeprune_ext.ops.overlap import log_sum_exp
from moeprune_ext.ops.reference import METRICS, SCORES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def layouts(values: Tensor) -> Iterator[Tensor]:
    """The same numbers contiguous, with strided rows off every alignment, and with strided columns."""
    yield values
    yield torch.cat([values[..., :1], values], -1)[..., 1:]
    yield torch.stack([values, values], -1)[..., 0]


def check_overlap(device: str, vocabularies: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        for vocabulary in vocabularies:
            rows = 5 if vocabulary < 10_000 else 2
            p_all = (torch.randn(rows, vocabulary, device=device) * 3).to(dtype)
            q_all = (torch.randn(3, rows, vocabulary, device=device) * 3).to(dtype)
            p_all[0, 0] = q_all[1, 0, vocabulary // 2] = -torch.inf if vocabulary > 1 else 0
            q_all[2, 0, -1] = torch.nan
            labels = torch.arange(rows, device=device) % vocabulary
            labels[-1] = -100
            weight = torch.linspace(0, 1, rows, device=device)
            arguments = dict(labels=labels, weight=weight, metrics=METRICS, seed=7)
            expected = reference.overlap(p_all.double(), q_all.double(), **arguments)
            lse = reference.log_sum_exp(p_all.double())
            for p, q in zip(layouts(p_all), layouts(q_all), strict=True):
                close(log_sum_exp(p, backend="native"), lse)
                actual = mp.overlap(p, q, backend="native", **arguments)
                for metric in METRICS:
                    close(actual[metric], expected[metric])
                alone = mp.overlap(p, q, p_lse=lse, backend="native")["esap"]
                close(alone, reference.overlap(p.double(), q.double())["esap"])


def check_overlap_from_hidden(device: str) -> None:
    head, p, q = (torch.randn(*shape, device=device) for shape in ((301, 24), (7, 24), (2, 7, 24)))
    actual = mp.overlap_from_hidden(p, q, head, chunk_bytes=3 * 2 * 301 * 4, backend="native")["esap"]
    close(actual, reference.overlap_from_hidden(p, q, head)["esap"])


def router_specs(n_experts: int, device: str) -> Iterator[mp.RouterSpec]:
    bias = torch.randn(n_experts, device=device)
    for score in SCORES:
        yield mp.RouterSpec(score=score)
    yield mp.RouterSpec(score="softmax", renormalize=True, weights_dtype=torch.bfloat16)
    yield mp.RouterSpec(score="softmax", correction_bias=bias)
    yield mp.RouterSpec(score="sigmoid", correction_bias=bias, renormalize=True, eps=1e-20, scale=2.5)
    if n_experts % 4 == 0:
        yield mp.RouterSpec(n_group=4, topk_group=3)
        yield mp.RouterSpec("sigmoid", correction_bias=bias, n_group=4, topk_group=3, group_score="top2_sum")


def check_masked_router(device: str) -> None:
    for dtype, n_experts, top_k, rows in zip(FLOATS, (13, 64, 260), (1, 8, 5), (1, 37, 131), strict=True):
        # Exact in every dtype and all different in a row: the definition has no rounding to disagree about.
        order_of_row = torch.rand(rows, n_experts, device=device).argsort(-1)
        logits_all = ((order_of_row - n_experts // 2) / 32).to(dtype)
        keep = torch.ones(5, n_experts, dtype=torch.bool, device=device)
        keep[1:, ::7] = False
        order = torch.randperm(n_experts, device=device)
        masks = (
            dict(keep=keep),
            dict(keep=keep, assigned=torch.randint(5, (rows,), device=device)),
            dict(order=order, counts=[n_experts, top_k + n_experts // 2, n_experts - 2]),
        )
        for spec in router_specs(n_experts, device):
            for form in masks[: 2 if spec.n_group > 1 else 3]:  # a prefix may leave a group too few experts
                expected = reference.masked_router(logits_all, top_k=top_k, spec=spec, **form)
                for logits in layouts(logits_all):
                    ids, weights = mp.masked_router(logits, top_k=top_k, spec=spec, backend="native", **form)
                    assert torch.equal(ids, expected[0]), (dtype, spec, form)
                    close(weights, expected[1], 1e-2 if spec.weights_dtype else 1e-4)


def check_router_map(device: str) -> None:
    for dtype, n_experts, n_rows, top_k, rows in zip(
        FLOATS, (13, 64, 260), (2, 33, 71), (1, 8, 5), (1, 37, 131), strict=True
    ):
        logits_all = torch.randn(rows, n_experts, device=device).to(dtype)
        # Rows of the map are spaced, so that no two pi are so close that rounding decides between them.
        maps_all = torch.rand(3, n_rows, n_experts, device=device)
        maps_all[2, :, 1::3] = 0
        maps_all += torch.rand(3, n_rows, device=device).argsort(-1)[..., None] * (maps_all != 0)
        for spec in router_specs(n_experts, device):
            if spec.n_group > 1:
                continue
            for form in (dict(), dict(assigned=torch.randint(3, (rows,), device=device))):
                expected = reference.masked_router(
                    logits_all.double(), top_k=top_k, spec=spec, router_map=maps_all, **form
                )
                for logits, maps in zip(layouts(logits_all), layouts(maps_all), strict=True):
                    ids, weights = mp.masked_router(
                        logits, top_k=top_k, spec=spec, router_map=maps, backend="native", **form
                    )
                    assert torch.equal(ids, expected[0]), (dtype, spec, form)
                    close(weights, expected[1], 1e-2 if spec.weights_dtype else 1e-4)


def check_routing_moments(device: str) -> None:
    for dtype in FLOATS:
        for pairs, hidden in ((1, 1), (33, 7), (257, 130), (4099, 9)):
            outputs_all = torch.randn(pairs, hidden, device=device).to(dtype)
            ids = torch.randint(11, (pairs,), device=device)
            gates = torch.rand(pairs, device=device).to(dtype)
            valid = torch.rand(pairs, device=device) < 0.8
            ids[~valid] = -1
            given = [dict(outputs=outputs) for outputs in layouts(outputs_all)]
            given.append(dict(norms=outputs_all.double().norm(dim=-1)))
            for values in given:
                tables = []
                for function, extra in (
                    (mp.routing_moments_, dict(backend="native")),
                    (reference.routing_moments_, {}),
                ):
                    moments = torch.zeros(11, 3, 3, dtype=torch.float64, device=device)
                    max_norm = torch.zeros(11, device=device)
                    function(moments, max_norm, ids.to(torch.int32), gates, valid=valid, **values, **extra)
                    tables.append((moments, max_norm))
                for actual, expected in zip(*tables, strict=True):
                    close(actual, expected, 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="no rows of a real vocabulary's length")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vocabularies = (1, 2, 31, 129, 1031, 4099)
    check_overlap(arguments.device, vocabularies if arguments.quick else (*vocabularies, 32_001, 151_936))
    check_overlap_from_hidden(arguments.device)
    check_masked_router(arguments.device)
    check_router_map(arguments.device)
    check_routing_moments(arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print("every operation agrees with its definition")


if __name__ == "__main__":
    main()
