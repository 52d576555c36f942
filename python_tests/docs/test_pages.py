"""What the pages are made of: names, pictures, navigation, sizes."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree

import pages
import pytest
import yaml

import moeprune_ext as mp
from moeprune_ext import files
from moeprune_ext.cli.main import VERBS


def load(name):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", pages.DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_one_page():
    assert len((pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_public_name_is_in_the_reference_once():
    text = (pages.DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    documented = [path.rsplit(".", 1)[1] for path in re.findall(r"^::: (\S+)$", text, flags=re.M)]
    assert sorted(documented) == sorted(set(mp.__all__) - {"__version__", "reference"})


def test_every_verb_is_in_the_command_line_reference():
    pytest.importorskip("mkdocs")
    text = load("hooks").help_of_every_verb()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(VERBS)
    assert "--sparsity" in text and text.count("```") == 2 * len(VERBS)


def test_pictures_are_those_that_the_script_draws():
    pictures = load("pictures")
    drawn = {path.stem for path in pictures.ASSETS.glob("*.svg")}
    shown = set(re.findall(r"assets/(\w+)\.svg", "".join(page.read_text(encoding="utf-8") for page in pages.pages())))
    assert shown == drawn
    for name in drawn:
        picture = getattr(pictures, name)()
        assert (pictures.ASSETS / f"{name}.svg").read_text(encoding="utf-8") == picture, "run docs/pictures.py"
        ElementTree.fromstring(picture)


def test_the_demos_picture_has_the_demos_numbers():
    pictures = load("pictures")
    esap, kept = pictures.demo_tables()
    assert len(esap) == 7 and sum(kept["prune 50%"]) == 48
    assert f">{esap['prune 50%']:.3f}<" in pictures.demo()


def test_links_inside_the_repository_lead_somewhere():
    for page in pages.pages():
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_tests_that_the_page_on_reliability_names_are_there():
    text = (pages.DOCS / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(python_tests/[\w/.]+)`", text)
    assert len(named) > 10 and all((pages.ROOT / path).exists() for path in named)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "plan.json"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as beside:
        beside.write_text("half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_citation_names_this_software_and_four_papers():
    citation = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors", "version"} <= set(citation)
    assert citation["version"] == mp.__version__
    papers = {reference["identifiers"][0]["value"] for reference in citation["references"]}
    assert papers == {"arXiv:2603.06003", "arXiv:2606.15716", "arXiv:2604.06542", "arXiv:2407.00945"}
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])
