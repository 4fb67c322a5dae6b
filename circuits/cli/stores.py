"""`circuits store`: looking after activation stores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli import options
from circuits.cli.output import say, warn
from circuits.cli.signatures import argument, command, option
from circuits.store import ActivationStore, Provenance
from circuits.store.exporting import Format, export
from circuits.store.reading import describe, verify
from circuits.store.shards import remove
from circuits.tables import Table
from circuits.units import unknown
from circuits.workspace import Workspace

app = typer.Typer(
    help="List, inspect, verify, export and delete activation stores.", no_args_is_help=True
)

_FORMATS: dict[str, Format] = {".npz": "npz", ".safetensors": "safetensors", ".parquet": "parquet"}


@dataclass(frozen=True)
class StoreOptions:
    """A store of a workspace."""

    store: Annotated[
        str, argument("The store: its folder, or its name in `circuits store ls` (the last part is enough).")
    ]  # fmt: skip
    workspace: options.WorkspaceFolder = None

    @property
    def folder(self) -> Path:
        """Its folder.

        Raises:
            KeyError: if there is none of the name.
            ValueError: if there are several.
        """
        place = Workspace.default(self.workspace)
        if (Path(self.store) / "provenance.json").is_file():
            return Path(self.store)
        known = {_name(folder, place.root): folder for folder in place.all_store_folders()}
        found = [name for name in known if name == self.store or name.endswith(f"/{self.store}")]
        if len(found) > 1:
            raise ValueError(f"store {self.store!r} is not clear: it may be {', '.join(found)}")
        if not found:
            raise unknown("store", self.store, known)
        return known[found[0]]

    def open(self) -> ActivationStore:
        """The store itself."""
        return ActivationStore.open(self.folder)


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)


def _listed(folder: Path, root: Path) -> dict[str, Any]:
    return {"store": _name(folder, root), **describe(folder)}


@command(app, "ls")
def list_stores(output: options.Output, workspace: options.WorkspaceFolder = None) -> None:
    """List the stores of a workspace."""
    place = Workspace.default(workspace)
    found = [_listed(folder, place.root) for folder in place.all_store_folders()]
    columns = ("store", "model", "data", "examples", "sites", "full", "state")
    rows = [(*(f.get(c, "") for c in columns), f"{f['bytes'] / 1e6:.1f}") for f in found]
    output.show(found, [Table((*columns, "MB"), rows)])


@command(app)
def info(store: StoreOptions, output: options.Output) -> None:
    """Show what a store was made from, and what is in it."""
    show_store(store.open(), output)


def show_store(store: ActivationStore, output: options.Output) -> None:
    """Say what is in a store, and what is wrong with it."""
    output.show(store, store.tables())
    if not output.json:
        for problem in store.problems():
            warn(problem)


@command(app, "verify")
def verify_store(store: StoreOptions, output: options.Output) -> None:
    """Read every file of a store and compare it with its checksum. Exit code 1 if one differs."""
    folder = store.folder
    found = verify(folder, Provenance.read(folder))
    bad = [health for health in found if health.state != "consistent"]
    rows = [(health.file, health.state) for health in bad or found]
    note = (
        f"{len(bad)} of {len(found)} files: run the same harvest again to make them again"
        if bad
        else f"consistent: {len(found)} files have the checksums in the manifest (which is not signed)"
    )
    output.show([asdict(health) for health in found], [Table(("file", "state"), rows, note=note)])
    if bad:
        raise typer.Exit(1)


@command(app, "export")
def export_store(
    store: StoreOptions,
    site: Annotated[str, option("The site whose numbers are written.")],
    out: Annotated[Path, option("The file to write: .npz, .safetensors or .parquet.")],
    full: Annotated[bool, option("Write the whole activations. By default the summary.", "--full")] = False,
) -> None:  # fmt: skip
    """Write a site's numbers in another format."""
    options.check_out(out, *_FORMATS)
    export(store.open(), site, out, _FORMATS[out.suffix], full)
    say(f"{site} -> {out} ({out.stat().st_size / 1e6:.1f} MB)")


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # Ctrl-C, or nobody is there
        raise ValueError(
            "nothing was deleted: nobody answered (--yes deletes without asking)"
        ) from None


@command(app, "rm")
def remove_store(
    store: StoreOptions,
    yes: Annotated[bool, option("Delete it without asking.", "--yes")] = False,
) -> None:
    """Delete a store of the workspace. Files in its folder that are not the store's are left."""
    folder = store.folder
    question = f"Delete {folder} ({describe(folder)['bytes'] / 1e6:.1f} MB)?"
    if not yes and not _confirmed(question):
        say(f"kept {folder}")
        return
    left = remove(folder, Workspace.default(store.workspace).root)
    say(f"deleted {folder}")
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warn(f"{folder} is left, with files that are not the store's: {', '.join(left[:5])}{more}")
