"""Repairs a pruned model without gradients: kept experts' down projections are refitted, layer by layer, in order.

Each layer is fitted on what the pruned and so far repaired layers before it give, so that later layers also make up for
what earlier ones lost. Layers behind normalise hidden states, so a position's error counts relative to the hidden state
there. The result is a plan whose merges hold the new down projections: it is scored, applied and exported like any
other, and its export is a stock checkpoint. What is fitted: fit.py; how layers are reached: walk.py.

With sequential=True a layer's experts are also scored on that input, and chosen anew at the plan's counts, as
llm-compressor does with REAP. One pass over the layers does all three: score, choose, repair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeprune_ext import distributed
from moeprune_ext.artifacts.journal import Journal
from moeprune_ext.artifacts.plan import HasPlan, Merge, PruningPlan, plan_of
from moeprune_ext.data.batches import TokenBatch, as_batches, data_fingerprint, joined, without_padding
from moeprune_ext.files import replacing
from moeprune_ext.models.apply import check_plan
from moeprune_ext.models.layers import masked
from moeprune_ext.models.moe import MoeModel
from moeprune_ext.models.patches import ExpertsFunction, evaluating
from moeprune_ext.models.slicing import check_slicing
from moeprune_ext.progress import View, track
from moeprune_ext.repair.fit import LayerRows, Refit, refit
from moeprune_ext.repair.sequential import Chooser
from moeprune_ext.repair.walk import ReplayWalk, Walk, WholeWalk, replay_to_repair

RIDGES = (0.01, 0.1, 1.0)  # strengths that "auto" chooses from, for each layer
PASSES = 3
TARGETS = ("layer", "hidden")
TOKENS_AT_ONCE = 2048  # in one call of a layer, unless a sequence is longer


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer.

    Attributes:
        ridge: its strength; None where no refit was better on held-out text.
        fitted: squared error of the output on the text that is fitted, relative to the mean square of the hidden state
            at each position, before and after.
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
    passes: int = PASSES,
    sequential: bool = False,
    criterion: str | Mapping[int, str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | View = False,
) -> RepairResult:
    """Refits the down projections of a pruned model's experts, so that its layers give what the full model's gave.

    Source of the idea of layer-by-layer least squares: GPTQ and MergeMoE (arXiv 2510.14436); the method is ours. Each
    position's error is divided by the root mean square of the hidden state that the full layer gives there, except in
    models whose hidden states are not known. Weights are fitted in float32 with normal equations in float64, whatever
    the model's dtype, and rounded to the dtype that they are stored in before the next layer is fitted. Biases and
    shared experts stay as they are.

    Memory for a layer of N positions: (1 + ridges) x N x H float32 and N x H of the model's dtype, and for each ridge
    the down projections of its kept experts in float32. On the host: all batches' hidden states, twice with
    target="hidden", and without `out` the new weights (with it they are mapped from their files). Streamed layers visit
    the device once, besides the checks on a few tokens. Under torchrun the batches are dealt out, and normal equations
    are added up.

    Args:
        model: a transformers model or a MoeModel; it is left as it was.
        plan: a pruning plan; merges of experts are not refitted.
        batches: text to fit, see `as_batches`; label masks do not count.
        ridge: penalty relative to the mean squared input of an expert's down projection; "auto" or a sequence: for each
            layer the one that misses least on held-out text, or no repair where none misses less than before.
        held_out: that text; None: every fourth sequence of `batches`, which is not fitted then.
        target: "layer": what the full layer computes of the same input. "hidden": the full model's hidden state behind
            the layer, which also corrects what earlier layers lost.
        passes: Gauss-Seidel passes over a layer's experts.
        sequential: whether to choose the experts anew, see above. The counts stay; what a plan protects does not.
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
    fitting = _Settings(_ridges(ridge), target, passes)
    _check(plan, moe)
    fit, judge = _texts(moe, batches, held_out)
    pruned = [index for index, count in plan.pruned_counts.items() if count]
    if not pruned:
        return RepairResult(plan)
    check_slicing(moe.layers)
    chooser = Chooser(plan, criterion, fit, moe.layers) if sequential else None
    if distributed.world()[1] > len(fit) + len(judge):
        raise ValueError(f"{distributed.world()[1]} processes cannot share {len(fit) + len(judge)} sequences")
    own = distributed.own_share(len(fit) + len(judge))
    texts = [(fit + judge)[number] for number in own]
    settings = {
        "model": moe.fingerprint,
        "plan": {str(layer): ids for layer, ids in plan.kept.items()},
        "data": data_fingerprint(fit),
        "held_out": data_fingerprint(judge),
        "dtype": str(next(moe.model.parameters()).dtype),
        "sequential": None if chooser is None else chooser.recorded,
        **asdict(fitting),
        "ridges": list(fitting.ridges),
    }
    with evaluating(moe.model):
        with_full = target == "hidden"
        replay = replay_to_repair(moe, pruned, with_full, (fit + judge)[0])
        journal = _Finished(Path(out), settings) if out is not None else None
        walk = WholeWalk(moe, texts) if replay is None else ReplayWalk(moe, replay, texts, with_full)
        return _Run(moe, walk, texts, own, len(fit), fitting, chooser).layers(plan, pruned, journal, progress)


def check_repairable(moe: MoeModel, target: str, batches: Sequence[TokenBatch]) -> None:
    """Refuses (NotRepairable) a model whose layers `repair` would refuse, on a few tokens of the first batch."""
    layers = [index for index, shape in moe.shapes.items() if shape.capacity]
    with evaluating(moe.model):
        replay_to_repair(moe, layers, target == "hidden", batches[0])


@dataclass(frozen=True)
class _Settings:
    """How layers are fitted; the attributes are arguments of `repair`."""

    ridges: tuple[float, ...]
    target: str
    passes: int

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; choose from {', '.join(TARGETS)}")
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")


def _check(plan: PruningPlan, moe: MoeModel) -> None:
    """Refuses (ValueError) a plan that cannot be repaired."""
    check_plan(plan, moe.layers, moe.fingerprint)
    if plan.repaired_layers:
        raise ValueError("this plan is repaired already; repair the plan that it was made of (its `unrepaired`)")
    if plan.merges:
        raise ValueError("this plan merges experts; repair takes one that keeps experts as they are")
    if plan.active is not None:
        raise ValueError(
            f"this plan lowers how many experts are active to {plan.active}; repair takes one that leaves it"
        )


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
    judge = fit[3::4] or fit[-1:]
    rest = [batch for batch in fit if not any(batch is other for other in judge)]
    return joined(rest, TOKENS_AT_ONCE), joined(judge, TOKENS_AT_ONCE)


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
        return record["kept"], done, self._down(index) if done.ridge is not None else None

    def add(self, index: int, kept: Sequence[int], done: LayerRepair, down: Tensor | None) -> Tensor | None:
        """Writes what became of a layer; returns its weights, which are mapped from their file and take no memory."""

        def write() -> None:
            if down is not None:
                with replacing(self._file(index)) as beside:
                    save_file({"down": down.contiguous()}, beside)

        distributed.from_first(write)  # the others go on when the file is there
        self._journal.append({"generation": index, "kept": list(kept), **asdict(done)})
        return None if down is None else self._down(index)

    def _down(self, index: int) -> Tensor:
        file = self._file(index)
        try:
            return load_file(file)["down"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} is missing or damaged ({error}); remove {self._folder} and repair again"
            ) from None

    def _file(self, index: int) -> Path:
        return self._folder / f"layer-{index}.safetensors"


@dataclass
class _Run:
    """One walk over the layers.

    Attributes:
        moe: the model.
        walk: over its layers.
        texts: this process's batches.
        numbers: of them among all processes'.
        fitted: so many of those are fitted; the others judge.
        settings: how layers are fitted.
        chooser: of the experts; None: the plan's stay.
    """

    moe: MoeModel
    walk: Walk
    texts: Sequence[TokenBatch]
    numbers: Sequence[int]
    fitted: int
    settings: _Settings
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
                if self.settings.target == "hidden":
                    self.walk.full(index)
            else:
                kept, fitted = self._layer(index, plan.kept[index])
                layer_repair = LayerRepair(fitted.ridge, fitted.fitted, fitted.judged)
                down = None if fitted.down is None else fitted.down.cpu()
                if finished is not None:
                    down = finished.add(index, kept, layer_repair, down)
            kept_by_layer[index], done[index] = kept, layer_repair
            count = plan.num_experts[index]
            if down is not None:
                merges[index] = Merge.as_they_are(kept, count, down)
            if index != pruned[-1]:
                alone = {index: merges[index]} if index in merges else {}
                self.walk.leave(index, PruningPlan({index: kept}, {index: count}, merges=alone))
        criterion = plan.criterion if self.chooser is None else self.chooser.criterion
        return RepairResult(replace(plan, kept=kept_by_layer, merges=merges, criterion=criterion), done)

    def _layer(self, index: int, kept: list[int]) -> tuple[list[int], Refit]:
        """Chooses a layer's experts, if that is asked for, and refits them."""
        layer = self.moe.layers[index]
        missed = _Missed(self.texts)
        if self.chooser is not None:
            then = missed.add_wanted if self.settings.target == "layer" else _only_run
            observe, context = self.chooser.observing(layer, self.texts, self.numbers, then)
            self.walk.look(index, observe, context, missed.take_size)
            kept = self.chooser.choose(layer, len(kept))
        elif self.settings.target == "layer":
            self.walk.look(index, missed.add_wanted, nullcontext, missed.take_size)
        if self.settings.target == "layer":
            self.walk.look(index, missed.take_given, lambda: masked(layer, kept))
        else:
            self.walk.look(index, missed.take_inputs, lambda: masked(layer, kept), missed.take_state)
            self.walk.full(index, missed.add_state)
        rows = missed.rows([number < self.fitted for number in self.numbers])
        return kept, refit(layer.experts, kept, rows, self.settings.ridges, self.settings.passes)


def _only_run(original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Leaves the experts' forward as it is."""
    return original(hidden, ids, weights)


class _Missed:
    """What the pruned layer's output misses, and what its experts are given, at the attended positions of all batches.

    Each method that takes something is called for one batch after the other.
    """

    def __init__(self, texts: Sequence[TokenBatch]) -> None:
        self._attended = [batch.attention_mask.flatten() for batch in texts]
        ends = torch.tensor([0, *(int(rows.sum()) for rows in self._attended)]).cumsum(0).tolist()
        self._slices = [slice(start, end) for start, end in pairwise(ends)]
        self._residual = torch.empty(0)
        self._inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._wanted = 0
        self._sizes: dict[int, Tensor] = {}  # {number of a batch: float32 [n, 1]}

    def add_wanted(self, original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward in the full layer."""
        output = original(hidden, ids, weights)
        self._add(self._wanted, output, 1)
        self._wanted += 1
        return output

    def take_given(self, original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward in the pruned layer."""
        number = len(self._inputs)
        output = self.take_inputs(original, hidden, ids, weights)
        self._add(number, output, -1)
        return output

    def take_inputs(self, original: ExpertsFunction, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Replaces the experts' forward in the pruned layer, whose output is not looked at."""
        rows = self._attended[len(self._inputs)].to(hidden.device)
        self._inputs.append((hidden[rows], ids[rows], weights[rows]))
        return original(hidden, ids, weights)

    def take_state(self, number: int, output: Tensor) -> None:
        """Takes a hidden state of the pruned model, [1, S, H], away from what is missed."""
        self._add(number, output.flatten(0, -2), -1)

    def add_state(self, number: int, output: Tensor) -> None:
        """Adds the full model's hidden state."""
        self.take_size(number, output)
        self._add(number, output.flatten(0, -2), 1)

    def take_size(self, number: int, output: Tensor) -> None:
        """Measures what the full layer gives: the root mean square of each position's hidden state."""
        rows = self._attended[number].to(output.device)
        if output.shape[:-1].numel() == len(rows):  # otherwise hidden states are no rows of positions
            self._sizes[number] = output.flatten(0, -2)[rows].float().square().mean(-1, keepdim=True).sqrt()

    def rows(self, is_fitted: Sequence[bool]) -> LayerRows:
        """Returns all of it; `is_fitted`: whether each batch is fitted."""
        lengths = [part.stop - part.start for part in self._slices]
        fitted = torch.tensor(is_fitted).repeat_interleave(torch.tensor(lengths))
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*self._inputs, strict=True))
        if len(self._sizes) == len(self._slices):
            sizes = torch.cat([self._sizes[number] for number in range(len(self._slices))])
            scale = torch.where(sizes > 0, sizes.reciprocal(), 0)
            weights = weights.float() * scale
            self._residual *= scale
        return LayerRows(hidden, ids, weights, self._residual, fitted.to(hidden.device))

    def _add(self, number: int, output: Tensor, sign: int) -> None:
        if not len(self._residual):
            self._residual = output.new_zeros(self._slices[-1].stop, output.shape[-1], dtype=torch.float32)
        rows = self._attended[number].to(output.device)
        self._residual[self._slices[number]] += sign * output[rows].float()
