"""Readouts: linear classifiers by site and position, and how well they do on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuits.edits.activations import Steer
from circuits.edits.records import fitting
from circuits.experiments import Record
from circuits.experiments.statistics import corrected
from circuits.files import finite
from circuits.localization.cells import Key
from circuits.localization.classifiers import Method
from circuits.localization.grids import CellEffect
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table, between

What = Literal["accuracy", "selectivity", "fitted", "control", "random"]
"""A readout's held-out accuracy; this minus the control task's (its selectivity); its accuracy on the examples it was
fitted on; the held-out accuracy of the control task, or of random directions on average."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear classifier at one site and position, and how well it does on held-out examples.

    Attributes:
        site: the site's name.
        position: the position's label; `all` for the mean over all positions.
        key: the position as it was asked for; None for all positions.
        vector: the direction from the first class to the second (from corrupted to clean); None with more than two
            classes.
        norm: the vector's norm.
        accuracy: the share of held-out rows that are right.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster.
        high: upper end of the interval.
        fitted: the share of the rows it was fitted on that are right.
        random: the accuracy of each random direction of equal norm, with sign and boundary fitted; empty with more than
            two classes.
        control: the held-out accuracy on each control task.
        control_fitted: the accuracy on each control task's own rows: how well such a classifier can memorise labels.
        p_value: (1 + k) / (1 + n) for k of n random directions (control tasks, with more than two classes) that do at
            least as well.
        n: the number of held-out rows.
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
        """The accuracy minus the mean accuracy on the control tasks (Hewitt and Liang 2019)."""
        return self.accuracy - float(np.mean(self.control)) if self.control else float("nan")

    def value(self, what: What) -> float:
        """One of the readout's numbers, by name."""
        if what in ("control", "random"):
            each = self.control if what == "control" else self.random
            return float(np.mean(each)) if each else float("nan")
        return float(getattr(self, what))

    def edit(
        self, model: HookedModel, amount: float = 1.0, at: tuple[int, ...] | None = None
    ) -> Steer:
        """The edit that adds the direction, at all positions or at one.

        Raises:
            ValueError: if the readout has more than two classes.
        """
        if self.vector is None:
            raise ValueError(
                f"readout of {self.site} has more than two classes, and so no single direction"
            )
        shape = model.site(self.site).unit_shape
        return fitting(model, Steer(self.site, self.vector.reshape(shape), amount, at))


@dataclass(frozen=True, eq=False)
class Readouts:
    """Readouts by site and position.

    Attributes:
        method: how each readout was fitted.
        labels: what is read off, in words.
        readouts: the readouts, site by site.
        record: where the numbers come from; its task is the held-out half.
        n_fitted: the number of examples that they were fitted on.
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
        """The readout of a site at a position.

        Raises:
            KeyError: if there is no such readout.
        """
        for readout in self.readouts:
            if (readout.site, readout.position) == (site, position):
                return readout
        raise KeyError(f"no readout of {site!r} at position {position!r}")

    def matrix(self, what: What = "accuracy") -> Float[np.ndarray, "site position"]:
        """One number of each readout, site by position; NaN where there is no readout."""
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
