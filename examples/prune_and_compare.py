"""Prunes a model by three scores of experts, and compares each pruned model with the full one.

python examples/prune_and_compare.py [MODEL TEXT...]      without arguments: the model that ships with the package
"""

import ast
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.data.batches import load_batches
from moeprune_ext.demo.run import demo_folder

CRITERIA = ("reap", "seer", "man")


def main(folder: Path, texts: list[str], sequence_length: int) -> None:
    """Prints a row per score, then exports the best plan, repaired, and loads it again."""
    model = mp.load(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = load_batches(texts, tokenizer, sequence_length=sequence_length, sequences=16)
    calibration, choosing, test = batches[:8], batches[8:12], batches[12:]

    stats = mp.calibrate(model, calibration)
    plans = {name: mp.uniform_plan(mp.score_experts(stats, name), sparsity=0.5) for name in CRITERIA}
    scores = mp.CandidateEvaluator(model, choosing).evaluate(list(plans.values()), metrics=("esap", "kl_pq"))
    print("criterion  ESAP    KL(full, pruned)")
    for name, score in zip(plans, scores, strict=True):
        print(f"{name:9}  {score.esap:.4f}  {score.kl_pq:.4f}")
    best = max(zip(plans.values(), scores, strict=True), key=lambda pair: pair[1].esap)[0]

    repaired = mp.repair(model, best, calibration).plan
    reporter = mp.CandidateEvaluator(model, test)  # on text that no choice depended on
    before, after = (score.esap for score in reporter.evaluate([best, repaired]))
    print(f"best: {best.criterion}; test ESAP {before:.4f}, repaired {after:.4f}")

    out = Path(tempfile.mkdtemp()) / "pruned"
    mp.export(folder, repaired, out)
    pruned = mp.load(out, dtype="float32")
    full, ours = mp.perplexity(model, test), mp.perplexity(pruned, test)
    print(f"perplexity {full:.2f}, of the pruned checkpoint {ours:.2f}: {out}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), sys.argv[2:], 2048)
    else:
        main(demo_folder(), [ast.__file__], 256)
