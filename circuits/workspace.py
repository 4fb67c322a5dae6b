"""The workspace: a folder with everything that the workbench has computed.

<root>/<model hash, 16 digits>/model.json          how to load the model again
                              /<dataset hash>/…     activation stores
                              /pictures/            feature visualizations, metadata inside
                              /sheets/<site>-<how>/  neuron sheets
                              /graph.h5, graph/     the graph store
       saes/<name>/                                 autoencoders, and where their training stands
       models/<name>/                               language models, converted from GGUF files
       workspace.db                                 what people wrote, with its history
       jobs/<id>/                                   work in the background
       natural-images/<dataset hash>-<shape>.safetensors   colours and spectrum of a dataset
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.parse import unquote

from circuits.database import Database
from circuits.environment import WORKSPACE
from circuits.files import check_writable, write_json
from circuits.json_files import read_json
from circuits.units import Unit

_PICTURES = (".png", ".webp")
_LONGEST = 160  # bytes of a file's name for its target; 255 in all is what file systems take

_OF_UNIT = re.compile(r"(?P<unit>[^:]+:(0|[1-9][0-9]*))-[0-9]+steps-")

_TOLERANCE = 0.01
"""By how much a model's outputs may differ, relative to the largest, between machines: bfloat16 has 8 bits."""

DIGITS = 16
"""How many hexadecimal digits of a hash name a folder."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is.

    Attributes:
        hash: of its weights and of what it computes with them.
        weights_hash: of its weights alone, by which earlier versions knew it.
        outputs: some of its outputs for a fixed input. They differ by rounding from machine to machine, so they are
            compared and not hashed.
    """

    hash: str
    weights_hash: str
    outputs: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelRecord:
    """A model that the workspace knows.

    Attributes:
        spec: what `load_model` takes.
        hash: its hash.
        weights: the weights file it was loaded from, or `untrained:SEED`, if one of them was named.
        outputs: as in `ModelIdentity`; none if they are not known.
        weights_hash: likewise.
        dtype: the type that its numbers were given when it was loaded; nothing if they are as they are stored.
    """

    spec: str
    hash: str
    weights: str | None = None
    outputs: tuple[float, ...] = ()
    weights_hash: str = ""
    dtype: str = ""

    @property
    def name(self) -> str:
        """What to call it: its name, with what tells it from the trained model of that name if it is not trained.

        >>> ModelRecord("shapes", "0", "untrained:3").name
        'shapes (untrained:3)'
        """
        untrained = (self.weights or "").startswith("untrained")
        return f"{self.spec} ({self.weights})" if untrained else self.spec

    @property
    def arguments(self) -> str:
        """What names it on the command line, quoted for a shell.

        >>> ModelRecord("shapes", "0", "untrained:3").arguments
        'shapes --weights untrained:3'
        """
        return shlex.join([self.spec, *(("--weights", self.weights) if self.weights else ())])

    @property
    def code(self) -> str:
        """The line of Python that loads it.

        >>> ModelRecord("shapes", "0", "untrained:3").code
        "circuits.load_model('shapes', 'untrained:3')"
        """
        return f"circuits.load_model({', '.join(repr(t) for t in (self.spec, self.weights) if t)})"

    @classmethod
    def of(cls, spec: str, model: ModelIdentity, weights: str | None = None) -> ModelRecord:
        """The record of a model."""
        return cls(spec, model.hash, weights, model.outputs, model.weights_hash)


@dataclass(frozen=True)
class Workspace:
    """A workspace folder.

    Attributes:
        root: where it is.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))  # a string will do

    @classmethod
    def default(cls, root: str | Path | None = None) -> Workspace:
        """The folder given, or that `CIRCUITS_WORKSPACE` names, or `cache`."""
        return cls(Path(root or os.environ.get(WORKSPACE) or "cache").expanduser().absolute())

    def writable(self) -> Workspace:
        """This workspace, if files can be written into it.

        Raises:
            PermissionError: if not.
        """
        check_writable(self.root, "workspace")
        return self

    def model_folder(self, model_hash: str) -> Path:
        """Where everything about one model is kept."""
        return self.root / model_hash[:DIGITS]

    @property
    def database(self) -> Database:
        """What people wrote: circuits, families, labels."""
        return Database(self.root / "workspace.db")

    def register(self, record: ModelRecord, replace: bool = True) -> None:
        """Note how a model is loaded, so that the app can load it again.

        Args:
            record: what to note.
            replace: whether to overwrite what was noted before.
        """
        path = self.model_folder(record.hash) / "model.json"
        known = _read_record(path)
        if known is None or (replace and known != record):
            write_json(path, asdict(record))

    def recognise(self, model: ModelIdentity) -> str:
        """Check that a model computes what it did when the workspace came to know it, and take over what people wrote
        about it under the hash of its weights alone.

        Returns:
            A line about stores and pictures that were made under that hash, which are not used; else nothing.

        Raises:
            ValueError: if it has the same hash and other outputs.
        """
        folder = self.model_folder(model.hash)
        known = _read_record(folder / "model.json")
        if (
            known is not None
            and (difference := _difference(known.outputs, model.outputs)) > _TOLERANCE
        ):
            raise ValueError(
                f"model {known.spec} computes something else than when {str(folder)!r} was filled, although weights "
                f"and operations are the same: half of its outputs differ by more than {difference:.2g} of the "
                "largest; use another --workspace, or delete that folder"
            )
        if os.access(self.root / "workspace.db", os.W_OK) and os.access(self.root, os.W_OK):
            for before in (model.weights_hash, *self._same_by_outputs(model)):
                self.database.take_over(before, model.hash)
        return self.outdated(model)

    def _same_by_outputs(self, model: ModelIdentity) -> list[str]:
        """The hashes of models with the same weights and outputs whose operations are others: a new version of torch or
        of the model's library may call other functions for the same computation.
        """
        return [
            record.hash
            for record in self.models()
            if record.hash != model.hash
            and record.weights_hash == model.weights_hash
            and len(record.outputs) == len(model.outputs) > 0
            and _difference(record.outputs, model.outputs) <= _TOLERANCE
        ]

    def outdated(self, model: ModelIdentity) -> str:
        """What to do about stores and pictures that earlier versions made; empty if there are none."""
        folder = self.model_folder(model.weights_hash)
        record = _read_record(folder / "model.json")
        if record is None or model.hash == model.weights_hash:
            return ""
        return (
            f"what {str(folder)!r} holds is not used: an earlier version made it, which knew models by their weights "
            f"alone; make it again (`circuits harvest {record.spec} …`) and delete that folder (circuits, names, "
            "families and edits are kept elsewhere)"
        )

    def present_hash(self, model_hash: str) -> str:
        """The hash of the model that had this hash in earlier versions, if the workspace knows it; else the hash."""
        found = next((r for r in self.models() if r.weights_hash == model_hash), None)
        return model_hash if found is None else found.hash

    def models(self) -> list[ModelRecord]:
        """The models it knows, by name; without those whose record cannot be read (`damaged_models`)."""
        found = [_read_record(path) for path in sorted(self.root.glob("*/model.json"))]
        return sorted((r for r in found if r), key=lambda record: record.spec)

    def damaged_models(self) -> list[str]:
        """What to do about each model whose record cannot be read."""
        return [
            f"record {str(path)!r} of a model is damaged: `circuits harvest` of that model writes it again"
            for path in sorted(self.root.glob("*/model.json"))
            if _read_record(path) is None
        ]

    def store_folder(self, model_hash: str, dataset_hash: str, run: str) -> Path:
        """Where one harvest's activation store is."""
        return self.model_folder(model_hash) / dataset_hash[:DIGITS] / run

    def store_folders(self, model_hash: str) -> Iterator[Path]:
        """The folders of all activation stores of a model, finished or not."""
        for path in sorted(self.model_folder(model_hash).glob("*/*/provenance.json")):
            yield path.parent

    def all_store_folders(self) -> Iterator[Path]:
        """The folders of all activation stores, finished or not."""
        for path in sorted(self.root.glob("*/*/*/provenance.json")):
            yield path.parent

    def picture_path(self, model_hash: str, target: str, how: str) -> Path:
        """Where the picture of a unit or objective, made one way, is kept."""
        return self.pictures_folder(model_hash) / self.picture_name(target, how)

    @staticmethod
    def picture_name(target: str, how: str, suffix: str = ".png") -> str:
        """The name of the file with the picture of a unit or objective, made one way."""
        return f"{_file_name(target)}-{how}{suffix}"

    def pictures_folder(self, model_hash: str) -> Path:
        """Where the pictures of a model's units and objectives are."""
        return self.model_folder(model_hash) / "pictures"

    def sheets_folder(self, model_hash: str) -> Path:
        """Where the neuron sheets of a model are, each in a folder of its own."""
        return self.model_folder(model_hash) / "sheets"

    def faces_folder(self, model_hash: str) -> Path:
        """Where the small pictures are by which units are known (`circuits.faces`)."""
        return self.model_folder(model_hash) / "faces"

    def faces_path(self, model_hash: str, site: str) -> Path:
        """The archive with the faces of a site's units."""
        return self.faces_folder(model_hash) / f"{_file_name(site)}.zip"

    def autoencoder_path(self, name: str) -> Path:
        """Where an autoencoder is: the folder `NAME`, or the file of a variant, `NAME/VARIANT`."""
        folder, _, variant = name.partition("/")
        place = self.root / "saes" / folder
        return place / f"{variant}.safetensors" if variant else place

    def converted_folder(self, name: str) -> Path:
        """Where a language model is that was converted from another format."""
        return self.root / "models" / name

    def natural_path(self, data_hash: str, shape: tuple[int, int, int]) -> Path:
        """Where the statistics of a dataset's images of a shape (channels, height, width) are kept."""
        size = "x".join(map(str, shape))
        return self.root / "natural-images" / f"{data_hash[:DIGITS]}-{size}.safetensors"

    def pictures(self, model_hash: str, unit: Unit) -> list[Path]:
        """The pictures of a unit, newest first."""
        folder, name = self.pictures_folder(model_hash), glob.escape(_file_name(str(unit)))
        found = [path for suffix in _PICTURES for path in folder.glob(f"{name}-*{suffix}")]
        return sorted(found, key=lambda path: -path.stat().st_mtime)

    def pictured(self, model_hash: str) -> Iterator[tuple[Unit, Path]]:
        """The pictures of all units, oldest first.

        Those of other objectives are left out, and those of units whose names are too long for a file's.
        """
        folder = self.pictures_folder(model_hash)
        found = [path for suffix in _PICTURES for path in folder.glob(f"*{suffix}")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            if name := _OF_UNIT.match(path.name):
                yield Unit.parse(unquote(name["unit"])), path


def _read_record(path: Path) -> ModelRecord | None:
    try:
        raw = read_json(path)
        outputs = tuple(raw.get("outputs", ()))
        record = ModelRecord(**{**raw, "outputs": outputs})
    except (ValueError, TypeError, AttributeError, OSError):
        return None
    named = (record.spec, record.hash, record.weights_hash, record.dtype)
    more = () if record.weights is None else (record.weights,)
    if not all(isinstance(t, str) and _is_text(t) for t in (*named, *more)):
        return None
    if record.hash[:DIGITS] != path.parent.name:  # its files would be looked for elsewhere
        return None
    numbers = all(isinstance(number, int | float) for number in outputs)
    return record if numbers else None


def _is_text(text: str) -> bool:
    """Whether it can be written and shown: JSON may have halves of characters."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _difference(known: Sequence[float], now: Sequence[float]) -> float:
    """The median difference of two models' outputs, relative to the largest output; 0 where nothing is known.

    The median, since single outputs jump where a model decides between ways (experts, codes).
    """
    if len(known) != len(now) or not known:
        return 0.0
    largest = max(abs(x) for x in known)
    return median(abs(x - y) for x, y in zip(known, now, strict=True)) / (largest or 1.0)


def _file_name(target: str) -> str:
    """Of a target and of no other, in at most 160 bytes: a long one ends in its hash."""
    name = target.replace("%", "%25").replace("/", "%2F")
    if len(name.encode()) <= _LONGEST:
        return name
    mark = f"~{hashlib.sha256(target.encode()).hexdigest()[:DIGITS]}"
    return name.encode()[: _LONGEST - len(mark)].decode(errors="ignore") + mark
