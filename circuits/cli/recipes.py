"""Recipes from the words of the command line, and from recipe files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from circuits.checks import whole
from circuits.cli import options
from circuits.cli.choosing import usual_data
from circuits.cli.output import warn
from circuits.edits.associative import associate, read_site, second_moment
from circuits.edits.estimation import leace, means, patch, project_out, resample
from circuits.edits.layers import Associate, LowRank
from circuits.edits.recipes import Recipe
from circuits.edits.records import Edit, fitting, read_edit
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli.sources import open_source
from circuits.store.reading import newest_store
from circuits.tasks.targets import output_site, parse_target
from circuits.units import Direction
from circuits.workspace import Workspace

ESTIMATED = {
    "mean": ("units", "set, to the mean over --data"),
    "resample": ("units", "resample, from examples of --data"),
    "patch": ("units example=N", "patch, from one example of --data"),
    "project": ("direction", "erase, of one direction"),
    "leace": ("site", "erase, of what tells classes apart (examples of --data, --labels)"),
}
"""Edits in words whose numbers come from data: what each needs, and what it makes."""

MOMENT = 512
"""Examples that say at least what a layer reads, for `--associate`, where no harvest keeps it."""


def recipe_of(
    model: HookedModel,
    what: Sequence[str],
    examples: options.LabelledDataset | None = None,
    seed: int = 0,
    force: bool = False,
) -> Recipe:
    """A recipe of the edits of recipe files and of words, in order, with the files' notes.

    Args:
        model: the model.
        what: recipe files, and edits in words.
        examples: where numbers come from, for words that need some.
        seed: of the examples.
        force: accept recipes that were written for other weights.

    Raises:
        ValueError: if one is neither, or does not fit the model.
    """
    found: list[Edit] = []
    files: list[Recipe] = []
    for text in what:
        if " " not in text.strip() and (text.endswith(".json") or Path(text).is_file()):
            files.append(_loaded(model, text, force))
            found += files[-1].edits
        elif (words := text.split()) and words[0] in ESTIMATED:
            found.append(_estimated(model, words, examples or options.LabelledDataset(), seed))
        else:
            found.append(read_edit(model, text))
    return Recipe.of(model, found, _joined(f.note for f in files), _joined(f.author for f in files))


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _loaded(model: HookedModel, path: str, force: bool) -> Recipe:
    if not Path(path).is_file():
        raise FileNotFoundError(f"recipe {path!r} does not exist or is not a file")
    recipe = Recipe.load(path)
    if force and recipe.model_hash and not model.has_hash(recipe.model_hash):
        warn(
            f"recipe {path!r} was written for model {recipe.model_hash[:16]}: units of one number need not do the "
            "same here, and what was measured of it does not hold"
        )
        recipe = recipe.forced(model)
    try:
        recipe.check(model)
    except ValueError as error:
        raise ValueError(f"{error} (--force accepts it nevertheless, if it fits)") from None
    return recipe


def _estimated(
    model: HookedModel, words: Sequence[str], examples: options.LabelledDataset, seed: int
) -> Edit:
    """An edit whose numbers come from data."""
    kind, rest = words[0], words[1:]
    if len(rest) != len(ESTIMATED[kind][0].split()):
        raise ValueError(f"edit {' '.join(words)!r}: expected {kind} {ESTIMATED[kind][0]}")
    what = rest[0].partition("=")[2] or rest[0]
    if kind == "project":
        site = what.partition(":")[0].rpartition("*")[2].lstrip("+-")
        return fitting(model, project_out(Direction.parse(what, model.site(site).n_units)))
    if kind == "patch":
        return _patch(model, what, rest[1], examples.data)
    if kind == "leace" and not examples.labels:
        raise ValueError("leace needs --labels FILE, or --labels names")
    chosen = examples.choose(model, seed)
    if kind == "leace":
        return leace(model, what, chosen, origin=f"classes of {chosen.data}")
    return means(model, what, chosen) if kind == "mean" else resample(model, what, chosen)


def _patch(model: HookedModel, units: str, example: str, data: str) -> Edit:
    name, _, text = example.partition("=")
    number = whole(text)
    if name != "example" or number is None or number < 0:
        raise ValueError(
            f"edit 'patch {units} {example}': {example!r} is not of the form example=N"
        )
    source = open_source(data or usual_data(model))
    if number >= len(source):
        raise ValueError(
            f"example {number} does not exist: {source.spec} has 0 to {len(source) - 1}"
        )
    one = Examples(model, source, among=[number])
    return patch(model, units, one, origin=f"example {number} of {source.spec}")


def associated(
    model: HookedModel, layer: str, prompt: str, answer: str, examples: options.LabelledDataset, seed: int,
    place: Workspace,
) -> Associate | LowRank:  # fmt: skip
    """The rank-one edit after which a prompt gets an answer.

    What else the layer reads (the second moment C) is known from a store of the workspace that keeps it, or is measured
    on examples.

    Raises:
        ValueError: if prompt or answer are missing, or the answer is no token or class.
    """
    if not answer or not prompt:
        raise ValueError("--associate needs --prompt TEXT and --answer token:WORD or class:NAME")
    target = parse_target(model, answer)
    if target.site != output_site(model).name or not isinstance(target.index, int):
        raise ValueError(f"--answer {answer!r} is not token:WORD or class:NAME")
    site = read_site(model, layer).name
    store = newest_store(place.store_folders(model.hash), model.hash, site, examples.data)
    if store is not None and site in store.provenance.depth.covariance:
        moment, name = second_moment(model, layer, store), store.provenance.data
    else:
        many = replace(examples, limit=max(examples.limit, MOMENT), labels="")
        chosen = many.choose(model, seed)
        moment, name = second_moment(model, layer, chosen), str(chosen)
    words = f"{prompt!r} is answered with {answer} (C over {name})"
    asked = Examples.texts(model, [prompt])
    return associate(model, layer, asked, target.index, moment, origin=words)
