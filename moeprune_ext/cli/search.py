"""`moeprune search`: EvoESAP, how many experts each layer should lose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget
from moeprune_ext.allocation.choice import CriterionChoice, auto_criterion
from moeprune_ext.allocation.evolve import SearchResult, SearchSpace, search
from moeprune_ext.allocation.selection import (
    LEAST_HELD_OUT,
    Domains,
    HeldOut,
    rank_held_out,
    simple_plans,
    split_held_out,
)
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.artifacts.about import record
from moeprune_ext.artifacts.journal import check_known, recorded_settings
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.artifacts.scores import ExpertScores
from moeprune_ext.artifacts.stats import RoutingStats
from moeprune_ext.calibration.criteria import CRITERIA
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import (
    MEMORY,
    SEARCH,
    Budgeted,
    Data,
    Memory,
    Scored,
    Streaming,
    criteria_help,
    data_flag,
    flag,
    part,
)
from moeprune_ext.data.batches import split_sequences
from moeprune_ext.files import write_json
from moeprune_ext.models.routers import ROUTERS

EXAMPLE = "moeprune search MODEL --stats stats.safetensors --sparsity 0.5 --data text.jsonl -o RUN_DIR"
CHOICE = "choice.json"


def _criteria_help() -> str:
    return f"auto: the best on --data of all criteria and naee's order, also per layer; or {criteria_help()}"


@dataclass(frozen=True, kw_only=True)
class Options(Memory, Streaming, Data, Budgeted, Scored):
    data: tuple[str, ...] = data_flag()
    criterion: str = flag(_criteria_help, "auto")
    init: tuple[Path, ...] = flag("plan files whose counts join the first generation", (), group=SEARCH)
    settings: EvolveSettings = part(SEARCH)
    held_out_share: float = flag(
        "share of the text not searched on, to choose among the last plans; 0: none", 0.25, group=SEARCH
    )
    router: str = flag("fused: the kernel for half-precision logits too", "auto", choices=ROUTERS, group=MEMORY)
    out: Path = flag("directory for plan.json, history and settings", short="-o")


def run(options: Options) -> tuple[Any, str]:
    """Searches, or goes on with the search in --out, and writes the plan that is best on the text held out."""
    io.check_run_folder(options.out)
    if not 0 <= options.held_out_share < 1:
        raise ValueError(f"--held-out-share is at least 0 and below 1; got {options.held_out_share}")
    init_plans = [PruningPlan.load(path) for path in options.init]
    stats = io.load_stats(options) if options.criterion == "auto" and options.scores is None else None
    _check_directory(options, auto=stats is not None)
    scores = io.load_scores(options if stats is None else replace(options, criterion=next(iter(CRITERIA))))
    budget = io.budget(options, options.model, scores.shapes)
    settings = replace(options.settings, sparsity=budget)
    space = SearchSpace.of(scores, settings, init_plans)  # with auto any order will do to refuse a budget
    io.say_resumed(options.out, settings.generations, "generations")
    domains = io.load_domains(options, io.tokenizer_of(options.model), model=options.model)
    searched, held_out, note = _split(domains, options.held_out_share)
    model = io.load_model(options.model, options)

    def evaluator_of(data: Domains) -> CandidateEvaluator:
        return CandidateEvaluator(model, data, memory_budget=options.memory_bytes, router=options.router)

    evaluator, choice, ranking = evaluator_of(searched), None, None
    method = evaluator.method
    if stats is not None:
        choice = _choice(options, evaluator, stats, budget)
        scores = choice.scores
    simple = simple_plans(scores, budget, choice.plan if choice else None)
    if choice is not None:
        joining = [simple["global"]] if "global" in simple else []
        space = SearchSpace.of(scores, settings, [*init_plans, *joining][: settings.population])
    check_known(options.out, space.recorded(evaluator))
    _record(options, scores, evaluator)
    outcome = search(evaluator, space, out=options.out, progress=distributed.is_first())
    plans = simple | {f"search {i}": found for i, found in enumerate(outcome.finalists, 1)}
    plan = outcome.plan
    compared = settings.fitness, settings.objective
    uniform = evaluator.fitness([simple["uniform"]], *compared)[0] if "uniform" in simple else None
    if held_out:
        evaluator, baseline = evaluator_of(held_out), next(iter(simple))
        metric, objective = compared
        ranking = rank_held_out(
            evaluator,
            plans,
            baseline=baseline,
            simple=list(simple)[1:],
            metric=metric,
            objective=objective,
            seed=options.seed,
        )
        plan, note = plans[ranking.winner], ranking.says
    found = _Found(plan, outcome, choice, ranking, uniform, evaluator.by_domain([plan])[0], note, method)
    if distributed.is_first():
        if ranking is not None:
            write_json(options.out / "held_out.json", ranking.as_json(), indent=1)
        plan.save(options.out / "plan.json")
        scores.save(options.out / "scores.json")
        io.report(options.out)
    return _shown(options, found)


def _record(options: Options, scores: ExpertScores, evaluator: CandidateEvaluator) -> None:
    """Writes how the run is made."""
    fingerprints = {"model": str(scores.model), "text searched on": evaluator.data_fingerprint}
    record(options.out, model=options.model, seed=options.seed, data=options.data, fingerprints=fingerprints)


@dataclass(frozen=True)
class _Found:
    """The plan written, and what is said about it.

    Attributes:
        plan: the plan.
        outcome: of the search.
        choice: of the criterion, if it was chosen here.
        ranking: on the text held out, if some was.
        uniform: what the search compares by, of the uniform plan, if there is one.
        esap: {domain: the plan's ESAP}, on the text held out, if some was.
        note: how the plan was chosen.
        method: how candidates were run.
    """

    plan: PruningPlan
    outcome: SearchResult
    choice: CriterionChoice | None
    ranking: HeldOut | None
    uniform: float | None
    esap: dict[str, float]
    note: str
    method: str


def _check_directory(options: Options, auto: bool) -> None:
    """Refuses the directory of another search, and one whose criterion was chosen otherwise, before any work."""
    known = options.settings.recorded()
    del known["sparsity"]  # which --fit tells later
    check_known(options.out, known)

    def check() -> None:
        chosen = (options.out / CHOICE).exists()
        if chosen != auto and (chosen or recorded_settings(options.out) is not None):
            there, now = ("auto", "another") if chosen else ("a named one", "auto")
            raise ValueError(
                f"{options.out} belongs to another search (criterion: {there} there, {now} now); use another directory "
                "or the same settings"
            )

    distributed.from_first(check)


def _split(domains: Domains, share: float) -> tuple[Domains, Domains, str]:
    """Splits the text into what is searched on and what is held out, and says why nothing is held out."""
    why, sequences = "", sum(len(split_sequences(batches)) for batches in domains.values())
    if share == 0:
        why = "Nothing is held out"
    elif sequences < 2 * LEAST_HELD_OUT:
        why = f"Nothing could be held out of {sequences} sequences ({2 * LEAST_HELD_OUT} are needed)"
    if why:
        return domains, {}, f"{why}: the score is of the text that was searched on."
    return *split_held_out(domains, share), ""


def _choice(options: Options, evaluator: CandidateEvaluator, stats: RoutingStats, budget: Budget) -> CriterionChoice:
    """Chooses the criterion, or reads what was chosen when the directory's search began."""
    return auto_criterion(
        evaluator,
        stats,
        budget,
        fitness=options.settings.fitness,
        objective=options.settings.objective,
        limits=lambda scores: io.constrained(scores, stats, options),
        seed=options.seed,
        file=options.out / CHOICE,
        progress=distributed.is_first(),
    )


def _shown(options: Options, found: _Found) -> tuple[Any, str]:
    """Returns the result and the text that shows it."""
    fitness, objective = options.settings.fitness, options.settings.objective
    plan, outcome, choice = found.plan, found.outcome, found.choice
    kept = {str(layer): len(ids) for layer, ids in plan.kept.items()}
    spent, saved = (
        sum(record[name] for record in outcome.history) for name in ("token_evaluations", "token_evaluations_saved")
    )
    chosen = ("table", "per_layer", "gain", "evaluations", "notes")
    report = options.out / "report.html"
    result = {
        "plan": str(options.out / "plan.json"),
        "report": str(report),
        "criterion": plan.criterion,
        "choice": choice and {name: value for name, value in choice.as_json().items() if name in chosen},
        "fitness": fitness,
        "objective": objective,
        "score": outcome.score,
        "uniform": found.uniform,
        "held_out": found.ranking and found.ranking.as_json(),
        "domains": found.esap,
        "note": found.note,
        "kept_per_layer": kept,
        "nan_candidates": sum(record["nan"] for record in outcome.history),
        "token_evaluations": spent,
        "token_evaluations_saved": saved,
        "method": found.method,
    }
    beside = "" if found.uniform is None else f" (uniform plan: {found.uniform:.5f})"
    named = fitness if objective == "mean" else f"{fitness} of the worst domain"
    esap = ", ".join(f"{name} {value:.4f}" for name, value in found.esap.items())
    lines = [
        f"{named} {outcome.score:.5f}{beside} on the text searched on, by criterion {plan.criterion}",
        *(choice.notes if choice else ()),
        found.note,
        f"ESAP on {'held-out' if found.ranking else 'the'} text: {esap}",
        f"kept per layer: {' '.join(map(str, kept.values()))}",
        f"{options.out / 'plan.json'}: {io.removed(plan)}{_gained(found)}",
        f"report: {report}",
        io.next_command("export", options.model, "--plan", options.out, "-o", "pruned"),
    ]
    return result, "\n".join(lines)


def _gained(found: _Found) -> str:
    """Returns what the plan gains over the simpler one, if text was held out to measure it."""
    ranking = found.ranking
    if ranking is None:
        return ""
    metric, scores = ranking.metric, ranking.scores
    if ranking.winner == ranking.baseline:
        return f"; it is the {ranking.baseline} plan, {metric} {scores[ranking.winner]:.4f} on held-out text"
    return (
        f"; {metric} {scores[ranking.winner]:.4f} on held-out text, where the {ranking.baseline} plan has "
        f"{scores[ranking.baseline]:.4f}"
    )
