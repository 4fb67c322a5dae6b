"""`circuits store`: looking after activation stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer.exceptions import Exit

from circuits.cli.output import say, show_json, show_table, warn
from circuits.store import ActivationStore, Provenance
from circuits.store.exporting import Format, export
from circuits.store.reading import verify
from circuits.store.shards import remove
from circuits.units import unknown
from circuits.workspace import Workspace

app = typer.Typer(help="Look after activation stores.", no_args_is_help=True)

StoreArgument = Annotated[
    str, typer.Argument(help="A store's folder, or its name in `circuits store ls`.")
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", help="Folder for results (default: $CIRCUITS_WORKSPACE or cache)."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)


def _find(store: str, workspace: Path | None) -> Path:
    """The folder of a store, by path, by its name in `ls`, or by the last part of that."""
    place = Workspace.default(workspace)
    if (Path(store) / "provenance.json").is_file():
        return Path(store)
    known = {_name(folder, place.root): folder for folder in place.all_store_folders()}
    found = [name for name in known if name == store or name.endswith(f"/{store}")]
    if len(found) > 1:
        raise ValueError(f"store {store!r} is not clear: it may be {', '.join(found)}")
    if not found:
        raise unknown("store", store, known)
    return known[found[0]]


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
            "state": state,
            "model": p.model,
            "data": p.data,
            "examples": len(p.examples),
            "sites": len(p.sites),
            "full": len(p.depth.full),
        }


@app.command(name="ls")
def list_stores(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """List the stores of a workspace."""
    found = list(_listed(Workspace.default(workspace)))
    if json:
        show_json(found)
        return
    columns = ("store", "model", "data", "examples", "sites", "full", "state")
    show_table(
        (*columns, "MB"),
        [(*(f.get(c, "") for c in columns), f"{f['bytes'] / 1e6:.1f}") for f in found],
    )


@app.command()
def info(store: StoreArgument, workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Show what a store was made from, and what is in it."""
    show_store(ActivationStore.open(_find(store, workspace)), json)


def show_store(store: ActivationStore, json: bool) -> None:
    """Say what is in a store, and what is wrong with it."""
    p = store.provenance
    rows = []
    for site in p.sites:
        s = store.summary(site.name)
        depth = "summary" + ", full" * (site.name in p.depth.full)
        depth += ", covariance" * (site.name in p.depth.covariance)
        best = float(np.fmax.reduce(s.maximum, axis=None))
        rows.append(
            (
                site.name,
                site.n_units,
                depth,
                best,
                float(s.density().mean()),
                int(s.nonfinite.sum()),
            )
        )
    facts = {
        "folder": str(store.folder),
        "model": p.model,
        "model_hash": p.model_hash,
        "data": p.data,
        "data_hash": p.data_hash,
        "examples": len(p.examples),
        "skipped": store.skipped,
        "version": p.version,
        "batch": p.batch,
        "depth": asdict(p.depth),
        "same": p.same,
        "sites": [row[0] for row in rows],
        "nonfinite": {row[0]: row[5] for row in rows if row[5]},
    }
    if json:
        show_json(facts)
        return
    say(f"{len(p.examples)} examples of {p.data} in {store.folder}")
    columns = ("site", "units", "kept", "largest activation", "mean share above 0")
    show_table(columns, [row[:5] for row in rows])
    for name, reason in store.skipped.items():
        warn(f"skipped {name}: {reason}")
    for row in rows:
        if row[5]:
            warn(
                f"site {row[0]}: {row[5]} activations are NaN or infinite, and left out of statistics"
            )


@app.command(name="verify")
def verify_store(
    store: StoreArgument, workspace: WorkspaceOption = None, json: JsonOption = False
) -> None:
    """Read every file of a store and compare it with its checksum. Exit code 1 if one differs."""
    folder = _find(store, workspace)
    found = verify(folder, Provenance.read(folder))
    bad = [health for health in found if health.state != "intact"]
    if json:
        show_json([asdict(health) for health in found])
    else:
        show_table(("file", "state"), [(health.file, health.state) for health in bad or found])
        if bad:
            say(f"{len(bad)} of {len(found)} files: run the same harvest again to make them anew")
    if bad:
        raise Exit(1)


@app.command(name="export")
def export_store(
    store: StoreArgument,
    site: Annotated[str, typer.Option(help="Which site.")],
    out: Annotated[Path, typer.Option(help="The file to write: .npz, .safetensors or .parquet.")],
    full: Annotated[
        bool, typer.Option("--full", help="The whole activations, not the summary.")
    ] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a site's numbers in another format."""
    kinds: dict[str, Format] = {".npz": "npz", ".safetensors": "safetensors", ".parquet": "parquet"}
    if out.suffix not in kinds:
        raise ValueError(f"out {str(out)!r} must end in {', '.join(kinds)}")
    export(ActivationStore.open(_find(store, workspace)), site, out, kinds[out.suffix], full)
    say(f"{site} -> {out} ({out.stat().st_size / 1e6:.1f} MB)")


@app.command(name="rm")
def remove_store(
    store: StoreArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Delete a store."""
    folder = _find(store, workspace)
    question = f"Delete {folder} ({_size(folder) / 1e6:.1f} MB)?"
    if not yes and not typer.confirm(question, err=True):
        say(f"kept {folder}")
        return
    remove(folder)
    say(f"deleted {folder}")
