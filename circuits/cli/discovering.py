"""`circuits discover`, `evaluate` and `compare`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import numpy as np
from typer import Typer

from circuits.cli import options
from circuits.cli.finding import Ablating, Evidence, Finding, Keeping, Other, Random, Shift
from circuits.cli.grains import Grain
from circuits.cli.output import note as say_before
from circuits.cli.signatures import Within, argument, command, option
from circuits.discovery.comparing import compare_circuits
from circuits.discovery.contrasts import contrast
from circuits.discovery.evaluating import evaluate as evaluated
from circuits.discovery.finding import discover as found_circuit
from circuits.discovery.finding import sets_on_disk, usual_size
from circuits.discovery.formats import SUFFIXES, check_writable, read_edges, write_edges
from circuits.discovery.found import check_not_found_on, edges_of, graph_of, parts_in, parts_of
from circuits.discovery.graphs import LIMIT, Edge, EdgeGraph, Mask
from circuits.discovery.planning import memory_plan
from circuits.discovery.results import EdgeScores
from circuits.discovery.scoring import Method, score_edges
from circuits.discovery.searching import check_size, least_size
from circuits.discovery.searching import top as strongest_edges
from circuits.discovery.series import compare_models
from circuits.discovery.shuffled import BesideShuffled
from circuits.discovery.stored import Cost, check_space
from circuits.experiments import N_RANDOM
from circuits.files import keeping, make_now
from circuits.graph.circuit import CircuitGraph
from circuits.graph.saved import load_circuit, save_circuit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.progress import begun_later
from circuits.tasks import Task
from circuits.workspace import Workspace

app = Typer()

_LARGE = 10**9
"""From how many bytes of weights on the memory that a search takes is said before it starts."""


@command(app)
def discover(
    model: options.Model,
    task: options.CounterpartTask,
    grain: Grain,
    output: options.FigureOutput,
    how: Finding,
    evidence: Evidence,
    kept: Keeping,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:
    """Find the circuit of a task: score edges, search on one half of the examples, evaluate on the other."""
    place = model.place.writable() if kept.save else model.place
    loaded = model.load()
    asked = task.compile(loaded, seed)
    further = _others(model.place, loaded, evidence.other)
    known = _others(model.place, loaded, evidence.truth)
    graph = grain.graph(loaded, asked, _all_edges(further | known))
    masks, right = _masks(graph, further), next(iter(_masks(graph, known).values()), None)
    if kept.scores:
        check_writable(kept.scores, graph)
    plan = memory_plan(graph, asked.find)
    if plan.batch < plan.asked or plan.weights > _LARGE:
        say_before(str(plan))
    settings: dict[str, Any] = asdict(how) | evidence.settings | {"batch": plan.batch}
    keep, folder = make_now, None
    sets = sets_on_disk(asked.find, how.method) if len(graph) > LIMIT else 0
    if sets:
        say_before(str(Cost.of(len(graph), len(asked.find), sets * (1 + evidence.shuffled))))
    if kept.save:
        own = {
            "graph": dict(graph.choices), "truth": _all_edges(known),
            "other": {name: edges_of(circuit) for name, circuit in further.items()},
        }  # fmt: skip
        folder = _work_folder(place, loaded, asked, own | settings)
        keep = keeping(folder)
    if (
        sets and evidence.shuffled
    ):  # whose scores lie in a temporary folder, as do the first ones without --save
        own = sets if kept.save else 2 * sets
        check_space(Path(gettempdir()), Cost.of(len(graph), len(asked.find), own), 0)
    with output.stages() as stage:
        found = found_circuit(
            graph, asked, seed=seed, stage=stage, keep=keep, folder=folder, other=masks, truth=right, **settings
        )  # fmt: skip
    if kept.scores:
        write_edges(kept.scores, graph, found.scores.mean, graph.mask(edges_of(found.circuit)))
    if kept.save:
        save_circuit(place.database, kept.save, found.circuit, kept.note)
        model.register(loaded)
    output.draw(lambda figures: figures.faithfulness_figure(found.evaluation))
    if not evidence.shuffled:
        output.show(found, found.tables(top))
        return
    # Before the second search, which takes as long as the first.
    output.show_parts(found.tables(top))
    less: dict[str, Any] = settings | {"alternatives": 0, "pairs": 0}
    twin = randomized(loaded, seed)
    with output.stages() as stage:
        again = task.compile(twin, seed)
        null = found_circuit(
            grain.graph(twin, again), again, seed=seed, stage=lambda name: stage(f"{name}, shuffled weights"),
            **less,
        )  # fmt: skip
    both = BesideShuffled(found, null)
    output.show(both, both.compared())


def _work_folder(
    place: Workspace, model: HookedModel, task: Task, settings: Mapping[str, Any]
) -> Path:
    """The folder of the workspace that keeps the numbers of each batch, for this very work."""
    said = json.dumps([model.hash, task.hash, task.seed, dict(settings)], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    folder = Path(place.model_folder(model.hash) / "discovery" / digest)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@command(app)
def evaluate(
    model: options.Model,
    circuit: Annotated[str, argument(
        "The name of a circuit that `circuits discover --save` kept, or a file of edges: .json, .pt of MIB and EAP-IG, "
        ".pth or .pkl of ACDC."
    )],
    task: options.CounterpartTask,
    grain: Grain,
    output: options.FigureOutput,
    version: Annotated[int | None, option("Which of its versions. By default the last.", check=Within(1))] = None,
    ablation: Ablating = "counterpart",
    shift: Shift = 0,
    random: Random = N_RANDOM,
    size: Annotated[int | None, option(
        "Of a file with scores: evaluate as many of its strongest edges instead of its circuit.", check=Within(1)
    )] = None,
    other: Other = "",
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Measure how much of a behaviour a circuit carries, on the test half of a task, against random circuits."""
    loaded = model.load()
    asked = task.compile(loaded, seed)
    more = _others(model.place, loaded, other)
    if Path(circuit).suffix in SUFFIXES:
        if version is not None:
            raise ValueError(
                f"--version {version} belongs to saved circuits; {circuit!r} is a file"
            )
        graph = grain.graph(loaded, asked, _all_edges(more))
        kept, scores = _of_file(circuit, graph, asked.test, size)
    elif size is not None:
        raise ValueError(
            f"--size {size} belongs to a file with scores; {circuit!r} is a saved circuit"
        )
    else:
        saved = _saved(model.place, loaded, circuit, version)
        graph, scores = _graph_of(saved, circuit, loaded, grain), None
        check_not_found_on(saved, asked.test)
        kept = graph.mask(edges_of(saved))
    masks = _masks(graph, more)
    with output.stages() as stage:
        learning, progress = (
            begun_later(partial(stage, name)) for name in ("optimal constants", "evaluation")
        )
        made = evaluated(
            graph, asked.test, kept, scores=scores, find=asked.find if ablation == "optimal" else None,
            ablation=ablation, shift=shift, others=masks, n_random=random, seed=seed, progress=progress,
            learning=learning,
        )  # fmt: skip
    output.show(made, made.tables(top))
    output.draw(lambda figures: figures.faithfulness_figure(made))


@command(app)
def compare(
    model: options.Model,
    task: options.CounterpartTask,
    grain: Grain,
    output: options.FigureOutput,
    circuit: Annotated[str, argument("The name of a circuit that `circuits discover --save` kept.")] = "",
    another: Annotated[str, argument("The name of another one.")] = "",
    to_task: Annotated[str, option("Compare the scores on --task with those on this task.")] = "",
    to_model: Annotated[list[str] | None, option(
        "Compare the circuit of the task with that in this model, written MODEL or MODEL,WEIGHTS; may be repeated, "
        "e.g. for checkpoints in their order."
    )] = None,
    method: Annotated[Method, option("How to score edges; see `circuits discover`.")] = "eap-ig",
    size: Annotated[int | None, option(
        "How many edges a circuit has. By default 50, or a quarter of a small model's.", check=Within(1)
    )] = None,
    ablation: Ablating = "counterpart",
    shift: Shift = 0,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Compare two saved circuits (by name), a circuit over tasks, or over models: what is shared, what changed."""
    ways = [bool(circuit or another), bool(to_task), bool(to_model)]
    if sum(ways) != 1 or bool(circuit) != bool(another):
        raise ValueError(
            "expected one of: the names of two saved circuits, --to-task, or --to-model (once or more)"
        )
    loaded = model.load()
    if circuit:
        one, other = (_saved(model.place, loaded, name) for name in (circuit, another))
        graph = _graph_of(one, circuit, loaded, grain)
        _masks(graph, {another: other})  # refused if it was found between other parts
        made = compare_circuits(edges_of(one), edges_of(other), len(graph))
        output.show(made, made.tables(top))
        return
    asked = task.compile(loaded, seed)
    graph = grain.graph(loaded, asked)
    n = usual_size(graph) if size is None else size
    scoring: dict[str, Any] = {"ablation": ablation, "shift": shift, "seed": seed}
    if to_task:
        other_task = replace(task, task=to_task).compile(loaded, seed)
        if other_task.hash == asked.hash:
            raise ValueError(f"--to-task {to_task!r} is the task itself: expected another one")
        with output.stages() as stage:
            own, theirs = (
                score_edges(graph, t.find, method, progress=stage(t.name), **scoring) for t in (asked, other_task)
            )  # fmt: skip
        made = contrast(own, theirs, n, names=(asked.name, other_task.name), seed=seed)
        output.show(made, made.tables(top))
        return
    graphs = {model.spec if model.weights is None else f"{model.spec},{model.weights}": graph}
    for words in to_model or ():
        spec, _, weights = words.partition(",")
        member = replace(model, spec=spec, weights=weights or None).load()
        graphs[words if words not in graphs else f"{words} ({len(graphs)})"] = grain.graph(
            member, asked
        )
    with output.progress("models") as progress:
        made = compare_models(graphs, asked, method, size=n, progress=progress, **scoring)
    output.show(made, made.tables(top))
    output.draw(lambda figures: figures.series_figure(made))


def _of_file(
    path: str, graph: EdgeGraph, task: Task, size: int | None
) -> tuple[np.ndarray, EdgeScores | None]:
    """Which edges a file's circuit has, or its strongest ones, and its scores if it has any."""
    found = read_edges(path, graph)
    scores = None if found.scores is None else found.scored(graph, task)
    if size is not None:
        if scores is None:
            raise ValueError(f"--size {size} belongs to a file with scores; {path!r} has none")
        check_size(graph, size)
        kept = strongest_edges(graph, scores.worth(), size)
        if not kept.any():
            raise ValueError(
                f"--size {size}: the strongest edges of {path!r} make no path from the model's input to its output; "
                f"expected at least {least_size(graph, partial(strongest_edges, graph, scores.worth()), size)}"
            )
        return kept, scores
    if not found.kept.any():
        raise ValueError(
            f"file {path!r} marks no edge as in_graph: expected a circuit, or scores with --size N for the N strongest"
        )
    return found.kept, scores


def _others(place: Workspace, model: HookedModel, names: str) -> dict[str, CircuitGraph]:
    """Saved circuits, by name."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    return {name: _saved(place, model, name) for name in listed}


def _saved(
    place: Workspace, model: HookedModel, name: str, version: int | None = None
) -> CircuitGraph:
    """A saved circuit of a model that says its edges."""
    circuit = load_circuit(place.database, name, model.hash, version)
    edges_of(circuit)
    return circuit


def _graph_of(circuit: CircuitGraph, name: str, model: HookedModel, grain: Grain) -> EdgeGraph:
    """The graph in which a saved circuit was found.

    Raises:
        ValueError: if options of parts were given, which the circuit says itself.
    """
    if grain != Grain():
        raise ValueError(
            f"circuit {name!r} says between which parts it was found: leave out options of parts"
        )
    return graph_of(circuit, model)


def _all_edges(circuits: Mapping[str, CircuitGraph]) -> tuple[Edge, ...]:
    return tuple(edge for circuit in circuits.values() for edge in edges_of(circuit))


def _masks(graph: EdgeGraph, circuits: Mapping[str, CircuitGraph]) -> dict[str, Mask]:
    """Which edges of a graph each of some circuits has.

    Raises:
        ValueError: if one was found between other parts.
    """
    found = {}
    for name, circuit in circuits.items():
        if (own := parts_of(circuit)) != (here := parts_in(graph.choices)):
            raise ValueError(
                f"circuit {name!r} was found between other parts ({_said(own)}) than these ({_said(here)}): expected "
                "circuits of the same parts"
            )
        found[name] = graph.mask(edges_of(circuit))
    return found


def _said(parts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parts.items()) or "the usual ones"
