"""The case's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import altair as alt
import numpy as np
import torch
from torch import Tensor

from circuits.attribution.results import Attribution
from circuits.figures import Figure
from circuits.figures.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Row,
    cells,
    data,
    encoded,
    lines,
    named_ticks,
    panel,
    run_color,
    signed,
    sized,
    together,
    zero_line,
)
from circuits.figures.tunings import overlaid
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.transplant import TransplantReport
from circuits.tuning.radial import RadialTuning

_ACROSS = 6  # pictures in a row
_MONTAGE = 420  # pixels
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
    """Tuning curves of a family side by side with a control's, on the same axes."""
    panels = []
    for tunings, title in ((own, "as written"), (control, "shuffled orientations")):
        rows = [
            {"unit": str(t.unit), "angle": a, "response": v / t.mean.max()}
            for t in tunings
            if t.mean.max() > 0
            for a, v in zip(t.angles.tolist(), t.mean.tolist(), strict=True)
        ]
        drawn = alt.Chart(data(rows)).mark_line(strokeWidth=1, opacity=0.7)
        x = _degrees("angle at which the curve bulges, degrees", range(0, 361, 90))
        y = alt.Y("response:Q", title="activation / peak", scale=alt.Scale(domain=[0, 1]))
        panels.append(panel(sized(drawn.encode(x, y, detail="unit:N"), 320, 160), title))
    return together(panels, 2)


def _degrees(title: str, ticks: range) -> alt.X:
    scale = alt.Scale(domain=[ticks[0], ticks[-1]], nice=False)
    return alt.X("angle:Q", title=title, scale=scale, axis=alt.Axis(values=list(ticks)))


_PUBLISHED, _CONTROL, _OWN = "published", "shuffled orientations", "as written"


def published(
    curves: Mapping[str, Sequence[float]],
    own: Sequence[RadialTuning],
    control: Sequence[RadialTuning],
) -> Figure:
    """Each published curve with the most similar of ours and of the control's."""
    panels = []
    for unit, values in curves.items():
        full = np.array(values, float)
        middle = 180 - int(full.argmax())
        rows = _turned_rows(_PUBLISHED, np.roll(full, middle) / full.max())
        said = []
        for name, tunings in ((_CONTROL, control), (_OWN, own)):
            step = 360 // len(tunings[0].angles)
            fits = [turned(full[::step], t.mean) for t in tunings]
            k = max(range(len(fits)), key=lambda i: fits[i][0])
            moved = np.roll(tunings[k].mean, fits[k][1]) / max(tunings[k].mean.max(), 1e-9)
            rows += _turned_rows(name, np.roll(moved, round(middle / step)))
            said.append(fits[k][0])
        x = _degrees("degrees from the peak", range(-180, 181, 90))
        y = alt.Y("response:Q", title="activation / peak", scale=alt.Scale(domain=[0, 1.05]))
        names = (_PUBLISHED, _CONTROL, _OWN)
        tips = {"run:N": "curve", "angle:Q": "degrees", "response:Q": "activation / peak"}
        drawn = lines(rows, x, y, tips, names, colours=(GREEN, GREY, ORANGE))
        title = [f"mixed3b:{unit}", f"r {said[1]:.3f} (control {said[0]:.2f})"]
        panels.append(panel(sized(drawn), title))
    return together(panels, 5)


def _turned_rows(name: str, values: np.ndarray) -> list[Row]:
    """A curve from -180 degrees on, in equal steps."""
    step = 360 / len(values)
    return [
        {"run": name, "angle": -180 + step * i, "response": float(v)} for i, v in enumerate(values)
    ]


def echoes(
    intact: Sequence[RadialTuning], without: Sequence[RadialTuning], control: Sequence[RadialTuning]
) -> Figure:
    """Mean tuning curves about each unit's angle, with bands from the smallest to the largest."""
    runs = {
        "as written": intact, "without random weights": control, "without negative weights": without,
    }  # fmt: skip
    rows: list[Row] = []
    for name, tunings in runs.items():
        step = 360 / len(tunings[0].angles)
        curves = np.stack(
            [
                np.roll(t.mean / max(t.mean.max(), 1e-9), round((180 - 15 * k) / step))
                for k, t in enumerate(tunings)
            ]
        )
        parts = zip(_turned_rows(name, curves.mean(0)), curves.min(0), curves.max(0), strict=True)
        rows += [row | {"low": float(low), "high": float(high)} for row, low, high in parts]
    x = _degrees("degrees from the angle that the unit is written for", range(-180, 181, 45))
    y = alt.Y("response:Q", title="activation / peak")
    tips = {"run:N": "network", "angle:Q": "degrees", "response:Q": "activation / peak"}
    colours = (BLUE, GREY, ORANGE)
    drawn = lines(rows, x, y, tips, runs, colours=colours)
    band = alt.Chart(data(rows)).mark_area(opacity=0.15)
    band = band.encode(
        x, alt.Y("low:Q"), y2="high:Q", color=run_color(runs, colours, of_lines=True)
    )
    return sized(alt.layer(band, drawn), 480, 200)


def matrices(sums: Mapping[str, Sequence[np.ndarray]], radii: Sequence[float]) -> Figure:
    """Kernel sums between families, by angle; blue inhibits, red excites; one colour scale for all of them."""
    shades = signed("sum of the kernel", *(b for blocks in sums.values() for b in blocks))
    panels = []
    for name, blocks in sums.items():
        for block, radius in zip(blocks, radii, strict=True):
            angles = [f"{360 * i / len(block):g}" for i in range(len(block))]
            drawn = cells(
                block.astype(float), shades, rows=angles, columns=angles, y="curve, degrees",
                x="early curve, degrees", size=(7, 7),
            )  # fmt: skip
            panels.append(panel(drawn, f"radius {radius:g}, {name}"))
    return together(panels, len(radii))


def kernels(rows: Mapping[str, Tensor]) -> Figure:
    """One row of kernels for each part, with a scale of its own."""
    found = []
    for name, weight in rows.items():
        shades = signed("weight", weight.numpy())
        painted = [shades.painted(w.double().numpy()) for w in weight[:12]]
        found.append((f"{name} (±{shades.high:.2g})", painted))
    return _grid(found, 62, "kernels: blue inhibits, white 0, red excites")


def _grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    side: int,
    title: str,
    columns: Sequence[str] = (),
) -> Figure:
    """Rows of pictures with their names."""
    most = max(len(pictures) for _, pictures in rows)
    labels = list(columns) or [str(i + 1) for i in range(most)]
    found = [
        {"row": i, "column": j, "url": encoded(picture)}
        for i, (_, pictures) in enumerate(rows)
        for j, picture in enumerate(pictures)
    ]
    drawn = alt.Chart(data(found)).mark_image(width=side, height=side, smooth=False)
    drawn = drawn.encode(
        alt.X("column:O", title=title, axis=named_ticks(labels, side, True)),
        alt.Y("row:O", title=None, axis=named_ticks([name for name, _ in rows], side, False)),
        url="url:N",
    )
    return drawn.properties(width=(side + 4) * most, height=(side + 4) * len(rows))


def pictures(own: Sequence[Tensor], names: Sequence[str], control: Sequence[Tensor]) -> Figure:
    """Feature visualizations, a control's in the last row."""
    shown = [_upright(image) for image in own]
    parts = range(0, len(own), _ACROSS)
    rows = [
        (f"{names[i]} to {names[min(i + _ACROSS, len(own)) - 1]}", shown[i : i + _ACROSS])
        for i in parts
    ]
    rows.append(("shuffled orientations", [_upright(image) for image in control]))
    return _grid(rows, 96, "what excites each curve most")


def _upright(image: Tensor) -> np.ndarray:
    """Channels last, as pictures have them."""
    return image.movedim(0, -1).numpy().clip(0, 1)


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
    panels = []
    for name, one, other in rows:
        for side, some in (("left", one), ("right", other)):
            montage = _montage(some)
            height, width = montage.shape[1:]
            picture = alt.Chart(data([{"url": encoded(_upright(montage))}]))
            picture = picture.mark_image(
                width=_MONTAGE, height=_MONTAGE * height / width, align="left", baseline="top", aspect=False
            )  # fmt: skip
            drawn = picture.encode(x=alt.value(0), y=alt.value(0), url="url:N")
            shown = sized(drawn, _MONTAGE, _MONTAGE * height / width)
            panels.append(panel(shown, f"{name}, {side}", 60))
    return together(panels, 2)


def _montage(images: Tensor, columns: int = 10) -> Tensor:
    """Images side by side, in rows of at most `columns`, with a white pixel between."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    columns = min(columns, len(framed))
    rest = -len(framed) % columns
    framed = torch.cat([framed, torch.ones(rest, *framed.shape[1:])])
    return torch.cat([torch.cat(list(row), 2) for row in framed.split(columns)], 1)


def overlays(rows: Sequence[tuple[Tensor, Attribution]]) -> Figure:
    """Crops, and next to each what of it counts."""
    found = []
    for number, (images, credit) in enumerate(rows):
        heat = credit.heat("absolute")
        line = []
        for k, image in enumerate(images):
            picture = _upright(image)
            line += [picture, overlaid(picture, heat[k].numpy())]
        found.append((f"curve {number + 1}", line))
    return _grid(found, 96, "crops, and next to each what of it counts")


def recovered(report: TransplantReport) -> Figure:
    """What each condition recovers, with its interval."""
    rows = [
        {"run": c.name, "value": c.recovered_kl.value, "low": c.recovered_kl.low, "high": c.recovered_kl.high,
         "own": c.name == "transplant"}
        for c in report.conditions
    ]  # fmt: skip
    low = min(min(c.recovered_kl.low for c in report.conditions), 0.0)
    scale = alt.Scale(domain=[max(low, -1.5) - 0.05, 1.05], nice=False, clamp=True)
    title = "share of the KL divergence of zeroing that is recovered (below -1.5 cut off)"
    base = alt.Chart(data(rows)).encode(y=alt.Y("run:N", title="in their place", sort=None))
    x = alt.X("value:Q", title=title, scale=scale)
    colour = alt.when("datum.own").then(alt.value(ORANGE)).otherwise(alt.value(GREY))
    ends = base.mark_rule(strokeWidth=1.5, color="black").encode(alt.X("low:Q"), x2="high:Q")
    made = alt.layer(zero_line("x"), base.mark_bar().encode(x, color=colour), ends)
    return made.properties(width=520, height=alt.Step(22))
