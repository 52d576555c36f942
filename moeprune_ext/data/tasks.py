"""Task files become examples of token ids, their splits, and the sequences that score them."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeprune_ext.data.batches import TokenBatch
from moeprune_ext.files import read_json_lines


@dataclass(frozen=True)
class Example:
    """prompt: token ids. options: the choices' token ids, or the one reference answer with its terminator.

    answer: index of the right choice, or None when `options` is one answer to reproduce exactly.
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

    Lines: {"prompt", "choices": [text, ...], "answer": index}, or {"prompt", "answer": text} with an optional "stop" (a
    text of one token that ends the answer; the end-of-text token when absent). Tokens = tokenizer(prompt) +
    tokenizer(answer without special tokens) + terminator; no space is inserted. Raises ValueError naming the line.
    """
    path = Path(path)
    examples = [_example(record, place, tokenizer) for record, place in read_json_lines(path)]
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return Task(path.stem, tuple(examples))


def make_task(name: str, records: Iterable[dict[str, Any]], tokenizer: Any) -> Task:
    """A Task from records in the form of load_task's lines."""
    examples = tuple(_example(record, f"{name}[{number}]", tokenizer) for number, record in enumerate(records))
    if not examples:
        raise ValueError(f"task {name} holds no examples")
    return Task(name, examples)


def _example(record: dict[str, Any], place: str, tokenizer: Any) -> Example:
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
    """(train, valid, test): those not given are cut from `task`, a quarter each.

    Which examples, is drawn by `seed`; equal ones stay in one part, and their order is the task's. Raises ValueError
    for a task of too few different examples; warns of given parts that share some.
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


TOKENS_AT_ONCE = 4096  # of a batch that is calibrated on


def answer_batches(task: Task) -> list[TokenBatch]:
    """Prompts with their right answers, padded on the right, for calibration."""
    rows = sorted((e.prompt + e.options[0] for e in right_answers(task).examples), key=len)
    batches = []
    while rows:
        longest = len(rows[-1])
        take = max(1, TOKENS_AT_ONCE // longest)
        chosen, rows = rows[-take:], rows[:-take]
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        attended = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for at, row in enumerate(chosen):
            ids[at, : len(row)] = torch.tensor(row)
            attended[at, : len(row)] = True
        batches.append(TokenBatch(ids, attended, attended))
    return batches


def sequences(task: Task, fitness: str) -> list[dict[str, torch.Tensor]]:
    """What the evaluator of a fitness ("accuracy", or a metric of AnswerFitness) runs: examples' options behind their
    prompts, or right answers alone, labelled where they are scored. Shorter ones come first, so that neighbours, the
    evaluator's units of work, go through a layer as one batch."""
    ahead = 1 if fitness == "esap" else 0
    batches = []
    rows = _rows(task if fitness == "accuracy" else right_answers(task))
    for prompt, continuation in sorted(rows, key=lambda row: len(row[0]) + len(row[1])):
        tokens = prompt + continuation
        labels = torch.zeros(1, len(tokens), dtype=torch.bool)
        labels[0, len(prompt) - ahead : len(tokens) - ahead] = True
        batches.append({"input_ids": torch.tensor([tokens]), "labels_mask": labels})
    return batches


def _rows(task: Task) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(example.prompt, option) for example in task.examples for option in example.options]


def right_answers(task: Task) -> Task:
    """The task with the right option of every example alone, to be reproduced."""
    return Task(task.name, tuple(Example(e.prompt, (e.options[e.answer or 0],), None) for e in task.examples))
