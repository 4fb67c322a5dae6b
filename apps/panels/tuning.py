"""What a unit answers to when a curve is turned and bent."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, line, part, python
from apps.showing import show
from apps.subject import Look
from circuits.edits.recipes import Recipe
from circuits.figures import heat_map_figure, tuning_figure
from circuits.models.adapter.inputs import ImageInput


@part
def tuning_panel(look: Look) -> None:
    """Radial tuning, and the map of orientation x curvature."""
    spec = look.model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        return
    st.subheader("How it is tuned")
    if not st.toggle(
        "Turn and bend a curve before it", key="tuning", help="Some seconds the first time."
    ):
        return
    try:
        tuned = cached.tuning_of(look.model, Recipe((), look.record.hash), look.unit)
        heat = cached.heat_of(look.model, look.unit)
    except TROUBLE as error:
        st.warning(line(error))
        return
    left, right = st.columns(2)
    with left:
        show(tuning_figure([tuned]), "radial")
    with right:
        show(heat_map_figure([heat]), "heat")
    m = tuned.measures
    st.caption(
        f"Curves of radius {tuned.radius:.3g} px in images of {tuned.size:d} px, every {cached.TURN:g}°: mean "
        f"direction {m.direction.value:.0f}° ({m.direction.low:.0f} to {m.direction.high:.0f}), full width at "
        f"half maximum {m.fwhm.value:.0f}° ({m.fwhm.low:.0f} to {m.fwhm.high:.0f}), echo {m.echo.value:.2f} "
        f"({m.echo.low:.2f} to {m.echo.high:.2f}); intervals over polarity, contrast and thickness, "
        f"seed {tuned.seed:d}."
    )
    python(f"""
import circuits
from circuits.tuning import heat_map, radial_tuning

model = {look.record.code}
tuned = radial_tuning(model, [{str(look.unit)!r}], step={cached.TURN:g})[0]
print(tuned.radius, tuned.measures)
print(heat_map(model, [{str(look.unit)!r}], step=15)[0].best)
""")
