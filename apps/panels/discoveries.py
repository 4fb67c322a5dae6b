"""A circuit that was found: whether its scores can be trusted, how good it is, its edges, and keeping it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import streamlit as st

from apps import cached
from apps.address import action, open_page, part, plain
from apps.cached import Finding
from apps.showing import show
from circuits.discovery import Discovery, Evaluation, strongest_circuit
from circuits.figures import faithfulness_figure
from circuits.graph import CircuitGraph
from circuits.graph.saved import save_circuit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table, spread
from circuits.tasks import Task
from circuits.workspace import ModelRecord

TOP = 50
"""How many edges are listed."""

_SAVED = "circuit to open"


def trust_panel(found: Discovery) -> None:
    """Whether scores agree with exact patching, or why they may not be trusted."""
    checked, at = found.checked, f" (find half, seed {found.scores.record.seed})."
    if checked is None:
        st.caption(
            "Every edge was patched: there is no estimate to check."
            if found.scores.method == "exact"
            else "These scores estimate no effect: there is nothing to check them against."
        )
    else:
        *lines, verdict = checked.lines()
        if checked.causes:
            st.warning(plain(verdict[:1].upper() + verdict[1:] + "."), icon="⚠️")
        else:
            lines.append(verdict)
        st.caption(plain("; ".join(lines) + at))
    if found.stability is not None:
        st.caption(plain("; ".join(found.stability.lines()) + at))


def evaluation_panel(made: Evaluation) -> None:
    """Faithfulness next to random circuits, and by size."""
    st.subheader("How much of the behaviour it carries")
    if not made.defined:
        st.warning(plain(made.undefined + "."))
        return
    whole, *rest = made.tables()
    _parts([whole])
    show(faithfulness_figure(made), "faithfulness")
    _parts(one for one in rest if isinstance(one, str))  # by size is what the figure shows


def alternatives_panel(found: Discovery) -> None:
    """Further circuits that are as good, if any were looked for."""
    if found.alternatives is not None:
        st.subheader("Other circuits that do it")
        _parts(found.alternatives.tables())


def edges_panel(found: Discovery) -> None:
    """The edges with the largest scores."""
    st.subheader("Edges by score")
    st.caption(
        plain(
            "An edge is written SOURCE -> TARGET. In a transformer 0.3 -> 1.0.k is what head 3 of layer 0 adds to the "
            "keys (q: queries, v: values) of head 0 of layer 1, mlp:0 an MLP, token and position embeddings, logits "
            "the output, and @1-4 the positions at which it is read; elsewhere parts are channels, SITE:INDEX."
        )
    )
    _parts(found.scores.tables(TOP))


def _parts(parts: Iterable[Table | str]) -> None:
    """Tables and lines of a result."""
    for one in parts:
        if isinstance(one, str):
            st.caption(plain(one))
            continue
        # "" is no number, and a column of numbers stays one.
        rows = [[None if value == "" else value for value in row] for row in one.rows]
        made = [dict(zip(one.columns, row, strict=True)) for row in rows]
        st.dataframe(made, hide_index=True, placeholder="")
        st.caption(plain(one.title))


# --- by size, and keeping ------------------------------------------------------------------------


@part
def keep_panel(
    record: ModelRecord, model: HookedModel, task: Task, how: Finding, found: Discovery
) -> None:
    """A circuit of another size, and saving either as one to open on the canvas."""
    st.subheader("Keep it")
    size = _size(found)
    st.text_input("Name", key="find-name", max_chars=200)
    st.text_input("Why", key="find-note", max_chars=1000)
    with st.container(horizontal=True):
        n = len(found.evaluation.edges)
        _saves(f"Save the circuit of {n:d} edges, open it", record, lambda: found.circuit, "own")
        if size is not None:
            graph = cached.edges_of(model, how.parts, task)
            _saves(
                f"Save the strongest {size:d}, open them",
                record,
                lambda: strongest_circuit(graph, found, task, size),
                "size",
            )
    asked = st.session_state.pop(_SAVED, None)
    if asked is not None:
        open_page("circuit", model=cached.label_of(record), **asked)


def _size(found: Discovery) -> int | None:
    """The size that the person chooses among those evaluated, which is in the URL, and what it reaches."""
    rows = {row[0]: row for row in found.evaluation.by_size()}
    if not rows:
        return None
    sizes, asked = list(rows), st.query_params.get("edges", "")
    own = len(found.evaluation.edges)
    wanted = int(asked) if asked.isdecimal() and int(asked) in rows else None
    nearest = min(sizes, key=lambda size: abs(size - own))
    st.session_state["find-edges"] = nearest if wanted is None else wanted

    def changed() -> None:
        st.query_params["edges"] = str(st.session_state["find-edges"])

    size = int(st.select_slider("The strongest edges", sizes, key="find-edges", on_change=changed))
    _, connected, f, others = rows[size]
    st.caption(
        f"The {size:d} strongest edges, of which {connected:d} lie on a path from input to output: faithfulness "
        f"{f:.3f}, as many at random {plain(spread(others))} (test half, seed {found.scores.record.seed:d})."
    )
    return size


def _saves(label: str, record: ModelRecord, make: Callable[[], CircuitGraph], key: str) -> None:
    """A button that saves a circuit under the name in the field, and opens it on the canvas."""

    def saved() -> None:
        name, note = st.session_state["find-name"], st.session_state["find-note"]
        made = save_circuit(cached.workspace().writable().database, name, make(), note)
        st.session_state[_SAVED] = {"circuit": made.name, "version": made.version}

    action(label, saved, f"find-save-{key}")
