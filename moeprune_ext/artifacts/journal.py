"""A search's directory: its settings, written once, and every generation's scores, appended one line at a time.

`search.json` holds the settings that the scores depend on, `history.jsonl` one record a generation. The search is a
function of the two: a run that finds them goes on where they end, with as many generations as asked, and refuses the
directory of another search. With several processes the first one reads and writes, and all get what it read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.files import read_json, write_json, write_text

SETTINGS = "search.json"

# Settings that are sums, which another number of threads rounds differently.
ROUNDED = ("teacher_log_sum_exp",)


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the search in a directory, None if it holds no search."""
    if not (folder / SETTINGS).exists():
        return None
    settings = read_json(folder / SETTINGS)
    return settings if isinstance(settings, dict) else {}


def check_known(folder: Path, known: Mapping[str, Any]) -> None:
    """Raises ValueError if a directory holds a search that differs in `known`, some of its settings; writes nothing."""

    def check() -> None:
        if (recorded := recorded_settings(folder)) is not None:
            refuse_other(folder, recorded, known)

    distributed.from_first(check)


def refuse_other(folder: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless what a directory's file records agrees with the settings."""
    differing = [name for name, value in settings.items() if not _same(name, recorded.get(name), value)]
    if differing:
        changes = "; ".join(f"{name}: {recorded.get(name)!r} there, {settings[name]!r} now" for name in differing)
        raise ValueError(f"{folder} belongs to another search ({changes}); use another directory or the same settings")


def _same(name: str, recorded: Any, value: Any) -> bool:
    if name in ROUNDED and isinstance(recorded, float) and isinstance(value, float):
        return math.isclose(recorded, value, rel_tol=1e-5)
    return bool(recorded == value)


class Journal:
    """The directory of a running search.

    Attributes:
        folder: the directory.
        records: {generation: its record}, of the generations so far.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Reads the directory, or begins it; raises ValueError, naming what differs, if it holds another search."""
        self.folder = folder
        self._history = folder / "history.jsonl"
        self.records: dict[int, dict[str, Any]] = distributed.from_first(lambda: self._open(settings))

    def append(self, record: dict[str, Any]) -> None:
        """Adds the record of a generation, {"generation": its number, ...}; it is on disk when this returns."""
        self.records[record["generation"]] = record
        if distributed.is_first():
            with self._history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _open(self, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
        recorded = recorded_settings(self.folder)
        if recorded is None:
            write_json(self.folder / SETTINGS, settings, indent=1)
            return {}
        refuse_other(self.folder, recorded, settings | {name: None for name in recorded if name not in settings})
        return self._read()

    def _read(self) -> dict[int, dict[str, Any]]:
        """Reads the records so far; drops a last line that a crash has cut off."""
        if not self._history.exists():
            return {}
        text = self._history.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            write_text(self._history, complete)
        records: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = json.loads(line)
                records[int(record["generation"])] = record
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{self._history}:{number} is damaged; remove the directory and search again"
                ) from None
        return records
