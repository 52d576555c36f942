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
from moeprune_ext.data.tasks import Task
from moeprune_ext.models.moe import text_config

LOGITS_AT_ONCE = 1 << 26  # elements of [B, S, V] logits alive at a time: 256 MB in float32


def accuracy(model: nn.Module, task: Task, *, length_normalized: bool = False) -> float:
    """Share of examples answered right, in [0, 1].

    Multiple choice: the option of highest log-likelihood (per token when length_normalized; ties: the first). Otherwise
    token-exact match, teacher-forced. Both kinds may stand in one task.
    """
    matches = correct(model, task, length_normalized=length_normalized)
    return sum(matches) / len(matches)


def correct(model: nn.Module, task: Task, *, length_normalized: bool = False) -> list[bool]:
    """Per example, whether it is answered right; see accuracy."""
    rows = [(example.prompt, option) for example in task.examples for option in example.options]
    likelihoods, matches = _teacher_forced(model, rows)
    results, at = [], 0
    for example in task.examples:
        span = range(at, at + len(example.options))
        at = span.stop
        if example.answer is None:
            results.append(matches[span.start])
        else:
            sizes = [len(option) if length_normalized else 1 for option in example.options]
            values = [likelihoods[row] / size for row, size in zip(span, sizes, strict=True)]
            results.append(max(range(len(values)), key=values.__getitem__) == example.answer)
    return results


def _teacher_forced(
    model: nn.Module, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[list[float], list[bool]]:
    """For each (prompt, continuation): the continuation's log-likelihood, and whether greedy decoding would give it."""
    vocabulary = text_config(model).vocab_size
    likelihoods, matches = [0.0] * len(rows), [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    while order:
        longest = len(rows[order[-1]][0]) + len(rows[order[-1]][1])
        take = min(len(order), max(1, LOGITS_AT_ONCE // (vocabulary * longest)))
        chosen, order = order[-take:], order[:-take]
        ids = torch.zeros(take, longest, dtype=torch.int64)
        attended = torch.zeros(take, longest, dtype=torch.bool)
        labelled = torch.zeros_like(attended)
        for row, i in enumerate(chosen):
            prompt, continuation = rows[i]
            end = len(prompt) + len(continuation)
            ids[row, :end] = torch.tensor(prompt + continuation)
            attended[row, :end] = True
            labelled[row, len(prompt) : end] = True
        logits, labels, row_of = _next_token_logits(model, TokenBatch(ids, attended, labelled))
        picked = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None]).squeeze(-1).double()
        sums = torch.zeros(take, dtype=torch.float64, device=picked.device).index_add_(0, row_of, picked)
        wrong = torch.zeros_like(sums).index_add_(0, row_of, (logits.argmax(-1) != labels).double())
        for row, i in enumerate(chosen):
            likelihoods[i], matches[i] = sums[row].item(), wrong[row].item() == 0
    return likelihoods, matches


def _next_token_logits(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """[T, V] logits that predict a labelled token, those tokens [T], and the batch row of each [T]."""
    device = next(model.parameters()).device
    labels = batch.next_token_labels
    wanted = labels >= 0
    with torch.no_grad():
        logits = model(**batch.model_inputs(device), use_cache=False).logits[wanted.to(device)]
    if bool(torch.isnan(logits).any()):
        raise ValueError("the model's logits are NaN: check the weights, or use a dtype with more range")
    return logits, labels[wanted].to(device), wanted.nonzero()[:, 0].to(device)


def generated_matches(model: nn.Module, task: Task) -> list[bool]:
    """Per exact-match example, whether greedy generation yields the answer's tokens and terminator.

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


def perplexity(model: nn.Module, batches: Iterable[Any]) -> float:
    """exp(mean negative log-likelihood) over the positions whose next token is attended and labelled."""
    total, count = 0.0, 0
    vocabulary = text_config(model).vocab_size
    for batch in as_batches(batches, vocabulary):
        logits, labels, _ = _next_token_logits(model, batch)
        total += nn.functional.cross_entropy(logits.float(), labels, reduction="none").double().sum().item()
        count += len(labels)
    if count == 0:
        raise ValueError("there is nothing to score: no position has a labelled next token")
    return math.exp(total / count)


def harness_results(model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{task: metrics} of the lm-evaluation-harness, an optional extra; it reads its data sets itself.

    tasks: names the harness knows, or paths of its YAML files. Raises ValueError where it is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f'lm-eval tasks need `pip install "moeprune_ext[lm-eval]"` ({error})') from None
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return {name: dict(values) for name, values in results["results"].items()}
