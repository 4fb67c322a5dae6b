"""Patched grids, readouts, lenses and heads as figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from circuits.localization import (
    HeadEffects,
    HeadScores,
    Lens,
    LensTokens,
    PatchGrid,
    Readouts,
    Sufficiency,
)
from circuits.localization.grids import Quantity

_OWN, _NULL, _WHOLE = "#b2182b", "#969696", "#2166ac"
_MOST_TICKS = 40
_SQUARE = 0.28  # inches a cell


def patch_grid_figure(
    grid: PatchGrid, what: Quantity = "normalised", null: bool = True, title: str = ""
) -> Figure:
    """The grid of each direction, next to what other pairs' runs do; one colour scale for all.

    Args:
        grid: what was found.
        what: a share of the way to the other run, or the change in the metric's unit.
        null: also what another pair's run does, as a share.
        title: above it.
    """
    panels = [(f"{way}\n{_word(grid, what)}", grid.matrix(what, way)) for way in grid.sides]
    if null and what == "normalised":
        panels += [
            (f"{way}\ncontrol: another pair", grid.matrix("null", way))
            for way, side in grid.sides.items()
            if len(side.random)
        ]
    shown = np.concatenate([m.ravel() for _, m in panels])
    limit = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 1.0
    figure, axes = _panels(len(panels), (len(grid.rows), len(grid.columns)))
    for axis, (name, matrix) in zip(axes, panels, strict=True):
        _heat(axis, matrix, grid.rows, grid.columns, "RdBu_r", -limit, limit)
        axis.set_title(name, fontsize=7)
    _scale(figure, axes)
    figure.suptitle(title or f"{grid.metric.name} of {grid.record.measured_on}", fontsize=8)
    return figure


def _word(grid: PatchGrid, what: Quantity) -> str:
    if what == "normalised":
        return "share of the way"
    unit = f" ({grid.metric.unit})" if grid.metric.unit else ""
    return f"change of {grid.metric.name}{unit}"


def readout_figure(readouts: Readouts, title: str = "") -> Figure:
    """Accuracy on held-out examples by site and position, next to random directions and the control task."""
    two = any(r.random for r in readouts.readouts)
    parts = ["accuracy", *(["random"] if two else []), "control"]
    names = {
        "accuracy": "held-out accuracy", "random": "random directions (mean)", "control": "control task (mean)",
    }  # fmt: skip
    figure, axes = _panels(len(parts), (len(readouts.rows), len(readouts.columns)))
    for axis, part in zip(axes, parts, strict=True):
        matrix = readouts.matrix(part)  # type: ignore[arg-type]
        _heat(axis, matrix, readouts.rows, readouts.columns, "viridis", 0.0, 1.0)
        axis.set_title(names[part], fontsize=7)
    _scale(figure, axes)
    method = {"mean_difference": "mean differences", "logistic": "logistic probes"}[readouts.method]
    figure.suptitle(
        title or f"{readouts.labels} by {method}: {readouts.record.measured_on}", fontsize=8
    )
    return figure


def lens_figure(lens: Lens, title: str = "") -> Figure:
    """A task's metric at each depth with its interval, next to that with another example's stream."""
    depths = lens.depths
    figure = Figure((0.45 * len(depths) + 2.0, 2.8), layout="constrained")
    axis, at = figure.subplots(), np.arange(len(depths))
    values = np.array([d.value for d in depths])
    error = np.abs(np.array([[d.low, d.high] for d in depths]).T - values)
    axis.errorbar(
        at,
        values,
        yerr=np.nan_to_num(error),
        fmt="o-",
        color=_OWN,
        markersize=3,
        capsize=2,
        label="own",
    )
    axis.plot(at, [d.null for d in depths], ":", color=_NULL, label="another example's stream")
    axis.axhline(float(lens.intact.mean()), color=_WHOLE, linewidth=0.8, label="whole model")
    axis.set_xticks(at, [short(d.site) for d in depths], rotation=60, fontsize=6)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_ylabel(
        lens.metric.name + (f" ({lens.metric.unit})" if lens.metric.unit else ""), fontsize=7
    )
    axis.legend(fontsize=6, frameon=False)
    held = "" if lens.norm == "own" else ", final normalisation held"
    figure.suptitle(title or f"logit lens{held}: {lens.record.measured_on}", fontsize=8)
    return figure


def lens_tokens_figure(lens: LensTokens, title: str = "") -> Figure:
    """The first choice at each depth and position of a text; darker where it is more probable."""
    rows, columns = lens.probability.shape
    figure = Figure((0.62 * columns + 1.6, 0.26 * rows + 1.2), layout="constrained")
    axis = figure.subplots()
    _heat(axis, lens.probability, lens.sites, [printed(t) for t in lens.tokens], "Blues", 0.0, 1.0)
    for row in range(rows):
        for column in range(columns):
            dark = lens.probability[row, column] > 0.6
            axis.text(
                column, row, printed(lens.words[row][column]), ha="center", va="center", fontsize=5,
                color="white" if dark else "black",
            )  # fmt: skip
    axis.set_title(title or "most probable next token at each depth", fontsize=8)
    return figure


def heads_figure(scores: HeadScores, title: str = "") -> Figure:
    """Scores by layer and head for each kind; heads that attend there more than by chance are framed."""
    layers = tuple(dict.fromkeys(u.site for u in scores.heads))
    heads = tuple(str(i) for i in range(1 + max(u.index for u in scores.heads)))
    figure, axes = _panels(len(scores.kinds), (len(layers), len(heads)))
    for axis, kind in zip(axes, scores.kinds, strict=True):
        _heat(axis, scores.matrix(kind), layers, heads, "viridis", 0.0, 1.0)
        for score in scores.of(kind):
            if score.is_one:
                at = (score.head.index - 0.5, layers.index(score.head.site) - 0.5)
                axis.add_patch(_frame(at))
        axis.set_title(kind.replace("_", " "), fontsize=7)
    _scale(figure, axes)
    figure.suptitle(
        title or f"heads of {scores.record.model}: {scores.scores.shape[2]} texts, seed {scores.record.seed} "
        "(framed: above chance, p < 0.05 corrected)",
        fontsize=8,
    )  # fmt: skip
    return figure


def head_effects_figure(found: HeadEffects, title: str = "") -> Figure:
    """Total, direct and indirect effect and self-repair of each head with 95 % intervals, next to another pair's."""
    effects = found.effects()
    parts = ("total", "direct", "indirect", "self_repair")
    figure = Figure((max(3.6, 0.45 * len(effects) + 1.5), 3.0), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(effects))
    for k, (part, colour) in enumerate(
        zip(parts, (_OWN, _WHOLE, "#92c5de", "#f4a582"), strict=True)
    ):
        each = [getattr(e, part) for e in effects]
        value = np.array([p.value for p in each])
        ends = np.array([[p.value - p.low, p.high - p.value] for p in each]).T
        axis.errorbar(
            places + 0.16 * (k - 1.5), value, yerr=np.nan_to_num(np.abs(ends)), fmt="o", markersize=3, capsize=2,
            color=colour, label=part.replace("_", "-"),
        )  # fmt: skip
    axis.scatter(
        places, [e.null for e in effects], marker="_", color=_NULL, label="another pair's total"
    )
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks(
        places, [e.head for e in effects], fontsize=6, rotation=90 if len(effects) > 12 else 0
    )
    axis.tick_params(axis="y", labelsize=6)
    unit = f" ({found.grid.metric.unit})" if found.grid.metric.unit else ""
    axis.set_ylabel(f"change of {found.grid.metric.name}{unit}", fontsize=7)
    axis.legend(fontsize=6)
    way = next(iter(found.grid.sides))
    figure.suptitle(title or f"{way}: {found.grid.record.measured_on}", fontsize=8)
    return figure


def sufficiency_figure(found: Sufficiency, title: str = "") -> Figure:
    """How far the kept units come from nothing (0) to the whole model (1), next to random sets."""
    figure = Figure((3.6, 2.8), layout="constrained")
    axis = figure.subplots()
    error = [[found.faithfulness - found.low], [found.high - found.faithfulness]]
    axis.errorbar(
        [0], [found.faithfulness], yerr=np.nan_to_num(np.abs(error)), fmt="o", color=_OWN, capsize=3
    )
    spread = np.linspace(-0.15, 0.15, max(1, len(found.null)))
    axis.scatter(1 + spread[: len(found.null)], found.null, s=9, color=_NULL)
    for level in (0, 1):
        axis.axhline(level, color="black", linewidth=0.5)
    axis.set_xticks([0, 1], ["kept", "random sets"], fontsize=7)
    axis.set_xlim(-0.6, 1.6)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_ylabel(f"faithfulness ({found.metric})", fontsize=7)
    figure.suptitle(title or f"{found.record.measured_on}, p {found.p_value:.2g}", fontsize=8)
    return figure


# --- parts ---------------------------------------------------------------------------------------


def short(site: str) -> str:
    """A hook point's name without what all of them have.

    >>> short("blocks.3.attn.hook_z:1"), short("blocks.0.hook_resid_pre"), short("mixed3b")
    ('3 z:1', '0 resid_pre', 'mixed3b')
    """
    return re.sub(r"^blocks\.(\d+)\.(?:attn\.|mlp\.)?hook_", r"\1 ", site)


def printed(token: str) -> str:
    """A token as it can be seen: blanks and line ends are marked, and `$` starts no formula.

    >>> printed(" a\\n")
    '·a↵'
    """
    made = token.replace(" ", "·").replace("\n", "↵").replace("$", r"\$")
    return made if len(made) <= 12 else f"{made[:11]}…"


def _panels(n: int, shape: tuple[int, int]) -> tuple[Figure, Sequence[Axes]]:
    rows, columns = shape
    width, height = max(1.6, _SQUARE * columns + 0.9), max(1.2, _SQUARE * rows + 0.9)
    figure = Figure((min(16.0, n * width + 0.8), min(20.0, height + 0.5)), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, n, squeeze=False)).ravel())


def _scale(figure: Figure, axes: Sequence[Axes]) -> None:
    """The colour scale that all panels share."""
    figure.colorbar(axes[0].images[0], ax=list(axes), shrink=0.7).ax.tick_params(labelsize=6)


def _heat(
    axis: Axes,
    matrix: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    low: float,
    high: float,
) -> None:
    """A matrix as colours with its rows and columns named; what is not there stays grey."""
    axis.set_facecolor("#dddddd")
    axis.imshow(matrix, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for names, ticks in ((rows, axis.set_yticks), (columns, axis.set_xticks)):
        step = -(-len(names) // _MOST_TICKS)
        at = range(0, len(names), step)
        labels = [short(names[i]).replace("$", r"\$").replace("\n", "↵") for i in at]
        ticks(
            list(at),
            labels,
            fontsize=5,
            rotation=90 if names is columns and max(map(len, labels)) > 2 else 0,
        )


def _frame(at: tuple[float, float]) -> Rectangle:
    return Rectangle(at, 1, 1, fill=False, edgecolor=_OWN, linewidth=1.2)
