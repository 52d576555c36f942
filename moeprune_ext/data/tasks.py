"""Task files become examples of token ids, their splits, and the sequences that score them."""

from __future__ import annotations

import itertools
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.files import read_json_lines

SHOWN = 2  # solved examples that a prompt must show for its format to say how answers end
NEWLINE = "\n"


@dataclass(frozen=True)
class Example:
    """One question of a task.

    Attributes:
        prompt: token ids.
        options: the choices' token ids, or the one reference answer with its terminator.
        answer: index of the right choice; None when `options` is one answer to reproduce exactly.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int | None


@dataclass(frozen=True)
class Task:
    """A named list of examples, each multiple choice or exact match."""

    name: str
    examples: tuple[Example, ...]


def load_task(path: str | os.PathLike[str], tokenizer: Any) -> Task:
    """Reads a JSONL task.

    Lines: {"prompt", "choices": [text, ...], "answer": index}, or {"prompt", "answer": text} with an optional "stop",
    a text of one token that ends the answer; null: the end-of-text token. Tokens = tokenizer(prompt) + tokenizer(answer
    without special tokens) + terminator; no space is inserted.

    An answer is right only if its terminator follows, so a task without "stop" needs the right one. Where no line has a
    "stop" and the prompts show solved examples one a line, answers end with a newline, or with the blank line between
    examples if that is one token; elsewhere with the end-of-text token. A warning says which is assumed.

    Args:
        path: of the file.
        tokenizer: of the model.

    Raises:
        ValueError: naming the line.
    """
    path = Path(path)
    return _task(path.stem, str(path), list(read_json_lines(path)), tokenizer)


def make_task(name: str, records: Iterable[dict[str, Any]], tokenizer: Any) -> Task:
    """Makes a Task of records in the form of load_task's lines."""
    placed = [(record, f"{name}[{number}]") for number, record in enumerate(records)]
    return _task(name, f"task {name}", placed, tokenizer)


def _task(name: str, source: str, records: Sequence[tuple[dict[str, Any], str]], tokenizer: Any) -> Task:
    """Makes a task of records, each with its place for messages; `source` names all of them."""
    if not records:
        raise ValueError(f"{source} holds no examples")
    stop = _assumed_stop(source, [record for record, _ in records], tokenizer)
    return Task(name, tuple(_example({"stop": stop, **record}, place, tokenizer) for record, place in records))


def _assumed_stop(source: str, records: Sequence[dict[str, Any]], tokenizer: Any) -> str | None:
    """Returns what ends the answers of records that do not say it, None for the end-of-text token; warns of it."""
    exact = [one for one in records if isinstance(one.get("answer"), str) and isinstance(one.get("prompt"), str)]
    exact = [one for one in exact if one.get("choices") is None]
    if not exact or any("stop" in one for one in exact):
        return None
    stop, because = None, "the prompts show no solved examples one a line"
    if all(_shows_answers(one["prompt"]) and NEWLINE not in one["answer"].strip() for one in exact):
        apart = [NEWLINE * 2, NEWLINE] if all(NEWLINE * 2 in one["prompt"].strip() for one in exact) else [NEWLINE]
        fitting = [end for end in apart if all(_ends_apart(one["answer"], end, tokenizer) for one in exact)]
        if fitting:
            stop, because = fitting[0], "the prompts show solved examples one a line"
        else:
            because = "this tokenizer has no token for a newline behind every answer"
    assumed = {None: "the end-of-text token", NEWLINE: "a newline"}.get(stop, "a blank line")
    if stop is not None or tokenizer.eos_token_id is not None:  # without one the first record is refused
        warnings.warn(
            f'{source}: no example says with "stop" what ends its answer; {assumed} is assumed, because {because}. A '
            'model that ends answers otherwise scores about 0: say "stop": "\\n", or null for the end-of-text token',
            stacklevel=4,
        )
    return stop


def _shows_answers(prompt: str) -> bool:
    """Tells whether what ends a prompt stands in SHOWN earlier lines with an answer behind it, as in "1+1=2\\n2+3="."""
    *earlier, last = prompt.strip().split("\n")
    words = last.split()
    if not earlier or not words:
        return False
    named = re.fullmatch(r"[^\W\d]+\W*", words[-1])  # a word, such as "Answer:", or the sign behind a problem
    cue = words[-1] if named else words[-1][-1]
    shows = re.compile(rf"(?<!\w){re.escape(cue)}\s*\S" if named else rf"{re.escape(cue)}\s*\S")
    return sum(bool(shows.search(line)) for line in earlier) >= SHOWN


def _ends_apart(answer: str, stop: str, tokenizer: Any) -> bool:
    """Tells whether a stop text behind an answer is one token of its own."""
    alone, both, end = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (answer, answer + stop, stop)
    )
    return len(end) == 1 and both == alone + end


def _example(record: dict[str, Any], place: str, tokenizer: Any) -> Example:
    """Makes an example of a record; `place` names it in errors."""
    if not isinstance(record.get("prompt"), str):
        raise ValueError(f'{place}: expected a text "prompt"')
    prompt = tuple(tokenizer(record["prompt"])["input_ids"])
    if not prompt:
        raise ValueError(f"{place}: the prompt has no tokens")
    answer, choices = record.get("answer"), record.get("choices")

    def tokens_of(text: Any) -> tuple[int, ...]:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if isinstance(text, str) else ()
        if not ids:
            raise ValueError(f"{place}: every choice and answer must be a text of at least one token, got {text!r}")
        return ids

    if choices is not None:
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f'{place}: "choices" must list at least two texts')
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(
                f'{place}: "answer" must be the index of a choice, 0 to {len(choices) - 1}; got {answer!r}'
            )
        return Example(prompt, tuple(tokens_of(choice) for choice in choices), answer)
    if record.get("stop") is None:
        stop: tuple[int, ...] = (tokenizer.eos_token_id,)
        if stop[0] is None:
            raise ValueError(f'{place}: the tokenizer has no end-of-text token; give a "stop"')
    else:
        stop = tokens_of(record["stop"])
        if len(stop) != 1:
            raise ValueError(f'{place}: "stop" must be one token, {record["stop"]!r} is {len(stop)}')
    return Example(prompt, (tokens_of(answer) + stop,), None)


SPLITS = ("train", "valid", "test")


def split_task(task: Task, valid: Task | None, test: Task | None, seed: int) -> tuple[Task, Task, Task]:
    """Cuts the splits that are not given from a task, a quarter of it each.

    Equal examples stay in one split, and their order is the task's. Warns of given splits that share some.

    Args:
        task: the training split, and what is cut from.
        valid: the validation split; None: cut.
        test: the test split; None: cut.
        seed: draws which examples are cut.

    Returns:
        (train, valid, test).

    Raises:
        ValueError: for a task of too few different examples, and for a split without any.
    """
    distinct = list(dict.fromkeys(task.examples))
    random.Random(f"{seed}:splits").shuffle(distinct)
    size, parts = len(distinct) // 4, [valid, test]
    wanted = parts.count(None)
    if wanted and not size:
        raise ValueError(
            f"{task.name} has {len(distinct)} different examples, too few to cut into a training, a validation and a "
            "test split; give at least 4, or tasks for valid and test"
        )
    for place, name in enumerate(SPLITS[1:]):
        if parts[place] is None:
            chosen = {distinct.pop() for _ in range(size)}
            parts[place] = Task(f"{task.name}, {name}", tuple(e for e in task.examples if e in chosen))
    rest = set(distinct)
    train = Task(task.name, tuple(example for example in task.examples if example in rest))
    splits = (train, *(part for part in parts if part is not None))
    for name, split in zip(SPLITS, splits, strict=True):
        if not split.examples:
            raise ValueError(f"the {name} split, {split.name}, has no examples")
    for a, b in ((0, 1), (0, 2), (1, 2)):
        if shared := len(set(splits[a].examples) & set(splits[b].examples)):
            warnings.warn(
                f"{shared} examples of the {SPLITS[b]} split are in the {SPLITS[a]} split, too: its figures flatter",
                stacklevel=3,
            )
    return splits[0], splits[1], splits[2]


# ---- examples as sequences

Row = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt, and what follows it
TOKENS_AT_ONCE = 4096  # of a batch that is calibrated on


def rows_of(task: Task) -> list[Row]:
    """Returns every option of every example behind its prompt, one after the other."""
    return [(example.prompt, option) for example in task.examples for option in example.options]


def right_answers(task: Task) -> Task:
    """Returns the task with the right option of every example alone, to be reproduced."""
    return Task(task.name, tuple(Example(e.prompt, (e.options[e.answer or 0],), None) for e in task.examples))


def padded_batches(rows: Sequence[Row], tokens: int) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yields rows as batches padded on the right, the longest first; what follows the prompts is labelled.

    Args:
        rows: prompts and what follows them.
        tokens: of a batch, padding included, if one row has no more.

    Yields:
        The rows' numbers, and their batch.
    """
    lengths = [len(prompt) + len(continuation) for prompt, continuation in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    while order:
        longest = lengths[order[-1]]
        count = max(1, tokens // longest)
        chosen, order = order[-count:], order[:-count]
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        attended = torch.zeros(len(chosen), longest, dtype=torch.bool)
        labelled = torch.zeros_like(attended)
        for at, number in enumerate(chosen):
            prompt, continuation = rows[number]
            ids[at, : lengths[number]] = torch.tensor(prompt + continuation)
            attended[at, : lengths[number]] = True
            labelled[at, len(prompt) : lengths[number]] = True
        yield chosen, TokenBatch(ids, attended, labelled)


def answer_batches(task: Task) -> list[TokenBatch]:
    """Returns prompts with their right answers, padded on the right, for calibration."""
    return [batch for _, batch in padded_batches(rows_of(right_answers(task)), TOKENS_AT_ONCE)]


def sequences(task: Task, fitness: str) -> list[dict[str, torch.Tensor]]:
    """Returns what an evaluator runs to score a task, labelled where it is scored.

    Shorter ones come first, so that neighbours, the evaluator's units of work, go through a layer as one batch.

    Args:
        task: whose examples are run.
        fitness: "accuracy": all options behind their prompts; a metric: right answers alone.
    """
    ahead = 1 if fitness == "esap" else 0
    batches = []
    rows = rows_of(task if fitness == "accuracy" else right_answers(task))
    for prompt, continuation in sorted(rows, key=lambda row: len(row[0]) + len(row[1])):
        tokens = prompt + continuation
        labels = torch.zeros(1, len(tokens), dtype=torch.bool)
        labels[0, len(prompt) - ahead : len(tokens) - ahead] = True
        batches.append({"input_ids": torch.tensor([tokens]), "labels_mask": labels})
    return batches


# ---- right or wrong


def answered_right(
    task: Task, likelihoods: Sequence[float], matches: Sequence[bool], *, length_normalized: bool = False
) -> list[bool]:
    """Tells which examples are answered right.

    Multiple choice: the option of highest log-likelihood is the answer; ties: the first; NaN is never the highest.

    Args:
        task: the examples.
        likelihoods: log-likelihood of each row of `rows_of`.
        matches: whether each row's every token has the largest logit.
        length_normalized: choices compare by log-likelihood per token.
    """
    results, start = [], 0
    for example in task.examples:
        if example.answer is None:
            results.append(bool(matches[start]))
        else:
            sizes = [len(option) if length_normalized else 1 for option in example.options]
            values = [likelihoods[start + row] / size for row, size in enumerate(sizes)]
            best = max(range(len(values)), key=values.__getitem__)
            results.append(best == example.answer and values[best] == values[best])
        start += len(example.options)
    return results


def right_likelihoods(task: Task, likelihoods: Sequence[float]) -> list[float]:
    """Returns each example's log-likelihood of the right answer; `likelihoods`: of each row of `rows_of`."""
    starts = [0, *itertools.accumulate(len(example.options) for example in task.examples)]
    return [likelihoods[start + (e.answer or 0)] for start, e in zip(starts, task.examples, strict=False)]
