"""Files of a workspace that somebody has changed: it is noticed, or the word used claims no more than was checked.

`docs/tampering.md` is written from the table below; `make_page` is what it must hold.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from circuits.cli.main import run
from circuits.edits.activations import zero
from circuits.edits.auditing import head
from circuits.edits.ledger import Ledger
from circuits.edits.recipes import Recipe
from circuits.edits.records import read_edit
from circuits.graph import GraphStore
from circuits.graph.circuit import CircuitGraph
from circuits.graph.formats import read_circuit, write_circuit
from circuits.graph.saved import save_circuit
from circuits.harvesting import harvest
from circuits.history import content_hash
from circuits.models.adapter.hooked_model import HookedModel
from circuits.stimuli import open_source
from circuits.units import Unit
from circuits.weights import build_graph
from circuits.workspace import Workspace
from tests.conftest import Branches, seeded

PAGE = Path(__file__).parents[1] / "docs" / "tampering.md"


@dataclass(frozen=True)
class Place:
    """A copy of the workspace, with the model that it is of and the head that was kept elsewhere."""

    root: Path
    model: HookedModel
    head: str

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    @property
    def store(self) -> Path:
        return next(self.workspace.store_folders(self.model.hash))

    @property
    def graph(self) -> Path:
        return self.workspace.model_folder(self.model.hash) / "graph.h5"


def _sql(*statements: str, rehash: bool = False) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.root / "workspace.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
            if rehash:
                _hash_again(connection)

    return change


def _planted(kind: str, name: str) -> Callable[[Place], None]:
    """A trigger that empties the ledger, written into the schema itself under another kind and name."""
    trigger = (
        f"CREATE TRIGGER {name} AFTER INSERT ON edit_events BEGIN DELETE FROM edit_events; END"
    )
    row = f"'{kind}', '{name}', 'edit_events', 0, '{trigger}'"
    return _sql(
        "PRAGMA writable_schema=ON",
        f"INSERT INTO sqlite_master VALUES ({row})",
        "PRAGMA schema_version=99",
    )


def _hash_again(connection: sqlite3.Connection) -> None:
    """What an attacker who knows the code does: every event gets the hash of its text, and of the one before it."""
    previous: dict[str, str] = {}
    rows = connection.execute("SELECT id, model_hash, body FROM edit_events ORDER BY id").fetchall()
    for i, model_hash, body in rows:
        raw = json.loads(body) | {"previous": previous.get(model_hash, model_hash)}
        text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous[model_hash] = content_hash(text)
        connection.execute(
            "UPDATE edit_events SET hash=?, body=? WHERE id=?", (previous[model_hash], text, i)
        )


def _forged(body: Any) -> Callable[[Place], None]:
    """A row of the ledger with a body that is none, under the right hash."""

    def change(place: Place) -> None:
        row = (place.model.hash, "main", content_hash(body), body)
        query = "INSERT INTO edit_events (model_hash, branch, hash, body) VALUES (?, ?, ?, ?)"
        with closing(sqlite3.connect(place.root / "workspace.db", isolation_level=None)) as made:
            made.execute(query, row)

    return change


def _appended(place: Place) -> None:
    Ledger(place.workspace.database, place.model).apply(zero("cat:3"), author="somebody else")


def _on_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    def changed(place: Place) -> None:
        path = {"store": place.store, "graph": place.graph.parent}.get(
            name.split("/")[0], place.root
        )
        path = path / name.rpartition("/")[2]
        path.write_bytes(change(path.read_bytes()))

    return changed


def _flipped(data: bytes) -> bytes:
    """One bit of a text that the ledger holds is another."""
    at = data.index(b'"note":"first"') + 10
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _on_json(name: str, change: Callable[[Any], Any]) -> Callable[[Place], None]:
    def edited(data: bytes) -> bytes:
        raw = json.loads(data)
        change(raw)
        return json.dumps(raw).encode()

    return _on_bytes(name, edited)


def _removed(name: str) -> Callable[[Place], None]:
    def remove(place: Place) -> None:
        (place.store if name.startswith("store/") else place.root).joinpath(
            name.rpartition("/")[2]
        ).unlink()

    return remove


def _replaced(make: Callable[[Path], object]) -> Callable[[Place], None]:
    """Something that is no file under the name of the database."""

    def change(place: Place) -> None:
        path = place.root / "workspace.db"
        path.unlink()
        make(path)

    return change


def _numbers(name: str, manifest: bool = False) -> Callable[[Place], None]:
    """Another number in a file of the store, and its checksum in the manifest, too."""

    def change(place: Place) -> None:
        path, before = place.store / name, file_text(place.store / name)
        with h5py.File(path, "r+") as file:
            file["summary/maximum"][...] = 7.0
        if manifest:
            listed = place.store / "manifest.jsonl"
            listed.write_text(listed.read_text().replace(before, file_text(path)))

    return change


def file_text(path: Path) -> str:
    """The checksum of a file, as a manifest has it."""
    return content_hash(path.read_bytes())


def _index(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    """Another index of the graph."""

    def changed(place: Place) -> None:
        with h5py.File(place.graph, "r+") as file:
            text = change(bytes(file["index"][()]))
            del file["index"]
            file["index"] = np.frombuffer(text, np.uint8)

    return changed


def _weights(place: Place) -> None:
    with h5py.File(place.graph, "r+") as file:
        names: list[str] = []
        file.visit(lambda name: names.append(name) if name.endswith("kernels") else None)
        file[names[0]][...] = 7.0


# --- who could notice it ---------------------------------------------------------------------------

VERIFY, HEAD, STORE = "`edit verify`", "`edit verify --head`", "`store verify`"
OPENED, APPLIED = "opening it", "using it with the model"


def _command(*words: str) -> Callable[[Place, Any], tuple[int, str]]:
    def check(place: Place, capsys: Any) -> tuple[int, str]:
        given = [w.format(head=place.head, store=place.store) for w in words]
        capsys.readouterr()
        code = run([*given, "--workspace", str(place.root)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return check


def _library(work: Callable[[Place], object]) -> Callable[[Place, Any], tuple[int, str]]:
    def check(place: Place, _: Any) -> tuple[int, str]:
        try:
            work(place)
        except (ValueError, KeyError) as error:  # what the command line says with exit code 2
            return 2, str(error.args[0])
        return 0, ""

    return check


def _read_ledger(place: Place) -> None:
    ledger = Ledger(place.workspace.database, place.model)
    for branch in ledger.branches():
        ledger.entries(branch)
        ledger.undone(branch)
    for event in ledger.events():
        if event.report:
            ledger.reports(event.entry)
    ledger.move_to(place.model.hash)


def _open_graph(place: Place) -> None:
    GraphStore(place.graph.parent, place.model.hash).close()


def _apply_recipe(place: Place) -> None:
    recipe = Recipe.load(place.root / "recipe.json")
    recipe.check(place.model)


def _use_circuit(place: Place) -> None:
    found = read_circuit(place.root / "circuit.json")
    found.checked(place.model.hash, {s.name: s.n_units for s in place.model.sites})


CHECKS: Mapping[str, Mapping[str, Callable[[Place, Any], tuple[int, str]]]] = {
    "ledger": {
        VERIFY: _command("edit", "verify"),
        HEAD: _command("edit", "verify", "--head", "{head}"),
        OPENED: _library(_read_ledger),
    },
    "store": {STORE: _command("store", "verify", "{store}")},
    "graph": {OPENED: _library(_open_graph)},
    "recipe": {APPLIED: _library(_apply_recipe)},
    "circuit": {APPLIED: _library(_use_circuit)},
}

# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is done to a file, and what each check says of it; a check that is not named says nothing."""

    file: str
    done: str
    tamper: Callable[[Place], None]
    says: Mapping[str, str] = field(default_factory=dict)


CONSISTENT, SINCE = "consistent: ", "unchanged up to that head: "
OTHER = "is not what it was then"
_EVENTS = (
    "INSERT INTO edit_events (model_hash, branch, hash, body) SELECT model_hash, branch, hash, body"
)

LEDGER = [
    ("its last events are deleted", _sql("DELETE FROM edit_events WHERE id > 4"), {
        VERIFY: "ledger entry [0-9a-f]+ is in no event", HEAD: "there are 4 events of the ledger, and 7 at that head"}),
    ("its last events and what they made are deleted", _sql(
        "DELETE FROM edit_events WHERE id > 4", "DELETE FROM edit_entries WHERE rowid > 3"), {
        VERIFY: CONSISTENT, HEAD: "there are 4 events of the ledger, and 7 at that head"}),
    ("all its rows are deleted", _sql("DELETE FROM edit_events", "DELETE FROM edit_entries"), {
        VERIFY: CONSISTENT, HEAD: "there are 0 events of the ledger, and 7 at that head"}),
    ("all its tables are dropped", _sql(
        *(f"DROP TABLE edit_{table}" for table in ("events", "entries", "originals", "reports"))), {
        VERIFY: CONSISTENT, HEAD: "there are 0 events of the ledger, and 7 at that head"}),
    ("an edit is added under another's name, by the library", _appended, {
        VERIFY: CONSISTENT, HEAD: SINCE}),
    ("the last event is added a second time", _sql(f"{_EVENTS} FROM edit_events WHERE id=7"), {
        VERIFY: "event 8 does not follow the one before it", HEAD: "event 8 does not follow"}),
    ("an author is changed", _sql("UPDATE edit_events SET body=replace(body, 'ann', 'bob') WHERE id=2"), {
        VERIFY: "was changed: its text has another hash", HEAD: OTHER, OPENED: "was changed"}),
    ("an author is changed and the chain hashed again", _sql(
        "UPDATE edit_events SET body=replace(body, 'ann', 'bob')", rehash=True), {
        VERIFY: CONSISTENT, HEAD: OTHER}),
    ("an undo is taken out and the chain hashed again", _sql("DELETE FROM edit_events WHERE id=5", rehash=True), {
        VERIFY: CONSISTENT, HEAD: "there are 6 events of the ledger, and 7"}),
    ("an event in the middle is deleted", _sql("DELETE FROM edit_events WHERE id=2"), {
        VERIFY: "does not follow the one before it", HEAD: "there are 6 events of the ledger, and 7"}),
    ("two events change places", _sql(
        "UPDATE edit_events SET id=90 WHERE id=2", "UPDATE edit_events SET id=2 WHERE id=3",
        "UPDATE edit_events SET id=3 WHERE id=90"), {
        VERIFY: "does not follow the one before it", HEAD: OTHER}),
    ("an event is moved to another branch", _sql("UPDATE edit_events SET branch='other' WHERE id=2"), {
        VERIFY: "it stands under another model or branch", HEAD: OTHER}),
    ("a note of an entry is changed", _sql("UPDATE edit_entries SET body=replace(body, 'first', 'worst')"), {
        VERIFY: "was changed: its text has another hash", HEAD: "was changed", OPENED: "was changed"}),
    ("an entry is deleted", _sql("DELETE FROM edit_entries WHERE rowid=1"), {
        VERIFY: "stands on one that is missing", HEAD: "is missing", OPENED: "no entry"}),
    ("stored original bytes are changed", _sql("UPDATE edit_originals SET bytes=x'00'"), {
        VERIFY: "original bytes [0-9a-f]+ were changed", HEAD: "were changed"}),
    ("stored original bytes are deleted", _sql("DELETE FROM edit_originals"), {
        VERIFY: "original bytes [0-9a-f]+ of .* are missing", HEAD: "are missing"}),
    ("a report is changed", _sql("UPDATE edit_reports SET body='{}'"), {
        VERIFY: "report [0-9a-f]+ was changed", HEAD: "was changed", OPENED: "was changed or is missing"}),
    ("a report is deleted", _sql("DELETE FROM edit_reports"), {
        VERIFY: "report [0-9a-f]+ is missing", HEAD: "is missing", OPENED: "was changed or is missing"}),
    ("a body is no JSON, under its right hash", _forged("no JSON"), {
        VERIFY: "is not JSON", HEAD: "is not JSON", OPENED: "is not JSON"}),
    ("a body has other types, under its right hash", _forged('{"schema": 1, "kind": 3}'), {
        VERIFY: "is not of type str", HEAD: "is not of type str", OPENED: "is not of type str"}),
    ("a body has NUL bytes, under its right hash", _forged('{"schema": "\x00"}'), {
        VERIFY: "is not JSON", HEAD: "is not JSON", OPENED: "is not JSON"}),
    ("a body is bytes and no text", _forged(b"\x00\xff"), {
        VERIFY: "was changed", HEAD: "was changed", OPENED: "was changed"}),
    ("a trigger is planted", _sql("CREATE TRIGGER t AFTER INSERT ON edit_events BEGIN DELETE FROM edit_events; END"), {
        VERIFY: "holds the trigger 't'", HEAD: "holds the trigger 't'", OPENED: "holds the trigger 't'"}),
    ("a view is planted", _sql("CREATE VIEW v AS SELECT * FROM records"), {
        VERIFY: "holds the view 'v'", HEAD: "holds the view 'v'", OPENED: "holds the view 'v'"}),
    ("a trigger is hidden as an index of SQLite's own", _planted("TRIGGER", "sqlite_autoindex_edit_events_9"), {
        VERIFY: "holds the 'TRIGGER' 'sqlite_autoindex_edit_events_9'", HEAD: "which circuits does not make",
        OPENED: "which circuits does not make"}),
    ("a table is added", _sql("CREATE TABLE more (x)"), {
        VERIFY: "holds the table 'more'", HEAD: "holds the table 'more'"}),
    ("a table gets a column", _sql("ALTER TABLE edit_entries ADD COLUMN more TEXT"), {
        VERIFY: "table 'edit_entries' of the database was altered", HEAD: "was altered"}),
    ("a constraint is added that deletes what was there", _sql(
        "ALTER TABLE edit_reports RENAME TO x", "CREATE TABLE edit_reports (hash TEXT PRIMARY KEY, body TEXT NOT NULL, "
        "UNIQUE (body) ON CONFLICT REPLACE)", "INSERT INTO edit_reports SELECT * FROM x", "DROP TABLE x"), {
        VERIFY: "table 'edit_reports' of the database was altered", HEAD: "was altered"}),
    ("an index is dropped", _sql("DROP INDEX edit_events_of"), {
        VERIFY: "index 'edit_events_of' of the database is missing", HEAD: "is missing"}),
    ("a bit of a note is flipped in the file", _on_bytes("workspace.db", _flipped), {
        VERIFY: "was changed", HEAD: "was changed", OPENED: "was changed"}),
    ("the file is cut in half", _on_bytes("workspace.db", lambda data: data[: len(data) // 2]), {
        VERIFY: "the database is damaged", HEAD: "the database is damaged", OPENED: "cannot be read"}),
    ("the file is another", _on_bytes("workspace.db", lambda _: b"no database" * 999), {
        VERIFY: "the database is damaged", HEAD: "the database is damaged", OPENED: "cannot be read"}),
    ("a folder takes its place", _replaced(Path.mkdir), {
        VERIFY: "workspace.db' is a folder", HEAD: "is a folder", OPENED: "is a folder"}),
    ("a pipe takes its place", _replaced(os.mkfifo), {
        VERIFY: "workspace.db' is no regular file", HEAD: "is no regular file", OPENED: "is no regular file"}),
    ("a link to nothing takes its place", _replaced(lambda path: path.symlink_to("gone")), {
        VERIFY: "workspace.db' is a link to a file that is not there", HEAD: "is a link", OPENED: "is a link"}),
    ("the file is deleted", _removed("workspace.db"), {
        VERIFY: "has no workspace.db", HEAD: "there is no database any more"}),
]  # fmt: skip

SAVED = [
    ("the body of a saved circuit is no JSON", _sql("UPDATE records SET body='x' WHERE version=2"), {
        VERIFY: "circuit 'mine' version 2 is damaged", HEAD: "is damaged"}),
    ("the body of a saved circuit is another", _sql("UPDATE records SET body=replace(body, '1.0', '2.0')"), {
        VERIFY: CONSISTENT, HEAD: OTHER}),
    ("the author of a version is changed", _sql("UPDATE records SET author='bob'"), {
        VERIFY: CONSISTENT, HEAD: OTHER}),
    ("a version in the middle is deleted", _sql("DELETE FROM records WHERE version=2"), {
        VERIFY: "does not follow version 1", HEAD: "does not follow version 1"}),
    ("the last version is deleted", _sql("DELETE FROM records WHERE version=3"), {
        VERIFY: CONSISTENT, HEAD: "there are 2 saved versions, and 3 at that head"}),
]  # fmt: skip

STORES = [
    ("a number of a shard is changed", _numbers("shard-00000.h5"), {STORE: "shard-00000.h5 +damaged"}),
    ("a number of the statistics is changed", _numbers("statistics.h5"), {STORE: "statistics.h5 +damaged"}),
    ("a number and its checksum are changed", _numbers("statistics.h5", manifest=True), {STORE: CONSISTENT}),
    ("a shard is deleted", _removed("store/shard-00000.h5"), {STORE: "shard-00000.h5 +missing"}),
    ("the manifest is emptied", _on_bytes("store/manifest.jsonl", lambda _: b""), {STORE: "statistics.h5 +unnoted"}),
    ("the manifest is no JSON", _on_bytes("store/manifest.jsonl", lambda data: b"x" + data), {
        STORE: "line 1 +damaged"}),
    ("the provenance is no JSON", _on_bytes("store/provenance.json", lambda _: b"["), {
        STORE: "damaged provenance.json"}),
    ("the provenance has other types", _on_json("store/provenance.json", lambda raw: raw.update(same=[])), {
        STORE: "damaged provenance.json"}),
    ("the provenance names other data", _on_json("store/provenance.json", lambda raw: raw.update(data="x")), {
        STORE: CONSISTENT}),
]  # fmt: skip

GRAPHS = [
    ("its index is no JSON", _index(lambda text: text[1:]), {OPENED: "is no graph of this version"}),
    ("its index lacks a field", _index(lambda text: text.replace(b'"sites"', b'"sits"')), {
        OPENED: "is no graph of this version"}),
    ("it names another model", _index(lambda text: re.sub(rb'"model_hash": "..', b'"model_hash": "zz', text)), {
        OPENED: "was built for weights zz"}),
    ("the file is cut", _on_bytes("graph/graph.h5", lambda data: data[:200]), {OPENED: "is no graph of this version"}),
    ("a weight is changed", _weights, {}),
]  # fmt: skip

RECIPES = [
    ("it is no JSON", _on_bytes("recipe.json", lambda data: data[:-3]), {APPLIED: "is not JSON"}),
    ("a field is there twice", _on_bytes("recipe.json", lambda data: b'{"seed": 1,' + data[1:]), {
        APPLIED: "field 'seed' is repeated"}),
    ("an operator is unknown", _on_json("recipe.json", lambda raw: raw["edits"][0].update(operator="run")), {
        APPLIED: "unknown edit operator"}),
    ("it names another model", _on_json("recipe.json", lambda raw: raw.update(model_hash="0" * 64)), {
        APPLIED: "recipe is for model 0000"}),
    ("a factor is changed", _on_json("recipe.json", lambda raw: raw["edits"][0].update(factor=3.0)), {}),
]  # fmt: skip

CIRCUITS = [
    ("a strength is a text", _on_json("circuit.json", lambda raw: raw["edges"][0].update(norm="x")), {
        APPLIED: "norm of the edge .* is 'x'"}),
    ("an edge is there twice", _on_json("circuit.json", lambda raw: raw["edges"].append(raw["edges"][0])), {
        APPLIED: "is listed twice"}),
    ("it names another model", _on_json("circuit.json", lambda raw: raw["graph"].update(model_hash="0" * 64)), {
        APPLIED: "circuit belongs to model 0000"}),
    ("it names a unit that is not there", _on_json("circuit.json", lambda raw: raw["nodes"].append({"id": "cat:99"})), {
        APPLIED: "units that the model does not have: cat:99"}),
    ("a strength is changed", _on_json("circuit.json", lambda raw: raw["edges"][0].update(norm=9.0)), {}),
]  # fmt: skip

TABLE = {
    "ledger": [Case("`workspace.db`, ledger", *row) for row in LEDGER]
    + [Case("`workspace.db`, saved versions", *row) for row in SAVED],
    "store": [Case("activation store", *row) for row in STORES],
    "graph": [Case("`graph.h5`", *row) for row in GRAPHS],
    "recipe": [Case("recipe file", *row) for row in RECIPES],
    "circuit": [Case("circuit file", *row) for row in CIRCUITS],
}
ALL = [(kind, case) for kind, cases in TABLE.items() for case in cases]


# --- the tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The workspace as it was written."""
    root = tmp_path_factory.mktemp("kept")
    place, model = Workspace(root / "workspace"), HookedModel(seeded(Branches()), (3, 8, 10))
    ledger = Ledger(place.database, model)
    ledger.apply(zero("cat:1"), "first", author="ann")
    ledger.apply(read_edit(model, "scale_weights into=cat:5 factor=2"), author="ann")
    ledger.apply(zero("cat:2"), author="ann")
    ledger.measured({"kl": 0.25}, author="ann")
    ledger.undo(author="ann")
    ledger.branch("b", author="ann")
    ledger.apply(zero("cat:4"), branch="b", author="ann")
    graph = CircuitGraph(model_hash=model.hash)
    graph.add_nodes_from([Unit("cat", 1), Unit("bn", 2)])
    graph.connect(Unit("cat", 1), Unit("bn", 2), "weight", sum=1.0)
    for _ in range(3):
        save_circuit(place.database, "mine", graph, author="ann")
    write_circuit(graph, place.root / "circuit.json")
    Recipe.of(model, [zero("cat:1")]).save(place.root / "recipe.json")
    build_graph(model, place.model_folder(model.hash)).close()
    (root / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (10, 8), (60 * i, 9, 90)).save(root / "images" / f"{i}.png")
    harvest(model, open_source(f"folder:{root / 'images'}"), ["cat"], place)
    return Place(place.root, model, str(ledger.chain_head()))


def _copied(kept: Place, folder: Path) -> Place:
    shutil.copytree(kept.root, folder / "workspace")
    return Place(folder / "workspace", kept.model, kept.head)


def test_nothing_is_said_of_what_nobody_changed(kept: Place, tmp_path: Path, capsys: Any) -> None:
    place = _copied(kept, tmp_path)
    for checks in CHECKS.values():
        for name, check in checks.items():
            code, said = check(place, capsys)
            assert code == 0, (name, said)
            assert said == "" or said.splitlines()[-1].startswith((CONSISTENT, SINCE)), said


@pytest.mark.parametrize(
    ("kind", "case"), ALL, ids=[f"{c.file}-{c.done}".replace("`", "") for _, c in ALL]
)
def test_a_change_is_noticed_or_the_word_claims_no_more(
    kind: str, case: Case, kept: Place, tmp_path: Path, capsys: Any
) -> None:
    place = _copied(kept, tmp_path)
    case.tamper(place)
    for name, check in CHECKS[kind].items():
        code, said = check(place, capsys)
        wanted = case.says.get(name, "")
        claims_nothing = wanted in ("", CONSISTENT, SINCE)
        assert (code == 0) == claims_nothing, (name, code, said)
        assert re.search(wanted, said), (name, said)
        assert "Traceback" not in said
        assert "as it was written" not in said
        assert all(len(line) < 500 for line in said.splitlines())
        if name in (VERIFY, HEAD, STORE) and code == 0:
            assert wanted, f"{name} says something: {said}"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_what_is_no_file_is_not_written_to(make: Callable[[Path], object], tmp_path: Path) -> None:
    database = Workspace(tmp_path).database
    make(database.path)
    with pytest.raises(ValueError, match=r"workspace.db' is (a folder|no regular file|a link)"):
        database.save("circuit", "hash", "name", {})
    with pytest.raises(ValueError, match=r"workspace.db' is (a folder|no regular file|a link)"):
        head(database)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_head_that_is_empty_is_refused(tmp_path: Path, capsys: Any) -> None:
    """As from `--head "$HEAD"` with a variable that is not set: nothing would be compared."""
    assert run(["edit", "verify", "--head", "", "--workspace", str(tmp_path)]) == 2
    assert "head '' is not of the form COUNT-COUNT-HASH" in capsys.readouterr().err


_ABOUT = """# What notices a change

Somebody changes a file of a workspace. Nothing inside a file can prove that it is as it was written: who can write the
file can write its hashes, too. So `consistent` is all that is said of files without a fault, and `circuits edit head`
prints what to keep elsewhere. Where nothing is claimed, the file is used as it is: recipes and circuits are texts that
people may change, and a graph is built again in seconds. Nothing is written into a database that holds
tables, constraints, indices, triggers or views that circuits does not make.

`tests/test_tampering.py` does each of these changes, and writes this table.
"""


def make_page() -> str:
    """The page of the documentation."""
    lines = [_ABOUT, "| | file | what is done | what says what |", "|---|---|---|---|"]
    for number, (_, case) in enumerate(ALL, 1):
        said = [f"{name}: {_plain(text)}" for name, text in case.says.items()]
        cell = "; ".join(said) or "nothing is claimed"
        lines.append(f"| {number} | {case.file} | {case.done} | {cell} |")
    return "\n".join(lines) + "\n"


def _plain(pattern: str) -> str:
    """What a pattern stands for, in words."""
    words = pattern.replace("[0-9a-f]+", "…").replace(".*", "…").replace(" +", " ")
    return f"“{words.strip().removesuffix(':')}”"


def test_the_page_is_this_table() -> None:
    assert len(ALL) >= 40
    assert PAGE.read_text() == make_page(), "write it again: python -m tests.test_tampering"


if __name__ == "__main__":
    PAGE.write_text(make_page())
