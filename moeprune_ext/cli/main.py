"""The `moeprune` command: reads a verb and its flags, runs the verb's file, prints what it returns.

Results go to stdout (JSON with --json), progress to stderr. Exit status: 0, 2 for a bad request (one line, nothing
written), 1 for a failure. Under torchrun, `calibrate`, `score` and the verbs that make plans share their work between
the processes, of which the first writes and prints; any other verb is run by the first alone.

The flags are argparse's, made of dataclasses (arguments.py). tyro would make them of the same dataclasses, but says an
error in a box of several lines, accepts `--data` without a value, and starts no faster (0.13 s; this file 0.05 s).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from moeprune_ext.cli.arguments import add_flags, read_flags

# Each verb is the file of that name: EXAMPLE, Options (its flags) and run(options) -> (a result for JSON, a text). Only
# the file of the verb that is asked for is imported, so that `moeprune --help` does not wait for torch.
VERBS = {
    "prune": "the whole way to the best pruned checkpoint: calibrate, choose, search, repair, measure; resumes OUT",
    "demo": "prune on the embedded model, beside what others do, in a minute and a half on two cores",
    "info": "MoE layers, experts, router kind, memory by part, what pruning would save",
    "calibrate": "one pass over text: routing and activation statistics of every expert",
    "score": "statistics to one score per expert, and how far the criteria agree",
    "search": "EvoESAP: how many experts each layer should lose; resumes RUN_DIR if it exists",
    "allocate": "a plan without a search: uniform, a global threshold, the best additive split (dp), or naee's subsets",
    "grape": "GRAPE: prunes where experts are most alike, over all layers",
    "eep": "EEP: which experts a task needs, and how the others merge into them; resumes RUN_DIR if it exists",
    "export": "write the pruned checkpoint",
    "eval": "accuracy on task files, perplexity on text",
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
        _end(self.prog, f"{message}; see {self.prog} --help", 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the console script."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(words)
    if not words:
        parser.print_help()
        return
    values = parser.parse_args(words)
    command = f"moeprune {values.verb}"
    from moeprune_ext import distributed  # needs torch, for which `moeprune --help` does not wait

    try:
        distributed.join()
        if not distributed.is_first() and values.verb not in SHARED:
            distributed.leave()
            return
        verb: Any = _file_of(values.verb)
        result, text = verb.run(read_flags(verb.Options, values))
    except ValueError as error:
        _end(command, error, 2)
    except (OSError, MemoryError) as error:
        _end(command, error, 1)
    except KeyboardInterrupt:
        resumes = "; the same command goes on where it was" if values.verb in RESUMED else ""
        _end(command, f"interrupted{resumes}", 130)
    if distributed.is_first():
        print(json.dumps(result) if values.json else text)
    distributed.leave()


def _file_of(verb: str) -> Any:
    return import_module(f"moeprune_ext.cli.{verb.replace('-', '_')}")


def _end(command: str, error: object, status: int) -> NoReturn:
    print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


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
