"""Repairs a pruned model without gradients: kept experts' down projections are refitted, layer by layer, in order.

Each layer is fitted on what the pruned and so far repaired layers before it give, so that later layers also make up for
what earlier ones lost. The result is a plan whose merges hold the new down projections: it is scored, applied and
exported like any other, and its export is a stock checkpoint. What is fitted: fit.py; how layers are reached: walk.py.

With sequential=True a layer's experts are also scored on that input, and chosen anew at the plan's counts, as
llm-compressor does with REAP. One pass over the layers does all three: score, choose, repair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import HasPlan, Merge, PruningPlan, plan_of
from moeprune_ext.data.batches import TokenBatch, as_batches, data_fingerprint, joined, without_padding
from moeprune_ext.files import replacing
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.experts import PairOutputs
from moeprune_ext.models.layers import MoeLayer, masked
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, Observe, evaluating
from moeprune_ext.models.slicing import check_slicing
from moeprune_ext.progress import View, track
from moeprune_ext.repair.fit import LayerRows, Refit, refit
from moeprune_ext.repair.sequential import Chooser
from moeprune_ext.repair.walk import Walk, walk_of

RIDGES = (0.001, 0.01, 0.1, 1.0)  # strengths that "auto" chooses from, for each layer
TARGETS = ("layer", "hidden")
TOKENS_AT_ONCE = 2048  # in one call of a layer, unless a sequence is longer


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer.

    Attributes:
        ridge: its strength; None where no refit was better on held-out text.
        fitted: squared error of the output on the text that is fitted, before and after.
        held_out: the same on held-out text, which chose the ridge.
    """

    ridge: float | None
    fitted: tuple[float, float]
    held_out: tuple[float, float]


@dataclass(frozen=True)
class RepairResult:
    """A repaired plan.

    Attributes:
        plan: the pruning plan, with new down projections in its merges.
        layers: {decoder layer: LayerRepair}.
    """

    plan: PruningPlan
    layers: dict[int, LayerRepair] = field(default_factory=dict)


def repair(
    model: nn.Module | MoeModel,
    plan: PruningPlan | HasPlan,
    batches: Iterable[Any],
    *,
    ridge: str | float | Sequence[float] = "auto",
    held_out: Iterable[Any] | None = None,
    target: str = "layer",
    passes: int = 2,
    sequential: bool = False,
    criterion: str | Mapping[int, str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
) -> RepairResult:
    """Refits the down projections of a pruned model's experts, so that its layers give what the full model's gave.

    Source of the idea of layer-by-layer least squares: GPTQ and MergeMoE (arXiv 2510.14436); the method is ours
    (docs: methods). Weights are fitted in float32 with normal equations in float64, whatever the model's dtype, and
    rounded to it before the next layer is fitted. Biases and shared experts stay as they are.

    Memory for a layer of N positions: (2 + ridges) x N x H float32, and for each ridge the down projections of its kept
    experts in float32. On the host: all batches' hidden states, twice with target="hidden". Streamed layers visit the
    device once. Under torchrun the batches are dealt out, and normal equations are added up.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        plan: a pruning plan; merges of experts are not refitted.
        batches: text to fit, see `as_batches`; label masks do not count.
        ridge: penalty relative to the mean squared input of an expert's down projection; "auto" or a sequence: for each
            layer the one that misses least on held-out text, or no repair where none misses less than before.
        held_out: that text; None: the last quarter of the sequences of `batches`, which are not fitted then.
        target: "layer": what the full layer computes of the same input. "hidden": the full model's hidden state behind
            the layer, which also corrects what earlier layers lost.
        passes: Gauss-Seidel passes over a layer's experts.
        sequential: whether to choose the experts anew, see above.
        criterion: by which to choose, for all layers or by layer; None: the plan's.
        out: directory for what is finished, layer by layer; a repair that finds it goes on.
        progress: whether to show progress on stderr, or the View to show it on.

    Returns:
        The repaired plan, with errors layer by layer.

    Raises:
        ValueError: before any work, for a plan that does not fit the model or merges experts, experts whose down
            projection is not known, unknown settings, or too little text.
    """
    moe, plan = MoeModel.of(model), plan_of(plan)
    ridges = _ridges(ridge)
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; choose from {', '.join(TARGETS)}")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    check_plan(plan, moe.layers, moe.fingerprint)
    if plan.merges or plan.active is not None:
        raise ValueError("repair takes a pruning plan: one that merges experts, or lowers how many are active, cannot")
    fit, judge = _texts(moe, batches, held_out)
    pruned = [index for index, count in plan.pruned_counts.items() if count]
    if not pruned:
        return RepairResult(plan)
    check_slicing(moe.layers)
    chooser = Chooser(moe, plan, criterion) if sequential else None
    settings = {
        "model": moe.fingerprint,
        "plan": {str(layer): ids for layer, ids in plan.kept.items()},
        "data": data_fingerprint(fit),
        "held_out": data_fingerprint(judge),
        "dtype": str(next(moe.model.parameters()).dtype),
        "ridges": list(ridges),
        "target": target,
        "passes": passes,
        "sequential": None if chooser is None else chooser.recorded,
    }
    journal = _Finished(Path(out), settings) if out is not None else None
    if distributed.world()[1] > len(fit) + len(judge):
        raise ValueError(f"{distributed.world()[1]} processes cannot share {len(fit) + len(judge)} sequences")
    own = distributed.own_share(len(fit) + len(judge))
    texts = [(fit + judge)[number] for number in own]
    is_fitted = [number < len(fit) for number in own]
    with evaluating(moe.model):
        run = _Run(moe, walk_of(moe, texts, target == "hidden"), texts, is_fitted, ridges, passes, target, chooser)
        return run.layers(plan, pruned, journal, progress)


def _ridges(ridge: str | float | Sequence[float]) -> tuple[float, ...]:
    values = RIDGES if ridge == "auto" else (ridge,) if isinstance(ridge, int | float) else ridge
    if isinstance(values, str) or not values or not all(0 < float(value) < float("inf") for value in values):
        raise ValueError(f'ridge is "auto", a number above 0 or several of them; got {ridge!r}')
    return tuple(map(float, values))


def _texts(moe: MoeModel, batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[TokenBatch], ...]:
    """Returns the batches to fit and those that judge."""

    def rows(batches: Iterable[Any]) -> list[TokenBatch]:
        checked = without_padding(as_batches(batches, moe.vocab_size))
        return without_padding([b.part(slice(row, row + 1)) for b in checked for row in range(len(b.input_ids))])

    fit = rows(batches)
    if held_out is not None:
        return joined(fit, TOKENS_AT_ONCE), joined(rows(held_out), TOKENS_AT_ONCE)
    if len(fit) < 2:
        raise ValueError("repair needs held-out text to choose its strength: give two sequences at least, or held_out")
    end = len(fit) - max(1, len(fit) // 4)
    return joined(fit[:end], TOKENS_AT_ONCE), joined(fit[end:], TOKENS_AT_ONCE)


class _Finished:
    """A repair's directory: settings, a record of every layer that is finished, and its new weights."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._journal = Journal(folder, settings)

    def layer(self, index: int) -> tuple[list[int], LayerRepair, Tensor | None] | None:
        """Returns what became of a layer, None if it is not finished: its kept experts, its errors, its weights."""
        record = self._journal.records.get(index)
        if record is None:
            return None
        done = LayerRepair(record["ridge"], tuple(record["fitted"]), tuple(record["held_out"]))
        down = load_file(self._file(index))["down"] if done.ridge is not None else None
        return record["kept"], done, down

    def add(self, index: int, kept: Sequence[int], done: LayerRepair, down: Tensor | None) -> None:
        """Writes what became of a layer."""
        if down is not None and distributed.is_first():
            with replacing(self._file(index)) as beside:
                save_file({"down": down.cpu().contiguous()}, beside)
        self._journal.append({"generation": index, "kept": list(kept), **asdict(done)})

    def _file(self, index: int) -> Path:
        return self._folder / f"layer-{index}.safetensors"


@dataclass
class _Run:
    """One walk over the layers."""

    moe: MoeModel
    walk: Walk
    texts: Sequence[TokenBatch]
    is_fitted: Sequence[bool]
    ridges: Sequence[float]
    passes: int
    target: str
    chooser: Chooser | None

    def layers(
        self, plan: PruningPlan, pruned: Sequence[int], finished: _Finished | None, progress: bool | View
    ) -> RepairResult:
        """Repairs layer by layer."""
        kept_by_layer, merges, done = dict(plan.kept), {}, {}
        for index in track(progress, pruned, "repair", "layer"):
            before = finished.layer(index) if finished is not None else None
            if before is not None:
                kept, layer_repair, down = before
                if self.target == "hidden":
                    for _ in self.walk.full(index):
                        pass
            else:
                kept, fitted = self._layer(index, plan.kept[index])
                layer_repair = LayerRepair(fitted.ridge, fitted.fitted, fitted.judged)
                down = None if fitted.down is None else fitted.down.cpu()
                if finished is not None:
                    finished.add(index, kept, layer_repair, down)
            kept_by_layer[index], done[index] = kept, layer_repair
            count = plan.num_experts[index]
            if down is not None:
                merges[index] = Merge.as_they_are(kept, count, down)
            alone = {index: merges[index]} if index in merges else {}
            self.walk.leave(index, PruningPlan({index: kept}, {index: count}, merges=alone))
        return RepairResult(replace(plan, kept=kept_by_layer, merges=merges), done)

    def _layer(self, index: int, kept: list[int]) -> tuple[list[int], Refit]:
        """Chooses a layer's experts, if that is asked for, and refits them."""
        layer = self.moe.layers[index]
        wanted = _Recorder(index, self.texts)
        observe: Observe = wanted.observe
        if self.chooser is not None:
            observe = self.chooser.observing(layer, self.texts, self.is_fitted, wanted.observe)
        for number, _ in self.walk.look(index, observe, nullcontext):
            wanted.end(number)
        self._check_known(layer)
        if self.chooser is not None:
            kept = self.chooser.choose(layer, len(kept))
        got = _Recorder(index, self.texts, keep_inputs=True)
        behind: list[Tensor] = []
        for number, output in self.walk.look(index, got.observe, lambda: masked(layer, kept)):
            got.end(number)
            if self.target == "hidden" and output is not None:
                behind.append(_attended(output, self.texts[number]).float())
        if self.target == "hidden":
            full = [_attended(output, self.texts[number]).float() for number, output in self.walk.full(index)]
            residual = torch.cat(full) - torch.cat(behind)
        else:
            residual = torch.cat(wanted.outputs) - torch.cat(got.outputs)
        lengths = [int(batch.attention_mask.sum()) for batch in self.texts]
        fitted = torch.cat([torch.full((n,), fits) for n, fits in zip(lengths, self.is_fitted, strict=True)])
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*got.inputs, strict=True))
        rows = LayerRows(hidden, ids, weights, residual, fitted.to(hidden.device))
        return kept, refit(layer.experts, kept, rows, self.ridges, self.passes)

    def _check_known(self, layer: MoeLayer) -> None:
        """Refuses (ValueError) experts whose down projection is not known; the layer is resident."""
        if not PairOutputs(layer).is_standard or getattr(layer.experts, "has_post_expert_norm", False):
            raise ValueError(
                f"{type(layer.experts).__name__} (layer {layer.index}) does not end in a down projection of the known "
                "layout, so it cannot be repaired; export the plan as it is"
            )


def _attended(output: Tensor, batch: TokenBatch) -> Tensor:
    """Returns the rows of attended positions: [n, H]."""
    return output.reshape(-1, output.shape[-1])[batch.attention_mask.flatten().to(output.device)]


class _Recorder:
    """Keeps the attended rows of what one layer's experts give, and what they are given.

    Attributes:
        outputs: float32 [n, H] of each batch.
        inputs: hidden [n, H], ids [n, K] and weights [n, K] of each batch, if they are wanted.
    """

    def __init__(self, index: int, texts: Sequence[TokenBatch], keep_inputs: bool = False) -> None:
        self._index, self._texts, self._keep_inputs = index, texts, keep_inputs
        self.outputs: list[Tensor] = []
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward."""
        output = original(hidden, ids, weights)
        number = len(self.outputs)
        batch = self._texts[number] if number < len(self._texts) else None
        if batch is None or len(ids) != batch.attention_mask.numel():
            raise ValueError(
                f"layer {self._index}: the experts are not given every position once; this model cannot be repaired"
            )
        rows = batch.attention_mask.flatten().to(output.device)
        self.outputs.append(output[rows].float())
        if self._keep_inputs:
            self.inputs.append((hidden[rows], ids[rows], weights[rows]))
        return output

    def end(self, number: int) -> None:
        """Checks that the batch of this number has been seen."""
        if len(self.outputs) != number + 1:
            raise ValueError(f"layer {self._index}: its experts were not called; this model cannot be repaired")
