"""What a unit belongs to: families, circuits."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import link, named, plain
from apps.showing import show_picture
from apps.subject import Look
from circuits.families import saved_families
from circuits.graph.saved import circuits_with
from circuits.units import Unit

_SIBLINGS = 48


def relations_panel(look: Look) -> None:
    """Families with the unit's siblings, and saved circuits that it is in."""
    label, database = cached.label_of(look.record), cached.workspace().database
    if not database.path.exists():
        return
    for family in saved_families(database, look.record.hash):
        if look.unit not in family.units:
            continue
        st.subheader(f"Family “{plain(family.name)}”")
        found = f"agreement {family.score:.2f}, p {family.p_value:.2g} ({plain(family.null)}, seed {family.seed:d})"
        by_hand = family.p_value != family.p_value  # nobody measured it
        st.caption(
            f"{plain(family.transformation)}, {len(family.units)} units, "
            + ("put together by a person: no agreement was measured." if by_hand else f"{found}.")
            + (f" The first {_SIBLINGS} are shown." if len(family.members) > _SIBLINGS else "")
        )
        with st.container(horizontal=True):
            for member in family.members[:_SIBLINGS]:
                with st.container(width=72):
                    _sibling(look, label, member.unit, f"{member.phase:.0f}°")
            link("edits", "Edit the family", model=label, on=family.name)
    seen = circuits_with(database, look.record.hash, look.unit)
    if seen:
        st.subheader("Seen in circuits")
        for record in seen:
            link(
                "circuit",
                f"{record.name} (version {record.version})",
                model=label,
                circuit=record.name,
            )


def _sibling(look: Look, label: str, unit: Unit, phase: str) -> None:
    face = cached.faces(look.record).get(unit)
    if face is not None and (small := cached.thumbnail(face)):
        show_picture(small, face.about, 56)
    link("unit", phase, help=named(look.model, unit), model=label, site=unit.site, unit=unit.index)
