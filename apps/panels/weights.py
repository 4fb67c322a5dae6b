"""The strongest weights into a unit and out of it."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import brief, go_to, line, link, named, plain, python
from apps.showing import show, show_picture
from apps.subject import Look
from circuits.figures import kernels_figure
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit
from circuits.weights import Connection

TOP = 5


def weights_panel(look: Look) -> None:
    """The strongest weights in and out, each with the unit at its other end and the way there."""
    try:
        built_from, builds = cached.connections_of(look.model, look.unit, look.record.hash, TOP)
        through = cached.through_of(look.model, look.unit, look.record.hash, TOP)
    except ValueError as error:  # the rest of the page needs no weights
        st.subheader("Built from")
        st.caption(line(error))
        return
    _section(look, "Built from", built_from, "source")
    if through is not None:
        gates = ", ".join(str(gate.unit) for gate in through.gates)
        about = (
            f"It reads one unit only, {gates}: this is what that one is built from, with the kernels of both layers "
            "multiplied together. Exact wherever that unit’s nonlinearity is open."
        )
        _section(look, "Built from, further back", through.connections, "source", about)
    _section(look, "Builds", builds, "target")
    st.caption(
        "Strength is the norm of the kernel; “typical” is the median norm over all units at the other end."
    )
    with st.container(horizontal=True):
        link("circuit", "These as a circuit", model=cached.label_of(look.record), unit=look.unit)
        python(f"""
import circuits

model = {look.record.code}
for c in circuits.weights.incoming(model, {str(look.unit)!r}, top={TOP}):
    print(c.source, c.norm, c.typical, c.kernel)
for c in circuits.weights.outgoing(model, {str(look.unit)!r}, top={TOP}):
    print(c.target, c.norm, c.typical, c.kernel)
""")


def _section(
    look: Look, title: str, connections: list[Connection], end: str, about: str = ""
) -> None:
    """Connections on one side, with their kernels."""
    st.subheader(title)
    if about:
        st.caption(plain(about))
    if not connections:
        st.caption("No weights connect it to another site on this side.")
        return
    kernels = [c for c in connections if c.kernel.ndim == 2 and c.kernel.numel() > 1]
    if kernels:
        show(kernels_figure(kernels, end), f"kernels-{end}{'-through' if about else ''}")
    for column, connection in zip(st.columns(TOP), connections, strict=False):
        with column:
            _connection(look, connection, end)


def _connection(look: Look, connection: Connection, end: str) -> None:
    other: Unit = getattr(connection, end)
    face = cached.faces(look.record).get(other)
    if face is not None and (small := cached.thumbnail(face)):
        show_picture(small, face.about, 64)
    st.button(
        plain(brief(look.model, other)), help=plain(named(look.model, other)),
        key=f"go-{end}-{connection.layer}-{other}", on_click=go_to, args=(other,),
        disabled=other.site == INPUT,  # the model's input has no page
    )  # fmt: skip
    st.caption(_in_words(connection, look.model.site(connection.target.site).kind == "head"))


def _in_words(connection: Connection, heads: bool) -> str:
    """What a connection does, in a line."""
    strength = f"strength {connection.norm:.3g} (typical {connection.typical:.3g})"
    if heads:
        q, k, v = connection.kernel.tolist()
        return f"composition Q {q:.2g}, K {k:.2g}, V {v:.2g}; {strength}"
    balanced = abs(connection.total) < 0.05 * connection.kernel.abs().sum().item()
    sign = "excites and inhibits" if balanced else "excites" if connection.total > 0 else "inhibits"
    via = f" through {plain(', '.join(connection.through))}" if connection.through else ""
    return f"{sign}, {strength}{via}"
