"""`circuits claim` and `circuits verify`: files, reports, exit codes, history, and work that was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from circuits.claims import Claim, ClaimFile, TaskSpec, read_claims, verify, write_claims
from circuits.claims.catalogue import TESTS
from circuits.claims.parts import EdgeParts
from circuits.claims.recording import read_recorded, recorded_path
from circuits.claims.registration import terms_of
from circuits.claims.settings import ClaimTest
from circuits.claims.subject import Subject, load_claims_task, subject_of
from circuits.claims.writing import task_of_circuit
from circuits.cli.main import run
from circuits.edits.recipes import Recipe
from circuits.edits.records import read_edit
from circuits.environment import WORKSPACE
from circuits.graph.circuit import CircuitGraph
from circuits.models.zoo.loading import load_model
from circuits.tasks.task import Task
from circuits.workspace import Workspace
from tests.smollm2 import fetched_smollm2

EDGES = ["token -> 0.0.v", "0.0 -> mlp:0", "mlp:0 -> logits"]
CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(WORKSPACE, str(tmp_path / "ws"))
    return tmp_path


def written(folder: Path, *claims: dict[str, Any], **fields: Any) -> str:
    raw = {
        "circuits_claims": 1, "name": "adding", "model": "addition-by-hand",
        "model_hash": load_model("addition-by-hand").hash, "task": {"examples": 24}, "circuit": {"edges": EDGES},
        "claims": list(claims),
    }  # fmt: skip
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump(raw | fields), "utf-8")
    return str(path)


HOLDS = {"claim": "sufficient", "test": "faithfulness"}
FALLS = {
    "claim": "necessary",
    "test": "knockout",
    "circuit": {"edges": EDGES[:1]},
    "with": {"most": -1},
}
OPEN = {"claim": "equivalent", "test": "equivalence"}


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ((HOLDS,), 0),
        ((HOLDS, {**FALLS, "expect": "refuted", "why": "it is needed"}), 0),
        ((HOLDS, FALLS), 1),
        ((HOLDS, OPEN), 3),
    ],
)
def test_the_exit_code_says_what_stands(folder: Path, capsys, claims: tuple[Any, ...], code: int):
    assert run(["verify", written(folder, *claims), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == code
    assert report["claims"][0]["verdict"] == "holds"
    kept = json.loads((folder / "ws/claims/adding/report.json").read_text())
    assert kept["claims"][0]["measured"] == report["claims"][0]["measured"]
    page = (folder / "ws/claims/adding/report.html").read_text()
    assert "faithfulness (noising)" in page
    assert "<script" not in page


def test_a_model_that_changed_makes_claims_stale(folder: Path, capsys):
    assert run(["verify", written(folder, HOLDS, model_hash="0" * 64)]) == 4
    assert "stale" in capsys.readouterr().out


def test_history_shows_what_was_changed(folder: Path, capsys):
    run(["verify", written(folder, HOLDS), "--json"])
    run(["verify", written(folder, {**HOLDS, "with": {"least": 0.5}}), "--json"])
    second = capsys.readouterr().out.strip().split("\n}\n")[-1]
    [earlier] = json.loads(second)["claims"][0]["earlier"]
    assert earlier["verdict"] == "holds"
    assert earlier["changed"] == {"least": [0.9, 0.5]}
    # another statement is another claim
    run(["verify", written(folder, {**HOLDS, "statement": "It is all there."}), "--json"])
    assert json.loads(capsys.readouterr().out)["claims"][0]["earlier"] == []


def test_claims_are_registered_before_anything_is_measured(folder: Path, monkeypatch):
    file = read_claims(written(folder, HOLDS))
    place, model = Workspace(folder / "ws"), load_model("addition-by-hand")
    seen: list[list[str]] = []

    def looked(task: Any, half: Any) -> Any:
        rows = place.database.rows("SELECT body FROM records WHERE kind='claim'")
        seen.append([json.loads(row[0])["event"] for row in rows])
        return original(task, half)

    original = Task._half
    monkeypatch.setattr(Task, "_half", looked)
    verify(file, place, model=model)
    assert seen
    assert all(events and events[0] == "registered" for events in seen)


def test_work_that_was_stopped_goes_on(folder: Path, monkeypatch):
    file = read_claims(written(folder, HOLDS, OPEN))
    place, model = Workspace(folder / "ws"), load_model("addition-by-hand")
    whole = verify(file, place, model=model)
    calls: list[str] = []

    def counted(test: ClaimTest) -> ClaimTest:
        def measure(*args: Any) -> Any:
            calls.append(test.name)
            if calls == ["faithfulness", "equivalence"]:
                raise KeyboardInterrupt
            return test.run(*args)

        return replace(test, run=measure)

    monkeypatch.setattr(
        "circuits.claims.verifying.TESTS", {n: counted(t) for n, t in TESTS.items()}
    )
    with pytest.raises(KeyboardInterrupt):
        verify(file, place, model=model)
    done = verify(file, place, model=model)
    assert calls == ["faithfulness", "equivalence", "equivalence"], "what was measured is kept"
    assert [j.measured for j in done.judged] == [j.measured for j in whole.judged]
    registration = done.judged[1].registration
    assert registration is not None
    assert [run.verdict for run in registration.earlier] == ["undecided", ""], (
        "the second did not end"
    )


def test_recorded_verdicts_belong_to_the_claims(folder: Path, capsys):
    path = written(folder, HOLDS)
    assert run(["verify", path, "--record"]) == 0
    kept = json.loads(recorded_path(Path(path)).read_text())
    recorded_path(Path(path)).write_text(json.dumps(kept | {"seconds": 100}))
    assert run(["verify", path, "--quick"]) == 0
    assert "as recorded, not measured again" in capsys.readouterr().out
    written(folder, {**HOLDS, "with": {"least": 0.8}})
    assert run(["verify", path, "--quick"]) == 2
    assert "is of other claims than" in capsys.readouterr().err


def test_a_file_from_a_circuit(folder: Path, capsys):
    assert run(["discover", "addition-by-hand", "--size", "3", "--limit", "24", "--save", "sum", "--random", "2",
                "--random-rankings", "1", "--check", "0"]) == 0  # fmt: skip
    out = folder / "sum.yaml"
    assert (
        run(["claim", "new", "addition-by-hand", "sum", "--out", str(out), "--examples", "24"]) == 0
    )
    file = read_claims(out)
    assert file.circuit.saved == "sum"
    assert {c.test for c in file.claims} >= {"faithfulness", "knockout", "minimality", "stability"}
    assert file.task.seed == 1, "new examples"
    assert run(["verify", str(out)]) in (0, 1, 3)
    again = out.read_text().replace("seed: 1\n", "seed: 0\n")
    out.write_text(again)
    capsys.readouterr()
    assert run(["verify", str(out)]) == 2
    assert "were seen when the circuit was found: expected another seed" in capsys.readouterr().err


def test_a_circuit_of_a_convolutional_network_is_claimed_of_on_new_images(folder: Path, capsys):
    assert run(["discover", "shapes", "--sites", "mixed3b:0-15,logits", "--task", "classes", "--data", "shapes",
                "--counterpart", "another", "--method", "eap", "--limit", "40", "--size", "60", "--search", "top",
                "--random", "2", "--random-rankings", "1", "--check", "0", "--save", "sh"]) == 0  # fmt: skip
    out = folder / "sh.yaml"
    assert run(["claim", "new", "shapes", "sh", "--out", str(out), "--examples", "120"]) == 0
    file = read_claims(out)
    assert file.task == TaskSpec(
        "classes", 120, 1, data="shapes", take="random", counterpart="another"
    )
    quick = [c for c in file.claims if c.test in ("faithfulness", "knockout", "equivalence")]
    write_claims(out, replace(file, claims=tuple(quick)))
    assert run(["verify", str(out), "--report", str(folder)]) == 1
    judged = json.loads((folder / "report.json").read_text())["claims"]
    assert [j["verdict"] for j in judged] == ["refuted"] * 3, "16 channels are not the network"
    model = load_model("shapes")
    subject = subject_of(file, model, Workspace(folder / "ws"), folder)
    drawn, seen = TaskSpec("classes", 40, data="shapes", counterpart="another"), subject.seen
    before = set(drawn.compile(model).examples.identities)
    assert seen == before
    assert not seen & {*subject.test.examples.identities}
    old = len(subject.task.test.examples.identities) - len(subject.test)
    assert old > 0, "60 of 400 images, of which 40 were seen"
    assert f"; {old} more were seen when the circuit was found" in judged[0]["measured"]["examples"]


def test_circuits_of_earlier_versions_say_what_was_drawn(folder: Path):
    model = load_model("addition-by-hand")
    subject = Subject(model, load_claims_task(model, TaskSpec(examples=24, seed=1)))
    earlier, newer = CircuitGraph(), CircuitGraph()
    drawn = load_claims_task(model, TaskSpec("addition", 24, 1)).examples.identities
    earlier.graph["made"] = {"task": "addition", "examples": 24, "seed": 1, "edges": []}
    newer.graph["made"] = {
        "task": "addition",
        "found_on": drawn[:5],
        "evaluated_on": drawn[5:9],
        "edges": [],
    }
    assert replace(subject, found=earlier).seen == frozenset(drawn)
    assert replace(subject, found=newer).seen == frozenset(drawn[:9])
    assert task_of_circuit(earlier, model) == TaskSpec("addition", 500, 2)
    unknown = CircuitGraph()
    unknown.graph["made"] = {"task": "cat against dog", "examples": 24}
    with pytest.raises(
        ValueError, match=r"cannot be made again \(unknown task 'cat against dog'.* saved since"
    ):
        replace(subject, found=unknown).seen  # noqa: B018
    newer.graph["made"]["task_spec"] = {"metric": "kl", "seed": 4, "examples": 30}
    assert task_of_circuit(newer, model, examples=24) == TaskSpec("", 24, 5, "kl")
    newer.graph["made"]["task_spec"] = {"data": "x.py:f"}
    with pytest.raises(ValueError, match=r"names data 'x\.py:f', which would run its own code"):
        task_of_circuit(newer, model)
    newer.graph["made"]["task_spec"] = {"metric": 3}
    with pytest.raises(ValueError, match=r"task_spec of the circuit\.metric 3: expected a text"):
        task_of_circuit(newer, model)


def test_what_claims_share_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[bytes] = []
    told: list[str] = []
    values = EdgeParts.values

    def watched(
        self: EdgeParts, circuits: Sequence[np.ndarray], task: Task, *rest: Any
    ) -> np.ndarray:
        measured.extend(
            task.hash.encode() + c.tobytes() + repr(rest[:2]).encode() for c in circuits
        )
        return values(self, circuits, task, *rest)

    monkeypatch.setattr(EdgeParts, "values", watched)

    def of(name: str, edges: int) -> dict[str, Any]:
        least = 0.5 if name.endswith("less") else 0.9
        return {
            **HOLDS,
            "name": name,
            "with": {"least": least},
            "circuit": {"edges": EDGES[:edges]},
        }

    claims = [of("all", 3), of("all, less", 3), of("two", 2), of("two, less", 2)]
    file = read_claims(written(folder, *claims))

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: told.append(name)

    verify(file, Workspace(folder / "ws"), folder=folder, stage=stage)
    assert len(measured) == len({*measured}) > 0
    assert list(dict.fromkeys(told)) == ["all", "two"], "the others had nothing to run"


def test_other_examples_are_another_run_and_another_task_is_another_claim():
    file = ClaimFile("a", "addition-by-hand", "1" * 64, (), TaskSpec(examples=24))
    claim = Claim("a", "sufficient", "faithfulness", {})
    model = load_model("addition-by-hand")
    subject = Subject(model, load_claims_task(model, file.task))

    def terms(**fields: Any) -> tuple[str, dict[str, Any]]:
        return terms_of(replace(file, task=replace(file.task, **fields)), claim, subject)

    identity, first = terms()
    assert terms(take="random") == (identity, {**first, "task_take": "random"})
    assert terms(seed=9) == (identity, {**first, "task_seed": 9})
    others = [
        terms(**f)[0]
        for f in (
            {"metric": "kl"},
            {"counterpart": "grey"},
            {"labels": "names"},
            {"one_class": "a"},
        )
    ]
    assert len({identity, *others}) == 5


EDIT = {
    "claim": "effect",
    "test": "edit-effect",
    "with": {"edits": ["zero nowhere:1"], "least": 0, "most": 1},
}
UNIT = {"claim": "curve-detector", "test": "tuning", "with": {"unit": "nowhere:1", "angle": 0}}
SUMS = {
    "claim": "algorithm",
    "test": "specification",
    "with": {"algorithm": "sums", "tokens": ["0"]},
}


@pytest.mark.parametrize(
    ("claims", "fields", "said"),
    [
        ((HOLDS,), {"circuit": {"edges": ["mlp:0 -> logit"]}}, "unknown edge of addition-by-hand 'mlp:0 -> logit'"),
        ((HOLDS,), {"circuit": {"saved": "nothing"}}, "no circuit 'nothing' for weights"),
        ((HOLDS,), {"circuit": {"file": "nothing.json"}}, "nothing.json"),
        ((HOLDS,), {"circuit": {"units": ["blocks.0.attn.hook_z:9"]}}, "blocks.0.attn.hook_z"),
        ((HOLDS,), {"model": "induction-by-hand"}, "stale"),
        ((HOLDS,), {"model": "x.py:f"}, "would run its own code"),
        ((HOLDS,), {"task": {"spec": "nonsense"}}, "nonsense"),
        ((HOLDS,), {"task": {"spec": "x.py:f"}}, "names task 'x.py:f', which would run its own code"),
        ((HOLDS,), {"task": {"data": "x.py:f"}}, "names data 'x.py:f', which would run its own code"),
        ((HOLDS,), {"task": {"counterparts": "x.py:f"}}, "names counterparts 'x.py:f', which would run"),
        ((HOLDS,), {"task": {"labels": "x.py:f"}}, "names labels 'x.py:f', which would run its own code"),
        ((HOLDS,), {"task": {"one_class": "a"}}, "expected both classes, and data with images of them"),
        ((HOLDS,), {"task": {"counterpart": "grey"}}, "counterpart 'grey' is of images"),
        (({"claim": "role", "test": "head-role", "with": {"heads": ["9.9"], "role": "induction"}},), {}, "9.9"),
        (({"claim": "role", "test": "head-role", "with": {"heads": ["0.0"], "role": "chef"}},), {}, "role 'chef'"),
        ((HOLDS, EDIT), {}, "nowhere"),
        ((HOLDS, UNIT), {}, "nowhere"),
        ((HOLDS, SUMS), {}, "sums"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(
    folder: Path, capsys, claims: tuple[Any, ...], fields: dict[str, Any], said: str
):
    code = run(["verify", written(folder, *claims, **fields)])
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert code == (4 if said == "stale" else 2)
    assert len(shown.err.strip().splitlines()) <= 1
    if code == 2:
        assert not Workspace(folder / "ws").database.there(), "nothing was registered"


def test_a_file_from_a_recipe(folder: Path, capsys):
    recipe, out = folder / "less.json", folder / "less.yaml"
    model = load_model("addition-by-hand")
    Recipe.of(model, [read_edit(model, "scale blocks.0.attn.hook_z:0 factor=0.5")]).save(recipe)
    assert (
        run(["claim", "new", "addition-by-hand", "--recipe", str(recipe), "--out", str(out)]) == 2
    )
    assert "--least and --most belong to --recipe" in capsys.readouterr().err
    said = [
        "claim",
        "new",
        "addition-by-hand",
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        "--examples",
        "24",
    ]
    assert run([*said, "--least", "0.5", "--most", "20"]) == 0
    [claim] = read_claims(out).claims
    assert claim.settings["edits"] == ("scale units=blocks.0.attn.hook_z:0 factor=0.5",)
    assert (claim.settings["least"], claim.settings["most"]) == (0.5, 20)


@pytest.mark.nightly
def test_all_cases_are_what_they_were():
    assert run(["verify", "--all", str(CASES), "--workspace", "cache"]) == 0


def test_cases_are_as_recorded():
    paths = sorted(CASES.rglob("claims.yaml"))
    assert [p.parent.name for p in paths] == [
        "curve_detector",
        "imagenet",
        "induction",
        "ioi",
        "modular_addition",
    ]
    for path in paths:
        file = read_claims(path)
        recorded = read_recorded(path, file)
        assert recorded is not None
        assert recorded.exit_code(file) == 0
        assert recorded.seconds < 300
        assert path.parent.name == "ioi" or file.model_hash == load_model(file.model).hash
        assert any(claim.expect == "refuted" for claim in file.claims)


@pytest.mark.models
def test_the_case_of_a_language_model_is_about_the_model_that_is_fetched():
    file = read_claims(CASES / "ioi/claims.yaml")
    fetched_smollm2()
    assert file.model_hash == load_model(file.model).hash
