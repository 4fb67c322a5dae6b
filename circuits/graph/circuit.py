"""`CircuitGraph`: units and the edges between them, in memory."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, get_args

import networkx as nx
import numpy as np

from circuits.graph.values import plain_number
from circuits.tables import Table
from circuits.units import Unit

Kind = Literal["weight", "expanded", "attribution", "effect"]
"""What an edge is: a raw weight, an expanded one, an attribution on some data, a measured effect."""

KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, order=True)
class UnitAt:
    """A unit at one position, as in an attribution graph of a prompt, written `site:index@position`."""

    unit: Unit
    position: int

    def __str__(self) -> str:
        return f"{self.unit}@{self.position}"


@dataclass(frozen=True, order=True)
class UnitGroup:
    """Units taken together, such as a family, written `{name}site:index,index,…` with one site's units.

    Attributes:
        name: what it is called.
        units: what is in it, all of one site, in order.
    """

    name: str
    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        if not self.units or len({unit.site for unit in self.units}) != 1:
            raise ValueError(f"group {self.name!r} needs units of exactly one site")
        if not self.name or re.search(r"[{}]", self.name) or not self.name.isprintable():
            raise ValueError(
                f"group name {self.name!r} must be printable, not empty, and without braces"
            )

    def __str__(self) -> str:
        indices = ",".join(str(unit.index) for unit in self.units)
        return f"{{{self.name}}}{self.units[0].site}:{indices}"


@dataclass(frozen=True, order=True)
class WholeSite:
    """All units of a site together, such as an MLP's output or the logits, written `site:*`."""

    site: str

    def __str__(self) -> str:
        return f"{self.site}:*"


ORDER = "order"
"""The attribute of a circuit that says in which order the model has its sites; edges alone may not say it."""

Node = Unit | UnitAt | UnitGroup | WholeSite
"""What a circuit's nodes are."""

_GROUP = re.compile(r"\{(?P<name>[^{}]+)\}(?P<site>[^:]+):(?P<indices>[0-9,]+)")
# Greedy up to the last `:`, since a site's name may hold an `@` itself (`layer@0` is a layer's first call).
_AT = re.compile(r"(?P<unit>.+:[0-9]+)@(?P<position>[0-9]+)")


def parse_node(text: str) -> Node:
    """Read a node as it is written.

    Raises:
        ValueError: if the text is not a node.

    >>> parse_node("mixed3b:379"), parse_node("block@0:3@5").position
    (Unit(site='mixed3b', index=379), 5)
    >>> str(parse_node("{curves}mixed3b:1,2"))
    '{curves}mixed3b:1,2'
    >>> parse_node("blocks.0.hook_mlp_out:*")
    WholeSite(site='blocks.0.hook_mlp_out')
    """
    if text.endswith(":*") and len(text) > 2:
        return WholeSite(text[:-2])
    if group := _GROUP.fullmatch(text):
        site = group["site"]
        units = tuple(Unit(site, int(i)) for i in group["indices"].split(","))
        return UnitGroup(group["name"], units)
    if at := _AT.fullmatch(text):
        return UnitAt(Unit.parse(at["unit"]), int(at["position"]))
    return Unit.parse(text)


def _natural(site: str) -> list[tuple[str, int]]:
    """For sorting: numbers in names count as numbers.

    >>> sorted(["blocks.10", "blocks.2"], key=_natural)
    ['blocks.2', 'blocks.10']
    """
    # mixed4a before mixed10: ("mixed", 4), ("a", -1) against ("mixed", 10).
    return [(name, int(part or -1)) for name, part in re.findall("([^0-9]*)([0-9]*)", site)]


def site_of(node: Node) -> str:
    """The site that a node's units belong to."""
    if isinstance(node, UnitGroup):
        return node.units[0].site
    return node.unit.site if isinstance(node, UnitAt) else node.site


_COMPOSITION = re.compile("composition [0-9]+ to [0-9]+")


def is_composition(edge: Mapping[str, Any]) -> bool:
    """Whether an edge holds composition scores of two heads (Elhage et al. 2021), which are norms and have no sign.

    >>> is_composition({"kind": "weight", "layer": "composition 0 to 1"})
    True
    """
    return edge["kind"] == "weight" and bool(_COMPOSITION.fullmatch(edge.get("layer") or ""))


# --- what attributes hold --------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


def _are_paths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(path, Mapping)
        and _is_number(path.get("sign"))
        and _is_number(path.get("strength"))
        and _are_texts(path.get("units"))
        for path in value
    )


def _is_kernel(value: Any) -> bool:
    try:
        numbers = np.asarray(value)
    except ValueError:  # rows of different lengths
        return False
    return numbers.dtype.kind in "if" and numbers.ndim <= 2 and bool(np.isfinite(numbers).all())


_Forms = Mapping[str, tuple[Callable[[Any], bool], str]]
"""By the name of an attribute: whether a value is of its form, and the form in words."""

_TEXT = (lambda value: isinstance(value, str), "a text")
_NUMBER = (_is_number, "a finite number")

_OF_CIRCUITS: _Forms = {
    "model": _TEXT,
    "model_hash": _TEXT,
    ORDER: (_are_texts, "a list of sites"),
    "paths": (_are_paths, "a list of paths, each with sign, strength and units"),
    "made": (lambda value: isinstance(value, Mapping), "an object"),
}

_OF_EDGES: _Forms = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "sum": _NUMBER,
    "norm": (lambda value: _is_number(value) and value >= 0, "a finite number of at least 0"),
    "typical": _NUMBER,
    "layer": (lambda value: isinstance(value, str | None), "a text"),
    "kernel": (_is_kernel, "a list of rows of finite numbers"),
}


def _check_attributes(data: Mapping[str, Any], forms: _Forms, what: str) -> None:
    for name in forms.keys() & data.keys():
        fits, expected = forms[name]
        if not fits(data[name]):
            raise ValueError(f"{name} of {what} is {reprlib.repr(data[name])}: expected {expected}")


class CircuitGraph(nx.MultiDiGraph):
    """A circuit: nodes are `Unit`s (or `UnitAt`, `UnitGroup`, `WholeSite`), edges go from source to target.

    An edge's key says its kind, and the layer where there is one: `weight:conv2`. Its attributes are
    `kind`, `norm` (strength), `sum` (signed), and where known `kernel` (nested lists), `layer`,
    `through`, `typical` (the median norm of the kernels to or from all units at the other end). `graph` holds `model`,
    `model_hash`, and how the circuit came about. Everything that networkx has works on it.
    """

    def tables(self) -> Iterator[Table | str]:
        """Its paths, if it is made of some, in lines; and its edges, the strongest first."""
        for path in self.graph.get("paths", []):
            sign = "+" if path["sign"] > 0 else "-" if path["sign"] < 0 else "0"
            yield f"{sign}{path['strength']:.4g}  {' -> '.join(path['units'])}"
        rows = [
            (
                str(a),
                str(b),
                d["kind"],
                d["norm"],
                d.get("typical", ""),
                d["sum"],
                d.get("layer", ""),
            )
            for a, b, d in self.edges(data=True)
        ]
        columns = ("from", "to", "kind", "norm", "typical norm", "sum", "layer")
        title = f"{self.number_of_nodes()} units, {self.number_of_edges()} edges"
        # By norm and not by sum: the weights of a strong kernel may add up to zero.
        rows.sort(key=lambda row: -row[3])
        yield Table(columns, rows, title)

    def connect(
        self,
        source: Node,
        target: Node,
        kind: str,
        *,
        sum: SupportsFloat,
        norm: SupportsFloat | None = None,
        **attributes: Any,
    ) -> None:
        """Add an edge, over one of the same kind and layer.

        Raises:
            TypeError: if `sum` or `norm` is no number.
            ValueError: if the kind is unknown, a number is not finite, or `norm` is negative.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} of an edge is not one of {', '.join(KINDS)}")
        total, strength = (plain_number(number) for number in (sum, norm))
        for name, number in (("sum", total), ("norm", strength)):
            if not isinstance(number, int | float) and (name, number) != ("norm", None):
                raise TypeError(
                    f"{name} of the edge {source} -> {target} is {type(number).__name__}: expected a number"
                )
        attributes = {name: plain_number(value) for name, value in attributes.items()}
        layer = attributes.get("layer") or ""
        # Two layers may connect the same units; their edges stay apart.
        key = f"{kind}:{layer}" if layer else kind
        # An edge with one number is as strong as that number is large.
        strength = abs(total) if strength is None else strength
        attributes |= {"kind": kind, "sum": total, "norm": strength}
        _check_attributes(attributes, _OF_EDGES, f"the edge {source} -> {target}")
        self.add_edge(source, target, key, **attributes)

    @property
    def model_hash(self) -> str:
        """Of the weights that the circuit belongs to; empty if it does not say."""
        return str(self.graph.get("model_hash", ""))

    def sites(self) -> list[str]:
        """The sites of its nodes in the model's order, or sources before targets where the circuit does not say it."""
        here = {site_of(node) for node in self}
        if set(known := self.graph.get(ORDER, ())) >= here:
            return [site for site in known if site in here]
        # A graph of sites instead of units: edges within a site (in recurrent parts) would be loops and say nothing
        # about order.
        order = nx.DiGraph()
        order.add_nodes_from(site_of(node) for node in self)
        order.add_edges_from(
            (site_of(a), site_of(b)) for a, b in self.edges() if site_of(a) != site_of(b)
        )
        if nx.is_directed_acyclic_graph(order):
            return list(nx.lexicographical_topological_sort(order, key=_natural))
        # With circles there is no order; that of the nodes is as good as any.
        return list(order)

    def valid(self) -> CircuitGraph:
        """This circuit, if the attributes that the library reads are of their forms, as those of a file may not be.

        Raises:
            ValueError: if one is not; the message names it and where it is.
        """
        _check_attributes(self.graph, _OF_CIRCUITS, "the circuit")
        for a, b, data in self.edges(data=True):
            needed = {"kind": None, "sum": None, "norm": None}
            _check_attributes(needed | data, _OF_EDGES, f"the edge {a} -> {b}")
        return self

    def same_as(self, other: nx.MultiDiGraph) -> bool:
        """Whether both hold the same nodes, edges and attributes, types included."""
        return _contents(self) == _contents(other)

    def checked(
        self, model_hash: str, n_units: Mapping[str, int], weights_hash: str = ""
    ) -> CircuitGraph:
        """This circuit, if it belongs to a model.

        Args:
            model_hash: of the model.
            n_units: how many units each of its sites has.
            weights_hash: of the model's weights alone, which circuits of earlier versions name.

        Raises:
            ValueError: if it was made from another model, or names units that are not there.
        """
        if self.model_hash and self.model_hash not in (model_hash, weights_hash):
            raise ValueError(
                f"circuit belongs to model {self.model_hash[:16]}, this one is {model_hash[:16]}"
            )
        units = {unit: node for node in self for unit in units_of(node)}
        gone = [
            str(node) for unit, node in units.items() if unit.index >= n_units.get(unit.site, 0)
        ]
        gone += [str(n) for n in self if isinstance(n, WholeSite) and n.site not in n_units]
        if gone:
            more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
            raise ValueError(
                f"circuit names units that the model does not have: {', '.join(gone[:5])}{more}"
            )
        return self


def units_of(node: Node) -> tuple[Unit, ...]:
    """The units that a node stands for; none for a whole site, whose number of units it does not say."""
    if isinstance(node, WholeSite):
        return ()
    if isinstance(node, UnitGroup):
        return node.units
    return (node.unit,) if isinstance(node, UnitAt) else (node,)


def _contents(graph: nx.MultiDiGraph) -> tuple[Any, ...]:
    return (
        _typed(graph.graph),
        {node: _typed(data) for node, data in graph.nodes(data=True)},
        {(a, b, key): _typed(data) for a, b, key, data in graph.edges(keys=True, data=True)},
    )


def _typed(value: Any) -> Any:
    """A value with its types, so that 1, 1.0 and True, lists and tuples are told apart."""
    if isinstance(value, Mapping):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [_typed(item) for item in value]
    # By `repr`, as NaN is not equal to itself but has one text.
    return type(value).__name__, repr(value)


# --- putting circuits together -----------------------------------------------------------------


def union(a: CircuitGraph, b: CircuitGraph) -> CircuitGraph:
    """All that is in either; where both have a node or an edge, attributes of `b` win.

    Raises:
        ValueError: if they belong to different weights.
    """
    _check_same_model(a, b)
    both = a.copy()
    both.graph.update(b.graph)
    both.add_nodes_from(b.nodes(data=True))
    for source, target, key, data in b.edges(keys=True, data=True):
        both.add_edge(source, target, key, **data)
    return both


def difference(a: CircuitGraph, b: CircuitGraph) -> CircuitGraph:
    """The edges of `a` that `b` lacks, with their nodes, and the nodes of `a` that `b` lacks.

    Raises:
        ValueError: if they belong to different weights.
    """
    _check_same_model(a, b)
    left = a.copy()
    left.remove_edges_from([edge for edge in a.edges(keys=True) if b.has_edge(*edge)])
    # Nodes of both circuits stay only as the ends of edges that are left.
    left.remove_nodes_from([n for n in list(left) if n in b and left.degree(n) == 0])
    return left


def _check_same_model(a: CircuitGraph, b: CircuitGraph) -> None:
    if a.model_hash and b.model_hash and a.model_hash != b.model_hash:
        raise ValueError(
            f"circuits belong to different weights, {a.model_hash[:16]} and {b.model_hash[:16]}"
        )


Edge = tuple[Node, Node, str]


@dataclass(frozen=True)
class CircuitDiff:
    """What one version of a circuit has that another has not.

    Attributes:
        nodes_added: only in the later one.
        nodes_removed: only in the earlier one.
        nodes_changed: in both, with other attributes.
        edges_added: source, target and key, only in the later one.
        edges_removed: only in the earlier one.
        edges_changed: in both, with other attributes.
    """

    nodes_added: tuple[Node, ...]
    nodes_removed: tuple[Node, ...]
    nodes_changed: tuple[Node, ...]
    edges_added: tuple[Edge, ...]
    edges_removed: tuple[Edge, ...]
    edges_changed: tuple[Edge, ...]

    @property
    def empty(self) -> bool:
        """Whether there is no difference."""
        return not any(vars(self).values())

    def to_dict(self) -> dict[str, list[Any]]:
        """As plain lists of text."""
        return {
            name: [str(v) if name.startswith("nodes") else [str(part) for part in v] for v in found]
            for name, found in vars(self).items()
        }

    def lines(self) -> Iterator[str]:
        """Every difference in a line."""
        for what, items in self.to_dict().items():
            for item in items:
                text = item if isinstance(item, str) else f"{item[0]} -> {item[1]} ({item[2]})"
                yield f"{what.replace('_', ' ')}: {text}"
        if self.empty:
            yield "no difference"


def circuit_diff(before: CircuitGraph, after: CircuitGraph) -> CircuitDiff:
    """What changed from one version of a circuit to another."""
    _, old_nodes, old_edges = _contents(before)
    _, new_nodes, new_edges = _contents(after)

    def split(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> tuple[tuple[Any, ...], ...]:
        return (
            tuple(k for k in new if k not in old),
            tuple(k for k in old if k not in new),
            tuple(k for k in new if k in old and new[k] != old[k]),
        )

    return CircuitDiff(*split(old_nodes, new_nodes), *split(old_edges, new_edges))


Weighing = Literal["sum", "representative"]


def collapse(
    graph: CircuitGraph, groups: Iterable[UnitGroup], weighing: Weighing = "sum"
) -> CircuitGraph:
    """Make one node of each group; edges between and into groups become one each.

    Args:
        graph: the circuit; it is not changed.
        groups: what to take together; no unit may be in two.
        weighing: `sum` adds the edges' sums (kernels are left out); `representative` keeps the strongest
            edge, and says in `members` how many there were.

    Raises:
        ValueError: if a unit is in two groups, or a group has no unit in the circuit.
    """
    place: dict[Node, Node] = {}
    for group in groups:
        found = [unit for unit in group.units if unit in graph]
        if not found:
            raise ValueError(f"group {group} has no unit in the circuit")
        for unit in found:
            if unit in place:
                raise ValueError(f"unit {unit} is in two groups")
            place[unit] = group
    made = CircuitGraph()
    made.graph.update(graph.graph)
    for node, data in graph.nodes(data=True):
        if node in place:
            made.add_node(place[node])
        else:
            made.add_node(node, **data)
    merged: dict[Edge, list[dict[str, Any]]] = {}
    for a, b, key, data in graph.edges(keys=True, data=True):
        # The key (kind and layer) stays, so that a group's edges of different kinds are not added up.
        ends: Edge = place.get(a) or a, place.get(b) or b, key
        merged.setdefault(ends, []).append(data)
    for (a, b, key), found in merged.items():
        best = max(found, key=lambda data: data["norm"])
        data = dict(best)
        if len(found) > 1 or a in place.values() or b in place.values():
            data["members"] = len(found)
            # What is left of `data` is the strongest edge's. Its kernel is not that of the sum, and neither is what is
            # typical.
            if weighing == "sum":
                data["sum"] = float(sum(d["sum"] for d in found))
                data["norm"] = abs(data["sum"])
                data.pop("kernel", None)
                data.pop("typical", None)
        made.add_edge(a, b, key, **data)
    return made
