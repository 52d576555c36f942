"""A search's directory: its settings, written once, and every generation's scores, appended one line at a time.

`search.json` says what the scores depend on; `history.jsonl` has one record per generation. The search is a function of
the two, so whoever finds them goes on where they end, with as many generations as asked, and a directory that belongs
to another search is refused. With several processes the first one reads and writes, and all see what it saw.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.files import read_json, write_text

SETTINGS = "search.json"


# A sum that another number of threads rounds differently.
NEARLY = ("teacher_log_sum_exp",)


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the search whose directory this is; None where it is no search's."""
    if not (folder / SETTINGS).exists():
        return None
    found = read_json(folder / SETTINGS)
    return found if isinstance(found, dict) else {}


def check_known(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuses (ValueError) the directory of a search that differs in these of its settings, before the others are
    known; writes nothing."""

    def check() -> None:
        if (before := recorded_settings(folder)) is not None:
            _refuse_other(folder, before, known)

    distributed.from_first(check)


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [
        name
        for name, value in now.items()
        if (there := before.get(name)) != value
        and not (
            name in NEARLY
            and isinstance(there, float)
            and isinstance(value, float)
            and math.isclose(there, value, rel_tol=1e-5)
        )
    ]
    if differing:
        changes = "; ".join(f"{n}: {before.get(n)!r} there, {now[n]!r} now" for n in differing)
        raise ValueError(f"{folder} belongs to another search ({changes}); use another directory or the same settings")


class Journal:
    """records: what each generation so far has written, by number. Raises ValueError, naming what differs, for a
    directory of another search."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._history = folder / "history.jsonl"
        self.records: dict[int, dict[str, Any]] = distributed.from_first(lambda: self._open(settings))

    def append(self, record: dict[str, Any]) -> None:
        """Adds a generation's record, {"generation": its number, ...}, and has it on disk before it returns."""
        self.records[record["generation"]] = record
        if distributed.is_first():
            with self._history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _open(self, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
        before = recorded_settings(self.folder)
        if before is None:
            write_text(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
            return {}
        _refuse_other(self.folder, before, settings | {name: None for name in before if name not in settings})
        return self._read()

    def _read(self) -> dict[int, dict[str, Any]]:
        """The records so far; a last line cut off by a crash is dropped."""
        if not self._history.exists():
            return {}
        text = self._history.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self._history, whole)
        records: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                records[int(record["generation"])] = record
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{self._history}:{number} is damaged; remove the directory and search again"
                ) from None
        return records
