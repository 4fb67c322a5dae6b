"""`circuits jobs`: work that runs in the background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

from typer import Typer

from circuits.checks import seen
from circuits.cli import options
from circuits.cli.output import say
from circuits.cli.signatures import Within, argument, command, option
from circuits.jobs import VERBS, Job, cancel, job, jobs, log_of, remove, start
from circuits.tables import Table
from circuits.workspace import Workspace

app = Typer(help="Start, list and cancel work that runs in the background.", no_args_is_help=True)

Id = Annotated[str, argument("The job's id, as `circuits jobs ls` shows it.", metavar="ID")]


@command(app, "ls")
def list_jobs(output: options.Output, workspace: options.WorkspaceFolder = None) -> None:
    """List the jobs of a workspace, newest first."""
    found = jobs(Workspace.default(workspace))
    rows = [(one.id, one.state, _share(one), one.title, one.message) for one in found]
    columns = ("job", "state", "done", "what", "last said")
    output.show([_facts(one) for one in found], [Table(columns, rows)])


@command(app, "show")
def show_job(
    id: Id,
    output: options.Output,
    lines: Annotated[int, option("How many lines of the end of its log to show.", check=Within(1))] = 50,
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Show how far a job is, and the end of what it printed."""
    found = job(Workspace.default(workspace), id)
    log = log_of(found, lines)

    def told() -> Iterator[str]:
        yield seen(f"{found.title}: {found.state} {_share(found)}".rstrip())
        yield seen(f"started {found.started}, {found.folder}")
        if log:
            yield log

    output.show(_facts(found) | {"log": log}, told())


@command(
    app, "start", context_settings={"allow_interspersed_args": False}
)  # what follows the verb belongs to the verb
def start_job(
    command: Annotated[list[str], argument(
        f"The command to run, with its arguments: {', '.join(VERBS)}.", metavar="VERB"
    )],
    output: options.Output,
    title: Annotated[str, option("What to call the job. By default its command.")] = "",
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Start a verb in the background, unless the same is running."""
    _tell(start(Workspace.default(workspace), command, title), output)


@command(app, "cancel")
def cancel_job(id: Id, output: options.Output, workspace: options.WorkspaceFolder = None) -> None:
    """Interrupt a job and wait until it has ended. The same verb goes on where it stopped."""
    _tell(cancel(job(Workspace.default(workspace), id)), output)


@command(app, "rm")
def remove_job(id: Id, workspace: options.WorkspaceFolder = None) -> None:
    """Forget a job that is not running. What it made is left alone."""
    remove(job(Workspace.default(workspace), id))
    say(f"deleted job {id}")


def _tell(one: Job, output: options.Output) -> None:
    output.show(_facts(one), [f"{one.id}: {one.state}"])


def _facts(one: Job) -> dict[str, Any]:
    return asdict(one) | {"folder": str(one.folder)}


def _share(one: Job) -> str:
    return f"{one.done}/{one.total}" if one.total else ""
