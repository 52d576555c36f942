"""What a run of `prune` will cost: time, memory and disk, from counts and two short measurements of the machine.

Every stage is counted in floating-point operations (2 x the weights that a token passes; for repair see
`repair_flops`) and in passes over the weights, which cost time where layers are streamed. A stage's time is its
operations over the rate of a matrix product of the experts' own size on this machine, times the share of that rate that
the stage reached where it was measured (SHARE). It is an estimate: a factor of two either way is usual.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune_ext.allocation.budget import Budget, uniform_counts, unscored
from moeprune_ext.allocation.choice import ORDERS
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.shape import LayerShape
from moeprune_ext.calibration.criteria import CRITERIA
from moeprune_ext.models.costs import costs, expert_weights, head_weights
from moeprune_ext.models.moe import MoeModel, text_config
from moeprune_ext.pipeline.settings import PruneSettings, TextSizes
from moeprune_ext.repair.repair import PASSES, RIDGES, TARGETS
from moeprune_ext.tables import text_table

# Share of the measured rate that each stage reached on the demo model with one thread, and seconds of two stages that
# depend little on the model (packages, text; the report). By `python bench/costs.py --measure` (bench/results/
# costs-demo.md); calls of small operations take part of the time there, and less of it in larger models.
SHARE = {"calibrate": 0.4, "criterion": 0.5, "search": 0.4, "select": 0.3, "repair": 0.45, "measure": 0.3}
FIXED = {"calibrate": 5.0, "measure": 4.0}
RUNS = 3  # of every layer, in one repair
SAMPLE = 1024  # tokens that naee judges subsets on
TOKENS = 2048  # of one call of a layer
HOST_COPY = 2e10  # bytes a second from host memory to a GPU: a PCIe 4.0 x16 slot, assumed
TRIAL = 0.15  # seconds that each measurement takes
READ = 64 * 2**20  # bytes that are read to measure the disk


@dataclass(frozen=True)
class Machine:
    """What time is reckoned by.

    Attributes:
        name: of the device.
        flops: operations a second in the model's dtype, of matrix products of the experts' size.
        flops32: the same in float32, in which repair is fitted.
        read: bytes a second from disk.
        host: whether the device has memory of its own, apart from the host's.
        reached: share of `flops` that every stage reaches; None: as it was measured for each (SHARE).
    """

    name: str
    flops: float
    flops32: float
    read: float
    host: bool = False
    reached: float | None = None


@dataclass(frozen=True)
class Asked:
    """What a run is asked to do.

    Attributes:
        settings: of the run.
        texts: how much text.
        length: tokens of a sequence.
        dtype: of the model.
        stream: "no", "host" or "disk".
    """

    settings: PruneSettings
    texts: TextSizes
    length: int
    dtype: str
    stream: str = "no"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of the stage.
        does: what it does, with the numbers.
        flops: floating-point operations in the model's dtype.
        flops32: the same in float32.
        passes: times that all weights are read, where they are streamed.
        seconds: the estimate.
    """

    name: str
    does: str
    flops: float
    flops32: float
    passes: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a run costs.

    Attributes:
        machine: that the time is of.
        stages: in order.
        device: {what: bytes} on the device at the peak.
        host: {what: bytes} in host memory at the peak.
        disk: {what: bytes} written.
    """

    machine: Machine
    stages: list[Stage]
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {"estimate": True, "seconds": self.seconds, **asdict(self)}


@dataclass(frozen=True)
class Size:
    """What the counts depend on.

    Attributes:
        layers: MoE layers, L.
        experts: of a layer, E.
        kept: of them.
        hidden: numbers of a token's state, H.
        inner: of an expert's inner state, I; 3 H I weights make an expert.
        top_k: experts of a token.
        dense: weights that a token passes beside the experts, the head included.
        weights: bytes of the model in its dtype.
        left: the same of the pruned model.
        item: bytes of one number.
    """

    layers: int
    experts: int
    kept: float
    hidden: int
    inner: float
    top_k: int
    dense: float
    weights: int
    left: int
    item: int

    @classmethod
    def of(cls, model: Any, budget: Budget, shapes: Mapping[int, LayerShape] | None, dtype: str) -> Size:
        """Counts a model, which may be without weights; `shapes`: what every plan must respect, None: the routers'."""
        moe = MoeModel.of(model)
        layers = [layer for layer in moe.layers.values() if layer.shape.prunable]
        scores = unscored(moe.shapes if shapes is None else shapes)
        plan = PruningPlan.from_pruned_counts(scores, uniform_counts(scores, budget))
        full, item = costs(moe), torch.finfo(getattr(torch, dtype)).bits // 8
        stored = next(moe.model.parameters()).element_size()
        hidden = int(text_config(moe).hidden_size)
        expert = sum(map(expert_weights, layers)) / len(layers)
        top_k = layers[0].active
        active = sum(layer.active * expert_weights(layer) for layer in moe.layers.values())
        return cls(
            layers=len(layers),
            experts=max(layer.shape.num_experts for layer in layers),
            kept=sum(len(plan.kept[index]) for index in plan.kept) / len(plan.kept),
            hidden=hidden,
            inner=expert / (3 * hidden),
            top_k=top_k,
            dense=full.flops_per_token / 2 - active,
            weights=full.bytes * item // stored,
            left=costs(moe, plan).bytes * item // stored,
            item=item,
        )

    @property
    def forward(self) -> float:
        """Operations of one token's way through the model, without attention's products of tokens with tokens."""
        return 2 * (self.dense + self.layers * self.top_k * 3 * self.hidden * self.inner)

    def repair_flops(self, tokens: int) -> tuple[float, float]:
        """Returns the operations of one repair of all layers: in the model's dtype, and in float32."""
        pairs, matrix = self.layers * tokens * self.top_k, self.hidden * self.inner
        forwards = RUNS * tokens * self.forward
        fits = PASSES * len(RIDGES)
        fit = PASSES * (8 * pairs * matrix + 2 * pairs * self.inner**2) + fits * 4 * pairs * matrix + 6 * pairs * matrix
        solves = fits * self.layers * self.kept * (self.inner**3 / 3 + 4 * self.inner**2 * self.hidden)
        return forwards, fit + solves

    def repair_bytes(self, tokens: int) -> int:
        """Returns what a repair holds on the device beside the weights."""
        ridges, rows = len(RIDGES), tokens * self.hidden
        changes = 4 * ridges * self.kept * self.hidden * self.inner
        return int(4 * (1 + ridges) * rows + self.item * rows + changes)

    def naee_flops(self) -> float:
        """Returns the operations of naee's order of all layers, as naee_plan counts them."""
        n, experts, gone = SAMPLE, self.experts, max(self.experts - self.top_k, 0)
        subsets = gone * (experts - gone / 2)
        outputs, products = 6 * n * self.hidden * self.inner * experts, 2 * n * experts**2 * self.hidden
        return self.layers * (outputs + products + 2 * n * experts**2 * subsets)


# ---- the stages


def estimate(
    model: Any, asked: Asked, machine: Machine, budget: Budget, shapes: Mapping[int, LayerShape] | None = None
) -> Estimate:
    """Estimates what a run of `prune` costs.

    Args:
        model: a transformers model; without weights (meta device) will do.
        asked: what the run does.
        machine: where it runs.
        budget: share of the experts to remove, or `Kept`.
        shapes: {decoder layer: LayerShape} with the limits of every plan; None: the routers'.
    """
    size = Size.of(model, budget, shapes, asked.dtype)
    stages = [_timed(stage, size, asked, machine) for stage in _stages(size, asked)]
    tokens = asked.length * (asked.texts.calibration_sequences + asked.texts.sequences)
    repairs = _ways(asked.settings)
    work = max(asked.settings.memory_budget, size.repair_bytes(tokens) if repairs else 0)
    states = tokens * size.hidden * size.item
    resident = size.weights
    if asked.stream != "no":  # the head, and two layers on a GPU, one on a CPU
        head = head_weights(model) * size.item
        resident = head + (size.weights - head) * (2 if machine.host else 1) // size.layers
    device = {"weights": int(resident), "search or repair, beside the weights": int(work)}
    host = {"hidden states": int(states)} if repairs else {}
    if asked.stream == "host":
        host["weights of the waiting layers"] = size.weights
    down = int(size.layers * size.kept * size.hidden * size.inner * size.item)
    disk = {"checkpoint": size.left}
    if repairs:
        disk["repaired weights in the plan, until the report is written and after"] = down
        disk["repairs while they are compared"] = down * repairs
    return Estimate(machine, stages, device, host, disk)


def _ways(settings: PruneSettings) -> int:
    """Returns how many repairs are compared."""
    targets = {"off": 0, "auto": len(TARGETS)}.get(settings.repair, 1)
    return targets * (2 if settings.sequential == "auto" else 1)


def _stages(size: Size, asked: Asked) -> Iterable[Stage]:
    """Yields the stages without their time."""
    settings, texts, search = asked.settings, asked.texts, asked.settings.search
    calibrated = texts.calibration_sequences * asked.length
    held_out = max(8, texts.sequences // 4)
    searched, judged = (texts.sequences - held_out) * asked.length, held_out * asked.length
    tested = texts.test_sequences * asked.length
    one = size.forward
    yield Stage("calibrate", f"1 forward of {calibrated:,} tokens", calibrated * one, 0, 1)
    if settings.criterion == "auto":
        # Plans by every criterion and naee, uniform and global; then one layer changed at a time, which share the
        # layers before it, and the changed layers together (allocation/mixing.py).
        plans = 2 * (len(CRITERIA) + 1) + (ORDERS - 1) * size.layers // 2 + size.layers
        flops = (plans + 2) * searched * one + size.naee_flops()
        yield Stage("criterion", f"up to {plans} plans on {searched:,} tokens, and naee's order", flops, 0, 5)
    scored = search.population + (search.generations - 1) * search.children
    about = f"up to {scored:,} plans on {searched:,} tokens, {search.generations} generations"
    yield Stage("search", about, scored * searched * one, 0, search.generations)
    finalists = search.elites + 3
    yield Stage("select", f"{finalists} plans on {judged:,} tokens held out", (finalists + 1) * judged * one, 0, 2)
    if ways := _ways(settings):
        fitted = calibrated + searched + judged
        forwards, fit = size.repair_flops(fitted)
        about = f"{ways} ways on {fitted:,} tokens, the best taken"
        yield Stage("repair", about, ways * forwards + (ways + 1) * judged * one, ways * fit, ways * RUNS)
    yield Stage("export", "weights read and written once", 0, 0, 1)
    yield Stage("measure", f"4 models on {tested:,} tokens", 4 * tested * one, 0, 4)


def _timed(stage: Stage, size: Size, asked: Asked, machine: Machine) -> Stage:
    """Returns a stage with its time."""
    share = SHARE.get(stage.name, 1.0) if machine.reached is None else machine.reached
    seconds = (stage.flops / machine.flops + stage.flops32 / machine.flops32) / share
    seconds += FIXED.get(stage.name, 0.0)
    if stage.name == "export":
        seconds += (size.weights + size.left) / machine.read
    elif asked.stream == "disk":
        seconds += stage.passes * size.weights / machine.read
    elif asked.stream == "host" and machine.host:
        seconds += stage.passes * size.weights / HOST_COPY
    if stage.name == "calibrate" and asked.stream == "no":
        seconds += size.weights / machine.read  # the model is loaded
    return Stage(**{**asdict(stage), "seconds": seconds})


# ---- the machine


def measured_machine(model: Any, length: int, dtype: str, device: torch.device, files: Iterable[Path]) -> Machine:
    """Measures this machine for about half a second.

    Args:
        model: whose experts' size the products have; without weights will do.
        length: tokens of a sequence.
        dtype: of the model.
        device: where it runs.
        files: weights, of which the first is read from for a moment.
    """
    moe = MoeModel.of(model)
    layer = next(iter(moe.layers.values()))
    hidden = int(text_config(moe).hidden_size)
    inner = max(1, round(expert_weights(layer) / (3 * hidden)))
    rows = max(16, max(TOKENS, length) * layer.active // layer.shape.num_experts)
    rates = [_product_rate(rows, hidden, inner, getattr(torch, name), device) for name in (dtype, "float32")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Machine(name, rates[0], rates[1], _read_rate(next(iter(files))), host=device.type != "cpu")


def _product_rate(rows: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Returns operations a second of [rows, H] x [I, H]^T, as an expert computes it, with weights that change."""
    states = torch.ones(rows, hidden, dtype=dtype, device=device)
    weights = torch.ones(8, inner, hidden, dtype=dtype, device=device)

    def products() -> None:
        for one in weights:
            torch.nn.functional.linear(states, one)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 8 * 2 * rows * hidden * inner / _seconds_of(products)


def _seconds_of(work: Callable[[], None]) -> float:
    """Returns the shortest time of a call, of those made in TRIAL seconds after a first one."""
    work()
    end, best = time.perf_counter() + TRIAL, float("inf")
    while (start := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - start)
    return best if best < float("inf") else TRIAL


def _read_rate(file: Path) -> float:
    """Returns bytes a second at which the first READ bytes of a file are read."""
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):  # so that the disk is measured rather than memory
            os.posix_fadvise(opened.fileno(), 0, READ, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        size = len(opened.read(READ))
        return max(size, 1) / max(time.perf_counter() - start, 1e-6)


# ---- as text


def estimate_text(found: Estimate, title: str) -> str:
    """Returns an estimate as a table of stages, and memory and disk below it."""
    rows = [
        [stage.name, _count(stage.flops + stage.flops32), duration(stage.seconds), stage.does] for stage in found.stages
    ]
    total = sum(stage.flops + stage.flops32 for stage in found.stages)
    rows.append(["in all", _count(total), duration(found.seconds), ""])
    machine = found.machine
    lines = [
        f"{title}. ESTIMATE, nothing was run: counts, and {machine.name} measured for a moment at "
        f"{machine.flops / 1e9:,.0f} GFLOP/s ({machine.flops32 / 1e9:,.0f} in float32), reading "
        f"{machine.read / 1e9:.2g} GB/s. A factor of two either way is usual.",
        text_table(["stage", "FLOP", "time", "what"], rows),
    ]
    named = {"device memory" if machine.host else "memory": found.device, "host memory": found.host, "disk": found.disk}
    for name, parts in named.items():
        if parts:
            each = "; ".join(f"{what} {size / 1e9:,.2f} GB" for what, size in parts.items())
            lines.append(f"{name}: {sum(parts.values()) / 1e9:,.2f} GB ({each})")
    return "\n".join(lines)


def _count(flops: float) -> str:
    return "" if flops == 0 else f"{flops:.2g}"


def duration(seconds: float) -> str:
    """Returns a time in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
