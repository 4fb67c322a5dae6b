"""`circuits publish`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from typer import Typer

from circuits.cli import options
from circuits.cli.choosing import units_of
from circuits.cli.output import note
from circuits.cli.signatures import Within, argument, command, option
from circuits.errors import line
from circuits.examples import Examples
from circuits.faces import faces_of
from circuits.factories import from_file
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.selecting import select_sites
from circuits.publishing import Chosen, publish
from circuits.publishing.writing import SIZE
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore

app = Typer()


@dataclass(frozen=True)
class Content:
    """What goes into the site."""

    heading: ClassVar = "What is published"

    sites: Annotated[str, option(
        "Sites whose units are published, separated by commas; patterns such as 'mixed*' work. By default all whose "
        "units have faces, if neither units, circuits nor cases are named."
    )] = ""  # fmt: skip
    units: Annotated[
        str, option("Single units, SITE:INDEX,INDEX; several sites separated by spaces.")
    ] = ""
    circuits: Annotated[str, option("Names of saved circuits, separated by commas.")] = ""
    cases: Annotated[
        str, option("Names of cases whose reports are published, separated by commas.")
    ] = ""
    names: Annotated[
        bool, option("Publish the names that people gave to units, or leave them out.")
    ] = False
    notes: Annotated[
        bool, option("Publish the notes that people wrote on circuits, or leave them out.")
    ] = False
    shown: Annotated[int, option(
        "How many of its strongest examples each unit's page shows.", check=Within(0, 50)
    )] = 6  # fmt: skip


@command(app, "publish")
def publish_site(
    model: options.Model,
    out: Annotated[str, argument("The folder that the site is written to.", metavar="OUT")],
    content: Content,
    output: options.Output,
    title: Annotated[str, option("The title of the first page.")] = "Circuits",
    size: Annotated[float, option("How many megabytes the site may have.", check=Within(0.001, 1e6))] = SIZE,
    replace: Annotated[bool, option("Replace a site that was published to the same folder.", "--replace")] = False,
) -> None:  # fmt: skip
    """Write a static site of units, circuits and cases, which opens from a disk and from any web server."""
    loaded, place = model.load(), model.place
    listed = {what: _listed(getattr(content, what)) for what in ("circuits", "cases")}
    chosen = Chosen.of(place, loaded, dict(_units(model, loaded, content)), listed["circuits"])
    opened = dict(_examples(loaded, chosen.store.values())) if content.shown else {}
    chosen = Chosen.of(place, loaded, chosen.units, listed["circuits"], opened)
    with output.progress(f"publish {model.spec}") as progress:
        made = publish(
            place, out, [chosen], cases=listed["cases"], title=title, names=content.names, notes=content.notes,
            n_examples=content.shown, size=size, replace=replace, progress=progress,
        )  # fmt: skip
    output.show(made, made.tables())


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _units(
    model: options.Model, loaded: HookedModel, content: Content
) -> Iterator[tuple[str, list[int]]]:
    """The units of each site that are asked for."""
    found: dict[str, list[int]] = {}
    if content.sites:
        for site in select_sites(loaded, content.sites):
            found[site.name] = list(range(site.n_units))
    elif not (content.units or content.circuits or content.cases):
        known = {unit.site for unit in faces_of(model.place, loaded.hash)}
        for site in loaded.sites:
            if site.name in known:
                found[site.name] = list(range(site.n_units))
    for text in content.units.split():
        for unit in units_of(loaded, text):
            found.setdefault(unit.site, []).append(unit.index)
    yield from found.items()


def _examples(
    model: HookedModel, stores: Iterable[ActivationStore]
) -> Iterator[tuple[Path, Examples]]:
    """The examples of stores; of those that cannot be read it is said why there are none."""
    for store in {s.folder: s for s in stores}.values():
        try:
            where = f"the store {str(store.folder)!r}"
            source = open_source(
                from_file("data", store.provenance.data, where, "publish with --shown 0")
            )
            if source.hash != store.provenance.data_hash:
                raise ValueError("it is not what it was when the model was harvested on it")
            yield store.folder, Examples(model, source, None, skip_bad=True)
        except (ValueError, OSError, ImportError) as error:
            note(f"no examples of {store.provenance.data}: {line(error)}")
