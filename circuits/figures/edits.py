"""What an edit or an ablation does, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuits.effects.reports import EditReport, TuningChange
from circuits.experiments.ablation import AblationReport
from circuits.experiments.outcomes import Effect

_EDIT, _NULL = "#b2182b", "#636363"

Panel = tuple[str, Effect]
"""What an effect is called, and the effect."""


def ablation_figure(report: AblationReport, title: str = "") -> Figure:
    """Each measure's change without the units, with its interval, compared with the random groups."""
    figure, _ = _effects(list(report.effects.items()))
    figure.suptitle(
        title
        or f"{len(report.units)} units, {report.how} ablation; {report.record.measured_on}\n{report.null_is} "
        f"(seed {report.record.seed})",
        fontsize=8,
    )
    return figure


def edit_figure(report: EditReport, title: str = "") -> Figure:
    """Each number's change with its interval, compared with random edits; and units' tuning before and after."""
    panels = [(f"on target\n{name}", e) for name, e in report.targets.items()]
    panels += [(f"on other examples\n{name}", e) for name, e in report.generalisation.items()]
    panels += list(report.effects.items())
    panels += [(f"other units of\n{name}", e) for name, e in report.others.items()]
    curves = report.tuning[:12]
    figure, rest = _effects(panels, len(curves))
    for axis, change in zip(rest, curves, strict=False):
        _tuning(axis, change)
    record = report.record
    size = "; ".join(f"{n.of}: {n.relative:.2g} of its norm" for n in report.norms[:3])
    figure.suptitle(
        title
        or f"{_counted(len(report.recipe.edits))} of {record.model} ({size})\n{record.measured_on}; {report.null_is}, "
        f"seed {record.seed}",
        fontsize=8,
    )
    return figure


def _counted(n: int) -> str:
    return "one edit" if n == 1 else f"{n} edits"


def _effects(panels: Sequence[Panel], more: int = 0) -> tuple[Figure, list[Axes]]:
    """A panel for each effect, and the axes of so many more."""
    columns = max(4, min(6, len(panels)))
    rows, below = -(-len(panels) // columns), -(-more // columns)
    figure = Figure((1.9 * columns, 2.1 * (rows + below) + 0.7), layout="constrained")
    axes = figure.subplots(rows + below, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, (name, effect) in zip(axes[:rows].ravel(), panels, strict=False):
        _effect(axis, name, effect)
    return figure, list(axes[rows:].ravel())


def _effect(axis: Axes, name: str, effect: Effect) -> None:
    axis.set_axis_on()
    ends = np.nan_to_num([effect.low, effect.high], nan=effect.change)
    error = [[max(effect.change - ends[0], 0)], [max(ends[1] - effect.change, 0)]]
    axis.errorbar([0], [effect.change], yerr=error, fmt="o", color=_EDIT, capsize=3)
    spread = np.linspace(-0.2, 0.2, max(1, len(effect.null)))
    axis.scatter(1 + spread[: len(effect.null)], effect.null, s=6, color=_NULL)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks([0, 1], ["changed", "null"], fontsize=5)
    axis.set_xlim(-0.6, 1.6)
    axis.tick_params(axis="y", labelsize=5)
    what = f"{name.replace('_', ' ')} ({effect.unit})"
    numbers = f"{effect.intact:.3g} to {effect.changed:.3g}, p {effect.p_value:.2g}"
    axis.set_title(f"{what}\n{numbers}", fontsize=6)


def _tuning(axis: Axes, change: TuningChange) -> None:
    axis.set_axis_on()
    axis.plot(change.angles, change.before, color=_NULL, linewidth=1, label="before")
    axis.plot(change.angles, change.after, color=_EDIT, linewidth=1, label="after")
    echo = change.measures.echo.value, change.changed.echo.value
    axis.set_title(f"{change.unit}\necho {echo[0]:.2f} to {echo[1]:.2f}", fontsize=6)
    axis.set_xticks([0, 90, 180, 270, 360])
    axis.tick_params(labelsize=5)
    axis.legend(fontsize=5, frameon=False)
