"""`circuits graph`: the graph store, and circuits out of it."""

# no `from __future__ import annotations`: typer reads the annotations
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    JsonOption,
    ModelArgument,
    WeightsOption,
    WorkspaceOption,
    record_of,
)
from circuits.cli.output import progress_bar, say, show_json, show_table
from circuits.cli.weights import FigureOption, check_figure
from circuits.files import check_writable
from circuits.workspace import Workspace

Format = Literal["json", "graphml", "gexf", "attribution"]

app = typer.Typer(
    help="Store all weights of a model as a graph, and look for circuits in it.",
    no_args_is_help=True,
)

CircuitOption = Annotated[str, typer.Option("--circuit", help="A saved circuit.")]
VersionOption = Annotated[
    int | None, typer.Option(help="Of the saved circuit (default: the last).")
]
UnitsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="A unit: its neighbourhood; several: the edges between them."),
]
HopsOption = Annotated[int, typer.Option(help="Steps from the unit.")]
TopOption = Annotated[int, typer.Option(help="Edges of each unit and way, or paths.")]
KindsOption = Annotated[
    str, typer.Option(help="weight, expanded, attribution, effect; with commas.")
]
ToOption = Annotated[str, typer.Option("--to", help="The strongest paths to this unit.")]


@app.command()
def build(
    model: ModelArgument,
    expand: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE=TARGET: store expanded weights of two sites too; may be repeated."
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Write all weights between directly connected sites to the workspace's graph.h5."""
    from circuits.graph import GraphStore, add_edges
    from circuits.models.adapter.topology import INPUT
    from circuits.models.zoo.loading import load_model
    from circuits.weights import expand_weights
    from circuits.weights.graphs import build_graph, expanded_block

    pairs = [text.partition("=") for text in expand or []]
    for text, (_, _, target) in zip(expand or [], pairs, strict=True):
        if not target:
            raise ValueError(f"--expand {text!r} is not of the form SOURCE=TARGET")
    place = Workspace.default(workspace).writable()
    loaded = load_model(model, weights)
    for source, _, target in pairs:
        for name in (source, target):
            if name != INPUT:
                loaded.site(name)
    folder = place.model_folder(loaded.hash)
    place.register(record_of(model, weights, loaded.hash), replace=False)
    with progress_bar("graph", quiet=json) as progress:
        build_graph(loaded, folder, progress).close()
        sites = _known_units(loaded)
        for source, _, target in pairs:
            found = expand_weights(loaded, source, target, progress=progress)
            add_edges(folder, _file_name(found), [expanded_block(found, sites)])
    with GraphStore(folder) as store:
        facts = {
            "file": str(folder / "graph.h5"), "model_hash": store.model_hash, "sites": len(store.sites),
            "blocks": len(store.blocks), "edges": store.n_edges,
        }  # fmt: skip
    if json:
        show_json(facts)
    else:
        say(f"{facts['edges']} edges between {facts['sites']} sites in {facts['file']}")


def _file_name(found: Any) -> str:
    """Of a pair's expanded weights: readable, and of no other pair."""
    text = f"{found.source} {found.target} {found.mode}"
    readable = re.sub(r"[^\w.+-]", "+", f"expanded-{text.replace(' ', '-')}")
    return f"{readable[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _circuit(
    loaded: Any,
    place: Workspace,
    units: list[str] | None,
    hops: int,
    top: int,
    kinds: str,
    to: str,
    circuit: str,
    version: int | None,
) -> Any:
    """The circuit that a command is about: saved, or out of the graph."""
    from circuits.graph import GraphStore
    from circuits.graph.saved import load_circuit

    if bool(units) == bool(circuit):
        raise ValueError("expected units (SITE:INDEX …) or --circuit NAME, one of the two")
    if circuit:
        saved = load_circuit(place.database, circuit, loaded.hash, version)
        return saved.checked(loaded.hash, _known_units(loaded))
    assert units, "one of the two is given"
    with GraphStore(place.model_folder(loaded.hash), loaded.hash) as store:
        chosen = [part.strip() for part in kinds.split(",") if part.strip()] or None
        if to:
            if len(units) != 1:
                raise ValueError(f"--to needs one unit to start from, got {len(units)}")
            return store.paths(units[0], to, top, chosen or ("weight",))
        if len(units) > 1:
            return store.subgraph(units, chosen)
        return store.neighbourhood(units[0], hops, top, chosen)


def _known_units(loaded: Any) -> dict[str, int]:
    """How many units each site has; `input` counts the channels of images."""
    channels = getattr(loaded.input, "channels", None)
    known = {} if channels is None else {"input": channels}
    return known | {site.name: site.n_units for site in loaded.sites}


@app.command()
def show(
    model: ModelArgument,
    units: UnitsArgument = None,
    hops: HopsOption = 1,
    top: TopOption = 10,
    kinds: KindsOption = "",
    to: ToOption = "",
    circuit: CircuitOption = "",
    version: VersionOption = None,
    save: Annotated[str, typer.Option(help="Save it as a circuit of this name.")] = "",
    note: Annotated[str, typer.Option(help="Why, kept in the history.")] = "",
    figure: FigureOption = None,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show what is around a unit, between units, or on the way to one; save it as a circuit."""
    from circuits.figures import circuit_figure, save_figure
    from circuits.graph.formats import to_node_link
    from circuits.graph.saved import save_circuit
    from circuits.models.zoo.loading import load_model
    from circuits.units import Unit

    check_figure(figure)
    place = Workspace.default(workspace)
    loaded = load_model(model, weights)
    found = _circuit(loaded, place, units, hops, top, kinds, to, circuit, version)
    if save:
        save_circuit(place.writable().database, save, found, note)
    if figure is not None:
        pictures: dict[Any, Path] = {
            node: paths[0]
            for node in found
            if isinstance(node, Unit) and (paths := place.pictures(loaded.hash, node))
        }
        save_figure(circuit_figure(found, pictures, save or circuit), figure)
    if json:
        show_json(to_node_link(found))
        return
    for path in found.graph.get("paths", []):
        sign = "+" if path["sign"] > 0 else "-" if path["sign"] < 0 else "0"
        say(f"{sign}{path['strength']:.4g}  {' -> '.join(path['units'])}")
    rows = sorted(
        (
            (
                str(a),
                str(b),
                d["kind"],
                d["norm"],
                d.get("typical", ""),
                d["sum"],
                d.get("layer", ""),
            )
            for a, b, d in found.edges(data=True)
        ),
        key=lambda row: -row[3],
    )
    columns = ("from", "to", "kind", "norm", "typical norm", "sum", "layer")
    show_table(
        columns, rows, title=f"{found.number_of_nodes()} units, {found.number_of_edges()} edges"
    )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The file: .json, .graphml or .gexf.")],
    units: UnitsArgument = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="attribution: the JSON of circuit-tracer and Neuronpedia (default: by ending)."
        ),
    ] = None,
    hops: HopsOption = 1,
    top: TopOption = 10,
    kinds: KindsOption = "",
    to: ToOption = "",
    circuit: CircuitOption = "",
    version: VersionOption = None,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Write a circuit to a file that other programs read."""
    from circuits.graph.formats import check_format, write_circuit
    from circuits.models.zoo.loading import load_model

    check_writable(out.parent, "folder")
    check_format(out, format)
    place = Workspace.default(workspace)
    loaded = load_model(model, weights)
    found = _circuit(loaded, place, units, hops, top, kinds, to, circuit, version)
    write_circuit(found, out, format)
    facts = {"file": str(out), "nodes": found.number_of_nodes(), "edges": found.number_of_edges()}
    if json:
        show_json(facts)
    else:
        say(f"{facts['nodes']} units and {facts['edges']} edges written to {facts['file']}")


@app.command(name="import")
def import_(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="A circuit in any format that export writes.")],
    name: Annotated[str, typer.Option(help="What to call it.")],
    format: Annotated[Format | None, typer.Option(help="Default: by the file's ending.")] = None,
    note: Annotated[str, typer.Option(help="Why, kept in the history.")] = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Save a circuit from a file in the workspace; its units must be the model's."""
    from circuits.graph.formats import read_circuit
    from circuits.graph.saved import save_circuit
    from circuits.models.zoo.loading import load_model

    found = read_circuit(file, format)
    loaded = load_model(model, weights)
    found.checked(loaded.hash, _known_units(loaded))
    found.graph["model_hash"] = loaded.hash
    record = save_circuit(Workspace.default(workspace).writable().database, name, found, note)
    if json:
        show_json({"name": name, "version": record.version, "nodes": found.number_of_nodes()})
    else:
        say(f"circuit {name!r}, version {record.version}: {found.number_of_nodes()} units")


@app.command()
def ls(
    model: ModelArgument,
    circuit: Annotated[str, typer.Option("--circuit", help="List the versions of this one.")] = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """List the saved circuits of a model, or the versions of one."""
    from circuits.graph.saved import KIND, circuit_history, saved_circuits
    from circuits.models.zoo.loading import load_model

    database, key = Workspace.default(workspace).database, load_model(model, weights).hash
    if circuit:
        database.load(KIND, key, circuit)
        found = circuit_history(database, circuit, key)
    else:
        found = saved_circuits(database, key)
    rows = [
        (r.name, r.version, *(len(r.body[k]) if r.body else 0 for k in ("nodes", "edges")), r.author, r.created, r.note)
        for r in found
    ]  # fmt: skip
    columns = ("circuit", "version", "units", "edges", "author", "created", "note")
    if json:
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        show_table(columns, rows)


@app.command()
def diff(
    model: ModelArgument,
    name: Annotated[str, typer.Argument(help="A saved circuit.")],
    before: Annotated[int, typer.Argument(help="A version.")],
    after: Annotated[int | None, typer.Argument(help="A later one (default: the last).")] = None,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show what changed between two versions of a circuit."""
    from circuits.graph import circuit_diff as compare
    from circuits.graph.saved import load_circuit
    from circuits.models.zoo.loading import load_model

    database, key = Workspace.default(workspace).database, load_model(model, weights).hash
    old, new = (load_circuit(database, name, key, version) for version in (before, after))
    found = compare(old, new)
    if json:
        show_json(found.to_dict())
        return
    for what, items in found.to_dict().items():
        for item in items:
            text = item if isinstance(item, str) else f"{item[0]} -> {item[1]} ({item[2]})"
            say(f"{what.replace('_', ' ')}: {text}")
    if found.empty:
        say("no difference")
