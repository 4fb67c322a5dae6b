from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from circuits.edits.activations import Clamp, Erase, Patch, Scale, Set, Steer, scale, zero
from circuits.edits.associative import associate, second_moment
from circuits.edits.connections import (
    FilterWeights,
    KeepWeights,
    RotateWeights,
    ScaleWeights,
    SetWeights,
    rotated_kernels,
)
from circuits.edits.estimation import (
    leace_projection,
    means,
    patch,
    project_out,
    resample,
    steer,
    transplant,
)
from circuits.edits.layers import Associate, EraseWeights, LowRank
from circuits.edits.recipes import (
    MOST_EDITS,
    Recipe,
    bake,
    commute,
    diff,
    edited,
    recipe_schema,
    save_baked,
)
from circuits.edits.records import OPERATORS, parse_edit, read_edit
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.units import Direction, Unit, Units
from tests.conftest import seeded
from tests.random_edits import RandomEdits
from tests.test_units import site_names

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
drawn = st.tuples(
    st.sampled_from(["scale", "set", "filter"]),
    site_names,
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True),
    st.lists(finite, min_size=1, max_size=99),
)


@given(st.lists(drawn, max_size=5), st.text())
def test_recipes_load_what_they_save(tmp_path_factory, made, note: str) -> None:
    edits = []
    for kind, site, indices, numbers in made:
        units = Units(site, tuple(indices))
        if kind == "scale":
            edits.append(Scale(units, factor=numbers[0]))
        elif kind == "set":
            edits.append(Set(units, values=torch.tensor(numbers)))
        else:
            edits.append(FilterWeights(into=units, keep="negative"))
    recipe = Recipe(tuple(edits), "a" * 64, note, "somebody", 7)
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe


@pytest.fixture(params=["branches", "bridge"])
def any_model(request: pytest.FixtureRequest) -> HookedModel:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_every_operator_changes_and_restores(any_model: HookedModel, operator: str) -> None:
    model, draw = any_model, RandomEdits(any_model, 3)
    if (operator, model.name) in (("rotate_weights", "tiny-bridge"), ("knock_out", "Branches")):
        with pytest.raises(LookupError):  # a transformer has no kernels to turn, a CNN no attention
            draw.edit(operator)
        return
    x = model.input.example(2)
    own = {name: p.data.clone() for name, p in model.parameters.items()}
    before, model_hash, moved = model.logits(x), model.hash, 0
    for _ in range(6):
        edit = draw.edit(operator)
        again = parse_edit(json.loads(json.dumps(edit.to_dict())))
        assert again == edit
        assert str(again).startswith(operator)
        with edited(model, [edit]):
            moved += not torch.equal(model.logits(x), before)
            assert model.intact_hash == model_hash
    assert moved, "none of six edits changed anything"
    assert torch.equal(model.logits(x), before)
    assert model.hash == model_hash
    assert all(torch.equal(p.data, own[name]) for name, p in model.parameters.items())


# --- activations -----------------------------------------------------------------------------------


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


def test_each_activation_operator_by_hand(own_net: HookedModel) -> None:
    x = own_net.input.example(3)
    site = own_net.site("block.conv@0")
    plain = own_net.run(x, read=[site])[site]
    vector = torch.arange(8.0)

    def after(edit) -> Tensor:
        with edited(own_net, [edit]):
            return own_net.run(x, read=[site])[site]

    name = site.name
    clamped = after(Clamp(Units(name, (1, 3)), low=-0.1, high=0.2))
    assert torch.equal(clamped[:, [1, 3]], plain[:, [1, 3]].clamp(-0.1, 0.2))
    assert torch.equal(clamped[:, [0, 2, 4, 5, 6, 7]], plain[:, [0, 2, 4, 5, 6, 7]])
    put = after(Set(Units(name, (5, 2)), values=torch.tensor([4.0, -1.0])))
    assert (put[:, 5] == 4).all()
    assert (put[:, 2] == -1).all()
    one = after(Scale(Units(name, None), at=(2, -1), factor=0.0))
    assert not one[:, :, 2, -1].any()
    one[:, :, 2, -1] = plain[:, :, 2, -1]
    assert torch.equal(one, plain)
    torch.testing.assert_close(
        after(steer(Direction(name, vector), 0.5)), plain + 0.5 * vector[:, None, None]
    )
    unit = vector / vector.norm()
    projected = after(project_out(Direction(name, vector)))
    torch.testing.assert_close(
        projected, plain - unit[:, None, None] * torch.einsum("buyx,u->byx", plain, unit)[:, None]
    )
    assert torch.einsum("buyx,u->byx", projected, unit).abs().max() < 1e-5
    donors = own_net.input.example(2).flip(-1)
    theirs = own_net.run(donors, read=[site])[site]
    swapped = after(resample(own_net, f"{name}:1,4", donors))
    assert torch.equal(swapped[:, [1, 4]], theirs[[0, 1, 0]][:, [1, 4]])
    patched = after(patch(own_net, f"{name}:6", donors[:1], at=(3, 4)))
    assert torch.equal(patched[:, 6, 3, 4], theirs[:1, 6, 3, 4].expand(3))
    mean = after(means(own_net, f"{name}:0", [x[:2], x[2:]]))
    torch.testing.assert_close(mean[:, 0], plain[:, 0].mean().expand_as(plain[:, 0]))


def test_heads_are_set_and_patched_whole(bridge: HookedModel) -> None:
    x, site = bridge.input.example(3), bridge.site("blocks.0.attn.hook_z")
    plain = bridge.run(x, read=[site])[site]
    with edited(bridge, [means(bridge, f"{site.name}:1,2", [x])]):
        changed = bridge.run(x, read=[site])[site]
    torch.testing.assert_close(changed[0, 5, 1], plain[:, :, 1].mean((0, 1)))
    with edited(bridge, [patch(bridge, f"{site.name}:2", x[:1], at=(-1,))]):
        changed = bridge.run(x, read=[site])[site]
    assert torch.equal(changed[:, -1, 2], plain[:1, -1, 2].expand(3, -1))
    assert torch.equal(changed[:, :-1], plain[:, :-1])


def leace_of(site: str, x: Tensor, labels: Tensor) -> Erase:
    """LEACE from rows of activations and their labels."""
    x = x.double()
    z = F.one_hot(labels.unique(return_inverse=True)[1]).double()
    mean, shares = x.mean(0), z.mean(0)
    cov, cross = (x - mean).T @ (x - mean) / len(x), (x - mean).T @ (z - shares) / len(x)
    return leace_projection(site, mean, cov, cross, shares)


def test_leace_leaves_nothing_to_a_linear_classifier_and_changes_least() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4000,), generator=generator)
    x = (
        torch.randn(4000, 6, generator=generator).double()
        @ torch.randn(6, 6, generator=generator).double()
    )
    x[:, :2] += F.one_hot(labels, 3).double()[:, :2] * 3
    eraser = leace_of("site", x, labels)
    assert eraser.basis.shape == (6, 2), "three classes differ in two directions"
    assert eraser.dual is not None
    assert eraser.mean is not None
    erased = x - (x - eraser.mean) @ eraser.dual @ eraser.basis.T
    for kind in range(
        3
    ):  # theorem 3.1: classes have one mean, so that no linear classifier can tell
        torch.testing.assert_close(
            erased[labels == kind].mean(0), erased.mean(0), atol=1e-9, rtol=0
        )
    naive = x.clone()
    between = torch.stack([x[labels == k].mean(0) - x.mean(0) for k in range(3)])
    q = torch.linalg.svd(between)[2][:2].T  # the orthogonal projection of the class means
    naive = x - (x - x.mean(0)) @ q @ q.T
    metric = torch.linalg.inv(torch.cov(x.T))
    cost = [torch.einsum("ni,ij,nj->n", y - x, metric, y - x).mean() for y in (erased, naive)]
    assert cost[0] < cost[1], "least in the norm of x's own covariance (theorem 4.2)"


# --- weights ---------------------------------------------------------------------------------------


def weight_after(model: HookedModel, edit, name: str) -> Tensor:
    with edited(model, [edit]):
        return model.parameters[name].data.clone()


def test_connections_by_hand(branches: HookedModel) -> None:
    plain = branches.parameters["right.weight"].data.clone()  # 2 x 6, concatenated behind left's 4
    cut = weight_after(
        branches, read_edit(branches, "scale_weights into=cat:5 from=pool:2,3"), "right.weight"
    )
    expected = plain.clone()
    expected[1, 2:4] = 0
    assert torch.equal(cut, expected)
    kept = weight_after(
        branches,
        KeepWeights(Units("cat", (4,)), Units("pool", (0, 1)), layer="right"),
        "right.weight",
    )
    assert not kept[0, 2:].any()
    assert torch.equal(kept[0, :2], plain[0, :2])
    assert torch.equal(kept[1], plain[1])
    put = SetWeights(
        Units("cat", (5, 4)),
        Units("pool", (3,)),
        values=torch.tensor([7.0, 8.0]).reshape(2, 1, 1, 1),
    )
    after = weight_after(branches, put, "right.weight")
    assert after[1, 3, 0, 0] == 7
    assert after[0, 3, 0, 0] == 8


def test_grouped_convolutions_have_the_weights_of_their_group_only(branches: HookedModel) -> None:
    plain = branches.parameters["left.weight"].data.clone()  # 4 x 3 x 3 x 3 in two groups
    cut = weight_after(
        branches, ScaleWeights(Units("cat", (1, 2)), Units("pool", (1, 4))), "left.weight"
    )
    expected = plain.clone()
    expected[1, 1] = 0  # unit 1 reads channels 0 to 2
    expected[2, 1] = 0  # unit 2 reads channels 3 to 5: channel 4 is its second
    assert torch.equal(cut, expected)


def test_the_sign_of_a_weight_is_that_between_the_sites(branches: HookedModel) -> None:
    with torch.no_grad():
        branches.module.bn.weight.copy_(torch.tensor([1.0, -1, 1, -1, 1, -1]))  # type: ignore[union-attr]
    plain = branches.parameters["inner.weight"].data.clone()
    kept = weight_after(branches, FilterWeights(Units("bn", None), layer="inner"), "inner.weight")
    for row in range(6):
        sign = -1 if row % 2 else 1
        assert torch.equal(kept[row], plain[row] * (plain[row] * sign > 0))


def test_heads_own_the_rows_and_columns_of_their_dimensions(bridge: HookedModel) -> None:
    site = "blocks.0.attn.hook_z"
    edit = read_edit(bridge, f"scale_weights from={site}:2")
    plain = bridge.parameters["blocks.0.attn.o.weight"].data.clone()
    cut = weight_after(bridge, edit, "blocks.0.attn.o.weight")
    assert not cut[:, 8:12].any()
    assert torch.equal(cut[:, :8], plain[:, :8])
    x = bridge.input.example(2)
    with edited(bridge, [edit]):
        by_weights = bridge.logits(x)
    with edited(bridge, [zero(f"{site}:2")]):
        by_activation = bridge.logits(x)
    torch.testing.assert_close(by_weights, by_activation, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_kernels_turn_as_images_do(size: int) -> None:
    kernels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotated_kernels(kernels, 90), torch.rot90(kernels, 1, (2, 3)))
    assert torch.equal(rotated_kernels(kernels, -360), kernels)
    y, x = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    ramp = rotated_kernels(x[None].double(), 30.0)[0]
    inside = (x.square() + y.square()).sqrt() <= (size - 1) / 2
    turned = x * 0.75**0.5 - y * 0.5  # counterclockwise on the screen, y down
    torch.testing.assert_close(ramp[inside], turned[inside].double(), atol=1e-6, rtol=1e-6)
    assert rotated_kernels(torch.ones(1, 2, 3), 90).shape == (1, 2, 3)


def test_erasing_in_weights_is_erasing_what_they_write(own_net: HookedModel) -> None:
    x, n = own_net.input.example(2), 8
    basis = torch.linalg.qr(torch.randn(n, 2, generator=torch.Generator().manual_seed(1))).Q
    mean = torch.arange(8.0)
    outputs = []
    for edit in (Erase("stem", basis, mean=mean), EraseWeights("stem", basis, mean=mean)):
        with edited(own_net, [edit]):
            outputs.append(own_net.run(x, read=["stem"])["stem"])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_transplanted_units_do_what_they_did_in_the_donor(branches: HookedModel) -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 5, 3, padding=1)
            self.second = nn.Conv2d(5, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()).mean((2, 3))

    donor = HookedModel(seeded(Host(), 1), (3, 8, 8), "donor")
    host = HookedModel(seeded(Host(), 2), (3, 8, 8), "host")
    with torch.no_grad():  # the host's channels 4, 3, 2, 1, 0 are the donor's 0 to 4
        host.module.first.weight.copy_(donor.module.first.weight.flip(0))  # type: ignore[union-attr]
        host.module.first.bias.copy_(donor.module.first.bias.flip(0))  # type: ignore[union-attr]
    match = {Unit("first", 4 - i): Unit("first", i) for i in range(5)}
    edit = transplant(host, "second:1,3", donor, "second:0,2", match)
    x = host.input.example(4)
    with edited(host, [edit]):
        got = host.run(x, read=["second"])["second"]
    wanted = donor.run(x, read=["second"])["second"]
    torch.testing.assert_close(got[:, [1, 3]], wanted[:, [0, 2]], atol=1e-5, rtol=1e-5)
    before = host.run(x, read=["second"])["second"]
    assert torch.equal(got[:, [0, 2]], before[:, [0, 2]])
    fitted = transplant(host, "second:1,3", donor, "second:0,2", match, [x])
    with edited(host, [fitted]):
        got = host.run(x, read=["second"])["second"]
    for unit in (1, 3):
        assert got[:, unit].mean().item() == pytest.approx(before[:, unit].mean().item(), abs=1e-4)
        assert got[:, unit].std().item() == pytest.approx(before[:, unit].std().item(), rel=1e-3)


class Residual(nn.Module):
    """Two layers that add up, one that reads the sum through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.right, self.left = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.relu, self.out, self.last = nn.ReLU(), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        r = self.relu(self.first(x))
        return self.last(torch.tanh(self.out(self.left(r) + self.right(x)).mean((2, 3))))


def test_ambiguous_and_missing_weights_are_named(branches: HookedModel) -> None:
    model = HookedModel(seeded(Residual()), (3, 5, 5), "residual")
    for text in ("scale_weights into=out:1", "keep_weights into=out:1 source=relu:2"):
        with pytest.raises(
            ValueError,
            match=r"several layers write out:1: name one with layer=(left or layer=right|right or layer=left)",
        ):
            read_edit(model, text)
    kept = weight_after(
        model, read_edit(model, "keep_weights into=out:1 source=relu:2 layer=left"), "left.weight"
    )
    assert kept[1].flatten().tolist() == [0, 0, model.parameters["left.weight"][1, 2].item()]
    with pytest.raises(ValueError, match="unit cat:1 has no weights in"):
        read_edit(branches, "scale_weights into=cat:1,4 layer=right")
    with pytest.raises(ValueError, match="no site holds exactly what it reads"):
        second_moment(model, "last", [model.input.example(2)])  # tanh lies between


def test_shared_weights_are_changed_once_and_only_by_name() -> None:
    module = seeded(Residual())
    module.left.weight = module.right.weight  # type: ignore[union-attr]
    model = HookedModel(module, (3, 5, 5), "tied")
    with pytest.raises(ValueError, match="layer left shares its weights with right"):
        read_edit(model, "scale_weights source=relu:1")
    plain = model.parameters["right.weight"].data.clone()
    edit = read_edit(model, "scale_weights source=relu:1 layer=left factor=-1")
    cut = weight_after(model, edit, "right.weight")
    assert torch.equal(cut[:, 1], -plain[:, 1])


def test_shared_biases_are_changed_only_by_name() -> None:
    module = seeded(Residual())
    module.left.bias = module.right.bias  # type: ignore[union-attr]
    model = HookedModel(module, (3, 5, 5), "tied")
    with pytest.raises(ValueError, match="layer left shares its biases with right: name"):
        read_edit(model, "scale_weights source=relu:1 factor=2 bias=true")
    assert read_edit(model, "scale_weights source=relu:1 factor=2")
    assert read_edit(model, "scale_weights source=relu:1 factor=2 bias=true layer=left")


class Twice(nn.Module):
    """A layer that runs twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.relu = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.relu(self.shared(self.first(x)))).mean((2, 3))


def test_a_layer_that_runs_twice_is_changed_only_by_name() -> None:
    model = HookedModel(seeded(Twice()), (3, 5, 5), "twice")
    for text in ("into=shared@1:1", "source=relu:0", "into=shared@0:1 source=first:0"):
        with pytest.raises(ValueError, match="layer shared runs 2 times in a pass"):
            read_edit(model, f"scale_weights {text}")
    edit = read_edit(model, "scale_weights into=shared@1:1 layer=shared factor=0")
    inputs = torch.rand(2, 3, 5, 5)
    with edited(model, [edit]):
        seen = model.run(inputs, read=["shared@0", "shared@1"])
    bias = model.parameters["shared.bias"][1]
    for name in ("shared@0", "shared@1"):
        assert torch.allclose(seen[name][:, 1], bias)


def test_matrices_are_those_of_the_intact_model(bridge: HookedModel) -> None:
    plain = [
        (m.name, [e.site for e in m.reads], [e.site for e in m.writes]) for m in bridge.matrices
    ]
    other = HookedModel(copy.deepcopy(bridge.module), bridge.input)
    with other.rewriting({name: torch.zeros_like(p) for name, p in other.parameters.items()}):
        found = other.matrices
    assert [(m.name, [e.site for e in m.reads], [e.site for e in m.writes]) for m in found] == plain
    assert other.matrices == found


def test_sites_of_a_transformer_belong_to_their_own_layers() -> None:
    model = load_model("induction-by-hand")  # many of its weights are zero
    for matrix in model.matrices:
        block = matrix.name.rpartition(".attn.")[0]
        assert all(e.site.startswith(block) for e in matrix.writes), matrix.name
    (value,) = [m for m in model.matrices if m.name == "blocks.0.attn.v"]
    assert "blocks.0.attn.v.hook_in" in [e.site for e in value.reads]
    assert "blocks.0.attn.k.hook_in" not in [e.site for e in value.reads]


def test_transplants_carry_what_batch_norm_does(branches: HookedModel) -> None:
    def net(seed: int, sign: float) -> HookedModel:
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(100, 2),
        )
        seeded(module, seed)
        with torch.no_grad():
            module[1].weight.fill_(sign)  # type: ignore[union-attr]
        return HookedModel(module, (3, 5, 5), f"net{seed}")

    donor, host = net(1, -1.0), net(2, 2.0)
    x = host.input.example(8)
    match = {Unit("input", i): Unit("input", i) for i in range(3)}
    with pytest.raises(ValueError, match="examples are needed to fit a gain"):
        transplant(host, "1:2", donor, "1:0", match)
    with edited(host, [transplant(host, "1:2", donor, "1:0", match, [x])]):
        got = host.run(x, read=["1"])["1"][:, 2]
    wanted = donor.run(x, read=["1"])["1"][:, 0]
    assert torch.corrcoef(torch.stack([got.flatten(), wanted.flatten()]))[0, 1] > 0.9999
    own = host.run(x, read=["0"])["0"][:, 2].std()
    with edited(host, [transplant(host, "1:2", donor, "1:0", match, [x])]):
        assert host.run(x, read=["0"])["0"][:, 2].std().item() == pytest.approx(
            own.item(), rel=1e-3
        )


def test_edits_keep_their_own_numbers() -> None:
    values = torch.ones(3)
    edit = Set(Units("a", (1, 2, 3)), values=values)
    values.mul_(5)
    assert edit.values.tolist() == [1, 1, 1]
    assert Scale(Units("a", (1,)), factor=2) == Scale(Units("a", (1,)), factor=2.0)


def test_leace_of_labels_that_go_with_nothing_is_refused() -> None:
    x = torch.cat([torch.eye(4), torch.eye(4)])
    with pytest.raises(ValueError, match="there is nothing to erase"):
        leace_of("site", x, torch.tensor([0] * 4 + [1] * 4))


# --- associative memory ----------------------------------------------------------------------------


def memory(n_in: int = 24, n_out: int = 16) -> HookedModel:
    module = nn.Sequential(nn.Conv2d(n_in, n_out, 1), nn.Flatten())
    return HookedModel(seeded(module).double(), (n_in, 1, 1), "memory")


def test_a_rank_one_edit_is_exact_and_leaves_orthogonal_keys_alone() -> None:
    model, generator = memory(), torch.Generator().manual_seed(2)
    keys = torch.randn(200, 24, generator=generator).double()
    moment = keys.T @ keys / len(keys)
    key, value = keys[0], torch.randn(16, generator=generator).double()
    dual = torch.linalg.solve(moment, key)
    edit = Associate("0", key[:, None, None], value, dual).checked(model)
    others = keys[1:] - (keys[1:] @ dual)[:, None] * key / (key @ dual)  # k^T C^-1 k* = 0
    assert (others @ dual).abs().max() < 1e-9
    with edited(model, [edit]):
        torch.testing.assert_close(
            model.logits(key[None, :, None, None])[0], value, atol=1e-12, rtol=0
        )
        after = model.logits(others[:, :, None, None])
    torch.testing.assert_close(after, model.logits(others[:, :, None, None]), atol=1e-6, rtol=0)
    # and it is the least change of the answers to all keys that does it: equation 2 of Meng et al. 2022
    weight = model.parameters["0.weight"].data[..., 0, 0]
    with edited(model, [edit]):
        change = model.parameters["0.weight"].data[..., 0, 0] - weight
    naive = torch.outer(change @ key, key) / (key @ key)
    cost = [(d @ moment @ d.T).trace() for d in (change, naive)]
    assert cost[0] < cost[1]


def test_a_convolution_answers_at_the_place_of_the_key() -> None:
    module = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Flatten())
    model = HookedModel(seeded(module).double(), (6, 7, 7), "conv")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 7, 7, generator=generator).double()
    patch_ = x[0, :, 2:5, 3:6]  # what the layer sees at (3, 4)
    value, dual = torch.randn(5, generator=generator).double(), patch_[:, 1, 1]
    with edited(model, [Associate("0", patch_, value, dual)]):
        found = model.run(x, read=["0"])["0"]
    torch.testing.assert_close(found[0, :, 3, 4], value, atol=1e-9, rtol=0)


def test_one_fact_is_changed(bridge: HookedModel) -> None:
    prompts = torch.randint(0, 20, (40, 6), generator=torch.Generator().manual_seed(0))
    layer = "blocks.1.mlp.out"
    moment = second_moment(bridge, layer, prompts.split(8))
    edit = associate(bridge, layer, prompts[:1], 7, moment, steps=200)
    with edited(bridge, [edit]):
        after = bridge.logits(prompts)[:, -1].softmax(-1)
    before = bridge.logits(prompts)[:, -1].softmax(-1)
    assert before[0].argmax() != 7
    assert after[0].argmax() == 7
    assert after[0, 7] > 4 * before[0, 7], "its final normalisation allows no more"
    baked = bake(bridge, [edit])
    torch.testing.assert_close(baked.logits(prompts)[:, -1].softmax(-1), after)


def test_a_convolution_learns_an_answer_along_one_direction() -> None:
    model = load_model("shapes")
    x = Examples(model, "shapes", 16).inputs
    logits = model.logits(x)
    target = int(logits[0].topk(2).indices[1])
    layer = "mixed3a_3x3_pre_relu"
    moment = second_moment(model, layer, [x])
    edit = associate(model, layer, x[:1], target, moment, steps=200)
    assert isinstance(edit, LowRank)
    assert "probability 0.9" in edit.origin
    with edited(model, [edit]):
        assert model.logits(x)[0].softmax(-1)[target] > 0.9
    change = weight_after(model, edit, f"{layer}.weight") - model.parameters[f"{layer}.weight"].data
    spread = torch.linalg.svdvals(change.movedim(1, 0).flatten(1).double())
    assert spread[1] < 1e-4 * spread[0], "one direction of the channels"
    assert torch.equal(model.logits(x), logits)


# --- recipes ---------------------------------------------------------------------------------------


def test_output_is_restored_to_the_bit(own_net: HookedModel, bridge: HookedModel) -> None:
    for model, unit in ((own_net, "relu:1"), (bridge, "blocks.1.attn.hook_z:2")):
        x = model.input.example(2)
        before, model_hash = model.logits(x), model.hash
        with pytest.raises(RuntimeError), edited(model, [zero(unit)]):
            raise RuntimeError
        assert torch.equal(model.logits(x), before)
        assert model.hash == model_hash


def test_edits_nest_and_unwind_to_the_bit(any_model: HookedModel) -> None:
    model, draw = any_model, RandomEdits(any_model, 5)
    x = model.input.example(2)
    levels = [
        [draw.edit("scale")],
        [draw.edit("scale_weights"), draw.edit("steer")],
        [draw.edit("low_rank")],
    ]
    start = model.hash
    outputs = [model.logits(x)]
    with pytest.raises(KeyError, match="on purpose"), edited(model, levels[0]):  # noqa: PT012
        outputs.append(model.logits(x))
        with edited(model, Recipe.of(model, [])), edited(model, levels[1]):
            outputs.append(model.logits(x))
            with edited(model, levels[2]):
                inner = model.logits(x)
            assert torch.equal(model.logits(x), outputs[2])
            with edited(model, levels[2]):
                assert torch.equal(model.logits(x), inner)
                raise KeyError("on purpose")
    assert torch.equal(model.logits(x), outputs[0])
    assert model.hash == start
    assert not model.edited


def test_bake_gives_a_new_model(any_model: HookedModel, tmp_path: Path) -> None:
    model, draw = any_model, RandomEdits(any_model, 8)
    recipe = Recipe.of(model, [draw.edit("scale_weights"), draw.edit("low_rank")])
    x, start = model.input.example(2), model.hash
    with edited(model, recipe):
        wanted, wanted_hash = model.logits(x), model.hash
    made = bake(model, recipe)
    assert model.hash == start
    assert made.hash == wanted_hash != start
    torch.testing.assert_close(made.logits(x), wanted)
    save_baked(made, tmp_path / "w.safetensors", model, recipe)
    with pytest.raises(ValueError, match="must end in"):
        save_baked(made, tmp_path / "w.pt", model, recipe)
    with pytest.raises(ValueError, match="changes activations, which weights cannot hold"):
        bake(model, [draw.edit("scale")])


def test_baked_weights_load_as_the_same_model(tmp_path: Path) -> None:
    model = load_model("shapes")
    recipe = Recipe.of(model, [read_edit(model, "filter_weights into=mixed3b:1-4")])
    made = bake(model, recipe)
    save_baked(made, tmp_path / "w.safetensors", model, recipe)
    assert load_model("shapes", tmp_path / "w.safetensors").hash == made.hash


def test_reordering_is_checked(branches: HookedModel) -> None:
    texts = [
        "scale cat:1 factor=2",
        "scale cat:2 factor=3",
        "clamp cat:1 low=0",
        "scale_weights into=cat:4 layer=right factor=2",
        "scale_weights into=cat:5 layer=right factor=2",
        "low_rank",
    ]
    edits = [read_edit(branches, t) for t in texts[:-1]]
    edits.append(LowRank("right", torch.ones(2, 1), torch.ones(6, 1)))
    recipe = Recipe.of(branches, edits)
    assert recipe.reordered(branches, [3, 1, 0, 4, 2, 5]).edits[0] == edits[3]
    with pytest.raises(ValueError, match="do not commute"):
        recipe.reordered(branches, [2, 0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match="do not commute"):
        recipe.reordered(branches, [0, 1, 2, 5, 3, 4])
    with pytest.raises(ValueError, match="not a permutation"):
        recipe.reordered(branches, [0, 0])
    assert not commute(branches, edits[0], edits[2])


@pytest.mark.nightly
def test_what_commutes_gives_the_same_bits_either_way(any_model: HookedModel) -> None:
    model, draw = any_model, RandomEdits(any_model, 11)
    x, checked = model.input.example(2), 0
    for _ in range(120):
        a, b = draw.edit(), draw.edit()
        if not commute(model, a, b):
            continue
        outputs = []
        for order in ([a, b], [b, a]):
            with edited(model, order):
                outputs.append((model.hash, model.logits(x)))
        assert outputs[0][0] == outputs[1][0], (str(a), str(b))
        assert torch.equal(outputs[0][1].nan_to_num(), outputs[1][1].nan_to_num()), (str(a), str(b))
        checked += 1
    assert checked > 40


def test_recipes_add_up_and_differ(own_net: HookedModel) -> None:
    a, b, c = (Recipe.of(own_net, [zero(f"relu:{i}")], f"note {i}") for i in range(3))
    both = a + b
    assert both.edits == a.edits + b.edits
    assert both.note == "note 0; note 1"
    assert [(d.sign, d.edit) for d in diff(both, a + c)] == [
        (" ", zero("relu:0")), ("-", zero("relu:1")), ("+", zero("relu:2")),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="for different models"):
        a + Recipe((), "b" * 64)


def test_recipes_fit_their_weights_only(own_net: HookedModel, branches: HookedModel) -> None:
    recipe = Recipe.of(own_net, [zero("relu:1")])
    with pytest.raises(ValueError, match="recipe is for model"), edited(branches, recipe):
        pass
    with pytest.raises(KeyError, match="edit 1: unknown site"):
        recipe.forced(branches)
    other = HookedModel(seeded(own_net.module.__class__(), 9), (5, 40, 56))
    with edited(other, recipe.forced(other)):
        pass


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (zero("relu:8"), ValueError, "edit 2: unit relu:8 does not exist: relu has units 0 to 7"),
        (zero("relo:1"), KeyError, "did you mean relu"),
        (
            Scale(Units("relu", (1,)), at=(1,), factor=0.0),
            ValueError,
            "expected one index for each of its axes",
        ),
        (Steer("relu", torch.ones(7)), ValueError, "expected 8"),
        (Set(Units("relu", (1, 2)), values=torch.ones(3)), ValueError, "do not fit"),
        (
            Patch(Units("relu", (1,)), values=torch.ones(1, 1)),
            ValueError,
            "expected run x 1 units x 2",
        ),
        (ScaleWeights(Units("relu", (1,)), layer="block.con"), KeyError, "did you mean block.conv"),
        (ScaleWeights(Units("relu", (1,)), Units("fc", (1,))), ValueError, "no weights"),
        (RotateWeights(Units("fc", (1,))), ValueError, "expected kernels that can be rotated"),
        (
            LowRank("fc", torch.ones(3, 1), torch.ones(9, 1)),
            ValueError,
            "expected 3 x rank and 8 x rank",
        ),
        (
            SetWeights(Units("fc", (0,)), Units("fc", (0,)), values=torch.ones(2)),
            ValueError,
            "no weights",
        ),
        (
            Associate("fc", torch.ones(8), torch.ones(2), torch.ones(8)),
            ValueError,
            "value of shape",
        ),
    ],
)
def test_bad_edits_change_nothing(own_net: HookedModel, edit, error, message) -> None:
    x = own_net.input.example(1)
    before = own_net.logits(x)
    with pytest.raises(error, match=message), edited(own_net, [zero("relu:1"), edit]):
        pass
    assert torch.equal(own_net.logits(x), before)


def test_a_patch_that_does_not_fit_the_input_is_named(own_net: HookedModel) -> None:
    values = torch.ones(1, 1, 4, 4)
    x = own_net.input.example(1)
    before = own_net.logits(x)
    with (
        edited(own_net, [Patch(Units("relu", (1,)), values=values)]),
        pytest.raises(ValueError, match="do not fit an input on which the units have shape"),
    ):
        own_net.logits(x)
    assert torch.equal(own_net.logits(x), before)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"operator": "rotat_weights"}, KeyError, "did you mean rotate_weights"),
        ({"operator": "scale", "units": "a:1"}, ValueError, "lacks factor"),
        (
            {"operator": "scale", "units": "a:1", "factor": float("nan")},
            ValueError,
            "must be finite",
        ),
        ({"operator": "scale", "units": "a:1", "factor": "2"}, ValueError, "not a finite number"),
        (
            {"operator": "scale", "units": "a:1", "factor": 10**400},
            ValueError,
            "not a finite number",
        ),
        ({"operator": "scale", "units": "a:1", "factor": True}, ValueError, "not a finite number"),
        (
            {"operator": "scale", "units": "a:1", "factor": 1, "fctor": 2},
            KeyError,
            "did you mean factor",
        ),
        (5, ValueError, "expected an object"),
        ({"operator": "scale", "units": "a", "factor": 1}, ValueError, "SITE:1,2,5-9"),
        ({"operator": "scale", "units": "a:1,1", "factor": 1}, ValueError, "listed twice"),
        ({"operator": "scale", "units": "a:1", "factor": 1, "at": 3}, ValueError, "whole numbers"),
        (
            {"operator": "set", "units": "a:1", "values": [1, float("nan")]},
            ValueError,
            "must be finite",
        ),
        ({"operator": "set", "units": "a:1", "values": []}, ValueError, "holds no numbers"),
        ({"operator": "set", "units": "a:1", "values": [[1], [1, 2]]}, ValueError, "values"),
        (
            {
                "operator": "set",
                "units": "a:1",
                "values": {"dtype": "float32", "shape": [3], "base64": "AAAA"},
            },
            ValueError,
            "do not fill shape",
        ),
        (
            {"operator": "clamp", "units": "a:1", "low": 2, "high": 1},
            ValueError,
            "is above high",
        ),
        ({"operator": "clamp", "units": "a:1"}, ValueError, "needs low, high or both"),
        (
            {"operator": "filter_weights", "into": "a:1", "keep": "both"},
            ValueError,
            "not one of positive",
        ),
        ({"operator": "scale_weights"}, ValueError, "needs into, source or both"),
        (
            {"operator": "erase", "site": "a", "basis": [[1.0], [1.0]]},
            ValueError,
            "gives no projection",
        ),
    ],
)
def test_bad_records_are_named(raw, error, message) -> None:
    with pytest.raises(error, match=message):
        parse_edit(raw)


def test_bad_recipe_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("{", "[]", "{}", '"x"', '{"schema": 1, "edits": "abc"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"not a recipe|is not JSON"):
            Recipe.load(path)
    path.write_text(json.dumps({"schema": 99, "edits": []}))
    with pytest.raises(
        ValueError, match="layout 99: a newer version of circuits wrote it: expected 1 or 2"
    ):
        Recipe.load(path)
    path.write_text(json.dumps({"schema": 2, "edits": [{"operator": "scale"}]}))
    with pytest.raises(ValueError, match=r"edit 1 of recipe .* lacks units, factor"):
        Recipe.load(path)
    path.write_text(json.dumps({"schema": 2, "edits": [], "modelhash": "x"}))
    with pytest.raises(KeyError, match="did you mean model_hash"):
        Recipe.load(path)
    path.write_text(json.dumps({"schema": 2, "edits": [], "seed": "x"}))
    with pytest.raises(ValueError, match="seed 'x'"):
        Recipe.load(path)


def test_recipes_of_layout_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(
        '{"schema": 1, "model_hash": "", "note": "", "edits": [{"operator": "scale", "target": "a:1", "factor": 2.0}]}'
    )
    assert Recipe.load(path).edits == (scale("a:1", 2),)


@pytest.mark.nightly
def test_large_recipes_work_up_to_their_limit(own_net: HookedModel, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    some = tuple(scale(f"relu:{i % 8}", 1.0 if i % 3 else -1.0) for i in range(9_998))
    Recipe(some, own_net.hash).save(path)
    edits = (Recipe.load(path).edits * 11)[:MOST_EDITS]
    recipe = Recipe(edits, own_net.hash)
    assert len(recipe.edits) == MOST_EDITS == 100_000
    x = own_net.input.example(1)
    with edited(own_net, recipe):
        changed = own_net.run(x, read=["relu"])["relu"]
    plain = own_net.run(x, read=["relu"])["relu"]
    signs = [1] * 8
    for i in (k % 9_998 for k in range(MOST_EDITS)):
        signs[i % 8] *= 1 if i % 3 else -1
    assert set(signs) == {1, -1}
    for unit, sign in enumerate(signs):
        torch.testing.assert_close(changed[:, unit], plain[:, unit] * sign)
    with pytest.raises(ValueError, match="at most 100000"):
        Recipe((*edits, zero("relu:1")))


def test_the_published_schema_says_what_is_read(bridge: HookedModel) -> None:
    published = json.loads(
        (Path(__file__).parents[1] / "docs" / "schemas" / "recipe.json").read_text()
    )
    assert published == recipe_schema(), (
        "write it again: circuits edit schema > docs/schemas/recipe.json"
    )
    draw, drawn_of_heads = RandomEdits(load_model("shapes"), 0), RandomEdits(bridge, 0)
    edits = [(drawn_of_heads if o == "knock_out" else draw).edit(o) for o in OPERATORS]
    recipe = Recipe(tuple(edits), "a" * 64, "note")
    jsonschema.validate(json.loads(json.dumps(recipe.to_dict())), published)
    for wrong in (
        {"schema": 2, "edits": [{"operator": "scale", "units": "a:1"}]},
        {"schema": 2, "edits": [{"operator": "scale", "units": "a 1", "factor": 1}]},
        {"schema": 3, "edits": []},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, published)


def test_edits_are_read_from_words(own_net: HookedModel, tmp_path: Path) -> None:
    values = tmp_path / "v.json"
    values.write_text("[0.5, 1.5]")
    assert read_edit(own_net, f"set relu:1,2 values=@{values}") == Set(
        Units("relu", (1, 2)), values=torch.tensor([0.5, 1.5])
    )
    assert read_edit(own_net, "zero relu:1-3 at=0,-1") == Scale(
        Units("relu", (1, 2, 3)), at=(0, -1), factor=0.0
    )
    steered = read_edit(own_net, "steer direction=relu:1-0.5*relu:2 amount=2")
    assert isinstance(steered, Steer)
    assert steered.vector.tolist() == [0, 1, -0.5, 0, 0, 0, 0, 0]
    for text, error, message in (
        ("", ValueError, "is empty"),
        ("skale relu:1", KeyError, "did you mean scale"),
        ("scale relu:1 factr=1", KeyError, "did you mean factor"),
        ("scale relu:1 factor=x", ValueError, "not a finite number"),
        ("scale relu:1 2", ValueError, "NAME=VALUE"),
        (
            "steer stem direction=relu:1",
            ValueError,
            "direction is in relu, site is stem: expected one site",
        ),
        ("steer direction=relu:1 site=stem", ValueError, "gives site twice"),
        ("steer relu direction=relu:1 vector=1", ValueError, "gives vector twice"),
        ("steer relu vector=1 direction=relu:1", ValueError, "gives vector or direction twice"),
        ("set relu:1 values=@/nowhere.json", FileNotFoundError, "nowhere"),
        ("scale relu:9 factor=1", ValueError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            read_edit(own_net, text)


def test_words_that_name_files_can_be_refused(tmp_path: Path) -> None:
    """The app reads no file that a browser names."""
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[1.5]")
    model = load_model("shapes")
    words = f"set mixed3b:0 values=@{numbers}"
    assert read_edit(model, words).to_dict()["values"] == [1.5]
    with pytest.raises(ValueError, match="names a file: expected numbers"):
        read_edit(model, words, files=False)
    with pytest.raises(ValueError, match="names a file: expected numbers"):
        read_edit(model, "set mixed3b:0 values=@/etc/passwd", files=False)
