"""Two models on the same examples and the same text: how much worse is the pruned one, and can the data show it?

Differences are paired: each example, each sequence is its own control. Accuracies are tested by McNemar's exact test,
which looks at the examples that one model alone answers right. On text, the model is also compared with the reference
position by position: ESAP (1 - mean total-variation distance), KL divergence, and agreement of the likeliest tokens, as
candidates/evaluator.py defines them. Both models are loaded; nothing here asks what made the one of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from moeprune_ext.data.batches import TokenBatch, as_batches, joined, split_sequences
from moeprune_ext.data.tasks import Task
from moeprune_ext.evaluate.quality import correct, logits_at, share_right, tokens_at_once
from moeprune_ext.intervals import Interval, bootstrap_interval, exp_interval, paired_gain
from moeprune_ext.models.moe import MoeModel, plain_model, text_config
from moeprune_ext.ops.overlap import overlap

SIGNIFICANT = 0.05  # a p-value below this is called a difference
POSITIONS = ("esap", "kl_pq", "top1_agree")  # metrics of positions against the reference


@dataclass(frozen=True)
class AnswersCompared:
    """Two models' answers to the same examples.

    Attributes:
        accuracy: the model's.
        reference: the reference's.
        difference: the model's minus the reference's, paired bootstrap over examples.
        only_model: examples that the model alone answers right.
        only_reference: examples that the reference alone answers right.
        p_value: of McNemar's exact test.
        examples: all of them.
    """

    accuracy: Interval
    reference: Interval
    difference: Interval
    only_model: int
    only_reference: int
    p_value: float
    examples: int

    @property
    def verdict(self) -> str:
        """Says in one sentence whether the examples show a difference."""
        if not self.only_model + self.only_reference:
            return f"answers the same {self.examples} examples right and wrong as the reference"
        gain, low, high = (100 * end for end in (self.difference.value, self.difference.low, self.difference.high))
        numbers = f"{gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, McNemar p = {self.p_value:.2g}"
        if self.p_value >= SIGNIFICANT:
            return f"no difference from the reference that {self.examples} examples can show ({numbers})"
        return f"answers {'more' if gain > 0 else 'fewer'} examples right than the reference ({numbers})"

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {**_as_json(self), "verdict": self.verdict}


@dataclass(frozen=True)
class TextCompared:
    """Two models on the same text.

    Attributes:
        perplexity: the model's.
        reference: the reference's.
        nll_difference: per token, in nats, the model's minus the reference's, paired bootstrap over sequences.
        ratio: of the perplexities, exp of that difference.
        esap: expected acceptance of the model as a draft for the reference, 1 - mean total-variation distance.
        kl_pq: KL(reference || model), in nats.
        top1_agree: share of positions with the same likeliest token.
        sequences: of the text.
        positions: attended and labelled positions, over which the last three average.
    """

    perplexity: Interval
    reference: Interval
    nll_difference: Interval
    ratio: Interval
    esap: Interval
    kl_pq: Interval
    top1_agree: Interval
    sequences: int
    positions: int

    @property
    def verdict(self) -> str:
        """Says in one sentence whether the text shows a difference of perplexity, and how alike the models are."""
        low, high = self.ratio.low, self.ratio.high
        if low > 1 or high < 1:
            says = f"perplexity {'above' if low > 1 else 'below'} the reference's"
        else:  # or no interval, as of a single sequence
            says = f"no difference of perplexity that {self.sequences} sequence{'s'[: self.sequences != 1]} can show"
        return f"{says}, {self.ratio:.4f} times; it shares {self.esap:.1%} of the reference's distribution (ESAP)"

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {**_as_json(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; None for what was not asked for."""

    answers: AnswersCompared | None = None
    text: TextCompared | None = None


def _as_json(compared: Any) -> dict[str, Any]:
    values = {field.name: getattr(compared, field.name) for field in fields(compared)}
    return {name: value.as_json() if isinstance(value, Interval) else value for name, value in values.items()}


def compare(
    model: nn.Module | MoeModel,
    reference: nn.Module | MoeModel,
    *,
    task: Task | None = None,
    batches: Iterable[Any] | None = None,
    length_normalized: bool = False,
) -> Comparison:
    """Compares a model with a reference, such as a pruned one with its original, on the same examples or text.

    Args:
        model: a transformers model, or a MoeModel.
        reference: likewise, with the same tokenizer.
        task: examples that both answer.
        batches: text that both read, see data.batches.as_batches.
        length_normalized: choices compare by log-likelihood per token.

    Raises:
        ValueError: if neither a task nor batches are given, for models of different vocabularies, and for logits that
            are NaN.
    """
    if task is None and batches is None:
        raise ValueError("there is nothing to compare on: give a task or batches")
    answers = text = None
    if task is not None:
        right, other = (correct(one, task, length_normalized=length_normalized) for one in (model, reference))
        answers = compare_answers(right, other)
    if batches is not None:
        text = compare_text(model, reference, batches)
    return Comparison(answers, text)


def compare_answers(right: Sequence[bool], reference: Sequence[bool]) -> AnswersCompared:
    """Compares which of the same examples two models answer right.

    Args:
        right: the model's.
        reference: the reference's.
    """
    if len(right) != len(reference) or not right:
        raise ValueError(f"expected answers to the same examples, got {len(right)} and {len(reference)}")
    only_model = sum(a and not b for a, b in zip(right, reference, strict=True))
    only_reference = sum(b and not a for a, b in zip(right, reference, strict=True))
    differ = only_model + only_reference
    return AnswersCompared(
        accuracy=share_right(right),
        reference=share_right(reference),
        difference=paired_gain(torch.tensor(right), torch.tensor(reference)),
        only_model=only_model,
        only_reference=only_reference,
        p_value=float(binomtest(only_model, differ).pvalue) if differ else 1.0,
        examples=len(right),
    )


def compare_text(model: nn.Module | MoeModel, reference: nn.Module | MoeModel, batches: Iterable[Any]) -> TextCompared:
    """Runs two models on the same text, teacher-forced; see `compare`."""
    size, other = (int(text_config(one).vocab_size) for one in (model, reference))
    if size != other:
        raise ValueError(
            f"the models' vocabularies have {size} and {other} tokens; compare models of one tokenizer and vocabulary"
        )
    sequences = split_sequences(as_batches(batches, size))
    if not sequences:
        raise ValueError("there is nothing to score: no position is attended and labelled")
    parts = [
        _sums(plain_model(model), plain_model(reference), batch) for batch in joined(sequences, tokens_at_once(model))
    ]
    sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    scored, predicted = sums["scored"], sums["predicted"]
    by_position = {name: bootstrap_interval(sums[name], scored) for name in POSITIONS}
    difference = sums["nll"] - sums["reference_nll"]
    return TextCompared(
        perplexity=exp_interval(sums["nll"], predicted),
        reference=exp_interval(sums["reference_nll"], predicted),
        nll_difference=bootstrap_interval(difference, predicted),
        ratio=exp_interval(difference, predicted),
        **by_position,
        sequences=len(scored),
        positions=int(scored.sum()),
    )


def _sums(model: Any, reference: Any, batch: TokenBatch) -> dict[str, Tensor]:
    """Returns sums over each sequence of a batch, float64 [B]: the metrics, and how many positions are behind them."""
    wanted = batch.wanted
    p = logits_at(reference, batch, wanted)
    q = logits_at(model, batch, wanted).to(p.device)
    if p.dtype != q.dtype:
        p, q = p.float(), q.float()
    rows = wanted.nonzero()[:, 0].to(p.device)
    labels, scored = batch.next_token_labels[wanted].to(p.device), batch.scored[wanted].to(p.device).double()
    each = overlap(p, q, labels=labels, metrics=(*POSITIONS, "nll"))
    values = {name: torch.where(scored > 0, each[name][0].double(), 0.0) for name in POSITIONS}
    values["nll"] = each["nll"][0].double()
    values["reference_nll"] = overlap(p, p, labels=labels, metrics=("nll",))["nll"][0].double()
    values |= {"scored": scored, "predicted": (labels >= 0).double()}
    empty = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=p.device)
    return {name: empty.index_add(0, rows, value).cpu() for name, value in values.items()}
