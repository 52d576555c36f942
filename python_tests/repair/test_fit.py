"""One layer's refit, against its definition in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from moeprune_ext.models.experts import inner_activations
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.repair import fit
from moeprune_ext.repair.fit import LayerRows, refit, stored_dtype

LAYOUTS = ("olmoe", "gpt_oss")  # gated; transposed, interleaved and with biases


def experts_of(family="olmoe", dtype=torch.float32):
    layers = MoeModel.of(tiny_model(family)).layers
    return next(iter(layers.values())).experts.to(dtype)


def matrix_rows(down, experts):
    """Down projections [K', I, H], whatever their layout."""
    return down if experts.is_transposed else down.transpose(1, 2)


def weighted_inputs(experts, rows, kept):
    """float64 [N, K', I]: g h of every row and expert, 0 where it is not routed."""
    gates = torch.stack([(rows.weights * (rows.ids == e)).sum(1) for e in kept], 1)
    inner = torch.stack([inner_activations(experts, e, rows.hidden) for e in kept], 1)
    return (gates[..., None].to(inner.dtype) * inner).double()


def rows_of(experts, kept, count=240, seed=0, noise=0.3):
    """Rows whose residual the kept experts explain but for noise; every fourth judges."""
    generator = torch.Generator().manual_seed(seed)
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    hidden = torch.randn(count, width, generator=generator).to(experts.down_proj.dtype)
    chosen = torch.rand(count, len(kept), generator=generator).argsort(1)[:, :2]
    weights = torch.rand(count, 2, generator=generator).to(hidden.dtype)
    rows = LayerRows(hidden, torch.tensor(kept)[chosen], weights, torch.empty(0), torch.arange(count) % 4 != 0)
    inputs = weighted_inputs(experts, rows, kept).flatten(1).float().detach()
    true = 0.2 * torch.randn(inputs.shape[1], width, generator=generator)
    residual = inputs @ true
    residual += noise * residual.std() * torch.randn(residual.shape, generator=generator)
    return replace(rows, residual=residual)


def penalties(inputs, fitted, ridge):
    """lambda_e, float64 [K']."""
    return ridge * inputs[fitted].square().sum(0).mean(-1)


def left_over(experts, rows, kept, down):
    """float64 [N, H]: what the module itself misses with other down projections."""
    other = copy.deepcopy(experts)
    other.down_proj = nn.Parameter(experts.down_proj.detach().clone())
    with torch.no_grad():
        other.down_proj[list(kept)] = down.to(other.down_proj.dtype)
        outputs = [e(rows.hidden, rows.ids, rows.weights).double() for e in (experts, other)]
    return rows.residual.double() - (outputs[1] - outputs[0])


@pytest.mark.parametrize("family", LAYOUTS)
def test_passes_converge_to_the_joint_ridge_solution(family):
    experts, kept = experts_of(family), [1, 4, 6]
    rows = rows_of(experts, kept)
    got = refit(experts, kept, rows, [0.05], 60)
    inputs = weighted_inputs(experts, rows, kept)
    x, r = inputs[rows.fitted].flatten(1), rows.residual[rows.fitted].double()
    penalty = penalties(inputs, rows.fitted, 0.05).repeat_interleave(inputs.shape[2])
    stacked = torch.cat([x, penalty.sqrt().diag()]), torch.cat([r, r.new_zeros(len(penalty), r.shape[1])])
    expected = torch.linalg.lstsq(*stacked).solution.view(len(kept), inputs.shape[2], -1)
    changes = matrix_rows(got.down - experts.down_proj[kept], experts)
    torch.testing.assert_close(changes.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_reported_errors_are_the_modules_own_with_the_new_weights(family):
    experts, kept = experts_of(family), [0, 2, 3, 7]
    rows = rows_of(experts, kept)
    got = refit(experts, kept, rows, [0.01, 0.1], 2)
    missed = left_over(experts, rows, kept, got.down).square().sum(1)
    assert got.fitted[0] == pytest.approx(float(rows.residual[rows.fitted].square().sum()), rel=1e-5)
    assert got.fitted[1] == pytest.approx(float(missed[rows.fitted].sum()), rel=1e-3)
    assert got.judged[1] == pytest.approx(float(missed[~rows.fitted].sum()), rel=1e-3)
    assert got.fitted[1] < 0.5 * got.fitted[0] and got.judged[1] < 0.5 * got.judged[0]


def test_no_pass_raises_the_penalised_sum_or_the_residual():
    experts, kept = experts_of(), [0, 1, 2, 3, 5]
    rows = rows_of(experts, kept, count=160)
    inputs = weighted_inputs(experts, rows, kept)
    penalty = penalties(inputs, rows.fitted, 0.1)
    sums = [float(rows.residual[rows.fitted].double().square().sum())]
    for passes in (1, 2, 3, 5, 9):
        got = refit(experts, kept, rows, [0.1], passes)
        squares = (got.down - experts.down_proj[kept]).double().square().sum((1, 2))
        sums.append(got.fitted[1] + float((penalty * squares).sum()))
        assert got.fitted[1] <= got.fitted[0]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(sums, sums[1:], strict=False))
    assert sums[-1] < 0.8 * sums[0]


def test_the_strength_is_chosen_by_the_rows_that_judge():
    experts, kept = experts_of(), [0, 1, 2]
    rows = rows_of(experts, kept, count=400, noise=1.0)
    alone = {ridge: refit(experts, kept, rows, [ridge], 2) for ridge in (0.001, 0.3)}
    best = min(alone, key=lambda ridge: alone[ridge].judged[1])
    together = refit(experts, kept, rows, list(alone), 2)
    assert together.ridge == best and torch.equal(together.down, alone[best].down)
    assert best == 0.3
    assert alone[0.001].fitted[1] < alone[0.3].fitted[1], "the weaker ridge always fits more"


def test_where_unfitted_rows_would_get_worse_nothing_is_repaired():
    experts, kept = experts_of(), [0, 1, 2]
    rows = rows_of(experts, kept)
    flipped = replace(rows, residual=torch.where(rows.fitted[:, None], rows.residual, -rows.residual))
    got = refit(experts, kept, flipped, [0.01, 1.0], 2)
    assert got.down is None and got.ridge is None
    assert got.judged[0] == got.judged[1] > 0 and got.fitted[0] == got.fitted[1]


def test_how_rows_are_cut_into_chunks_does_not_matter(monkeypatch):
    experts, kept = experts_of(), [1, 2, 6]
    rows = rows_of(experts, kept)
    whole = refit(experts, kept, rows, [0.01, 0.1], 2)
    monkeypatch.setattr(fit, "CHUNK_BYTES", 1000)
    cut = refit(experts, kept, rows, [0.01, 0.1], 2)
    torch.testing.assert_close(cut.down, whole.down, rtol=1e-4, atol=1e-5)
    assert cut.judged == pytest.approx(whole.judged, rel=1e-5)


def test_experts_that_no_fitted_row_reaches_stay():
    experts, kept = experts_of(), [0, 1, 2, 5]
    rows = rows_of(experts, kept)
    got = refit(experts, kept, replace(rows, fitted=rows.fitted & (rows.ids != 5).all(1)), [0.1], 2)
    assert torch.equal(got.down[3], experts.down_proj[5])
    assert not torch.equal(got.down[0], experts.down_proj[0])
    nowhere = replace(rows, ids=torch.full_like(rows.ids, 7))
    assert refit(experts, kept, nowhere, [0.1], 2).down is None


def test_pairs_of_one_row_that_name_an_expert_twice_add_up():
    experts, kept = experts_of(), [0, 3]
    rows = rows_of(experts, kept)
    twice = replace(
        rows, ids=torch.cat([rows.ids, rows.ids], 1), weights=torch.cat([rows.weights, rows.weights], 1) / 2
    )
    once, same = (refit(experts, kept, its, [0.1], 2).down for its in (rows, twice))
    torch.testing.assert_close(once, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_bfloat16_experts_are_fitted_wide_and_judged_as_they_are_stored(family):
    wide, kept = experts_of(family), [0, 2, 6]
    experts = copy.deepcopy(wide).to(torch.bfloat16)
    rows = rows_of(experts, kept)
    got = refit(experts, kept, rows, [0.01], 2)
    assert got.down.dtype == torch.bfloat16 == stored_dtype(experts.down_proj)
    # The same numbers in float32, as a checkpoint loaded with dtype=float32 holds them, give a bfloat16 repair, too.
    loaded = experts.float()
    in_float = refit(loaded, kept, replace(rows, hidden=rows.hidden.float(), weights=rows.weights.float()), [0.01], 2)
    assert in_float.down.dtype == torch.bfloat16
    exact = left_over(
        loaded, replace(rows, hidden=rows.hidden.float(), weights=rows.weights.float()), kept, in_float.down
    )
    assert in_float.fitted[1] == pytest.approx(float(exact[rows.fitted].square().sum()), rel=1e-4)
    assert got.fitted[1] == pytest.approx(in_float.fitted[1], rel=0.05)
    assert stored_dtype(wide.down_proj) == torch.float32


def test_a_residual_that_rounding_drowns_is_not_repaired():
    """What is missed is far below the steps of the weights: the refit rounds to noise, or to nothing."""
    experts, kept = experts_of(dtype=torch.bfloat16), [0, 2, 6]
    rows = rows_of(experts, kept)
    tiny = replace(rows, residual=rows.residual * 1e-5)
    got = refit(experts, kept, tiny, [0.01], 2)
    assert got.judged[1] <= got.judged[0] and got.fitted[1] <= got.fitted[0]


def test_a_ridge_too_weak_for_floating_point_leaves_finite_weights():
    experts, kept = experts_of(), [0, 1]
    rows = rows_of(experts, kept, count=12)  # fewer rows than the experts' 24 inner values
    got = refit(experts, kept, rows, [1e-30, 0.1], 3)
    assert got.down is None or bool(torch.isfinite(got.down).all())
    assert got.judged[1] <= got.judged[0]
