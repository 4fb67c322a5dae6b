"""Runs a transformer with patched paths, many patches in one pass: the machinery of `patching`.

The patches of one pass (sets of paths) are stacked along the batch, each with all examples in order. Numbers that are
compared come from the same rows of batches of the same size, so that a patch without effect changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import main_output
from circuits.models.paths.contributions import (
    input_change,
    position_embedding,
    stream_change,
    written_change,
)
from circuits.models.paths.residual import NEURONS, STREAMS, Path, Receiver, Sender, Stream
from circuits.models.paths.written import Written, rows_of
from circuits.progress import Progress

Direction = Literal["noising", "denoising"]


MEMORY = 2**29
"""A rough limit for the tensors of one pass, in bytes."""

_NUMBERS = 2**22
"""How many numbers the stream of the receivers that are patched together has at most: neurons are many."""

_WIDE_TENSORS = 8
"""How many tensors of the model's largest width are alive at the same time, roughly."""


@dataclass(frozen=True)
class Options:
    """How paths are patched.

    Attributes:
        through_mlps: MLPs between sender and receiver recompute.
        where: at which positions of which examples senders are replaced; everywhere if None.
        hold_norms: the normalisation before a receiver keeps its scale instead of being recomputed.
        span: the span that each position is in, if receivers are patched span by span.
    """

    through_mlps: bool = False
    where: Tensor | None = None
    hold_norms: bool = False
    span: Int[Tensor, "example position"] | None = None


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
            changes = changes_of(self.stream, patches_of(self.stream, some), cache, options)
            logits = model.logits(tokens, merged(self.stream.model, own_positions, changes))
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


def merged(model: HookedModel, *parts: Mapping[str, Change]) -> dict[str, Change]:
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

Patches = Mapping[Receiver, Float[Tensor, "set sender *span"]]
"""What each receiver reads of each sender, in each set: 0 for what it writes in this run, 1 for the other run. With a
last axis it is so for the positions of each span (`Options.span`)."""


def patches_of(stream: Stream, sets: Sequence[frozenset[Path]]) -> Patches:
    """Sets of paths that are patched as one table for each receiver."""
    places = {sender: i for i, sender in enumerate(stream.senders)}
    found: dict[Receiver, Tensor] = {}
    for i, group in enumerate(sets):
        for sender, receiver in group:
            table = found.setdefault(receiver, torch.zeros(len(sets), len(places)))
            table[i, places[sender]] = 1
    return found


@dataclass(frozen=True, eq=False)
class _PatchedReceivers:
    """Receivers at one site that are patched in the same sets of a batch.

    Attributes:
        receivers: the receivers.
        index: the indices of those sets.
        off: which senders are replaced, and how much.
        senders: all senders that are replaced in some set.
    """

    receivers: tuple[Receiver, ...]
    index: Int[Tensor, " set"]
    off: Float[Tensor, "set sender receiver *span"]
    senders: tuple[Sender, ...]


def _patched_receivers(stream: Stream, patches: Patches) -> list[_PatchedReceivers]:
    """The patched receivers in order of execution, those of a site that are in the same sets together."""
    # A receiver such as resid_pre is the stream itself. Once a sender has been replaced there, everything that reads
    # the stream later sees the replacement already; replacing it again would count it twice (`present`).
    n_sets = len(next(iter(patches.values()), ()))
    # Biases write the same in every run: there is nothing to patch.
    present = torch.tensor([s.kind != "bias" for s in stream.senders]).float().repeat(n_sets, 1)
    together: dict[tuple[str, bytes], list[tuple[Receiver, Tensor]]] = {}
    for receiver in stream.receivers:
        if receiver not in patches:
            continue
        off = patches[receiver]
        off = off * (present if off.ndim == 2 else present[..., None])
        if receiver.kind in STREAMS:
            present = present * (1 - off)
        which = _touched(stream, receiver, off).any(1)
        if which.any():
            key = stream.input_site(receiver), which.numpy().tobytes()
            together.setdefault(key, []).append((receiver, off))
    found = []
    for some in together.values():
        off = torch.stack([off for _, off in some], 2)
        touched = torch.stack([_touched(stream, receiver, own) for receiver, own in some], -1)
        index = touched.flatten(1).any(1).nonzero()[:, 0]
        used = touched.any(2).any(0)
        senders = tuple(s for s, own in zip(stream.senders, used.tolist(), strict=True) if own)
        found.append(_PatchedReceivers(tuple(r for r, _ in some), index, off[index], senders))
    return found


def _touched(
    stream: Stream, receiver: Receiver, off: Float[Tensor, "set sender *span"]
) -> Bool[Tensor, "set sender"]:
    """Which senders are replaced, or could be: where a gradient is asked for, it is also that at 0."""
    replaced = (off.detach() != 0).reshape(*off.shape[:2], -1).any(2)
    return replaced | stream.reaching(receiver) if off.requires_grad else replaced


def changes_of(
    stream: Stream,
    patches: Patches,
    other: Mapping[str, Tensor],
    options: Options,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Change]:
    """Patched paths as changes at sites, for a batch that stacks all examples once for each set.

    Args:
        stream: the model's residual stream.
        patches: what is patched.
        other: the tensors of the senders' sites in the other run, of one set's examples (the same for all sets) or
            of all sets'. Where every sender that reaches a receiver is replaced, the receiver reads to the bit what
            it read in the other run, if that site is here too.
        options: how paths are patched.
        known: tensors of sites that lie before everything that the pass computes, of one set's examples.
    """
    groups = _patched_receivers(stream, patches)
    written = Written(stream, stream.sender_sites({s for one in groups for s in one.senders}))
    run = _Pass(stream, len(next(iter(patches.values()), ())), other, options, known or {}, written)
    looks: set[str] = set()
    by_site: dict[str, list[_PatchedReceivers]] = {}
    for one in groups:
        by_site.setdefault(stream.input_site(one.receivers[0]), []).append(one)
        looks |= {
            *stream.sender_sites(one.senders),
            *_sites_seen(stream, one.receivers[0], options),
        }
    receiving = {site: run.receiving(site, those) for site, those in by_site.items()}
    # Record after changing: if an earlier receiver of a set changed the site, later ones have to see that.
    recording = {site: run.record(site) for site in sorted(looks - run.known.keys())}
    return merged(stream.model, receiving, recording)


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
        self,
        stream: Stream,
        n_sets: int,
        other: Mapping[str, Tensor],
        options: Options,
        known: Mapping[str, Tensor],
        written: Written,
    ) -> None:
        self.stream, self.n_sets, self.other, self.options = stream, n_sets, other, options
        self.known = {site: value[None] for site, value in known.items()}
        self.live: dict[str, Tensor] = dict(self.known)
        # At which site parts are told apart that are shown at several.
        self._told_apart = {site: s.site for s in stream.splits for site in s.sites}
        self._written = written

    def record(self, site: str) -> Change:
        """A change that changes nothing but records a site's tensor."""

        def look(value: Tensor) -> Tensor:
            theirs = self.other.get(site, value)
            if theirs.shape[1:] != value.shape[1:] or len(value) not in (
                len(theirs),
                len(theirs) * self.n_sets,
            ):
                raise ValueError(
                    f"source: {site} has shape {tuple(theirs.shape)} there, expected {tuple(value.shape)}, that of the "
                    "same examples and positions"
                )
            self.live[site] = value.unflatten(0, (self.n_sets, -1))
            # Of an earlier pass with the same changes.
            self._written.drop(self._told_apart.get(site, site))
            return value

        return look

    def receiving(self, site: str, those: Sequence[_PatchedReceivers]) -> Change:
        """The change of what receivers read at a site."""
        theirs = self.other.get(site)

        def change(value: Tensor) -> Tensor:
            made = value.unflatten(0, (self.n_sets, -1)).clone()
            for one in those:
                for some in self._in_parts(one, made, theirs):
                    self._add(made, some, self._received(some))
                if theirs is not None:
                    self._replace(made, theirs, one)
            return made.flatten(0, 1)

        return change

    @staticmethod
    def _add(made: Tensor, one: _PatchedReceivers, received: Tensor) -> None:
        """Add the change of receivers' inputs to their site."""
        own, kind = [r.head for r in one.receivers], one.receivers[0].kind
        if kind not in ("q", "k", "v", *NEURONS):
            made[one.index] += received
            return
        # Only the sets that patch these heads: `index` numbers them along the stacked axis.
        rows = made[one.index]
        rows[(..., own) if kind in NEURONS else (..., own, slice(None))] += received
        made[one.index] = rows

    def _in_parts(
        self, one: _PatchedReceivers, made: Tensor, theirs: Tensor | None
    ) -> Iterator[_PatchedReceivers]:
        """Receivers with the sets in which they read something of this run: the others `_replace` gives all they read.

        Of neurons there are many: a number of them at a time.
        """
        left = torch.ones(len(one.index), len(one.receivers), dtype=torch.bool)
        if theirs is not None and self.options.span is None and not one.off.requires_grad:
            left = ~(one.off[:, self.stream.reaching(one.receivers[0])] == 1).all(1)
        together: dict[bytes, list[int]] = {}
        for k, sets in enumerate(left.T):
            together.setdefault(sets.numpy().tobytes(), []).append(k)
        many = one.receivers[0].kind in NEURONS
        for those in together.values():
            rows = left[:, those[0]]
            each = int(rows.sum()) * made.shape[1] * made.shape[2] * self.stream.width
            size = max(1, _NUMBERS // max(1, each)) if many else len(those)
            for start in range(0, len(those) if rows.any() else 0, size):
                some = those[start : start + size]
                receivers = tuple(one.receivers[k] for k in some)
                off = one.off[rows][:, :, some]
                yield _PatchedReceivers(receivers, one.index[rows], off, one.senders)

    def _replace(self, made: Tensor, theirs: Tensor, one: _PatchedReceivers) -> None:
        """Put in what was read in the other run where nothing of this run is read."""
        span = self.options.span
        if one.receivers[0].kind in NEURONS and span is None and not made.requires_grad:
            reaching = self.stream.reaching(one.receivers[0])
            off = (one.off[:, reaching] == 1).all(1)[:, None, None].to(made.device)
            rows, own = made[one.index], [r.head for r in one.receivers]
            put = rows_of(theirs.unflatten(0, (-1, made.shape[1])), one.index)
            rows[..., own] = torch.where(off, put[..., own], rows[..., own])
            made[one.index] = rows
            return
        for k, receiver in enumerate(one.receivers):
            reaching = self.stream.reaching(receiver)
            off = (one.off[:, reaching, k] == 1).all(1)
            whole = one.index[off if span is None else off.any(1)]
            if not len(whole):
                continue
            put = rows_of(theirs.unflatten(0, (-1, made.shape[1])), whole)
            at: tuple[Any, ...] = (whole,)
            if receiver.kind in ("q", "k", "v"):
                at, put = (whole, ..., receiver.head, slice(None)), put[..., receiver.head, :]
            elif receiver.kind in NEURONS:
                at, put = (whole, ..., receiver.head), put[..., receiver.head]
            own = made[at]
            put = put.expand_as(own)
            if own.requires_grad:
                # A zero with the gradient of what is replaced, so that derivatives by `off` stay.
                put = put + (own - own.detach())
            if span is not None:
                inside = off[off.any(1)][:, span].to(made.device)
                inside = inside if receiver.kind in NEURONS else inside[..., None]
                put = torch.where(inside, put, own)
            made[at] = put

    def _received(self, one: _PatchedReceivers) -> Tensor:
        """The change of receivers' inputs: set x example x position x …"""
        stream, first = self.stream, one.receivers[0]
        live = {name: rows_of(value, one.index) for name, value in self.live.items()}
        for site in dict.fromkeys(stream.output_site(s) for s in one.senders):
            self._note_change(site)
        options = self.options
        change = stream_change(
            stream, one.off, first, self._written, live, one.index, options.through_mlps,
            options.span,
        )  # fmt: skip
        if self.options.where is not None:
            change = change * self.options.where.to(change)[..., None]
        if first.kind in STREAMS:
            return change[:, 0]
        before = live[stream.stream_site(first)]
        # What is added is a difference of normalised inputs, so that a receiver whose sender is the same in both runs
        # gets exactly zero.
        return input_change(stream, one.receivers, before, change, self.options.hold_norms)

    def _note_change(self, site: str) -> None:
        """Note what senders at a site write in the other run less what they write in this one."""
        if site in self._written:
            return
        split = next((s for s in self.stream.splits if s.site == site), None)
        sites = (site,) if split is None else split.sites
        live = {name: self.live[name] for name in sites}
        n = live[site].shape[1]
        other = {s: self.other[s].unflatten(0, (-1, n)) for s in sites if s in self.other}
        if split is None:
            made = written_change(self.stream, site, live[site], other[site])
        else:
            made = split.change(live, other)
        self._written.put(site, made)
