"""Which graph of edges a model has."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.streams import StreamGraph
from circuits.models.adapter.hooked_model import HookedModel


def edge_graph(model: HookedModel, sites: Sequence[str] = ()) -> EdgeGraph:
    """The edges between the parts of a model.

    Args:
        model: a transformer: its heads, with queries, keys and values apart, and its MLPs.
        sites: not for transformers.

    Raises:
        ValueError: if the model's edges cannot be found, or there are too many.
    """
    if sites:
        raise ValueError(
            f"sites {','.join(sites)}: the edges of a transformer are between its heads and MLPs"
        )
    return StreamGraph(model)
