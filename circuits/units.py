"""Addresses inside a network; imports nothing of the package.

A `Site` is a hook point, a `Unit` one channel, neuron, head or latent of it, a `Direction` a linear
combination of its units. Inside the library a unit is a `Unit`; strings are parsed once, where they come in.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

SiteKind = Literal["channel", "neuron", "head", "pattern", "residual", "logit", "latent"]
"""What the units of a site are: convolution channels, neurons of a fully connected or MLP layer,
attention heads, attention patterns (one a head), residual-stream dimensions, output logits, or latents of an
autoencoder."""

# `:` separates site and index, `,` the items of a list, and `+ - *` the terms of a direction. A `-` inside a name is
# fine, since a term starts after an index; in front it would be read as a sign.
_NAME = r"(?!-)[^\s:,+*]+"
_SITE_NAME = re.compile(_NAME)
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
_MOST_UNITS = 1_000_000
"""The most units that a range may name: a mistyped `1-9999999999` must not fill the memory."""
_UNIT = re.compile(rf"(?P<site>{_NAME}):(?P<index>0|[1-9][0-9]*)")


def check_site_name(name: str) -> str:
    """Return `name` if it is a valid name of a site: no white space, no `:`, `,`, `+` or `*`, no leading `-`.

    Raises:
        ValueError: if it is not.

    >>> check_site_name("blocks.0.attn.hook_z")
    'blocks.0.attn.hook_z'
    """
    if not _SITE_NAME.fullmatch(name):
        raise ValueError(
            f"site name {name!r} is not valid: expected characters other than white space and "
            "any of : , + * (and no leading -)"
        )
    return name


@dataclass(frozen=True)
class Site:
    """A hook point: a place in a model where a tensor can be read and changed.

    Attributes:
        name: the site's name, e.g. `mixed3b` or `blocks.1.attn.hook_z`.
        kind: what its units are.
        axes: the names of its tensor's axes, batch first, e.g. `("batch", "channel", "y", "x")`.
        unit_axis: which of them runs over units.
        shape: the tensor's shape for one example (without the batch axis), as traced.
        aliases: other names for the same site.
        module: class name of the module that computes it, e.g. `Conv2d`.
        ceiling: what activations cannot exceed, e.g. 6 after ReLU6; None without such a limit.
        floor: what they cannot fall below, if they have a ceiling.
        before: the site of what that function is given, if they have a ceiling and there is such a site: it has the
            same units at the same positions, and tells apart what is equal at the ceiling.
    """

    name: str
    kind: SiteKind
    axes: tuple[str, ...]
    unit_axis: int
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    module: str = ""
    ceiling: float | None = None
    floor: float | None = None
    before: str = ""

    def __post_init__(self) -> None:
        check_site_name(self.name)
        if len(self.axes) != len(self.shape) + 1:
            raise ValueError(f"axes {self.axes} do not fit shape {self.shape} of site {self.name}")
        if not 0 < self.unit_axis < len(self.axes):
            raise ValueError(
                f"unit_axis {self.unit_axis} of site {self.name} is not in {self.axes}"
            )

    @property
    def n_units(self) -> int:
        """The number of units."""
        return self.shape[self.unit_axis - 1]

    @property
    def position_axes(self) -> tuple[str, ...]:
        """The axes of positions, e.g. `("y", "x")`: all but batch, units and the inside of a head."""
        return tuple(self.axes[i] for i in self._places)

    @property
    def position_shape(self) -> tuple[int, ...]:
        """The lengths of `position_axes`, as traced."""
        return tuple(self.shape[i - 1] for i in self._places)

    def without_ceiling(self, before: Tensor) -> Tensor:
        """What the site would hold if there were no ceiling, from the tensor of the site `before`.

        Where a function cuts off at 6, activations of 6 cannot be compared; these are 6 or more.
        """
        return before if self.floor is None else before.clamp(min=self.floor)

    # --- layout: every method takes tensors of any batch and any number of positions -------------

    @property
    def inner_axis(self) -> int | None:
        """The axis that runs over the inside of a unit (`d_head` of heads); None where a unit is one number."""
        return self.axes.index("d_head") if "d_head" in self.axes else None

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """The shape of all units at one position: `(n_units,)`, for heads `(n_units, d_head)`."""
        inner = self.inner_axis
        return (self.n_units,) if inner is None else (self.n_units, self.shape[inner - 1])

    @property
    def width(self) -> int:
        """The number of numbers in a row: those of all units at one position."""
        return math.prod(self.unit_shape)

    @property
    def row_units(self) -> Int[Tensor, " width"]:
        """The unit that each number of a row belongs to."""
        return torch.arange(self.n_units).repeat_interleave(self.width // self.n_units)

    @property
    def units_last(self) -> bool:
        """Whether the axis of units comes after all axes of positions (channels last)."""
        return self.unit_axis > max(self._places, default=0)

    @property
    def _places(self) -> tuple[int, ...]:
        """The numbers of the axes in `position_axes`."""
        not_positions = (0, self.unit_axis, self.inner_axis)
        return tuple(i for i in range(len(self.axes)) if i not in not_positions)

    @property
    def _by_unit(self) -> tuple[int, ...]:
        """The order of axes of `by_unit`."""
        inner = () if self.inner_axis is None else (self.inner_axis,)
        return (0, self.unit_axis, *self._places, *inner)

    def positions_of(self, value: Shaped[Tensor, "batch *rest"]) -> tuple[int, ...]:
        """The lengths of the position axes in a tensor of the site."""
        return tuple(value.shape[i] for i in self._places)

    def by_unit(self, value: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "batch unit *inside"]:
        """A view of the site's tensor as batch x unit x positions, with a head's inside last.

        Writing into the view changes the tensor.
        """
        return value.permute(self._by_unit)

    def from_by_unit(
        self, view: Shaped[Tensor, "batch unit *inside"]
    ) -> Shaped[Tensor, "batch *rest"]:
        """The inverse of `by_unit`, also a view."""
        order = self._by_unit
        return view.permute([order.index(i) for i in range(len(order))])

    def at(
        self, value: Shaped[Tensor, "batch *rest"], position: Sequence[int]
    ) -> Shaped[Tensor, "batch unit *inner"]:
        """A view of the site's tensor at one position, with one index for each position axis.

        Raises:
            ValueError: if the position is not in the tensor. Negative indices count from the end.
        """
        if len(position) != len(self._places):
            raise ValueError(
                f"position {tuple(position)} does not fit the axes of {self.name} "
                f"({', '.join(self.position_axes) or 'none'})"
            )
        view = self.by_unit(value)
        lengths = self.positions_of(value)
        for axis, length, index in zip(self.position_axes, lengths, position, strict=True):
            if not -length <= index < length:
                raise ValueError(
                    f"position {index} along {axis} of {self.name} must be from {-length} to {length - 1}"
                )
            view = view.select(
                2, index
            )  # each selection removes axis 2, and the next one takes its place
        return view

    def rows(self, value: Shaped[Tensor, "batch *rest"]) -> Shaped[Tensor, "batch *position width"]:
        """The site's tensor with all numbers of a position on the last axis.

        A view where the memory layout allows it. The numbers of one head are adjacent.
        """
        # Batch, positions, units, and d_head for heads: the last two are then joined.
        moved = self.by_unit(value).movedim(1, 1 + len(self._places))
        return moved if self.inner_axis is None else moved.flatten(-2)

    def from_rows(
        self, rows: Shaped[Tensor, "batch *position width"]
    ) -> Shaped[Tensor, "batch *rest"]:
        """The inverse of `rows`, a view; the lengths of the position axes are those of `rows`."""
        return self.from_by_unit(rows.unflatten(-1, self.unit_shape).movedim(rows.ndim - 1, 1))

    def activations(
        self, value: Float[Tensor, "batch *rest"]
    ) -> Float[Tensor, "batch unit position"]:
        """The site's tensor with one number for each example, unit and position.

        Positions are flattened in the order of `position_axes`; a head's activation at a position
        is the norm of its output there.
        """
        if self.inner_axis is not None:
            value = value.norm(dim=self.inner_axis, keepdim=True)
        return self.by_unit(value).reshape(len(value), value.shape[self.unit_axis], -1)

    def spread(self, vector: Shaped[Tensor, "unit *inner"]) -> Shaped[Tensor, "1 *rest"]:
        """Shape a vector with one entry for each unit so that it broadcasts against the site's tensor.

        Args:
            vector: of shape `unit_shape`, or with one number for each head; or for some of the units only, to
                go with a selection of them.
        """
        # One number for a head becomes an inner axis of length 1, which broadcasts over d_head.
        inner = () if self.inner_axis is None else tuple(vector.shape[1:]) or (1,)
        everywhere = (1,) * len(self._places)
        return self.from_by_unit(vector.reshape(1, len(vector), *everywhere, *inner))

    def unit(self, index: int) -> Unit:
        """The unit at `index`.

        Raises:
            ValueError: if the site has no such unit.
        """
        if not 0 <= index < self.n_units:
            raise ValueError(
                f"unit {self.name}:{index} does not exist: {self.name} has units "
                f"0 to {self.n_units - 1}"
            )
        return Unit(self.name, index)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, order=True)
class Unit:
    """One channel, neuron, head or latent: the `index`-th unit of a site, written `site:index`.

    >>> Unit.parse("mixed3b:379")
    Unit(site='mixed3b', index=379)
    >>> str(Unit("blocks.1.attn.hook_z", 4))
    'blocks.1.attn.hook_z:4'
    """

    site: str
    index: int

    def __post_init__(self) -> None:
        check_site_name(self.site)
        # In Python, True is an int: `Unit(site, True)` would be unit 1.
        if not isinstance(self.index, int) or isinstance(self.index, bool) or self.index < 0:
            raise ValueError(f"unit index {self.index!r} of {self.site} is not a whole number >= 0")

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Read `site:index`.

        Raises:
            ValueError: if `text` is not of that form.
        """
        match = _UNIT.fullmatch(text)
        if match is None:
            raise ValueError(f"unit {text!r} is not of the form SITE:INDEX, e.g. mixed3b:379")
        return cls(match["site"], int(match["index"]))

    def __str__(self) -> str:
        return f"{self.site}:{self.index}"


@dataclass(frozen=True)
class Units:
    """Some units of one site, in the order given and without repeats, written `site:1,2,5-9`; `site:*` is all.

    Attributes:
        site: the site's name.
        indices: the units' indices; None stands for all of them.

    >>> str(Units.parse("mixed3b:3-5,1"))
    'mixed3b:3-5,1'
    """

    site: str
    indices: tuple[int, ...] | None

    def __post_init__(self) -> None:
        check_site_name(self.site)
        if self.indices is None:
            return
        if not self.indices:
            raise ValueError(
                f"units of {self.site} are an empty list: expected one of the form {self.site}:1,2,5-9"
            )
        for index in self.indices:
            Unit(self.site, index)
        if len(set(self.indices)) != len(self.indices):
            twice = next(i for i in self.indices if self.indices.count(i) > 1)
            raise ValueError(f"unit {self.site}:{twice} is listed twice")

    @classmethod
    def parse(cls, text: str) -> Units:
        """Read `SITE:1,2,5-9` or `SITE:*`.

        Raises:
            ValueError: if the text is not of that form.
        """
        site, colon, listed = text.partition(":")
        if colon and listed == "*":
            return cls(site, None)
        found: list[int] = []
        for item in listed.split(",") if colon else [""]:
            match = _RANGE.fullmatch(item)
            if match is None:
                raise ValueError(
                    f"units {text!r} are not of the form SITE:1,2,5-9 (SITE:* for all)"
                )
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if last < first:
                raise ValueError(f"units {text!r}: {item} runs backwards")
            if last - first > _MOST_UNITS:
                raise ValueError(f"units {text!r}: {item} names more than {_MOST_UNITS} units")
            found += range(first, last + 1)
        return cls(site, tuple(found))

    @classmethod
    def of(cls, units: Units | Unit | str | Iterable[Unit | str]) -> Units:
        """Make `Units` of anything that names units of one site.

        Raises:
            ValueError: if they are of several sites, or there are none.
        """
        if isinstance(units, Units):
            return units
        if isinstance(units, Unit):
            return cls(units.site, (units.index,))
        if isinstance(units, str):
            return cls.parse(units)
        each = [Unit.parse(u) if isinstance(u, str) else u for u in units]
        sites = sorted({u.site for u in each})
        if len(sites) != 1:
            raise ValueError(f"units name {len(sites)} sites ({', '.join(sites)}): expected one")
        return cls(sites[0], tuple(u.index for u in each))

    def among(self, site: Site) -> tuple[int, ...]:
        """The indices at a site, after a check that the site has these units.

        Raises:
            ValueError: if the site has no such unit.
        """
        if self.indices is None:
            return tuple(range(site.n_units))
        site.unit(max(self.indices))  # raises if there is no such unit; none is negative
        return self.indices

    def __str__(self) -> str:
        if self.indices is None:
            return f"{self.site}:*"
        runs: list[list[int]] = []
        for index in self.indices:
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
        return f"{self.site}:{','.join(parts)}"


@dataclass(frozen=True, eq=False)
class Direction:
    """A linear combination of the units of a site.

    Attributes:
        site: the site's name.
        vector: one weight for each unit, finite and not all zero; kept in float64 on the CPU, whatever is given.
    """

    site: str
    vector: Float[Tensor, " unit"]

    def __post_init__(self) -> None:
        check_site_name(self.site)
        if self.vector.ndim != 1 or self.vector.numel() == 0:
            raise ValueError(
                f"vector of a direction in {self.site} has shape {tuple(self.vector.shape)}: expected one weight "
                "for each unit"
            )
        if not torch.isfinite(self.vector).all() or not self.vector.any():
            raise ValueError(
                f"vector of a direction in {self.site} must be finite and not all zero"
            )
        # The way to set a field of a frozen dataclass in its own constructor.
        object.__setattr__(self, "vector", self.vector.detach().to("cpu", torch.float64))

    @classmethod
    def parse(cls, text: str, n_units: int) -> Direction:
        """Read a sum of weighted units of one site, e.g. `mixed3b:379+0.5*mixed3b:385`.

        Args:
            text: terms `[WEIGHT*]SITE:INDEX` joined by `+` or `-`; units that are not named have weight 0.
            n_units: the number of units of the site.

        Raises:
            ValueError: if it cannot be read, spans two sites or names a unit beyond `n_units`.
        """
        terms = [_parse_term(t) for t in _split_terms(text)]
        sites = {unit.site for _, unit in terms}
        if len(sites) != 1:
            raise ValueError(f"direction {text!r} names {len(sites)} sites: expected exactly one")
        vector = torch.zeros(n_units, dtype=torch.float64)
        for weight, unit in terms:
            if unit.index >= n_units:
                raise ValueError(
                    f"unit {unit} does not exist: {unit.site} has units 0 to {n_units - 1}"
                )
            vector[unit.index] += weight
        return cls(sites.pop(), vector)

    def __str__(self) -> str:
        # `repr` of a float is the shortest text that reads back as the same number.
        terms = [
            f"{'-' if w < 0 else '+'}{abs(w)!r}*{self.site}:{i}"
            for i, w in enumerate(self.vector.tolist())
            if w != 0
        ]
        return "".join(terms).removeprefix("+")

    # A dataclass would compare tensors by `==`, which gives a tensor and not a truth value.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        return self.site == other.site and torch.equal(self.vector, other.vector)

    def __hash__(self) -> int:
        return hash((self.site, tuple(self.vector.tolist())))


_TERM = re.compile(
    r"(?P<sign>[+-]?)"
    r"(?:(?P<weight>[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\*)?"
    rf"(?P<unit>{_NAME}:[0-9]+)"
)


def _split_terms(text: str) -> list[re.Match[str]]:
    compact = text.replace(" ", "")
    # `finditer` skips what does not match: the terms must add up to the whole text.
    matches = list(_TERM.finditer(compact))
    if not matches or "".join(m[0] for m in matches) != compact:
        raise ValueError(
            f"direction {text!r} is not a sum of terms WEIGHT*SITE:INDEX, "
            "e.g. mixed3b:379+0.5*mixed3b:385"
        )
    return matches


def _parse_term(match: re.Match[str]) -> tuple[float, Unit]:
    weight = float(match["weight"] or 1.0)
    return (-weight if match["sign"] == "-" else weight), Unit.parse(match["unit"])


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` names of `known` that look most like `name`, best first.

    >>> nearest("mixd3b", ["mixed3a", "mixed3b", "conv2d0"], n=2)
    ['mixed3b', 'mixed3a']
    """
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.3)


def unknown(what: str, name: str, known: Iterable[str]) -> KeyError:
    """Make the error for a name that is not among `known`; its message offers the nearest names.

    >>> print(unknown("site", "mixd3b", ["mixed3a", "mixed3b"]).args[0])
    unknown site 'mixd3b': did you mean mixed3b, mixed3a?
    """
    names = list(known)
    close = nearest(name, names)
    if not names:
        hint = "there is none"
    elif close:
        hint = f"did you mean {', '.join(close)}?"
    else:
        hint = f"expected one of {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
    return KeyError(f"unknown {what} {name!r}: {hint}")
