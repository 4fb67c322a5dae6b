"""`circuits ablate`."""

from __future__ import annotations

from typing import Annotated

import typer

from circuits.cli import options
from circuits.cli.choosing import units_of
from circuits.cli.signatures import command, option
from circuits.experiments import N_RANDOM, ablation

app = typer.Typer()


@command(app)
def ablate(
    model: options.Model,
    units: options.UnitsArgument,
    task: options.LabelledTask,
    output: options.FigureOutput,
    how: Annotated[ablation.Replacement, option(
        "What to replace the units' activations with: zero, their mean over the examples, their activation on "
        "another example (resample) or on the example's counterpart (the corrupted input)."
    )] = "zero",
    random: options.Random = N_RANDOM,
    pool: Annotated[str, option(
        "The units to draw the random groups from, written like the units to ablate. By default units of the same "
        "site that are about equally active."
    )] = "",
    later: Annotated[str, option("A later site: also list its units that change most. By default none.")] = "",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Ablate units and show what changes, compared with random, equally active units."""
    loaded = model.load()
    chosen = units_of(loaded, units)
    asked = task.compile(loaded, seed)
    among = units_of(loaded, pool) if pool else None
    with output.progress("ablate") as progress:
        report = ablation.ablate(
            loaded, chosen, asked, how=how, n_random=random, pool=among, later=later or None, seed=seed,
            progress=progress,
        )  # fmt: skip
    output.draw(lambda figures: figures.ablation_figure(report))
    output.show(report, report.tables())
