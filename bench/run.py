"""One table for the operations on this machine: time, ratio to PyTorch, fraction of what memory allows.

    python bench/run.py [--device cpu|cuda] [--quick] [--only REGEX] [--rounds N] [--threads N] [--no-compile]

Markdown to stdout, with date, versions and command. How times and ratios are taken: measure.py; what is measured, and
the targets: cases.py. The columns:

- eager, torch.compile: their time over native's, for the fastest eager spelling.
- of the limit: native's speed as a fraction of the limit measured in the same rounds, bytes counted once. Reading:
  the fastest of a copy that moves as many bytes as there are inputs and, on a CPU, summing the inputs as float32
  words. masked_router: writing its answers into new memory, as it does, or on a GPU a copy of as many bytes as logits
  and answers; with router maps its matrix products. overlap_from_hidden: its matrix products.
- native over: native's time over that of other yardsticks.
- workspace: the peak of memory beyond inputs and outputs as a fraction of these, of native and of the fastest eager
  spelling.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
from pathlib import Path

import torch
from cases import Case, Target, Work, all_cases
from measure import Times, compiled, measure, memory_of

import moeprune_ext as mp

SECONDS = 15.0  # per case, at most, for as long as three rounds fit
HEADER = (
    "| operation | ms | eager | torch.compile | of the limit | native over | workspace: native, eager | targets |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def judged(target: Target, times: Times) -> str | None:
    """The target with its number, or None where what it compares with could not be measured."""
    others = [name for prefix in target.others for name in times.named(prefix)]
    if not others:
        return None
    ratio = times.over_native(others, target.pick)
    value, met = (ratio, ratio >= target.faster) if target.faster else (1 / ratio, 1 / ratio <= target.within)
    return f"{target.text}: {value:.2f}, {'met' if met else '**missed**'}"


def workspace_cells(work: Work, eager: str, device: str) -> tuple[str, str]:
    """The workspace of native and eager, and whether native's is within bounds."""
    extra, outputs = memory_of(work.contenders["native"], device)
    whole = sum(tensor.nbytes for tensor in work.inputs) + outputs
    eager_extra, _ = memory_of(work.contenders[eager], device)
    if work.max_workspace is None:
        text, met = "workspace < 1 %", extra < 0.01 * whole
    else:
        text, met = (
            f"workspace {extra / 2**20:.1f} <= {work.max_workspace / 2**20:.0f} MiB",
            extra <= work.max_workspace,
        )
    return f"{extra / whole:.2%}, {eager_extra / whole:.0%}", f"{text}: {'met' if met else '**missed**'}"


def row(case: Case, arguments: argparse.Namespace) -> str:
    torch.manual_seed(0)
    device, work = arguments.device, case.build()
    contenders = {**work.contenders, **work.yardsticks}
    if not arguments.no_compile and work.compiles and (fast := compiled(*work.compiles)):
        contenders["compile"] = fast
    times = measure(contenders, device, 3 if arguments.quick else arguments.rounds, SECONDS)
    eager = min(times.named("eager"), key=times.median)
    inductor = f"{times.over_native(['compile']):.1f}x" if "compile" in contenders else "-"
    limits = times.named(case.limit)
    others = [f"{name} {1 / times.over_native([name]):.2f}" for name in work.yardsticks if name not in limits]
    workspace, workspace_verdict = workspace_cells(work, eager, device)
    verdicts = [*filter(None, (judged(target, times) for target in case.targets)), workspace_verdict]
    if arguments.quick:
        verdicts = ["not judged: small inputs"]
    return (
        f"| {case.name} | {times.median('native') * 1e3:.2f} | {times.over_native([eager]):.1f}x | {inductor} "
        f"| {times.over_native(limits):.2f} | {', '.join(others) or '-'} | {workspace} | {'; '.join(verdicts)} |"
    )


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def heading(device: str) -> str:
    info = mp.build_info()
    return (
        f"{datetime.date.today()}, {machine(device)}, {info['cpu_isa']}, {info['compiler']}, "
        f"torch {torch.__version__}, moeprune_ext {mp.__version__}; `python {' '.join(sys.argv)}`\n\n{HEADER}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds: does it run at all?")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name it is found in")
    parser.add_argument("--rounds", type=int, default=15, help="fewer where a case would take longer than 15 s, but 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a while")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not mp.build_info()["cuda_available"]:
        parser.error("--device cuda: no GPU, or a build without CUDA kernels")
    return arguments


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(heading(arguments.device))
    failures = 0
    for case in all_cases(arguments.device, shrink=16 if arguments.quick else 1):
        if not re.search(arguments.only, case.name):
            continue
        try:
            print(row(case, arguments), flush=True)
        except Exception as error:  # a table with a hole says more than none
            failures += 1
            print(f"| {case.name} | failed: {type(error).__name__} | | | | | | |", flush=True)
            print(f"{case.name}: {error}", file=sys.stderr)
    return min(failures, 1)


if __name__ == "__main__":
    raise SystemExit(main())
