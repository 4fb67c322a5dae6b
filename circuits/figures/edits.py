"""What an edit does, as a figure (layer 6)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuits.effects.reports import EditReport, Effect, TuningChange

_EDIT, _TWIN, _NOISE = "#b2182b", "#636363", "#9ecae1"
_NAMES = {
    "kl": "KL (nats)",
    "top1_changed": "first choice changed",
    "logit": "logit of first choice",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "loss": "cross-entropy (nats)",
}


def edit_figure(report: EditReport, title: str = "") -> Figure:
    """Each number's change with its interval, beside random twins and random edits of the same size; and units'
    tuning before and after.
    """
    panels = [(f"on target\n{name}", e) for name, e in report.targets.items()]
    panels += [(f"on other examples\n{name}", e) for name, e in report.generalisation.items()]
    panels += [(_NAMES.get(name, name), e) for name, e in report.measures.items()]
    panels += [(f"other units of\n{name}", e) for name, e in report.others.items()]
    curves = report.tuning[:12]
    columns = max(4, min(6, len(panels)))
    rows, more = -(-len(panels) // columns), -(-len(curves) // columns)
    figure = Figure((1.9 * columns, 2.1 * (rows + more) + 0.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows + more, columns, squeeze=False))
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, (name, effect) in zip(axes[:rows].ravel(), panels, strict=False):
        _effect(axis, name, effect)
    for axis, change in zip(axes[rows:].ravel(), curves, strict=False):
        _tuning(axis, change)
    size = "; ".join(f"{n.of}: {n.relative:.2g} of its norm" for n in report.norms[:3])
    figure.suptitle(
        title
        or f"{_counted(len(report.recipe.edits))} of {report.model} ({size})\n{report.n_examples} examples of "
        f"{report.data or 'no name'}, seed {report.seed}",
        fontsize=8,
    )
    return figure


def _counted(n: int) -> str:
    return "one edit" if n == 1 else f"{n} edits"


def _effect(axis: Axes, name: str, effect: Effect) -> None:
    axis.set_axis_on()
    error = [[max(effect.change - effect.low, 0)], [max(effect.high - effect.change, 0)]]
    axis.errorbar([0], [effect.change], yerr=error, fmt="o", color=_EDIT, capsize=3)
    for place, values, colour in ((1, effect.random, _TWIN), (2, effect.noise, _NOISE)):
        spread = np.linspace(-0.15, 0.15, max(1, len(values)))
        axis.scatter(place + spread[: len(values)], values, s=9, color=colour)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks([0, 1, 2], ["edit", "other\nunits", "same\nsize"], fontsize=5)
    axis.set_xlim(-0.6, 2.6)
    axis.tick_params(axis="y", labelsize=5)
    axis.set_title(
        f"{name}\n{effect.intact:.3g} to {effect.edited:.3g}, p {effect.p_value:.2g}", fontsize=6
    )


def _tuning(axis: Axes, change: TuningChange) -> None:
    axis.set_axis_on()
    axis.plot(change.angles, change.before, color=_TWIN, linewidth=1, label="before")
    axis.plot(change.angles, change.after, color=_EDIT, linewidth=1, label="after")
    echo = change.measures.echo.value, change.changed.echo.value
    axis.set_title(f"{change.unit}\necho {echo[0]:.2f} to {echo[1]:.2f}", fontsize=6)
    axis.set_xticks([0, 90, 180, 270, 360])
    axis.tick_params(labelsize=5)
    axis.legend(fontsize=5, frameon=False)
