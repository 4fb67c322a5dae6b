"""What a case has measured."""

from __future__ import annotations

from typing import Any

import streamlit as st

from apps import cached
from apps.address import link, plain
from circuits.json_files import read_json

CASE = "curve-detector"


def evidence_panel() -> None:
    """What `circuits case` has measured, if it ran in this workspace."""
    st.subheader("The evidence")
    folder = cached.workspace().root / "cases" / CASE
    try:
        results: dict[str, Any] = read_json(folder / "results.json", nan=True)
        report = (folder / "report.html").read_bytes()
        rows = _rows(results)
    except (OSError, ValueError, KeyError, TypeError):
        st.caption(f"Not measured here yet: `circuits case {CASE}` (some minutes; `--fast`: one).")
        link("jobs", "Run it in the background", do="case")
        return
    st.dataframe(rows, hide_index=True, width="content")
    facts = results["transplant_facts"]
    numbers = {
        name: results[name] for name in ("echo", "echo_without_negative", "echo_without_random")
    }
    st.caption(
        f"{len(facts['matches'])} curve units of {plain(facts['host'])} replaced, on {plain(facts['evaluation'])}, "
        f"seed {results['seed']:d}; echo {numbers['echo']:.3f}, without negative weights "
        f"{numbers['echo_without_negative']:.2f} (without random weights {numbers['echo_without_random']:.2f}); "
        f"published curves r {results['r_published_min']:.3f} at least, median {results['r_published_median']:.3f}."
    )
    st.download_button(
        "The whole report, one HTML file",
        report,
        "curve-detector.html",
        "text/html",
        on_click="ignore",
    )


def _rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    def written(number: dict[str, Any]) -> str:
        if number["low"] is None:
            return f"{number['value']:.3f}"
        return f"{number['value']:.3f} ({number['low']:.3f} to {number['high']:.3f})"

    return [
        {"in their place": name}
        | {k: written(c[k]) for k in ("recovered_kl", "kl", "accuracy", "top5")}
        for name, c in results["transplant"].items()
    ]
