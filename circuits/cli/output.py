"""How the command line speaks: tables or JSON on stdout, progress and errors on stderr.

This is the one place that prints. Names of users and models hold brackets and colons (`mixed4a:100:`), which rich would
take for styles and emoji: nothing that is printed here is interpreted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from math import isnan
from pathlib import Path
from time import monotonic
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from circuits.checks import seen
from circuits.environment import DEBUG, PROGRESS
from circuits.errors import is_theirs, shortened
from circuits.files import finite, write_json
from circuits.tables import Table

_WIDTH = None if sys.stdout.isatty() else 200  # a pipe or a file has no width to fit
_NOTE_EVERY = 0.25  # seconds
_LINE_EVERY = 60.0  # seconds

_EARLY = 25
"""Before this part of the work is done, it is not said how long the rest takes: what comes first is not typical."""


class _PlainConsole(Console):
    """Prints text as it is, and leaves a reader that has seen enough (`| head`) to `circuits.cli.main.run`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Go on printing to where it prints now, whatever `sys.stdout` becomes."""
        before = self._file
        self.file = self.file
        try:
            yield
        finally:
            self._file = before


console = _PlainConsole(width=_WIDTH)
errors = _PlainConsole(stderr=True, soft_wrap=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON, for machines; null for NaN and infinity."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    console.file.write(text + "\n")


def show_table(table: Table) -> None:
    """Print a table and its note, for people."""
    title = Text(_words(table.title)) if table.title else None
    made = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        made.add_column(Text(_cell(column)), no_wrap=i == 0, overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    console.print(made)
    if table.note:
        say(table.note)


def _cell(value: object) -> str:
    """A value as text; NaN stands for what does not exist, such as a p without random edits, and is no number."""
    if isinstance(value, float):
        return "–" if isnan(value) else f"{value + 0.0:.4g}"  # no -0
    return _words(str(value), keep="")


def _words(text: str, keep: str = "\n\t") -> str:
    """A text as it is printed: nothing in it moves the cursor, or makes the terminal do anything else.

    Names of files may hold bytes that are no text; they are printed as escapes.
    """
    return seen(text.encode(errors="backslashreplace").decode(), keep)


def say(text: str) -> None:
    """Print text for people."""
    console.print(_words(text))


def note(text: str) -> None:
    """Print one line on stderr that is worth knowing."""
    tell(f"circuits: {shortened(text)}")


def warn(text: str) -> None:
    """Print one line on stderr that is no error."""
    tell(f"circuits: {shortened(text)}", style="yellow")


@contextmanager
def only_ours() -> Iterator[None]:
    """On stderr our own lines, and the warnings and logs of a person's own code as such lines.

    Those of other libraries, which say nothing of what was typed, are dropped; `CIRCUITS_DEBUG=1` shows everything.
    """
    if os.environ.get(DEBUG):
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it prints its log itself
    log, shown, handler = logging.getLogger(), warnings.showwarning, _OurLog(logging.WARNING)
    warnings.showwarning = _show_warning
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        warnings.showwarning = shown


@contextmanager
def results_alone() -> Iterator[None]:
    """Results alone on stdout: what other code prints, such as a person's model, goes to stderr."""
    with console.staying(), redirect_stdout(sys.stderr):
        yield


def _show_warning(
    message: Warning | str, category: type[Warning], file: str, number: int, *_: Any, **__: Any
) -> None:
    if is_theirs(file):
        warn(f"{file}, line {number}: {category.__name__}: {message}")


class _OurLog(logging.Handler):
    """Shows what this package and a person's own code log as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] == "circuits" or is_theirs(record.pathname):
            warn(record.getMessage())


@dataclass
class _Silence:
    """Since when nothing has been said on stderr; None if no work has begun."""

    since: float | None = None


_silence = _Silence()


def begin() -> None:
    """Begin a command: the minute until the first line of its long work is counted from its first progress.

    Names of files may hold bytes that are no text; they are printed as escapes.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    _silence.since = None


def tell(text: str, style: str | None = None) -> None:
    """Print one line on stderr."""
    errors.print(_words(text), style=style)
    _silence.since = monotonic()


def leads() -> bool:
    """Whether this process speaks for all: rank 0 of those that `torchrun` started, or the only one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, and in the file of a job; yields the callback that moves it.

    Where no bar can be seen, a line a minute says how far it is; a job's file says it already.
    """
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    hidden = quiet or not sys.stderr.isatty() or not leads()
    lines = _Lines(what) if hidden and leads() and PROGRESS not in os.environ else None
    bar = Progress(*columns, console=errors, transient=True, disable=hidden)
    with bar, _noting(what) as note:
        task = bar.add_task(_words(what), total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if lines is not None:
                lines.move(done, total)
            note(done, total)

        yield move


class _Lines:
    """Says how far work is when nothing has been said for a minute.

    Args:
        what: the work.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = 0
        self.first: tuple[int, float] | None = None
        if _silence.since is None:
            _silence.since = monotonic()

    def move(self, done: int, total: int) -> None:
        """Note how much is done, and say it if it is time to."""
        now = monotonic()
        if self.first is None or done < self.done:  # what was there before, or the next of several
            self.first = done, now
        self.done = done
        if _silence.since is None or now - _silence.since < _LINE_EVERY or total <= 0:
            return
        text = f"{self.what}: {done} of {total} ({100 * done // total} %)"
        before, since = self.first
        if before < done and (done - before) * _EARLY >= total - before:
            text += f", {_duration((now - since) * (total - done) / (done - before))} left"
        note(text)


def _duration(seconds: float) -> str:
    """
    >>> _duration(50), _duration(130), _duration(7500)
    ('50 s', '2 min', '2 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _noting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what writes progress to the file that `CIRCUITS_PROGRESS` names, now and then and at the end."""
    path = os.environ.get(PROGRESS)
    last: dict[str, Any] = {}
    due = 0.0

    def note(done: int, total: int) -> None:
        nonlocal due
        last.update(what=what, done=int(done), total=int(total))
        if monotonic() >= due:
            write()
            due = monotonic() + _NOTE_EVERY

    def write() -> None:
        if path and last:
            with suppress(OSError):  # work is not to fail for want of a place to say how far it is
                write_json(Path(path), last)

    try:
        yield note
    finally:
        write()
