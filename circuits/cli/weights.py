"""`circuits weights` and `expand`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Typer

from circuits.cli import options
from circuits.cli.output import warn
from circuits.cli.signatures import Within, argument, command, option
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.randomizing import randomized
from circuits.tables import Table
from circuits.units import Unit
from circuits.weights import (
    Connection,
    ExpandedWeights,
    expand_weights,
    incoming,
    incoming_through,
    outgoing,
)
from circuits.weights.connections import connections_table, not_written
from circuits.weights.factors import Factors, factorize

app = Typer()


@command(app)
def weights(
    model: options.Model,
    unit: options.UnitArgument,
    examples: options.Dataset,
    output: options.FigureOutput,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:
    """Show the strongest weights into and out of a unit.

    Of a unit that reads one other unit only, as in a depthwise convolution, also those of what that reads; with --data
    it is counted on these examples how often the nonlinearity in between is open.
    """
    loaded = model.load()
    why = not_written(loaded, loaded.unit(unit))
    built_from, builds = [] if why else incoming(loaded, unit, top), outgoing(loaded, unit, top)
    chosen = examples.choose(loaded, seed) if examples.data else None
    through = None if why else incoming_through(loaded, unit, top, chosen)
    if through is None and chosen is not None:
        raise ValueError(
            f"--data {examples.data!r} is for a unit that reads one other unit only, as in a depthwise convolution: "
            f"{unit} does not"
        )
    shown = {c.layer for c in (*built_from, *builds)}
    for layer in loaded.weight_layers:
        if layer.name in shown and layer.lost:
            warn(
                f"layer {layer.name} also reads what comes through {', '.join(layer.lost)}, which is not "
                "followed here: `circuits expand` has it all"
            )
    end = "source" if built_from else "target"
    output.draw(lambda figures: figures.kernels_figure(built_from or builds, end, unit))
    both = {"incoming": built_from, "outgoing": builds}
    facts = {name: [c.to_dict() for c in found] for name, found in both.items()}
    output.show(
        {
            "unit": str(loaded.unit(unit)), "model_hash": loaded.hash, **facts,
            "incoming_through": None if through is None else through.to_dict(),
            "examples": {} if chosen is None else chosen.describe(),
        },
        [
            *_connections(f"{unit} is built from", built_from, "source", why),
            *([] if through is None else [through.table()]),
            *_connections(f"{unit} builds", builds, "target"),
        ],
    )  # fmt: skip


def _connections(
    title: str, found: list[Connection], end: Literal["source", "target"], why: str = ""
) -> Iterator[Table | str]:
    yield connections_table(found, end, title, {"through": [", ".join(c.through) for c in found]})
    if not found:
        yield f"  nothing: {why or 'no layer that is followed connects it to a site there (see `circuits expand`)'}"


@dataclass(frozen=True)
class Expanding:
    """Which weights are expanded, and how."""

    mode: Annotated[Literal["linear", "mean"], option(
        "What stands for nonlinearities: nothing (linear), or their mean gradient on the examples of --data (mean)."
    )] = "linear"  # fmt: skip
    at: Annotated[str, option(
        "The position of TARGET in its map, written Y,X. By default the middle of the map."
    )] = ""  # fmt: skip
    apart: Annotated[bool, option(
        "Also show the sums over paths of positive and of negative weight apart.", "--apart"
    )] = False  # fmt: skip

    def expand(
        self, model: HookedModel, source: str, unit: Unit, examples: Examples | None, **more: Any
    ) -> ExpandedWeights:
        """A site's weights on a unit."""
        return expand_weights(
            model, source, unit.site, mode=self.mode, units=[unit.index], at=_position(self.at), examples=examples,
            **more,
        )  # fmt: skip


@command(app)
def expand(
    model: options.Model,
    source: Annotated[str, argument("The site that is read, an earlier one, or `input`.")],
    target: options.UnitArgument,
    expanding: Expanding,
    examples: options.Dataset,
    output: options.FigureOutput,
    factors: Annotated[int, option(
        "Also factorise the weights into this many groups of source units; 0: do not.", check=Within(0)
    )] = 0,
    top: options.Top = options.TOP,
    out: Annotated[Path | None, option("Save the weights of all units of SOURCE to this .safetensors file.")] = None,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show expanded weights (site to unit, through all layers between) and shuffled ones."""
    options.check_out(out, ".safetensors")
    _position(expanding.at)
    loaded = model.load()
    unit = loaded.unit(target)
    n_sources = loaded.n_units(source if source == "input" else loaded.site(source).name)
    if factors > n_sources:
        raise ValueError(f"factors {factors} must be 0 to {n_sources}, the units of {source}")
    chosen = None
    if expanding.mode == "mean":
        chosen = examples.choose(loaded, seed)
    elif examples.data:
        raise ValueError(f"--data {examples.data!r} goes with --mode mean")
    with output.progress("expand") as progress:
        found = expanding.expand(
            loaded, source, unit, chosen, apart=expanding.apart, progress=progress
        )
    parts = factorize(found, factors, seed) if factors else None
    null = expanding.expand(randomized(loaded, seed), source, unit, chosen)
    if out is not None:
        found.save(out)
    connections = found.connections(unit.index, top)
    title = f"{unit} from {found.source}, {found.mode}"
    output.draw(lambda figures: figures.kernels_figure(connections, "source", title))
    shuffled = sorted(null.norms[0].tolist(), reverse=True)[: len(connections)]
    on = "" if chosen is None else f" on {chosen}"
    output.show(
        _expanded_facts(found, unit, connections, shuffled, parts, top, seed),
        _expanded_tables(found, unit, connections, shuffled, parts, top, seed, on),
    )


def _expanded_facts(
    found: ExpandedWeights, unit: Unit, connections: list[Connection], shuffled: list[float], parts: Factors | None,
    top: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "source": found.source, "target": str(unit), "mode": found.mode, "at": list(found.at),
        "start": list(found.start), "model_hash": found.model_hash, "examples": dict(found.examples),
        "cut": found.cut, "seed": seed,
        "connections": [
            c.to_dict() | {"norm_in_shuffled_weights": norm}
            for c, norm in zip(connections, shuffled, strict=True)
        ],
        "factors": None if parts is None else parts.to_dict(found.sources, top),
    }  # fmt: skip


def _expanded_tables(
    found: ExpandedWeights, unit: Unit, connections: list[Connection], shuffled: list[float], parts: Factors | None,
    top: int, seed: int, on: str,
) -> Iterator[Table]:  # fmt: skip
    more: dict[str, list[float]] = {f"in shuffled weights (seed {seed})": shuffled}
    if found.positive is not None and found.negative is not None:
        order = [found.sources.index(c.source.index) for c in connections]
        more["positive paths"] = [found.positive[0, i].sum().item() for i in order]
        more["negative paths"] = [found.negative[0, i].sum().item() for i in order]
    title = f"{unit} from {found.source} at {found.at}, mode {found.mode}{on}"
    yield connections_table(connections, "source", title, more)
    if not connections:
        silent = f": {unit} was not active at {found.at} in any example (the site before its ReLU has a gradient there)"
        warn(f"all weights are zero{silent if found.mode == 'mean' else ''}")
    if found.cut:
        warn("the border of the map cuts these kernels off")
    if parts is not None:
        yield parts.table(found.sources, top)


def _position(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--at {text!r} is not of the form Y,X, e.g. 14,14") from None
