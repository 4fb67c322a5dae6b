"""Claims about a model: what stands, what fell, and why."""

from __future__ import annotations

import shlex

import streamlit as st

from apps import cached
from apps.address import choose, choose_model, code, link, plain, python
from apps.panels.claims import claim_panel, planned_panel, summary_panel
from apps.panels.verifying import verify_panel
from circuits.claims.kept import Kept, claims_folder
from circuits.models.adapter.hooked_model import HookedModel
from circuits.workspace import ModelRecord


def page() -> None:
    """The page of claims."""
    st.title("Claims")
    st.caption(
        "A circuit is a claim, and a claim that cannot fail says nothing: which claims stand, which fell, and why?"
    )
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    found = cached.claims_kept()
    known = {kept.name: kept for kept in found if kept.is_about(record)}
    for kept in found:
        if kept.file is None:  # it does not say about which model
            st.caption(f"⚠ {plain(kept.trouble)}")
    if not known:
        _empty(record)
        return
    kept = known[choose("Claim file", list(known), "file", sidebar=False)]
    _file(kept, model)
    verify_panel(kept, model)
    if kept.report is not None:
        summary_panel(kept.report)
        judged = {j.claim.name: j for j in kept.report.judged}
        claim_panel(judged[choose("Claim", list(judged), "claim", sidebar=False)])
    elif kept.file is not None:
        planned_panel(kept.file)
    _same(kept)


def _empty(record: ModelRecord) -> None:
    new = ["circuits", "claim", "new", *shlex.split(record.arguments), "CIRCUIT", "--out"]
    path = str(claims_folder(cached.workspace()) / "NAME.yaml")
    st.info(
        "No claims about this model yet. Find a circuit and save it, open it on the canvas, and choose “Claim this” "
        f"there; or write a claim file with {code(shlex.join([*new, path]))}."
    )
    with st.container(horizontal=True):
        link("find", "Find a circuit", model=cached.label_of(record))
        link("circuit", "Saved circuits", model=cached.label_of(record))


def _file(kept: Kept, model: HookedModel) -> None:
    """What the claims are about, and whether what is shown is about them as they are."""
    file = kept.file
    assert file is not None, "others are about no model"
    if file.about:
        st.markdown(plain(file.about))
    for part, role in file.roles.items():
        st.caption(plain(f"{part}: {role}"))
    if file.circuit.saved:
        link(
            "circuit",
            f"The circuit {file.circuit.saved}",
            circuit=file.circuit.saved,
            model=st.query_params["model"],
        )
    task = file.task.spec or "the model’s own task"
    st.caption(
        plain(
            f"{len(file.claims)} claims about {file.model}, weights {file.model_hash[:16]}, on {task}, "
            f"{file.task.examples} examples, seed {file.task.seed}"
            + (f"; {file.ablation} ablation" if file.circuit.given else "")
        )
    )
    for why in kept.stale(model):
        st.warning(plain(f"Stale: {why}."))
    if kept.trouble:
        st.error(plain(kept.trouble))


def _same(kept: Kept) -> None:
    """The same from the command line, and from Python."""
    path = str(kept.path or "FILE.yaml")
    folder = str(kept.path.parent if kept.path else ".")
    st.caption(f"The same: {code(shlex.join(['circuits', 'verify', path]))}")
    python(f"""
import circuits
from circuits.claims import read_claims, verify

report = verify(read_claims({path!r}), circuits.Workspace.default(), folder={folder!r})
for judged in report.judged:
    print(judged.claim.name, judged.verdict, judged.why)
""")
