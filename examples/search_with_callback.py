"""Searches how many experts each layer should lose, and hears of every generation.

python examples/search_with_callback.py [MODEL TEXT...]      without arguments: the model that ships with the package

The callback is where a tracker goes (docs/how-to/tracking.md); here it prints.
"""

import ast
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.data.batches import load_batches
from moeprune_ext.demo.run import demo_folder


def tell(record: dict[str, Any]) -> None:
    """Prints what a generation found."""
    print(f"generation {record['generation']}: {record['evaluated']} new plans; best so far {record['best']:.4f}")


def main(folder: Path, texts: list[str], sequence_length: int, generations: int) -> None:
    """Searches, then compares the plan with the uniform one on other text."""
    model = mp.load(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = load_batches(texts, tokenizer, sequence_length=sequence_length, sequences=16)

    scores = mp.score_experts(mp.calibrate(model, batches[:8]), "seer")
    evaluator = mp.CandidateEvaluator(model, batches[8:12])
    run = Path(tempfile.mkdtemp()) / "run"  # give a fixed directory, and a stopped search goes on there
    found = mp.evolve(
        evaluator, scores, 0.5, population=8, generations=generations, screen=32, out=run, on_generation=tell
    )
    print("kept per layer:", [len(experts) for experts in found.plan.kept.values()])

    other = mp.CandidateEvaluator(model, batches[12:])
    uniform, searched = (s.esap for s in other.evaluate([mp.uniform_plan(scores, 0.5), found.plan]))
    print(f"ESAP on text that was not searched on: uniform {uniform:.4f}, searched {searched:.4f}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), sys.argv[2:], 2048, 20)
    else:
        main(demo_folder(), [ast.__file__], 256, 4)
