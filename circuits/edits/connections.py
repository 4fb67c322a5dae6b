"""Edits of the weights between units: scale, filter, set, rotate, transplant.

Connections are named by the units at their ends: `into` (units of a site that the layer writes) and `source` (units of
a site that the layer reads). An end that is left out means all units. `layer` selects one of several layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.edits.records import Edit, Substitutes
from circuits.edits.weights import WeightEdit, Weights, check_alone, layer_named
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import MatrixEnd, WeightMatrix
from circuits.models.adapter.topology import INPUT
from circuits.units import Unit, Units, nearest


@dataclass(frozen=True, eq=False)
class Part:
    """The rows and columns of a matrix that an edit changes."""

    matrix: WeightMatrix
    rows: Tensor
    columns: Tensor
    row_factor: Tensor
    column_factor: Tensor

    def effective(self, block: Tensor) -> Tensor:
        """Weights as they act from unit to unit: times the factors between layer and sites (batch norm, signs)."""
        factor = self.row_factor[:, None] * self.column_factor[None, :]
        return block * factor.reshape(*factor.shape, *(1,) * (block.ndim - 2)).to(block)


def parts_of(
    matrices: Sequence[WeightMatrix], into: Units | None, source: Units | None, layer: str
) -> list[Part]:
    """The weights between units, as one part for each layer.

    Raises:
        KeyError: if the layer is unknown.
        ValueError: if no layer connects them, or several layers write the same units and none is named.
    """
    among = (layer_named(matrices, layer),) if layer else matrices
    found: list[Part] = []
    for matrix in among:
        # Layers that do not touch the named site are no error: without `layer` all layers of the model are looked
        # through.
        written = None if into is None else matrix.end(into.site, "writes")
        read = None if source is None else matrix.end(source.site, "reads")
        if (into is not None and written is None) or (source is not None and read is None):
            continue
        # Without a target only layers that read the source directly count, not those behind further layers.
        if into is None and read is not None and not read.direct and not layer:
            continue
        rows, row_factor = _rows_or_columns(written, into, matrix.shape[0])
        columns, column_factor = _rows_or_columns(read, source, matrix.shape[1])
        # Grouped layers: units at both ends may be the layer's and have no weight between them.
        if len(rows) and len(columns) and bool(matrix.there(rows, columns).any()):
            found.append(Part(matrix, rows, columns, row_factor, column_factor))
    if not found:
        raise ValueError(_why_nothing(matrices, into, source, layer))
    for units, side in ((into, "writes"), (source, "reads")):
        if units is not None:
            _check_covered(found, units, side, alone=side == "writes" and not layer)
    if into is None:  # a parameter that several layers share is changed once
        by_parameter = {
            p.matrix.weight if p.matrix.cells is None else p.matrix.name: p for p in found
        }
        found = list(by_parameter.values())
    return found


def _why_nothing(
    matrices: Sequence[WeightMatrix], into: Units | None, source: Units | None, layer: str
) -> str:
    """The error message if no weights were found: why, and what there is."""
    ends = f"{f' into {into}' if into else ''}{f' from {source}' if source else ''}"
    text = f"no weights{' of ' + layer if layer else ''} lead{ends}"
    for units, side in ((into, "writes"), (source, "reads")):
        if units is None or any(m.end(units.site, side) for m in matrices):
            continue
        sites = [end.site for m in matrices for end in getattr(m, side)]
        near = ", ".join(dict.fromkeys(nearest(units.site, sites) or sites[:5]))
        known = f"layers {side[:-1]} {near}" if near else f"no layer is known that {side} any site"
        return (
            f"{text}: no layer {side} {units.site} (weights that are computed from other weights are not followed, "
            f"nor biases that are), {'but' if near else 'and'} {known}"
        )
    return f"{text} directly"


def _check_covered(parts: Sequence[Part], units: Units, side: str, alone: bool) -> None:
    """Raise ValueError if a unit has no weights here, or (`alone`) several layers' weights."""
    seen: dict[int, list[str]] = {}
    for part in parts:
        end = part.matrix.end(units.site, side)
        assert end is not None
        which = part.rows if side == "writes" else part.columns
        # A unit may own several rows (a head owns d_head of them), hence owners and not rows are counted.
        for unit in end.owner[which].unique().tolist():
            seen.setdefault(unit, []).append(part.matrix.name)
    if units.indices is not None and (missing := [i for i in units.indices if i not in seen]):
        known = ", ".join(part.matrix.name for part in parts)
        raise ValueError(f"unit {units.site}:{missing[0]} has no weights in {known}")
    if alone and any(len(names) > 1 for names in seen.values()):
        names = next(names for names in seen.values() if len(names) > 1)
        raise ValueError(
            f"several layers write {units}: name one with layer={' or layer='.join(names)}"
        )


def _rows_or_columns(end: MatrixEnd | None, units: Units | None, n: int) -> tuple[Tensor, Tensor]:
    if end is None or units is None:
        return torch.arange(n), torch.ones(n)
    which = end.of(units.indices)
    return which, end.factor[which].float()


@dataclass(frozen=True, eq=False)
class ConnectionEdit(WeightEdit):
    """An edit of the weights between units.

    Attributes:
        into: units that the layer writes; all if None.
        source: units that the layer reads; all if None.
        layer: the layer's name; the only one that connects the units if empty.
    """

    into: Units | None = None
    source: Units | None = None
    layer: str = ""

    def _check_values(self) -> None:
        if self.into is None and self.source is None:
            raise ValueError(f"edit {self.operator!r} needs into, source or both")

    def checked(self, model: HookedModel) -> ConnectionEdit:
        ends: dict[str, Any] = {}
        for name in ("into", "source"):
            units: Units | None = getattr(self, name)
            if units is None:
                continue
            if name == "source" and units.site == INPUT:
                n = model.n_units(INPUT)
                if units.indices is not None and max(units.indices) >= n:
                    raise ValueError(
                        f"unit input:{max(units.indices)} does not exist: there are {n}"
                    )
                continue
            site = model.site(units.site)
            units.among(site)
            ends[name] = Units(site.name, units.indices)
        own = replace(self, **ends)
        parts = own.parts(model.matrices)
        for part in parts:
            tied = {"weights": part.matrix.tied}
            if self.changes_biases:
                tied["biases"] = part.matrix.bias_tied
            for what, others in tied.items():
                if others and not own.layer:
                    raise ValueError(
                        f"layer {part.matrix.name} shares its {what} with {', '.join(others)}: name "
                        f"layer={part.matrix.name} to change all of them"
                    )
            if part.matrix.calls > 1 and not own.layer:
                raise ValueError(
                    f"layer {part.matrix.name} runs {part.matrix.calls} times in a pass, with the same weights: name "
                    f"layer={part.matrix.name} to change all of them"
                )
        own._check_parts(parts)
        check_alone(own, model.matrices)
        return own

    def _check_parts(self, parts: list[Part]) -> None:
        """Raise ValueError if arrays do not fit."""

    def parts(self, matrices: Sequence[WeightMatrix]) -> list[Part]:
        """The weights that the edit changes."""
        return parts_of(matrices, self.into, self.source, self.layer)

    @property
    def changes_biases(self) -> bool:
        """Whether it changes the biases of its rows, too."""
        return False

    def parameters(self, matrices: Sequence[WeightMatrix]) -> list[str]:
        parts = self.parts(matrices)
        biases = [p.matrix.bias for p in parts if self.changes_biases and p.matrix.bias]
        return [part.matrix.weight for part in parts] + biases

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        name, units = self._twin_end()
        # The input is no site of the model, so that there are no other units of it to draw from.
        instead = None if units.site == INPUT else substitutes.of(units)
        if instead is None:
            return None
        try:
            return replace(self, **{name: instead}).checked(model)
        except ValueError:  # these substitutes do not have the same weights together
            return None

    def edited_units(self, model: HookedModel) -> Mapping[Unit, frozenset[int] | None]:
        name, units = self._twin_end()
        if units.site == INPUT:
            return {}
        site = model.site(units.site)
        side: Literal["reads", "writes"] = "writes" if name == "into" else "reads"
        found: dict[Unit, frozenset[int] | None] = {}
        for part in self.parts(model.matrices):
            end = part.matrix.end(units.site, side)
            assert end is not None
            pool = frozenset(
                i for i in range(site.n_units) if self._has_weights(part, end, side, i)
            )
            which = part.rows if side == "writes" else part.columns
            for index in end.owner[which].unique().tolist():
                before = found.get(site.unit(index))
                # Where several layers read the unit, a substitute needs weights in all of them.
                found[site.unit(index)] = pool if before is None else pool & before
        return found

    def _has_weights(self, part: Part, end: MatrixEnd, side: str, unit: int) -> bool:
        """Whether a unit has weights to the units at the other end, if those are named (grouped layers may not)."""
        which = end.of((unit,))
        if not len(which):
            return False
        if self.into is None or self.source is None:
            return True
        rows, columns = (which, part.columns) if side == "writes" else (part.rows, which)
        return part.matrix.groups == 1 or bool(part.matrix.there(rows, columns).all())

    def _twin_end(self) -> tuple[Literal["into", "source"], Units]:
        """The end whose units a twin replaces."""
        if self.into is not None:
            return "into", self.into
        assert self.source is not None
        return "source", self.source

    def apply(self, weights: Weights) -> None:
        for part in self.parts(weights.matrices):
            parameter = weights.writable(part.matrix.weight)
            # Blocks are in the matrix' own layout, row x column x kernel, whatever the parameter's shape is
            # (transposed, several heads' matrices side by side): `block` and `put` convert both ways.
            block = part.matrix.block(parameter, part.rows, part.columns)
            part.matrix.put(parameter, part.rows, part.columns, self.new(part, block))

    def new(self, part: Part, block: Tensor) -> Tensor:
        """The new weights of a block, row x column x kernel, given the old ones."""
        raise NotImplementedError

    def _only_part(self, parts: list[Part]) -> Part:
        if len(parts) != 1:
            names = ", ".join(part.matrix.name for part in parts)
            raise ValueError(f"edit {self.operator!r} changes one layer only: name one of {names}")
        return parts[0]


@dataclass(frozen=True, eq=False)
class ScaleWeights(
    ConnectionEdit, operator="scale_weights", about="Multiply weights between units; 0 cuts them."
):
    """Multiply the weights between units by a factor; 0 cuts the connection.

    Attributes:
        factor: a finite number.
        bias: whether the rows' biases are scaled too.
    """

    factor: float = 0.0
    bias: bool = False

    def new(self, part: Part, block: Tensor) -> Tensor:
        # Not 0 * block, which is NaN for an infinite weight.
        return torch.zeros_like(block) if self.factor == 0 else block * self.factor

    @property
    def changes_biases(self) -> bool:
        return self.bias

    def apply(self, weights: Weights) -> None:
        super().apply(weights)
        for part in self.parts(weights.matrices):
            if self.bias and part.matrix.bias is not None:
                bias = weights.writable(part.matrix.bias)
                bias[part.matrix.bias_index(bias, part.rows)] *= self.factor


Sign = Literal["positive", "negative"]


@dataclass(frozen=True, eq=False)
class FilterWeights(
    ConnectionEdit, operator="filter_weights", about="Keep weights of one sign only."
):
    """Keep the weights of one sign and set the rest to 0.

    The sign is that of the weight as it acts between the sites; a batch norm in between may flip it.

    Attributes:
        keep: `positive` or `negative`.
    """

    keep: str = "positive"

    def _check_values(self) -> None:
        super()._check_values()
        if self.keep not in ("positive", "negative"):
            raise ValueError(
                f"keep {self.keep!r} of edit 'filter_weights' is not one of positive, negative"
            )

    def new(self, part: Part, block: Tensor) -> Tensor:
        # By the sign with which units act on each other: behind a batch norm with a negative weight, a positive
        # parameter inhibits.
        acting = part.effective(block)
        kept = acting > 0 if self.keep == "positive" else acting < 0
        return torch.where(kept, block, torch.zeros_like(block))


@dataclass(frozen=True, eq=False)
class KeepWeights(
    ConnectionEdit, operator="keep_weights", about="Keep only what comes from some units."
):
    """Of the weights into `into`, keep only those from `source` (a family, for example) and set the rest to 0.

    This applies to every layer that writes these units, or to the named one. Biases stay.
    """

    def _check_values(self) -> None:
        if self.into is None or self.source is None:
            raise ValueError("edit 'keep_weights' needs both into and source")

    def parts(self, matrices: Sequence[WeightMatrix]) -> list[Part]:
        parts_of(matrices, self.into, None, self.layer)  # raises if several layers write the units
        return parts_of(matrices, self.into, self.source, self.layer)

    def apply(self, weights: Weights) -> None:
        for part in self.parts(weights.matrices):
            parameter, matrix = weights.writable(part.matrix.weight), part.matrix
            # Taken out before the rows are cleared: block copies.
            kept = matrix.block(parameter, part.rows, part.columns)
            _clear(matrix, parameter, part.rows)
            matrix.put(parameter, part.rows, part.columns, kept)


def _clear(matrix: WeightMatrix, parameter: Tensor, rows: Tensor) -> None:
    """Set whole rows to 0."""
    # All inputs and not only those of `source`: what a unit read besides must not act on it.
    every = torch.arange(matrix.shape[1])
    matrix.put(parameter, rows, every, torch.zeros_like(matrix.block(parameter, rows, every)))


@dataclass(frozen=True, eq=False)
class SetWeights(ConnectionEdit, operator="set_weights", about="Set the weights between units."):
    """Set the weights between units: a kernel, or a block of kernels.

    Attributes:
        values: row x column x kernel, in the order of the units; just the kernel for a single connection.
        bias: one number for each row; unchanged if None.
    """

    values: Tensor | None = None
    bias: Tensor | None = None

    def _check_values(self) -> None:
        super()._check_values()
        if self.values is None:
            raise ValueError("edit 'set_weights' needs values")

    def _check_parts(self, parts: list[Part]) -> None:
        part = self._only_part(parts)
        if self.values is not None and not bool(part.matrix.there(part.rows, part.columns).all()):
            raise ValueError(
                f"layer {part.matrix.name} has no weights between some of these units (groups)"
            )
        self._shaped(part)
        if self.bias is not None and (
            part.matrix.bias is None or tuple(self.bias.shape) != (len(part.rows),)
        ):
            has = "no bias" if part.matrix.bias is None else f"{len(part.rows)} rows here"
            raise ValueError(
                f"bias of shape {tuple(self.bias.shape)}: {part.matrix.name} has {has}"
            )

    def _shaped(self, part: Part) -> Tensor:
        wanted = (len(part.rows), len(part.columns), *part.matrix.shape[2:])
        assert self.values is not None
        if tuple(self.values.shape) == wanted:
            return self.values
        if wanted[:2] == (1, 1) and tuple(self.values.shape) == wanted[2:]:
            return self.values.reshape(wanted)
        raise ValueError(
            f"values of shape {tuple(self.values.shape)} of edit '{self}' do not fit: expected "
            f"{' x '.join(map(str, wanted))}"
        )

    def new(self, part: Part, block: Tensor) -> Tensor:
        return self._shaped(part)

    @property
    def changes_biases(self) -> bool:
        return self.bias is not None

    def apply(self, weights: Weights) -> None:
        super().apply(weights)
        if self.bias is not None:
            part = self._only_part(self.parts(weights.matrices))
            assert part.matrix.bias is not None
            own = weights.writable(part.matrix.bias)
            own[part.matrix.bias_index(own, part.rows)] = self.bias.to(own)


@dataclass(frozen=True, eq=False)
class RotateWeights(
    ConnectionEdit, operator="rotate_weights", about="Turn kernels about their middle."
):
    """Rotate kernels about their centre, counterclockwise as seen in an image (y down).

    Multiples of 90 degrees are exact for square kernels; other angles are interpolated bilinearly, with zeros outside.

    Attributes:
        degrees: the angle.
    """

    degrees: float = 90.0

    def _check_parts(self, parts: list[Part]) -> None:
        for part in parts:
            kernel = part.matrix.shape[2:]
            if len(kernel) != 2 or kernel == (1, 1):
                raise ValueError(
                    f"edit 'rotate_weights': {part.matrix.name} has kernels of "
                    f"{' x '.join(map(str, kernel)) or 'one number'}, expected kernels that can be rotated"
                )

    def new(self, part: Part, block: Tensor) -> Tensor:
        return rotated_kernels(block, self.degrees)


def rotated_kernels(kernels: Tensor, degrees: float) -> Tensor:
    """Kernels (… x y x x) rotated counterclockwise as seen in an image."""
    height, width = kernels.shape[-2:]
    quarter = degrees / 90
    # Quarter turns move every weight to the place of another and are exact; a kernel that is not square only allows
    # half turns.
    if quarter == round(quarter) and (height == width or round(quarter) % 2 == 0):
        return torch.rot90(kernels, round(quarter) % 4, (-2, -1)).contiguous()
    # Each point of the result is looked up at its preimage: (x, y) rotated back about the centre. With y pointing down
    # a counterclockwise rotation by a is x' = x cos a + y sin a, y' = -x sin a + y cos a; its inverse swaps the signs
    # of the sines. One row and column of zeros around the kernel take the points outside.
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    y = (torch.arange(height) - (height - 1) / 2).double()[:, None]
    x = (torch.arange(width) - (width - 1) / 2).double()[None, :]
    back_x = x * angle.cos() - y * angle.sin() + (width - 1) / 2
    back_y = x * angle.sin() + y * angle.cos() + (height - 1) / 2
    padded = F.pad(kernels.cpu().double().reshape(-1, height, width), (1, 1, 1, 1))
    found = torch.zeros(len(padded), height, width, dtype=torch.float64)
    left, top = back_x.floor(), back_y.floor()
    for dy in (0, 1):
        for dx in (0, 1):
            # Bilinear: the four neighbours of a point share in it by their closeness along both axes; the shares add up
            # to 1.
            share = (1 - (back_x - left - dx).abs()) * (1 - (back_y - top - dy).abs())
            # One is added for the border; what lies further outside is clamped to it and reads a zero.
            column = (left + dx + 1).clamp(0, width + 1).long()
            row = (top + dy + 1).clamp(0, height + 1).long()
            found += padded[:, row, column] * share
    return found.reshape(kernels.shape).to(kernels)


@dataclass(frozen=True, eq=False)
class Transplant(
    ConnectionEdit, operator="transplant", about="Replace units by ones of another network."
):
    """Replace units by units of another network: its weights and biases, times a gain, plus an offset.

    All other weights into the units become 0.

    Attributes:
        weights: row x column x kernel: the weights of the donor's units from the units that match `source`.
        biases: one number for each row; 0 if None.
        gain: one number for each row; 1 if None.
        offset: one number for each row; 0 if None.
        donor: the donor's units and network, in words.
    """

    weights: Tensor | None = None
    biases: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    donor: str = ""

    def _check_values(self) -> None:
        if self.into is None or self.source is None or self.weights is None:
            raise ValueError("edit 'transplant' needs into, source and weights")

    def _check_parts(self, parts: list[Part]) -> None:
        part = self._only_part(parts)
        assert self.weights is not None
        wanted = (len(part.rows), len(part.columns), *part.matrix.shape[2:])
        if tuple(self.weights.shape) != wanted:
            raise ValueError(
                f"weights of shape {tuple(self.weights.shape)} of edit 'transplant' do not fit "
                f"{part.matrix.name}: expected {' x '.join(map(str, wanted))}"
            )
        if not bool(part.matrix.there(part.rows, part.columns).all()):
            raise ValueError(
                f"layer {part.matrix.name} has no weights between some of these units (groups)"
            )
        for name in ("biases", "gain", "offset"):
            array: Tensor | None = getattr(self, name)
            if array is not None and tuple(array.shape) != wanted[:1]:
                raise ValueError(
                    f"{name} of shape {tuple(array.shape)}: expected {wanted[0]} numbers"
                )
            if name != "gain" and array is not None and part.matrix.bias is None:
                raise ValueError(f"{name}: layer {part.matrix.name} has no bias")

    @property
    def changes_biases(self) -> bool:
        return True

    def apply(self, weights: Weights) -> None:
        part = self._only_part(self.parts(weights.matrices))
        assert self.weights is not None
        matrix, rows = part.matrix, part.rows
        n = len(rows)
        gain = torch.ones(n) if self.gain is None else self.gain
        parameter = weights.writable(matrix.weight)
        _clear(matrix, parameter, rows)
        shape = (n, *(1,) * (self.weights.ndim - 1))
        matrix.put(parameter, rows, part.columns, self.weights * gain.reshape(shape))
        # The unit becomes gain (w x + b) + offset: gain on weights and bias alike, else the threshold would move.
        if matrix.bias is not None:
            biases = torch.zeros(n) if self.biases is None else self.biases
            offset = torch.zeros(n) if self.offset is None else self.offset
            own = weights.writable(matrix.bias)
            own[matrix.bias_index(own, rows)] = (gain * biases + offset).to(own)
