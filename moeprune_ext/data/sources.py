"""Where data is read from: one word of `--data` names a source, and a source yields records, only as far as asked.

A source is a file; a folder of `.parquet` or `.jsonl` files, or one saved by the `datasets` library's save_to_disk; or
`hf:NAME[:CONFIG][:SPLIT]`, a dataset of the Hugging Face hub or such a folder. `*W` behind it is its weight. A `.jsonl`
file is read line by line, `.csv` and `.tsv` row by row, `.parquet` batch by batch, a dataset of the hub as a stream, a
saved one from mapped memory; `.json`, an array of records, is read whole.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moeprune_ext.data.layouts import Record
from moeprune_ext.files import read_json_lines

T = TypeVar("T")

HUB = "hf:"
KINDS = {  # any other file: text
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".safetensors": "tokens",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST_CELL = 2**31 - 1  # characters; Python's csv stops at 131,072 unless told
SPLIT = re.compile(r"(train|validation|valid|val|dev|test)([_.-].*)?")  # hf:NAME:WORD: a split rather than a config
ROWS_AT_ONCE = 64  # of a parquet file, decoded together
BUFFER = 2**20  # bytes read together, of a column of a parquet file


@dataclass(frozen=True)
class Source:
    """One source of data.

    Attributes:
        word: what the user gave, without the weight.
        kind: tokens, jsonl, json, csv, tsv, parquet, text, folder or hub.
        location: a path, or a dataset's name on the hub.
        config: of a dataset of the hub; None: its only one.
        split: of a dataset; None: train, or the only one.
        weight: its share of the sequences, relative to the other sources'.
    """

    word: str
    kind: str
    location: str
    config: str | None = None
    split: str | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, word: str | os.PathLike[str]) -> Source:
        """Takes a word of --data apart; what exists under that name is that file, whatever signs its name holds.

        Raises:
            ValueError: for a file that is not there, a weight that is no positive number, a dataset's name with too
                many parts.
        """
        text = os.fspath(word)
        place, star, factor = text.rpartition("*")
        if not star or os.path.exists(text):
            return _located(text, 1.0)
        try:
            weight = float(factor)
        except ValueError:
            weight = math.nan
            if not (os.path.exists(place) or place.startswith(HUB)):
                return _located(text, 1.0)  # a pattern that the shell found no file for
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{text}: the weight behind * must be a positive number, got {factor!r}")
        return _located(place, weight)

    @property
    def name(self) -> str:
        """Returns the dataset's name, or the file's without its ending."""
        if self.kind == "hub":
            return self.location
        path = Path(self.location).absolute()
        return path.name if self.kind == "folder" else path.stem


def _located(word: str, weight: float) -> Source:
    if os.path.isdir(word):
        return Source(word, "folder", word, weight=weight)
    if os.path.exists(word):
        return Source(word, KINDS.get(Path(word).suffix.lower(), "text"), word, weight=weight)
    if not word.startswith(HUB):
        raise ValueError(f"there is no data file {word}")
    parts = word[len(HUB) :].split(":")
    for cut in range(len(parts), 0, -1):  # a folder's name may hold colons
        if os.path.isdir(folder := ":".join(parts[:cut])):
            if len(parts) - cut > 1:
                raise ValueError(f"{word}: a folder has splits but no configs; give {HUB}{folder}:SPLIT")
            return Source(word, "folder", folder, split=parts[cut] if cut < len(parts) else None, weight=weight)
    if len(parts) > 3 or not parts[0]:
        raise ValueError(f"{word}: a dataset is named {HUB}NAME, {HUB}NAME:CONFIG, {HUB}NAME:SPLIT or all three")
    if len(parts) == 2 and SPLIT.fullmatch(parts[1]):
        parts.insert(1, "")
    config, split = (part or None for part in (*parts[1:], "", "")[:2])
    return Source(word, "hub", parts[0], config, split, weight)


def domain_names(sources: Sequence[Source]) -> list[str]:
    """Returns the sources' names, with -2, -3 and so on behind those that are taken."""
    names: list[str] = []
    for source in sources:
        name, number = source.name, 1
        while name in names:
            number += 1
            name = f"{source.name}-{number}"
        names.append(name)
    return names


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Shares a number out by weights, the largest remainder first; of equal ones the earlier.

    Returns:
        Whole numbers, each within 1 of the exact share, that add up to `count`.
    """
    total = sum(map(Fraction, weights))
    exact = [count * Fraction(weight) / total for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: count - sum(parts)]:
        parts[i] += 1
    return parts


def deal(readers: Sequence[Iterator[T]], weights: Sequence[float], count: int) -> list[list[T]]:
    """Takes items from readers, shared out by weight; what one is short of is shared out among the others.

    Args:
        readers: read only as far as needed.
        weights: of the readers.
        count: items in all, at most.

    Returns:
        Each reader's items.
    """
    dealt: list[list[T]] = [[] for _ in readers]
    going = list(range(len(readers)))
    while going and (missing := count - sum(map(len, dealt))):
        wanted = shares(missing, [weights[i] for i in going])
        taken = [list(islice(readers[i], n)) for i, n in zip(going, wanted, strict=True)]
        for i, items in zip(going, taken, strict=True):
            dealt[i] += items
        going = [i for i, n, items in zip(going, wanted, taken, strict=True) if len(items) == n]
    return dealt


def read_tokens(source: Source) -> dict[str, Tensor]:
    """Returns the tensors of a token file, `input_ids` among them; ValueError if it is none."""
    try:
        tensors = load_file(source.location)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    if "input_ids" not in tensors:
        raise ValueError(f"no tensor `input_ids` (it has: {', '.join(sorted(tensors)) or 'none'})")
    return tensors


def records(source: Source) -> Iterator[Record]:
    """Yields a source's records in their own order, each with its place for messages.

    Raises:
        ValueError: naming the file or the dataset, for what cannot be read, and where reading it needs an extra that is
            not installed.
    """
    path = Path(source.location)
    if source.kind == "hub":
        yield from _hub_records(source)
    elif source.kind != "folder":
        yield from _file_records(path, source.kind)
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _saved_records(source)
    else:
        yield from _folder_records(source)


def _file_records(path: Path, kind: str) -> Iterator[Record]:
    if kind == "jsonl":
        yield from read_json_lines(path)
    elif kind == "json":
        yield from _json_records(path)
    elif kind in DELIMITERS:
        yield from _table_records(path, DELIMITERS[kind])
    elif kind == "parquet":
        yield from _parquet_records(path)
    else:
        yield {"text": _read_text(path)}, str(path)


def _json_records(path: Path) -> Iterator[Record]:
    """Yields the objects of a JSON array; a file of JSON lines may have the same ending."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if "Extra data" not in str(error):
            raise ValueError(f"{path} is not JSON: {error}") from None
        yield from read_json_lines(path)
        return
    rows = content if isinstance(content, list) else [content]
    for number, record in enumerate(rows):
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}: record {number} is a {type(record).__name__}, where an object with fields is needed; give an "
                'array of records, such as [{"text": "..."}, ...]'
            )
        yield record, f"{path}: record {number}"


def _table_records(path: Path, delimiter: str) -> Iterator[Record]:
    """Yields the rows of a table, whose first row names the fields."""
    csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: two columns have one name; the first row must name the fields")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row:
                    raise ValueError(f"{place} has more cells than the first row, which must name the fields")
                yield {name: cell for name, cell in row.items() if cell is not None}, place
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from None


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text file: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _folder_records(source: Source) -> Iterator[Record]:
    """Yields what the .parquet and .jsonl files of a folder hold, by file name."""
    folder = Path(source.location)
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files = [folder / name for name in names if Path(name).suffix in (".parquet", ".jsonl")]
    if not files:
        raise ValueError(
            f"{folder} is neither a dataset of save_to_disk nor a folder of .parquet or .jsonl files; it has: "
            f"{', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}"
        )
    if source.split is not None:
        raise ValueError(f"{source.word}: a folder of files has no split {source.split!r}; name its files")
    for file in files:
        yield from _file_records(file, KINDS[file.suffix])


def _parquet_records(path: Path) -> Iterator[Record]:
    parquet = _extra("pyarrow.parquet", str(path))
    number = 0
    # Reads a column piece by piece: by default all of a row group is read, which may be all of the file.
    pieces = {"pre_buffer": False, "buffer_size": BUFFER}
    with _reading(str(path), "is it a parquet file?"), parquet.ParquetFile(path, **pieces) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield record, f"{path}:{number}"


def _saved_records(source: Source) -> Iterator[Record]:
    datasets = _extra("datasets", source.word)
    with _reading(source.word, "is it a folder that save_to_disk wrote?"):
        data = datasets.load_from_disk(source.location)
    yield from _split_records(data, source, "is the folder whole?")


def _hub_records(source: Source) -> Iterator[Record]:
    datasets = _extra("datasets", source.word)
    advice = "without network give a file, or a folder that save_to_disk wrote elsewhere"
    with _reading(source.word, advice):
        data = datasets.load_dataset(source.location, source.config, streaming=True)
    yield from _split_records(data, source, advice)


def _split_records(data: Any, source: Source, advice: str) -> Iterator[Record]:
    """Yields the records of the split that the source names; of several, without a name, those of `train`."""
    if isinstance(data, Mapping):
        split = source.split or ("train" if "train" in data or len(data) != 1 else next(iter(data)))
        if split not in data:
            raise ValueError(
                f"{source.word} has no split {split!r}, but {', '.join(data)}; give {HUB}{source.location}:SPLIT"
            )
        data = data[split]
    elif source.split not in (None, str(data.split)):
        raise ValueError(f"{source.word}: the folder is one split, {data.split}, not {source.split!r}")
    with _reading(source.word, advice):
        for number, record in enumerate(data, 1):
            yield record, f"{source.word}, record {number}"


@contextmanager
def _reading(word: str, advice: str) -> Iterator[None]:
    """Makes a ValueError of one line of whatever a block raises: `datasets` and pyarrow have errors of many classes."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{word} cannot be read: {_line(error)}; {advice}") from error


def _extra(module: str, word: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{word} needs `pip install "moeprune_ext[data]"` ({error})') from None


def _line(error: Exception) -> str:
    """Returns the start of an error's message, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
