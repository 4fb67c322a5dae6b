"""Logs and undo, and that files of earlier versions open."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from circuits.concepts.naming import damaged_names, name_unit, names_of
from circuits.database import Database
from circuits.edits.auditing import verify
from circuits.edits.ledger import Ledger
from circuits.edits.records import read_edit
from circuits.families import (
    Family,
    Member,
    damaged_families,
    load_family,
    save_family,
    saved_families,
)
from circuits.graph.circuit import CircuitGraph
from circuits.graph.saved import (
    circuit_history,
    circuits_with,
    load_circuit,
    save_circuit,
    saved_circuits,
)
from circuits.history import Log, UndoStack, content_hash, signed
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit


@given(st.lists(st.sampled_from(["change", "undo", "redo"]), max_size=30))
def test_undo_and_redo_walk_along_what_was_done(steps: list[str]) -> None:
    """Compared with a slow oracle: all states that were reached, and where one stands among them."""
    stack, states, at = UndoStack(-1), [-1], 0
    for i, step in enumerate(steps):
        if step == "change":
            stack = stack.changed(i)
            states, at = [*states[: at + 1], i], at + 1
        elif step == "undo":
            stack, at = stack.undone(), max(0, at - 1)
        else:
            stack, at = stack.redone(), min(len(states) - 1, at + 1)
        assert (*stack.past, stack.now, *stack.future[::-1]) == tuple(states)
        assert stack.now == states[at]
        assert stack.untouched == (len(states) == 1)


def test_streams_of_a_log_do_not_mix() -> None:
    log = Log("events", ("model", "branch", "text"))
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, model, branch, text)")
        assert log.last(connection, "m", "a") is None
        rows = [("m", "a", "1"), ("m", "b", "2"), ("m", "a", "3"), ("n", "a", "4")]
        for row in rows:
            log.append(connection, *row)
        assert log.last(connection, "m", "b") == rows[1]
        assert log.last(connection, "m") == rows[2]
        assert connection.execute(log.select(2), ("m", "a")).fetchall() == [rows[0], rows[2]]


def test_who_is_the_user_unless_somebody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signed("")[0] == ""
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    assert signed(None)[0] == "ann"

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert signed(None)[0] == "unknown"


def test_texts_and_bytes_have_one_hash() -> None:
    assert content_hash("ä") == content_hash(b"\xc3\xa4")
    assert content_hash("\ud800") == content_hash(b"\xed\xa0\x80")  # a lone surrogate is kept


@pytest.mark.parametrize(
    "body", ["no JSON", '{"nodes": 3}', "[]", '"x"', "[" * 5000, '{"a":1,"a":2}', b"\x00\xff"]
)
def test_one_damaged_record_leaves_the_others_in_their_list(
    tmp_path: Path, body: str | bytes
) -> None:
    database, key = Database(tmp_path / "workspace.db"), "a" * 64
    graph, unit = CircuitGraph(model_hash=key), Unit("x", 1)
    graph.add_node(unit)
    members = (Member(0.0, unit, 1.0), Member(90.0, Unit("x", 2), 1.0))
    family = Family("good", "x", "rotation", 360.0, members, 1.0, 0.5, "", 9, key, "", 0)
    for name in ("bad", "good"):
        save_circuit(database, name, graph)
        save_family(database, family.renamed(name))
    name_unit(database, key, unit, "good")
    bad = name_unit(database, key, Unit("x", 2), "bad").name
    with database.writing() as connection:
        connection.execute("UPDATE records SET body=? WHERE name IN ('bad', ?)", (body, bad))
    listed = {r.name: r.fault for r in saved_circuits(database, key)}
    assert listed["bad"].startswith("circuit 'bad' version 1 is damaged: ")
    assert listed["good"] == ""
    assert [r.name for r in circuits_with(database, key, unit)] == ["good"]
    assert saved_families(database, key) == [family]
    assert [r.body["text"] for r in names_of(database, key).values()] == ["good"]
    for faults in (damaged_families(database, key), damaged_names(database, key)):
        assert ["is damaged" in fault and len(fault) < 300 for fault in faults] == [True]
    for load in (load_circuit, load_family):
        with pytest.raises(ValueError, match=r"damaged|no node-link|no family"):
            load(database, "bad", key)
    assert circuit_history(database, "bad", key)[0].fault
    readable = body in (
        '{"nodes": 3}',
        "[]",
        '"x"',
    )  # as JSON; that they are no circuits, lists say
    assert len(verify(database)) == (0 if readable else 3)


def test_versions_that_are_missing_are_noticed(tmp_path: Path) -> None:
    database = Database(tmp_path / "workspace.db")
    for _ in range(3):
        database.save("circuit", "h", "name", {})
    assert verify(database) == []
    with database.writing() as connection:
        connection.execute("DELETE FROM records WHERE version=2")
    (fault,) = verify(database)
    assert (
        fault
        == "circuit 'name' version 3 does not follow version 1: one is missing or out of order"
    )


# --- a workspace of an earlier version ---------------------------------------------------------------


class Counted(nn.Module):
    """The model of `old_workspace.sql`; its weights are -2, -1, 0, …."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 3, 1, bias=False)
        self.relu = nn.ReLU()
        self.two = nn.Conv2d(3, 2, 1, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_((torch.arange(p.numel()) - 2.0).reshape(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.relu(self.one(x)))


@pytest.fixture
def old(tmp_path: Path) -> Database:
    """A `workspace.db` as the version before `circuits.history` wrote it."""
    made = Database(tmp_path / "workspace.db")
    with sqlite3.connect(made.path) as connection:
        connection.executescript(Path(__file__).with_name("old_workspace.sql").read_text())
    return made


def test_a_ledger_of_an_earlier_version_opens(old: Database) -> None:
    model = HookedModel(Counted(), (1, 4, 4), "counted")
    ledger = Ledger(old, model)
    assert ledger.verify() == []
    kinds = [(e.branch, e.kind, e.author) for e in ledger.events()]
    assert kinds == [
        ("main", "apply", "ann"), ("main", "apply", "ann"), ("main", "apply", "bob"), ("main", "undo", "bob"),
        ("other", "branch", "ann"), ("other", "apply", "ann"), ("other", "undo", "ann"), ("other", "redo", "bob"),
        ("other", "measure", "ann"),
    ]  # fmt: skip
    first, second = ledger.entries()
    assert (first.note, first.seed, first.created) == ("why", 3, "2026-01-02T03:04:05+00:00")
    assert [str(e.edit) for e in ledger.entries("other")] == [
        "scale units=relu:1 factor=0",
        "scale units=relu:0 factor=2",
    ]
    assert ledger.reports(ledger.head("other")) == [{"kl": 0.25}]
    assert second.originals
    assert all(r.same for branch in ("main", "other") for r in ledger.replay(branch))
    (undone,) = ledger.undone()
    assert ledger.redo() == undone
    with ledger.edited():
        weights = model.parameters["two.weight"].flatten().tolist()
    assert weights == [-8.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    for _ in range(3):
        ledger.undo()
    assert ledger.move_to(ledger.model_hash)["two.weight"].equal(model.parameters["two.weight"])
    ledger.apply(read_edit(model, "zero two:1"), branch="other")
    assert ledger.verify() == []


def test_records_of_an_earlier_version_open(old: Database) -> None:
    model = HookedModel(Counted(), (1, 4, 4), "counted")
    key = model.hash
    assert circuit_history(old, "small", key) == []  # saved under the hash of the weights alone
    old.take_over(model.weights_hash, key)
    one, two = circuit_history(old, "small", key)
    assert (one.version, one.note, one.author) == (1, "a start", "ann")
    assert (two.version, two.note, two.author) == (2, "fewer", "bob")
    assert [r.name for r in saved_circuits(old, key)] == ["small"]
    assert len(load_circuit(old, "small", key)) == 1
    with pytest.raises(KeyError, match="no circuit 'gone'"):
        load_circuit(old, "gone", key)
    assert names_of(old, key)["relu:2"].body["text"] == "stripes"
    first = load_circuit(old, "small", key, version=1)
    with pytest.raises(ValueError, match="it is at version 2, yours started from 1"):
        save_circuit(old, "small", first, replaces=1)
    assert save_circuit(old, "small", first, replaces=2).version == 3
    assert save_circuit(old, "gone", first, replaces=0).version == 3
