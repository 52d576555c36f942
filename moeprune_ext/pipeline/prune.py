"""From a model directory and text to the best pruned checkpoint: the library's side of `moeprune prune`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moeprune_ext import distributed
from moeprune_ext.allocation.budget import Budget
from moeprune_ext.allocation.selection import HeldOut
from moeprune_ext.allocation.settings import EvolveSettings
from moeprune_ext.artifacts.about import read_about, record
from moeprune_ext.artifacts.measured import Measured, format_table
from moeprune_ext.artifacts.plan import PruningPlan
from moeprune_ext.checkpoint.card import add_measured
from moeprune_ext.checkpoint.load import load, load_tokenizer
from moeprune_ext.checkpoint.read import read_checkpoint
from moeprune_ext.data.batches import load_domains
from moeprune_ext.files import write_json
from moeprune_ext.pipeline.run import FOLDER, Run, Source
from moeprune_ext.pipeline.settings import PruneSettings, TextSizes
from moeprune_ext.pipeline.texts import split_texts
from moeprune_ext.progress import View
from moeprune_ext.report.report import REPORT, write_report


@dataclass(frozen=True)
class PruneResult:
    """One pruned checkpoint.

    Attributes:
        out: its directory.
        plan: what it keeps, with the repair.
        held_out: how the plan was chosen.
        measured: what it is worth, and what it costs.
        table: that as text.
        report: a page that says all this, with pictures.
    """

    out: Path
    plan: PruningPlan
    held_out: HeldOut
    measured: Measured
    table: str
    report: Path

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, without the weights."""
        return {
            "out": str(self.out),
            "sparsity": self.plan.sparsity,
            "criterion": self.plan.criterion,
            "kept_per_layer": {str(layer): len(ids) for layer, ids in self.plan.kept.items()},
            "repaired_layers": self.plan.repaired_layers,
            "held_out": self.held_out.as_json(),
            **self.measured.as_json(),
            "report": str(self.report),
        }


def prune_checkpoint(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]],
    sparsity: Budget = 0.5,
    criterion: str | tuple[int, int, str] = "auto",
    repair: bool | str = True,
    settings: PruneSettings | None = None,
    search: EvolveSettings | None = None,
    texts: TextSizes | None = None,
    sequence_length: int = 2048,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    stream: str | None = None,
    seed: int = 0,
    progress: bool | View = False,
    say: Callable[[str], None] = lambda line: None,
) -> PruneResult:
    """Makes the best pruned checkpoint of a size, and measures it: the whole way, resumable.

    Calibrates, chooses the criterion by measurement, searches how many experts each layer loses (EvoESAP), takes the
    plan that held-out text confirms, repairs it without gradients, exports it, and measures it on text that no choice
    depended on. Killed anywhere, the same call goes on and ends with the same checkpoint. Under torchrun the text is
    dealt out.

    Args:
        model_dir: a local Hugging Face directory.
        out: directory for the checkpoint; the stages' files are in its folder `moeprune`.
        data: sources of text, see data.sources; each is a domain.
        sparsity: share of the experts to remove, or `Kept`.
        criterion: "auto", "naee", or as in `score_experts`.
        repair: True: what is best on held-out text; or "layer", "hidden", False.
        settings: everything else; `criterion`, `repair`, `search` and `seed` go into it.
        search: settings of the search.
        texts: how much text is used.
        sequence_length: tokens of a sequence.
        device: where the model runs; None: a GPU if there is one.
        dtype: the model's; "auto": as stored.
        stream: "host" or "disk" for a model larger than the device.
        seed: of everything random.
        progress: whether to show progress bars on stderr.
        say: is given a line after every stage.

    Raises:
        ValueError: before any work, for a model, data, settings or a budget that cannot be, or the directory of another
            run.
    """
    base = settings or PruneSettings()
    how = repair if isinstance(repair, str) else base.repair if repair else "off"
    base = replace(base, criterion=criterion, repair=how, search=replace(search or base.search, seed=seed))
    source = open_source(
        model_dir,
        data,
        base,
        texts or TextSizes(),
        shared=Path(out) / FOLDER,
        sequence_length=sequence_length,
        loader=lambda: load(Path(model_dir), stream=stream, device=device or _device(), dtype=dtype).eval(),
        dtype=str(dtype),
        progress=progress,
        say=say,
    )
    return prune_to(source, sparsity, Path(out))


def _device() -> torch.device:
    return distributed.local_device() if torch.cuda.is_available() else torch.device("cpu")


def open_source(
    model_dir: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    settings: PruneSettings,
    sizes: TextSizes,
    *,
    shared: Path,
    sequence_length: int,
    loader: Callable[[], Any],
    dtype: str = "auto",
    progress: bool | View = False,
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Reads what runs to any budget share; the model's weights are not loaded yet.

    Args:
        model_dir: see `prune_checkpoint`.
        data: see there.
        settings: how to prune.
        sizes: how much text is used.
        shared: directory for the statistics.
        sequence_length: tokens of a sequence.
        loader: loads the model.
        dtype: that it is loaded in, for the record.
        progress: see `prune_checkpoint`.
        say: see there.
    """
    folder = Path(model_dir)
    checkpoint = read_checkpoint(folder)
    domains = load_domains(
        list(data),
        cache(lambda: load_tokenizer(folder)),
        sequence_length=sequence_length,
        sequences=sizes.total,
        say=say,
    )
    return Source(checkpoint, loader, split_texts(domains, sizes), settings, shared, dtype, progress, say)


def prune_to(source: Source, budget: Budget, out: Path) -> PruneResult:
    """Runs all stages of one budget, and writes the report."""
    run = Run(source, budget, out)
    run.check()
    texts, folder = source.texts, out / FOLDER
    record(
        folder,
        model=source.checkpoint.folder,
        seed=source.settings.search.seed,
        data=list(texts.test),
        fingerprints={"model": source.checkpoint.fingerprint, **texts.fingerprints()},
    )
    plan, held_out, measured = run.finish()
    report = folder / REPORT
    result = PruneResult(out, plan, held_out, measured, format_table(measured), report)
    if distributed.is_first():
        write_json(folder / "result.json", result.as_json(), indent=1)
        add_measured(out, measured, held_out.says, read_about(folder))
        write_report(out)
    return result


def report_text(result: PruneResult) -> str:
    """Returns what a run says at its end: the table, the verdict, and how to load the checkpoint."""
    measured = result.measured
    kept = " ".join(str(len(ids)) for ids in result.plan.kept.values())
    lines = [
        result.table,
        "",
        f"ESAP and perplexity: on {measured.sequences} sequences that no choice depended on. {measured.gained}",
        result.held_out.says,
        f"Experts kept per layer: {kept} (criterion {result.plan.criterion}).",
        how_to_load(result),
    ]
    return "\n".join(lines) + "\n"


def how_to_load(result: PruneResult) -> str:
    """Returns one line on how to load and serve the checkpoint."""
    if result.plan.is_uniform:
        return f'A stock checkpoint: AutoModelForCausalLM.from_pretrained("{result.out}"), vllm serve {result.out}.'
    return (
        f'Load: moeprune_ext.load("{result.out}"), or AutoModelForCausalLM.from_pretrained("{result.out}", '
        f"trust_remote_code=True). Serve, with moeprune_ext beside vLLM: vllm serve {result.out}; whether "
        f"that and other runtimes load it: moeprune serve-check {result.out}."
    )
