"""Refits one layer's down projections by ridge least squares, so that its output misses less.

With h_e the input of kept expert e's down projection, g_e the gate weight that the pruned router gives, and r the
residual, which is what the pruned layer's output misses, the changes D_e of the down projections minimise

    sum_t || r_t - sum_e g_t,e D_e h_t,e ||^2 + sum_e lambda_e ||D_e||^2,    lambda_e = ridge * mean(diag(H_e)),

with H_e = sum_t g_t,e^2 h_t,e h_t,e^T. Gauss-Seidel passes over the experts solve it: an expert's D_e is exact for the
residual that the others leave. No step raises the penalised sum, so the squared residual of the fitted rows never
rises. Rows that are not fitted choose the ridge, and whether the layer is repaired at all (our method).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        weights: [N, K], their gate weights.
        residual: float32 [N, H].
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
        down: [K', ...] in the module's layout and dtype; None where none was better on the rows that judge.
        ridge: the strength chosen; None with `down`.
        fitted: squared residual of the fitted rows, before and after.
        judged: squared residual of the rows that judge, before and after.
    """

    down: Tensor | None
    ridge: float | None
    fitted: tuple[float, float]
    judged: tuple[float, float]


def refit(experts: Any, kept: Sequence[int], rows: LayerRows, ridges: Sequence[float], passes: int) -> Refit:
    """Refits the down projections of a layer's kept experts. Under torchrun all processes' rows count.

    Memory: for each ridge float32 [N, H] and [K', I, H]. FLOPs a pass, with n routed pairs: 4 n H I for the
    activations, 2 n I^2 for H_e, 4 n I H for each ridge.

    Args:
        experts: the module, in the layout of transformers' experts interface.
        kept: numbers of the experts to refit.
        rows: what they get and miss.
        ridges: strengths to try.
        passes: over the experts.
    """
    trials = [_Trial(ridge, rows, len(kept)) for ridge in ridges]
    pairs = [_routed(rows, expert) for expert in kept]
    for _ in range(passes):
        for place, expert in enumerate(kept):
            _visit(experts, expert, place, rows, pairs[place], trials)
    before = _errors(rows.residual, rows.fitted)
    after = [_errors(trial.residual, rows.fitted) for trial in trials]
    best = min(range(len(trials)), key=lambda i: after[i][1])
    if not after[best][1] < before[1]:
        return Refit(None, None, (before[0], before[0]), (before[1], before[1]))
    stored = experts.down_proj.detach()[list(kept)]
    changes = trials[best].changes
    down = (stored.float() + (changes if experts.is_transposed else changes.transpose(1, 2))).to(stored.dtype)
    return Refit(down, trials[best].ridge, (before[0], after[best][0]), (before[1], after[best][1]))


class _Trial:
    """The fit with one ridge.

    Attributes:
        ridge: its strength.
        residual: float32 [N, H], what is still missed.
        changes: float32 [K', I, H], of the down projections, transposed.
    """

    def __init__(self, ridge: float, rows: LayerRows, count: int) -> None:
        self.ridge = ridge
        self.residual = rows.residual.clone()
        self._count = count
        self.changes = torch.empty(0)

    def change(self, place: int, width: int) -> Tensor:
        """Returns the change of one expert's down projection, [I, H]; of none yet, zeros."""
        if not len(self.changes):
            self.changes = self.residual.new_zeros(self._count, width, self.residual.shape[1])
        return self.changes[place]


def _routed(rows: LayerRows, expert: int) -> tuple[Tensor, Tensor]:
    """Returns the rows that are routed to an expert, int64 [n], and their gate weights, float32 [n, 1]."""
    chosen = rows.ids == expert
    index = chosen.any(1).nonzero()[:, 0]
    return index, (rows.weights[index].float() * chosen[index]).sum(1, keepdim=True)


def _visit(
    experts: Any, expert: int, place: int, rows: LayerRows, pairs: tuple[Tensor, Tensor], trials: list[_Trial]
) -> None:
    """Solves one expert's change exactly, in every trial, and takes it from the residuals."""
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    index, _ = pairs
    chunks = list(row_chunks(len(index), 4 * width, CHUNK_BYTES))
    held = list(_weighted(experts, expert, rows, pairs, chunks)) if len(chunks) == 1 else None

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        yield from held if held is not None else _weighted(experts, expert, rows, pairs, chunks)

    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.hidden.device)
    sides = [gram.new_zeros(width, rows.hidden.shape[1]) for _ in trials]
    for at, inner in parts():
        used = rows.fitted[at]
        at, inner = at[used], inner[used]
        gram += inner.T @ inner
        for trial, side in zip(trials, sides, strict=True):
            side += inner.T @ trial.residual[at]
    gram = _over_all(gram)
    scale = float(gram.diagonal().mean())
    solutions: list[Tensor] = []
    for trial, side in zip(trials, sides, strict=True):
        before = trial.change(place, width)
        side = _over_all(side)
        if scale == 0:
            solutions.append(torch.zeros_like(before))
            continue
        ridged = gram + trial.ridge * scale * torch.eye(width, dtype=gram.dtype, device=gram.device)
        new = torch.cholesky_solve(side + gram @ before.double(), torch.linalg.cholesky(ridged)).float()
        solutions.append(new - before)
        before.copy_(new)
    for at, inner in parts():
        for trial, change in zip(trials, solutions, strict=True):
            trial.residual[at] -= inner @ change


def _weighted(
    experts: Any, expert: int, rows: LayerRows, pairs: tuple[Tensor, Tensor], chunks: Sequence[slice]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields chunks of an expert's rows: int64 [n], and g h, float32 [n, I]."""
    index, gates = pairs
    for chunk in chunks:
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
