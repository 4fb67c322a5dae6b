"""Reading and writing of stores: statistics, samples, whole activations, damage."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from circuits.harvesting import harvest, kernels
from circuits.harvesting.observing import Observer, laid_out
from circuits.hdf5 import file_hash, opened
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, Provenance, Summary, fit_tail
from circuits.store.exporting import export
from circuits.store.hdf5 import write_full
from circuits.store.provenance import Depth
from circuits.store.reading import verify
from circuits.store.rows import Rows
from circuits.store.summaries import BINS, edges, histogram_range, skewness_and_kurtosis
from circuits.units import Site, Unit
from circuits.workspace import Workspace
from tests.conftest import examples


def site(shape: tuple[int, ...], axes: tuple[str, ...], unit_axis: int) -> Site:
    return Site("s", "channel", axes, unit_axis, shape)


LAYOUTS = {
    "map": (site((5, 4, 6), ("batch", "channel", "y", "x"), 1), (7, 5, 4, 6)),
    "tokens": (site((9, 5), ("batch", "position", "unit"), 2), (7, 9, 5)),
    "flat": (site((5,), ("batch", "unit"), 1), (7, 5)),
    "heads": (site((9, 5, 3), ("batch", "position", "head", "d_head"), 2), (7, 9, 5, 3)),
    "pattern": (site((5, 4, 4), ("batch", "head", "query", "key"), 1), (7, 5, 4, 4)),
    "long": (site((5, 60, 70), ("batch", "channel", "y", "x"), 1), (7, 5, 60, 70)),
}


def observed(place: Site, value: torch.Tensor, depth: Depth, sizes: list[int], **more) -> Observer:
    """What an observer makes of a tensor shown in batches of some sizes."""
    units = place.n_units
    low, high = histogram_range(np.full(units, -2.0), np.full(units, 2.0))
    fixed = {"center": np.full(units, 0.25), "low": low, "high": high}
    observer = Observer(place, Summary.empty(len(value), fixed), range(len(value)), depth, **more)
    start = 0
    for size in sizes:
        observer.see(value[start : start + size], range(start, start + size))
        start += size
    assert start == len(value)
    return observer


def oracle(values: np.ndarray, summary: Summary) -> dict[str, np.ndarray]:
    """The fields of a summary, from example x unit x position in float64, one unit at a time."""
    found: dict[str, list] = {}
    for u in range(values.shape[1]):
        v = values[:, u].astype(np.float64)
        finite = np.isfinite(v)
        good = v[finite]
        bins = np.concatenate(
            [[-np.inf], edges(float(summary.low[u]), float(summary.high[u])), [np.inf]]
        )
        d = good - summary.center[u]
        facts = {
            "maximum": [e[np.isfinite(e)].max(initial=-np.inf) for e in v],
            "mean": [e[np.isfinite(e)].mean() if np.isfinite(e).any() else np.nan for e in v],
            "total": d.sum(),
            "square": (d**2).sum(),
            "minimum": good.min(initial=np.inf),
            "positive": (good > 0).sum(),
            "count": len(good),
            "nonfinite": (~finite).sum(),
            "histogram": np.histogram(good, bins)[0],
            "powers": [(d**k).sum() for k in (1, 2, 3, 4)],
        }
        for name, fact in facts.items():
            found.setdefault(name, []).append(fact)
    arrays = {name: np.array(fact) for name, fact in found.items()}
    for name in ("maximum", "mean", "powers"):
        arrays[name] = arrays[name].T
    arrays["maximum"][np.isinf(arrays["maximum"])] = np.nan
    return arrays


@pytest.mark.parametrize("spoilt", [False, True], ids=["finite", "with NaN and inf"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_summaries_equal_a_slow_oracle(name: str, spoilt: bool) -> None:
    place, shape = LAYOUTS[name]
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    value[value.abs() < 0.3] = 0.0  # ties, as a ReLU makes them
    if spoilt:
        value[1].flatten()[3] = torch.nan
        value[2].flatten()[-1] = torch.inf
        value[3] = -torch.inf
    summary = observed(place, value, Depth(positions=2**31), [3, 1, 3])._s
    x, axis = laid_out(place, value)
    values = x.movedim(axis, 2).numpy()
    for field, expected in oracle(values, summary).items():
        actual = getattr(summary, field)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6, err_msg=field)
    best = np.where(np.isfinite(values), values, -np.inf).argmax(2)
    np.testing.assert_array_equal(summary.argmax, best)


def test_compiled_and_torch_statistics_agree() -> None:
    for place, shape in LAYOUTS.values():
        value = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        observer = observed(place, value, Depth(positions=4), [7])
        x, axis = laid_out(place, value)
        ours, other = observer._compiled(x, axis), observer._in_torch(x, axis)
        for field in ("maximum", "argmax", "total", "square", "minimum", "positive", "count"):
            expected = getattr(other, field)
            np.testing.assert_allclose(getattr(ours, field), expected, rtol=1e-5, atol=1e-4)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
@settings(max_examples=examples(60))
def test_order_of_bits_is_the_order_of_numbers(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    keys = kernels.ordered(values.view(np.int32))
    assert values[keys.argmax()] == values.max()
    assert values[keys.argmin()] == values.min()
    np.testing.assert_array_equal(kernels.ordered(keys).view(np.float32), values)


def test_positions_that_are_looked_at_are_drawn_without_bias() -> None:
    """Every position of an example is as likely as any other, and the histogram expects the truth."""
    place = site((1, 50), ("batch", "channel", "position"), 1)
    n, looked = 4000, 5
    value = torch.arange(50.0).expand(n, 1, 50).clone()
    units = {
        "center": np.zeros(1),
        "low": np.zeros(1, np.float32),
        "high": np.full(1, 50.0, np.float32),
    }
    observer = Observer(place, Summary.empty(n, units), range(n), Depth(positions=looked, seed=3))
    observer.see(value, range(n))
    s = observer._s
    assert s.histogram.sum() == n * looked
    drawn = np.repeat(np.arange(50.0), 1)
    bins = np.floor(drawn * BINS / 50).astype(int)
    counts = np.array([s.histogram[0, 1 + b] for b in bins])
    expected = n * looked / 50
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 85.4, "a fair draw is above this once in a thousand (49 degrees of freedom)"
    assert s.powers[0, 0] / (n * looked) == pytest.approx(24.5, abs=5 * 14.4 / np.sqrt(n * looked))


def test_large_means_keep_their_variance() -> None:
    place = site((1, 4096), ("batch", "channel", "position"), 1)
    value = 1000 + 0.01 * torch.randn((8, 1, 4096), generator=torch.Generator().manual_seed(0))
    center = np.array([1000.0])
    fixed = {"center": center, "low": np.zeros(1, np.float32), "high": np.ones(1, np.float32)}
    summary = Summary.empty(8, fixed)
    Observer(place, summary, range(8), Depth(positions=8)).see(value, range(8))
    mean, std = summary.moments()
    assert mean[0] == pytest.approx(value.double().mean().item(), rel=1e-9)
    assert std[0] == pytest.approx(value.double().std(correction=0).item(), rel=1e-4)


def test_tail_fit_recovers_the_rate_of_an_exponential() -> None:
    values = np.random.default_rng(0).exponential(1 / 0.7, 200_000)
    bins = np.linspace(0, 12, BINS + 1)
    counts = np.histogram(values, np.concatenate([[-np.inf], bins, [np.inf]]))[0]
    tail = fit_tail(bins, counts)
    assert tail.share <= 0.1
    assert tail.rate == pytest.approx(0.7, abs=4 * tail.error)
    assert tail.error < 0.01
    assert tail.distance < 0.01
    uniform = np.histogram(
        np.linspace(0, 11, 100_000), np.concatenate([[-np.inf], bins, [np.inf]])
    )[0]
    assert fit_tail(bins, uniform).distance > 0.1, "a uniform tail is no exponential"
    dead = np.zeros(BINS + 2, np.int64)
    dead[1] = 1000
    assert np.isnan(fit_tail(bins, dead).rate)


def test_skewness_and_kurtosis_follow_their_definition() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=5000)
    powers = np.array([((values - 1.5) ** k).sum() for k in (1, 2, 3, 4)])
    z = (values - values.mean()) / values.std()
    expected = (pytest.approx((z**3).mean()), pytest.approx((z**4).mean()))
    assert skewness_and_kurtosis(powers, 5000) == expected
    assert all(np.isnan(skewness_and_kurtosis(np.zeros(4), 0)))


# --- whole activations ---------------------------------------------------------------------------


def written(folder: Path, values: list[np.ndarray], depth: Depth) -> Rows:
    """Some arrays as the shards of a site."""
    paths = []
    for i, value in enumerate(values):
        paths.append(folder / f"{i}.h5")
        with h5py.File(paths[-1], "w") as file:
            group = file.create_group("full/s")
            group["example"] = np.full(len(value), i, np.int32)
            group["position"] = np.arange(len(value), dtype=np.int32)[:, None]
            write_full(group, value, depth)
    return Rows(paths, "s")


DEPTHS = [Depth(), Depth(layout="rows"), Depth(compress=True)]


@pytest.mark.parametrize("depth", DEPTHS, ids=["blocks", "rows", "compressed"])
def test_rows_come_back_however_they_are_asked_for(depth: Depth, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = [
        generator.standard_normal((n, 150)).round(1).astype(np.float32) for n in (9000, 1, 0, 333)
    ]
    values[0][generator.random(values[0].shape) < 0.9] = 0.0
    rows = written(tmp_path, values, depth)
    whole = np.concatenate(values).astype(np.float16).astype(np.float32)
    assert rows.shape == whole.shape
    assert set(rows.dtypes) == {"float16"}
    np.testing.assert_array_equal(rows.range(0, len(rows)), whole)
    wanted = generator.integers(len(rows), size=500)
    np.testing.assert_array_equal(rows.take(wanted), whole[wanted])
    np.testing.assert_array_equal(rows.of_example(3), whole[9001:])
    assert rows.of_example(2).shape == (0, 150)
    assert rows.random(10_000).shape == whole.shape
    for bad in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {bad} does not exist: s has rows 0 to 9333"):
            rows.take([0, bad])


def test_compression_is_used_only_where_it_pays(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((5000, 70)).astype(np.float32)
    zeros = np.where(generator.random(noise.shape) < 0.95, 0, noise).astype(np.float32)
    written(tmp_path, [noise, zeros], Depth(compress=True))
    used = [h5py.File(tmp_path / f"{i}.h5")["full/s/activations"].compression for i in range(2)]
    assert used == [None, "lzf"]


def test_what_overflows_half_precision_is_kept_whole(tmp_path: Path) -> None:
    fine = np.array([[65504.0, np.inf], [-65504.0, np.nan]], np.float32)
    large = np.array([[65536.0, 1 / 3]], np.float32)
    rows = written(tmp_path, [fine, large], Depth())
    assert rows.dtypes == ("float16", "float32")
    np.testing.assert_array_equal(rows.range(0, 3), np.concatenate([fine, large]))


def test_stream_shows_every_row_once_and_can_go_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.store.rows.BLOCK", 64)
    monkeypatch.setattr("circuits.store.rows.MIXED", 4)
    values = [np.arange(i, i + 500, dtype=np.float32)[:, None] for i in (0, 500, 1000)]
    rows = written(tmp_path, values, Depth())
    batches = list(rows.stream(70, seed=5))
    assert [len(b) for b in batches[:-1]] == [70] * 21
    shown = np.concatenate(batches)[:, 0]
    assert sorted(shown) == list(range(1500))
    assert np.abs(np.diff(shown)).mean() > 50, "neighbours are no longer neighbours"
    for start in (0, 1, 4, 9, 21, 22):
        rest = list(rows.stream(70, seed=5, start=start))
        assert len(rest) == len(batches[start:])
        for a, b in zip(rest, batches[start:], strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(np.concatenate(list(rows.stream(70, seed=6)))[:, 0], shown)
    with pytest.raises(ValueError, match="batch 0 must be"):
        rows.stream(0)


# --- a store of a real model -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("shapes")


def hundred() -> ImageSource:
    """The first hundred of the drawings."""
    source = open_source("shapes")
    assert isinstance(source, ImageSource)
    return ImageSource("shapes", source.names[:100], f"100 {source.hash}", source.image)


@pytest.fixture(scope="module")
def store(model: HookedModel, tmp_path_factory) -> ActivationStore:
    place = Workspace(tmp_path_factory.mktemp("store"))
    kept = {"full": ["mixed3b", "logits"], "covariance": ["mixed3a", "mixed3b"]}
    return harvest(model, hundred(), ["mixed3a", "mixed3b"], place, **kept)


def whole(model: HookedModel, name: str) -> np.ndarray:
    """All rows of a site, computed anew."""
    source = hundred()
    images = torch.stack([model.input.load(source.image(i)) for i in range(len(source))])
    value = model.run(model.input.normalize(images), read=[name])[name]
    return model.site(name).rows(value).flatten(0, -2).double().numpy()


def test_whole_activations_are_those_of_the_model(
    model: HookedModel, store: ActivationStore
) -> None:
    expected = whole(model, "mixed3b")
    rows = store.rows("mixed3b")
    np.testing.assert_allclose(rows.range(0, len(rows)), expected, rtol=1e-3, atol=1e-3)
    y, x = 5, 9
    at = np.flatnonzero((rows.example == 7) & (rows.position == [y, x]).all(1))
    assert at.tolist() == [7 * 256 + y * 16 + x]
    assert store.rows("logits").position.shape == (100, 0), "logits have no positions"
    with pytest.raises(KeyError, match="unknown site at full depth 'mixed3a'"):
        store.rows("mixed3a")


def test_covariance_is_that_of_the_rows(model: HookedModel, store: ActivationStore) -> None:
    expected = whole(model, "mixed3a")
    found = store.covariance("mixed3a")
    assert found.count == len(expected)
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-5, atol=1e-6)
    scale = np.cov(expected.T, bias=True)
    np.testing.assert_allclose(found.covariance, scale, rtol=1e-4, atol=1e-5 * np.abs(scale).max())
    with pytest.raises(KeyError, match="unknown site with covariance 'logits'"):
        store.covariance("logits")


def test_quantile_examples_span_the_range_and_are_fair(store: ActivationStore) -> None:
    unit = Unit("mixed3b", 200)
    values = store.summary("mixed3b").maximum[:, 200]
    order = np.argsort(-values, kind="stable")
    counts = np.zeros(100)
    for seed in range(400):
        groups = store.quantile_examples(unit, quantiles=5, k=3, seed=seed)
        assert [len(g) for g in groups] == [3] * 5
        for i, group in enumerate(groups):
            strengths = [e.value for e in group]
            assert strengths == sorted(strengths, reverse=True)
            assert max(strengths) <= values[order[20 * i]]
            assert min(strengths) >= values[order[20 * i + 19]]
            counts[[e.index for e in group]] += 1
    chi2 = (
        (counts - 60) ** 2 / (60 * 17 / 20)
    ).sum()  # drawn without replacement: less than Poisson
    assert chi2 < 149, "a fair draw is above this once in a thousand"
    same = store.quantile_examples(unit, 5, 3, seed=1)
    assert same == store.quantile_examples(unit, 5, 3, seed=1)
    with pytest.raises(ValueError, match="quantiles 0 must be"):
        store.quantile_examples(unit, 0)


def test_ties_are_drawn_fairly(store: ActivationStore, monkeypatch) -> None:
    """A dead unit's examples are all equal: each has the same chance in every group."""
    site = store.sites["mixed3b"]
    zeros = np.zeros(100, np.float32)
    monkeypatch.setattr(store, "_strengths", lambda unit: (site, zeros, np.zeros(100, np.int32)))
    first = np.zeros(100)
    for seed in range(500):
        first[[e.index for e in store.quantile_examples(Unit("mixed3b", 0), 4, 5, seed)[0]]] += 1
    assert ((first - 25) ** 2 / 25).sum() < 149


def test_a_store_is_only_opened_for_what_it_was_made_of(store: ActivationStore) -> None:
    p = store.provenance
    ActivationStore.open(store.folder, p.model_hash, p.data_hash)
    with pytest.raises(ValueError, match=r"is of data .* not ffff"):
        ActivationStore.open(store.folder, p.model_hash, "f" * 64)
    with pytest.raises(FileNotFoundError, match="there is no activation store"):
        ActivationStore.open(store.folder.parent)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "parquet"])
def test_exports_hold_what_the_store_holds(kind, store: ActivationStore, tmp_path: Path) -> None:
    summary, rows = store.summary("mixed3b"), store.rows("mixed3b")
    for full in (False, True):
        export(store, "mixed3b", tmp_path / f"{full}.{kind}", kind, full)
    if kind == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(tmp_path / "False.parquet")
        assert table.num_rows == summary.maximum.size
        np.testing.assert_array_equal(table["maximum"].to_numpy(), summary.maximum.ravel())
        whole = parquet.read_table(tmp_path / "True.parquet")
        np.testing.assert_array_equal(whole["unit_17"].to_numpy(), rows.range(0, len(rows))[:, 17])
        np.testing.assert_array_equal(whole["position_1"].to_numpy(), rows.position[:, 1])
        note = json.loads(table.schema.metadata[b"provenance"])
    elif kind == "npz":
        with np.load(tmp_path / "False.npz") as made, np.load(tmp_path / "True.npz") as other:
            np.testing.assert_array_equal(made["maximum"], summary.maximum)
            np.testing.assert_array_equal(other["activations"], rows.range(0, len(rows)))
            note = json.loads(str(made["provenance"]))
    else:
        made = load_file(tmp_path / "False.safetensors")
        np.testing.assert_array_equal(made["histogram"], summary.histogram)
        other = load_file(tmp_path / "True.safetensors")
        np.testing.assert_array_equal(other["activations"], rows.range(0, len(rows)))
        return
    assert note["model_hash"] == store.provenance.model_hash


def test_verify_names_what_is_wrong(model: HookedModel, tmp_path: Path) -> None:
    made = harvest(model, hundred(), ["mixed3a"], Workspace(tmp_path))
    assert {health.state for health in made.verify()} == {"consistent"}
    (made.folder / "shard-00001.h5").unlink()
    with (made.folder / "shard-00002.h5").open("ab") as file:
        file.write(b"x")
    lines = (made.folder / "manifest.jsonl").read_text().splitlines()
    lines[4] = "{broken"
    (made.folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    found = {health.file: health.state for health in verify(made.folder, made.provenance)}
    assert found["shard-00001.h5"] == "missing"
    assert found["shard-00002.h5"] == "damaged"
    assert found["shard-00003.h5"] == "unnoted"
    assert found["manifest.jsonl line 5"] == "damaged"
    assert found["statistics.h5"] == "consistent"
    assert made.top_examples(Unit("mixed3a", 0)), "the rest can still be read"


def test_provenance_comes_back(store: ActivationStore) -> None:
    assert Provenance.read(store.folder) == store.provenance


def _linked(place: Path) -> Callable[[Any], None]:
    def change(group: Any) -> None:
        with h5py.File(place, "w") as other:
            other["x"] = np.ones(group["maximum"].shape, np.float32)
        del group["maximum"]
        group["maximum"] = h5py.ExternalLink(str(place), "x")

    return change


def _elsewhere(place: Path) -> Callable[[Any], None]:
    def change(group: Any) -> None:
        shape = group["maximum"].shape
        place.write_bytes(bytes(4 * math.prod(shape)))
        del group["maximum"]
        outside = [(str(place), 0, 4 * math.prod(shape))]
        group.create_dataset("maximum", shape, np.float32, external=outside)

    return change


def _virtual(place: Path) -> Callable[[Any], None]:
    def change(group: Any) -> None:
        shape = group["maximum"].shape
        del group["maximum"]
        layout = h5py.VirtualLayout(shape, np.float32)
        layout[...] = h5py.VirtualSource(str(place), "x", shape)
        group.create_virtual_dataset("maximum", layout)

    return change


def _replaced(value: Any) -> Callable[[Path], Callable[[Any], None]]:
    def change(group: Any) -> None:
        del group["maximum"]
        made = value(group) if callable(value) else value
        if made is not None:
            group["maximum"] = made

    return lambda place: change


FOREIGN = [
    ("an external link", _linked, "'summary/maximum' is a link"),
    ("external storage", _elsewhere, "'summary/maximum' has its numbers in another file"),
    ("a virtual dataset", _virtual, "'summary/maximum' has its numbers in another file"),
    ("a link to itself", _replaced(h5py.SoftLink("/summary/maximum")), "'summary/maximum' is a link"),
    ("a group inside itself", _replaced(lambda group: group), "'summary/maximum' is there under two names"),
    ("texts", _replaced(["a", "b"]), "'summary/maximum' holds something other than numbers"),
    ("another shape", _replaced(np.ones((3, 2), "f4")), r"of shape \(3, 2\), expected floats of shape \(\d+, 100\)"),
    ("whole numbers", _replaced(np.ones((5, 2), int)), r"holds int64 of shape \(5, 2\), expected floats"),
    ("nothing", _replaced(None), "'summary/maximum' is missing or no array"),
]  # fmt: skip


def _noted(path: Path, change: Callable[[Any], None], group: str) -> None:
    """Change a file of a store, and its checksum as well."""
    with h5py.File(path, "r+") as file:
        change(file[group])
    manifest = path.with_name("manifest.jsonl")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line["sha256"] = file_hash(path.with_name(line["file"]))
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("change", "said"), [f[1:] for f in FOREIGN], ids=[f[0] for f in FOREIGN])
def test_statistics_that_lead_elsewhere_are_refused(
    change, said: str, store: ActivationStore, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(store.folder, tmp_path / "store"))
    _noted(folder / "statistics.h5", change(tmp_path / "outside.h5"), "summary")
    with pytest.raises(ValueError, match=rf"statistics\.h5' is damaged: .*{said}.*; run the same"):
        ActivationStore.open(folder).summary("mixed3b")


def test_shards_that_promise_or_hold_something_else_are_refused(
    store: ActivationStore, tmp_path: Path
) -> None:
    def made(name: str, shape: tuple[int, ...], **more: Any) -> Callable[[Any], None]:
        def change(group: Any) -> None:
            del group[name]
            group.create_dataset(name, shape, np.float32, **more)

        return change

    for number, (change, said) in enumerate(
        (
            (made("activations", (10**9, 32), chunks=(4096, 32)), "lacks numbers"),
            (made("activations", (6144, 3), data=np.ones((6144, 3))), "expected floats of shape"),
            (made("example", (5,), data=np.ones(5)), "expected whole numbers of shape"),
        )
    ):
        folder = Path(shutil.copytree(store.folder, tmp_path / str(number)))
        _noted(folder / "shard-00000.h5", change, "full/mixed3b")
        with pytest.raises(ValueError, match=rf"damaged shard \(shard-00000\.h5: .*{said}"):
            ActivationStore.open(folder).rows("mixed3b")
    folder = Path(shutil.copytree(store.folder, tmp_path / "pipe"))
    (folder / "statistics.h5").unlink()
    os.mkfifo(folder / "statistics.h5")
    with pytest.raises(FileNotFoundError, match="is not finished"):
        ActivationStore.open(folder)
    with pytest.raises(OSError, match=r"statistics\.h5 is not a regular file"):
        opened(folder / "statistics.h5")
