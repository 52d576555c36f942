"""Python started inside a source checkout, which holds nothing compiled, takes the installed compiled core."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moeprune_ext.ops.backend as backend

ROOT = Path(backend.__file__).resolve().parents[2]
# Without the finder of an editable install, which comes before the current directory.
CODE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, "")
import moeprune_ext.ops.backend as backend
print(backend.__file__)
print(backend._C and backend._C.build_info()["version"], backend._import_error)
"""


@pytest.fixture
def checkout(tmp_path):
    """The source of the package's compiled operations, without compiled files."""
    shutil.copytree(
        ROOT / "moeprune_ext", tmp_path / "moeprune_ext", ignore=shutil.ignore_patterns("*.so", "model", "__pycache__")
    )
    shutil.copy(Path(__file__).resolve().parents[2] / "pyproject.toml", tmp_path)
    return tmp_path


def started_in(folder):
    done = subprocess.run([sys.executable, "-c", CODE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(backend._C is None, reason="nothing is compiled")
def test_a_checkout_takes_the_installed_core(checkout):
    file, loaded = started_in(checkout)
    assert Path(file) == checkout / "moeprune_ext" / "ops" / "backend.py"
    assert loaded == f"{backend.build_info()['version']} None"


def test_a_core_of_another_version_is_not_taken_and_the_message_says_what_to_do(checkout):
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "0.1.0"', 'version = "9.9.9"'))
    _, loaded = started_in(checkout)
    assert loaded.startswith("None ") and "9.9.9" in loaded and f"run `pip install .` in {checkout}" in loaded
