"""What an edit or an ablation does, compared with random changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np

from circuits.effects.reports import EditReport
from circuits.experiments.ablation import AblationReport
from circuits.experiments.outcomes import Effect
from circuits.figures.charts import (
    GREY,
    ORANGE,
    Figure,
    data,
    panel,
    sized,
    together,
    with_unit,
    zero_line,
)
from circuits.figures.tunings import curves

_COLUMNS = 2
_TUNED = 12  # units whose tuning is drawn, at most


def ablation_figure(report: AblationReport, title: str = "") -> Figure:
    """Each measure's change without the units, with its interval, compared with the random groups."""
    n = len(report.units)
    units = "one unit" if n == 1 else f"{n} units"
    said = f"{units}, {report.how} ablation; {report.record.measured_on}\n{report.null_is}"
    panels = _effects({n: {n: e} for n, e in report.effects.items()})
    return together(panels, _COLUMNS, title or f"{said} (seed {report.record.seed})")


def edit_figure(report: EditReport, title: str = "") -> Figure:
    """Each number's change with its interval, compared with random edits; and units' tuning before and after.

    What is measured on target and on other examples has one scale.
    """
    groups: dict[str, dict[str, Effect]] = {}
    # A dictionary keeps the order of the first, and names that only the second has.
    for name in {**report.targets, **report.generalisation}:
        both = (("on target", report.targets), ("on other examples", report.generalisation))
        groups[name] = {f"{where}: {name}": es[name] for where, es in both if name in es}
    groups |= {f"of the task: {n}": {n: e} for n, e in report.effects.items()}
    groups |= {f"others of {n}": {f"other units of {n}": e} for n, e in report.others.items()}
    panels = _effects(groups)
    for change in report.tuning[:_TUNED]:
        echo = change.measures.echo.value, change.changed.echo.value
        drawn = curves(
            {"before": (change.angles, change.before), "after": (change.angles, change.after)}
        )
        panels.append(
            panel(sized(drawn, 230), [str(change.unit), f"echo {echo[0]:.2f} to {echo[1]:.2f}"], 44)
        )
    record, n = report.record, len(report.recipe.edits)
    size = "; ".join(f"{n.of}: {n.relative:.2g} of its norm" for n in report.norms[:3])
    edits = "one edit" if n == 1 else f"{n} edits"
    said = f"{edits} of {record.model} ({size})\n{record.measured_on}; {report.null_is}, seed {record.seed}"
    return together(panels, _COLUMNS, title or said)


def _effects(groups: Mapping[str, Mapping[str, Effect]]) -> list[Figure]:
    """A panel for each effect; those of a group have one scale."""
    panels = []
    for group in groups.values():
        ends = [v for e in group.values() for v in _numbers(e)]
        low, high = min(0.0, *ends), max(0.0, *ends)
        room = 0.05 * (high - low) or 1.0
        scale = alt.Scale(domain=[low - room, high + room], nice=False)
        panels += [_effect(name, effect, scale) for name, effect in group.items()]
    return panels


def _numbers(effect: Effect) -> Sequence[float]:
    found = (effect.change, effect.low, effect.high, *effect.null)
    return [v for v in found if np.isfinite(v)]


def _effect(name: str, effect: Effect, scale: alt.Scale) -> Figure:
    """The change above, the changes that random variants make below it, on one axis with zero on it."""
    x = alt.X(
        "change:Q",
        title=with_unit("change", effect.unit),
        scale=scale,
        axis=alt.Axis(format="~g", tickCount=4),
    )
    y = alt.Y("what:N", title="run", scale=alt.Scale(domain=["changed", "random"]))
    null = [{"what": "random", "change": v} for v in effect.null]
    own = [{"what": "changed", "change": effect.change, "low": effect.low, "high": effect.high}]
    tip = [alt.Tooltip("what:N"), alt.Tooltip("change:Q", format=".3g")]
    ends = [alt.Tooltip(f"{end}:Q", title=f"95 %, {end}", format=".3g") for end in ("low", "high")]
    layers = [
        zero_line("x").encode(alt.X("zero:Q", scale=scale)),
        alt.Chart(data(null)).mark_point(color=GREY).encode(x, y, tooltip=tip),
        alt.Chart(data(own)).mark_rule(color=ORANGE).encode(alt.X("low:Q", scale=scale), y, x2="high:Q"),
        alt.Chart(data(own))
        .mark_point(color=ORANGE, filled=True, size=70, opacity=1)
        .encode(x, y, tooltip=[*tip, *ends]),
    ]  # fmt: skip
    said = f"{effect.intact:.3g} to {effect.changed:.3g}, p {effect.p_value:.2g}"
    return panel(sized(alt.layer(*layers), 230, 50), [name.replace("_", " "), said], 44)
