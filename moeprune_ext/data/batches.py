"""Text, JSONL, chat data or token files -> token batches with attention and label masks."""

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


@dataclass(frozen=True)
class TokenBatch:
    """One forward pass of tokens.

    input_ids: int64 [B, S]. attention_mask: bool [B, S], False at padding. labels_mask: bool [B, S], True where the
    distribution is scored (response tokens where data has a prompt/response split, else every token).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels_mask: Tensor

    @property
    def scored(self) -> Tensor:
        """Positions whose own distribution counts: attended and labelled. bool [B, S]."""
        return self.attention_mask & self.labels_mask

    @property
    def wanted(self) -> Tensor:
        """Positions whose logits a metric reads: scored ones, and those that predict a labelled token. bool [B, S]."""
        return self.scored | (self.next_token_labels >= 0)

    @property
    def next_token_labels(self) -> Tensor:
        """int64 [B, S]: the next token where it is attended and labelled and this position is attended, else -100.

        The last column is always -100.
        """
        labels = torch.full_like(self.input_ids, -100)
        predicts = self.attention_mask[:, :-1] & self.scored[:, 1:]
        labels[:, :-1] = torch.where(predicts, self.input_ids[:, 1:], labels[:, :-1])
        return labels

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Keyword arguments of a causal LM's forward; positions count attended tokens, so left padding shifts
        nothing."""
        inputs = {"input_ids": self.input_ids.to(device)}
        if not bool(self.attention_mask.all()):
            mask = self.attention_mask.to(device)
            inputs["attention_mask"] = mask.long()
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return inputs


def as_batches(batches: Iterable[Any], vocab_size: int | None = None) -> list[TokenBatch]:
    """Checks and normalises what the public functions accept as `batches`.

    Each item is a TokenBatch, a mapping with `input_ids` [B, S] and optional `attention_mask` and `labels_mask` [B,
    S], or an `input_ids` tensor. Raises ValueError for no data, no attended token, wrong shapes or ids outside the
    vocabulary.
    """
    if isinstance(batches, Tensor | Mapping | TokenBatch):
        batches = [batches]
    found = [_as_batch(item, number, vocab_size) for number, item in enumerate(batches)]
    if not found or not any(bool(batch.attention_mask.any()) for batch in found):
        raise ValueError("there is no data: no batch holds an attended token")
    return found


def without_padding(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """The batches without rows that are all padding, and without columns of padding at either end; empty ones are left
    out."""
    found = []
    for batch in batches:
        rows, columns = batch.attention_mask.any(1), batch.attention_mask.any(0).nonzero()[:, 0]
        if len(columns):
            inside = slice(int(columns[0]), int(columns[-1]) + 1)
            parts = (batch.input_ids, batch.attention_mask, batch.labels_mask)
            found.append(TokenBatch(*(part[rows, inside] for part in parts)))
    return found


def split_sequences(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Every sequence that has something to score as a batch of its own, [1, S], without the padding around it."""
    found = []
    for batch in batches:
        wanted = batch.wanted
        for row in range(len(batch.input_ids)):
            attended = batch.attention_mask[row].nonzero()[:, 0]
            if bool(wanted[row].any()):
                inside = slice(int(attended[0]), int(attended[-1]) + 1)
                parts = (batch.input_ids, batch.attention_mask, batch.labels_mask)
                found.append(TokenBatch(*(part[row : row + 1, inside] for part in parts)))
    return found


def _as_batch(item: Any, number: int, vocab_size: int | None) -> TokenBatch:
    if isinstance(item, TokenBatch):
        parts = {
            "input_ids": item.input_ids,
            "attention_mask": item.attention_mask,
            "labels_mask": item.labels_mask,
        }
    else:
        parts = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
    ids = parts.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"batch {number}: input_ids must be an integer tensor [batch, sequence], got {_describe(ids)}")
    masks = []
    for name in ("attention_mask", "labels_mask"):
        mask = parts.get(name)
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
    """data_fingerprint of batches as the evaluator takes them apart."""
    return data_fingerprint(split_sequences(as_batches(batches)))


def data_fingerprint(batches: Sequence[TokenBatch]) -> str:
    """Identifies tokens, masks and batching; a resumed search must see the same."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.input_ids.shape)).encode())
        for tensor in (batch.input_ids, batch.attention_mask, batch.labels_mask):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def pack(
    tokenizer: Any, texts: Iterable[str], *, sequence_length: int, sequences: int, batch_size: int = 1
) -> list[TokenBatch]:
    """Texts joined by the end-of-text token and cut into at most `sequences` rows of exactly `sequence_length` tokens.

    Raises ValueError when the texts do not fill one row.
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
    """Reads data files into at most `sequences` rows of at most `sequence_length` tokens.

    `.jsonl` lines hold "text" (packed), "prompt" and "response", or "messages" (the chat template is applied; the
    last assistant message is the response). With a prompt only response tokens are labelled; such rows are padded,
    not packed, cut at sequence_length, and left out when the prompt alone fills it. `.safetensors` holds `input_ids`
    [N, S] with optional masks. Anything else is one plain text. labels=False is for calibration, where every token
    counts: messages need no assistant among them, and what is too long is cut, never left out. Raises ValueError,
    naming the file, for what cannot be read.
    """
    texts: list[str] = []
    rows: list[tuple[list[int], int]] = []  # tokens, and how many of them are prompt
    batches: list[TokenBatch] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"there is no data file {path}")
        if path.suffix == ".safetensors":
            batches += _token_file(path, batch_size, sequences - sum(len(batch.input_ids) for batch in batches))
        elif path.suffix == ".jsonl":
            for record, place in read_json_lines(path):
                text, prompt_and_response = _record(record, place, tokenizer, labels)
                if prompt_and_response is not None:
                    rows.append(prompt_and_response)
                else:
                    texts.append(text)
        else:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not a readable text file: {error}") from None
            if not texts[-1].strip():
                raise ValueError(f"{path} is empty")
    wanted = sequences - sum(len(batch.input_ids) for batch in batches)
    rows = [(tokens[:sequence_length], prompt) for tokens, prompt in rows if prompt < min(len(tokens), sequence_length)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    for start in range(0, min(len(rows), max(wanted, 0)), batch_size):
        batches.append(_pad(rows[start : min(start + batch_size, wanted)], pad))
    wanted -= len(rows)
    if texts and wanted > 0:
        batches += pack(tokenizer, texts, sequence_length=sequence_length, sequences=wanted, batch_size=batch_size)
    if not batches:
        raise ValueError(f"the data files hold no usable sequence: {', '.join(map(str, paths))}")
    return batches


def _token_file(path: Path, batch_size: int, rows: int) -> list[TokenBatch]:
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
    parts = zip(
        *(t[: max(rows, 0)].split(batch_size) for t in (whole.input_ids, whole.attention_mask, whole.labels_mask)),
        strict=True,
    )
    return [TokenBatch(*part) for part in parts if len(part[0])]


def _record(
    record: dict[str, Any], place: str, tokenizer: Any, labels: bool
) -> tuple[str, tuple[list[int], int] | None]:
    if isinstance(record.get("text"), str):
        return record["text"], None
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        prompt = tokenizer(record["prompt"])["input_ids"]
        response = tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        return "", (prompt + response + end, len(prompt) if labels else 0)
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return "", _chat(messages, place, tokenizer, labels)
    raise ValueError(f'{place} needs "text", "prompt" and "response", or "messages"; it has: {", ".join(record)}')


def _chat(messages: list[Any], place: str, tokenizer: Any, labels: bool) -> tuple[list[int], int]:
    """Token ids up to the end of the last assistant message, and how many of them come before it; all and 0 without
    labels."""
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


def _pad(rows: Sequence[tuple[list[int], int]], pad_id: int) -> TokenBatch:
    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attended, labelled = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        attended[i, : len(tokens)] = True
        labelled[i, prompt : len(tokens)] = True
    return TokenBatch(ids, attended, labelled)
