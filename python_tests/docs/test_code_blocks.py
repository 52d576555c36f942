"""Every code block of README.md and docs/ runs on the embedded model, or is parsed, or says why it is neither.

The blocks of a page are one session: they run in order, in one directory; python blocks share their names.
"""

import ast
import importlib
import inspect
import shlex
import subprocess

import pages
import pytest

import moeprune_ext as mp
from moeprune_ext.cli import main as cli
from moeprune_ext.cli.arguments import read_flags

REASONS = {
    "CI runs these two as steps of their own",
    "installs the package",
    "needs the network",
    "needs vLLM",
    "needs mlx-lm",
    "needs trackio",
    "needs wandb",
    "needs tensorboard",
}
PAGES = [page for page in pages.pages() if pages.blocks(page)]


def name_of(page):
    return page.relative_to(pages.ROOT).as_posix()


def runs(block):
    return not block.marker.startswith((pages.NOT_RUN, pages.PARSED))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page, environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    ours = [block for block in pages.blocks(page) if runs(block)]
    if not ours:
        pytest.skip("nothing to run")
    for block in ours:
        place = f"{name_of(page)}:{block.line}"
        if block.kind == "python":
            exec(compile(block.code, place, "exec"), names)
            continue
        flags = block.marker.removeprefix(pages.RUN_WITH) if block.marker.startswith(pages.RUN_WITH) else ""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            env={**environment, "EXTRA_FLAGS": flags and f"{place} {flags}"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (
            f"{place} exits with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_do_not_run_say_why_and_their_flags_and_names_exist(page):
    for block in pages.blocks(page):
        if block.marker.startswith(pages.NOT_RUN):
            assert block.marker.removeprefix(pages.NOT_RUN) in REASONS, f"{name_of(page)}:{block.line}"
        if block.kind == "bash":
            for command in commands(block.code):
                parse(command)
        else:
            check_calls(ast.parse(block.code))


def commands(code):
    """The words of every moeprune command, without its name, if they do not depend on the shell."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        for part in line.split(" #")[0].split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["moeprune"]:
                found.append(words[1:])
            elif words[:1] == ["torchrun"]:
                found.append(words[words.index("moeprune_ext.cli") + 1 :])
    return found


def parse(words):
    """Refuses flags that do not exist and values that cannot be; `$text` stands for flags of the page."""
    words = [word for word in words if not word.startswith("$")]
    if words[0].startswith("-"):
        return
    verb = importlib.import_module(f"moeprune_ext.cli.{words[0].replace('-', '_')}")
    needed = ["--data", "text.txt"] if words[0] in ("calibrate", "search") and "--data" not in words else []
    read_flags(verb.Options, cli._parser(words).parse_args(words + needed))


def check_calls(tree):
    """Every mp.NAME exists, and every keyword of its call is one of its parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_package(node.func.value):
            signature = inspect.signature(getattr(mp, node.func.attr))
            arguments = [None for argument in node.args if not isinstance(argument, ast.Starred)]
            signature.bind_partial(*arguments, **{word.arg: None for word in node.keywords if word.arg})
        elif isinstance(node, ast.Attribute) and is_package(node.value):
            assert hasattr(mp, node.attr), f"there is no mp.{node.attr}"


def is_package(node):
    return isinstance(node, ast.Name) and node.id == "mp"


def test_a_flag_that_does_not_exist_is_found():
    (command,) = commands("moeprune prune MODEL --data a.txt \\\n  --no-such-flag 3 -o out  # words")
    with pytest.raises(SystemExit):
        parse(command)


def test_a_keyword_that_does_not_exist_is_found():
    with pytest.raises(TypeError):
        check_calls(ast.parse("mp.uniform_plan(scores, no_such_keyword=1)"))


def test_most_pages_with_code_run_something():
    assert sum(any(runs(block) for block in pages.blocks(page)) for page in PAGES) >= 4
