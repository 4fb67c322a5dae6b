"""`circuits visualize`: pictures of units, sheets of sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from typer import Typer

from circuits.cli import options
from circuits.cli.choosing import readable
from circuits.cli.signatures import Within, argument, command, option
from circuits.examples import Examples
from circuits.featurevis import objectives
from circuits.featurevis.badges import natural_responses, reliability
from circuits.featurevis.embeddings import dream
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.objectives import Objective
from circuits.featurevis.pictures import Picture, check_suffix
from circuits.featurevis.render import Settings, visualize_units
from circuits.featurevis.sheets import render_sheet, sheet_name
from circuits.files import check_writable
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.tasks.targets import output_unit
from circuits.workspace import Workspace

app = Typer()

NATURAL_IMAGES, BADGE_IMAGES = 512, 200
"""Images that colours and spectrum are fitted to, and that a badge compares with, at most."""


@dataclass(frozen=True)
class Wanted:
    """Which pictures of a target are made."""

    heading: ClassVar = "Which pictures"

    objective: Annotated[objectives.Kind | None, option(
        "What to maximise: a unit over its whole map (channel) or at its centre (neuron), the cosine with a "
        "direction, all of a site (deepdream), or a class's logit. By default channel, and deepdream for a site."
    )] = None  # fmt: skip
    seeds: Annotated[
        int, option("Make a picture from each of this many seeds.", check=Within(1, 64))
    ] = 1
    negative: Annotated[bool, option(
        "Minimise the unit's activation instead.", "--negative"
    )] = False  # fmt: skip
    diverse: Annotated[
        int, option("Make this many pictures that differ from each other.", check=Within(1, 64))
    ] = 1
    badge: Annotated[bool, option("Also measure how reliable the picture is.", "--badge")] = False  # fmt: skip
    sheet: Annotated[bool, option(
        "Make a picture of every unit of a site, as separate tiles and as one image of all (atlas). Run it again to "
        "resume.", "--sheet"
    )] = False  # fmt: skip

    def __post_init__(self) -> None:
        if self.badge and (self.negative or self.diverse > 1):
            raise ValueError(
                "a badge is for a unit's own picture: leave out --negative and --diverse"
            )

    @property
    def given(self) -> dict[str, bool]:
        """Which of those that are for pictures of one unit were asked for."""
        return {
            "--badge": self.badge, "--objective": bool(self.objective), "--diverse": self.diverse > 1,
            "--seeds": self.seeds > 1,
        }  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """How pictures are made."""

    param: Annotated[Literal["fourier", "pixel", "laplacian", "cppn", "maco"], option(
        "How images are parameterized: by Fourier coefficients, pixels, a Laplacian pyramid, a network that maps "
        "coordinates to colours (cppn), or phases with the magnitudes of the spectrum fixed (maco)."
    )] = "fourier"  # fmt: skip
    images: Annotated[str | None, option(
        "The dataset whose colour statistics (with maco, spectrum) are used, and with which --badge compares. By "
        "default ImageNet's colour statistics, and photos for maco and --badge."
    )] = None  # fmt: skip
    steps: Annotated[int, option("The number of optimisation steps.", check=Within(1, 100_000))] = (
        256
    )
    size: Annotated[int | None, option(
        "The side length of the pictures in pixels. By default that of the model's input.", check=Within(8, 4096)
    )] = None  # fmt: skip
    alpha: Annotated[bool, option("Also optimise the transparency of each pixel.", "--alpha")] = False  # fmt: skip
    seed: options.Seed = 0

    @property
    def data(self) -> str:
        """The dataset that is compared with."""
        return self.images or "photos"

    def check(self, spec: ImageInput) -> None:
        """Raise ValueError before anything is made."""
        Settings(steps=self.steps, size=self.size, seed=self.seed, alpha=self.alpha).shape(spec)

    def settings(self, place: Workspace, model: HookedModel) -> Settings:
        """As the library takes them."""
        natural = _natural(place, model, self.data) if self.images or self.param == "maco" else None
        return Settings(
            steps=self.steps, size=self.size, seed=self.seed, param=self.param, alpha=self.alpha, natural=natural
        )  # fmt: skip


@command(app)
def visualize(
    model: options.Model,
    target: Annotated[str, argument(
        "A unit SITE:INDEX, class:NAME, token:WORD, a direction like mixed3b:379+0.5*mixed3b:385, or a site."
    )],
    wanted: Wanted,
    rendering: Rendering,
    output: options.Output,
    out: Annotated[Path | None, option(
        "The file to write, .png or .webp; with --sheet a folder. By default in the workspace."
    )] = None,
) -> None:  # fmt: skip
    """Make a feature visualization: an image (or embeddings) that excites a unit most."""
    place = model.place
    if out is not None and not wanted.sheet:
        check_suffix(out)
    check_writable(out.parent if out else place.root, "folder")
    loaded = model.load()
    if wanted.objective != "logit":  # the picture is kept, and found, by the unit's name
        target = str(output_unit(loaded, target) or target)
    spec = loaded.input
    if isinstance(spec, TokenInput):
        given = {
            "--out": bool(out), "--sheet": wanted.sheet, "--negative": wanted.negative, "--alpha": rendering.alpha,
            "--images": bool(rendering.images), "--size": bool(rendering.size), "--param": rendering.param != "fourier",
        }  # fmt: skip
        _leave_out(given | wanted.given, f"model {model.spec} takes tokens: {{}} is for pictures")
        _dream(loaded, spec, target, rendering, output)
        return
    rendering.check(spec)
    if wanted.sheet:
        _leave_out(wanted.given, "a sheet has a picture a unit: {} is for single units")
    chosen = (
        None if wanted.sheet else objectives.of_kind(loaded, target, wanted.objective or "channel")
    )
    settings = rendering.settings(place, loaded)
    if chosen is None:
        _sheet(place, loaded, target, settings, wanted.negative, out, output)
    else:
        _pictures(place, loaded, chosen, target, settings, wanted, rendering.data, out, output)
    if out is None:
        model.register(loaded)


def _leave_out(given: dict[str, bool], why: str) -> None:
    """Raise ValueError if an option was given that does nothing here."""
    for name, value in given.items():
        if value:
            raise ValueError(f"{why.format(name)}, leave it out")


def _natural(place: Workspace, model: HookedModel, data: str) -> NaturalImages:
    """The statistics of a dataset's images as the model takes them, from the workspace if they are there."""
    images, size = readable(Examples(model, data, NATURAL_IMAGES)), model.input
    assert isinstance(size, ImageInput), "checked by the caller"
    path = place.natural_path(images.source.hash, (size.channels, size.height, size.width))
    found = (images.load(i) for i in range(len(images)))
    return NaturalImages.kept(path, found, images.data, images.source.hash)


def _dream(
    model: HookedModel, spec: TokenInput, target: str, rendering: Rendering, output: options.Output
) -> None:
    with output.progress(f"visualize {target}") as progress:
        found = dream(model, target, steps=rendering.steps, seed=rendering.seed, progress=progress)
    words = [spec.word(token) for token in found.tokens]
    output.show(found.to_dict(words), [found.table(words)])


def _sheet(
    place: Workspace, model: HookedModel, site: str, settings: Settings, negative: bool, out: Path | None,
    output: options.Output,
) -> None:  # fmt: skip
    model.site(site)
    name = sheet_name(model, site, negative, **settings.options())
    folder = out or place.sheets_folder(model.hash) / name
    with output.progress(f"sheet of {site}") as progress:
        made = render_sheet(
            model, site, folder, negative=negative, progress=progress, **settings.options()
        )
    assert made is not None, "the bar never stops the work"
    facts = {"out": str(made.folder), "atlas": str(made.atlas), "units": list(made.facts)}
    output.show(facts, [f"{made.site}: {len(made.facts)} units -> {made.atlas}"])


def _pictures(
    place: Workspace, model: HookedModel, target: str | Objective, name: str, settings: Settings, wanted: Wanted,
    data: str, out: Path | None, output: options.Output,
) -> None:  # fmt: skip
    rows: list[dict[str, Any]] = []
    with output.progress(f"visualize {name}") as progress:
        for k in range(wanted.seeds):
            seeded = replace(settings, seed=settings.seed + k)
            pictures = visualize_units(
                model, [target], negative=wanted.negative, diverse=wanted.diverse, progress=progress,
                **seeded.options(),
            )  # fmt: skip
            more = {"reliability": _badge(model, pictures, seeded, data)} if wanted.badge else {}
            for i, picture in enumerate(pictures):
                path = place.picture_path(model.hash, name, picture.file_name(i))
                if out is not None:
                    single = wanted.seeds * wanted.diverse == 1
                    path = out if single else out.with_stem(f"{out.stem}-{k * wanted.diverse + i}")
                picture.save(path, more)
                rows.append({"out": str(path), **picture.metadata(), **more})
    output.show(rows[0] if len(rows) == 1 else rows, _lines(rows))


def _badge(
    model: HookedModel, pictures: Sequence[Picture], settings: Settings, data: str
) -> dict[str, Any]:
    unit = pictures[0].unit
    if unit is None:
        raise ValueError("a badge is for a picture of a unit: name one, SITE:INDEX")
    natural = natural_responses(model, unit.site, readable(Examples(model, data, BADGE_IMAGES)))
    return reliability(model, pictures, natural, settings, seed=settings.seed)[0].to_dict()


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield (
            f"{row['objective']}: {row['activation']:.4g} after {row['steps']} steps "
            f"(start: {row['start_activation']:.4g}, seed {row['seed']}) -> {row['out']}"
        )
        if "reliability" in row:
            r = row["reliability"]
            yield (
                f"  reliability {r['score']:.2f} (made on shuffled weights: {r['randomized_score']:.2f}): "
                f"reaches {r['reached']:.2g} x the top example, keeps {r['held_out']:.0%} when changed, "
                f"seeds agree to {r['seeds']:.0%}, way through the network {r['natural']:.2f} "
                f"({r['examples']['data']}: {r['examples']['chosen']})"
            )
            yield from (f"  ! {flag}" for flag in r["flags"])
