"""How the command line speaks: tables or JSON on stdout, progress and errors on stderr.

This is the one place that prints. Names of users and models hold brackets and colons (`mixed4a:100:`), which rich would
take for styles and emoji: nothing that is printed here is interpreted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from circuits.environment import PROGRESS
from circuits.files import finite, write_json
from circuits.tables import Table

_WIDTH = None if sys.stdout.isatty() else 200  # a pipe or a file has no width to fit
_NOTE_EVERY = 0.25  # seconds


class _PlainConsole(Console):
    """Prints text as it is, and leaves a reader that has seen enough (`| head`) to `circuits.cli.main.run`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = _PlainConsole(width=_WIDTH)
errors = _PlainConsole(stderr=True, soft_wrap=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON, for machines; null for NaN and infinity."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")


def show_table(table: Table) -> None:
    """Print a table and its note, for people."""
    title = Text(table.title) if table.title else None
    made = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        made.add_column(Text(column), no_wrap=i == 0, overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    console.print(made)
    if table.note:
        say(table.note)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Print text for people."""
    console.print(text)


def note(text: str) -> None:
    """Print one line on stderr that is worth knowing."""
    errors.print(f"circuits: {text}")


def warn(text: str) -> None:
    """Print one line on stderr that is no error."""
    errors.print(f"circuits: {text}", style="yellow")


@contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, and in the file of a job; yields the callback that moves it."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    hidden = quiet or not sys.stderr.isatty()
    bar = Progress(*columns, console=errors, transient=True, disable=hidden)
    with bar, _noting(what) as note:
        task = bar.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            note(done, total)

        yield move


@contextmanager
def _noting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what writes progress to the file that `CIRCUITS_PROGRESS` names, now and then and at the end."""
    path = os.environ.get(PROGRESS)
    last: dict[str, Any] = {}
    due = 0.0

    def note(done: int, total: int) -> None:
        nonlocal due
        last.update(what=what, done=int(done), total=int(total))
        if time.monotonic() >= due:
            write()
            due = time.monotonic() + _NOTE_EVERY

    def write() -> None:
        if path and last:
            with suppress(OSError):  # work is not to fail for want of a place to say how far it is
                write_json(Path(path), last)

    try:
        yield note
    finally:
        write()
