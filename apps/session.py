"""What pages share: the workspace, loaded models, cached results, the choice in the URL (layer 7).

The only file with `st.cache_*`. Everything is keyed by the model's hash, so that other weights never
show old results.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from circuits.autoencoders import FILE, Autoencoder, load_autoencoder
from circuits.edits.activations import zero
from circuits.edits.recipes import Recipe, edited
from circuits.effects import EditReport, Prediction, measure, predictions
from circuits.harvesting import Inputs, find_stores
from circuits.models.adapter import HookedModel
from circuits.models.loading import find_autoencoder, list_autoencoders, load_model
from circuits.models.receptive import ReceptiveField, receptive_field
from circuits.stimuli.sources import Source, open_source
from circuits.store import ActivationStore
from circuits.units import Unit
from circuits.weights import Connection, incoming, outgoing
from circuits.workspace import TRUST_PYTHON, ModelRecord, Workspace


def workspace() -> Workspace:
    """The workspace that the app was started on."""
    return Workspace.default()


def _check_trust(what: str) -> None:
    if not os.environ.get(TRUST_PYTHON):
        raise ValueError(
            f"{what} would run its own code: if you trust it, start the app with "
            "`circuits app --trust-python`"
        )


@st.cache_resource(show_spinner="Loading the model…")
def _model(spec: str, weights: str | None, model_hash: str) -> HookedModel:
    if spec.startswith("python:"):
        _check_trust(f"model {spec}")
    model = load_model(spec, weights)
    if model.hash != model_hash:
        raise ValueError(
            f"model {spec} has other weights ({model.hash[:16]}) than the workspace's "
            f"{model_hash[:16]}: harvest it again"
        )
    return model


def model_of(record: ModelRecord) -> HookedModel:
    """The model of a workspace record, shared by all sessions; its `lock` keeps them apart.

    Raises:
        ValueError, OSError, ImportError: if it cannot be loaded or is not what it was.
    """
    return _model(record.spec, record.weights, record.hash)


def stores_of(record: ModelRecord) -> list[ActivationStore]:
    """The finished stores of a model, as the disk has them now."""
    return list(find_stores(workspace(), record.hash))


@st.cache_resource(show_spinner="Opening the data…", max_entries=8)
def _inputs(model_hash: str, data: str, data_hash: str, _model: HookedModel) -> Inputs:
    if data.startswith("python:"):
        _check_trust(f"data {data}")
    source: Source = open_source(data)
    if source.hash != data_hash:
        raise ValueError(f"data {data} is not what it was when the model was harvested on it")
    return Inputs(_model, source)


def inputs_of(model: HookedModel, store: ActivationStore) -> Inputs:
    """The examples that a store was made from.

    Raises:
        ValueError, OSError: if they are gone or have changed.
    """
    p = store.provenance
    return _inputs(p.model_hash, p.data, p.data_hash, model)


@st.cache_data(show_spinner="Finding what it sees…", max_entries=4096)
def _field(model_hash: str, site: str, _model: HookedModel) -> ReceptiveField:
    return receptive_field(_model, _model.site(site))


def field_of(model: HookedModel, site: str, model_hash: str) -> ReceptiveField:
    """Which input pixels a site's units see."""
    return _field(model_hash, site, model)


@st.cache_resource(show_spinner="Reading the weights…")
def _connections(
    model_hash: str, unit: str, top: int, _model: HookedModel
) -> tuple[list[Connection], list[Connection]]:
    return incoming(_model, unit, top), outgoing(_model, unit, top)


def connections_of(
    model: HookedModel, unit: Unit, model_hash: str, top: int = 5
) -> tuple[list[Connection], list[Connection]]:
    """The strongest weights into a unit and out of it."""
    return _connections(model_hash, str(unit), top, model)


@st.cache_data(show_spinner=False, max_entries=512)
def _intact(
    model_hash: str, data: str, example: int, _model: HookedModel, _inputs: Inputs
) -> list[Prediction]:
    return predictions(_model, _inputs.batch(range(example, example + 1)))


def intact(model: HookedModel, inputs: Inputs, example: int, model_hash: str) -> list[Prediction]:
    """The model's top predictions for one example."""
    return _intact(model_hash, inputs.source.hash, example, model, inputs)


@dataclass(frozen=True)
class Ablation:
    """What removing a unit does to one example: the same outputs' new probabilities, and the measure."""

    predictions: list[Prediction]
    report: EditReport


@st.cache_resource(show_spinner="Ablating…", max_entries=512)
def _ablated(
    model_hash: str, unit: str, data: str, example: int, _model: HookedModel, _inputs: Inputs
) -> Ablation:
    x = _inputs.batch(range(example, example + 1))
    recipe = Recipe.of(_model, [zero(unit)])
    before = predictions(_model, x)
    with edited(_model, recipe):
        after = predictions(_model, x, of=[p.index for p in before])
    return Ablation(after, measure(_model, recipe, x, data=_inputs.source.spec))


def ablated(
    model: HookedModel, unit: Unit, inputs: Inputs, example: int, model_hash: str
) -> Ablation:
    """The same without a unit. The edit holds only while this runs: other sessions never see it."""
    return _ablated(model_hash, str(unit), inputs.source.hash, example, model, inputs)


def label_of(record: ModelRecord) -> str:
    """A model's name, with its hash where two sets of weights share it."""
    same = [r for r in workspace().models() if r.spec == record.spec]
    return record.spec if len(same) == 1 else f"{record.spec} {record.hash[:8]}"


def autoencoders() -> dict[str, Path]:
    """The workspace's autoencoders: their files by name."""
    return list_autoencoders(workspace())


@st.cache_resource(show_spinner="Loading the autoencoder…", max_entries=8)
def _autoencoder(path: str, written: int) -> Autoencoder:
    return load_autoencoder(path)


def autoencoder_of(path: Path) -> Autoencoder:
    """An autoencoder, as its file is now.

    Raises:
        ValueError, OSError: if it cannot be read.
    """
    return _autoencoder(str(path), path.stat().st_mtime_ns)


def record_with(path: Path) -> ModelRecord | None:
    """The model of the workspace that has this autoencoder attached, and no other."""
    for record in workspace().models():
        _, *attached = record.spec.split("+")
        if len(attached) == 1:
            try:
                found = find_autoencoder(attached[0], workspace())
            except FileNotFoundError:
                continue
            if (found / FILE if found.is_dir() else found).resolve() == path.resolve():
                return record
    return None


def choose(label: str, options: Sequence[str], parameter: str) -> str:
    """A select box in the sidebar whose choice is the URL's `parameter`."""
    key = f"choose-{parameter}"
    wanted = st.query_params.get(parameter)
    if wanted is not None and wanted not in options:
        shown = wanted[:80].replace("`", "'")  # as code: a link in a URL must not become one here
        st.warning(f"There is no {label.lower()} `{shown}` here: showing `{options[0]}`.")
        wanted = None
    value = wanted or options[0]
    st.session_state[key] = value
    st.query_params[parameter] = value

    def changed() -> None:
        st.query_params[parameter] = st.session_state[key]

    return st.sidebar.selectbox(label, options, key=key, on_change=changed)


def go_to(unit: Unit) -> None:
    """Make `unit` the page's choice."""
    st.query_params["site"] = unit.site
    st.query_params["unit"] = str(unit.index)
