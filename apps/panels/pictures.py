"""A unit's pictures: what excites it most and least, other ways, and how far to trust them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from apps import cached
from apps.address import line, plain
from apps.showing import show_picture
from circuits.examples import Examples
from circuits.featurevis.badges import natural_responses, reliability
from circuits.featurevis.pictures import Picture, read_facts
from circuits.featurevis.render import Settings, visualize_units
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.images import open_picture
from circuits.units import Unit

STEPS, WIDTH, DIVERSE, COMPARED = 128, 260, 4, 100
"""Steps of a picture, its width on the page, how many diverse ones, images that a badge compares with."""

KINDS = {
    "positive": "What excites it most",
    "diverse": "Other ways to excite it",
    "negative": "What it is least active on",
}


@dataclass(frozen=True)
class Made:
    """A picture in the workspace."""

    path: Path
    facts: dict[str, Any]


def pictures_of(unit: Unit, model_hash: str) -> dict[str, list[Made]]:
    """A unit's pictures by kind, newest first."""
    found: dict[str, list[Made]] = {kind: [] for kind in KINDS}
    for path in cached.workspace().pictures(model_hash, unit):
        try:
            facts = read_facts(path)
        except OSError:
            continue  # not a picture, or gone since
        found.setdefault(str(facts.get("kind", "positive")), []).append(Made(path, facts))
    return found


def picture_panel(
    model: HookedModel, unit: Unit, model_hash: str, examples: Examples | None
) -> None:
    """The unit's feature visualizations, and buttons that make what is missing."""
    st.subheader(KINDS["positive"])
    if not isinstance(model.input, ImageInput):
        st.caption("Feature visualization needs image inputs; this model takes tokens.")
        return
    made = pictures_of(unit, model_hash)
    missing = not made["positive"]
    if missing:
        place = st.empty()
        with place.container():
            _stand_in(model_hash, unit)
            wanted = st.button("Make the picture", key="make-picture")
        if wanted:
            _make(model, unit, model_hash)
            made = pictures_of(unit, model_hash)
            if made["positive"]:
                place.empty()
    if made["positive"]:
        _show(made["positive"][0])
        _badge(model, unit, model_hash, made["positive"][0], examples)
    with st.expander("Negative and diverse pictures", expanded=bool(made["negative"])):
        for kind, label in (("negative", "least"), ("diverse", "diverse")):
            st.caption(KINDS[kind])
            if not made[kind] and st.button(f"Make {label}", key=f"make-{kind}"):
                _make(model, unit, model_hash, kind)
                made = pictures_of(unit, model_hash)
            for column, one in zip(st.columns(DIVERSE), made[kind][:DIVERSE], strict=False):
                show_picture(one.path, f"{label} picture of {unit}", place=column)
                column.caption(f"{one.facts.get('activation', float('nan')):.3g}")


def _stand_in(model_hash: str, unit: Unit) -> None:
    """What excites the unit most, as long as there is no picture of it."""
    face = cached.faces_by_hash(model_hash).get(unit)
    if face is not None and (small := cached.thumbnail(face, WIDTH)):
        show_picture(small, face.about, WIDTH)
        st.caption(f"No feature visualization yet: {plain(face.about)}.")
    else:
        st.caption("No picture yet.")


def _make(model: HookedModel, unit: Unit, model_hash: str, kind: str = "positive") -> None:
    bar = st.progress(0.0, f"{STEPS} steps of gradient ascent")
    try:
        cached.workspace().writable()  # before the work
        pictures = visualize_units(
            model,
            [unit],
            negative=kind == "negative",
            diverse=DIVERSE if kind == "diverse" else 1,
            steps=STEPS,
            progress=lambda done, total: bar.progress(done / total),
        )
    except (ValueError, OSError) as error:
        st.warning(line(error))
        return
    finally:
        bar.empty()
    for i, picture in enumerate(pictures):
        _save(picture, unit, model_hash, "" if kind == "positive" else f"-{kind}{i}")


def _save(picture: Picture, unit: Unit, model_hash: str, variant: str, **more: Any) -> None:
    size = picture.image.shape[-1]
    how = f"{picture.steps}steps-{size}px-seed{picture.seed}{variant}"
    picture.save(cached.workspace().picture_path(model_hash, str(unit), how), more)


def _show(made: Made) -> None:
    with open_picture(made.path) as image:
        show_picture(
            image.resize((WIDTH, WIDTH), Image.Resampling.LANCZOS), "feature visualization", WIDTH
        )
    facts = made.facts
    if {"activation", "start_activation", "steps", "seed"} <= set(facts):
        st.caption(
            f"Mean activation {facts['activation']:.3g}; the random start gave "
            f"{facts['start_activation']:.3g}. {plain(str(facts['steps']))} steps, seed "
            f"{plain(str(facts['seed']))}."
        )


def _badge(
    model: HookedModel, unit: Unit, model_hash: str, made: Made, examples: Examples | None
) -> None:
    """How far the picture can be trusted, or a button that measures it."""
    badge = made.facts.get("reliability")
    if not isinstance(badge, dict) or "examples" not in badge:  # or one of an older version
        badge = None
        if examples is not None and st.button("How far can it be trusted?", key="make-badge"):
            with st.spinner("Making it from another seed and on shuffled weights…"):
                badge = _measured(model, unit, model_hash, examples)
        if badge is None:
            return
    compared = badge["examples"]
    st.metric(
        "Reliability",
        f"{badge['score']:.2f}",
        help="Geometric mean of five measurements in 0..1. It does not say that the picture shows all "
        "that excites the unit, nor what the unit is for.",
    )
    st.caption(
        f"The same made on shuffled weights: {badge['randomized_score']:.2f}. Reaches "
        f"{badge['reached']:.2g} × the top example; keeps {badge['held_out']:.0%} when changed; seeds "
        f"agree to {badge['seeds']:.0%}; way through the network {badge['natural']:.2f} (1: as among top "
        f"examples, 0: as other images). {plain(compared['data'])}: {plain(compared['chosen'])}; seed "
        f"{plain(str(badge['seed']))}."
    )
    for flag in badge["flags"]:
        st.warning(f"This picture {plain(flag)}")


def _measured(
    model: HookedModel, unit: Unit, model_hash: str, examples: Examples
) -> dict[str, Any] | None:
    """Make the picture again with its badge, and keep both."""
    settings = Settings(steps=STEPS)
    try:
        cached.workspace().writable()
        compared = Examples(model, examples.source, COMPARED)
        natural = natural_responses(model, unit.site, compared)
        pictures = visualize_units(model, [unit], **settings.options())
        found = reliability(model, pictures, natural, settings)[0].to_dict()
    except (ValueError, OSError) as error:
        st.warning(line(error))
        return None
    _save(pictures[0], unit, model_hash, "", reliability=found)
    return found
