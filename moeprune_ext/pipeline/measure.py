"""Measures a run's plans on text that nothing was fitted to."""

from __future__ import annotations

from pathlib import Path

import torch

from moeprune_ext.artifacts.measured import Measured, Row
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.checkpoint.read import read_config, read_hf_config, skeleton
from moeprune_ext.intervals import bootstrap_interval, exp_interval
from moeprune_ext.models.apply import full_plan
from moeprune_ext.models.costs import CONTEXT, costs, kv_cache_bytes


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
    groups = list(reporter.domains.values())  # how much text there is of each was chosen, not drawn
    empty = skeleton(read_hf_config(source), read_config(source))
    cache, before, after = kv_cache_bytes(empty, CONTEXT), _disk(source), _disk(out)
    rows = []
    for number, (name, one) in enumerate(plans.items()):
        cost = costs(empty, one.unrepaired)
        esap, nll = sums["esap"][number], sums["nll"][number]
        domains = {
            domain: bootstrap_interval(esap[numbers], weights[numbers]) for domain, numbers in reporter.domains.items()
        }
        rows.append(
            Row(
                model=name,
                esap=bootstrap_interval(esap, weights, groups=groups),
                perplexity=exp_interval(nll, predicted, groups=groups),
                ratio=exp_interval(nll - sums["nll"][0], predicted, groups=groups),
                domains=domains,
                experts=cost.experts,
                disk=before if name == "full" else after,
                memory=cost.bytes + cache,
                active=cost.flops_per_token // 2,
            )
        )
    gain = bootstrap_interval(sums["esap"][-1] - sums["esap"][1], weights, groups=groups)
    return Measured(rows, gain, len(weights))


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
