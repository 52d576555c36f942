"""How a run was made: its command, its text, its seed, versions. A file beside the run's products.

The report and the model card quote it. Nothing that is computed depends on it.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeprune_ext import distributed
from moeprune_ext.files import read_json, write_json

ABOUT = "about.json"
STARTED = datetime.now(timezone.utc)  # of this process, as soon as it needs to know
PACKAGES = ("moeprune_ext", "torch", "transformers", "safetensors", "numpy")


def record(
    folder: Path,
    *,
    model: Path,
    seed: int,
    data: Sequence[str] = (),
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Writes `about.json`, or adds this command to the one that is there; the first process writes.

    Args:
        folder: of the run.
        model: directory of the model.
        seed: of everything random.
        data: sources of text, or task files.
        fingerprints: {part of the text: its fingerprint}.
    """
    if not distributed.is_first():
        return
    before = read_about(folder).get("commands", [])
    commands = before + [entry for entry in [_this_command()] if entry["command"] not in _texts(before)]
    content = {
        "model": str(model.resolve()),
        "seed": seed,
        "data": [str(source) for source in data],
        "fingerprints": dict(fingerprints or {}),
        "commands": commands,
    }
    write_json(folder / ABOUT, content, indent=1)


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what `record` wrote; an empty dict where it wrote nothing."""
    file = folder / ABOUT
    return dict(read_json(file)) if file.exists() else {}


def model_name(folder: Path) -> str:
    """Returns the name of a run's model, that of its directory; of a run without a record, the run's own."""
    return Path(str(read_about(folder).get("model", folder.resolve()))).name


def versions() -> dict[str, str]:
    """Returns {package: version} of what a result may depend on, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an unpacked source tree
            found[name] = "unknown"
    return found


def command_line() -> str:
    """Returns this process's command as a user would type it."""
    program = Path(sys.argv[0] or "python")
    ours = program.name == "moeprune" or program.parent.parts[-2:] == ("moeprune_ext", "cli")
    start = ["moeprune"] if ours else ["python", program.name] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def _this_command() -> dict[str, Any]:
    return {
        "command": command_line(),
        "started": f"{STARTED:%Y-%m-%d %H:%M} UTC",
        "processes": distributed.world()[1],
        "versions": versions(),
    }


def _texts(commands: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(entry.get("command")) for entry in commands]
