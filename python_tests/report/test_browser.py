"""Reports in a real browser, headless Chromium: `python_tests/report/browser.sh` installs it and runs this file."""

import csv
import json

import pytest
import runs

from moeprune_ext.report.report import write_report

pytestmark = pytest.mark.browser
KINDS = ("pruned/50", "pruned", "search", "eep", "table")
WIDTHS = {390: "narrow", 1280: "wide"}  # pixels, and which of a chart's two pictures is shown


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def chromium():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options)
    yield driver
    driver.quit()


def shown(driver, page, width, scheme):
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        dict.fromkeys(("latency", "downloadThroughput"), 0) | {"uploadThroughput": 0, "offline": True},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_and_says_nothing_on_the_console(finished, chromium, tmp_path, kind, width, scheme):
    page = write_report(finished / kind, tmp_path / "page.html")
    shown(chromium, page, width, scheme)
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = chromium.execute_script(
        "return [...document.querySelectorAll('figure')].map(f => ['narrow', 'wide'].map(c => {"
        "const r = f.querySelector('.' + c + ' svg').getBoundingClientRect(); return [r.left, r.right, r.height]}))"
    )
    assert boxes
    for narrow, wide in boxes:
        visible, hidden = (narrow, wide) if WIDTHS[width] == "narrow" else (wide, narrow)
        assert hidden[2] == 0 and visible[2] > 60 and 0 <= visible[0] < visible[1] <= width
    paper, ink = chromium.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    levels = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (paper, ink)]
    assert (levels[0] > levels[1]) == (scheme == "light") and abs(levels[0] - levels[1]) > 150
    sizes = chromium.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        ".filter(height => height > 0)"
    )
    assert min(sizes) >= 9  # pixels: words of a picture can be read on a phone


def test_the_tables_in_the_browser_equal_the_json(finished, chromium, tmp_path):
    page = write_report(finished / "pruned" / "50", tmp_path / "page.html")
    shown(chromium, page, 1280, "light")
    result = json.loads((finished / "pruned" / "50" / "moeprune" / "result.json").read_text())
    assert chromium.execute_script("return JSON.parse(document.getElementById('data').textContent)") == result
    cells = chromium.execute_script(
        "return [...document.querySelectorAll('section table')]"
        ".map(t => [...t.rows].map(r => [...r.cells].map(c => c.textContent)))"
    )
    first = cells[0]
    assert [row[0] for row in first[1:]] == [row["model"] for row in result["rows"]]
    assert [row[1].split(" ")[0] for row in first[1:]] == [f"{row['esap']['value']:.4f}" for row in result["rows"]]
    for name in ("kept-per-layer", "domains", "criteria", "search-progress"):
        rows = list(csv.reader((tmp_path / "page-pictures" / f"{name}.csv").open()))
        table = chromium.execute_script(
            f"return [...document.querySelectorAll('#{name} table tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert [row[0] for row in table] == [row[0] for row in rows] and len(table) == len(rows)
        link = chromium.execute_script(f"return document.querySelector('#{name} a').href")
        fetched = chromium.execute_async_script(
            "const done = arguments[1]; fetch(arguments[0]).then(r => r.text()).then(done)", link
        )
        assert fetched == (tmp_path / "page-pictures" / f"{name}.csv").read_text()
