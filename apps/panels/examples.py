"""The examples on a unit's page: the strongest, and a sample of the whole range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from PIL import Image, ImageDraw

from apps import cached
from apps.address import part, plain
from apps.inputs import picture_of
from apps.panels.pictures import pictures_of
from apps.panels.tokens import texts_panel
from apps.showing import show_picture
from apps.subject import Look
from circuits.examples import Examples
from circuits.figures.tunings import overlaid
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.paths.receptive import Box, ReceptiveField
from circuits.store import ActivationStore, Example

SHOWN, TENTHS, SAMPLED = 9, 10, 3
"""Strongest examples; groups that the range is cut into, and how many examples are shown of each."""


@part
def examples_panel(look: Look, store: ActivationStore, examples: Examples) -> None:
    """The examples with the unit's largest activations, cut to what it sees there."""
    model, unit = look.model, look.unit
    st.subheader("Examples that excite it most")
    best = store.top_examples(unit, SHOWN)
    if isinstance(model.input, TokenInput):
        texts_panel(look, examples, best, "best")
        return
    with st.container(horizontal=True):
        whole = st.toggle("Whole images", key="whole-images", help="The box is what the unit sees.")
        credit = st.toggle(
            "Attribution to pixels",
            key="overlay",
            help="Gradient × input of the unit's activation: red adds to it.",
        )
    field = cached.field_of(model, unit.site)
    for column, example in zip(st.columns(SHOWN), best, strict=False):
        if credit:
            _credited(column, look, examples, example)
        else:
            _image(column, model.input, examples, example, field, whole)


def _credited(column: Any, look: Look, examples: Examples, example: Example) -> None:
    one = examples.subset([example.index])
    target = (
        f"{look.unit}@{','.join(map(str, example.position))}"
        if example.position
        else str(look.unit)
    )
    found = cached.salient(look.model, one, target, "gradient_x_input")
    shown = picture_of(one)
    assert shown is not None, "an image"
    heat = overlaid(np.asarray(shown) / 255, found.heat()[0].numpy())
    show_picture(heat, f"pixels of {example.name} that excite the unit", place=column)
    column.caption(f"{plain(str(example))} · {plain(Path(example.name).stem)}")


@part
def range_panel(look: Look, store: ActivationStore, examples: Examples) -> None:
    """A sample from each tenth of the examples, ranked by the unit's activation: not only the top."""
    model, unit, model_hash = look.model, look.unit, look.record.hash
    st.subheader("Across its whole range")
    if not st.toggle("Show a sample of every tenth of the examples", key="range"):
        return
    seed = int(st.number_input("Seed of the sample", 0, 2**31 - 1, 0, key="range-seed"))
    tenths = store.quantile_examples(unit, TENTHS, SAMPLED, seed)
    if isinstance(model.input, TokenInput):
        for i, found in enumerate(tenths):
            st.caption(_share(i))
            texts_panel(look, examples, found, f"tenth-{i:d}")
        return
    field = cached.field_of(model, unit.site)
    high, *columns, low = st.columns(TENTHS + 2)
    made = pictures_of(unit, model_hash)
    for column, kind in ((high, "positive"), (low, "negative")):
        column.caption(f"made: {kind}")
        if made[kind]:
            show_picture(made[kind][0].path, f"{kind} feature visualization", place=column)
    for i, (column, found) in enumerate(zip(columns, tenths, strict=True)):
        column.caption(_share(i))
        for example in found:
            _image(column, model.input, examples, example, field, whole=False)


def _share(i: int) -> str:
    return (
        f"{100 * i // TENTHS:d}–{100 * (i + 1) // TENTHS:d} %" if i else f"top {100 // TENTHS:d} %"
    )


def _image(
    column: Any,
    spec: ImageInput,
    examples: Examples,
    example: Example,
    field: ReceptiveField,
    whole: bool,
) -> None:
    box = field.at(example.position)
    show_picture(
        _excerpt(spec, examples, example, box, whole), f"part of {example.name}", place=column
    )
    column.caption(f"{plain(str(example))} · {plain(Path(example.name).stem)}")


def _excerpt(
    spec: ImageInput, examples: Examples, example: Example, box: Box, whole: bool
) -> Image.Image:
    """An example's image as the model sees it: the excited part, or all of it with a box around that."""
    image = spec.fit(examples.picture(example.index))
    top, left, bottom, right = box
    if not whole:
        return image.crop((left, top, right, bottom)).resize((128, 128), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline="#D55E00", width=2)
    return image
