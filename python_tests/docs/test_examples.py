"""The scripts of examples/ run on the embedded model as they are."""

import subprocess

import pages
import pytest

EXAMPLES = sorted((pages.ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_example(script, environment, tmp_path):
    done = subprocess.run(
        ["moeprune", "--script", str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
    exports_and_runs = [path for path in tmp_path.glob("*/*") if path.is_dir()]
    assert any(any(path.iterdir()) for path in exports_and_runs)


def test_examples_are_short():
    assert len(EXAMPLES) == 3
    assert all(len(script.read_text(encoding="utf-8").splitlines()) < 60 for script in EXAMPLES)
