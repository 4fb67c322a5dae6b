"""A circuit on a canvas: Cytoscape.js as a component of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components import v2

from circuits.figures.charts import short
from circuits.graph.circuit import (
    CircuitGraph,
    Node,
    UnitGroup,
    WholeSite,
    is_composition,
    site_of,
)
from circuits.graph.layout import PLACE, layered

_HERE = Path(__file__).parent
_ACROSS, _DOWN, _DOWN_BARE = 84.0, 150.0, 74.0
"""Pixels between neighbours of a row, and between rows; these where no unit has a picture."""

_HTML = (
    '<div class="circuit-canvas" role="img" aria-label="circuit"></div>'
    '<button class="circuit-fit" title="Show all of it">⤢</button>'
)
_CSS = """
.circuit-canvas { width: 100%; border: 1px solid var(--st-border-color, #ccc); border-radius: 8px; }
.circuit-fit { position: absolute; right: 10px; top: 8px; z-index: 9; cursor: pointer; border: 1px solid #888;
  border-radius: 6px; background: var(--st-background-color); color: var(--st-text-color); padding: 0 8px; }
"""


@cache
def _component() -> Any:
    library = (_HERE / "cytoscape.min.js").read_text()
    # the library looks for a module system first: it is given one of its own
    wrapped = f"const cytoscape = (() => {{ const exports = {{}}, module = {{ exports }};\n{library}\n;return module.exports; }})();\n"  # noqa: E501
    return v2.component(
        "circuits_canvas", html=_HTML, css=_CSS, js=wrapped + (_HERE / "canvas.js").read_text(),
        isolate_styles=False,
    )  # fmt: skip


def canvas(
    graph: CircuitGraph,
    pictures: Mapping[Node, str],
    names: Mapping[Node, str],
    selected: str = "",
    layout: str = "",
    height: int = 560,
    key: str = "canvas",
    on_tap: Callable[[str], None] | None = None,
    on_move: Callable[[str, float, float], None] | None = None,
) -> str | None:
    """Draw a circuit.

    Args:
        graph: the circuit.
        pictures: of nodes, as data URIs.
        names: what nodes are known to be, below their numbers.
        selected: the node or edge that is set off, a node as it is written or as `edge_id` has it.
        layout: all is brought into view when this changes.
        height: in pixels.
        key: of the canvas on the page.
        on_tap: called with what was clicked (empty for the background), before the page runs again.
        on_move: called with the node that was moved, and where to, in the units of `layered`.

    Returns:
        What was clicked, if something was.
    """

    down = _DOWN if pictures else _DOWN_BARE

    def tapped() -> None:
        if on_tap is not None and (told := st.session_state[key].tapped) is not None:
            on_tap(str(told))

    def moved() -> None:
        if on_move is not None and (told := st.session_state[key].moved) is not None:
            on_move(str(told["id"]), float(told["x"]) / _ACROSS, -float(told["y"]) / down)

    told = _component()(
        key=key, data=_drawn(graph, pictures, names) | {"selected": selected, "layout": layout, "height": height},
        on_tapped_change=tapped, on_moved_change=moved,
    )  # fmt: skip
    return told.tapped


def edge_id(source: Node, target: Node, key: str) -> str:
    """An edge, as the canvas names it."""
    return f"{source} → {target} [{key}]"


def _drawn(
    graph: CircuitGraph, pictures: Mapping[Node, str], names: Mapping[Node, str]
) -> dict[str, Any]:
    places, down = layered(graph), _DOWN if pictures else _DOWN_BARE
    strongest: dict[str, float] = {}
    for _, _, data in graph.edges(data=True):
        strongest[data["kind"]] = max(strongest.get(data["kind"], 0.0), data["norm"])
    fixed = {n for n, data in graph.nodes(data=True) if PLACE in data}
    left = min((x for x, _ in places.values()), default=0.0) - 1
    rows = {site_of(n): y for n, (_, y) in places.items() if n not in fixed}
    return {
        "nodes": [_node(node, place, pictures, names) for node, place in places.items()],
        "edges": [
            {
                "id": edge_id(a, b, key), "source": str(a), "target": str(b), "sum": data["sum"],
                "unsigned": is_composition(data),
                # What an edge leads into: q, k or v of a head, and the span of positions.
                "way": data.get("layer", "") if data["kind"] == "effect" else "",
                "width": 0.5 + 5.5 * data["norm"] / (strongest[data["kind"]] or 1.0),
            }
            for a, b, key, data in graph.edges(keys=True, data=True)
        ],
        "rows": [
            {"id": site, "label": site if pictures else short(site), "x": left * _ACROSS, "y": -y * down}
            for site, y in rows.items()
        ],
    }  # fmt: skip


def _node(
    node: Node, place: tuple[float, float], pictures: Mapping[Node, str], names: Mapping[Node, str]
) -> dict[str, Any]:
    if pictures:
        label, down = f"{_label(node)}\n{names.get(node, '')}".strip(), _DOWN
    else:
        label, down = names.get(node) or _bare_label(node), _DOWN_BARE
    return {
        "id": str(node), "label": label, "bare": not pictures,
        "x": place[0] * _ACROSS, "y": -place[1] * down, "picture": pictures.get(node, ""),
        "count": len(node.units) if isinstance(node, UnitGroup) else 0,
    }  # fmt: skip


def _bare_label(node: Node) -> str:
    """What stands in a node without a picture: `20 post:17`, or as a group is called."""
    if isinstance(node, UnitGroup):
        return _label(node)
    return short(node.site if isinstance(node, WholeSite) else str(node))


def _label(node: Node) -> str:
    if isinstance(node, UnitGroup):
        return f"{node.name} ({len(node.units)})"
    if isinstance(node, WholeSite):
        return "all"
    return str(node).removeprefix(site_of(node))


# --- units as tiles -----------------------------------------------------------------------------

_SHEET_CSS = """
.unit-sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--tile), 1fr)); gap: 4px;
  max-height: 640px; overflow-y: auto; }
.unit-strip { display: flex; gap: 14px; overflow-x: auto; max-height: none; padding-bottom: 8px; }
.unit-strip h4 { font-size: 12px; font-weight: 600; margin: 0 0 4px; max-width: calc(2 * var(--tile) + 16px);
  overflow-wrap: anywhere; }
.unit-column { display: grid; grid-template-columns: repeat(2, calc(var(--tile) + 6px)); gap: 4px; }
.unit-tile { border: 1px solid var(--st-border-color, #ccc); border-radius: 4px; padding: 1px; cursor: pointer;
  min-height: calc(var(--tile) + 16px);
  background: var(--st-secondary-background-color); color: var(--st-text-color); font-size: 10px; line-height: 1.2; }
.unit-tile .word { display: block; font-size: 13px; line-height: calc(var(--tile) - 4px); overflow: hidden;
  text-overflow: ellipsis; white-space: pre; height: calc(var(--tile) - 4px); }
.unit-tile img { width: 100%; display: block; border-radius: 3px; }
.unit-tile:hover, .unit-tile:focus { border-color: #E69F00; }
"""


@cache
def _sheet() -> Any:
    return v2.component(
        "circuits_sheet", html='<div class="unit-sheet"></div>', css=_SHEET_CSS,
        js=(_HERE / "sheet.js").read_text(), isolate_styles=False,
    )  # fmt: skip


def sheet(tiles: Sequence[Tile], size: int = 56, key: str = "sheet") -> str | None:
    """Show units as tiles; the one that was clicked, if one was."""
    told = _sheet()(
        key=key,
        data={"tiles": [vars(tile) for tile in tiles], "size": size},
        on_picked_change=lambda: None,
    )
    return told.picked


@dataclass(frozen=True)
class Tile:
    """A unit on a sheet.

    Attributes:
        id: the unit.
        label: below its picture.
        title: all that is said of it.
        picture: a data URI; empty for none.
        text: what stands in its place where there is none, such as a token.
        group: above which heading; tiles of one group follow each other.
    """

    id: str
    label: str
    title: str
    picture: str
    text: str = ""
    group: str = ""
