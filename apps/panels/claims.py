"""Claims with their verdicts: all of a file, and one with its numbers and history."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import pandas as pd
import streamlit as st

from apps.address import plain
from circuits.claims import ClaimFile, Judged, Measured, Quantity, Report
from circuits.claims.drawing import COLOURS, interval_svg
from circuits.claims.report import page as html_of
from circuits.claims.verdicts import Verdict
from circuits.tables import spread

LISTED = 100
"""How many numbers of a claim are listed, the least sure first."""

_BADGES: Mapping[Verdict, Literal["green", "red", "orange"]] = {
    "holds": "green", "refuted": "red", "undecided": "orange",
}  # fmt: skip
_DRAWING = 110  # pixels: what a row is high enough for


def summary_panel(report: Report) -> None:
    """What stands and what fell, and the report as one file."""
    counted = Counter(j.verdict for j in report.judged)
    with st.container(horizontal=True, vertical_alignment="center"):
        for verdict in COLOURS:
            if counted[verdict]:
                _badge(verdict, f": {counted[verdict]:d}")
        odd = sum(not j.as_expected for j in report.judged)
        st.caption(f"{odd:d} not as expected" if odd else "all as expected")
        st.download_button(
            "The report, one HTML file", lambda: html_of(report).encode(), f"{report.file.name}.html", "text/html",
            on_click="ignore",
        )  # fmt: skip
    rows = [
        {
            "claim": j.claim.name, "verdict": j.verdict,
            "expected": j.claim.expect + ("" if j.as_expected else " (!)"), "why": j.why,
        }
        for j in report.judged
    ]  # fmt: skip
    table = pd.DataFrame(rows).style.map(_coloured, subset=["verdict"])
    widths = {
        "claim": st.column_config.Column(width="medium"),
        "why": st.column_config.Column(width="large"),
    }
    st.dataframe(table, hide_index=True, column_config=widths)
    st.caption(plain(report.summary.note))


def _coloured(verdict: Verdict) -> str:
    return f"background-color: {COLOURS[verdict]}; color: #ffffff"


def _badge(verdict: Verdict, after: str = "") -> None:
    st.badge(plain(verdict + after), color=_BADGES.get(verdict, "gray"))


def claim_panel(judged: Judged) -> None:
    """One claim: its verdict and why, its numbers over what is claimed, and its history."""
    claim, measured = judged.claim, judged.measured
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(plain(claim.name), width="content")
        _badge(judged.verdict)
        st.caption(plain(f"expected: {claim.expect}"))
    if claim.statement:
        st.markdown(plain(claim.statement))
    if claim.why:
        st.caption(plain(f"It is here although it is expected to be refuted: {claim.why}"))
    st.markdown(plain(judged.why + "."))
    if measured.quantities:
        _numbers(measured)
    for note in measured.notes:
        st.caption(plain(note + "."))
    st.caption(plain(judged.conditions))
    _history(judged)


def _numbers(measured: Measured) -> None:
    """Numbers over the claimed region, with p-values and nulls, the least sure first."""
    by_doubt = measured.by_doubt
    columns = {
        "number": st.column_config.Column(width=165),
        "drawn": st.column_config.ImageColumn("claimed (grey)", width=125),
        "value": st.column_config.Column("value (interval)", width=185),
        "claimed": st.column_config.Column(width=95),
        "p for": st.column_config.NumberColumn(format="%.2g", width=62),
        "p against": st.column_config.NumberColumn(format="%.2g", width=75),
        "null": st.column_config.Column(width=110),
    }
    st.dataframe([_row(q) for q in by_doubt[:LISTED]], hide_index=True, column_config=columns)
    if len(by_doubt) > LISTED:
        st.caption(
            f"{len(by_doubt) - LISTED:d} more numbers, which hold more surely, are in the report."
        )
    for null in dict.fromkeys(
        f"{q.null_is} ({len(q.null)} draws)" for q in measured.quantities if q.null
    ):
        st.caption(plain(f"Null: {null}."))


def _row(q: Quantity) -> dict[str, object]:
    image = base64.b64encode(interval_svg(q, _DRAWING).encode()).decode()
    value = f"{q.value:.4g} {q.unit}".strip()
    return {
        "number": q.name, "drawn": f"data:image/svg+xml;base64,{image}",
        "value": f"{value} ({q.interval})", "claimed": str(q.region), "p for": q.p_holds, "p against": q.p_refuted,
        "null": spread(q.null),
    }  # fmt: skip


def _history(judged: Judged) -> None:
    made = judged.registration
    if made is None:
        st.caption("Not registered: it was not tested.")
        return
    st.caption(plain(f"Registered {made.registered} as {made.terms[:16]}."))
    if not made.earlier:
        st.caption("No earlier run.")
        return
    st.dataframe(
        [
            {
                "earlier run": run.registered, "verdict": run.outcome,
                "changed since": ", ".join(run.changes) or "nothing",
            }
            for run in made.earlier
        ],
        hide_index=True,
    )  # fmt: skip


def planned_panel(file: ClaimFile) -> None:
    """The claims of a file that was not verified."""
    st.info("Not verified yet.")
    rows = [
        {
            "claim": c.name, "settings": c.settings_line,
            "expected": c.expect, "statement": c.statement, "test": c.test,
        }
        for c in file.claims
    ]  # fmt: skip
    st.dataframe(rows, hide_index=True)
