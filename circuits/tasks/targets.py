"""Targets: a class, a token's logit or any unit, as one number for each example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import listed_error
from circuits.stimuli.labels import index_of
from circuits.tensors import at_least_single
from circuits.units import Site, Unit, unknown

Quantity = Literal["activation", "probability", "log_probability"]
"""The unit's activation (for an output, its logit), its probability under a softmax over the site's units, or the
logarithm of that probability."""

_OUTPUTS = ("class", "token")
_AT = re.compile(r"(?P<what>.+?)@(?P<at>-?[0-9]{1,18}(,-?[0-9]{1,18})*)")


@dataclass(frozen=True)
class Target:
    """A number that a model computes for each example.

    Attributes:
        site: the target's site.
        index: the unit: one for all examples, one for each example, or None for each example's largest (for an output,
            its prediction).
        at: the position along `position_axes`, negative from the end; one for all examples or one for each. None is
            the last token of an output over tokens; elsewhere it is the most active position of each example, which
            stays fixed while the example is changed.
        against: a unit whose number is subtracted, as in a logit difference: one for all examples, or one for each.
        quantity: activation, probability or log-probability.
    """

    site: str
    index: int | tuple[int, ...] | None
    at: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    against: int | tuple[int, ...] | None = None
    quantity: Quantity = "activation"

    def of_examples(self, examples: range) -> Target:
        """The same target for some of the examples."""
        some = slice(examples.start, examples.stop)
        index = self.index[some] if isinstance(self.index, tuple) else self.index
        against = self.against[some] if isinstance(self.against, tuple) else self.against
        each = self.at is not None and len(self.at) > 0 and isinstance(self.at[0], tuple)
        at = self.at[some] if each and self.at else self.at
        return replace(self, index=index, at=at, against=against)  # type: ignore[arg-type]

    def ceiling(self, model: HookedModel) -> float | None:
        """What it cannot exceed, as after ReLU6; None without such a limit."""
        plain = self.quantity == "activation" and self.against is None
        return model.site(self.site).ceiling if plain else None

    def __str__(self) -> str:
        which = "top" if self.index is None else self.index
        if isinstance(which, tuple):
            which = ",".join(map(str, which))
        text = f"{self.site}:{which}"
        if self.at is not None:
            each = [at if isinstance(at, tuple) else (at,) for at in self.at]
            text += "@" + (";" if each and len(each[0]) > 1 else ",").join(
                ",".join(map(str, at)) for at in each
            )
        if self.against is not None:
            other = self.against if isinstance(self.against, tuple) else (self.against,)
            text += f" - {self.site}:{','.join(map(str, other))}"
        prefix = {"activation": "", "probability": "p", "log_probability": "log p"}[self.quantity]
        return f"{prefix}({text})" if prefix else text


def output_site(model: HookedModel) -> Site:
    """The site of a model's logits: the last site of kind `logit`, or the last site if there is none.

    Raises:
        ValueError: if the model returns a list of examples, as detection models do.
    """
    if model.listed:
        raise listed_error(model.name)
    return next((s for s in reversed(model.sites) if s.kind == "logit"), model.sites[-1])


def parse_target(
    model: HookedModel, text: str, against: str = "", quantity: Quantity = "activation"
) -> Target:
    """Parse a target.

    Args:
        model: the model.
        text: `top` (each example's prediction), `class:NAME` or `class:INDEX`, `token:WORD` or `token:INDEX`, or a
            unit `SITE:INDEX`; each may end in `@POSITION` (`@Y,X` on a map).
        against: a class or token of the output to subtract.
        quantity: activation, probability or log-probability.

    Raises:
        KeyError: if there is no such class, token or site.
        ValueError: if the text has none of these forms, or there is no such unit.

    >>> from circuits.models.zoo.loading import load_model
    >>> str(parse_target(load_model("shapes"), "mixed3b:3@4,4"))
    'mixed3b:3@4,4'
    """
    # A name that ends in what looks like a position is a name first.
    whole = text.partition(":")[2] in _output_names(model)
    match = None if whole else _AT.fullmatch(text)
    what, at = text, None
    if match is not None:
        what = match["what"]
        at = tuple(int(n) for n in match["at"].split(","))
    other = None
    if what == "top":
        made = Target(output_site(model).name, None, at)
    else:
        unit = output_unit(model, what) or model.unit(_parsed_unit(what))
        made = Target(unit.site, unit.index, at)
    if against:
        if made.site != output_site(model).name:
            raise ValueError(
                f"against {against!r} does not go with target {text!r}: expected a class or a token as the target"
            )
        kind = "token" if isinstance(model.input, TokenInput) else "class"
        named = against if against.partition(":")[0] in _OUTPUTS else f"{kind}:{against}"
        other = output_index(model, named)
    return as_target(model, replace(made, against=other, quantity=quantity))


def _parsed_unit(text: str) -> Unit:
    try:
        return Unit.parse(text)
    except ValueError:
        raise ValueError(
            f"target {text!r} is not one of top, class:NAME, token:WORD or SITE:INDEX (with @POSITION)"
        ) from None


def output_unit(model: HookedModel, text: str) -> Unit | None:
    """The output that `class:NAME` or `token:WORD` names, whatever characters are in the name; None of other texts.

    Raises:
        KeyError: if there is no such class or token.
        ValueError: if several have the name, or its number is out of range.
    """
    if text.partition(":")[0] not in _OUTPUTS:
        return None
    return output_site(model).unit(output_index(model, text))


def _output_names(model: HookedModel) -> Sequence[str]:
    return model.input.vocabulary if isinstance(model.input, TokenInput) else model.classes


def output_index(model: HookedModel, text: str) -> int:
    """The index of the output that `class:NAME` or `token:WORD` names."""
    kind, _, name = text.partition(":")
    site = output_site(model)
    names = _output_names(model)
    if name in names:
        return index_of(name, names, kind)
    close = [i for i, n in enumerate(names) if name and name.lower() in re.split(r", ?", n.lower())]
    if len(close) == 1:  # ImageNet's class names are lists of synonyms: "tench, Tinca tinca"
        return close[0]
    if re.fullmatch("[0-9]{1,18}", name):
        if int(name) >= site.n_units:
            raise ValueError(
                f"target {text!r} is out of range: expected {kind}:0 to {site.n_units - 1}"
            )
        return int(name)
    raise unknown(f"{kind} of {model.name}", name, names or ["a number"])


def as_target(model: HookedModel, target: str | Unit | Target) -> Target:
    """A target from its text or from a unit, or a target checked against the model.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if there is no such unit, or the position has the wrong number of axes.
    """
    if isinstance(target, str):
        return parse_target(model, target)
    if isinstance(target, Unit):
        unit = model.unit(target)
        return Target(unit.site, unit.index)
    if target.quantity not in get_args(Quantity):
        raise ValueError(
            f"quantity {target.quantity!r} is not one of {', '.join(get_args(Quantity))}"
        )
    site = model.site(target.site)
    target = replace(target, index=_tuple(target.index), against=_tuple(target.against))
    for index in (*_each(target.index), *_each(target.against)):
        if index is not None:
            site.unit(index)
    if any(len(at) != len(site.position_axes) for at in _each_position(target)):
        axes = ", ".join(site.position_axes) or "none"
        raise ValueError(
            f"target {target}: position {target.at} does not fit the axes of {site.name} ({axes})"
        )
    return replace(target, site=site.name)


def _tuple(units: Any) -> Any:
    """Units for each example as a tuple, whichever sequence they came in."""
    return tuple(map(int, units)) if isinstance(units, Sequence | np.ndarray | Tensor) else units


def _each(units: int | tuple[int, ...] | None) -> tuple[int | None, ...]:
    return units if isinstance(units, tuple) else (units,)


def _among_tokens(site: Site, target: Target, mask: Tensor) -> Tensor | None:
    """The position that a target names in each padded text: it counts the text's own tokens, not the padding."""
    positions = [at[0] for at in _each_position(target)] or ([-1] if site.kind == "logit" else [])
    if not positions:
        return None
    check_indices(target, len(mask))
    wanted = torch.tensor(positions, device=mask.device).expand(len(mask))
    lengths, first = mask.sum(1), mask.int().argmax(1)
    far = (wanted < -lengths) | (wanted >= lengths)
    if bool(far.any()):
        i = int(far.int().argmax())
        raise ValueError(
            f"target {target}: position {int(wanted[i])} is outside example {i}: expected {-int(lengths[i])} to "
            f"{int(lengths[i]) - 1}"
        )
    return first + torch.where(wanted < 0, wanted + lengths, wanted)


def _each_position(target: Target) -> list[tuple[int, ...]]:
    """The positions that a target names: none, one for all examples, or one for each."""
    if target.at is None:
        return []
    if target.at and isinstance(target.at[0], tuple):
        return [at for at in target.at if isinstance(at, tuple)]
    return [tuple(i for i in target.at if isinstance(i, int))]


def check_indices(target: Target, n: int) -> None:
    """Raise ValueError if a target has several indices, units against or positions, but not one each of n examples."""
    positions = _each_position(target)
    if len(positions) > 1 and len(positions) != n:
        raise ValueError(
            f"target has {len(positions)} positions for {n} examples: expected one each"
        )
    for what, units in (("indices", target.index), ("units against", target.against)):
        if isinstance(units, tuple) and len(units) != n:
            raise ValueError(f"target has {len(units)} {what} for {n} examples: expected one each")


@dataclass(frozen=True, eq=False)
class Aim:
    """A target resolved on examples: which unit, at which position, for each example.

    Attributes:
        target: the target that was asked for.
        site: its site.
        indices: the unit of each example.
        places: the flattened position of each example.
        shape: the shape of the positions, before flattening.
    """

    target: Target
    site: Site
    indices: Int[Tensor, " example"]
    places: Int[Tensor, " example"]
    shape: tuple[int, ...]

    @classmethod
    def at(
        cls,
        site: Site,
        target: Target,
        value: Tensor,
        mask: Bool[Tensor, "example position"] | None = None,
        before: Tensor | None = None,
    ) -> Aim:
        """Resolve a target on examples, given the site's tensor.

        Args:
            site: the target's site.
            target: the target.
            value: the site's tensor.
            mask: True at tokens, False at padding, for texts that were padded; padding is never the target.
            before: of a site with a ceiling, the tensor of the site before it: of positions that are equal at the
                ceiling, the one with the largest number there is the target.

        Raises:
            ValueError: if the target has several indices or positions but not one for each example, or a position is
                not on the map.
        """
        # Detached: which unit and position is the target is a choice, and no gradient flows through it.
        units = site.activations((value if before is None else before).detach())
        n = len(units)
        check_indices(target, n)
        if mask is not None and site.position_axes == ("position",):
            units = units.masked_fill(~mask[:, None].to(units.device), -torch.inf)
        places = cls._fixed(site, target, value, n, mask)
        if target.index is None:
            if places is None:
                # units are example x unit x position: the largest number decides unit and position at once.
                largest = units.flatten(1).argmax(1)
                indices, places = largest // units.shape[2], largest % units.shape[2]
            else:
                indices = units[torch.arange(n), :, places].argmax(1)
        else:
            given = target.index if isinstance(target.index, tuple) else (target.index,) * n
            indices = torch.tensor(given, device=units.device)
        if places is None:
            places = units[torch.arange(n), indices].argmax(1)
        return cls(target, site, indices, places, site.positions_of(value))

    def of(self, example: int) -> Target:
        """The target of one example, with its resolved unit and position."""
        at = np.unravel_index(int(self.places[example]), self.shape) if self.shape else None
        where = None if at is None else tuple(int(i) for i in at)
        against = self.target.against
        if isinstance(against, tuple):
            against = against[example]
        return replace(self.target, index=int(self.indices[example]), at=where, against=against)

    @staticmethod
    def _fixed(
        site: Site, target: Target, value: Tensor, n: int, mask: Tensor | None = None
    ) -> Tensor | None:
        """The flattened position that a target names; None if it names none."""
        axes = site.position_axes
        if mask is not None and axes == ("position",):
            return _among_tokens(site, target, mask.to(value.device))
        positions = _each_position(target)
        if not positions and site.kind == "logit" and axes == ("position",):
            positions = [(-1,)]
        if not positions:
            return None
        check_indices(target, n)
        places = []
        for at in positions:
            place = 0  # row-major, as `flatten` lays positions out
            for axis, length, index in zip(axes, site.positions_of(value), at, strict=True):
                if not -length <= index < length:
                    raise ValueError(
                        f"target {target}: position {index} along {axis} is out of range: expected {-length} to "
                        f"{length - 1}"
                    )
                place = place * length + index % length
            places.append(place)
        return torch.tensor(places, device=value.device).expand(n)

    def value(self, tensor: Tensor, examples: Int[Tensor, " point"]) -> Float[Tensor, " point"]:
        """The target's number for tensors at its site, each of which is a version of one of the examples."""
        units = self.site.activations(tensor)  # point x unit x position
        rows = torch.arange(len(units), device=units.device)
        here = at_least_single(units[rows, :, self.places[examples]])
        if self.target.quantity == "probability":
            here = here.softmax(1)
        elif self.target.quantity == "log_probability":
            here = here.log_softmax(1)
        found, against = here[rows, self.indices[examples]], self.target.against
        if against is None:
            return found
        if isinstance(against, int):
            return found - here[:, against]
        return found - here[rows, torch.tensor(against, device=here.device)[examples]]

    def names(self) -> list[str]:
        """Each example's unit as text, with its position where the site has several."""
        found = []
        for index, place in zip(self.indices.tolist(), self.places.tolist(), strict=True):
            at = np.unravel_index(place, self.shape) if self.shape else ()
            where = "@" + ",".join(str(int(i)) for i in at) if at else ""
            found.append(f"{self.site.name}:{index}{where}")
        return found


def named(model: HookedModel, aim: str) -> str:
    """A target in words, with the name of its class or token if it is one of the output."""
    site, _, rest = aim.partition(":")
    if site != output_site(model).name:
        return aim
    index = int(rest.partition("@")[0])
    if isinstance(model.input, TokenInput):
        return f"{aim} ({model.input.word(index)!r})"
    return f"{aim} ({model.classes[index]})" if model.classes else aim
