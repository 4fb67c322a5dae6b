"""`circuits tune` and `circuits examples`."""

# no `from __future__ import annotations`: typer reads the annotations
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    JsonOption,
    ModelArgument,
    SeedOption,
    UnitArgument,
    WeightsOption,
    WorkspaceOption,
)
from circuits.cli.choosing import stored, units_of
from circuits.cli.output import progress_bar, say, show_json, show_table, warn
from circuits.cli.weights import FigureOption, check_figure
from circuits.examples import Examples
from circuits.workspace import Workspace

app = typer.Typer()

Shape = Literal["curve", "line", "grating"]
UnitsArgument = Annotated[
    str, typer.Argument(help="Units, SITE:1,2,5-9 (a site alone: all of them; several in quotes).")
]


@app.command()
def tune(
    model: ModelArgument,
    units: UnitsArgument,
    shape: Annotated[Shape, typer.Option(help="What is turned.")] = "curve",
    find: Annotated[
        bool,
        typer.Option("--find", help="Which of them are curve detectors, beside shuffled weights."),
    ] = False,
    heat: Annotated[
        bool, typer.Option("--heat-map", help="Orientation x curvature instead of a tuning curve.")
    ] = False,
    aspects: Annotated[
        bool,
        typer.Option("--aspects", help="Contrast, colour, fill, thickness and corners instead."),
    ] = False,
    step: Annotated[
        float | None, typer.Option(help="Degrees from angle to angle (default: 1; 5 with --find).")
    ] = None,
    radius: Annotated[
        list[float] | None, typer.Option(help="A radius to try, in pixels; may be repeated.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the images (default: what a unit sees, and more).")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Of which harvested data standard deviations are taken.")
    ] = "",
    figure: FigureOption = None,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show how units respond as a drawn shape is turned, bent or painted differently."""
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    if find + heat + aspects > 1:
        raise ValueError("--find, --heat-map and --aspects: expected one of them")
    if (find or heat or aspects) and shape != "curve":
        raise ValueError(f"--shape {shape} goes with a plain tuning curve")
    if (find or heat) and radius:
        raise ValueError(f"--radius {radius[0]:g} goes with tuning curves and --aspects")
    if find and data:
        raise ValueError(f"--data {data!r}: --find needs no deviations")
    loaded = load_model(model, weights)
    chosen = units_of(loaded, units)
    if find:
        _find(loaded, chosen, 5.0 if step is None else step, size, seed, figure, json)
        return
    store = stored(Workspace.default(workspace), loaded.hash, chosen[0].site, data)
    if data and store is None:
        raise ValueError(f"data {data!r}: no finished harvest of {chosen[0].site} of {model} on it")
    statistics = None if store is None else [store.statistics(unit) for unit in chosen]
    known = "" if store is None else store.provenance.data
    with progress_bar("tune", quiet=json) as progress:
        if heat:
            _heat_maps(
                loaded,
                chosen,
                10.0 if step is None else step,
                size,
                statistics,
                known,
                progress,
                figure,
                json,
            )
        else:
            _curves(
                loaded, chosen, shape, 1.0 if step is None else step, radius, size, statistics, known, seed,
                progress, figure, json, aspects,
            )  # fmt: skip


def _curves(
    model: Any, units: list[Any], shape: Shape, step: float, radius: list[float] | None, size: int | None,
    statistics: Any, data: str, seed: int, progress: Any, figure: Path | None, json: bool, aspects: bool,
) -> None:  # fmt: skip
    from circuits.figures import invariance_figure, save_figure, tuning_figure
    from circuits.tuning import invariance, joint_tuning, radial_tuning

    found = radial_tuning(
        model, units, shape, step=step, radii=radius, size=size, data=data, seed=seed, progress=progress,
        deviations=None if statistics is None else [s.std for s in statistics],
    )  # fmt: skip
    title = f"{model.name} {model.hash[:16]}, {shape}"
    if aspects:
        changed = invariance(model, found)
        if figure is not None:
            save_figure(invariance_figure(changed, title), figure)
        if json:
            show_json([i.to_dict() for i in changed])
            return
        columns = ("unit", "aspect", "kept", "responses", "at the opposite angle")
        rows = [
            (
                i.unit,
                i.aspect,
                i.kept,
                _listed(i.values, i.responses),
                _listed(i.values, i.opposite),
            )
            for i in changed
        ]
        show_table(columns, rows, title=title)
        return
    if figure is not None:
        save_figure(tuning_figure(found, title), figure)
    if json:
        show_json([t.to_dict() for t in found])
        return
    columns = (
        "unit",
        "peak",
        "in std",
        "at",
        "direction",
        "half-width",
        "echo",
        "circular variance",
        "radius",
    )
    rows = []
    for t in found:
        m = t.measures
        rows.append(
            (t.unit, m.peak.value, _over(m.peak.value, t.deviation), m.preferred.value, _interval(m.direction),
             _interval(m.half_width), _interval(m.echo), _interval(m.circular_variance), t.radius)
        )  # fmt: skip
    show_table(
        columns,
        rows,
        title=f"{title}; 95 % intervals over {found[0].measures.n_replicates} drawings (seed {seed})",
    )
    if not data:
        say("no harvest of this site in the workspace: peaks are not given in standard deviations")
    else:
        say(f"standard deviations are of {data}")
    if len(found) > 1:
        joint = joint_tuning(found)
        _say_together(joint)


def _over(value: float, deviation: float) -> float:
    """In standard deviations; not a number for a unit that never changes."""
    return value / deviation if deviation else float("nan")


def _say_together(joint: Any) -> None:
    say(
        f"together: at every angle one responds with at least {joint.coverage:.2f} of its peak; "
        f"largest gap {joint.largest_gap:.0f}°"
    )


def _listed(values: Any, responses: Any) -> str:
    return ", ".join(f"{v:g}: {r:.3g}" for v, r in zip(values, responses, strict=True))


def _interval(found: Any) -> str:
    return f"{found.value:.3g} ({found.low:.3g}, {found.high:.3g})"


def _heat_maps(
    model: Any, units: list[Any], step: float, size: int | None, statistics: Any, data: str, progress: Any,
    figure: Path | None, json: bool,
) -> None:  # fmt: skip
    from circuits.figures import heat_map_figure, save_figure
    from circuits.tuning import heat_map

    pairs = None if statistics is None else [(s.mean, s.std) for s in statistics]
    found = heat_map(
        model, units, step=step, size=size, statistics=pairs, data=data, progress=progress
    )
    if figure is not None:
        save_figure(heat_map_figure(found, f"{model.name} {model.hash[:16]}"), figure)
    if json:
        show_json([m.to_dict() for m in found])
        return
    rows = []
    for m in found:
        angle, curvature = m.best
        peak = float(m.responses.max())
        rows.append(
            (
                m.unit,
                angle,
                "line" if curvature == 0 else f"{1 / curvature:.1f}",
                peak,
                _over(peak - m.mean, m.deviation),
            )
        )
    show_table(
        ("unit", "angle", "radius", "response", "in std"),
        rows,
        title=f"strongest curve, {model.name}",
    )
    if figure is None:
        say("--figure PATH draws the maps, --json prints them")


def _find(
    model: Any,
    units: list[Any],
    step: float,
    size: int | None,
    seed: int,
    figure: Path | None,
    json: bool,
) -> None:
    from circuits.figures import save_figure, tuning_figure
    from circuits.models.paths.randomizing import randomized
    from circuits.tuning import find_curve_units, joint_tuning

    sites = {unit.site for unit in units}
    if len(sites) != 1:
        raise ValueError(f"units of {len(sites)} sites: --find looks among those of one")
    site, indices = sites.pop(), [unit.index for unit in units]
    with progress_bar("tune", quiet=json) as progress:
        found = find_curve_units(
            model, site, indices, step=step, size=size, seed=seed, progress=progress
        )
    with progress_bar("tune, shuffled weights", quiet=json) as progress:
        beside = find_curve_units(
            randomized(model, seed),
            site,
            indices,
            step=step,
            size=size,
            seed=seed,
            progress=progress,
        )
    good = [c for c in found if c.is_curve_unit]
    by_chance = sum(c.is_curve_unit for c in beside)
    joint = joint_tuning([c.tuning for c in good]) if good else None
    if figure is not None and good:
        save_figure(
            tuning_figure([c.tuning for c in good], f"{model.name}: curve units of {site}"), figure
        )
    elif figure is not None:
        warn("no curve unit was found: nothing to draw")
    if json:
        show_json(
            {
                "site": site, "model_hash": model.hash, "seed": seed, "in_shuffled_weights": by_chance,
                "coverage": None if joint is None else joint.coverage,
                "largest_gap": None if joint is None else joint.largest_gap,
                "units": [c.to_dict() for c in found],
            }
        )  # fmt: skip
        return
    columns = (
        "unit",
        "direction",
        "half-width",
        "echo",
        "circular variance",
        "peak",
        "lines",
        "gratings",
        "radius",
    )
    rows = []
    for c in good:
        m = c.tuning.measures
        rows.append(
            (c.unit, _interval(m.direction), _interval(m.half_width), _interval(m.echo),
             m.circular_variance.value, m.peak.value, c.line_peak, c.grating_peak, c.tuning.radius)
        )  # fmt: skip
    show_table(
        columns,
        rows,
        title=f"{len(good)} curve units among {len(found)} of {site}, {model.name} (seed {seed})",
    )
    why: dict[str, int] = {}
    for c in found:
        if c.why_not:
            why[c.why_not] = why.get(c.why_not, 0) + 1
    say(
        "not: " + ", ".join(f"{n} {reason}" for reason, n in why.items())
        if why
        else "all of them are"
    )
    say(f"with shuffled weights: {by_chance}")
    if joint is not None:
        _say_together(joint)


@app.command()
def examples(
    model: ModelArgument,
    unit: UnitArgument,
    data: Annotated[
        str, typer.Option("--data", help="Which harvested data (default: the newest).")
    ] = "",
    bins: Annotated[int, typer.Option(help="Ranges of activation: 2, 4, 8, 16, 32 or 64.")] = 16,
    each: Annotated[int, typer.Option(help="Examples drawn of each range.")] = 3,
    overlay: Annotated[
        bool,
        typer.Option("--overlay", help="Mark in the figure which pixels excite the unit there."),
    ] = False,
    method: Annotated[str, typer.Option(help="Of the overlay.")] = "gradient_x_input",
    figure: FigureOption = None,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show examples from a unit's whole range of activation, and how often each part of it occurs."""
    from circuits.models.zoo.loading import load_model
    from circuits.store import spectrum

    check_figure(figure)
    if overlay and figure is None:
        raise ValueError("--overlay marks pixels in the figure: give --figure too")
    loaded = load_model(model, weights)
    found_unit = loaded.unit(unit)
    store = stored(Workspace.default(workspace), loaded.hash, found_unit.site, data)
    if store is None:
        on = f" on {data}" if data else ""
        raise FileNotFoundError(
            f"no finished harvest of {found_unit.site} of {model}{on}: run `circuits harvest {model} --data "
            f"{data or 'photos'} --sites {found_unit.site}` first"
        )
    found = spectrum(store, found_unit, bins, each, seed)
    if figure is not None:
        _draw_spectrum(loaded, found, overlay, method, figure)
    texts = _excerpts(loaded, store, found)
    if json:
        whole = found.to_dict()
        for b in whole["bins"]:
            b["examples"] = [
                e | ({"text": texts[e["index"]]} if texts else {}) for e in b["examples"]
            ]
        show_json(whole)
        return
    rows = [
        (f"{b.low:.3g} to {b.high:.3g}", b.density, b.contribution, b.n_examples,
         "\n".join(f"{e.value:.3g}  {texts.get(e.index, e.name)}" for e in b.examples))
        for b in reversed(found.bins) if b.density or b.n_examples
    ]  # fmt: skip
    s = found.statistics
    show_table(
        ("activation", "p(x)", "x p(x)", "examples with their largest here", "some of them"),
        rows,
        title=f"{found_unit} on {found.data}, {s.count} activations (seed {seed})",
    )
    say(
        f"mean {s.mean:.4g}, std {s.std:.4g}, above zero {s.density:.2%}; tail falls by exp(-{s.tail.rate:.3g} x), "
        f"distance {s.tail.distance:.3f}; {found.above_two:.0%} of the positive mean is above two std"
    )


def _excerpts(model: Any, store: Any, found: Any) -> dict[int, str]:
    """The text around the token that excites a unit most, by example; none for images."""
    from circuits.models.adapter.inputs import TokenInput
    from circuits.stimuli.sources import open_source

    spec, known = model.input, store.provenance
    drawn = [e for b in found.bins for e in b.examples]
    if not isinstance(spec, TokenInput) or not drawn:
        return {}
    try:
        source = open_source(known.data)
    except (OSError, ValueError, KeyError, ImportError) as error:
        warn(f"texts cannot be shown: {error}")
        return {}
    if source.hash != known.data_hash:
        warn(f"texts cannot be shown: data {known.data} is not what was harvested")
        return {}
    texts = Examples(model, source, None, among=[e.index for e in drawn])
    at = [e.position[0] if e.position else len(texts.tokens(i)) - 1 for i, e in enumerate(drawn)]
    return {e.index: spec.excerpt(texts.tokens(i), at[i]) for i, e in enumerate(drawn)}


def _draw_spectrum(model: Any, found: Any, overlay: bool, method: str, figure: Path) -> None:
    import numpy as np
    from PIL import Image

    from circuits.figures import save_figure, spectrum_figure
    from circuits.figures.tunings import overlaid
    from circuits.models.adapter.inputs import ImageInput
    from circuits.models.paths.receptive import receptive_field
    from circuits.saliency import saliency_map
    from circuits.tasks.targets import Target

    crops: dict[int, list[Any]] = {}
    drawn = [e.index for b in found.bins for e in b.examples]
    if isinstance(model.input, ImageInput) and drawn:
        inputs = Examples(model, found.data, None, among=drawn)
        field = receptive_field(model, model.site(found.unit.site))
        for number, b in enumerate(found.bins):
            for e in b.examples:
                top, left, bottom, right = field.at(e.position)
                one = inputs.subset([drawn.index(e.index)])
                image = one.load(0)
                picture = image.expand(3, -1, -1).movedim(0, -1).numpy()
                if overlay:
                    target = Target(found.unit.site, found.unit.index, e.position or None)
                    made = saliency_map(model, one, target, method)  # type: ignore[arg-type]
                    picture = overlaid(picture, made.heat()[0].numpy())
                cut = (picture[top:bottom, left:right] * 255).round().astype(np.uint8)
                crops.setdefault(number, []).append(Image.fromarray(cut))
    elif overlay and not isinstance(model.input, ImageInput):
        warn("--overlay: only images have pixels to mark")
    save_figure(spectrum_figure(found, crops), figure)
