"""Batches of tokens with attention and label masks: their checks, and how data sources become some."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moeprune_ext.data.layouts import TEXTS, Tally, TokenRow, layout_of, token_rows
from moeprune_ext.data.sources import Source, deal, domain_names, read_tokens, records, shares


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


def joined(batches: Sequence[TokenBatch], tokens: int) -> list[TokenBatch]:
    """Joins neighbouring batches of equal length, each of at most `tokens` tokens unless one already has more."""
    groups: list[list[TokenBatch]] = []
    for batch in batches:
        size = sum(part.input_ids.numel() for part in groups[-1]) if groups else 0
        alike = bool(groups) and groups[-1][0].input_ids.shape[1] == batch.input_ids.shape[1]
        if not alike or size + batch.input_ids.numel() > tokens:
            groups.append([])
        groups[-1].append(batch)
    return [_joined(group) for group in groups]


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
    tally = Tally()
    documents = (({"text": text}, "") for text in texts)
    read = token_rows(tally.counted(documents), tokenizer, sequence_length=sequence_length, labels=True, tally=tally)
    rows = list(islice(read, sequences))
    if not rows:
        raise ValueError(f"the data {tally.why_empty(sequence_length)}")
    return _batched(rows, batch_size, 0)


def load_batches(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Any = None,
    *,
    sequence_length: int = 2048,
    sequences: int = 64,
    batch_size: int = 1,
    labels: bool = True,
    say: Callable[[str], None] | None = None,
) -> list[TokenBatch]:
    """Reads data sources into token batches: those of load_domains, which says more, one source after the other."""
    domains = load_domains(
        paths,
        tokenizer,
        sequence_length=sequence_length,
        sequences=sequences,
        batch_size=batch_size,
        labels=labels,
        say=say,
    )
    return [batch for batches in domains.values() for batch in batches]


def load_domains(
    specs: Sequence[str | os.PathLike[str]],
    tokenizer: Any = None,
    *,
    sequence_length: int = 2048,
    sequences: int = 64,
    batch_size: int = 1,
    labels: bool = True,
    say: Callable[[str], None] | None = None,
) -> dict[str, list[TokenBatch]]:
    """Reads data sources into token batches, a domain each.

    A source is a file, a folder or `hf:NAME[:CONFIG][:SPLIT]`, with or without a weight `*W` behind it (data.sources
    says more). Its records have layouts of data.layouts. Texts are packed into rows of exactly `sequence_length`
    tokens. A prompt with its response is a row of its own, padded on the right and cut at `sequence_length`; only
    response tokens are labelled, and a prompt that fills the row leaves it out. `.safetensors` holds `input_ids` [N, S]
    and optionally the masks of a TokenBatch. Sequences are shared out by weight; what a source is short of goes to the
    others. A source is read in its own order, and only as far as needed; but a `.jsonl` file gives prompts with
    responses before texts.

    Args:
        specs: sources, as words of --data.
        tokenizer: a transformers tokenizer, or a function without arguments that loads one, called if a source needs
            it; None: all are token files.
        sequence_length: tokens of a row, at most; token files keep theirs.
        sequences: rows in all, at most.
        batch_size: rows of a batch, at most.
        labels: False for calibration, where every token counts: messages need no assistant among them, and rows that
            are too long are cut, never left out.
        say: is told in one line what was recognised of each source.

    Returns:
        {domain: batches}; a domain is named after the file or the dataset, with a number where names would be equal.

    Raises:
        ValueError: naming the source, for what cannot be read, and for a source without a share or a usable row.
    """
    sources = [Source.parse(spec) for spec in specs]
    if not sources:
        raise ValueError("there is no data: name at least one source")
    weights = [source.weight for source in sources]
    if idle := [source.word for source, n in zip(sources, shares(sequences, weights), strict=True) if n == 0]:
        raise ValueError(
            f"{sequences} sequences are too few for {len(sources)} sources of these weights: {', '.join(idle)} would "
            "give none; ask for more sequences or name fewer sources"
        )
    tokenizer = _loaded(tokenizer, sources)
    tallies = [Tally() for _ in sources]
    pairs = zip(sources, tallies, strict=True)
    rows = deal([_rows(*pair, tokenizer, sequence_length, labels) for pair in pairs], weights, sequences)
    domains = {}
    for name, source, tally, own in zip(domain_names(sources), sources, tallies, rows, strict=True):
        if not own:
            raise ValueError(f"{source.word} {tally.why_empty(sequence_length)}")
        if say is not None:
            say(f"{source.word}: {tally.summary()}, {len(own):,} sequence{'s'[: len(own) != 1]}")
        domains[name] = _batched(own, batch_size, _pad_id(tokenizer))
    return domains


def padded(rows: Sequence[TokenRow], pad_id: int = 0) -> TokenBatch:
    """Makes one batch of rows, padded on the right; the tokens after a row's prompt are labelled."""
    length = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attended, labelled = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        attended[i, : len(row.tokens)] = True
        labelled[i, row.prompt : len(row.tokens)] = True
    return TokenBatch(ids, attended, labelled)


def _batched(rows: Sequence[Any], batch_size: int, pad_id: int) -> list[TokenBatch]:
    """Makes batches of one source's rows, all TokenRows or all batches of one; no text shares one with a response."""
    batches = []
    for packed in (False, True):
        same = [row for row in rows if getattr(row, "packed", False) == packed]
        for start in range(0, len(same), batch_size):
            part = same[start : start + batch_size]
            batches.append(padded(part, pad_id) if isinstance(part[0], TokenRow) else _joined(part))
    return batches


def _joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    return TokenBatch(*(torch.cat(tensors) for tensors in zip(*(vars(b).values() for b in batches), strict=True)))


def _loaded(tokenizer: Any, sources: Sequence[Source]) -> Any:
    """Returns the tokenizer, loaded if it is a function that does so; None where all sources are token files."""
    texts = [source.word for source in sources if source.kind != "tokens"]
    if not texts:
        return None
    if tokenizer is None:
        raise ValueError(f"{texts[0]} needs the model's tokenizer; only .safetensors files of tokens need none")
    return tokenizer if hasattr(tokenizer, "eos_token_id") else tokenizer()


def _pad_id(tokenizer: Any) -> int:
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in ids if token is not None), 0)


def _rows(
    source: Source, tally: Tally, tokenizer: Any, sequence_length: int, labels: bool
) -> Iterator[TokenRow | TokenBatch]:
    """Yields a source's rows, reading only as far as needed; those of a token file are batches of one."""
    if source.kind == "tokens":
        try:
            whole = as_batches([read_tokens(source)])[0]
        except ValueError as error:
            raise ValueError(f"{source.word}: {error}") from None
        tally.layouts["tokens"], tally.complete = len(whole.input_ids), True
        yield from (whole.part(slice(row, row + 1)) for row in range(len(whole.input_ids)))
        return
    convert = partial(token_rows, tokenizer=tokenizer, sequence_length=sequence_length, labels=labels, tally=tally)
    tally.complete = source.kind == "text"
    counted = tally.counted(records(source))
    if source.kind != "jsonl":
        yield from convert(counted)
        return
    yield from convert(item for item in counted if layout_of(*item) not in TEXTS)
    if any(tally.layouts[layout] for layout in TEXTS):  # read again, so that no text waits in memory
        yield from convert(item for item in records(source) if layout_of(*item) in TEXTS)
