"""`moeprune eval`: accuracy on task files, perplexity on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune_ext.cli import io
from moeprune_ext.cli.arguments import Common, Data, flag
from moeprune_ext.data.tasks import load_task
from moeprune_ext.evaluate import accuracy, harness_results, perplexity

EXAMPLE = "moeprune eval MODEL --task task.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options(Data, Common):
    model: Path = flag("model directory or export", positional=True)
    task: tuple[Path, ...] = flag("JSONL of prompt, choices, answer; or prompt, answer", ())
    length_normalized: bool = flag("compare choices by log-likelihood per token", False)
    lm_eval: str | None = flag("lm-evaluation-harness tasks, a,b,c (extra: lm-eval)", None, metavar="TASKS")


def run(options: Options) -> tuple[Any, str]:
    """Returns the accuracy on each task file, the perplexity of --data and the harness's figures."""
    if not (options.task or options.data or options.lm_eval):
        raise ValueError("there is nothing to measure: give --task files, --data or --lm-eval tasks")
    tokenizer = io.tokenizer_of(options.model)
    tasks = {str(path): load_task(path, tokenizer()) for path in options.task}
    batches = io.load_data(options, tokenizer) if options.data else None
    model = io.load_model(options.model, options)
    result: dict[str, Any] = {
        name: {
            "accuracy": accuracy(model, task, length_normalized=options.length_normalized),
            "examples": len(task.examples),
        }
        for name, task in tasks.items()
    }
    lines = [f"{name}: {value['accuracy']:.2%} of {value['examples']}" for name, value in result.items()]
    if batches is not None:
        result["perplexity"] = perplexity(model, batches)
        lines.append(f"perplexity: {result['perplexity']:.4f}")
    if options.lm_eval:
        result["lm_eval"] = harness_results(model, tokenizer(), options.lm_eval.split(","))
        lines += [f"{name}: {values}" for name, values in result["lm_eval"].items()]
    return result, "\n".join(lines)
