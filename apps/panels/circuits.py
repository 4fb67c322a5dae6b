"""What is selected on the canvas, and keeping a circuit."""

from __future__ import annotations

from typing import get_args

import numpy as np
import streamlit as st

from apps import cached, drawing
from apps.address import TROUBLE, line, link, named, plain, rerun_part
from apps.drawing import Drawing
from apps.showing import show
from circuits.figures import circuit_figure, figure_bytes, matrix_figure
from circuits.figures.saving import Format
from circuits.graph import CircuitGraph, GraphStore, UnitGroup, circuit_diff
from circuits.graph.circuit import Node
from circuits.graph.formats import circuit_text
from circuits.graph.saved import circuit_history, load_circuit, save_circuit, saved_circuits
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit
from circuits.workspace import ModelRecord


def tools_panel(record: ModelRecord, model: HookedModel, store: GraphStore, now: Drawing) -> None:
    """Units to add, and the last change to take back."""
    with (
        st.form("add-units", border=False),
        st.container(horizontal=True, vertical_alignment="bottom"),
    ):
        words = st.text_input(
            "Add units", placeholder="SITE:INDEX; separate several with spaces", max_chars=400
        )
        if st.form_submit_button("Add"):
            try:
                units = [store.check(model.unit(word)) for word in words.split()]
                drawing.change(record.hash, drawing.with_units(now.graph, store, units))
            except TROUBLE as error:
                st.error(line(error))
            else:
                rerun_part()
    with st.container(horizontal=True):
        if st.button("Undo", disabled=not now.past, key="canvas-undo"):
            drawing.undo(record.hash)
            rerun_part()
        if st.button("Lay out by layer", key="canvas-tidy"):
            drawing.change(record.hash, drawing.tidied(now.graph))
            rerun_part()


def selection_panel(
    record: ModelRecord, model: HookedModel, store: GraphStore, shown: CircuitGraph, selected: str
) -> None:
    """The node or edge that was clicked, and what can be done with it."""
    edge = drawing.edge_of(shown, selected)
    if edge is not None:
        _edge(record, model, *edge)
        return
    node = next((n for n in shown if str(n) == selected), None)
    if node is None:
        st.caption("Click a node or an edge.")
    elif isinstance(node, Unit):
        _unit(record, model, store, node)
    else:
        st.subheader(str(node))
        if isinstance(node, UnitGroup):
            st.caption(", ".join(map(str, node.units)))


def _unit(record: ModelRecord, model: HookedModel, store: GraphStore, unit: Unit) -> None:
    label = cached.label_of(record)
    st.subheader(named(model, unit) if unit.site != INPUT else str(unit))
    top = int(st.number_input("How many", 1, 50, 5, key="canvas-top"))
    now = drawing.drawing(record.hash)
    assert now is not None, "begun by the page"
    with st.container(horizontal=True):
        for text, incoming in (("Add what builds it", True), ("Add what it builds", False)):
            if st.button(text, key=f"canvas-add-{incoming}"):
                _change(record, drawing.with_neighbours(now.graph, store, unit, incoming, top))
        if st.button("Remove it", key="canvas-remove"):
            _change(record, drawing.without(now.graph, unit))
        if unit.site != INPUT:
            link("unit", "Its page", model=label, site=unit.site, unit=unit.index)
            link("edits", "Edit it", model=label, on=unit)


def _change(record: ModelRecord, graph: CircuitGraph) -> None:
    try:
        drawing.change(record.hash, graph)
    except ValueError as error:
        st.error(line(error))
    else:
        rerun_part()


def _edge(
    record: ModelRecord, model: HookedModel, a: Node, b: Node, key: str, data: dict[str, object]
) -> None:
    st.subheader(f"{a} → {b}")
    kernel = np.atleast_2d(np.array(data.get("kernel", [])))
    typical = f", typical {data['typical']:.3g}" if "typical" in data else ""
    st.caption(f"`{key}`: sum {data['sum']:.3g}, strength {data['norm']:.3g}{typical}")
    left, right = st.columns(2)
    if kernel.size > 1:
        with left:
            show(matrix_figure(kernel, "weight"), "edge-kernel")
    if not (isinstance(a, Unit) and isinstance(b, Unit) and a.site != INPUT):
        return
    link("edits", "Edit this connection", model=cached.label_of(record), on=f"{a}->{b}")
    if right.toggle("Expanded weights, through everything between", key="edge-expand"):
        try:
            expanded, shuffled = cached.expanded_of(model, a, b)
        except TROUBLE as error:
            right.warning(line(error))
            return
        with right:
            show(matrix_figure(np.atleast_2d(expanded), "effect"), "edge-expanded")
        right.caption(
            f"linear mode; root of the sum of squares {np.sqrt((expanded**2).sum()):.3g}, with shuffled weights "
            f"{shuffled:.3g} (seed 0)"
        )


# --- keeping -------------------------------------------------------------------------------------


def keep_panel(record: ModelRecord, now: Drawing, shown: CircuitGraph) -> None:
    """Save under a name, open another, compare versions, export."""
    with st.expander("Save, open, compare, export"):
        _save(record, now)
        _saved(record, now)
        with st.container(horizontal=True):
            st.download_button(
                "JSON", lambda: circuit_text(now.graph, "json"), "circuit.json", on_click="ignore"
            )
            st.download_button(
                "GraphML",
                lambda: circuit_text(now.graph, "graphml"),
                "circuit.graphml",
                on_click="ignore",
            )
            for kind in get_args(Format):
                st.download_button(
                    kind.upper(),
                    lambda kind=kind: _drawn(record, shown, kind),
                    f"circuit.{kind}",
                    on_click="ignore",
                )


def _save(record: ModelRecord, now: Drawing) -> None:
    name = st.text_input("Name", key="circuit-name", max_chars=200)
    note = st.text_input("Why", key="circuit-note", max_chars=1000)
    if st.button("Save", key="circuit-save"):
        graph = now.graph.copy()
        graph.graph["model_hash"] = record.hash
        try:
            made = save_circuit(cached.workspace().writable().database, name, graph, note)
        except (ValueError, OSError) as error:
            st.error(line(error))
        else:
            st.success(f"Saved as version {made.version} of {plain(made.name)}.")


def _saved(record: ModelRecord, now: Drawing) -> None:
    database, label = cached.workspace().database, cached.label_of(record)
    known = saved_circuits(database, record.hash)
    if not known:
        return
    name = st.selectbox("Saved circuits", [r.name for r in known], key="circuit-open")
    versions = circuit_history(database, name, record.hash)
    for old in reversed(versions[-10:]):
        link(
            "circuit", f"version {old.version}, {old.created[:16]}, {old.author}: {old.note or 'no note'}", model=label,
            circuit=name, version=old.version,
        )  # fmt: skip
    before = st.selectbox(
        "Compare with version", [None, *(r.version for r in versions)], key="circuit-diff",
        format_func=lambda version: "none" if version is None else str(version),
    )  # fmt: skip
    if before is None:
        return
    found = circuit_diff(load_circuit(database, name, record.hash, before), now.graph)
    if found.empty:
        st.caption("The same as what is drawn.")
    else:
        st.json({k: v for k, v in found.to_dict().items() if v}, expanded=False)


def _drawn(record: ModelRecord, shown: CircuitGraph, kind: Format) -> bytes:
    pictures = {n: p for n, p in cached.pictured(record).items() if n in shown}
    return figure_bytes(circuit_figure(shown, pictures), kind)
