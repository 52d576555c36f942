"""The `moeprune` command: reads a verb and its flags, runs the verb's file, prints what it returns.

Results go to stdout (JSON with --json), progress to stderr. Exit status: 0, 2 for a bad request (one line, nothing
written), 1 for a failure. Under torchrun, `calibrate`, `score` and the verbs that make plans share their work between
the processes, of which the first writes and prints; any other verb is run by the first alone.

The flags are argparse's, made of dataclasses (arguments.py). tyro would make them of the same dataclasses, but says an
error in a box of several lines, accepts `--data` without a value, and starts no faster (0.13 s; this file 0.05 s).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from moeprune_ext.cli.arguments import add_flags, read_flags

# Each verb is the file of that name: EXAMPLE, Options (its flags) and run(options) -> (a result for JSON, a text). Only
# the file of the verb that is asked for is imported, so that `moeprune --help` does not wait for torch.
VERBS = {
    "prune": "the whole way to the best pruned checkpoint: calibrate, choose, search, repair, measure; resumes OUT",
    "demo": "prune on the embedded model, beside what others do, in about two minutes on two cores",
    "info": "MoE layers, experts, router kind, memory by part, what pruning would save",
    "calibrate": "one pass over text: routing and activation statistics of every expert",
    "score": "statistics to one score per expert, and how far the criteria agree",
    "search": "EvoESAP: how many experts each layer should lose; resumes RUN_DIR if it exists",
    "allocate": "a plan without a search: uniform, a global threshold, the best additive split (dp), or naee's subsets",
    "grape": "GRAPE: prunes where experts are most alike, over all layers",
    "eep": "EEP: which experts a task needs, and how the others merge into them; resumes RUN_DIR if it exists",
    "export": "write the pruned checkpoint",
    "eval": "one model, or two side by side: accuracy on task files, perplexity on text, agreement, speed",
    "report": "one self-contained page about a run: what was kept, what it is worth, how it was made",
    "serve-check": "which runtimes load an export, how, and why others do not",
}

SHARED = (
    "prune",
    "calibrate",
    "score",
    "search",
    "allocate",
    "grape",
    "eep",
)  # verbs whose work several processes share

RESUMED = ("prune", "search", "eep")  # verbs whose directory keeps what is finished

# What the library's messages call a parameter, and what the command line calls it.
OPTIONS = {
    "memory_budget": "--search-memory",
    "`entropy`": "--entropy",
    "merge_iters=0": "--merge-iters 0",
    "method: 'layer sweep": "--search-memory or --router, which say how plans are run: 'layer sweep",
}


class _Version(argparse.Action):
    """Prints the versions of this package and of what it stands on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        names = ("moeprune_ext", "torch", "transformers")
        print(", ".join(f"{name} {version(name)}" for name in names))
        sys.exit(0)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']+)'", message)
        meant = _meant(wrong[1], VERBS) if wrong and self.prog == "moeprune" else ""
        _end(self.prog, f"{message}{meant}; see {self.prog} --help", 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the console script."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _run(words)
    except KeyboardInterrupt:
        verb = words[0] if words else ""
        resumes = "; the same command goes on where it was" if verb in RESUMED else ""
        _end(f"moeprune {verb}".strip(), f"interrupted{resumes}", 130)


def _run(words: Sequence[str]) -> None:
    """Runs the verb that comes first."""
    with _starting(words):
        parser = _parser(words)
    if not words:
        parser.print_help()
        return
    values, unknown = parser.parse_known_args(words)
    command = f"moeprune {values.verb}"
    if unknown:
        _refuse_flags(command, unknown, vars(values))
    with _starting(words):
        from moeprune_ext import distributed  # needs torch, for which `moeprune --help` does not wait

    try:
        distributed.join()
        if not distributed.is_first() and values.verb not in SHARED:
            distributed.leave()
            return
        verb: Any = _file_of(values.verb)
        with _warnings_in_one_line(command):
            result, text = verb.run(read_flags(verb.Options, values))
    except ValueError as error:
        _end(command, error, 2)
    except (OSError, MemoryError) as error:
        _end(command, error, 1)
    if distributed.is_first():
        print(json.dumps(result) if values.json else text)
    distributed.leave()


@contextmanager
def _starting(words: Sequence[str]) -> Iterator[None]:
    """Shows on a terminal that a verb is starting while torch loads, which takes seconds, and wipes it away."""
    shown = words[:1] and words[0] in VERBS and "torch" not in sys.modules and sys.stderr.isatty()
    if shown:
        print(f"moeprune {words[0]}: starting ...", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)


@contextmanager
def _warnings_in_one_line(command: str) -> Iterator[None]:
    """Inside, warnings are lines on stderr without the place in our source that gave them; of the first process."""
    original = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        from moeprune_ext import distributed

        if not issubclass(category, UserWarning):
            return original(message, category, *place, **more)
        return f"{command}: warning: {_in_options(message)}\n" if distributed.is_first() else ""

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = original


def _file_of(verb: str) -> Any:
    return import_module(f"moeprune_ext.cli.{verb.replace('-', '_')}")


def _end(command: str, error: object, status: int) -> NoReturn:
    print(f"{command}: error: {_in_options(error)}", file=sys.stderr)
    sys.exit(status)


def _in_options(message: object) -> str:
    """Returns a message in one line, with options in the place of the library's parameters."""
    text = " ".join(str(message).split())
    for parameter, option in OPTIONS.items():
        text = text.replace(parameter, option)
    return text


def _refuse_flags(command: str, unknown: Sequence[str], known: Iterable[str]) -> NoReturn:
    flags = [f"--{name.replace('_', '-')}" for name in known]
    meant = next((hint for word in unknown if (hint := _meant(word.split("=")[0], flags))), "")
    _end(command, f"unrecognized arguments: {' '.join(unknown)}{meant}; see {command} --help", 2)


def _meant(word: str, names: Iterable[str]) -> str:
    """Returns a hint at the name that is most like a word; "" if none is."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Makes a parser of all verbs, with the flags of the one that comes first."""
    parser = _Parser(prog="moeprune", description="Prune Mixture-of-Experts language models without gradients.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, about in VERBS.items():
        verb_parser = parsers.add_parser(name, help=about, description=about)
        if name in words[:1]:
            verb: Any = _file_of(name)
            verb_parser.epilog = f"example: {verb.EXAMPLE}"
            add_flags(verb_parser, verb.Options)
    return parser


if __name__ == "__main__":
    main()
