"""What a unit is built from that reads one other unit only, as those of a depthwise convolution do.

That it reads that unit says little: what it is built from is what that unit reads. Weights from there pass the other
unit's nonlinearity, the gate, and are exact where it is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.adapter.topology import INPUT, WeightLayer
from circuits.tables import Table
from circuits.units import Unit
from circuits.weights.connections import Connection, connections_table, incoming
from circuits.weights.expanded import expand_weights
from circuits.weights.kernels import by_site, written


@dataclass(frozen=True)
class Gate:
    """A unit that weights pass on the way to another.

    Attributes:
        unit: the unit.
        open: the mean slope of its nonlinearity over the positions of the examples: for ReLU the share of them at which
            it is open, for ReLU6 at which it is open and below 6. None without examples.
        full: the share of them at which it is held at a value other than zero, as ReLU6 is at 6.
        n: the number of positions counted.
    """

    unit: Unit
    open: float | None = None
    full: float | None = None
    n: int = 0

    def __str__(self) -> str:
        if self.open is None:
            return str(self.unit)
        full = f", at its upper bound at {self.full:.1%}" if (self.full or 0) >= 0.0005 else ""
        return f"{self.unit}, open at {self.open:.1%} of {self.n} positions{full}"


@dataclass(frozen=True, eq=False)
class Through:
    """What a unit is built from through the only unit that it reads.

    Attributes:
        unit: the unit.
        gates: the only unit that it reads; if that reads only one as well, also that one, and so on: the nearest first.
        connections: the strongest connections from what the last of them reads, as if the gates were open. Their
            kernels are those of all layers in between multiplied together, by offset on the source's map; their
            `through` has the gates' sites.
        cut: whether the kernels reach the border of the source's map, which then may have cut off some of them.
    """

    unit: Unit
    gates: tuple[Gate, ...]
    connections: list[Connection]
    cut: bool

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        gates = [
            {"unit": str(g.unit), "open": g.open, "full": g.full, "n": g.n} for g in self.gates
        ]
        found = [c.to_dict() for c in self.connections]
        return {"gates": gates, "cut": self.cut, "connections": found}

    def table(self) -> Table:
        """The connections by their source, with the gates in the title."""
        ways = " and ".join(map(str, self.gates))
        title = f"{self.unit}, further back: what it is built from through {ways}"
        note = "the border of the map cuts these kernels off" if self.cut else ""
        return replace(connections_table(self.connections, "source", title), note=note)


def incoming_through(
    model: HookedModel,
    unit: str | Unit,
    top: int = 10,
    examples: Examples | Tensor | None = None,
) -> Through | None:
    """The strongest connections into a unit through the only unit that it reads.

    They are expanded weights (of mode `linear`, see `expand_weights`) from each site that the last of the gates reads
    directly, and so count all paths from there. The unit's own nonlinearity does not count, as in `incoming`.

    Args:
        model: a model of images, without edits in force.
        unit: the target.
        top: how many connections, by the norm of the kernel.
        examples: on which it is counted how often the gates are open.

    Returns:
        None if the unit reads several units or none, or the only one that it reads has no incoming weights, as the
        model's input has none.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the unit does not exist, `top` is not positive, the model is edited, or an operation between the
            sites has no rule in `expand_weights`.
    """
    target = model.unit(unit)
    if not isinstance(model.input, ImageInput):  # weights are expanded over images only
        return None
    reads = incoming(
        model, target, 2 if top == 1 else top
    )  # one connection of several is not the only one
    lone = _lone(model, reads)
    if not lone:
        return None
    given = None if examples is None else as_examples(model, examples)
    gates = tuple(Gate(u) if given is None else gate_on(model, u, given) for u in lone)
    end, sites = _before_gate(model, target), tuple(g.unit.site for g in reversed(gates))
    expanded = [
        expand_weights(model, source, end.site, units=[end.index])
        for source in _sites_read(model, lone[-1])
    ]
    found = [c for weights in expanded for c in weights.connections(end.index, top)]
    kept = sorted(found, key=lambda c: -c.norm)[:top]
    return Through(
        target, gates, [replace(c, target=target, through=sites) for c in kept], any(w.cut for w in expanded)
    )  # fmt: skip


def _lone(model: HookedModel, reads: list[Connection]) -> list[Unit]:
    """The only unit that is read, the only one that this reads, and so on, as far as they have incoming weights."""
    found: list[Unit] = []
    while len(reads) == 1 and reads[0].source.site != INPUT:
        unit = reads[0].source
        if unit in found or not _sites_read(model, unit):
            break
        found.append(unit)
        reads = incoming(model, unit, 2)
    return found


def _writers(model: HookedModel, unit: Unit) -> Iterator[WeightLayer]:
    """The layers that write a unit."""
    return (x for x in model.weight_layers if unit.index in written(x, unit.site))


def _sites_read(model: HookedModel, unit: Unit) -> tuple[str, ...]:
    """The sites that the layers which write a unit read directly."""
    reads = (r for layer in _writers(model, unit) for r in layer.reads if r.direct)
    return tuple(by_site(reads))


def _before_gate(model: HookedModel, unit: Unit) -> Unit:
    """The same unit at the earliest site that shows it: before its nonlinearity, if there is one.

    A sum of several layers' outputs is a unit of its own.
    """
    writers = list(_writers(model, unit))
    if len(writers) != 1:
        return unit
    writes = writers[0].writes
    channel = next(int(w.index[unit.index]) for w in writes if w.site == unit.site)
    at = (writes[0].index == channel).nonzero()[:, 0].tolist()
    return Unit(writes[0].site, at[0]) if len(at) == 1 else unit


@recording_gradients()
def gate_on(model: HookedModel, unit: str | Unit, examples: Examples | Tensor) -> Gate:
    """Count at how many positions of some examples a unit's nonlinearity is open.

    Args:
        model: a model of images.
        unit: a unit behind a nonlinearity; one that has none before it is open everywhere.
        examples: the examples.

    Raises:
        KeyError: if its site is unknown.
        ValueError: if the unit does not exist.
    """
    behind = model.unit(unit)
    before = _before_gate(model, behind)
    total = full = n = 0
    for part in as_examples(model, examples).batches():
        slope, value = _slopes(model, before, behind, part.inputs)
        total += float(slope.double().sum())
        full += int(((slope == 0) & (value != 0)).sum())
        n += value.numel()
    return Gate(behind, total / n, full / n, n)


def _slopes(
    model: HookedModel, before: Unit, behind: Unit, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The slope of a nonlinearity at each position, and its value there."""
    if before == behind:
        value = model.run(inputs, read=[behind.site], until=behind.site)[behind.site]
        own = model.site(behind.site).by_unit(value)[:, behind.index]
        return torch.ones_like(own), own
    leaves: list[Tensor] = []

    def start(value: Tensor) -> Tensor:
        leaves.append(value.detach().clone().requires_grad_(True))
        return leaves[-1] * 1  # the model may work in place, which a leaf does not permit

    cache = model.run(
        inputs, read=[behind.site], until=behind.site, edits={before.site: start}, grad=True
    )
    own = model.site(behind.site).by_unit(cache[behind.site])[:, behind.index]
    # Nothing but the unit itself depends on it position by position, so that one gradient has all slopes.
    (slopes,) = torch.autograd.grad(own.sum(), leaves[-1])
    return model.site(before.site).by_unit(slopes)[:, before.index], own.detach()
