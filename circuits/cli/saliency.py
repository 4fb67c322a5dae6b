"""`circuits saliency` and `sanity`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from circuits import saliency as methods
from circuits.attribution.results import Attribution
from circuits.cli import options
from circuits.cli.choosing import name_values, units_of
from circuits.cli.output import warn
from circuits.cli.signatures import Within, command, option
from circuits.examples import Examples
from circuits.files import write_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.saliency.cards import cards_table
from circuits.saliency.maps import METHODS, Method, check_options
from circuits.saliency.perturbations import MASKS, Game, Perturbation
from circuits.tables import Table
from circuits.tasks import targets

app = typer.Typer()

SANITY = ("gradient", "grad_cam", "guided_backprop", "guided_grad_cam")
"""Methods that get a card when nobody names any."""


@dataclass(frozen=True)
class Settings:
    """How pixels are credited."""

    site: Annotated[str, option(
        "The site at which class activation maps (…cam…) are taken. By default the last one with a map."
    )] = ""  # fmt: skip
    area: Annotated[
        float,
        option(
            "With --method extremal: the area of the mask, as a share of the image.",
            check=Within(0.001, 0.999),
        ),
    ] = 0.1
    variant: Annotated[Game, option(
        "With --method extremal or meaningful: whether the mask marks what preserves the target's value, or what "
        "deletes it when hidden."
    )] = "preserve"  # fmt: skip
    method_options: options.MethodOptions = None
    batch: options.Batch = 32
    seed: options.Seed = 0

    @property
    def shared(self) -> dict[str, Any]:
        """What every method takes."""
        return {"seed": self.seed, "batch": self.batch, "size": "keep"}


@command(app)
def saliency(
    model: options.Model,
    settings: Settings,
    examples: options.Images,
    output: options.FigureOutput,
    method: Annotated[list[str] | None, option(
        "A method, of those listed above; may be repeated to compare them. By default integrated_gradients."
    )] = None,
    target: options.Target = "top",
    against: options.Subtracted = "",
    quantity: options.Quantity = "activation",
    out: Annotated[Path | None, option(
        "Save the values of one method to this .safetensors file, and what they are in a .json file next to it."
    )] = None,
) -> None:  # fmt: skip
    """Show which pixels are responsible for a decision or for a unit's activation.

    Methods are gradient, gradient_x_input, smoothgrad, vargrad, smoothgrad_squared, guided_backprop,
    integrated_gradients, relevance, occlusion, rise, grad_cam, grad_cam_plus_plus, smooth_grad_cam_plus_plus,
    guided_grad_cam, lime, kernel_shap; and the masks extremal and meaningful.
    """
    options.check_out(out, ".safetensors")
    given = name_values(settings.method_options)
    wanted = _methods(method or ["integrated_gradients"], given, [*METHODS, *MASKS])
    if out is not None and (len(wanted) > 1 or wanted[0] in MASKS):
        raise ValueError(f"--out {str(out)!r} saves one method that is no mask")
    if settings.site and not any("cam" in name for name in wanted):
        raise ValueError(
            f"--site {settings.site!r}: only class activation maps are taken at a site"
        )
    loaded = model.load()
    if "through" in given:
        given["through"] = units_of(loaded, str(given["through"]))
    goal = targets.parse_target(loaded, target, against, quantity)
    chosen = examples.choose(loaded, settings.seed)
    maps: dict[str, Map] = {}
    for name in wanted:
        with output.progress(name) as progress:
            maps[name] = _map(loaded, chosen, goal, name, settings, given, progress)
        if out is not None:
            maps[name].found.save(out)
    _show(loaded, chosen, goal, maps, settings, output, hint=out is None)


def _methods(names: Sequence[str], given: dict[str, Any], known: Sequence[str]) -> list[Any]:
    """The methods that are named, once each; ValueError or TypeError if one does not exist or lacks an option."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in known:
            raise ValueError(f"method {name!r} is not one of {', '.join(known)}")
        if given:
            check_options(name, given)
    return wanted


def _method(name: str) -> Method:
    return next(m for m in get_args(Method) if m == name)


@dataclass(frozen=True)
class Map:
    """What one method found on the examples, with what it was told."""

    found: Any
    heat: Any
    facts: dict[str, Any]


def _map(
    model: HookedModel, chosen: Examples, goal: targets.Target, name: str, settings: Settings, given: dict[str, Any],
    progress: Progress,
) -> Map:  # fmt: skip
    shared: dict[str, Any] = given | settings.shared | {"progress": progress}
    if name in MASKS:
        more = {"variant": settings.variant} | (
            {"area": settings.area} if name == "extremal" else {}
        )
        mask: Perturbation = MASKS[name](model, chosen, goal, **more, **shared)
        each = [(mask.target, float(value)) for value in mask.intact]
        return Map(mask, mask.masks[:, 0], _facts(name, more | given, mask, each, chosen))
    at: dict[str, Any] = {"site": settings.site} if settings.site and "cam" in name else {}
    made = methods.saliency_map(model, chosen, goal, _method(name), **at, **shared)
    each = [
        (targets.named(model, aim), float(v))
        for aim, v in zip(made.aims, made.target_values, strict=True)
    ]
    return Map(made, made.heat("signed"), _facts(name, dict(made.settings), made, each, chosen))


def _facts(
    name: str, settings: dict[str, Any], found: Attribution | Perturbation, each: list[tuple[str, float]],
    chosen: Examples,
) -> dict[str, Any]:  # fmt: skip
    examples = [
        {"name": n, "target": target, "value": value, "found": found.facts(i)}
        for i, (n, (target, value)) in enumerate(zip(chosen.names, each, strict=True))
    ]
    return {"method": name, "settings": settings, "examples": examples}


def _show(
    model: HookedModel, chosen: Examples, goal: targets.Target, maps: dict[str, Map], settings: Settings,
    output: options.FigureOutput, hint: bool,
) -> None:  # fmt: skip
    heats, all_facts = {n: m.heat for n, m in maps.items()}, [m.facts for m in maps.values()]
    names, table = methods.agreement(heats)
    if output.figure is not None:
        images = chosen.images()
        if images is None:
            raise ValueError(
                f"--figure: model {model.name} takes images of neither 1 nor 3 channels"
            )
        title = f"{model.name}, {goal}; {chosen}"
        output.draw(lambda figures: figures.saliency_figure(images, heats, chosen.names, title))

    def tables() -> Iterator[Table | str]:
        for facts in all_facts:
            rows = [
                (e["name"], e["target"], e["value"], *e["found"].values())
                for e in facts["examples"]
            ]
            columns = ("image", "target", "value", *facts["examples"][0]["found"])
            yield Table(columns, rows, f"{facts['method']} {facts['settings']}, {chosen}")
        if len(names) > 1:
            rows = [(n, *row) for n, row in zip(names, table.tolist(), strict=True)]
            yield Table(("rank correlation", *names), rows)
        if hint and output.figure is None:
            yield "--figure PATH draws the maps, --out PATH saves them"

    facts = {
        "model_hash": model.hash, "examples": chosen.describe(), "seed": settings.seed, "target": str(goal),
        "names": list(chosen.names), "methods": all_facts,
        "agreement": {"methods": names, "rank_correlation": table.tolist()},
    }  # fmt: skip
    output.show(facts, tables())


@command(app)
def sanity(
    model: options.Model,
    examples: options.Dataset,
    output: options.FigureOutput,
    method: Annotated[list[str] | None, option(
        f"A method of `circuits saliency`; may be repeated. By default {', '.join(SANITY)}."
    )] = None,
    target: options.Target = "top",
    method_options: options.MethodOptions = None,
    stages: Annotated[int | None, option(
        "In how many steps the layers' weights are shuffled; an even number. By default 6, or fewer if the model has "
        "fewer layers.", check=Within(2, 1000)
    )] = None,
    faithful: Annotated[int, option("On how many images faithfulness is measured.", check=Within(1))] = 8,
    out: Annotated[Path | None, option("Save the cards to this .json file.")] = None,
    batch: options.Batch = 32,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Test whether saliency methods depend on what the model learned: a card for each."""
    options.check_out(out, ".json")
    given = name_values(method_options)
    wanted = _methods(method or SANITY, given, METHODS)
    if faithful < 1:
        raise ValueError(f"faithful {faithful} must be at least 1")
    loaded = model.load()
    chosen = examples.choose(loaded, seed)
    cards = []
    for name in wanted:
        with output.progress(name) as progress:
            made = methods.card(
                loaded, chosen, _method(name), target, stages=stages, faithful=faithful, seed=seed, batch=batch,
                progress=progress, **given,
            )  # fmt: skip
        cards.append(made)
    if out is not None:
        write_json(out, [c.to_dict() for c in cards])
    title = f"{loaded.name} {loaded.hash[:16]}, {chosen}"
    output.draw(lambda figures: figures.sanity_figure(cards, title))
    output.show(
        cards, [cards_table(cards, f"{loaded.name} on {chosen}; target {target}, seed {seed}")]
    )
    if len(chosen) < 30 and not output.json:
        warn(f"{len(chosen)} images: verdicts are steadier on thirty or more")
