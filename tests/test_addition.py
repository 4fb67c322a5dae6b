"""The network that learned to add: what is shipped is what the script trains, and its frequencies by the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from circuits.claims.catalogue import TESTS
from circuits.claims.frequencies import losses, sums, trained_on, wave_part
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.training.addition import (
    MODULUS,
    SHARE,
    last_logits,
    parameters,
    split,
    train,
)
from circuits.tasks.spec import TaskSpec


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("addition")


def test_it_adds(model: HookedModel):
    logits = sums(model)
    total = (torch.arange(MODULUS)[:, None] + torch.arange(MODULUS)[None]) % MODULUS
    assert (logits.argmax(-1) == total).all()
    ours = trained_on(MODULUS, SHARE, 0)
    assert losses(logits, ours) == pytest.approx(1.063e-7, rel=1e-3)  # as the log says
    assert losses(logits, ~ours) == pytest.approx(2.94e-5, rel=1e-3)


def test_the_script_trains_the_model_that_is_shipped(model: HookedModel):
    """Its short forward pass gives the model's own logits, and its split is the one that claims know."""
    pairs, _ = split(0)
    w = dict(model.module.state_dict())
    assert (
        last_logits(w, pairs[:500])[:, :MODULUS] - sums(model)[pairs[:500, 0], pairs[:500, 1]]
    ).abs().max() < 1e-4
    known = trained_on(MODULUS, SHARE, 0)
    assert known[pairs[:, 0], pairs[:, 1]].all()
    assert int(known.sum()) == len(pairs)


def test_training_goes_down_and_is_kept(tmp_path):
    bridge = train(3, 0, tmp_path, checkpoints=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "addition-2.safetensors", "addition.log.jsonl", "addition.safetensors",
    ]  # fmt: skip
    again = load_model("addition", tmp_path / "addition.safetensors")
    w, pairs = parameters(bridge), split(0)[0][:50]
    assert (
        last_logits(w, pairs)[:, :MODULUS] - sums(again)[pairs[:, 0], pairs[:, 1]]
    ).abs().max() < 1e-5


def test_waves_are_projections_by_the_definition():
    p = 7
    logits = torch.randn(p, p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = np.mgrid[:p, :p].reshape(2, -1)
    basis = np.stack(
        [f(2 * math.pi * k * (a + b) / p) for k in (1, 3) for f in (np.cos, np.sin)], 1
    )
    flat = logits.reshape(p * p, p).numpy()
    wanted = basis @ np.linalg.lstsq(basis, flat, rcond=None)[0]
    assert np.abs(wave_part(logits, [1, 3]).reshape(p * p, p).numpy() - wanted).max() < 1e-10
    which = torch.rand(p, p, generator=torch.Generator().manual_seed(1)) < 0.5
    right = torch.tensor([(int(i) + int(j)) % p for i, j in which.nonzero()])
    assert losses(logits, which) == pytest.approx(F.cross_entropy(logits[which], right).item())


def test_clocks_and_pizzas():
    """The network written by hand averages both numbers before anything else, so that both have one gradient."""
    level, test = Level(), TESTS["clock-or-pizza"]
    for name, symmetry, irrelevance in (
        ("addition", (0.5, 0.62), (0.85, 0.91)),
        ("addition-by-hand", (0.999, 1.001), (0.02, 0.05)),
    ):
        model = load_model(name)
        subject = Subject(model, load_claims_task(model, TaskSpec(examples=24)))
        [one, other] = test.run(subject, test.settings({"sums": 300}, ""), level).quantities
        assert symmetry[0] < one.value < symmetry[1]
        assert irrelevance[0] < other.value < irrelevance[1]


def test_frequencies_that_are_not_there(model: HookedModel):
    test = TESTS["key-frequencies"]
    subject = Subject(model, load_claims_task(model, TaskSpec(examples=24)))
    four = test.settings({"frequencies": ["19", "22", "1", "7"]}, "")
    assert test.run(subject, four, Level()).verdict(0.05)[0] == "holds"
    with pytest.raises(ValueError, match="frequencies: '57', expected a whole number from 1 to 56"):
        test.run(subject, test.settings({"frequencies": ["57"]}, ""), Level())
