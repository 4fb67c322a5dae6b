"""The curve detector, live: turn the stimulus and watch its layers; and the case's evidence."""

from __future__ import annotations

import numpy as np
import streamlit as st
import torch

from apps import cached, editing
from apps.address import TROUBLE, line, link, part, python
from apps.panels.evidence import evidence_panel
from apps.showing import show, show_picture
from circuits.cleanroom.families import angles_of
from circuits.cleanroom.network import FAMILIES
from circuits.figures import layers_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.images import to_image
from circuits.stimuli.patterns import arcs

LAYERS = ("gabor", "complex", "line", "early", "curve")


def page() -> None:
    """The page of the case."""
    st.title("A curve detector, written by hand")
    record = next((r for r in cached.workspace().models() if r.spec == "cleanroom"), None)
    if record is None:
        st.info("The workspace has no `cleanroom` yet: `circuits demo` builds it.")
        return
    try:
        model = cached.model_of(record)
    except TROUBLE as error:
        st.error(line(error))
        return
    _live(model)
    evidence_panel()


@part
def _live(model: HookedModel) -> None:
    """A curve under the person's hand, and what each layer makes of it."""
    left, right = st.columns([1, 2])
    with left:
        angle = st.slider("Bulges at, degrees", 0, 355, 90, 5, key="case-angle")
        radius = st.slider("Radius, pixels", 12, 80, 30, 2, key="case-radius")
        thickness = st.slider("Thickness, pixels", 1.0, 10.0, 4.0, 0.5, key="case-thick")
        light = st.toggle("Light on dark", key="case-light")
        recipe = editing.recipe(model.intact_hash)
        ink, paper = (1.0, 0.0) if light else (0.0, 1.0)
        spec = model.input
        assert isinstance(spec, ImageInput), "the clean room sees"
        image = arcs(
            torch.tensor([float(angle)]),
            float(radius),
            spec.height,
            thickness=thickness,
            ink=ink,
            paper=paper,
        )
        show_picture(to_image(image[0]), "the drawn curve", 256)
        if recipe.edits:
            st.caption(f"With your {len(recipe.edits)} edits in force.")
        link(
            "edits",
            "Edit the network",
            model="cleanroom",
            on=f"curve:{24 + round(angle / 15) % 24}",
        )
    key = f"{angle} {radius} {thickness} {light}"
    active = cached.answers_to(model, recipe, LAYERS, image, key)
    with right:
        families = {layer: _families(layer, active[layer]) for layer in LAYERS}
        show(layers_figure(families, angle), "layers")
    python(f"""
import circuits
import torch
from circuits.stimuli.patterns import arcs
from circuits.tuning.responding import responses

model = circuits.load_model("cleanroom")
image = arcs(torch.tensor([{angle}.0]), {radius}.0, {spec.height}, thickness={thickness}, ink={ink}, paper={paper})
for layer in {LAYERS}:
    print(layer, responses(model, layer, [image]))
""")


def _families(layer: str, active: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """A layer's families that have an angle: name, angles (lines at both ends), activations."""
    found, start = [], 0
    for family in FAMILIES[layer]:
        own = active[start : start + len(family)]
        start += len(family)
        if not family[0].period:
            continue
        angles = angles_of(family).numpy() % 360
        if family[0].period == 180:
            angles, own = np.concatenate([angles, (angles + 180) % 360]), np.concatenate([own, own])
        about = f" of radius {family[0].radius:g}" if family[0].radius else ""
        about += "" if family[0].phase is None else f" of phase {family[0].phase:g}°"
        found.append((f"{family[0].kind}{about}", angles, own))
    return found
