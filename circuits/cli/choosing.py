"""Which units, and which examples, a command is about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from circuits.cli.arguments import Take
from circuits.examples import Examples
from circuits.tasks import Task
from circuits.units import Units
from circuits.workspace import Workspace


def units_of(model: Any, text: str) -> list[Any]:
    """Units written as `SITE:1,2,5-9` (several separated by a blank or `;`); a site alone is all of its units.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if it is not of this form, or there is no such unit.
    """
    found = []
    for part in filter(None, re.split(r"[;\s]+", text)):
        units = Units.parse(part if ":" in part else f"{part}:*")
        place = model.site(units.site)
        found += [place.unit(i) for i in units.among(place)]
    if not found:
        raise ValueError(f"units {text!r} name none: expected SITE:1,2,5-9")
    return found


def usual_data(model: Any) -> str:
    """The name of the data that a verb takes when nobody names any."""
    from circuits.models.adapter.inputs import ImageInput

    return "photos" if isinstance(model.input, ImageInput) else "repeats"


def examples_of(
    model: Any,
    data: str,
    limit: int | None,
    image: list[Path] | None = None,
    text: str = "",
    exact: bool = False,
    *,
    take: Take = "spread",
    seed: int = 0,
    labels: str = "",
) -> Examples:
    """Images by path, a text, or examples of some data.

    Args:
        model: the model.
        data: used where no image or text is given; empty for the usual one.
        limit: how many of the data; None takes all.
        image: paths.
        text: for a model of tokens.
        exact: refuse images that have not the model's size, instead of fitting them.
        take: which of the data.
        seed: of the choice.
        labels: where the classes of the data are: a file, or `names`; none if empty.

    Raises:
        FileNotFoundError: if an image does not exist.
        ValueError: if what is given does not fit the model, or does not go together.
    """
    from circuits.models.adapter.inputs import ImageInput
    from circuits.stimuli.sources import open_source

    if data and (image or text):
        raise ValueError(f"--data {data!r} does not go with --image or --text")
    if labels and (image or text):
        raise ValueError(f"--labels {labels!r} goes with --data")
    images = isinstance(model.input, ImageInput)
    if text:
        if images:
            raise ValueError(f"--text {text!r}: model {model.name} takes images")
        return Examples.texts(model, [text])
    if image:
        if not images:
            raise ValueError(
                f"--image {str(image[0])!r}: model {model.name} takes tokens: use --text or --data"
            )
        return _pictures(model, image, exact)
    source = open_source(data or usual_data(model))
    known = labels_of(model, source, labels) if labels else None
    return Examples(model, source, limit, how=take, seed=seed, labels=known)


def _pictures(model: Any, paths: list[Path], exact: bool) -> Examples:
    from circuits.stimuli.images import read_image

    size, pictures = (model.input.width, model.input.height), [read_image(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if exact and picture.size != size:
            raise ValueError(
                f"--image {str(path)!r} has {picture.width} x {picture.height} pixels: {model.name} takes "
                f"{size[0]} x {size[1]} (leave out --exact to fit it)"
            )
    return Examples.pictures(model, pictures, [path.name for path in paths])


def labels_of(model: Any, source: Any, labels: str) -> list[int]:
    """The class of each example of a source, from a file or, for `names`, from the examples' names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an example has none.
    """
    from circuits.stimuli.labels import read_labels

    return read_labels(source, model.classes, None if labels == "names" else labels)


def task_of(
    model: Any,
    task: str,
    data: str,
    text: str,
    limit: int,
    take: Take,
    seed: int,
    labels: str,
    **asked: str,
) -> Task:
    """What a verb measures: a task by name or file, what data or a text states by itself, or the model's own task.

    Args:
        model: the model.
        task: its name or file.
        data: examples, for tasks that do not bring their own.
        text: a text instead.
        limit: how many examples.
        take: which of the data.
        seed: of what is drawn and of the choice.
        labels: as in `examples_of`.
        asked: `metric`, `positions`, `answer` and `against`, as `load_task` takes them.

    Raises:
        KeyError: if there is no such task or metric.
        ValueError: if what is given does not go together, or does not fit the model.
    """
    from circuits.models.adapter.inputs import ImageInput
    from circuits.stimuli.sources import open_source
    from circuits.tasks.builtin import STATED, load_task

    if data and text:
        raise ValueError(f"--data {data!r} does not go with --text")
    if task and task not in STATED and (data or text):
        raise ValueError(f"--task {task!r} has its own examples: leave out --data and --text")
    if labels and not data:
        raise ValueError(f"--labels {labels!r} goes with --data")
    if labels and not isinstance(model.input, ImageInput):
        raise ValueError(f"--labels {labels!r}: of texts the next token is what is right")
    known = labels_of(model, open_source(data), labels) if labels else None
    return load_task(
        model, task, n=limit, seed=seed, how=take, data=data, labels=known, texts=[text] if text else (), **asked
    )  # fmt: skip


def stored(place: Workspace, model_hash: str, site: str, data: str = "") -> Any:
    """The newest finished store of a model that has a site (of some data, if it is named); None if none has."""
    from circuits.store import ActivationStore

    found = []
    for folder in place.store_folders(model_hash):
        try:
            store = ActivationStore.open(folder, model_hash)
        except (OSError, ValueError):
            continue
        if site in store.sites and data in ("", store.provenance.data):
            found.append(store)
    return max(found, key=lambda s: (s.folder / "statistics.h5").stat().st_mtime, default=None)


def options_of(given: list[str] | None) -> dict[str, Any]:
    """Options written NAME=VALUE: whole numbers, numbers, or words.

    Raises:
        ValueError: if one is not of this form.

    >>> options_of(["samples=20", "noise=0.1", "blank=blur"])
    {'samples': 20, 'noise': 0.1, 'blank': 'blur'}
    """
    found: dict[str, Any] = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--option {item!r} is not of the form NAME=VALUE, e.g. samples=20")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "none" else text
