"""Kernels and families of units as figures. Zero is in the middle of every diverging scale."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
from jaxtyping import Float, UInt8

from circuits.equivariance import Equivariance
from circuits.families import Family
from circuits.figures.charts import (
    GREY,
    Figure,
    cells,
    data,
    panel,
    rising,
    signed,
    titled,
)
from circuits.weights.connections import Connection

_KERNEL = 84  # pixels a side
_LABEL = 15  # characters of a title above a kernel
_COMPOSITION = ("Q", "K", "V")
_PHASES = {
    "rotation": "preferred angle, degrees", "scale": "scale, factor", "mirror": "mirrored (0 no, 1 yes)",
    "hue": "hue, degrees",
}  # fmt: skip


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
    kernels = [np.atleast_2d(c.kernel.cpu().double().numpy()) for c in connections]
    shades = signed("weight", *kernels)
    panels = []
    for kernel, connection in zip(kernels, connections, strict=True):
        size = _KERNEL / max(kernel.shape)
        # Between heads a connection has three numbers, one for each input of the later head that the earlier one may
        # write to.
        composition = connection.kernel.ndim == 1 and connection.kernel.numel() == len(_COMPOSITION)
        drawn = cells(
            kernel, shades, rows=_numbers(kernel, 0), columns=_COMPOSITION if composition else _numbers(kernel, 1),
            y="" if composition else "y", x="composition" if composition else "x",
            size=(size, size), labels=composition,
        )  # fmt: skip
        panels.append(panel(drawn, str(getattr(connection, end)), _LABEL))
    return titled(alt.concat(*panels, columns=min(8, len(panels)), spacing=18), title)


def _numbers(matrix: np.ndarray, axis: int) -> list[str]:
    return [str(i) for i in range(matrix.shape[axis])]


def matrix_figure(matrix: Float[np.ndarray, "y x"], what: str) -> Figure:
    """A kernel with its scale, the first row on top."""
    size = 160 / max(matrix.shape)
    return cells(
        matrix.astype(float), signed(what, matrix), rows=_numbers(matrix, 0), columns=_numbers(matrix, 1),
        y="y", x="x", size=(size, size), labels=False,
    )  # fmt: skip


def map_picture(values: Float[np.ndarray, "y x"]) -> UInt8[np.ndarray, "y x 3"]:
    """A unit's map as a picture without a scale: blue below zero, white at it, red above."""
    return signed("activation", values).painted(values.astype(float))


def family_figure(found: Equivariance, title: str = "") -> Figure:
    """Sums of kernels between two families, both by angle: bands along the diagonal if weights turn.

    The title also says what angles given at random reach.
    """
    drawn = cells(
        found.sums.astype(float), signed("sum of the kernel", found.sums),
        rows=[str(u) for u in found.targets], columns=[str(u) for u in found.sources],
        y="target units by angle", x="source units by angle",
    )  # fmt: skip
    angle = "angle between" if found.multiple == 1 else "twice the angle between"
    said = (
        f"correlation with cos({angle}) {found.correlation:.2f}, "
        f"by chance 0 ± {found.correlation_null:.2f}, p {found.correlation_p:.3g}\n"
        f"turned kernels explained {found.explained:.2f}, by chance {found.explained_null:.2f}, "
        f"p {found.explained_p:.3g} (seed {found.seed})"
    )
    return titled(drawn, f"{title}\n{said}", 72)


def families_figure(families: Sequence[Family], title: str = "") -> Figure:
    """Each family's members by their phase, darker the better they agree with the rest of the family.

    Raises:
        ValueError: if there is none.
    """
    if not families:
        raise ValueError("families is empty: nothing to draw")
    rows = [
        {
            "family": f.name or f"{f.site} {i}", "unit": str(m.unit), "index": m.unit.index, "phase": m.phase,
            "fit": m.fit,
        }
        for i, f in enumerate(families)
        for m in f.members
    ]  # fmt: skip
    kinds = list(dict.fromkeys(f.transformation for f in families))
    phase = " or ".join(_PHASES[kind] for kind in kinds)
    base = alt.Chart(data(rows)).encode(
        alt.X("phase:Q", title=phase), alt.Y("family:N", title="family", sort=None),
        tooltip=[alt.Tooltip("unit:N"), alt.Tooltip("phase:Q"), alt.Tooltip("fit:Q", format=".3g")],
    )  # fmt: skip
    points = base.mark_point(filled=True, size=90, opacity=1, stroke=GREY, strokeWidth=1)
    labels = base.mark_text(dy=-10, fontSize=8, color=GREY).encode(text="index:N")
    made = alt.layer(points.encode(color=rising("mean agreement").encoding("fit")), labels)
    first = families[0]
    said = f"chance: {first.null}, {first.n_null} times, seed {first.seed}; {first.stimuli}"
    return titled(made.properties(width=560, height=alt.Step(34)), f"{title}\n{said}")
