"""Products with weights in a pass: projections, output weights, the layers of an MLP; and where in the model's
parameters the weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.call_points import Address
from circuits.models.adapter.attention import Batches
from circuits.models.adapter.flow import (
    SHAPE_ONLY,
    Flow,
    Product,
    moves,
    short_name,
    substituted,
)
from circuits.models.adapter.program import Operation, Value

ADDS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
"""Functions that add two tensors."""


@dataclass(frozen=True)
class Affine:
    """A product with weights and what is added to it: given @ weights + bias.

    Attributes:
        first: the number of the operation that multiplies.
        given: the factor that depends on the input.
        made: the result, with the bias.
        biases: the values that are added.
        summed: the letters of the product (`Flow.product`) that are summed over, then or in the next operation.
        unbiased: the result before an operation that adds a bias to it; the same as `made` if none does.
    """

    first: int
    given: Value
    made: Value
    biases: tuple[Value, ...]
    summed: str
    unbiased: Value


def affine_of(flow: Flow, i: int) -> Affine | None:
    """An operation as a product with weights; None if it is none."""
    product = flow.product(i)
    op = flow.program.operations[i]
    if product is None or not op.counted:
        return None
    given = [v for v in (product.left, product.right) if v in flow.dependent]
    if len(given) != 1 or op.kwargs.get("groups", 1) != 1:
        return None
    biases = [v for v in op.inputs if v not in (product.left, product.right)]
    unbiased, shared = _summed(flow, op.outputs[0], product)
    made = unbiased
    takers = flow.taken_by.get(made, [])
    if len(takers) == 1:
        then = flow.program.operations[takers[0]]
        others = [v for v in then.inputs if v != made]
        constant = others and not flow.dependent.intersection(others)
        same = flow.shape(then.outputs[0]) == flow.shape(made)
        if short_name(then) in ADDS and constant and len(others) == 1 and same:
            biases, made = [*biases, *others], then.outputs[0]
    return Affine(i, given[0], made, tuple(biases), product.summed + shared, unbiased)


def _summed(flow: Flow, made: Value, product: Product) -> tuple[Value, str]:
    """A product after the sum over an axis that both its factors have, such as heads, and that axis's letter.

    The product itself and no letter if no such sum follows.
    """
    sizes = dict(zip(product.left_axes, flow.shape(product.left), strict=True))
    other = dict(zip(product.right_axes, flow.shape(product.right), strict=True))
    shared = [a for a in product.made_axes if sizes.get(a, 1) > 1 and other.get(a, 1) > 1]
    takers = flow.taken_by.get(made, [])
    if len(shared) != 1 or len(takers) != 1:
        return made, ""
    op = flow.program.operations[takers[0]]
    if short_name(op) != "sum":
        return made, ""
    dim, axis = op.argument(1, "dim"), product.made_axes.index(shared[0])
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    if [d % len(product.made_axes) for d in dims] == [axis]:
        return op.outputs[0], shared[0]
    return made, ""


@dataclass(frozen=True)
class Products:
    """The products of a pass.

    Attributes:
        flow: the operations of the pass.
        batches: which axes follow the number of examples.
    """

    flow: Flow
    batches: Batches

    def is_product(self, i: int) -> bool:
        """Whether an operation multiplies two tensors along an axis, or is attention."""
        op = self.flow.program.operations[i]
        return self.flow.product(i) is not None or short_name(op) == "scaled_dot_product_attention"

    def affine(self, i: int) -> Affine | None:
        """An operation as a product with weights, its result with examples as an axis of their own."""
        found = affine_of(self.flow, i)
        if found is None:
            return None
        return replace(found, made=self.batches.apart(found.made, forward=True))

    def affines_before(self, value: Value) -> list[Affine]:
        """The nearest products that a value is made of; an empty list if one of them has no weights."""
        found = [i for i in self.flow.before(value, self.is_product) if self.is_product(i)]
        made = [self.affine(i) for i in found]
        return [a for a in made if a is not None] if None not in made else []

    def affine_after(self, value: Value) -> Affine | None:
        """The first product with weights that a value is given to; what lies between may be anything but a product."""
        waiting, seen = [value], set()
        while waiting:
            for i in self.flow.taken_by.get(waiting.pop(0), ()):
                if i in seen:
                    continue
                seen.add(i)
                if self.is_product(i):
                    return self.affine(i)
                waiting += self.flow.program.operations[i].outputs
        return None


# --- the weights themselves ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Constants:
    """The values of a pass that do not depend on the input, computed from the model's tensors as they are now.

    Attributes:
        flow: the operations of the pass.
        tensors: those that no operation made, by their values.
    """

    flow: Flow
    tensors: Mapping[Value, Tensor]

    def of(self, value: Value) -> Tensor:
        """A value.

        Raises:
            LookupError: if it was made in a way that was not seen, or depends on the input.
        """
        if value in self.tensors:
            return self.tensors[value].detach()
        op = self.flow.operation(value)
        if op is None:
            raise LookupError(f"value {value.number} of the pass has no tensor")
        held = {v: self.of(v) for v in op.inputs}
        args, kwargs = (substituted(given, held) for given in (op.args, op.kwargs))
        made = op.function(*args, **kwargs)
        return made if len(op.outputs) == 1 else made[op.outputs.index(value)]

    def matrix(self, affine: Affine) -> tuple[Float[Tensor, "given made"], Float[Tensor, " made"]]:
        """The weights and the bias of a product.

        Raises:
            ValueError: if they were computed in a way that was not seen.
        """
        try:
            return self._followed(affine)
        except LookupError as error:
            op = self.flow.program.operations[affine.first]
            raise ValueError(
                f"the weights of a product in {op.module or 'the model'} cannot be followed to the model's tensors: "
                f"{error.args[0]}"
            ) from error

    def _followed(
        self, affine: Affine
    ) -> tuple[Float[Tensor, "given made"], Float[Tensor, " made"]]:
        product = self.flow.product(affine.first)
        assert product is not None, "it was found as one"
        other = product.right if product.left == affine.given else product.left
        letters, given = product.axes_of(other), product.axes_of(affine.given)
        summed = [a for a in given if a in affine.summed]
        free = [a for a in product.made_axes if a in letters and a not in summed]
        weight = self.of(other)
        sizes = dict(zip(letters, weight.shape, strict=True))
        rest = [a for a in letters if a not in (*summed, *free)]  # axes of length 1 (kernels)
        order = [letters.index(a) for a in (*summed, *free, *rest)]
        width = [int(torch.Size([sizes[a] for a in axes]).numel()) for axes in (summed, free)]
        op = self.flow.program.operations[affine.first]
        matrix = weight.permute(order).reshape(width) * _scale(op, "alpha")
        bias = matrix.new_zeros(width[1])
        for value in affine.biases:
            own = _bias(self.of(value), product.made_axes, free, sizes)
            adds = None if value in op.inputs else self.flow.operation(affine.made)
            bias = bias + own * (_scale(op, "beta") if adds is None else _scale(adds, "alpha"))
        return matrix, bias


def _scale(op: Operation, name: str) -> float:
    """What a function multiplies by before it adds: `alpha` or `beta` of `torch.addmm`."""
    found = op.kwargs.get(name, 1)
    if not isinstance(found, int | float):
        raise LookupError(f"{name} of {short_name(op)} is {found}")
    return found


def _bias(
    own: Tensor, made: str, free: Sequence[str], sizes: Mapping[str, int]
) -> Float[Tensor, " made"]:
    """What is added to a product, as one number for each of its outputs.

    Args:
        own: the tensor that is added.
        made: the letters of the product's axes.
        free: those of its outputs.
        sizes: their lengths.
    """
    width = [sizes[a] for a in free]
    if own.numel() == math.prod(width):
        return own.flatten()
    full = own.reshape((1,) * (len(made) - own.ndim) + own.shape)
    for axis in reversed([n for n, letter in enumerate(made) if letter not in free]):
        full = full.select(axis, 0)
    return full.expand(width).flatten()


# --- where weights lie in the model's parameters -----------------------------------------------


@dataclass(frozen=True, eq=False)
class Cells:
    """Where the numbers of a matrix lie in a parameter, as places in the flattened parameter.

    The number of a row and a column is at the sum of both. For a group of rows that has columns of its own, columns are
    counted inside the group.

    Attributes:
        rows: the place of each row's first number.
        columns: what each column adds to it.
        bias: the place of each row's bias in the parameter that holds the biases; None if there is none.
    """

    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"]
    bias: Int[Tensor, " row"] | None = None

    def same(self, other: Cells) -> bool:
        """Whether the weights are the same numbers in the same order."""
        return torch.equal(self.rows, other.rows) and torch.equal(self.columns, other.columns)


@dataclass(frozen=True)
class Lines:
    """A tensor of a pass as a table.

    Attributes:
        address: where it is.
        last: the axes that run along a line, outermost first; all others count the lines.
        overwritten: whether a later operation changes it in place.
    """

    address: Address
    last: tuple[int, ...]
    overwritten: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as line x number."""
        lead = [axis for axis in range(tensor.ndim) if axis not in self.last]
        width = math.prod(tensor.shape[axis] for axis in self.last)
        return tensor.permute(*lead, *self.last).reshape(-1, width)


@dataclass(frozen=True, eq=False)
class WeightProduct:
    """A product of an activation with a parameter, or with a part of one.

    Attributes:
        first: the number of the operation that multiplies.
        weight: the parameter's name.
        bias: the name of the parameter that is added, or None.
        cells: where the weights lie in them.
        groups: how many groups of rows have columns of their own.
        part: which part of the parameter it is, as an index, e.g. `[0:16]`; empty for all of it.
        takes: the values of parameters that it takes, each with the number of the operation that is given it: the
            weights first, then the bias if there is one.
        lines: where its tensors are in the pass: the `weights`, row by row as one line; what it `reads`, and what it
            `writes` with the bias, a line for each example and position. Those are left out that no operation shows.
    """

    first: int
    weight: str
    bias: str | None
    cells: Cells
    groups: int
    part: str
    takes: tuple[tuple[int, Value], ...]
    lines: Mapping[str, Lines]

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows, and of columns of all groups."""
        return len(self.cells.rows), len(self.cells.columns) * self.groups


Parameters = Mapping[str, tuple[str, Tensor]]
"""For each source of a pass that is a parameter its name in the state dict, and the parameter."""


def weight_products(
    flow: Flow, parameters: Parameters, among: Iterable[int]
) -> list[WeightProduct]:
    """The products of a pass with parameters that reach them unchanged.

    Args:
        flow: the operations of the pass.
        parameters: the model's.
        among: the numbers of the operations to look at.
    """
    found = (_weight_product(flow, i, parameters) for i in among)
    return [product for product in found if product is not None]


@dataclass(frozen=True, eq=False)
class Use:
    """A call that takes a parameter, or a part of one.

    Attributes:
        called: what a person calls it.
        module: the module that it runs in.
        places: which numbers of the flattened parameter it takes; None for all, or if that is unknown.
    """

    called: str
    module: str
    places: Int[Tensor, " number"] | None


def other_uses(
    flow: Flow,
    parameters: Parameters,
    layers: Mapping[int, Container[str]],
    taken: Container[tuple[int, Value]],
) -> dict[str, list[Use]]:
    """The calls that take parameters, by the parameters' names, other than as weights or biases of known matrices.

    Args:
        flow: the operations of the pass.
        parameters: the model's.
        layers: for operations of a layer the names of the parameters that are the layer's own.
        taken: the values that products are known to take (`WeightProduct.takes`).
    """
    held = {v: parameters[s][0] for v, s in flow.program.sources.items() if s in parameters}
    found: dict[str, list[Use]] = {}
    for i, op in enumerate(flow.program.operations):
        if held.keys().isdisjoint(op.inputs) or not op.counted or short_name(op) in SHAPE_ONLY:
            continue
        if _keeps(op):
            held |= {made: held[op.inputs[0]] for made in op.outputs if op.inputs[0] in held}
            continue
        for value in dict.fromkeys(op.inputs):
            name = held.get(value)
            if name is None or name in layers.get(i, ()) or (i, value) in taken:
                continue
            part = None if value in flow.program.sources else _in_parameter(flow, value, parameters)
            places = None if part is None else part.index.flatten()
            found.setdefault(name, []).append(Use(flow.called(i), op.module, places))
    return found


_SAME = {
    "to", "type", "type_as", "float", "half", "double", "bfloat16", "detach", "data", "alias", "cpu", "cuda",
    "contiguous", "clone",
}  # fmt: skip
"""Functions whose result holds the numbers of their first argument, where they were."""


def _keeps(op: Operation) -> bool:
    """Whether an operation moves the numbers of its first argument and takes no other tensor's."""
    return short_name(op) in _SAME or (moves(op) and len(set(op.inputs)) == 1)


@dataclass(frozen=True, eq=False)
class _Held:
    """A parameter, and where in it (flattened) each number of a tensor of the pass lies."""

    name: str
    index: Tensor
    shape: tuple[int, ...]


def _in_parameter(flow: Flow, value: Value, parameters: Parameters) -> _Held | None:
    """The parameter that a value is, or is a part of; None if it is none."""
    shape, way = flow.shape(value), []
    while (source := flow.program.sources.get(value)) is None:
        op = flow.operation(value)
        if op is None or not _keeps(op) or flow.overwritten(value):
            return None
        way.append((op, op.outputs.index(value)))
        value = op.inputs[0]
    if source not in parameters or flow.overwritten(value):
        return None
    name, parameter = parameters[source]
    index = _places(parameter.shape, way[::-1])
    if index is None or tuple(index.shape) != shape:
        return None
    return _Held(name, index, tuple(parameter.shape))


def _places(shape: Sequence[int], way: Sequence[tuple[Operation, int]]) -> Tensor | None:
    """Where the numbers that operations make of a tensor lie in it, flattened; None if they do not take it.

    Args:
        shape: the tensor's.
        way: the operations, in order, each with the number of its output that is meant.
    """
    # A view says where its numbers are; only a copy in another order has to be made to see that.
    empty = torch.empty(tuple(shape), device="meta")
    made = _replayed(empty, way)
    if made is None:
        return None
    if made is empty or made._base is empty:
        index = torch.tensor(made.storage_offset())
        for size, stride in zip(made.shape, made.stride(), strict=True):
            index = index[..., None] + torch.arange(size) * stride
        return index
    return _replayed(torch.arange(math.prod(shape)).reshape(*shape), way)


def _replayed(given: Tensor, way: Sequence[tuple[Operation, int]]) -> Tensor | None:
    """What operations that keep numbers make of a tensor; None if they do not take it."""
    for op, place in way:
        if short_name(op) in _SAME:
            continue
        args, kwargs = (substituted(each, {op.inputs[0]: given}) for each in (op.args, op.kwargs))
        try:
            made = op.function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError, LookupError):
            return None
        given = made[place] if isinstance(made, tuple | list) else made
    return given


@dataclass(frozen=True)
class _Roles:
    """What the letters of a product with weights stand for.

    Attributes:
        groups: those that weights, activation and result have; each entry is a group.
        free: those that weights and result have.
        summed: those that are summed over.
    """

    groups: list[str]
    free: list[str]
    summed: list[str]

    @property
    def rows(self) -> list[str]:
        """The letters of the rows."""
        return [*self.groups, *self.free]


def _roles(flow: Flow, affine: Affine, product: Product, letters: Sequence[str]) -> _Roles | None:
    """What letters stand for, given those along which the weights differ; None if the product is no matrix."""
    axes = (product.left_axes, product.right_axes, product.made_axes)
    if any(len({*each}) < len(each) for each in axes):
        return None
    given = product.axes_of(affine.given)
    long = {a for a, n in zip(given, flow.shape(affine.given), strict=True) if n > 1}
    summed = [a for a in given if a in affine.summed and a in letters]
    alone = {a for a in affine.summed if (a in long) != (a in letters)}
    kept = [a for a in product.made_axes if a in letters and a not in summed]
    found = _Roles([a for a in kept if a in long], [a for a in kept if a not in long], summed)
    # A letter that only the weights have, and that is summed over, belongs to no row and no column.
    return None if alone or {*found.rows, *summed} != {*letters} else found


def _weight_product(flow: Flow, i: int, parameters: Parameters) -> WeightProduct | None:
    """An operation as a product with a parameter."""
    affine, product = affine_of(flow, i), flow.product(i)
    if affine is None or product is None:
        return None
    operand = product.right if product.left == affine.given else product.left
    found, address = _in_parameter(flow, operand, parameters), flow.argument_address(i, operand)
    if found is None or address is None:
        return None
    index = found.index
    axes = [axis for axis in range(index.ndim) if not _is_constant(index, axis)]
    letters = {product.axes_of(operand)[axis]: axis for axis in axes}
    roles = _roles(flow, affine, product, list(letters))
    if roles is None:
        return None
    order = tuple(letters[a] for a in (*roles.rows, *roles.summed))
    for axis in reversed([axis for axis in range(index.ndim) if axis not in axes]):
        index = index.narrow(axis, 0, 1)
    table = index.permute(*order, *(a for a in range(index.ndim) if a not in order))
    cells = _cells(table.reshape(math.prod(index.shape[letters[a]] for a in roles.rows), -1))
    if cells is None or not _distinct(index):
        return None
    bias, made = _with_bias(flow, affine, product, roles, parameters)
    given = product.axes_of(affine.given)
    sizes = dict(zip(given, flow.shape(affine.given), strict=True))
    reads = _lines(
        flow,
        flow.argument_address(i, affine.given),
        affine.given,
        given,
        [*roles.groups, *roles.summed],
    )
    writes = None
    if made is not None:
        axes_made = _made_axes(affine, product)
        writes = _lines(flow, flow.address_of(made), made, axes_made, roles.rows)
    lines = {"weights": Lines(address, order), "reads": reads, "writes": writes}
    return WeightProduct(
        i, found.name, bias and bias.name, replace(cells, bias=bias and bias.places),
        math.prod(sizes[a] for a in roles.groups), _part(index, found.shape),
        ((i, operand), *([bias.taken] if bias else [])),
        {what: known for what, known in lines.items() if known is not None},
    )  # fmt: skip


def _made_axes(affine: Affine, product: Product) -> str:
    """The letters of the result, after the sum that may follow."""
    return "".join(a for a in product.made_axes if a not in affine.summed)


def _lines(
    flow: Flow, address: Address | None, value: Value, letters: str, last: Sequence[str]
) -> Lines | None:
    if address is None:
        return None
    return Lines(address, tuple(letters.index(a) for a in last), flow.overwritten(value))


def _is_constant(index: Tensor, axis: int) -> bool:
    """Whether an axis is of length 1, or repeats the same numbers of a parameter."""
    if not index.numel():
        return True
    same = torch.equal(index.select(axis, 0), index.select(axis, -1))  # spares most a look at all
    return same and bool((index == index.narrow(axis, 0, 1)).all())


def _cells(table: Tensor) -> Cells | None:
    """A table of places as a sum of one number for each row and one for each column; None if it is none."""
    if not table.numel():
        return None
    rows, columns = table[:, 0], table[0] - table[0, 0]
    return Cells(rows, columns) if torch.equal(table, rows[:, None] + columns) else None


def _distinct(index: Tensor) -> bool:
    """Whether no place occurs twice."""
    first = int(index.min())
    taken = torch.zeros(int(index.max()) - first + 1, dtype=torch.bool)
    taken[index.flatten() - first] = True
    return int(taken.sum()) == index.numel()


@dataclass(frozen=True, eq=False)
class _Bias:
    """A parameter that is added to a product.

    Attributes:
        name: the parameter's.
        places: where in it (flattened) each row's number lies.
        taken: the number of the operation that adds it, and the value that this is given.
    """

    name: str
    places: Tensor
    taken: tuple[int, Value]


def _with_bias(
    flow: Flow, affine: Affine, product: Product, roles: _Roles, parameters: Parameters
) -> tuple[_Bias | None, Value | None]:
    """The parameter that is added to a product, and the result with it.

    Where what is added later is no such parameter, the result is that before it; where the operation that multiplies
    adds it, or scales what it multiplies, there is no result of weights and a known bias alone, and it is None.
    """
    op = flow.program.operations[affine.first]
    own = [v for v in affine.biases if v in op.inputs]
    added = [v for v in affine.biases if v not in own]
    chosen, made = (own, affine.unbiased) if own else (added, affine.made)
    if not chosen:
        return None, affine.made
    without = None if own else affine.unbiased
    adds = affine.first if own else flow.made_by.get(affine.made)
    if adds is None or _scales(flow.program.operations[adds]):
        return None, without
    found = _in_parameter(flow, chosen[0], parameters)
    letters = _made_axes(affine, product)
    if found is None:
        return None, without
    index = found.index
    if own and short_name(op).startswith("conv"):
        index = index.reshape(1, -1, *(1,) * (len(letters) - 2))
    sizes = dict(zip(letters, flow.shape(affine.made), strict=True))
    places = _bias_places(index, letters, roles.rows, sizes)
    if places is None:
        return None, without
    return _Bias(found.name, places, (adds, chosen[0])), made


def _scales(op: Operation) -> bool:
    """Whether an operation multiplies what it adds by a number (`alpha` and `beta` of `torch.addmm`)."""
    return any(op.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))


def _bias_places(
    index: Tensor, letters: str, rows: Sequence[str], sizes: Mapping[str, int]
) -> Tensor | None:
    """The place of each row's bias, given those that are added; None if rows do not have one each."""
    if index.ndim > len(letters):
        return None
    full = index.reshape((1,) * (len(letters) - index.ndim) + tuple(index.shape))
    for axis, letter in enumerate(letters):
        if letter in rows and full.shape[axis] != sizes[letter]:
            return None
        if letter not in rows:
            if not _is_constant(full, axis):
                return None
            full = full.narrow(axis, 0, 1)
    order = [letters.index(a) for a in rows]
    places = full.permute(*order, *(a for a in range(full.ndim) if a not in order)).flatten()
    return places if len(places.unique()) == len(places) else None


def _part(index: Tensor, shape: Sequence[int]) -> str:
    """Which part of a parameter some of its numbers are, as an index; empty for all of it."""
    if index.numel() == math.prod(shape):
        return ""
    # The first and the last number of a box are its corners.
    ends = torch.stack([index.min(), index.max()])
    corners = torch.stack(torch.unravel_index(ends, tuple(shape)), 1).tolist()
    sizes = [last - first + 1 for first, last in zip(*corners, strict=True)]
    if min(sizes) < 1 or math.prod(sizes) < index.numel():
        return f".flatten()[{int(ends[0])}:{int(ends[1]) + 1}]"
    words = [
        ":" if size == length else f"{first}" if size == 1 else f"{first}:{first + size}"
        for first, size, length in zip(corners[0], sizes, shape, strict=True)
    ]
    while len(words) > 1 and words[-1] == ":":
        words.pop()
    return f"[{','.join(words)}]"
