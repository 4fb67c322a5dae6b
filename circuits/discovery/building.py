"""Which graph of edges a model has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from circuits.discovery.channels import ChannelGraph
from circuits.discovery.graphs import LIMIT, EdgeGraph
from circuits.discovery.groups import GroupedGraph
from circuits.discovery.spans import Spans
from circuits.discovery.splitting import ALL, active_latents
from circuits.discovery.streams import KeysValues, StreamGraph
from circuits.models.adapter.attaching import autoencoders
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.tasks.task import Task
from circuits.units import Units

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
    model: HookedModel,
    sites: Sequence[str] = (),
    kv: KeysValues = "group",
    *,
    spans: str | Sequence[str] = (),
    neurons: str = "",
    neuron_targets: str = "",
    latents: Sequence[str | Units] = (),
    groups: Mapping[str, str | Units] = MappingProxyType({}),
    offsets: bool = False,
    limit: int = LIMIT,
) -> EdgeGraph:
    """The edges between the parts of a model.

    Args:
        model: a transformer: its heads, with queries, keys and values apart, and its MLPs; or a convolutional network:
            the channels of its layers.
        sites: of a convolutional network: the sites between whose channels edges are wanted, in order, each with all of
            its channels or `SITE:INDEX` for some; all sites with channels if there are none.
        kv: of a transformer: whether grouped keys and values are one target for their group, or one for each head.
        spans: of a transformer: spans of positions, at each of which what a target reads is patched by itself: ranges
            from 0 (`0,1-4,5-`; negative: from the end), names that the task gives to parts of its texts, and `rest`.
        neurons: of a transformer: the layers whose MLPs are split into neurons as sources, such as `3,5-7` or `all`.
        neuron_targets: the same as targets: an edge leads to what one neuron is given.
        latents: of a transformer with autoencoders (`HookedModel.attach`): those whose latents are sources, as
            `sae/NAME`, `sae/NAME:1,2,5-9` or `Units` (`active_latents` has those that a task needs), with what is left
            of their site as one more source.
        groups: of a convolutional network: channels that are one source and one target, `SITE:NAME`, by the group's
            name: `{"curves": "mixed3a:1,2,5-9"}`.
        offsets: of a convolutional network: whether each offset of a kernel is an edge of its own (see `ChannelGraph`).
        limit: the most edges between channels, heads and MLPs.

    Raises:
        KeyError: if there is no such site, autoencoder or channel of a group.
        ValueError: if the model's edges cannot be found, there are too many, sites or groups are named of a
            transformer, or spans, neurons or latents of another model, or spans do not hold each position once, or a
            channel is in two groups.
    """
    words = spans if isinstance(spans, str) else ",".join(spans)
    if offsets and (groups or not isinstance(model.input, ImageInput) or model.has_stream):
        what = "groups of channels" if groups else f"{model.name}, a transformer"
        raise ValueError(f"offsets of kernels do not go with {what}: they are of single channels")
    graph = _built(model, sites, kv, words, neurons, neuron_targets, latents, offsets, limit)
    if groups:
        graph = _grouped(graph, groups)
    given: dict[str, Any] = {
        "sites": [*sites], "kv": kv, "spans": words, "neurons": neurons,
        "neuron_targets": neuron_targets, "latents": [*map(str, latents)],
        "groups": {name: str(units) for name, units in groups.items()}, "offsets": offsets,
        "limit": limit,
    }  # fmt: skip
    usual = {"kv": "group", "limit": LIMIT}
    graph.choices = {k: v for k, v in given.items() if v and v != usual.get(k)}
    return graph


def _grouped(graph: EdgeGraph, groups: Mapping[str, str | Units]) -> EdgeGraph:
    """A graph of channels with groups as single nodes."""
    if not isinstance(graph, ChannelGraph):
        raise ValueError(
            f"groups {', '.join(groups)}: {graph.model.name} is a transformer; groups are of channels of a "
            "convolutional network"
        )
    return GroupedGraph(
        graph,
        {
            n: units if isinstance(units, Units) else Units.parse(units)
            for n, units in groups.items()
        },
    )


def _built(
    model: HookedModel,
    sites: Sequence[str],
    kv: KeysValues,
    spans: str,
    neurons: str,
    neuron_targets: str,
    latents: Sequence[str | Units],
    offsets: bool,
    limit: int,
) -> EdgeGraph:
    named = Spans.parse(spans) if spans else None
    if isinstance(model.input, ImageInput) and named is not None:
        raise ValueError(f"spans {named}: {model.name} takes images; spans are of texts")
    units = [Units.parse(x) if ":" in x else Units(x, None) for x in map(str, latents)]
    if isinstance(model.input, ImageInput) and not model.has_stream:
        if neurons or neuron_targets or units:
            given = (
                ("neurons", neurons),
                ("neuron_targets", neuron_targets),
                ("latents", units and units[0]),
            )
            what = next(f"{name} {value}" for name, value in given if value)
            raise ValueError(
                f"{what}: the edges of {model.name}, a convolutional network, are between channels of sites, or groups "
                "of channels; expected sites and groups, or what is done to units of sae/NAME (`circuits ablate`)"
            )
        if kv != "group":
            raise ValueError(f"kv {kv}: {model.name} is no transformer: it has no keys and values")
        return ChannelGraph(model, tuple(sites) or None, offsets=offsets, limit=limit)
    if sites:
        raise ValueError(
            f"sites {','.join(sites)}: the edges of a transformer are between its heads and MLPs; sites are of "
            "convolutional networks"
        )
    return StreamGraph(
        model,
        kv,
        spans=named,
        neurons=neurons,
        neuron_targets=neuron_targets,
        latents=units,
        limit=limit,
    )


def chosen_latents(
    model: HookedModel, text: str, task: Task | None, edges: Sequence[tuple[str, str]] = ()
) -> tuple[Units, ...]:
    """The latents that a text names: `active`, `all`, or a list such as `sae/NAME:1,2,5-9,sae/OTHER`.

    Args:
        model: the model, with autoencoders.
        text: the text.
        task: the task on which latents are active; without one all are taken for active.
        edges: edges whose latents count as active however active they are.

    Raises:
        ValueError: if the model has no autoencoders, or no latent is active.
    """
    known = list(autoencoders(model.module))
    if not known:
        raise ValueError(
            f"latents {text}: {model.name} has no autoencoders; expected a model with some, written MODEL+sae/NAME"
        )
    if text not in ("active", ALL):
        listed = parse_sites(text)
        return tuple(Units.parse(part) if ":" in part else Units(part, None) for part in listed)
    if text == ALL or task is None:
        return tuple(Units(name, None) for name in known)
    named = [source.rpartition(":") for source, _ in edges]
    also = {name: [int(i) for of, _, i in named if of == name] for name in known}
    return active_latents(model, task, known, also)
