"""`moeprune eval`: accuracy on task files, perplexity on text, speed; of one model, or of two beside each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import DATA, Common, Data, flag, setting
from moeprune_ext.data.batches import TokenBatch, data_fingerprint, load_batches
from moeprune_ext.data.tasks import Task, load_task
from moeprune_ext.evaluate.compare import AnswersCompared, TextCompared, compare_answers, compare_text
from moeprune_ext.evaluate.harness import harness_results, harness_table, harness_tasks
from moeprune_ext.evaluate.hopeless import hopeless_reason
from moeprune_ext.evaluate.quality import chance_level, correct, perplexity_interval, share_right
from moeprune_ext.evaluate.speed import Speed, SpeedSettings, measure_speed, quartiles, speed_ratio
from moeprune_ext.intervals import Interval
from moeprune_ext.tables import text_table

INTERVALS = "In brackets: 95 % intervals, Wilson's of accuracies, else a bootstrap over sequences or examples."
EXAMPLE = "moeprune eval PRUNED ORIGINAL --task task.jsonl --data held_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options(Data, Common):
    models: tuple[Path, ...] = flag(
        "model directory or export; a second one is its reference, such as the original, and both are loaded at once",
        positional=True,
        metavar="MODEL",
        group=DATA,
    )
    reference: Path | None = flag("the second model, by name", None, group=DATA, metavar="MODEL")
    task: tuple[Path, ...] = flag("JSONL of prompt, choices, answer; or prompt, answer", (), group=DATA)
    length_normalized: bool = flag("compare choices by log-likelihood per token", False)
    lm_eval: str | None = flag("lm-evaluation-harness tasks, a,b,c (extra: lm-eval)", None, metavar="TASKS")
    speed: bool = flag("time prefill and decode in alternating rounds, and read the memory they take", False)
    speed_batch: int = setting(SpeedSettings, "batch", least=1)
    speed_prompt: int = setting(SpeedSettings, "prompt", least=1)
    speed_new: int = setting(SpeedSettings, "new", least=1)
    speed_rounds: int = setting(SpeedSettings, "rounds", least=1)

    MOST: ClassVar[int] = 2  # models

    def __post_init__(self) -> None:
        if self.reference is not None and len(self.models) > 1:
            raise ValueError("a second MODEL and --reference are the same thing: give one of them")
        if len(self.models) > self.MOST:
            raise ValueError(f"at most two models are compared, {len(self.models)} were named")
        if not (self.task or self.data or self.lm_eval or self.speed):
            raise ValueError("there is nothing to measure: give --task files, --data, --lm-eval tasks or --speed")

    @property
    def folders(self) -> list[Path]:
        """Returns the model, and its reference if there is one."""
        return [*self.models, *([self.reference] if self.reference is not None else [])]

    @property
    def timing(self) -> SpeedSettings:
        """Returns what --speed times."""
        return SpeedSettings(self.speed_batch, self.speed_prompt, self.speed_new, self.speed_rounds)


def run(options: Options) -> tuple[Any, str]:
    """Returns what is measured of the model, and of the reference beside it."""
    folders, names = options.folders, _names(options.folders)
    tokenizers = [io.tokenizer_of(folder) for folder in folders]
    harness = harness_tasks(options.lm_eval.split(",")) if options.lm_eval else []
    tasks = {str(path): load_task(path, tokenizers[0]()) for path in options.task}
    batches = io.load_data(options, tokenizers[0], model=folders[0]) if options.data else None
    for folder in folders:
        for task in tasks.values():
            io.check_task(folder, task)
        if options.speed:
            total = options.speed_prompt + options.speed_new
            io.check_longest(folder, total, f"--speed runs {total:,} tokens", "use smaller --speed-prompt, --speed-new")
    if len(folders) > 1:
        _check_tokens(options, tokenizers, tasks, batches)
    models = [io.load_model(folder, options) for folder in folders]
    result: dict[str, Any] = {}
    if len(folders) > 1:
        result["models"] = {"model": str(folders[0]), "reference": str(folders[1])}
    rows: list[list[str]] = []
    lines: list[str] = []
    for name, task in tasks.items():
        entry, row, verdict = _answers(models, name, task, options.length_normalized)
        result[name], rows, lines = entry, [*rows, row], [*lines, *verdict]
    if batches is not None:
        entry, text_rows, verdict = _text(models, batches)
        result, rows, lines = result | entry, [*rows, *text_rows], [*lines, *verdict]
    parts = [_table(names, rows, "difference")] if rows else []
    parts += [INTERVALS] if rows else []
    parts += ["\n".join(lines)] if lines else []
    if options.speed:
        speeds = measure_speed(models, options.timing, seed=options.seed)
        result["speed"], table = _speeds(names, speeds, options.timing)
        parts.append(table)
    if harness:
        reported = {
            name: harness_results(model, tokenizer(), harness)
            for name, model, tokenizer in zip(names, models, tokenizers, strict=True)
        }
        for key, figures in zip(("lm_eval", "lm_eval_reference"), reported.values(), strict=False):
            result[key] = figures
        parts.append(harness_table(reported))
    return result, "\n\n".join(parts)


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns names for columns: the directories' own, or their whole paths where those are equal."""
    names = [folder.resolve().name for folder in folders]
    return (
        names if len(set(names)) == len(names) else [f"{folder} ({place})" for place, folder in enumerate(folders, 1)]
    )


def _check_tokens(
    options: Options,
    tokenizers: Sequence[Callable[[], Any]],
    tasks: Mapping[str, Task],
    batches: Sequence[TokenBatch] | None,
) -> None:
    """Raises ValueError if the reference's tokenizer reads the same examples as other tokens."""
    files = [folder / "tokenizer.json" for folder in options.folders]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    differing = [name for name, task in tasks.items() if load_task(name, tokenizers[1]()) != task]
    if batches is not None:
        again = load_batches(
            options.data,
            tokenizers[1],
            sequence_length=options.sequence_length,
            sequences=options.sequences,
            batch_size=options.batch_size,
        )
        differing += ["--data"] if data_fingerprint(again) != data_fingerprint(batches) else []
    if differing:
        raise ValueError(
            f"the two models' tokenizers make different tokens of {', '.join(differing)}, so that nothing could be "
            "compared token by token; compare a model with the one that it was made of"
        )


def _answers(
    models: Sequence[Any], name: str, task: Task, length_normalized: bool
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns a task's entry in the JSON result, its row in the table, and its verdict."""
    answers = [correct(model, task, length_normalized=length_normalized) for model in models]
    shares = [share_right(right) for right in answers]
    if reason := hopeless_reason(models[-1], task, shares[-1].value):
        warnings.warn(reason, stacklevel=2)
    chance = chance_level(task)
    entry = {
        "accuracy": shares[0].value,
        "accuracy_interval": shares[0].as_json(),
        "examples": len(task.examples),
        "chance": chance,
    }
    file = Path(name).name
    about = f"{file}: {len(task.examples)} examples" + (f", chance {chance:.1%}" if chance else "")
    row = [about, *(f"{share:.1%}" for share in shares)]
    if len(models) == 1:
        return entry, row, []
    compared = compare_answers(answers[0], answers[1])
    return entry | {"compared": compared.as_json()}, [*row, _points(compared)], [f"{file}: {compared.verdict}"]


def _points(compared: AnswersCompared) -> str:
    gain = compared.difference
    points = Interval(*(100 * end for end in (gain.value, gain.low, gain.high)))
    return f"{points:+.1f} points"


def _text(models: Sequence[Any], batches: Sequence[TokenBatch]) -> tuple[dict[str, Any], list[list[str]], list[str]]:
    """Returns the text's entries in the JSON result, its rows in the table, and its verdict."""
    if len(models) == 1:
        value = perplexity_interval(models[0], batches)
        entry = {"perplexity": value.value, "perplexity_interval": value.as_json()}
        return entry, [["perplexity", f"{value:.4f}"]], []
    text = compare_text(models[0], models[1], batches)
    value = text.perplexity
    entry = {"perplexity": value.value, "perplexity_interval": value.as_json(), "compared": text.as_json()}
    return entry, _text_rows(text), [f"text: {text.verdict}"]


def _text_rows(text: TextCompared) -> list[list[str]]:
    return [
        [
            f"perplexity, {text.sequences} sequences",
            f"{text.perplexity:.4f}",
            f"{text.reference:.4f}",
            f"{text.ratio:.4f} times",
        ],
        ["ESAP", f"{text.esap:.4f}", "1", ""],
        ["KL(reference || model), nats", f"{text.kl_pq:.4f}", "0", ""],
        ["same likeliest token", f"{text.top1_agree:.1%}", "100%", ""],
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], last: str) -> str:
    """Writes rows under the models' names; with one model there is no last column. Values: with 95 % intervals."""
    header = ["", *names, *([f"{last}, paired"] if len(names) > 1 else [])]
    return text_table(header, [list(row) for row in rows])


def _speeds(names: Sequence[str], speeds: Sequence[Speed], timing: SpeedSettings) -> tuple[dict[str, Any], str]:
    """Returns the speeds' entry in the JSON result, and their table."""
    entry: dict[str, Any] = {"settings": vars(timing), "model": speeds[0].as_json()}
    rows = []
    for kind in ("prefill", "decode"):
        rounds = [getattr(speed, kind) for speed in speeds]
        cells = [f"{middle:,.1f} ({low:,.1f} to {high:,.1f})" for middle, low, high in map(quartiles, rounds)]
        if len(speeds) > 1:
            ratio = speed_ratio(rounds[0], rounds[1])
            entry["reference"] = speeds[1].as_json()
            entry.setdefault("ratio", {})[kind] = ratio.as_json()
            cells.append(f"{ratio:.2f} times")
        rows.append([f"{kind}, tokens/s: median (quartiles)", *cells])
    for label, sizes in (
        ("weights, MB", [speed.weights for speed in speeds]),
        ("a round takes on top, at least, MB", [speed.growth for speed in speeds]),
    ):
        cells = ["not known" if size is None else f"{size / 1e6:,.1f}" for size in sizes]
        rows.append([label, *cells, *([""] if len(speeds) > 1 else [])])
    about = (
        f"{timing.rounds} rounds each, alternating: {timing.batch} x {timing.prompt} tokens of prompt, {timing.new} new"
    )
    return entry, f"{about}\n{_table(names, rows, 'ratio')}"
