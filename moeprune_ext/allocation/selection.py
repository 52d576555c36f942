"""Honest selection: the last step of a search ranks its finalists on sequences that were never searched on.

The score that a search ends with is the best of many on one text, and so too good. Here the text is split once, a plan
is chosen among a few on the other part, and its gain over a simpler plan comes with an interval. Where the interval
includes 0, the simpler plan is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget, uniform_plan
from moeprune_ext.allocation.threshold import global_plan
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.candidates.metrics import LOWER_IS_BETTER, domain_means, objective_value, to_maximise
from moeprune_ext.data.batches import TokenBatch, split_sequences
from moeprune_ext.files import finite_or_none, nan_if_none
from moeprune_ext.intervals import Interval, bootstrap

LEAST_HELD_OUT = 8

Domains = Mapping[str, Sequence[TokenBatch]]


def split_held_out(
    domains: Domains, share: float = 0.25, least: int = LEAST_HELD_OUT
) -> tuple[dict[str, list[TokenBatch]], dict[str, list[TokenBatch]]]:
    """Splits data into what a search sees and what it never sees: the last sequences of every domain.

    Args:
        domains: {domain: batches}.
        share: of each domain's sequences that are held out, rounded to the nearest number, at least 1.
        least: fewest sequences held out in all; where the share gives fewer, the domains with most left give more.

    Returns:
        {domain: batches of one sequence} to search on, and the same of what is held out.

    Raises:
        ValueError: for a share outside (0, 1), fewer than twice `least` sequences, or a domain of one.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share held out lies between 0 and 1; got {share}")
    sequences = {name: split_sequences(batches) for name, batches in domains.items()}
    total = sum(map(len, sequences.values()))
    if total < 2 * least:
        raise ValueError(
            f"the data has {total} sequences; holding out {least} of them needs at least {2 * least}: give more text, "
            "shorter sequences, or hold out nothing"
        )
    if short := [name for name, its in sequences.items() if len(its) < 2]:
        raise ValueError(
            f"domain {short[0]} has {len(sequences[short[0]])} sequences; one to search on and one to hold out are 2: "
            "give more of its text, leave the domain out, or hold out nothing"
        )
    held = {name: min(max(1, math.floor(share * len(its) + 0.5)), len(its) - 1) for name, its in sequences.items()}
    while sum(held.values()) < least:
        held[max(held, key=lambda name: len(sequences[name]) - held[name])] += 1
    searched = {name: its[: len(its) - held[name]] for name, its in sequences.items()}
    return searched, {name: its[len(its) - held[name] :] for name, its in sequences.items()}


def simple_plans(scores: ExpertScores, sparsity: Budget, best: PruningPlan | None = None) -> dict[str, PruningPlan]:
    """Returns the plans that no search is needed for, the simplest first.

    Args:
        scores: the order in which layers lose experts.
        sparsity: the budget.
        best: the best plan of a choice among criteria, if there was one.

    Returns:
        "uniform", where every layer can give its share, and "global": `best` where it is another plan, or else what
        stands in for the uniform plan.
    """
    plans = {}
    try:
        plans["uniform"] = uniform_plan(scores, sparsity)
    except ValueError:  # some layer cannot give the uniform share
        if best is None:
            plans["global"] = global_plan(scores, sparsity)
    if best is not None and best not in plans.values():
        plans["global"] = best
    return plans


@dataclass(frozen=True)
class HeldOut:
    """How plans rank on text that was not searched on.

    Attributes:
        metric: that plans are compared by.
        objective: "mean", or "worst" for the worst domain's mean.
        sequences: held out.
        scores: {plan's name: its score}.
        domains: {plan's name: {domain: ESAP}}.
        baseline: name of the simpler plan.
        best: name of the plan that scores best.
        winner: name of the plan chosen: the best, or a simpler one where the interval of the gain over it includes 0.
        gain: of the winner over the baseline, or of the best where that is the winner; positive = better. The interval
            is of the pair and does not count that the best was chosen on the same sequences.
        says: how it was chosen, in a sentence for every step.
    """

    metric: str
    objective: str
    sequences: int
    scores: dict[str, float]
    domains: dict[str, dict[str, float]]
    baseline: str
    best: str
    winner: str
    gain: Interval
    says: str

    def as_json(self) -> dict[str, Any]:
        """Returns the attributes as JSON values, None for numbers that are not finite."""
        return vars(self) | {
            "scores": _finite(self.scores),
            "domains": {name: _finite(means) for name, means in self.domains.items()},
            "gain": self.gain.as_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HeldOut:
        """Reads what `as_json` returned."""
        numbers = {name: nan_if_none(score) for name, score in content["scores"].items()}
        domains = {
            name: {domain: nan_if_none(mean) for domain, mean in means.items()}
            for name, means in content["domains"].items()
        }
        gain = Interval.from_json(content["gain"])
        return cls(**{**content, "scores": numbers, "domains": domains, "gain": gain})


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite_or_none(number) for name, number in numbers.items()}


def rank_held_out(
    evaluator: CandidateEvaluator,
    plans: Mapping[str, PruningPlan],
    *,
    baseline: str = "uniform",
    simple: Sequence[str] = (),
    metric: str = "esap",
    objective: str = "mean",
    seed: int = 0,
) -> HeldOut:
    """Ranks plans on held-out text and chooses one: the best, unless its gain over a simpler one may be chance.

    The best of the simple plans must gain over the baseline, and the best of all others over what was chosen so far.
    The interval is a paired bootstrap over sequences, token-weighted; with objective "worst" each domain's sequences
    are drawn among themselves.

    Args:
        evaluator: of the held-out sequences.
        plans: {name: plan}, the baseline among them.
        baseline: name of the simplest plan.
        simple: names of plans that are simpler than those not named.
        metric: that plans are compared by.
        objective: "mean" or "worst".
        seed: of the bootstrap.

    Raises:
        ValueError: where the baseline is not among the plans, for a single sequence, as
            `CandidateEvaluator.evaluate`, and if every plan gives NaN logits.
    """
    if baseline not in plans:
        raise ValueError(f"the baseline {baseline!r} is not among the plans ranked: {', '.join(plans)}")
    if len(evaluator.sequences) < 2:
        raise ValueError("one sequence gives no interval; hold out at least 2")
    evaluator.check_objective(metric, objective)
    names = list(plans)
    scored = evaluator.sequence_sums(list(plans.values()), tuple(dict.fromkeys((metric, "esap")))).sums

    def judge() -> HeldOut:
        scores = dict(zip(names, evaluator.objective_values(scored[metric], metric, objective).tolist(), strict=True))
        best = min(names, key=lambda name: (-to_maximise(metric, scores[name]), name != baseline))
        if math.isnan(scores[best]):
            raise ValueError("every plan gives NaN logits on the held-out text; use a dtype with more range")
        esap = domain_means(scored["esap"], _positions(evaluator, "esap"), evaluator.domains)
        rank = {name: to_maximise(metric, score) for name, score in scores.items()}

        def gain_over(name: str, other: str) -> Interval:
            pair = scored[metric][[names.index(name), names.index(other)]]
            return gain_of(evaluator, pair, metric=metric, objective=objective, seed=seed)

        chosen, sentences = baseline, []
        for rung in (simple, [name for name in names if name not in (baseline, *simple)]):
            candidate = max([name for name in rung if name in names], key=lambda name: rank[name], default=chosen)
            if candidate == chosen:
                continue
            gain = gain_over(candidate, chosen)
            better = gain.above_zero or not math.isfinite(scores[chosen])
            winner = candidate if better else chosen
            sentences.append(_sentence(candidate, winner, chosen, gain, metric, len(evaluator.sequences)))
            chosen = winner
        gain = gain_over(best if chosen == baseline else chosen, baseline)
        return HeldOut(
            metric=metric,
            objective=objective,
            sequences=len(evaluator.sequences),
            scores=scores,
            domains={name: {d: float(means[i]) for d, means in esap.items()} for i, name in enumerate(names)},
            baseline=baseline,
            best=best,
            winner=chosen,
            gain=gain,
            says=" ".join(sentences) or f"There is no other plan than {baseline}.",
        )

    return distributed.from_first(judge)


def gain_of(
    evaluator: CandidateEvaluator,
    pair: Tensor,
    *,
    metric: str = "esap",
    objective: str = "mean",
    seed: int = 0,
) -> Interval:
    """Returns the interval of one plan's gain over another, positive = better.

    Args:
        evaluator: of the sequences.
        pair: float64 [2, N], both plans' sums of the metric over each sequence.
        metric: of the sums.
        objective: "mean" or "worst".
        seed: of the bootstrap.
    """
    weights, sign = _positions(evaluator, metric), -1.0 if metric in LOWER_IS_BETTER else 1.0

    def difference(times: Tensor) -> Tensor:
        ours, theirs = (
            objective_value(metric, objective, times * sums, times * weights, evaluator.domains) for sums in pair
        )
        return sign * (ours - theirs)

    groups = list(evaluator.domains.values()) if objective == "worst" else None
    return bootstrap(difference, pair.shape[1], groups=groups, seed=seed)


def _positions(evaluator: CandidateEvaluator, metric: str) -> Tensor:
    return torch.tensor(evaluator.weights(metric), dtype=torch.float64)


def _sentence(best: str, chosen: str, baseline: str, gain: Interval, metric: str, sequences: int) -> str:
    where = f"on {sequences} held-out sequences"
    if not math.isfinite(gain.value):
        return f"{baseline} has no finite {metric} {where}: {best} is chosen."
    if gain.value <= 0:
        return f"{best} is not better than {baseline} {where}: {baseline} is kept."
    interval = f"95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
    if chosen == baseline:
        return (
            f"{best} gains {gain.value:.4f} {metric} over {baseline} {where}, but the {interval} includes 0: the "
            f"simpler plan, {baseline}, is kept."
        )
    return f"{best} gains {gain.value:.4f} {metric} over {baseline} {where} ({interval})."
