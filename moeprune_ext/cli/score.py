"""`moeprune score`: statistics to one score per expert, and how far the criteria agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeprune_ext import distributed
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import CRITERIA, rank_correlations, score_experts
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import (
    DATA,
    SCORES,
    Common,
    Data,
    Limits,
    Streaming,
    criteria_help,
    flag,
    force_flag,
)
from moeprune_ext.tables import text_table

EXAMPLE = "moeprune score stats.safetensors --criterion reap -o scores.json"


@dataclass(frozen=True, kw_only=True)
class Options(Limits, Streaming, Data, Common):
    stats: Path = flag("statistics file", positional=True, group=DATA)
    criterion: tuple[str, ...] = flag(
        lambda: f"one or more of {criteria_help()} And naee: see --model. prune and search measure it (auto)",
        ("reap",),
        group=SCORES,
    )
    model: Path | None = flag(
        "model directory, for naee: experts in the order in which a layer misses them least", None, group=DATA
    )
    out: Path | None = flag("scores file to write, of one criterion", None, short="-o")
    force: bool = force_flag()


def run(options: Options) -> tuple[Any, str]:
    """Returns the scores by each criterion, and rank correlations with all others."""
    stats = RoutingStats.load(options.stats)
    names = list(dict.fromkeys(map(io.parse_criterion, options.criterion)))
    if options.out is not None:
        io.check_new_file(options.out, options.force)
        if len(names) > 1:
            raise ValueError(f"a scores file is of one criterion, not of {len(names)}: leave -o out or name one")
    if "naee" in names and not (options.model and options.data):
        raise ValueError("naee compares a layer's output with and without experts: give --model and --data")
    chosen = [io.constrained(_scores(stats, name, options), stats, options) for name in names]
    if options.out is not None and distributed.is_first():
        chosen[0].save(options.out)

    first = chosen[0]
    compared = chosen + [score_experts(stats, name) for name in CRITERIA if name not in names]
    titles = [str(scores.criterion) for scores in compared]
    agreement = rank_correlations(compared)
    criteria = {str(scores.criterion): {str(i): v.tolist() for i, v in scores.items()} for scores in chosen}
    result = {
        "criterion": first.criterion,
        "scores": criteria[str(first.criterion)],
        "criteria": criteria,
        "protected": {str(layer): sorted(ids) for layer, ids in first.protected.items()},
        "compared": titles,
        "rank_correlations": {
            str(i): [[None if math.isnan(x) else x for x in row] for row in matrix.tolist()]
            for i, matrix in agreement.items()
        },
    }
    lines = [line for scores in chosen for line in _score_lines(scores)]
    if first.protected:
        lines += [f"never pruned: {_listed(first.protected)}", ""]
    rows = [[str(layer), *(f"{x:.2f}" for x in matrix[0, 1:].tolist())] for layer, matrix in agreement.items()]
    mean = torch.stack(list(agreement.values()))[:, 0, 1:].nanmean(0).tolist()
    lines += [
        f"how far the others order a layer's experts as {first.criterion} does: rank correlation, 1 = alike",
        text_table(["layer", *titles[1:]], [*rows, ["mean", *(f"{x:.2f}" for x in mean)]]),
    ]
    if options.out is not None:
        model = options.model or "MODEL"
        lines += [
            f"{options.out}: the scores by {first.criterion}, an order in which each layer loses experts",
            io.next_command("allocate", model, "--scores", options.out, "--sparsity", 0.5, "-o", "plan.json"),
        ]
    return result, "\n".join(lines)


def _scores(stats: RoutingStats, name: str | tuple[int, int, str], options: Options) -> ExpertScores:
    """Returns the scores by a criterion of the statistics, or by naee, for which the model runs."""
    if name != "naee" or options.model is None:
        return score_experts(stats, name, seed=options.seed)
    io.check_same_model(options.model, stats.model, options.stats)
    batches = io.load_data(options, io.tokenizer_of(options.model), labels=False, model=options.model)
    model = io.load_model(options.model, options)
    scores = naee_scores(model, batches, seed=options.seed, progress=distributed.is_first())
    return replace(scores, mtp=score_experts(stats).mtp)  # of which naee says nothing


def _score_lines(scores: ExpertScores) -> list[str]:
    """Returns a criterion's table: each layer's mean, best and worst."""
    rows = []
    for layer, values in scores.items():
        best, worst = int(values.argmax()), int(values.argmin())
        rows.append(
            [str(layer), f"{values.mean():.4g}", f"{best} ({values[best]:.4g})", f"{worst} ({values[worst]:.4g})"]
        )
    table = text_table(["layer", "mean", "best expert", "worst expert"], rows)
    return [f"{scores.criterion}, higher = keep", table, ""]


def _listed(experts: Mapping[int, Iterable[int]]) -> str:
    return "; ".join(f"layer {layer}: {', '.join(map(str, sorted(ids)))}" for layer, ids in experts.items())
