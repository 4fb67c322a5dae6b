"""Random edits of every operator, for any model: for property tests and `benchmarks/edit_fuzz.py`."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from circuits.edits.activations import (
    Clamp,
    Erase,
    Patch,
    Resample,
    Scale,
    Set,
    Steer,
    random_basis,
)
from circuits.edits.attention import KnockOut
from circuits.edits.connections import (
    FilterWeights,
    KeepWeights,
    RotateWeights,
    ScaleWeights,
    SetWeights,
    Transplant,
)
from circuits.edits.layers import Associate, EraseWeights, LowRank
from circuits.edits.records import OPERATORS, Edit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import WeightMatrix
from circuits.models.adapter.sites import attention_patterns
from circuits.units import Site, Units


class RandomEdits:
    """Draws edits that fit a model."""

    def __init__(self, model: HookedModel, seed: int) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def units(self, site: Site, most: int = 3) -> Units:
        n = self.random.randint(1, min(most, site.n_units))
        return Units(site.name, tuple(self.random.sample(range(site.n_units), n)))

    def edit(self, operator: str | None = None) -> Edit:
        """An edit of one operator, or of any that the model can have."""
        for _ in range(200):
            name = operator or self.random.choice(list(OPERATORS))
            try:
                return getattr(self, f"_{name}")().checked(self.model)
            except (ValueError, LookupError):
                continue  # drew ends that no layer connects, or a 1 x 1 kernel to turn
        raise LookupError(f"no {operator or 'edit'} of {self.model.name} found")

    # --- activations -----------------------------------------------------------------------------

    def _site(self, heads: bool = True) -> Site:
        sites = [s for s in self.model.sites if heads or "d_head" not in s.axes]
        return self.random.choice(sites)

    def _scale(self) -> Edit:
        return Scale(self.units(self._site()), factor=self.random.choice([0.0, -1.5, 2.0]))

    def _clamp(self) -> Edit:
        return Clamp(self.units(self._site()), low=-0.5, high=self.random.random())

    def _set(self) -> Edit:
        return Set(self.units(self._site()), values=self.numbers(1).reshape(()))

    def _inner(self, site: Site) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(site.shape, 1) if i != site.unit_axis)

    def _patch(self) -> Edit:
        site = self._site()
        units = self.units(site)
        return Patch(units, values=self.numbers(1, len(units.indices or ()), *self._inner(site)))

    def _resample(self) -> Edit:
        site = self._site()
        units = self.units(site)
        return Resample(units, values=self.numbers(3, len(units.indices or ()), *self._inner(site)))

    def _steer(self) -> Edit:
        site = self._site(heads=False)
        return Steer(site.name, self.numbers(site.n_units), amount=0.5)

    def _basis(self, n: int) -> Tensor:
        return random_basis(torch.zeros(n, min(2, n)), self.generator)

    def _erase(self) -> Edit:
        site = self._site(heads=False)
        return Erase(site.name, self._basis(site.n_units), mean=self.numbers(site.n_units))

    def _knock_out(self) -> Edit:
        """Some positions no longer look at the second; the first keeps what it has."""
        sites = attention_patterns(self.model.sites)
        if not sites:
            raise LookupError(f"{self.model.name} has no attention")
        renormalise = self.random.random() < 0.5
        units = self.units(self.random.choice(sites))
        return KnockOut(units, queries=(2, 3, -1), keys=(1,), renormalise=renormalise)

    # --- weights ---------------------------------------------------------------------------------

    def _matrix(self) -> WeightMatrix:
        return self.random.choice(self.model.matrices)

    def _ends(self) -> dict[str, Units | str]:
        matrix = self._matrix()
        found: dict[str, Units | str] = {"layer": matrix.name}
        for name, ends in (("into", matrix.writes), ("source", matrix.reads)):
            ends = [e for e in ends if e.site != "input"]
            if ends and (self.random.random() < 0.7 or name == "into"):
                found[name] = self.units(self.model.site(self.random.choice(ends).site))
        return found

    def _both(self) -> tuple[dict[str, Units | str], WeightMatrix, int, int]:
        ends = self._ends()
        into, source = ends["into"], ends["source"]
        assert isinstance(into, Units)
        assert isinstance(source, Units)
        matrix = next(m for m in self.model.matrices if m.name == ends["layer"])
        written, read = matrix.end(into.site, "writes"), matrix.end(source.site, "reads")
        assert written is not None
        assert read is not None
        return ends, matrix, len(written.of(into.indices)), len(read.of(source.indices))

    def _scale_weights(self) -> Edit:
        factor = self.random.choice([0.0, 0.5, -1.0])
        return ScaleWeights(**self._ends(), factor=factor, bias=self.random.random() < 0.3)

    def _filter_weights(self) -> Edit:
        return FilterWeights(**self._ends(), keep=self.random.choice(["positive", "negative"]))

    def _keep_weights(self) -> Edit:
        return KeepWeights(**self._both()[0])

    def _set_weights(self) -> Edit:
        ends, matrix, rows, columns = self._both()
        bias = self.numbers(rows) if matrix.bias else None
        return SetWeights(**ends, values=self.numbers(rows, columns, *matrix.shape[2:]), bias=bias)

    def _rotate_weights(self) -> Edit:
        return RotateWeights(**self._ends(), degrees=self.random.choice([90.0, 180.0, 33.0]))

    def _transplant(self) -> Edit:
        ends, matrix, rows, columns = self._both()
        weights = self.numbers(rows, columns, *matrix.shape[2:])
        biases = self.numbers(rows) if matrix.bias else None
        return Transplant(
            **ends, weights=weights, biases=biases, gain=self.numbers(rows), donor="x"
        )

    def _low_rank(self) -> Edit:
        matrix = self._matrix()
        right = self.numbers(math.prod(matrix.shape[1:]), 2)
        return LowRank(matrix.name, self.numbers(matrix.shape[0], 2) * 0.1, right * 0.1)

    def _associate(self) -> Edit:
        matrix = self._matrix()
        return Associate(
            matrix.name,
            self.numbers(*matrix.shape[1:]),
            self.numbers(matrix.shape[0]),
            self.numbers(matrix.shape[1]),
        )

    def _erase_weights(self) -> Edit:
        matrix = self._matrix()
        mean = self.numbers(matrix.shape[0]) if matrix.bias else None
        return EraseWeights(matrix.name, self._basis(matrix.shape[0]), mean=mean)
