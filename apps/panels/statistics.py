"""How active a unit is over a dataset."""

from __future__ import annotations

import streamlit as st

from apps.address import plain, python
from apps.showing import show
from apps.subject import Look
from circuits.figures import histogram_figure
from circuits.store import ActivationStore


def statistics_panel(look: Look, store: ActivationStore) -> None:
    """How active the unit is over the dataset."""
    s, p = store.statistics(look.unit), store.provenance
    st.subheader("How active it is")
    ceiling = "" if s.saturated is None else f", at its ceiling at {100 * s.saturated:.3g} %"
    show(histogram_figure(s), "histogram")
    st.caption(
        f"{len(p.examples)} examples of {plain(p.data)}: mean {s.mean:.3g}, standard deviation {s.std:.3g}, "
        f"skewness {s.skewness:.3g}, largest {s.maximum:.3g}, above zero at {100 * s.density:.3g} % of "
        f"positions{ceiling}. The outer bars hold all beyond."
    )
    notes = []
    if s.looked_at < s.count:
        drawn = f"a random {s.looked_at:,} of {s.count:,} positions (seed {p.depth.seed:d})"
        notes.append(
            f"The histogram, the skewness and the tail look at {drawn}; all else at every one."
        )
    if s.tail.rate == s.tail.rate:  # it could be fitted
        notes.append(
            f"Above {s.tail.threshold:.3g} (the top {100 * s.tail.share:.2g} %) the chance falls as "
            f"exp(−{s.tail.rate:.3g} · activation), ± {s.tail.error:.2g}; the largest gap between the "
            f"two distributions is {s.tail.distance:.2f}."
        )
    if s.nonfinite:
        notes.append(f"{s.nonfinite:,} activations are NaN or infinite and left out.")
    if notes:
        st.caption(" ".join(notes))
    python(f"""
import circuits
from circuits.harvesting import find_stores

workspace = circuits.Workspace.default()  # cache/, or $CIRCUITS_WORKSPACE
store = next(s for s in find_stores(workspace, {p.model_hash!r}) if s.provenance.data == {p.data!r})
unit = circuits.Unit.parse({str(look.unit)!r})
statistics = store.statistics(unit)
print(statistics.mean, statistics.std, statistics.density, statistics.tail)
print([(e.name, e.value) for e in store.top_examples(unit, 9)])
""")
