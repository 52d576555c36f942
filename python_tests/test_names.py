"""The public names, whatever was imported before them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "import moeprune_ext; moeprune_ext.reference.overlap",
        "import moeprune_ext.eep, moeprune_ext.repair",
        "from moeprune_ext.eep.search import search",
        "from moeprune_ext.repair.walk import replay_to_repair",
        "import moeprune_ext.eep.table, moeprune_ext.allocation.grape",
        "from moeprune_ext.cli.main import main",
    ],
)
def test_every_public_name_is_there_and_functions_are_not_packages(before):
    code = f"""
import sys
{before}
import moeprune_ext as mp
names = {{name: getattr(mp, name) for name in mp.__all__}}
assert set(names) == set(dir(mp)) and names["__version__"] == mp.build_info()["version"]
modules = [name for name, value in names.items() if type(value) is type(sys)]
assert modules == ["reference"], modules
from moeprune_ext.eep.search import search
from moeprune_ext.repair.fit import refit
assert callable(mp.eep) and callable(mp.repair) and not hasattr(mp, "nonsense")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
