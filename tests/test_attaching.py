"""Autoencoders attached to models: latents are units like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from circuits.attribution.passes import Passes
from circuits.autoencoders import About, Autoencoder, save_autoencoder
from circuits.edits.activations import Steer, scale, zero
from circuits.edits.recipes import edited
from circuits.experiments.ablation import ablate
from circuits.models.adapter.attaching import Attached
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.loading import load_model
from circuits.weights import incoming, outgoing


def code_of(
    model: HookedModel, site: str, n: int = 40, target: str | None = None, **more: object
) -> Autoencoder:
    g = torch.Generator().manual_seed(0)
    d, out = model.site(site).width, model.site(target or site).width
    options = {"activation": "topk", "k": 5} | more
    return Autoencoder(
        torch.randn(n, d, generator=g) / d**0.5, torch.randn(n, generator=g) * 0.1,
        torch.randn(n, out, generator=g) / out**0.5, torch.randn(out, generator=g) * 0.1, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def shapes() -> HookedModel:
    return load_model("shapes")


@pytest.fixture(scope="module")
def induction() -> HookedModel:
    return load_model("induction")


CASES = [
    ("shapes", "mixed3a"),
    ("induction", "blocks.0.hook_resid_post"),
    ("induction", "blocks.0.attn.hook_z"),
]


@pytest.mark.parametrize(("name", "site"), CASES)
def test_attaching_changes_nothing_and_changing_latents_changes_what_they_write(
    name: str, site: str
) -> None:
    model = load_model(name)
    code = code_of(model, site)
    own = model.attach(code, "x", site)
    x = model.input.example(3)
    assert torch.equal(own.logits(x), model.logits(x))
    cache, intact = own.run(x, read=[site, "sae/x", "sae/x.error"]), model.logits(x)
    assert torch.equal(
        own.run(x, read=["sae/x.error"], until="sae/x.error")["sae/x.error"], cache["sae/x.error"]
    )

    def rows(value: Tensor) -> Tensor:
        place = model.site(site)
        return value.flatten(-2) if "d_head" in place.axes else value.movedim(place.unit_axis, -1)

    latents = cache["sae/x"].movedim(own.site("sae/x").unit_axis, -1)
    torch.testing.assert_close(latents, code.encode(rows(cache[site])))
    torch.testing.assert_close(rows(cache["sae/x.error"]), rows(cache[site]) - code.decode(latents))

    # a latent twice as strong is its direction once more: the same as steering the site
    latent = int(latents.flatten(0, -2).sum(0).argmax())
    with edited(own, [scale(f"sae/x:{latent}", 2.0)]):
        twice = own.logits(x)

    def add(value: Tensor) -> Tensor:
        place = model.site(site)
        more = latents[..., latent, None] * code.W_dec[latent]
        return value + (
            more.reshape(value.shape)
            if "d_head" in place.axes
            else more.movedim(-1, place.unit_axis)
        )

    torch.testing.assert_close(twice, model.logits(x, edits={site: add}), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(twice, intact, atol=1e-4)
    assert torch.equal(own.logits(x), intact)


def test_what_is_edited_at_the_site_comes_before_the_latents(shapes: HookedModel) -> None:
    own = shapes.attach(code_of(shapes, "mixed3a"), "x", "mixed3a")
    x = shapes.input.example(2)
    order = [s.name for s in own.sites]
    base = own.site("mixed3a").name
    assert order.index(base) < order.index("sae/x") < order.index("sae/x.error") < len(order) - 1
    without = own.run(x, read=["sae/x"], edits={"mixed3a": torch.zeros_like})["sae/x"]
    zero_row = own.run(x, read=["sae/x"])["sae/x"]
    assert not torch.equal(without, zero_row)
    assert bool((without == without[:1, :, :1, :1]).all())  # the codes of a row of zeros everywhere
    with own.intervening({"sae/x": torch.zeros_like}):  # nested, and both are in force
        both = own.logits(x, edits={"sae/x.error": torch.zeros_like})
    code = code_of(shapes, "mixed3a")
    held = shapes.logits(x, edits={"mixed3a": lambda v: code.b_dec[:, None, None].expand_as(v)})
    torch.testing.assert_close(both, held, atol=1e-5, rtol=1e-4)


def test_two_autoencoders_on_one_model_and_copies_with_their_own(shapes: HookedModel) -> None:
    one = shapes.attach(code_of(shapes, "mixed3a"), "x", "mixed3a")
    two = one.attach(code_of(shapes, "conv2d1", n=30), "y", "conv2d1")
    x = shapes.input.example(2)
    cache = two.run(x, read=["sae/x", "sae/y"])
    assert cache["sae/y"].shape[1] == 30
    assert torch.equal(cache["sae/x"], one.run(x, read=["sae/x"])["sae/x"])
    assert len({shapes.hash, one.hash, two.hash}) == 3
    other = randomized(one, 1)
    assert not torch.equal(other.run(x, read=["sae/x"])["sae/x"], cache["sae/x"])
    assert not any(name.startswith("sae") for name in shapes.module.state_dict())


def test_a_transcoder_reads_one_site_and_writes_another(induction: HookedModel) -> None:
    source, target = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"
    code = code_of(induction, source, target=target, activation="relu", k=None)
    own = induction.attach(code, "t", source, target)
    x = induction.input.example(2)
    assert torch.equal(own.logits(x), induction.logits(x))
    before = induction.run(x, read=[source])[source]
    written = own.logits(x, edits={"sae/t.error": torch.zeros_like})
    torch.testing.assert_close(
        written, induction.logits(x, edits={target: lambda v: code(before)}), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ValueError, match=r"is computed before site .*: expected a later site"):
        induction.attach(code, "t", target, source)


def test_what_cannot_be_attached_is_refused(shapes: HookedModel) -> None:
    code = code_of(shapes, "mixed3a")
    own = shapes.attach(code, "x", "mixed3a")
    for model, name, site, message in (
        (own, "x", "mixed3a", "has an autoencoder of that name"),
        (shapes, "a b", "mixed3a", "name 'a b' of an autoencoder is not valid"),
        (shapes, "x", "conv2d1", "has d_in 160: site"),
    ):
        with pytest.raises(ValueError, match=message):
            model.attach(code, name, site)
    with pytest.raises(KeyError, match="unknown site"):
        shapes.attach(code, "x", "nowhere")
    with edited(shapes, [zero("mixed3a:0")]), pytest.raises(ValueError, match="outside the edit"):
        shapes.attach(code, "x", "mixed3a")


def test_any_module_with_encode_and_decode_will_do(shapes: HookedModel) -> None:
    class Halves(nn.Module):
        def encode(self, x: Tensor) -> Tensor:
            return torch.cat([x.relu(), (-x).relu()], -1)

        def decode(self, codes: Tensor) -> Tensor:
            a, b = codes.chunk(2, -1)
            return a - b

    own = shapes.attach(Halves(), "halves", "mixed3a")
    x = shapes.input.example(2)
    cache = own.run(x, read=["mixed3a", "sae/halves", "sae/halves.error"])
    assert cache["sae/halves"].shape[1] == 2 * cache["mixed3a"].shape[1]
    assert float(cache["sae/halves.error"].abs().max()) == 0
    with pytest.raises(ValueError, match="is found that writes sae/halves:0"):
        incoming(own, "sae/halves:0")


def test_weights_of_latents_are_those_of_the_encoder_and_of_what_reads_the_decoder(
    shapes: HookedModel,
) -> None:
    code = code_of(shapes, "conv2d1")
    own = shapes.attach(code, "x", "conv2d1")
    into = incoming(own, "sae/x:3", top=100)
    site = own.site("conv2d1")
    assert {c.source.site for c in into} == {site.name}
    for c in into:
        assert float(c.kernel) == pytest.approx(float(code.W_enc[3, c.source.index]), rel=1e-5)
    # what one more unit of the latent does to units that read the site, at one place, before their nonlinearity
    out = outgoing(own, "sae/x:3", top=5)
    plain = {c.target.site: c for c in outgoing(shapes, f"{site.name}:0", top=500)}
    assert out
    assert {c.target.site for c in out} <= set(plain)
    for c in out:
        kernels = [
            next(
                (
                    k.kernel
                    for k in outgoing(shapes, f"{site.name}:{u}", top=500)
                    if k.target == c.target
                ),
                None,
            )
            for u in range(site.n_units)
        ]
        parts = [float(code.W_dec[3, u]) * k for u, k in enumerate(kernels) if k is not None]
        torch.testing.assert_close(c.kernel, torch.stack(parts).sum(0), atol=1e-5, rtol=1e-4)


def test_latents_of_the_residual_stream_write_to_logits(induction: HookedModel) -> None:
    code = code_of(induction, "blocks.1.hook_resid_post")
    own = induction.attach(code, "x", "blocks.1.hook_resid_post")
    found = outgoing(own, "sae/x:7", top=3)
    wanted = (code.W_dec[7] @ induction.module.W_U).abs().topk(3)  # type: ignore[operator]
    assert [c.target.index for c in found] == wanted.indices.tolist()
    assert {c.target.site for c in found} == {"hook_unembed"}
    torch.testing.assert_close(
        torch.tensor([c.norm for c in found]), wanted.values, rtol=1e-4, atol=1e-5
    )


def test_latents_are_ablated_steered_and_pictured_like_units(shapes: HookedModel) -> None:
    own = shapes.attach(code_of(shapes, "mixed3a"), "x", "mixed3a")
    x = shapes.input.example(6)
    report = ablate(own, ["sae/x:1", "sae/x:2"], x, n_random=3)
    intact = own.run(x, read=["sae/x"])["sae/x"]
    gone = own.logits(
        x, edits={"sae/x": lambda v: v * torch.tensor([1, 0, 0] + [1] * 37)[:, None, None]}
    )
    changed = (gone.softmax(-1).log() - own.logits(x).softmax(-1).log()).abs().max()
    assert (report.effects["kl"].change > 0) == (float(changed) > 1e-6)
    vector = torch.zeros(40)
    vector[4] = 2.0
    with edited(own, [Steer("sae/x", vector)]):
        steered = own.logits(x)
    code = code_of(shapes, "mixed3a")
    direct = shapes.logits(x, edits={"mixed3a": lambda v: v + 2 * code.W_dec[4][:, None, None]})
    torch.testing.assert_close(steered, direct, atol=1e-4, rtol=1e-4)
    inputs = x.clone().requires_grad_(True)
    value = own.run(inputs, read=["sae/x"], until="sae/x", grad=True)["sae/x"]
    (gradient,) = torch.autograd.grad(
        value[:, int(own.site("sae/x").activations(intact).sum((0, 2)).argmax())].sum(),
        inputs,
    )
    assert float(gradient.abs().max()) > 0


def test_a_model_is_loaded_with_its_autoencoders(
    shapes: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path))
    code = code_of(shapes, "mixed3a")
    code.about = About("x", "mixed3a", "mixed3a", "shapes", shapes.hash)
    file = save_autoencoder(code, tmp_path / "saes" / "x")
    for spec in ("shapes+x", "shapes+sae/x", f"shapes+{file}", f"shapes+{file.parent}"):
        assert load_model(spec).site("sae/x").n_units == 40
    with pytest.raises(FileNotFoundError, match="there is no autoencoder 'y'"):
        load_model("shapes+y")
    code.about = About("x", "mixed3a", "mixed3a", "shapes", "0" * 64)
    save_autoencoder(code, tmp_path / "saes" / "z")
    with pytest.raises(ValueError, match="was trained on shapes with hash 0000000000000000"):
        load_model("shapes+z")
    code.about = About("x")
    save_autoencoder(code, tmp_path / "saes" / "w")
    with pytest.raises(ValueError, match="does not say which site it was trained on"):
        load_model("shapes+w")


def small(*layers: nn.Module, dtype: torch.dtype = torch.float32) -> HookedModel:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), *layers, nn.Flatten(), nn.LazyLinear(4))
    module(torch.rand(1, 3, 8, 8))
    return HookedModel(module.eval().to(dtype), ImageInput(3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_that_calls_its_children_in_order_takes_any_precision(dtype: torch.dtype) -> None:
    model = small(nn.ReLU(), dtype=dtype)
    own = model.attach(code_of(model, "1", k=3), "x", "1")
    x = torch.rand(2, 3, 8, 8).to(dtype)
    assert torch.equal(own.logits(x), model.logits(x))
    cache = own.run(x, read=["sae/x", "sae/x.error"], edits={"sae/x": lambda value: value * 1})
    assert cache["sae/x.error"].dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(cache.output.double(), model.logits(x).double(), atol=tolerance)


def test_a_way_beside_latents_reads_its_input_before_it_is_overwritten() -> None:
    model = small(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
    code = code_of(model, "0", target="2", k=3, W_skip=torch.randn(6, 6))
    own = model.attach(code, "x", "0", "2")
    x = torch.rand(2, 3, 8, 8)
    before = model.run(x, read=["0"])["0"].movedim(1, -1)
    cache = own.run(x, read=["2", "sae/x", "sae/x.error"])
    made = code.decode(code.encode(before), before).movedim(-1, 1)
    assert torch.allclose(cache["sae/x.error"], cache["2"] - made, atol=1e-5)


def test_a_pass_that_is_stopped_leaves_nothing_behind() -> None:
    model = small(nn.ReLU())
    own = model.attach(code_of(model, "1", k=3), "x", "1")
    own.run(torch.rand(1, 3, 8, 8), read=["sae/x"], until="sae/x")
    attached = next(m for m in own.module.modules() if isinstance(m, Attached))
    assert attached.held is None
    assert not Passes(own, torch.rand(2, 3, 8, 8), "3:0", own.site("sae/x"), size="keep").alone
