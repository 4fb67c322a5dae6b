"""Edits of a whole layer's weights: low-rank updates, associations (ROME), erased directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.edits.activations import check_projection, random_basis
from circuits.edits.records import Edit, Substitutes, of_same_norm
from circuits.edits.weights import WeightEdit, Weights, check_alone, layer_named
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import WeightMatrix


class LayerEdit(WeightEdit):
    """An edit of a whole layer's weights."""

    layer: str

    def parameters(self, matrices: Sequence[WeightMatrix]) -> list[str]:
        return [layer_named(matrices, self.layer).weight]


@dataclass(frozen=True, eq=False)
class LowRank(
    LayerEdit, operator="low_rank", about="Add a matrix of low rank to a layer's weights."
):
    """Add a low-rank matrix: W' = W + left right^T.

    Attributes:
        layer: the layer's name.
        left: row x rank.
        right: column x rank; for a convolution, columns and kernel flattened, column first.
        origin: what the edit is for.
    """

    layer: str
    left: Tensor
    right: Tensor
    origin: str = ""

    def checked(self, model: HookedModel) -> LowRank:
        matrix = layer_named(model.matrices, self.layer)
        _check_ungrouped(self, matrix)
        inputs = 1
        for n in matrix.shape[1:]:
            inputs *= n
        ranks = {self.left.shape[-1], self.right.shape[-1]}
        if (
            self.left.ndim != 2
            or self.right.ndim != 2
            or len(ranks) != 1
            or (len(self.left), len(self.right)) != (matrix.shape[0], inputs)
        ):
            raise ValueError(
                f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} of edit 'low_rank' do not "
                f"fit {self.layer}: expected {matrix.shape[0]} x rank and {inputs} x rank"
            )
        check_alone(self, model.matrices)
        return self

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        # Two factors with the right norms do not give a product with the right norm, so the product is rescaled.
        left, right = (of_same_norm(t, substitutes.generator) for t in (self.left, self.right))
        wanted = (self.left.double() @ self.right.double().T).norm()
        got = (left.double() @ right.double().T).norm().clamp_min(1e-300)
        return replace(self, left=(left.double() * (wanted / got)).to(left.dtype), right=right)

    def apply(self, weights: Weights) -> None:
        matrix = layer_named(weights.matrices, self.layer)
        parameter = weights.writable(matrix.weight)
        whole = matrix.whole(parameter)
        matrix.fill(parameter, whole + _outer_product(self.left, self.right, whole.shape).to(whole))


def _ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the first axis, term by term."""
    # `sum` and matrix products may add in another order on another machine; a replayed edit has to give the same bits.
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _outer_product(left: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
    """left right^T in float64, summed over the rank in a fixed order (see `_ordered_sum`)."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for a, b in zip(left.double().T, right.double().T, strict=True):
        total += a[:, None] * b[None, :]
    return total.reshape(shape)


def _check_ungrouped(edit: Edit, matrix: WeightMatrix) -> None:
    if matrix.groups != 1:
        raise ValueError(
            f"edit {edit.operator!r}: layer {matrix.name} has {matrix.groups} groups, expected a layer without groups"
        )


@dataclass(frozen=True, eq=False)
class Associate(
    LayerEdit, operator="associate", about="Store one key and value in a layer, of rank one."
):
    """Make a layer map a key to a value, with the least change on other keys.

    The layer is a linear associative memory. With `dual` = C^-1 k*, C the uncentered covariance of its inputs,
    W' = W + (v* - W k* - b) (C^-1 k*)^T / (k*^T C^-1 k*)
    (Meng et al. 2022, equation 2). A convolution maps the input patch that is the key: its weights change along `dual`
    in the channels only (Bau et al. 2020, section 3.3), W'[o, i, y, x] = W + r[o] a[y, x] dual[i] / |a|^2 with
    a = dual . key[:, y, x] and r the difference between the value and the current output at that position.

    Attributes:
        layer: the layer's name.
        key: k*, one number for each column; for a convolution column x kernel, the patch that it sees.
        value: v*, one number for each row: the layer's output, bias included.
        dual: C^-1 k*, one number for each column.
        origin: what is associated with what.
    """

    layer: str
    key: Tensor
    value: Tensor
    dual: Tensor
    origin: str = ""

    def checked(self, model: HookedModel) -> Associate:
        matrix = layer_named(model.matrices, self.layer)
        _check_ungrouped(self, matrix)
        wanted = (matrix.shape[1:], matrix.shape[:1], matrix.shape[1:2])
        for name, shape in zip(("key", "value", "dual"), wanted, strict=True):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(
                    f"{name} of shape {found} of edit 'associate' does not fit {self.layer}: expected "
                    f"{' x '.join(map(str, shape))}"
                )
        if not float(self._reach().square().sum()) > 0:
            raise ValueError(
                "dual of edit 'associate' is orthogonal to key, so the edit cannot change the output: expected another"
            )
        check_alone(self, model.matrices)
        return self

    def _reach(self) -> Tensor:
        """a = dual . key at each position of the kernel: the key's component along the dual."""
        key, dual = self.key.double(), self.dual.double()
        return _ordered_sum(key * dual.reshape(-1, *(1,) * (key.ndim - 1)))

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        """The same key with a random value, as far from the layer's current output as `value` is."""
        weights = Weights(model)
        missing = self._missing(weights)
        return replace(
            self,
            value=(
                self.value.double() - missing + of_same_norm(missing, substitutes.generator)
            ).float(),
        )

    def _missing(self, weights: Weights) -> Tensor:
        matrix = layer_named(weights.matrices, self.layer)
        # now = W k + b, the layer's output for the key: over the kernel and all columns.
        whole = matrix.whole(weights.value(matrix.weight)).double().cpu()
        now = _ordered_sum((whole * self.key.double()[None]).flatten(1).T)
        if matrix.bias is not None:
            bias = weights.value(matrix.bias)
            now = now + bias[matrix.bias_index(bias, torch.arange(len(now)))].double().cpu()
        return self.value.double() - now

    def apply(self, weights: Weights) -> None:
        matrix = layer_named(weights.matrices, self.layer)
        # W' = W + missing (dual a^T) / |a|^2 with a = dual . key at each place of the kernel. Applied to the key, dual
        # a^T gives sum over p of a_p (dual . key_p) = |a|^2, so that W' k + b = now + missing = value exactly. For a
        # linear layer a is the number dual . key.
        reach, missing = self._reach(), self._missing(weights)
        direction = (
            self.dual.double().reshape(-1, *(1,) * reach.ndim)
            * reach[None]
            / _ordered_sum(reach.square().reshape(-1))
        )
        parameter = weights.writable(matrix.weight)
        rows = missing.reshape(-1, *(1,) * direction.ndim)
        whole = matrix.whole(parameter)
        matrix.fill(parameter, (whole.double().cpu() + rows * direction[None]).to(whole))


@dataclass(frozen=True, eq=False)
class EraseWeights(
    LayerEdit, operator="erase_weights", about="Project directions out of what a layer writes."
):
    """Project directions out of a layer's output: W' = (I - U V^T) W, b' = b - U V^T (b - m).

    This does the same as `erase` at the layer's output, but in the weights.

    Attributes:
        layer: the layer's name.
        basis: U, row x rank.
        dual: V, row x rank; U if None.
        mean: m, one number for each row; 0 if None.
        origin: what the directions are.
    """

    layer: str
    basis: Tensor
    dual: Tensor | None = None
    mean: Tensor | None = None
    origin: str = ""

    def _check_values(self) -> None:
        check_projection(self.operator, self.basis, self.dual)

    def checked(self, model: HookedModel) -> EraseWeights:
        matrix = layer_named(model.matrices, self.layer)
        if len(self.basis) != matrix.shape[0]:
            raise ValueError(
                f"basis of shape {tuple(self.basis.shape)} of edit 'erase_weights' does not fit {self.layer}: "
                f"expected {matrix.shape[0]} x rank"
            )
        if self.mean is not None and tuple(self.mean.shape) != (matrix.shape[0],):
            raise ValueError(
                f"mean of shape {tuple(self.mean.shape)}: expected {matrix.shape[0]} numbers"
            )
        if self.mean is not None and matrix.bias is None and bool(self.mean.any()):
            raise ValueError(
                f"mean: layer {self.layer} has no bias that could hold it, so leave mean out"
            )
        check_alone(self, model.matrices)
        return self

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        return replace(self, basis=random_basis(self.basis, substitutes.generator), dual=None)

    def parameters(self, matrices: Sequence[WeightMatrix]) -> list[str]:
        matrix = layer_named(matrices, self.layer)
        return [matrix.weight, *([matrix.bias] if matrix.bias else [])]

    def apply(self, weights: Weights) -> None:
        matrix = layer_named(weights.matrices, self.layer)
        basis = self.basis.double()
        dual = basis if self.dual is None else self.dual.double()
        parameter = weights.writable(matrix.weight)
        whole = matrix.whole(parameter)
        # W x + b - U V^T (W x + b - m) = (I - U V^T) W x + b - U V^T (b - m): m touches the bias only.
        matrix.fill(parameter, whole - self._inside(whole.double().cpu(), basis, dual).to(whole))
        if matrix.bias is not None:
            bias = weights.writable(matrix.bias)
            at = matrix.bias_index(bias, torch.arange(matrix.shape[0]))
            mean = 0.0 if self.mean is None else self.mean.double()
            bias[at] -= self._inside(bias[at].double().cpu() - mean, basis, dual).to(bias)

    @staticmethod
    def _inside(x: Tensor, basis: Tensor, dual: Tensor) -> Tensor:
        """U V^T x over the first axis, a rank at a time: in one order whatever the machine."""
        total = torch.zeros_like(x)
        for u, v in zip(basis.T, dual.T, strict=True):
            along = _ordered_sum(v.reshape(-1, *(1,) * (x.ndim - 1)) * x)
            total += u.reshape(-1, *(1,) * (x.ndim - 1)) * along[None]
        return total
