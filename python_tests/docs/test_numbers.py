"""Every measured number of README.md and docs/ is in the file that its paragraph links to.

Measured are decimals, percentages and "N times". The linked file (bench/results/*.md, docs/models.md, docs/study.*)
must hold each of them, or a number that rounds to it. A paragraph with such numbers and without such a link is wrong,
unless the numbers are settings (`SETTINGS`).
"""

import json
import re
from decimal import ROUND_HALF_UP, Decimal

import pages
import pytest

NUMBER = re.compile(
    r"(?<![\w.,^/-])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?= ?%| times\b| to [\d.]+ times\b| to [\d.]+ ?%)"
    r"|(?<![\w.,/])(?<!\w-)\d+\.\d+\b"
)
ANY_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
LINK = re.compile(r"\]\(([^)#\s]*(?:bench/results/[\w-]+|models|study|costs)\.(?:md|json))(?:#[^)]*)?\)")
# Settings, not measurements: {page: numbers}
SETTINGS = {
    "README.md": {"3.10", "3.5"},
    "docs/tutorial.md": {"3.10", "3.5", "95"},
    "docs/how-to/one-gpu.md": {"0.5"},
    "docs/how-to/choose.md": {"25", "50"},
    "docs/how-to/steps.md": {"95"},
    "docs/methods/grape.md": {"0.9"},
    "docs/methods/eep.md": {"0.065"},
    "docs/methods/choice.md": {"2.5", "97.5"},
    "docs/methods/evoesap.md": {"1", "3"},
    "docs/faq.md": {"0"},
    "docs/reliability.md": {"95"},
    "docs/reference/files.md": set(),
}
OTHERS = {"docs/serving.md", "docs/how-to/tracking.md"}  # their numbers are tested by those who wrote them


def paragraphs(page):
    """The paragraphs, list items and tables of a page, without code and without links to papers and issues."""
    text = pages.without_code(page.read_text(encoding="utf-8"))
    text = re.sub(r"\[[^\]]*\]\(https?://[^)]*\)|arXiv \d{4}\.\d{5}|\b\d{4}\.\d{5}\b|<sub>.*?</sub>", " ", text)
    text = re.sub(r"^(!!!|#)[^\n]*$", "", text, flags=re.M)
    return [part for part in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text) if part.strip()]


def numbers_of(text):
    return [word.replace(",", "") for word in NUMBER.findall(LINK.sub("]", text))]


def holds(content, word):
    """Whether a number in the content is `word`, or rounds to it."""
    wanted = Decimal(word.lstrip("+-"))
    return any(found == wanted or found.quantize(wanted, ROUND_HALF_UP) == wanted for found in content)


def numbers_in(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = json.dumps(json.loads(text))
    return {Decimal(word.replace(",", "")) for word in ANY_NUMBER.findall(text)}


PAGES = [page for page in pages.pages() if page.relative_to(pages.ROOT).as_posix() not in OTHERS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(pages.ROOT).as_posix())
def test_numbers_are_those_of_the_linked_files(page):
    name = page.relative_to(pages.ROOT).as_posix()
    for paragraph in paragraphs(page):
        if paragraph.lstrip().startswith("| model ") and name == "README.md":
            continue  # the demo's table: below
        settings = SETTINGS.get(name, set())
        words = [word for word in numbers_of(paragraph) if word not in settings]
        if not words:
            continue
        links = LINK.findall(paragraph)
        assert links, f"{name}: {words} without a link to the file that they come from: {paragraph.strip()[:200]}"
        content = set().union(*(numbers_in((page.parent / link).resolve()) for link in links))
        missing = [word for word in words if not holds(content, word)]
        assert not missing, f"{name}: {missing} are not in {links}: {paragraph.strip()[:200]}"


def table(path):
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


def test_the_readme_has_the_demos_table():
    shown = [line for line in table(pages.ROOT / "README.md") if line.count("|") == 10]
    measured = [line for line in table(pages.ROOT / "bench" / "results" / "demo.md") if line.count("|") == 10]
    assert len(shown) == 9 and shown == measured


def test_the_readme_counts_the_models_that_the_table_counts():
    (count,) = re.findall(r"(\d+) kinds of model", (pages.ROOT / "README.md").read_text(encoding="utf-8"))
    assert f": {count} green" in (pages.DOCS / "models.md").read_text(encoding="utf-8")


def test_rounding_is_understood_and_other_numbers_are_found():
    content = {Decimal("64.7"), Decimal("0.0070")}
    assert holds(content, "64.7") and holds(content, "65") and holds(content, "0.007")
    assert not holds(content, "64") and not holds(content, "0.006")
    assert numbers_of("gains 0.25, 3.3 to 4.6 times, at 50 % and 12% of 7 experts") == [
        "0.25",
        "3.3",
        "4.6",
        "50",
        "12",
    ]
