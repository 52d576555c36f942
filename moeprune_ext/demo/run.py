"""`moeprune demo`: `moeprune prune` on the embedded model, beside what other tools do, ending in one table.

At 25 % and 50 % sparsity: the uniform plan by REAP, EvoESAP by REAP (with `prune`'s settings, children screened), and
`prune`, which chooses the criterion by measurement, searches, and repairs. All see the same text. Every row is a
checkpoint on disk, loaded again and measured on text that neither training nor calibration nor search has seen. ESAP is
the evaluator's on that text: a plan's score is its checkpoint's score.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from moeprune_ext.allocation.budget import uniform_plan
from moeprune_ext.allocation.evolve import SearchSpace, search
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.candidates.evaluator import CandidateEvaluator
from moeprune_ext.checkpoint.export import export
from moeprune_ext.checkpoint.load import load
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.data.batches import TokenBatch, joined, pack, split_sequences
from moeprune_ext.data.tasks import Task, make_task
from moeprune_ext.demo import corpus
from moeprune_ext.demo.tasks import arithmetic_records, word_order_records, write_tasks
from moeprune_ext.evaluate.quality import accuracy_interval, perplexity_interval
from moeprune_ext.intervals import Interval, bootstrap_interval
from moeprune_ext.pipeline.prune import prune_to
from moeprune_ext.pipeline.run import Source
from moeprune_ext.pipeline.settings import PruneSettings, SearchSettings
from moeprune_ext.pipeline.texts import Texts
from moeprune_ext.progress import View
from moeprune_ext.tables import markdown_table

SPARSITIES = (0.25, 0.5)
SEQUENCE_LENGTH = 256
# Per domain. The benches take as much text, but from the `calibration` split alone, as the first version of the demo.
CALIBRATION_SEQUENCES, SEARCH_SEQUENCES, HELD_OUT_SEQUENCES = 16, 4, 8
POPULATION, GENERATIONS = 16, 8
FITTED_SEQUENCES, SEARCHED_SEQUENCES, CHOOSING_SEQUENCES = 16, 4, 4  # per domain, of the demo itself
SEARCHED_POPULATION, SEARCHED_GENERATIONS = 12, 5  # likewise
PROBLEMS, QUESTIONS = 300, 60


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        model: what is measured.
        esap: on held-out text.
        perplexity: {domain: perplexity on held-out text}.
        exact_match: share of arithmetic problems answered exactly.
        multiple_choice: share of word-order questions answered right.
        experts: experts in all layers.
        megabytes: weights on disk, in 10^6 bytes.
        esap_interval: 95 % interval of the ESAP, over sequences of which each domain's are drawn among themselves.
        perplexity_interval: {domain: over its sequences}.
        exact_match_interval: Wilson's, over the problems.
        multiple_choice_interval: likewise, over the questions.
    """

    model: str
    esap: float
    perplexity: dict[str, float]
    exact_match: float
    multiple_choice: float
    experts: int
    megabytes: float
    esap_interval: Interval
    perplexity_interval: dict[str, Interval]
    exact_match_interval: Interval
    multiple_choice_interval: Interval


def demo_folder() -> Path:
    """Returns the embedded checkpoint's directory."""
    with as_file(files("moeprune_ext.demo") / "model") as folder:
        return folder


def domain_batches(tokenizer: Any, split: str, sequences: int, seed: int = 0) -> dict[str, list[TokenBatch]]:
    """Returns one batch of [sequences, SEQUENCE_LENGTH] tokens for each domain.

    Raises:
        ValueError: where the standard library has too few long documents.
    """
    batches = {}
    for domain in corpus.DOMAINS:
        rng = random.Random(f"{seed}:{split}:{domain}")
        rows: list[TokenBatch] = []
        texts = islice(corpus.documents(domain, split, rng), 100 * sequences)
        for text in texts:  # one row a document, so that no long module fills a whole domain
            if len(rows) == sequences:
                break
            if len(text) > 8 * SEQUENCE_LENGTH:
                start = rng.randrange(len(text) - 8 * SEQUENCE_LENGTH)
                text = text[text.find("\n", start) + 1 :]
            if len(tokenizer(text[: 16 * SEQUENCE_LENGTH])["input_ids"]) >= SEQUENCE_LENGTH:
                rows += pack(tokenizer, [text[: 16 * SEQUENCE_LENGTH]], sequence_length=SEQUENCE_LENGTH, sequences=1)
        if len(rows) < sequences:
            raise ValueError(f"the standard library has too few long documents of {domain} for {sequences} sequences")
        batches[domain] = [TokenBatch(*(_stack(rows, name) for name in TokenBatch.__dataclass_fields__))]
    return batches


def _stack(rows: list[TokenBatch], name: str) -> Any:
    return torch.cat([getattr(row, name) for row in rows])


def arithmetic_task(tokenizer: Any, problems: int | None, seed: int = 0) -> Task:
    """Returns the task of `arithmetic_records`."""
    return make_task("arithmetic", arithmetic_records(problems, seed), tokenizer)


def word_order_task(tokenizer: Any, questions: int, seed: int = 0) -> Task:
    """Returns the task of `word_order_records`."""
    return make_task("word order", word_order_records(questions, seed), tokenizer)


def load_demo() -> tuple[PreTrainedModel, Any]:
    """Returns the embedded model in float32 and its tokenizer."""
    folder = demo_folder()
    return load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def demo_texts(tokenizer: Any, seed: int = 0) -> Texts:
    """Returns the demo's text: no module or problem is in two of training text, search, and test."""
    chosen = _rows(domain_batches(tokenizer, "calibration", SEARCHED_SEQUENCES + CHOOSING_SEQUENCES, seed))
    return Texts(
        calibration=_rows(domain_batches(tokenizer, "train", FITTED_SEQUENCES, seed)),
        search={domain: rows[:SEARCHED_SEQUENCES] for domain, rows in chosen.items()},
        held_out={domain: rows[SEARCHED_SEQUENCES:] for domain, rows in chosen.items()},
        test=_rows(domain_batches(tokenizer, "evaluation", HELD_OUT_SEQUENCES, seed)),
    )


def _rows(domains: dict[str, list[TokenBatch]]) -> dict[str, list[TokenBatch]]:
    return {domain: split_sequences(batches) for domain, batches in domains.items()}


def run_demo(
    out: Path, *, seed: int = 0, progress: bool | View = False, say: Callable[[str], None] = lambda _: None
) -> list[DemoRow]:
    """Runs the flow and returns the table's rows.

    Args:
        out: directory for statistics, plans, checkpoints and tasks.
        seed: seed of the texts, the tasks and the searches.
        progress: whether to show bars on stderr, or the View to show them in.
        say: called with a line of text after each step.
    """
    started = time.perf_counter()

    def step(text: str) -> None:
        say(f"[{time.perf_counter() - started:5.1f} s] {text}")

    folder = demo_folder()
    model, tokenizer = load_demo()
    step(f"loaded the embedded model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    search_settings = SearchSettings(population=SEARCHED_POPULATION, generations=SEARCHED_GENERATIONS, seed=seed)
    # One target, because trying them all would take the demo's time twice.
    settings = PruneSettings(search=search_settings, repair="hidden", sequential="off")
    source = Source(
        checkpoint=read_checkpoint(folder),
        load=lambda: model,
        texts=demo_texts(tokenizer, seed),
        settings=settings,
        shared=out,
        progress=progress,
        say=step,
    )
    arithmetic = arithmetic_task(tokenizer, PROBLEMS, seed)
    word_order = word_order_task(tokenizer, QUESTIONS, seed)

    def measure(name: str, candidate: PreTrainedModel, plan: PruningPlan, checkpoint: Path, esap: Interval) -> DemoRow:
        texts = {domain: joined(batches, 2048) for domain, batches in source.texts.test.items()}
        perplexities = {domain: perplexity_interval(candidate, batches) for domain, batches in texts.items()}
        answers = [accuracy_interval(candidate, task) for task in (arithmetic, word_order)]
        return DemoRow(
            model=name,
            esap=esap.value,
            perplexity={domain: interval.value for domain, interval in perplexities.items()},
            exact_match=answers[0].value,
            multiple_choice=answers[1].value,
            experts=sum(len(ids) for ids in plan.kept.values()),
            megabytes=sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e6,
            esap_interval=esap,
            perplexity_interval=perplexities,
            exact_match_interval=answers[0],
            multiple_choice_interval=answers[1],
        )

    scores = source.scores("reap")
    rows: list[DemoRow] = []
    for sparsity in SPARSITIES:
        percent = f"{100 * sparsity:.0f}"
        found = search(
            source.searcher,
            SearchSpace.of(scores, replace(search_settings, sparsity=sparsity)),
            out=out / f"search-{percent}",
            progress=progress,
        )
        step(f"EvoESAP by REAP at {percent}%: kept per layer {[len(ids) for ids in found.plan.kept.values()]}")
        pruned = prune_to(source, sparsity, out / f"prune-{percent}")
        measured = {row.model: row.esap for row in pruned.measured.rows}
        esap = _held_out_esap(source.reporter, found.plan)
        if not rows:
            rows.append(measure("full", model, PruningPlan.from_pruned_counts(scores, {}), folder, measured["full"]))
        for name, plan, its in (
            ("uniform REAP", uniform_plan(scores, sparsity), measured["uniform, reap"]),
            ("EvoESAP by REAP", found.plan, esap),
        ):
            checkpoint = export(folder, plan, out / f"{name.replace(' ', '-').lower()}-{percent}")
            rows.append(measure(f"{name} {percent}%", load(checkpoint, dtype=torch.float32), plan, checkpoint, its))
        last = pruned.measured.rows[-1].esap
        rows.append(measure(f"prune {percent}%", load(pruned.out, dtype=torch.float32), pruned.plan, pruned.out, last))
        step(f"exported at {percent}%, loaded again and measured")
    write_tasks(out / "tasks", seed)
    return rows


def _held_out_esap(reporter: CandidateEvaluator, plan: PruningPlan) -> Interval:
    """Returns a plan's ESAP; each domain's sequences are drawn among themselves."""
    sums = reporter.sequence_sums([plan], ("esap",)).sums["esap"][0]
    weights = torch.tensor(reporter.weights("esap"), dtype=torch.float64)
    return bootstrap_interval(sums, weights, groups=list(reporter.domains.values()))


def format_table(rows: list[DemoRow]) -> str:
    """Returns the rows as a Markdown table."""
    domains = corpus.DOMAINS
    header = ["model", "held-out ESAP", *(f"ppl {d}" for d in domains), "arithmetic", "word order", "experts", "MB"]
    lines = [
        [
            row.model,
            f"{row.esap:.4f}",
            *(f"{row.perplexity[d]:.2f}" for d in domains),
            f"{row.exact_match:.1%}",
            f"{row.multiple_choice:.1%}",
            str(row.experts),
            f"{row.megabytes:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def format_intervals(rows: list[DemoRow]) -> str:
    """Returns the 95 % intervals of the rows' figures as a Markdown table."""
    header = ["95 % intervals", "held-out ESAP", *(f"ppl {d}" for d in corpus.DOMAINS), "arithmetic", "word order"]
    lines = [
        [
            row.model,
            _ends(row.esap_interval, ".4f"),
            *(_ends(row.perplexity_interval[domain], ".2f") for domain in corpus.DOMAINS),
            _ends(row.exact_match_interval, ".1%"),
            _ends(row.multiple_choice_interval, ".1%"),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _ends(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def as_json(rows: list[DemoRow]) -> list[dict[str, Any]]:
    """Returns the rows for --json."""
    return [
        {
            name: value.as_json()
            if isinstance(value, Interval)
            else {domain: interval.as_json() for domain, interval in value.items()}
            if name == "perplexity_interval"
            else value
            for name, value in vars(row).items()
        }
        for row in rows
    ]
