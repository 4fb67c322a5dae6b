"""`circuits tune` and `circuits examples`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float
from PIL import Image
from typer import Typer

from circuits import tuning
from circuits.cli import options
from circuits.cli.choosing import units_of
from circuits.cli.output import warn
from circuits.cli.signatures import Within, command, option
from circuits.examples import Examples
from circuits.factories import from_file
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.paths.randomizing import randomized
from circuits.models.paths.receptive import receptive_field
from circuits.saliency import saliency_map
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, spectrum
from circuits.store.reading import newest_store
from circuits.store.spectra import Example, Spectrum
from circuits.tasks.targets import Target
from circuits.tuning.radial import Shape
from circuits.tuning.tables import (
    curve_units_table,
    heat_maps_table,
    invariances_table,
    together,
    tuning_table,
)
from circuits.units import Unit

app = Typer()


@dataclass(frozen=True)
class Drawing:
    """What is drawn."""

    shape: Annotated[Shape, option("The shape to rotate, for a plain tuning curve.")] = "curve"
    step: Annotated[float | None, option(
        "Degrees from one angle to the next. By default 1; 5 with --find, and 10 with --heat-map.",
        check=Within(0.01, 90),
    )] = None  # fmt: skip
    radius: Annotated[list[float] | None, option(
        "A radius to draw, in pixels; may be repeated. By default several, of which each unit's best is taken.",
        check=Within(0.1, 1e6),
    )] = None  # fmt: skip
    size: Annotated[int | None, option(
        "The side length of the images in pixels. By default a little more than a unit's receptive field.",
        check=Within(8, 1024),
    )] = None  # fmt: skip

    def degrees(self, usual: float) -> float:
        """The step from angle to angle."""
        return usual if self.step is None else self.step


@command(app)
def tune(
    model: options.Model,
    units: options.UnitsArgument,
    drawing: Drawing,
    output: options.FigureOutput,
    find: Annotated[bool, option(
        "Instead find which of the units are curve detectors, compared with a model of shuffled weights.", "--find"
    )] = False,
    heat: Annotated[bool, option("Instead show responses by orientation and curvature.", "--heat-map")] = False,
    aspects: Annotated[bool, option(
        "Instead change contrast, colour, fill, thickness and corners of each unit's best curve.", "--aspects"
    )] = False,
    data: options.HarvestedData = "",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show tuning curves: how units respond as a drawn shape is rotated, bent or restyled."""
    radius = drawing.radius
    if find + heat + aspects > 1:
        raise ValueError("--find, --heat-map and --aspects: expected one of them")
    if (find or heat or aspects) and drawing.shape != "curve":
        raise ValueError(f"--shape {drawing.shape} goes with a plain tuning curve")
    if (find or heat) and radius:
        raise ValueError(f"--radius {radius[0]:g} goes with tuning curves and --aspects")
    if find and data:
        raise ValueError(f"--data {data!r}: --find needs no deviations")
    loaded = model.load()
    chosen = units_of(loaded, units)
    if find:
        _find(loaded, chosen, drawing, seed, output)
        return
    store = newest_store(model.place.store_folders(loaded.hash), loaded.hash, chosen[0].site, data)
    if data and store is None:
        raise ValueError(
            f"data {data!r}: no finished harvest of {chosen[0].site} of {model.spec} on it"
        )
    if heat:
        _heat_maps(loaded, chosen, drawing, store, output)
    else:
        _curves(loaded, chosen, drawing, store, seed, output, aspects)


def _curves(
    model: HookedModel, units: list[Unit], drawing: Drawing, store: ActivationStore | None, seed: int,
    output: options.FigureOutput, aspects: bool,
) -> None:  # fmt: skip
    deviations = None if store is None else [store.statistics(unit).std for unit in units]
    with output.progress("tune") as progress:
        found = tuning.radial_tuning(
            model, units, drawing.shape, step=drawing.degrees(1.0), radii=drawing.radius, size=drawing.size,
            deviations=deviations, data="" if store is None else store.provenance.data, seed=seed, progress=progress,
        )  # fmt: skip
    title = f"{model.name} {model.hash[:16]}, {drawing.shape}"
    if aspects:
        changed = tuning.invariance(model, found)
        output.draw(lambda figures: figures.invariance_figure(changed, title))
        output.show(changed, [invariances_table(changed, title)])
        return
    output.draw(lambda figures: figures.tuning_figure(found, title))
    joint = [together(tuning.joint_tuning(found))] if len(found) > 1 else []
    output.show(found, [tuning_table(found, title), *joint])


def _heat_maps(
    model: HookedModel, units: list[Unit], drawing: Drawing, store: ActivationStore | None,
    output: options.FigureOutput,
) -> None:  # fmt: skip
    each = None if store is None else [store.statistics(unit) for unit in units]
    with output.progress("tune") as progress:
        found = tuning.heat_map(
            model, units, step=drawing.degrees(10.0), size=drawing.size,
            statistics=None if each is None else [(s.mean, s.std) for s in each],
            data="" if store is None else store.provenance.data, progress=progress,
        )  # fmt: skip
    title = f"{model.name} {model.hash[:16]}"
    output.draw(lambda figures: figures.heat_map_figure(found, title))
    hint = [] if output.figure else ["--figure PATH draws the maps, --json prints them"]
    output.show(found, [heat_maps_table(found, f"strongest curve, {model.name}"), *hint])


def _find(
    model: HookedModel, units: list[Unit], drawing: Drawing, seed: int, output: options.FigureOutput
) -> None:
    sites = {unit.site for unit in units}
    if len(sites) != 1:
        raise ValueError(f"units of {len(sites)} sites: --find looks among those of one")
    site, indices = sites.pop(), [unit.index for unit in units]

    def look(what: str, some: HookedModel) -> list[tuning.CurveUnit]:
        with output.progress(what) as progress:
            return tuning.find_curve_units(
                some, site, indices, step=drawing.degrees(5.0), size=drawing.size, seed=seed, progress=progress
            )  # fmt: skip

    found = look("tune", model)
    shuffled = look("tune, shuffled weights", randomized(model, seed))
    by_chance = sum(c.is_curve_unit for c in shuffled)
    good = [c.tuning for c in found if c.is_curve_unit]
    joint = tuning.joint_tuning(good) if good else None
    if good:
        title = f"{model.name}: curve units of {site}"
        output.draw(lambda figures: figures.tuning_figure(good, title))
    elif output.figure is not None:
        warn("no curve unit was found: nothing to draw")
    facts = {
        "site": site, "model_hash": model.hash, "seed": seed, "in_shuffled_weights": by_chance,
        "coverage": None if joint is None else joint.coverage,
        "largest_gap": None if joint is None else joint.largest_gap,
        "units": [c.to_dict() for c in found],
    }  # fmt: skip
    table = curve_units_table(found, f"of {site}, {model.name} (seed {seed})")
    joined = [] if joint is None else [together(joint)]
    output.show(facts, [table, f"with shuffled weights: {by_chance}", *joined])


# --- examples --------------------------------------------------------------------------------------


@command(app)
def examples(
    model: options.Model,
    unit: options.UnitArgument,
    output: options.FigureOutput,
    data: options.HarvestedData = "",
    bins: Annotated[int, option(
        "Into how many ranges activations are divided: 2, 4, 8, 16, 32 or 64.",
        check=Within(2, 64),
    )] = 16,
    each: Annotated[int, option("How many examples to draw at random from each range.", check=Within(0))] = 3,
    overlay: Annotated[bool, option(
        "With --figure: mark which pixels excite the unit where it is most active.", "--overlay"
    )] = False,
    method: Annotated[str, option(
        "With --overlay: the method that finds these pixels, one of those of `circuits saliency`."
    )] = "gradient_x_input",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show dataset examples across a unit's activation range, and how common each part is."""
    if overlay and output.figure is None:
        raise ValueError("--overlay marks pixels in the figure: give --figure too")
    loaded = model.load()
    wanted = loaded.unit(unit)
    store = newest_store(model.place.store_folders(loaded.hash), loaded.hash, wanted.site, data)
    if store is None:
        on = f" on {data}" if data else ""
        raise FileNotFoundError(
            f"no finished harvest of {wanted.site} of {model.spec}{on}: run `circuits harvest {model.spec} --data "
            f"{data or 'photos'} --sites {wanted.site}` first"
        )
    found = spectrum(store, wanted, bins, each, seed)
    if output.figure is not None:
        crops = _crops(loaded, found, method if overlay else "")
        output.draw(lambda figures: figures.spectrum_figure(found, crops))
    texts = _excerpts(loaded, store, found)
    facts = found.to_dict()
    for example in (e for b in facts["bins"] for e in b["examples"] if texts):
        example["text"] = texts[example["index"]]
    output.show(facts, found.tables(texts))


def _drawn(found: Spectrum) -> list[Example]:
    return [e for b in found.bins for e in b.examples]


def _excerpts(model: HookedModel, store: ActivationStore, found: Spectrum) -> dict[int, str]:
    """The text around the token that excites a unit most, by example; none for images."""
    spec, known, drawn = model.input, store.provenance, _drawn(found)
    if not isinstance(spec, TokenInput) or not drawn:
        return {}
    try:
        where = f"store {str(store.folder)!r}"
        source = open_source(
            from_file("data", known.data, where, "look at it with `circuits examples`")
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        warn(f"texts cannot be shown: {error}")
        return {}
    if source.hash != known.data_hash:
        warn(f"texts cannot be shown: data {known.data} is not what was harvested")
        return {}
    texts = Examples(model, source, None, among=[e.index for e in drawn])
    at = [e.position[0] if e.position else len(texts.tokens(i)) - 1 for i, e in enumerate(drawn)]
    return {e.index: spec.excerpt(texts.tokens(i), at[i]) for i, e in enumerate(drawn)}


def _crops(model: HookedModel, found: Spectrum, method: str) -> dict[int, list[Image.Image]]:
    """What the unit sees of each example where it is most active, by range; with `method`, pixels are marked."""
    if not isinstance(model.input, ImageInput):
        if method:
            warn("--overlay: only images have pixels to mark")
        return {}
    crops: dict[int, list[Image.Image]] = {}
    drawn = [e.index for e in _drawn(found)]
    inputs = Examples(model, found.data, None, among=drawn)
    field = receptive_field(model, model.site(found.unit.site))
    for number, b in enumerate(found.bins):
        for e in b.examples:
            top, left, bottom, right = field.at(e.position)
            one = inputs.subset([drawn.index(e.index)])
            picture = _picture(model, found.unit, one, e, method)
            cut = (picture[top:bottom, left:right] * 255).round().astype(np.uint8)
            crops.setdefault(number, []).append(Image.fromarray(cut))
    return crops


def _picture(
    model: HookedModel, unit: Unit, one: Examples, example: Example, method: str
) -> Float[np.ndarray, "h w 3"]:
    from circuits.figures.tunings import (
        overlaid,  # altair is loaded only when something is drawn
    )

    picture = one.load(0).expand(3, -1, -1).movedim(0, -1).numpy()
    if not method:
        return picture
    target = Target(unit.site, unit.index, example.position or None)
    made = saliency_map(model, one, target, method)  # type: ignore[arg-type]
    return overlaid(picture, made.heat()[0].numpy())
