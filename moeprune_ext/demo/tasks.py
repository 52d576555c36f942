"""The embedded model's two tasks, as records that `load_task` reads: sums to answer, word orders to choose from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from moeprune_ext.demo import corpus
from moeprune_ext.files import write_text

# Examples of the training, validation and test parts that `write_tasks` makes.
ARITHMETIC_PARTS = {"train": 160, "valid": 300, "test": 700}
WORD_ORDER_PARTS = {"train": 80, "valid": 120, "test": 300}

Record = dict[str, Any]


def arithmetic_records(problems: int | None, seed: int = 0) -> list[Record]:
    """Returns held-out two-digit problems, each after corpus.SHOTS solved ones.

    Args:
        problems: how many, drawn by `seed`; None: every held-out problem.
        seed: decides which problems, and the solved ones.
    """
    rng = random.Random(f"{seed}:arithmetic")
    pool = [problem for operation in corpus.OPERATIONS for problem in corpus.problems("held_out", operation)]
    chosen = pool if problems is None else rng.sample(pool, problems)
    return [
        {"prompt": corpus.few_shot_prompt(p, rng), "answer": str(corpus.solve(*p)), "stop": corpus.STOP} for p in chosen
    ]


def word_order_records(questions: int, seed: int = 0) -> list[Record]:
    """Returns questions that ask which of four word orders is the original.

    The choices are eight words of held-out code or prose, and the same with two neighbours swapped, three times.
    """
    rng = random.Random(f"{seed}:word order")
    records: list[Record] = []
    pools = [corpus.code_documents("evaluation"), corpus.prose_documents("evaluation")]
    pools = [[text for text in pool if len(text) > 1500] for pool in pools]
    while len(records) < questions:
        text = rng.choice(pools[len(records) % 2])
        start = text.find(" ", rng.randrange(200, len(text) - 600))
        words = text[start : start + 600].split()[:8]
        if len(words) < 8:
            continue
        swaps = [words[:i] + [words[i + 1], words[i]] + words[i + 2 :] for i in rng.sample(range(7), 3)]
        choices = [" " + " ".join(order) for order in [words, *swaps]]
        if len(set(choices)) == 4:
            order = rng.sample(range(4), 4)
            choices = [choices[i] for i in order]
            records.append({"prompt": text[start - 200 : start], "choices": choices, "answer": order.index(0)})
    return records


def write_tasks(folder: Path, seed: int = 0) -> list[Path]:
    """Writes each task's three parts as TASK-PART.jsonl, without an example in common, and returns the paths."""
    paths = []
    for name, records, parts in (
        ("arithmetic", arithmetic_records(sum(ARITHMETIC_PARTS.values()), seed), ARITHMETIC_PARTS),
        ("word-order", word_order_records(sum(WORD_ORDER_PARTS.values()), seed), WORD_ORDER_PARTS),
    ):
        for part, count in parts.items():
            part_records, records = records[:count], records[count:]
            paths.append(folder / f"{name}-{part}.jsonl")
            write_text(paths[-1], "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part_records))
    return paths
