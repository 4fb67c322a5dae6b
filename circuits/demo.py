"""The default workspace: the built-in models on photographs and drawings, no network; and that of a language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from circuits.autoencoders import FILE, load_autoencoder
from circuits.concepts import Name, import_names, name_by_attributes, names_of, pooled, save_names
from circuits.discovery import discover, edge_graph
from circuits.examples import Examples
from circuits.faces import make_faces
from circuits.families import find_families, save_family, saved_families
from circuits.featurevis.render import visualize_units
from circuits.featurevis.shipping import SHIPPED, unpack
from circuits.files import keeping, replacing, write_json
from circuits.graph.saved import load_circuit, save_circuit, saved_circuits
from circuits.harvesting import harvest
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.fetching import Begin, fetch
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
from circuits.tasks.builtin import load_task
from circuits.tasks.templates import TEMPLATES
from circuits.units import unknown
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


@dataclass(frozen=True)
class LanguagePlan:
    """What the demo computes for a language model that is fetched.

    Attributes:
        model: its name.
        layers: those whose heads and neurons are recorded: some, since every site of 30 layers takes an hour.
        behaviours: templates of `circuits.tasks.templates` that write the texts, one line each.
        texts: how many of each.
        task: whose circuit is found.
        items: how many of the task, half of them to find the circuit and half to measure it.
        size: edges of the circuit, with those that are on no path from input to output.
        n_random: random circuits that it is compared with.
        minutes: what everything but the circuit takes on two cores, and what the circuit takes.
    """

    model: str
    layers: tuple[int, ...]
    behaviours: tuple[str, ...]
    texts: int
    task: str
    items: int
    size: int
    n_random: int
    minutes: tuple[int, int]

    @property
    def sites(self) -> tuple[str, ...]:
        """What is recorded: what heads put out before it is mixed, and neurons."""
        return tuple(
            f"blocks.{layer}.{part}"
            for layer in self.layers
            for part in ("attn.hook_z", "mlp.hook_post")
        )


LANGUAGE = {
    "smollm2": LanguagePlan(
        "smollm2", (0, 10, 15, 20, 25, 29),
        ("indirect-object", "greater-than", "agreement", "pronouns", "capitals"), 48,
        "indirect-object", 64, 300, 9, (2, 6),
    ),
}  # fmt: skip
"""The demos of language models (`circuits demo --model NAME`). Of templates `docstring` is left out: it needs lines."""

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
    # Its shipped pictures are faces enough to begin with; `build` makes the others.
    return _build((plan,), workspace, progress, faces=bool(folder))


def build_language(
    workspace: Workspace,
    name: str,
    circuit: bool = True,
    begin: Begin = lambda _: None,
    stage: Callable[[str], Progress | None] = lambda _: None,
) -> list[Row]:
    """Build what is missing of the workspace of a language model, which is fetched if it is not there.

    Args:
        workspace: where it is built.
        name: the model, one of `LANGUAGE`.
        circuit: whether the circuit is found too, which takes longest; work that is stopped goes on.
        begin: called with what is fetched or converted now; returns what to call with how far it is.
        stage: the same for what is computed.

    Raises:
        KeyError: if there is no demo of such a model.
        ValueError, OSError, ImportError: as `circuits.models.zoo.fetching.fetch`.
    """
    plan = LANGUAGE.get(name)
    if plan is None:
        raise unknown("language model with a demo", name, list(LANGUAGE))
    got = fetch(name, workspace, begin=begin)
    rows = [Row(name, "weights", got.origin or "there already", str(got.folder))]
    model = load_model(name)
    record = record_of(name, None, model.identity)
    path = _write_texts(model, plan, workspace)
    rows.append(
        _activations(
            record, model, f"tokens:{path}", plan.sites, workspace, stage("record activations")
        )
    )
    if circuit:
        workspace.register(record, replace=False)
        rows.append(_circuit(model, plan, workspace, stage))
    return rows


def is_language_built(workspace: Workspace, name: str) -> bool:
    """Whether the circuit, the last part of a language model's demo, was found."""
    hashes = [r.hash for r in workspace.models() if r.spec == name]
    saved = {r.name for h in hashes for r in saved_circuits(workspace.database, h)}
    return name in LANGUAGE and LANGUAGE[name].task in saved


def _write_texts(model: HookedModel, plan: LanguagePlan, workspace: Workspace) -> Path:
    """Texts of the package's own templates with their right answers, a line each, in a fixed order: seed 0.

    They were written for this package and have its licence (Apache-2.0).
    """
    lines = []
    for template in plan.behaviours:
        for item in TEMPLATES[template](plan.texts, 0, model.input).items:
            assert isinstance(item.clean, str), "templates write texts"
            lines.append(f"{item.clean}{item.answers[0]}")
    path = workspace.root / "texts" / f"{plan.model}-behaviours.txt"
    text = "".join(f"{line}\n" for line in lines)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def _circuit(
    model: HookedModel,
    plan: LanguagePlan,
    workspace: Workspace,
    stage: Callable[[str], Progress | None],
) -> Row:
    """Find the circuit of the plan's task and save it under the task's name, unless there is one of that name."""
    database, model_hash = workspace.database, model.hash
    what = f"circuit of {plan.task}"
    if plan.task in {r.name for r in saved_circuits(database, model_hash)}:
        n = load_circuit(database, plan.task, model_hash).number_of_edges()
        return Row(model.name, what, f"saved before, drawn with {n} edges", str(database.path))
    task = load_task(model, plan.task, n=plan.items)
    graph = edge_graph(model)
    said = json.dumps([model_hash, task.hash, plan.size, plan.n_random])
    folder = (
        workspace.model_folder(model_hash)
        / "discovery"
        / hashlib.sha256(said.encode()).hexdigest()[:16]
    )
    folder.mkdir(parents=True, exist_ok=True)
    found = discover(
        graph, task, "eap-ig", size=plan.size, n_random=plan.n_random, n_curves=0, check=20, stage=stage,
        keep=keeping(folder),
    )  # fmt: skip
    save_circuit(database, plan.task, found.circuit, "found by the demo")
    f, by_chance = found.evaluation.faithfulness, found.evaluation.random_faithfulness
    measured = found.evaluation.undefined or (
        f"faithfulness {f.value:.2f} [{f.low:.2f}, {f.high:.2f}] on {len(task.test)} items that did not choose them; "
        f"at most {max(by_chance):.2f} in {len(by_chance)} random circuits"
    )
    result = f"{len(found.evaluation.edges)} of {len(graph)} edges (eap-ig, seed 0): {measured}"
    return Row(model.name, what, result, str(database.path))


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


def _build(
    plans: Sequence[Plan], workspace: Workspace, progress: Progress | None, faces: bool = True
) -> list[Row]:
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
                    record_of(plan.model, None, model.identity),
                    model,
                    data,
                    plan.sites,
                    workspace,
                    faces=faces,
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
    record: ModelRecord,
    model: HookedModel,
    data: str,
    sites: Sequence[str],
    workspace: Workspace,
    progress: Progress | None = None,
    faces: bool = True,
) -> Row:
    """Harvest a model on a dataset, and keep its units' faces; what is there already is kept."""
    store = harvest(
        model, open_source(data), sites, workspace, record, skip_bad=True, progress=progress
    )
    if faces:
        make_faces(workspace, model, store, open_source(data))
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
