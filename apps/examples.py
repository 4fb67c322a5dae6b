"""The examples on a unit's page: the strongest, and a sample of the whole range (layer 7)."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image, ImageDraw

from apps import session
from apps.pictures import pictures_of
from circuits.harvesting import Inputs
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.models.receptive import Box, ReceptiveField
from circuits.store import ActivationStore, Example
from circuits.units import Unit

TENTHS, SAMPLED = 10, 3
"""Groups of examples that the range is cut into, and how many are shown of each."""


def examples_panel(
    model: HookedModel, store: ActivationStore, unit: Unit, inputs: Inputs, model_hash: str
) -> None:
    """The examples with the unit's largest activations, cut to what it sees there."""
    st.subheader("Examples that excite it most")
    examples = store.top_examples(unit, 9)
    if isinstance(model.input, TokenInput):
        for example in examples:
            st.html(_marked_tokens(inputs.tokens(example.index), example, model.input))
        return
    whole = st.toggle("Whole images", key="whole-images", help="The box is what the unit sees.")
    field = session.field_of(model, unit.site, model_hash)
    for column, example in zip(st.columns(9), examples, strict=False):
        _image(column, model.input, inputs, example, field, whole)


def range_panel(
    model: HookedModel, store: ActivationStore, unit: Unit, inputs: Inputs, model_hash: str
) -> None:
    """A sample from each tenth of the examples, ranked by the unit's activation: not only the top."""
    st.subheader("Across its whole range")
    if not st.toggle("Show a sample of every tenth of the examples", key="range"):
        return
    seed = int(st.number_input("Seed of the sample", 0, 2**31 - 1, 0, key="range-seed"))
    tenths = store.quantile_examples(unit, TENTHS, SAMPLED, seed)
    if isinstance(model.input, TokenInput):
        for i, examples in enumerate(tenths):
            st.caption(_share(i))
            for example in examples:
                st.html(_marked_tokens(inputs.tokens(example.index), example, model.input))
        return
    field = session.field_of(model, unit.site, model_hash)
    high, *columns, low = st.columns(TENTHS + 2)
    made = pictures_of(unit, model_hash)
    for column, kind in ((high, "positive"), (low, "negative")):
        column.caption(f"made: {kind}")
        if made[kind]:
            column.image(str(made[kind][0].path), width="stretch")
    for i, (column, examples) in enumerate(zip(columns, tenths, strict=True)):
        column.caption(_share(i))
        for example in examples:
            _image(column, model.input, inputs, example, field, whole=False)


def _share(i: int) -> str:
    return f"{100 * i // TENTHS}–{100 * (i + 1) // TENTHS} %" if i else f"top {100 // TENTHS} %"


def _image(
    column: Any,
    spec: ImageInput,
    inputs: Inputs,
    example: Example,
    field: ReceptiveField,
    whole: bool,
) -> None:
    box = field.at(example.position)
    column.image(_excerpt(spec, inputs, example, box, whole), width="stretch")
    column.caption(f"{example.value:.3g} · {Path(example.name).stem}")


def _excerpt(
    spec: ImageInput, inputs: Inputs, example: Example, box: Box, whole: bool
) -> Image.Image:
    """An example's image as the model sees it: the excited part, or all of it with a box around that."""
    image = spec.fit(inputs.picture(example.index))
    top, left, bottom, right = box
    if not whole:
        return image.crop((left, top, right, bottom)).resize((128, 128), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline="#D55E00", width=2)
    return image


def _marked_tokens(tokens: list[int], example: Example, spec: TokenInput) -> str:
    """A text with the token where the unit is most active set off."""
    at = example.position[0] if example.position else -1
    words = [html.escape(spec.word(t)).replace("\n", "⏎") for t in tokens]
    gap = "" if spec.vocabulary else " "
    marked = gap.join(
        f"<mark title='{example.value:.3g}'>{w}</mark>" if i == at else w
        for i, w in enumerate(words)
    )
    return f"<div style='font-family:monospace'>{example.value:.3g}&emsp;{marked}</div>"
