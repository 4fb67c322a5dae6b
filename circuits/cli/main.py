"""The `circuits` command: the library's verbs for a shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated

import typer
from typer.exceptions import Abort, Exit, TyperException

from circuits import __version__
from circuits.cli.commands import Commands
from circuits.cli.output import begin, leads, only_ours, say, tell
from circuits.environment import DEBUG, WORKSPACE
from circuits.errors import line, shortened

_INTERRUPTED = 130  # the exit code of what was stopped by Ctrl-C

app = typer.Typer(
    name="circuits",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        say(f"circuits {__version__}")
        raise Exit
    return wanted


@app.callback()
def circuits(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Reverse-engineer neural networks: look at units, at the weights between them, and edit them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input is one line on stderr and exit code 2.

    With `CIRCUITS_DEBUG=1` in the environment errors keep their traceback.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    begin()
    try:
        with _workspace_of(given), only_ours():
            code = app(args=given, prog_name="circuits", standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except Exit as exit_:
        return exit_.exit_code
    except (Abort, KeyboardInterrupt) as error:
        if isinstance(
            error.__cause__, EOFError
        ):  # of a file that is cut off, which typer takes for Ctrl-D
            return _fail(line(error.__cause__), 2)
        return _fail("stopped; run the same command again to go on", _INTERRUPTED)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TyperException as error:
        message = _usage(error)
        return _fail(message, 2) if message else 2  # no command: the help has been shown
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return _fail(line(error), 2)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code if isinstance(code, int) else 0  # what `Exit` was raised with


@contextmanager
def _workspace_of(arguments: Sequence[str]) -> Iterator[None]:
    """What `--workspace` names is the workspace of the whole command: autoencoders are looked up there."""
    named = [b for a, b in pairwise(arguments) if a == "--workspace"]
    named += [a.partition("=")[2] for a in arguments if a.startswith("--workspace=")]
    before = os.environ.get(WORKSPACE)
    try:
        if named and named[-1]:
            os.environ[WORKSPACE] = named[-1]
        yield
    finally:
        if before is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = before


_EXPECTED = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 18 digits",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
}
"""What an option takes, by pydantic's name for the error of a word that is not of that kind."""


def _usage(error: TyperException) -> str:
    """What is wrong with the words of a command, naming each word as it was typed, and where help is found."""
    message = getattr(error, "format_message", lambda: str(error))()
    # Typer reads options by pydantic, whose words say neither the value nor, to a newcomer, what it should be.
    reasons = getattr(error.__cause__, "errors", list)()
    for reason in reasons:
        if reason["type"] in _EXPECTED:
            said = f"{reason['input']!r} is not {_EXPECTED[reason['type']]}"
            message = message.replace(reason["msg"], said)
    message = message.replace(": Value error, ", ": ")
    path = getattr(getattr(error, "ctx", None), "command_path", "circuits")
    if message.startswith("No such"):
        what = "options" if "option" in message.partition(":")[0] else "commands"
        message = f"{message.rstrip('.')} (`{path} --help` lists the {what})"
    return message


def _fail(message: str, code: int) -> int:
    """Say why in a line, once for all ranks of `torchrun`, which fail together."""
    if not leads():
        return code
    tell(f"circuits: {shortened(message)}", style="red")
    return code


if __name__ == "__main__":
    main()
