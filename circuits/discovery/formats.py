"""Edges and their scores in the files of other tools: MIB's and EAP-IG's (`.json`, `.pt`), ACDC's (`.pth`, `.pkl`).

These tools know transformers whose parts are `input`, the heads `a0.h1`, the MLPs `m2` and `logits`; an edge leads into
a head's queries, keys or values, `a0.h1->a3.h4<q>`, by query head also where heads share keys. So a graph with shared
keys is needed by head (`kv="head"`). Their `input` is one part: `input->X` stands for the edges of the token and of the
position embedding into X, kept if either is, with the sum of both scores. As it is read, both are kept; the score is
the token's, since it is the token's embedding alone that these tools let differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.discovery.acdc_files import read_plain, read_subgraph
from circuits.discovery.graphs import Edge, EdgeGraph, Mask
from circuits.discovery.results import EdgeScores
from circuits.discovery.streams import StreamGraph
from circuits.experiments.outcomes import Record
from circuits.files import replacing
from circuits.json_files import read_json
from circuits.tasks.task import Task
from circuits.units import unknown

SUFFIXES = (".json", ".pt", ".pth", ".pkl")
"""The endings of files of edges."""

WRITTEN = (".json", ".pt")
"""Those of files that are written."""

_HEAD = re.compile(r"([0-9]+)\.([0-9]+)(?:\.([qkv]))?")


@dataclass(frozen=True, eq=False)
class EdgeFile:
    """What a file says of a graph's edges.

    Attributes:
        path: the file.
        scores: the score of each edge; None if the file has none.
        kept: which edges are in its circuit; none if it marks no circuit.
    """

    path: str
    scores: Float[np.ndarray, " edge"] | None
    kept: Mask

    def scored(self, graph: EdgeGraph, task: Task) -> EdgeScores:
        """The scores as those of a task, the same on all examples, so that a ranking can be evaluated.

        Raises:
            ValueError: if the file has none.
        """
        if self.scores is None:
            raise ValueError(f"file {self.path!r} has no scores")
        values = np.broadcast_to(self.scores, (len(task), len(graph)))
        missing = np.full(len(task), np.nan)
        return EdgeScores(
            "file", {"file": self.path, "grain": graph.grain}, graph.edges, values, missing, missing, (),
            task.metric.name, task.metric.unit, task.metric.better, task.clusters, Record.of(graph.model, task, 0),
        )  # fmt: skip


def named(node: str) -> str:
    """What other tools call a source or target of a transformer.

    >>> named("0.1"), named("3.4.q"), named("mlp:2"), named("position"), named("logits")
    ('a0.h1', 'a3.h4<q>', 'm2', 'input', 'logits')
    """
    if node in ("token", "position"):
        return "input"
    match = _HEAD.fullmatch(node)
    if match is None:
        return f"m{node.removeprefix('mlp:')}" if node.startswith("mlp:") else node
    layer, head, letter = match.groups()
    return f"a{layer}.h{head}" + (f"<{letter}>" if letter else "")


class Layout:
    """The edges of a transformer as other tools name and order them.

    Args:
        graph: the edges between heads and MLPs of a transformer.

    Raises:
        ValueError: if it is no transformer's, or heads that share keys or values have no edges of their own.
    """

    def __init__(self, graph: EdgeGraph) -> None:
        if not isinstance(graph, StreamGraph) or graph.spans is not None or graph.stream.splits:
            raise ValueError(
                f"model {graph.model.name}: files of edges are of transformers' heads and MLPs; its edges lead between "
                f"{graph.grain}"
            )
        stream = graph.stream
        heads = [stream.heads_of(i) for i in range(stream.n_layers)]
        numbers = {h.stop - h.start for h in heads}
        if len(numbers) != 1:
            raise ValueError(
                f"model {graph.model.name}: files of edges need layers with the same number of heads, not "
                f"{sorted(numbers)}"
            )
        self.graph, self.n_layers, (self.n_heads,) = graph, stream.n_layers, numbers
        self.config = {
            "n_layers": self.n_layers, "n_heads": self.n_heads, "parallel_attn_mlp": stream.parallel,
            "d_model": stream.width,
        }  # fmt: skip
        last = f"0.{self.n_heads - 1}"
        if not {f"{last}.k", f"{last}.v"} <= set(graph.targets):
            raise ValueError(
                f"model {graph.model.name}: files of edges have keys and values of each query head, which share them "
                "here; expected a graph by query head (--kv head)"
            )

    @cached_property
    def sources(self) -> list[str]:
        """The names of all sources: the input, and of each layer the heads and the MLP."""
        found = ["input"]
        for layer in range(self.n_layers):
            found += [f"a{layer}.h{h}" for h in range(self.n_heads)] + [f"m{layer}"]
        return found

    @cached_property
    def targets(self) -> list[str]:
        """The names of all targets, as the columns of a `.pt` file have them."""
        found: list[str] = []
        for layer in range(self.n_layers):
            found += [f"a{layer}.h{h}<{x}>" for x in "qkv" for h in range(self.n_heads)]
            found.append(f"m{layer}")
        return [*found, "logits"]

    @cached_property
    def edges(self) -> dict[Edge, list[int]]:
        """The numbers of each edge here, by its names there: two, if the token and the position lead to a target."""
        found: dict[Edge, list[int]] = {}
        for i, (source, target) in enumerate(self.graph.edges):
            found.setdefault((named(source), named(target)), []).append(i)
        return found

    @cached_property
    def _embedded(self) -> dict[Edge, list[int]]:
        """The edges of the token and of the position embedding apart, as ACDC may have them."""
        return {
            (source, named(target)): [i]
            for i, (source, target) in enumerate(self.graph.edges)
            if source in ("token", "position")
        }

    def places(self, edge: str) -> list[int] | None:
        """The numbers of an edge that a file names; None for one of an MLP that a layer does not have.

        Raises:
            KeyError: if there is no such edge.
        """
        source, _, target = edge.partition("->")
        found = self.edges.get((source, target)) or self._embedded.get((source, target))
        if found is None and not self._of_no_mlp(source, target):
            raise unknown(
                f"edge of {self.graph.model.name}", edge, [f"{a}->{b}" for a, b in self.edges]
            )
        return found

    def _of_no_mlp(self, source: str, target: str) -> bool:
        known = source in self.sources and target in self.targets
        there = {named(s) for s in self.graph.sources} | {named(t) for t in self.graph.targets}
        return known and bool({source, target} - there)

    def scattered(
        self, scores: Mapping[str, float], kept: Iterable[str]
    ) -> tuple[np.ndarray, Mask]:
        """Scores and a circuit by the names of a file at the edges of the graph."""
        made, mask = np.zeros(len(self.graph)), np.zeros(len(self.graph), bool)
        for edge, score in scores.items():
            made[(self.places(edge) or [])[:1]] = score
        for edge in kept:
            mask[self.places(edge) or []] = True
        return made, mask


# --- reading -----------------------------------------------------------------------------------------


def read_edges(path: str | Path, graph: EdgeGraph) -> EdgeFile:
    """Read the scores and the circuit of a file.

    Args:
        path: `.json` or `.pt` as MIB and EAP-IG write them; `.pth` or `.pkl` as ACDC writes them (`subgraph.pth`,
            `edges.pkl`). Nothing in a file is run: `.pt` and `.pth` are read with `weights_only=True`, and a `.pkl`
            holds names, indices and numbers alone.
        graph: the edges of the model that the file is of.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if the file names an edge that the graph does not have.
        ValueError: if it is damaged, of another form, of a model with other layers or heads, or a score is no number.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"file {str(path)!r}: expected one that ends in {', '.join(SUFFIXES)}")
    layout = Layout(graph)
    if path.suffix in (".pth", ".pkl"):
        scores, kept = read_subgraph(path, layout.n_layers)
    elif path.suffix == ".pt":
        scores, kept = _from_tensors(read_plain(path), layout, f"file {str(path)!r}")
    else:
        scores, kept = _from_json(read_json(path, nan=True), layout, f"file {str(path)!r}")
    for edge, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"file {str(path)!r}: the score of {edge} is {score}: expected a number"
            )
    made, mask = layout.scattered(scores, kept)
    return EdgeFile(str(path), made if scores else None, mask)


Read = tuple[dict[str, float], list[str]]
"""Scores by the names of edges, and the names of those in the circuit."""


def _check_config(found: Any, layout: Layout, what: str) -> None:
    """Raise ValueError unless a file is of a model of the same shape."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{what}: 'cfg' is {type(found).__name__}: expected n_layers, n_heads, …")
    for name, own in layout.config.items():
        if name not in found:
            raise ValueError(f"{what}: 'cfg' has no {name}; expected {own}")
        if found[name] != own:
            raise ValueError(
                f"{what} has {name} {found[name]!r}: expected {own!r}, that of {layout.graph.model.name}"
            )


def _check_keys(found: Any, keys: Sequence[str], what: str) -> None:
    missing = [k for k in keys if not isinstance(found, Mapping) or k not in found]
    if missing:
        raise ValueError(f"{what} has no {', '.join(map(repr, missing))}: expected a file of edges")


def _from_json(found: Any, layout: Layout, what: str) -> Read:
    _check_keys(found, ("cfg", "nodes", "edges"), what)
    _check_config(found["cfg"], layout, what)
    if not isinstance(found["nodes"], Mapping) or not isinstance(found["edges"], Mapping):
        raise ValueError(f"{what}: 'nodes' and 'edges' must be objects by name")
    for node in layout.sources:
        if node not in found["nodes"]:
            raise ValueError(
                f"{what} has no node {node}: expected all of {layout.graph.model.name}"
            )
    for node, said in found["nodes"].items():
        if isinstance(said, Mapping) and not all(said.get("neurons") or (True,)):
            raise ValueError(f"{what} keeps some neurons of {node}: expected whole parts")
    scores: dict[str, float] = {}
    kept: list[str] = []
    for edge, said in found["edges"].items():
        layout.places(edge)
        score, inside = _said(edge, said, what)
        scores |= {} if score is None else {edge: score}
        kept += [edge] * inside
    if 0 < len(scores) < len(found["edges"]):
        bare = next(edge for edge in found["edges"] if edge not in scores)
        raise ValueError(f"{what}: edge {bare} has no score, others have one")
    _check_all(found["edges"], kept, layout, what)
    # A list of a circuit's edges says nothing of the others.
    return (scores if _is_whole(found["edges"], layout) else {}), kept


def _said(edge: str, said: Any, what: str) -> tuple[float | None, bool]:
    """The score of an edge in a JSON file, if it has one, and whether the edge is in the circuit."""
    if not isinstance(said, Mapping) or not said.keys() & {"score", "in_graph"}:
        raise ValueError(f"{what}: edge {edge} has neither 'score' nor 'in_graph'")
    score, inside = said.get("score"), said.get("in_graph", False)
    if not isinstance(inside, bool):
        raise ValueError(f"{what}: 'in_graph' of {edge} is {inside!r}: expected true or false")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise ValueError(f"{what}: the score of {edge} is {score!r}: expected a number")
    return None if score is None else float(score), inside


def _is_whole(edges: Iterable[str], layout: Layout) -> bool:
    return {f"{a}->{b}" for a, b in layout.edges} <= set(edges)


def _check_all(edges: Iterable[str], kept: Sequence[str], layout: Layout, what: str) -> None:
    """Raise ValueError if edges are missing, unless all that are there are a circuit's."""
    there = set(edges)
    missing = [f"{a}->{b}" for a, b in layout.edges if f"{a}->{b}" not in there]
    if missing and there - set(kept):
        raise ValueError(
            f"{what} lacks {len(missing)} edges of {layout.graph.model.name}, as {missing[0]}: expected all, or a "
            "circuit's alone"
        )


def _from_tensors(found: Any, layout: Layout, what: str) -> Read:
    _check_keys(found, ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph"), what)
    _check_config(found["cfg"], layout, what)
    sources, targets = (
        _names(found[key], own, f"{what}: {key!r}", layout)
        for key, own in (("src_nodes", layout.sources), ("dst_nodes", layout.targets))
    )
    shape = len(sources), len(targets)
    scores, inside = (
        _matrix(found[key], shape, f"{what}: {key!r}") for key in ("edges_scores", "edges_in_graph")
    )
    if "neurons_in_graph" in found and not bool(torch.as_tensor(found["neurons_in_graph"]).all()):
        raise ValueError(f"{what} keeps some neurons of its parts: expected whole parts")
    real = {f"{a}->{b}" for a, b in layout.edges}
    made: Read = {}, []
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            edge = f"{source}->{target}"
            if edge in real:
                made[0][edge] = float(scores[i, j])
            if bool(inside[i, j]):
                layout.places(edge)
                made[1].append(edge)
    return made


def _names(found: Any, own: Sequence[str], what: str, layout: Layout) -> list[str]:
    """The rows or columns of a `.pt` file."""
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{what} is no list of names")
    missing = [name for name in own if name not in found]
    if missing or len(found) != len(own):
        first = (
            missing[0] if missing else next(n for n in found if n not in own or found.count(n) > 1)
        )
        raise ValueError(
            f"{what} {'lacks' if missing else 'has'} {first}: expected the {len(own)} of {layout.graph.model.name}"
        )
    return list(found)


def _matrix(found: Any, shape: tuple[int, int], what: str) -> Float[Tensor, "source target"]:
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        has = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{what} is {has}: expected a tensor of shape {shape}")
    return found.detach().double()


# --- writing -----------------------------------------------------------------------------------------


def check_writable(path: str | Path, graph: EdgeGraph) -> None:
    """Raise ValueError unless scores of a graph can be written to a file, by its name and the graph's grain."""
    if Path(path).suffix not in WRITTEN:
        raise ValueError(f"file {str(path)!r}: expected a name that ends in {' or '.join(WRITTEN)}")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"file {str(path)!r}: its folder does not exist")
    Layout(graph)


def write_edges(
    path: str | Path, graph: EdgeGraph, scores: Float[np.ndarray, " edge"], kept: Mask
) -> None:
    """Write the scores of all edges, and which of them are a circuit, as MIB and EAP-IG read them.

    Args:
        path: a file that ends in `.json`, or `.pt`, in which scores are rounded to float32 as theirs are.
        graph: the model's edges.
        scores: the score of each.
        kept: which are in the circuit.

    Raises:
        ValueError: if the file's name ends otherwise, or the graph is no transformer's with keys by query head.
    """
    check_writable(path, graph)
    layout, path = Layout(graph), Path(path)
    summed = {edge: float(scores[at].sum()) for edge, at in layout.edges.items()}
    inside = {edge: bool(kept[at].any()) for edge, at in layout.edges.items()}
    nodes = dict.fromkeys(layout.sources, False)
    nodes |= {source: True for (source, _), there in inside.items() if there}
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            with temporary.open("wb") as file:
                torch.save(_tensors(layout, summed, inside, nodes), file)
        else:
            temporary.write_text(_json(layout, summed, inside, nodes))


def _json(
    layout: Layout,
    scores: Mapping[Edge, float],
    inside: Mapping[Edge, bool],
    nodes: Mapping[str, bool],
) -> str:
    return json.dumps(
        {
            "cfg": layout.config,
            "nodes": {
                node: {"in_graph": there} for node, there in {**nodes, "logits": True}.items()
            },
            "edges": {
                f"{a}->{b}": {"score": score, "in_graph": inside[a, b]}
                for (a, b), score in scores.items()
            },
        }
    )


def _tensors(
    layout: Layout,
    scores: Mapping[Edge, float],
    inside: Mapping[Edge, bool],
    nodes: Mapping[str, bool],
) -> dict[str, Any]:
    row = {name: i for i, name in enumerate(layout.sources)}
    column = {name: i for i, name in enumerate(layout.targets)}
    made, kept = (
        torch.zeros(len(row), len(column)),
        torch.zeros(len(row), len(column), dtype=torch.bool),
    )
    for (a, b), score in scores.items():
        made[row[a], column[b]] = score
        kept[row[a], column[b]] = inside[a, b]
    return {
        "cfg": layout.config, "src_nodes": layout.sources, "dst_nodes": layout.targets, "edges_scores": made,
        "edges_in_graph": kept, "nodes_in_graph": torch.tensor(list(nodes.values())),
    }  # fmt: skip
