"""What mkdocs adds to the pages of docs/: the command line's help, and the files of the repository that pages link to.

A page says `<!-- help of every verb -->` where the help goes. A link to a file outside docs/, such as
`../bench/results/demo.md`, works where the repository is browsed; in the site that file becomes a page of its own.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HELP = "<!-- help of every verb -->"
PREFIX = "repository"  # folder of the site for files from outside docs/
FILES = (
    "bench/results/*.md",
    "examples/*.py",
    "moeprune_ext/demo/TRAINING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
)
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the repository's files as pages; code and plain text in a fenced block."""
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            if path.suffix != ".md":
                text = f"# {path.name}\n\n```{path.suffix[1:].replace('cff', 'yaml')}\n{text}```\n"
            files.append(File.generated(config, _page_of(path.relative_to(ROOT).as_posix()), content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Puts the help into its page, and turns links to the repository's files into links between pages."""
    if HELP in markdown:
        markdown = markdown.replace(HELP, help_of_every_verb())
    site = page.file.src_uri
    place = f"docs/{site}" if not site.startswith(f"{PREFIX}/") else site.removeprefix(f"{PREFIX}/")

    def rewritten(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        page_path = path.removeprefix("docs/") if path.startswith("docs/") else _page_of(path)
        if files.get_file_from_path(page_path) is None:
            return target + anchor  # mkdocs warns of it, and --strict makes that an error
        return posixpath.relpath(page_path, posixpath.dirname(site) or ".") + anchor

    return LINK.sub(rewritten, markdown)


def _page_of(path: str) -> str:
    stem, ending = posixpath.splitext(path)
    return f"{PREFIX}/{stem if ending == '.md' else path}.md"


def help_of_every_verb() -> str:
    """Returns a section for each verb of `moeprune`, with its help as it is printed."""
    from moeprune_ext.cli.main import VERBS, _parser

    sections = []
    with patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        for verb in VERBS:
            actions = _parser([verb])._actions
            parsers = next(action for action in actions if isinstance(action.choices, dict))
            sections.append(f"## {verb}\n\n```text\n{parsers.choices[verb].format_help()}```\n")
    return "\n".join(sections)
