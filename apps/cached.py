"""What pages share: the workspace, loaded models and cached results.

The only file with `st.cache_*`. Everything is keyed by the model's hash (and edits, data, inputs by theirs), so
that other weights never show old results. What sessions share is never changed: edits hold inside one call.
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from PIL import Image
from torch import Tensor

from apps.preparing import ALONE
from apps.showing import spec_of
from circuits.attribution import Attribution, LogitParts, attribute, direct_logit_attribution
from circuits.attribution.channels import ChannelMethod
from circuits.autoencoders import FILE, Autoencoder, load_autoencoder
from circuits.claims import ClaimFile, Report, read_claims
from circuits.claims.kept import Kept, kept_claims
from circuits.claims.report import read_report
from circuits.concepts import Bottleneck, Intervention, intervene, train_bottleneck
from circuits.concepts.bottleneck import Accuracy, InterventionReport
from circuits.discovery import Discovery, EdgeGraph, discover, edge_graph
from circuits.discovery.building import chosen_latents
from circuits.discovery.finding import Stage
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import Method as ScoringMethod
from circuits.discovery.searching import Search
from circuits.discovery.streams import KeysValues
from circuits.edits.recipes import Recipe, edited
from circuits.edits.records import canonical
from circuits.effects import EditReport, Prediction, measure, predictions, token_losses
from circuits.examples import Examples
from circuits.experiments import INTACT, Variant, run
from circuits.experiments.patched_runs import Direction
from circuits.faces import Face, faces_of
from circuits.factories import from_file
from circuits.figures import attention_figure, heads_figure
from circuits.graph.circuit import Node
from circuits.graph.store import FILE as GRAPH
from circuits.graph.store import GraphStore
from circuits.harvesting import find_stores
from circuits.localization import (
    AttentionPatterns,
    HeadScores,
    ImageAttention,
    Lens,
    PatchGrid,
    attention_patterns,
    image_attention,
    logit_lens,
    patch_grid,
    query_names,
    score_heads,
)
from circuits.localization.attention import attention_of as attention_of_site
from circuits.localization.cells import By
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.randomizing import randomized
from circuits.models.paths.receptive import ReceptiveField, receptive_field
from circuits.models.paths.selecting import select_sites
from circuits.models.zoo.loading import find_autoencoder, list_autoencoders, load_model
from circuits.saliency import saliency_map
from circuits.saliency.maps import Method as PixelMethod
from circuits.specs import split_attached
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source, open_source
from circuits.stimuli.spelling import marked, word_of
from circuits.store import ActivationStore
from circuits.tasks import Task, of_examples
from circuits.tasks.builtin import STATED, names_of
from circuits.tasks.spec import TaskSpec
from circuits.tasks.targets import Target, output_site
from circuits.tuning import HeatMap, RadialTuning, heat_map, radial_tuning
from circuits.tuning.responding import responses
from circuits.unit_maps import Method, UnitMap, response_map, weight_map
from circuits.units import Site, Unit
from circuits.weights import (
    Connection,
    LiveGraph,
    Through,
    TokenPairs,
    both_ways,
    build_graph,
    expand_weights,
    incoming_through,
    joined_tokens,
    written_logits,
)
from circuits.weights.connections import not_written
from circuits.weights.token_pairs import Way, writing_logits
from circuits.workspace import ModelRecord, Workspace

TURN = 10.0
"""Degrees from drawing to drawing in tuning curves."""

KEPT = 512
"""Reports of edits that are kept."""

FOUND = 16
"""Circuits that were found that are kept, with the scores of all edges on all examples."""

RANDOM = 19
"""Random edits that a page compares with, where an answer is wanted soon; the command line takes more."""


def workspace() -> Workspace:
    """The workspace that the app was started on."""
    return Workspace.default()


TRUSTING = "start the app with `circuits app --trust-python`"
"""What to do to run code that a workspace names."""


@st.cache_resource(show_spinner="Loading the model…")
def _model(spec: str, weights: str | None, dtype: str, model_hash: str) -> HookedModel:
    from_file("model", spec, "the workspace", TRUSTING)
    with ALONE:
        model = load_model(spec, weights, dtype=dtype or None)
    outdated = workspace().recognise(model.identity)
    if model.hash != model_hash:
        if model.weights_hash == model_hash:
            raise ValueError(outdated)
        raise ValueError(
            f"model {spec} is another one ({model.hash[:16]}) than the workspace's {model_hash[:16]}: "
            "harvest it again"
        )
    return model


def model_of(record: ModelRecord) -> HookedModel:
    """The model of a workspace record, shared by all sessions; its `lock` keeps them apart.

    Raises:
        ValueError, OSError, ImportError: if it cannot be loaded or is not what it was.
    """
    return _model(record.spec, record.weights, record.dtype, record.hash)


@st.cache_resource(show_spinner=False, max_entries=16)
def _output_names(model_hash: str, _model: HookedModel) -> Sequence[str]:
    if isinstance(_model.input, TokenInput):
        words = _model.input.vocabulary
        return [marked(word_of(words, i)) for i in range(len(words))]
    return _model.classes


def output_names(model: HookedModel) -> Sequence[str]:
    """What a model's outputs are called: its classes, or the tokens with their blanks marked; empty if unknown."""
    return _output_names(hash_of(model), model)


@st.cache_resource(show_spinner=False, max_entries=64)
def _own_hash(place: int, _model: HookedModel) -> tuple[str, HookedModel]:
    return (
        _model.intact_hash,
        _model,
    )  # with the model, so that no other comes to its place in memory


def hash_of(model: HookedModel) -> str:
    """The hash of a model that sessions share, computed once: of a language model it takes a second.

    Nothing changes what sessions share but edits, and those hold inside one call under the model's lock.
    """
    return _own_hash(id(model), model)[0]


def _as_edited(model: HookedModel, recipe: Recipe) -> AbstractContextManager[HookedModel]:
    """The model with edits; without any as it is, since checking that a recipe belongs to it hashes all weights."""
    return edited(model, recipe) if recipe.edits else nullcontext(model)


def stores_of(record: ModelRecord) -> list[ActivationStore]:
    """The finished stores of a model, as the disk has them now."""
    return list(find_stores(workspace(), record.hash))


@st.cache_resource(show_spinner="Opening the data…", max_entries=8)
def _examples(model_hash: str, data: str, data_hash: str, _model: HookedModel) -> Examples:
    source: Source = open_source(from_file("data", data, "the workspace", TRUSTING))
    if source.hash != data_hash:
        raise ValueError(f"data {data} is not what it was when the model was harvested on it")
    return Examples(_model, source, None, skip_bad=True)


def examples_of(model: HookedModel, store: ActivationStore) -> Examples:
    """The examples that a store was made from, all of them.

    Raises:
        ValueError, OSError: if they are gone or have changed.
    """
    p = store.provenance
    return _examples(p.model_hash, p.data, p.data_hash, model)


@st.cache_data(show_spinner=False, max_entries=64)
def _labels(data_hash: str, classes: tuple[str, ...], _source: Source) -> list[int] | None:
    with suppress(ValueError):  # they have none
        return read_labels(_source, classes)
    return None


def labels_of(model: HookedModel, store: ActivationStore) -> list[int] | None:
    """The class of each example that a store was made from, as their names tell; None if they do not.

    Raises:
        ValueError, OSError: if the examples are gone or have changed.
    """
    if not model.classes:
        return None
    return _labels(store.provenance.data_hash, model.classes, examples_of(model, store).source)


def tasks_of(model: HookedModel) -> list[str]:
    """The tasks that a model has by name, its own first."""
    return names_of(model)


@st.cache_resource(show_spinner="Making the task…", max_entries=64)
def _task(
    model_hash: str, name: str, n: int, seed: int, data_hash: str, _model: HookedModel,
    _store: ActivationStore | None,
) -> Task:  # fmt: skip
    if name not in STATED:
        return TaskSpec(name, n, seed).compile(_model)
    assert _store is not None, "these tasks need data"
    source = examples_of(_model, _store).source
    labels = labels_of(_model, _store) if name == "classes" else None
    return of_examples(Examples(_model, source, n, labels=labels, skip_bad=True).readable())


def task_of(
    model: HookedModel, name: str, n: int, store: ActivationStore | None = None, seed: int = 0
) -> Task:
    """A task by name; of those that examples state by themselves, on what a store was made from (without a seed).

    Raises:
        ValueError, OSError: if it does not fit the model, or the examples are gone or have changed.
    """
    data_hash = "" if store is None else store.provenance.data_hash
    return _task(hash_of(model), name, n, seed, data_hash, model, store)


def field_of(model: HookedModel, site: str) -> ReceptiveField:
    """Which input pixels a site's units see; the model remembers it."""
    with st.spinner("Finding what it sees…"):
        return receptive_field(model, model.site(site))


@st.cache_resource(show_spinner="Reading the weights…", max_entries=2048)
def _connections(
    model_hash: str, unit: str, top: int, _model: HookedModel
) -> tuple[list[Connection], list[Connection]]:
    return both_ways(_model, unit, top)


def connections_of(
    model: HookedModel, unit: Unit, model_hash: str, top: int = 5
) -> tuple[list[Connection], list[Connection]]:
    """The strongest weights into a unit and out of it."""
    return _connections(model_hash, str(unit), top, model)


@st.cache_resource(show_spinner="Reading the weights…", max_entries=2048)
def _through(model_hash: str, unit: str, top: int, _model: HookedModel) -> Through | None:
    if isinstance(_model.input, TokenInput) or not_written(_model, _model.unit(unit)):
        return None
    return incoming_through(_model, unit, top)


def through_of(model: HookedModel, unit: Unit, model_hash: str, top: int = 5) -> Through | None:
    """The strongest weights into a unit through the only unit that it reads, if there is only one."""
    return _through(model_hash, str(unit), top, model)


@st.cache_data(show_spinner=False, max_entries=1024)
def _predictions(
    model_hash: str, key: str, edits: str, of: tuple[int, ...], _model: HookedModel, _recipe: Recipe, _one: Examples
) -> list[Prediction]:  # fmt: skip
    with _as_edited(_model, _recipe):
        return predictions(_model, _one, of=of or None)


def predictions_of(
    model: HookedModel, recipe: Recipe, one: Examples, of: Sequence[int] = ()
) -> list[Prediction]:
    """What an edited model makes of one example: its top outputs, or those asked for.

    The edits hold only while this runs, under the model's lock: other sessions never see them.
    """
    key = one.identity(0)
    return _predictions(hash_of(model), key, identity(recipe), tuple(of), model, recipe, one)


@st.cache_data(show_spinner=False, max_entries=512)
def _losses(
    model_hash: str, key: str, edits: str, _model: HookedModel, _recipe: Recipe, _one: Examples
) -> np.ndarray:
    with _as_edited(_model, _recipe):
        return token_losses(_model, _one)[0].cpu().numpy()


def losses_of(model: HookedModel, recipe: Recipe, one: Examples) -> np.ndarray:
    """How surprised an edited model is by each token of a text but the first, in nats."""
    return _losses(hash_of(model), one.identity(0), identity(recipe), model, recipe, one)


def identity(recipe: Recipe) -> str:
    """What is the same for the same edits only."""
    return canonical([edit.to_dict() for edit in recipe.edits])


@st.cache_resource(show_spinner="Turning a curve about…", max_entries=256)
def _tuned(
    model_hash: str,
    unit: str,
    edits: str,
    radius: float | None,
    _model: HookedModel,
    _recipe: Recipe,
) -> RadialTuning:
    with _as_edited(_model, _recipe):
        return radial_tuning(_model, [unit], radii=[radius] if radius else None, step=TURN)[0]


def tuning_of(
    model: HookedModel, recipe: Recipe, unit: Unit, radius: float | None = None
) -> RadialTuning:
    """How a unit answers to a curve at every angle, in the edited model."""
    return _tuned(hash_of(model), str(unit), identity(recipe), radius, model, recipe)


@st.cache_resource(show_spinner="Bending and turning a curve…", max_entries=256)
def _heat(model_hash: str, unit: str, _model: HookedModel) -> HeatMap:
    return heat_map(_model, [unit], step=15.0)[0]


def heat_of(model: HookedModel, unit: Unit) -> HeatMap:
    """How a unit answers to curves of every angle and curvature."""
    return _heat(hash_of(model), str(unit), model)


@st.cache_resource(show_spinner=False)
def _reports() -> OrderedDict[tuple[str, ...], EditReport]:
    return OrderedDict()


def measured(
    model: HookedModel,
    recipe: Recipe,
    task: Task,
    progress: Callable[[int, int], object] | None = None,
) -> EditReport | None:
    """What edits do on a task, compared with random edits; without `progress` only if it is known already."""
    kept = _reports()  # by hand: a progress bar cannot be moved inside st.cache_*
    key = (hash_of(model), identity(recipe), task.hash)
    if key not in kept and progress is not None:
        kept[key] = measure(model, recipe, task, n_random=RANDOM, progress=progress)
        while len(kept) > KEPT:
            kept.popitem(last=False)
    return kept.get(key)


@dataclass(frozen=True)
class Parts:
    """Between which parts of a model edges lead, as on the command line; see `circuits.discovery.edge_graph`."""

    sites: tuple[str, ...] = ()
    kv: KeysValues = "group"
    spans: str = ""
    neurons: str = ""
    latents: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are not the usual ones."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


@dataclass(frozen=True)
class Finding:
    """How a circuit is looked for; see `circuits.discovery.discover`.

    Attributes:
        method: how edges are scored.
        search: how they are chosen.
        size: how many are kept.
        threshold: of `acdc`.
        ablation: what edges outside the circuit carry.
        seed: of everything random.
        parts: between which edges lead.
        direction: of `exact`.
        alternatives: how many further circuits are looked for.
    """

    method: ScoringMethod
    search: Search
    size: int | None
    threshold: float | None
    ablation: Ablation
    seed: int
    parts: Parts = Parts()
    direction: Direction = "noising"
    alternatives: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """As `discover` takes them, without the method."""
        names = ("search", "size", "threshold", "ablation", "seed", "direction", "alternatives")
        own = {name: getattr(self, name) for name in names}
        usual = {"direction": "noising", "alternatives": 0}
        return {n: v for n, v in own.items() if v is not None and (n, v) not in usual.items()}


@st.cache_resource(show_spinner="Looking for the model's edges…", max_entries=16)
def _edges(
    model_hash: str, parts: Parts, task_hash: str, _model: HookedModel, _task: Task
) -> EdgeGraph:
    settings = parts.settings
    if parts.latents:
        settings["latents"] = chosen_latents(_model, parts.latents, _task)
    return edge_graph(_model, **settings)


def edges_of(model: HookedModel, parts: Parts, task: Task) -> EdgeGraph:
    """The edges between the parts of a model; the task says which latents are active.

    Raises:
        ValueError, KeyError: if they cannot be found, or there is no such part.
    """
    return _edges(hash_of(model), parts, task.hash if parts.latents else "", model, task)


@st.cache_resource(show_spinner=False)
def _discoveries() -> OrderedDict[tuple[object, ...], Discovery]:
    return OrderedDict()


def discovered(
    model: HookedModel, task: Task, how: Finding, stage: Stage | None = None
) -> Discovery | None:
    """The circuit of a task with the evidence for it; without `stage` only if it is known already.

    Raises:
        ValueError: if a setting is out of range, or the task does not fit.
    """
    kept = _discoveries()
    key = (hash_of(model), task.hash, task.seed, how)
    if key not in kept and stage is not None:
        graph = edges_of(model, how.parts, task)
        kept[key] = discover(graph, task, how.method, n_random=RANDOM, stage=stage, **how.settings)
        while len(kept) > FOUND:
            kept.popitem(last=False)
    return kept.get(key)


@st.cache_resource(show_spinner=False, max_entries=4)
def _graph(folder: str, written: int, model_hash: str) -> GraphStore:
    return GraphStore(folder, model_hash)


MOST_EDGES = 300_000_000
"""Weights that are written to disk at most; of a model with more they are read as they are asked for."""


@st.cache_resource(show_spinner="Looking for what the model's weights connect…", max_entries=16)
def _live_graph(model_hash: str, _model: HookedModel) -> LiveGraph:
    return LiveGraph(_model)


def graph_of(record: ModelRecord, model: HookedModel) -> GraphStore | LiveGraph:
    """The model's weights as a graph on disk, which is written there the first time; of a large language model as they
    are asked for.

    Raises:
        ValueError, OSError: if the model has no weights between its sites, or it cannot be written or read.
    """
    folder = workspace().model_folder(record.hash)
    if not (folder / GRAPH).is_file():
        if isinstance(model.input, TokenInput):
            live = _live_graph(record.hash, model)
            if live.n_edges > MOST_EDGES:
                return live
        workspace().writable()
        with st.spinner("Gathering the model's weights…"):
            build_graph(model, folder).close()
    try:
        return _opened(folder, record.hash)
    except (
        ValueError,
        OSError,
        KeyError,
    ):  # damaged, or of another version: it is made from the weights
        workspace().writable()
        with st.spinner("Gathering the model's weights again…"):
            build_graph(model, folder).close()
        return _opened(folder, record.hash)


def _opened(folder: Path, model_hash: str) -> GraphStore:
    files = [folder / GRAPH, *sorted((folder / "graph").glob("*.h5"))]
    return _graph(str(folder), hash(tuple(f.stat().st_mtime_ns for f in files)), model_hash)


@st.cache_data(show_spinner="Expanding…", max_entries=256)
def _expanded(
    model_hash: str, source: str, target: str, _model: HookedModel
) -> tuple[np.ndarray, float]:
    a, b = Unit.parse(source), Unit.parse(target)

    def of(model: HookedModel) -> Tensor:
        return expand_weights(model, a.site, b.site, units=[b.index], sources=[a.index]).weight[
            0, 0
        ]

    return of(_model).numpy(), of(randomized(_model, 0)).norm().item()


def expanded_of(model: HookedModel, source: Unit, target: Unit) -> tuple[np.ndarray, float]:
    """The effect of a unit on another through everything between, and how strong it is in shuffled weights.

    Raises:
        KeyError, ValueError: if there is no way from one to the other, or it cannot be linearised.
    """
    return _expanded(hash_of(model), str(source), str(target), model)


@st.cache_data(show_spinner=False, max_entries=4096)
def _thumbnail(path: str, member: str, written: int, size: int, _face: Face) -> str:
    small = _face.picture().resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(face: Face, size: int = 64) -> str:
    """A face to be put into a page as it is; empty if it is a token, or its file cannot be read."""
    if face.kind == "token":
        return ""
    try:
        written = face.path.stat().st_mtime_ns
        return _thumbnail(str(face.path), face.member, written, size, face)
    except OSError:
        return ""


def faces(record: ModelRecord) -> Mapping[Unit, Face]:
    """The face of every unit of a model that has one."""
    return faces_by_hash(record.hash)


def faces_by_hash(model_hash: str) -> Mapping[Unit, Face]:
    """The same of the model with some weights."""
    folder = workspace().model_folder(model_hash)
    places = [
        folder / "pictures",
        folder / "faces",
        *sorted((folder / "sheets").glob("*/sheet.json")),
    ]
    stamp = [p.stat().st_mtime_ns for p in places if p.exists()]
    return _faces(model_hash, tuple(stamp))


@st.cache_resource(show_spinner=False, max_entries=16)
def _faces(model_hash: str, stamp: tuple[int, ...]) -> dict[Unit, Face]:
    return faces_of(workspace(), model_hash)


def thumbnails(faces: Mapping[Unit, Face], nodes: Iterable[Node]) -> dict[Node, str]:
    """The pictures of a circuit's nodes, to be put into a page; those that have none are left out."""
    found: dict[Node, str] = {}
    for node in nodes:
        if isinstance(node, Unit) and node in faces and (small := thumbnail(faces[node])):
            found[node] = small
    return found


@st.cache_data(show_spinner=False, max_entries=64)
def _site_table(folder: str, site: str, _store: ActivationStore) -> pd.DataFrame:
    summary = _store.summary(site)
    mean, std = summary.moments()
    largest = np.where(np.isnan(summary.maximum), -np.inf, summary.maximum)
    best = largest.argmax(0)
    return pd.DataFrame(
        {
            "unit": np.arange(len(mean)), "mean": mean, "std": std, "above 0 in %": 100 * summary.density(),
            "largest": largest.max(0), "largest example": [_store.provenance.examples[i] for i in best],
        }
    )  # fmt: skip


def site_table(store: ActivationStore, site: str) -> pd.DataFrame:
    """Every unit of a site with its statistics."""
    return _site_table(str(store.folder), site, store)


@st.cache_resource(show_spinner="Laying units out by what they answer to…", max_entries=64)
def _response_map(folder: str, site: str, method: Method, _store: ActivationStore) -> UnitMap:
    return response_map(_store, site, method)


@st.cache_resource(show_spinner="Laying units out by their weights…", max_entries=64)
def _weight_map(model_hash: str, site: str, method: Method, _model: HookedModel) -> UnitMap:
    return weight_map(_model, site, method)


def map_of(model: HookedModel, store: ActivationStore | None, site: str, method: Method) -> UnitMap:
    """A site's units in two dimensions: by responses, or by weights where there is no store.

    Raises:
        ValueError: if there are too few units.
    """
    if store is None:
        return _weight_map(hash_of(model), site, method, model)
    return _response_map(str(store.folder), site, method, store)


# --- prompts -------------------------------------------------------------------------------------


@st.cache_data(show_spinner=False, max_entries=512)
def _metric(
    model_hash: str, task_hash: str, edits: str, _model: HookedModel, _recipe: Recipe, _task: Task
) -> tuple[float, ...]:
    variants = [Variant("edited", _recipe.edits)] if _recipe.edits else []
    which = variants[0].name if variants else INTACT
    ways = (False,) if _task.counterparts is None else (False, True)
    made = [run(_model, variants, _task, measures=[_task.metric], corrupted=c) for c in ways]
    return tuple(outcomes.mean(_task.metric.name, which) for outcomes in made)


def metric_of(model: HookedModel, recipe: Recipe, task: Task) -> tuple[float, ...]:
    """A task's metric in the edited model: on its examples and, if there are any, on their counterparts."""
    return _metric(hash_of(model), task.hash, identity(recipe), model, recipe, task)


@st.cache_resource(show_spinner="Stopping at each layer…", max_entries=64)
def _lens(model_hash: str, task_hash: str, _model: HookedModel, _task: Task) -> Lens:
    return logit_lens(_model, _task, null=False)


def lens_of(model: HookedModel, task: Task) -> Lens:
    """A task's metric if the model stopped at each depth."""
    return _lens(hash_of(model), task.hash, model, task)


@st.cache_resource(show_spinner="Splitting the logit…", max_entries=64)
def _logit_parts(model_hash: str, task_hash: str, _model: HookedModel, _task: Task) -> LogitParts:
    question = _task.questions[0]
    if _task.feeding != "one" or not question.answers:
        raise ValueError("the task has no answer of one token: expected one to split its logit")
    right, wrong = question.answers[0][0], question.against[0][0] if question.against else None
    target = Target(output_site(_model).name, right, question.positions, against=wrong)
    return direct_logit_attribution(_model, _task.examples, target)


def logit_parts_of(model: HookedModel, task: Task) -> LogitParts:
    """What each part of a model adds directly to the logit of a task's answer, less that of the wrong one.

    Raises:
        ValueError: if the task asks for no single token, or the model's logits cannot be split.
    """
    return _logit_parts(hash_of(model), task.hash, model, task)


@st.cache_resource(show_spinner=False)
def _patched_grids() -> OrderedDict[tuple[str, str, By], PatchGrid]:
    return OrderedDict()


def patched(
    model: HookedModel, task: Task, by: By, progress: Callable[[int, int], object] | None = None
) -> PatchGrid | None:
    """Each cell of the counterpart put into the run on the example; without `progress` only if known."""
    kept = _patched_grids()
    key: tuple[str, str, By] = (hash_of(model), task.hash, by)
    if key not in kept and progress is not None:
        kept[key] = patch_grid(
            model, task, by=by, direction="noising", n_random=0, progress=progress
        )
        while len(kept) > FOUND:
            kept.popitem(last=False)
    return kept.get(key)


@st.cache_data(show_spinner=False, max_entries=16)
def _heads(model_hash: str, _model: HookedModel) -> dict[str, Unit]:
    try:
        sites = select_sites(_model, "pattern")
    except (KeyError, ValueError):  # it has none
        return {}
    return {
        f"{i}.{h}": Unit(site.name, h) for i, site in enumerate(sites) for h in range(site.n_units)
    }


def heads_of(model: HookedModel) -> Mapping[str, Unit]:
    """A model's heads, as units of their attention patterns, written `LAYER.HEAD`."""
    return _heads(hash_of(model), model)


@st.cache_data(show_spinner="Writing…", max_entries=64)
def _continued(
    model_hash: str, key: str, edits: str, n: int, _model: HookedModel, _recipe: Recipe, _one: Examples
) -> list[int]:  # fmt: skip
    with _as_edited(_model, _recipe):
        return _model.generate(_one.inputs, n)[0].tolist()


def continued(model: HookedModel, recipe: Recipe, one: Examples, n: int) -> list[int]:
    """A text and its n most likely next tokens in the edited model.

    Raises:
        ValueError: if the model is not causal, or the text would grow past its context.
    """
    return _continued(hash_of(model), one.identity(0), identity(recipe), n, model, recipe, one)


@st.cache_data(show_spinner=False, max_entries=512)
def _answers(
    model_hash: str, sites: tuple[str, ...], edits: str, key: str, _model: HookedModel, _recipe: Recipe,
    _images: Tensor,
) -> dict[str, np.ndarray]:  # fmt: skip
    with _as_edited(_model, _recipe):
        return {site: responses(_model, site, [_images])[0].numpy() for site in sites}


def answers_to(
    model: HookedModel, recipe: Recipe, sites: Sequence[str], image: Tensor, key: str
) -> dict[str, np.ndarray]:
    """Each unit's largest activation in the middle of its map for one drawing, in the edited model."""
    return _answers(hash_of(model), tuple(sites), identity(recipe), key, model, recipe, image)


@st.cache_resource(show_spinner=False, max_entries=256)
def _recorded(
    model_hash: str,
    key: str,
    site: str,
    edits: str,
    _model: HookedModel,
    _recipe: Recipe,
    _one: Examples,
) -> Tensor:
    with _as_edited(_model, _recipe):
        return _model.run(_one.inputs, read=[site], until=site)[site]


def recorded(model: HookedModel, recipe: Recipe, one: Examples, site: str) -> Tensor:
    """What a site holds for one example, in the edited model."""
    key = one.identity(0)
    return _recorded(hash_of(model), key, site, identity(recipe), model, recipe, one)


@st.cache_resource(show_spinner=False, max_entries=256)
def _attention(
    model_hash: str, key: str, unit: str, _model: HookedModel, _one: Examples
) -> AttentionPatterns:
    return attention_patterns(_model, _one.tokens(0), [_model.unit(unit)])


def attention_of(model: HookedModel, one: Examples, unit: Unit) -> AttentionPatterns:
    """A head's attention over one text, raw and weighted by values."""
    return _attention(hash_of(model), one.identity(0), str(unit), model, one)


@st.cache_resource(show_spinner=False, max_entries=256)
def _attention_drawn(
    model_hash: str, key: str, unit: str, longest: int, _found: AttentionPatterns
) -> dict[str, Any]:
    return spec_of(attention_figure(_found.first(longest)))


def attention_drawn(
    model: HookedModel, one: Examples, unit: Unit, longest: int
) -> tuple[Mapping[str, Any], int]:
    """A head's attention over the first tokens of a text as a figure, and how many tokens the text has."""
    found = attention_of(model, one, unit)
    drawn = _attention_drawn(hash_of(model), one.identity(0), str(unit), longest, found)
    return drawn, len(found.tokens)


@st.cache_data(show_spinner=False, max_entries=256)
def _head_output(model_hash: str, unit: str, _model: HookedModel) -> str:
    own = attention_of_site(_model.site(_model.unit(unit).site))
    site = next((s for s in _model.sites if s.name == f"{own}.hook_z"), None)
    return "" if site is None else f"{site.name}:{_model.unit(unit).index}"


def output_of_head(model: HookedModel, unit: Unit) -> Unit | None:
    """A head, given by any of its sites, as a unit of what it puts out; None if that is at no site."""
    found = _head_output(hash_of(model), str(unit), model)
    return Unit.parse(found) if found else None


@st.cache_resource(show_spinner="Going through all pairs of tokens…", max_entries=256)
def _pairs(model_hash: str, head: str, way: Way, offset: int, _model: HookedModel) -> TokenPairs:
    return joined_tokens(_model, head, way, offset=offset)


def pairs_of(model: HookedModel, head: Unit, way: Way, offset: int) -> TokenPairs:
    """The pairs of tokens that a head's weights join most.

    Raises:
        ValueError: if its weights are not known by head, or its scores are no bilinear form.
    """
    return _pairs(hash_of(model), str(head), way, offset, model)


@st.cache_data(show_spinner=False, max_entries=256)
def _logit_writers(model_hash: str, _model: HookedModel) -> set[str]:
    if not isinstance(_model.input, TokenInput) or not _model.has_stream:
        return set()
    return set(writing_logits(_model))


def writes_logits(model: HookedModel, site: Site) -> bool:
    """Whether a site's units write to logits directly, as neurons and the dimensions of the stream do."""
    return site.name in _logit_writers(hash_of(model), model)


@st.cache_resource(show_spinner="Reading the weights…", max_entries=256)
def _logits_by(model_hash: str, unit: str, _model: HookedModel) -> Tensor:
    return written_logits(_model, unit)


def logits_by(model: HookedModel, unit: Unit) -> Tensor:
    """What a unit's activation of one adds to each token's logit directly, by the weights alone."""
    return _logits_by(hash_of(model), str(unit), model)


@st.cache_resource(show_spinner=False)
def _scored_heads() -> OrderedDict[tuple[str, int], HeadScores]:
    return OrderedDict()


def head_scores(
    model: HookedModel, seed: int, progress: Callable[[int, int], object] | None = None
) -> HeadScores | None:
    """How much each head is a previous-token, duplicate-token or induction head; without `progress` only if known.

    Raises:
        ValueError: if the model shows no attention patterns over tokens.
    """
    kept, key = _scored_heads(), (hash_of(model), seed)
    if key not in kept and progress is not None:
        kept[key] = score_heads(model, seed=seed, progress=progress)
        while len(kept) > FOUND:
            kept.popitem(last=False)
    return kept.get(key)


@st.cache_resource(show_spinner=False, max_entries=16)
def _heads_drawn(model_hash: str, seed: int, _found: HeadScores) -> dict[str, Any]:
    return spec_of(heads_figure(_found))


def heads_drawn(model: HookedModel, found: HeadScores) -> Mapping[str, Any]:
    """The scores of all heads as a figure."""
    return _heads_drawn(hash_of(model), found.record.seed, found)


@st.cache_resource(show_spinner=False, max_entries=256)
def _looks(
    model_hash: str,
    key: str,
    head: str,
    queries: tuple[str, ...],
    _model: HookedModel,
    _one: Examples,
) -> ImageAttention:
    return image_attention(_model, _one.picture(0), [_model.unit(head)], queries)


def looks_of(model: HookedModel, one: Examples, head: Unit, *queries: str) -> ImageAttention:
    """Where a head looks in one image."""
    return _looks(hash_of(model), one.identity(0), str(head), queries, model, one)


@st.cache_data(show_spinner=False, max_entries=256)
def _queries(model_hash: str, head: str, _model: HookedModel) -> list[str]:
    with suppress(ValueError):  # its tokens have no known place in the image
        return query_names(_model, _model.unit(head))
    return []


def queries_of(model: HookedModel, head: Unit) -> list[str]:
    """What may be a query of a head in an image; empty if its tokens have no known place there."""
    return _queries(hash_of(model), str(head), model)


@st.cache_resource(show_spinner="Attributing…", max_entries=256)
def _attributed(
    model_hash: str,
    key: str,
    site: str,
    target: str,
    method: ChannelMethod,
    _model: HookedModel,
    _one: Examples,
) -> Attribution:
    return attribute(_model, _one, target, site, method)


def attributed(
    model: HookedModel, one: Examples, site: str, target: str, method: ChannelMethod
) -> Attribution:
    """Which units of a site are responsible for a target.

    Raises:
        KeyError, ValueError: if the target is unknown or does not come after the site.
    """
    return _attributed(hash_of(model), one.identity(0), site, target, method, model, one)


@st.cache_resource(show_spinner="Attributing to pixels…", max_entries=256)
def _salient(
    model_hash: str, key: str, target: str, method: PixelMethod, _model: HookedModel, _one: Examples
) -> Attribution:
    return saliency_map(_model, _one, target, method)


def salient(model: HookedModel, one: Examples, target: str, method: PixelMethod) -> Attribution:
    """Which pixels are responsible for a target.

    Raises:
        KeyError, ValueError: if the target is unknown or the model takes tokens.
    """
    return _salient(hash_of(model), one.identity(0), target, method, model, one)


def label_of(record: ModelRecord) -> str:
    """A model's name, with its hash where two sets of weights share it."""
    same = [r for r in workspace().models() if r.name == record.name]
    return record.name if len(same) == 1 else f"{record.name} {record.hash[:8]}"


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
        _, *attached = split_attached(record.spec)
        if len(attached) == 1:
            try:
                found = find_autoencoder(attached[0], workspace())
            except FileNotFoundError:
                continue
            if (found / FILE if found.is_dir() else found).resolve() == path.resolve():
                return record
    return None


@dataclass(frozen=True, eq=False)
class Decisions:
    """A bottleneck on an autoencoder's latents, with the examples that it was not trained on.

    Attributes:
        bottleneck: trained on a random half of the examples.
        units: latents' mean activation on each example of the store.
        labels: the class of each.
        rest: the examples of the other half.
        accuracy: on those.
    """

    bottleneck: Bottleneck
    units: np.ndarray
    labels: list[int]
    rest: list[int]
    accuracy: Accuracy


@st.cache_resource(show_spinner="Classifying with latents…", max_entries=16)
def _decisions(
    folder: str, site: str, seed: int, _model: HookedModel, _store: ActivationStore
) -> Decisions:
    labels = labels_of(_model, _store)
    if labels is None:
        raise ValueError(f"examples of {_store.provenance.data} have no classes")
    units = np.nan_to_num(_store.summary(site).mean)
    first = np.random.default_rng(seed).permutation(len(labels)) < len(labels) // 2
    own = np.array(labels)
    found = train_bottleneck(
        site, units[first], own[first].tolist(), _model.classes, model_hash=hash_of(_model),
        data=_store.provenance.data, seed=seed,
    )  # fmt: skip
    accuracy = found.accuracy(units[~first], own[~first].tolist(), seed)
    return Decisions(found, units, labels, np.flatnonzero(~first).tolist(), accuracy)


def decisions_of(model: HookedModel, store: ActivationStore, site: str, seed: int = 0) -> Decisions:
    """A classifier on latents, from what has been harvested of them.

    Raises:
        ValueError: if the examples have no labels, or fewer than two classes.
    """
    return _decisions(str(store.folder), site, seed, model, store)


@st.cache_data(show_spinner="Beside random latents…", max_entries=256)
def _intervened(
    folder: str,
    site: str,
    seed: int,
    done: str,
    _made: Decisions,
    _interventions: Sequence[Intervention],
) -> InterventionReport:
    made = _made
    kept = [made.labels[i] for i in made.rest]
    return intervene(made.bottleneck, made.units[made.rest], kept, _interventions, seed=seed)


def intervened(
    store: ActivationStore, made: Decisions, interventions: Sequence[Intervention], seed: int = 0
) -> InterventionReport:
    """What switching latents does to decisions about examples held out."""
    done = "; ".join(str(i.edit) for i in interventions)
    return _intervened(str(store.folder), made.bottleneck.site, seed, done, made, interventions)


@st.cache_resource(show_spinner=False, max_entries=256)
def _claim_file(path: str, written: int) -> ClaimFile:
    return read_claims(path)


@st.cache_resource(show_spinner=False, max_entries=64)
def _claims_report(path: str, written: int) -> Report:
    return read_report(Path(path))


def claims_kept() -> list[Kept]:
    """The claim files and the reports of the workspace, of all models, as the disk has them now."""

    def written(path: Path) -> int:
        return path.stat().st_mtime_ns if path.is_file() else 0

    return kept_claims(
        workspace(),
        lambda path: _claim_file(str(path), written(path)),
        lambda path: _claims_report(str(path), written(path)),
    )
