from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from circuits.edits.operators import zero
from circuits.edits.recipes import edited
from circuits.files import replacing
from circuits.harvesting import Inputs, find_stores, harvest
from circuits.models.adapter import HookedModel
from circuits.models.inputs import TokenInput
from circuits.models.loading import load_model
from circuits.models.sites import unit_activations
from circuits.stimuli.sources import ImageSource, TextSource, open_source
from circuits.store import TOP, ActivationStore, Provenance, StaleCacheError
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("cleanroom")


def part(n: int, spec: str = "shapes") -> ImageSource:
    """The first images of a source, as a source."""
    whole = open_source(spec)
    assert isinstance(whole, ImageSource)
    return ImageSource(f"{spec}", whole.names[:n], f"{n}{whole.hash}", whole.image)


def oracle(model: HookedModel, source: ImageSource, site: str) -> np.ndarray:
    """Every activation of a site in float64: example x unit x position, one example at a time."""
    rows = []
    for i in range(len(source)):
        x = model.input.normalize(model.input.load(source.image(i))[None])
        cache = model.run(x, read=[site])
        rows.append(unit_activations(model.site(site), cache[site])[0].double().numpy())
    return np.stack(rows)


def test_statistics_equal_a_slow_oracle(model: HookedModel, tmp_path: Path) -> None:
    source = part(45)
    store = harvest(model, source, ["complex", "line"], Workspace(tmp_path), batch=7)
    for site in ("complex", "line"):
        values = oracle(model, source, site)
        for unit in (0, 5, 11):
            s = store.statistics(Unit(site, unit))
            v = values[:, unit]
            assert s.mean == pytest.approx(v.mean(), rel=1e-5, abs=1e-8)
            assert s.std == pytest.approx(v.std(), rel=1e-4)
            assert s.minimum == pytest.approx(v.min(), abs=1e-6)
            assert s.maximum == pytest.approx(v.max(), rel=1e-5)
            assert s.density == pytest.approx((v > 0).mean(), abs=1e-4)
            assert s.histogram.sum() == v.size
            edges = np.concatenate([[-np.inf], s.edges, [np.inf]])
            expected = np.histogram(v, edges)[0]
            # a value that float32 rounds across an edge may count next door
            assert np.abs(expected - s.histogram).sum() <= 4
            top = store.top_examples(Unit(site, unit), TOP)
            order = np.argsort(-v.max(1), kind="stable")[:TOP]
            np.testing.assert_allclose(
                [e.value for e in top], v.max(1)[order], rtol=1e-4, atol=1e-5
            )
            for e in top[:3]:
                assert e.name == source.names[e.index]
                y, x = e.position
                assert v[e.index, y * 64 + x] == pytest.approx(e.value, rel=1e-4)


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.suffix in (".h5", ".jsonl", ".json")
    }


def test_interrupted_harvest_resumes_to_identical_files(
    model: HookedModel, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("circuits.harvesting.SHARD_EXAMPLES", 10)
    source = part(35)
    whole = harvest(model, source, ["line"], Workspace(tmp_path / "whole"), batch=4)

    def interrupt(done: int, total: int) -> None:
        if done >= 26:
            raise KeyboardInterrupt

    place = Workspace(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        harvest(model, source, ["line"], place, batch=4, progress=interrupt)
    assert not list(find_stores(place, model.hash)), "an unfinished store is not offered"
    seen: list[int] = []
    resumed = harvest(
        model, source, ["line"], place, batch=4, progress=lambda done, _: seen.append(done)
    )
    assert seen[0] == 20, "two whole shards were kept"
    assert digests(resumed.folder) == digests(whole.folder)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "flip"])
def test_damaged_shards_are_made_again(
    damage: str, model: HookedModel, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("circuits.harvesting.SHARD_EXAMPLES", 10)
    source = part(25)
    store = harvest(model, source, ["line"], Workspace(tmp_path), batch=5)
    before = digests(store.folder)
    shard = store.folder / "summary-00001.h5"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "flip":
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
    else:
        manifest = store.folder / "manifest.jsonl"
        lines = manifest.read_text().splitlines()
        manifest.write_text("\n".join([lines[0], "{broken"]) + "\n")
    (store.folder / "statistics.h5").unlink()
    again = harvest(model, source, ["line"], Workspace(tmp_path), batch=5)
    assert digests(again.folder) == before


def test_second_harvest_at_once_says_so(model: HookedModel, tmp_path: Path) -> None:
    source = part(12)

    def second(done: int, total: int) -> None:
        if done:
            with pytest.raises(BlockingIOError, match="written by another process"):
                harvest(model, source, ["line"], Workspace(tmp_path))

    harvest(model, source, ["line"], Workspace(tmp_path), batch=6, progress=second)


def test_finished_harvest_returns_at_once(model: HookedModel, tmp_path: Path) -> None:
    source = part(12)
    first = harvest(model, source, ["line"], Workspace(tmp_path))
    before = (first.folder / "statistics.h5").stat().st_mtime_ns
    calls: list[int] = []
    harvest(model, source, ["line"], Workspace(tmp_path), progress=lambda d, _: calls.append(d))
    assert calls == [12]
    assert (first.folder / "statistics.h5").stat().st_mtime_ns == before


def test_results_do_not_depend_on_the_batch(model: HookedModel, tmp_path: Path) -> None:
    source = part(40)
    small = harvest(model, source, ["line"], Workspace(tmp_path / "a"), batch=2).summary("line")
    large = harvest(model, source, ["line"], Workspace(tmp_path / "b"), batch=40).summary("line")
    np.testing.assert_allclose(small.edges, large.edges, rtol=1e-5)
    np.testing.assert_allclose(small.maximum, large.maximum, rtol=1e-4, atol=1e-6)
    assert np.abs(small.histogram - large.histogram).sum() <= 20  # rounding across an edge


@pytest.mark.parametrize("damage", ["empty", "cut", "flip"])
def test_damaged_statistics_are_merged_again(damage, model: HookedModel, tmp_path: Path) -> None:
    source, place = part(12), Workspace(tmp_path)
    store = harvest(model, source, ["line"], place)
    path = store.folder / "statistics.h5"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes({"empty": b"", "cut": whole[:300], "flip": bytes(flipped)}[damage])
    if damage == "empty":
        assert not list(find_stores(place, model.hash)), "a damaged store is not offered"
        with pytest.raises(ValueError, match="run the same harvest again"):
            ActivationStore.open(store.folder)
    harvest(model, source, ["line"], place)
    assert path.read_bytes() == whole


def test_store_of_something_else_is_stale(model: HookedModel, tmp_path: Path) -> None:
    source = part(6)
    store = harvest(model, source, ["line"], Workspace(tmp_path))
    with pytest.raises(StaleCacheError, match="not ffff"):
        ActivationStore.open(store.folder, "f" * 64)
    path = store.folder / "provenance.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"version": "0.0.1"}))
    with pytest.raises(StaleCacheError, match=r"version was 0\.0\.1.*delete the folder"):
        harvest(model, source, ["line"], Workspace(tmp_path))
    for text in ("{", "null", "5"):
        path.write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Provenance.read(store.folder)
        assert not list(find_stores(Workspace(tmp_path), model.hash))


def test_data_that_moved_is_the_same_data(model: HookedModel, tmp_path: Path) -> None:
    source = part(6)
    harvest(model, source, ["line"], Workspace(tmp_path))
    moved = ImageSource("folder:/elsewhere", source.names, source.hash, source.image)
    store = harvest(model, moved, ["line"], Workspace(tmp_path))
    assert Provenance.read(store.folder).data == "folder:/elsewhere"


def test_an_edited_model_is_not_harvested(model: HookedModel, tmp_path: Path) -> None:
    with (
        edited(model, [zero("line:0")]),
        pytest.raises(ValueError, match="harvest it outside the edit"),
    ):
        harvest(model, part(4), ["line"], Workspace(tmp_path))


def test_a_library_harvest_does_not_forget_how_a_model_is_loaded(model, tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    record = ModelRecord("cleanroom", model.hash, "/some/weights.pt")
    harvest(model, part(4), ["line"], place, record)
    harvest(model, part(4), ["complex"], place)
    assert place.models() == [record]


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            assert first != second
            second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tokens_of_different_lengths(bridge: HookedModel, tmp_path: Path) -> None:
    texts = tuple(" ".join(str((7 * i + j) % 20) for j in range(4 + i % 5)) for i in range(23))
    source = TextSource("made", tuple(map(str, range(23))), "hash", texts)
    site = "blocks.0.attn.hook_z"
    store = harvest(bridge, source, [site, "hook_unembed"], Workspace(tmp_path), batch=4)
    rows = []
    for text in texts:
        tokens = torch.tensor([[int(t) for t in text.split()]])
        value = bridge.run(tokens, read=[site])[site]
        rows.append(unit_activations(bridge.site(site), value)[0].double().numpy())
    joined = np.concatenate(rows, axis=1)  # unit x all positions of all texts
    for head in range(4):
        s = store.statistics(Unit(site, head))
        assert s.mean == pytest.approx(joined[head].mean(), rel=1e-5)
        best = store.top_examples(Unit(site, head), 1)[0]
        assert best.value == pytest.approx(joined[head].max(), rel=1e-5)
        assert rows[best.index][head, best.position[0]] == pytest.approx(best.value, rel=1e-5)


def test_vocabulary_and_first_token_are_used(bridge: HookedModel) -> None:
    words = tuple("abcdefghijklmnopqrst")  # words are separated by white space
    model = HookedModel(bridge.module, TokenInput(20, 12, words, bos=0))
    source = TextSource("made", ("x", "y"), "hash", ("b c d", "a b c d e f g h i j k l m n o p q"))
    inputs = Inputs(model, source)
    assert inputs.tokens(0) == [0, 1, 2, 3]
    assert inputs.tokens(1) == list(range(12)), "cut to what the model takes"


@pytest.mark.parametrize(
    ("sites", "data", "error", "message"),
    [
        ([], "shapes", ValueError, "at least one site"),
        (["lines"], "shapes", KeyError, "did you mean line"),
        (["line"], "repeats", ValueError, "takes images"),
    ],
)
def test_bad_harvests_write_nothing(sites, data, error, message, model, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        harvest(model, open_source(data), sites, Workspace(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()


def test_unreadable_image_is_named_and_the_rest_kept(model: HookedModel, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (30, 30), (i * 40, 0, 0)).save(folder / f"{i}.png")
    (folder / "3.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"3\.png' cannot be read"):
        harvest(
            model, open_source(f"folder:{folder}"), ["line"], Workspace(tmp_path / "ws"), batch=2
        )
    (folder / "0.png").write_text("not an image either")
    with pytest.raises(ValueError, match=r"0\.png' cannot be read"):
        harvest(model, open_source(f"folder:{folder}"), ["line"], Workspace(tmp_path / "new"))
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_workspace_that_cannot_be_written(model: HookedModel, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file, not a folder")
    with pytest.raises(PermissionError, match="cannot be written"):
        harvest(model, part(2), ["line"], Workspace(blocked / "ws"))


def test_model_of_five_channels_takes_no_photographs(own_net: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model takes 5"):
        harvest(own_net, open_source("photos"), ["stem"], Workspace(tmp_path))


def test_workspace_lists_models_it_can_read(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    place.register(ModelRecord("b", "1" * 64))
    place.register(ModelRecord("a", "2" * 64, "/w.pt"))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "model.json").write_text("{")
    assert [r.spec for r in place.models()] == ["a", "b"]
    assert place.models()[0].weights == "/w.pt"


KILLED = """
import sys
import time
from pathlib import Path
import circuits.harvesting as h
from circuits.models.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.workspace import Workspace
h.SHARD_EXAMPLES = 10
store = h.harvest(load_model("cleanroom"), open_source("curves"), ["line"], Workspace(Path(sys.argv[1])), batch=4)
print(store.folder)
"""


@pytest.mark.slow
def test_killed_harvest_resumes_to_identical_files(tmp_path: Path) -> None:
    def start(place: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(place)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)

    whole = start(tmp_path / "whole").communicate()[0].strip()
    place = tmp_path / "killed"
    for shards in (1, 3, 6):  # kill it each time a few more are there
        process = start(place)
        while process.poll() is None and len(list(place.glob("*/*/*/summary-*.h5"))) < shards:
            time.sleep(0.005)
        assert process.poll() is None, "it must be killed while it works"
        process.kill()
        process.communicate()
        assert not list(place.glob("*/*/*/statistics.h5"))
    resumed = start(place).communicate()[0].strip()
    assert digests(Path(resumed)) == digests(Path(whole))
