"""A report says what the run's files say, in one file that needs nothing else."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import runs
from torch import tensor

import moeprune_ext as mp
from moeprune_ext.artifacts.about import command_line
from moeprune_ext.artifacts.measured import HEADER, Measured, cells
from moeprune_ext.charts import COLOURS, Point, heat_map, intervals, kept_per_layer
from moeprune_ext.cli.main import main
from moeprune_ext.report.plans import search_section
from moeprune_ext.report.report import write_report

KINDS = ("pruned/25", "pruned", "search", "eep", "table")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.make_runs(tmp_path_factory.mktemp("runs"))


class Read(HTMLParser):
    """The tables of a page as lists of rows, its headings, and what its tags refer to."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.references, self.open, self.data = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.open.append((tag, values.get("id")))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        inside = [tag for tag, _ in self.open]
        if self.open and self.open[-1] == ("script", "data"):
            self.data += text
        if "td" in inside or "th" in inside:
            self.tables[-1][-1][-1] += text
        if inside and inside[-1] in ("h2", "h3"):
            self.headings[-1] += text


def page_of(run, out):
    return write_report(run, out).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_no_other_file_and_its_pictures_lie_beside_it(finished, kind, tmp_path):
    text = page_of(finished / kind, tmp_path / "page.html")
    read = Read(text)
    assert all(one.startswith(("data:", "#")) for one in read.references)
    assert "@import" not in text and not re.search(r"url\((?!#|\"?data:)", text)
    assert not any(sentinel in text for sentinel, _ in COLOURS.values())  # all colours are the page's
    ids = re.findall(r'<figure id="([^"]+)"', text)
    assert ids and text.count("<svg ") == 2 * len(ids)  # wide and narrow
    for name in ids:
        assert (tmp_path / "page-pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.reader((tmp_path / "page-pictures" / f"{name}.csv").open()))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1
    assert page_of(finished / kind, tmp_path / "page.html") == text  # same files, same page


def test_the_tables_equal_the_runs_numbers(finished, tmp_path):
    read = Read(page_of(finished / "pruned" / "50", tmp_path / "page.html"))
    folder = finished / "pruned" / "50" / "moeprune"
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(read.data) == result
    measured = Measured.from_json(result)
    assert [list(HEADER), *map(cells, measured.rows)] in read.tables
    plan = mp.PruningPlan.load(folder / "plan.json")
    kept = [row for table in read.tables if table[0] == ["layer", "experts_before", "kept", "uniform"] for row in table]
    assert [[int(cell) for cell in row[:3]] for row in kept[1:]] == [
        [layer, plan.num_experts[layer], len(ids)] for layer, ids in plan.kept.items()
    ]
    heat = next(table for table in read.tables if table[0] == ["layer", "expert", "score", "kept"])
    stays = {(int(layer), int(expert)) for layer, expert, _, kept in heat[1:] if kept == "yes"}
    assert stays == {(layer, expert) for layer, ids in plan.kept.items() for expert in ids}
    domains = next(table for table in read.tables if table[0][:2] == ["name", "group"] and "first" in str(table))
    last = measured.rows[-1]
    for name, group, value, low, high in domains[1:]:
        if group == last.model:
            interval = last.domains[name]
            assert [value, low, high] == [f"{n:.6g}" for n in (interval.value, interval.low, interval.high)]


def test_a_pruning_runs_page_has_every_part(finished, tmp_path):
    read = Read(page_of(finished / "pruned", tmp_path / "page.html"))
    parts = ("Sizes", "What it is worth", "Experts kept per layer", "Experts by score", "ESAP by source of text")
    parts += ("Criteria compared", "Search progress", "The choice of the plan", "The repair", "How it was made")
    assert set(parts) <= set(read.headings)
    made = {row[0]: row[1] for table in read.tables for row in table if len(row) == 2}
    about = json.loads((finished / "pruned" / "50" / "moeprune" / "about.json").read_text())
    assert made["seed"] == "0" and made["fingerprint, test"] == about["fingerprints"]["test"]
    assert "torch" in made["versions"] and about["commands"][0]["command"]


def test_what_racing_saved_is_told(finished, tmp_path):
    text = page_of(finished / "pruned" / "50", tmp_path / "page.html")
    history = (finished / "pruned" / "50" / "moeprune" / "search" / "history.jsonl").read_text().splitlines()
    saved = sum(json.loads(line)["token_evaluations_saved"] for line in history)
    assert ("Racing dropped" in text) == (saved > 0)


def test_a_searchs_best_so_far_falls_where_lower_is_better(finished):
    chart = search_section(finished / "search").charts[0]
    best = [row[1] for row in chart.rows]
    assert best == sorted(best, reverse=True) and all(row[2] >= row[1] for row in chart.rows)
    spent = [json.loads(line)["token_evaluations"] for line in (finished / "search" / "history.jsonl").open()]
    assert [row[3] for row in chart.rows] == spent


def test_eeps_pages_have_the_accuracies(finished, tmp_path):
    result = json.loads((finished / "eep" / "result.json").read_text())
    read = Read(page_of(finished / "eep", tmp_path / "eep.html"))
    right = {row[0]: row[1:4] for row in read.tables[0][1:]}
    assert right["full model"] == [f"{result['accuracy']['full'][split]:.1%}" for split in ("train", "valid", "test")]
    rows = json.loads((finished / "table" / "table.json").read_text())
    table = Read(page_of(finished / "table", tmp_path / "table.html")).tables[0]
    assert [row[0] for row in table[1:]] == [row["model"] for row in rows]
    assert [row[5].split(" ")[0] for row in table[1:]] == [f"{row['accuracy']['test']:.1%}" for row in rows]


def test_the_verb_writes_where_it_is_told(finished, tmp_path, capsys):
    main(["report", str(finished / "pruned" / "25" / "moeprune"), "-o", str(tmp_path / "r.html"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(tmp_path / "r.html") and len(result["pictures"]) > 4
    assert (finished / "pruned" / "25" / "moeprune" / "report.html").exists()  # of the run itself


@pytest.mark.parametrize("missing", ["moeprune/result.json", None])
def test_what_is_no_finished_run_is_refused_and_nothing_is_written(finished, tmp_path, missing, capsys):
    run = tmp_path / "run"
    if missing:
        shutil.copytree(finished / "pruned" / "25", run)
        (run / missing).unlink()
        (run / "moeprune" / "report.html").unlink()
        shutil.rmtree(run / "moeprune" / "report-pictures")
    else:
        run.mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert ended.value.code == 2 and "no finished run" in capsys.readouterr().err
    assert not list(run.rglob("report*"))


def test_names_are_escaped(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "search", run)
    about = {"model": "/models/<script>alert(1)</script>", "seed": 0, "data": ["</script><b>"], "commands": []}
    (run / "about.json").write_text(json.dumps(about))
    text = page_of(run, tmp_path / "page.html")
    assert "<script>alert" not in text and "<b>" not in text and "&lt;b&gt;" in text


# ---- charts


def test_the_heat_map_says_how_many_stay_out_of_order():
    scores = {0: [3.0, 2.0, 1.0], 4: [1.0, float("inf"), float("nan")]}
    chart = heat_map(scores, {0: [0, 2], 4: [1]})
    assert "1 experts stay although" in chart.says
    assert [row[:2] for row in chart.rows] == [(0, 0), (0, 1), (0, 2), *((4, e) for _, e, *_ in chart.rows[3:])]
    assert chart.svg().startswith("<svg ") and "out of" not in heat_map({0: [3.0, 2.0]}, {0: [0]}).says


def test_charts_are_drawn_for_many_layers_and_for_missing_ends():
    kept = {layer: 1 + layer % 7 for layer in range(94)}
    chart = kept_per_layer(kept, dict.fromkeys(kept, 128))
    assert len(chart.rows) == 94 and sum(row[2] for row in chart.rows) == sum(kept.values())
    assert chart.svg() != chart.svg(narrow=True)
    nan = float("nan")
    chart = intervals(
        "x", 'A <b> & "c"', "", [Point("one", 1.0), Point("two", nan), Point("three", 2.0, 1.0, 3.0)], "y"
    )
    assert 'aria-label="A &lt;b> &amp; &quot;c&quot;"' in chart.svg()
    assert chart.csv.splitlines()[2] == "two,,,,"


def test_a_uniform_plan_is_called_so():
    assert kept_per_layer({0: 4, 1: 4}, {0: 8, 1: 8}).says == "Every layer keeps 4 experts."


# ---- the model card


def test_the_card_says_what_the_checkpoint_is_worth(finished):
    out = finished / "pruned" / "50"
    card, result = (out / "README.md").read_text(), json.loads((out / "moeprune" / "result.json").read_text())
    last = Measured.from_json(result).rows[-1]
    assert "| " + " | ".join(cells(last)) + " |" in re.sub(r" +", " ", card)
    assert "![Experts kept in each layer](experts-per-layer.png)" in card
    assert (out / "experts-per-layer.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((out / "moeprune" / "about.json").read_text())
    assert about["fingerprints"]["test"] in card and about["commands"][0]["command"] in card
    assert card.count("## What it is worth") == 1 and "## How it was made" in card


def test_a_card_is_completed_once_and_an_owners_own_is_left_alone(finished, tmp_path):
    from moeprune_ext.artifacts.about import read_about
    from moeprune_ext.checkpoint.card import add_measured

    source = finished / "pruned" / "25"
    measured = Measured.from_json(json.loads((source / "moeprune" / "result.json").read_text()))
    shutil.copy(source / "README.md", tmp_path)
    before = (tmp_path / "README.md").read_text()
    says = json.loads((source / "moeprune" / "held_out.json").read_text())["says"]
    add_measured(tmp_path, measured, says, read_about(source / "moeprune"))
    assert (tmp_path / "README.md").read_text() == before
    (tmp_path / "README.md").write_text("my own words")
    add_measured(tmp_path, measured, says, {})
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_plain_export_says_how_it_was_made_but_not_what_it_is_worth(finished, tmp_path):
    scores = {layer: tensor(range(8)) for layer in range(4)}
    model = mp.load(finished / "model")
    plan = mp.uniform_plan(mp.score_experts(mp.calibrate(model, [runs.random_tokens(2, 8)])), 0.5)
    assert set(plan.kept) == set(scores)
    out = mp.export(finished / "model", plan, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "## What it is worth" not in card and "| command |" in card and "| versions |" in card


@pytest.mark.parametrize("kind", ["eep", "search"])
def test_an_export_of_a_runs_plan_says_what_the_run_found(finished, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(finished / kind, run)
    shutil.copy(finished / "pruned" / "25" / "moeprune" / "about.json", run)  # as the verbs leave it
    if kind == "search":
        shutil.copy(finished / "pruned" / "25" / "moeprune" / "held_out.json", run)
    main(["export", str(finished / "model"), "--plan", str(run), "-o", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((run / ("held_out.json" if kind == "search" else "result.json")).read_text())
    found = result["says"] if kind == "search" else f"answers {result['accuracy']['best']['test']:.1%} ("
    assert found in card and card.count("## What it is worth") == 1
    if kind == "eep":  # the mask alone has figures of its own
        main(["export", str(finished / "model"), "--plan", str(run / "pruned_plan.json"), "-o", str(tmp_path / "mask")])
        card = (tmp_path / "mask" / "README.md").read_text()
        assert f"answers {result['accuracy']['pruned']['test']:.1%} (" in card


def test_an_export_of_another_plan_of_a_run_does_not_take_its_figures(finished, tmp_path):
    run = tmp_path / "moeprune"
    shutil.copytree(finished / "pruned" / "50" / "moeprune", run)
    plan = mp.PruningPlan.load(run / "plan.json")
    main(["export", str(finished / "model"), "--plan", str(run), "-o", str(tmp_path / "same")])
    assert "## What it is worth" in (tmp_path / "same" / "README.md").read_text()
    for name, other in (("searched.json", None), ("plan.json", {**plan.kept, 0: plan.kept[0][:2]})):
        if other is not None:
            mp.PruningPlan(other, plan.num_experts, model=plan.model).save(run / name)
        main(["export", str(finished / "model"), "--plan", str(run / name), "-o", str(tmp_path / name)])
        assert "## What it is worth" not in (tmp_path / name / "README.md").read_text()


def edited(run, rows=None, gain=None):
    """A pruned run's directory with other figures."""
    for name in ("result.json", "measured.json"):
        content = json.loads((run / "moeprune" / name).read_text())
        content |= ({} if rows is None else {"rows": rows(content["rows"])}) | ({} if gain is None else {"gain": gain})
        (run / "moeprune" / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "low, high, says",
    [(0.1, 0.2, "more than chance"), (-0.1, 0.2, "maybe chance"), (-0.2, -0.1, "a loss beyond chance")],
)
def test_a_gain_is_called_what_its_interval_says(finished, tmp_path, low, high, says):
    shutil.copytree(finished / "pruned" / "50", tmp_path / "run")
    edited(tmp_path / "run", gain={"value": (low + high) / 2, "low": low, "high": high})
    text = page_of(tmp_path / "run", tmp_path / "page.html")
    assert says in text and ("which may be no difference" in text) == (low < 0 < high)


def test_nothing_is_said_of_a_gain_where_there_is_nothing_to_compare_with(finished, tmp_path):
    shutil.copytree(finished / "pruned" / "50", tmp_path / "run")
    edited(tmp_path / "run", rows=lambda rows: [rows[0], rows[-1]])
    assert "gains" not in page_of(tmp_path / "run", tmp_path / "page.html").split("The search")[0].split("What was")[0]


def test_figures_of_an_earlier_version_are_refused_by_name(finished, tmp_path):
    shutil.copytree(finished / "pruned" / "50", tmp_path / "run")
    edited(tmp_path / "run", rows=lambda rows: [{**row, "perplexity": 3.0, "ratio": None} for row in rows])
    edited(tmp_path / "run", rows=lambda rows: [{k: v for k, v in row.items() if k != "ratio"} for row in rows])
    with pytest.raises(ValueError, match="earlier version"):
        write_report(tmp_path / "run")


def test_runs_of_other_text_are_not_put_into_one_table(finished, tmp_path):
    shutil.copytree(finished / "pruned", tmp_path / "runs")
    file = tmp_path / "runs" / "25" / "moeprune" / "request.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test": "other"}))
    with pytest.raises(ValueError, match="another test"):
        write_report(tmp_path / "runs")


def test_names_may_have_dollar_signs():
    assert "a$x_{b$" in intervals("x", "title", "", [Point("a$x_{b$", 1.0), Point("$b$", 2.0)], "$y").svg()


@pytest.mark.parametrize(
    "program, command",
    [("/usr/bin/moeprune", "moeprune info ."), ("/x/moeprune_ext/cli/__main__.py", "moeprune info .")]
    + [("/home/me/main.py", "python main.py info ."), ("-c", "-c info .")],
)
def test_a_command_is_recorded_as_it_was_typed(monkeypatch, program, command):
    monkeypatch.setattr("sys.argv", [program, "info", "."])
    assert command_line() == command
