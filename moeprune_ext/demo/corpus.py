"""The demo's text: the running interpreter's standard library, and generated arithmetic.

There are three domains, each a stream of documents: `code` (modules of the standard library), `prose` (their
docstrings) and `arithmetic` (lines such as `37+48=85`). No text is shipped: code and prose are read from the running
interpreter, arithmetic is computed. A hash of the module's path or of the problem decides the split, so that no module
and no problem is in two splits, on any machine. (A module that a Python version renamed may change its split.)

- modules: 80 % `train`, 10 % `calibration`, 10 % `evaluation`;
- problems: 90 % `train`, 10 % `held_out`, by hash of the operands' pair (commuted spellings share one fate).
  Calibration uses training problems, evaluation the held-out ones.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DOMAINS = ("code", "prose", "arithmetic")
OPERATIONS = ("+", "-", "*")
SHOTS = 6  # solved examples before a problem, in training documents' own format
STOP = "\n"  # ends an answer

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def _percentile(text: str) -> int:
    """Returns a number in [0, 100) that depends on `text` alone, whatever the machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def module_split(name: str) -> str:
    """Returns `train`, `calibration` or `evaluation` for a module's path relative to the standard library."""
    percentile = _percentile(name)
    return "train" if percentile < 80 else "calibration" if percentile < 90 else "evaluation"


@cache
def _modules(split: str) -> tuple[Path, ...]:
    """Returns the paths of a split's modules, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    modules = sorted(path for path in modules if module_split(path.relative_to(root).as_posix()) == split)
    if not modules:
        raise ValueError(
            f"no standard-library sources under {root}; the demo reads its text from there, so it needs a Python "
            "installation that ships the .py files"
        )
    return tuple(modules)


@cache
def _code(module: Path) -> str:
    """Returns a module's text, nothing if it cannot be read."""
    try:
        return module.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


@cache
def _prose(module: Path) -> str:
    """Returns a module's docstrings, nothing if it has none of any length."""
    try:
        tree = ast.parse(_code(module))
    except (SyntaxError, ValueError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 40:
                parts.append(inspect.cleandoc(docstring))
    return "\n\n".join(parts) + "\n" if parts else ""


def code_documents(split: str) -> list[str]:
    """Returns the text of each of a split's modules."""
    return [text for module in _modules(split) if (text := _code(module))]


def prose_documents(split: str) -> list[str]:
    """Returns the docstrings of a split's modules, one document a module."""
    return [text for module in _modules(split) if (text := _prose(module))]


def solve(a: int, operation: str, b: int) -> int:
    """Returns the answer of a problem."""
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def problem_split(a: int, operation: str, b: int) -> str:
    """Returns `train` or `held_out`; `a*b` and `b*a` are in the same split, so are `a+b` and `b+a`."""
    low, high = (b, a) if operation == "-" else sorted((a, b))
    return "held_out" if _percentile(f"{operation}{low},{high}") < 10 else "train"


def problems(split: str, operation: str) -> list[tuple[int, str, int]]:
    """Returns every two-digit problem of one operation: 0 <= b <= a <= 99 for + and -, a <= 99 and b <= 9 for *."""
    pairs = [(a, b) for a in range(100) for b in range(10 if operation == "*" else a + 1)]
    return [(a, operation, b) for a, b in pairs if problem_split(a, operation, b) == split]


def few_shot_prompt(problem: tuple[int, str, int], rng: random.Random) -> str:
    """Returns `SHOTS` solved training problems of all operations, then the problem up to its equals sign."""
    a, operation, b = problem
    lines = [arithmetic_line(rng) for _ in range(SHOTS)]
    return "".join(lines) + f"{a}{operation}{b}="


def arithmetic_line(rng: random.Random, largest: int = 99, split: str = "train") -> str:
    """Returns one solved problem of a split with its newline; operands are at most `largest`."""
    while True:
        operation = rng.choice(OPERATIONS)
        a = rng.randint(0, largest)
        b = rng.randint(0, 9) if operation == "*" else rng.randint(0, a)
        if problem_split(a, operation, b) == split:
            return f"{a}{operation}{b}={solve(a, operation, b)}{STOP}"


def arithmetic_document(rng: random.Random, lines: int = 40, largest: int = 99, split: str = "train") -> str:
    """Returns `lines` solved problems of a split."""
    return "".join(arithmetic_line(rng, largest, split) for _ in range(lines))


def documents(domain: str, split: str, rng: random.Random) -> Iterator[str]:
    """Yields one domain's documents in random order, endlessly; evaluation arithmetic is of held-out problems."""
    if domain == "arithmetic":
        problems_split = "held_out" if split == "evaluation" else "train"
        while True:
            yield arithmetic_document(rng, split=problems_split)
    read, modules = _code if domain == "code" else _prose, _modules(split)
    while True:  # modules are read one by one: parsing all of them takes seconds
        yield from filter(None, map(read, rng.sample(modules, len(modules))))
