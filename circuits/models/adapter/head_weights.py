"""The weights of an attention's heads, found among the operations of a pass and compared with what it computes.

They are what queries, keys, values and outputs are multiplied with, whether or not a residual stream is known that the
heads read and write: `circuits.models.adapter.parts` has them by the layers of a stream,
`circuits.models.adapter.lone_heads` where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.adapter.affine import Affine, Constants, Products
from circuits.models.adapter.attention import Place
from circuits.models.adapter.flow import Flow
from circuits.models.adapter.head_sites import Head, Picked, Points, Projection, rearranged

Letter = Literal["Q", "K", "V"]
"""What a head reads: queries, keys or values."""

Matrices = Literal["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]

WEIGHTS: dict[Letter, Matrices] = {"Q": "W_Q", "K": "W_K", "V": "W_V"}
BIASES: dict[Letter, Matrices] = {"Q": "b_Q", "K": "b_K", "V": "b_V"}
WORDS: dict[str, str] = {"Q": "queries", "K": "keys", "V": "values"}
_NAMES: dict[Letter, Literal["q", "k", "v"]] = {"Q": "q", "K": "k", "V": "v"}


@dataclass(frozen=True, eq=False)
class Output:
    """The product of what heads read with the output weights.

    Attributes:
        affine: the product.
        columns: which of its inputs each head has: head x d_head.
        starts: for each row that it is given, the place of the row's first number in what heads read (z), flattened.
    """

    affine: Affine
    columns: Tensor
    starts: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What one pass shows of an attention.

    Attributes:
        read: what queries, keys and values are made of: batch x (window) x position x d_in.
        made: queries (`q`), keys (`k`) and values (`v`), what heads read (`z`), their `pattern`, and what attention's
            output weights return (`out`), those that are shown.
    """

    read: Mapping[Letter, Tensor]
    made: Mapping[str, Tensor]


class HeadWeights:
    """The weights of an attention's heads.

    Args:
        head: the attention.
        products: the products of the pass.
        constants: its weights.
        points: where functions are watched.
    """

    def __init__(
        self, head: Head, products: Products, constants: Constants, points: Points
    ) -> None:
        self.head, self._products, self._constants = head, products, constants
        self._points = points

    @property
    def _flow(self) -> Flow:
        return self._products.flow

    @cached_property
    def output(self) -> Output | str:
        """The output weights; why they are not known, if they are not."""
        z = self.head.attention.z
        assert z.value is not None, "a product has a value"
        affine = self._products.affine_after(z.value)
        if affine is None:
            return f"{self.head.name} has no output projection"
        moved, product = (
            self._flow.moved(z.value, affine.given),
            self._flow.product(affine.first),
        )
        if moved is None or product is None:
            return f"what {self.head.name} reads is mixed before the output weights"
        # Where each number of z comes from, and which input of the weights each number of what they are given is.
        rows = _rows(moved, product.axes_of(affine.given), affine.summed)
        heads = _places(z)
        first = heads[(0,) * (heads.ndim - 2)]
        place = {int(n): i for i, n in enumerate(rows[0])}
        if set(place) != set(first.flatten().tolist()):
            return (
                f"the inputs of the output weights of {self.head.name} are not its heads' numbers"
            )
        columns = torch.tensor([[place[int(n)] for n in own] for own in first])
        return Output(affine, columns, rows[:, 0].clone())

    def matrix(self, name: Matrices) -> Tensor | None:
        """W_Q, W_K, W_V (head x d_in x d_head), W_O (head x d_head x d_out), or a bias; None if there is none."""
        if name in ("W_O", "b_O"):
            if isinstance(self.output, str):
                return None
            matrix, bias = self._constants.matrix(self.output.affine)
            if name == "b_O":
                return bias if self.output.affine.biases else None
            return matrix[self.output.columns]
        projection = self.head.projections.get(name[-1].lower())
        affine = None if projection is None else self._affine(projection)
        if projection is None or affine is None:
            return None
        matrix, bias = self._constants.matrix(affine)
        index = projection.index.to(matrix.device)
        if name.startswith("b"):
            return bias[index] if affine.biases else None
        return matrix[:, index].movedim(0, 1)

    def _affine(self, projection: Projection) -> Affine | None:
        return None if projection.first is None else self._products.affine(projection.first)

    def group(self, letter: Letter, head: int) -> int:
        """The number of the matrix W_Q, W_K or W_V that a head has: groups of heads may share one."""
        projection = self.head.projections.get(_NAMES[letter])
        if projection is None:
            return head
        # Keys and values that are broadcast over neighbouring heads have one entry for each group.
        return projection.group[head // (self.head.attention.n_heads // len(projection.group))]

    # --- what a pass shows ---------------------------------------------------------------------

    def seen(self, module: nn.Module, inputs: Tensor) -> Seen:
        """What a pass shows of the attention.

        Args:
            module: the model, in evaluation mode.
            inputs: as many examples as the pass was traced with.
        """
        attention = self.head.attention
        taps = {"z": self._at(attention.z)}
        if not attention.mixed:
            taps["pattern"] = self._at(attention.pattern)
        for letter, name in _NAMES.items():
            if (projection := self.head.projections.get(name)) is not None:
                taps |= self._of_projection(letter, name, projection)
        if not isinstance(self.output, str):
            address = self._flow.address_of(self.output.affine.made)
            taps |= {} if address is None else {"out": self._points.tap(address)}
        # Copied as they are shown: what follows may write in place.
        taps = {name: replace(tap, overwritten=True) for name, tap in taps.items()}
        with record(module, taps) as found:
            module(inputs.clone())
        read: dict[Letter, Tensor] = {
            letter: self._given(letter, found[letter]) for letter in WEIGHTS if letter in found
        }
        made = {name: value for name, value in found.items() if name not in read}
        return Seen(read, made | ({"out": self._written(made["out"])} if "out" in made else {}))

    def _at(self, place: Place) -> Tap:
        return self._points.tap(place.address, rearranged(place))

    def _of_projection(self, letter: Letter, name: str, projection: Projection) -> dict[str, Tap]:
        """Where what a projection is given, and what it makes, can be read."""
        affine = self._affine(projection)
        if affine is None:
            return {}
        given = self._flow.argument_address(affine.first, affine.given)
        made = self._flow.address_of(projection.made)
        assert given is not None, "a product takes its factors"
        assert made is not None, "it was read to find the heads"
        layout = Picked(projection.features, projection.index)
        return {letter: self._points.tap(given), name: self._points.tap(made, layout)}

    def _given(self, letter: Letter, held: Tensor) -> Float[Tensor, "*position d_in"]:
        """What a projection is given, in the order of the positions of what it makes."""
        projection = self.head.projections[_NAMES[letter]]
        affine = self._affine(projection)
        assert affine is not None, "it was read"
        product = self._flow.product(affine.first)
        assert product is not None, "it was found as one"
        letters = product.axes_of(affine.given)
        rest = [a for a in letters if a not in affine.summed]
        made = [a for a in product.made_axes if a not in affine.summed]
        # The number of the row that each number of what is made comes from.
        numbers = torch.arange(math.prod(held.shape[letters.index(a)] for a in rest))
        numbers = numbers.reshape([held.shape[letters.index(a)] for a in rest])
        numbers = numbers.permute([rest.index(a) for a in made if a in rest])
        for n, a in enumerate(made):
            numbers = numbers if a in rest else numbers.unsqueeze(n)
        sizes = dict(zip(product.made_axes, self._shape(affine.first), strict=True))
        numbers = numbers.expand([sizes[a] for a in made])
        order = projection.features.read(numbers.reshape(self._flow.shape(projection.made)))
        return _rows(held, letters, affine.summed)[order[..., 0].to(held.device)]

    def _written(self, held: Tensor) -> Float[Tensor, "*position d_out"]:
        """What the output weights make, in the order of the positions of what heads read.

        Raises:
            ValueError: if they make another number of rows than heads read.
        """
        assert isinstance(self.output, Output), "it was read"
        affine = self.output.affine
        product = self._flow.product(affine.first)
        assert product is not None, "it was found as one"
        made = [a for a in product.made_axes if a not in affine.summed]
        sizes = dict(zip(product.made_axes, self._shape(affine.first), strict=True))
        rest = [a for a in product.axes_of(affine.given) if a not in affine.summed]
        free = [a for a in made if a not in rest]
        laid = held.reshape([sizes[a] for a in made])
        laid = laid.permute([made.index(a) for a in (*rest, *free)]).flatten(len(rest))
        rows = laid.flatten(0, len(rest) - 1)
        heads = _places(self.head.attention.z)
        positions = heads.shape[:-2]
        if len(rows) != math.prod(positions):
            raise ValueError(
                f"{self.head.name} reads {math.prod(positions)} positions, and its output weights are given {len(rows)}"
            )
        position = torch.empty(heads.numel(), dtype=torch.long)
        position[heads.flatten()] = torch.arange(len(rows)).repeat_interleave(
            math.prod(heads.shape[-2:])
        )
        order = position[self.output.starts].argsort().to(rows.device)
        return rows[order].unflatten(0, positions)

    def _shape(self, i: int) -> tuple[int, ...]:
        return self._flow.shape(self._flow.program.operations[i].outputs[0])


def _rows(held: Tensor, letters: str, summed: str) -> Tensor:
    """A factor of a product as row x input, the inputs being the axes that are summed over."""
    inner = [n for n, a in enumerate(letters) if a in summed]
    outer = [n for n, a in enumerate(letters) if a not in summed]
    return held.permute(*outer, *inner).flatten(len(outer)).flatten(0, len(outer) - 1)


def _places(z: Place) -> Tensor:
    """Where each number of z is in the flattened tensor: batch x (window) x position x head x d_head."""
    return rearranged(z).read(torch.arange(math.prod(z.shape)).reshape(z.shape))


# --- weights compared with what attention computes -----------------------------------------------


def recomputed(
    where: str,
    matrix: Callable[[Matrices], Tensor | None],
    group: Callable[[Letter, int], int],
    seen: Seen,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For queries, keys, values, what heads read and what attention puts out: which it is, what weights make of it,
    and the tensor itself.

    Args:
        where: what the attention is called in errors.
        matrix: gives the weights by name.
        group: the number of the matrix that a head has.
        seen: what a pass shows.

    Raises:
        ValueError: if values lie otherwise than their pattern, as where windows are made of them.
    """
    for letter, name in _NAMES.items():
        weight, bias = matrix(WEIGHTS[letter]), matrix(BIASES[letter])
        if weight is None or letter not in seen.read or name not in seen.made:
            continue
        if seen.read[letter].shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{where}: the weights of {WORDS[letter]} take vectors of {weight.shape[1]} numbers, and what it reads "
                f"has {seen.read[letter].shape[-1]}: its {WORDS[letter]} are made of another tensor"
            )
        made = torch.einsum("...pm,hmd->...phd", seen.read[letter].double(), weight.double())
        made = made if bias is None else made + bias.double()
        yield name, made, seen.made[name]
        if letter == "V" and {"z", "pattern"} <= seen.made.keys():
            z, pattern = seen.made["z"], seen.made["pattern"].double()
            own = made[..., [group("V", head) for head in range(z.shape[-2])], :]
            if pattern.shape[:-3] != own.shape[:-3] or pattern.shape[-1] != own.shape[-3]:
                raise ValueError(
                    f"{where}: values of the shape {tuple(own.shape)} lie in other windows or positions than their "
                    f"pattern, of the shape {tuple(pattern.shape)}: what heads read is not made by their weights alone"
                )
            yield "z", torch.einsum("...hqk,...khd->...qhd", pattern, own), z
    out, bias = matrix("W_O"), matrix("b_O")
    if out is not None and {"z", "out"} <= seen.made.keys():
        made = torch.einsum("...phd,hdm->...pm", seen.made["z"].double(), out.double())
        yield "out", made if bias is None else made + bias.double(), seen.made["out"]


def check_same(what: str, source: str, made: Tensor, found: Tensor) -> None:
    """Raise ValueError unless what was made with weights is what the model computes, but for rounding.

    Args:
        what: what it is.
        source: what it was recomputed from.
        made: with weights, in float64.
        found: by the model.
    """
    if made.shape != found.shape:
        raise ValueError(
            f"{what} has the shape {tuple(found.shape)}, and {tuple(made.shape)} when it is recomputed from {source}: "
            "positions are merged on the way, so no weights make it alone"
        )
    off = float((made - found).abs().max() / found.abs().max().clamp_min(1e-30))
    # In half precision the norm before and the result are rounded; sums are not.
    most = max(1e-5, 4 * torch.finfo(found.dtype).eps)
    if not off <= most:  # written so that NaN is refused, too
        why = "they are not the weights of its heads"
        if off <= 4 * torch.finfo(torch.bfloat16).eps:
            why = (
                "they are not quite the weights of its heads, or the model rounds to half precision on the way, as "
                "under torch.autocast, which hides the difference"
            )
        raise ValueError(
            f"{what} is off by {off:.2g} of its size when it is recomputed from the weights that were found "
            f"(at most {most:.2g}): {why}"
        )
