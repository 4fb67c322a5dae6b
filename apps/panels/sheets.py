"""Units as tiles, each by its face."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from shlex import quote

import pandas as pd
import streamlit as st

from apps import cached
from apps.address import code, link, open_page
from apps.canvas import Tile, sheet
from circuits.faces import Face
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site, Unit
from circuits.workspace import ModelRecord

SITES, FACES = 12, 6
"""How many sites are shown of each model at most, and how many units of each."""


def tile_of(unit: Unit, faces: Mapping[Unit, Face], title: str = "") -> Tile:
    """A unit by its face, with all that is said of it."""
    face = faces.get(unit)
    if face is None:
        return Tile(str(unit), str(unit.index), title or str(unit), "")
    said = f"{title or unit}: {face.about}"
    return Tile(str(unit), str(unit.index), said, cached.thumbnail(face, 56), face.text)


def sheet_panel(
    record: ModelRecord, model: HookedModel, site: Site, table: pd.DataFrame
) -> Unit | None:
    """The units of a table as a sheet; the one that was clicked, if one was."""
    faces = cached.faces(record)
    tiles, made = [], 0
    for row in table.to_dict("records"):
        unit = site.unit(int(row["unit"]))
        title = ", ".join(filter(None, (str(unit), str(row["name"]), str(row["family"]))))
        tiles.append(tile_of(unit, faces, title))
        made += unit in faces and faces[unit].kind == "visualization"
    picked = sheet(tiles)
    missing = len(tiles) - made
    if missing and isinstance(model.input, TokenInput):
        st.caption(
            "A unit’s token is the one at which it is most active, in all texts that were harvested."
        )
    elif missing:
        visualize = code(f"circuits visualize {record.arguments} {quote(site.name)} --sheet")
        st.caption(
            f"{missing:d} have no feature visualization, and show what excites them most in all that was harvested, "
            f"if anything does: {visualize} makes all of them."
        )
        label = cached.label_of(record)
        link("jobs", "Make the sheet in the background", do="sheet", model=label, site=site.name)
    return None if picked is None else Unit.parse(picked)


def strip_panel(record: ModelRecord, order: Sequence[str], hidden: Container[str]) -> None:
    """A network as a strip of its sites, with the faces of some units of each; a click opens the unit."""
    label = cached.label_of(record)
    faces, sites = cached.faces(record), dict[str, list[Unit]]()
    for unit in (u for u in faces if u.site not in hidden):
        sites.setdefault(unit.site, []).append(unit)
    drawn = {u for u, face in faces.items() if face.kind == "visualization"}
    for name, units in sites.items():  # where there are enough visualizations, only these
        known = [u for u in units if u in drawn]
        sites[name] = sorted(known if len(known) >= FACES else units, key=lambda u: u.index)
    names = sorted(sites, key=lambda name: order.index(name) if name in order else len(order))
    shown = [names[i] for i in _spread(len(names), SITES)]
    tiles = [
        replace(tile_of(units[i], faces), group=name)
        for name in shown
        for units in [sites[name]]
        for i in _spread(len(units), FACES)
    ]
    if tiles and (picked := sheet(tiles, key=f"faces-{label}")) is not None:
        unit = Unit.parse(picked)
        open_page("unit", model=label, site=unit.site, unit=unit.index)
    if len(shown) < len(names):
        st.caption(f"{len(shown):d} of {len(names):d} sites, {FACES:d} units of each.")


def _spread(n: int, most: int) -> list[int]:
    """Some of n places, evenly spread over them."""
    most = min(n, most)
    return [i * n // most for i in range(most)]
