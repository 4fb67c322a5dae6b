"""The default workspace: the built-in models on photographs and drawings, no network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from circuits.autoencoders import FILE, load_autoencoder
from circuits.concepts import Name, import_names, name_by_attributes, names_of, pooled, save_names
from circuits.examples import Examples
from circuits.families import find_families, save_family, saved_families
from circuits.featurevis.render import visualize_units
from circuits.featurevis.shipping import SHIPPED, unpack
from circuits.files import write_json
from circuits.harvesting import harvest
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import BUILTIN, load_model, record_of
from circuits.models.zoo.weights_files import file_hash
from circuits.progress import Progress
from circuits.sae import (
    Hyperparameters,
    ModelRows,
    RowFilter,
    Schedule,
    as_evaluation,
    behaviour,
    load_evaluation,
    reconstruction,
    save_evaluation,
    train,
    unseen,
)
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import Source, batches, open_source
from circuits.tables import by_reason
from circuits.workspace import ModelRecord, Workspace


@dataclass(frozen=True)
class Concepts:
    """An autoencoder that the demo trains, measures and names.

    Attributes:
        name: what it is called.
        site: of whose activations.
        data: name of the source; its examples have labels, which give latents their names.
        settings: of the autoencoder.
        schedule: of the training.
        examples: how many held-out ones are used, at most, to measure what the model does with it.
    """

    name: str
    site: str
    data: str
    settings: Hyperparameters
    schedule: Schedule
    examples: int = 100


@dataclass(frozen=True)
class Plan:
    """What the demo computes for one model.

    Attributes:
        model: its name.
        data: names of sources to harvest.
        sites: what to record.
        pictured: site and units to visualize.
        families: sites whose units are sorted into turned versions of one another.
        concepts: autoencoders.
        shipped: whether the package has pictures and names of its units.
    """

    model: str
    data: tuple[str, ...]
    sites: tuple[str, ...]
    pictured: tuple[tuple[str, range], ...] = ()
    families: tuple[str, ...] = ()
    concepts: tuple[Concepts, ...] = ()
    shipped: bool = False


PLANS = (
    Plan(
        "efficientnet-lite0",
        ("crops",),
        (
            *dict.fromkeys(batch.site for batch in SHIPPED["efficientnet-lite0"]),
            "block2b",
            "block3b",
            "block4c",
            "block5c",
            "block6d",
            "logits",
        ),
        shipped=True,
    ),
    Plan(
        "cleanroom",
        ("photos", "curves"),
        ("gabor", "complex", "line", "early", "curve", "shape"),
        pictured=(("line", range(12)), ("curve", range(24, 48))),
        families=("line", "curve"),
    ),
    Plan(
        "shapes",
        ("photos", "shapes"),
        ("conv2d0", "conv2d1", "conv2d2", "mixed3a", "mixed3b", "logits"),
        pictured=(("mixed3a", range(96, 144)), ("mixed3b", range(160, 224))),  # the 5x5 branches
        concepts=(
            Concepts(
                "shapes-mixed3b",
                "mixed3b",
                "shapes",
                Hyperparameters("topk", 512, k=16, lr=1e-3),
                Schedule(200, 1024),
            ),
        ),
    ),
    Plan(
        "induction",
        ("repeats",),
        ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"),
    ),
)

PICTURE_STEPS, PICTURE_SIZE = 96, 64


@dataclass(frozen=True)
class Row:
    """One line of what the demo built."""

    model: str
    what: str
    result: str
    where: str


def build(workspace: Workspace, progress: Progress | None = None) -> list[Row]:
    """Build what is missing of the demo's workspace; say what is in it.

    A finished build is noted in `demo.json`, so that the next start need not load the models; delete
    that file to have single missing pictures made again.

    Raises:
        PermissionError: if the workspace cannot be written.
    """
    note, made_from = workspace.root / "demo.json", _fingerprint()
    rows = _noted(note, made_from)
    if rows is None:
        rows = _build(PLANS, workspace, progress)
        write_json(note, {"made_from": made_from, "rows": [asdict(row) for row in rows]})
    return rows


def is_built(workspace: Workspace) -> bool:
    """Whether nothing of the demo's workspace is missing."""
    return _noted(workspace.root / "demo.json", _fingerprint()) is not None


def build_first(
    workspace: Workspace, folder: str = "", progress: Progress | None = None
) -> list[Row]:
    """Build what is missing of the demo's first model, which takes less than a minute.

    Args:
        workspace: where it is built.
        folder: a folder of the person's own images, on which the model is run too.
        progress: called with how many parts are done, and in all.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there are no images in the folder.
        PermissionError: if the workspace cannot be written.
    """
    plan = PLANS[0]
    if folder:
        # First, so that a folder without a readable image is refused at once.
        plan = replace(plan, data=(open_source(f"folder:{folder}").spec, *plan.data))
    return _build((plan,), workspace, progress)


def _fingerprint() -> str:
    """Changes when anything does that the demo's results depend on."""
    weights = [
        file_hash(path)
        for pattern in ("*.safetensors", "*.zip", "*.names.json")
        for path in sorted(BUILTIN.glob(pattern))
    ]
    facts = (version("circuits-workbench"), PLANS, PICTURE_STEPS, PICTURE_SIZE, weights)
    return hashlib.sha256(f"{facts} {load_model('cleanroom').hash}".encode()).hexdigest()


def _noted(note: Path, made_from: str) -> list[Row] | None:
    """What an earlier build made, if it was the same and is still there."""
    try:
        noted = read_json(note)
        rows = [Row(**row) for row in noted["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = noted.get("made_from") == made_from
    return rows if same and all(Path(row.where).exists() for row in rows) else None


def _build(plans: Sequence[Plan], workspace: Workspace, progress: Progress | None) -> list[Row]:
    total = sum(
        p.shipped + len(p.data) + len(p.pictured) + len(p.families) + len(p.concepts) for p in plans
    )
    rows: list[Row] = []

    def built(row: Row) -> None:
        rows.append(row)
        if progress:
            progress(len(rows), total)

    for plan in plans:
        model = load_model(plan.model)
        for data in plan.data:
            built(
                _activations(
                    record_of(plan.model, None, model.identity), model, data, plan.sites, workspace
                )
            )
        # After the harvest, which only one process at a time can do.
        if plan.shipped:
            built(_shipped(model, workspace))
        for site, indices in plan.pictured:
            built(_pictures(model, site, indices, workspace))
        for site in plan.families:
            built(_families(model, site, workspace))
        for concepts in plan.concepts:
            built(_concepts(plan.model, model, concepts, workspace))
    return rows


def _shipped(model: HookedModel, workspace: Workspace) -> Row:
    """Put the pictures and names of units that come with the package into the workspace."""
    n, database = unpack(model, workspace), workspace.database
    import_names(database, model, note="comes with the package")
    named = len(names_of(database, model.hash))
    place = workspace.pictures_folder(model.hash)
    return Row(
        model.name, "what comes with the package", f"{n} pictures, {named} names", str(place)
    )


def _activations(
    record: ModelRecord, model: HookedModel, data: str, sites: Sequence[str], workspace: Workspace
) -> Row:
    """Harvest a model on a dataset; what is there already is kept."""
    store = harvest(model, open_source(data), sites, workspace, record, skip_bad=True)
    units = sum(s.n_units for s in store.provenance.sites)
    result = f"{len(store.provenance.examples) - len(store.skipped)} examples, {units} units"
    if store.skipped:
        result += f"; left out: {by_reason(store.skipped)}"
    return Row(record.spec, f"activations on {data}", result, str(store.folder))


def _pictures(model: HookedModel, site: str, indices: range, workspace: Workspace) -> Row:
    """Visualize the units of a site that have no picture yet."""
    units = [model.site(site).unit(i) for i in indices]
    model_hash = model.hash
    paths = {
        str(u): workspace.picture_path(
            model_hash, str(u), f"{PICTURE_STEPS}steps-{PICTURE_SIZE}px-seed0"
        )
        for u in units
    }
    missing = [u for u in units if not paths[str(u)].exists()]
    for batch in batches(len(missing), 32):
        chosen = [missing[i] for i in batch]
        for picture in visualize_units(model, chosen, steps=PICTURE_STEPS, size=PICTURE_SIZE):
            picture.save(paths[str(picture.unit)])
    what = f"pictures of {site}:{indices.start} to {indices.stop - 1}"
    return Row(model.name, what, f"{len(units)} units", str(paths[str(units[0])].parent))


def _families(model: HookedModel, site: str, workspace: Workspace) -> Row:
    """Find a site's families and save them, unless some of the site are saved already."""
    database, model_hash = workspace.database, model.hash
    known = [f for f in saved_families(database, model_hash) if f.site == site]
    if not known:
        known = find_families(model, site)
        for family in known:
            save_family(database, family, "found by the demo")
    result = ", ".join(f"{f.name}: {len(f.members)} units" for f in known) or "none"
    return Row(model.name, f"families of {site}", result, str(database.path))


def _concepts(spec: str, model: HookedModel, plan: Concepts, workspace: Workspace) -> Row:
    """Train an autoencoder, compare it with its nulls, harvest its latents and name them."""
    folder, source = workspace.autoencoder_path(plan.name), open_source(plan.data)
    path = folder / FILE
    rows = ModelRows(model, source, plan.site)
    if not path.is_file():
        train(rows, plan.settings, plan.schedule, folder, rule=RowFilter(0, hold_out=0.2))
    code = load_autoencoder(path)
    labels = read_labels(source, model.classes)
    if load_evaluation(path) is None:
        among = unseen(code, source)
        examples = Examples(model, source, plan.examples, labels=labels, among=among)
        behaved = behaviour(model, code, examples)
        measured = reconstruction(code, rows, rows=8192)
        save_evaluation(path, as_evaluation(measured, behaved, "held out of training"))
    attached = model.attach(code, plan.name, plan.site)
    latents = f"sae/{plan.name}"
    record = replace(record_of(spec, None, attached.identity), spec=f"{spec}+{latents}")
    row = _activations(record, attached, plan.data, [latents], workspace)
    if not names_of(workspace.database, attached.hash):
        save_names(workspace.database, attached.hash, _names(attached, latents, source, labels))
    named = len(names_of(workspace.database, attached.hash))
    return replace(
        row, what=f"autoencoder of {plan.site}", result=f"{code.n_latents} latents, {named} named"
    )


def _names(
    model: HookedModel, site: str, source: Source, labels: Sequence[int]
) -> tuple[Name, ...]:
    """Latents that tell a class, on examples that did not choose their name too."""
    strengths = pooled(model, site, Examples(model, source, None))
    classes = [[model.classes[i]] for i in labels]
    found = name_by_attributes(site, strengths, classes, data=source.spec, by="class labels")
    return found.holding
