"""`circuits jobs`: work that runs in the background."""

# no `from __future__ import annotations`: typer reads the annotations
from dataclasses import asdict
from typing import Annotated, Any

import typer

from circuits.cli.arguments import JsonOption, WorkspaceOption, within
from circuits.cli.output import say, show_json, show_table
from circuits.jobs import VERBS, Job, cancel, job, jobs, log_of, remove, start
from circuits.workspace import Workspace

app = typer.Typer(
    help="Start, list and cancel work that runs in the background.",
    no_args_is_help=True,
)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `circuits jobs ls` shows it.")]


@app.command(name="ls")
def list_jobs(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """List the jobs of a workspace, newest first."""
    found = jobs(Workspace.default(workspace))
    if json:
        show_json([_facts(one) for one in found])
        return
    show_table(
        ("job", "state", "done", "what", "last said"),
        [(one.id, one.state, _share(one), one.title, one.message) for one in found],
    )


@app.command(name="show")
def show_job(
    id: IdArgument,
    lines: Annotated[
        int, typer.Option(callback=within(1), help="How much of the end of its log.")
    ] = 50,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Show how far a job is, and the end of what it printed."""
    found = job(Workspace.default(workspace), id)
    log = log_of(found, lines)
    if json:
        show_json(_facts(found) | {"log": log})
        return
    say(f"{found.title}: {found.state} {_share(found)}".rstrip())
    say(f"started {found.started}, {found.folder}")
    if log:
        say(log)


@app.command(
    name="start", context_settings={"allow_interspersed_args": False}
)  # options behind the verb are the verb's
def start_job(
    command: Annotated[
        list[str],
        typer.Argument(metavar="VERB", help=f"One of {', '.join(VERBS)}; and its arguments."),
    ],
    title: Annotated[str, typer.Option(help="What to call it (default: the command).")] = "",
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Start a verb in the background, unless the same is running."""
    _say(start(Workspace.default(workspace), command, title), json)


@app.command(name="cancel")
def cancel_job(id: IdArgument, workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Interrupt a job and wait until it has ended. The same verb goes on where it stopped."""
    _say(cancel(job(Workspace.default(workspace), id)), json)


@app.command(name="rm")
def remove_job(id: IdArgument, workspace: WorkspaceOption = None) -> None:
    """Forget a job that is not running. What it made is left alone."""
    remove(job(Workspace.default(workspace), id))
    say(f"deleted job {id}")


def _say(one: Job, json: bool) -> None:
    if json:
        show_json(_facts(one))
    else:
        say(f"{one.id}: {one.state}")


def _facts(one: Job) -> dict[str, Any]:
    return asdict(one) | {"folder": str(one.folder)}


def _share(one: Job) -> str:
    return f"{one.done}/{one.total}" if one.total else ""
