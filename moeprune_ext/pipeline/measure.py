"""What a run's plans are worth, on text that nothing was fitted to, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.checkpoint.read import read_config, read_hf_config, skeleton
from moeprune_ext.intervals import Interval, bootstrap_interval, paired_gain
from moeprune_ext.models.apply import full_plan
from moeprune_ext.models.costs import CONTEXT, costs, kv_cache_bytes
from moeprune_ext.tables import markdown_table


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: what is measured.
        esap: on the test text, with its interval.
        perplexity: on the test text.
        domains: {domain: ESAP}.
        experts: routed experts stored.
        disk: bytes of the weights' files.
        memory: bytes when served: weights, and the KV cache of CONTEXT tokens.
        active: parameters that a token passes.
    """

    model: str
    esap: Interval
    perplexity: float
    domains: dict[str, float]
    experts: int
    disk: int
    memory: int
    active: int


@dataclass(frozen=True)
class Measured:
    """What a run ends with.

    Attributes:
        rows: full, uniform by the default criterion, the plan before repair, and after.
        gain: ESAP of the last row over the uniform plan's, or over the plan's before repair if there is none.
        sequences: of the test text.
    """

    rows: list[Row]
    gain: Interval
    sequences: int

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        rows = [{**asdict(row), "esap": row.esap.as_json()} for row in self.rows]
        return {"rows": rows, "gain": self.gain.as_json(), "sequences": self.sequences}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        """Reads what `as_json` returned."""
        rows = [Row(**{**row, "esap": Interval.from_json(row["esap"])}) for row in content["rows"]]
        return cls(rows, Interval.from_json(content["gain"]), int(content["sequences"]))


def measure(
    reporter: CandidateEvaluator,
    source: Path,
    out: Path,
    plan: PruningPlan,
    repaired: PruningPlan,
    default: PruningPlan | None,
) -> Measured:
    """Measures the plans of a run on the test text.

    Args:
        reporter: of the test text.
        source: the model's directory.
        out: the checkpoint's directory.
        plan: before repair.
        repaired: the same, repaired; or the plan itself.
        default: the uniform plan by the default criterion, if there is one.
    """
    plans = {"full": full_plan(reporter.moe)}
    if default is not None:
        plans["uniform, reap"] = default
    plans["this plan"] = plan
    if repaired.repaired_layers or repaired.kept != plan.kept:
        plans["this plan, repaired"] = repaired
    sums = reporter.sequence_sums(list(plans.values()), ("esap", "nll")).sums
    weights, predicted = (torch.tensor(reporter.weights(name), dtype=torch.float64) for name in ("esap", "nll"))
    empty = skeleton(read_hf_config(source), read_config(source))
    cache, before, after = kv_cache_bytes(empty, CONTEXT), _disk(source), _disk(out)
    rows = []
    for number, (name, one) in enumerate(plans.items()):
        cost = costs(empty, one.unrepaired)
        esap, nll = sums["esap"][number], sums["nll"][number]
        domains = {
            domain: float(esap[numbers].sum() / weights[numbers].sum()) for domain, numbers in reporter.domains.items()
        }
        rows.append(
            Row(
                model=name,
                esap=bootstrap_interval(esap, weights),
                perplexity=math.exp(float(nll.sum() / predicted.sum())),
                domains=domains,
                experts=cost.experts,
                disk=before if name == "full" else after,
                memory=cost.bytes + cache,
                active=cost.flops_per_token // 2,
            )
        )
    return Measured(rows, paired_gain(sums["esap"][-1], sums["esap"][1], weights), len(weights))


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def format_table(measured: Measured) -> str:
    """Returns the rows as a Markdown table."""
    header = ["model", "held-out ESAP", "95 % interval", "perplexity", "on disk", "served", "active parameters"]
    lines = [
        [
            row.model,
            f"{row.esap.value:.4f}",
            f"{row.esap.low:.3f} to {row.esap.high:.3f}",
            f"{row.perplexity:.2f}",
            _size(row.disk),
            _size(row.memory),
            f"{row.active / 1e6:,.1f} M" if row.active < 1e9 else f"{row.active / 1e9:,.2f} B",
        ]
        for row in measured.rows
    ]
    return markdown_table(header, lines)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
