"""The Python that makes the circuit on the canvas."""

from __future__ import annotations

from apps.address import python
from apps.drawing import Drawing
from circuits.graph import GraphStore
from circuits.weights import LiveGraph
from circuits.workspace import ModelRecord

TOP = 5
"""Neighbours on each side that a circuit begins with."""


def code_panel(record: ModelRecord, store: GraphStore | LiveGraph, now: Drawing) -> None:
    """The same from a script."""
    start = now.graph.graph.get("made", {}).get("neighbourhood")
    live = isinstance(store, LiveGraph)
    made = (
        f"{'weights' if live else 'GraphStore(folder)'}.neighbourhood({start!r}, hops=1, top={TOP})"
    )
    if now.past or now.version:  # changed by hand: as exported above
        made = 'circuits.graph.read_circuit("circuit.json")'
    on_disk = """folder = circuits.Workspace.default().model_folder(model.hash)
circuits.weights.build_graph(model, folder)  # once"""
    python(f"""
import circuits
from circuits.graph import GraphStore

model = {record.code}
{"weights = circuits.weights.LiveGraph(model)  # too many to write them all to disk" if live else on_disk}
graph = {made}
print(len(graph), graph.number_of_edges())
""")
