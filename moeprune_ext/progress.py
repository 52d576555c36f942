"""Shows on stderr how far the work is: a line per stage, with its rate, the best so far and the time left.

A function that takes `progress` opens its bars with `bar` or `track`. True draws them alone; a View draws the bars of
several functions on one display. Where stderr is no terminal, nothing is drawn and no thread is started.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console  # imported where a terminal is drawn on: it takes a tenth of a second
    from rich.progress import Progress

T = TypeVar("T")

NEWEST = 0.3  # weight of the newest step in the mean time of a unit: steps read from a journal take no time


class View:
    """A display that several functions draw their bars on. Finished bars stay as lines above those that run.

    Args:
        console: where to draw, if it is a terminal; None: stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self.display: Progress | None = None  # None outside `with`, and without a terminal

    def __enter__(self) -> View:
        if self._console is None and not sys.stderr.isatty():
            return self
        from rich.console import Console

        console = self._console or Console(stderr=True)
        if console.is_terminal:
            self.display = _new_display(console)
            self.display.start()
            console.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back
        return self

    def __exit__(self, *exception: object) -> None:
        display, self.display = self.display, None
        if display is not None:
            display.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bars that run; on stderr where none are drawn."""
        if self.display is None:
            print(text, file=sys.stderr)
        else:
            self.display.console.out(text, highlight=False)


class Bar:
    """One line: what is done, how many units of how many, the rate, the time taken and left, and a note."""

    def __init__(self, description: str, total: int, unit: str, display: Progress | None) -> None:
        self._done, self._total, self._unit, self.text = 0, total, unit, ""
        self._started = self._last = time.monotonic()
        self._each: float | None = None  # seconds
        self._display = display
        if display is not None:
            self._task = display.add_task(description, total=total, line=self)

    def advance(self, n: int = 1) -> None:
        """Counts n more units as done."""
        now = time.monotonic()
        if n:
            each = (now - self._last) / n
            self._each = each if self._each is None else self._each + NEWEST * (each - self._each)
        self._done, self._last = self._done + n, now
        self._update()

    def note(self, text: str) -> None:
        """Shows a text at the end of the line, such as "best 0.7712"."""
        self.text = text

    def reset(self, total: int, unit: str | None = None) -> None:
        """Counts from 0 again, to another total, in another unit if one is given. The time taken goes on."""
        self._done, self._total, self._unit = 0, total, unit or self._unit
        self._each, self._last = None, time.monotonic()
        self._update()

    def close(self) -> None:
        """Leaves the line as it is, above the bars that run."""
        if self._display is not None:
            task = next(task for task in self._display.tasks if task.id == self._task)
            self._display.remove_task(self._task)
            self._display.refresh()
            self._display.console.print(self._display.make_tasks_table([task]))

    @property
    def count(self) -> str:
        """The units that are done."""
        return f"{self._done}/{self._total} {self._unit}"

    @property
    def rate(self) -> str:
        """Units a second, or seconds a unit."""
        if self._each is None:
            return ""
        return f"{self._each:.1f} s each" if self._each > 1 else f"{1 / max(self._each, 1e-9):.1f}/s"

    @property
    def times(self) -> str:
        """The time taken < the time left."""
        now = time.monotonic()
        taken = _clock(now - self._started)
        if self._each is None or self._done >= self._total:
            return taken
        return f"{taken} < {_clock(max(0.0, self._each * (self._total - self._done) - (now - self._last)))}"

    def _update(self) -> None:
        if self._display is not None:
            self._display.update(self._task, total=self._total, completed=self._done)


@contextmanager
def bar(progress: bool | View, description: str, total: int, unit: str) -> Iterator[Bar]:
    """Opens a bar, which is closed however the block ends.

    Args:
        progress: a View to draw on; True: a View of its own; False: nothing is shown.
        description: what is done.
        total: units to do.
        unit: name of one.
    """
    with ExitStack() as stack:
        view = progress if isinstance(progress, View) else stack.enter_context(View()) if progress else None
        line = Bar(description, total, unit, view.display if view is not None else None)
        stack.callback(line.close)
        yield line


def track(progress: bool | View, items: Collection[T], description: str, unit: str) -> Iterator[T]:
    """Yields items, with a bar that counts those that are done; see `bar`."""
    with bar(progress, description, len(items), unit) as line:
        for item in items:
            yield item
            line.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _new_display(console: Console) -> Progress:
    """Makes rich's display of Bars."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(field: str, width: int, style: str = "none") -> TextColumn:
        # Of a least width, so that finished lines, each a table of its own, stand under each other.
        column = Column(no_wrap=True, min_width=width)
        return TextColumn(f"{{task.{field}}}", style, markup=False, table_column=column)

    return Progress(
        text("description", 14),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # what the texts leave of the line
        text("fields[line].count", 16),
        text("fields[line].rate", 10),
        text("fields[line].times", 13, "progress.elapsed"),
        text("fields[line].text", 14, "bold"),
        console=console,
        expand=True,
        transient=True,  # `Bar.close` prints what stays
        redirect_stdout=sys.stdout.isatty(),  # a result that goes into a file or a pipe must get there
    )
