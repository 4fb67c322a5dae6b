"""The default workspace: the built-in models on photographs and drawings, no network (layer 6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from circuits.featurevis.render import visualize_units
from circuits.files import write_json
from circuits.harvesting import harvest
from circuits.models.adapter import HookedModel
from circuits.models.loading import BUILTIN, load_model
from circuits.models.weights_files import file_hash
from circuits.stimuli.sources import batches, open_source
from circuits.workspace import ModelRecord, Workspace


@dataclass(frozen=True)
class Plan:
    """What the demo computes for one model.

    Attributes:
        model: its name.
        data: names of sources to harvest.
        sites: what to record.
        pictured: site and units to visualize.
    """

    model: str
    data: tuple[str, ...]
    sites: tuple[str, ...]
    pictured: tuple[tuple[str, range], ...] = ()


PLANS = (
    Plan(
        "cleanroom",
        ("photos", "curves"),
        ("gabor", "complex", "line", "early", "curve", "shape"),
        (("line", range(12)), ("curve", range(24, 48))),
    ),
    Plan(
        "shapes",
        ("photos", "shapes"),
        ("conv2d0", "conv2d1", "conv2d2", "mixed3a", "mixed3b", "logits"),
        (("mixed3a", range(96, 144)), ("mixed3b", range(160, 224))),  # the 5x5 branches
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


def build(workspace: Workspace, progress: Callable[[int, int], object] | None = None) -> list[Row]:
    """Build what is missing of the demo's workspace; say what is in it.

    A finished build is noted in `demo.json`, so that the next start need not load the models; delete
    that file to have single missing pictures made again.

    Raises:
        PermissionError: if the workspace cannot be written.
    """
    note, made_from = workspace.root / "demo.json", _fingerprint()
    rows = _noted(note, made_from)
    if rows is None:
        rows = _build(workspace, progress)
        write_json(note, {"made_from": made_from, "rows": [asdict(row) for row in rows]})
    return rows


def _fingerprint() -> str:
    """Changes when anything does that the demo's results depend on."""
    weights = [file_hash(path) for path in sorted(BUILTIN.glob("*.safetensors"))]
    facts = (version("circuits-workbench"), PLANS, PICTURE_STEPS, PICTURE_SIZE, weights)
    return hashlib.sha256(f"{facts} {load_model('cleanroom').hash}".encode()).hexdigest()


def _noted(note: Path, made_from: str) -> list[Row] | None:
    """What an earlier build made, if it was the same and is still there."""
    try:
        noted = json.loads(note.read_text())
        rows = [Row(**row) for row in noted["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = noted.get("made_from") == made_from
    return rows if same and all(Path(row.where).exists() for row in rows) else None


def _build(workspace: Workspace, progress: Callable[[int, int], object] | None) -> list[Row]:
    total = sum(len(plan.data) + len(plan.pictured) for plan in PLANS)
    rows: list[Row] = []
    for plan in PLANS:
        model = load_model(plan.model)
        record = ModelRecord(plan.model, model.hash)
        for spec in plan.data:
            store = harvest(model, open_source(spec), plan.sites, workspace, record)
            units = sum(s.n_units for s in store.provenance.sites)
            result = f"{len(store.provenance.examples)} examples, {units} units"
            rows.append(Row(plan.model, f"activations on {spec}", result, str(store.folder)))
            _report(progress, len(rows), total)
        for site, indices in plan.pictured:
            rows.append(_pictures(model, site, indices, workspace))
            _report(progress, len(rows), total)
    return rows


def _report(progress: Callable[[int, int], object] | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)


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
