from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import time
import warnings
from contextlib import closing, suppress
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from benchmarks.edit_fuzz import sequence
from circuits.database import Database
from circuits.edits.activations import zero
from circuits.edits.auditing import verify
from circuits.edits.entries import EVENTS, LedgerError
from circuits.edits.ledger import Ledger
from circuits.edits.originals import original_bytes, tensor_hash, with_original
from circuits.edits.recipes import Recipe, edited
from circuits.history import Head, content_hash
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from tests.random_edits import RandomEdits


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "workspace.db")


@pytest.fixture(scope="module")
def shapes() -> HookedModel:
    return load_model("shapes")


@pytest.mark.parametrize("name", ["shapes", "induction"])
def test_random_sequences_come_back_to_the_bit(name: str, database: Database) -> None:
    ledger = Ledger(database, load_model(name))
    for seed in range(6):
        sequence(ledger, f"s{seed}", seed, steps=12)
    again = Ledger(database, load_model(name))
    for seed in range(6):
        assert all(r.same for r in again.replay(f"s{seed}"))
    assert verify(database) == []


def test_applying_is_what_a_recipe_does(database: Database, branches: HookedModel) -> None:
    ledger, draw = Ledger(database, branches), RandomEdits(branches, 0)
    edits = [draw.edit() for _ in range(8)]
    ledger.apply(edits[:3], "first")
    ledger.apply(Recipe.of(branches, edits[3:], "then", "someone"))
    x = branches.input.example(2)
    with edited(branches, edits):
        wanted, wanted_hash = branches.logits(x), branches.hash
    with ledger.edited():
        assert torch.equal(branches.logits(x).nan_to_num(), wanted.nan_to_num())
        assert branches.hash == wanted_hash
    assert ledger.recipe().edits == tuple(edits)
    entries = ledger.entries()
    assert [e.note for e in entries] == ["first"] * 3 + ["then"] * 5
    assert entries[-1].author == "someone"
    assert entries[0].parent == branches.hash
    assert all(b.parent == a.hash for a, b in pairwise(entries))


def test_undo_redo_and_branches(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    one, two, three = (ledger.apply(zero(f"cat:{i}"))[0] for i in range(3))
    assert ledger.undo() == three
    assert ledger.undo() == two
    assert [e.hash for e in ledger.undone()] == [three.hash, two.hash]
    assert ledger.redo() == two
    ledger.branch("other", at=one.hash[:8])
    four = ledger.apply(zero("cat:4"), branch="other")[0]
    assert four.parent == one.hash
    assert ledger.head() == two.hash
    assert ledger.redo() == three
    ledger.undo()
    ledger.apply(zero("cat:5"))
    assert ledger.undone() == []
    with pytest.raises(ValueError, match="no undone edit"):
        ledger.redo()
    assert ledger.branches() == ["main", "other"]
    assert [e.kind for e in ledger.events("other")] == ["branch", "apply"]
    with pytest.raises(ValueError, match="there is a branch 'other' already"):
        ledger.branch("other")
    with pytest.raises(ValueError, match="1 to 100 printable"):
        ledger.branch("a\nb")
    with pytest.raises(KeyError, match=r"no branch 'nowhere' of .*: there are main, other"):
        ledger.apply(zero("cat:1"), branch="nowhere")
    for branch in ("other", "main"):
        while ledger.head(branch) != branches.hash:
            ledger.undo(branch)
        with pytest.raises(ValueError, match="no edit to undo"):
            ledger.undo(branch)
    assert verify(database) == []


def test_reports_stand_beside_their_entry(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    entry = ledger.apply(zero("cat:1"))[0]
    ledger.measured({"kl": 0.25})
    ledger.measured({"kl": None})
    assert ledger.reports(entry.hash) == [{"kl": 0.25}, {"kl": None}]
    assert ledger.entry(entry.hash[:6]) == entry
    with pytest.raises(KeyError, match="no entry 'ffff'"):
        ledger.entry("ffff")
    with pytest.raises(KeyError, match="first digits"):
        ledger.entry("*")


def test_bad_edits_are_not_written(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    with pytest.raises(ValueError, match="edit 2: unit cat:99 does not exist"):
        ledger.apply([zero("cat:1"), zero("cat:99")])
    with pytest.raises(ValueError, match="recipe is for model"):
        ledger.apply(Recipe((zero("cat:1"),), "b" * 64))
    with pytest.raises(ValueError, match="at least one"):
        ledger.apply([])
    assert ledger.events() == []


def test_original_bytes_give_everything_back() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(7, 5, 3, generator=generator)
    for kind in ("one", "scattered", "all", "sign"):
        after = before.clone()
        if kind == "one":
            after[3, 2, 1] = float("inf")
        elif kind == "scattered":
            after.view(-1)[::6] = 0
        elif kind == "all":
            after += 1
        else:
            after[0, 0, 0] = 0.0
            before[0, 0, 0] = -0.0  # equal as numbers, not as bits
        assert tensor_hash(with_original(after, original_bytes(before, after))) == tensor_hash(
            before
        )


def test_undo_needs_the_edited_weights_only(database: Database, shapes: HookedModel) -> None:
    """The bytes in the ledger bring back the original, without the model as it was."""
    ledger = Ledger(database, shapes)
    entry = ledger.apply(RandomEdits(shapes, 1).edit("low_rank"))[0]
    (name,) = entry.before
    edited_tensor = ledger.move_to(entry.hash)[name]
    with sqlite3.connect(database.path) as connection:
        (data,) = connection.execute("SELECT bytes FROM edit_originals").fetchone()
    assert torch.equal(with_original(edited_tensor, data), shapes.parameters[name].data)


def test_edits_in_force_and_other_weights_are_refused(
    database: Database, branches: HookedModel
) -> None:
    ledger, draw = Ledger(database, branches), RandomEdits(branches, 0)
    edit = draw.edit("low_rank")
    ledger.apply(edit)
    for work in (
        lambda: ledger.apply(edit),
        ledger.undo,
        ledger.replay,
        lambda: ledger.edited().__enter__(),
    ):
        with (
            edited(branches, [zero("cat:1")]),
            pytest.raises(ValueError, match="is edited: use its ledger outside"),
        ):
            work()
    with ledger.edited(), pytest.raises(ValueError, match="is edited"):
        ledger.apply(edit)
    with torch.no_grad():
        next(branches.module.parameters()).add_(1)
    for work in (lambda: ledger.apply(edit), ledger.undo, ledger.replay):
        with pytest.raises(ValueError, match="is another one"):
            work()
    assert len(ledger.events()) == 1
    assert verify(database) == []


def test_training_inside_leaves_the_ledger_alone(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    (name,) = ledger.apply(RandomEdits(branches, 0).edit("low_rank"))[0].before
    with ledger.edited():
        branches.parameters[name].data.add_(1)
    ledger.apply(RandomEdits(branches, 1).edit("low_rank"))
    assert all(r.same for r in ledger.replay())


def test_a_recipe_comes_back_with_who_why_and_seed(
    database: Database, branches: HookedModel
) -> None:
    ledger = Ledger(database, branches)
    recipe = Recipe.of(branches, [zero("cat:1"), zero("cat:2")], "why", "ann", 7)
    ledger.apply(recipe)
    assert ledger.recipe() == recipe


def test_first_digits_will_do(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    one, two = (ledger.apply(RandomEdits(branches, i).edit("low_rank"))[0] for i in range(2))
    with ledger.edited(at=one.hash[:12]):
        assert tensor_hash(branches.parameters[next(iter(one.after))].data) in one.after.values()
    assert [e.hash for e in ledger.entries(at=two.hash[:10])] == [one.hash, two.hash]
    ledger.branch("start", at=branches.hash[:16])
    assert ledger.head("start") == branches.hash
    with pytest.raises(KeyError, match="first digits"):
        ledger.branch("nothing", at="")


def test_reports_stand_at_what_was_measured(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    one, two = (ledger.apply(zero(f"cat:{i}"))[0] for i in range(2))
    ledger.measured({"kl": float("nan")}, at=one.hash)
    assert ledger.reports(one.hash[:9]) == [{"kl": None}]
    assert ledger.reports(two.hash) == []
    with pytest.raises(KeyError, match="no branch 'typo'"):
        ledger.measured({}, "typo")
    assert verify(database) == []


def test_redo_sees_what_others_did_since(database: Database, branches: HookedModel) -> None:
    mine, theirs = Ledger(database, branches), Ledger(database, branches)
    mine.apply(zero("cat:1"))
    mine.undo()
    undone = mine.undone

    def meanwhile(branch: str = "main"):
        found = undone(branch)
        mine.undone = undone  # type: ignore[method-assign]
        theirs.apply(
            zero("cat:2")
        )  # the head is where it was again, but what can be redone is another
        theirs.undo()
        return found

    mine.undone = meanwhile  # type: ignore[method-assign]
    assert mine.redo().edit == zero("cat:2")
    assert verify(database) == []


def test_verify_is_not_confused_by_a_writer(database: Database, shapes: HookedModel) -> None:
    Ledger(database, shapes).apply(zero("conv2d0:1"))
    writer, seen = Writer(database, shapes, seed=5, n=60), set()
    while writer.process.is_alive():
        assert verify(database) == []
        seen.add(len(Ledger(database, shapes).events()))
    assert len(writer.said()) == 60
    assert len(seen) > 5, "it was verified between edits"


def test_a_ledger_is_read_where_nothing_can_be_written(
    database: Database, branches: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Ledger(database, branches).apply([zero("cat:1"), zero("cat:2")])
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(Database, "open", lambda *_: pytest.fail("it was opened for writing"))
    assert Ledger(database, branches).entries() == entries
    assert verify(database) == []
    assert all(step.same for step in Ledger(database, branches).replay())


def test_what_a_writer_has_not_yet_put_in_its_place_is_read_where_nothing_can_be_written(
    database: Database, branches: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(database, branches).apply(zero("cat:1"))
    with database.open() as writer:  # while it is open, the last event is in the write-ahead log
        Ledger(database, branches).apply(zero("cat:2"))
        assert writer.execute("SELECT count(*) FROM edit_entries").fetchone() == (2,)
        monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
        assert len(Ledger(database, branches).entries()) == 2


def test_a_workspace_without_a_ledger_is_verified_where_nothing_can_be_written(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.save("circuit", "h", "a", {})
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert verify(database) == []


def test_a_lock_that_is_not_let_go_is_said_in_a_line(
    database: Database, branches: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(database, branches)
    ledger.apply(zero("cat:1"))
    monkeypatch.setattr("circuits.database.PATIENCE", 0.05)
    said = r"database '.*' was locked by another process for 0.05 seconds: wait for it or stop it"
    with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BlockingIOError, match=said):
            ledger.apply(zero("cat:2"))
        other.execute("COMMIT")
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("PRAGMA journal_mode=DELETE")
        other.execute("BEGIN EXCLUSIVE")
        for read in (ledger.entries, lambda: verify(database)):
            with pytest.raises(BlockingIOError, match=said):
                read()
    assert len(ledger.entries()) == 1


# --- damage ----------------------------------------------------------------------------------------


def contents(database: Database, model: HookedModel) -> object:
    """All that can be read of a ledger."""
    ledger = Ledger(database, model)
    entries = [[e.to_dict() for e in ledger.entries(b)] for b in ledger.branches()]
    with sqlite3.connect(f"file:{database.path}?mode=ro", uri=True) as connection:
        blobs = sorted(connection.execute("SELECT * FROM edit_originals").fetchall())
        reports = sorted(connection.execute("SELECT * FROM edit_reports").fetchall())
    return entries, ledger.events(), blobs, reports


def test_a_flipped_byte_is_noticed(
    database: Database, branches: HookedModel, tmp_path: Path
) -> None:
    ledger, draw = Ledger(database, branches), RandomEdits(branches, 4)
    for _ in range(12):
        ledger.apply(draw.edit(), "a note")
    ledger.undo()
    ledger.branch("b")
    ledger.measured({"kl": 1.0}, "b")
    whole, data = contents(database, branches), database.path.read_bytes()
    chance, noticed, harmless = random.Random(0), 0, 0
    for trial in range(300):
        at = chance.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= 1 << chance.randrange(8)
        copy = Database(tmp_path / f"copy{trial}.db")
        copy.path.write_bytes(changed)
        if verify(copy):
            noticed += 1
        else:  # bytes that hold nothing: the ledger reads as it did
            assert contents(copy, branches) == whole, f"byte {at} of {len(data)} was not noticed"
            harmless += 1
        for left in tmp_path.glob(f"copy{trial}.db*"):
            left.unlink()
    assert noticed > 60, (noticed, harmless)
    texts = [e.hash.encode() for e in ledger.entries()] + [
        b'"note":"a note"',
        b'"kind":"undo"',
        b'{"kl":1.0}',
    ]
    with sqlite3.connect(database.path) as connection:
        rows = connection.execute("SELECT bytes FROM edit_originals").fetchall()
    texts += [row[0][-40:] for row in rows if data.count(row[0][-40:]) == 1]
    for i, text in enumerate(texts):  # of what the ledger holds each byte is noticed
        changed = bytearray(data)
        changed[data.index(text) + len(text) // 2] ^= 1
        copy = Database(tmp_path / f"held{i}.db")
        copy.path.write_bytes(changed)
        assert verify(copy), text


def test_missing_rows_are_noticed(
    database: Database, branches: HookedModel, tmp_path: Path
) -> None:
    ledger, draw = Ledger(database, branches), RandomEdits(branches, 4)
    for _ in range(4):
        ledger.apply(draw.edit("low_rank"))
    ledger.measured({"kl": 1.0})
    for i, statement in enumerate(
        (
            "DELETE FROM edit_entries WHERE rowid = 2",
            "DELETE FROM edit_originals WHERE rowid = 1",
            "DELETE FROM edit_events WHERE id = 2",
            "DELETE FROM edit_reports",
            "UPDATE edit_events SET branch = 'x' WHERE id = 2",
            "UPDATE edit_entries SET body = replace(body, 'low_rank', 'lowerank') WHERE rowid = 1",
            "DELETE FROM edit_events WHERE id = 5",
            "DELETE FROM edit_events WHERE id >= 4",
        )
    ):
        copy = Database(tmp_path / f"copy{i}.db")
        shutil.copy(database.path, copy.path)
        with sqlite3.connect(copy.path) as connection:
            connection.execute(statement)
        connection.close()
        if statement.endswith(
            "id = 5"
        ):  # the last report's event alone: a shorter history is one too
            continue
        assert verify(copy), statement
    database.path.write_bytes(b"not a database" * 100)
    assert "damaged" in verify(database)[0]
    assert verify(Database(tmp_path / "nowhere.db")) == []


def test_a_head_that_was_kept_shows_what_no_hash_inside_can(
    database: Database, branches: HookedModel, tmp_path: Path
) -> None:
    """A ledger that was rewritten, or cut short, is consistent, but does not match a head that was kept."""
    ledger = Ledger(database, branches)
    assert ledger.chain_head().counts == (0, 0)
    ledger.apply([zero(f"cat:{i}") for i in range(3)])
    head = ledger.chain_head()
    assert ledger.verify(head) == ledger.verify(str(head)) == []
    ledger.undo()
    database.save("unit name", branches.hash, "cat:1", {"text": "x"})
    assert ledger.chain_head().counts == (4, 1)
    assert ledger.verify(head) == []  # what came later is no fault
    later = ledger.chain_head()
    with database.writing() as connection:
        connection.execute("DELETE FROM edit_events WHERE id > 3")
    assert ledger.verify() == []
    assert ledger.verify(head) == []
    assert ledger.verify(later) == ["there are 3 events of the ledger, and 4 at that head"]
    other = Ledger(Database(tmp_path / "other.db"), branches)
    other.apply([zero(f"cat:{i}") for i in range(3)], author="somebody else")
    assert other.verify() == []
    assert "is not what it was then" in other.verify(head)[0]
    assert "no database" in Ledger(Database(tmp_path / "none.db"), branches).verify(head)[0]
    for text in ("", "3-" + head.hash, "3-0-" + "x" * 64, "x" * 5000):
        with pytest.raises(ValueError, match="is not of the form COUNT-COUNT-HASH") as error:
            Head.parse(text, 2)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("not JSON", "is not JSON"),
        ('{"schema": 1}', "its .* is not of type"),
        ('{"schema": 1, "schema": 1}', "is repeated"),
        ("[" * 5000, "nested too deeply"),
        ("[]", "has a layout that is not known"),
        (b"\x00bytes", "was changed"),
        ('{"note": "\x00"}', "is not JSON"),
    ],
)
def test_a_damaged_body_is_one_line(
    database: Database, branches: HookedModel, body: str | bytes, message: str
) -> None:
    """Also under the right hash: whoever writes the row may hash it."""
    Ledger(database, branches).apply(zero("cat:1"))
    name = content_hash(body)
    with database.writing() as connection:
        row = (branches.hash, "main", name, body)
        EVENTS.append(connection, *row)
        connection.execute("INSERT INTO edit_entries VALUES (?, ?, ?)", (name, branches.hash, body))
    found = verify(database)
    assert found
    assert any(re.search(message, line) for line in found)
    assert all("\n" not in line and len(line) < 400 for line in found)
    ledger = Ledger(database, branches)
    for read in (ledger.head, ledger.events, lambda: ledger.entry(name)):
        with pytest.raises(LedgerError, match=message):
            read()


def _dump(database: Database) -> list[str]:
    with closing(sqlite3.connect(database.path)) as connection:
        return list(connection.iterdump())


def test_tables_and_triggers_are_those_that_are_made(
    database: Database, branches: HookedModel, tmp_path: Path
) -> None:
    Ledger(database, branches).apply(zero("cat:1"))
    trigger = "CREATE TRIGGER t AFTER INSERT ON edit_events BEGIN DELETE FROM edit_events; END"
    for statement, message in (
        (trigger, "holds the trigger 't', which circuits does not make"),
        ("CREATE VIEW v AS SELECT * FROM records", "holds the view 'v'"),
        ("CREATE TABLE more (x)", "holds the table 'more'"),
        ("CREATE INDEX more ON records (name)", "holds the index 'more'"),
        ("CREATE UNIQUE INDEX more ON edit_entries (model_hash)", "holds the index 'more'"),
        (
            "DROP TABLE edit_events; CREATE TABLE edit_events (id INTEGER PRIMARY KEY, model_hash TEXT NOT NULL, "
            "branch TEXT NOT NULL, hash TEXT NOT NULL, body TEXT NOT NULL, "
            "UNIQUE (model_hash, branch) ON CONFLICT REPLACE)",
            "table 'edit_events' of the database was altered",
        ),
        ("DROP INDEX edit_events_of", "index 'edit_events_of' of the database is missing"),
        ("DROP TABLE edit_reports", "table 'edit_reports' of the database is missing"),
        (
            "ALTER TABLE edit_entries ADD COLUMN more TEXT",
            "table 'edit_entries' of the database was",
        ),
    ):
        copy = Database(tmp_path / "copy.db")
        shutil.copy(database.path, copy.path)
        with contextlib.closing(sqlite3.connect(copy.path, isolation_level=None)) as connection:
            connection.executescript(statement)
        assert any(message in line for line in verify(copy)), statement
        if "TRIGGER" in statement or "VIEW" in statement:
            with pytest.raises(ValueError, match="which circuits does not make"):
                Ledger(copy, branches).head()
        if not statement.startswith(
            ("DROP INDEX", "DROP TABLE edit_reports")
        ):  # they are made again
            before = _dump(copy)
            for write in (
                lambda copy=copy: copy.save("kind", "hash", "name", 1),
                lambda copy=copy: Ledger(copy, branches).apply(zero("cat:2")),
            ):
                with pytest.raises(ValueError, match="`circuits edit verify` lists what is wrong"):
                    write()
            assert _dump(copy) == before
        for left in tmp_path.glob("copy.db*"):
            left.unlink()
    with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as connection:
        connection.execute("ANALYZE")  # SQLite's own tables are nobody's
    assert verify(database) == []


# --- two at once, and killed -----------------------------------------------------------------------


class Writer:
    """A process that puts random edits into a ledger and says of each that it wrote it.

    Forked from this one, which has imported and loaded everything: it writes from its first millisecond on.

    Args:
        database: of the ledger.
        model: whose edits.
        seed: of the edits.
        n: how many.
    """

    def __init__(self, database: Database, model: HookedModel, seed: int, n: int) -> None:
        fork = get_context("fork")
        self._receiver, sender = fork.Pipe(duplex=False)
        self.process = fork.Process(target=_write, args=(sender, database, model, seed, n))
        with warnings.catch_warnings():
            # from Python 3.12: the child needs nothing that another thread of this process might hold
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        sender.close()

    def wrote(self) -> str:
        """The hash of the next edit that it says it wrote."""
        return self._receiver.recv()

    def said(self) -> list[str]:
        """The hashes of all further edits that it said it wrote, once it has ended."""
        hashes = []
        with suppress(EOFError):
            while True:
                hashes.append(self.wrote())
        self.process.join()
        self._receiver.close()
        return hashes


def _write(sender: Connection, database: Database, model: HookedModel, seed: int, n: int) -> None:
    torch.set_num_threads(1)  # a forked process has no other threads
    ledger, draw = Ledger(database, model), RandomEdits(model, seed)
    for _ in range(n):
        sender.send(ledger.apply(draw.edit(), f"by {seed}", author=str(seed))[-1].hash)


def test_two_processes_write_to_one_branch(database: Database, shapes: HookedModel) -> None:
    both = [Writer(database, shapes, seed, n=25) for seed in range(2)]
    said = [writer.said() for writer in both]
    ledger = Ledger(database, shapes)
    entries = ledger.entries()
    assert len(entries) == 50
    assert {e.hash for e in entries} == {line for lines in said for line in lines}
    assert sum(a.author != b.author for a, b in pairwise(entries)) > 1, "they wrote by turns"
    assert all(r.same for r in ledger.replay())
    assert verify(database) == []


def check_killed(database: Database, model: HookedModel, kills: int) -> int:
    """Kill writers at random moments: what they had said they wrote is there, and the ledger is whole."""
    chance, said = random.Random(0), []
    for i in range(kills):
        writer = Writer(database, model, seed=100 + i, n=10_000)
        if i % 3 == 0:  # some are killed after an edit, however slow the machine is
            said.append(writer.wrote())
        time.sleep(chance.uniform(0.0, 0.08))  # an edit takes about 0.01
        writer.process.kill()
        said += writer.said()
        assert writer.process.exitcode == -signal.SIGKILL
        assert verify(database) == []
        kept = {e.hash for e in Ledger(database, model).entries()}
        assert set(said) <= kept, "an edit that was acknowledged is lost"
        assert len(kept) <= len(said) + i + 1, "more than one unacknowledged edit a kill"
    ledger = Ledger(database, model)
    assert all(r.same for r in ledger.replay())
    ledger.apply(zero("conv2d0:1"))
    return len(said)


@pytest.mark.parametrize("kills", [16, pytest.param(50, marks=pytest.mark.nightly)])
def test_the_ledger_survives_kills(kills: int, database: Database, shapes: HookedModel) -> None:
    assert check_killed(database, shapes, kills) > 3 * kills // 10


def test_ledgers_json_is_canonical(database: Database, branches: HookedModel) -> None:
    ledger = Ledger(database, branches)
    entry = ledger.apply(zero("cat:1"), 'a "note" with \u00e4, \u4e2d and \U0001f600')[0]
    assert Ledger(database, branches).entry(entry.hash).note == entry.note
    assert json.loads(json.dumps(entry.to_dict()))["edit"]["units"] == "cat:1"
