"""Kernels, families and circuits as figures. Zero is in the middle of every diverging scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from circuits.equivariance import Equivariance
from circuits.graph.circuit import CircuitGraph, Node, UnitGroup, site_of
from circuits.graph.layout import layered
from circuits.weights.connections import Connection

_COLORS = "RdBu_r"  # red excites, blue inhibits
_NODE, _KERNEL, _ROW = 0.62, 0.3, 1.7
_MOST_KERNELS = 150


def kernels_figure(connections: Sequence[Connection], end: str, title: str = "") -> Figure:
    """Kernels as small multiples with one shared colour scale, zero in the middle.

    Args:
        connections: at least one.
        end: which unit names each kernel: `source` or `target`.
        title: of the figure.

    Raises:
        ValueError: if there is none.
    """
    if not connections:
        raise ValueError("connections is empty: nothing to draw")
    kernels = [np.atleast_2d(c.kernel.cpu().numpy()) for c in connections]
    limit = _limit(kernels)
    columns = min(8, len(kernels))
    rows = -(-len(kernels) // columns)
    figure = Figure((1.3 * columns + 0.8, 1.6 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    drawn: Any = None
    for axis, kernel, connection in zip(axes, kernels, connections, strict=False):
        drawn = axis.imshow(kernel, cmap=_COLORS, vmin=-limit, vmax=limit)
        axis.set_title(str(getattr(connection, end)), fontsize=7)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axes.tolist(), label="weight", shrink=0.8)
    figure.suptitle(title, fontsize=9)
    return figure


def family_figure(found: Equivariance, title: str = "") -> Figure:
    """Sums of kernels between two families, both by angle: bands along the diagonal if weights turn.

    Beside the numbers stand what angles given at random reach.
    """
    n, m = found.sums.shape
    figure = Figure((0.22 * m + 2.4, 0.22 * n + 1.9), layout="constrained")
    axis = figure.subplots()
    limit = _limit([found.sums])
    drawn = axis.imshow(found.sums, cmap=_COLORS, vmin=-limit, vmax=limit)
    axis.set_xticks(range(m), [str(u) for u in found.sources], fontsize=6, rotation=90)
    axis.set_yticks(range(n), [str(u) for u in found.targets], fontsize=6)
    axis.set_xlabel("source units by angle", fontsize=8)
    axis.set_ylabel("target units by angle", fontsize=8)
    figure.colorbar(drawn, ax=axis, label="sum of the kernel")
    angle = "angle between" if found.multiple == 1 else "twice the angle between"
    figure.suptitle(
        f"{title}\ncorrelation with cos({angle}) {found.correlation:.2f}, "
        f"by chance 0 ± {found.correlation_null:.2f}, p {found.correlation_p:.3g}\n"
        f"turned kernels explained {found.explained:.2f}, by chance {found.explained_null:.2f}, "
        f"p {found.explained_p:.3g} (seed {found.seed})",
        fontsize=8,
    )
    return figure


def circuit_figure(
    graph: CircuitGraph,
    pictures: Mapping[Any, str | Path] | None = None,
    title: str = "",
) -> Figure:
    """A circuit layer by layer, what comes first at the bottom.

    Nodes carry their pictures, or their names alone; edges are red where they excite and blue where they
    inhibit on the whole, as wide as they are strong beside the strongest of their kind and layer, with
    their kernels on them.

    Args:
        graph: the circuit.
        pictures: of nodes that have one, an image file each.
        title: of the figure.

    Raises:
        ValueError: if it is empty.
    """
    if not len(graph):
        raise ValueError("circuit is empty: nothing to draw")
    places = {n: (x, _ROW * y) for n, (x, y) in layered(graph).items()}
    xs = [x for x, _ in places.values()]
    ys = [y for _, y in places.values()]
    wide, high = max(xs) - min(xs) + 3.2, max(ys) - min(ys) + 1.4
    scale = min(1.1, 20 / wide)
    figure = Figure((max(3.0, wide * scale), max(2.5, high * scale) + 0.4), layout="constrained")
    axis = figure.subplots()
    axis.set_xlim(min(xs) - 2.4, max(xs) + 0.8)
    axis.set_ylim(min(ys) - 0.7, max(ys) + 0.7)
    axis.set_aspect("equal")
    axis.set_axis_off()
    for site, y in {site_of(node): y for node, (_, y) in places.items()}.items():
        axis.text(min(xs) - 0.7, y, site, ha="right", va="center", fontsize=7, color="grey")
    _draw_edges(axis, graph, places)
    for node, (x, y) in places.items():
        half = _NODE / 2
        path = (pictures or {}).get(node)
        if path is not None:
            image = np.asarray(Image.open(path).convert("RGB").resize((128, 128)))
            axis.imshow(image, extent=(x - half, x + half, y - half, y + half), zorder=3)
        else:
            box = {"facecolor": "white", "edgecolor": "grey", "boxstyle": "round"}
            axis.text(x, y, _label(node), ha="center", va="center", fontsize=6, zorder=4, bbox=box)
            continue
        axis.text(x, y - half - 0.03, _label(node), ha="center", va="top", fontsize=6, zorder=4)
    about = graph.graph
    made = f"{about.get('model', '')} {graph.model_hash[:16]}".strip()
    figure.suptitle("\n".join(filter(None, (title, made))), fontsize=8)
    return figure


def _label(node: Node) -> str:
    """A node's name without its site, which stands beside the row."""
    if isinstance(node, UnitGroup):
        return f"{node.name}\n({len(node.units)} units)"
    return str(node).removeprefix(site_of(node))


def _draw_edges(axis: Any, graph: CircuitGraph, places: Mapping[Node, tuple[float, float]]) -> None:
    edges = list(graph.edges(keys=True, data=True))
    strongest: dict[str, float] = {}
    for *_, key, data in edges:
        strongest[key] = max(strongest.get(key, 0.0), data["norm"])
    with_kernel = [e for e in edges if np.ndim(k := e[3].get("kernel", 0)) == 2 and np.size(k) > 1]
    with_kernel = sorted(with_kernel, key=lambda e: -e[3]["norm"])[:_MOST_KERNELS]
    limit = _limit([np.array(e[3]["kernel"]) for e in with_kernel])
    scale = Normalize(-limit, limit)
    for a, b, key, data in edges:
        (x0, y0), (x1, y1) = places[a], places[b]
        color = "#b2182b" if data["sum"] > 0 else "#2166ac"
        width = 0.4 + 2.6 * data["norm"] / (strongest[key] or 1.0)
        axis.plot([x0, x1], [y0, y1], color=color, linewidth=width, alpha=0.55, zorder=1)
    for number, (a, b, _, data) in enumerate(with_kernel):
        (x0, y0), (x1, y1) = places[a], places[b]
        at = 0.42 + 0.16 * (number % 2)  # kernels of neighbouring edges do not hide each other
        x, y, half = x0 + at * (x1 - x0), y0 + at * (y1 - y0), _KERNEL / 2
        box = (x - half, x + half, y - half, y + half)
        axis.imshow(np.array(data["kernel"]), cmap=_COLORS, norm=scale, extent=box, zorder=2)
        axis.plot(
            [box[0], box[1], box[1], box[0], box[0]], [box[2], box[2], box[3], box[3], box[2]],
            color="grey", linewidth=0.4, zorder=2.5,
        )  # fmt: skip


def _limit(arrays: Sequence[np.ndarray]) -> float:
    return max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0) or 1.0
