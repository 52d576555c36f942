"""Measures a run's plans on text that nothing was fitted to."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from moeprune_ext.artifacts.measured import Measured, Row
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.checkpoint.read import read_config, read_hf_config, skeleton
from moeprune_ext.intervals import Interval, bootstrap, bootstrap_interval
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
    strata = list(reporter.domains.values())
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
                esap=_mean(esap, weights, strata),
                perplexity=_exp(_mean(nll, predicted, strata)),
                ratio=_exp(_mean(nll - sums["nll"][0], predicted, strata)),
                domains=domains,
                experts=cost.experts,
                disk=before if name == "full" else after,
                memory=cost.bytes + cache,
                active=cost.flops_per_token // 2,
            )
        )
    gain = _mean(sums["esap"][-1] - sums["esap"][1], weights, strata)
    return Measured(rows, gain, len(weights))


def _mean(sums: Tensor, weights: Tensor, strata: list[list[int]]) -> Interval:
    """Returns a token-weighted mean with its interval; each domain's sequences are drawn among themselves.

    How much text of each domain there is was chosen, not drawn.
    """
    return bootstrap(lambda times: (times @ sums) / (times @ weights), len(sums), groups=strata)


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(end) for end in (interval.value, interval.low, interval.high)))


def _disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
