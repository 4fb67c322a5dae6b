"""Runs a transformer with patched paths, many patches in one pass: the machinery of `patching`.

The patches of one pass (sets of paths) are stacked along the batch, each with all examples in order. Numbers that are
compared come from the same rows of batches of the same size, so that a patch without effect changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import main_output
from circuits.models.paths.contributions import input_change, position_embedding, stream_change
from circuits.models.paths.residual import STREAMS, Path, Receiver, Sender, Stream
from circuits.progress import Progress

Direction = Literal["noising", "denoising"]


MEMORY = 2**29
"""A rough limit for the tensors of one pass, in bytes."""

_WIDE_TENSORS = 8
"""How many tensors of the model's largest width are alive at the same time, roughly."""


@dataclass(frozen=True)
class Options:
    """How paths are patched.

    Attributes:
        through_mlps: MLPs between sender and receiver recompute.
        where: at which positions of which examples senders are replaced; everywhere if None.
        hold_norms: the normalisation before a receiver keeps its scale instead of being recomputed.
    """

    through_mlps: bool = False
    where: Tensor | None = None
    hold_norms: bool = False


@dataclass(frozen=True, eq=False)
class RunPair:
    """Tokens and positions of the run that is patched, and of the other run, which contributions come from."""

    stream: Stream
    tokens: Tensor
    ids: Tensor | None
    other_tokens: Tensor
    other_ids: Tensor | None

    @classmethod
    def of(
        cls,
        stream: Stream,
        clean: tuple[Tensor, Tensor | None],
        corrupted: tuple[Tensor, Tensor | None],
        direction: Direction,
    ) -> RunPair:
        if direction not in ("noising", "denoising"):
            raise ValueError(f"direction {direction!r}: expected noising or denoising")
        if clean[0].shape != corrupted[0].shape:
            raise ValueError(
                f"corrupted has shape {tuple(corrupted[0].shape)}: expected that of clean, {tuple(clean[0].shape)}"
            )
        # Noising puts the corrupted run's contributions into the clean one, denoising the reverse.
        base, other = (clean, corrupted) if direction == "noising" else (corrupted, clean)
        for tokens in (base[0], other[0]):
            stream.model.check(tokens)
        return cls(
            stream, base[0], positions_of(stream, *base), other[0], positions_of(stream, *other)
        )

    def patched(
        self,
        sets: Sequence[frozenset[Path]],
        options: Options,
        rows: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each set of paths: the logits of the patched run, of the same run unpatched, and of the other run.

        Raises:
            ValueError: if `where` does not fit the tokens.
        """
        n, where = len(self.tokens), options.where
        if where is not None and where.shape != self.tokens.shape:
            raise ValueError(
                f"where has shape {tuple(where.shape)}: expected that of the tokens, {tuple(self.tokens.shape)}"
            )
        each = max(1, min(len(sets), (rows or self._rows()) // n))
        model = self.stream.model
        used = self.stream.sender_sites({s for group in sets for s, _ in group})
        tokens, others = self.tokens.repeat(each, 1), self.other_tokens.repeat(each, 1)
        own_positions = at_positions(self.stream, _repeated(self.ids, each, n))
        other_positions = at_positions(self.stream, _repeated(self.other_ids, each, n))
        # The other run in a batch of the same size as the patched one, though all its copies are alike: another size
        # would round differently, and c' - c would not be zero where both runs agree.
        cache = model.run(others, read=used, edits=other_positions)
        source = main_output(cache.output)
        base = model.logits(tokens, own_positions)
        for start in range(0, len(sets), each):
            some = [*sets[start : start + each]]
            # The last pass is filled up with empty sets: kernels round differently for other batch sizes.
            some += [frozenset()] * (each - len(some))
            changes = changes_of(self.stream, some, cache, options)
            logits = model.logits(tokens, _merged(self.stream.model, own_positions, changes))
            for i in range(min(each, len(sets) - start)):
                place = slice(i * n, (i + 1) * n)
                yield logits[place], base[place], source[place]
            if progress is not None:
                progress(min(start + each, len(sets)), len(sets))

    def _rows(self) -> int:
        """How many rows fit into one pass."""
        # Bytes for each row = 4 (float32) x positions x numbers at each position: what every sender writes and every
        # receiver sees, in both runs, plus a few tensors of the largest width (attention patterns have one number
        # for each head and key, so their width is heads x length).
        stream, length = self.stream, self.tokens.shape[1]
        kept = {*stream.sender_sites(stream.senders), *map(stream.stream_site, stream.receivers)}
        numbers = sum(math.prod(stream.model.site(name).shape[1:]) for name in kept)
        # Only senders know how many heads there are; those without a head have number 0.
        heads = max(s.head for s in stream.senders) + 1
        wide = (math.prod(s.shape[1:]) for s in stream.model.sites if s.kind != "pattern")
        widest = max(heads * length, *wide)
        return max(1, MEMORY // (4 * length * (2 * numbers + _WIDE_TENSORS * widest)))


def positions_of(stream: Stream, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
    """Positions checked and shaped as (1 or n examples) x position; None stays None."""
    if positions is None:
        return None
    ids = positions if positions.ndim == 2 else positions[None]
    if ids.ndim != 2 or len(ids) not in (1, len(tokens)) or ids.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"positions of shape {tuple(positions.shape)} do not fit tokens of shape {tuple(tokens.shape)}"
        )
    position_embedding(stream, ids)
    return ids


def _repeated(ids: Tensor | None, times: int, n: int) -> Tensor | None:
    return None if ids is None else ids.expand(n, -1).repeat(times, 1)


def at_positions(stream: Stream, ids: Tensor | None) -> dict[str, Change]:
    """The change that gives tokens other positions, by replacing the position embedding's output."""
    if ids is None:
        return {}
    written = position_embedding(stream, ids)
    site = stream.output_site(Sender("position"))
    return {site: lambda value: written.to(value).expand_as(value)}


def _merged(model: HookedModel, *parts: Mapping[str, Change]) -> dict[str, Change]:
    """Several sets of changes as one; at each site they are made in order."""
    found: dict[str, list[Change]] = {}
    for part in parts:
        for name, change in part.items():
            found.setdefault(model.site(name).name, []).append(change)
    return {name: _in_order(steps) for name, steps in found.items()}


def _in_order(steps: Sequence[Change]) -> Change:
    def change(value: Tensor) -> Tensor:
        for step in steps:
            value = step(value)
        return value

    return change


# --- paths as changes of sites -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _PatchedReceiver:
    """A receiver, with the sets of a batch that patch a path into it.

    Attributes:
        receiver: the receiver.
        index: the indices of those sets.
        senders: the senders that each of those sets replaces.
        written: the sites that all those senders write to.
    """

    receiver: Receiver
    index: Tensor
    senders: tuple[frozenset[Sender], ...]
    written: tuple[str, ...]


def _patched_receivers(stream: Stream, sets: Sequence[frozenset[Path]]) -> list[_PatchedReceiver]:
    """The patched receivers in order of execution, each with its senders in every set."""
    # A receiver such as resid_pre is the stream itself. Once a sender has been replaced there, everything that reads
    # the stream later sees the replacement already; replacing it again would count it twice (`gone`).
    by_receiver: dict[Receiver, dict[int, set[Sender]]] = {}
    for i, group in enumerate(sets):
        for sender, receiver in group:
            if sender.kind == "bias":  # biases write the same in every run: nothing to patch
                continue
            by_receiver.setdefault(receiver, {}).setdefault(i, set()).add(sender)
    gone: list[set[Sender]] = [set() for _ in sets]
    found = []
    for receiver in stream.receivers:
        groups = {i: frozenset(g - gone[i]) for i, g in by_receiver.get(receiver, {}).items()}
        groups = {i: group for i, group in groups.items() if group}
        if groups:
            written = stream.sender_sites(frozenset().union(*groups.values()))
            index = torch.tensor(list(groups))
            found.append(_PatchedReceiver(receiver, index, tuple(groups.values()), written))
        if receiver.kind in STREAMS:
            for i, group in groups.items():
                gone[i] |= group
    return found


def changes_of(
    stream: Stream,
    sets: Sequence[frozenset[Path]],
    other: Mapping[str, Tensor],
    options: Options,
) -> dict[str, Change]:
    """Sets of paths as changes at sites, for a batch that stacks all examples once for each set."""
    looks: set[str] = set()
    by_site: dict[str, list[_PatchedReceiver]] = {}
    for one in _patched_receivers(stream, sets):
        by_site.setdefault(stream.input_site(one.receiver), []).append(one)
        looks |= {*one.written, *_sites_seen(stream, one.receiver, options)}
    run = _Pass(stream, len(sets), other, options)
    receiving = {site: run.receiving(those) for site, those in by_site.items()}
    # Record after changing: if an earlier receiver of a set changed the site, later ones have to see that.
    return _merged(stream.model, receiving, {site: run.record(site) for site in sorted(looks)})


def _sites_seen(stream: Stream, receiver: Receiver, options: Options) -> tuple[str, ...]:
    """The sites that show what a receiver, and the MLPs that the path leads through, read."""
    middles = (
        tuple(map(stream.stream_site, stream.mlps_before(receiver))) if options.through_mlps else ()
    )
    return middles if receiver.kind in STREAMS else (*middles, stream.stream_site(receiver))


class _Pass:
    """One forward pass with patched paths: what it has recorded so far, and what replaces it.

    What senders write in the patched run is recorded while it runs, since an earlier receiver of the same set may have
    changed it.
    """

    def __init__(
        self, stream: Stream, n_sets: int, other: Mapping[str, Tensor], options: Options
    ) -> None:
        self.stream, self.n_sets, self.other, self.options = stream, n_sets, other, options
        self.live: dict[str, Tensor] = {}

    def record(self, site: str) -> Change:
        """A change that changes nothing but records a site's tensor."""

        def look(value: Tensor) -> Tensor:
            theirs = self.other.get(site, value)
            if theirs.shape != value.shape:
                raise ValueError(
                    f"source: {site} has shape {tuple(theirs.shape)} there, expected {tuple(value.shape)}, that of the "
                    "same examples and positions"
                )
            self.live[site] = value
            return value

        return look

    def receiving(self, those: Sequence[_PatchedReceiver]) -> Change:
        """The change of what receivers read at a site."""

        def change(value: Tensor) -> Tensor:
            made = value.clone()
            for one in those:
                receiver, rows = one.receiver, self._by_set(made)
                if receiver.kind in ("q", "k", "v"):
                    rows = rows[..., receiver.head, :]
                # Only the sets that patch this receiver: `index` numbers them along the stacked axis.
                rows[one.index] += self._received(one)
            return made

        return change

    def _received(self, one: _PatchedReceiver) -> Tensor:
        """The change of a receiver's input: set x example x position x …"""
        stream, receiver = self.stream, one.receiver
        names = (*one.written, *_sites_seen(stream, receiver, self.options))
        live = {name: self._by_set(self.live[name])[one.index] for name in names}
        other = {name: self._by_set(self.other[name])[one.index] for name in one.written}
        through_mlps, where = self.options.through_mlps, self.options.where
        change = stream_change(stream, one.senders, receiver, live, other, through_mlps)
        if where is not None:
            change = change * where.to(change)[..., None]
        if receiver.kind in STREAMS:
            return change
        before = live[stream.stream_site(receiver)]
        # What is added is a difference of normalised inputs, so that a receiver whose sender is the same in both runs
        # gets exactly zero.
        return input_change(stream, receiver, before, change, self.options.hold_norms)

    def _by_set(self, value: Tensor) -> Tensor:
        return value.unflatten(0, (self.n_sets, -1))
