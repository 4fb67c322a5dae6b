"""`circuits graph`: the graph store, and circuits out of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from typer import Typer

from circuits.cli import options
from circuits.cli.output import warn
from circuits.cli.signatures import Within, argument, circuit_name, command, option
from circuits.faces import faces_of
from circuits.graph import CircuitGraph, GraphStore, add_edges, circuit_diff
from circuits.graph.blocks import BlockInfo
from circuits.graph.circuit import KINDS
from circuits.graph.formats import check_format, read_circuit, to_node_link, write_circuit
from circuits.graph.saved import (
    KIND,
    circuit_history,
    load_circuit,
    save_circuit,
    saved_circuits,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.tables import Table
from circuits.units import Unit
from circuits.weights import ExpandedWeights, expand_weights
from circuits.weights.graphs import build_graph, expanded_block, graph_units
from circuits.workspace import Workspace

app = Typer(
    help="Store all weights of a model as a graph, and look for circuits in it.",
    no_args_is_help=True,
)

Format = Annotated[Literal["json", "graphml", "gexf", "attribution"] | None, option(
    "The format of the file; attribution is the JSON of circuit-tracer and Neuronpedia. By default its ending says it."
)]  # fmt: skip


@dataclass(frozen=True)
class CircuitOptions:
    """Which circuit: what is around or between units, or a saved one."""

    units: Annotated[list[str] | None, argument(
        "One unit, SITE:INDEX, for its neighbourhood; several for the edges between them."
    )] = None  # fmt: skip
    hops: Annotated[int, option("How many edges away from the unit to go.", check=Within(1))] = 1
    top: options.Top = options.TOP
    kinds: Annotated[str, option(
        "The kinds of edges, with commas: weight, expanded, attribution, effect. By default all of them, and "
        "weight for paths."
    )] = ""  # fmt: skip
    to: Annotated[str, option("Take the strongest paths from the unit to this one instead.")] = ""
    circuit: Annotated[str, option("Take the saved circuit of this name instead.")] = ""
    version: Annotated[int | None, option(
        "With --circuit: which of its versions. By default the last.", check=Within(1)
    )] = None  # fmt: skip

    def find(self, model: HookedModel, place: Workspace, spec: str) -> CircuitGraph:
        """The circuit, saved or out of the graph; if no edge is stored, a warning says what to build.

        Raises:
            ValueError: if units and a saved circuit are named, or neither.
            FileNotFoundError: if the model's graph was not built.
        """
        if bool(self.units) == bool(self.circuit):
            raise ValueError("expected units (SITE:INDEX …) or --circuit NAME, one of the two")
        if not self.units:
            saved = load_circuit(place.database, self.circuit, model.hash, self.version)
            return saved.checked(model.hash, _known_units(model))
        with GraphStore(place.model_folder(model.hash), model.hash) as store:
            kinds = [part.strip() for part in self.kinds.split(",") if part.strip()] or None
            units = [_unit_of(store, model, text) for text in self.units]
            if self.to:
                if len(units) != 1:
                    raise ValueError(f"--to needs one unit to start from, got {len(units)}")
                end = _unit_of(store, model, self.to)
                return store.paths(units[0], end, self.top, kinds or ("weight",))
            if len(units) > 1:
                found = store.subgraph(units, kinds)
            else:
                found = store.neighbourhood(units[0], self.hops, self.top, kinds)
            if not found.number_of_edges():
                warn(_why_empty(store, units, kinds or KINDS, spec))
            return found


def _unit_of(store: GraphStore, model: HookedModel, text: str) -> Unit:
    """A unit of the graph by any name of its site.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the graph leaves the site out; the message says which units it has instead.
    """
    unit = Unit.parse(text)
    if unit.site in store.sites or unit.site not in {
        n for s in model.sites for n in (s.name, *s.aliases)
    }:
        return store.check(unit)
    unit = Unit(model.site(unit.site).name, model.unit(text).index)
    if unit.site in store.sites:
        return unit
    same = graph_units(model, unit, store.sites)
    instead = f"there it is {', '.join(map(str, same))}" if same else "it has no weights"
    raise ValueError(f"unit {unit} is of a site that the graph leaves out: {instead}")


def _why_empty(store: GraphStore, units: Sequence[Unit], kinds: Sequence[str], spec: str) -> str:
    """What to do where no edge of some units was found."""
    names = ", ".join(map(str, units))
    sites = sorted({unit.site for unit in units}, key=list(store.sites).index)
    indices = {site: [u.index for u in units if u.site == site] for site in sites}

    def touches(info: BlockInfo) -> bool:
        into = any(info.row(i) is not None for i in indices.get(info.target, ()))
        out = any(info.column(i) is not None for i in indices.get(info.source, ()))
        return (into and out) if len(units) > 1 else (into or out)

    stored = list(dict.fromkeys(info.kind for info in store.blocks if touches(info)))
    if asked := [kind for kind in stored if kind in kinds]:
        return f"{names}: all stored edges of kind {', '.join(asked)} are zero"
    why = "no layer connects them directly"
    if stored:
        why = f"no edges of kind {', '.join(kinds)} are stored; there are others: --kinds {','.join(stored)}"
    if len(units) == 1:
        earlier = [site for site in store.sites if store.leads(site, sites[0])]
        pairs = [(site, sites[0]) for site in earlier[-1:]]
    else:
        pairs = [pair for pair in combinations(sites, 2) if store.leads(*pair)]
    if not pairs:
        return f"{names}: no weights lead from one to another, directly or through other sites"
    if "expanded" not in kinds:
        return f"{names}: {why}"
    expand = " ".join(f"--expand {source}={target}" for source, target in pairs)
    return (
        f"{names}: {why}. `circuits graph build {spec} {expand}` stores their weights through the layers in between, "
        "as edges of kind expanded"
    )


def _known_units(model: HookedModel) -> dict[str, int]:
    """How many units each site has; `input` counts the channels of images."""
    channels = getattr(model.input, "channels", None)
    known = {} if channels is None else {"input": channels}
    return known | {site.name: site.n_units for site in model.sites}


@command(app)
def build(
    model: options.Model,
    output: options.Output,
    expand: Annotated[list[str] | None, option(
        "Two sites, written SOURCE=TARGET, whose expanded weights are stored too; may be repeated."
    )] = None,
) -> None:  # fmt: skip
    """Write all weights between directly connected sites to the workspace's graph.h5."""
    pairs = [_pair(text) for text in expand or []]
    place = model.place.writable()
    loaded = model.load()
    for name in (name for pair in pairs for name in pair if name != INPUT):
        loaded.site(name)
    folder = place.model_folder(loaded.hash)
    model.register(loaded)
    with output.progress("graph") as progress:
        build_graph(loaded, folder, progress).close()
        sites = _known_units(loaded)
        for source, target in pairs:
            found = expand_weights(loaded, source, target, progress=progress)
            add_edges(folder, _file_name(found), [expanded_block(found, sites)])
    with GraphStore(folder) as store:
        facts = {
            "file": str(folder / "graph.h5"), "model_hash": store.model_hash, "sites": len(store.sites),
            "blocks": len(store.blocks), "edges": store.n_edges,
        }  # fmt: skip
    output.show(
        facts, [f"{facts['edges']} edges between {facts['sites']} sites in {facts['file']}"]
    )


def _pair(text: str) -> tuple[str, str]:
    source, _, target = text.partition("=")
    if not target:
        raise ValueError(f"--expand {text!r} is not of the form SOURCE=TARGET")
    return source, target


def _file_name(found: ExpandedWeights) -> str:
    """Of a pair's expanded weights: readable, and of no other pair."""
    text = f"{found.source} {found.target} {found.mode}"
    readable = re.sub(r"[^\w.+-]", "+", f"expanded-{text.replace(' ', '-')}")
    return f"{readable[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@command(app)
def show(
    model: options.Model,
    circuit: CircuitOptions,
    output: options.FigureOutput,
    save: Annotated[
        str | None, option("Save it as a circuit of this name.", check=circuit_name)
    ] = None,
    note: options.Note = "",
) -> None:
    """Show what is around a unit, between units, or on the way to one; save it as a circuit."""
    place = model.place.writable() if save else model.place
    loaded = model.load()
    found = circuit.find(loaded, place, model.spec)
    if save:
        save_circuit(place.database, save, found, note)
    if output.figure is not None:
        known = faces_of(place, loaded.hash)
        faces = {node: known[node] for node in found if isinstance(node, Unit) and node in known}
        title = save or circuit.circuit
        output.draw(lambda figures: figures.circuit_figure(found, faces, title))
    output.show(to_node_link(found), found.tables())


@command(app)
def export(
    model: options.Model,
    out: Annotated[Path, argument("The file to write: .json, .graphml or .gexf.")],
    circuit: CircuitOptions,
    output: options.Output,
    format: Format = None,
) -> None:
    """Write a circuit to a file that other programs read."""
    options.check_out(out)
    check_format(out, format)
    found = circuit.find(model.load(), model.place, model.spec)
    write_circuit(found, out, format)
    nodes, edges = found.number_of_nodes(), found.number_of_edges()
    line = f"{nodes} units and {edges} edges written to {out}"
    output.show({"file": str(out), "nodes": nodes, "edges": edges}, [line])


@command(app, "import")
def import_(
    model: options.Model,
    file: Annotated[Path, argument("A circuit, in any format that `circuits graph export` writes.")],
    name: Annotated[str, option("The name under which the circuit is saved.", check=circuit_name)],
    output: options.Output,
    format: Format = None,
    note: options.Note = "",
) -> None:  # fmt: skip
    """Save a circuit from a file in the workspace; its units must be the model's."""
    found = read_circuit(file, format)
    loaded = model.load()
    found.checked(loaded.hash, _known_units(loaded), loaded.weights_hash)
    found.graph["model_hash"] = loaded.hash
    record = save_circuit(model.place.writable().database, name, found, note)
    n = found.number_of_nodes()
    output.show(
        {"name": name, "version": record.version, "nodes": n},
        [f"circuit {name!r}, version {record.version}: {n} units"],
    )


@command(app)
def ls(
    model: options.Model,
    output: options.Output,
    circuit: Annotated[str, option("List the versions of this saved circuit instead.")] = "",
) -> None:
    """List the saved circuits of a model, or the versions of one."""
    database, key = model.place.database, model.load().hash
    if circuit:
        database.load(KIND, key, circuit)
        found = circuit_history(database, circuit, key)
    else:
        found = saved_circuits(database, key)
    rows = [
        (r.name, r.version, *(len(r.body[k]) if r.body else 0 for k in ("nodes", "edges")), r.author, r.created,
         r.fault or r.note)
        for r in found
    ]  # fmt: skip
    columns = ("circuit", "version", "units", "edges", "author", "created", "note")
    output.show([dict(zip(columns, row, strict=True)) for row in rows], [Table(columns, rows)])


@command(app)
def diff(
    model: options.Model,
    name: Annotated[str, argument("The name of a saved circuit.")],
    before: Annotated[int, argument("The number of one of its versions.", check=Within(1))],
    output: options.Output,
    after: Annotated[int | None, argument("The number of a later one. By default the last.", check=Within(1))] = None,
) -> None:  # fmt: skip
    """Show what changed between two versions of a circuit."""
    database, key = model.place.database, model.load().hash
    old, new = (load_circuit(database, name, key, version) for version in (before, after))
    found = circuit_diff(old, new)
    output.show(found, found.lines())
