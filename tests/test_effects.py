from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.edits.activations import scale, zero
from circuits.edits.associative import associate, second_moment
from circuits.edits.connections import FilterWeights
from circuits.edits.estimation import project_out
from circuits.edits.recipes import Recipe, edited
from circuits.edits.records import read_edit, twin_of
from circuits.effects import fine_tune, measure, predictions, token_losses
from circuits.examples import Examples
from circuits.experiments import Variant, null_of
from circuits.experiments.variants import in_force, prepared
from circuits.figures import edit_figure, save_figure
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.labels import read_labels
from circuits.stimuli.sources import open_source
from circuits.tuning import radial_tuning
from circuits.units import Direction, Unit, Units
from tests.conftest import seeded

CURVES = (413, 358, 335, 408, 336, 326, 398, 386, 321, 394, 368, 369, 359, 352, 389, 346, 375)
"""GoogLeNet's curve units of mixed3b, found by tuning alone (see test_tuning)."""


def kl(intact: Tensor, changed: Tensor) -> float:
    p, q = intact.double().log_softmax(-1), changed.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_measure_reports_the_edit_beside_random_ones(own_net: HookedModel) -> None:
    x = own_net.input.example(40)
    recipe = Recipe.of(own_net, [zero("relu:1"), zero("relu:2")])
    options = {"n_random": 3, "seed": 1, "labels": [i % 3 for i in range(40)]}
    report = measure(
        own_net, recipe, x.split(7), targets=["class:1", "relu:1@2,3", "relu:4"], **options
    )
    intact = own_net.logits(x)
    with edited(own_net, recipe):
        changed = own_net.logits(x)
    assert report.effects["kl"].change == pytest.approx(kl(intact, changed), rel=1e-4)
    first = intact.argmax(-1)
    assert report.effects["top1_changed"].changed == (changed.argmax(-1) != first).float().mean()
    labels = torch.tensor(options["labels"])
    assert report.effects["accuracy"].intact == pytest.approx(
        (first == labels).float().mean().item()
    )
    assert report.targets["class:1"].change == pytest.approx(
        (changed - intact)[:, 1].mean().item(), rel=1e-4
    )
    assert (
        report.targets["class:1 is first choice"].changed
        == (changed.argmax(-1) == 1).float().mean()
    )
    assert report.targets["relu:1@2,3"].changed == 0
    assert report.targets["relu:4"].change == 0
    assert report.others["relu"].change == 0, (
        "an edit of activations leaves the site's other units alone"
    )
    assert report.restored
    assert report.locality == 1 - report.effects["top1_changed"].change
    assert len(report.effects["kl"].null) == len(report.null) == 3
    again = measure(
        own_net, recipe, x.split(7), targets=["class:1", "relu:1@2,3", "relu:4"], **options
    )
    assert json.dumps(report.to_dict()) == json.dumps(again.to_dict())
    whole = measure(own_net, Recipe.of(own_net, [zero(f"fc:{i}") for i in range(3)]), x, n_random=5)
    assert whole.null == (), "a site without other units has no random twin"
    assert (
        whole.null_is
        == "5 random changes of equal norm (fc has no other live units, too few to draw from)"
    )
    assert len(whole.effects["kl"].null) == 5


def test_other_units_of_the_site_are_those_an_edit_is_not_about(branches: HookedModel) -> None:
    x = branches.input.example(8)
    edit = read_edit(branches, "scale_weights into=cat:4 layer=right factor=3")
    report = measure(branches, [edit], x, n_random=2)
    assert report.others["cat"].change == 0
    assert report.norms[0].of == "right.weight"
    own = branches.parameters["right.weight"].data
    assert report.norms[0].size == pytest.approx(2 * own[0].norm().item(), rel=1e-5)


def twins(model: HookedModel, edits: list, n: int = 4) -> list:
    """Edits of random twins."""
    examples = Examples.given(model, model.input.example(3))
    return [v.edits for v in null_of(model, Variant("x", tuple(edits)), examples, n).variants]


def test_twins_swap_each_unit_once(own_net: HookedModel) -> None:
    edits = [scale("relu:1", 2), scale("relu:1", 3), zero("relu:2")]
    for twin in twins(own_net, edits):
        targets = [edit.units for edit in twin]
        assert targets[0] == targets[1] != targets[2]
        assert not set(targets) & {edit.units for edit in edits}
        assert [edit.factor for edit in twin] == [2, 3, 0]
    swap = {Unit("relu", 1): Unit("relu", 5)}
    assert twin_of(own_net, edits[:1], swap) == (scale("relu:5", 2),)
    assert twin_of(own_net, edits, swap) is None, "nobody stands in for relu:2"


def awake(branches: HookedModel) -> None:
    """No unit of `right` is dead: a dead one is nobody's twin."""
    with torch.no_grad():
        branches.module.right.bias += 3  # type: ignore[union-attr, operator]


def test_a_twin_is_one_that_all_edits_of_a_unit_can_have(branches: HookedModel) -> None:
    awake(branches)
    edits = [zero("cat:1"), read_edit(branches, "rotate_weights into=cat:1"), zero("cat:2")]
    found = twins(branches, edits, 3)
    assert len(found) == 3
    for twin in found:
        first, second, third = (getattr(e, "units", None) or e.into for e in twin)
        assert first == second
        assert first.indices[0] in (0, 3), "of `left`, whose kernels can be turned, and not 2"
        assert third.indices[0] not in (1, 2, first.indices[0])


def test_twins_of_grouped_weights_have_weights(branches: HookedModel) -> None:
    edit = read_edit(branches, "scale_weights into=cat:0 source=pool:1")  # the first of two groups
    assert twins(branches, [edit], 1) == [
        (read_edit(branches, "scale_weights into=cat:1 source=pool:1"),)
    ]
    with pytest.raises(ValueError, match="no weights"):
        read_edit(branches, "scale_weights into=cat:0 source=pool:4 layer=left")


def test_edits_of_what_reads_the_input_have_no_twin(branches: HookedModel) -> None:
    edit = read_edit(branches, "scale_weights source=input:0")
    report = measure(branches, [edit], branches.input.example(2), n_random=5)
    assert report.null == ()
    assert report.null_is.startswith("5 random changes of equal norm")
    assert len(report.effects["kl"].null) == 5


def test_numbers_that_overflow_in_the_model_are_refused_with_edit_and_site(
    own_net: HookedModel,
) -> None:
    large = scale("relu:0-5", 3e38)
    with pytest.raises(
        ValueError,
        match=r"\(scale units=relu:0-5 factor=3e\+38\) .* gives NaN or infinity, first at relu",
    ):
        measure(own_net, [large], own_net.input.example(4), n_random=2)
    with pytest.raises(
        ValueError, match=r"factor of edit 'scale' has 1e\+39: expected at most 3.4e\+38"
    ):
        measure(own_net, [scale("relu:0-5", 1e39)], own_net.input.example(4), n_random=2)


def test_twins_of_weights_are_units_of_the_same_layer(branches: HookedModel) -> None:
    awake(branches)
    edits = [FilterWeights(Units("cat", (4,)))]  # written by `right`, as unit 5 alone is
    assert twins(branches, edits, 1) == [(FilterWeights(Units("cat", (5,))),)]


@pytest.mark.parametrize("name", ["own_net", "bridge"])
def test_noise_is_as_large_as_the_edit(request: pytest.FixtureRequest, name: str) -> None:
    model: HookedModel = request.getfixturevalue(name)
    site = {"own_net": "relu", "bridge": "blocks.0.attn.hook_z"}[name]
    words = "from=blocks.0.attn.hook_z:2" if name == "bridge" else "into=stem:2"
    cut = read_edit(model, f"scale_weights {words} factor=0")
    every = range(model.site(site).n_units)
    edits = [scale(f"{site}:{','.join(map(str, every))}", 0.5), cut]  # no unit is left for a twin
    examples = Examples.given(model, model.input.example(2))
    own = Variant("x", tuple(edits))
    null = null_of(model, own, examples, n=1)
    variant, noise = prepared(model, own), prepared(model, null.variants[0])
    for (name, tensor), (_, other) in zip(
        variant.tensors.items(), noise.tensors.items(), strict=True
    ):
        before = model.parameters[name].data
        assert (tensor - before).norm().item() == pytest.approx(
            (other - before).norm().item(), rel=1e-4
        )
        assert torch.equal(tensor != before, other != before), "noise touches the same weights"
    plain = model.run(examples.inputs, read=[site])[site]
    gone = [plan.fixed()[site](plain) - plain for plan in (variant, noise)]
    norms = [model.site(site).rows(g).norm(dim=-1) for g in gone]
    torch.testing.assert_close(*norms)


def test_fine_tuning_reaches_the_target(bridge: HookedModel) -> None:
    x, start = bridge.input.example(1), bridge.hash
    tuned = fine_tune(bridge, x, 5, enough=0.5, learning_rate=1e-2)
    assert bridge.hash == start
    with bridge.rewriting(tuned.tensors):
        reached = bridge.logits(x)[0, -1].softmax(-1)[5].item()
    assert reached == pytest.approx(tuned.probability, abs=1e-5)
    assert reached >= 0.5
    one = fine_tune(bridge, x, 5, parameters=["blocks.1.mlp.out.weight"], steps=3)
    assert list(one.tensors) == ["blocks.1.mlp.out.weight"]
    with pytest.raises(KeyError, match="no parameter 'x'"):
        fine_tune(bridge, x, 5, parameters=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_random": -1}, "n_random -1"),
        ({"seed": -1}, "seed -1"),
        ({"labels": [0]}, "labels have 1 entries: expected one for each of the 4 examples"),
        ({"targets": ["fc:9"]}, "does not exist"),
    ],
)
def test_bad_input_to_measure_is_named(own_net: HookedModel, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(own_net, [zero("relu:1")], own_net.input.example(4), **options)
    with pytest.raises(ValueError, match="recipe has no edits"):
        measure(own_net, [], own_net.input.example(4))
    with pytest.raises(ValueError, match="examples are empty"):
        measure(own_net, [zero("relu:1")], [])


def test_predictions_of_images_and_tokens(own_net: HookedModel, bridge: HookedModel) -> None:
    x = own_net.input.example(1)
    best = predictions(own_net, x, top=2)
    expected = own_net.logits(x)[0].softmax(-1)
    assert best[0].probability == pytest.approx(expected.max().item())
    assert best[0].name == f"output {expected.argmax().item()}"
    tokens = bridge.input.example(1)
    following = predictions(bridge, tokens, top=1)[0]
    assert following.index == bridge.logits(tokens)[0, -1].argmax().item()
    with pytest.raises(ValueError, match="expected one"):
        predictions(own_net, own_net.input.example(2))


def test_maps_of_predictions_are_compared_over_classes() -> None:
    model = HookedModel(seeded(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))), (3, 5, 6))
    x = model.input.example(2)
    report = measure(model, [scale("0:1", 3)], x, n_random=2)
    with edited(model, [scale("0:1", 3)]):
        changed = model.logits(x).movedim(1, -1)
    wanted = kl(model.logits(x).movedim(1, -1), changed)
    assert report.effects["kl"].change == pytest.approx(wanted, rel=1e-4)
    assert len(predictions(model, x[:1])) == 4


# --- the published edit ----------------------------------------------------------------------------


def echoes(model: HookedModel, units: list[str], edit, n_random: int = 5):
    """The echo of each unit before and after, and the change that each random edit makes."""
    x = model.input.example(2)
    report = measure(model, [edit], x, tuning=units, n_random=n_random)
    before = np.array([t.measures.echo.value for t in report.tuning])
    after = np.array([t.changed.echo.value for t in report.tuning])
    return report, before, after, np.array([t.null for t in report.tuning])


def test_without_negative_weights_lines_of_the_clean_room_answer_other_angles() -> None:
    """As far as the clean room is built: lines have no opposite, their echo is at right angles."""
    model = load_model("cleanroom")
    own = Variant("x", (read_edit(model, "filter_weights into=line:* keep=positive"),))
    null = null_of(model, own, Examples(model, "curves", 2), n=1)
    assert "random changes of equal norm" in null.is_, "all lines are edited"
    units = [f"line:{i}" for i in range(12)]

    def echo(variant: Variant) -> np.ndarray:
        """The least response, from 45 to 135 degrees away, over the peak."""
        with in_force(prepared(model, variant)):
            tunings = radial_tuning(model, units, "line", step=15.0, radii=[20.0])
        rolled = [np.roll(t.mean, -int(t.mean.argmax())) for t in tunings]
        return np.array([c[3:10].max() / c[0] for c in rolled])

    before, after, random = echo(Variant("intact")), echo(own), echo(null.variants[0])
    assert (after > before).all(), (before, after)
    assert (after - before).mean() > 3 * np.abs(random - before).mean(), (before, after, random)


@pytest.mark.nightly
def test_without_negative_weights_googlenets_curves_answer_the_opposite(assets: Path) -> None:
    model = load_model("googlenet")
    units = [f"mixed3b:{i}" for i in CURVES]
    edit = FilterWeights(Units("mixed3b", CURVES))
    report, before, after, random = echoes(model, units, edit, n_random=1)
    assert np.nanmedian(before) < 0.05
    assert np.nanmedian(after) > 0.2
    assert (after > before).mean() >= 0.9
    grown = np.nanmean(after - before)
    assert grown > 5 * np.nanmean(np.abs(random)), "the same edit of other units leaves the echo"
    assert report.restored


def test_editing_curves_of_googlenet_beside_random_twins(assets: Path, tmp_path: Path) -> None:
    model = load_model("googlenet")
    source = open_source(f"folder:{assets / 'images' / 'imagenet500'}")
    labels = read_labels(source, model.classes, assets / "images" / "imagenet500_labels.json")
    examples = Examples(model, source, 16, labels=labels)
    direction = Direction(
        "mixed4c", torch.randn(512, generator=torch.Generator().manual_seed(0)).double()
    )
    for edits in (
        [zero(Units("mixed3b", CURVES))],
        [scale("mixed4c:447", 3.0)],
        [project_out(direction)],
    ):
        report = measure(model, edits, examples, targets=["mixed3b:358"], n_random=2)
        assert report.restored
        assert set(report.effects) == {
            "cross_entropy",
            "accuracy",
            "top5",
            "kl",
            "top1_changed",
            "logit_of_first",
        }
        assert len(report.effects["kl"].null) == 2
        assert report.effects["kl"].change > 0
        save_figure(edit_figure(report), tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 10_000


def test_one_fact_of_the_addition_model_is_changed_more_locally_than_by_fine_tuning(
    assets: Path,
) -> None:
    model = load_model("modular-addition")
    p, layer = 113, "blocks.0.mlp.out"
    every = torch.tensor([[a, b, p] for a in range(p) for b in range(p)])
    truth = torch.tensor([(a + b) % p for a in range(p) for b in range(p)])
    batches = every.split(4096)
    moment = second_moment(model, layer, batches)
    moved, tuned_moved = [], []
    for a, b, answer in ((3, 5, 50), (40, 100, 1), (70, 7, 12)):
        prompt, at = torch.tensor([[a, b, p]]), a * p + b

        def wrong(found: Tensor, at: int = at) -> int:
            others = torch.arange(p * p) != at
            return int((found[:, -1, :p].argmax(-1) != truth)[others].sum())

        assert wrong(model.logits(every)) == 0
        with edited(model, [associate(model, layer, prompt, answer, moment)]):
            found = model.logits(every)
        assert found[at, -1].softmax(-1)[answer] > 0.99
        moved.append(wrong(found))
        tuned = fine_tune(model, prompt, answer, parameters=[f"{layer}.weight"])
        assert tuned.probability >= 0.99
        with model.rewriting(tuned.tensors):
            tuned_moved.append(wrong(model.logits(every)))
    assert max(moved) < 40, moved  # of 12768
    assert sum(moved) * 10 < sum(tuned_moved), (moved, tuned_moved)


def test_token_losses_are_minus_log_probabilities(bridge: HookedModel) -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    losses = token_losses(bridge, tokens)
    probabilities = bridge.logits(tokens).softmax(-1)
    for i, row in enumerate(tokens.tolist()):
        for at, token in enumerate(row[1:]):
            expected = -probabilities[i, at, token].log()
            torch.testing.assert_close(losses[i, at], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="1 positions: expected at least 2"):
        token_losses(bridge, tokens[:, :1])
    with pytest.raises(ValueError, match="shapes takes images"):
        token_losses(load_model("shapes"), tokens)
