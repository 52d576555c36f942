"""Turns text, JSONL, chat data and token files into batches of tokens with attention and label masks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moeprune_ext.files import read_json_lines

TokenRow = tuple[Sequence[int], int]  # token ids, and how many of them are prompt


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one forward pass, on the CPU.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: bool [B, S], False at padding.
        labels_mask: bool [B, S], True where the distribution is scored: at response tokens where the data tells prompt
            and response apart, else everywhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels_mask: Tensor

    @property
    def scored(self) -> Tensor:
        """Positions whose own distribution counts, attended and labelled: bool [B, S]."""
        return self.attention_mask & self.labels_mask

    @property
    def wanted(self) -> Tensor:
        """Positions whose logits a metric reads, scored or predicting a labelled token: bool [B, S]."""
        return self.scored | (self.next_token_labels >= 0)

    @property
    def next_token_labels(self) -> Tensor:
        """The next token, if it is attended and labelled and this position attended, else -100: int64 [B, S].

        The last column is always -100.
        """
        labels = torch.full_like(self.input_ids, -100)
        predicts = self.attention_mask[:, :-1] & self.scored[:, 1:]
        labels[:, :-1] = torch.where(predicts, self.input_ids[:, 1:], labels[:, :-1])
        return labels

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the keyword arguments of a causal LM's forward.

        Positions count attended tokens only, so padding on the left shifts none.
        """
        inputs = {"input_ids": self.input_ids.to(device)}
        if not bool(self.attention_mask.all()):
            mask = self.attention_mask.to(device)
            inputs["attention_mask"] = mask.long()
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def part(self, rows: Any, columns: slice = slice(None)) -> TokenBatch:
        """Returns the batch of some rows and columns; `rows` is anything that indexes a tensor."""
        return TokenBatch(*(tensor[rows, columns] for tensor in vars(self).values()))


def as_batches(batches: Iterable[Any], vocab_size: int | None = None) -> list[TokenBatch]:
    """Checks what the public functions accept as `batches`, and makes TokenBatches of it.

    Args:
        batches: one batch or several. A batch is a TokenBatch; a mapping with `input_ids`, integers [B, S], and
            optionally `attention_mask` and `labels_mask`, [B, S], nonzero where attended and scored; or an `input_ids`
            tensor.
        vocab_size: tokens that the model knows; None: not checked.

    Raises:
        ValueError: if there is no data, no attended token, a tensor of another shape or dtype, or a token id outside
            the vocabulary.
    """
    if isinstance(batches, Tensor | Mapping | TokenBatch):
        batches = [batches]
    checked = [_as_batch(item, number, vocab_size) for number, item in enumerate(batches)]
    if not any(bool(batch.attention_mask.any()) for batch in checked):
        raise ValueError("there is no data: no batch holds an attended token")
    return checked


def as_domains(batches: Iterable[Any], vocab_size: int | None = None) -> dict[str, list[TokenBatch]]:
    """Checks data that may come in domains; all of it is the domain "all" where it does not.

    Args:
        batches: {domain: what as_batches accepts}, or what as_batches accepts. A mapping with `input_ids` is one batch.
        vocab_size: see as_batches.

    Raises:
        ValueError: as as_batches, naming the domain.
    """
    if not isinstance(batches, Mapping) or "input_ids" in batches or not batches:
        return {"all": as_batches(batches, vocab_size)}
    domains = {}
    for name, its_batches in batches.items():
        try:
            domains[str(name)] = as_batches(its_batches, vocab_size)
        except ValueError as error:
            raise ValueError(f"domain {name}: {error}") from None
    return domains


def without_padding(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Leaves out rows that are all padding, columns of padding at either end, and batches that are all padding."""
    trimmed = []
    for batch in batches:
        attended_rows, attended_columns = batch.attention_mask.any(1), batch.attention_mask.any(0).nonzero()[:, 0]
        if len(attended_columns):
            trimmed.append(batch.part(attended_rows, slice(int(attended_columns[0]), int(attended_columns[-1]) + 1)))
    return trimmed


def split_sequences(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Makes a batch [1, S] of every sequence that has something to score, without the padding at either end."""
    wanted = [(batch, batch.wanted.any(1).nonzero()[:, 0].tolist()) for batch in batches]
    return without_padding([batch.part(slice(row, row + 1)) for batch, rows in wanted for row in rows])


def _as_batch(item: Any, number: int, vocab_size: int | None) -> TokenBatch:
    tensors = vars(item) if isinstance(item, TokenBatch) else item if isinstance(item, Mapping) else {"input_ids": item}
    ids = tensors.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"batch {number}: input_ids must be an integer tensor [batch, sequence], got {_describe(ids)}")
    masks = []
    for name in ("attention_mask", "labels_mask"):
        mask = tensors.get(name)
        mask = torch.ones_like(ids) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ValueError(f"batch {number}: {name} must have the shape {tuple(ids.shape)} of input_ids")
        masks.append(mask.to("cpu") != 0)
    ids = ids.to("cpu", torch.int64)
    if vocab_size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"batch {number}: token ids from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
            f"{vocab_size}; was the data tokenised for another model?"
        )
    return TokenBatch(ids, masks[0], masks[1])


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def fingerprint_of(batches: Iterable[Any]) -> str:
    """Returns the data_fingerprint of `batches` (see as_batches) split into sequences, as the evaluator splits them."""
    return data_fingerprint(split_sequences(as_batches(batches)))


def data_fingerprint(batches: Sequence[TokenBatch]) -> str:
    """Identifies tokens, masks and their split into batches; a search may only go on with the same ones."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.input_ids.shape)).encode())
        for tensor in (batch.input_ids, batch.attention_mask, batch.labels_mask):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pack(
    tokenizer: Any, texts: Iterable[str], *, sequence_length: int, sequences: int, batch_size: int = 1
) -> list[TokenBatch]:
    """Joins texts by the end-of-text token and cuts the result into rows.

    Args:
        tokenizer: a transformers tokenizer.
        texts: read only as far as needed.
        sequence_length: tokens of every row.
        sequences: rows, at most.
        batch_size: rows of a batch, at most.

    Raises:
        ValueError: if the texts do not fill one row.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"] + separator
        if len(stream) >= sequence_length * sequences:
            break
    rows = min(sequences, len(stream) // sequence_length)
    if rows == 0:
        raise ValueError(
            f"the data has {len(stream)} tokens, less than one sequence of {sequence_length}; give more text or a "
            "smaller sequence length"
        )
    ids = torch.tensor(stream[: rows * sequence_length]).view(rows, sequence_length)
    return as_batches(list(ids.split(batch_size)))


def load_batches(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    sequence_length: int = 2048,
    sequences: int = 64,
    batch_size: int = 1,
    labels: bool = True,
) -> list[TokenBatch]:
    """Reads data files into token batches.

    A `.jsonl` line holds "text"; or "prompt" and "response"; or "messages", to which the chat template is applied and
    whose last assistant message is the response. Texts are packed into rows of exactly `sequence_length` tokens. A
    prompt with its response is a row of its own, padded on the right and cut at `sequence_length`; only response tokens
    are labelled, and a prompt that fills the row leaves it out. `.safetensors` holds `input_ids` [N, S] and optionally
    the masks of a TokenBatch. Any other file is one text.

    Args:
        paths: files.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a row, at most.
        sequences: rows in all, at most. Token files count first, then prompts with responses, then texts.
        batch_size: rows of a batch, at most.
        labels: False for calibration, where every token counts: messages need no assistant among them, and rows that
            are too long are cut, never left out.

    Raises:
        ValueError: naming the file, for what cannot be read, or if no row is usable.
    """
    texts: list[str] = []
    rows: list[TokenRow] = []
    batches: list[TokenBatch] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"there is no data file {path}")
        if path.suffix == ".safetensors":
            batches += _token_file(path, batch_size, sequences - sum(len(batch.input_ids) for batch in batches))
        elif path.suffix == ".jsonl":
            for record, place in read_json_lines(path):
                if isinstance(record.get("text"), str):
                    texts.append(record["text"])
                else:
                    rows.append(_row(record, place, tokenizer, labels))
        else:
            texts.append(_read_text(path))
    remaining = sequences - sum(len(batch.input_ids) for batch in batches)
    rows = [(tokens[:sequence_length], prompt) for tokens, prompt in rows if prompt < min(len(tokens), sequence_length)]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    for start in range(0, min(len(rows), max(remaining, 0)), batch_size):
        batches.append(padded(rows[start : min(start + batch_size, remaining)], pad_id))
    remaining -= len(rows)
    if texts and remaining > 0:
        batches += pack(tokenizer, texts, sequence_length=sequence_length, sequences=remaining, batch_size=batch_size)
    if not batches:
        raise ValueError(f"the data files hold no usable sequence: {', '.join(map(str, paths))}")
    return batches


def padded(rows: Sequence[TokenRow], pad_id: int = 0) -> TokenBatch:
    """Makes one batch of rows, padded on the right; the tokens after a row's prompt are labelled."""
    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attended, labelled = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        attended[i, : len(tokens)] = True
        labelled[i, prompt : len(tokens)] = True
    return TokenBatch(ids, attended, labelled)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text file: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _token_file(path: Path, batch_size: int, rows: int) -> list[TokenBatch]:
    """Reads at most `rows` rows of a safetensors file."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "input_ids" not in tensors:
        raise ValueError(f"{path} has no tensor `input_ids` (it has: {', '.join(sorted(tensors)) or 'none'})")
    try:
        whole = as_batches([tensors])[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [
        whole.part(slice(start, min(start + batch_size, rows)))
        for start in range(0, min(len(whole.input_ids), rows), batch_size)
    ]


def _row(record: dict[str, Any], place: str, tokenizer: Any, labels: bool) -> TokenRow:
    """Returns the row of a JSONL record with a response; without labels nothing counts as prompt."""
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        prompt = tokenizer(record["prompt"])["input_ids"]
        response = tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        return prompt + response + end, len(prompt) if labels else 0
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return _chat_row(messages, place, tokenizer, labels)
    raise ValueError(f'{place} needs "text", "prompt" and "response", or "messages"; it has: {", ".join(record)}')


def _chat_row(messages: list[Any], place: str, tokenizer: Any, labels: bool) -> TokenRow:
    """Returns the row of a chat up to the end of its last assistant message, or of all of it without labels."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{place} has chat messages, but the tokenizer has no chat template")
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
        raise ValueError(f'{place}: every message must be an object with a "role" and a text "content"')
    if not labels:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(whole, add_special_tokens=False)["input_ids"], 0
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError(f"{place} has no assistant message after a first one, so no response to score")
    prompt = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{place}: the chat template writes the prompt differently once it is answered; "
            'give "prompt" and "response" instead'
        )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt_ids + tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"], len(prompt_ids)
