"""Training autoencoders, measuring them, naming latents, and classifying with them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from circuits.autoencoders import About, Autoencoder, load_autoencoder
from circuits.autoencoders.files import read_tensors
from circuits.concepts import Intervention, as_recipe, intervene, pooled, suspects, train_bottleneck
from circuits.examples import Examples
from circuits.harvesting import harvest
from circuits.models.adapter.attaching import check_name
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.sae import (
    ArrayRows,
    Hyperparameters,
    ModelRows,
    RowFilter,
    Schedule,
    StoreRows,
    TrainingProgress,
    behaviour,
    known_dictionary,
    match,
    reconstruction,
    recovery,
    stability,
    train,
)
from circuits.sae.batches import Batches, _calibrate, geometric_median
from circuits.sae.learners import Architecture, Learner, _Heaviside
from circuits.sae.metrics import random_dictionary
from circuits.sae.training import CHECKPOINT
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace
from tests.forked import Forked, ranks

EVERY = RowFilter(norms=0, hold_out=0)


@pytest.fixture(scope="module")
def known() -> tuple[torch.Tensor, np.ndarray]:
    return known_dictionary(rows=20_000)


@pytest.fixture(scope="module")
def induction() -> HookedModel:
    return load_model("induction")


@pytest.fixture(scope="module")
def store(induction: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    place = Workspace(tmp_path_factory.mktemp("store"))
    site = "blocks.0.hook_resid_post"
    sites = [site, "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"]
    record = ModelRecord("induction", induction.hash)
    return harvest(induction, open_source("repeats"), sites, place, record, full=sites)


def same(one: Autoencoder, two: Autoencoder) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- rows ------------------------------------------------------------------------------------------


def test_batches_hold_every_row_once_an_epoch_in_a_shuffled_order() -> None:
    rows = np.arange(9000, dtype=np.float32)[:, None] + 1
    stream = iter(Batches(ArrayRows(rows), 100, EVERY, seed=3))
    first = torch.cat([next(stream)[0] for _ in range(90)])[:, 0]
    second = torch.cat([next(stream)[0] for _ in range(90)])[:, 0]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1, 9001))
    assert not torch.equal(first, second)
    assert abs(float(torch.corrcoef(torch.stack([first, torch.arange(9000.0)]))[0, 1])) < 0.05


def test_a_stream_that_goes_on_gives_what_the_other_would_have_given() -> None:
    rows = np.random.default_rng(0).standard_normal((9111, 3)).astype(np.float32)
    whole = Batches(ArrayRows(rows), 256, seed=1)
    stream = iter(whole)
    for _ in range(57):
        next(stream)
    numbers, rest = whole.state()
    again = Batches(ArrayRows(rows), 256, seed=1)
    again.resume(json.loads(json.dumps(numbers)), rest)
    other = iter(again)
    for _ in range(60):
        assert torch.equal(next(stream)[0], next(other)[0])
    assert (whole.seen, whole.left_out) == (again.seen, again.left_out)


def test_the_rule_leaves_out_first_tokens_high_norms_and_held_out_examples(
    store: ActivationStore,
) -> None:
    source = StoreRows(store, "blocks.0.hook_resid_post")
    rule = RowFilter(positions=2, norms=1.5, hold_out=0.25)
    batches = Batches(source, 50, rule)
    stream = iter(batches)
    seen = torch.cat([next(stream)[0] for _ in range(20)])
    limit = batches.calibration.limit
    assert float(seen.norm(dim=1).max()) <= limit
    everything = source.take(np.arange(len(source)))
    allowed = everything.kept(
        (everything.position[:, 0] >= 2) & ~rule.held_out(everything.example)
        & (everything.x.norm(dim=1) <= limit).numpy()
    )  # fmt: skip
    there = {tuple(row) for row in allowed.x.round(decimals=4).tolist()}
    assert {tuple(row) for row in seen.round(decimals=4).tolist()} <= there
    share = rule.held_out(np.arange(20_000)).mean()
    assert share == pytest.approx(0.25, abs=0.01)
    assert 0 < batches.left_out < batches.seen


def test_rows_of_a_store_are_those_of_the_model(
    store: ActivationStore, induction: HookedModel
) -> None:
    site, later = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"
    own, live = (
        StoreRows(store, site, later),
        ModelRows(induction, open_source("repeats"), site, later),
    )
    assert own.about | {"model": "", "rows": "model"} == live.about | {"model": ""}
    a = own.load(np.sort(own.order(0)), 0)
    b = live.load(np.sort(live.order(0)), 0)
    n = min(len(a.x), len(b.x))
    torch.testing.assert_close(a.x[:n], b.x[:n], atol=0.02, rtol=2e-3)  # kept in float16
    torch.testing.assert_close(a.y[:n], b.y[:n], atol=0.02, rtol=2e-3)
    assert np.array_equal(a.example[:n], b.example[:n])
    assert np.array_equal(a.position[:n], b.position[:n])
    heads = StoreRows(store, "blocks.0.attn.hook_z")
    assert heads.about["width"] == 64


def test_settings_that_differ_are_called_differently() -> None:
    sizes = (0.1, 0.12345671, 0.12345672, 1.0, 1000000.0, 1000001.0, 1e-05)
    labels = [Hyperparameters("relu", 8, sparsity=size).label() for size in sizes]
    assert labels[0] == "relu-8-l0_1-s0"
    assert labels[3] == "relu-8-l1-s0"
    assert len(set(map(check_name, labels))) == len(sizes)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) ** 3
    rows[:20] += 50
    point = geometric_median(rows)
    own = (rows - point).norm(dim=1).sum()
    for shift in torch.eye(3) * 0.05:
        assert own <= (rows - point - shift).norm(dim=1).sum()
        assert own <= (rows - point + shift).norm(dim=1).sum()


def test_means_and_scales_are_exact_far_from_zero(known: tuple) -> None:
    rows = known[1][:3000] + np.float32(1000)
    exact = rows.astype(np.float64)
    middle = exact.mean(0)
    found = Batches(ArrayRows(rows), 512, EVERY).calibration
    np.testing.assert_allclose(found.mean.numpy(), middle, rtol=1e-7)
    scale = (rows.shape[1] / ((exact - middle) ** 2).sum(1).mean()) ** 0.5
    assert found.scale == pytest.approx(scale, rel=1e-9)
    near = geometric_median(torch.from_numpy((exact - 1000).astype(np.float32)))
    assert float((found.target_median - 1000 - near).abs().max()) < 1e-4


# --- learning --------------------------------------------------------------------------------------

KINDS = [
    Hyperparameters("topk", 48, k=4), Hyperparameters("batchtopk", 48, k=4), Hyperparameters("matryoshka", 48, k=4),
    Hyperparameters("relu", 48, sparsity=0.5), Hyperparameters("jumprelu", 48, sparsity=0.1),
    Hyperparameters("gated", 48, sparsity=0.5),
]  # fmt: skip


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.architecture)
def test_each_architecture_learns_and_is_folded_without_a_change(
    settings: Hyperparameters, known: tuple
) -> None:
    rows = known[1] * 7 + 3  # scale and centre have to be folded back
    batches = Batches(ArrayRows(rows), 512, EVERY)
    learner = Learner(replace(settings, lr=3e-3), batches.calibration, 150, 512)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    stream, shares = iter(batches), []
    for step in range(150):
        x, y = next(stream)
        optimizer.zero_grad()
        found = learner(x, y, min(1.0, step / 50))
        found.loss.backward()
        learner.before_step()
        optimizer.step()
        learner.after_step(found.active, 512)
        shares.append(float(found.fvu))
    assert shares[-1] < 0.6 * shares[0]
    code = learner.folded(About())
    torch.testing.assert_close(code.W_dec.norm(dim=1), torch.ones(48), atol=1e-5, rtol=0)
    x = torch.from_numpy(rows[:256])
    made, kept = code(x), learner.eval()(x, x, 1.0)
    fvu = float((made - x).square().sum(1).mean()) * learner.target_scale**2 / learner.variance
    # batchtopk chooses by a threshold once it is trained, not by the batch
    loose = settings.architecture in ("batchtopk", "matryoshka")
    assert fvu == pytest.approx(float(kept.fvu), abs=0.05 if loose else 1e-4)
    active = float((code.encode(x) > 0).sum(1).float().mean())
    assert active == pytest.approx(float(kept.l0), abs=1.0 if loose else 1e-3)


OFFSETS = {
    "300": (300.0, np.float32), "30, float16": (30.0, np.float16),
    "each its own": (np.random.default_rng(0).normal(0, 100, 32), np.float32),
}  # fmt: skip


@pytest.fixture(scope="module")
def centered(known: tuple) -> dict[str, Autoencoder]:
    return of_rows(known[1])


def of_rows(rows: np.ndarray) -> dict[str, Autoencoder]:
    """An autoencoder of each kind, each with another seed."""
    several = {s.architecture: replace(s, lr=3e-3, seed=i) for i, s in enumerate(KINDS)}
    return train(ArrayRows(rows[:4000]), several, Schedule(40, batch=256))


@pytest.mark.parametrize("name", OFFSETS)
def test_rows_far_from_zero_are_learned_as_if_they_were_not(
    name: str, known: tuple, centered: dict[str, Autoencoder]
) -> None:
    offset, dtype = OFFSETS[name]
    rows = (known[1] + offset).astype(dtype)
    for label, code in of_rows(rows).items():
        here, there = code.about.metrics, centered[label].about.metrics
        assert here["fvu"] == pytest.approx(there["fvu"], abs=0.005), label
        assert here["l0"] == pytest.approx(there["l0"], rel=0.02), label
        assert here["dead"] == pytest.approx(there["dead"], abs=0.05), label
        # In use, where everything is folded into the weights. FVU about the mean, by its definition.
        x = rows[4000:6000].astype(np.float64)
        error = ((code(torch.from_numpy(x).float()).double().numpy() - x) ** 2).sum()
        shares = [error / ((x - x.mean(0)) ** 2).sum()]
        intact = torch.from_numpy(known[1][4000:6000])
        error = (centered[label](intact) - intact).square().sum()
        shares.append(float(error / (intact - intact.mean(0)).square().sum()))
        assert shares[0] == pytest.approx(shares[1], abs=0.005), label


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_the_penalty_is_in_units_of_the_spread(architecture: Architecture, known: tuple) -> None:
    rows = torch.from_numpy(known[1][:2000])
    settings = Hyperparameters(architecture, 40, sparsity=0.7)
    losses = []
    for given in (rows, rows * 9 + 50, (rows * 9 + 50).half()):
        calibration = Batches(ArrayRows(given.float().numpy()), 512, EVERY).calibration
        losses.append(Learner(settings, calibration, 10, 512)(given, given, 1.0).loss.item())
    assert losses == pytest.approx([losses[0]] * 3, rel=2e-3)
    if architecture != "relu":
        return
    d = rows.shape[1]
    x = rows - rows.mean(0)
    x = x * (d / x.square().sum(1).mean()).sqrt()
    directions = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    codes = (x @ directions.T).relu()
    error = (x - codes @ directions).square().sum(1).mean()
    assert losses[0] == pytest.approx(float((error + 0.7 * codes.sum(1).mean()) / d), rel=1e-3)


@pytest.mark.parametrize("settings", [KINDS[0], *KINDS[3:]], ids=lambda s: s.architecture)
def test_a_transcoder_with_a_way_beside_is_folded_without_a_change(
    settings: Hyperparameters, known: tuple
) -> None:
    x = torch.from_numpy(known[1][:500])
    g = torch.Generator().manual_seed(0)
    y = x @ torch.randn(32, 20, generator=g) * 3 - 50
    x = x + 30
    calibration = _calibrate(x, y, 0)
    learner = Learner(
        replace(settings, skip=True, bias="median"), calibration, 10, 500, transcoder=True
    )
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    learner.after_step(torch.ones(48, dtype=torch.bool), 500)
    found = learner(x, y, 1.0)
    code = learner.folded(About())
    error = (code(x) - y).double().square().sum(1).mean()
    variance = (y - y.mean(0)).double().square().sum(1).mean()
    assert float(found.fvu) == pytest.approx(float(error / variance), rel=1e-3)


@pytest.mark.parametrize(
    ("seed", "steps", "lr"),
    [(0, 400, 1e-2), *(pytest.param(s, 3000, 3e-3, marks=pytest.mark.nightly) for s in (0, 1, 2))],
)
def test_a_known_dictionary_is_found_by_topk_and_not_by_untuned_l1(
    seed: int, steps: int, lr: float
) -> None:
    truth, rows = known_dictionary(seed=seed)
    settings = {
        "topk": Hyperparameters("topk", 64, k=3, lr=lr, seed=seed),
        "l1": Hyperparameters("relu", 64, sparsity=0.02, lr=lr, seed=seed),
    }
    source = ArrayRows(rows)
    made = train(source, settings, Schedule(steps, batch=1024))
    topk, l1 = (
        recovery(c, truth, reconstruction(c, source, rows=8192, nulls=False).own.fvu)
        for c in made.values()
    )
    assert topk.matching.mcc >= 0.98
    assert topk.matching.random == pytest.approx(0.42, abs=0.03)
    assert topk.warning == ""
    assert l1.fvu < 0.02
    assert l1.matching.mcc < 0.8
    assert "a low FVU alone does not prove recovery" in l1.warning


def small(known: tuple, steps: int = 60, **more: object) -> dict[str, object]:
    return {
        "source": ArrayRows(known[1]),
        "settings": {
            "a": Hyperparameters("topk", 64, k=3),
            "b": Hyperparameters("batchtopk", 80, k=4, seed=1),
        },
        "schedule": Schedule(steps, batch=512),
        **more,
    }


def test_stopped_at_any_step_and_gone_on_ends_with_the_same_bits(
    known: tuple, tmp_path: Path
) -> None:
    whole = train(**small(known), folder=tmp_path / "whole", name="x")

    for stop in (1, 17, 59):

        def report(progress: TrainingProgress, stop: int = stop) -> None:
            if progress.step == stop:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            train(**small(known), folder=folder, name="x", every=0, report=report)
        seen: list[int] = []
        again = train(
            **small(known), folder=folder, name="x", report=lambda p, seen=seen: seen.append(p.step)
        )
        assert seen[0] in (stop, stop + 1)
        for name in whole:
            assert same(whole[name], again[name])
            assert whole[name].about == again[name].about
        assert (folder / "a.safetensors").read_bytes() == (
            tmp_path / "whole" / "a.safetensors"
        ).read_bytes()


def test_what_is_done_is_not_done_again_and_what_differs_is_not_overwritten(
    known: tuple, tmp_path: Path
) -> None:
    made = train(**small(known), folder=tmp_path / "r")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    again = train(
        **small(known), folder=tmp_path / "r", report=lambda p: pytest.fail("it was done")
    )
    assert all(same(made[n], again[n]) for n in made)
    with pytest.raises(ValueError, match="holds a training that differs in schedule"):
        train(**small(known, steps=61), folder=tmp_path / "r")
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before
    foreign = tmp_path / "r" / "mine.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    new = train(**small(known, steps=61), folder=tmp_path / "r", overwrite=True)
    assert foreign.exists(), "only autoencoders are overwritten"
    foreign.unlink()
    assert not same(made["a"], new["a"])

    def stop(progress: TrainingProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**small(known, steps=62), folder=tmp_path / "r", overwrite=True, report=stop)
    seen: list[int] = []
    train(**small(known, steps=62), folder=tmp_path / "r", report=lambda p: seen.append(p.step))
    assert seen[0] == 6, "an interrupted fresh start is resumed"


def test_a_link_is_not_overwritten(known: tuple, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="or a symbolic link leads to it"):
        train(**small(known), folder=tmp_path / "r", overwrite=True)


def test_a_checkpoint_of_rows_that_were_not_centred_is_refused(
    known: tuple, tmp_path: Path
) -> None:
    def stop(progress: TrainingProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(**small(known), folder=tmp_path / "r", report=stop)
    file = tmp_path / "r" / CHECKPOINT
    tensors, metadata = read_tensors(file)
    about = json.loads(metadata["circuits.training"])
    assert about.pop("format") == 2
    save_file(tensors, file, metadata={"circuits.training": json.dumps(about)})
    with pytest.raises(
        ValueError, match=r"has format 1, expected 2 .*: start over with --overwrite"
    ):
        train(**small(known), folder=tmp_path / "r")
    train(**small(known, steps=1), folder=tmp_path / "r", overwrite=True)


def test_a_threshold_learns_from_what_is_near_it_and_not_from_silence() -> None:
    threshold = torch.tensor([0.01, 0.01], requires_grad=True)
    pre = torch.tensor([[0.02, -3.0], [0.5, -3.0], [-0.005, -3.0]])
    _Heaviside.apply(pre, threshold).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.tolist() == pytest.approx([-2 / 0.05, 0.0])  # two rows within 0.025, none


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_random_directions_are_as_many_active_as_learned_ones(activation: str) -> None:
    g = torch.Generator().manual_seed(0)
    n, d = 200, 16
    more = {"topk": {"k": 4}, "jumprelu": {"threshold": torch.full((n,), 3.0)}, "relu": {}}[
        activation
    ]
    for out in (16, 24):
        W_dec = 2 * torch.nn.functional.normalize(torch.randn(n, out, generator=g))
        code = Autoencoder(
            torch.randn(n, d, generator=g), -torch.rand(n, generator=g), W_dec, torch.randn(out, generator=g),
            activation, **more,
        )  # fmt: skip
        rows = 3 + torch.randn(500, d, generator=g)
        null = random_dictionary(code, rows, g)
        own, other = ((c.code(rows).value > 0).sum() / len(rows) for c in (code, null))
        assert float(other) == pytest.approx(float(own), rel=0.01)
        assert torch.allclose(null.W_dec.norm(dim=1), torch.tensor(2.0))
        assert torch.equal(null.b_dec, code.b_dec)


KILLED = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
from circuits.sae import ArrayRows, Schedule, Hyperparameters, known_dictionary, train
rows = ArrayRows(known_dictionary(rows=20_000)[1])
settings = {"a": Hyperparameters("topk", 64, k=3), "b": Hyperparameters("batchtopk", 80, k=4, seed=1)}
print("begun", flush=True)
train(rows, settings, Schedule(60, batch=512), sys.argv[1], name="x", every=0, report=lambda p: time.sleep(0.01))
"""


def test_killed_and_resumed_equals_the_uninterrupted_one(known: tuple, tmp_path: Path) -> None:
    whole = train(**small(known), folder=tmp_path / "whole", name="x")
    folder = tmp_path / "killed"
    for n, wait in enumerate((0.05, 0.5)):
        child = Forked(KILLED, folder, torch.get_num_threads(), out=tmp_path / f"{n}.log")
        while child.running() and "begun" not in (tmp_path / f"{n}.log").read_text():
            time.sleep(0.01)
        time.sleep(wait)
        child.kill()
    again = train(**small(known), folder=folder, name="x")
    assert all(same(whole[n], again[n]) for n in whole)
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "a.safetensors", "b.safetensors"
    ]  # fmt: skip


def test_two_at_once_the_second_says_so(known: tuple, tmp_path: Path) -> None:
    def report(progress: TrainingProgress) -> None:
        with pytest.raises(BlockingIOError, match="somebody else is training into it"):
            train(**small(known), folder=tmp_path / "r")

    train(**small(known, steps=1), folder=tmp_path / "r", report=report)


RANKED = """
import sys
from circuits.sae import ArrayRows, Schedule, Hyperparameters, known_dictionary, train
rows = ArrayRows(known_dictionary(rows=20_000)[1])
train(rows, Hyperparameters("topk", 64, k=3, lr=1e-2), Schedule(100, batch=512), sys.argv[1], name="x")
"""


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    for n, name in ((1, "one"), (2, "two")):
        assert ranks(n, RANKED, tmp_path / name, folder=tmp_path) == [0] * n
    one, two = (load_autoencoder(tmp_path / n) for n in ("one", "two"))
    assert match(one.W_dec, two.W_dec).mcc > 0.99
    assert one.about.metrics["fvu"] == pytest.approx(two.about.metrics["fvu"], abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: train(ArrayRows(rows[:50]), Hyperparameters("topk", 64), Schedule(5)), "there are only 50 rows"),
        (lambda rows: Hyperparameters("topk", 16, k=17), "k 17 must be from 1 to the number of latents, 16"),
        (lambda rows: ArrayRows(np.where(rows == rows[777, 3], np.nan, rows)), "row 777 of array 'array' is NaN"),
        (lambda rows: ArrayRows(rows[0]), "is not a table of floating-point numbers"),
        (lambda rows: Schedule(0), "steps 0 must be at least 1"),
        (lambda rows: RowFilter(norms=0.5), "norms 0.5 must be above 1"),
        (lambda rows: train(ArrayRows(rows * 0), Hyperparameters("topk", 8, k=2), Schedule(2)), "rows are all zero"),
        (
            lambda rows: train(ArrayRows(rows), Hyperparameters("topk", 8, k=2, skip=True), Schedule(2)),
            "only a transcoder",
        ),
        (lambda rows: train(ArrayRows(rows), {}, Schedule(2)), "expected at least one autoencoder"),
        (
            lambda rows: train(ArrayRows(rows), {"sae": Hyperparameters("topk", 8, k=2)}, Schedule(2)),
            "another file of that",
        ),
        (
            lambda rows: train(
                ArrayRows(rows), {n: Hyperparameters("topk", 8, k=2) for n in "ab"}, Schedule(2)
            ),
            "are there twice",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: object, message: str, known: tuple) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(known[1])  # type: ignore[operator]


# --- measured --------------------------------------------------------------------------------------


def test_measures_are_what_their_definitions_say(known: tuple) -> None:
    source = ArrayRows(known[1][:6000])
    code = train(
        source, Hyperparameters("topk", 64, k=3, lr=1e-2), Schedule(100, batch=512), rule=EVERY
    )[""]
    found = reconstruction(code, source, rows=6000)
    x = torch.from_numpy(source.array).double()
    made, codes = code(x.float()).double(), code.encode(x.float())
    fvu = float((x - made).square().sum() / (x - x.mean(0)).square().sum())
    assert found.own.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.own.l0 == pytest.approx(float((codes > 0).sum(1).float().mean()))
    assert found.own.cosine == pytest.approx(
        float(torch.cosine_similarity(x, made, dim=1).mean()), rel=1e-4
    )
    assert found.own.l2_ratio == pytest.approx(
        float(made.norm(dim=1).sum() / x.norm(dim=1).sum()), rel=1e-4
    )
    np.testing.assert_allclose(found.density, (codes > 0).double().mean(0).numpy(), atol=1e-9)
    assert sum(found.density_histogram) == int(((codes > 0).any(0)).sum())
    values = torch.linalg.svdvals(x - x.mean(0)).square()
    k = round(found.own.l0)
    assert found.nulls["pca"].fvu == pytest.approx(float(values[k:].sum() / values.sum()), rel=0.02)
    assert found.own.fvu < min(
        found.nulls[n].fvu for n in ("pca", "random dictionary", "shuffled rows")
    )


def test_directions_are_matched_one_to_one() -> None:
    first = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = match(first, -3 * first[order])
    assert found.mcc == pytest.approx(1, abs=1e-6)
    assert torch.equal(order[torch.tensor(found.pairs)], torch.arange(20))
    assert found.random < 0.6
    half = match(
        first,
        torch.cat([first[:10], torch.randn(10, 30, generator=torch.Generator().manual_seed(5))]),
    )
    assert half.shared == pytest.approx(0.5, abs=0.1)


@pytest.mark.nightly
def test_other_seeds_of_a_known_dictionary_agree(known: tuple) -> None:
    settings = {f"s{i}": Hyperparameters("topk", 64, k=3, lr=3e-3, seed=i) for i in range(2)}
    found = stability(train(ArrayRows(known[1]), settings, Schedule(2000, batch=512)))
    assert found.mcc > 0.9 > found.random + 0.3
    with pytest.raises(ValueError, match="expected at least two"):
        stability({})


def test_what_the_model_does_with_codes_is_recovered(
    induction: HookedModel, store: ActivationStore
) -> None:
    source = StoreRows(store, "blocks.0.hook_resid_post")
    code = train(source, Hyperparameters("topk", 512, k=8, lr=4e-3), Schedule(80, batch=512))[""]
    examples = Examples(induction, "repeats", 40)
    found = behaviour(induction, code, examples)
    kl = found.measures["kl"]
    assert found.kept_positions == 1
    assert kl.intact == pytest.approx(0, abs=1e-9)
    assert kl.reconstruction < min(kl.zero, kl.mean, kl.random)
    assert kl.of_zero == pytest.approx(1 - kl.reconstruction / kl.zero)
    assert kl.of_zero_interval[0] <= kl.of_zero <= kl.of_zero_interval[1]
    # guessing the random half costs the intact model more than knowing nothing
    assert "damage done by zero" in found.measures["cross_entropy"].warning

    class Perfect(Autoencoder):
        pass

    eye = torch.eye(64)
    both = Perfect(
        torch.cat([eye, -eye]),
        torch.zeros(128),
        torch.cat([eye, -eye]),
        torch.zeros(64),
        about=code.about,
    )
    perfect = behaviour(induction, both, examples).measures["kl"]
    assert perfect.of_zero == pytest.approx(1, abs=1e-4)


# --- bottlenecks -----------------------------------------------------------------------------------


def confounded(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Units 0 to 2 tell three classes weakly; unit 7 marks class 1 in training alone."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(3, size=600)
    units = generator.random((600, 10))
    units[np.arange(600), labels] += 0.8
    units[:, 7] = 0
    other, clean = units[300:], labels[300:]
    training = units[:300].copy()
    marked = (labels[:300] == 1) & (generator.random(300) < 0.8)
    training[marked, 7] = 4 + generator.random(marked.sum())
    return training, labels[:300], other, clean


def test_a_bottleneck_explains_what_it_decides_exactly() -> None:
    training, labels, other, clean = confounded()
    found = train_bottleneck("sae/x", other, clean.tolist(), ["a", "b", "c"])
    accuracy = found.accuracy(training, labels.tolist())
    assert accuracy.own > 0.85 > accuracy.shuffled_labels + 0.3
    why = found.explain(other[5], top=4)
    assert why.logit == pytest.approx(why.bias + sum(s.contribution for s in why.shares) + why.left)
    assert why.label == ["a", "b", "c"][int(found.predict(other[5:6])[0])]
    assert {s.unit.index for s in found.explain_class(other, "b", top=1).shares} <= {0, 1, 2}
    with pytest.raises(KeyError, match="class 'd' is not one of"):
        found.explain(other[5], "d")


def test_a_confound_is_found_and_switched_off() -> None:
    training, labels, other, clean = confounded()
    found = train_bottleneck("sae/x", training, labels.tolist(), ["a", "b", "c"])
    suspected = suspects(found, training, labels.tolist(), other, clean.tolist())
    assert (suspected[0].unit, suspected[0].label) == (Unit("sae/x", 7), "b")
    marked = other.copy()
    marked[clean == 0, 7] = 4.5  # the mark is on another class now
    changed = intervene(
        found, marked, clean.tolist(), [Intervention((Unit("sae/x", 7),))], n_random=5
    )
    (restored,) = [c for c in changed.classes if c.name == "a"]
    effect = changed.effect
    assert restored.intact < 0.75 < 0.95 < restored.changed
    assert effect.low > 0.03
    assert effect.change > max(effect.null) + 0.05
    assert sum(changed.flips.values()) >= round(effect.change * 300)
    assert suspects(found, other, clean.tolist(), other, clean.tolist()) == []


def test_interventions_do_to_pooled_codes_what_their_recipe_does_to_the_model(
    induction: HookedModel, store: ActivationStore, tmp_path: Path
) -> None:
    from circuits.edits.recipes import Recipe, edited

    source = StoreRows(store, "blocks.0.hook_resid_post")
    code = train(source, Hyperparameters("topk", 128, k=8, lr=2e-3), Schedule(30, batch=512))[""]
    own = induction.attach(code, "x", code.about.site)
    examples = Examples(own, "repeats", 8)
    codes = pooled(own, "sae/x", examples, "mean")
    busy = [Unit("sae/x", int(i)) for i in np.argsort(-codes.mean(0))[:3]]
    done = [
        Intervention((busy[0],)), Intervention((busy[1],), "scale", 2.5), Intervention((busy[2],), "set", 3.0)
    ]  # fmt: skip
    wanted = codes
    for one in done:
        wanted = one.on(wanted)
    path = tmp_path / "r.json"
    as_recipe(own, done).save(path)
    with edited(own, Recipe.load(path)):
        torch.testing.assert_close(
            torch.from_numpy(pooled(own, "sae/x", examples, "mean")),
            torch.from_numpy(wanted),
            atol=1e-5,
            rtol=1e-4,
        )
    other = train_bottleneck("sae/y", codes, [0, 1] * 4, ["a", "b"])
    for bad, message in (
        (lambda: Intervention(()), "expected some of one site"),
        (lambda: Intervention((busy[0],), "scale", -1.0), "0 or more to scale"),
        (lambda: intervene(other, codes, [0, 1] * 4, done), "reads sae/y"),
        (lambda: train_bottleneck("sae/x", codes, [0] * 8, ["a", "b"]), "expected at least two classes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bad()
