"""How the command line speaks: tables or JSON on stdout, progress and errors on stderr (layer 7)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from circuits.files import finite

_WIDTH = None if sys.stdout.isatty() else 200  # a pipe or a file has no width to fit


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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def say(text: str) -> None:
    """Print one line for people."""
    console.print(text, markup=False, highlight=False)


def warn(text: str) -> None:
    """Print one line on stderr that is no error."""
    errors.print(f"circuits: {text}", markup=False, highlight=False, style="yellow")


@contextmanager
def progress_bar(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields the callback that moves it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=errors, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
