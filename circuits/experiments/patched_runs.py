"""Runs of a transformer with paths patched, many in one pass: the machinery of `patching`.

Sets of paths lie one behind the other in a batch, the examples of each set in order. Whatever is compared comes from
the same place of a batch of the same size, so that what does nothing changes no bit.
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
"""Bytes that the tensors of one pass may take, roughly."""

_AT_ONCE = 8
"""So many tensors as wide as a model's widest are alive at once."""


@dataclass(frozen=True)
class Options:
    """How paths are patched.

    Attributes:
        through_mlps: MLPs between sender and receiver recompute.
        where: at which positions of which examples senders are replaced; everywhere if None.
        hold_norms: the normalisation in front of a receiver keeps its scale instead of being recomputed.
    """

    through_mlps: bool = False
    where: Tensor | None = None
    hold_norms: bool = False


@dataclass(frozen=True, eq=False)
class Runs:
    """The run that is patched and the one that contributions come from: tokens and positions of both."""

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
    ) -> Runs:
        if direction not in ("noising", "denoising"):
            raise ValueError(f"direction {direction!r} must be noising or denoising")
        if clean[0].shape != corrupted[0].shape:
            raise ValueError(
                f"corrupted has shape {tuple(corrupted[0].shape)}: expected that of clean, {tuple(clean[0].shape)}"
            )
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
        """For each set: the logits with its paths patched, without, and of the other run.

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
        standing = standing_at(self.stream, _repeated(self.ids, each, n))
        moved = standing_at(self.stream, _repeated(self.other_ids, each, n))
        cache = model.run(others, read=used, edits=moved)
        source = main_output(cache.output)
        base = model.logits(tokens, standing)
        for start in range(0, len(sets), each):
            some = [*sets[start : start + each]]
            some += [frozenset()] * (each - len(some))  # every pass is of one size
            changes = changes_of(self.stream, some, cache, options)
            logits = model.logits(tokens, _merged(self.stream.model, standing, changes))
            for i in range(min(each, len(sets) - start)):
                place = slice(i * n, (i + 1) * n)
                yield logits[place], base[place], source[place]
            if progress is not None:
                progress(min(start + each, len(sets)), len(sets))

    def _rows(self) -> int:
        """How many examples fit into a pass, by what it holds at once."""
        stream, length = self.stream, self.tokens.shape[1]
        kept = {*stream.sender_sites(stream.senders), *map(stream.stream_site, stream.receivers)}
        numbers = sum(math.prod(stream.model.site(name).shape[1:]) for name in kept)
        heads = max(s.head for s in stream.senders) + 1
        wide = (math.prod(s.shape[1:]) for s in stream.model.sites if s.kind != "pattern")
        widest = max(heads * length, *wide)
        return max(1, MEMORY // (4 * length * (2 * numbers + _AT_ONCE * widest)))


def positions_of(stream: Stream, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
    """Positions as 1 or n examples x position, checked; None stays None."""
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


def standing_at(stream: Stream, ids: Tensor | None) -> dict[str, Change]:
    """The change that has tokens stand at other positions."""
    if ids is None:
        return {}
    written = position_embedding(stream, ids)
    site = stream.output_site(Sender("position"))
    return {site: lambda value: written.to(value).expand_as(value)}


def _merged(model: HookedModel, *parts: Mapping[str, Change]) -> dict[str, Change]:
    """Changes one after the other."""
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
class _Patched:
    """A receiver in those sets of a batch that patch it.

    Attributes:
        receiver: which.
        index: the places of the sets.
        senders: of each of them.
        written: the sites where those write.
    """

    receiver: Receiver
    index: Tensor
    senders: tuple[frozenset[Sender], ...]
    written: tuple[str, ...]


def _patched(stream: Stream, sets: Sequence[frozenset[Path]]) -> list[_Patched]:
    """Who receives what in which set, in order of execution.

    A sender that was replaced in the stream itself is replaced for all that reads the stream later.
    """
    by_receiver: dict[Receiver, dict[int, set[Sender]]] = {}
    for i, group in enumerate(sets):
        for sender, receiver in group:
            if sender.kind == "bias":  # the same in every run
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
            found.append(_Patched(receiver, index, tuple(groups.values()), written))
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
    """Sets of paths as changes of sites, for a batch in which the examples of each set follow those of the last."""
    looks: set[str] = set()
    by_site: dict[str, list[_Patched]] = {}
    for one in _patched(stream, sets):
        by_site.setdefault(stream.input_site(one.receiver), []).append(one)
        looks |= {*one.written, *_seen(stream, one.receiver, options)}
    run = _Pass(stream, len(sets), other, options)
    receiving = {site: run.receiving(those) for site, those in by_site.items()}
    # what is changed at a site is looked at after the change
    return _merged(stream.model, receiving, {site: run.looking(site) for site in sorted(looks)})


def _seen(stream: Stream, receiver: Receiver, options: Options) -> tuple[str, ...]:
    """The sites that show what is in front of a receiver."""
    middles = (
        tuple(map(stream.stream_site, stream.mlps_before(receiver))) if options.through_mlps else ()
    )
    return middles if receiver.kind in STREAMS else (*middles, stream.stream_site(receiver))


class _Pass:
    """One forward pass with paths patched: what it has shown so far, and what it takes in its place.

    What senders write in the patched run itself is looked up while it runs, since an earlier receiver of the same
    set may have changed it.
    """

    def __init__(
        self, stream: Stream, n_sets: int, other: Mapping[str, Tensor], options: Options
    ) -> None:
        self.stream, self.n_sets, self.other, self.options = stream, n_sets, other, options
        self.live: dict[str, Tensor] = {}

    def looking(self, site: str) -> Change:
        """Keeps what a site holds."""

        def look(value: Tensor) -> Tensor:
            theirs = self.other.get(site, value)
            if theirs.shape != value.shape:
                raise ValueError(
                    f"paths come from a run in which {site} has shape {tuple(theirs.shape)}: expected "
                    f"{tuple(value.shape)}, the same examples and positions"
                )
            self.live[site] = value
            return value

        return look

    def receiving(self, those: Sequence[_Patched]) -> Change:
        """Changes what receivers read at a site."""

        def change(value: Tensor) -> Tensor:
            made = value.clone()
            for one in those:
                receiver, rows = one.receiver, self._by_set(made)
                if receiver.kind in ("q", "k", "v"):
                    rows = rows[..., receiver.head, :]
                rows[one.index] += self._received(one)
            return made

        return change

    def _received(self, one: _Patched) -> Tensor:
        """By how much what a receiver reads changes: set x example x position x …"""
        stream, receiver = self.stream, one.receiver
        names = (*one.written, *_seen(stream, receiver, self.options))
        live = {name: self._by_set(self.live[name])[one.index] for name in names}
        other = {name: self._by_set(self.other[name])[one.index] for name in one.written}
        through_mlps, where = self.options.through_mlps, self.options.where
        change = stream_change(stream, one.senders, receiver, live, other, through_mlps)
        if where is not None:
            change = change * where.to(change)[..., None]
        if receiver.kind in STREAMS:
            return change
        before = live[stream.stream_site(receiver)]
        return input_change(stream, receiver, before, change, self.options.hold_norms)

    def _by_set(self, value: Tensor) -> Tensor:
        return value.unflatten(0, (self.n_sets, -1))
