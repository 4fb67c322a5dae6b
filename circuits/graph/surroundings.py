"""Graphs of all units of a model, on disk or read from the model: how units are checked, how a part of one begins."""

from __future__ import annotations

from typing import Any

from circuits.graph.circuit import ORDER, CircuitGraph
from circuits.units import Unit, unknown


class AllUnits:
    """A graph of all units of a model.

    Attributes:
        model: the model's name.
        model_hash: the hash of its weights.
        sites: the connected sites in the model's order, each with how many units it has.
    """

    model: str
    model_hash: str
    sites: dict[str, int]

    def check(self, unit: str | Unit) -> Unit:
        """A unit of the graph.

        Raises:
            KeyError: if its site is unknown.
            ValueError: if the site has no such unit.
        """
        unit = Unit.parse(unit) if isinstance(unit, str) else unit
        if unit.site not in self.sites:
            raise unknown("site of the graph", unit.site, self.sites)
        if unit.index >= self.sites[unit.site]:
            raise ValueError(
                f"unit {unit} does not exist: {unit.site} has units 0 to {self.sites[unit.site] - 1}"
            )
        return unit

    def _begun(self, unit: str | Unit, hops: int, top: int) -> tuple[Unit, CircuitGraph]:
        """The unit that a neighbourhood starts at, and a graph of it alone."""
        start = self.check(unit)
        for name, value in (("hops", hops), ("top", top)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        graph = self._new({"neighbourhood": str(start), "hops": hops, "top": top})
        graph.add_node(start)
        return start, graph

    def _new(self, how: dict[str, Any]) -> CircuitGraph:
        known = {"model": self.model, "model_hash": self.model_hash, ORDER: list(self.sites)}
        return CircuitGraph(**known, made=how)
