"""Progress: one view of lines on a terminal, which is left clean, and nothing anywhere else."""

import io
import re
import subprocess
import sys
import threading
from contextlib import redirect_stderr

import pytest
from rich.console import Console
from tiny_models import random_tokens, tiny_model

import moeprune_ext as mp
from moeprune_ext import progress
from moeprune_ext.allocation.naee import naee_scores
from moeprune_ext.checkpoint.streaming import load_streamed
from moeprune_ext.progress import View, bar, track


class Terminal(io.StringIO):
    """A terminal of unlimited height, which says what a reader sees."""

    def isatty(self):
        return True

    def view(self):
        return View(Console(file=self, force_terminal=True, width=100, height=30, _environ={"TERM": "xterm"}))

    def screen(self):
        """The lines on the screen; raises if the cursor stays hidden or a code is not one of those rich uses."""
        lines, row, column, shown = [""], 0, 0, True
        for code, number, command, text in re.findall(r"(\x1b\[\??([\d;]*)([A-Za-z]))|([\s\S])", self.getvalue()):
            if text == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            elif text == "\r":
                column = 0
            elif text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
                column += 1
            elif command == "A":
                row -= int(number)
            elif command == "K":
                lines[row] = ""
            elif code in ("\x1b[?25l", "\x1b[?25h"):
                shown = command == "h"
            else:
                assert command == "m"
        assert shown
        return [" ".join(line.split()) for line in lines if line.strip()]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in a list."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_running_line_has_rate_and_time_left_and_a_finished_one_stays(clock):
    terminal = Terminal()
    with terminal.view() as view:
        with bar(view, "evolve [esap]", 3, "gen") as line:
            clock[0] = 4.0
            line.advance()
            line.note("best 0.7712 [x]")
            view.display.refresh()
            assert re.fullmatch(
                r"evolve \[esap\] [╸╺━ ]+ 1/3 gen 4\.0 s each 0:04 < 0:08 best 0\.7712 \[x\]", terminal.screen()[0]
            )
            clock[0] = 64.0
            line.advance(2)
        (finished,) = terminal.screen()
        assert re.fullmatch(r"evolve \[esap\] ━+ 3/3 gen 11\.8 s each 1:04 best 0\.7712 \[x\]", finished)
    assert terminal.screen() == [finished]


def test_lines_stay_in_the_order_in_which_they_finish_below_what_was_said():
    terminal = Terminal()
    with terminal.view() as view, bar(view, "outer", 2, "stage") as outer:
        for item in track(view, "ab", "inner", "letter"):
            view.say(f"at {item} [b]:smile: {'word ' * 30}end")
            outer.advance()
            view.display.refresh()
            assert [line.split()[0] for line in terminal.screen()[-2:]] == ["outer", "inner"]
        print("printed")
    *said, inner, outer_line = terminal.screen()
    assert said == [f"at {item} [b]:smile: {'word ' * 30}end" for item in "ab"]
    assert inner.startswith("inner") and "2/2 letter" in inner
    assert outer_line.startswith("outer") and "2/2 stage" in outer_line


def test_what_is_printed_to_stderr_meanwhile_stands_above_the_lines():
    with redirect_stderr(Terminal()) as terminal:
        with View() as view, bar(view, "work", 1, "step") as line:
            view.display.refresh()
            print("a warning", file=sys.stderr)
            line.advance()
        assert sys.stderr is terminal
    said, finished = terminal.screen()
    assert said == "a warning" and finished.startswith("work")


def test_a_result_printed_meanwhile_goes_to_stdout_where_that_is_a_pipe(capsys):
    with redirect_stderr(Terminal()) as terminal, bar(True, "work", 1, "step"):
        print("result")
    assert capsys.readouterr().out == "result\n"
    (line,) = terminal.screen()
    assert line.startswith("work")


def test_a_bar_counts_anew_in_another_unit(clock):
    terminal = Terminal()
    with terminal.view() as view, bar(view, "calibrate", 5, "batch") as line:
        clock[0] = 10.0
        line.advance()
        line.reset(2, "layer")
        clock[0] = 10.5
        line.advance()
    assert re.fullmatch(r"calibrate [╸╺━ ]+ 1/2 layer 2\.0/s 0:10 < 0:00", terminal.screen()[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_leaves_the_line_and_a_clean_terminal(error):
    before = set(threading.enumerate())
    with redirect_stderr(Terminal()) as terminal:
        with pytest.raises(error):
            for item in track(True, [1, 2, 3], "work", "step"):
                (thread,) = set(threading.enumerate()) - before
                if item == 2:
                    raise error
        thread.join(5)
        assert not thread.is_alive() and sys.stderr is terminal
    (line,) = terminal.screen()
    assert "1/3 step" in line


@pytest.mark.parametrize("streamed", [False, True])
def test_functions_add_their_lines_to_a_view(tmp_path, streamed):
    model = tiny_model("olmoe")
    if streamed:
        model.save_pretrained(tmp_path)
        model = load_streamed(tmp_path)
    terminal = Terminal()
    with terminal.view() as view:
        mp.calibrate(model, [random_tokens()], progress=view)
        naee_scores(model, [random_tokens()], progress=view)
    lines = terminal.screen()
    assert [line.split()[0] for line in lines] == ["calibrate", "sample", "naee"]
    assert ("4/4 layer" if streamed else "1/1 batch") in lines[0] and "4/4 layer" in lines[2]


def test_a_search_shows_its_best_score():
    model = tiny_model("olmoe")
    evaluator = mp.CandidateEvaluator(model, [random_tokens()])
    scores = mp.score_experts(mp.calibrate(model, [random_tokens()]), "reap")
    with redirect_stderr(Terminal()) as terminal:
        result = mp.evolve(evaluator, scores, 0.25, population=6, generations=2, elites=2, progress=True)
    (line,) = terminal.screen()
    assert line.startswith("evolve esap") and "2/2 gen" in line and line.endswith(f"best {result.score:.4f}")


@pytest.mark.parametrize("shown", [False, True, "view"])
def test_nothing_is_written_and_no_thread_runs_where_stderr_is_no_terminal(capfd, monkeypatch, shown):
    monkeypatch.setenv("FORCE_COLOR", "1")
    threads = threading.active_count()
    with View() as view:
        for _ in track(view if shown == "view" else shown, [1, 2], "work", "step"):
            assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")
    view.say("text")
    assert capfd.readouterr() == ("", "text\n")


def test_false_draws_nothing_on_a_terminal():
    with redirect_stderr(Terminal()) as terminal:
        for _ in track(False, [1, 2], "work", "step"):
            pass
    assert terminal.getvalue() == ""


def test_rich_is_imported_only_to_draw():
    code = (
        "import sys, moeprune_ext.progress as p\n"
        "for _ in p.track(True, [1], 'work', 'step'): pass\n"
        "assert not any(name.split('.')[0] == 'rich' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.PIPE)
