"""Refits one layer's down projections by ridge least squares, so that its output misses less.

With h_e the input of kept expert e's down projection, g_e the gate weight that the pruned router gives, and r the
residual, which is what the pruned layer's output misses, the changes D_e of the down projections minimise

    sum_t || r_t - sum_e g_t,e D_e h_t,e ||^2 + sum_e lambda_e ||D_e||^2,    lambda_e = ridge * mean(diag(H_e)),

with H_e = sum_t g_t,e^2 h_t,e h_t,e^T. Gauss-Seidel passes over the experts solve it: an expert's D_e is exact for the
residual that the others leave. No step raises the penalised sum, so the squared residual of the fitted rows never
rises. Rows that are not fitted choose the ridge, and whether the layer is repaired at all (our method).

A row's weight, by which g and r are multiplied, is the caller's (repair.py).

The new weights are rounded to the dtype that the layer's are stored in (`stored_dtype`), so that an export holds the
very numbers that were judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.models.experts import inner_activations
from moeprune_ext.ops.backend import row_chunks

CHUNK_BYTES = 256 * 2**20  # of float32 activations [n, I] alive at a time


@dataclass(frozen=True)
class LayerRows:
    """What one pruned layer's experts get, and what its output misses, at this process's N positions.

    Attributes:
        hidden: [N, H], the experts' input.
        ids: int64 [N, K], numbers of experts in the module.
        weights: [N, K], their gate weights, times the row's weight.
        residual: float32 [N, H], times the row's weight.
        fitted: bool [N], rows that are fitted; the others judge.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    residual: Tensor
    fitted: Tensor


@dataclass(frozen=True)
class Refit:
    """One layer's new down projections.

    Attributes:
        down: [K', ...] in the module's layout, rounded to `stored_dtype`; None where none was better on the rows that
            judge.
        ridge: the strength chosen; None with `down`.
        fitted: squared residual of the fitted rows, before and with `down`.
        judged: squared residual of the rows that judge, before and with `down`.
    """

    down: Tensor | None
    ridge: float | None
    fitted: tuple[float, float]
    judged: tuple[float, float]


@torch.no_grad()
def refit(experts: Any, kept: Sequence[int], rows: LayerRows, ridges: Sequence[float], passes: int) -> Refit:
    """Refits the down projections of a layer's kept experts. Under torchrun all processes' rows count.

    Memory: for each ridge float32 [N, H] and [K', I, H]. FLOPs a pass, with n routed pairs: 4 n H I for the
    activations, 2 n I^2 for H_e, 4 n I H for each ridge; once, for the rounding, 6 n H I.

    Args:
        experts: the module, in the layout of transformers' experts interface.
        kept: numbers of the experts to refit.
        rows: what they get and miss.
        ridges: strengths to try.
        passes: over the experts.
    """
    stored = experts.down_proj.detach()[list(kept)]
    wide = stored if experts.is_transposed else stored.transpose(1, 2)  # [K', I, H]
    trials = [_Trial(ridge, rows.residual.clone(), torch.zeros_like(wide, dtype=torch.float32)) for ridge in ridges]
    pairs = [_routed(rows, expert) for expert in kept]
    for _ in range(passes):
        for place, expert in enumerate(kept):
            _visit(experts, expert, place, rows, pairs[place], trials)
    before = _errors(rows.residual, rows.fitted)
    best = min(trials, key=lambda trial: _errors(trial.residual, rows.fitted)[1])
    trials = [best]  # gives the others' memory back
    new = (wide.float() + best.changes).to(stored_dtype(experts.down_proj))
    rounding = new.float() - wide.float() - best.changes
    for place, expert in enumerate(kept):
        for at, inner in _weighted(experts, expert, rows, pairs[place]):
            best.residual[at] -= inner @ rounding[place]
    after = _errors(best.residual, rows.fitted)
    if not (after[1] < before[1] and after[0] <= before[0]):
        return Refit(None, None, (before[0], before[0]), (before[1], before[1]))
    down = (new if experts.is_transposed else new.transpose(1, 2)).contiguous()
    return Refit(down, best.ridge, (before[0], after[0]), (before[1], after[1]))


def stored_dtype(weights: Tensor) -> torch.dtype:
    """Returns the dtype that weights are stored in, though they may be loaded in a wider one.

    That is bfloat16 or float16 where each of them is such a number, as in a checkpoint loaded with dtype=float32.
    """
    weights = weights.detach()
    for narrow in (torch.bfloat16, torch.float16):
        if all(torch.equal(expert.to(narrow).to(weights.dtype), expert) for expert in weights):
            return narrow
    return weights.dtype


@dataclass
class _Trial:
    """The fit with one ridge.

    Attributes:
        ridge: its strength.
        residual: float32 [N, H], what is still missed.
        changes: float32 [K', I, H], of the down projections, transposed.
    """

    ridge: float
    residual: Tensor
    changes: Tensor


def _routed(rows: LayerRows, expert: int) -> tuple[Tensor, Tensor]:
    """Returns the rows that are routed to an expert, int64 [n], and their gate weights, float32 [n, 1]."""
    chosen = rows.ids == expert
    index = chosen.any(1).nonzero()[:, 0]
    return index, (rows.weights[index].float() * chosen[index]).sum(1, keepdim=True)


def _visit(
    experts: Any, expert: int, place: int, rows: LayerRows, pairs: tuple[Tensor, Tensor], trials: list[_Trial]
) -> None:
    """Solves one expert's change exactly, in every trial, and takes it from the residuals.

    Where a ridge is too weak for H_e in floating point, the trial's change of this expert stays as it was.
    """
    width, height = trials[0].changes.shape[1:]
    chunks = list(_weighted(experts, expert, rows, pairs)) if 4 * width * len(pairs[0]) <= CHUNK_BYTES else None

    def parts() -> Iterable[tuple[Tensor, Tensor]]:
        return _weighted(experts, expert, rows, pairs) if chunks is None else chunks

    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.hidden.device)
    sides = [gram.new_zeros(width, height) for _ in trials]
    for at, inner in parts():
        used = rows.fitted[at]
        at, inner = at[used], inner[used]
        gram += inner.T @ inner
        for trial, side in zip(trials, sides, strict=True):
            side += inner.T @ trial.residual[at]
    gram = _over_all(gram)
    scale = float(gram.diagonal().mean())
    steps: list[Tensor] = []
    for trial, side in zip(trials, sides, strict=True):
        before, side = trial.changes[place], _over_all(side)
        ridged = gram.clone()
        ridged.diagonal().add_(trial.ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if failed:  # an expert that no row reaches, too
            steps.append(torch.zeros_like(before))
            continue
        new = torch.cholesky_solve(side + gram @ before.double(), factor).float()
        steps.append(new - before)
        before.copy_(new)
    for at, inner in parts():
        for trial, step in zip(trials, steps, strict=True):
            trial.residual[at] -= inner @ step


def _weighted(
    experts: Any, expert: int, rows: LayerRows, pairs: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields chunks of an expert's rows: int64 [n], and g h, float32 [n, I]."""
    index, gates = pairs
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    for chunk in row_chunks(len(index), 4 * width, CHUNK_BYTES):
        inner = inner_activations(experts, expert, rows.hidden[index[chunk]])
        yield index[chunk], inner.float() * gates[chunk]


def _over_all(tensor: Tensor) -> Tensor:
    """Adds up a tensor over all processes."""
    return tensor if distributed.world()[1] == 1 else distributed.sum_(tensor.cpu()).to(tensor.device)


def _errors(residual: Tensor, fitted: Tensor) -> tuple[float, float]:
    """Returns the squared residual of the fitted rows and of the others, over all processes."""
    squared = residual.square().sum(1, dtype=torch.float64)
    both = torch.stack([squared[fitted].sum(), squared[~fitted].sum()]).cpu()
    fits, judges = distributed.sum_(both).tolist()
    return fits, judges
