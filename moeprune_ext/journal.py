"""A search's directory: its settings, written once, and every generation's scores, appended one line at a time.

`search.json` says what the scores depend on; `history.jsonl` has one record per generation. The search is a function of
the two, so whoever finds them goes on where they end, with as many generations as asked, and a directory that belongs
to another search is refused. With several processes the first one reads and writes, and all see what it saw.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.files import read_json, write_text

# A sum that another number of threads rounds differently.
NEARLY = ("teacher_log_sum_exp",)


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
        recorded = self.folder / "search.json"
        if not recorded.exists():
            write_text(recorded, json.dumps(settings, indent=1) + "\n")
            return {}
        before = read_json(recorded)
        before = before if isinstance(before, dict) else {}
        differing = [
            name
            for name in dict.fromkeys([*settings, *before])
            if before.get(name) != settings.get(name)
            and not (
                name in NEARLY
                and isinstance(before.get(name), float)
                and math.isclose(before[name], settings[name], rel_tol=1e-5)
            )
        ]
        if differing:
            changes = "; ".join(f"{n}: {before.get(n)!r} there, {settings.get(n)!r} now" for n in differing)
            raise ValueError(
                f"{self.folder} belongs to another search ({changes}); use another directory or the same settings"
            )
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
