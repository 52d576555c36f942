"""Files are written whole or not at all, and read with an error that says which file was wrong."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to it when the block ends, removed when the block raises."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text in UTF-8, beside the target and then renamed."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Writes JSON and a line feed, beside the target and then renamed; `indent` as in json.dumps."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; raises ValueError, naming the file, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None


@contextmanager
def reading_json(path: str | os.PathLike[str], file_format: str, kind: str) -> Iterator[dict[str, Any]]:
    """Yields the object of a JSON file for a block that takes it apart.

    Args:
        path: the file.
        file_format: what the object must have under "format".
        kind: what the file is, for messages: "pruning plan".

    Raises:
        ValueError: if the file is missing, of another format, or if the block cannot take the object apart
            (LookupError, TypeError, ValueError, AttributeError).
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise ValueError(f"{path} is not a {kind} (JSON with format {file_format!r})")
    try:
        yield content
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged {kind}: {error}") from None


def finite_or_none(value: float) -> float | None:
    """Returns a number as JSON can hold it: None (null) for NaN and infinities."""
    return value if math.isfinite(value) else None


def nan_if_none(value: float | None) -> float:
    """Returns a number read from JSON: NaN for None (null)."""
    return math.nan if value is None else float(value)


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the objects of a JSONL file, each with its place "file:line", line by line; blank lines are skipped.

    Raises:
        ValueError: naming the place, if the file or a line cannot be read or holds anything but an object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_object(line, f"{path}:{number}"), f"{path}:{number}"
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text file: {error}") from None


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(record).__name__}")
    return record
