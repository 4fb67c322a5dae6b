"""A circuit on the canvas: grown, cut, collapsed, saved, compared."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from apps import cached, drawing, tab_storage
from apps.address import TROUBLE, choose_model, line, name_of, part
from apps.canvas import canvas
from apps.drawing import Drawing
from apps.panels.circuit_code import TOP, code_panel
from apps.panels.circuits import keep_panel, legend_panel, selection_panel, tools_panel
from apps.panels.claiming import claim_this_panel
from circuits.checks import whole
from circuits.families import saved_families
from circuits.graph import CircuitGraph, GraphStore, UnitGroup
from circuits.graph.circuit import Node, site_of
from circuits.graph.saved import circuit_history, load_circuit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit
from circuits.weights import LiveGraph
from circuits.workspace import ModelRecord


def page() -> None:
    """The page of circuits."""
    st.title("Circuit")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    try:
        store = cached.graph_of(record, model)
        _begin(record, model, store)
    except TROUBLE as error:
        st.error(line(error))
        return
    _body(record, model, store)


def _begin(record: ModelRecord, model: HookedModel, store: GraphStore | LiveGraph) -> None:
    """Begin with what the URL asks for: a saved circuit, or a unit and its neighbours; or go on."""
    asked = {name: st.query_params.get(name, "") for name in ("circuit", "version", "unit")}
    origin = " ".join(f"{k}={v}" for k, v in asked.items() if v)
    if drawing.drawing(record.hash) is None:
        drawing.begin(record.hash, _asked_for(record, model, store, asked, origin))
    now = drawing.drawing(record.hash)
    if now is not None and origin not in ("", now.origin):
        drawing.replace_by(record.hash, now, _asked_for(record, model, store, asked, origin))


def _asked_for(
    record: ModelRecord,
    model: HookedModel,
    store: GraphStore | LiveGraph,
    asked: Mapping[str, str],
    origin: str,
) -> Drawing:
    """The circuit that the URL asks for; without any, a unit of a late site and its neighbours."""
    if asked["circuit"]:
        version = whole(asked["version"])
        if asked["version"] and version is None:
            raise ValueError(f"version {asked['version']!r} of a circuit is not a whole number")
        database = cached.workspace().database
        graph = load_circuit(database, asked["circuit"], record.hash, version)
        latest = circuit_history(database, asked["circuit"], record.hash)[-1].version
        return Drawing(graph, origin=origin, version=version or latest)
    unit = model.unit(asked["unit"]) if asked["unit"] else _first(store, model)
    return Drawing(store.neighbourhood(unit, 1, TOP), origin=origin)


def _first(store: GraphStore | LiveGraph, model: HookedModel) -> Unit:
    targets = {b.target for b in store.blocks}
    late = [s.name for s in model.sites if s.name in targets and s.kind != "logit"]
    names = (
        [n for n in model.unit_names if n in targets] or late or [b.target for b in store.blocks]
    )
    return Unit(names[-1], 0)


@part
def _body(record: ModelRecord, model: HookedModel, store: GraphStore | LiveGraph) -> None:
    now = drawing.drawing(record.hash)
    assert now is not None, "begun by the page"
    tab_storage.keep({drawing.slot(record.hash): now.text}, "keeper-drawing")
    tools_panel(record, model, store, now)
    shown = _shown(record, now.graph)
    if not len(shown):
        st.info("Nothing is left: add a unit.")
        return
    faces = cached.faces(record)
    pictures = cached.thumbnails(faces, shown)
    names: dict[Node, str] = {
        n: name_of(model, n) for n in shown if isinstance(n, Unit) and n.site != INPUT
    }
    key = f"selected {record.hash}"

    def select(node: str) -> None:
        st.session_state[key] = node

    def move(node: str, x: float, y: float) -> None:
        at = drawing.drawing(record.hash)
        assert at is not None, "begun by the page"
        drawing.change(record.hash, drawing.moved(at.graph, node, x, y))

    selected = st.session_state.get(key, "")
    canvas(
        shown, pictures, names, selected, f"{now.origin} {len(shown)}", on_tap=select, on_move=move
    )
    legend_panel(record, shown)
    selection_panel(record, model, store, shown, st.session_state.get(key, ""))
    claim_this_panel(record, model, now)
    keep_panel(record, now, shown)
    code_panel(record, store, now)


def _shown(record: ModelRecord, graph: CircuitGraph) -> CircuitGraph:
    """The circuit as it is shown: weak edges left out, groups as one node."""
    left, right = st.columns(2)
    share = left.slider(
        "Hide edges below this share of the strongest", 0.0, 1.0, 0.0, 0.01, key="canvas-share"
    )
    families = {
        f"family {f.name}": f.group
        for f in saved_families(cached.workspace().database, record.hash)
    }
    sites: dict[str, UnitGroup] = {}
    for site in graph.sites():
        units = tuple(sorted(n for n in graph if isinstance(n, Unit) and site_of(n) == site))
        if len(units) > 1:
            sites[f"all of {site}"] = UnitGroup(site.replace("{", "").replace("}", ""), units)
    groups = families | sites
    chosen = right.multiselect("Collapse", list(groups), key="canvas-groups")
    return drawing.grouped(drawing.above(graph, share), [groups[name] for name in chosen])
