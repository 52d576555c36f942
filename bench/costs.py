"""What the methods cost by model size, as docs/costs.md; and how far estimates are from what was measured.

    python bench/costs.py               # counts and estimates -> docs/costs.md
    python bench/costs.py --measure     # prune on the embedded model, stage by stage -> bench/results/costs-demo.md

The models are made of their published configurations, without weights (`MODELS`); nothing is downloaded. The estimates
are those of `moeprune prune --dry-run` (pipeline/estimate.py), for a GPU by its peak, of which a share is assumed.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import moeprune_ext as mp
from moeprune_ext.checkpoint.read import find_shards, skeleton
from moeprune_ext.demo import corpus
from moeprune_ext.demo.run import demo_folder
from moeprune_ext.files import write_text
from moeprune_ext.models.costs import costs
from moeprune_ext.pipeline.estimate import Asked, Estimate, Machine, Stage, duration, estimate, measured_machine
from moeprune_ext.pipeline.settings import PruneSettings, SearchSettings, TextSizes
from moeprune_ext.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "costs.md", ROOT / "bench" / "results" / "costs-demo.md"

# NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s in bfloat16 without sparsity, 67 in float32. The shares are assumed.
PEAK, PEAK32, SHARE, READ = 989e12, 67e12, 0.35, 2e9
H100 = Machine("H100 80 GB", PEAK * SHARE, PEAK32 * SHARE, READ, host=True, reached=1.0)
SPARSITY = 0.5

QWEN = dict(vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_experts=128, num_experts_per_tok=8)
QWEN |= dict(moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
OLMOE = dict(vocab_size=50_304, hidden_size=2048, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8)
OLMOE |= dict(intermediate_size=1024, num_attention_heads=16, num_key_value_heads=16)
MIXTRAL = dict(vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_local_experts=8, num_experts_per_tok=2)
MIXTRAL |= dict(intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8)
GPT_OSS = dict(vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_experts_per_tok=4, head_dim=64)
GPT_OSS |= dict(num_attention_heads=64, num_key_value_heads=8)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE-1B-7B": ("OlmoeConfig", OLMOE),
    "gpt-oss-20b": ("GptOssConfig", {**GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", QWEN),
    "Mixtral-8x7B": ("MixtralConfig", MIXTRAL),
    "gpt-oss-120b": ("GptOssConfig", {**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}),
    "DeepSeek-V3": ("DeepseekV3Config", {}),  # whose configuration class has its published values as defaults
}


def empty_model(name: str) -> Any:
    """Makes a model without weights, in bfloat16."""
    import transformers

    kind, values = MODELS[name]
    config = getattr(transformers, kind)(**values)
    config.dtype = torch.bfloat16
    return skeleton(config, {}).to(torch.bfloat16)


def asked(search: SearchSettings, stream: str = "no") -> Asked:
    """What is estimated: prune's defaults, with this search."""
    return Asked(PruneSettings(search=search), TextSizes(), 2048, "bfloat16", stream)


def page() -> str:
    """Returns docs/costs.md."""
    times, sizes = [], []
    for name in MODELS:
        model = empty_model(name)
        found = {
            "full": estimate(model, asked(SearchSettings(screen=0)), H100, SPARSITY),
            "screened": estimate(model, asked(SearchSettings()), H100, SPARSITY),
        }
        streamed = estimate(model, asked(SearchSettings(), "host"), H100, SPARSITY)
        times.append([name, *_times(found["full"], found["screened"])])
        sizes.append([name, *_sizes(model, found["screened"], streamed)])
    return TEXT.format(
        sparsity=f"{SPARSITY:.0%}",
        rate=f"{H100.flops / 1e12:,.0f}",
        share=f"{SHARE:.0%}",
        peak=f"{PEAK / 1e12:,.0f}",
        rate32=f"{H100.flops32 / 1e12:,.0f}",
        times=markdown_table(TIMES, times),
        sizes=markdown_table(SIZES, sizes),
        measured=RESULTS.read_text(encoding="utf-8").split("\n\n", 2)[2].strip() if RESULTS.exists() else "",
    )


TIMES = ["model", "calibrate", "criterion", "search, full", "search, screened", "repair, four ways", "prune in all"]
SIZES = [
    "model",
    "parameters",
    "active",
    "weights",
    "pruned",
    "beside the weights",
    "device, streamed",
    "search, PFLOP",
    "repair, PFLOP",
]


def _times(full: Estimate, screened: Estimate) -> list[str]:
    seconds = {stage.name: stage.seconds for stage in screened.stages}
    search = next(stage.seconds for stage in full.stages if stage.name == "search")
    shown = [seconds["calibrate"], seconds["criterion"], search, seconds["search"], seconds["repair"]]
    return [*map(duration, shown), duration(screened.seconds)]


def _sizes(model: Any, found: Estimate, streamed: Estimate) -> list[str]:
    flops = {stage.name: stage.flops + stage.flops32 for stage in found.stages}
    weights, beside = found.device.values()
    counted = costs(model)
    return [
        f"{counted.bytes / 2 / 1e9:,.1f} B",
        f"{counted.flops_per_token / 2 / 1e9:,.1f} B",
        f"{weights / 1e9:,.0f} GB",
        f"{found.disk['checkpoint'] / 1e9:,.0f} GB",
        f"{beside / 1e9:,.0f} GB",
        f"{sum(streamed.device.values()) / 1e9:,.0f} GB",
        f"{flops['search'] / 1e15:,.0f}",
        f"{flops['repair'] / 1e15:,.0f}",
    ]


TEXT = """# What it costs

<!-- written by bench/costs.py; do not edit -->

!!! warning "Estimates"
    No machine with a GPU was at hand: **every time on this page but the last table's is an estimate**, by counts.
    `moeprune prune MODEL --data text.jsonl --dry-run` makes the same for your model, with rates that it measures on
    your machine.

Counted: prune's defaults at {sparsity} (128 sequences of 2,048 tokens calibrate, 64 search and choose, 16 report; up to
1,404 plans are scored by the full search, up to 718 by the screened one), all weights in bfloat16. One H100 at {rate}
TFLOP/s in bfloat16, which is {share} of its peak of {peak}, and {rate32} in float32, in which repair is fitted; the
share is assumed, as are 2 GB/s from disk.

## Time on one H100, estimated

{times}

- A model that takes more than 80 GB does not fit on one. With `--stream`, add its transfers, which `--dry-run` counts.
  On N GPUs under `torchrun` the text is dealt out: the time of all stages but loading and export is about a Nth.
- `--repair layer --sequential off` tries one way instead of four. `--criterion NAME` leaves the comparison of criteria
  out.
- `--fidelity race` drops clearly worse plans early:
  [what it saved where it was measured](../bench/results/search-epyc-zen3-2core.md).
- "calibrate" includes loading the weights; "in all" includes the export, which reads and writes them once.

## Size and memory, counted

{sizes}

"active": weights that a token passes. "beside the weights": what repair holds on the device for the default text, or
the search if that is more; `--search-memory` and the number of sequences change it. "device, streamed": with `--stream
host`, weights of two layers, the embedding and the head, and that. Attention's products of tokens with tokens and the
multi-token-prediction layers are not counted.

## Estimate against measurement, on the embedded model

{measured}
"""


# ---- measured


def measure(sequences: int, generations: int) -> str:
    """Runs prune on the embedded model and returns bench/results/costs-demo.md."""
    folder, settings = demo_folder(), PruneSettings(search=SearchSettings(population=16, generations=generations))
    texts, length = TextSizes(2 * sequences, sequences, max(8, sequences // 4)), 256
    request = Asked(settings, texts, length, "float32")
    model = mp.load(folder, dtype=torch.float32)
    machine = measured_machine(model, length, "float32", torch.device("cpu"), find_shards(folder))
    shares = estimate(model, request, machine, SPARSITY)
    marks: list[tuple[str, float]] = [("", time.process_time())]
    with tempfile.TemporaryDirectory() as work:
        sources = _write_texts(Path(work), 4 * sequences)
        marks[0] = ("", time.process_time())
        mp.prune_checkpoint(
            folder,
            Path(work) / "out",
            data=sources,
            sparsity=SPARSITY,
            settings=settings,
            search=settings.search,
            texts=texts,
            sequence_length=length,
            dtype=torch.float32,
            say=lambda line: marks.append((line, time.process_time())),
        )
    took_by_stage = _stage_seconds([*marks, ("done", time.process_time())])
    rows = []
    ends = ("export", "measure")
    stages = [*(stage for stage in shares.stages if stage.name not in ends), _together(shares.stages, ends)]
    for stage in stages:
        took = took_by_stage[stage.name]
        flops = f"{stage.flops + stage.flops32:.2g}"
        rows.append([stage.name, flops, f"{stage.seconds:.1f}", f"{took:.1f}", f"{stage.seconds / took:.2f}"])
    took = sum(took_by_stage.values())
    rows.append(["in all", "", f"{shares.seconds:.1f}", f"{took:.1f}", f"{shares.seconds / took:.2f}"])
    header = ["stage", "FLOP", "estimated s", "CPU s", "estimated / measured"]
    counts = " + ".join(map(str, vars(texts).values()))
    about = (
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; `python "
        f"bench/costs.py --measure`; {counts} sequences of {length} tokens, {generations} generations of 16 plans, "
        f"float32; products of the experts' size: {machine.flops / 1e9:.0f} GFLOP/s."
    )
    title = "# Estimates of `--dry-run` against a run\n\nThe embedded model; CPU seconds of one core."
    return f"{title}\n\n{about}\n\n{markdown_table(header, rows)}\n"


def _write_texts(folder: Path, documents: int) -> list[str]:
    """Writes text of every domain of the demo."""
    files = []
    for domain in corpus.DOMAINS:
        texts = islice(corpus.documents(domain, "calibration", random.Random(0)), documents)
        (folder / f"{domain}.txt").write_text("\n\n".join(texts), encoding="utf-8")
        files.append(str(folder / f"{domain}.txt"))
    return files


def _together(stages: Sequence[Stage], names: Sequence[str]) -> Stage:
    """Returns several stages as one."""
    parts = [stage for stage in stages if stage.name in names]
    return replace(
        parts[0], name=" and ".join(names), flops=sum(p.flops for p in parts), seconds=sum(p.seconds for p in parts)
    )


def _stage_seconds(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Returns the CPU seconds of every stage; `marks`: the lines that a run says after its stages, with their times."""
    starts = {"calibrated": "calibrate", "criterion": "criterion", "searched": "search", "repair:": "repair"}
    seconds: dict[str, float] = {}
    before = marks[0][1]
    for line, at in marks[1:]:
        known = [name for start, name in starts.items() if line.startswith(start)]
        name = "export and measure" if "repair" in seconds else known[0] if known else ""
        if not name and "search" in seconds and "select" not in seconds:
            name = "select"
        if name:
            seconds[name] = seconds.get(name, 0.0) + at - before
            before = at
    return seconds


def main(words: Sequence[str] | None = None) -> None:
    """Writes the page, or measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run prune on the embedded model")
    parser.add_argument("--sequences", type=int, default=24, help="to search on, when measuring")
    parser.add_argument("--generations", type=int, default=6, help="when measuring")
    parser.add_argument("-o", type=Path, default=None, help="file to write")
    options = parser.parse_args(words)
    text = measure(options.sequences, options.generations) if options.measure else page()
    write_text(options.o or (RESULTS if options.measure else PAGE), text)
    print(text)


if __name__ == "__main__":
    main()
