"""What the channels of a graph are called, and at which sites they are read and changed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.call_points import Address
from circuits.models.adapter.flow import short_name
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.program import Value
from circuits.models.adapter.topology import INPUT
from circuits.models.paths.channels import ChannelFlow
from circuits.units import Site, Units

ChannelMask = Bool[Tensor, " _"]
"""True for the channels of a value that are meant."""

ChannelMasks = dict[Value, ChannelMask]
"""Some channels of some values."""


class ChannelNames:
    """Names and sites of the values of a pass.

    A channel is called by the site that a person named; else by the site that shows what its nonlinearity puts out, or
    the concatenation that alone reads it (`mixed3a` rather than `mixed3a_1x1`); else by what it is given.
    """

    def __init__(self, flow: ChannelFlow) -> None:
        self.flow, self.model = flow, flow.model
        self._asked: dict[tuple[Value, int], str] = {}
        self._first: dict[Value, str] = {}
        for name, (value, _) in flow.places.items():
            self._first.setdefault(value, name)
        self._points: dict[str, tuple[Site, Address, str]] = {}

    # --- what a person names ---------------------------------------------------------------------

    def resolve(self, units: Units) -> tuple[ChannelMasks, ChannelMasks]:
        """The targets and the sources that some units of a site stand for.

        Raises:
            KeyError: if the site is unknown.
            ValueError: if it has no such unit, or is no place where a nonlinearity begins or ends.
        """
        flow = self.flow
        value, site = self._shown(units.site)
        wanted = torch.tensor(units.among(site))
        targets, sources = ChannelMasks(), ChannelMasks()
        if value in flow.targets:
            self._alias(value, wanted, units, wanted)
            _add(targets, value, flow, wanted)
            if value in flow.linear_parts:
                _add(sources, value, flow, wanted)
        elif flow.alone(value):
            for source, index in flow.carried(value):
                own = index[wanted]
                self._alias(source, own, units, wanted)
                _add(sources, source, flow, own[own >= 0])
            for target, table in flow.computed_from(value).items():
                _add(targets, target, flow, table[wanted].any(0).nonzero()[:, 0])
        else:
            raise ValueError(
                f"site {site.name} of {self.model.name} is neither what a nonlinearity is given nor what one puts out: "
                f"expected one such as {', '.join(self._examples())}"
            )
        if not any(v in self.read for v in sources):  # layers read what is made of it only
            sources = self._fed(targets)
        return targets, sources

    def _shown(self, name: str) -> tuple[Value, Site]:
        flow = self.flow
        if name == INPUT:
            value = self.image
            shape = flow.shape(value)[1:]
            return value, Site(INPUT, "channel", ("batch", "channel", "y", "x"), 1, shape)
        site = self.model.site(name)
        if site.name not in flow.places:
            raise ValueError(
                f"site {name} of {self.model.name} shows no tensor of the pass as it is"
            )
        return flow.places[site.name][0], site

    def _examples(self) -> list[str]:
        return list(dict.fromkeys(self.target(v, 0).rpartition(":")[0] for v in self.flow.targets))[
            :4
        ]

    def _alias(self, value: Value, channels: Tensor, units: Units, indices: Tensor) -> None:
        for channel, index in zip(channels.tolist(), indices.tolist(), strict=True):
            if channel >= 0:
                self._asked.setdefault((value, channel), f"{units.site}:{index}")

    def _fed(self, targets: Mapping[Value, Tensor]) -> ChannelMasks:
        found = ChannelMasks()
        for source in self.read:
            for target, table in self.flow.computed_from(source).items():
                if target in targets:
                    _add(found, source, self.flow, table[:, targets[target]].any(1).nonzero()[:, 0])
        return {v: mask for v, mask in found.items() if bool(mask.any())}

    @cached_property
    def read(self) -> tuple[Value, ...]:
        """The sources that layers read, in order of execution."""
        found = {p.source for t in self.flow.targets for p in self.flow.paths(t)}
        return tuple(sorted(found, key=self.flow.order))

    @cached_property
    def image(self) -> Value:
        """The image as the model reads it."""
        read = [
            v
            for v in self.flow.image
            if any(i in self._inside for i in self.flow.flow.taken_by.get(v, ()))
        ]
        return max(read, key=lambda v: v.number)

    # --- names -----------------------------------------------------------------------------------

    def source(self, value: Value, channel: int) -> str:
        """The name of a channel of a source."""
        if value in self.flow.image:
            return f"{INPUT}:{channel}"
        given = self._given(value)
        asked = [self._asked.get((v, channel)) for v in (value, given) if v is not None]
        known = next(filter(None, asked), None) or self._labelled(value, channel)
        if known is None and given is not None:
            known = self._labelled(given, channel)
        return known or f"{self._called(value)}:{channel}"

    def target(self, value: Value, channel: int) -> str:
        """The name of a channel of a target."""
        made = None if value in self.flow.linear_parts else self._put_out(value)
        asked = [self._asked.get((v, channel)) for v in (value, made) if v is not None]
        known = next(filter(None, asked), None)
        if known is None and made is not None:
            known = self._labelled(made, channel)
        called = self._called(value if made is None else made)
        return known or self._labelled(value, channel) or f"{called}:{channel}"

    def _put_out(self, target: Value) -> Value | None:
        """What a nonlinearity of single channels puts out for a target that it alone reads."""
        readers = self.flow.flow.taken_by.get(target, [])
        if len(readers) != 1:
            return None
        op = self.flow.flow.program.operations[readers[0]]
        made = op.outputs[0]
        return made if self._given(made) == target else None

    def _given(self, source: Value) -> Value | None:
        """The one target from which a nonlinearity of single channels makes a source."""
        if not self.flow.is_nonlinear(source):
            return None
        found = self.flow.computed_from(source)
        if len(found) != 1:
            return None
        ((target, table),) = found.items()
        same = table.shape[0] == table.shape[1] and torch.equal(
            table, torch.eye(len(table), dtype=torch.bool)
        )
        return target if same else None

    def _labelled(self, value: Value, channel: int) -> str | None:
        """A channel by the site that shows it; None without one."""
        readers = self.flow.flow.taken_by.get(value, [])
        if len(readers) == 1:
            op = self.flow.flow.program.operations[readers[0]]
            joined = op.outputs[0]
            if short_name(op) in ("cat", "concat", "concatenate") and joined in self._first:
                for step in self.flow.steps(joined):
                    if step.given == value and self.flow.shape(joined)[1] > len(
                        step.index[step.index >= 0]
                    ):
                        return f"{self._first[joined]}:{int((step.index == channel).nonzero()[0])}"
        return f"{self._first[value]}:{channel}" if value in self._first else None

    def _called(self, value: Value) -> str:
        return self.flow.flow.called(self.flow.flow.made_by[value])

    # --- sites -----------------------------------------------------------------------------------

    def read_at(self, source: Value) -> tuple[str, ...]:
        """The sites at which a source is read and, all together, can be changed for all that read it."""
        if source in self.flow.image:
            return tuple(self._argument(source, i) for i in self._readers(source))
        shown = self.flow.shown.get(source)
        return (shown[0],) if shown else (self._output(source),)

    def changed_at(self, target: Value, taken: Container[str]) -> str:
        """The site at which a target is changed: none of those where sources are read."""
        free = [s for s in self.flow.shown.get(target, ()) if s not in taken]
        return free[0] if free else self._output(target)

    @cached_property
    def _inside(self) -> set[int]:
        """The operations of the model itself."""
        return {i for i, op in enumerate(self.flow.flow.program.operations) if op.running}

    def _readers(self, value: Value) -> list[int]:
        return [i for i in self.flow.flow.taken_by.get(value, ()) if i in self._inside]

    def _output(self, value: Value) -> str:
        """A site of its own for a value that none shows in time."""
        address = self.flow.flow.address_of(value)
        if address is None:
            raise ValueError(
                f"model {self.model.name} computes {self._called(value)} in a way that cannot be changed from outside"
            )
        return self._point(self._called(value), value, address, self.flow.flow.made_by[value])

    def _argument(self, value: Value, i: int) -> str:
        """A site for what an operation is given."""
        flow, op = self.flow.flow, self.flow.flow.program.operations[i]
        part: dict[str, object] = {}
        for place, given in [*enumerate(op.args), *op.kwargs.items()]:
            if given == value:
                part = {"place": place} if isinstance(place, int) else {"key": place}
            elif isinstance(given, list | tuple) and value in given and isinstance(place, int):
                part = {"place": place, "item": list(given).index(value)}
        assert part, "the operation reads it"
        address = flow.address(i, len(op.running), part="argument", **part)
        return self._point(f"{flow.called(i)}.{INPUT}", value, address, i)

    def _point(self, name: str, value: Value, address: Address, i: int) -> str:
        if name not in self._points:
            shape = self.flow.shape(value)[1:]
            axes = ("batch", "unit") if len(shape) == 1 else ("batch", "channel", "y", "x")
            if len(axes) != len(shape) + 1:
                raise ValueError(
                    f"{name} of {self.model.name} has shape {shape} for one image: expected channels, or a map of them"
                )
            later = [
                s.name for s in self.model.sites if self.flow.places.get(s.name, (None, 0))[1] > i
            ]
            kind = "neuron" if len(shape) == 1 else "channel"
            site = Site(name, kind, axes, 1, tuple(shape))
            self._points[name] = site, address, later[0] if later else ""
        return name

    def showing(self) -> HookedModel:
        """The model with the sites that were added."""
        order = {site: i for i, site in enumerate(self._points)}
        points = sorted(
            self._points.values(), key=lambda p: (self._when(p[0].name), order[p[0].name])
        )
        return self.model.showing(points) if points else self.model

    def _when(self, name: str) -> int:
        """The number of the operation at which an added site is."""
        return self.flow.flow.calls[name.removesuffix(f".{INPUT}")]

    def starts(self, site: str, order: Mapping[str, int]) -> list[str]:
        """Sites of the model before another on whose tensor all that follows depends, the nearest first."""
        found = [s for s in self._narrow if order[s] < order[site]]
        return found[::-1]

    @cached_property
    def _narrow(self) -> list[str]:
        """The sites whose tensor alone is read after them, in order."""
        flow = self.flow.flow
        last = {v: max(flow.taken_by.get(v, [-1])) for v in flow.dependent}
        last[self.flow.places[self.flow.output][0]] = len(flow.program.operations)
        found, seen = [], set[Value]()
        for site in self.model.sites:
            if site.name in self.flow.places:
                value, at = self.flow.places[site.name]
                alive = {v for v in flow.dependent if flow.made_by.get(v, -1) < at <= last[v]}
                if alive == {value} and value not in seen:
                    seen.add(value)
                    found.append(site.name)
        return found


def _add(found: ChannelMasks, value: Value, flow: ChannelFlow, channels: Tensor) -> None:
    mask = found.setdefault(value, torch.zeros(flow.n_channels(value), dtype=torch.bool))
    mask[channels] = True
