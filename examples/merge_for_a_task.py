"""Fits a model to one task: which experts stay, and how the others merge into them (EEP, arXiv 2407.00945).

python examples/merge_for_a_task.py [MODEL TASK.jsonl KEEP]     without arguments: the model that ships with the package

Lines of the task file: {"prompt", "choices", "answer": index}, or {"prompt", "answer": text, "stop": text}.
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import moeprune_ext as mp
from moeprune_ext.demo.run import demo_folder
from moeprune_ext.demo.tasks import write_tasks


def main(folder: Path, task_file: Path, keep: int, examples: int | None, prune_iters: int, merge_iters: int) -> None:
    """Searches, prints accuracies on examples that were looked at once, exports, and measures the export."""
    model = mp.load(folder, dtype="float32")
    task = mp.load_task(task_file, AutoTokenizer.from_pretrained(folder))
    task = mp.Task(task.name, task.examples[:examples])

    found = mp.eep(model, task, keep=keep, prune_iters=prune_iters, merge_iters=merge_iters)
    print(f"full model  {found.accuracy['full']['test']:.1%}")
    print(f"pruned      {found.pruned_test_score:.1%}   {keep} experts a layer stay as they are")
    print(f"merged      {found.test_score:.1%}   and all others merge into them, where that is better")

    out = Path(tempfile.mkdtemp()) / "for-the-task"
    mp.export(folder, found, out)
    print(f"exported    {mp.accuracy(mp.load(out, dtype='float32'), task):.1%} of all examples: {out}")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), None, 40, 160)
    else:
        tasks = write_tasks(Path(tempfile.mkdtemp()))
        arithmetic = next(path for path in tasks if path.name == "arithmetic-train.jsonl")
        main(demo_folder(), arithmetic, 4, 32, 10, 4)
