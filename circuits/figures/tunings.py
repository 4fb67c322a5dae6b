"""Tuning curves, heat maps and activation spectra as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from circuits.store.spectra import Spectrum
from circuits.tuning.heatmaps import HeatMap
from circuits.tuning.invariances import Invariance
from circuits.tuning.radial import RadialTuning

_SHOWN = 48


def tuning_figure(tunings: Sequence[RadialTuning], title: str = "") -> Figure:
    """Each unit's response by angle, its replicates as a band, and all of them together at the end.

    Raises:
        ValueError: if there is none.
    """
    if not tunings:
        raise ValueError("tunings is empty: nothing to draw")
    shown = list(tunings[:_SHOWN])
    columns = min(6, len(shown) + 1)
    rows = -(-(len(shown) + 1) // columns)
    figure = Figure((2.2 * columns, 1.7 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, t in zip(axes, shown, strict=False):
        axis.fill_between(t.angles, t.curves.min(0), t.curves.max(0), color="#9ecae1", linewidth=0)
        axis.plot(t.angles, t.mean, color="#08519c", linewidth=1)
        m = t.measures
        axis.set_title(
            f"{t.unit}\n{m.direction.value:.0f}° width {m.half_width.value:.0f}° echo {m.echo.value:.2f}",
            fontsize=6,
        )
    together = axes[len(shown)]
    for t in shown:
        if t.mean.max() > 0:
            together.plot(t.angles, t.mean / t.mean.max(), linewidth=0.7)
    together.set_title("all, each over its peak", fontsize=6)
    for axis in axes[: len(shown) + 1]:
        axis.set_xticks([0, 90, 180, 270, 360])
        axis.tick_params(labelsize=5)
    for axis in axes[len(shown) + 1 :]:
        axis.set_axis_off()
    left_out = f", {len(shown)} of {len(tunings)} shown" if len(tunings) > len(shown) else ""
    figure.suptitle(f"{title}{left_out}", fontsize=8)
    figure.supxlabel(
        "angle at which the shape bulges, degrees (band: polarity, contrast, thickness)", fontsize=7
    )
    figure.supylabel("activation", fontsize=7)
    return figure


def heat_map_figure(maps: Sequence[HeatMap], title: str = "") -> Figure:
    """Orientation x curvature, in standard deviations of a dataset where one is known.

    Raises:
        ValueError: if there is none.
    """
    if not maps:
        raise ValueError("maps is empty: nothing to draw")
    shown = list(maps[:_SHOWN])
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure((3.0 * columns, 2.1 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, m in zip(axes, shown, strict=False):
        known = np.isfinite(m.deviation) and m.deviation > 0
        values = m.in_deviations if known else m.responses
        step = float(m.angles[1] - m.angles[0])
        high = max(float(values.max()), 1e-12)
        drawn = axis.imshow(
            values, aspect="auto", origin="lower", cmap="viridis", vmin=min(0.0, float(values.min())), vmax=high,
            extent=(-step / 2, 360 - step / 2, -0.5, len(m.curvatures) - 0.5),
        )  # fmt: skip
        radii = ["line" if c == 0 else f"{1 / c:.0f}" for c in m.curvatures]
        axis.set_yticks(range(len(radii)), radii, fontsize=5)
        axis.set_xticks([0, 90, 180, 270])
        axis.tick_params(labelsize=5)
        axis.set_title(str(m.unit), fontsize=7)
        bar = figure.colorbar(drawn, ax=axis)
        bar.ax.tick_params(labelsize=5)
        bar.set_label("standard deviations" if known else "activation", fontsize=5)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=8)
    figure.supxlabel("angle at which the curve bulges, degrees", fontsize=7)
    figure.supylabel("radius, pixels", fontsize=7)
    return figure


def invariance_figure(found: Sequence[Invariance], title: str = "") -> Figure:
    """Each unit's response, at its angle and at the opposite one, as one aspect changes."""
    units = list(dict.fromkeys(i.unit for i in found))[:12]
    aspects = list(dict.fromkeys(i.aspect for i in found))
    figure = Figure((1.9 * len(aspects), 1.4 * len(units) + 0.5), layout="constrained")
    axes = figure.subplots(len(units), len(aspects), squeeze=False)
    for i in found:
        if i.unit not in units:
            continue
        axis = axes[units.index(i.unit), aspects.index(i.aspect)]
        axis.plot(
            range(len(i.values)), i.responses, "o-", color="#08519c", markersize=2, linewidth=0.8
        )
        axis.plot(
            range(len(i.values)), i.opposite, "o-", color="#bdbdbd", markersize=2, linewidth=0.8
        )
        axis.set_xticks(range(len(i.values)), [f"{v:g}" for v in i.values], fontsize=5)
        axis.tick_params(axis="y", labelsize=5)
        axis.set_title(f"{i.unit} {i.aspect}", fontsize=6)
    figure.suptitle(f"{title} (grey: at the opposite angle)".strip(), fontsize=8)
    return figure


def spectrum_figure(
    found: Spectrum, crops: Mapping[int, Sequence[Image.Image]] | None = None, title: str = ""
) -> Figure:
    """How often a unit is how active, what that contributes, and examples of each range.

    Args:
        found: the spectrum.
        crops: pictures of the examples of each bin, by the bin's number.
        title: of the figure.
    """
    bins = found.bins
    pictures = dict(crops or {})
    most = max((len(p) for p in pictures.values()), default=0)
    figure = Figure((max(6.0, 0.62 * len(bins)), 3.2 + 0.62 * most), layout="constrained")
    grid = figure.add_gridspec(2 + most, len(bins), height_ratios=[1.4, 1.4] + [0.62] * most)
    density, share = (figure.add_subplot(grid[row, :]) for row in (0, 1))
    middles = np.array([(b.low + b.high) / 2 for b in bins])
    widths = np.array([b.high - b.low for b in bins])
    density.bar(middles, [b.density for b in bins], widths * 0.95, color="#6baed6")
    density.set_yscale("log")
    tail = found.statistics.tail
    if np.isfinite(tail.rate) and tail.rate > 0:
        x = np.linspace(tail.threshold, bins[-1].high, 50)
        density.plot(
            x,
            tail.share * tail.rate * np.exp(-tail.rate * (x - tail.threshold)),
            "k--",
            linewidth=1,
        )
    density.set_ylabel("p(x), log", fontsize=7)
    share.bar(middles, [b.contribution for b in bins], widths * 0.95, color="#fd8d3c")
    share.set_ylabel("x p(x), what it\nadds to the mean", fontsize=7)
    share.set_xlabel(
        f"activation; {found.above_two:.0%} of the positive mean is above two standard deviations",
        fontsize=7,
    )
    for axis in (density, share):
        axis.set_xlim(bins[0].low, bins[-1].high)
        axis.tick_params(labelsize=6)
    for number, some in pictures.items():
        for row, picture in enumerate(some):
            axis = figure.add_subplot(grid[2 + row, number])
            axis.imshow(np.asarray(picture))
            axis.set_axis_off()
    figure.suptitle(title or f"{found.unit} on {found.data} (seed {found.seed})", fontsize=8)
    return figure


def overlaid(
    picture: Float[np.ndarray, "h w 3"], heat: Float[np.ndarray, "h w"], limit: float | None = None
) -> Float[np.ndarray, "h w 3"]:
    """A grey picture with an attribution over it: red for, blue against, clear where it says nothing.

    Args:
        picture: in 0..1.
        heat: signed.
        limit: the value of full colour; the 99.5th percentile of the absolute values if not given.
    """
    top = float(np.quantile(np.abs(heat), 0.995)) if limit is None else limit
    strength = (np.abs(heat) / max(top, 1e-12)).clip(0, 1)[..., None]
    colour = np.where(heat[..., None] > 0, [0.84, 0.1, 0.11], [0.13, 0.4, 0.67])
    grey = 0.35 + 0.65 * picture.mean(2, keepdims=True)
    return (grey * (1 - strength) + colour * strength).clip(0, 1)
