"""Attributions and sanity checks as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.results import Attribution
from circuits.figures.charts import (
    BLUE,
    ORANGE,
    Figure,
    Row,
    data,
    encoded,
    lines,
    named_ticks,
    panel,
    sized,
    titled,
    together,
)
from circuits.figures.tunings import overlaid
from circuits.saliency.cards import MethodCard

_PICTURE = 110  # pixels a side
_EXAMPLES = 8


def attribution_figure(
    made: Attribution,
    images: Float[Tensor, "example 3 h w"] | None = None,
    top: int = 12,
    title: str = "",
) -> Figure:
    """The units credited and blamed most in each example, and where (the spatial view)."""
    heat = made.heat().cpu()
    panels = []
    for example in range(min(_EXAMPLES, len(made.values))):
        panels.append(_credited(made, example, top))
        if images is not None and heat.ndim == 3:
            size = images.shape[-2:]
            large = F.interpolate(heat[example][None, None], size, mode="bilinear")[0, 0].numpy()
            panels.append(_picture(overlaid(images[example].movedim(0, -1).numpy(), large)))
    columns = 2 if len(panels) > len(made.values) else 1
    drawn = alt.concat(*panels, columns=columns).resolve_scale(color="shared")
    return titled(drawn, title or f"{made.site}, {made.method}")


def _credited(made: Attribution, example: int, top: int) -> Figure:
    bars = made.top(example, top)
    rows: list[Row] = [
        {"place": i, "unit": str(unit), "share": float(share), "run": "for" if share > 0 else "against"}
        for i, (unit, share) in enumerate(bars)
    ]  # fmt: skip
    names = [str(unit) for unit, _ in bars]
    scale = alt.Scale(domain=["for", "against"], range=[ORANGE, BLUE])
    drawn = alt.Chart(data(rows)).mark_bar()
    drawn = drawn.encode(
        alt.X("place:O", title=f"unit of {made.site}", axis=named_ticks(names, 22, True)),
        alt.Y("share:Q", title="credit, in the target's unit"),
        color=alt.Color("run:N", title="speaks", scale=scale),
        tooltip=[alt.Tooltip("unit:N"), alt.Tooltip("share:Q", format=".3g")],
    )
    aim = f"{made.aims[example]} = {float(made.target_values[example]):.3g}"
    return panel(sized(drawn, 22 * len(bars)), aim, 48)


def _picture(picture: Float[np.ndarray, "h w 3"]) -> alt.Chart:
    drawn = alt.Chart(data([{"url": encoded(picture)}]))
    drawn = drawn.mark_image(width=_PICTURE, height=_PICTURE, align="left", baseline="top")
    drawn = drawn.encode(x=alt.value(0), y=alt.value(0), url="url:N")
    return drawn.properties(width=_PICTURE, height=_PICTURE)


def saliency_figure(
    images: Float[Tensor, "example 3 h w"],
    heats: Mapping[str, Float[Tensor, "example h w"]],
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Images in rows, methods in columns: red speaks for the target, blue against it."""
    n = min(12, len(images))
    rows: list[Row] = []
    for row in range(n):
        picture = images[row].movedim(0, -1).cpu().numpy()
        pictures = [
            picture,
            *(overlaid(picture, heat[row].cpu().numpy()) for heat in heats.values()),
        ]
        rows += [{"row": row, "column": j, "url": encoded(p)} for j, p in enumerate(pictures)]
    columns = ["image", *heats]
    labels = list(names[:n]) if names else [str(i) for i in range(n)]
    across = named_ticks(columns, _PICTURE, False)
    across.orient = "top"
    drawn = alt.Chart(data(rows)).mark_image(width=_PICTURE, height=_PICTURE)
    drawn = drawn.encode(
        alt.X("column:O", title="method (red: for the target, blue: against it)", axis=across),
        alt.Y("row:O", title="example", axis=named_ticks(labels, _PICTURE, False)),
        url="url:N",
    )
    side = _PICTURE + 8
    return titled(drawn.properties(width=side * len(columns), height=side * n), title)


def sanity_figure(cards: Sequence[MethodCard], title: str = "") -> Figure:
    """For each method: likeness to its own maps as layers are shuffled, and insertion and deletion.

    Raises:
        ValueError: if there is no card.
    """
    if not cards:
        raise ValueError("cards is empty: nothing to draw")
    panels = []
    for card in cards:
        values = [v for c in card.curves for v in (*c.values, *c.random)]
        # One scale for both curves of a method, or a small effect would look as large as a big one.
        scale = alt.Scale(domain=[min(0.0, *values), max(values)] if values else [0, 1])
        panels.append(_randomised(card))
        panels += [_curves(card, kind, scale) for kind in ("insertion", "deletion")]
    made = together(panels, 3, title)
    return made.resolve_scale(color="independent", strokeDash="independent")


def _randomised(card: MethodCard) -> Figure:
    test = card.randomization
    rows: list[Row] = []
    names = {"spearman_signed": "rank, signed", "spearman": "rank, absolute", "ssim": "SSIM"}
    stages = [0, *(s.layers for s in test.stages)]
    for field, label in names.items():
        # With nothing shuffled a map is like itself.
        own = [1.0, *(float(getattr(s, field)) for s in test.stages)]
        for k, v in zip(stages, own, strict=True):
            rows.append({"run": label, "kind": "maps", "layers": k, "likeness": v})
            by_chance = float(getattr(test.chance, field))
            rows.append({"run": label, "kind": "chance", "layers": k, "likeness": by_chance})
    x = alt.X(
        "layers:Q", title="layers shuffled, from the output down", axis=alt.Axis(values=stages)
    )
    y = alt.Y(
        "likeness:Q", title="correlation, or SSIM", scale=alt.Scale(domain=[-0.3, 1.05], nice=False)
    )
    tips = {"run:N": "measure", "kind:N": "of", "layers:Q": "layers", "likeness:Q": "likeness"}
    said = f"randomisation {card.verdicts['randomisation']} (keeps {test.kept:.2f})"
    return panel(
        sized(lines(rows, x, y, tips, names.values(), dashed=True), 190), [card.method, said], 44
    )


def _curves(card: MethodCard, kind: str, scale: alt.Scale) -> Figure:
    of_kind = [c for c in card.curves if c.kind == kind]
    rows: list[Row] = [
        {"run": c.blank, "kind": order, "share": s, "value": v}
        for c in of_kind
        for order, values in (("most credited first", c.values), ("random order", c.random))
        for s, v in zip(c.shares, values, strict=True)
    ]
    done = "put in" if kind == "insertion" else "taken out"
    x = alt.X("share:Q", title=f"share of the pixels {done}")
    y = alt.Y("value:Q", title="target's value", scale=scale)
    tips = {"run:N": "blank", "kind:N": "order", "share:Q": "share", "value:Q": "value"}
    drawn = lines(rows, x, y, tips, [c.blank for c in of_kind], dashed=True)
    return panel(sized(drawn, 190), [card.method, f"{kind} {card.verdicts[kind]}"], 44)
