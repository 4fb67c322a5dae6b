"""The case's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from circuits.attribution.results import Attribution
from circuits.figures.tunings import overlaid
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.transplant import TransplantReport
from circuits.tuning.radial import RadialTuning

INK, OTHER, PALE = "#08519c", "#d94801", "#969696"
_CROP = 72  # pixels: about what a curve of the clean room sees


class Crops(NamedTuple):
    """Parts of images and what a unit is in their middle."""

    images: Tensor
    values: list[float]


def turned(curve: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """The best Pearson correlation of a curve with another that is turned, and by how many steps."""
    a, b = curve - curve.mean(), other - other.mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    if norm == 0:
        return 0.0, 0
    r = np.fft.ifft(np.fft.fft(a) * np.conj(np.fft.fft(b))).real / norm
    return float(r.max()), int(r.argmax())


def families(own: Sequence[RadialTuning], control: Sequence[RadialTuning]) -> Figure:
    """Tuning curves of a family side by side with a control's."""
    figure = Figure((9, 2.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, tunings, title in (
        (axes[0], own, "as written"),
        (axes[1], control, "shuffled orientations"),
    ):
        for t in tunings:
            if t.mean.max() > 0:
                axis.plot(t.angles, t.mean / t.mean.max(), linewidth=0.8)
        axis.set(
            title=title, xlabel="angle at which the curve bulges, degrees", xticks=range(0, 361, 90)
        )
    axes[0].set_ylabel("activation / peak")
    return figure


def published(
    curves: Mapping[str, Sequence[float]],
    own: Sequence[RadialTuning],
    control: Sequence[RadialTuning],
) -> Figure:
    """Each published curve with the most similar of ours and of the control's."""
    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots(2, 5, sharex=True, sharey=True).ravel()
    for axis, (unit, values) in zip(axes, curves.items(), strict=True):
        full = np.array(values, float)
        middle = 180 - int(full.argmax())
        axis.plot(np.arange(360), np.roll(full, middle) / full.max(), color="black", linewidth=1)
        said = []
        for tunings, colour in ((control, PALE), (own, OTHER)):
            step = 360 // len(tunings[0].angles)
            theirs = full[::step]
            fits = [turned(theirs, t.mean) for t in tunings]
            k = max(range(len(fits)), key=lambda i: fits[i][0])
            moved = np.roll(tunings[k].mean, fits[k][1]) / max(tunings[k].mean.max(), 1e-9)
            axis.plot(
                np.arange(0, 360, step),
                np.roll(moved, round(middle / step)),
                color=colour,
                linewidth=0.9,
            )
            said.append(fits[k][0])
        axis.set_title(f"mixed3b:{unit}  r {said[1]:.3f} (control {said[0]:.2f})", fontsize=7)
        axis.set_xticks([0, 90, 180, 270, 360], ["-180", "-90", "0", "90", "180"], fontsize=6)
    figure.supxlabel("degrees from the peak", fontsize=8)
    figure.supylabel("activation / peak", fontsize=8)
    return figure


def echoes(
    intact: Sequence[RadialTuning], without: Sequence[RadialTuning], control: Sequence[RadialTuning]
) -> Figure:
    """Mean tuning curves about each unit's own angle."""
    figure = Figure((6, 2.8), layout="constrained")
    axis = figure.subplots()
    for tunings, colour, label in (
        (intact, "black", "as written"), (control, PALE, "without random weights"),
        (without, OTHER, "without negative weights"),
    ):  # fmt: skip
        step = 360 / len(tunings[0].angles)
        rows = np.stack(
            [
                np.roll(t.mean / max(t.mean.max(), 1e-9), round((180 - 15 * k) / step))
                for k, t in enumerate(tunings)
            ]
        )
        axis.fill_between(
            tunings[0].angles - 180, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0
        )
        axis.plot(tunings[0].angles - 180, rows.mean(0), color=colour, label=label)
    axis.set(
        xlabel="degrees from the unit's own angle",
        ylabel="activation / peak",
        xticks=range(-180, 181, 45),
    )
    axis.legend(fontsize=7)
    return figure


def matrices(sums: Mapping[str, Sequence[np.ndarray]], radii: Sequence[float]) -> Figure:
    """Kernel sums between families, by angle; blue inhibits, red excites."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots(len(sums), len(radii), squeeze=False)
    for row, (name, blocks) in enumerate(sums.items()):
        for axis, block, radius in zip(axes[row], blocks, radii, strict=True):
            high = np.abs(block).max()
            drawn = axis.imshow(
                block, cmap="RdBu_r", vmin=-high, vmax=high, extent=(0, 360, 360, 0)
            )
            axis.set_title(f"radius {radius:g}, {name}", fontsize=7)
            axis.set_xticks([0, 180, 360])
            axis.set_yticks([0, 180, 360])
            figure.colorbar(drawn, ax=axis).ax.tick_params(labelsize=5)
    figure.supxlabel("angle of the early curve, degrees", fontsize=8)
    figure.supylabel("angle of the curve, degrees", fontsize=8)
    return figure


def kernels(rows: Mapping[str, Tensor]) -> Figure:
    """One row of kernels for each part, with a scale of its own."""
    figure = Figure((11, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 12)
    for line, (name, weight) in zip(axes, rows.items(), strict=True):
        high = float(weight.abs().max())
        for k, axis in enumerate(line):
            axis.imshow(weight[k].numpy(), cmap="RdBu_r", vmin=-high, vmax=high)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_title(f"{name} (±{high:.2g})", fontsize=7, loc="left")
    return figure


def pictures(own: Sequence[Tensor], names: Sequence[str], control: Sequence[Tensor]) -> Figure:
    """Feature visualizations, a control's in the last row."""
    columns = 6
    rows = -(-len(own) // columns) + 1
    figure = Figure((1.5 * columns, 1.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, image, name in zip(axes.ravel(), own, names, strict=False):
        axis.imshow(image.movedim(0, -1).numpy().clip(0, 1))
        axis.set_title(name, fontsize=6)
    for axis, image in zip(axes[-1], control, strict=False):
        axis.imshow(image.movedim(0, -1).numpy().clip(0, 1))
        axis.set_title("shuffled orientations", fontsize=6)
    return figure


def strongest_crops(model: HookedModel, site: str, unit: int, images: Tensor, n: int) -> Crops:
    """The parts of images where a unit is most active, at most one an image."""
    assert isinstance(model.input, ImageInput), "the clean room takes images"
    maps = [
        model.run(model.input.normalize(x), read=[site], until=site)[site][:, unit]
        for x in images.split(32)
    ]
    return _cut(images, torch.cat(maps), n, 8.0)


def crops_at(images: Tensor, maps: Tensor, n: int, pixels: float) -> Tensor:
    """The same for maps that are known."""
    return _cut(images, maps, n, pixels).images


def _cut(images: Tensor, maps: Tensor, n: int, pixels: float) -> Crops:
    values, places = maps.flatten(1).max(1)
    best = values.argsort(descending=True, stable=True)[:n].tolist()
    size = min(_CROP, round(9 * pixels), *images.shape[-2:])
    found = []
    for i in best:
        y, x = divmod(int(places[i]), maps.shape[2])
        top, left = (
            int(min(max((p + 0.5) * pixels - size / 2, 0), side - size))
            for p, side in ((y, images.shape[2]), (x, images.shape[3]))
        )
        found.append(images[i, :, top : top + size, left : left + size])
    return Crops(torch.stack(found), [float(values[i]) for i in best])


def crops(rows: Sequence[tuple[str, Tensor, Tensor]]) -> Figure:
    """Two groups of crops in each row."""
    figure = Figure((11, 1.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (name, one, other) in zip(axes, rows, strict=True):
        for axis, some in ((left, one), (right, other)):
            axis.imshow(_montage(some).movedim(0, -1).numpy().clip(0, 1))
            axis.set_axis_off()
        left.set_title(name, fontsize=8, loc="left")
    return figure


def _montage(images: Tensor, columns: int = 10) -> Tensor:
    """Images side by side, in rows of at most `columns`, with a white pixel between."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    columns = min(columns, len(framed))
    rest = -len(framed) % columns
    framed = torch.cat([framed, torch.ones(rest, *framed.shape[1:])])
    return torch.cat([torch.cat(list(row), 2) for row in framed.split(columns)], 1)


def overlays(rows: Sequence[tuple[Tensor, Attribution]]) -> Figure:
    """Crops, and beside each what of it counts."""
    n = max(len(images) for images, _ in rows)
    figure = Figure((2.4 * n, 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2 * n, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for line, (images, credit) in zip(axes, rows, strict=True):
        heat = credit.heat("absolute")
        for k, image in enumerate(images):
            picture = image.movedim(0, -1).numpy().clip(0, 1)
            line[2 * k].imshow(picture)
            line[2 * k + 1].imshow(overlaid(picture, heat[k].numpy()))
    return figure


def recovered(report: TransplantReport) -> Figure:
    """What each condition recovers, with its interval."""
    figure = Figure((7, 2.6), layout="constrained")
    axis = figure.subplots()
    for k, c in enumerate(report.conditions):
        m = c.recovered_kl
        axis.barh(k, m.value, color=OTHER if c.name == "transplant" else PALE)
        axis.plot([m.low, m.high], [k, k], color="black", linewidth=1)
    axis.set_yticks(range(len(report.conditions)), [c.name for c in report.conditions], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.5)
    low = min(min(c.recovered_kl.low for c in report.conditions), 0.0)
    axis.set_xlim(max(low, -1.5) - 0.05, 1.05)
    axis.set_xlabel("share of the KL divergence of zeroing that is recovered (below -1.5 cut off)")
    return figure
