"""The app's page of claims, and claiming a circuit from the canvas."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from circuits.claims import Claim, ClaimFile, read_claims, write_claims
from circuits.claims.kept import claim_saved, claims_folder, report_folder
from circuits.claims.report import write_report
from circuits.discovery import edge_graph
from circuits.graph import CircuitGraph
from circuits.graph.saved import load_circuit, save_circuit
from circuits.jobs import Job
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace
from tests import canned
from tests.test_app import page, read, text


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace that knows the induction model, with a circuit that was found."""
    made, model = Workspace(tmp_path), load_model("induction")
    made.register(ModelRecord("induction", model.hash))
    task = load_task(model, "repeats", n=16)
    save_circuit(made.database, "story", canned.discovery(edge_graph(model), task).circuit)
    return made


@pytest.fixture
def file(place: Workspace) -> ClaimFile:
    """The usual claims about that circuit, as a file of the workspace."""
    record = place.models()[0]
    return read_claims(claim_saved(place, "story", record, load_model("induction")))


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """What is started in the background."""
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "circuits.jobs.start",
        lambda place, argv, title: asked.append(argv) or SimpleNamespace(title=title),
    )
    return asked


def test_without_claims_it_says_what_to_do(place: Workspace, monkeypatch) -> None:
    test = page(place, monkeypatch, "claims", model="induction")
    assert not test.exception
    said = f"circuits claim new induction CIRCUIT --out {place.root / 'claims' / 'NAME.yaml'}"
    assert said in text(test)
    assert "choose “Claim this” there" in text(test)


def test_a_file_is_verified_in_the_background(
    place: Workspace, file: ClaimFile, started: list[list[str]], monkeypatch
) -> None:
    test = page(place, monkeypatch, "claims", guard=True, model="induction")
    assert not test.exception
    assert test.query_params["file"] == "story"
    assert "Not verified yet." in text(test)
    assert list(test.dataframe[0].value["claim"]) == [c.name for c in file.claims]
    test.button(key="claims-verify").click().run()
    assert not test.exception
    path = place.root / "claims" / "story.yaml"
    assert started == [["verify", str(path), "--exit-zero"]]
    job = Job(
        "1", place.root, tuple(started[0]), "Verify story", "2026-11-30", "running", 2, 10, "x"
    )
    monkeypatch.setattr("circuits.jobs.jobs", lambda place: [job])
    monkeypatch.setattr("circuits.jobs.log_of", lambda job: "its log")
    test.run()
    assert not test.exception
    assert "claims-verify" not in [b.key for b in test.button]
    assert "▶ running" in test.markdown[0].value
    failed = replace(job, state="failed", message="no such task")
    monkeypatch.setattr("circuits.jobs.jobs", lambda place: [failed])
    test.run()
    assert test.button(key="claims-verify")
    assert "no such task" in [t.value for t in test.text]


def test_what_stands_what_fell_and_why(place: Workspace, file: ClaimFile, monkeypatch) -> None:
    write_report(canned.claims_report(file), report_folder(place, file.name))
    second = file.claims[1].name
    test = page(
        place, monkeypatch, "claims", guard=True, model="induction", file="story", claim=second
    )
    assert not test.exception
    assert not test.warning
    verdicts, numbers, history = (frame.value for frame in test.dataframe)
    assert list(verdicts["verdict"]) == ["holds", "refuted", *["could not be tested"] * 8]
    assert verdicts["expected"][1] == "holds (!)"
    assert "a number 0.3 (interval 0.2 to 0.4) is outside" in verdicts["why"][1]
    assert "9 not as expected" in text(test)
    assert read(test.subheader[0]) == second
    assert list(numbers["value"]) == ["0.3 nats (0.2 to 0.4)", "0.95 (0.92 to 0.98)"], (
        "least sure first"
    )
    assert list(numbers["claimed"]) == ["at least 0.9", "0.9 to 1.1"]
    assert list(numbers["p against"]) == [2e-9, 1.0]
    assert numbers["null"][1] == "none"
    assert "Null: a number (3 draws)." in text(test)
    kind, _, drawn = numbers["drawn"][0].partition(",")
    assert kind == "data:image/svg+xml;base64"
    region, interval, value = ElementTree.fromstring(base64.b64decode(drawn))
    ends = float(region.attrib["x"]), float(interval.attrib["x2"]), float(value.attrib["cx"])
    assert ends[0] > ends[1] > ends[2], "all of the interval lies below the claimed region"
    assert history.to_dict("records") == [
        {"earlier run": "2026-11-01", "verdict": "holds", "changed since": "least was 0.1, is 0.9"}
    ]
    test.selectbox(key="choose-claim").select(file.claims[2].name).run()
    assert test.query_params["claim"] == file.claims[2].name
    assert "too few independent examples" in " ".join(map(read, test.markdown))
    assert "No earlier run." in text(test)


def test_stale_verdicts_are_called_so(place: Workspace, file: ClaimFile, monkeypatch) -> None:
    write_report(canned.claims_report(file), report_folder(place, file.name))
    path = claims_folder(place) / "story.yaml"
    write_claims(path, replace(file, alpha=0.01))
    said = [read(w) for w in page(place, monkeypatch, "claims", model="induction").warning]
    assert said == [
        "Stale: the file was changed after it was verified: the verdicts are about what it said before."
    ]
    write_claims(path, replace(file, model_hash="ab" * 32))
    test = page(place, monkeypatch, "claims", model="induction")
    assert not test.exception
    (warning,) = [read(w) for w in test.warning]
    assert warning.startswith(
        f"Stale: the claims are about weights {'ab' * 8}, and the model's are"
    )
    assert "Not verified yet." in text(test), "the report is about other weights"


def test_damaged_files_leave_the_others(place: Workspace, file: ClaimFile, monkeypatch) -> None:
    folder = claims_folder(place)
    (folder / "odd.yaml").write_text("circuits_claims: [")
    for name, written in (("a", "{"), ("b", '{"file": {}, "claims": 1}'), ("c", "[]")):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(written)
    own = report_folder(place, file.name)
    own.mkdir()
    (own / "report.json").write_text('{"file": 1}')
    test = page(place, monkeypatch, "claims", guard=True, model="induction")
    assert not test.exception
    assert len([c for c in test.caption if c.value.startswith("⚠")]) == 4
    assert "is no YAML" in text(test)
    (error,) = [read(e) for e in test.error]
    assert "is none that this version of circuits wrote" in error
    assert "Not verified yet." in text(test)


def test_a_report_whose_file_lies_elsewhere_is_shown(
    place: Workspace, file: ClaimFile, monkeypatch
) -> None:
    write_report(canned.claims_report(file), report_folder(place, file.name))
    (claims_folder(place) / "story.yaml").unlink()
    test = page(place, monkeypatch, "claims", guard=True, model="induction")
    assert not test.exception
    assert "Its file lies elsewhere" in text(test)
    assert "claims-verify" not in [b.key for b in test.button]
    assert len(test.dataframe[0].value) == 10


@pytest.mark.parametrize("where", ["model", "setting"])
def test_a_claim_file_runs_no_code_unasked(
    where: str, place: Workspace, file: ClaimFile, started: list[list[str]], monkeypatch
) -> None:
    monkeypatch.delenv("CIRCUITS_TRUST_PYTHON", raising=False)
    claim: Claim = file.claims[0]
    if where == "model":
        file = replace(file, model="evil.py:f")
    else:  # as a test of a person's own function has it
        odd = replace(
            file, claims=(replace(claim, settings={"f": ["evil.py:f"]}), *file.claims[1:])
        )
        monkeypatch.setattr("apps.cached._claim_file", lambda path, written: odd)
    write_claims(claims_folder(place) / "story.yaml", file)
    test = page(place, monkeypatch, "claims", guard=True, model="induction")
    test.button(key="claims-verify").click().run()
    assert not test.exception
    assert "'evil.py:f', which would run its own code: start the app with" in read(test.error[0])
    assert not started


# --- from the canvas -----------------------------------------------------------------------------


def test_a_circuit_is_claimed_from_the_canvas(place: Workspace, monkeypatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        "apps.panels.claiming.open_page", lambda page, **to: opened.append((page, to))
    )
    test = page(place, monkeypatch, "circuit", guard=True, model="induction", circuit="story")
    assert not test.exception
    test.button(key="circuit-claim").click().run()
    assert not test.exception
    assert opened == [("claims", {"model": "induction", "file": "story"})]
    file = read_claims(claims_folder(place) / "story.yaml")
    assert (file.circuit.saved, file.ablation) == ("story", "counterpart")
    assert (file.task.spec, file.task.examples, file.task.seed) == ("repeats", 500, 1)
    assert len(file.claims) == 10
    test.run()
    assert "circuit-claim" not in [b.key for b in test.button], "it is not written over"


def test_what_cannot_be_claimed_says_why(place: Workspace, monkeypatch) -> None:
    model = load_model("induction")

    def said(**query: str) -> str:
        test = page(place, monkeypatch, "circuit", guard=True, model="induction", **query)
        assert not test.exception
        assert "circuit-claim" not in [b.key for b in test.button]
        return next(read(c) for c in test.caption if c.value.startswith("No claims"))

    by_hand = CircuitGraph()
    by_hand.add_nodes_from([Unit("blocks.1.attn.hook_z", 1)])
    by_hand.graph["model_hash"] = model.hash
    save_circuit(place.database, "by hand", by_hand)
    assert "the circuit does not say its edges: expected one that" in said(circuit="by hand")
    save_circuit(
        place.database, "story", load_circuit(place.database, "story", model.hash), "again"
    )
    assert "this is version 1, and claims are about the latest, 2" in said(
        circuit="story", version="1"
    )


def test_circuits_of_like_names_have_files_of_their_own(place: Workspace, file: ClaimFile) -> None:
    model, record = load_model("induction"), place.models()[0]
    graph = load_circuit(place.database, "story", model.hash)
    write_claims(claims_folder(place) / "a-b.yaml", replace(file, name="other"))
    save_circuit(place.database, "a b", graph)
    path = claim_saved(place, "a b", record, model)
    assert path.name == f"a-b-{model.hash[:8]}.yaml"
    made = read_claims(path)
    assert (made.name, made.circuit.saved) == (path.stem, "a b")
    assert read_claims(claims_folder(place) / "a-b.yaml").name == "other"
    with pytest.raises(ValueError, match="cannot name weights untrained:1 of induction"):
        claim_saved(place, "x", replace(record, weights="untrained:1"), model)
