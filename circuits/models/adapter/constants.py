"""Values of a pass that do not depend on the input, and the weights of its products, from the model's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.affine import Affine
from circuits.models.adapter.flow import Flow, substituted
from circuits.models.adapter.program import Value


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
