"""`circuits store`: looking after activation stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from circuits.cli.options import Output, WorkspaceFolder, check_out
from circuits.cli.output import say, warn
from circuits.cli.signatures import argument, command, option
from circuits.store import ActivationStore, Provenance
from circuits.store.exporting import Format, export
from circuits.store.reading import verify
from circuits.store.shards import remove
from circuits.tables import Table
from circuits.units import unknown
from circuits.workspace import Workspace

app = typer.Typer(help="Look after activation stores.", no_args_is_help=True)

_FORMATS: dict[str, Format] = {".npz": "npz", ".safetensors": "safetensors", ".parquet": "parquet"}


@dataclass(frozen=True)
class StoreOptions:
    """A store of a workspace."""

    store: Annotated[
        str, argument("The store: its folder, or its name in `circuits store ls` (the last part is enough).")
    ]  # fmt: skip
    workspace: WorkspaceFolder = None

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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _listed(place: Workspace) -> Iterator[dict[str, Any]]:
    for folder in place.all_store_folders():
        facts: dict[str, Any] = {"store": _name(folder, place.root), "bytes": _size(folder)}
        try:
            p = Provenance.read(folder)
        except (OSError, ValueError):
            yield facts | {"state": "damaged"}
            continue
        state = "finished" if (folder / "statistics.h5").exists() else "unfinished"
        yield facts | {
            "state": state, "model": p.model, "data": p.data, "examples": len(p.examples), "sites": len(p.sites),
            "full": len(p.depth.full),
        }  # fmt: skip


@command(app, "ls")
def list_stores(output: Output, workspace: WorkspaceFolder = None) -> None:
    """List the stores of a workspace."""
    found = list(_listed(Workspace.default(workspace)))
    columns = ("store", "model", "data", "examples", "sites", "full", "state")
    rows = [(*(f.get(c, "") for c in columns), f"{f['bytes'] / 1e6:.1f}") for f in found]
    output.show(found, [Table((*columns, "MB"), rows)])


@command(app)
def info(store: StoreOptions, output: Output) -> None:
    """Show what a store was made from, and what is in it."""
    show_store(store.open(), output)


def show_store(store: ActivationStore, output: Output) -> None:
    """Say what is in a store, and what is wrong with it."""
    p = store.provenance
    kept = {site.name: store.summary(site.name) for site in p.sites}
    nonfinite = {name: n for name, s in kept.items() if (n := int(s.nonfinite.sum()))}
    facts = {
        "folder": str(store.folder), "model": p.model, "model_hash": p.model_hash, "data": p.data,
        "data_hash": p.data_hash, "examples": len(p.examples), "skipped": store.skipped, "version": p.version,
        "batch": p.batch, "depth": asdict(p.depth), "same": p.same, "sites": list(kept), "nonfinite": nonfinite,
    }  # fmt: skip

    def tables() -> Iterator[Table | str]:
        yield f"{len(p.examples)} examples of {p.data} in {store.folder}"
        rows = []
        for site in p.sites:
            depth = "summary" + ", full" * (site.name in p.depth.full)
            depth += ", covariance" * (site.name in p.depth.covariance)
            s = kept[site.name]
            best, density = float(np.fmax.reduce(s.maximum, axis=None)), float(s.density().mean())
            rows.append((site.name, site.n_units, depth, best, density))
        yield Table(("site", "units", "kept", "largest activation", "mean share above 0"), rows)
        for name, reason in store.skipped.items():
            warn(f"skipped {name}: {reason}")
        for name, n in nonfinite.items():
            warn(f"site {name}: {n} activations are NaN or infinite, and left out of statistics")

    output.show(facts, tables())


@command(app, "verify")
def verify_store(store: StoreOptions, output: Output) -> None:
    """Read every file of a store and compare it with its checksum. Exit code 1 if one differs."""
    folder = store.folder
    found = verify(folder, Provenance.read(folder))
    bad = [health for health in found if health.state != "intact"]
    rows = [(health.file, health.state) for health in bad or found]
    note = (
        f"{len(bad)} of {len(found)} files: run the same harvest again to make them again"
        if bad
        else ""
    )
    output.show([asdict(health) for health in found], [Table(("file", "state"), rows, note=note)])
    if bad:
        raise typer.Exit(1)


@command(app, "export")
def export_store(
    store: StoreOptions,
    site: Annotated[str, option("The site whose numbers are written.")],
    out: Annotated[Path, option("The file to write: .npz, .safetensors or .parquet.")],
    full: Annotated[bool, option(
        "Write the whole activations. By default the summary.", "--full"
    )] = False,
) -> None:  # fmt: skip
    """Write a site's numbers in another format."""
    check_out(out, *_FORMATS)
    export(store.open(), site, out, _FORMATS[out.suffix], full)
    say(f"{site} -> {out} ({out.stat().st_size / 1e6:.1f} MB)")


@command(app, "rm")
def remove_store(
    store: StoreOptions,
    yes: Annotated[bool, option("Delete it without asking.", "--yes")] = False,
) -> None:
    """Delete a store."""
    folder = store.folder
    question = f"Delete {folder} ({_size(folder) / 1e6:.1f} MB)?"
    if not yes and not typer.confirm(question, err=True):
        say(f"kept {folder}")
        return
    remove(folder)
    say(f"deleted {folder}")
