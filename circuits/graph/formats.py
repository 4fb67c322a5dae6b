"""Circuits as files that other programs read: node-link JSON, GraphML, GEXF.

Every format is read back equal, types included. What a format cannot hold (None, lists, tuples,
dictionaries, columns of mixed types) is written as JSON text under a name that ends in `__json`.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import networkx as nx
from networkx.readwrite.gexf import GEXFReader

from circuits.checks import clipped
from circuits.errors import line
from circuits.files import replacing
from circuits.graph.attribution_graphs import from_attribution_graph, to_attribution_graph
from circuits.graph.circuit import CircuitGraph, Node, parse_node
from circuits.graph.values import decoded, encoded
from circuits.json_files import parse_json, read_text
from circuits.units import unknown

_PREFIX = "circuit."
_JSON = "__json"
_KEY = "circuit-key"
_XML_SAFE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff￾￿]+")


def write_circuit(graph: CircuitGraph, path: str | Path, format: str | None = None) -> None:
    """Write a circuit to a file.

    Args:
        graph: the circuit.
        path: where; its ending says the format if none is given.
        format: `json` (node-link), `graphml`, `gexf`, or `attribution` (circuit-tracer's JSON).

    Raises:
        KeyError: if the format is unknown.
    """
    path = Path(path)
    text = circuit_text(graph, check_format(path, format))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def circuit_text(graph: CircuitGraph, format: str) -> str:
    """A circuit as a file of one of the formats of `write_circuit` holds it.

    Raises:
        KeyError: if the format is unknown.
    """
    if format not in _FORMATS:
        raise unknown("format", format, _FORMATS)
    return _FORMATS[format][1](graph)


def read_circuit(path: str | Path, format: str | None = None) -> CircuitGraph:
    """Read a circuit from a file, one of ours or of another program.

    Args:
        path: the file.
        format: as for `write_circuit`; a `.json` file of either kind is told by what is in it.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if the format is unknown.
        ValueError: if the file is not of the format, or its nodes are no units.
    """
    path = Path(path)
    name = check_format(path, format)
    read, _ = _FORMATS[name]
    text = read_text(path, f"circuit file {str(path)!r}")
    try:
        # Attribution graphs end in .json too; `qParams` is a key that all of them have and node-link files have not.
        if name == "json" and '"qParams"' in text and "qParams" in parse_json(text, "the text"):
            read, _ = _FORMATS["attribution"]
        return read(text)
    except (ElementTree.ParseError, nx.NetworkXError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"file {str(path)!r} is no circuit in the format {name}: {line(error)}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"file {str(path)!r} is nested too deeply for a circuit") from error


def check_format(path: Path, format: str | None) -> str:
    """The name of a file's format, as given or by its ending.

    Raises:
        KeyError: if there is no such format.
    """
    if format is not None:
        if format not in _FORMATS:
            raise unknown("format", format, _FORMATS)
        return format
    name = path.suffix.removeprefix(".").lower()
    if name not in _FORMATS:
        raise unknown("format by file ending", name, _FORMATS)
    return name


@cache
def schema(name: str) -> dict[str, Any]:
    """The JSON schema of a format: `node-link` or `attribution-graph`."""
    return parse_json(files("circuits.graph.schemas").joinpath(f"{name}.json").read_text(), name)


def _validated(raw: Any, name: str) -> Any:
    try:
        jsonschema.validate(raw, schema(name))
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the top"
        raise ValueError(f"no {name} file: at {where}: {error.message[:200]}") from error
    return raw


# --- node-link JSON ----------------------------------------------------------------------------


def to_node_link(graph: CircuitGraph) -> dict[str, Any]:
    """A circuit as node-link data, as `networkx.node_link_graph` reads it."""
    return {
        "directed": True,
        "multigraph": True,
        "graph": encoded(graph.graph),
        "nodes": [_aside(data) | {"id": str(node)} for node, data in graph.nodes(data=True)],
        "edges": [
            _aside(data) | {"source": str(a), "target": str(b), "key": key}
            for a, b, key, data in graph.edges(keys=True, data=True)
        ],
    }


def from_node_link(raw: Any) -> CircuitGraph:
    """A circuit from node-link data.

    Raises:
        ValueError: if the data is not a circuit.
    """
    _validated(raw, "node-link")
    made = CircuitGraph()
    made.graph.update(decoded(raw["graph"]))
    for node in raw["nodes"]:
        place = parse_node(node["id"])
        if place in made:
            raise ValueError(f"node {place} is listed twice")
        made.add_node(place)
        made.nodes[place].update(_unaside(_without(node, "id")))
    for edge in raw["edges"]:
        ends = parse_node(edge["source"]), parse_node(edge["target"])
        if not (ends[0] in made and ends[1] in made):
            raise ValueError(f"edge from {ends[0]} to {ends[1]} names a node that is not listed")
        _check_once(made, *ends, edge["key"])
        made.add_edge(*ends, edge["key"])
        data = _unaside(_without(edge, "source", "target", "key"))
        data.setdefault("kind", "weight")  # of another program, which has no such thing
        # Files of other programs: their `weight` is all that is known of an edge's strength.
        data.setdefault("sum", data.get("weight", 1.0))
        if isinstance(data["sum"], int | float):
            data.setdefault("norm", abs(data["sum"]))
        made.edges[(*ends, edge["key"])].update(data)
    return made.valid()


def _check_once(made: CircuitGraph, a: Node, b: Node, key: str) -> None:
    if made.has_edge(a, b, key):
        raise ValueError(f"edge {key!r} from {a} to {b} is listed twice")


_ASIDE = "attribute:"


def _aside(data: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON; those whose names the format needs itself get a mark."""
    # Node-link puts attributes beside its own keys, where an attribute called `id` would replace the node's name.
    taken = ("id", "source", "target", "key")
    return {
        f"{_ASIDE}{name}" if name in taken or name.startswith(_ASIDE) else name: encoded(value)
        for name, value in data.items()
    }


def _unaside(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_ASIDE): decoded(value) for name, value in data.items()}


def _without(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in names}


# --- XML ---------------------------------------------------------------------------------------


def _plain(graph: CircuitGraph) -> nx.MultiDiGraph:
    """A circuit with nothing but text, numbers and truth values in it."""
    node_columns = _columns(data for _, data in graph.nodes(data=True))
    edge_columns = _columns(data for *_, data in graph.edges(keys=True, data=True))
    plain = nx.MultiDiGraph()
    for node, data in graph.nodes(data=True):
        plain.add_node(str(node))
        plain.nodes[str(node)].update(_flat(data, node_columns))
    for number, (a, b, key, data) in enumerate(graph.edges(keys=True, data=True)):
        extra = {_KEY: key}
        if isinstance(data.get("norm"), float) and math.isfinite(data["norm"]):
            extra["weight"] = data["norm"]  # what viewers draw
        # Parallel edges get numbers, as keys of ours may hold what XML does not allow; the key is an attribute.
        plain.add_edge(str(a), str(b), str(number))
        plain.edges[str(a), str(b), str(number)].update(_flat(data, edge_columns) | extra)
    return plain


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """For each attribute, whether it can be written as it is."""
    kinds: dict[str, set[type]] = {}
    safe: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            # Both formats declare a type for each attribute, once for all nodes or edges. Where types are mixed, JSON
            # text is the only type that fits all.
            kinds.setdefault(name, set()).add(type(value))
            fits = not isinstance(value, str) or _fits_xml(value)
            # `int` has 32 bits in both formats for the programs that read them.
            whole = not isinstance(value, int) or abs(value) < 2**31
            finite = not isinstance(value, float) or math.isfinite(value)
            named = not name.endswith(_JSON)
            safe[name] = safe.get(name, True) and fits and whole and finite and named
    simple = (str, bool, int, float)
    return {n: safe[n] and len(k) == 1 and next(iter(k)) in simple for n, k in kinds.items()}


def _fits_xml(text: str) -> bool:
    # XML has no way to write control characters, and readers may drop white space at the ends.
    return _XML_SAFE.fullmatch(text) is not None and text == text.strip()


def _flat(data: Mapping[str, Any], columns: Mapping[str, bool]) -> dict[str, Any]:
    return {
        f"{_PREFIX}{name}" if columns[name] else f"{_PREFIX}{name}{_JSON}": value
        if columns[name]
        else json.dumps(encoded(value))
        for name, value in data.items()
    }


def _unflat(data: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as they were; of a file of another program, all that are there."""
    ours = {k.removeprefix(_PREFIX): v for k, v in data.items() if k.startswith(_PREFIX)}
    return {
        name.removesuffix(_JSON): decoded(parse_json(value, name))
        if name.endswith(_JSON)
        else value
        for name, value in ours.items()
    }


def _check_ids(root: ElementTree.Element) -> None:
    """Raise ValueError if two nodes have one name, of which networkx would make one node."""
    seen: set[str | None] = set()
    for node in root.findall(".//{*}node"):
        if node.get("id") in seen:
            raise ValueError(f"node {node.get('id')} is listed twice")
        seen.add(node.get("id"))


def _restored(plain: nx.Graph, about: str | None) -> CircuitGraph:
    """A circuit out of what networkx read; `about` is its `graph` as we wrote it, None if we did not."""
    if not plain.is_directed():
        raise ValueError("its edges have no direction: expected a directed graph")
    made = CircuitGraph()
    is_ours = about is not None
    if about is not None:
        made.graph.update(decoded(parse_json(about, "its description")))
    for name, data in plain.nodes(data=True):
        node = parse_node(str(name))
        made.add_node(node)
        made.nodes[node].update(_unflat(data) if is_ours else data)
    for a, b, data in plain.edges(data=True):
        ends = parse_node(str(a)), parse_node(str(b))
        key = data.get(_KEY) if is_ours else "weight"
        if not isinstance(key, str):
            raise ValueError(f"edge from {a} to {b} has no {_KEY}")
        _check_once(made, *ends, key)
        if is_ours:
            made.add_edge(*ends, key)
            made.edges[(*ends, key)].update(_unflat(data))
        else:
            weight = data.get("weight", 1.0)
            if not isinstance(weight, int | float):
                raise ValueError(
                    f"weight {clipped(repr(weight))} of the edge {a} -> {b}: expected a number"
                )
            made.connect(*ends, "weight", sum=float(weight))
            rest = _without(data, "weight", "id", "kind", "sum", "norm")
            made.edges[(*ends, "weight")].update(rest)
    return made.valid()


def _to_graphml(graph: CircuitGraph) -> str:
    plain = _plain(graph)
    plain.graph[f"{_PREFIX}graph"] = json.dumps(encoded(graph.graph))
    return "\n".join(nx.generate_graphml(plain))


def _from_graphml(text: str) -> CircuitGraph:
    _check_ids(ElementTree.fromstring(text))
    # A circuit without parallel edges would otherwise come back as a graph that cannot have any.
    plain = nx.parse_graphml(text, force_multigraph=True)
    return _restored(plain, plain.graph.get(f"{_PREFIX}graph"))


_GEXF = "{http://www.gexf.net/1.2draft}"


def _to_gexf(graph: CircuitGraph) -> str:
    root = ElementTree.fromstring("\n".join(nx.generate_gexf(_plain(graph))))
    # GEXF has no attributes of the graph itself; the description is free text, marked by our prefix.
    meta = root.find(f"{_GEXF}meta")
    if meta is None:
        meta = ElementTree.Element(f"{_GEXF}meta")
        root.insert(0, meta)
    meta.attrib.pop("lastmodifieddate", None)  # the same circuit makes the same file every day
    about = ElementTree.SubElement(meta, f"{_GEXF}description")
    about.text = _PREFIX + json.dumps(encoded(graph.graph))
    ElementTree.register_namespace("", _GEXF.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")


def _from_gexf(text: str) -> CircuitGraph:
    root = ElementTree.fromstring(text)
    _check_ids(root)
    found = root.find(f"{_GEXF}meta/{_GEXF}description")
    described = "" if found is None else found.text or ""
    about = described.removeprefix(_PREFIX) if described.startswith(_PREFIX) else None
    # networkx reads from files only by itself; its reader is given the tree that was parsed here for the description.
    reader: Any = GEXFReader(version="1.2draft")
    reader.xml = root
    graph = root.find(f"{_GEXF}graph")
    if graph is None:
        raise ValueError(
            f"its top is {root.tag}: expected GEXF 1.2 (version 1.2draft) with a graph in it"
        )
    return _restored(reader.make_graph(graph), about)


_FORMATS: dict[str, tuple[Callable[[str], CircuitGraph], Callable[[CircuitGraph], str]]] = {
    "json": (
        lambda text: from_node_link(parse_json(text, "the text")),
        lambda graph: json.dumps(to_node_link(graph), indent=1, allow_nan=False),
    ),
    "graphml": (_from_graphml, _to_graphml),
    "gexf": (_from_gexf, _to_gexf),
    "attribution": (
        lambda text: from_attribution_graph(
            _validated(parse_json(text, "the text"), "attribution-graph")
        ),
        lambda graph: json.dumps(to_attribution_graph(graph), indent=1, allow_nan=False),
    ),
}
