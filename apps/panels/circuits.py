"""What is selected on the canvas, and keeping a circuit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import streamlit as st

from apps import cached, drawing
from apps.address import TROUBLE, action, code, line, link, named, plain
from apps.drawing import Drawing
from apps.showing import show
from circuits.discovery.results import SIZES
from circuits.figures import circuit_figure, figure_bytes, matrix_figure
from circuits.figures.saving import Format
from circuits.graph import CircuitGraph, GraphStore, UnitGroup, circuit_diff
from circuits.graph.circuit import Node, is_composition
from circuits.graph.formats import circuit_text
from circuits.graph.saved import circuit_history, load_circuit, save_circuit, saved_circuits
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit
from circuits.weights import LiveGraph
from circuits.workspace import ModelRecord


def tools_panel(
    record: ModelRecord, model: HookedModel, store: GraphStore | LiveGraph, now: Drawing
) -> None:
    """Units to add, and the last change to take back."""
    with (
        st.form("add-units", border=False),
        st.container(horizontal=True, vertical_alignment="bottom"),
    ):
        st.text_input(
            "Add units", placeholder="SITE:INDEX; separate several with spaces", max_chars=400,
            key="canvas-units",
        )  # fmt: skip

        def added(graph: CircuitGraph) -> CircuitGraph:
            words = st.session_state["canvas-units"].split()
            return drawing.with_units(graph, store, [store.check(model.unit(w)) for w in words])

        _changes("Add", record, added, "canvas-add", form=True)
    with st.container(horizontal=True):
        action("Undo", lambda: drawing.undo(record.hash), "canvas-undo", disabled=not now.past)
        _changes("Lay out by layer", record, drawing.tidied, "canvas-tidy")


def _changes(
    label: str,
    record: ModelRecord,
    change: Callable[[CircuitGraph], CircuitGraph],
    key: str,
    form: bool = False,
) -> None:
    """A button that makes another circuit of the one that is drawn when it is clicked."""

    def changed() -> None:
        now = drawing.drawing(record.hash)
        assert now is not None, "begun by the page"
        drawing.change(record.hash, change(now.graph))

    action(label, changed, key, form=form)


def legend_panel(record: ModelRecord, shown: CircuitGraph) -> None:
    """What the canvas shows: weights, or edges that were found."""
    counted = f"{len(shown)} nodes, {shown.number_of_edges():d} edges"
    wide = "An edge is as wide as it is strong, relative to the strongest of its kind."
    made = shown.graph.get("made", {})
    if made.get("by") == "discover":
        method, metric = made.get("method"), made.get("metric")
        colours = f"A red edge adds to {metric}, a blue one takes from it. "
        said = (
            f"{counted} of weights {record.hash[:16]}, found on {made.get('task')} (find half): scores by {method}, "
            f"search {made.get('search')}, {made.get('settings', {}).get('ablation')} ablation, seed "
            f"{made.get('seed')}. {'' if method in SIZES else colours}{wide}"
        )
    else:
        said = f"{counted} of weights {record.hash[:16]}: {_colours(shown)} {wide}"
    st.caption(plain(said))


def _colours(shown: CircuitGraph) -> str:
    """What colours of weights mean; composition scores of heads are norms, which have no sign."""
    heads = [is_composition(data) for *_, data in shown.edges(data=True)]
    if heads and all(heads):
        return (
            "edges between heads are composition scores (by queries, keys and values), from 0 to 1 and without a sign: "
            "how much of what the one writes the other can read."
        )
    mixed = " Edges between heads are composition scores, which have no sign." if any(heads) else ""
    return f"red excites, blue inhibits.{mixed}"


def selection_panel(
    record: ModelRecord,
    model: HookedModel,
    store: GraphStore | LiveGraph,
    shown: CircuitGraph,
    selected: str,
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
        st.subheader(plain(str(node)))
        if isinstance(node, UnitGroup):
            st.caption(plain(", ".join(map(str, node.units))))


def _unit(
    record: ModelRecord, model: HookedModel, store: GraphStore | LiveGraph, unit: Unit
) -> None:
    label = cached.label_of(record)
    st.subheader(plain(named(model, unit) if unit.site != INPUT else str(unit)))
    top = int(st.number_input("How many", 1, 50, 5, key="canvas-top"))
    with st.container(horizontal=True):
        for text, incoming in (("Add what builds it", True), ("Add what it builds", False)):
            grown = partial(
                drawing.with_neighbours, store=store, unit=unit, incoming=incoming, top=top
            )
            _changes(text, record, grown, f"canvas-add-{incoming}")
        _changes("Remove it", record, partial(drawing.without, node=unit), "canvas-remove")
        if unit.site != INPUT:
            link("unit", "Its page", model=label, site=unit.site, unit=unit.index)
            link("edits", "Edit it", model=label, on=unit)


def _edge(
    record: ModelRecord, model: HookedModel, a: Node, b: Node, key: str, data: dict[str, Any]
) -> None:
    ends = [named(model, n) if isinstance(n, Unit) and n.site != INPUT else str(n) for n in (a, b)]
    st.subheader(plain(" → ".join(ends)))
    kernel = np.atleast_2d(np.array(data.get("kernel", [])))
    typical = f", typical {data['typical']:.3g}" if "typical" in data else ""
    if is_composition(data):
        q, k, v = kernel[0].tolist()
        total = f"composition by queries {q:.3g}, keys {k:.3g}, values {v:.3g}"
    else:
        total = f"sum {data['sum']:.3g}"
    st.caption(f"{code(key)}: {total}, strength {data['norm']:.3g}{typical}")
    left, right = st.columns(2)
    if kernel.size > 1 and not is_composition(data):
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
        _save(record)
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


def _save(record: ModelRecord) -> None:
    st.text_input("Name", key="circuit-name", max_chars=200)
    st.text_input("Why", key="circuit-note", max_chars=1000)

    def saved() -> str:
        now = drawing.drawing(record.hash)
        assert now is not None, "begun by the page"
        graph = now.graph.copy()
        graph.graph["model_hash"] = record.hash
        name, note = st.session_state["circuit-name"], st.session_state["circuit-note"]
        made = save_circuit(cached.workspace().writable().database, name, graph, note)
        return f"Saved as version {made.version} of {plain(made.name)}."

    action("Save", saved, "circuit-save")


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
    known = cached.faces(record)
    faces = {n: known[n] for n in shown if isinstance(n, Unit) and n in known}
    return figure_bytes(circuit_figure(shown, faces), kind)
