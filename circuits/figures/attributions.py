"""Attributions and sanity checks as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from circuits.attribution.results import Attribution
from circuits.figures.tunings import overlaid
from circuits.saliency.cards import MethodCard

_WORST = "#b2182b"


def attribution_figure(
    made: Attribution,
    images: Float[Tensor, "example 3 h w"] | None = None,
    top: int = 12,
    title: str = "",
) -> Figure:
    """The units credited and blamed most in each example, and where (the spatial view)."""
    n = min(8, len(made.values))
    spatial = images is not None and made.heat().ndim == 3
    figure = Figure((7.0 if spatial else 4.6, 1.9 * n + 0.5), layout="constrained")
    axes = figure.subplots(n, 2 if spatial else 1, squeeze=False)
    heat = made.heat().cpu()
    for example in range(n):
        bars = made.top(example, top)
        axis = axes[example, 0]
        values = [v for _, v in bars]
        colours = [_WORST if v > 0 else "#2166ac" for v in values]
        axis.bar(range(len(bars)), values, color=colours)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xticks(range(len(bars)), [str(u) for u, _ in bars], fontsize=6, rotation=60)
        axis.tick_params(axis="y", labelsize=6)
        axis.set_title(
            f"{made.aims[example]} = {float(made.target_values[example]):.3g}", fontsize=7
        )
        if spatial:
            assert images is not None, "spatial only with images"
            size = images.shape[-2:]
            large = F.interpolate(heat[example][None, None], size, mode="bilinear")[0, 0].numpy()
            axes[example, 1].imshow(overlaid(images[example].movedim(0, -1).numpy(), large))
            axes[example, 1].set_axis_off()
    figure.suptitle(title or f"{made.site}, {made.method}", fontsize=8)
    return figure


def saliency_figure(
    images: Float[Tensor, "example 3 h w"],
    heats: Mapping[str, Float[Tensor, "example h w"]],
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Images in rows, methods in columns: red speaks for the target, blue against it."""
    n = min(12, len(images))
    columns = 1 + len(heats)
    figure = Figure((1.6 * columns, 1.7 * n + 0.4), layout="constrained")
    axes = figure.subplots(n, columns, squeeze=False)
    for row in range(n):
        picture = images[row].movedim(0, -1).cpu().numpy()
        axes[row, 0].imshow(picture.clip(0, 1))
        if names:
            axes[row, 0].set_title(names[row], fontsize=6)
        for column, (name, heat) in enumerate(heats.items(), 1):
            axes[row, column].imshow(overlaid(picture, heat[row].cpu().numpy()))
            if row == 0:
                axes[row, column].set_title(name, fontsize=6)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.suptitle(title, fontsize=8)
    return figure


def sanity_figure(cards: Sequence[MethodCard], title: str = "") -> Figure:
    """For each method: likeness to its own maps as layers are shuffled, and insertion and deletion.

    Raises:
        ValueError: if there is no card.
    """
    if not cards:
        raise ValueError("cards is empty: nothing to draw")
    figure = Figure((8.4, 1.9 * len(cards) + 0.5), layout="constrained")
    axes = figure.subplots(len(cards), 3, squeeze=False)
    for row, card in zip(axes, cards, strict=True):
        test = card.randomization
        at = range(len(test.stages) + 1)
        for name, colour, label in (
            ("spearman_signed", "#08519c", "rank, signed"),
            ("spearman", "#6baed6", "rank, absolute"),
            ("ssim", "#fd8d3c", "SSIM"),
        ):
            row[0].plot(
                at,
                [1.0, *(getattr(s, name) for s in test.stages)],
                "o-",
                color=colour,
                markersize=3,
                label=label,
            )
            row[0].axhline(getattr(test.chance, name), color=colour, linestyle=":", linewidth=0.8)
        row[0].set_ylim(-0.3, 1.05)
        row[0].set_title(
            f"{card.method}: randomisation {card.verdicts['randomisation']} (keeps {test.kept:.2f})",
            fontsize=7,
        )
        row[0].set_xticks(list(at), ["0", *(str(s.layers) for s in test.stages)], fontsize=5)
        for axis, kind in ((row[1], "insertion"), (row[2], "deletion")):
            for curve in card.curves:
                if curve.kind == kind:
                    (line,) = axis.plot(curve.shares, curve.values, linewidth=1, label=curve.blank)
                    axis.plot(
                        curve.shares,
                        curve.random,
                        linewidth=0.8,
                        linestyle=":",
                        color=line.get_color(),
                    )
            axis.set_title(f"{kind} {card.verdicts[kind]} (dotted: random)", fontsize=7)
            axis.legend(fontsize=5)
        row[0].legend(fontsize=5)
        for axis in row:
            axis.tick_params(labelsize=5)
    figure.supxlabel(
        "layers shuffled, from the output down (dotted: chance)   |   share of the pixels",
        fontsize=7,
    )
    figure.suptitle(title, fontsize=8)
    return figure
