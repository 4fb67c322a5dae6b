"""The graph of a transformer: heads with queries, keys and values apart, and MLPs, on the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery.graphs import LIMIT, EdgeGraph, PlacedNode
from circuits.discovery.matrices import path_norms
from circuits.discovery.spans import Spans
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
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site, Unit

_SPAN = "spans of positions"
"""Under which name the span of each position lies among the tensors of a run."""


class StreamGraph(EdgeGraph):
    """The direct paths of a transformer, from what writes to the residual stream to what reads it.

    Grouped keys and values (grouped-query attention) are one target for their group of heads.

    Args:
        model: a transformer.
        spans: what each target reads is patched by itself at the positions of each span: a query's edge at the
            query's position, those of keys and values at the key's. None: at all positions together.
        limit: the most edges.

    Raises:
        ValueError: if the model's residual stream is not the sum of what its parts write, or there are more edges than
            `limit`.
    """

    def __init__(
        self, model: HookedModel, spans: Spans | None = None, *, limit: int = LIMIT
    ) -> None:
        self.model, self.spans = model, spans
        self.grain = "heads and MLPs" + ("" if spans is None else f", at the spans {spans}")
        self.stream: Stream = stream_of(model)
        senders = [s for s in self.stream.senders if s.kind != "bias"]
        self._receivers = [r for r in self.stream.receivers if r.kind not in STREAMS]
        # The targets of a receiver lie one behind the other, one for each span.
        self._n_spans = 1 if spans is None else len(spans)
        ends = [""] if spans is None else [f"@{name}" for name in spans.names]
        # The place of each source among the stream's senders, biases included.
        self._sender = np.flatnonzero([s.kind != "bias" for s in self.stream.senders])
        reach = [self.stream.reaching(r).numpy()[self._sender] for r in self._receivers]
        self._check(sum(int(r.sum()) for r in reach) * self._n_spans, limit)
        self.sources = tuple(map(str, senders))
        self.targets = tuple(f"{r}{end}" for r in self._receivers for end in ends)
        target, source = np.nonzero(np.repeat(np.stack(reach), self._n_spans, 0))
        self.ends = np.stack([source, target], 1)
        self.feeds = tuple(self._fed(r) for r in self._receivers for _ in ends)
        self.input_sites = tuple(
            self.stream.output_site(s) for s in senders if s.kind in ("token", "position")
        )

    def _check(self, n: int, limit: int) -> None:
        """Raise ValueError if there are too many edges."""
        if n <= limit:
            return
        raise ValueError(
            f"{self.model.name} has {n} edges between {self.grain}, more than {limit}; expected at most "
            f"{max(1, limit * self._n_spans // n)} spans"
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
        part, at, span = name.partition("@")
        layer, dot, rest = part.partition(".")
        if not dot:
            return name  # an MLP, the embeddings, the logits
        return f"{rest.partition('.')[2] or 'head'}{at}{span} of layer {layer}"

    def way(self, target: int) -> str:
        part, at, span = self.targets[target].partition("@")
        letter = part.rpartition(".")[2] if part.count(".") == 2 else ""
        return f"{letter}{at}{span}"

    def node(self, name: str) -> PlacedNode:
        if name.partition("@")[0] == "logits":
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
        """The receivers at each site that can be changed, in order."""
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
        return self.stream.input_site(self._receivers[target // self._n_spans])

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
        anywhere = (off.detach() != 0).any(0).numpy()
        shape = len(off), len(self.stream.senders), self._n_spans
        for receiver, (edges, places) in zip(self._receivers, self._tables, strict=True):
            if anywhere[edges].any():
                table = off.new_zeros(len(off), shape[1] * shape[2])
                table = table.index_copy(1, places, off[:, edges])
                patches[receiver] = table if self.spans is None else table.reshape(shape)
        options = Options() if self.spans is None else Options(span=other[_SPAN])
        return changes_of(self.stream, patches, other, options, known)

    @cached_property
    def _tables(self) -> list[tuple[slice, Int[Tensor, " edge"]]]:
        """For each receiver its edges, and their places in its table of senders and spans."""
        n, found = self._n_spans, []
        first = np.searchsorted(self.ends[:, 1], np.arange(len(self._receivers) + 1) * n)
        for start, stop in pairwise(first.tolist()):
            source, target = self.ends[start:stop].T
            found.append(
                (slice(start, stop), torch.from_numpy(self._sender[source] * n + target % n))
            )
        return found

    def placed(self, task: Task, part: TaskBatch) -> dict[str, Tensor]:
        return {} if self.spans is None else {_SPAN: self.spans.index(task, part)}

    def _inside(
        self, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "example position span"] | None:
        """Which positions are in which span; None if there are no spans."""
        if self.spans is None:
            return None
        return torch.nn.functional.one_hot(tensors[_SPAN], self._n_spans).float()

    def _targets(self, receivers: Sequence[int]) -> list[int]:
        """The numbers of the targets of some receivers."""
        n = self._n_spans
        return [r * n + k for r in receivers for k in range(n)]

    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        found, tangents = dict[str, Tensor](), dict[tuple[str, int], Tangent | None]()
        for site, numbers in self._at_site.items():
            receivers = [self._receivers[r] for r in numbers]
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
        change, inside = self._written(clean, other, linear), self._inside(clean)
        made = change.new_zeros(len(change), len(self.sources), len(self.targets))
        for site, receivers in self._at_site.items():
            targets, gradient = self._targets(receivers), pulled[site]
            if inside is not None:
                own = inside.to(gradient).movedim(2, 1)[:, None, ..., None]
                gradient = (gradient[:, :, None] * own).flatten(1, 2)
            # The sources that reach a site come first among all; it is the same for all targets of the site.
            reach = 1 + int(self.ends[self.edges_into[targets[0]], 0].max())
            products = change[:, :reach].flatten(2) @ gradient.flatten(2).transpose(1, 2)
            made[:, :reach, targets] = products
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    # --- baselines -------------------------------------------------------------------------------

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        senders, n = [self.stream.senders[i] for i in self._sender], self._n_spans
        ends = self.ends.tolist()
        return path_norms(self.stream, [(senders[s], self._receivers[t // n]) for s, t in ends])

    def sizes(
        self, clean: Mapping[str, Tensor], counted: Bool[Tensor, "example position"] | None
    ) -> Float[Tensor, "example edge"]:
        nothing = {site: torch.zeros_like(value) for site, value in clean.items()}
        written = self._written(clean, nothing, linear=True)
        n, inside = self._n_spans, self._inside(clean)
        made = written.new_zeros(len(written), len(self.sources), len(self.targets))
        weights = written.new_ones(len(written), written.shape[2], n)
        weights = weights if counted is None else weights * counted.to(weights)[..., None]
        weights = weights if inside is None else weights * inside.to(weights)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        for receivers in self._at_site.values():
            reach = 1 + int(self.ends[self.edges_into[receivers[0] * n], 0].max())
            for receiver, given in self._given(clean, written[:, :reach], receivers):
                squares = torch.einsum("espd,epk->esk", given.square(), weights)
                made[:, :reach, self._targets([receiver])] = squares.sqrt()
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    def _given(
        self, clean: Mapping[str, Tensor], written: Tensor, numbers: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "example source position inner"]]]:
        """What sources add to what each receiver of a site is given, with the scale of the normalisation held."""
        receivers = [self._receivers[r] for r in numbers]
        before = clean[self.stream.stream_site(receivers[0])]
        tangent = tangent_of(self.stream, receivers[0], before)
        read = written if tangent is None else tangent.pushed(written, held=True)
        for number, receiver in zip(numbers, receivers, strict=True):
            heads = receiver.kind in ("q", "k", "v")
            yield number, read @ read_matrices(self.stream, [receiver])[0] if heads else read

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
