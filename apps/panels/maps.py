"""A site's units in two dimensions."""

from __future__ import annotations

import math
from typing import get_args

import pandas as pd
import streamlit as st

from apps import cached
from apps.address import line, plain, python
from apps.canvas import canvas
from circuits.graph import CircuitGraph
from circuits.graph.circuit import Node
from circuits.graph.layout import PLACE
from circuits.models.adapter.hooked_model import HookedModel
from circuits.store import ActivationStore
from circuits.unit_maps import Method, UnitMap
from circuits.units import Site, Unit
from circuits.workspace import ModelRecord

_SPREAD = 1.5
"""How wide a map is: times the root of how many units, in the distance between neighbours of a row."""


def map_panel(
    record: ModelRecord,
    model: HookedModel,
    site: Site,
    store: ActivationStore | None,
    table: pd.DataFrame,
) -> Unit | None:
    """A site's units in two dimensions, like ones together; the one that was clicked."""
    method: Method = st.segmented_control(
        "Laid out by", get_args(Method), default="tsne", key="map-method", required=True
    )
    by_weights = store is None or st.toggle("By weights instead of responses", key="map-weights")
    try:
        found = cached.map_of(model, None if by_weights else store, site.name, method)
    except ValueError as error:
        st.warning(line(error))
        return None
    span = float(max(found.xy.max(0) - found.xy.min(0))) or 1.0
    graph = CircuitGraph(model_hash=record.hash)
    for index in table["unit"]:
        x, y = found.xy[int(index)] * (_SPREAD * len(found.xy) ** 0.5 / span)
        graph.add_node(site.unit(int(index)), **{PLACE: [float(x), float(y) / 2]})
    if not len(graph):
        st.info("No unit is left: change what names contain.")
        return None
    known = zip(table["unit"], table["name"], strict=True)
    names: dict[Node, str] = {site.unit(int(i)): name for i, name in known if name}
    pictures = cached.thumbnails(cached.faces(record), graph)
    tapped = canvas(
        graph, pictures, names, layout=f"{site.name} {method} {by_weights} {len(graph)}", key="map"
    )
    st.caption(
        f"{plain(found.method)} of {plain(found.of)} ({plain(found.data or model.name)}, {found.n:d} numbers a unit, "
        f"seed {found.seed:d}). Of a unit's 10 nearest neighbours {100 * found.kept:.0f} % are near it here (shuffled "
        f"{100 * found.shuffled:.0f} %)." + _branch_note(found)
    )
    how = f"weight_map(model, {site.name!r}, {method!r})"
    if not by_weights:
        how = f"response_map(store, {site.name!r}, {method!r})"
    python(f"""
from circuits.unit_maps import response_map, weight_map

found = {how}
print(found.xy, found.kept, found.shuffled)
""")
    return Unit.parse(tapped) if tapped else None


def _branch_note(found: UnitMap) -> str:
    """How much of a map is where units sit and not what they do."""
    if math.isnan(found.same_branch):
        return ""
    return (
        f" Of the 10 nearest here {100 * found.same_branch:.0f} % are in a unit's own branch, by chance "
        f"{100 * found.same_branch_by_chance:.0f} %."
    )
