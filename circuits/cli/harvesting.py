"""`circuits harvest`: one pass over a dataset into an activation store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from typer import Typer

from circuits.cli import options
from circuits.cli.output import leads, note, warn
from circuits.cli.signatures import Within, command, option
from circuits.cli.stores import show_store
from circuits.errors import line
from circuits.faces import make_faces
from circuits.harvesting import harvest as run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.selecting import select_sites
from circuits.stimuli.accounts import account
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import Source, open_source
from circuits.store import ActivationStore, Provenance
from circuits.store.provenance import Layout, Precision
from circuits.workspace import ModelRecord, Workspace

app = Typer()


@dataclass(frozen=True)
class Depth:
    """What is kept of which sites."""

    sites: Annotated[str, option(
        "The sites to harvest, separated by commas; patterns like 'mixed*' work too."
    )] = ""  # fmt: skip
    full: Annotated[str, option(
        "The sites whose full activations are also stored. By default none."
    )] = ""  # fmt: skip
    covariance: Annotated[str, option(
        "The sites for which the covariance of the units is also stored. By default none."
    )] = ""  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """How the pass over the dataset is made."""

    heading: ClassVar = "How it is run"

    batch: Annotated[int | None, option(
        "How many examples to run in one forward pass. By default as many as --memory allows.", check=Within(1)
    )] = None  # fmt: skip
    layout: Annotated[Layout, option(
        "How full activations are laid out on disk: in blocks, or in rows, which are faster to read in random order."
    )] = "blocks"  # fmt: skip
    compress: Annotated[bool, option(
        "Compress full activations where that saves enough space.", "--compress"
    )] = False  # fmt: skip
    precision: Annotated[Precision, option("The precision of the forward pass.")] = "float32"
    memory: Annotated[
        float, option("How much memory activations may take, in GiB.", check=Within(1e-6, 1e6))
    ] = 4.0
    workers: Annotated[int | None, option(
        "The number of worker processes. By default one for each CPU thread.", check=Within(1, 1024)
    )] = None  # fmt: skip
    skip_bad: Annotated[bool | None, option(
        "Skip and list examples that cannot be read, or stop at the first one. By default files of a folder are "
        "skipped, and the harvest stops at any other.", "--skip-bad/--stop-at-bad",
    )] = None  # fmt: skip
    positions: Annotated[int | None, option(
        "How many positions per example, drawn at random, go into the histograms; 0 means all. By default just "
        "enough for 2048 values per unit, and at least 8.", check=Within(0)
    )] = None  # fmt: skip
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.memory < 2**20:
            raise ValueError(f"memory {self.memory} must be a number of GiB above 0")


@command(app)
def harvest(
    model: options.Model,
    data: options.Data,
    depth: Depth,
    how: Pass,
    output: options.Output,
    resume: Annotated[bool, option(
        "Continue where an earlier run stopped, or start over and overwrite it.", "--resume/--overwrite"
    )] = True,
    faces: Annotated[bool, option(
        "Keep a small picture of what excites each unit most, by which the app shows it, or leave that out.",
        "--faces/--no-faces",
    )] = True,
) -> None:  # fmt: skip
    """Record unit activations on every example of a dataset. Run it again to resume.

    Under `torchrun --nproc-per-node N -m circuits harvest …` N processes share the work.
    """
    place = model.place.writable()
    loaded = model.load()
    source = open_source(data)
    record = model.record(loaded)
    if leads():
        _note_stale(place, record, source)
    files = isinstance(source, ImageSource) and source.folder is not None
    settings: dict[str, Any] = vars(how) | {
        "memory": int(how.memory * 2**30),
        "skip_bad": files if how.skip_bad is None else how.skip_bad,
    }
    summary, full, covariance = (
        _names(loaded, s) for s in (depth.sites, depth.full, depth.covariance)
    )
    with output.progress(f"harvest {model.spec} on {data}") as progress:
        store = run(
            loaded, source, summary, place, record, progress=progress, full=full, covariance=covariance,
            overwrite=not resume, **settings,
        )  # fmt: skip
    if leads():
        if faces:
            _keep_faces(place, loaded, store, source, output)
        n = len(source) - len(store.skipped)
        # What was skipped is said with what else is wrong with the store, or in its JSON.
        if told := account(source, n, "all that can be read", {}):
            note(told)
        show_store(store, output)


def _keep_faces(
    place: Workspace,
    model: HookedModel,
    store: ActivationStore,
    source: Source,
    output: options.Output,
) -> None:
    """Keep what excites each unit most; a dataset that can no longer be read has no faces, which is said."""
    try:
        with output.progress("faces") as progress:
            make_faces(place, model, store, source, progress=progress)
    except (OSError, ValueError) as error:
        warn(f"no faces: {line(error)}")


def _names(model: HookedModel, sites: str) -> list[str]:
    return [site.name for site in select_sites(model, sites)]


def _note_stale(place: Workspace, record: ModelRecord, source: Source) -> None:
    """Say so if the same names led to other weights or other data before: nothing old is reused."""
    for folder in place.all_store_folders():
        try:
            known = Provenance.read(folder)
        except (OSError, ValueError):
            continue
        if (known.model, known.data) != (record.name, source.spec):
            continue
        for what, name, before, now in (
            ("model", known.model, known.model_hash, record.hash),
            ("data", known.data, known.data_hash, source.hash),
        ):
            if before != now:
                warn(
                    f"{what} {name} has changed since {str(folder)!r} was made "
                    f"({before[:16]}, now {now[:16]}): a new store is made"
                )
                return
