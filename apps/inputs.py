"""The input that a page is about: an example of the data, a person's own picture, or a text (layer 7).

What a person brings stays in their session's memory: nothing of it is written, its name is never a path.
"""

from __future__ import annotations

import hashlib

import streamlit as st
import torch
from PIL import Image

from apps import cached
from apps.cached import Shown
from apps.choosing import choose, line
from circuits.harvesting import Inputs
from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.stimuli.images import ImageSource
from circuits.stimuli.uploads import decode_image
from circuits.workspace import ModelRecord

OWN = "your own"
_TYPES = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"]
_LONGEST = 20_000
"""Characters of a text."""


def shown_example(model: HookedModel, inputs: Inputs, example: int) -> Shown:
    """An example of a dataset."""
    source, spec = inputs.source, model.input
    picture = None
    if isinstance(source, ImageSource) and isinstance(spec, ImageInput):
        picture = spec.fit(inputs.picture(example)).convert("RGB")
    tokens = () if isinstance(source, ImageSource) else tuple(inputs.tokens(example))
    code = f"x = circuits.Inputs(model, circuits.open_source({source.spec!r})).batch([{example}])"
    return Shown(
        f"{source.hash} {example}",
        source.names[example],
        inputs.batch([example]),
        picture,
        tokens,
        code,
    )


def choose_input(record: ModelRecord, model: HookedModel) -> Shown | None:
    """An input from the model's data, or the person's own; None, after saying why, if there is none yet."""
    stores = {s.provenance.data: s for s in cached.stores_of(record)}
    where = choose("Input from", [*stores, OWN], "from")
    if where == OWN:
        return _own_picture(model) if isinstance(model.input, ImageInput) else _own_text(model)
    try:
        inputs = cached.inputs_of(model, stores[where])
    except (ValueError, OSError, ImportError) as error:
        st.warning(f"The examples cannot be shown: {line(error)}")
        return None
    names = inputs.source.names
    options = [str(i) for i in range(len(names))]
    index = choose("Example", options, "example", show=lambda i: f"{i} · {names[int(i)]}")
    return shown_example(model, inputs, int(index))


def _own_picture(model: HookedModel) -> Shown | None:
    spec = model.input
    assert isinstance(spec, ImageInput), "chosen by the caller"
    file = st.file_uploader(
        "A picture, at most 20 MB", type=_TYPES, key="upload", max_upload_size=20
    )
    if file is not None:
        try:
            picture = decode_image(file.getvalue(), file.name)
        except ValueError as error:
            st.error(line(error))
            return None
        st.session_state["own picture"] = (picture, hashlib.sha256(file.getvalue()).hexdigest())
    kept: tuple[Image.Image, str] | None = st.session_state.get("own picture")
    if kept is None:
        st.info("Choose a picture from your computer: it stays in this session's memory.")
        return None
    picture, digest = kept
    x = spec.normalize(spec.load(picture)[None])
    code = 'x = model.input.normalize(model.input.load(PIL.Image.open("your picture.png"))[None])'
    return Shown(digest, "your picture", x, spec.fit(picture).convert("RGB"), (), code)


def _own_text(model: HookedModel) -> Shown | None:
    spec = model.input
    assert isinstance(spec, TokenInput), "chosen by the caller"
    example = (
        " ".join(str(i) for i in (5, 9, 2, 7, 5, 9, 2))
        if not spec.vocabulary
        else "Once upon a time"
    )
    text = st.text_input(
        "A text", st.query_params.get("text", example), max_chars=_LONGEST, key="own text"
    )
    st.query_params["text"] = text
    try:
        tokens = spec.encode(text)
        if spec.bos is not None and tokens[:1] != [spec.bos]:
            tokens = [spec.bos, *tokens]
        x = spec.check(torch.tensor([tokens[: spec.n_ctx]], dtype=torch.int64))
    except (ValueError, KeyError) as error:
        st.error(line(error))
        return None
    code = f"x = torch.tensor([{x[0].tolist()}])"
    return Shown(
        hashlib.sha256(str(x.tolist()).encode()).hexdigest(),
        "your text",
        x,
        None,
        tuple(x[0].tolist()),
        code,
    )


def show_input(model: HookedModel, shown: Shown, width: int = 224) -> None:
    """The input as people see it."""
    if shown.picture is not None:
        st.image(shown.picture, width=width, caption=shown.name)
    elif isinstance(model.input, TokenInput):
        st.caption(shown.name)
        gap = "" if model.input.vocabulary else " "
        st.code(gap.join(model.input.word(t) for t in shown.tokens), language=None, wrap_lines=True)
