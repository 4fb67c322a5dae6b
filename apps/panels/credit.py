"""Which units and which pixels are responsible for what a model says."""

from __future__ import annotations

from shlex import quote
from typing import cast, get_args

import numpy as np
import streamlit as st

from apps import cached
from apps.address import TROUBLE, code, line, link, named, part, plain
from apps.inputs import picture_of
from apps.showing import show_picture
from circuits.attribution.channels import ChannelMethod
from circuits.examples import Examples
from circuits.figures.tunings import overlaid
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.saliency.maps import METHODS
from circuits.saliency.maps import Method as PixelMethod
from circuits.units import Unit
from circuits.workspace import ModelRecord

LISTED = 12
FAST = ("gradient_x_input", "integrated_gradients", "grad_cam", "relevance")
"""Methods offered first."""


@part
def credit_panel(record: ModelRecord, model: HookedModel, one: Examples, site: str) -> None:
    """Which units, and which pixels, are responsible for a target."""
    st.subheader("What is responsible")
    target = st.text_input(
        "Target: top, class:NAME, token:WORD or SITE:INDEX", "top", key="own-target", max_chars=200
    )
    method: ChannelMethod = st.segmented_control(
        "Units by",
        get_args(ChannelMethod),
        default="activation_x_gradient",
        key="own-units-by",
        required=True,
    )
    try:
        found = cached.attributed(model, one, site, target, method)
    except (*TROUBLE, TypeError) as error:
        st.warning(line(error))
    else:
        label = cached.label_of(record)
        rows = [
            {"unit": named(model, Unit(found.site, i)), "share": share}
            for i, share in found.top(0, LISTED)
        ]
        st.dataframe(rows, hide_index=True, width="content")
        check = found.check
        agreed = (
            ""
            if check is None
            else f" Rank correlation with true ablation {check.correlation:.2f} (by chance up to {check.chance:.2f})."
        )
        st.caption(
            f"{code(found.aims[0])}: {found.target_values[0]:.3g}. {plain(found.method)}.{agreed} Seed {found.seed:d}."
        )
        with st.container(horizontal=True):
            for i, _ in found.top(0, 5):
                link("unit", f"{site}:{i}", model=label, site=site, unit=i)
    if isinstance(model.input, ImageInput):
        _pixels(model, one, target)


def _pixels(model: HookedModel, one: Examples, target: str) -> None:
    others = tuple(m for m in METHODS if m not in FAST)
    method = st.selectbox("Pixels by", (*FAST, *others), key="own-pixels-by")
    if not st.toggle("Attribution to pixels", key="own-pixels"):
        return
    try:
        found = cached.salient(model, one, target, cast(PixelMethod, method))
    except (*TROUBLE, TypeError) as error:
        st.warning(line(error))
        return
    picture = picture_of(one)
    assert picture is not None, "an image"
    heat = found.heat()[0].numpy()
    show_picture(overlaid(np.asarray(picture) / 255, heat), "what pixels are responsible", 320)
    which = code(f"circuits sanity {quote(model.name)}")
    st.caption(
        f"{plain(method)}: red for, blue against {code(found.aims[0])}. {which} says which to believe."
    )
