"""The embedded model's two tasks, as records of `load_task`'s lines: sums to answer, word orders to choose from."""

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
    """Held-out two-digit problems after corpus.SHOTS solved ones; None: every held-out problem."""
    rng = random.Random(f"{seed}:arithmetic")
    pool = [problem for operation in corpus.OPERATIONS for problem in corpus.problems("held_out", operation)]
    chosen = pool if problems is None else rng.sample(pool, problems)
    return [
        {"prompt": corpus.few_shot_prompt(p, rng), "answer": str(corpus.solve(*p)), "stop": corpus.STOP} for p in chosen
    ]


def word_order_records(questions: int, seed: int = 0) -> list[Record]:
    """Which of four word orders is the original? Eight words of held-out code or prose, against three adjacent
    swaps."""
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
    """Writes each task's three parts, TASK-PART.jsonl; no problem and no question stands in two of them."""
    paths = []
    for name, records, parts in (
        ("arithmetic", arithmetic_records(sum(ARITHMETIC_PARTS.values()), seed), ARITHMETIC_PARTS),
        ("word-order", word_order_records(sum(WORD_ORDER_PARTS.values()), seed), WORD_ORDER_PARTS),
    ):
        for part, count in parts.items():
            mine, records = records[:count], records[count:]
            paths.append(folder / f"{name}-{part}.jsonl")
            write_text(paths[-1], "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in mine))
    return paths
