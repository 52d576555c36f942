"""What every CUDA kernel costs, as ptxas reports it: registers, spills, stack and shared memory. Needs nvcc, no GPU.

python bench/resources.py [--arch 80 90] > bench/results/resources.md
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-O3", "-DNDEBUG", "-std=c++17", "--expt-relaxed-constexpr"]  # those of CMakeLists.txt, Release
KERNEL = re.compile(r"Compiling entry function '(\w+)' for")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def short_name(symbol: str) -> str:
    """overlap_kernel<float> for _ZN8moeprune..."""
    name = symbol
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    for prefix in ("(anonymous namespace)::", "moeprune::"):
        name = name.replace(prefix, "")
    depth = 0  # of template brackets, within which a parenthesis may be a cast
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def compile_report(nvcc: str, source: Path, arch: str) -> str:
    with tempfile.TemporaryDirectory() as work:
        output = ["-Xptxas", "-v", "-cubin", "-o", f"{work}/out.cubin"]
        command = [nvcc, *FLAGS, f"-I{SOURCES}", f"-arch=sm_{arch}", *output, str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    return result.stderr


def rows(report: str, arch: str) -> list[str]:
    """One row per kernel of a report. A kernel's figures follow its name, as do those of functions it calls."""
    table = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", report):
        kernel, used = KERNEL.search(part), USED.search(part)
        if not kernel or not used:
            continue
        own = part[part.find(f"Function properties for {kernel[1]}") :]
        frame = FRAME.search(own)
        stack, stores, loads = frame.groups() if frame else ("0", "0", "0")
        shared = SHARED.search(part)
        name = short_name(kernel[1])
        table.append(
            f"| {name} | sm_{arch} | {used[1]} | {stores} / {loads} | {stack} | {shared[1] if shared else 0} |"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90"])
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise SystemExit("nvcc is not on PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V[\d.]+", version)
    print(f"{datetime.date.today()}, nvcc {release[0] if release else '?'}, {' '.join(FLAGS)}; ", end="")
    print(f"`python {' '.join(sys.argv)}`\n")
    print("| kernel | arch | registers | spill stores / loads, bytes | stack, bytes | shared memory, bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for source in sorted(SOURCES.glob("*.cu")):
        for arch in arguments.arch:
            print(*rows(compile_report(nvcc, source, arch), arch), sep="\n", flush=True)


if __name__ == "__main__":
    main()
