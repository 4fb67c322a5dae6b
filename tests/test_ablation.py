from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from circuits.examples import Examples
from circuits.experiments.ablation import ablate
from circuits.means import activities
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.datasets import from_dataset
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.tasks.builtin import load_task

close = torch.testing.assert_close


@pytest.mark.parametrize(("site", "units"), [("cat", (1, 4)), ("left_relu", (0,)), ("bn", (2, 5))])
def test_ablation_is_a_forward_pass_without_the_units(
    branches: HookedModel, site: str, units: tuple[int, ...]
) -> None:
    x = branches.input.example(6)
    labels = [0, 1, 2, 0, 1, 2]
    report = ablate(
        branches,
        [f"{site}:{u}" for u in units],
        [x[:4], x[4:]],
        labels=labels,
        n_random=3,
        later="out_relu",
    )

    def without(value: torch.Tensor) -> torch.Tensor:
        return value.index_fill(1, torch.tensor(units), 0)

    intact = branches.run(x, read=["out_relu"])
    ablated = branches.run(x, read=["out_relu"], edits={site: without})
    p, q = intact.output.double().log_softmax(1), ablated.output.double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).mean()
    assert report.effects["kl"].change == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
    loss = -q[torch.arange(6), labels].mean() + p[torch.arange(6), labels].mean()
    assert report.effects["cross_entropy"].change == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    right = (ablated.output.argmax(1) == torch.tensor(labels)).double().mean()
    assert report.effects["accuracy"].changed == pytest.approx(float(right))
    assert "top5" not in report.effects, "of three classes"
    change = (ablated["out_relu"] - intact["out_relu"]).mean((0, 2, 3))
    for d in report.downstream:
        assert d.change == pytest.approx(float(change[d.unit.index]), rel=1e-3, abs=1e-5)
    low, high = report.effects["kl"].low, report.effects["kl"].high
    assert low <= report.effects["kl"].change <= high
    assert len(report.null_units) == 3
    assert all(len(g) == len(units) and not set(g) & set(report.units) for g in report.null_units)
    json.dumps(report.to_dict())


def test_resampling_is_seeded_and_takes_other_examples(branches: HookedModel) -> None:
    x = branches.input.example(5)
    first, again = (
        ablate(branches, ["cat:2"], x, how="resample", seed=3, n_random=3) for _ in range(2)
    )
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict())
    other = ablate(branches, ["cat:2"], x, how="resample", seed=4, n_random=0)
    assert other.effects["kl"].change != first.effects["kl"].change
    same = ablate(branches, ["cat:2"], x[:1].repeat(4, 1, 1, 1), how="resample", n_random=0)
    assert same.effects["kl"].change == pytest.approx(0, abs=1e-9), "all examples are one"


def test_groups_of_several_sites_and_p_values(branches: HookedModel) -> None:
    x = branches.input.example(8)
    report = ablate(
        branches, ["cat:0", "out_relu:1"], x, n_random=4, pool=["cat:1", "cat:2", "out_relu:0"]
    )
    assert all([u.site for u in g] == ["cat", "out_relu"] for g in report.null_units)
    kl = report.effects["kl"]
    at_least = sum(abs(r) >= abs(kl.change) for r in kl.null)
    assert len(kl.null) == 2, "all there are"
    assert kl.p_value == pytest.approx((1 + at_least) / 3)


def test_heads_and_next_tokens(bridge: HookedModel) -> None:
    tokens = bridge.input.example(4)
    report = ablate(bridge, ["blocks.0.attn.hook_z:1"], tokens, n_random=2)
    logits = bridge.logits(
        tokens, edits={"blocks.0.attn.hook_z": lambda z: z.index_fill(2, torch.tensor([1]), 0)}
    )
    loss = -logits.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert report.effects["cross_entropy"].changed == pytest.approx(float(loss), rel=1e-5)
    for how in ("mean", "resample"):
        made = ablate(bridge, ["blocks.0.attn.hook_z:1"], tokens, how=how, n_random=1)
        assert made.effects["kl"].change > 0


def test_induction_heads_are_what_the_model_copies_with() -> None:
    model = load_model("induction-by-hand")
    task = load_task(model, n=16)
    made = {
        head: ablate(model, [f"blocks.{head}"], task, n_random=0).effects["cross_entropy"].change
        for head in ("0.attn.hook_z:0", "1.attn.hook_z:0", "1.attn.hook_z:1")
    }
    assert made["0.attn.hook_z:0"] > 1
    assert made["1.attn.hook_z:0"] > 1
    assert abs(made["1.attn.hook_z:1"]) < 1e-6


def test_random_groups_differ_and_are_all_there_are_if_few(branches: HookedModel) -> None:
    x = branches.input.example(4)
    alive = activities(branches, ["cat"], Examples.given(branches, x))["cat"].alive
    others = [i for i in range(6) if alive[i] and i != 1]
    few = ablate(branches, ["cat:1"], x, n_random=6)
    assert sorted(g[0].index for g in few.null_units) == others
    none = ablate(branches, ["cat:1"], x, n_random=20)
    assert none.null_units == ()
    assert none.null_is.startswith(
        f"20 random changes of equal norm (cat has {len(others)} other live units"
    )
    many = ablate(branches, ["cat:1", "cat:2"], x, n_random=3)  # 4 and 5 are dead
    assert [{u.index for u in g} for g in many.null_units] == [{0, 3}]
    with pytest.raises(ValueError, match="expected at least two examples in a batch"):
        ablate(branches, ["cat:1"], x[:1], how="resample", n_random=0)


def test_bad_input_is_named(branches: HookedModel) -> None:
    x = branches.input.example(3)
    with pytest.raises(ValueError, match=r"^units: expected at least one"):
        ablate(branches, [], x)
    with pytest.raises(ValueError, match=r"^unit cat:1 is listed twice"):
        ablate(branches, ["cat:1", "cat:1"], x)
    with pytest.raises(
        ValueError, match=r"^labels have 2 entries: expected one for each of the 3 examples"
    ):
        ablate(branches, ["cat:1"], x, labels=[0, 1])
    with pytest.raises(ValueError, match=r"^label 3: expected a class from 0 to 2"):
        ablate(branches, ["cat:1"], x, labels=[0, 1, 3])
    with pytest.raises(ValueError, match=r"^pool: 1 units are too few: expected more active units"):
        ablate(branches, ["cat:1", "cat:2"], x, pool=["cat:3"])
    with pytest.raises(ValueError, match=r"^examples are empty"):
        ablate(branches, ["cat:1"], [])


def test_labels_from_names_files_and_lists(tmp_path: Path) -> None:
    shapes = open_source("shapes")
    classes = load_model("shapes").classes
    assert read_labels(shapes, classes)[: len(classes)] == list(range(len(classes)))
    data = from_dataset([np.zeros((8, 8, 3), np.uint8)] * 2, "two")
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"labels": {"example 0": "b", "example 1": 0}}))
    assert read_labels(data, ["a", "b"], path) == [1, 0]
    path.write_text("[1, 1]")
    assert read_labels(data, [], path) == [1, 1]
    np.savez(tmp_path / "l.npz", labels=np.array([0, 1]))
    assert read_labels(data, ["a", "b"], tmp_path / "l.npz") == [0, 1]
    for text, message in (
        ("[1]", r"have 1 entries: expected one for each of 2 examples"),
        ("[0, 2]", r"label 2 of 'example 1' is not a class: expected 0 to 1"),
        ('{"example 0": 1}', r"'example 1' has no label"),
        ('["a", "c"]', r"label 'c' of 'example 1' is not a class"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(data, ["a", "b"], path)
    with pytest.raises(FileNotFoundError):
        read_labels(data, [], tmp_path / "none.json")
    with pytest.raises(ValueError, match="has no label"):
        read_labels(data, ["a"])


def test_googlenet_needs_its_curve_units(assets: Path) -> None:
    """The ten units of the 5x5 branch that respond most to curves, beside random groups of the branch."""
    model = load_model("googlenet")
    source = open_source(f"folder:{assets / 'images/imagenet500'}")
    labels = read_labels(source, model.classes, assets / "images/imagenet500_labels.json")
    units = [336, 408, 326, 398, 386, 394, 413, 321, 358, 335]
    report = ablate(
        model, [f"mixed3b:{u}" for u in units], Examples(model, source, 120, labels=labels), n_random=6,
        pool=[f"mixed3b:{u}" for u in range(320, 416)],
    )  # fmt: skip
    kl = report.effects["kl"]
    assert kl.low > max(kl.null)
    assert report.effects["top5"].intact > 0.85
