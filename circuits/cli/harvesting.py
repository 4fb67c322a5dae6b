"""`circuits harvest`: one pass over a dataset into an activation store."""

import os
from typing import Annotated

import typer

from circuits.cli.arguments import (
    DataOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    WeightsOption,
    WorkspaceOption,
    record_of,
)
from circuits.cli.output import progress_bar, warn
from circuits.cli.stores import show_store
from circuits.harvesting import harvest as run
from circuits.models.paths.selecting import select_sites
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import Source, open_source
from circuits.store import Provenance
from circuits.store.provenance import Layout, Precision
from circuits.workspace import ModelRecord, Workspace

app = typer.Typer()


@app.command()
def harvest(
    model: ModelArgument,
    data: DataOption,
    sites: Annotated[
        str, typer.Option("--sites", help="Sites, separated by commas; patterns like mixed* too.")
    ] = "",
    full: Annotated[str, typer.Option(help="Sites of which to keep the whole tensor.")] = "",
    covariance: Annotated[
        str, typer.Option(help="Sites of which to keep the units' covariance.")
    ] = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples in one forward pass (default: what memory allows).")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Of whole tensors: rows are faster to read at random.")
    ] = "blocks",
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress whole tensors where it pays.")
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="What the forward pass computes in.")
    ] = "float32",
    memory: Annotated[float, typer.Option(help="GiB that activations may take.")] = 4.0,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: one a CPU thread).")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List examples that cannot be read, and go on.")
    ] = False,
    positions: Annotated[
        int | None,
        typer.Option(help="Positions of an example that histograms look at, drawn; 0 is all."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--anew", help="Go on where a run stopped, or begin anew.")
    ] = True,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Record what units do on every example of a dataset. Run it again to resume.

    Under `torchrun --nproc-per-node N -m circuits harvest …` N processes share the work.
    """

    place = Workspace.default(workspace).writable()
    loaded = load_model(model, weights)
    source = open_source(data)
    record = record_of(model, weights, loaded.hash)
    lead = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"
    if lead:
        _note_stale(place, record, source)
    with progress_bar(f"harvest {model} on {data}", quiet=json or not lead) as progress:
        store = run(
            loaded,
            source,
            [s.name for s in select_sites(loaded, sites)],
            place,
            record,
            batch,
            progress,
            full=[s.name for s in select_sites(loaded, full)],
            covariance=[s.name for s in select_sites(loaded, covariance)],
            layout=layout,
            compress=compress,
            precision=precision,
            positions=positions,
            memory=_bytes(memory),
            workers=workers,
            skip_bad=skip_bad,
            anew=not resume,
            seed=seed,
        )
    if lead:
        show_store(store, json)


def _bytes(memory: float) -> int:
    if not 0 < memory < 2**20:
        raise ValueError(f"memory {memory} must be a number of GiB above 0")
    return int(memory * 2**30)


def _note_stale(place: Workspace, record: ModelRecord, source: Source) -> None:
    """Say so if the same names led to other weights or other data before: nothing old is reused."""

    for folder in place.all_store_folders():
        try:
            known = Provenance.read(folder)
        except (OSError, ValueError):
            continue
        if (known.model, known.data) != (record.spec, source.spec):
            continue
        for what, before, now in (
            ("model", known.model_hash, record.hash),
            ("data", known.data_hash, source.hash),
        ):
            if before != now:
                name = known.model if what == "model" else known.data
                warn(
                    f"{what} {name} has changed since {str(folder)!r} was made "
                    f"({before[:16]}, now {now[:16]}): a new store is made"
                )
                return
