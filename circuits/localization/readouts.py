"""Readouts: linear classifiers by site and position, and how well they do on examples they have not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuits.edits.activations import Steer
from circuits.experiments import Record
from circuits.experiments.statistics import corrected
from circuits.files import finite
from circuits.localization.cells import Key
from circuits.localization.classifiers import Method
from circuits.localization.grids import CellEffect
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table, between

What = Literal["accuracy", "selectivity", "fitted", "control", "random"]
"""A readout's accuracy on held-out examples; that less the control task's; its accuracy where it was fitted; the
control task's, or the mean of random directions', on held-out examples."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear classifier at one place, and how well it does on examples that it has not seen.

    Attributes:
        site: where.
        position: which column; `all` for the mean over all positions.
        key: the position as it was asked for; None for all of them.
        vector: the direction from the first class to the second (from corrupted to clean), one number for each of a
            row's; None for more than two classes.
        norm: its length.
        accuracy: the share of held-out rows that are right.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster.
        high: its upper end.
        fitted: the share of rows that are right where it was fitted.
        random: the accuracy of each random direction of equal norm, with sign and boundary fitted; none for more than
            two classes.
        control: the accuracy on each control task.
        control_fitted: the same where it was fitted: how well such a classifier can learn labels by heart.
        p_value: the share of random directions (of control tasks, for more than two classes) that do at least as well,
            the readout counted.
        n: how many held-out rows.
    """

    site: str
    position: str
    key: Key | None
    vector: Float[Tensor, " width"] | None
    norm: float
    accuracy: float
    low: float
    high: float
    fitted: float
    random: tuple[float, ...]
    control: tuple[float, ...]
    control_fitted: tuple[float, ...]
    p_value: float
    n: int

    @property
    def selectivity(self) -> float:
        """The accuracy less the mean of the control tasks'."""
        return self.accuracy - float(np.mean(self.control)) if self.control else float("nan")

    def value(self, what: What) -> float:
        """One of its numbers."""
        if what in ("control", "random"):
            each = self.control if what == "control" else self.random
            return float(np.mean(each)) if each else float("nan")
        return float(getattr(self, what))

    def edit(
        self, model: HookedModel, amount: float = 1.0, at: tuple[int, ...] | None = None
    ) -> Steer:
        """The edit that adds the direction, at all positions or at one.

        Raises:
            ValueError: if there is none.
        """
        if self.vector is None:
            raise ValueError(f"readout of {self.site} has more than two classes: no one direction")
        shape = model.site(self.site).unit_shape
        return Steer(self.site, self.vector.reshape(shape), amount, at).checked(model)


@dataclass(frozen=True, eq=False)
class Readouts:
    """Readouts by site and position.

    Attributes:
        method: how each was fitted.
        labels: what is read off.
        readouts: site by site.
        record: what they belong to; its task is the held-out half.
        n_fitted: how many examples they were fitted on.
    """

    method: Method
    labels: str
    readouts: tuple[Readout, ...]
    record: Record
    n_fitted: int

    @property
    def rows(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(dict.fromkeys(r.site for r in self.readouts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The positions."""
        return tuple(dict.fromkeys(r.position for r in self.readouts))

    def at(self, site: str, position: str) -> Readout:
        """One of them.

        Raises:
            KeyError: if there is none.
        """
        for readout in self.readouts:
            if (readout.site, readout.position) == (site, position):
                return readout
        raise KeyError(f"no readout of {site!r} at position {position!r}")

    def matrix(self, what: What = "accuracy") -> Float[np.ndarray, "site position"]:
        """A number of each readout; NaN where there is none."""
        made = np.full((len(self.rows), len(self.columns)), np.nan)
        for r in self.readouts:
            made[self.rows.index(r.site), self.columns.index(r.position)] = r.value(what)
        return made

    def corrected_p(self) -> tuple[float, ...]:
        """P-values corrected for the number of readouts (Holm)."""
        return corrected([r.p_value for r in self.readouts])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        rows = [
            {k: v for k, v in asdict(r).items() if k != "vector"}
            | {"selectivity": r.selectivity, "corrected_p": p}
            for r, p in zip(self.readouts, self.corrected_p(), strict=True)
        ]
        return finite({
            "method": self.method, "labels": self.labels, "n_fitted": self.n_fitted, "readouts": rows,
            "record": asdict(self.record),
        })  # fmt: skip

    def tables(self, top: int, steered: Sequence[CellEffect] = ()) -> Iterator[Table]:
        """The most accurate readouts; with what steering along each did, where that was measured."""
        p = self.corrected_p()
        order = sorted(range(len(p)), key=lambda i: -self.readouts[i].accuracy)[:top]
        columns = [
            "where",
            "accuracy",
            "95 % interval",
            "random directions",
            "control",
            "selectivity",
            "p",
        ]
        rows: list[list[object]] = []
        for i in order:
            r = self.readouts[i]
            rows.append([
                f"{r.site}@{r.position}", r.accuracy, between(r.low, r.high), r.value("random"), r.value("control"),
                r.selectivity, p[i],
            ])  # fmt: skip
            rows[-1] += [steered[i].normalised, steered[i].null] if steered else []
        columns += ["steered", "at random"] if steered else []
        title = f"{self.labels}, fitted on {self.n_fitted} examples and judged on {self.record.measured_on}"
        note = (
            "control: labels drawn at random for each template instance; p: by random directions, Holm correction over "
            "all places"
        )
        yield Table(
            columns,
            rows,
            f"{title}; {len(order)} of {len(p)} places, seed {self.record.seed}",
            note,
        )
