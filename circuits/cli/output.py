"""How the command line speaks: tables or JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from circuits.environment import PROGRESS
from circuits.files import finite, write_json

if TYPE_CHECKING:
    from circuits.experiments.outcomes import Effect

_WIDTH = None if sys.stdout.isatty() else 200  # a pipe or a file has no width to fit
_NOTE_EVERY = 0.25  # seconds


class _PipedConsole(Console):
    """Leaves a reader that has seen enough (`| head`) to `circuits.cli.main.run`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


console = _PipedConsole(width=_WIDTH)
errors = Console(stderr=True, soft_wrap=True)


def show_json(value: Any) -> None:
    """Print `value` as JSON, for machines; null for NaN and infinity."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print rows under column heads, for people."""
    table = Table(
        title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(Text(column), no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))  # as it is: names may hold [brackets]
    console.print(table)


def show_effects(groups: Mapping[str, Mapping[str, Effect]], title: str) -> None:
    """Print effects, grouped under words that stand before each measure, with what they are compared with."""
    each = [
        (f"{g} {name}".strip(), e) for g, effects in groups.items() for name, e in effects.items()
    ]
    rows = [
        (
            name, e.intact, e.changed, e.change, _range((e.low, e.high)), _range(e.null_range) if e.null else "none",
            e.p_value,
        )
        for name, e in each
    ]  # fmt: skip
    null_is = "; ".join(dict.fromkeys(e.null_is for _, e in each))
    least = max((e.least_p for _, e in each if e.null), default=float("nan"))
    columns = ("measure", "intact", "changed", "change", "95 % interval", "null", "p")
    show_table(columns, rows, title)
    say(f"null: {null_is}" + ("" if least != least else f"; smallest possible p: {least:.2g}"))


def show_classes(classes: Any) -> None:
    """Print the classes whose accuracy changed most, if any did."""
    if classes:
        rows = [(c.name, c.n, c.intact, c.changed) for c in classes[:10]]
        columns = ("class", "examples", "right", "right when changed")
        show_table(columns, rows, title="classes that changed most")


def _range(ends: tuple[float, float]) -> str:
    return "unknown" if ends[0] != ends[0] else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def visible(token: str) -> str:
    """A token on one line, with its line ends marked.

    >>> visible(" a\\n")
    ' a↵'
    """
    return token.replace("\n", "↵")


def say(text: str) -> None:
    """Print one line for people."""
    console.print(text, markup=False, highlight=False)


def warn(text: str) -> None:
    """Print one line on stderr that is no error."""
    errors.print(f"circuits: {text}", markup=False, highlight=False, style="yellow")


@contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, and in the file of a job; yields the callback that moves it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
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
