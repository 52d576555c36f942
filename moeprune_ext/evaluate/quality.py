"""What a model can still do: perplexity, multiple choice, and token-exact match, with intervals.

Exact match needs no generation: greedy decoding reproduces an answer's tokens and its terminator if and only if,
teacher-forced on prompt + answer + terminator, the argmax at every answer position is the answer's token (float32, rows
without a tied argmax). `generated_matches` decodes for real and exists to check that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from moeprune_ext.data.batches import TokenBatch, as_batches
from moeprune_ext.data.tasks import Row, Task, answered_right, padded_batches, rows_of
from moeprune_ext.intervals import Interval, exp_interval, wilson
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
    return accuracy_interval(model, task, length_normalized=length_normalized).value


def accuracy_interval(model: nn.Module | MoeModel, task: Task, *, length_normalized: bool = False) -> Interval:
    """Returns the accuracy with its standard error and Wilson's 95 % interval; see `accuracy`.

    Wilson's interval, because a bootstrap's has width 0 where every example or none is answered right.

    Args:
        model: see `accuracy`, as the others.
    """
    return share_right(correct(model, task, length_normalized=length_normalized))


def share_right(right: Sequence[bool]) -> Interval:
    """Returns the accuracy of examples that are answered right or not, with Wilson's interval."""
    return wilson(sum(right), len(right))


def chance_level(task: Task) -> float:
    """Returns the accuracy of guessing: the mean of 1 / options; an answer to reproduce exactly counts as 0."""
    shares = [0.0 if example.answer is None else 1 / len(example.options) for example in task.examples]
    return sum(shares) / len(shares)


def correct(model: nn.Module | MoeModel, task: Task, *, length_normalized: bool = False) -> list[bool]:
    """Tells for each example whether it is answered right; see accuracy."""
    likelihoods, matches = _teacher_forced(plain_model(model), rows_of(task))
    return answered_right(task, likelihoods, matches, length_normalized=length_normalized)


def _teacher_forced(model: Any, rows: Sequence[Row]) -> tuple[list[float], list[bool]]:
    """Tells of each row the continuation's log-likelihood, and whether greedy decoding would give it."""
    likelihoods, matches = [0.0] * len(rows), [False] * len(rows)
    for numbers, batch in padded_batches(rows, tokens_at_once(model)):
        logits, labels, row_of = next_token_logits(model, batch)
        picked = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1).double()
        sums = torch.zeros(len(numbers), dtype=torch.float64, device=picked.device).index_add_(0, row_of, picked)
        wrong = torch.zeros_like(sums).index_add_(0, row_of, (logits.argmax(-1) != labels).double())
        for row, number in enumerate(numbers):
            likelihoods[number], matches[number] = sums[row].item(), wrong[row].item() == 0
    return likelihoods, matches


def tokens_at_once(model: Any) -> int:
    """Returns how many tokens, padding included, a batch of this model has."""
    return min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // int(text_config(model).vocab_size))


def next_token_logits(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits [T, V] that predict a labelled token, those tokens [T], and the batch row of each [T]."""
    labels = batch.next_token_labels
    wanted = labels >= 0
    logits = logits_at(model, batch, wanted)
    return logits, labels[wanted].to(logits.device), wanted.nonzero()[:, 0].to(logits.device)


def logits_at(model: Any, batch: TokenBatch, wanted: Tensor) -> Tensor:
    """Returns a transformers model's logits [T, V] at the T positions of a batch that `wanted`, bool [B, S], marks.

    Raises:
        ValueError: for logits that are NaN.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(**batch.model_inputs(device), use_cache=False).logits
    logits = logits[wanted.to(logits.device)]
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model's logits are NaN: check the weights, or use a dtype with more range")
    return logits


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
    return perplexity_interval(model, batches).value


def perplexity_interval(model: nn.Module | MoeModel, batches: Iterable[Any]) -> Interval:
    """Returns the perplexity with its standard error and its 95 % interval, a bootstrap over sequences.

    Args:
        model: see `perplexity`, as `batches`.
    """
    return exp_interval(*sequence_nll(model, batches))


def sequence_nll(model: nn.Module | MoeModel, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Returns each sequence's negative log-likelihood, summed, float64 [N], and its positions, float64 [N].

    Sequences without a labelled next token are left out. See `perplexity`.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in as_batches(batches, text_config(model).vocab_size):
        logits, labels, row_of = next_token_logits(plain_model(model), batch)
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none").double()
        empty = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=losses.device)
        sums.append(empty.index_add(0, row_of, losses).cpu())
        counts.append(empty.index_add(0, row_of, torch.ones_like(losses)).cpu())
    weights = torch.cat(counts)
    if not bool(weights.any()):
        raise ValueError("there is nothing to score: no position has a labelled next token")
    return torch.cat(sums)[weights > 0], weights[weights > 0]
