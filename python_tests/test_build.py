"""The compiled module: what it says of itself, how it is loaded, how its instruction set is chosen."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile

import pytest

import moeprune_ext
from moeprune_ext import ops

IN_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        cwd=tempfile.gettempdir(),  # not the checkout, whose moeprune_ext/ would hide the installed one
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_build_info_says_what_was_compiled_in():
    info = moeprune_ext.build_info()
    assert info["version"] == importlib.metadata.version("moeprune_ext") == moeprune_ext.__version__
    assert info["cpu_isas"][0] == "portable" and info["cpu_isa"] in info["cpu_isas"]
    assert isinstance(info["openmp"], bool) and info["compiler"]
    if info["cuda"]:
        assert info["cuda_archs"] and info["cuda_runtime"]
    else:
        assert info["cuda_archs"] == [] and info["cuda_runtime"] is None and not info["cuda_available"]


def test_the_best_instruction_set_is_the_default():
    found = run("import moeprune_ext.ops as o; print(o.build_info()['cpu_isa'])", MOEPRUNE_ISA="")
    assert found.stdout.strip() == ops.build_info()["cpu_isas"][-1]


def test_the_environment_chooses_the_instruction_set():
    found = run("import moeprune_ext.ops as o; print(o.build_info()['cpu_isa'])", MOEPRUNE_ISA="portable")
    assert found.stdout.strip() == "portable"


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        ops._C.set_isa("sse9")
    refused = run("import torch; from moeprune_ext import _C", MOEPRUNE_ISA="sse9")
    assert refused.returncode != 0 and "unknown instruction set 'sse9'" in refused.stderr


@IN_LINUX
def test_the_module_needs_neither_torch_libraries_nor_a_cuda_driver():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {ops._C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
maps = open("/proc/self/maps").read()
assert "libtorch" not in maps and "libcuda" not in maps.replace("libcudart", ""), maps
print(module.build_info()["cpu_isa"])
"""
    loaded = run(code)
    assert loaded.returncode == 0, loaded.stderr


@IN_LINUX
@pytest.mark.skipif(not ops.build_info()["openmp"], reason="built without OpenMP")
def test_one_openmp_runtime_is_shared_with_torch():
    code = """
import moeprune_ext

moeprune_ext.build_info()  # loads torch and the core
print(sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert len(eval(run(code).stdout)) == 1


def test_the_core_refuses_what_would_crash_it():
    import torch

    a, b = torch.zeros(2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="q_logits has the wrong shape"):
        ops._C.overlap(p_logits=a, q_logits=b, out=[None] * 6, threads=1)
    with pytest.raises(ValueError, match="p_logits has the wrong dtype"):
        ops._C.overlap(p_logits=a.long(), q_logits=b, out=[None] * 6, threads=1)
    out = torch.zeros(1, 4)[:, ::2]
    with pytest.raises(ValueError, match="out is not contiguous"):
        ops._C.overlap(p_logits=a, q_logits=a[None], out=[out] + [None] * 5, threads=1)
    with pytest.raises(ValueError, match="q_logits is missing"):
        ops._C.overlap(p_logits=a, out=[None] * 6, threads=1)
    with pytest.raises(ValueError, match="tokens is not an argument"):
        ops._C.overlap(p_logits=a, q_logits=a[None], out=[None] * 6, threads=1, tokens=None)
