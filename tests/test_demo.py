from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from circuits import demo
from circuits.cli.main import run
from circuits.environment import WORKSPACE
from circuits.families import save_family, saved_families
from circuits.graph import load_circuit
from circuits.harvesting import find_stores
from circuits.models.zoo import fetching
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.weights_files import file_hash
from circuits.sae import Hyperparameters, Schedule, load_evaluation
from circuits.stimuli.sources import open_source
from circuits.tasks.templates import indirect_objects
from circuits.tasks.templates.words import NAMES, PLACES, THINGS
from circuits.workspace import Workspace
from tests.gguf_models import words_of, write_llama


@pytest.fixture
def small(monkeypatch) -> None:
    """The same demo on fewer sites, units and steps."""
    plans = (
        demo.Plan("cleanroom", ("curves",), ("line",), (("line", range(3)),)),
        demo.Plan("induction", ("repeats",), ("blocks.1.attn.hook_z",)),
    )
    monkeypatch.setattr(demo, "PLANS", plans)
    monkeypatch.setattr(demo, "PICTURE_STEPS", 2)


def test_builds_once_and_then_reuses(small, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    seen: list[tuple[int, int]] = []
    rows = demo.build(place, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [r.model for r in rows] == ["cleanroom", "cleanroom", "induction"]
    assert all(Path(row.where).exists() for row in rows)
    (record,) = [r for r in place.models() if r.spec == "cleanroom"]
    assert [s.provenance.data for s in find_stores(place, record.hash)] == ["curves"]
    pictures = list((tmp_path / record.hash[:16] / "pictures").glob("*.png"))
    assert len(pictures) == 3

    start = time.monotonic()
    assert demo.build(place) == rows
    assert time.monotonic() - start < 5


def test_rebuilds_what_was_deleted(small, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    demo.build(place)
    (record,) = [r for r in place.models() if r.spec == "cleanroom"]
    picture = next((tmp_path / record.hash[:16] / "pictures").glob("line:1-*.png"))
    picture.unlink()
    (tmp_path / "demo.json").write_text("{")
    demo.build(place)
    assert picture.exists()


def test_families_and_concepts_are_there_and_stay(monkeypatch, tmp_path: Path) -> None:
    drawn = open_source("shapes")
    for i in range(0, 400, 10):
        folder = tmp_path / "drawn" / drawn.names[i].partition(" #")[0]
        folder.mkdir(parents=True, exist_ok=True)
        drawn.image(i).save(folder / f"{i}.png")
    data = f"folder:{tmp_path / 'drawn'}"
    concepts = demo.Concepts(
        "little", "mixed3b", data, Hyperparameters("topk", 32, k=4), Schedule(3, 256), examples=8
    )
    plans = (
        demo.Plan("cleanroom", (), (), families=("line",)),
        demo.Plan("shapes", (), (), concepts=(concepts,)),
    )
    monkeypatch.setattr(demo, "PLANS", plans)
    place = Workspace(tmp_path)
    rows = demo.build(place)
    (family,) = saved_families(place.database, load_model("cleanroom").hash)
    assert (family.site, len(family.members)) == ("line", 12)
    path = tmp_path / "saes" / "little" / "sae.safetensors"
    found = load_evaluation(path)
    assert found is not None
    assert found["behaviour"]["examples"] == "held out of training"
    assert found["rows"]["nulls"]
    (record,) = [r for r in place.models() if r.spec == "shapes+sae/little"]
    assert [s.provenance.data for s in find_stores(place, record.hash)] == [data]

    save_family(place.database, family.renamed("mine"))  # what people change is not undone
    place.database.save("family", family.model_hash, family.name, None)
    before = path.read_bytes()
    (tmp_path / "demo.json").unlink()
    assert [r.what for r in demo.build(place)] == [r.what for r in rows]
    assert [f.name for f in saved_families(place.database, family.model_hash)] == ["mine"]
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_a_language_model_is_fetched_recorded_and_its_circuit_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setenv(WORKSPACE, str(tmp_path / "ws"))
    place = Workspace.default()
    texts = [*indirect_objects.SENTENCES, *NAMES, *PLACES, *THINGS]
    tokens, merges = words_of(t.replace("{", "").replace("}", "") for t in texts)
    file = write_llama(tmp_path / "tiny.gguf", tokens=tokens, merges=merges)
    known = replace(fetching.PUBLISHED["smollm2"], sha256=file_hash(file))
    monkeypatch.setitem(fetching.PUBLISHED, "smollm2", known)
    plan = replace(
        demo.LANGUAGE["smollm2"], layers=(0, 1), behaviours=("indirect-object",), texts=6, items=8, size=20, n_random=3
    )  # fmt: skip
    monkeypatch.setitem(demo.LANGUAGE, "smollm2", plan)
    fetching.fetch("smollm2", place, file)
    first = demo.build_language(place, "smollm2", circuit=False)
    assert (first[0].what, first[0].result) == ("weights", "there already")
    assert first[1].result == f"6 examples, {2 * (4 + 64)} units"
    lines = (place.root / "texts" / "smollm2-behaviours.txt").read_text().splitlines()
    assert len(lines) == 6
    assert all(line.rpartition(" ")[2] in NAMES for line in lines), "they end in their answers"
    assert not demo.is_language_built(place, "smollm2")
    assert run(["demo", "--model", "smollm2", "--no-serve"]) == 0
    said = capsys.readouterr()
    assert "the workspace of smollm2 takes about 2 minutes" in said.err
    model = load_model("smollm2")
    circuit = load_circuit(place.database, "indirect-object", model.hash)
    kept = re.search(r"([0-9]+) of [0-9]+ edges \(eap-ig", " ".join(said.out.split()))
    assert kept is not None
    assert 10 < int(kept[1]) <= 20, "those on no path to the output are left out"
    # An edge into the keys or values of a group is drawn to each of its heads.
    assert circuit.number_of_edges() >= int(kept[1])
    assert demo.is_language_built(place, "smollm2")
    rows = demo.build_language(place, "smollm2")
    assert rows[2].result == f"saved before, drawn with {circuit.number_of_edges()} edges"
    assert run(["demo", "--model", "shapes", "--no-serve"]) == 2
    assert "unknown language model with a demo 'shapes'" in capsys.readouterr().err
    assert run(["demo", "--model", "smollm2", "--folder", "x", "--no-serve"]) == 2
    assert "--folder 'x' is for images" in capsys.readouterr().err


def test_plans_name_sites_that_exist() -> None:
    for plan in demo.PLANS:
        model = load_model(plan.model)
        for site in plan.sites:
            assert model.site(site)
        for site, units in plan.pictured:
            assert model.site(site).unit(units[-1])
        for site in (*plan.families, *(c.site for c in plan.concepts)):
            assert model.site(site)


def test_a_folder_of_ones_own_is_added_to_the_first_model(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "PLANS", (demo.Plan("shapes", ("curves",), ("mixed3b",)),))
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (64, 64), (255, 0, 0)).save(own / "a.png")
    (own / "b.png").write_text("no picture")
    rows = demo.build_first(Workspace(tmp_path / "w"), str(own))
    assert [r.what for r in rows] == [f"activations on folder:{own}", "activations on curves"]
    assert rows[0].result.startswith("1 examples, 256 units; left out: 1 ")
    (store,) = [
        s
        for s in find_stores(Workspace(tmp_path / "w"), load_model("shapes").hash)
        if s.provenance.data == f"folder:{own}"
    ]
    assert list(store.skipped) == ["b.png"]
    assert not demo.is_built(Workspace(tmp_path / "w"))
    with pytest.raises(FileNotFoundError, match="does not exist or is not a folder"):
        demo.build_first(Workspace(tmp_path / "w"), str(tmp_path / "none"))
