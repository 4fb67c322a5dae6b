"""Work in the background, as pages show it."""

from __future__ import annotations

import shlex
from functools import partial

import streamlit as st

from apps.address import action
from circuits import jobs
from circuits.jobs import Job

STATES = {
    "running": "▶ running", "done": "✔ done", "failed": "✘ failed", "cancelled": "◼ cancelled",
    "lost": "? ended without a word", "damaged": "⚠ damaged",
}  # fmt: skip


def job_panel(job: Job) -> None:
    """A job: how far it is, a button that cancels or forgets it, what it says, and its log."""
    with st.container(border=True):
        left, right = st.columns([3, 1], vertical_alignment="center")
        left.markdown(f"**{STATES[job.state]}**")
        left.text(f"{job.title} · {job.started[:19]}")
        going = job.state == "running"
        label, do = ("Cancel", jobs.cancel) if going else ("Forget", jobs.remove)
        with right:
            about = None if going else "Its results stay."
            action(label, partial(do, job), f"{label}-{job.id}", help=about)
        if going:
            share = min(1.0, job.done / job.total) if job.total else 0.0
            st.progress(share, f"{job.done:d} of {job.total:d}" if job.total else "starting …")
        if job.message:
            st.text(job.message[:300])
        with st.popover("Log and command"):
            st.code("circuits " + shlex.join(job.argv), language=None, wrap_lines=True)
            st.code(jobs.log_of(job), language=None)
