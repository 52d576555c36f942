"""What a model can still do: perplexity, multiple choice, and token-exact match.

Exact match needs no generation: greedy decoding reproduces an answer's tokens and its terminator if and only if,
teacher-forced on prompt + answer + terminator, the argmax at every answer position is the answer's token (float32, rows
without a tied argmax). `generated_matches` decodes for real and exists to check that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.data.batches import TokenBatch, as_batches
from moeprune_ext.data.tasks import Row, Task, answered_right, padded_batches, rows_of
from moeprune_ext.models.moe import MoeModel, plain_model, text_config

LOGITS_AT_ONCE = 1 << 26  # elements of [B, S, V] logits alive at a time: 256 MB in float32
TOKENS_AT_ONCE = 4096  # of small vocabularies: larger batches leave a processor's cache and take twice the time


def accuracy(model: nn.Module | MoeModel, task: Task, *, length_normalized: bool = False) -> float:
    """Returns the share of examples answered right, in [0, 1].

    Multiple choice: the option of highest log-likelihood; ties: the first. Otherwise token-exact match, teacher-forced.
    Both kinds may stand in one task.

    Args:
        model: a transformers model, with experts or without, or a MoeModel.
        task: the examples.
        length_normalized: choices compare by log-likelihood per token.
    """
    matches = correct(model, task, length_normalized=length_normalized)
    return sum(matches) / len(matches)


def correct(model: nn.Module | MoeModel, task: Task, *, length_normalized: bool = False) -> list[bool]:
    """Tells for each example whether it is answered right; see accuracy."""
    likelihoods, matches = _teacher_forced(plain_model(model), rows_of(task))
    return answered_right(task, likelihoods, matches, length_normalized=length_normalized)


def _teacher_forced(model: Any, rows: Sequence[Row]) -> tuple[list[float], list[bool]]:
    """Tells of each row the continuation's log-likelihood, and whether greedy decoding would give it."""
    likelihoods, matches = [0.0] * len(rows), [False] * len(rows)
    tokens = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // text_config(model).vocab_size)
    for numbers, batch in padded_batches(rows, tokens):
        logits, labels, row_of = _next_token_logits(model, batch)
        picked = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1).double()
        sums = torch.zeros(len(numbers), dtype=torch.float64, device=picked.device).index_add_(0, row_of, picked)
        wrong = torch.zeros_like(sums).index_add_(0, row_of, (logits.argmax(-1) != labels).double())
        for row, number in enumerate(numbers):
            likelihoods[number], matches[number] = sums[row].item(), wrong[row].item() == 0
    return likelihoods, matches


def _next_token_logits(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits [T, V] that predict a labelled token, those tokens [T], and the batch row of each [T]."""
    device = next(model.parameters()).device
    labels = batch.next_token_labels
    wanted = labels >= 0
    with torch.no_grad():
        logits = model(**batch.model_inputs(device), use_cache=False).logits[wanted.to(device)]
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model's logits are NaN: check the weights, or use a dtype with more range")
    return logits, labels[wanted].to(device), wanted.nonzero()[:, 0].to(device)


def generated_matches(model: nn.Module, task: Task) -> list[bool]:
    """Tells for each exact-match example whether greedy generation gives the answer's tokens and terminator.

    Prompts of equal length are decoded together, so that no padding is needed. Slow; for checking `correct`.
    """
    results = [False] * len(task.examples)
    device = next(model.parameters()).device

    def key(i: int) -> tuple[int, int]:
        example = task.examples[i]
        return len(example.prompt), example.options[0][-1]

    if any(example.answer is not None for example in task.examples):
        raise ValueError("generation checks exact-match examples only; this task has multiple-choice ones")
    for (_, terminator), group in groupby(sorted(range(len(results)), key=key), key=key):
        members = list(group)
        prompts = torch.tensor([task.examples[i].prompt for i in members], device=device)
        longest = max(len(task.examples[i].options[0]) for i in members)
        generated = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=terminator,
            pad_token_id=terminator,
        )
        for row, i in enumerate(members):
            answer = task.examples[i].options[0]
            new = generated[row, prompts.shape[1] :].tolist()
            results[i] = tuple(new[: len(answer)]) == answer
    return results


def perplexity(model: nn.Module | MoeModel, batches: Iterable[Any]) -> float:
    """Returns exp(mean negative log-likelihood) over the positions whose next token is attended and labelled.

    Args:
        model: a transformers model, with experts or without, or a MoeModel.
        batches: see data.batches.as_batches.

    Raises:
        ValueError: where there is no such position, and for logits that are NaN.
    """
    total, count = 0.0, 0
    for batch in as_batches(batches, text_config(model).vocab_size):
        logits, labels, _ = _next_token_logits(plain_model(model), batch)
        total += nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum().item()
        count += len(labels)
    if count == 0:
        raise ValueError("there is nothing to score: no position has a labelled next token")
    return math.exp(total / count)


def harness_results(model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Runs the lm-evaluation-harness, an optional extra, which reads its data sets itself.

    Args:
        model: a transformers model.
        tokenizer: of the model.
        tasks: names that the harness knows, or paths of its YAML files.

    Returns:
        {task: metrics}.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f'lm-eval tasks need `pip install "moeprune_ext[lm-eval]"` ({error})') from None
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return {name: dict(values) for name, values in results["results"].items()}
