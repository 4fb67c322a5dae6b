"""Twenty random questions "what if these units were replaced?", each asked of every verb that answers it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.attribution import attribute
from circuits.autoencoders import Autoencoder
from circuits.autoencoders.autoencoder import About
from circuits.edits.activations import zero
from circuits.edits.estimation import means
from circuits.effects import measure
from circuits.examples import Examples
from circuits.experiments.ablation import AblationReport, ablate
from circuits.models.adapter.hooked_model import HookedModel
from circuits.sae import behaviour
from circuits.tasks import Question, Task, UnitActivation, of_examples

IMAGES = ["stem_relu", "pool", "left_relu", "cat", "inner", "out_relu"]
TOKENS = ["blocks.0.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_mid"]


def question(
    seed: int, branches: HookedModel, bridge: HookedModel
) -> tuple[HookedModel, Examples, list[str], str]:
    """A model, examples, units and what takes their place."""
    generator = np.random.default_rng(seed)
    model, sites = (branches, IMAGES) if seed % 2 else (bridge, TOKENS)
    site = model.site(sites[int(generator.integers(len(sites)))])
    n = int(generator.integers(1, 3))
    units = [f"{site.name}:{i}" for i in generator.choice(site.n_units, n, replace=False)]
    if model is branches:
        labels = generator.integers(0, 3, 7).tolist()
        examples = Examples.given(model, model.input.example(7, seed=seed), labels=labels)
    else:
        rows = [
            torch.tensor(generator.integers(0, 20, (1, k))) for k in generator.integers(3, 10, 6)
        ]
        examples = Examples.given(model, rows)
    return model, examples, units, ["zero", "mean"][int(generator.integers(2))]


def same(a: AblationReport, b: object, names: set[str]) -> None:
    for name in names:
        one, other = a.effects[name], b.effects[name]  # type: ignore[attr-defined]
        for what in ("intact", "changed", "change", "low", "high", "p_value"):
            assert getattr(other, what) == pytest.approx(
                getattr(one, what), abs=1e-6, nan_ok=True
            ), (name, what)
        np.testing.assert_allclose(other.null, one.null, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_ablating_and_measuring_an_edit(
    seed: int, branches: HookedModel, bridge: HookedModel
) -> None:
    model, examples, units, how = question(seed, branches, bridge)
    task = of_examples(examples)
    taken = ablate(model, units, task, how=how, n_random=24, seed=seed)  # type: ignore[arg-type]
    edit = zero(units) if how == "zero" else means(model, units, examples)
    measured = measure(model, [edit], examples, n_random=24, seed=seed, batch=3)
    assert measured.null_is == taken.null_is
    assert len(measured.effects["kl"].null) == 24 or "groups of other units" in measured.null_is
    same(taken, measured, set(taken.effects))


@pytest.mark.parametrize("seed", [21, 23, 25, 27])
def test_attribution_by_ablation(seed: int, branches: HookedModel, bridge: HookedModel) -> None:
    """What each unit is credited with is what the target loses without it."""
    model, examples, units, _ = question(seed, branches, bridge)
    aim = UnitActivation.named(model, "class:1")
    task = Task("target", examples, (Question(),) * len(examples), aim)
    site = units[0].partition(":")[0]
    made = attribute(model, examples.inputs, "class:1", site, "ablation", baseline="zero")
    lost = made.units().double().mean(0)
    for unit in units:
        effect = ablate(model, [unit], task, n_random=0).effects[aim.name]
        assert -effect.change == pytest.approx(float(lost[int(unit.partition(":")[2])]), abs=1e-6)


@pytest.mark.parametrize("seed", range(31, 35))
def test_an_autoencoders_baselines(seed: int, branches: HookedModel, bridge: HookedModel) -> None:
    """Zero and mean instead of a site are the ablation of all of its units."""
    model, examples, units, _ = question(seed, branches, bridge)
    site = model.site(units[0].partition(":")[0])
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(site.width, 12, generator=generator)
    code = Autoencoder(
        w.T.contiguous(), torch.zeros(12), (w / w.norm(dim=0)).T.contiguous(), torch.zeros(site.width), "relu",
        about=About(site=site.name, target=site.name),
    )  # fmt: skip
    found = behaviour(model, code, examples, keep_positions=0, seed=seed)
    every = [f"{site.name}:{i}" for i in range(site.n_units)]
    for how in ("zero", "mean"):
        taken = ablate(model, every, examples, how=how, n_random=0, seed=seed)
        for name in ("cross_entropy", "kl"):
            assert getattr(found.measures[name], how) == pytest.approx(
                taken.effects[name].changed, abs=1e-6
            )
