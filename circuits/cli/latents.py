"""What latents mean: `circuits sae name` and `circuits sae bottleneck`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from circuits import concepts
from circuits.autoencoders import Autoencoder
from circuits.cli import options
from circuits.cli.choosing import labels_of, readable
from circuits.cli.output import say, warn
from circuits.cli.signatures import option
from circuits.concepts import Intervention
from circuits.concepts.bottleneck import Accuracy, Switch
from circuits.concepts.pooling import Pool
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import record_of
from circuits.sae import rule_of
from circuits.stimuli.labels import read_attributes
from circuits.stimuli.sources import Source
from circuits.tables import Table
from circuits.units import Site


def _pooled(
    model: HookedModel, code: Autoencoder, site: str, examples: Examples, pool: Pool
) -> Float[np.ndarray, "example unit"]:
    """Activations of latents an example, without the positions that training left out."""
    return concepts.pooled(model, site, examples, pool, rule_of(code).positions)


# --- names -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """A name that a person gives."""

    heading: ClassVar = "Naming one latent by hand"

    unit: Annotated[
        int | None, option("The index of the latent that is named; goes with --as.")
    ] = None
    text: Annotated[str, option("The name that the latent gets; goes with --unit.", "--as")] = ""

    def __post_init__(self) -> None:
        if (self.unit is None) != (not self.text):
            raise ValueError("--unit and --as go together: a latent's index and what it is called")


def name_latents(
    sae: options.Sae,
    examples: options.TrainingDataset,
    by_hand: ByHand,
    output: options.Output,
    attributes: Annotated[str, option(
        "A JSON file that says what is true of each example: lists of texts, by the examples' names or in order."
    )] = "",
    labels: options.Labels = "",
    keep: Annotated[bool, option(
        "Keep the names that hold in the workspace. By default they are only shown.", "--keep"
    )] = False,
    level: Annotated[float, option("The level of the tests: a name holds if its p is below.")] = 0.05,
    top: options.Top = options.TOP,
    note: options.Note = "",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Name latents after the attributes that they tell; names are checked on other examples.

    Without --attributes, --labels and --unit the names that are kept are listed.
    """
    place = sae.place.writable() if keep or by_hand.unit is not None else sae.place
    code = sae.load()
    loaded = sae.load_model(code)
    model = options.attached(loaded, code)
    site = model.site(f"sae/{code.about.name}")
    if by_hand.unit is not None:
        unit, text = site.unit(by_hand.unit), by_hand.text
        record = concepts.name_unit(place.database, model.hash, unit, text, note)
        say(f"{record.name} is called {text!r} (version {record.version}, by {record.author})")
        return
    if not attributes and not labels:
        known = concepts.names_of(place.database, model.hash)
        rows = [(n, r.body["text"], r.author, r.created, r.note) for n, r in known.items()]
        columns = ("latent", "name", "by", "when", "note")
        output.show({n: r.body for n, r in known.items()}, [Table(columns, rows)])
        return
    if not 0 < level < 1:
        raise ValueError(f"--level {level} must be between 0 and 1")
    if attributes and labels:
        raise ValueError("--attributes and --labels: expected one of them")
    source = examples.source(code)
    chosen = readable(Examples(model, source, examples.limit, how=examples.take, seed=seed))
    if labels:
        each = _classes(source, labels, loaded)
    else:
        each, missing = read_attributes(source, attributes)
        if missing:
            warn(
                f"attributes {attributes!r}: {missing} of {len(each)} examples are not in it: nothing is true of them"
            )
    found = concepts.name_by_attributes(
        site.name, _pooled(model, code, site.name, chosen, "max"), [each[i] for i in chosen.numbers], level=level,
        data=str(chosen), by="class labels" if labels else "attributes", seed=seed,
    )  # fmt: skip
    if keep:
        concepts.save_names(place.database, model.hash, found.holding, note)
        base = sae.known(loaded.hash)
        assert base is not None, "it was loaded by this record"
        weights = Path(base.weights) if base.weights else None
        own = record_of(f"{base.spec}+{sae.sae}", weights, model.identity, base.dtype)
        place.register(own, replace=False)
    output.show(found, found.tables(top))


def _classes(source: Source, labels: str, model: HookedModel) -> list[list[str]]:
    classes = model.classes
    return [[classes[i] if classes else str(i)] for i in labels_of(model, source, labels)]


# --- bottlenecks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switches:
    """What is done to latents before the bottleneck decides."""

    heading: ClassVar = "Switching latents"

    off: Annotated[str, option("The latents to switch off, e.g. 3,17.")] = ""
    scale: Annotated[str, option(
        "The latents to multiply, and by what: INDICES=FACTOR, e.g. 3,17=2."
    )] = ""  # fmt: skip
    set_: Annotated[str, option(
        "The latents to set, and to what: INDICES=VALUE, e.g. 3,17=0.5.", "--set"
    )] = ""  # fmt: skip
    recipe: Annotated[Path | None, option(
        "Write what is switched as a recipe of edits, to this new .json file."
    )] = None  # fmt: skip

    def read(self, site: Site) -> list[Intervention]:
        """As the library takes them; the recipe's file can be written.

        Raises:
            ValueError: if one is not of its form, or there is nothing for the recipe.
            FileExistsError: if the recipe's file cannot be a new one.
        """
        given: tuple[tuple[Switch, str], ...] = (
            ("off", self.off), ("scale", self.scale), ("set", self.set_),
        )  # fmt: skip
        found = [Intervention.parse(site, how, text) for how, text in given if text]
        if (recipe := self.recipe) is not None:
            if not found or recipe.suffix != ".json":
                raise ValueError(
                    f"--recipe {str(recipe)!r}: expected a .json file, and something to switch (--off, …)"
                )
            if recipe.exists() or not recipe.absolute().parent.is_dir():
                raise FileExistsError(
                    f"--recipe {str(recipe)!r}: expected a new file in a folder that exists"
                )
        return found


def bottleneck(
    sae: options.Sae,
    labels: options.Labels,
    examples: options.TrainingDataset,
    switches: Switches,
    output: options.Output,
    explain: Annotated[int | None, option("The number of an example whose decision is explained, too.")] = None,
    pool: Annotated[Literal["mean", "max"], option(
        "How the activations at an example's positions become one number: their mean, or the largest."
    )] = "mean",
    strength: Annotated[float, option("The inverse of the strength of the regularisation.")] = 1.0,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Classify with latents: what decisions rest on, and what changes if latents are switched."""
    code = sae.load()
    loaded = sae.load_model(code)
    model = options.attached(loaded, code)
    site = model.site(f"sae/{code.about.name}")
    done = switches.read(site)
    if not strength > 0:
        raise ValueError(f"--strength {strength} must be above 0")
    source = examples.source(code)
    every = labels_of(loaded, source, labels)
    chosen = readable(
        Examples(model, source, examples.limit, how=examples.take, seed=seed, labels=every)
    )
    which = chosen.numbers
    if explain is not None and explain not in which:
        raise ValueError(
            f"--explain {explain}: expected one of the {len(which)} examples that are read"
        )
    classes = np.array(chosen.labels)
    units = _pooled(model, code, site.name, chosen, pool)
    first = np.random.default_rng(seed).permutation(len(classes)) < len(classes) // 2
    names = loaded.classes or tuple(map(str, range(classes.max() + 1)))
    found = concepts.train_bottleneck(
        site.name, units[first], classes[first].tolist(), names, pool=pool, strength=strength, model_hash=model.hash,
        data=str(chosen), seed=seed,
    )  # fmt: skip
    rest, answers = units[~first], classes[~first].tolist()
    accuracy = found.accuracy(rest, answers, seed)
    explained = [found.explain_class(rest, i, top) for i in sorted(set(classes.tolist()))]
    local = None if explain is None else found.explain(units[which.index(explain)], top=top)
    changed = concepts.intervene(found, rest, answers, done, seed=seed) if done else None
    if switches.recipe is not None:
        concepts.as_recipe(model, done).save(switches.recipe)
    facts = {
        "accuracy": asdict(accuracy), "classes": [e.to_dict() for e in explained],
        "example": local and local.to_dict(), "interventions": changed and changed.to_dict(), "seed": seed,
        "examples": chosen.describe(), "model_hash": model.hash,
    }  # fmt: skip

    def tables() -> Iterator[Table | str]:
        yield f"{chosen}\n{_accuracy(accuracy)}"
        for explanation in [*explained, *([local] if local else [])]:
            yield from explanation.tables()
        if changed is not None:
            yield from changed.tables()

    output.show(facts, tables())


def _accuracy(found: Accuracy) -> str:
    return (
        f"right on {100 * found.own:.1f} % of {found.n} held out ({100 * found.low:.1f} to {100 * found.high:.1f}); "
        f"trained on shuffled labels {100 * found.shuffled_labels:.1f} %, always the commonest "
        f"{100 * found.majority:.1f} %"
    )
