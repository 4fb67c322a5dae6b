"""Whether a site's units are a better basis than random directions."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, line, plain, python
from circuits.concepts.basis import basis_table, basis_test
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.store import ActivationStore
from circuits.units import Site

EXAMPLES, RANDOM = 64, 39
"""How many examples are looked at, and how many random bases."""


def basis_panel(model: HookedModel, site: Site, store: ActivationStore) -> None:
    """The test, once it is asked for: it takes a few seconds."""
    with st.expander("Are these units a privileged basis?"):
        st.caption(
            "Channels of a residual sum, or of what a block adds to one, are not followed by a nonlinearity of their "
            "own: any rotation of them might do as well, and then a single channel means nothing. After one, "
            "channels should be closer to rare features than random directions are."
        )
        if not st.button("Measure", key="basis"):
            return
        try:
            with st.spinner("Comparing with random bases"):
                examples = cached.examples_of(model, store)
                chosen = Examples(model, examples.source, EXAMPLES, skip_bad=True)
                found = basis_test(model, site.name, chosen, RANDOM)
        except TROUBLE as error:
            st.warning(line(error))
            return
        table = basis_table([found])
        st.dataframe(
            [dict(zip(table.columns, row, strict=True)) for row in table.rows], hide_index=True
        )
        st.caption(plain(f"{table.title}; {table.note}."))
        python(f"""
import circuits
from circuits.concepts import basis_test

examples = circuits.Examples(model, {store.provenance.data!r}, {EXAMPLES})
found = basis_test(model, {site.name!r}, examples, {RANDOM})
print(found.median, found.random, found.p)
""")
