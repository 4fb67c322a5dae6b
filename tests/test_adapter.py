from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.featurevis.render import visualize
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.adapter.tokenizing import by_merges
from circuits.units import Unit
from circuits.weights import incoming
from tests.conftest import OwnNet, seeded


def test_sites_of_an_own_module(own_net: HookedModel) -> None:
    found = {s.name: (s.kind, s.n_units, s.shape) for s in own_net.sites}
    assert found["stem"] == ("channel", 8, (8, 18, 26))
    assert found["block.conv@1"] == ("channel", 8, (8, 18, 26))
    assert found["fc"] == ("logit", 3, (3,))
    assert [s.name for s in own_net.sites][:3] == ["stem", "relu", "block.conv@0"]


def test_sites_of_a_bridge_have_the_names_people_know(bridge: HookedModel) -> None:
    z = bridge.site("blocks.1.attn.hook_z")
    assert (z.kind, z.n_units, z.axes) == ("head", 4, ("batch", "position", "head", "d_head"))
    assert bridge.site("blocks.1.attn.o.hook_in") is z
    assert bridge.site("blocks.0.mlp.hook_post").kind == "neuron"
    assert bridge.site("hook_unembed").kind == "logit"
    assert bridge.site("blocks.0.hook_resid_pre").kind == "residual"
    pattern = bridge.site("blocks.0.attn.hook_pattern")
    assert (pattern.kind, pattern.unit_axis, pattern.n_units) == ("pattern", 1, 4)


def test_aliases_are_the_same_site(own_net: HookedModel) -> None:
    model = HookedModel(own_net.module, own_net.input, aliases={"first": "stem"})
    x = model.input.example(1)
    cache = model.run(x, read=["first"])
    assert list(cache) == ["stem"]
    assert cache["first"] is cache["stem"]
    assert model.unit("first:3") == Unit("stem", 3)


def test_bridge_values_agree_with_transformer_lens(bridge: HookedModel) -> None:
    tokens = bridge.input.example(3)
    with torch.no_grad():
        logits, theirs = bridge.module.run_with_cache(tokens)
    names = [s.name for s in bridge.sites if s.name in theirs]
    ours = bridge.run(tokens, read=names)
    assert len(names) > 30
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
    torch.testing.assert_close(ours.output, logits)


def test_head_ablation_equals_removing_its_output_weights(bridge: HookedModel) -> None:
    tokens = bridge.input.example(2)
    site = bridge.site("blocks.1.attn.hook_z")

    def without(z: Tensor) -> Tensor:
        return torch.cat([z[:, :, :2], torch.zeros_like(z[:, :, 2:3]), z[:, :, 3:]], dim=2)

    ablated = bridge.logits(tokens, {site.name: without})
    weight = dict(bridge.module.named_parameters())[
        "layers.1._original_component.attn._original_component.o._original_component.weight"
    ]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 8:12] = 0  # head 2 of 4, four dimensions each
        expected = bridge.logits(tokens)
        weight.copy_(kept)
    torch.testing.assert_close(ablated, expected)


def test_scores_without_effect_are_not_offered(bridge: HookedModel) -> None:
    """Every site offered must matter when it is changed, or an edit of it would tell a lie."""
    tokens = bridge.input.example(2)
    before = bridge.logits(tokens)
    for site in bridge.sites:
        noise = torch.Generator().manual_seed(1)
        after = bridge.logits(
            tokens, {site.name: lambda t, g=noise: t * 0.5 + torch.rand(t.shape, generator=g)}
        )
        assert not torch.equal(before, after), site.name


def test_hash_follows_the_weights_and_nothing_else(own_net: HookedModel) -> None:
    before = own_net.hash
    own_net.run(own_net.input.example(1))
    assert own_net.hash == before
    assert HookedModel(seeded(OwnNet()), (5, 40, 56)).hash == before
    with torch.no_grad():
        own_net.module.fc.bias[0] += 1e-6
    assert own_net.hash != before


def test_runs_in_evaluation_mode_and_leaves_the_mode_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    module[1].eval()
    model = HookedModel(module, (3, 6, 6))
    x = model.input.example(2)
    assert torch.equal(model.logits(x), model.logits(x))
    assert [m.training for m in module] == [True, False, True]
    assert all(p.requires_grad for p in module.parameters())
    assert module[1].num_batches_tracked.item() == 0


def test_gradient_reaches_the_input_and_not_the_weights(own_net: HookedModel) -> None:
    x = own_net.input.example(1).requires_grad_(True)
    own_net.run(x, read=["relu"], until="relu", grad=True)["relu"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in own_net.module.parameters())


def test_threads_do_not_see_each_others_edits(own_net: HookedModel) -> None:
    x = own_net.input.example(1)
    intact = own_net.logits(x)
    wrong: list[int] = []
    stop = threading.Event()

    def edits() -> None:
        while not stop.is_set():
            with own_net.intervening({"relu": torch.zeros_like}):
                own_net.module(x)

    editor = threading.Thread(target=edits)
    editor.start()
    for i in range(100):
        if not torch.equal(own_net.logits(x), intact):
            wrong.append(i)
    stop.set()
    editor.join()
    assert not wrong


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.site("stemm"), KeyError, "did you mean stem"),
        (lambda m: m.unit("stem:8"), ValueError, "units 0 to 7"),
        (lambda m: m.run(torch.rand(1, 3, 40, 56)), ValueError, "5 channels"),
        (lambda m: m.run(torch.rand(5, 40, 56)), ValueError, "batch x 5 channels"),
        (lambda m: m.run(m.input.example(), read=["nope"]), KeyError, "unknown site"),
        (lambda m: m.run(m.input.example(), edits={"nope": torch.relu}), KeyError, "unknown site"),
    ],
)
def test_bad_calls_say_what_would_be_right(own_net, call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(own_net)


def test_bad_tokens_are_refused(bridge: HookedModel) -> None:
    with pytest.raises(ValueError, match="token 20 is not in the vocabulary"):
        bridge.run(torch.tensor([[1, 20]]))
    with pytest.raises(ValueError, match="expected 1 to 12"):
        bridge.run(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="not tokens"):
        bridge.run(torch.rand(1, 5))


def test_a_site_that_a_pass_skips_is_named() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(x) if len(x) > 1 else x * 2

    model = HookedModel(Sometimes(), (1, 4, 4))
    with pytest.raises(KeyError, match="'extra' was not reached"):
        model.run(torch.rand(1, 1, 4, 4), read=["extra"])


def test_a_reference_run_is_the_module_to_the_bit_and_a_fast_one_up_to_rounding(
    branches: HookedModel, own_net: HookedModel
) -> None:
    x = torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    read = {
        name: branches.run(x, read=["norm"], reference=name == "plain")["norm"]
        for name in ("plain", "fast")
    }
    with torch.no_grad():
        module = branches.module
        expected = module.norm(module.stem_relu(module.stem(x)))
        assert torch.equal(branches.logits(x, reference=True), module(x))
        assert torch.equal(read["plain"], expected)
        torch.testing.assert_close(branches.logits(x), module(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read["fast"], expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(read["fast"], expected), "compiled, in another order of sums"
    shown: list[Tensor] = []
    branches.observe(x, {"norm": lambda value: shown.append(value.clone())}, "norm")
    assert torch.equal(shown[0], read["fast"])
    other = torch.randn(2, *OwnNet.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(own_net.logits(other), own_net.module(other)), "nothing to make fast"


def test_second_derivatives_of_a_fast_run_are_right(branches: HookedModel) -> None:
    x = torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    def curvature(reference: bool) -> Tensor:
        value = branches.run(x, read=["norm"], until="norm", grad=True, reference=reference)["norm"]
        (slope,) = torch.autograd.grad(value.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    found, expected = curvature(reference=False), curvature(reference=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_image_input_normalizes_and_refuses() -> None:
    spec = ImageInput(3, 4, 4, mean=(10.0, 20.0, 30.0), std=(2.0,), scale=255.0, bgr=True)
    out = spec.normalize(torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 4, 4))
    assert out[0, :, 0, 0].tolist() == [(0 - 10) / 2, (127.5 - 20) / 2, (255 - 30) / 2]
    with pytest.raises(ValueError, match="the model takes 3"):
        spec.normalize(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="mean has 2 values"):
        ImageInput(3, 4, 4, mean=(0.0, 1.0))
    with pytest.raises(ValueError, match="must be positive"):
        ImageInput(0, 4, 4)


def test_token_input_encodes_and_refuses() -> None:
    words = TokenInput(3, 8, ("one", "two", "="))
    assert words.encode("two one =") == [1, 0, 2]
    with pytest.raises(ValueError, match="the word 'three'"):
        words.encode("one three")
    assert TokenInput(4, 8).encode(" 3  1\n2") == [3, 1, 2]
    with pytest.raises(ValueError, match="no vocabulary"):
        TokenInput(4, 8).encode("1 two")
    with pytest.raises(ValueError, match="expected n_vocab 4"):
        TokenInput(4, 8, ("a",))


def test_merges_take_the_best_pair_first() -> None:
    pieces = [" ", "a", "b", "ab", "ba", " ab", "<0xC3>", "<0xA9>"]
    encode = by_merges(pieces, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, 0.0, 0.0])
    assert encode("ab") == [5], "a space in front, then ab, then space + ab"
    assert encode("bab") == [0, 2, 3], "ab before ba"
    assert encode("é") == [0, 6, 7], "bytes of what is not in the vocabulary"


class Trunk(nn.Module):
    """LSTM states, a named tuple, keyword arguments, channels-last activations."""

    class Out(NamedTuple):
        features: Tensor
        logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.last, self.gelu = nn.Linear(6, 5), nn.GELU()
        self.lstm = nn.LSTM(5, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Trunk.Out:
        maps = self.relu(input=self.conv(input=x))
        rows = self.gelu(self.last(maps.permute(0, 2, 3, 1)))
        out, _ = self.lstm(rows.flatten(1, 2))
        return Trunk.Out(features=out, logits=self.head(out[:, -1]))


def test_odd_layouts_are_understood() -> None:
    model = HookedModel(seeded(Trunk()), (3, 6, 7))
    sites = {s.name: s for s in model.sites}
    assert sites["gelu"].axes == ("batch", "y", "x", "unit"), "laid out like what it was given"
    assert sites["gelu"].n_units == 5
    assert "lstm[1][0]" not in sites, "layers x batch x hidden is not a batch"
    assert sites["head"].kind == "logit", "the named field is the output"
    x = model.input.example(4)
    gelu = model.run(x, read=["gelu"])["gelu"]
    with edited(model, [zero("gelu:2")]):
        changed = model.run(x, read=["gelu"])["gelu"]
    gelu[..., 2] = 0
    assert torch.equal(changed, gelu)
    assert incoming(model, "relu:1")
    assert model.logits(x).shape == (4, 3)


def test_modules_and_outputs_of_one_name_as_sites_stay_apart() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[object, Tensor]:
            return {"a b": x + 1, "a_b": x + 2, 0: x + 3, "0": x + 4}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("in:1", Several())
            self.add_module("in_1", nn.Identity())
            self.add_module("in 1", nn.ReLU())
            self.add_module("in_1__", nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            many, same, relu, sigmoid = self.children()
            return sigmoid(relu(same(many(x)["a_b"])))

    model = HookedModel(Outer(), (1, 2, 2))
    x = torch.full((1, 1, 2, 2), -3.0)
    wanted = {"in_1_[a_b]": -2.0, "in_1_[a_b]_": -1.0, "in_1_[0]": 0.0, "in_1_[0]_": 1.0}
    wanted |= {"in_1": -1.0, "in_1___": 0.0, "in_1__": 0.5}
    assert {s.name for s in model.sites} == set(wanted)
    cache = model.run(x, read=list(wanted))
    for name, value in wanted.items():
        assert cache[name].eq(value).all(), name


def test_precision_follows_the_model() -> None:
    model = HookedModel(seeded(OwnNet().double()), OwnNet.input_shape)
    out = model.logits(torch.rand(2, 5, 40, 56))
    assert out.dtype == torch.float64
    assert visualize(model, "relu:1", steps=2).activation > 0


def test_the_callers_input_is_not_overwritten() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.sub_(0.5))

    model = HookedModel(seeded(Overwrites()), (1, 4, 4))
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(model.logits(x), model.logits(x))
    assert (x == 1).all()


def test_models_without_weights_differ_by_their_modules() -> None:
    assert HookedModel(nn.Sequential(nn.ReLU()), (1, 4, 4)).hash != (
        HookedModel(nn.Sequential(nn.Tanh()), (1, 4, 4)).hash
    )


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot run on an input of shape \(3, 4, 40, 56\)"):
        HookedModel(seeded(OwnNet()), (4, 40, 56))
    with pytest.raises(ValueError, match=r"is not of the form \(channels, height, width"):
        HookedModel(seeded(OwnNet()), (5, 40))
