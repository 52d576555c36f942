"""The study: the papers' headline tables in miniature, on the embedded model; one command, which goes on if killed.

    python bench/study.py -o docs/study.md --work DIR [--parts a b c d e f] [--seeds N] [--quick]

a: criteria x budgets x (uniform, EvoESAP), and `prune`; b: all criteria for general and for task-specific calibration;
c: GRAPE against uniform plans; d: EEP's table; e: how well ESAP, KL and NLL predict generation; f: repair by the number
of calibration tokens. study_cells.py measures, study_page.py writes. Every cell is a JSON file in DIR, and a cell
that is there is not measured again. The page is written from study.json beside it, which holds every number:
`--render` writes the page from study.json alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study_page import FORMAT, render
from study_tables import PARTS, tables_of

from moeprune_ext.files import read_json, write_json, write_text

CPU_NAMES = Path("/proc/cpuinfo")
SEEDS = 5
DIGITS = 6  # of numbers in study.json


def cell(folder: Path, part: str, name: str, seed: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns a cell from its file, or measures it and writes the file.

    Args:
        folder: of the cells.
        part: letter.
        name: of the cell, in its part.
        seed: of everything random.
        work: measures {row: {metric: value}}.
    """
    file = folder / f"{part}-{name.replace('%', '').replace(' ', '-')}-{seed}.json"
    if file.exists():
        return read_json(file)
    start = time.process_time()
    rows = work()
    content = {"part": part, "name": name, "seed": seed, "seconds": round(time.process_time() - start, 1), "rows": rows}
    write_json(file, content)
    print(f"{part} {name}, seed {seed}: {content['seconds']} s", flush=True)
    return content


def refuse_other_study(folder: Path, settings: dict[str, Any]) -> None:
    """Begins the directory of cells; raises ValueError if its cells are of another model or of other sizes."""
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, settings, indent=1)
    there = read_json(file)
    if differing := [name for name, value in settings.items() if there.get(name) != value]:
        raise ValueError(
            f"{folder} holds cells of a study with other {', '.join(differing)}; give another --work directory"
        )


def in_lists(settings: Any) -> dict[str, Any]:
    """Returns a dataclass as a JSON file holds it: tuples are lists."""
    return json.loads(json.dumps(asdict(settings)))


def machine() -> str:
    """Returns the class of the processor that measures."""
    lines = CPU_NAMES.read_text().splitlines() if CPU_NAMES.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def about(sizes: dict[str, Any], seeds: int, flags: str) -> dict[str, Any]:
    """Returns what the page says of the run; flags: of the command, beside its paths."""
    import torch
    from study_cells import REPAIRED

    from moeprune_ext.allocation.settings import EvolveSettings
    from moeprune_ext.demo.run import SEQUENCE_LENGTH, demo_texts, load_demo
    from moeprune_ext.models.moe import MoeModel

    model, tokenizer = load_demo()
    shapes = list(MoeModel.of(model).shapes.values())
    counts = {name: sum(map(len, domains.values())) for name, domains in vars(demo_texts(tokenizer)).items()}
    threads = torch.get_num_threads()
    packages = ("moeprune_ext", "torch", "transformers", "numpy", "scipy")
    return {
        "command": f"python bench/study.py -o docs/study.md --work DIR{flags}",
        "date": str(date.today()),
        "machine": f"{machine()}, {threads} thread{'s' if threads > 1 else ''}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "model": {
            "layers": len(shapes),
            "experts": shapes[0].num_experts,
            "top_k": shapes[0].top_k,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "sequence_length": SEQUENCE_LENGTH,
        "texts": {name: [count, count * SEQUENCE_LENGTH] for name, count in counts.items()},
        "published": [EvolveSettings.population, EvolveSettings.generations],
        "repaired": list(REPAIRED),
        "seeds": seeds,
        "sizes": sizes,
    }


def rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a cell with the digits that study.json keeps."""
    rows = {
        row: {metric: round(value, DIGITS) for metric, value in metrics.items()}
        for row, metrics in content["rows"].items()
    }
    return {**content, "rows": rows}


def as_text(content: dict[str, Any]) -> str:
    """Returns the study as JSON, one cell or table a line."""
    cells = ",\n".join(json.dumps(one) for one in content["cells"])
    tables = ",\n".join(f"{json.dumps(part)}: {json.dumps(its)}" for part, its in content["tables"].items())
    about = json.dumps(content["about"], indent=1)
    return (
        f'{{"format": {json.dumps(content["format"])},\n"about": {about},\n"cells": [\n{cells}\n],\n'
        f'"tables": {{\n{tables}\n}}}}\n'
    )


def measured(folder: Path, parts: list[str], sizes: Any, seeds: int) -> Iterator[dict[str, Any]]:
    """Yields every cell, all parts of one seed after the other, so that they share what they need."""
    from study_cells import Bench, cells_of

    from moeprune_ext.demo.run import load_demo

    demo = lru_cache(load_demo)
    for seed in range(seeds):
        bench = lru_cache(lambda seed=seed: Bench(*demo(), sizes, seed, folder / f"seed-{seed}"))
        for part in parts:
            for name, work in cells_of(part, sizes, seed).items():
                yield cell(folder, part, name, seed, lambda work=work, bench=bench: work(bench()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the page; study.json is written beside it")
    parser.add_argument("--work", type=Path, help="directory of the cells")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, few examples: does it run at all?")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the page from study.json")
    arguments = parser.parse_args()
    file = arguments.out.with_suffix(".json")
    if not arguments.render:
        if arguments.work is None:
            parser.error("--work is required: the directory of the cells")
        from study_cells import QUICK, Sizes

        from moeprune_ext.checkpoint.read import read_checkpoint
        from moeprune_ext.demo.run import demo_folder

        sizes, seeds = (QUICK, 1) if arguments.quick else (Sizes(), arguments.seeds)
        model = read_checkpoint(demo_folder()).fingerprint
        refuse_other_study(arguments.work, {"model": model, **in_lists(sizes)})
        cells = [rounded(one) for one in measured(arguments.work, arguments.parts, sizes, seeds)]
        flags = " --quick" if arguments.quick else f" --seeds {seeds}" if seeds != SEEDS else ""
        if arguments.parts != list(PARTS):
            flags += f" --parts {' '.join(arguments.parts)}"
        content = {"format": FORMAT, "about": about(in_lists(sizes), seeds, flags), "cells": cells}
        tables = {part: [asdict(table) for table in its] for part, its in tables_of(content).items()}
        write_text(file, as_text({**content, "tables": tables}))
    write_text(arguments.out, render(read_json(file)))


if __name__ == "__main__":
    main()
