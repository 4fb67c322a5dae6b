"""Products with weights in a pass (projections, output weights, the layers of an MLP), and those weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.attention import Batches
from circuits.models.adapter.flow import Flow, Product, short_name, substituted
from circuits.models.adapter.program import Value

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
    """

    first: int
    given: Value
    made: Value
    biases: tuple[Value, ...]
    summed: str


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
        """An operation as a product with weights."""
        product = self.flow.product(i)
        op = self.flow.program.operations[i]
        if product is None or not op.counted:
            return None
        given = [v for v in (product.left, product.right) if v in self.flow.dependent]
        if len(given) != 1 or self.flow.program.operations[i].kwargs.get("groups", 1) != 1:
            return None
        biases = [v for v in op.inputs if v not in (product.left, product.right)]
        made, shared = self._summed(op.outputs[0], product)
        takers = self.flow.taken_by.get(made, [])
        if len(takers) == 1:
            then = self.flow.program.operations[takers[0]]
            others = [v for v in then.inputs if v != made]
            constant = others and not self.flow.dependent.intersection(others)
            same = self.flow.shape(then.outputs[0]) == self.flow.shape(made)
            if short_name(then) in ADDS and constant and len(others) == 1 and same:
                biases, made = [*biases, *others], then.outputs[0]
        made = self.batches.apart(made, forward=True)
        return Affine(i, given[0], made, tuple(biases), product.summed + shared)

    def _summed(self, made: Value, product: Product) -> tuple[Value, str]:
        """A product after the sum over an axis that both its factors have, such as heads, and that axis's letter.

        The product itself and no letter if no such sum follows.
        """
        sizes = dict(zip(product.left_axes, self.flow.shape(product.left), strict=True))
        other = dict(zip(product.right_axes, self.flow.shape(product.right), strict=True))
        shared = [a for a in product.made_axes if sizes.get(a, 1) > 1 and other.get(a, 1) > 1]
        takers = self.flow.taken_by.get(made, [])
        if len(shared) != 1 or len(takers) != 1:
            return made, ""
        op = self.flow.program.operations[takers[0]]
        dim, axis = op.argument(1, "dim"), product.made_axes.index(shared[0])
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        if short_name(op) == "sum" and [d % len(product.made_axes) for d in dims] == [axis]:
            return op.outputs[0], shared[0]
        return made, ""

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
        matrix = weight.permute(order).reshape(width)
        bias = matrix.new_zeros(width[1])
        for value in affine.biases:
            bias = bias + _bias(self.of(value), product.made_axes, free, sizes)
        return matrix, bias


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
