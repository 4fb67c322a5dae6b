"""The claims of a workspace: files in its folder `claims`, reports below it, and files about saved circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from circuits.claims.claim import ClaimFile
from circuits.claims.files import read_claims, to_yaml, write_claims
from circuits.claims.parts import ABLATIONS
from circuits.claims.report import read_report
from circuits.claims.verifying import Report
from circuits.claims.writing import claims_of_circuit, task_of_circuit
from circuits.errors import line
from circuits.factories import from_file
from circuits.files import is_inside
from circuits.graph.saved import load_circuit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.workspace import ModelRecord, Workspace

_MOST = 200


@dataclass(frozen=True)
class Kept:
    """A claim file of a workspace with its report.

    Attributes:
        name: the file's, without `.yaml`; of a report whose file lies elsewhere, its folder's.
        path: the file; None if it lies elsewhere.
        file: the claims, as the file has them now; as the report has them if it lies elsewhere; None if they cannot be
            read.
        report: what the last verification found; None if there is none, or it is about another model.
        trouble: what could not be read, in a sentence; empty if all could.
    """

    name: str
    path: Path | None
    file: ClaimFile | None
    report: Report | None
    trouble: str = ""

    def is_about(self, record: ModelRecord) -> bool:
        """Whether the claims are about a model, as it is or as it was."""
        file = self.file
        return file is not None and (
            file.model_hash == record.hash or (file.model, file.weights) == _named(record)
        )

    def stale(self, model: HookedModel) -> list[str]:
        """Why the verdicts are not those of these claims about this model, a sentence each; empty if they are.

        Args:
            model: the model that the claims are about, as it is now.
        """
        file, report = self.file, self.report
        said = []
        if file is not None and not model.has_hash(file.model_hash):
            said.append(
                f"the claims are about weights {file.model_hash[:16]}, and the model's are {model.hash[:16]} now: "
                "no claim can be tested"
            )
        if report is not None and not model.has_hash(report.model_hash):
            said.append(f"the verdicts are about weights {report.model_hash[:16]}")
        if report is not None and report.file != file:
            said.append(
                "the file was changed after it was verified: the verdicts are about what it said before"
            )
        return said


def claims_folder(place: Workspace) -> Path:
    """Where a workspace keeps claim files, and a folder for the report of each."""
    return place.root / "claims"


def report_folder(place: Workspace, name: str) -> Path:
    """Where the report of the claims of this name is kept, unless another folder is named."""
    return claims_folder(place) / _as_file(name)


def _as_file(name: str) -> str:
    """A name as that of a file or a folder."""
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return kept[:80] or "claims"


def kept_claims(
    place: Workspace,
    read: Callable[[Path], ClaimFile] = read_claims,
    reported: Callable[[Path], Report] = read_report,
) -> list[Kept]:
    """The claim files of a workspace with their reports, and reports whose files lie elsewhere, by name.

    Args:
        place: the workspace.
        read: reads a claim file.
        reported: reads a report.
    """
    folder = claims_folder(place)
    found, used = [], set()
    for path in sorted(p for p in folder.glob("*.y*ml") if is_inside(p, place.root))[:_MOST]:
        name = path.stem if path.suffix == ".yaml" else path.name
        try:
            file = read(path)
        except (ValueError, OSError) as error:
            found.append(Kept(name, path, None, None, line(error)))
            continue
        own = report_folder(place, file.name) / "report.json"
        report, trouble = _report(own, reported)
        if report is not None and report.file.model_hash != file.model_hash:
            report = None  # of claims of that name about another model
        else:
            used.add(own)
        found.append(Kept(name, path, file, report, trouble))
    return found + list(_alone(place, {k.name for k in found}, used, reported))


def _alone(
    place: Workspace, names: set[str], used: set[Path], reported: Callable[[Path], Report]
) -> Iterator[Kept]:
    """Reports whose files lie elsewhere."""
    for path in sorted(claims_folder(place).glob("*/report.json"))[:_MOST]:
        if path in used or not is_inside(path, place.root):
            continue
        report, trouble = _report(path, reported)
        name = path.parent.name + (" (report)" if path.parent.name in names else "")
        yield Kept(name, None, None if report is None else report.file, report, trouble)


def _report(path: Path, reported: Callable[[Path], Report]) -> tuple[Report | None, str]:
    try:
        return reported(path), ""
    except FileNotFoundError:
        return None, ""
    except (ValueError, OSError) as error:
        return None, line(error)


# --- of a saved circuit --------------------------------------------------------------------------


def claim_saved(place: Workspace, circuit: str, record: ModelRecord, model: HookedModel) -> Path:
    """Write the usual claims about a saved circuit into the workspace, under its name.

    They are made under the ablation under which it was found, where claims know that, else under counterparts.

    Args:
        place: the workspace.
        circuit: the circuit's name.
        record: its model.
        model: the model itself.

    Returns:
        The claim file. One that is there already and about this circuit is left as it is.

    Raises:
        KeyError: if there is no such circuit.
        ValueError: if it was not found, a claim file cannot name its model, or its task cannot be made again.
        OSError: if the file cannot be written.
    """
    path = claims_path(place, circuit, record)
    if path.exists():
        return path
    if record.dtype or (record.weights or "").startswith("untrained"):
        what = f"numbers of type {record.dtype}" if record.dtype else f"weights {record.weights}"
        raise ValueError(
            f"a claim file cannot name {what} of {record.spec}: expected a model as it is stored"
        )
    graph = load_circuit(place.database, circuit, record.hash)
    task = task_of_circuit(graph, model)
    found = graph.graph["made"].get("settings", {}).get("ablation", "")
    file = claims_of_circuit(
        circuit if path.stem == _as_file(circuit) else path.stem, graph, model, record.spec, task,
        weights=_named(record)[1], ablation=found if found in ABLATIONS else "counterpart", seed=task.seed,
        saved=circuit,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_claims(path, file)
    return path


def claims_path(place: Workspace, circuit: str, record: ModelRecord) -> Path:
    """Where claims about a saved circuit are kept: in a file of its name, unless that is about something else."""
    folder, name = claims_folder(place), _as_file(circuit)
    path = folder / f"{name}.yaml"
    if not path.exists():
        return path
    try:
        file = read_claims(path)
    except (ValueError, OSError):
        file = None  # it says itself what is wrong with it
    if file is not None and file.circuit.saved == circuit and file.model_hash == record.hash:
        return path
    return folder / f"{name}-{record.hash[:8]}.yaml"


def _named(record: ModelRecord) -> tuple[str, str]:
    """A model and its weights, as a claim file names them."""
    return record.spec, str(Path(record.weights).resolve()) if record.weights else ""


def check_no_code(file: ClaimFile, instead: str) -> None:
    """Raise ValueError if a claim file that nobody has typed the name of would run code.

    Args:
        file: the claims.
        instead: what to do to use it all the same, for messages.
    """
    where = f"claim file {file.name!r}"
    for what, name in {"model": file.model, **file.task.names}.items():
        from_file(what, name, where, instead)
    for text in _texts([claim["with"] for claim in to_yaml(file)["claims"]]):
        from_file("code", text, where, instead)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
