"""The lm-evaluation-harness, an optional extra: its tasks, which it reads itself, and what it reports of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moeprune_ext.tables import text_table

MATCHES = 5  # names that an error offers in the place of an unknown one


def harness_tasks(names: Sequence[str]) -> list[str]:
    """Checks names of the harness's tasks, before a model is loaded.

    Args:
        names: tasks, groups, tags, patterns such as "mmlu_*", or paths of the harness's YAML files.

    Returns:
        The names, patterns replaced by what they match.

    Raises:
        ValueError: if the harness is not installed, and for a name that it does not know, with the nearest it does.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing(error) from None
    manager = TaskManager()
    chosen: list[str] = []
    for name in map(str.strip, names):
        matches = [name] if Path(name).is_file() or name in manager.all_tasks else manager.match_tasks([name])
        if not name or not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, MATCHES)
            meant = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ValueError(f"the lm-evaluation-harness has no task {name!r}; {meant}")
        chosen += matches
    return list(dict.fromkeys(chosen))


def harness_results(model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Runs the harness.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        tasks: see `harness_tasks`.

    Returns:
        {task: what the harness reports, such as "acc,none" and "acc_stderr,none"}.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise _missing(error) from None
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return {name: dict(values) for name, values in results["results"].items()}


def harness_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Writes what the harness reports as a table: task, metric, and of each model the value and its standard error.

    Args:
        results: {model: what harness_results returned}.
    """
    models = list(results)
    header = ["task", "filter", "metric", *(f"{model} ± stderr" for model in models)]
    measured = {model: dict(_figures(results[model])) for model in models}
    keys = dict.fromkeys(key for figures in measured.values() for key in figures)
    return text_table(header, [[*key, *(measured[model].get(key, "") for model in models)] for key in keys])


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Yields (task, filter, metric) and the figure with its standard error."""
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or metric == "sample_len":
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            yield (task, kind, metric), f"{value:.4f}{shown}"


def _missing(error: ImportError) -> ValueError:
    return ValueError(f'lm-eval tasks need `pip install "moeprune_ext[lm-eval]"` ({error})')
