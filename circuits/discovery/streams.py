"""The graph of a transformer: heads with queries, keys and values apart, and MLPs, on the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuits.discovery.graphs import LIMIT, EdgeGraph, PlacedNode
from circuits.discovery.grouped import SharedHeads
from circuits.discovery.matrices import path_norms
from circuits.discovery.spans import Spans
from circuits.discovery.splitting import check_neurons_read, parse_layers
from circuits.discovery.splitting import latents as latents_of
from circuits.discovery.splitting import neurons as neurons_of
from circuits.discovery.stored import Cost
from circuits.experiments.patched_runs import Options, changes_of
from circuits.graph.circuit import WholeSite
from circuits.hooks import Change
from circuits.memory import in_bytes
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.norms import Tangent
from circuits.models.paths.contributions import (
    input_gradient,
    norm_of,
    read_matrices,
    tangent_of,
    written_change,
)
from circuits.models.paths.parts import PartsChange, Split
from circuits.models.paths.residual import NEURONS, STREAMS, Receiver, Sender, Stream
from circuits.models.paths.routes import stream_of
from circuits.tasks.targets import output_site
from circuits.tasks.task import Task, TaskBatch
from circuits.units import Site, Unit, Units

_SPAN = "spans of positions"
"""Under which name the span of each position lies among the tensors of a run."""

_NUMBERS = 2**23
"""How many numbers a tensor has at most as scores of a large graph are computed."""

KeysValues = Literal["group", "head"]
"""Whether keys and values that a group of heads shares are one target for the group, or one for each head."""

BY_HEAD = "heads and MLPs, with keys and values by query head"
"""The grain of a graph in which heads that share keys or values have targets of their own."""


class StreamGraph(EdgeGraph):
    """The direct paths of a transformer, from what writes to the residual stream to what reads it.

    Args:
        model: a transformer.
        kv: what grouped keys and values (grouped-query attention) are: one target for their group of heads, or one for
            each query head, whose edges change the keys or values that this head alone reads (as MIB and the authors
            of EAP-IG have it). Where no heads share any, both are the same graph.
        spans: what each target reads is patched by itself at the positions of each span: a query's edge at the
            query's position, those of keys and values at the key's. None: at all positions together.
        neurons: the layers of MLPs whose neurons are sources, such as `3,5-7` or `all`. What an MLP is given feeds all
            of its neurons.
        neuron_targets: the layers of MLPs whose neurons are targets: an edge into one changes what it is given before
            its nonlinearity (in a gated MLP, and what that is multiplied with), and feeds the neuron alone if neurons
            are sources, too, or the MLP.
        latents: latents of attached autoencoders (`sae/NAME`, all or some) that are sources, each with what is left of
            their site's tensor as one more, in the place of the MLP or of the heads of the layer.
        limit: the most edges.

    Raises:
        KeyError: if there is no such autoencoder.
        ValueError: if the model's residual stream is not the sum of what its parts write, keys and values are asked for
            by head where weights mix the heads that share them, neurons or latents do not add up to what is written,
            or there are more edges than `limit`.
    """

    def __init__(
        self,
        model: HookedModel,
        kv: KeysValues = "group",
        *,
        spans: Spans | None = None,
        neurons: str = "",
        neuron_targets: str = "",
        latents: Sequence[Units] = (),
        limit: int = LIMIT,
    ) -> None:
        if kv not in get_args(KeysValues):
            raise ValueError(f"kv {kv!r}: expected group or head")
        self.model, self.spans = model, spans
        whole = stream_of(model)
        self._shared = _sharing(whole) if kv == "head" else {}
        self._read_by_neuron = read_by_neurons(whole, neuron_targets) if neuron_targets else ()
        self.stream: Stream = split_stream(whole, neurons, latents).with_neurons(
            self._read_by_neuron
        )
        self.grain = _grain(self.stream, spans, BY_HEAD if self._shared else "heads and MLPs")
        senders = [s for s in self.stream.senders if s.kind != "bias"]
        named = dict(self._named_receivers())
        self._receivers, self._names = list(named.values()), tuple(named)
        # The targets of a receiver lie one behind the other, one for each span.
        self._n_spans = 1 if spans is None else len(spans)
        ends = [""] if spans is None else [f"@{name}" for name in spans.names]
        # The place of each source among the stream's senders, biases included.
        self._sender = np.flatnonzero([s.kind != "bias" for s in self.stream.senders])
        # The sources that reach a target are the first ones.
        reach = [int(self.stream.reaching(r).numpy()[self._sender].sum()) for r in self._receivers]
        self._check([n * self._n_spans for n in reach], limit)
        self.sources = tuple(map(str, senders))
        self.targets = tuple(f"{name}{end}" for name in named for end in ends)
        reach = np.repeat(reach, self._n_spans)
        # Two columns of small integers: of 10^7 edges they are 80 MB.
        self.ends = np.empty((int(reach.sum()), 2), np.int32)
        self.ends[:, 1] = np.repeat(np.arange(len(reach), dtype=np.int32), reach)
        for (start, stop), n in zip(pairwise(self.bounds), reach.tolist(), strict=True):
            self.ends[start:stop, 0] = np.arange(n)
        self.feeds = tuple(self._fed(name, r) for name, r in named.items() for _ in ends)
        self.input_sites = tuple(
            self.stream.output_site(s) for s in senders if s.kind in ("token", "position")
        )

    def _check(self, counts: Sequence[int], limit: int) -> None:
        """Raise ValueError if there are too many edges, given how many lead to each receiver."""
        n = sum(counts)
        if n <= limit:
            return
        parts = sum(len(split.names) for split in self.stream.splits)
        fits = f"a limit of {n} or more"
        if n > LIMIT:
            cost = Cost.of(n, 1)
            fits += f", about {in_bytes(cost.memory)} of memory and {in_bytes(cost.disk)} of disk an example"
        if self.spans is not None:
            fits = f"at most {max(1, limit * self._n_spans // n)} spans, or {fits}"
        if parts:
            # Each part has an edge to every receiver behind it: at most as many as there are receivers.
            share = int(parts * limit / n)
            fits = f"about {share} neurons or latents in place of {parts}, or {fits}"
        raise ValueError(
            f"{self.model.name} has {n} edges between {self.grain}, more than {limit}; expected {fits}"
        )

    def _named_receivers(self) -> Iterator[tuple[str, Receiver]]:
        """The targets' names, each with what it reads the stream as: several have the keys of their group."""
        for receiver in self.stream.receivers:
            shared = self._shared.get(receiver.layer)
            by_neuron = receiver.kind == "mlp" and receiver.layer in self._read_by_neuron
            if receiver.kind in (*STREAMS, "neuron_linear") or by_neuron:
                continue
            if shared is None or receiver.kind not in ("q", *shared.letters):
                yield str(receiver), receiver
            elif receiver.kind == "q":
                yield str(receiver), receiver
                for letter in shared.letters:
                    group = shared.group(letter, receiver.head)
                    own = Receiver(letter, receiver.layer, receiver.head)  # type: ignore[arg-type]
                    yield str(own), replace(own, head=group)

    def _by_head(self, receiver: Receiver) -> bool:
        """Whether heads that share what a receiver computes have targets of their own."""
        shared = self._shared.get(receiver.layer)
        return shared is not None and receiver.kind in shared.letters

    def _fed(self, name: str, receiver: Receiver) -> tuple[int, ...]:
        """The sources that are computed from what a target reads."""
        if receiver.kind == "logits":
            return ()
        of_mlp = receiver.kind in ("mlp", "neuron")
        writers = self.stream.writers(receiver.layer, "mlp" if of_mlp else "attention")
        own = range(writers.columns.start, writers.columns.stop)
        if receiver.kind == "neuron" and writers.split is not None and not writers.split.whole:
            own = own[receiver.head : receiver.head + 1]
        if writers.split is None and not of_mlp:
            letter = {"q": "Q", "k": "K", "v": "V"}[receiver.kind]
            group = self.stream.parts.group
            by_head, at = self._by_head(receiver), int(name.split(".")[1])
            own = [
                column for head, column in enumerate(own)
                if (head == at if by_head else group(letter, receiver.layer, head) == receiver.head)  # type: ignore[arg-type]
            ]  # fmt: skip
        return tuple(np.searchsorted(self._sender, own).tolist())

    def kind(self, name: str) -> str:
        return self._kinds[name]

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """What each source and target is, and in which layer."""
        found = dict[str, str]()
        for name, number in zip(self.sources, self._sender.tolist(), strict=True):
            sender, kind = self.stream.senders[number], name
            if sender.kind == "head":
                kind = f"head of layer {sender.layer}"
            elif sender.kind == "part":
                kind = f"part of {sender.name}"
            found[name] = kind
        for i, name in enumerate(self.targets):
            receiver, span = self._receivers[i // self._n_spans], name.partition("@")
            many = receiver.kind in ("q", "k", "v", "neuron")
            kind = f"{receiver.kind}{''.join(span[1:])} of layer {receiver.layer}"
            found[name] = kind if many else name
        return found

    def way(self, target: int) -> str:
        receiver, span = self._receivers[target // self._n_spans], self.targets[target]
        letter = receiver.kind if receiver.kind in ("q", "k", "v") else ""
        return letter + "".join(span.partition("@")[1:])

    def node(self, name: str) -> PlacedNode:
        if name.partition("@")[0] == "logits":
            return WholeSite(output_site(self.model).name)
        sender = self.stream.senders[self._sender[self._source_of[name]]]
        site = self.stream.output_site(sender)
        if sender.kind == "rest":
            return WholeSite(f"{sender.name}.error")
        return Unit(site, sender.head) if sender.kind in ("head", "part") else WholeSite(site)

    @cached_property
    def _source_of(self) -> dict[str, int]:
        """The number of each source by its name."""
        return {name: i for i, name in enumerate(self.sources)}

    # --- sites -----------------------------------------------------------------------------------

    @property
    def reads(self) -> tuple[str, ...]:
        return self._reads

    @cached_property
    def _reads(self) -> tuple[str, ...]:
        stream = self.stream
        senders = stream.sender_sites(s for s in stream.senders if s.kind != "bias")
        firsts = [(self._receivers[numbers[0]], site) for site, numbers in self._at_site.items()]
        read = (s for r, site in firsts for s in (stream.stream_site(r), site))
        return tuple(dict.fromkeys([*senders, *read]))

    @property
    def slopes(self) -> tuple[str, ...]:
        return tuple(self._at_site)

    @property
    def pull_reads(self) -> tuple[str, ...]:
        firsts = (self._receivers[numbers[0]] for numbers in self._at_site.values())
        return tuple(dict.fromkeys(map(self.stream.stream_site, firsts)))

    @cached_property
    def _at_site(self) -> dict[str, list[int]]:
        """The receivers at each site that can be changed, in order; neurons of gated MLPs are at two."""
        found: dict[tuple[str, int], list[int]] = {}
        for i, receiver in enumerate(self._receivers):
            for own in self._apart(receiver):
                found.setdefault((own.kind, own.layer), []).append(i)
        named: dict[str, list[int]] = {}
        for (kind, layer), numbers in found.items():
            named.setdefault(self.stream.input_site(Receiver(kind, layer)), []).extend(numbers)  # type: ignore[arg-type]
        return named

    def _apart(self, receiver: Receiver) -> tuple[Receiver, ...]:
        """What a receiver reads the stream as: neurons of a gated MLP do twice."""
        if receiver.kind != "neuron" or receiver.layer not in self._gated:
            return (receiver,)
        return receiver, replace(receiver, kind="neuron_linear")

    @cached_property
    def _gated(self) -> frozenset[int]:
        """The layers whose neurons are targets and read the stream twice."""
        return frozenset(r.layer for r in self.stream.receivers if r.kind == "neuron_linear")

    def _at(self, site: str, numbers: Sequence[int]) -> list[Receiver]:
        """Receivers, as which they are at a site."""
        found = [self._receivers[i] for i in numbers]
        if found[0].kind == "neuron" and site != self.stream.input_site(found[0]):
            return [replace(r, kind="neuron_linear") for r in found]
        return found

    def source_sites(self) -> Iterator[tuple[tuple[str, ...], list[int]]]:
        yield self.input_sites, sorted(self.inputs)
        together: dict[str, list[int]] = {}
        for i, sender in enumerate(self._sender):
            if i not in self.inputs:
                together.setdefault(self._mixed_at(self.stream.senders[sender]), []).append(i)
        for site, sources in together.items():
            yield (site,), sources

    def _mixed_at(self, sender: Sender) -> str:
        """The site at which what a sender writes can be changed together with what others write there."""
        site = self.stream.output_site(sender)
        return next((s.whole or site for s in self.stream.splits if s.site == site), site)

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
        patches: dict[Receiver, Tensor] = {}
        anywhere = ((off.detach() != 0).any(0) | off.requires_grad).numpy()
        shape = len(off), len(self.stream.senders), self._n_spans
        for number, (edges, places) in enumerate(self._tables):
            if anywhere[edges].any():
                receiver, given = self._receivers[number], off[:, edges]
                if self._by_head(receiver):
                    given = given * self._own_rows(number, len(off))[:, None]
                table = off.new_zeros(len(off), shape[1] * shape[2])
                table = table.index_copy(1, places, given)
                table = table if self.spans is None else table.reshape(shape)
                for own in self._apart(receiver):
                    patches[own] = patches[own] + table if own in patches else table
        options = Options() if self.spans is None else Options(span=other[_SPAN])
        return changes_of(self.stream, patches, other, options, known)

    @cached_property
    def _tables(self) -> list[tuple[slice, Int[Tensor, " edge"]]]:
        """For each receiver its edges, and their places in its table of senders and spans."""
        n, found = self._n_spans, []
        known: dict[int, Tensor] = {}  # receivers that the same sources reach share places
        for start, stop in pairwise(self.bounds[::n]):
            if stop - start not in known:
                source, target = self.ends[start:stop].T
                known[stop - start] = torch.from_numpy(self._sender[source] * n + target % n)
            found.append((slice(start, stop), known[stop - start]))
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

    # --- keys and values by query head -----------------------------------------------------------

    def _own_rows(self, number: int, n: int) -> Float[Tensor, " row"]:
        """1 for the rows of a pass in which the keys or values of a receiver's head are those of its group."""
        layer, head, _ = self._names[number].split(".")
        rows, own = self.rows(self.slopes), self._shared[int(layer)].row[int(head)]
        return (torch.arange(n) % rows == own).float()

    def rows(self, sites: Iterable[str]) -> int:
        receivers = [self._receivers[self._at_site[site][0]] for site in sites]
        if not any(map(self._by_head, receivers)):
            return 1
        return max(shared.rows for shared in self._shared.values())

    def joined(self, sites: Iterable[str], n_sets: int) -> dict[str, Change]:
        receivers = [self._receivers[self._at_site[site][0]] for site in sites]
        layers = dict.fromkeys(r.layer for r in receivers if self._by_head(r))
        rows = self.rows(self.slopes)
        return {self.stream.heads_site(i): self._shared[i].joined(n_sets, rows) for i in layers}

    @property
    def behind(self) -> tuple[str, ...]:
        return tuple(map(self.stream.heads_site, self._shared))

    def separated(
        self,
        read: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        found = {}
        for layer, shared in self._shared.items():
            site = self.stream.heads_site(layer)
            names = {x: self._input_site(x, layer) for x in shared.letters}
            own = {letter: leaves[name] for letter, name in names.items()}
            made = shared.separated(read[site], gradients[site], own)
            found |= {names[letter]: slope for letter, slope in made.items()}
        return found

    def _input_site(self, letter: str, layer: int) -> str:
        return self.stream.input_site(Receiver(letter, layer))  # type: ignore[arg-type]

    # --- gradients -------------------------------------------------------------------------------

    def pulled(
        self, cache: Mapping[str, Tensor], gradients: Mapping[str, Tensor], linear: bool = False
    ) -> dict[str, Tensor]:
        found, tangents = dict[str, Tensor](), dict[tuple[str, int], Tangent | None]()
        for site, numbers in self._at_site.items():
            receivers = self._at(site, numbers)
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
        moved, inside = self._moved(clean, other), self._inside(clean)
        change = self._written(clean, other, moved, linear)
        tangents = {split.site: self._after(split, clean) for split in self.stream.splits}
        made = change.new_zeros(len(change), len(self.sources), len(self.targets))
        for site, receivers in self._at_site.items():
            targets, gradient = self._targets(receivers), pulled[site]
            if inside is not None:
                own = inside.to(gradient).movedim(2, 1)[:, None, ..., None]
                gradient = (gradient[:, :, None] * own).flatten(1, 2)
            # The sources that reach a site come first among all; it is the same for all targets of the site.
            reach = 1 + int(self.ends[self.edges_into[targets[0]], 0].max())
            whole = self._whole[: int(np.searchsorted(self._whole, reach))]
            products = change[:, : len(whole)].flatten(2) @ gradient.flatten(2).transpose(1, 2)
            rows = whole[:, None] if self.stream.splits else slice(reach)
            again = self._at(site, receivers)[0].kind == "neuron_linear"
            made[:, rows, targets] = products + made[:, rows, targets] if again else products
            for name, some in self._part_sources.items():
                if some.start < reach:
                    parts = _products(moved[name], gradient, tangents[name], linear)
                    parts = parts + made[:, some, targets] if again else parts
                    made[:, some, targets] = parts
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    def pieces(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        slopes: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        linear: bool = False,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        work = _Pieces(self, clean, other, slopes, linear)
        together: dict[int, list[str]] = {}
        for site, numbers in self._at_site.items():
            together.setdefault(numbers[0], []).append(site)
        for sites in together.values():
            numbers = self._at_site[sites[0]]
            size = len(numbers)
            if self._receivers[numbers[0]].kind == "neuron":
                size = work.size(numbers[0])
            for start in range(0, len(numbers), size):
                yield from work.of(sites, numbers[start : start + size])

    @cached_property
    def _whole(self) -> Int[np.ndarray, " source"]:
        """The numbers of the sources that are no parts."""
        return np.flatnonzero([self.stream.senders[i].kind != "part" for i in self._sender])

    @cached_property
    def _part_sources(self) -> dict[str, slice]:
        """The numbers of the sources that are parts, by the site of their activations."""
        found = dict[str, slice]()
        for split in self.stream.splits:
            first = self._source_of[split.names[0]]
            found[split.site] = slice(first, first + len(split.units))
        return found

    def _moved(
        self, clean: Mapping[str, Tensor], other: Mapping[str, Tensor]
    ) -> dict[str, PartsChange]:
        """The changes of parts between two runs, by the site of their activations."""
        return {split.site: split.change(clean, other) for split in self.stream.splits}

    def _after(self, split: Split, clean: Mapping[str, Tensor]) -> Tangent | None:
        """The derivative of the normalisation that parts go through, as `tangent_of` has it."""
        if split.norm is None:
            return None
        return self.stream.measured(split.norm).tangent(clean[split.before][:, None])

    # --- baselines -------------------------------------------------------------------------------

    def weight_norms(self) -> Float[np.ndarray, " edge"]:
        senders = [self.stream.senders[i] for i in self._sender]
        found, n = np.empty(len(self)), self._n_spans
        for number, norms in enumerate(path_norms(self.stream, senders, self._receivers)):
            for target in range(number * n, number * n + n):
                start, stop = self.bounds[target : target + 2]
                found[start:stop] = norms[: stop - start]
        return found

    def sizes(
        self, clean: Mapping[str, Tensor], counted: Bool[Tensor, "example position"] | None
    ) -> Float[Tensor, "example edge"]:
        nothing = {site: torch.zeros_like(value) for site, value in clean.items()}
        moved, n, inside = self._moved(clean, nothing), self._n_spans, self._inside(clean)
        written = self._written(clean, nothing, moved, linear=True)
        made = written.new_zeros(len(written), len(self.sources), len(self.targets))
        weights = written.new_ones(len(written), written.shape[2], n)
        weights = weights if counted is None else weights * counted.to(weights)[..., None]
        weights = weights if inside is None else weights * inside.to(weights)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        for site, receivers in self._at_site.items():
            reach = 1 + int(self.ends[self.edges_into[receivers[0] * n], 0].max())
            whole = self._whole[: int(np.searchsorted(self._whole, reach))]
            # Of a gated neuron the last site counts, as of its weights: what does not pass the activation function.
            for receiver, given in self._given(clean, written[:, : len(whole)], receivers, site):
                squares = torch.einsum("espd,epk->esk", given.square(), weights)
                made[:, whole[:, None], self._targets([receiver])] = squares.sqrt()
                for split in self.stream.splits:
                    own = self._part_sources[split.site]
                    if own.start < reach:
                        read = self._at(site, [receiver])[0]
                        sizes = self._part_sizes(split, moved[split.site], clean, read, weights)
                        made[:, own, self._targets([receiver])] = sizes
        source, target = torch.from_numpy(self.ends).T
        return made[:, source, target]

    def _part_sizes(
        self,
        split: Split,
        moved: PartsChange,
        clean: Mapping[str, Tensor],
        receiver: Receiver,
        weights: Tensor,
    ) -> Float[Tensor, "example part span"]:
        """How large what parts add to what a receiver is given is, with the scales of normalisations held.

        Parts write along one direction each, so that a normalisation's scale is a factor at each position.
        """
        stream = self.stream
        read, scale = split.directions.double(), moved.activations.double()
        passed = [
            (split.norm, split.before),
            (norm_of(stream, receiver), stream.stream_site(receiver)),
        ]
        for norm, site in passed:
            if norm is not None and not isinstance(norm, nn.Identity):
                measured = stream.measured(norm)
                read, scale = measured.linear(read), scale * measured.factor(clean[site])
        if receiver.kind in ("q", "k", "v", *NEURONS):
            read = read @ read_matrices(stream, [receiver])[0].double()
        squares = torch.einsum("epn,epk->enk", scale.square(), weights.double())
        return (squares.sqrt() * read.norm(dim=1)[:, None]).to(weights)

    def _given(
        self, clean: Mapping[str, Tensor], written: Tensor, numbers: Sequence[int], site: str = ""
    ) -> Iterator[tuple[int, Float[Tensor, "example source position inner"]]]:
        """What sources add to what each receiver of a site is given, with the scale of the normalisation held."""
        receivers = self._at(site or self.stream.input_site(self._receivers[numbers[0]]), numbers)
        before = clean[self.stream.stream_site(receivers[0])]
        tangent = tangent_of(self.stream, receivers[0], before)
        read = written if tangent is None else tangent.pushed(written, held=True)
        for number, receiver in zip(numbers, receivers, strict=True):
            heads = receiver.kind in ("q", "k", "v", *NEURONS)
            yield number, read @ read_matrices(self.stream, [receiver])[0] if heads else read

    def _written(
        self,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        moved: Mapping[str, PartsChange],
        linear: bool = False,
    ) -> Float[Tensor, "example source position d_model"]:
        """What each source that is no part adds to the stream in the other run less what it adds in the clean one."""
        stream, parts = self.stream, []
        for site in dict.fromkeys(
            stream.output_site(s) for s in stream.senders if s.kind != "bias"
        ):
            if site in moved:
                rest = moved[site].rest
                split = next(s for s in stream.splits if s.site == site)
                tangent = self._after(split, clean)
                if rest is not None:
                    own = rest[:, None]
                    parts.append(own if tangent is None else tangent.pushed(own, linear))
                continue
            made = written_change(stream, site, clean[site][None], other[site][None])[0]
            made = made.transpose(0, 1)
            layer = stream.layer_of_heads(site)
            norm = None if layer is None else stream.norm("ln1_post", layer)
            if layer is not None and norm is not None:
                # All heads of the layer are normalised together: to first order each has a part of the change.
                before = clean[stream.before_post_norm_site(layer)][:, None]
                made = stream.measured(norm).tangent(before).pushed(made, linear)
            parts.append(made)
        return torch.cat(parts, 1)


class _Pieces:
    """The scores of a large graph, some receivers at a time; see `EdgeGraph.pieces`."""

    def __init__(
        self,
        graph: StreamGraph,
        clean: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        slopes: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        linear: bool,
    ) -> None:
        self.graph, self.slopes, self.linear = graph, slopes, linear
        self.moved, self.inside = graph._moved(clean, other), graph._inside(clean)
        self.change = graph._written(clean, other, self.moved, linear)
        self.after = {s.site: graph._after(s, clean) for s in graph.stream.splits}
        self.tangents: dict[tuple[int, str, int], Tangent | None] = {}

    def size(self, number: int) -> int:
        """How many receivers like one are taken at a time."""
        n, _, length, width = self.change.shape
        start, stop = self.graph.bounds[number * self.graph._n_spans :][:2]
        each = n * self.graph._n_spans * max(length * width, stop - start)
        return max(1, _NUMBERS // each)

    def of(
        self, sites: Sequence[str], numbers: Sequence[int]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """The scores of all edges into some receivers, which are at these sites."""
        graph, targets = self.graph, self.graph._targets(numbers)
        start, stop = graph.bounds[targets[0] : targets[0] + 2]
        block = self.change.new_zeros(len(self.change), stop - start, len(targets))
        for site in sites:
            self._add(block, self._gradient(site, numbers))
        everyone = slice(0, len(block))
        first = 0
        # Targets that follow one another have edges that do.
        for place in range(1, len(targets) + 1):
            if place == len(targets) or targets[place] != targets[place - 1] + 1:
                edges = slice(graph.bounds[targets[first]], graph.bounds[targets[place - 1] + 1])
                yield everyone, edges, block[..., first:place].transpose(1, 2).flatten(1)
                first = place

    def _gradient(
        self, site: str, numbers: Sequence[int]
    ) -> Float[Tensor, "example target position d_model"]:
        """The mean gradient at what some receivers read."""
        graph, receivers = self.graph, self.graph._at(site, numbers)
        before, norm = graph.stream.stream_site(receivers[0]), norm_of(graph.stream, receivers[0])
        total: Tensor | None = None
        for i, (cache, gradients) in enumerate(self.slopes):
            key = i, before, id(norm)
            if key not in self.tangents:
                self.tangents[key] = tangent_of(graph.stream, receivers[0], cache[before])
            own = input_gradient(
                graph.stream, receivers, self.tangents[key], gradients[site], self.linear
            )
            total = own if total is None else total + own
        assert total is not None, "there is a run"
        mean = total / len(self.slopes)
        if self.inside is None:
            return mean
        inside = self.inside.to(mean).movedim(2, 1)[:, None, ..., None]
        return (mean[:, :, None] * inside).flatten(1, 2)

    def _add(self, block: Float[Tensor, "example source target"], gradient: Tensor) -> None:
        """Add to scores what sources carry to targets times the gradient there."""
        graph, reach = self.graph, block.shape[1]
        whole = graph._whole[: int(np.searchsorted(graph._whole, reach))]
        block[:, whole] += self.change[:, : len(whole)].flatten(2) @ gradient.flatten(2).transpose(
            1, 2
        )
        for name, some in graph._part_sources.items():
            if some.start < reach:
                block[:, some] += _products(
                    self.moved[name], gradient, self.after[name], self.linear
                )


def split_stream(stream: Stream, neurons: str, latents: Sequence[Units]) -> Stream:
    """A stream with neurons and latents as senders.

    Raises:
        KeyError: if there is no such autoencoder.
        ValueError: if there are no such layers, parts do not add up, or two split the same.
    """
    splits = [neurons_of(stream, i) for i in parse_layers(neurons, stream)] if neurons else []
    splits += [latents_of(stream, units) for units in latents]
    known: dict[tuple[int, str], Split] = {}
    for split in splits:
        before = known.setdefault((split.layer, split.writing), split)
        if before is not split:
            what = "the MLP" if split.writing == "mlp" else "attention"
            raise ValueError(
                f"{before.name} and {split.name} both split {what} of layer {split.layer}: expected one of them"
            )
    return stream.split(splits) if splits else stream


def read_by_neurons(stream: Stream, text: str) -> tuple[int, ...]:
    """The layers of a list, whose MLPs read the stream by neuron.

    Raises:
        ValueError: if it is no such list, or the neurons of a layer do not read what its MLP is given by matrices.
    """
    layers = parse_layers(text, stream, "neuron_targets")
    for layer in layers:
        check_neurons_read(stream, layer)
    return layers


def _sharing(stream: Stream) -> dict[int, SharedHeads]:
    """The layers with heads that share keys or values."""
    found = {i: SharedHeads.of(stream, i) for i in range(stream.n_layers)}
    return {layer: shared for layer, shared in found.items() if shared is not None}


def _grain(stream: Stream, spans: Spans | None, heads: str) -> str:
    """What the parts are, in words."""
    said = [heads]
    for split in stream.splits:
        if split.whole:
            n = stream.model.site(split.site).n_units
            said.append(f"{len(split.units)} of {n} latents of {split.name}")
    layers = [str(split.layer) for split in stream.splits if not split.whole]
    if layers:
        said.append(f"neurons of {'layer' if len(layers) == 1 else 'layers'} {', '.join(layers)}")
    read = dict.fromkeys(str(r.layer) for r in stream.receivers if r.kind == "neuron")
    if read:
        said.append(
            f"neurons of {'layer' if len(read) == 1 else 'layers'} {', '.join(read)} as targets"
        )
    return " and ".join(said) + ("" if spans is None else f" at spans {spans}")


def _products(
    moved: PartsChange,
    gradient: Float[Tensor, "example target position d_model"],
    tangent: Tangent | None,
    linear: bool,
) -> Float[Tensor, "example part target"]:
    """The change of each part times the gradient at targets, summed over positions and dimensions."""
    found = []
    for own in gradient.unbind(1):
        given = own if tangent is None else tangent.pulled(own[:, None], linear)[:, 0]
        along = given @ moved.directions.to(given).T
        found.append((along * moved.activations).sum(1))
    return torch.stack(found, 2)
