"""Flags are the fields of dataclasses: how a parser is made of them, and the groups of flags that several verbs share.

A field without a default is required, a bool is a switch, a tuple takes several values, and underscores become hyphens.
A field whose type is a dataclass of settings adds that one's fields to the flags. A verb's help shows the flags in
groups (GROUPS): a dataclass says its group in TITLE, a field may name another.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

DATA, SCORES, WAY = "model and data", "scores of experts", "how"
BUDGET, LIMITS = "budget", "limits of every plan"
SEARCH, REPAIR, MEMORY, OUTPUT, GENERAL = "search", "repair", "memory and streaming", "output", "general"
# Groups of flags, in the order in which a verb's help shows them.
GROUPS = (DATA, SCORES, BUDGET, LIMITS, WAY, SEARCH, REPAIR, MEMORY, OUTPUT, GENERAL)


def flag(help: str | Callable[[], str], default: Any = MISSING, **metadata: Any) -> Any:
    """Declares a field of a dataclass as a flag.

    Args:
        help: what the flag does, or a function that says it and need not run before the verb's help is shown.
        default: value where it is left out; none: the flag is required.
        **metadata: `short`: a second name, such as "-o"; `positional`: True for an argument without a name; `choices`:
            the values allowed; `least`: the smallest whole number allowed; `above`: what a number must exceed;
            `metavar`: the value's name in the help; `group`: one of GROUPS, if it is not that of the dataclass.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def setting(settings: type, name: str, **metadata: Any) -> Any:
    """Declares a field as the flag of one of a settings dataclass's fields, with its help and its default.

    Args:
        settings: the dataclass.
        name: of its field.
        **metadata: see `flag`.
    """
    field = settings.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return flag(field.metadata["help"], field.default, **metadata)


def part(group: str) -> Any:
    """Declares a field that is a dataclass of settings, whose flags stand in a group of the help."""
    return dataclasses.field(metadata={"group": group})


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds a dataclass's fields to a parser, in groups; fields without a `help` take the value of another's flag."""
    found: dict[str, list[tuple[dataclasses.Field, Any]]] = {group: [] for group in GROUPS}
    _collect(options, None, found)
    for title, fields in found.items():
        if fields:
            group = parser.add_argument_group(title)
            for field, kind in fields:
                _add_flag(group, field, kind)


def _collect(options: type, title: str | None, found: dict[str, list[tuple[dataclasses.Field, Any]]]) -> None:
    """Sorts a dataclass's flags, and those of its dataclasses, into groups; `title`: the group of all of them."""
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):
        named = title or field.metadata.get("group")
        if is_dataclass(kinds[field.name]):
            _collect(kinds[field.name], named, found)
        elif "help" in field.metadata:
            group = named or (OUTPUT if field.metadata.get("short") == "-o" else _title_of(options, field.name))
            found[group].append((field, kinds[field.name]))


def _title_of(options: type, name: str) -> str:
    """Returns the group of the first dataclass that declares a field, the deepest one of its bases."""
    declaring = [one for one in options.__mro__ if name in one.__dict__.get("__annotations__", {})]
    return str(declaring[-1].__dict__.get("TITLE", WAY))


def read_flags(options: type[T], values: argparse.Namespace) -> T:
    """Makes the dataclass of what was parsed.

    Raises:
        ValueError: for settings that refuse their values.
    """
    kinds = get_type_hints(options)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kind: Any = kinds[field.name]
        if is_dataclass(kind):
            arguments[field.name] = read_flags(kind, values)  # type: ignore[arg-type]
        else:
            value = getattr(values, field.name)
            if value is None and "help" not in field.metadata:
                continue  # another group's flag, which was left out: the field's own default
            arguments[field.name] = tuple(value) if get_origin(kind) is tuple else value
    return options(**arguments)


def _add_flag(parser: argparse._ArgumentGroup, field: dataclasses.Field, kind: Any) -> None:
    metadata, default = field.metadata, field.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    ending = "" if any(shown is nothing for nothing in (MISSING, None, False, "")) else f" (default: {shown})"
    text = metadata["help"]() if callable(metadata["help"]) else metadata["help"]
    details: dict[str, Any] = {"help": (text + ending).replace("%", "%%")}
    if metadata.get("positional"):
        several: dict[str, Any] = (
            {"nargs": "+", "metavar": metadata.get("metavar")} if get_origin(kind) is tuple else {}
        )
        parser.add_argument(field.name, type=_converter(kind, metadata), **several, **details)
        return
    if kind is bool:
        details |= {"action": "store_true"}
    else:
        several = {"nargs": "+"} if get_origin(kind) is tuple else {}
        details |= {"type": _converter(kind, metadata), "required": default is MISSING, **several}
        details |= {"default": None if default is MISSING else default}
        details |= {name: metadata[name] for name in ("choices", "metavar") if name in metadata}
    names = [metadata["short"]] if "short" in metadata else []
    parser.add_argument(*names, "--" + field.name.replace("_", "-"), **details)


def _converter(kind: Any, metadata: Any) -> Callable[[str], Any]:
    """Returns what makes a value of a word; `kind`: X, X | None or tuple[X, ...]."""
    value: type = next((part for part in get_args(kind) if part not in (type(None), ...)), kind)
    if "least" in metadata:
        return lambda text: _whole_number(text, metadata["least"])
    if "above" in metadata:
        return lambda text: _number(text, metadata["above"])
    return value


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _number(text: str, above: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > above):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above {above}")
    return value


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every verb."""

    TITLE: ClassVar[str] = GENERAL

    seed: int = flag("seed of everything random", 0)
    device: str = flag("where a model is run: auto, cpu, cuda, cuda:N", "auto")
    dtype: str = flag(
        "dtype a model is run in; auto: as stored", "auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    json: bool = flag("print the result as JSON", False)


def model_argument() -> Any:
    """Declares the model that a verb works on."""
    return flag("model directory", positional=True, group=DATA)


def data_flag(**default: Any) -> Any:
    """Declares the data sources (see data.sources); required without a default."""
    return flag(
        "text, .jsonl, .json, .csv, .tsv, .parquet or .safetensors token files, dataset folders, "
        "hf:NAME[:CONFIG][:SPLIT]; 'SOURCE*2' gives twice the sequences",
        metavar="SOURCE",
        group=DATA,
        **default,
    )


def sequences_flag(default: int) -> Any:
    """Declares how much of the text is used."""
    return flag("most sequences to use", default, least=1, group=DATA)


def length_flag() -> Any:
    """Declares how long a sequence is."""
    return flag("tokens per sequence, at most the model's positions", 2048, least=1, group=DATA)


def force_flag() -> Any:
    """Declares that an output file may be there."""
    return flag("overwrite the output file if it exists", False, group=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text that a verb may be given."""

    TITLE: ClassVar[str] = DATA

    data: tuple[str, ...] = data_flag(default=())
    sequence_length: int = length_flag()
    sequences: int = sequences_flag(64)
    batch_size: int = flag("sequences per forward pass", 1, least=1)


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """For models larger than the device."""

    TITLE: ClassVar[str] = MEMORY

    stream: str = flag(
        "for models larger than the device: layers wait in host memory or in the shards, and visit it in turn",
        "no",
        choices=("no", "host", "disk"),
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What an evaluator of candidates may take."""

    TITLE: ClassVar[str] = MEMORY

    search_memory: float = flag(
        "GiB that the scoring of plans may take on the device, beside the model's weights", 1.0, above=0
    )

    @property
    def memory_bytes(self) -> int:
        """Returns the memory in bytes."""
        return int(self.search_memory * 2**30)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What every plan must respect."""

    TITLE: ClassVar[str] = LIMITS

    min_kept: int = flag("fewest experts any layer keeps", 0, least=0)
    min_kept_per_group: int = flag("the same for each group of grouped routers", 0, least=0)
    multiple_of: int = flag(
        "every layer keeps a multiple of so many experts, such as the size of expert parallelism", 1, least=1
    )
    max_kept: int | None = flag("most experts any layer keeps, for loaders that pad", None, least=1)
    protect_super: bool = flag("never prune experts with extreme output norms (super experts, arXiv 2507.23279)", False)


def criteria_help() -> str:
    """Returns the names of the criteria, and what to expect of them."""
    from moeprune_ext.calibration.criteria import CRITERIA, SELECTION_PRINCIPLE

    return f"{', '.join([*CRITERIA, 'random'])}, or alpha,beta,mean|sum. {SELECTION_PRINCIPLE}"


def named_criterion_help() -> str:
    """Returns the help of a criterion where no plan is scored, so that `auto` cannot be."""
    return f"{criteria_help()} prune and search measure it (auto); here no plan is scored, so that one is named"


@dataclass(frozen=True, kw_only=True)
class Scored(Limits, Common):
    """A model and the scores of its experts, for verbs that make plans."""

    TITLE: ClassVar[str] = SCORES

    model: Path = model_argument()
    stats: Path | None = flag("statistics file of this model, to score by --criterion", None)
    criterion: str = flag(named_criterion_help, "reap")
    scores: Path | None = flag("a file that `score -o` wrote, in the place of --stats", None)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Limits):
    """How many experts go: one of three ways to say it, within the limits; io.py's `budget` makes one of them.

    Raises:
        ValueError: for two ways at once, a size that is none, or --context without --fit.
    """

    TITLE: ClassVar[str] = BUDGET

    sparsity: float | None = flag("share of the experts to remove, 0 to below 1 (default: 0.5)", None)
    experts: int | None = flag("experts to keep in all layers together, in the place of --sparsity", None, least=1)
    fit: str | None = flag(
        "memory for weights and KV cache, such as 24GiB: as many experts stay as fit, in the place of --sparsity", None
    )
    context: int | None = flag("with --fit: tokens of one sequence whose KV cache fits (default: 4096)", None, least=1)

    def __post_init__(self) -> None:
        from moeprune_ext.models.costs import bytes_of  # needs torch, for which a verb's --help does not wait

        chosen = [f"--{name}" for name in ("sparsity", "experts", "fit") if getattr(self, name) not in (None, ())]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are different ways to say one budget: give one of them")
        if self.fit is not None:
            bytes_of(self.fit)
        elif self.context is not None:
            raise ValueError("--context is the text that --fit leaves memory for: give --fit, too")
