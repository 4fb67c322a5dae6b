"""`circuits families`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from typer import Typer

from circuits import equivariance
from circuits import families as library
from circuits.checks import whole
from circuits.cli import options
from circuits.cli.output import warn
from circuits.cli.signatures import Within, argument, command, option
from circuits.concepts.basis import basis_table, basis_test
from circuits.database import Database
from circuits.families import Family
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.orbits import Transformation
from circuits.weights import expand_weights

app = Typer()


@dataclass(frozen=True)
class Search:
    """What makes a family, and how it is tested."""

    kind: Annotated[Transformation, option(
        "How the members of a family differ: by rotation, mirroring, scale or hue."
    )] = "rotation"  # fmt: skip
    threshold: Annotated[float, option(
        "The minimum mean agreement (at most 1) of a unit with the members of its family.", check=Within(-1, 1)
    )] = 0.7  # fmt: skip
    least: Annotated[int, option("The minimum number of members.", check=Within(2))] = 4
    permutations: Annotated[
        int,
        option("How many random permutations to compute p-values from.", check=Within(1, 10**6)),
    ] = 199
    size: Annotated[int | None, option(
        "The side length of the stimuli in pixels. By default that of the model's input.", check=Within(16, 1024)
    )] = None  # fmt: skip
    seed: options.Seed = 0


@dataclass(frozen=True)
class Saved:
    """What is to be done with families that are saved."""

    heading: ClassVar = "Saved families"

    listing: Annotated[bool, option("List the families that are saved.", "--list")] = False
    rename: Annotated[str, option("Give a saved family another name, written OLD=NEW.")] = ""
    remove: Annotated[str, option("Remove the saved family of this name; its history stays.")] = ""
    weights_from: Annotated[str, option(
        "Measure whether the weights from one saved family (OTHER) into another (SAVED) are equivariant: whether "
        "they rotate with the units. Written SAVED=OTHER."
    )] = ""  # fmt: skip

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return bool(self.listing or self.rename or self.remove or self.weights_from)


@command(app)
def families(
    model: options.Model,
    search: Search,
    saved: Saved,
    output: options.FigureOutput,
    site: Annotated[str, argument("The site to search; not needed for saved families.")] = "",
    units: Annotated[str, option(
        "Measure these units of SITE (their indices, with commas) as one family, instead of looking for families."
    )] = "",
    name: Annotated[str, option("Save what is found or measured under this name.")] = "",
    save: Annotated[bool, option("Save every family that is found.", "--save")] = False,
    note: options.Note = "",
) -> None:  # fmt: skip
    """Find units that are rotated, mirrored, scaled or hue-shifted copies of each other."""
    if (save or name) and saved.wanted:
        raise ValueError("--save and --name go with finding or measuring families")
    loaded, place = model.load(), model.place
    if save or name or saved.rename or saved.remove:
        place.writable()
    if saved.wanted:
        _saved(loaded, place.database, saved, search, note, output)
        return
    if not site:
        raise ValueError("SITE is missing: where to look (or --list)")
    found = _found(loaded, site, units, name, search, output)
    if save or name:
        for family in found:
            library.save_family(place.database, family, note)
    title = f"{search.kind} families of {loaded.name} {site}"
    output.draw(lambda figures: figures.families_figure(found, title))
    output.show(found, [library.families_table(found)])


def _found(
    model: HookedModel, site: str, units: str, name: str, search: Search, output: options.Output
) -> list[Family]:
    """The families of a site, or one of the units that are named."""
    if units:
        wanted = [model.site(site).unit(i) for i in _whole_numbers(units)]
        return [
            library.measure_family(
                model, wanted, search.kind, name=name, permutations=search.permutations, seed=search.seed,
                size=search.size,
            )
        ]  # fmt: skip
    with output.progress("families") as progress:
        found = library.find_families(
            model, site, search.kind, threshold=search.threshold, least=search.least,
            permutations=search.permutations, seed=search.seed, size=search.size, progress=progress,
        )  # fmt: skip
    if not name:
        return found
    return [family.renamed(name if i == 0 else f"{name} {i + 1}") for i, family in enumerate(found)]


def _whole_numbers(text: str) -> list[int]:
    found = [whole(part.strip()) for part in text.split(",")]
    if any(part is None or part < 0 for part in found):
        raise ValueError(f"--units {text!r} is not a list of indices, e.g. 3,14,15")
    return [part for part in found if part is not None]


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    left, _, right = text.partition("=")
    if not right:
        raise ValueError(f"--{option} {text!r} is not of the form {form}")
    return left, right


def _saved(
    model: HookedModel, database: Database, saved: Saved, search: Search, note: str, output: options.FigureOutput
) -> None:  # fmt: skip
    """Rename, remove, compare or list what is saved."""
    key = model.hash
    if saved.rename:
        old, new = _pair("rename", saved.rename, "OLD=NEW")
        family = library.load_family(database, old, key)
        library.save_family(database, family.renamed(new), note or f"was {old}", replaces=0)
        database.save(library.KIND, key, old, None, note or f"now {new}")
    if saved.remove:
        database.load(library.KIND, key, saved.remove)
        database.save(library.KIND, key, saved.remove, None, note)
    if saved.weights_from:
        target, source = _pair("weights-from", saved.weights_from, "SAVED=OTHER")
        targets, sources = (library.load_family(database, name, key) for name in (target, source))
        _weights_between(model, targets, sources, search, output)
        return
    found = library.saved_families(database, key)
    for fault in library.damaged_families(database, key):
        warn(fault)
    output.draw(lambda figures: figures.families_figure(found, f"saved families of {model.name}"))
    output.show(found, [library.families_table(found)])


def _weights_between(
    model: HookedModel,
    targets: Family,
    sources: Family,
    search: Search,
    output: options.FigureOutput,
) -> None:
    expanded = expand_weights(
        model, sources.site, targets.site,
        units=[u.index for u in targets.units], sources=[u.index for u in sources.units],
    )  # fmt: skip
    found = equivariance.measure_equivariance(
        expanded, targets, sources, search.permutations, search.seed
    )
    title = f"{targets.name} from {sources.name}"
    output.draw(lambda figures: figures.family_figure(found, title))
    output.show(found.to_dict() | {"model_hash": model.hash}, found.tables(title))


@command(app)
def basis(
    model: options.Model,
    sites: Annotated[str, argument("The sites to test, with commas between them.")],
    examples: options.Inputs,
    output: options.Output,
    random: Annotated[int, option(
        "How many random bases to compare with.", "--bases", check=Within(1, 100_000)
    )] = 99,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Test whether a site's units are a privileged basis: a higher kurtosis than random directions have."""
    loaded = model.load()
    names = [loaded.site(name).name for name in map(str.strip, sites.split(",")) if name]
    if not names:
        raise ValueError(
            f"sites {sites!r} name no site: expected one or more, with commas between them"
        )
    chosen = examples.choose(loaded, seed)
    found = [basis_test(loaded, name, chosen, random, seed) for name in names]
    output.show(
        [test.to_dict() for test in found],
        [f"privileged bases of {loaded.name} on {chosen}", basis_table(found)],
    )
