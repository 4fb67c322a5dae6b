"""The graph of a transformer: heads with queries, keys and values apart, and MLPs, on the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.graphs import EdgeGraph, PlacedNode
from circuits.discovery.matrices import path_norms
from circuits.experiments.patched_runs import Options, changes_of
from circuits.graph.circuit import WholeSite
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.norms import Tangent
from circuits.models.paths.contributions import (
    input_gradient,
    norm_of,
    read_matrices,
    tangent_of,
    written_change,
)
from circuits.models.paths.residual import STREAMS, Receiver, Stream
from circuits.models.paths.routes import stream_of
from circuits.tasks.targets import output_site
from circuits.units import Site, Unit


class StreamGraph(EdgeGraph):
    """The direct paths of a transformer, from what writes to the residual stream to what reads it.

    Grouped keys and values (grouped-query attention) are one target for their group of heads.

    Args:
        model: a transformer.

    Raises:
        ValueError: if the model's residual stream is not the sum of what its parts write.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model, self.grain = model, "heads and MLPs"
        self.stream: Stream = stream_of(model)
        senders = [s for s in self.stream.senders if s.kind != "bias"]
        self._receivers = [r for r in self.stream.receivers if r.kind not in STREAMS]
        self.sources, self.targets = tuple(map(str, senders)), tuple(map(str, self._receivers))
        source = {s: i for i, s in enumerate(senders)}
        target = {r: i for i, r in enumerate(self._receivers)}
        self.ends = np.array([(source[s], target[r]) for s, r in self.stream.paths()])
        self.feeds = tuple(self._fed(r) for r in self._receivers)
        # The place of each source among the stream's senders, biases included.
        self._sender = np.array([self.stream.senders.index(s) for s in senders])
        self.input_sites = tuple(
            self.stream.output_site(s) for s in senders if s.kind in ("token", "position")
        )

    def _fed(self, receiver: Receiver) -> tuple[int, ...]:
        """The sources that are computed from what a receiver reads."""
        if receiver.kind == "logits":
            return ()
        if receiver.kind == "mlp":
            return (self.sources.index(f"mlp:{receiver.layer}"),)
        parts = self.stream.parts
        letter = {"q": "Q", "k": "K", "v": "V"}[receiver.kind]
        heads = [n for n in self.sources if n.startswith(f"{receiver.layer}.")]
        return tuple(
            self.sources.index(name)
            for h, name in enumerate(heads)
            if parts.group(letter, receiver.layer, h) == receiver.head  # type: ignore[arg-type]
        )

    def kind(self, name: str) -> str:
        layer, dot, rest = name.partition(".")
        if not dot:
            return name  # an MLP, the embeddings, the logits
        return f"{rest.partition('.')[2] or 'head'} of layer {layer}"

    def node(self, name: str) -> PlacedNode:
        if name == "logits":
            return WholeSite(output_site(self.model).name)
        sender = self.stream.sender(name)
        site = self.stream.output_site(sender)
        return Unit(site, sender.head) if sender.kind == "head" else WholeSite(site)

    # --- sites -----------------------------------------------------------------------------------

    @property
    def reads(self) -> tuple[str, ...]:
        return self._reads

    @cached_property
    def _reads(self) -> tuple[str, ...]:
        stream = self.stream
        senders = stream.sender_sites(s for s in stream.senders if s.kind != "bias")
        read = (s for r in self._receivers for s in (stream.stream_site(r), stream.input_site(r)))
        return tuple(dict.fromkeys([*senders, *read]))

    @property
    def slopes(self) -> tuple[str, ...]:
        return tuple(self._at_site)

    @property
    def pull_reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.stream.stream_site(r) for r in self._receivers))

    @cached_property
    def _at_site(self) -> dict[str, list[int]]:
        """The targets of each site that can be changed, in order."""
        found: dict[str, list[int]] = {}
        for i, receiver in enumerate(self._receivers):
            found.setdefault(self.stream.input_site(receiver), []).append(i)
        return found

    def source_sites(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        yield self.input_sites, sorted(self.inputs)
        together: dict[str, list[int]] = {}
        for i, sender in enumerate(self._sender):
            if i not in self.inputs:
                site = self.stream.output_site(self.stream.senders[sender])
                together.setdefault(site, []).append(i)
        for site, sources in together.items():
            yield (site,), sources

    def first_site(self, target: int) -> str:
        return self.stream.input_site(self._receivers[target])

    def starts(self, site: str) -> list[Site]:
        receiver = self._receivers[self._at_site[site][0]]
        layers = self.stream.layers
        names = [layers[receiver.layer].before]
        if receiver.kind == "logits":
            names = [self.stream.stream_site(receiver), layers[-1].before]
        return [self.model.site(name) for name in dict.fromkeys(names)]

    # --- what is computed ------------------------------------------------------------------------

    def changes(
        self,
        off: Float[Tensor, "set edge"],
        other: Mapping[str, Tensor],
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Change]:
        patches = {}
        anywhere = ((off.detach() != 0).any(0) | off.requires_grad).numpy()
        for target, into in enumerate(self.edges_into):
            if anywhere[into].any():
                table = off.new_zeros(len(off), len(self.stream.senders))
                columns = torch.from_numpy(self._sender[self.ends[into, 0]])
                patches[self._receivers[target]] = table.index_copy(1, columns, off[:, into])
        return changes_of(self.stream, patches, other, Options(), known)

    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        found, tangents = dict[str, Tensor](), dict[tuple[str, int], Tangent | None]()
        for site, targets in self._at_site.items():
            receivers = [self._receivers[t] for t in targets]
            before = self.stream.stream_site(receivers[0])
            # Queries, keys and values of a layer read the same stream through the same normalisation.
            key = before, id(norm_of(self.stream, receivers[0]))
            if key not in tangents:
                tangents[key] = tangent_of(self.stream, receivers[0], cache[before])
            found[site] = input_gradient(
                self.stream, receivers, tangents[key], gradients[site], linear
            )
        return found

    def contracted(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        pulled: Mapping[str, Tensor],
        linear: bool = False,
    ) -> Float[Tensor, "example edge"]:
        change = self._written(clean, other, linear)
        n = len(change)
        made = change.new_zeros(n, len(self.sources), len(self.targets))
        for site, targets in self._at_site.items():
            # The sources that reach a site come first among all; it is the same for all targets of the site.
            reach = 1 + int(self.ends[self.edges_into[targets[0]], 0].max())
            products = change[:, :reach].flatten(2) @ pulled[site].flatten(2).transpose(1, 2)
            made[:, :reach, targets] = products
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    # --- baselines -------------------------------------------------------------------------------

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        senders = [self.stream.senders[i] for i in self._sender]
        ends = self.ends.tolist()
        return path_norms(self.stream, [(senders[s], self._receivers[t]) for s, t in ends])

    def sizes(
        self, clean: Mapping[str, Tensor], counted: Bool[Tensor, "example position"] | None
    ) -> Float[Tensor, "example edge"]:
        nothing = {site: torch.zeros_like(value) for site, value in clean.items()}
        written = self._written(clean, nothing, linear=True)
        n = len(written)
        made = written.new_zeros(n, len(self.sources), len(self.targets))
        weights = written.new_ones(n, written.shape[2]) if counted is None else counted.to(written)
        weights = weights / weights.sum(1, keepdim=True)
        for targets in self._at_site.values():
            reach = 1 + int(self.ends[self.edges_into[targets[0]], 0].max())
            for target, given in self._given(clean, written[:, :reach], targets):
                squares = torch.einsum("espd,ep->es", given.square(), weights)
                made[:, :reach, target] = squares.sqrt()
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    def _given(
        self, clean: Mapping[str, Tensor], written: Tensor, targets: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "example source position inner"]]]:
        """What sources add to what each target of a site is given, with the scale of the normalisation held."""
        receivers = [self._receivers[t] for t in targets]
        before = clean[self.stream.stream_site(receivers[0])]
        tangent = tangent_of(self.stream, receivers[0], before)
        read = written if tangent is None else tangent.pushed(written, held=True)
        for target, receiver in zip(targets, receivers, strict=True):
            heads = receiver.kind in ("q", "k", "v")
            yield target, read @ read_matrices(self.stream, [receiver])[0] if heads else read

    def _written(
        self, clean: Mapping[str, Tensor], other: Mapping[str, Tensor], linear: bool = False
    ) -> Float[Tensor, "example source position d_model"]:
        """What each source adds to the stream in the other run less what it adds in the clean one."""
        stream, parts = self.stream, []
        for site in dict.fromkeys(
            stream.output_site(s) for s in stream.senders if s.kind != "bias"
        ):
            made = written_change(stream, site, clean[site][None], other[site][None])[0].movedim(
                2, 1
            )
            layer = stream.layer_of_heads(site)
            norm = None if layer is None else stream.norm("ln1_post", layer)
            if layer is not None and norm is not None:
                # All heads of the layer are normalised together: to first order each has a part of the change.
                before = clean[stream.before_post_norm_site(layer)][:, None]
                made = stream.measured(norm).tangent(before).pushed(made, linear)
            parts.append(made)
        return torch.cat(parts, 1)
