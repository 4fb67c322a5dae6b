"""Which graph of edges a model has."""

from __future__ import annotations

import re
from collections.abc import Sequence

from circuits.discovery.channels import LIMIT, ChannelGraph
from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.streams import KeysValues, StreamGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput

_MORE_UNITS = re.compile(r"[0-9]+(-[0-9]+)?")


def parse_sites(text: str) -> tuple[str, ...]:
    """The sites of a list separated by commas, each with the units that are named behind it.

    >>> parse_sites("conv2d2, mixed3a:1,2,5-9,mixed3b:335")
    ('conv2d2', 'mixed3a:1,2,5-9', 'mixed3b:335')
    """
    found: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if found and ":" in found[-1] and _MORE_UNITS.fullmatch(part):
            found[-1] += f",{part}"
        elif part:
            found.append(part)
    return tuple(found)


def edge_graph(
    model: HookedModel, sites: Sequence[str] = (), kv: KeysValues = "group", limit: int = LIMIT
) -> EdgeGraph:
    """The edges between the parts of a model.

    Args:
        model: a transformer: its heads, with queries, keys and values apart, and its MLPs; or a convolutional network:
            the channels of its layers.
        sites: of a convolutional network: the sites between whose channels edges are wanted, in order, each with all of
            its channels or `SITE:INDEX` for some; all sites with channels if there are none.
        kv: of a transformer: whether grouped keys and values are one target for their group, or one for each head.
        limit: of a convolutional network: the most edges.

    Raises:
        KeyError: if there is no such site.
        ValueError: if the model's edges cannot be found, there are too many, or sites are named of a transformer.
    """
    if isinstance(model.input, ImageInput) and not model.has_stream:
        if kv != "group":
            raise ValueError(f"kv {kv}: {model.name} is no transformer: it has no keys and values")
        return ChannelGraph(model, tuple(sites) or None, limit=limit)
    if sites:
        raise ValueError(
            f"sites {','.join(sites)}: the edges of a transformer are between its heads and MLPs; sites are of "
            "convolutional networks"
        )
    return StreamGraph(model, kv)
