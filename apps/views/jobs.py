"""Work in the background: started, watched, cancelled; it goes on without the page."""

from __future__ import annotations

import shlex

import streamlit as st

from apps import cached
from apps.address import TROUBLE, action, line, plain
from apps.panels.works import job_panel
from circuits import jobs
from circuits.factories import from_file
from circuits.models.adapter.inputs import ImageInput

DATA = {"images": ("photos", "crops", "curves", "shapes"), "tokens": ("repeats",)}
SHOWN = 20


def page() -> None:
    """The page of jobs."""
    st.title("Jobs")
    st.caption(
        "They run outside the app: a reload, or a restart of its server, does not touch them."
    )
    _start()
    _running()


def _start() -> None:
    records = {cached.label_of(r): r for r in cached.workspace().models()}
    if not records:
        st.info("The workspace has no model yet: `circuits demo` builds one with four.")
        title = "Build the demo's workspace"
        action(title, lambda: _begin(["demo", "--no-serve"], title), "job-demo")
        return
    wanted = st.query_params.get("model", "")
    with st.expander("Start one", expanded="do" in st.query_params):
        names = list(records)
        label = st.selectbox(
            "Model", names, names.index(wanted) if wanted in names else 0, key="job-model"
        )
        record = records[label]
        try:
            model = cached.model_of(record)
        except TROUBLE as error:
            st.error(line(error))
            return
        images = isinstance(model.input, ImageInput)
        kinds = ["harvest", "sheet", "sae", "case"] if images else ["harvest", "sae"]
        asked = st.query_params.get("do", "harvest")
        kind = st.segmented_control(
            "What",
            kinds,
            default=asked if asked in kinds else "harvest",
            key="job-kind",
            required=True,
        )
        sites = [s.name for s in model.sites]
        site = st.query_params.get("site", sites[-1])
        site = st.selectbox(
            "Site", sites, sites.index(site) if site in sites else 0, key="job-site"
        )
        known = [s.provenance.data for s in cached.stores_of(record)]
        offered = list(dict.fromkeys([*known, *DATA["images" if images else "tokens"]]))
        data = "" if kind in ("sheet", "case") else st.selectbox("Data", offered, key="job-data")
        argv = {
            "harvest": ["harvest", record.spec, "--data", data, "--sites", site],
            "sheet": ["visualize", record.spec, site, "--sheet"],
            "case": ["case", "curve-detector"],
            "sae": [
                "sae",
                "train",
                record.spec,
                site,
                "--name",
                f"{site.replace('/', '-')}-app",
                "--data",
                data,
            ],
        }[kind]
        argv += ["--weights", record.weights] if record.weights and kind != "case" else []
        st.code("circuits " + shlex.join(argv), language=None, wrap_lines=True)
        begin = lambda: _begin(argv, f"{kind} {label} {site}")  # noqa: E731
        action("Start", begin, "job-start", primary=True)


def _begin(argv: list[str], title: str) -> None:
    for word in argv:
        from_file("code", word, "the workspace", cached.TRUSTING)
    made = jobs.start(cached.workspace().writable(), argv, title)
    st.toast(f"Started {plain(made.title)}.")


@st.fragment(run_every=1.5)
def _running() -> None:
    found = jobs.jobs(cached.workspace())
    if not found:
        st.caption("No jobs yet.")
    for job in found[:SHOWN]:
        job_panel(job)
