"""Writing a model's weights to a graph store."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from circuits.graph.blocks import BlockInfo, writing
from circuits.graph.store import FILE, GraphStore
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.weights.expanded import ExpandedWeights
from circuits.weights.raw import Pair, connected_pairs

_NUMBERS_AT_ONCE = 2**22
"""Numbers of a block that are computed together, at 25 for each kernel (5 x 5)."""


def build_graph(
    model: HookedModel,
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> GraphStore:
    """Write the weights between all directly connected sites to `graph.h5`, and open it.

    Rows are written as they are computed, so that memory does not grow with the network. A build that is interrupted
    leaves the file of an earlier one as it was.

    Args:
        model: the model, without edits in force.
        folder: the model's folder, as `Workspace.model_folder` gives it.
        progress: called with the blocks done and all blocks.

    Raises:
        ValueError: if the model is edited, or none of its sites are connected by weights.
    """
    pairs = list(connected_pairs(model))
    if not pairs:
        raise ValueError(f"model {model.name} has no weights between its sites")
    used = {pair.source for pair in pairs} | {pair.target for pair in pairs}
    names = [*(used - {s.name for s in model.sites}), *(s.name for s in model.sites)]
    sites = {name: model.n_units(name) for name in names if name in used}
    path = Path(folder) / FILE
    with writing(path, model.name, model.hash, sites) as writer:
        for done, pair in enumerate(pairs):
            n = sites[pair.source]
            step = max(1, _NUMBERS_AT_ONCE // max(1, n * 25))
            # Computed before the block is opened, since the block's record holds the shape of its kernels.
            first = pair.kernels(pair.units[:step], n)
            everything = len(pair.units) == sites[pair.target]
            info = _info(pair, n, tuple(first.shape[2:]), everything)
            with writer.block(info) as block:
                block.write(first.detach().cpu().numpy())
                for at in range(step, len(pair.units), step):
                    block.write(pair.kernels(pair.units[at : at + step], n).detach().cpu().numpy())
            if progress is not None:
                progress(done + 1, len(pairs))
    return GraphStore(folder)


def _info(pair: Pair, n_sources: int, kernel: tuple[int, ...], everything: bool) -> BlockInfo:
    """The record of a block; with `everything` its rows are all units of the target, and need not be listed."""
    return BlockInfo(
        pair.source,
        pair.target,
        "weight",
        pair.layer.name,
        pair.through,
        () if everything else tuple(pair.units.tolist()),
        (),
        (len(pair.units), n_sources),
        kernel,
        {"method": "the layer's weights, batch norm multiplied in", "lost": list(pair.layer.lost)},
    )


def graph_units(model: HookedModel, unit: Unit, sites: Container[str]) -> list[Unit]:
    """The units of a graph's sites that are the same as a unit of a site that the graph leaves out.

    The graph has one site for each place that layers read: of the branches of a block their concatenation, of a layer
    its activation and not what it was before that, of a pooled map the map.
    """
    found: dict[Unit, None] = {}
    for layer in model.weight_layers:
        # What is written says for each unit which channel of the layer it is; what is read for each channel which unit.
        channels = [int(w.index[unit.index]) for w in layer.writes if w.site == unit.site]
        for w in (w for w in layer.writes if w.site in sites):
            same = [k for k, c in enumerate(w.index.tolist()) if c >= 0 and c in channels]
            found |= dict.fromkeys(Unit(w.site, k) for k in same)
        for mine in (r for r in layer.reads if r.site == unit.site):
            places = (mine.index == unit.index).nonzero()[:, 0]
            for r in (r for r in layer.reads if r.site in sites and r.direct):
                same = [k for k in r.index[places].tolist() if k >= 0]
                found |= dict.fromkeys(Unit(r.site, k) for k in same)
    return list(found)


def expanded_block(
    expanded: ExpandedWeights, n_units: Mapping[str, int] | None = None
) -> tuple[BlockInfo, Float[np.ndarray, "target source *offset"]]:
    """Turn expanded weights into a block for `add_edges`.

    Args:
        expanded: weights of mode `linear` or `mean`.
        n_units: the number of units of each site; where a block has all of them, they need not be listed.

    Raises:
        ValueError: if the mode is `example`.
    """
    if expanded.mode == "example":
        raise ValueError(
            "mode 'example' gives weights for each example: expected mode 'linear' or 'mean' for edges"
        )
    known = n_units or {}
    provenance = {
        "method": f"expanded weights, {expanded.mode}",
        "at": list(expanded.at),
        "start": list(expanded.start),
        "examples": dict(expanded.examples),
    }
    info = BlockInfo(
        expanded.source,
        expanded.target,
        "expanded",
        expanded.mode,  # as the layer's name: the same units can have an edge for each mode
        (),
        _unless_all(expanded.units, known.get(expanded.target)),
        _unless_all(expanded.sources, known.get(expanded.source)),
        (len(expanded.units), len(expanded.sources)),
        tuple(expanded.weight.shape[2:]),
        provenance,
    )
    return info, expanded.weight.cpu().numpy()


def _unless_all(units: Sequence[int], n: int | None) -> tuple[int, ...]:
    """The units, or an empty list if they are all n of the site."""
    return () if list(units) == list(range(n or 0)) else tuple(units)
