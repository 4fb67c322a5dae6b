"""How a circuit is looked for: the choices, the work, and the same as a command and as Python."""

from __future__ import annotations

import shlex
from typing import cast, get_args

import streamlit as st

from apps import cached
from apps.address import TROUBLE, action, choose, choose_number, code, plain, python
from apps.cached import Finding
from circuits.discovery import Discovery
from circuits.discovery.building import parse_sites
from circuits.discovery.finding import usual_size
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import Method
from circuits.discovery.searching import Search
from circuits.experiments.patched_runs import Direction
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.tasks import Task
from circuits.tasks.builtin import STATED
from circuits.workspace import ModelRecord

EXAMPLES = ("64", "16", "256")
"""How many examples a task has, both halves together; the first is taken unless another is asked for."""

THRESHOLD = 0.01
_SEEDS = 2**31 - 1
_MOST = 5

_WANTED = "circuit to find"
"""In a session: the task and the settings for which the work was started and has not ended."""


def search_panel(model: HookedModel) -> tuple[Task, Finding]:
    """What the person wants: the task, and how its circuit is looked for.

    Raises:
        ValueError, KeyError: if the model's edges cannot be found, or the task does not fit.
    """
    sites = _sites() if isinstance(model.input, ImageInput) else ()
    graph = cached.edges_of(model, sites)
    names = [name for name in cached.tasks_of(model) if name not in STATED]
    first, second = st.columns(4), st.columns(4)
    with first[0]:
        name = choose("Task", names, "task", sidebar=False)
    with first[1]:
        n = int(choose("Examples", EXAMPLES, "n", sidebar=False))
    with first[2]:
        method = cast(Method, _choice("Method", "eap-ig", get_args(Method), "method"))
    with first[3]:
        search = cast(Search, _choice("Search", "greedy", get_args(Search), "search"))
    size, threshold = None, None
    with second[0]:
        if search == "acdc":
            threshold = choose_number("Threshold", 1e-6, 1e6, THRESHOLD, "threshold")
        else:
            size = choose_number("Size", 1, len(graph), usual_size(graph), "size")
    with second[1]:
        ablation = cast(
            Ablation, _choice("Ablation", "counterpart", get_args(Ablation), "ablation")
        )
    with second[2]:
        seed = choose_number("Seed", 0, _SEEDS, 0, "seed")
    with second[3]:
        further = choose_number("Alternatives", 0, _MOST, 0, "alternatives")
    direction: Direction = "noising"
    if method == "exact":
        words = "Which run is patched"
        direction = cast(Direction, _choice(words, "noising", get_args(Direction), "direction"))
    task = cached.task_of(model, name, n, seed=seed)
    about = task.about or task.name
    st.caption(
        plain(
            f"{about} Taken: {task.examples}; edges are chosen on one half and the circuit is evaluated on the other, "
            f"by {task.metric.name}. {len(graph)} edges between {graph.grain}."
        )
    )
    return task, Finding(method, search, size, threshold, ablation, seed, sites, direction, further)


def _choice(label: str, usual: str, options: tuple[str, ...], parameter: str) -> str:
    """A choice whose usual option comes first."""
    others = (option for option in options if option != usual)
    return choose(label, (usual, *others), parameter, sidebar=False)


def _sites() -> tuple[str, ...]:
    """The sites between whose channels edges are wanted, which stay in the URL."""

    def changed() -> None:
        st.query_params["sites"] = st.session_state["find-sites"]

    st.session_state["find-sites"] = st.query_params.get("sites", "")
    words = st.text_input(
        "Sites between whose channels edges are wanted", key="find-sites", on_change=changed, max_chars=400,
        placeholder="in the model's order, separated by commas; SITE:INDEX for single channels",
    )  # fmt: skip
    return parse_sites(words)


def discovery_panel(model: HookedModel, task: Task, how: Finding) -> Discovery | None:
    """The circuit, if it has been found; else a button to find it, with progress and a way to stop it.

    This has to be in the page and in no fragment: only a run of the whole page takes the place of one at work.

    Raises:
        ValueError: if a setting is out of range, or the task does not fit.
    """
    found, wanted = cached.discovered(model, task, how), (task.hash, how)
    if found is None and st.session_state.get(_WANTED) == wanted:
        found = _find(model, task, how)
    st.session_state.pop(_WANTED, None)  # after the work: a run that takes its place begins again

    def begin() -> None:
        st.session_state[_WANTED] = wanted

    if found is None:
        action("Find the circuit", begin, "find-run", primary=True)
    return found


def _find(model: HookedModel, task: Task, how: Finding) -> Discovery | None:
    place = st.empty()
    with place.container(horizontal=True, vertical_alignment="center"):
        bar = st.progress(0.0, "Scores")
        # A click starts the page again, and this run ends at its next step.
        st.button("Cancel", key="find-cancel", on_click=_cancelled)

    def stage(name: str) -> Progress:
        words = name.capitalize()

        def progress(done: int, total: int) -> None:
            bar.progress(min(1.0, done / total) if total else 1.0, plain(words))

        progress(0, 1)
        return progress

    try:
        found = cached.discovered(model, task, how, stage)
    except TROUBLE:
        st.session_state.pop(_WANTED)
        place.empty()
        raise
    place.empty()
    return found


def _cancelled() -> None:
    st.session_state.pop(_WANTED, None)
    st.toast("Cancelled.")


def same_panel(record: ModelRecord, name: str, n: int, how: Finding) -> None:
    """The same from the command line, and from Python."""
    words = ["--task", name, "--limit", str(n), "--method", how.method]
    for option, value in how.settings.items():
        words += [f"--{option}", str(value)]
    words += [
        "--random",
        str(cached.RANDOM),
        *(["--sites", ",".join(how.sites)] if how.sites else []),
    ]
    settings = ", ".join(f"{option}={value!r}" for option, value in how.settings.items())
    sites = f", {list(how.sites)!r}" if how.sites else ""
    st.caption(f"The same: {code(f'circuits discover {record.arguments} {shlex.join(words)}')}")
    python(f"""
import circuits
from circuits.discovery import discover, edge_graph

model = {record.code}
task = circuits.load_task(model, {name!r}, n={n}, seed={how.seed})
found = discover(edge_graph(model{sites}), task, {how.method!r}, n_random={cached.RANDOM}, {settings})
print(found.evaluation.faithfulness, found.evaluation.random_faithfulness, found.checked)
""")
