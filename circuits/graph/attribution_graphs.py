"""Attribution graphs as circuit-tracer writes and Neuronpedia reads them.

A file has `metadata`, `qParams`, `nodes` and `links`; a node is a feature of a layer at a token, an error,
a token's embedding or a logit. Its ids can collide: errors are `0_{layer}_{position}` and features of
layer 0 are `0_{feature}_{position}`, so a link may not say which of the two it means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from circuits.checks import whole
from circuits.graph.circuit import (
    CircuitGraph,
    Node,
    UnitAt,
    WholeSite,
    parse_node,
    site_of,
    units_of,
)
from circuits.graph.values import decoded, encoded
from circuits.units import Unit

_OURS = "circuits"
"""The key under which we keep what the format has no place for."""

_FEATURE, _ERROR = "cross layer transcoder", "mlp reconstruction error"
_LAYER = re.compile(r"layer(?P<layer>[0-9]+)\.(?P<what>features|error)")


def from_attribution_graph(raw: Mapping[str, Any]) -> CircuitGraph:
    """A circuit from an attribution graph, validated before.

    Features are units of the sites `layer0.features`, …; errors of `layer0.error`, …; tokens of
    `embedding`, by their number in the vocabulary, and outputs of `logits`; each at its position.

    Raises:
        ValueError: if two nodes have one id and a link uses it, two ids stand for one node, a feature
            has no number, or a link names no node.
    """
    made = CircuitGraph()
    made.graph.update(_about(raw["metadata"]))
    by_id: dict[str, Node] = {}
    id_of: dict[Node, str] = {}
    # Ids that stand for two nodes are only an error once a link uses one: files with such nodes can be read as long as
    # nothing depends on which is meant.
    doubled: dict[str, tuple[str, str]] = {}
    kinds: dict[str, str] = {}
    for entry in raw["nodes"]:
        node = _node(entry)
        name = entry["node_id"]
        # The reverse case: two ids for one node would silently become one.
        twin = id_of.setdefault(node, name)
        if twin != name:
            raise ValueError(f"node_id {twin!r} and {name!r} are one node, {node}")
        if name in by_id and by_id[name] != node:
            doubled[name] = (kinds[name], str(entry.get("feature_type")))
        by_id[name], kinds[name] = node, str(entry.get("feature_type"))
        ours = entry.get(_OURS)
        known = ("node_id", "layer", "ctx_idx", "feature", _OURS)
        # What the format says of a node in general; `layer` and the like are in the node's name already.
        rest = {k: v for k, v in entry.items() if k not in known and v is not None}
        made.add_node(node)
        made.nodes[node].update(decoded(ours["attributes"]) if ours else rest)
    for link in raw["links"]:
        for end in ("source", "target"):
            name = link[end]
            if name in doubled:
                a, b = doubled[name]
                raise ValueError(
                    f"node_id {name!r} names two nodes, a {a!r} and a {b!r}, and a link uses it: "
                    "which of them it means cannot be told"
                )
            if name not in by_id:
                raise ValueError(f"link names node_id {name!r}, which is not among the nodes")
        ends = by_id[link["source"]], by_id[link["target"]]
        ours = link.get(_OURS)
        if ours:
            made.add_edge(*ends, ours["key"])
            made.edges[(*ends, ours["key"])].update(decoded(ours["attributes"]))
        else:
            # The format has one number a link and no kind: it is an attribution.
            made.connect(*ends, "attribution", sum=float(link["weight"]))
    return made.valid()


def _about(metadata: Mapping[str, Any]) -> dict[str, Any]:
    if _OURS in metadata:
        return decoded(metadata[_OURS])
    return {
        "model": str(metadata.get("scan", "")),
        **{k: v for k, v in metadata.items() if k != "scan"},
    }


def _node(entry: Mapping[str, Any]) -> Node:
    ours = entry.get(_OURS)
    if ours:
        return parse_node(ours["node"])
    kind, parts = entry["feature_type"], entry["node_id"].split("_")
    layer, position = str(entry["layer"]), int(entry["ctx_idx"])
    number = entry.get("feature")
    # Of a feature the number is in the id, `layer_feature_position`.
    if len(parts) == 3 and (index := whole(parts[1])) is not None:
        number = index  # `feature` is the layer and the feature paired as one number
    if kind == _ERROR:
        return UnitAt(Unit(f"layer{layer}.error", 0), position)
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"node_id {entry['node_id']!r} does not say which feature it is")
    if kind == "embedding":
        return UnitAt(Unit("embedding", number), position)
    if kind == "logit":
        return UnitAt(Unit("logits", number), position)
    return UnitAt(Unit(f"layer{layer}.features", number), position)


def to_attribution_graph(graph: CircuitGraph) -> dict[str, Any]:
    """A circuit as an attribution graph; what the format has no place for is under `circuits`."""
    about = graph.graph
    layers = {site: i for i, site in enumerate(graph.sites())}
    ids: dict[Node, str] = {}
    used: set[str] = set()
    nodes = []
    for node, data in graph.nodes(data=True):
        entry = _entry(node, data, layers)
        # Two sites of ours may have one number in the format, which only has layers.
        if entry["node_id"] in used:
            entry["node_id"] = f"{entry['node_id']}_{len(ids)}"
        entry["jsNodeId"] = f"{entry['node_id']}-0"
        used.add(entry["node_id"])
        ids[node] = entry["node_id"]
        nodes.append(entry)
    links = [
        {
            "source": ids[a],
            "target": ids[b],
            "weight": _finite(data.get("sum", 1.0)),
            _OURS: {"key": key, "attributes": encoded(data)},
        }
        for a, b, key, data in graph.edges(keys=True, data=True)
    ]
    tokens = about.get("prompt_tokens", [])
    return {
        "metadata": {
            "slug": str(about.get("slug", about.get("name", "circuit"))),
            "scan": str(about.get("model", "")),
            "prompt_tokens": list(tokens) if isinstance(tokens, list | tuple) else [],
            "prompt": str(about.get("prompt", "")),
            _OURS: encoded(about),
        },
        "qParams": {
            "linkType": "both",
            "pinnedIds": [],
            "clickedId": "",
            "supernodes": [],
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def _entry(node: Node, data: Mapping[str, Any], layers: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(node, WholeSite):
        raise ValueError(
            f"{node}: the attribution format has units at positions only, no whole sites"
        )
    unit, site = units_of(node)[0], site_of(node)
    position = node.position if isinstance(node, UnitAt) else 0
    known = _LAYER.fullmatch(site)
    # Sites that the format has no name for are numbered in the model's order, which keeps their order in a viewer.
    layer = known["layer"] if known else str(layers[site])
    kind, name = _FEATURE, f"{layer}_{unit.index}_{position}"
    if known and known["what"] == "error":
        kind, name = _ERROR, f"{layer}_error_{position}"  # not 0_{layer}_{position}: that collides
    elif site == "embedding":
        kind, layer, name = "embedding", "E", f"E_{unit.index}_{position}"
    elif site == "logits":
        kind, name = "logit", f"{layer}_{unit.index}_{position}"
    label = data.get("clerp", data.get("label", str(node)))
    entry = {
        "node_id": name,
        "feature": unit.index,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "clerp": str(label),
        _OURS: {"node": str(node), "attributes": encoded(data)},
    }
    for number in ("influence", "activation"):
        if isinstance(data.get(number), int | float):
            entry[number] = _finite(data[number])
    return entry


def _finite(number: float) -> float:
    """0 for what JSON has no number for; the true one is under `circuits`."""
    return number if math.isfinite(number) else 0.0
