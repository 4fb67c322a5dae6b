"""`circuits store` and the options of `circuits harvest`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from circuits.cli.main import run
from circuits.store import shards
from circuits.store.provenance import Provenance


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws"


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a small store."""
    root = tmp_path_factory.mktemp("ws")
    what = ["--sites", "l*", "--full", "line", "--covariance", "line", "--workspace", str(root)]
    assert run(["harvest", "cleanroom", "--data", "curves", *what, "--batch", "16"]) == 0
    return root


@pytest.fixture
def store(workspace: Path, harvested: Path, capsys) -> str:
    """The name of a small store."""
    shutil.copytree(harvested, workspace)
    capsys.readouterr()
    assert run(["store", "ls", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["examples"], facts["full"]) == ("finished", 192, 1)
    return facts["store"]


def test_info_tells_what_is_kept(store: str, capsys) -> None:
    assert run(["store", "info", store.rpartition("/")[2], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sites"] == ["line_pre_relu", "line", "line_pool"]
    assert facts["depth"]["full"] == ["line"]
    assert facts["batch"] == 16
    assert facts["skipped"] == {}
    assert run(["store", "info", store]) == 0
    assert "summary, full, covariance" in capsys.readouterr().out


def test_verify_finds_damage_and_the_same_harvest_mends_it(store: str, workspace, capsys) -> None:
    assert run(["store", "verify", store]) == 0
    assert "damaged" not in capsys.readouterr().out
    shard = workspace / store / "shard-00003.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert run(["store", "verify", store]) == 1
    said = capsys.readouterr().out
    assert "shard-00003.h5" in said
    assert "shard-00002.h5" not in said
    what = ["--sites", "l*", "--full", "line", "--covariance", "line"]
    assert run(["harvest", "cleanroom", "--data", "curves", *what]) == 0
    assert shard.read_bytes() == whole
    assert run(["store", "verify", store]) == 0


def test_export_writes_what_is_named(store: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "line.npz"
    assert run(["store", "export", store, "--site", "line", "--out", str(out), "--full"]) == 0
    with np.load(out) as made:
        assert made["activations"].shape == (192 * 32 * 32, 12)
    for arguments, message in (
        (["--site", "lin", "--out", str(out)], "did you mean line"),
        (["--site", "line", "--out", str(tmp_path / "a.csv")], "must end in .npz"),
        (["--site", "line_pre_relu", "--full", "--out", str(out)], "unknown site at full depth"),
    ):
        assert run(["store", "export", store, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert out.stat().st_size > 1e6, "what was there is left alone"


@pytest.mark.parametrize("kind", ["npz", "safetensors", "parquet"])
def test_exports_are_the_same_bytes(store: str, tmp_path: Path, kind: str) -> None:
    made = set()
    for i in range(6):
        out = tmp_path / f"{i}.{kind}"
        line = ["store", "export", store, "--site", "line_pool", "--out", str(out)]
        assert run(line) == 0
        made.add(out.read_bytes())
    assert len(made) == 1


def test_rm_asks_and_leaves_what_is_being_written(
    store: str, workspace, capsys, monkeypatch
) -> None:
    folder = workspace / store
    monkeypatch.setattr("typer.confirm", lambda *a, **k: False)
    assert run(["store", "rm", store]) == 0
    assert "kept" in capsys.readouterr().out
    with shards.locked(folder, Provenance.read(folder)):
        assert run(["store", "rm", store, "--yes"]) == 2
    assert "is being written by another process" in capsys.readouterr().err
    assert (folder / "statistics.h5").exists()
    assert run(["store", "rm", store, "--yes"]) == 0
    assert not folder.exists()
    assert run(["store", "rm", store, "--yes"]) == 2
    assert "unknown store" in capsys.readouterr().err


def test_a_manifest_that_is_a_pipe_is_not_waited_for(store: str, workspace, capsys) -> None:
    manifest = workspace / store / "manifest.jsonl"
    manifest.unlink()
    os.mkfifo(manifest)
    for verb in ("verify", "info"):
        assert run(["store", verb, store]) == 2
        assert "manifest.jsonl' is no regular file" in capsys.readouterr().err


def test_rm_leaves_what_is_not_the_stores(store: str, workspace, tmp_path, capsys) -> None:
    folder, precious = workspace / store, tmp_path / "precious.h5"
    precious.write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "results.h5").write_text("mine")
    (folder / "shard-00099.h5").symlink_to(precious)
    with (folder / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"file": "notes.txt", "sha256": "0"}\n')
    (folder / ".statistics.h5.killed.tmp").write_text("half")
    assert run(["store", "rm", store, "--yes"]) == 0
    assert "not the store's: notes.txt, results.h5, shard-00099.h5" in capsys.readouterr().err
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["notes.txt", "results.h5", "shard-00099.h5"]
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("how", ["outside", "link", "parent"])
def test_rm_refuses_what_is_not_in_the_workspace(
    store: str, workspace, tmp_path, capsys, how: str
) -> None:
    outside = tmp_path / "elsewhere" / "store"
    shutil.move(workspace / store, outside)
    link = {"outside": outside, "link": workspace / store, "parent": workspace / "a" / "store"}[how]
    if how == "link":
        link.symlink_to(outside)
    elif how == "parent":
        link.parent.symlink_to(outside.parent)
    before = sorted(outside.iterdir())
    assert run(["store", "rm", str(link), "--yes"]) == 2
    said = capsys.readouterr().err
    assert "is not in the workspace" in said
    assert "--workspace" in said
    assert sorted(outside.iterdir()) == before


def test_rm_deletes_in_a_workspace_that_is_itself_a_link(store: str, workspace, tmp_path) -> None:
    (tmp_path / "link").symlink_to(workspace)
    assert run(["store", "rm", store, "--yes", "--workspace", str(tmp_path / "link")]) == 0
    assert not (workspace / store).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sites", "x*"], "no site of cleanroom matches 'x*'"),
        ([], "sites is empty"),
        (["--sites", "line", "--memory", "0.0001"], "is too little: one example"),
        (["--sites", "line", "--workers", "0"], "'--workers': 0 must be 1 to 1024"),
        (["--sites", "line", "--batch", "0"], "'--batch': 0 must be 1 or more"),
        (["--sites", "line", "--positions", "-1"], "'--positions': -1 must be 0 or more"),
        (["--sites", "line", "--layout", "columns"], "'columns' is not one of"),
        (["--sites", "line", "--precision", "int8"], "'int8' is not one of"),
    ],
)
def test_bad_options_are_one_line(options, message, workspace: Path, capsys) -> None:
    assert run(["harvest", "cleanroom", "--data", "curves", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not list(workspace.glob("*/*/*"))


def test_changed_data_is_said(workspace: Path, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 64, 64, 3), np.uint8))
    command = ["harvest", "cleanroom", "--data", f"npz:{tmp_path / 'a.npy'}", "--sites", "line"]
    assert run(command) == 0
    assert "has changed" not in capsys.readouterr().err
    np.save(tmp_path / "a.npy", np.full((3, 64, 64, 3), 9, np.uint8))
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "data npz:" in said
    assert "has changed since" in said
    assert run(["store", "ls"]) == 0
    assert len(list(workspace.glob("*/*/*/statistics.h5"))) == 2
