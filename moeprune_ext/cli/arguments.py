"""Flags are the fields of dataclasses: how a parser is made of them, and the groups of flags that several verbs share.

A field without a default is required, a bool is a switch, a tuple takes several values, and underscores become hyphens.
A field whose type is a dataclass of settings adds that one's fields to the flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def flag(help: str | Callable[[], str], default: Any = MISSING, **metadata: Any) -> Any:
    """Declares a field of a dataclass as a flag.

    Args:
        help: what the flag does, or a function that says it and need not run before the verb's help is shown.
        default: value where it is left out; none: the flag is required.
        **metadata: `short`: a second name, such as "-o"; `positional`: True for an argument without a name; `choices`:
            the values allowed; `least`: the smallest whole number allowed; `above`: what a number must exceed;
            `metavar`: the value's name in the help.
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


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds a dataclass's fields to a parser; fields without a `help` take the value of another group's flag."""
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):
        if is_dataclass(kinds[field.name]):
            add_flags(parser, kinds[field.name])
        elif "help" in field.metadata:
            _add_flag(parser, field, kinds[field.name])


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


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    metadata, default = field.metadata, field.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    ending = "" if any(shown is nothing for nothing in (MISSING, None, False, "")) else f" (default: {shown})"
    text = metadata["help"]() if callable(metadata["help"]) else metadata["help"]
    details: dict[str, Any] = {"help": (text + ending).replace("%", "%%")}
    if metadata.get("positional"):
        parser.add_argument(field.name, type=_converter(kind, metadata), **details)
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

    seed: int = flag("seed of everything random", 0)
    device: str = flag("where a model is run: auto, cpu, cuda, cuda:N", "auto")
    dtype: str = flag(
        "dtype a model is run in; auto: as stored", "auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    json: bool = flag("print the result as JSON", False)


def model_argument() -> Any:
    """Declares the model that a verb works on."""
    return flag("model directory", positional=True)


def data_flag(**default: Any) -> Any:
    """Declares the data sources (see data.sources); required without a default."""
    return flag(
        "text, .jsonl, .parquet or .safetensors token files, dataset folders, hf:NAME[:CONFIG][:SPLIT]; 'SOURCE*2' "
        "gives twice the sequences",
        metavar="SOURCE",
        **default,
    )


def sequences_flag(default: int) -> Any:
    """Declares how much of the text is used."""
    return flag("most sequences to use", default, least=1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text that a verb may be given."""

    data: tuple[str, ...] = data_flag(default=())
    sequence_length: int = flag("tokens per sequence", 2048, least=1)
    sequences: int = sequences_flag(64)
    batch_size: int = flag("sequences per forward pass", 1, least=1)


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """For models larger than the device."""

    stream: str = flag(
        "for models larger than the device: layers wait in host memory or in the shards, and visit it in turn",
        "no",
        choices=("no", "host", "disk"),
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What an evaluator of candidates may take."""

    memory_budget: float = flag("GiB on the device beside the model's weights", 1.0, above=0)

    @property
    def memory_bytes(self) -> int:
        """Returns the budget in bytes."""
        return int(self.memory_budget * 2**30)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What every plan must respect."""

    min_kept: int = flag("fewest experts any layer keeps", 0, least=0)
    min_kept_per_group: int = flag("the same for each group of grouped routers", 0, least=0)
    multiple_of: int = flag(
        "every layer keeps a multiple of so many experts, such as the size of expert parallelism", 1, least=1
    )
    max_kept: int | None = flag("most experts any layer keeps, for loaders that pad", None, least=1)
    protect_super: bool = flag("never prune experts with extreme output norms (super experts, arXiv 2507.23279)", False)


def criteria_help() -> str:
    """Returns the names of the criteria and which of them to prefer."""
    from moeprune_ext.calibration.criteria import CRITERIA, SELECTION_PRINCIPLE

    return f"{', '.join([*CRITERIA, 'random'])}, or alpha,beta,mean|sum. {SELECTION_PRINCIPLE}"


@dataclass(frozen=True, kw_only=True)
class Scored(Limits, Common):
    """A model and the scores of its experts, for verbs that make plans."""

    model: Path = model_argument()
    stats: Path | None = flag("statistics file of this model, to score by --criterion", None)
    criterion: str = flag(criteria_help, "reap")
    scores: Path | None = flag("a file that `score -o` wrote, in the place of --stats", None)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Limits):
    """How many experts go: one of three ways to say it, within the limits; io.py's `budget` makes one of them.

    Raises:
        ValueError: for two ways at once, a size that is none, or --context without --fit.
    """

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
