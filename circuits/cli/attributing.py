"""`circuits attribute`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from circuits import attribution
from circuits.attribution import ChannelGroups, Passes, channel_groups, direct_logit_attribution
from circuits.attribution.channels import Baseline, ChannelMethod
from circuits.attribution.edges import attribution_block
from circuits.attribution.propagation import RelevanceRule
from circuits.attribution.results import Attribution
from circuits.cli import options
from circuits.cli.signatures import Within, argument, command, option
from circuits.examples import Examples
from circuits.graph.store import GraphStore, add_edges
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table
from circuits.tasks import targets
from circuits.units import Unit
from circuits.workspace import Workspace

app = typer.Typer()

SHOWN = 8
"""Examples that have a table each; JSON has all."""


@dataclass(frozen=True)
class Settings:
    """How units are credited."""

    method: Annotated[ChannelMethod, option(
        "The attribution method: activation x gradient, integrated gradients, ablation of one unit at a time, or "
        "relevance (layer-wise relevance propagation)."
    )] = "activation_x_gradient"  # fmt: skip
    rule: Annotated[RelevanceRule, option(
        "With --method relevance: the rule by which relevance is passed back through a layer."
    )] = "epsilon"  # fmt: skip
    baseline: Annotated[Baseline, option(
        "With --method integrated_gradients or ablation: the activations to compare with, zero or each unit's mean "
        "over the examples."
    )] = "zero"  # fmt: skip
    steps: Annotated[int, option(
        "With --method integrated_gradients: the number of steps from the baseline to the activations.",
        check=Within(1, 10_000),
    )] = 50  # fmt: skip
    check: Annotated[int, option(
        "How many units to ablate on each of the first four examples, to check how well attributions correlate with "
        "the effects of ablation; 0 skips this check.", check=Within(0)
    )] = 16  # fmt: skip
    batch: options.Batch = 32


@command(app)
def attribute(
    model: options.Model,
    settings: Settings,
    examples: options.Inputs,
    output: options.FigureOutput,
    site: Annotated[str, argument("The site whose units get the attributions; not needed with --direct.")] = "",
    target: options.Target = "top",
    against: options.Subtracted = "",
    quantity: options.Quantity = "activation",
    groups: Annotated[int, option(
        "Also factorise the activations into this many groups of units, and attribute to these; 0 turns this off.",
        check=Within(0),
    )] = 0,
    direct: Annotated[bool, option(
        "Instead, split a transformer's logit into what each head and MLP adds to it (direct logit attribution).",
        "--direct",
    )] = False,
    top: options.Top = options.TOP,
    save: Annotated[str, option("Store the mean attributions as edges of the model's graph, under this name.")] = "",
    out: Annotated[Path | None, option(
        "Save all attributions to this .safetensors file, and a description of them to a .json file next to it."
    )] = None,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show which units of a site are responsible for a decision or for another unit's activation."""
    _check(
        site, direct, {"--figure": output.figure, "--out": out, "--save": save, "--groups": groups}
    )
    options.check_out(out, ".safetensors")
    loaded = model.load()
    goal = targets.parse_target(loaded, target, against, quantity)
    if not direct:
        loaded.site(site)
    if save:
        _check_edges(model.place, loaded, goal, site, save)
    chosen = examples.choose(loaded, seed)
    if direct:
        _direct(loaded, chosen, goal, top, output)
        return
    with output.progress("attribute") as progress:
        made = attribution.attribute(
            loaded, chosen, goal, site, settings.method, baseline=settings.baseline, steps=settings.steps,
            rule=settings.rule, check=settings.check, seed=seed, batch=settings.batch, size="keep", progress=progress,
        )  # fmt: skip
    split = None
    if groups:
        split = channel_groups(
            Passes(loaded, chosen, goal, site, settings.batch, "keep"), groups, seed
        )
    if save:
        add_edges(model.place.model_folder(loaded.hash), save, [attribution_block(made)])
    if out is not None:
        made.save(out)
    output.draw(lambda figures: figures.attribution_figure(made, chosen.images()))
    _show(made, chosen, split, top, output)


def _check(site: str, direct: bool, given: dict[str, object]) -> None:
    """Raise ValueError if options do not go together."""
    if not direct and not site:
        raise ValueError("site '' is missing: name the site whose units are to be credited")
    for name, value in given.items():
        if direct and value:
            raise ValueError(f"{name} {str(value)!r} does not go with --direct")
    if int(str(given["--groups"])) < 0:
        raise ValueError(f"groups {given['--groups']} must be 0 or more")


def _show(
    made: Attribution,
    chosen: Examples,
    split: ChannelGroups | None,
    top: int,
    output: options.Output,
) -> None:
    by_example = [
        {"name": name, "units": [{"unit": f"{made.site}:{u}", "value": v} for u, v in made.top(i, top)]}
        for i, name in enumerate(chosen.names)
    ]  # fmt: skip
    by_group = None
    if split is not None:
        by_group = [{"name": n} | g for n, g in zip(chosen.names, split.to_dict(), strict=True)]
    facts = made.to_dict() | {"by_example": by_example, "groups": by_group}
    output.show(facts, _tables(made, chosen, split, top))


def _tables(
    made: Attribution, chosen: Examples, split: ChannelGroups | None, top: int
) -> Iterator[Table | str]:
    yield f"{made.method} at {made.site} of {made.model} on {chosen}"
    for i, name in enumerate(chosen.names[:SHOWN]):
        yield made.table(i, name, top)
    yield from _more(chosen)
    if (check := made.check) is not None:
        yield (
            f"rank correlation with ablation ({check.n_units} units, {len(check.by_example)} examples): "
            f"{check.correlation:.2f} (by chance up to {check.chance:.2f}, seed {made.seed})"
        )
    yield from made.problems()
    if split is not None:
        yield from (split.table(i, name) for i, name in enumerate(chosen.names[:SHOWN]))


def _more(chosen: Examples) -> Iterator[str]:
    if len(chosen) > SHOWN:
        yield f"and {len(chosen) - SHOWN} more examples: --json has all"


def _direct(
    model: HookedModel, chosen: Examples, goal: targets.Target, top: int, output: options.Output
) -> None:
    found = direct_logit_attribution(model, chosen, goal)
    facts = found.to_dict()
    for name, example in zip(chosen.names, facts["by_example"], strict=True):
        example["name"] = name

    def tables() -> Iterator[Table | str]:
        yield f"direct logit attribution on {chosen}"
        yield from (found.table(i, name, top) for i, name in enumerate(chosen.names[:SHOWN]))
        yield from _more(chosen)

    output.show(facts, tables())


def _check_edges(
    place: Workspace, model: HookedModel, goal: targets.Target, site: str, name: str
) -> None:
    """Raise before anything is computed if edges could not be stored."""
    if goal.against is not None or goal.quantity != "activation" or goal.index is None:
        raise ValueError(
            f"--save {name!r}: edges lead to one unit's activation or logit, not to {goal}"
        )
    with GraphStore(place.writable().model_folder(model.hash)) as store:
        for end in (Unit(model.site(site).name, 0), Unit(goal.site, 0)):
            store.check(end)
