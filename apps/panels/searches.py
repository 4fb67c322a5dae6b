"""How a circuit is looked for: the choices, the work, and the same as a command and as Python."""

from __future__ import annotations

import shlex
from typing import cast, get_args

import streamlit as st

from apps import cached
from apps.address import TROUBLE, action, choose, choose_number, code, plain, python
from apps.cached import Finding, Parts
from circuits.discovery import Discovery
from circuits.discovery.building import parse_sites
from circuits.discovery.finding import usual_size
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import Method
from circuits.discovery.searching import Search
from circuits.discovery.streams import KeysValues
from circuits.experiments.patched_runs import Direction
from circuits.models.adapter.attaching import autoencoders
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

METHODS = (
    "How each edge is scored: exact patches every edge; eap (one gradient), eap-ig and eap-ig-activations "
    "(gradients averaged along a path), clean-corrupted (at both ends) and relp (by the rules of relevance) "
    "estimate that; weights and activations are sizes and random is nothing, for comparison."
)
SEARCHES = (
    "How edges are chosen: the highest scores (top), grown backwards from the output (greedy), three times as "
    "many, cut by exact effects (refine), all, dropping what is not needed (acdc), a learned mask (pruning)."
)
ABLATIONS = (
    "What edges outside the circuit carry: what they carry on the example's counterpart or another example "
    "(resample); the mean over examples and positions, mean-by-position or mean-by-template; constants learned "
    "for the circuit (optimal); nothing (zero)."
)
_KV = (
    "Whether keys and values that heads share are one target for their group, or one for each head."
)
_SPANS = (
    "Spans of positions whose edges are patched apart, separated by commas: ranges from 0 (negative numbers count from "
    "the end), names that the task gives to parts of its texts, and `rest`."
)
_NEURONS = "The layers whose MLPs are split into neurons."
_LATENTS = (
    "Which latents of autoencoders are sources, next to the error: `active` on the task, `all`, or some, such as "
    "`sae/NAME:1,2,5-9`."
)

_WANTED = "circuit to find"
"""In a session: the task and the settings for which the work was started and has not ended."""


def search_panel(model: HookedModel) -> tuple[Task, Finding]:
    """What the person wants: the task, and how its circuit is looked for.

    Raises:
        ValueError, KeyError: if the model's edges cannot be found, or the task does not fit.
    """
    images = isinstance(model.input, ImageInput)
    sites = _sites() if images else ()
    names = [name for name in cached.tasks_of(model) if name not in STATED]
    first, second = st.columns(4), st.columns(4)
    with first[0]:
        name = choose("Task", names, "task", sidebar=False)
    with first[1]:
        n = int(choose("Examples", EXAMPLES, "n", sidebar=False))
    with first[2]:
        method = cast(Method, _choice("Method", "eap-ig", get_args(Method), "method", METHODS))
    with first[3]:
        search = cast(Search, _choice("Search", "greedy", get_args(Search), "search", SEARCHES))
    with second[2]:
        seed = choose_number("Seed", 0, _SEEDS, 0, "seed")
    task = cached.task_of(model, name, n, seed=seed)
    parts = cached.Parts(sites) if images else _grain(model)
    graph = cached.edges_of(model, parts, task)
    size, threshold = None, None
    with second[0]:
        if search == "acdc":
            threshold = choose_number("Threshold", 1e-6, 1e6, THRESHOLD, "threshold")
        else:
            size = choose_number("Size", 1, len(graph), usual_size(graph), "size")
    with second[1]:
        ablation = cast(
            Ablation, _choice("Ablation", "counterpart", get_args(Ablation), "ablation", ABLATIONS)
        )
    with second[3]:
        further = choose_number("Alternatives", 0, _MOST, 0, "alternatives")
    direction: Direction = "noising"
    if method == "exact":
        words = "Which run is patched"
        direction = cast(Direction, _choice(words, "noising", get_args(Direction), "direction"))
    about = task.about or task.name
    st.caption(
        plain(
            f"{about} Taken: {task.examples}; edges are chosen on one half and the circuit is evaluated on the other, "
            f"by {task.metric.name}. {len(graph)} edges between {graph.grain}."
        )
    )
    return task, Finding(method, search, size, threshold, ablation, seed, parts, direction, further)


def _choice(
    label: str, usual: str, options: tuple[str, ...], parameter: str, help: str | None = None
) -> str:
    """A choice whose usual option comes first."""
    others = (option for option in options if option != usual)
    return choose(label, (usual, *others), parameter, sidebar=False, help=help)


def _grain(model: HookedModel) -> Parts:
    """How fine the parts of a transformer are, by the names of the command line's options."""
    with st.expander("Grain"):
        columns = st.columns(4)
        with columns[0]:
            kv = cast(KeysValues, _choice("kv", "group", get_args(KeysValues), "kv", _KV))
        with columns[1]:
            spans = _words("spans", "spans", "0,1--2,-1", _SPANS)
        with columns[2]:
            neurons = _words("neurons", "neurons", "3,5-7 or all", _NEURONS)
        latents = ""
        if autoencoders(model.module):
            with columns[3]:
                latents = _words("latents", "latents", "active", _LATENTS)
    return Parts((), kv, spans, neurons, latents)


def _sites() -> tuple[str, ...]:
    """The sites between whose channels edges are wanted, which stay in the URL."""

    placeholder = "in the model's order, separated by commas; SITE:INDEX for single channels"
    return parse_sites(
        _words("Sites between whose channels edges are wanted", "sites", placeholder)
    )


def _words(label: str, parameter: str, placeholder: str, help: str | None = None) -> str:
    """A text that stays in the URL."""
    key = f"find-{parameter}"

    def changed() -> None:
        st.query_params[parameter] = st.session_state[key]

    st.session_state[key] = st.query_params.get(parameter, "")
    given = st.text_input(
        label, key=key, on_change=changed, max_chars=400, placeholder=placeholder, help=help
    )
    return given.strip()


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
    ]
    for option, value in how.parts.settings.items():
        words += [f"--{option}", ",".join(value) if isinstance(value, tuple) else str(value)]
    settings = ", ".join(f"{option}={value!r}" for option, value in how.settings.items())
    parts = "".join(f", {option}={value!r}" for option, value in how.parts.settings.items())
    if how.parts.latents:
        chosen = f"circuits.discovery.building.chosen_latents(model, {how.parts.latents!r}, task)"
        parts = parts.replace(f"latents={how.parts.latents!r}", f"latents={chosen}")
    st.caption(f"The same: {code(f'circuits discover {record.arguments} {shlex.join(words)}')}")
    python(f"""
import circuits
from circuits.discovery import discover, edge_graph

model = {record.code}
task = circuits.load_task(model, {name!r}, n={n}, seed={how.seed})
found = discover(edge_graph(model{parts}), task, {how.method!r}, n_random={cached.RANDOM}, {settings})
print(found.evaluation.faithfulness, found.evaluation.random_faithfulness, found.checked)
""")
