from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuits.edits.effects import _twin, compare, measure, predictions
from circuits.edits.operators import Scale, parse_edit, scale, zero
from circuits.edits.recipes import Recipe, edited
from circuits.models.adapter import HookedModel
from circuits.units import Unit
from tests.conftest import seeded
from tests.test_units import site_names

edits = st.builds(
    Scale,
    st.builds(Unit, site_names, st.integers(0, 10**6)),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(st.lists(edits, max_size=5), st.text())
def test_recipes_load_what_they_save(tmp_path_factory, made: list[Scale], note: str) -> None:
    recipe = Recipe(tuple(made), "a" * 64, note)
    path = tmp_path_factory.mktemp("recipe") / "r.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe


def test_zero_and_scale_by_hand(own_net: HookedModel) -> None:
    x = own_net.input.example(2)
    plain = own_net.run(x, read=["relu", "stem"])
    with edited(own_net, [zero("relu:2"), scale("relu:5", -1.5), scale("relu:5", 2)]):
        changed = own_net.run(x, read=["relu", "stem"])
        assert not torch.equal(own_net.module(x), plain.output), "the plain module is edited too"
    expected = plain["relu"].clone()
    expected[:, 2] = 0
    expected[:, 5] *= -3
    torch.testing.assert_close(changed["relu"], expected)
    assert torch.equal(changed["stem"], plain["stem"])


@pytest.mark.parametrize(
    "site", ["blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.0.attn.hook_pattern"]
)
def test_transformer_units(bridge: HookedModel, site: str) -> None:
    tokens = bridge.input.example(2)
    plain = bridge.run(tokens, read=[site])[site]
    axis = bridge.site(site).unit_axis
    with edited(bridge, [zero(f"{site}:3")]):
        changed = bridge.run(tokens, read=[site])[site]
    assert not changed.select(axis, 3).any()
    assert torch.equal(changed.narrow(axis, 0, 3), plain.narrow(axis, 0, 3))


def test_output_is_restored_to_the_bit(own_net: HookedModel, bridge: HookedModel) -> None:
    for model, unit in ((own_net, "block.act@0:1"), (bridge, "blocks.0.attn.hook_z:1")):
        x = model.input.example(2)
        weights, before = model.hash, model.logits(x)
        with edited(model, [zero(unit)]):
            assert not torch.equal(model.logits(x), before)
        with pytest.raises(RuntimeError, match="inside"), edited(model, [zero(unit)]):
            raise RuntimeError("inside")
        with edited(model, [zero(unit)]), edited(model, [scale(unit, 3)]), edited(model, []):
            pass
        assert torch.equal(model.logits(x), before)
        assert model.hash == weights


def test_zero_removes_even_what_is_not_finite(own_net: HookedModel) -> None:
    x = own_net.input.example(1)
    with own_net.intervening({"relu": lambda t: t / 0}), edited(own_net, [zero("relu:0")]):
        assert not own_net.run(x, read=["relu"])["relu"][:, 0].any()


def test_recipe_for_other_weights_is_refused(own_net: HookedModel) -> None:
    recipe = Recipe((zero("relu:1"),), "f" * 64)
    with (
        pytest.raises(ValueError, match="recipe is for model ffffffffffffffff, not"),
        edited(own_net, recipe),
    ):
        pass
    assert Recipe.of(own_net, [zero("relu:1")]).model_hash == own_net.hash


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (zero("relu:8"), ValueError, "units 0 to 7"),
        (zero("relo:1"), KeyError, "did you mean relu"),
    ],
)
def test_bad_edits_change_nothing(own_net: HookedModel, edit, error, message) -> None:
    x = own_net.input.example(1)
    before = own_net.logits(x)
    with pytest.raises(error, match=message), edited(own_net, [zero("relu:1"), edit]):
        pass
    assert torch.equal(own_net.logits(x), before)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"operator": "rotate"}, KeyError, "unknown edit operator 'rotate'"),
        ({"operator": "scale", "target": "a:1"}, ValueError, "needs a target"),
        (
            {"operator": "scale", "target": "a:1", "factor": float("nan")},
            ValueError,
            "must be finite",
        ),
        ({"operator": "scale", "target": "a:1", "factor": "2"}, ValueError, "needs a target"),
        ({"operator": "scale", "target": "a:1", "factor": 10**400}, ValueError, "needs a target"),
        (5, ValueError, "not a record"),
        ({"operator": "scale", "target": "a", "factor": 1}, ValueError, "SITE:INDEX"),
    ],
)
def test_bad_records_are_named(raw, error, message) -> None:
    with pytest.raises(error, match=message):
        parse_edit(raw)


def test_bad_recipe_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", "{}", '"x"', '{"schema": 1, "edits": "abc"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a recipe"):
            Recipe.load(path)
    path.write_text(json.dumps({"schema": 99, "edits": []}))
    with pytest.raises(ValueError, match="layout 99: expected 1"):
        Recipe.load(path)


def test_compare_by_hand() -> None:
    intact, changed = (
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[0.0, torch.log(torch.tensor(3.0))]]),
    )
    effect = compare(intact, changed)
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3
    assert effect.kl == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item(), rel=1e-5)
    assert effect.top1_changed == 1.0


def test_measure_reports_the_edit_beside_random_ones(own_net: HookedModel) -> None:
    x = own_net.input.example(40)
    recipe = Recipe.of(own_net, [zero("relu:1"), zero("relu:2")])
    report = measure(own_net, recipe, x, "noise", n_random=3, seed=1, batch=7)
    with edited(own_net, recipe):
        changed = own_net.logits(x)
    direct = compare(own_net.logits(x), changed)
    assert report.effect.kl == pytest.approx(direct.kl, rel=1e-4)
    assert report.restored
    assert len(report.random) == 3
    assert report == measure(own_net, recipe, x, "noise", n_random=3, seed=1, batch=7)
    assert json.loads(json.dumps(report.to_dict()))["recipe"]["edits"][0]["target"] == "relu:1"
    whole = measure(own_net, Recipe.of(own_net, [zero(f"fc:{i}") for i in range(3)]), x)
    assert whole.random == (), "a site without other units has no random twin"


def test_maps_of_predictions_are_compared_over_classes() -> None:
    model = HookedModel(seeded(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))), (3, 5, 6))
    x = model.input.example(2)
    with edited(model, [scale("0:1", 3)]):
        changed = model.logits(x)
    report = measure(model, Recipe.of(model, [scale("0:1", 3)]), x)
    p, q = (t.double().log_softmax(1) for t in (model.logits(x), changed))
    assert report.effect.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert len(predictions(model, x[:1])) == 4
    assert report.model_hash == model.hash


def test_twins_swap_each_unit_once(own_net: HookedModel) -> None:
    edits = [scale("relu:1", 2), scale("relu:1", 3), zero("relu:2")]
    twin = _twin(own_net, edits, torch.Generator().manual_seed(0))
    assert twin[0].target == twin[1].target != twin[2].target
    assert not {e.target for e in twin} & {e.target for e in edits}
    assert [e.factor for e in twin] == [2, 3, 0]


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
