"""Verifying a claim file in the background, from its page."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import action, code
from apps.panels.works import job_panel
from circuits import jobs
from circuits.claims.kept import Kept, check_no_code
from circuits.jobs import Job
from circuits.models.adapter.hooked_model import HookedModel


def verify_panel(kept: Kept, model: HookedModel) -> None:
    """A button that verifies a file in the background, and how far that is."""
    if kept.path is None:
        st.caption(
            f"Its file lies elsewhere: {code('circuits verify FILE.yaml')} verifies it again."
        )
        return
    argv = ["verify", str(kept.path.absolute()), "--exit-zero"]

    def begin() -> None:
        assert kept.file is not None, "others are about no model"
        check_no_code(kept.file, cached.TRUSTING)
        jobs.start(cached.workspace().writable(), argv, f"Verify {kept.name}")

    job = _newest(argv)
    if job is not None and job.state == "running":
        _watch(argv)
        return
    label = "Verify" if kept.report is None else "Verify again"
    action(label, begin, "claims-verify", primary=kept.report is None or bool(kept.stale(model)))
    if job is not None and job.state != "done":
        job_panel(job)


def _newest(argv: list[str]) -> Job | None:
    return next((job for job in jobs.jobs(cached.workspace()) if job.argv == tuple(argv)), None)


@st.fragment(run_every=1.5)
def _watch(argv: list[str]) -> None:
    """The job while it runs; when it has ended, the page is drawn again, with what it found."""
    job = _newest(argv)
    if job is None or job.state != "running":
        st.rerun()
    else:
        job_panel(job)
