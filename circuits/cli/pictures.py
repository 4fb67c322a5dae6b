"""`circuits visualize`: pictures of units, sheets of sites."""

# no `from __future__ import annotations`: typer reads the annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    JsonOption,
    ModelArgument,
    SeedOption,
    WeightsOption,
    WorkspaceOption,
    record_of,
)
from circuits.cli.output import progress_bar, say, show_json, show_table
from circuits.examples import Examples
from circuits.workspace import Workspace

app = typer.Typer()

Kind = Literal["channel", "neuron", "cosine", "deepdream", "logit"]
Param = Literal["fourier", "pixel", "laplacian", "cppn", "maco"]

NATURAL_IMAGES, BADGE_IMAGES = 512, 200
"""Images that colours and spectrum are fitted to, and that a badge compares with, at most."""


@app.command()
def visualize(
    model: ModelArgument,
    target: Annotated[
        str,
        typer.Argument(
            help="A unit SITE:INDEX, a direction like mixed3b:379+0.5*mixed3b:385, a site, or a class."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The PNG or WebP (a folder for a sheet; default: workspace)."),
    ] = None,
    objective: Annotated[
        Kind | None,
        typer.Option(help="What to make large (default: channel; deepdream for a site)."),
    ] = None,
    param: Annotated[Param, typer.Option(help="How images are parameterized.")] = "fourier",
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            help="Data whose colours (for maco, spectrum) to use and to compare a badge with (photos).",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of optimisation.")] = 256,
    size: Annotated[
        int | None, typer.Option(help="Pixels along each side (default: the model's).")
    ] = None,
    seed: SeedOption = 0,
    seeds: Annotated[int, typer.Option(help="Pictures from so many seeds.")] = 1,
    negative: Annotated[
        bool, typer.Option("--negative", help="What the unit is least active on.")
    ] = False,
    diverse: Annotated[int, typer.Option(help="So many pictures unlike each other.")] = 1,
    alpha: Annotated[bool, typer.Option("--alpha", help="Optimise transparency too.")] = False,
    badge: Annotated[
        bool, typer.Option("--badge", help="Measure how far the picture can be trusted.")
    ] = False,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="All units of a site, as tiles and one atlas; resumes.")
    ] = False,
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Make the image that excites a unit most or, for a language model, the embeddings that do."""
    from circuits.featurevis.pictures import check_suffix
    from circuits.featurevis.render import Settings
    from circuits.files import check_writable
    from circuits.models.adapter.inputs import TokenInput
    from circuits.models.zoo.loading import load_model

    place = Workspace.default(workspace)
    if out is not None and not sheet:
        check_suffix(out)
    check_writable(out.parent if out else place.root, "folder")
    if not 1 <= seeds <= 64:
        raise ValueError(f"seeds {seeds} must be from 1 to 64")
    loaded = load_model(model, weights)
    record = record_of(model, weights, loaded.hash)
    if isinstance(loaded.input, TokenInput):
        given = {
            "--out": out, "--sheet": sheet, "--badge": badge, "--negative": negative, "--alpha": alpha,
            "--images": images, "--size": size, "--objective": objective, "--diverse": diverse > 1,
            "--seeds": seeds > 1, "--param": param != "fourier",
        }  # fmt: skip
        _leave_out(given, f"model {model} takes tokens: {{}} is for pictures")
        _dream(loaded, target, steps, seed, json)
        return
    # what can be wrong is said before anything is made
    Settings(steps=steps, size=size, seed=seed, alpha=alpha).shape(loaded.input)
    if sheet:
        given = {
            "--badge": badge, "--objective": objective, "--diverse": diverse > 1, "--seeds": seeds > 1
        }  # fmt: skip
        _leave_out(given, "a sheet has a picture a unit: {} is for single units")
    wanted = _Wanted(seeds, negative, diverse, badge, images or "photos")
    chosen = loaded.site(target) if sheet else _objective(loaded, target, objective)
    natural = _natural(place, loaded, images or "photos") if images or param == "maco" else None
    settings = Settings(
        steps=steps, size=size, seed=seed, param=param, alpha=alpha, natural=natural
    )
    if sheet:
        _sheet(place, loaded, target, settings, negative, out, json)
        if out is None:
            place.register(record, replace=False)
        return
    _pictures(
        place, loaded, chosen, target, settings, wanted, out, json,
    )  # fmt: skip
    if out is None:
        place.register(record, replace=False)


def _leave_out(given: dict[str, Any], why: str) -> None:
    """Raise ValueError if an option was given that does nothing here."""
    for name, value in given.items():
        if value:
            raise ValueError(f"{why.format(name)}, leave it out")


class _Wanted:
    """What pictures of a target to make."""

    def __init__(self, seeds: int, negative: bool, diverse: int, badge: bool, images: str) -> None:
        if badge and (negative or diverse > 1):
            raise ValueError(
                "a badge is for a unit's own picture: leave out --negative and --diverse"
            )
        self.seeds, self.negative, self.diverse = seeds, negative, diverse
        self.badge, self.images = badge, images


def _natural(place: Workspace, model: Any, spec: str) -> Any:
    """The statistics of a dataset's images as the model takes them, from the workspace if they are there."""
    from circuits.featurevis.natural import NaturalImages

    images, size = Examples(model, spec, NATURAL_IMAGES), model.input
    path = place.natural_path(images.source.hash, (size.channels, size.height, size.width))
    found = (images.load(i) for i in range(len(images)))
    return NaturalImages.kept(path, found, images.data, images.source.hash)


def _objective(model: Any, target: str, kind: Kind | None) -> Any:
    """What is to be visualized; units stay units."""
    from circuits.featurevis import objectives

    if kind is None or kind == "channel":
        objectives.as_objective(model, target)
        return target
    if kind == "neuron":
        return objectives.neuron(model, target)
    if kind == "cosine":
        return objectives.direction(model, target, cosine_power=1.0)
    if kind == "deepdream":
        return objectives.deepdream(model, target)
    return objectives.logit(model, int(target) if target.isdigit() else target)


def _dream(model: Any, target: str, steps: int, seed: int, json: bool) -> None:
    from circuits.featurevis.embeddings import dream

    with progress_bar(f"visualize {target}", quiet=json) as progress:
        found = dream(model, target, steps=steps, seed=seed, progress=progress)
    words = [model.input.word(token) for token in found.tokens]
    if json:
        show_json(
            {
                "objective": found.objective, "activation": found.activation,
                "start_activation": found.start, "activation_of_tokens": found.of_tokens,
                "tokens": found.tokens, "words": words, "cosines": found.cosines,
                "model_hash": found.model_hash, "steps": found.steps, "seed": found.seed,
            }
        )  # fmt: skip
        return
    rows = [(i, w, c) for i, (w, c) in enumerate(zip(words, found.cosines, strict=True))]
    show_table(("position", "nearest token", "cosine"), [(i, repr(w), c) for i, w, c in rows])
    say(
        f"{found.objective}: {found.activation:.4g} on embeddings, {found.of_tokens:.4g} on the nearest "
        f"tokens, {found.start:.4g} on random ones ({found.steps} steps, seed {found.seed})"
    )


def _sheet(
    place: Workspace,
    model: Any,
    site: str,
    settings: Any,
    negative: bool,
    out: Path | None,
    json: bool,
) -> None:
    from circuits.featurevis.sheets import render_sheet, sheet_name

    name = sheet_name(model, site, negative, **settings.options())
    folder = out or place.sheets_folder(model.hash) / name
    with progress_bar(f"sheet of {site}", quiet=json) as progress:
        made = render_sheet(
            model, site, folder, negative=negative, progress=progress, **settings.options()
        )
    assert made is not None, "the bar never stops the work"
    if json:
        show_json({"out": str(made.folder), "atlas": str(made.atlas), "units": list(made.facts)})
        return
    say(f"{made.site}: {len(made.facts)} units -> {made.atlas}")


def _pictures(
    place: Workspace,
    model: Any,
    target: Any,
    name: str,
    settings: Any,
    wanted: _Wanted,
    out: Path | None,
    json: bool,
) -> None:
    from dataclasses import replace

    from circuits.featurevis.render import visualize_units

    rows: list[dict[str, Any]] = []
    with progress_bar(f"visualize {name}", quiet=json) as progress:
        for k in range(wanted.seeds):
            own = replace(settings, seed=settings.seed + k)
            pictures = visualize_units(
                model, [target], negative=wanted.negative, diverse=wanted.diverse,
                progress=progress, **own.options(),
            )  # fmt: skip
            more = {"reliability": _badge(model, pictures, own, wanted)} if wanted.badge else {}
            for i, picture in enumerate(pictures):
                size = picture.image.shape[-1]
                how = f"{picture.steps}steps-{size}px-seed{picture.seed}" + _variant(picture, i)
                path = place.picture_path(model.hash, name, how)
                if out is not None:
                    number = k * wanted.diverse + i
                    single = wanted.seeds * wanted.diverse == 1
                    path = out if single else out.with_stem(f"{out.stem}-{number}")
                picture.save(path, more)
                rows.append({"out": str(path), **picture.metadata(), **more})
    if json:
        show_json(rows[0] if len(rows) == 1 else rows)
        return
    for row in rows:
        _tell(row)


def _variant(picture: Any, number: int) -> str:
    """What sets a picture's file apart from the plain one of the same steps, size and seed."""
    facts = picture.settings
    parts = [facts["param"]] if facts["param"] != "fourier" else []
    parts += ["alpha"] if facts["alpha"] else []
    parts += ["natural"] if "images" in facts and facts["param"] != "maco" else []
    parts += {"negative": ["negative"], "diverse": [f"diverse{number}"]}.get(facts["kind"], [])
    if picture.unit is None or picture.objective != str(picture.unit):
        parts += ["".join(c if c.isalnum() else "_" for c in picture.objective)[:40]]
    return "".join(f"-{part}" for part in dict.fromkeys(parts))


def _badge(model: Any, pictures: Any, settings: Any, wanted: _Wanted) -> dict[str, Any]:
    from circuits.featurevis.badges import natural_responses, reliability

    unit = pictures[0].unit
    if unit is None:
        raise ValueError("a badge is for a picture of a unit: name one, SITE:INDEX")
    natural = natural_responses(model, unit.site, Examples(model, wanted.images, BADGE_IMAGES))
    return reliability(model, pictures, natural, settings, seed=settings.seed)[0].to_dict()


def _tell(row: dict[str, Any]) -> None:
    say(
        f"{row['objective']}: {row['activation']:.4g} after {row['steps']} steps "
        f"(start: {row['start_activation']:.4g}, seed {row['seed']}) -> {row['out']}"
    )
    if "reliability" in row:
        r = row["reliability"]
        say(
            f"  reliability {r['score']:.2f} (made on shuffled weights: {r['randomized_score']:.2f}): "
            f"reaches {r['reached']:.2g} x the top example, keeps {r['held_out']:.0%} when changed, "
            f"seeds agree to {r['seeds']:.0%}, way through the network {r['natural']:.2f} "
            f"({r['examples']['data']}: {r['examples']['chosen']})"
        )
        for flag in r["flags"]:
            say(f"  ! {flag}")
