"""The input that a page is about: an example of the data, a person's own picture, or a text.

What a person brings stays in their session's memory: nothing of it is written, its name is never a path.
"""

from __future__ import annotations

import streamlit as st
from PIL import Image

from apps import cached
from apps.address import choose, line, plain
from apps.showing import show_picture
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.stimuli.spelling import words_of
from circuits.stimuli.uploads import decode_image
from circuits.workspace import ModelRecord

OWN = "your own"
_TYPES = ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"]
_LONGEST = 20_000
"""Characters of a text."""


def picture_of(one: Examples) -> Image.Image | None:
    """An image as the model sees it, for people; None of a text."""
    spec = one.model.input
    return spec.fit(one.picture(0)).convert("RGB") if isinstance(spec, ImageInput) else None


def code_of(one: Examples) -> str:
    """The Python that makes an example."""
    if one.data == "pictures":
        made = 'pictures(model, [PIL.Image.open("your picture.png")])'
    elif one.data == "texts":
        made = f"texts(model, [{one.tokens(0)}])"
    else:
        return f"examples = circuits.Examples(model, {one.data!r}, None).subset([{one.numbers[0]}])"
    return f"examples = circuits.Examples.{made}"


def choose_input(record: ModelRecord, model: HookedModel) -> Examples | None:
    """One example from the model's data, or the person's own; None, after saying why, if there is none yet."""
    stores = {s.provenance.data: s for s in cached.stores_of(record)}
    where = choose("Input from", [*stores, OWN], "from")
    if where == OWN:
        return _own_picture(model) if isinstance(model.input, ImageInput) else _own_text(model)
    try:
        examples = cached.examples_of(model, stores[where])
    except (ValueError, OSError, ImportError) as error:
        st.warning(f"The examples cannot be shown: {line(error)}")
        return None
    names = examples.names
    options = [str(i) for i in range(len(names))]
    index = choose("Example", options, "example", show=lambda i: f"{i} · {names[int(i)]}")
    return examples.subset([int(index)])


def _own_picture(model: HookedModel) -> Examples | None:
    file = st.file_uploader(
        "A picture, at most 20 MB", type=_TYPES, key="upload", max_upload_size=20
    )
    if file is not None:
        try:
            picture = decode_image(file.getvalue(), file.name)
        except ValueError as error:
            st.error(line(error))
            return None
        st.session_state["own picture"] = picture
    kept: Image.Image | None = st.session_state.get("own picture")
    if kept is None:
        st.info("Choose a picture from your computer: it stays in this session's memory.")
        return None
    return Examples.pictures(model, [kept], ["your picture"])


def _own_text(model: HookedModel) -> Examples | None:
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
        return Examples.texts(model, [text], ["your text"])
    except (ValueError, KeyError) as error:
        st.error(line(error))
        return None


def show_input(one: Examples, width: int = 224) -> None:
    """An example as people see it."""
    spec, picture = one.model.input, picture_of(one)
    if picture is not None:
        show_picture(picture, one.names[0], width)
        st.caption(plain(one.names[0]))
    elif isinstance(spec, TokenInput):
        st.caption(plain(one.names[0]))
        gap = "" if spec.vocabulary else " "
        words = words_of(spec.vocabulary, one.tokens(0))
        st.code(gap.join(words), language=None, wrap_lines=True)
