"""Circuits as figures: layers from the bottom up, edges around nodes, kernels on edges."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np
from jaxtyping import Bool, Float

from circuits.faces import Face
from circuits.figures.charts import (
    BLUE,
    GREY,
    ORANGE,
    Figure,
    Row,
    Shades,
    data,
    encoded,
    signed,
    titled,
)
from circuits.graph.circuit import (
    CircuitGraph,
    Node,
    UnitGroup,
    WholeSite,
    is_composition,
    site_of,
)
from circuits.graph.layout import layered

Point = tuple[float, float]
Places = Mapping[Node, Point]
Edge = tuple[Node, Node, str, dict[str, Any]]

_NODE, _KERNEL, _ROW = (
    0.62,
    0.3,
    1.7,
)  # sides of a node and of a kernel, and between rows; nodes of a row are 1 apart
_LABEL = 0.2  # below a node: its name
_CLEAR = 0.04  # between an edge and a node that it passes
_PIXELS = 84  # a unit
_WIDEST = 1800  # pixels
_MOST_KERNELS = 150
_PICTURE = 128  # pixels a side

_MEANING = {
    "weight": ("excites", "inhibits"),
    "expanded": ("excites", "inhibits"),
    "attribution": ("adds to the target", "takes from the target"),
    "effect": ("raises", "lowers"),
}
"""What a positive and a negative edge of a kind says."""
_NEITHER = "sums to zero"
_UNSIGNED = "is read by (composition)"
"""What an edge between heads says: how much of what the one writes the other can read, which has no sign."""


def circuit_figure(
    graph: CircuitGraph,
    faces: Mapping[Any, Face] | None = None,
    title: str = "",
) -> Figure:
    """A circuit layer by layer, what comes first at the bottom.

    Nodes carry their faces, or their names alone. Edges are orange where they excite and blue where they inhibit on
    the whole (of attributions and effects the legend says what their sign means), as wide as they are strong compared
    with the strongest of their kind and layer, with their kernels on them; they go around nodes that are in their way.

    Args:
        graph: the circuit.
        faces: of nodes that have one (`circuits.faces`).
        title: of the figure.

    Raises:
        ValueError: if it is empty.
    """
    if not len(graph):
        raise ValueError("circuit is empty: nothing to draw")
    places = {n: (x, _ROW * y) for n, (x, y) in layered(graph).items()}
    frame = _Frame.around(places)
    edges = list(graph.edges(keys=True, data=True))
    ways = {(a, b, key): _way(places, a, b) for a, b, key, _ in edges}
    images, shades = _kernels(edges, ways)
    layers = [
        *_edge_layers(edges, ways, frame),
        *_image_layers(images, frame),
        *_node_layers(places, faces or {}, frame),
        _site_layer(places, frame),
    ]
    width, height = frame.size
    made = alt.layer(*layers).properties(
        width=width, height=height, view=alt.ViewBackground(stroke=None)
    )
    about = f"{graph.graph.get('model', '')} {graph.model_hash[:16]}".strip()
    scale = f"kernels: white 0, red +{shades.high:.2g}, blue {shades.low:.2g}" if shades else ""
    return titled(made, "\n".join(filter(None, (title, about, scale))))


@dataclass(frozen=True)
class _Frame:
    """What of the plane is drawn, and how large."""

    low: Point
    high: Point

    @classmethod
    def around(cls, places: Places) -> _Frame:
        xs, ys = zip(*places.values(), strict=True)
        # More room at the left, where the names of sites are.
        return cls((min(xs) - 2.4, min(ys) - 0.8), (max(xs) + 0.8, max(ys) + 0.7))

    @property
    def pixels(self) -> float:
        """A unit of the plane in pixels."""
        return min(_PIXELS, _WIDEST / (self.high[0] - self.low[0]))

    @property
    def size(self) -> Point:
        (x0, y0), (x1, y1) = self.low, self.high
        return self.pixels * (x1 - x0), self.pixels * (y1 - y0)

    def x(self, field: str = "x") -> alt.X:
        domain = [self.low[0], self.high[0]]
        return alt.X(f"{field}:Q", axis=None, scale=alt.Scale(domain=domain, nice=False))

    def y(self, field: str = "y") -> alt.Y:
        domain = [self.low[1], self.high[1]]
        return alt.Y(f"{field}:Q", axis=None, scale=alt.Scale(domain=domain, nice=False))


def _edge_layers(
    edges: Sequence[Edge], ways: Mapping[tuple[Node, Node, str], list[Point]], frame: _Frame
) -> list[alt.Chart]:
    strongest: dict[str, float] = {}
    for *_, key, d in edges:
        # By kind and layer: weights of one layer, and weights and attributions, have no common scale.
        strongest[key] = max(strongest.get(key, 0.0), d["norm"])
    rows: list[Row] = []
    for number, (a, b, key, d) in enumerate(edges):
        same = {
            "edge": number, "between": f"{a} → {b}", "layer": key, "sign": _sign(d), "kind": d["kind"],
            "strength": float(d["norm"]), "sum": float(d["sum"]), "width": float(d["norm"]) / (strongest[key] or 1.0),
        }  # fmt: skip
        rows += [same | {"step": k, "x": x, "y": y} for k, (x, y) in enumerate(ways[a, b, key])]
    if not rows:
        return []
    kinds = list(dict.fromkeys(d["kind"] for *_, d in edges))
    signed_kinds = dict.fromkeys(d["kind"] for *_, d in edges if not is_composition(d))
    colours = {m: c for k in signed_kinds for m, c in zip(_MEANING[k], (ORANGE, BLUE), strict=True)}
    present = {r["sign"] for r in rows}
    colours |= {neither: GREY for neither in (_NEITHER, _UNSIGNED) if neither in present}
    tips = [alt.Tooltip(f"{f}:N", title=f) for f in ("between", "layer", "sign")]
    tips += [alt.Tooltip(f"{f}:Q", format=".3g") for f in ("strength", "sum")]
    strength = ["strength / strongest of", "its kind and layer"]
    width = alt.StrokeWidth(
        "width:Q",
        scale=alt.Scale(domain=[0, 1], range=[0.5, 3.5]),
        legend=alt.Legend(title=strength, values=[0.25, 0.5, 1], format=".2~f"),
    )
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    drawn = alt.Chart(data(rows)).mark_line(opacity=0.6, interpolate="linear", strokeJoin="round")
    drawn = drawn.encode(
        frame.x(), frame.y(), detail="edge:N", order="step:Q", tooltip=tips, strokeWidth=width,
        color=alt.Color("sign:N", title="edge", scale=scale, legend=alt.Legend(symbolOpacity=1, symbolStrokeWidth=3)),
    )  # fmt: skip
    if len(kinds) > 1:
        drawn = drawn.encode(strokeDash=alt.StrokeDash("kind:N", scale=alt.Scale(domain=kinds)))
    return [drawn]


def _sign(edge: Mapping[str, Any]) -> str:
    if is_composition(edge):
        return _UNSIGNED
    positive, negative = _MEANING[edge["kind"]]
    return positive if edge["sum"] > 0 else negative if edge["sum"] < 0 else _NEITHER


def _kernels(
    edges: Sequence[Edge], ways: Mapping[tuple[Node, Node, str], list[Point]]
) -> tuple[list[Row], Shades | None]:
    """The strongest edges' kernels, as pictures in the middle of their edges."""
    found = [e for e in edges if np.ndim(k := e[3].get("kernel", 0)) == 2 and np.size(k) > 1]
    found = sorted(found, key=lambda e: -e[3]["norm"])[:_MOST_KERNELS]
    if not found:
        return [], None
    kernels = [np.array(e[3]["kernel"], float) for e in found]
    shades = signed("weight", *kernels)
    rows: list[Row] = []
    for number, ((a, b, key, _), kernel) in enumerate(zip(found, kernels, strict=True)):
        at = 0.42 + 0.16 * (number % 2)  # kernels of neighbouring edges do not hide each other
        x, y = _along(ways[a, b, key], at)
        large = np.kron(
            shades.painted(kernel), np.ones((8, 8, 1), np.uint8)
        )  # smoothed by no renderer
        rows.append({"x": x, "y": y, "url": encoded(large), "name": f"{a} → {b}", "side": _KERNEL})
    return rows, shades


def _along(way: Sequence[Point], share: float) -> Point:
    """The point that a share of a line's length comes before."""
    points = np.array(way)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    passed = np.concatenate([[0.0], lengths.cumsum()])
    at = share * passed[-1]
    return float(np.interp(at, passed, points[:, 0])), float(np.interp(at, passed, points[:, 1]))


def _image_layers(rows: Sequence[Row], frame: _Frame) -> list[alt.Chart]:
    """Pictures with a thin frame around them."""
    if not rows:
        return []
    side = rows[0]["side"] * frame.pixels
    base = alt.Chart(data(rows)).encode(frame.x(), frame.y(), tooltip="name:N")
    return [
        base.mark_image(width=side, height=side, smooth=False).encode(url="url:N"),
        # Vega's `size` of a square is its area in pixels.
        base.mark_point(shape="square", size=side**2, stroke=GREY, strokeWidth=0.6, filled=False),
    ]


def _node_layers(places: Places, faces: Mapping[Any, Face], frame: _Frame) -> list[alt.Chart]:
    shown: list[Row] = []
    plain: list[Row] = []
    for node, (x, y) in places.items():
        row = {"x": x, "y": y, "name": str(node), "side": _NODE, "label": _label(node)}
        face = faces.get(node)
        if face is None or face.kind == "token":
            word = f"\n“{face.text}”" if face is not None and face.text else ""
            plain.append(row | {"label": row["label"] + word})
            continue
        small = face.picture().resize((_PICTURE, _PICTURE))
        shown.append(row | {"url": encoded(small)})
    layers = _image_layers(shown, frame)
    text = {"fontSize": 9, "limit": frame.pixels, "lineBreak": "\n"}
    if shown:
        below = alt.Chart(data(shown)).mark_text(
            baseline="top", dy=frame.pixels * _NODE / 2 + 2, color=GREY, **text
        )
        layers.append(below.encode(frame.x(), frame.y(), text="label:N"))
    if plain:
        base = alt.Chart(data(plain)).encode(frame.x(), frame.y(), tooltip="name:N")
        side = (_NODE * frame.pixels) ** 2
        layers += [
            base.mark_point(
                shape="square", size=side, filled=True, fill="white", stroke=GREY, strokeWidth=1, opacity=1
            ),
            base.mark_text(color="black", **text).encode(text="label:N"),
        ]  # fmt: skip
    return layers


def _label(node: Node) -> str:
    """A node's name without its site, which is written at the left of the row."""
    if isinstance(node, UnitGroup):
        return f"{node.name}\n({len(node.units)} units)"
    if isinstance(node, WholeSite):
        return "all"
    return str(node).removeprefix(site_of(node))


def _site_layer(places: Places, frame: _Frame) -> alt.Chart:
    """The names of sites at the left of their rows."""
    rows: dict[str, list[float]] = {}
    for node, (_, y) in places.items():
        rows.setdefault(site_of(node), []).append(y)
    left = min(x for x, _ in places.values()) - 0.7
    found = [{"x": left, "y": float(np.mean(ys)), "site": site} for site, ys in rows.items()]
    text = alt.Chart(data(found)).mark_text(
        align="right", fontSize=10, color=GREY, limit=1.6 * frame.pixels
    )
    return text.encode(frame.x(), frame.y(), text="site:N", tooltip="site:N")


# --- the way of an edge --------------------------------------------------------------------------


def _way(places: Places, a: Node, b: Node) -> list[Point]:
    """The shortest way from node to node that goes through no other node.

    A straight line where nothing is in its way. Otherwise the shortest path over the corners of what is: corners of
    nodes that the path found so far runs into are added until it runs into none. Where nodes lie on each other, which
    only a person who moves them can bring about, there may be no such way, and the line is straight.
    """
    start, end = places[a], places[b]
    boxes = np.array([_box(p) for n, p in places.items() if n not in (a, b)]).reshape(-1, 4)
    # Boxes are added only as the way runs into them: a way around a few is found in a small graph, and most edges meet
    # none. It ends since each round knows more boxes.
    known = np.zeros(len(boxes), bool)
    way = [start, end]
    while True:
        hit = np.zeros(len(boxes), bool)
        for p, q in pairwise(way):
            hit |= _hits(boxes, p, q)
        if not (hit & ~known).any():
            return way if not hit.any() else [start, end]
        known |= hit
        found = _shortest(start, end, boxes[known])
        if found is None:
            return [start, end]
        way = found


def _box(place: Point) -> tuple[float, float, float, float]:
    """What a node covers, with its name below it: left, bottom, right, top."""
    (x, y), half = place, _NODE / 2
    return x - half, y - half - _LABEL, x + half, y + half


def _hits(boxes: Float[np.ndarray, "box 4"], p: Point, q: Point) -> Bool[np.ndarray, " box"]:
    """Which boxes a line from p to q runs through (clipping by Liang and Barsky)."""
    enter, leave = np.zeros(len(boxes)), np.ones(len(boxes))
    for axis in (0, 1):
        step = q[axis] - p[axis]
        # The line is p + t (q - p) with t from 0 to 1. Along each axis it is inside the box between two values of t;
        # where these ranges and 0..1 overlap, it is inside along both.
        near, far = boxes[:, axis] - p[axis], boxes[:, axis + 2] - p[axis]
        if step == 0:
            outside = (near >= 0) | (far <= 0)
            leave = np.where(outside, -1.0, leave)
            continue
        one, other = near / step, far / step
        enter = np.maximum(enter, np.minimum(one, other))
        leave = np.minimum(leave, np.maximum(one, other))
    # A line that only touches a corner does not count: ways lead from corner to corner.
    return enter < leave - 1e-9


def _shortest(start: Point, end: Point, boxes: Float[np.ndarray, "box 4"]) -> list[Point] | None:
    """The shortest way around some boxes, by way of points just outside their corners (Dijkstra)."""
    # Just outside, as ways along the border itself would touch the node.
    outer = boxes + np.array([-_CLEAR, -_CLEAR, _CLEAR, _CLEAR])
    corners = [(b[i], b[j]) for b in outer.tolist() for i in (0, 2) for j in (1, 3)]
    points = [start, end, *corners]
    best, before = {0: 0.0}, {0: 0}
    queue = [(0.0, 0)]
    while queue:
        length, here = heapq.heappop(queue)
        if here == 1:
            break
        if length > best[here]:
            continue
        for other, point in enumerate(points):
            reached = length + float(
                np.hypot(point[0] - points[here][0], point[1] - points[here][1])
            )
            if reached < best.get(other, np.inf) and not _hits(boxes, points[here], point).any():
                best[other], before[other] = reached, here
                # An entry that has become too long stays in the queue and is passed over when its turn comes, above.
                heapq.heappush(queue, (reached, other))
    if 1 not in before:
        return None
    way = [1]
    while way[-1] != 0:
        way.append(before[way[-1]])
    return [points[i] for i in reversed(way)]
