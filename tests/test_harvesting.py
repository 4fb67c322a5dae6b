from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from circuits.cli.main import run
from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.examples import Examples
from circuits.files import replacing
from circuits.harvesting import find_stores, harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource
from circuits.store import ActivationStore, Provenance, StaleCacheError, shards
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace
from tests.forked import COMMAND_LINE, Forked, ranks
from tests.test_locks import WITHOUT


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("cleanroom")


def part(n: int, spec: str = "shapes") -> ImageSource:
    """The first images of a source, as a source."""
    whole = open_source(spec)
    assert isinstance(whole, ImageSource)
    return ImageSource(f"{spec}", whole.names[:n], f"{n}{whole.hash}", whole.image)


def oracle(model: HookedModel, source: ImageSource, sites: list[str]) -> list[np.ndarray]:
    """Every activation of some sites in float64: example x unit x position, one example at a time."""
    rows: list[list[np.ndarray]] = [[] for _ in sites]
    for i in range(len(source)):
        x = model.input.normalize(model.input.load(source.image(i))[None])
        cache = model.run(x, read=sites)
        for kept, site in zip(rows, sites, strict=True):
            kept.append(model.site(site).activations(cache[site])[0].double().numpy())
    return [np.stack(kept) for kept in rows]


def test_statistics_equal_a_slow_oracle(model: HookedModel, tmp_path: Path) -> None:
    source, sites = part(30), ["complex", "line"]
    store = harvest(model, source, sites, Workspace(tmp_path), batch=7, positions=0)
    for site, side, values in zip(sites, (64, 32), oracle(model, source, sites), strict=True):
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
            top = store.top_examples(Unit(site, unit), 24)
            order = np.argsort(-v.max(1), kind="stable")[:24]
            np.testing.assert_allclose(
                [e.value for e in top], v.max(1)[order], rtol=1e-4, atol=1e-5
            )
            for e in top[:3]:
                assert e.name == source.names[e.index]
                y, x = e.position
                assert v[e.index, y * side + x] == pytest.approx(e.value, rel=1e-4)


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.suffix in (".h5", ".jsonl", ".json")
    }


def test_interrupted_harvest_resumes_to_identical_files(
    model: HookedModel, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 10)
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
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 10)
    source = part(25)
    store = harvest(model, source, ["line"], Workspace(tmp_path), batch=5)
    before = digests(store.folder)
    shard = store.folder / "shard-00001.h5"
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
    np.testing.assert_array_equal(small.high, large.high)
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
    long = raw["model_hash"][:-1] + "-"
    path.write_text(json.dumps(raw | {"model_hash": long}))
    with pytest.raises(
        StaleCacheError, match=rf"was ….*{long[-9:]}, is ….*{raw['model_hash'][-9:]};"
    ):
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
        rows.append(bridge.site(site).activations(value)[0].double().numpy())
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
    examples = Examples(model, source)
    assert examples.tokens(0) == [0, 1, 2, 3]
    assert examples.tokens(1) == list(range(12)), "cut to what the model takes"


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
from pathlib import Path
import circuits.harvesting.running as h
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.workspace import Workspace
h._shard = lambda *a: 10
curves = open_source("curves")
some = ImageSource("curves", curves.names[:100], "100 " + curves.hash, curves.image)
h.harvest(load_model("cleanroom"), some, ["line"], Workspace(Path(sys.argv[1])), batch=4)
"""


@pytest.mark.parametrize("before", ["", WITHOUT], ids=["kernel", "without locks"])
def test_killed_harvest_resumes_to_identical_files(before: str, tmp_path: Path) -> None:
    def finished(place: Path) -> dict[str, str]:
        assert Forked(before + KILLED, place).wait() == 0
        (statistics,) = place.glob("*/*/*/statistics.h5")
        return digests(statistics.parent)

    place = tmp_path / "killed"
    for n in (1, 4):  # kill it each time a few more are there
        process = Forked(before + KILLED, place)
        while process.running() and len(list(place.glob("*/*/*/shard-*.h5"))) < n:
            time.sleep(0.005)
        assert process.running(), "it must be killed while it works"
        process.kill()
        assert not list(place.glob("*/*/*/statistics.h5"))
    assert finished(place) == finished(tmp_path / "whole")


# --- several processes -----------------------------------------------------------------------------


def test_files_do_not_depend_on_how_many_processes_made_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 10)
    model = load_model("shapes")
    made = [
        harvest(
            model, part(45), ["mixed3a"], Workspace(tmp_path / str(n)), workers=n, full=["mixed3b"],
            covariance=["mixed3a"],
        )
        for n in (1, 2, 3)
    ]  # fmt: skip
    first, *others = (digests(store.folder) for store in made)
    assert len(first) == 5 + 4  # shards; reference, statistics, manifest, provenance
    assert all(other == first for other in others)
    assert [p.name for p in made[0].folder.glob(".*")] == [".lock"], "nothing temporary is left"


def test_a_worker_that_is_killed_is_reported_and_nothing_lost(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    model, source, here = load_model("cleanroom"), part(40), os.getpid()

    def image(i: int) -> Image.Image:
        if i == 30 and os.getpid() != here and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            time.sleep(0.5)
            os.kill(os.getpid(), 9)
        return source.image(i)

    fragile = ImageSource("shapes", source.names, source.hash, image)
    place = Workspace(tmp_path / "ws")
    with pytest.raises(RuntimeError, match=r"killed by signal 9.*run the same harvest again"):
        harvest(model, fragile, ["line"], place, workers=2)
    kept = list((tmp_path / "ws").glob("*/*/*/shard-*.h5"))
    assert kept, "what was finished is kept"
    store = harvest(model, fragile, ["line"], place, workers=2)
    whole = harvest(model, source, ["line"], Workspace(tmp_path / "whole"), workers=1)
    assert digests(store.folder) == digests(whole.folder)


def test_errors_of_workers_arrive_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    source = part(20)

    def image(i: int) -> Image.Image:
        if i == 18:
            raise ValueError("image 'x.png' cannot be read: it is spoilt")
        return source.image(i)

    spoilt = ImageSource("shapes", source.names, "spoilt", image)
    with pytest.raises(ValueError, match=r"image 'x\.png' cannot be read: it is spoilt"):
        harvest(load_model("cleanroom"), spoilt, ["line"], Workspace(tmp_path), workers=2)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`circuits harvest` of six shards, three for each of two ranks."""
    folder, source = tmp_path_factory.mktemp("drawings"), part(96)
    for i, name in enumerate(source.names):
        source.image(i).save(folder / f"{i:02} {name}.png")
    return f"harvest shapes --data folder:{folder} --sites mixed3* --full mixed3b".split()


def test_ranks_give_the_files_of_one_process(command: list[str], tmp_path: Path) -> None:
    def made(n: int) -> dict[str, str]:
        place = tmp_path / str(n)
        codes = ranks(n, COMMAND_LINE, *command, "--workspace", place, folder=tmp_path)
        assert codes == [0] * n, (tmp_path / "rank0.log").read_text()
        (statistics,) = place.glob("*/*/*/statistics.h5")
        return digests(statistics.parent)

    assert made(1) == made(2)


def test_a_killed_rank_stops_the_others_and_a_restart_finishes(
    command: list[str], tmp_path: Path
) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    words = [*launch, "-m", "circuits", *command, "--workspace", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*/*/*/shard-*.h5")):
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), 9)
    assert process.wait(120) != 0
    assert not list(tmp_path.glob("*/*/*/statistics.h5"))
    assert list(tmp_path.glob("*/*/*/shard-*.h5"))
    assert run([*command, "--workspace", str(tmp_path)]) == 0
    (folder,) = (p.parent for p in tmp_path.glob("*/*/*/statistics.h5"))
    store = ActivationStore.open(folder)
    assert {health.state for health in store.verify()} == {"consistent"}
    assert not list(folder.glob("manifest-*"))


# --- what goes wrong -------------------------------------------------------------------------------


def test_bad_examples_are_skipped_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "nested").mkdir(parents=True)
    for i in range(12):
        shade = Image.new("L", (30 + i, 20), i * 20)
        shade.save(folder / ("nested" if i % 2 else "") / f"{i:02}.png")
    (folder / "00.png").write_text("not an image")
    (folder / "nested" / "05.png").write_bytes(b"")
    model, source = load_model("cleanroom"), open_source(f"folder:{folder}")
    store = harvest(
        model, source, ["line"], Workspace(tmp_path / "ws"), full=["line"], skip_bad=True
    )
    assert list(store.skipped) == ["00.png", "nested/05.png"]
    assert "cannot be read" in store.skipped["00.png"]
    gone = [source.names.index(name) for name in store.skipped]
    summary = store.summary("line")
    assert np.flatnonzero(np.isnan(summary.maximum).all(1)).tolist() == gone
    assert not set(store.rows("line").example) & set(gone)
    assert len(store.rows("line")) == 10 * 32 * 32
    found = store.top_examples(Unit("line", 0), 12)
    assert len(found) == 10
    assert not {e.index for e in found} & set(gone)
    assert store.statistics(Unit("line", 0)).count == 10 * 32 * 32


class Spoilt(torch.nn.Module):
    """Divides by the brightness of a picture: NaN where it is black, infinite where it is nearly so."""

    def __init__(self) -> None:
        super().__init__()
        self.id = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.id(torch.cat([x, x[:, :1] / x.mean((1, 2, 3), keepdim=True)], 1))


def test_nan_and_infinite_activations_are_left_out_and_counted(tmp_path: Path) -> None:
    model = HookedModel(Spoilt(), (1, 8, 8))
    images = [torch.full((1, 8, 8), i / 10) for i in range(10)]
    source = ImageSource("grey", tuple(map(str, range(10))), "grey", lambda i: images[i])
    store = harvest(model, source, ["id"], Workspace(tmp_path), covariance=["id"])
    fine, spoilt = (store.statistics(Unit("id", u)) for u in (0, 1))
    assert (fine.nonfinite, spoilt.nonfinite) == (0, 64)
    assert spoilt.count == 9 * 64
    assert spoilt.mean == pytest.approx(1.0)
    assert fine.mean == pytest.approx(0.45)
    assert np.isnan(store.summary("id").maximum[0, 1])
    assert {e.index for e in store.top_examples(Unit("id", 1), 20)} == set(range(1, 10))
    assert store.covariance("id").count == 9 * 64


def test_one_example_is_enough(model: HookedModel, tmp_path: Path) -> None:
    store = harvest(model, part(1), ["line"], Workspace(tmp_path), full=["line"])
    assert store.summary("line").maximum.shape == (1, 12)
    assert len(store.quantile_examples(Unit("line", 0), 10, 4)) == 10
    assert len(store.rows("line")) == 32 * 32


def test_sites_with_one_tensor_are_kept_once(bridge: HookedModel, tmp_path: Path) -> None:
    texts = tuple(" ".join(str((3 * i + j) % 20) for j in range(8)) for i in range(20))
    source = TextSource("made", texts, "same", texts)
    names = [site.name for site in bridge.sites]
    store = harvest(bridge, source, names, Workspace(tmp_path), full=names)
    same = store.provenance.same
    assert "blocks.1.hook_resid_pre" in same or "blocks.0.hook_resid_post" in same
    tokens = Examples(bridge, source).inputs
    cache = bridge.run(tokens, read=names)
    for name in names:
        expected = bridge.site(name).activations(cache[name]).amax(2).numpy()
        np.testing.assert_allclose(store.summary(name).maximum, expected, rtol=1e-4, atol=1e-5)
    shared, other = next(iter(same.items()))
    np.testing.assert_array_equal(store.rows(shared).random(9), store.rows(other).random(9))


def test_half_precision_is_recorded_and_close(tmp_path: Path) -> None:
    model = load_model("shapes")
    made = [
        harvest(model, part(12), ["mixed3b"], Workspace(tmp_path), precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    assert made[0].folder != made[1].folder
    assert made[1].provenance.depth.precision == "bfloat16"
    a, b = (store.summary("mixed3b").mean for store in made)
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())


def test_memory_that_is_too_little_is_named(model: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory 1000 bytes is too little"):
        harvest(model, part(2), ["line"], Workspace(tmp_path / "ws"), memory=1000, workers=1)
    assert not (tmp_path / "ws").exists()


def test_disk_that_is_too_small_is_named_beforehand(model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs about [\d.]+ MB, and the disk has 0\.0 MB left"):
        harvest(model, part(12), ["line"], Workspace(tmp_path), full=["line"])
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_disk_that_fills_up_is_said_in_a_line(model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    write = shards._write_summary
    calls: list[int] = []

    def full_disk(group, summary) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "Can't write data: No space left on device")
        write(group, summary)

    with monkeypatch.context() as broken:
        broken.setattr(shards, "_write_summary", full_disk)
        with pytest.raises(OSError, match=r"no space left on the disk; what was finished is kept"):
            harvest(model, part(20), ["line"], Workspace(tmp_path), workers=1)
    (folder,) = (p.parent for p in tmp_path.glob("*/*/*/provenance.json"))
    assert len(list(folder.glob("shard-*.h5"))) == 2
    assert not list(folder.glob(".shard*"))
    again = harvest(model, part(20), ["line"], Workspace(tmp_path), workers=1)
    assert {health.state for health in again.verify()} == {"consistent"}


def test_a_shard_renamed_but_not_noted_is_not_made_again(
    model, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    store = harvest(model, part(20), ["line"], Workspace(tmp_path), workers=1)
    before, manifest = digests(store.folder), store.folder / "manifest.jsonl"
    (store.folder / "statistics.h5").unlink()
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    times = {p.name: p.stat().st_mtime_ns for p in store.folder.glob("shard-*")}
    again = harvest(model, part(20), ["line"], Workspace(tmp_path), workers=1)
    assert digests(again.folder) == before
    assert {p.name: p.stat().st_mtime_ns for p in store.folder.glob("shard-*")} == times


def test_anew_throws_away_what_was_there(model, tmp_path: Path) -> None:
    store = harvest(model, part(6), ["line"], Workspace(tmp_path))
    (store.folder / "provenance.json").write_text("{")
    again = harvest(model, part(6), ["line"], Workspace(tmp_path), overwrite=True)
    assert {health.state for health in again.verify()} == {"consistent"}
    again.folder.rename(tmp_path / "outside")
    again.folder.symlink_to(tmp_path / "outside")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "outside").iterdir()}
    with pytest.raises(ValueError, match="or a symbolic link leads to it"):
        harvest(model, part(6), ["line"], Workspace(tmp_path), overwrite=True)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "outside").iterdir()} == before


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_covariances_are_summed_in_full_precision(precision, tmp_path: Path) -> None:
    model = load_model("shapes")
    store = harvest(
        model, part(8), ["mixed3a"], Workspace(tmp_path), precision=precision, full=["mixed3a"],
        covariance=["mixed3a"],
    )  # fmt: skip
    rows = store.rows("mixed3a").range(0, len(store.rows("mixed3a"))).astype(np.float64)
    found, expected = store.covariance("mixed3a").covariance, np.cov(rows.T, bias=True)
    # bfloat16 activations are kept as float16: rounded once more
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_an_interrupted_repair_does_not_adopt_what_was_damaged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    model, place = load_model("cleanroom"), Workspace(tmp_path)
    store = harvest(model, part(20), ["line"], place, workers=1)
    before = digests(store.folder)
    with h5py.File(store.folder / "shard-00001.h5", "r+") as file:
        file["summary/total"][:] = 1e9
    with monkeypatch.context() as broken:
        broken.setattr("circuits.harvesting.running.share_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, part(20), ["line"], place, workers=1)
    assert digests(harvest(model, part(20), ["line"], place, workers=1).folder) == before


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_bad_line_of_the_reference_loses_no_shard(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    model, place = load_model("cleanroom"), Workspace(tmp_path)
    store = harvest(model, part(20), ["line"], place, workers=1)
    before, manifest = digests(store.folder), store.folder / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(["garbage", *lines[1:]]) + "\n")
    times = {p.name: p.stat().st_mtime_ns for p in store.folder.glob("*.h5")}
    again = harvest(model, part(20), ["line"], place, workers=1)
    assert digests(again.folder) == before
    assert {p.name: p.stat().st_mtime_ns for p in store.folder.glob("*.h5")} == times


def test_a_run_that_goes_on_keeps_its_batch(tmp_path: Path) -> None:
    model = load_model("cleanroom")
    store = harvest(model, part(6), ["line"], Workspace(tmp_path), batch=3)
    again = harvest(model, part(6), ["line"], Workspace(tmp_path), batch=2)
    assert again.provenance.batch == 3
    assert digests(again.folder) == digests(store.folder)


def test_texts_that_the_model_cannot_take_are_named_or_skipped(bridge, tmp_path: Path) -> None:
    texts = ("1 2 3", "4 99", "5 6 7", "", "8")
    source = TextSource("made", tuple(f"line {i}" for i in range(5)), "texts", texts)
    with pytest.raises(ValueError, match="line 1 of made: token 99 is not in the vocabulary"):
        harvest(bridge, source, ["hook_unembed"], Workspace(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    store = harvest(bridge, source, ["hook_unembed"], Workspace(tmp_path), skip_bad=True)
    assert list(store.skipped) == ["line 1", "line 3"]
    assert store.statistics(Unit("hook_unembed", 0)).count == 7
    alias = bridge.site("hook_unembed").aliases
    if alias:
        np.testing.assert_array_equal(
            store.summary(alias[0]).count, store.summary("hook_unembed").count
        )


def test_activations_in_the_smallest_numbers_have_a_histogram(tmp_path: Path) -> None:
    model = HookedModel(torch.nn.Sequential(torch.nn.Identity()), (1, 4, 4))
    images = [torch.full((1, 4, 4), 1e-40 * (i % 2)) for i in range(12)]
    source = ImageSource("tiny", tuple(map(str, range(12))), "tiny", lambda i: images[i])
    s = harvest(model, source, ["0"], Workspace(tmp_path)).statistics(Unit("0", 0))
    assert s.histogram.sum() == 12 * 16


def _altered(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        values = file[name]
        values[0] = values[0] + 1
    later = path.with_name("manifest.jsonl").stat().st_mtime_ns + 1
    os.utime(path, ns=(later, later))


def test_altered_numbers_are_noticed_when_a_store_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    model = load_model("cleanroom")
    store = harvest(model, part(20), ["line"], Workspace(tmp_path), full=["line"], workers=1)
    shard, statistics = store.folder / "shard-00001.h5", store.folder / "statistics.h5"
    assert len(store.rows("line")) == 20 * 32 * 32
    os.utime(shard)  # a copy has other times, and the same bytes
    assert len(store.rows("line")) == 20 * 32 * 32
    _altered(shard, "full/line/activations")
    with pytest.raises(ValueError, match=r"shard-00001.h5 is not what the manifest says"):
        store.rows("line")
    assert len(store.rows("line", damaged="skip")) == 15 * 32 * 32
    unit = Unit("line", 0)
    assert len(store.top_examples(unit)) == 9
    _altered(statistics, "summary/maximum")
    for read in (lambda: store.top_examples(unit), lambda: store.summary("line")):
        with pytest.raises(ValueError, match=r"statistics.h5 is not what .* same harvest again"):
            read()


def test_rows_of_undamaged_shards_can_still_be_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.harvesting.running._shard", lambda *a: 5)
    model = load_model("cleanroom")
    store = harvest(model, part(20), ["line"], Workspace(tmp_path), full=["line"], workers=1)
    shard = store.folder / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"damaged shard .* read the others with damaged='skip'"):
        store.rows("line")
    rest = store.rows("line", damaged="skip")
    assert sorted(set(rest.example)) == [*range(5), *range(10, 20)]
