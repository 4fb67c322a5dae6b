"""The autoencoders of a workspace: how good they are, and what their latents are called."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from apps import cached
from apps.address import choose, code, line, link, plain
from apps.panels.decisions import decisions_panel
from circuits.autoencoders import Autoencoder
from circuits.concepts import names_of
from circuits.database import Record
from circuits.sae import load_evaluation

LISTED = 200  # latents in the list, at most


def page() -> None:
    """An autoencoder's numbers with their nulls, and its latents."""
    st.title("Concepts")
    found = cached.autoencoders()
    if not found:
        st.info("No autoencoder yet: `circuits sae train MODEL SITE --name NAME --data DATA`.")
        return
    name = choose("Autoencoder", list(found), "sae")
    path = found[name]
    try:
        sae = cached.autoencoder_of(path)
        measured = load_evaluation(path)
    except (ValueError, OSError) as error:
        st.error(line(error))
        return
    a = sae.about
    st.subheader(plain(name))
    way = a.site if a.target in ("", a.site) else f"{a.site} → {a.target}"
    st.caption(
        plain(
            f"{a.architecture} · {sae.n_latents} latents of {way} · {a.model}, weights {a.model_hash[:16]} · trained "
            f"on {a.data}"
        )
    )
    if measured is None:
        st.info(f"Not measured yet: {code(f'circuits sae eval {shlex.quote(name)}')}.")
    else:
        _numbers(measured)
    _latents(name, path, sae, measured)


def _numbers(measured: Mapping[str, Any]) -> None:
    rows, behaviour = measured["rows"], measured["behaviour"]
    st.subheader("How well it describes rows")
    described = {
        "the autoencoder": rows["own"],
        "on rows of its training": rows["trained"],
        **rows["nulls"],
    }
    st.dataframe(
        pd.DataFrame({what: numbers for what, numbers in described.items() if numbers}).T.rename(
            columns={
                "fvu": "variance left",
                "fvu_all": "with rows left out",
                "l2_ratio": "norm ratio",
                "l0": "active",
            }
        )
    )
    st.caption(
        f"{rows['n_rows']:,} rows of {plain(rows['data'])}, seed {rows['seed']:d}; the last of these are nulls "
        "of the same size."
    )
    st.subheader("What the model does with it")
    wanted = ("intact", "reconstruction", "zero", "mean", "random", "of_zero", "of_mean")
    measures = behaviour["measures"]
    table = pd.DataFrame({what: {k: m[k] for k in wanted} for what, m in measures.items()}).T
    st.dataframe(
        table.rename(
            columns={
                "reconstruction": "with codes", "random": "random dictionary", "of_zero": "recovered of zero",
                "of_mean": "of the mean",
            }
        )
    )  # fmt: skip
    which = f", {behaviour['examples']}" if behaviour.get("examples") else ""
    record = behaviour["record"]
    examples = record["task"]["examples"]
    st.caption(plain(f"{examples['data']}: {examples['chosen']}{which}; seed {record['seed']}."))
    for what, m in measures.items():
        if m["warning"]:
            st.warning(plain(f"{what}: {m['warning']}"))


def _latents(name: str, path: Path, sae: Autoencoder, measured: Mapping[str, Any] | None) -> None:
    st.subheader("Its latents")
    record = cached.record_with(path)
    if record is None:
        a = sae.about
        words = [f"{a.model}+sae/{name}", "--data", a.data, "--sites", f"sae/{a.name}"]
        st.info(f"They have no pages yet: {code('circuits harvest ' + shlex.join(words))}.")
    known = {} if record is None else names_of(cached.workspace().database, record.hash)
    site = f"sae/{sae.about.name}"
    used = measured["rows"]["density"] if measured else [float("nan")] * sae.n_latents
    model = cached.label_of(record) if record else ""
    rows = [_row(model, site, i, share, known.get(f"{site}:{i}")) for i, share in enumerate(used)]
    table = pd.DataFrame(rows)
    first = st.radio(
        "First come", ["named ones", "those used most", "those used least"], horizontal=True
    )
    if first == "named ones":
        table = table.sort_values(["AUROC", "active in %"], ascending=False, na_position="last")
        table = table.sort_values("name", key=lambda n: n == "", kind="stable")
    else:
        table = table.sort_values("active in %", ascending=first == "those used least")
    st.dataframe(
        table.head(LISTED), hide_index=True,
        column_config={"page": st.column_config.LinkColumn("page", display_text="open")},
    )  # fmt: skip
    left = f", the first {LISTED} listed" if len(table) > LISTED else ""
    st.caption(f"{len(table)} latents{left}; {sum(n != '' for n in table['name'])} have a name.")
    if measured:
        n = measured["rows"]["n_rows"]
        st.caption(
            f"Activity is that in {n:,} rows: 0 % is less than {300 / n:.2g} % (with 95 % confidence)."
        )
    if record is not None:
        link(
            "unit",
            "Name one on its page",
            model=model,
            site=site,
            unit=int(table.iloc[0]["latent"]),
        )
        decisions_panel(record, site, known)


def _row(model: str, site: str, index: int, share: float, named: Record | None) -> dict[str, Any]:
    body = named.body if named else {}
    page = f"/unit?{urlencode({'model': model, 'site': site, 'unit': index})}" if model else None
    return {
        "latent": index, "active in %": 100 * share, "name": body.get("text", ""), "by": named.author if named else "",
        "AUROC": body.get("score"), "p": body.get("p_value"), "page": page,
    }  # fmt: skip
