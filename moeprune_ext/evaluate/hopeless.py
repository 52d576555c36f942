"""A task that the full model fails at tells nothing about its experts: found before a search, with the likely cause."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeprune_ext.data.tasks import Example, Task
from moeprune_ext.evaluate.quality import accuracy, chance_level
from moeprune_ext.models.moe import MoeModel

HOPELESS = 0.02  # share of the examples right; at most so many, or no more than guessing gives, say nothing


def hopeless_reason(model: nn.Module | MoeModel, task: Task, share: float) -> str | None:
    """Says why a model fails at a task, as far as can be told; None for a task that it can do.

    A model fails that answers at most 2 % right, or no more than guessing would. Answers that are right but for the
    token behind them are found by a second look at the examples, which costs what the accuracy costs.

    Args:
        model: the full model.
        task: the examples.
        share: of them that the model answers right.
    """
    chance = chance_level(task)
    if share > max(chance, HOPELESS):
        return None
    start = f"the model answers {share:.1%} of {task.name} right"
    open_answers = [example for example in task.examples if example.answer is None]
    if not open_answers:
        return (
            f"{start}, no more than guessing ({chance:.1%}), so that little can be learnt from it; look at the "
            "prompt's format: every choice must continue the prompt, with the space before it"
        )
    ended = accuracy(model, Task(task.name, tuple(map(_without_end, open_answers))))
    if ended > max(share, HOPELESS):
        return (
            f"{start}, but {ended:.1%} if the token behind the answer does not count: the model goes on where the task "
            'expects an end; give the lines a "stop" that the prompt\'s format implies, such as a line feed'
        )
    return (
        f"{start}, so that nothing can be learnt from it; the likely cause is the prompt's format (examples in the "
        'prompt, the space before the answer, the chat template) or what has to follow the answer: "stop" says it, '
        "see data.tasks.load_task"
    )


def _without_end(example: Any) -> Example:
    return Example(example.prompt, (example.options[0][:-1] or example.options[0],), None)
