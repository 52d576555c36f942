"""An environment in which `moeprune` and `python` are those under test."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import verb_server


@pytest.fixture(scope="session")
def environment():
    """Variables for commands; `moeprune` is answered by one process that has everything imported."""
    with tempfile.TemporaryDirectory(prefix="docs") as folder:
        path = str(Path(folder) / "socket")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, verb_server.__file__, path], env=variables)
        try:
            for name, content in (
                ("moeprune", verb_server.CLIENT.format(python=sys.executable, path=path)),
                ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
            ):
                script = Path(folder) / name
                script.write_text(content)
                script.chmod(0o755)
            deadline = time.monotonic() + 300
            while not os.path.exists(path):
                assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            yield {**variables, "PATH": os.pathsep.join([folder, str(Path(sys.executable).parent), os.environ["PATH"]])}
        finally:
            process.kill()
            process.wait()
