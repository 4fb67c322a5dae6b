"""The sites of attention in models without hook points: queries, keys, values, scores, patterns and what heads read.

They have the names that users of TransformerLens know (`blocks.0.attn.hook_z`), and its axes. Queries, keys and values
are what the projections put out, before any rotation by positions. Which of a projection's outputs belong to a head is
found by gradients: those by which the head's queries change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from einops import EinopsError, rearrange
from torch import Tensor, nn

from circuits.autograd import recording_gradients
from circuits.call_points import Address, Scope
from circuits.hooks import Tap, intervene, observe, record
from circuits.models.adapter.affine import ADDS, Products
from circuits.models.adapter.attention import Attention, Axes, Batches, Place
from circuits.models.adapter.flow import Flow, moves, short_name
from circuits.models.adapter.program import Value
from circuits.units import Site, SiteKind

Letter = Literal["q", "k", "v"]
_LETTERS: tuple[Letter, ...] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Rearranged:
    """A layout with the same numbers in another order of axes.

    Attributes:
        held: the axes of the model's tensor, as einops writes them.
        shown: those of the site.
        sizes: the lengths that cannot be told from a tensor.
    """

    held: str
    shown: str
    sizes: Mapping[str, int]

    def read(self, held: Tensor) -> Tensor:
        return rearrange(held, f"{self.held} -> {self.shown}", **self.sizes)

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        return rearrange(value, f"{self.shown} -> {self.held}", **self.sizes)


@dataclass(frozen=True, eq=False)
class Picked:
    """A layout with some of the model's numbers: those of the heads among the outputs of a projection.

    Attributes:
        features: the layout with the projection's outputs last.
        index: which of them each head has: head x d_head.
    """

    features: Rearranged
    index: Tensor

    def read(self, held: Tensor) -> Tensor:
        value = self.features.read(held)
        first, size = int(self.index[0, 0]), self.index.numel()
        if torch.equal(self.index.flatten(), torch.arange(first, first + size)):  # a view
            return value.narrow(-1, first, size).unflatten(-1, self.index.shape)
        return value[..., self.index]

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        made = self.features.read(held).clone()
        made[..., self.index] = value
        return self.features.write(held, made)


@dataclass(frozen=True, eq=False)
class Projection:
    """What makes queries, keys or values of what attention reads.

    Attributes:
        given: the value that the weights are multiplied with.
        made: what they put out, biases included.
        first: the number of the operation that multiplies; None if what is made is a sum of several products.
        index: which outputs each group of heads has: group x d_head.
        group: the group of each head; each head is one of its own, unless they share keys or values.
        features: the layout with the outputs last.
    """

    given: Value
    made: Value
    first: int | None
    index: Tensor
    group: tuple[int, ...]
    features: Rearranged


@dataclass(frozen=True, eq=False)
class Head:
    """An attention with its name and projections.

    Attributes:
        name: `blocks.0.attn`.
        attention: where its tensors are.
        projections: those of queries, keys and values that were found, by letter.
    """

    name: str
    attention: Attention
    projections: Mapping[str, Projection]


class Points:
    """The points in a model's functions: one for each address, and one scope for each module."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._modules = dict(root.named_modules())
        self._scopes: dict[str, Scope] = {}

    def tap(self, address: Address, layout: Any = None, also: Sequence[Address] = ()) -> Tap:
        """A tap at an address; with `also`, of one tensor at all of these addresses, which count in one scope."""
        scope = self._scopes.get(address.scope)
        if scope is None:
            scope = self._scopes[address.scope] = Scope(self._modules[address.scope], self.root)
        return Tap(scope.point(address, also), None if also else 0, layout=layout)


def rearranged(place: Place) -> Rearranged:
    """How the heads of a tensor lie, with the axes of a site."""
    names = [name for axis in place.axes for name in axis]
    heads = [name for name in names if name.startswith("head")]
    head = f"({' '.join(heads)})" if len(heads) > 1 else (heads[0] if heads else "1")
    window = ["window"] if "window" in names else []
    order = ["head", "query", "key"] if "query" in names else ["position", "head", "d_head"]
    shown = ["batch", *window, *(head if name == "head" else name for name in order)]
    held = [
        f"({' '.join(axis)})" if len(axis) > 1 else (axis[0] if axis else "1")
        for axis in place.axes
    ]
    return Rearranged(" ".join(held), " ".join(shown), dict(place.sizes))


def _site(
    name: str, layout: Any, shape: Sequence[int], windows: bool, aliases: Sequence[str]
) -> Site:
    shown = tuple(layout.read(torch.zeros(tuple(shape))).shape[1:])
    ends = name.rpartition(".")[2]
    pattern = ends in ("hook_pattern", "hook_attn_scores")
    window = ("window",) if windows else ()
    inner = ("head", "query", "key") if pattern else ("position", "head", "d_head")
    axes = ("batch", *window, *inner)
    kind: SiteKind = "pattern" if pattern else "head"
    return Site(name, kind, axes, axes.index("head"), shown, tuple(aliases), "HookPoint")


def head_sites(heads: Sequence[Head], flow: Flow, points: Points) -> Iterator[tuple[Site, Tap]]:
    """The sites of attentions."""
    modules = [head.attention.module for head in heads]
    for head in heads:
        own, path = head.attention, head.attention.module[0]
        only = modules.count(own.module) == 1 and path and sum(m[0] == path for m in modules) == 1

        def made(
            what: str,
            place: Place,
            layout: Any,
            head: Head = head,
            path: str = path,
            only: bool = bool(only),
        ) -> tuple[Site, Tap]:
            name = f"{head.name}.{what}"
            other = f"{path}.{what}"
            aliases = [other] if only and other != name else []
            windows = any("window" in axis for axis in place.axes)
            site = _site(name, layout, place.shape, windows, aliases)
            return site, points.tap(place.address, layout)

        for letter, place in zip(_LETTERS, (own.query, own.key, own.value), strict=True):
            projection = head.projections.get(letter)
            turned = (
                letter != "v"
                and projection is not None
                and _turns(flow, projection.made, place.value)
            )
            if projection is None:
                yield made(f"hook_{letter}", place, rearranged(place))
                continue
            address = flow.address_of(projection.made)
            assert address is not None, "it was read to find the heads"
            shape = flow.shape(projection.made)
            windows: Axes = (("window",),) if "window" in projection.features.shown else ()
            held = Place(projection.made, address, windows, shape)
            yield made(f"hook_{letter}", held, Picked(projection.features, projection.index))
            if turned:
                shown = _before_repeats(flow, projection, place)
                yield made(f"hook_rot_{letter}", shown, rearranged(shown))
        if own.scores is not None:
            yield made("hook_attn_scores", own.scores, rearranged(own.scores))
        yield made("hook_pattern", own.pattern, rearranged(own.pattern))
        yield made("hook_z", own.z, rearranged(own.z))


def _before_repeats(flow: Flow, projection: Projection, place: Place) -> Place:
    """Keys before they are repeated for the heads of a group; where they are multiplied, if that is not found."""
    if place.heads == len(projection.index):
        return place
    op = None if place.value is None else flow.operation(place.value)
    while op is not None and moves(op) and len(op.inputs) == 1:
        found = _of_projection(flow, projection, op.inputs[0])
        if found is not None:
            return found
        op = flow.operation(op.inputs[0])
    return place


def _of_projection(flow: Flow, projection: Projection, value: Value) -> Place | None:
    """A value that is made of a projection number by number, with its axes; None if they are not told by that."""
    address, moved = flow.address_of(value), flow.moved(projection.made, value)
    if address is None or moved is None:
        return None
    made = torch.arange(math.prod(flow.shape(projection.made))).reshape(flow.shape(projection.made))
    wanted = Picked(projection.features, projection.index).read(made)
    names = ("batch", "position", "head", "d_head")
    joined: Axes = (("batch",), ("position",), ("head", "d_head"))
    sizes: dict[str, int] = {"head": len(projection.index), "d_head": projection.index.shape[1]}
    orders: list[Axes] = [tuple((n,) for n in order) for order in itertools.permutations(names)]
    for axes in [joined, *orders]:
        if len(axes) == moved.ndim and wanted.ndim == 4:
            place = Place(value, address, axes, tuple(moved.shape), sizes)
            try:
                if torch.equal(rearranged(place).read(moved), wanted):
                    return place
            except EinopsError:  # the sizes are others
                continue
    return None


def normed_sites(
    heads: Sequence[Head], flow: Flow, ends: Iterable[tuple[Value, Value]], points: Points
) -> Iterator[tuple[Site, Tap]]:
    """The sites of queries and keys after their normalisation, where a module normalises them (as in Qwen 3).

    Args:
        heads: the attentions.
        flow: the operations of a pass.
        ends: what each module was given and what it returned.
        points: where functions are watched.
    """
    pairs = [(given, made) for given, made in ends if given != made]
    for head in heads:
        for letter, place in (("q", head.attention.query), ("k", head.attention.key)):
            projection = head.projections.get(letter)
            if projection is None or place.value is None:
                continue
            between = {
                v
                for i in flow.between(projection.made, place.value)
                for v in (*flow.program.operations[i].inputs, *flow.program.operations[i].outputs)
            }
            given, made = next(
                ((g, m) for g, m in pairs if g in between and m in between), (None, None)
            )
            # Where queries are turned first (Hunyuan), what is normalised is no site: it is not what is turned.
            if given is None or made is None or _turns(flow, projection.made, given):
                continue
            shown = _of_projection(flow, projection, made)
            if shown is not None:
                layout = rearranged(shown)
                site = _site(f"{head.name}.hook_{letter}_normed", layout, shown.shape, False, ())
                yield site, points.tap(shown.address, layout)


def _turns(flow: Flow, start: Value, end: Value | None) -> bool:
    """Whether queries or keys are turned by their positions between a projection and the product."""
    assert end is not None, "an operand is a value"
    for i in flow.between(start, end):
        op = flow.program.operations[i]
        several = sum(v in flow.dependent for v in dict.fromkeys(op.inputs)) > 1
        if several and short_name(op) in ("add", "__add__", "__iadd__", "cat", "stack", "concat"):
            return True
        if short_name(op) == "view_as_complex":
            return True
    return False


@dataclass(frozen=True)
class Seen:
    """What a pass shows of taps.

    Attributes:
        order: those that were reached, in the order in which they were.
        overwritten: those whose tensor a later operation changed in place.
    """

    order: list[str]
    overwritten: set[str]


def look_at(module: nn.Module, example: Tensor, taps: Mapping[str, Tap]) -> Seen:
    """Run a model and see when each tap is reached.

    Args:
        module: the model.
        example: what it is called with.
        taps: where to look, by name.
    """
    seen: dict[str, tuple[Tensor, int]] = {}

    def look(name: str, value: Tensor) -> None:
        seen[name] = value, value._version

    with observe(module, {name: (tap, partial(look, name)) for name, tap in taps.items()}):
        module(example.clone())
    written = {name for name, (value, version) in seen.items() if value._version != version}
    return Seen(list(seen), written)


def checked(
    module: nn.Module, example: Tensor, attentions: Sequence[Attention], flow: Flow, points: Points
) -> tuple[list[Attention], dict[str, str]]:
    """Attentions of which the pattern and the values give what the heads read, and why the others do not.

    Where an axis holds examples and heads (or windows), which of them comes first is found by changing one example.

    Args:
        module: the model.
        example: two examples.
        attentions: what was found.
        flow: the operations of a pass.
        points: where functions are watched.

    Raises:
        ValueError: if a person has declared one that does not.
    """
    kept, refused = [], {}
    for one in attentions:
        own = _in_order_of_examples(module, example, one, points)
        if own is None:
            refused[flow.called(one.last)] = (
                "an axis holds examples and heads in no order that is known"
            )
            continue
        gap, size, most = (0.0, 1.0, CLOSE) if own.mixed else _gap(module, example, own, points)
        if gap <= most * size:
            kept.append(own)
        elif own.declared:
            raise ValueError(
                f"attention: {own.declared} does not read its values by its pattern: pattern @ v differs from what its "
                f"heads read by {gap:.2g}, where the largest number is {size:.2g}: expected {most:.2g} of that at most"
            )
        else:
            refused[flow.called(own.last)] = (
                f"pattern @ v differs from what its heads read by {gap:.2g}, where the largest number is {size:.2g}"
            )
    return kept, refused


def _gap(
    module: nn.Module, example: Tensor, own: Attention, points: Points
) -> tuple[float, float, float]:
    """How far pattern @ v is from what heads read, the largest number of that, and which share of it is rounding."""
    places = {"pattern": own.pattern, "v": own.value, "z": own.z}
    taps = {name: points.tap(place.address, rearranged(place)) for name, place in places.items()}
    with record(module, taps) as found:
        module(example.clone())
    pattern, v, z = (found[name].double() for name in places)
    size, most = float(z.abs().max()), max(CLOSE, 4 * torch.finfo(found["z"].dtype).eps)
    if pattern.shape[-1] != v.shape[-3]:  # a learned sink, which weighs no value
        return 0.0, size, most
    n = pattern.shape[-3] // v.shape[-2]
    # Groups of heads share values: neighbours do, or every so-and-so-many-th.
    shared = [v.repeat_interleave(n, -2)]
    shared += [torch.cat([v] * n, -2)] if n > 1 else []
    made = [torch.einsum("...hqk,...khd->...qhd", pattern, each) for each in shared]
    return min(float((each - z).abs().max()) for each in made), size, most


def _in_order_of_examples(
    module: nn.Module, example: Tensor, own: Attention, points: Points
) -> Attention | None:
    """An attention in which an axis over examples and heads (or windows) has them in the order in which they lie.

    None if they lie in neither order.
    """
    joined = next((n for n, axis in enumerate(own.z.axes) if len(axis) == 2), None)
    if joined is None:
        return own
    other = example.clone()
    other[1] = example[0]
    tap = {"z": points.tap(own.z.address)}
    found = []
    for inputs in (example, other):
        with record(module, tap) as seen:
            module(inputs.clone())
        found.append(seen["z"].movedim(joined, 0).flatten(1))
    changed = (found[0] - found[1]).abs().amax(1) > 1e-6 * found[0].abs().max()
    n = len(changed) // 2
    if not changed[:n].any() and changed[n:].any():
        return own
    if not changed[::2].any() and changed[1::2].any():
        places = {
            name: replace(
                place, axes=tuple(axis[::-1] if len(axis) == 2 else axis for axis in place.axes)
            )
            for name, place in vars(own).items()
            if isinstance(place, Place)
        }
        return replace(own, **places)
    return None


CLOSE = 1e-5
"""How far numbers that are computed in another order may be apart, of the largest of them."""


# --- projections -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A product with weights that may be a projection: what goes in, what comes out, and which operation it is."""

    given: Value
    made: Value
    first: int | None


def _candidate(flow: Flow, batches: Batches, place: Place) -> _Candidate | None:
    """The product with weights that a factor comes from, or the sum of several; None if there is none.

    There is none, either, if something is added on the way that is no product: values that are the stream itself are
    not what an earlier layer added to it.
    """
    assert place.value is not None, "an operand is a value"
    products = Products(flow, batches)
    found = products.affines_before(place.value)
    if not found or _adds_another(products, place.value):
        return None
    first = min(found, key=lambda affine: affine.first)
    given = batches.apart(first.given, forward=False)
    if len(found) == 1:
        return _Candidate(given, first.made, first.first)
    made = _sum_of(products, place.value, {affine.first for affine in found})
    return None if made is None else _Candidate(given, batches.apart(made, forward=True), None)


def _adds_another(products: Products, value: Value) -> bool:
    """Whether on the way from products to a value something is added that depends on the input and is of no product."""
    flow, stop = products.flow, products.is_product
    for i in flow.before(value, stop):
        op = flow.program.operations[i]
        if stop(i) or short_name(op) not in ADDS:
            continue
        for given in flow.dependent.intersection(op.inputs):
            if not any(stop(j) for j in flow.before(given, stop)):
                return True
    return False


def _sum_of(products: Products, value: Value, firsts: set[int]) -> Value | None:
    """The first sum of all of some products on the way to a value, as of weights and an adapter (LoRA)."""
    flow, stop = products.flow, products.is_product
    for i in sorted(flow.before(value, stop)):
        op = flow.program.operations[i]
        if short_name(op) in ADDS:
            inside = {j for j in flow.before(op.outputs[0], stop) if stop(j)}
            if inside == firsts:
                return op.outputs[0]
    return None


def _wanted(flow: Flow, batches: Batches, attentions: Sequence[Attention]) -> list[Wanted]:
    """The products that may be projections of queries, keys and values, with the number of their attention."""
    wanted: list[Wanted] = []
    for n, own in enumerate(attentions):
        places: dict[Letter, Place] = {"q": own.query, "k": own.key, "v": own.value}
        candidates: dict[Letter, _Candidate] = {
            letter: found
            for letter, place in places.items()
            if (found := _candidate(flow, batches, place)) is not None
        }
        # What others are made of is what attention reads, not what a projection of its own makes of that.
        read = {v for c in candidates.values() for v in _made_of(flow, c.given)}
        for letter in _LETTERS:
            own_candidate = candidates.get(letter)
            if own_candidate is None or own_candidate.made in read:
                continue
            if flow.address_of(own_candidate.made) is not None:
                wanted.append((n, letter, places[letter], own_candidate))
    return wanted


def find_projections(
    module: nn.Module,
    example: Tensor,
    flow: Flow,
    attentions: Sequence[Attention],
    batches: Batches,
    points: Points,
    running: Callable[[nn.Module], Any],
) -> list[dict[str, Projection]]:
    """The projections of queries, keys and values of attentions, where they can be found.

    Args:
        module: the model.
        example: two examples.
        flow: the operations of a pass.
        attentions: where heads are.
        batches: which axes follow the batch.
        points: where functions are watched.
        running: the context in which the model is called.
    """
    wanted = _wanted(flow, batches, attentions)
    made: list[dict[str, Projection]] = [{} for _ in attentions]
    if not wanted:
        return made
    try:
        found = _by_gradients(module, example, flow, wanted, points, running)
    except (
        RuntimeError,
        ValueError,
    ):  # what is written by `out=`, or made in inference mode, has no gradient
        found = {}
    for n, letter, place, candidate in wanted:
        for slope in (found.get((n, letter)), _by_places(flow, place, candidate)):
            try:
                projection = slope and _projection(flow, place, candidate, slope, batches)
            except (RuntimeError, ValueError):  # what is needed for the gradient is overwritten
                continue
            if projection is not None:
                made[n][letter] = projection
                break
    return made


Slope = Callable[..., Tensor]
"""How strongly what an index picks of an operand (position, then head) depends on each of a projection's outputs."""

Wanted = tuple[int, Letter, Place, _Candidate]


def _by_gradients(
    module: nn.Module,
    example: Tensor,
    flow: Flow,
    wanted: Sequence[Wanted],
    points: Points,
    running: Callable[[nn.Module], Any],
) -> dict[tuple[int, Letter], Slope]:
    """What operands depend on, by gradients of sums with random weights."""
    leaves: dict[Value, Tensor] = {}

    def leaf(value: Value, tensor: Tensor) -> Tensor:
        leaves[value] = tensor.detach().clone().requires_grad_(True)
        return leaves[value] * 1  # what follows may write in place, which a leaf forbids

    taps = []
    for value in dict.fromkeys(c.made for *_, c in wanted):
        address = flow.address_of(value)
        assert address is not None, "checked before"
        taps.append((points.tap(address), partial(leaf, value)))
    read = {
        f"{n}{letter}": points.tap(place.address, rearranged(place))
        for n, letter, place, _ in wanted
    }
    with (
        running(module),
        recording_gradients(),
        intervene(module, taps),
        record(module, read) as operands,
    ):
        module(example.clone())
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[int, Letter], Slope] = {}
    for n, letter, _, candidate in wanted:
        operand, made = operands.get(f"{n}{letter}"), leaves.get(candidate.made)
        if operand is not None and made is not None and operand.requires_grad:
            weights = torch.randn(operand.shape, generator=generator).to(operand)
            found[n, letter] = partial(_gradient, operand, weights, made)
    return found


@recording_gradients()
def _gradient(operand: Tensor, weights: Tensor, leaf: Tensor, *index: Any) -> Tensor:
    chosen = (..., *index, *[slice(None)] * (3 - len(index)))
    total = (operand[chosen] * weights[chosen]).sum()
    (found,) = torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found.abs()


def _by_places(flow: Flow, place: Place, candidate: _Candidate) -> Slope | None:
    """What operands depend on, by where their numbers come from if those between do no more than scale them."""
    assert place.value is not None, "an operand is a value"
    moved = flow.moved(candidate.made, place.value)
    if moved is None:
        return None
    shape, numbers = flow.shape(candidate.made), rearranged(place).read(moved)

    def slope(*index: Any) -> Tensor:
        made = torch.zeros(math.prod(shape))
        made[numbers[(..., *index, *[slice(None)] * (3 - len(index)))].flatten()] = 1
        return made.reshape(shape)

    return slope


def _projection(
    flow: Flow,
    place: Place,
    candidate: _Candidate,
    slope: Slope,
    batches: Batches,
) -> Projection | None:
    """Which of the outputs of a product with weights each head of an operand has.

    Args:
        slope: how the operand depends on them: batch x (window) x position x head x d_head.
    """
    operand = rearranged(place).read(torch.zeros(place.shape)).shape
    rank = len(flow.shape(candidate.made))
    batch = [(axis, m) for axis in range(rank) if (m := batches.of(candidate.made, axis))]
    if len(batch) != 1:
        return None
    (batch_axis, m), others = batch[0], [a for a in range(rank) if a != batch[0][0]]
    # An axis along which another position is made of another entry runs over positions.
    first, second = slope(0), slope(operand[-3] - 1)
    places = [a for a in others if _extent(first, a) != _extent(second, a)]
    features = [a for a in others if a not in places]
    if operand[-3] > 1 and not places and m == 1:
        return None
    windows = m > 1
    if windows and len(operand) != 5:
        return None
    layout = _features_last(flow.shape(candidate.made), batch_axis, m, places, features)
    strength = torch.stack(
        [layout.read(slope(slice(None), h)).flatten(0, -2).amax(0) for h in range(operand[-2])]
    )
    owned = _owners(strength)
    if owned is None:  # each head depends on all outputs: they are normalised together
        owned = _by_place(flow, candidate, place, layout)
    if owned is None:
        return None
    return Projection(candidate.given, candidate.made, candidate.first, *owned, layout)


def _features_last(
    shape: Sequence[int], batch_axis: int, m: int, places: Sequence[int], features: Sequence[int]
) -> Rearranged:
    """The layout of a tensor with its batch first, windows, positions and its features last, each as one axis."""
    windows = m > 1
    names = {batch_axis: "(batch window)" if windows else "batch"}
    names |= {a: f"p{i}" for i, a in enumerate(places)} | {
        a: f"f{i}" for i, a in enumerate(features)
    }
    position = f"({' '.join(names[a] for a in places)})" if len(places) != 1 else names[places[0]]
    shown = (
        f"batch {'window ' if windows else ''}{position} ({' '.join(names[a] for a in features)})"
    )
    sizes = {f"f{i}": shape[a] for i, a in enumerate(features)}
    sizes |= {f"p{i}": shape[a] for i, a in enumerate(places)} if len(places) > 1 else {}
    sizes |= {"window": m} if windows else {}
    return Rearranged(" ".join(names[a] for a in range(len(shape))), shown, sizes)


def _extent(value: Tensor, axis: int) -> tuple[int, ...]:
    """The entries of an axis at which a tensor is not zero."""
    other = [a for a in range(value.ndim) if a != axis]
    return tuple(value.amax(other).nonzero().flatten().tolist())


def _owners(strength: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
    """The outputs that each group of heads has, and the group of each head, given how strongly heads depend on outputs.

    None if heads share some of them only.
    """
    groups, of_head = _distinct(strength > 0)
    together = torch.stack(groups).sum(0)
    sizes = {int(own.sum()) for own in groups}
    everything = len(groups) == 1 < len(strength) and bool(groups[0].all())
    if bool((together > 1).any()) or len(sizes) != 1 or 0 in sizes or everything:
        # One group that has all outputs may also be one head of keys for all, which `_by_place` finds as well.
        return None
    return torch.stack([own.nonzero().flatten() for own in groups]).cpu(), of_head


def _distinct(rows: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """The rows that differ, in the order in which they first occur, and which of them each row is."""
    groups: list[Tensor] = []
    of_row = []
    for own in rows:
        same = [n for n, other in enumerate(groups) if torch.equal(own, other)]
        of_row.append(same[0] if same else len(groups))
        groups += [] if same else [own]
    return groups, tuple(of_row)


def _by_place(
    flow: Flow, candidate: _Candidate, place: Place, layout: Rearranged
) -> tuple[Tensor, tuple[int, ...]] | None:
    """The same by where their numbers go, if those between do no more than scale them."""
    assert place.value is not None, "an operand is a value"
    moved = flow.moved(candidate.made, place.value)
    if moved is None:
        return None
    shape = flow.shape(candidate.made)
    features = layout.read(torch.zeros(shape)).shape
    number = layout.write(torch.zeros(shape), torch.arange(features[-1]).expand(features))
    heads = rearranged(place).read(number.flatten()[moved])
    groups, of_head = _distinct(heads[(0,) * (heads.ndim - 2)].sort(-1).values)
    index = torch.stack(groups)
    return (index, of_head) if len(index.unique()) == index.numel() else None


def reads_one(flow: Flow, one: Value, other: Value) -> bool:
    """Whether two values are made of one stream by norms and the like, with no product and no table between."""
    return not _made_of(flow, one).isdisjoint(_made_of(flow, other))


def _made_of(flow: Flow, value: Value) -> set[Value]:
    """What a value is made of by norms and the like, with itself: up to the nearest products and tables."""

    def stop(i: int) -> bool:
        op = flow.program.operations[i]
        attends = short_name(op) in ("scaled_dot_product_attention", "embedding")
        return attends or flow.product(i) is not None

    found = {value}
    for i in flow.before(value, stop):
        found.update(flow.program.operations[i].outputs)
    return found


def named(
    attentions: Sequence[Attention], projections: Sequence[Mapping[str, Projection]], flow: Flow
) -> list[Head]:
    """Attentions with their names: `blocks.N.attn`; in models with an encoder and a decoder those that bridges have."""
    crossed = [
        "q" in p and "k" in p and not reads_one(flow, p["q"].given, p["k"].given)
        for p in projections
    ]
    if not any(crossed):
        return _in_blocks(attentions, projections)
    first = crossed.index(True)
    read = projections[first]["k"].given
    below = {
        v for i in flow.before(read, lambda _: False) for v in flow.program.operations[i].outputs
    }
    heads, encoders, decoders = [], 0, 0
    for own, p, cross in zip(attentions, projections, crossed, strict=True):
        if cross:
            numbers = (n for n in itertools.count(max(decoders - 1, 0)))
            taken = {head.name for head in heads}
            name = next(
                name for n in numbers if (name := f"decoder_blocks.{n}.cross_attn") not in taken
            )
        elif own.z.value in below:
            name, encoders = f"encoder_blocks.{encoders}.attn", encoders + 1
        else:
            name, decoders = f"decoder_blocks.{decoders}.self_attn", decoders + 1
        heads.append(Head(own.declared or name, own, p))
    return heads


def _in_blocks(
    attentions: Sequence[Attention], projections: Sequence[Mapping[str, Projection]]
) -> list[Head]:
    """`blocks.N.attn`, and `blocks.N.attn.H` where each head of a block is an attention by itself."""
    taken = {own.declared for own in attentions}
    numbers = (n for n in itertools.count() if f"blocks.{n}.attn" not in taken)
    heads: list[Head] = []
    for _, group in itertools.groupby(zip(attentions, projections, strict=True), _read_alone):
        together = list(group)
        if together[0][0].declared:
            heads += [Head(own.declared, own, p) for own, p in together]
            continue
        name = f"blocks.{next(numbers)}.attn"
        heads += [
            Head(f"{name}.{h}" if len(together) > 1 else name, own, p)
            for h, (own, p) in enumerate(together)
        ]
    return heads


def _read_alone(found: tuple[Attention, Mapping[str, Projection]]) -> object:
    """What an attention of one head reads, if it was found; equal for those that are one block."""
    own, projections = found
    alone = own.n_heads <= 1 and not own.declared and "q" in projections
    return projections["q"].given if alone else own.last
