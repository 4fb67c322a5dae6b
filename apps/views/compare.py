"""Two units side by side, of one model or of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import streamlit as st

from apps import cached
from apps.address import TROUBLE, choose, choose_model, line, link, named, plain
from apps.inputs import picture_of
from apps.showing import show, show_picture
from circuits.edits.recipes import Recipe
from circuits.figures import histogram_figure, tuning_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.store import ActivationStore, UnitStatistics
from circuits.tuning import RadialTuning
from circuits.units import Unit
from circuits.workspace import ModelRecord

STRONGEST = 6


@dataclass(frozen=True)
class Side:
    """One of the two units."""

    name: str
    record: ModelRecord
    model: HookedModel
    unit: Unit

    @property
    def store(self) -> ActivationStore | None:
        """Activations of its site, if there are any."""
        stores = cached.stores_of(self.record)
        return next((s for s in stores if self.unit.site in s.sites), None)


def page() -> None:
    """The page that compares two units."""
    st.title("Compare")
    labels = [cached.label_of(r) for r in cached.workspace().models()]
    if not labels:
        choose_model()  # says what to do
        return
    columns = {"unit": "model", "other": "other_model"}
    places = dict(zip(columns, st.columns(2), strict=True))
    sides = []
    for name, model_name in columns.items():
        with places[name]:
            sides.append(_chosen(name, model_name, labels))
    here = [side for side in sides if side is not None]
    statistics = {s.name: store.statistics(s.unit) for s in here if (store := s.store) is not None}
    wanted = []
    for side in here:
        with places[side.name]:
            _harvested(side, statistics)
            if _tunable(side) and st.toggle("Tuning", key=f"compare-tuning-{side.name}"):
                wanted.append(side)
    tuned = {s.name: cached.tuning_of(s.model, Recipe((), s.record.hash), s.unit) for s in wanted}
    for name in tuned:
        with places[name]:
            _tuning(name, tuned)


def _chosen(name: str, model_name: str, labels: list[str]) -> Side | None:
    """One of the two as the person chooses it, kept in the URL."""
    if model_name not in st.query_params:
        st.query_params[model_name] = st.query_params.get("model", labels[0])
    label = choose("Model", labels, model_name, sidebar=False)
    record = next(r for r in cached.workspace().models() if cached.label_of(r) == label)
    if name not in st.query_params:
        st.query_params[name] = _usual(record, 0 if name == "unit" else 1)
    address = st.text_input(
        "Unit, SITE:INDEX", st.query_params.get(name, ""), key=f"compare-{name}", max_chars=200
    )
    st.query_params[name] = address
    if not address.strip():
        st.caption("Type a unit, such as `SITE:0`.")
        return None
    try:
        model = cached.model_of(record)
        unit = model.unit(address)
    except TROUBLE as error:
        st.error(line(error))
        return None
    st.subheader(plain(named(model, unit)))
    st.caption(plain(f"{model.name} · weights {record.hash[:16]}"))
    link("unit", "Its page", model=label, site=unit.site, unit=unit.index)
    face = cached.faces(record).get(unit)
    if face is not None and (small := cached.thumbnail(face, 224)):
        show_picture(small, face.about, 224)
    return Side(name, record, model, unit)


def _usual(record: ModelRecord, index: int) -> str:
    """A unit to begin with: of the last site that was harvested; empty if none was."""
    sites = [site for store in cached.stores_of(record) for site in store.provenance.sites]
    wide = [site for site in sites if site.n_units > index]
    return str(wide[-1].unit(index)) if wide else ""


def _harvested(side: Side, statistics: Mapping[str, UnitStatistics]) -> None:
    """How active the unit is, on the same axes as the other one, and its strongest examples."""
    store = side.store
    if store is None:
        st.info(f"No activations of {plain(side.unit.site)} yet.")
        return
    own = statistics[side.name]
    show(histogram_figure(own, list(statistics.values())), f"compare-histogram-{side.name}")
    st.caption(f"on {len(store.provenance.examples)} examples of {plain(store.provenance.data)}")
    try:
        examples = cached.examples_of(side.model, store)
    except TROUBLE as error:
        st.warning(line(error))
        return
    for column, example in zip(
        st.columns(STRONGEST), store.top_examples(side.unit, STRONGEST), strict=False
    ):
        shown = picture_of(examples.subset([example.index]))
        if shown is not None:
            show_picture(shown, f"example {example.name}", place=column)
        column.caption(plain(str(example)))


def _tunable(side: Side) -> bool:
    spec = side.model.input
    return isinstance(spec, ImageInput) and spec.channels in (1, 3)


def _tuning(name: str, tuned: Mapping[str, RadialTuning]) -> None:
    """How the unit is tuned, on the same axes as the other one."""
    own = tuned[name]
    show(tuning_figure([own], compared_with=list(tuned.values())), f"compare-curve-{name}")
    m = own.measures
    st.caption(
        f"mean direction {m.direction.value:.0f}°, full width at half maximum {m.fwhm.value:.0f}°, "
        f"echo {m.echo.value:.2f}"
    )
