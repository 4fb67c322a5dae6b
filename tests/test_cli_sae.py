"""`circuits sae …`, and its latents in every other command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from circuits.autoencoders import About, save_autoencoder
from circuits.cli.main import run
from circuits.locks import held
from circuits.models.zoo.loading import load_model
from circuits.sae.batches import ModelRows
from circuits.sae.training import LOCK
from circuits.stimuli.sources import open_source
from tests.commands import given, output, put
from tests.random_models import booted
from tests.test_attaching import code_of

SITE = "blocks.0.hook_resid_post"
BRIEFLY = "--steps 40 --batch 512 --lr 2e-3"
MIXED = "sae train shapes mixed3a --name mixed --data shapes --latents 320 --k 12"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an autoencoder of each built-in kind of model."""
    root = tmp_path_factory.mktemp("ws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIRCUITS_WORKSPACE", str(root))
        resid = f"sae train induction {SITE} --name resid --data repeats --latents 256 --k 8 --seeds 0,1"
        assert run([*resid.split(), *BRIEFLY.split()]) == 0
        assert run([*MIXED.split(), *BRIEFLY.split()]) == 0
    return root


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(place))


def test_what_was_trained_is_listed_measured_and_compared(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["sae", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == {"mixed", "resid/topk-256-k8-s0", "resid/topk-256-k8-s1"}
    assert listed["mixed"]["site"] == "mixed3a"
    assert (
        run(["sae", "eval", "resid/topk-256-k8-s0", "--limit", "20", "--rows", "2000", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["rows"]["own"]["fvu"] < found["rows"]["nulls"]["random dictionary"]["fvu"]
    assert (
        found["behaviour"]["measures"]["kl"]["reconstruction"]
        < found["behaviour"]["measures"]["kl"]["random"]
    )
    kept = sorted(path.stat().st_mtime_ns for path in place.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
        assert run(["sae", "eval", "resid/topk-256-k8-s0", "--limit", "20", "--rows", "500"]) == 0
        told = capsys.readouterr()
        assert "random dictionary" in told.out
        assert "is shown and not kept" in told.err
        assert "read-only" in told.err
        keep = ["--labels", "names", "--keep"]
        assert run(["sae", "name", "mixed", *keep]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in place.rglob("*")) == kept
    assert run(["sae", "compare", "resid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mcc"] > 0.2


def test_training_again_does_nothing_and_other_settings_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "saes" / "mixed" / "sae.safetensors"
    before = file.read_bytes()
    again = [*MIXED.split(), *BRIEFLY.split()]
    assert run(again) == 0
    assert run([*again[:-1], "1e-3"]) == 2
    assert "holds a training that differs in autoencoders" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_latents_are_units_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    model, unit = "shapes+sae/mixed", "sae/mixed:5"
    sites = {s["name"]: s for s in output(capsys, "sites", model)}
    assert sites["sae/mixed"]["n_units"] == 320
    assert sites["sae/mixed"]["kind"] == "latent"
    assert output(capsys, "weights", model, unit)["incoming"]
    assert output(capsys, "visualize", model, unit, "--steps", "2", "--size", "32")["unit"] == unit
    ablated = output(capsys, "ablate", model, "sae/mixed:5,9", "--limit", "8", "--random", "1")
    assert ablated["units"] == ["sae/mixed:5", "sae/mixed:9"]
    words = "scale units=sae/mixed:5 factor=0"
    measured = output(capsys, "edit", "measure", model, words, "--limit", "4", "--random", "1")
    assert unit in json.dumps(measured["recipe"])
    credited = output(capsys, "attribute", model, "sae/mixed", "--limit", "1", "--check", "2")
    assert credited["site"] == "sae/mixed"
    for where, *command in (
        ("harvesting.run", "harvest", model, "--data", "shapes", "--sites", "sae/mixed"),
        ("tuning.tuning.radial_tuning", "tune", model, unit),
    ):
        asked = given(where, *command)
        assert "sae/mixed" in str(asked.get("sites", asked.get("units")))


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_latents_of_a_bridge_are_units_of_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = booted(tmp_path / "gpt2", "gpt2")
    code = code_of(model, SITE, n=24)
    code.about = About("r", SITE, SITE, model.name, model.hash)
    spec = f"{model.name}+{save_autoencoder(code, tmp_path / 'r')}"
    del model
    texts = tmp_path / "texts.txt"
    texts.write_text("a b c d e f\nf e d c b a\n" * 8)
    data = ("--data", f"tokens:{texts}", "--limit", "4")
    harvested = output(capsys, "harvest", spec, *data[:2], "--sites", "sae/r")
    assert "sae/r" in json.dumps(harvested)
    assert output(capsys, "attribute", spec, "sae/r", *data)["site"] == "sae/r"
    ablated = output(capsys, "ablate", spec, "sae/r:1,2", *data, "--random", "1")
    assert ablated["units"] == ["sae/r:1", "sae/r:2"]
    words = "scale units=sae/r:1 factor=0"
    assert "sae/r:1" in json.dumps(
        output(capsys, "edit", "measure", spec, words, *data, "--random", "1")
    )


def test_latents_are_named_by_attributes_and_by_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sae", "name", "mixed", "--attributes", str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    from circuits.stimuli.sources import open_source

    names = open_source("shapes").names
    file = tmp_path / "a.json"
    file.write_text(json.dumps({n: [n.partition(" #")[0].split()[0]] for n in names}))
    assert (
        run(
            [
                "sae",
                "name",
                "mixed",
                "--attributes",
                str(file),
                "--keep",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["n_units"] > 50
    held = [n for n in found["names"] if n["holds"]]
    assert held
    assert len(held) > found["by_chance"]
    assert (
        run(["sae", "name", "mixed", "--unit", "3", "--as", "nothing much", "--note", "seen often"])
        == 0
    )
    capsys.readouterr()
    assert run(["sae", "name", "mixed", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["sae/mixed:3"]["text"] == "nothing much"
    assert {n["unit"] for n in held} - {"sae/mixed:3"} <= set(known)


def test_a_bottleneck_is_explained_and_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from circuits.edits.recipes import Recipe
    from circuits.models.zoo.loading import load_model
    from circuits.stimuli.sources import open_source

    classes = load_model("shapes").classes
    labels = tmp_path / "l.json"
    labels.write_text(
        json.dumps([classes.index(n.partition(" #")[0]) for n in open_source("shapes").names])
    )
    recipe = tmp_path / "r.json"
    command = [
        "sae",
        "bottleneck",
        "mixed",
        "--labels",
        str(labels),
        "--off",
        "5,9",
        "--set",
        "7=1.5",
        "--explain",
        "0",
    ]
    assert run([*command, "--recipe", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    accuracy = found["accuracy"]
    assert accuracy["own"] > accuracy["shuffled_labels"] + 0.2
    why = found["example"]
    assert why["logit"] == pytest.approx(
        why["bias"] + sum(s["adds"] for s in why["shares"]) + why["left"], abs=1e-6
    )
    assert len(found["interventions"]["effect"]["null"]) == 99
    assert next(str(e) for e in Recipe.load(recipe).edits) == "scale units=sae/mixed:5,9 factor=0"
    assert run(command) == 0
    assert "switched:" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning", "sparsify"])
def test_autoencoders_go_out_and_come_in(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / layout)
    assert run(["sae", "export", "mixed", folder, "--layout", layout]) == 0
    more = ["--name", f"in-{layout}", "--model", "shapes", "--workspace", str(tmp_path / "ws")]
    site = ["--site", "mixed3a"]
    assert run(["sae", "import", folder, *more, *site]) == 0
    assert run(["sae", "import", folder, *more, *site]) == 2
    assert "has an autoencoder of that name" in capsys.readouterr().err
    assert (
        run(
            [
                "sae",
                "import",
                folder,
                "--name",
                "b",
                "--model",
                "shapes",
                "--site",
                "conv2d1",
                "--workspace",
                str(tmp_path / "ws"),
            ]
        )
        == 2
    )
    assert "has d_in 160" in capsys.readouterr().err
    assert not (tmp_path / "ws" / "saes" / "b").exists()


def test_of_two_imports_of_one_name_the_second_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ws" / "saes" / "n"
    folder.mkdir(parents=True)
    command = [
        "import",
        "/tmp",
        "--name",
        "n",
        "--model",
        "shapes",
        "--workspace",
        str(tmp_path / "ws"),
    ]
    with held(folder / LOCK, "held"):
        assert run(["sae", *command]) == 2
        assert "--name n: another process is writing it" in capsys.readouterr().err
    (folder / "sae.safetensors").touch()
    assert run(["sae", *command]) == 2
    assert "has an autoencoder of that name" in capsys.readouterr().err


TRAIN = ["train", "shapes", "mixed3a", "--name", "n", "--data", "shapes"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*TRAIN, "--name", "a b"], "name 'a b' of an autoencoder is not valid"),
        (["train", "shapes", "mixed9", "--name", "n", "--data", "shapes"], "unknown site of shapes 'mixed9'"),
        ([*TRAIN, "--latents", "10", "--k", "11"], "k 11 must be from 1"),
        ([*TRAIN, "--seeds", "0,0"], "--seeds '0,0' is not a list"),
        (
            ["train", "shapes", "logits", "--name", "n", "--data", "shapes", "--latents", "4096"],
            "there are only 400 rows",
        ),
        ([*TRAIN, "--steps", "0"], "'--steps': 0 must be 1 or more"),
        ([*TRAIN, "--batch", "200000"], "batch 200000: there are only 102400 rows"),
        ([*TRAIN, "--norms", "inf"], "'--norms': inf must be 0 to 1e+06"),
        ([*TRAIN, "--k", "4", "--k", "4"], "--k 4 4: expected different ones"),
        ([*TRAIN, "--leave-first", "1"], "are no positions of texts"),
        ([*TRAIN, "--hold-out", "0.9999"], "hold_out=0.9999) leaves out every one"),
        ([*TRAIN, "--every", "nan"], "'--every': nan must be 0 to"),
        ([*TRAIN, "--name", "x" * 101], "expected at most 100 letters"),
        ([*TRAIN, "--name", "mixed", "--seed", "1"], "holds a training that differs in"),
        (["eval", "mixed", "--seed", "-1"], "-1 must be 0 to"),
        (["name", "mixed", "--top", "0"], "'--top': 0 must be 1 or more"),
        (["compare", "mixed", "mixed"], "'mixed' is named twice"),
        (["compare", "mixed", "resid"], "expected autoencoders of one site"),
        (["name", "mixed", "--labels", "names", "--level", "nan"], "'--level': nan must be 1e-09 to 1"),
        (["bottleneck", "mixed", "--labels", "names", "--off", "mixed3a:3"], "'mixed3a:3' are no indices of latents"),
        (["bottleneck", "mixed", "--labels", "names", "--set", "3="], "'' is no finite number"),
        (["bottleneck", "mixed", "--labels", "names", "--set", "3=nan"], "'nan' is no finite number"),
        (
            ["bottleneck", "mixed", "--labels", "names", "--off", "3", "--recipe", "/nowhere/x.json"],
            "expected a new file in a folder that exists",
        ),
        ([*TRAIN, "--sparsity", "1"], "--sparsity 1 goes with relu"),
        (["eval", "nothing"], "there is no autoencoder 'nothing'"),
        (["eval", "resid"], "has several variants: expected one of resid/topk-256-k8-s0"),
        (["eval", "mixed", "--model", "induction"], "--model induction: its hash is"),
        (["compare", "mixed"], "expected at least two to compare"),
        (["name", "mixed", "--unit", "320", "--as", "x"], "sae/mixed:320 does not exist"),
        (["name", "mixed", "--unit", "3"], "--unit and --as go together"),
        (["bottleneck", "mixed", "--labels", "x.json", "--scale", "3"], "scale '3' is not of the form"),
        (["bottleneck", "mixed", "--labels", "x.json", "--set", "3=a"], "'a' is no finite number"),
        (["import", "/tmp", "--name", "n", "--model", "shapes"], "holds no autoencoder of another tool"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    command: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in (place / "saes").rglob("*"))
    assert run(["sae", *command]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert len(captured) == 1
    assert message in captured[0]
    assert sorted(p.name for p in (place / "saes").rglob("*")) == before


def test_what_training_asks_for() -> None:
    command = ["sae", *TRAIN, "--latents", "64", "--latents", "128", "--k", "4", "--seeds", "0,1", "--steps",
               "5", "--batch", "128", "--norms", "0", "--every", "9", "--overwrite", "--seed", "3",
               "--bias", "median"]  # fmt: skip
    asked = given("autoencoders.library.train", *command)
    variants = asked["settings"].values()
    assert [(v.n_latents, v.k, v.seed) for v in variants] == [
        (64, 4, 0), (64, 4, 1), (128, 4, 0), (128, 4, 1)
    ]  # fmt: skip
    assert {v.bias for v in variants} == {"median"}
    schedule, rule = asked["schedule"], asked["rule"]
    assert (schedule.steps, schedule.batch, schedule.seed) == (5, 128, 3)
    assert (rule.positions, rule.norms, rule.hold_out) == (0, 0.0, 0.1)
    assert (asked["every"], asked["overwrite"]) == (9.0, True)
    one = given("autoencoders.library.train", "sae", *TRAIN)["settings"]
    assert (one.n_latents, one.k, one.architecture) == (8 * 160, 32, "topk")
    texts = ["sae", "train", "induction", SITE, "--name", "n", "--data", "repeats"]
    assert given("autoencoders.library.train", *texts)["rule"].positions == 1
    logits = ["sae", "train", "shapes", "logits", "--name", "n", "--data", "shapes"]
    assert given("autoencoders.library.train", *logits)["rule"].positions == 0, "no positions"


def test_what_evaluation_asks_for() -> None:
    common = (
        "sae",
        "eval",
        "mixed",
        "--limit",
        "50",
        "--labels",
        "names",
        "--rows",
        "100",
        "--seed",
        "2",
    )
    assert given("autoencoders.library.reconstruction", *common)["rows"] == 100
    with pytest.MonkeyPatch.context() as patch:
        put(patch, "autoencoders.library.reconstruction", lambda *a, **k: None)
        held_out = given("autoencoders.library.behaviour", *common)["task"]
        every = given("autoencoders.library.behaviour", *common, "--examples", "all")["task"]
    assert len(held_out) < 50 == len(every)
    assert held_out.labels is not None


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in ((4, "[/red]"), (5, "x [bold]y[/bold]")):
        assert run(["sae", "name", "mixed", "--unit", str(index), "--as", name]) == 0
    capsys.readouterr()
    assert run(["sae", "name", "mixed"]) == 0
    shown = capsys.readouterr().out
    assert "[/red]" in shown
    assert "x [bold]y[/bold]" in shown


def test_what_cannot_be_read_is_left_out_of_the_list(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (place / "saes" / "mixed" / "sae.safetensors").read_bytes()
    folder = place / "saes" / "broken"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "short.safetensors").write_bytes(whole[:2000])
    assert run(["sae", "ls", "--json"]) == 0
    captured = capsys.readouterr()
    assert "mixed" in json.loads(captured.out)
    assert "short.safetensors" in captured.err
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(b"")
    assert run(["sae", "eval", "broken"]) == 2
    assert "its training is not finished" in capsys.readouterr().err
    shutil.rmtree(folder)


def test_every_command_that_loads_a_model_finds_autoencoders_where_it_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path))
    for command in (
        "sites shapes+mixed",
        "weights shapes+mixed sae/mixed:3",
        "ablate shapes+mixed sae/mixed:3 --data shapes --limit 4 --random 1",
    ):
        assert run(command.split()) == 2
        assert "there is no autoencoder 'mixed'" in capsys.readouterr().err
        assert run([*command.split(), "--workspace", str(place)]) == 0
        assert "mixed" in capsys.readouterr().out


def test_a_short_training_accounts_for_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A group of rows holds 70 images of these: the first batch of 16 rows meets only one group of them."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for k in range(6):
        pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png")
    broken = [f"bad{k}.png" for k in range(3)]
    for name in broken:
        (tmp_path / "images" / name).write_bytes(b"no picture")
    source, model = open_source(f"folder:{tmp_path / 'images'}"), load_model("shapes")
    rows = ModelRows(model, source, "mixed3b")
    assert sorted(rows.skipped) == broken, "before any row is read"
    argv = f"sae train shapes mixed3b --name short --data folder:{tmp_path / 'images'} --steps 1 --batch 16 --json"
    assert run([*argv.split(), "--workspace", str(tmp_path / "w")]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert sorted(facts["short"]["skipped"]) == broken
    assert "6 of 9 images taken (all that can be read); skipped 3 × " in " ".join(said.err.split())
