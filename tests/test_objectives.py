from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuits.examples import Examples
from circuits.featurevis import comparisons, objectives
from circuits.featurevis.embeddings import dream
from circuits.featurevis.objectives import Objective
from circuits.featurevis.optimizing import respond
from circuits.featurevis.render import visualize
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.metrics import UnitActivation
from circuits.units import Direction, Unit
from tests.conftest import OwnNet, seeded


@pytest.fixture
def model() -> HookedModel:
    return HookedModel(seeded(OwnNet()).double(), OwnNet.input_shape)


def images(n: int = 3) -> Tensor:
    return torch.rand(n, *OwnNet.input_shape, generator=torch.Generator().manual_seed(n)).double()


def made(model: HookedModel) -> dict[str, Objective]:
    """One of each kind."""
    reference = images(1)[0].float()
    shape = model.site("block.conv@1").position_shape
    vectors = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    target = "block.conv@1"
    return {
        "channel": objectives.channel(model, f"{target}:2"),
        "neuron": objectives.neuron(model, f"{target}:2", (3, 4)),
        "logit": objectives.logit(model, 1),
        "direction": objectives.direction(model, f"{target}:1+0.5*{target}:3"),
        "cosine": objectives.direction(model, f"{target}:1-2*{target}:3", 2.0),
        "direction here": objectives.direction(model, f"{target}:1", 1.0, (2, 2)),
        "spatial": objectives.spatial_direction(model, target, vectors, 1.0),
        "deepdream": objectives.deepdream(model, target),
        "interpolation": objectives.interpolation(model, f"{target}:0", f"{target}:5"),
        "total variation": objectives.total_variation(),
        "l1": objectives.l1(),
        "l2": objectives.l2(0.3),
        "diversity": objectives.diversity(model, target),
        "alignment": objectives.alignment(model, target),
        "inversion": comparisons.inversion(model, target, reference),
        "difference": comparisons.difference(model, target, reference),
        "caricature": comparisons.caricature(model, target, reference, 2.0),
        "attributed": comparisons.attributed(model, "relu", reference, f"{target}:2"),
    }


KINDS = (
    "channel", "neuron", "logit", "direction", "cosine", "direction here", "spatial", "deepdream",
    "interpolation", "total variation", "l1", "l2", "diversity", "alignment", "inversion", "difference",
    "caricature", "attributed",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_objectives(model: HookedModel, kind: str) -> None:
    objective, x = made(model)[kind], images().requires_grad_(True)
    value = respond(model, x, objective, grad=True)
    assert value.shape == (3,)
    (grad,) = torch.autograd.grad(value.sum(), x)
    generator = torch.Generator().manual_seed(9)
    way = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        up = respond(model, x + 1e-6 * way, objective).sum()
        down = respond(model, x - 1e-6 * way, objective).sum()
    torch.testing.assert_close((up - down) / 2e-6, (grad * way).sum(), atol=1e-6, rtol=1e-4)


def test_values_by_definition(model: HookedModel) -> None:
    x, kinds = images(), made(model)
    site = "block.conv@1"
    a = model.run(model.input.normalize(x), read=[site])[site]

    def value(kind: str) -> Tensor:
        return respond(model, x, kinds[kind])

    torch.testing.assert_close(value("channel"), a[:, 2].mean((1, 2)))
    torch.testing.assert_close(value("neuron"), a[:, 2, 3, 4])
    torch.testing.assert_close(value("direction"), (a[:, 1] + 0.5 * a[:, 3]).mean((1, 2)))
    dot = a[:, 1] - 2 * a[:, 3]
    cosine = dot / (a.norm(dim=1) * 5**0.5)
    torch.testing.assert_close(value("cosine"), (dot * cosine.clamp_min(0.1) ** 2).mean((1, 2)))
    torch.testing.assert_close(value("deepdream"), a.square().mean((1, 2, 3)))
    share = torch.tensor([0.0, 0.5, 1.0]).double()
    ends = a[:, 0].mean((1, 2)), a[:, 5].mean((1, 2))
    torch.testing.assert_close(value("interpolation"), (1 - share) * ends[0] + share * ends[1])
    grams = [F.normalize((m.flatten(1) @ m.flatten(1).T).flatten(), dim=0) for m in a]
    alike = [sum(float(g @ h) for h in grams if h is not g) / 2 for g in grams]
    torch.testing.assert_close(value("diversity"), torch.tensor(alike).double())
    apart = [
        sum(0.5 ** abs(i - j) * float((p - q).square().mean()) for j, q in enumerate(a) if j != i)
        for i, p in enumerate(a)
    ]
    torch.testing.assert_close(value("alignment"), torch.tensor(apart).double())
    logits = model.logits(model.input.normalize(x))
    torch.testing.assert_close(value("logit"), logits[:, 1])


def test_an_image_is_like_itself(model: HookedModel) -> None:
    image = images(1).float()
    inversion = comparisons.inversion(model, "relu", image[0])
    caricature = comparisons.caricature(model, "relu", image[0])
    assert respond(model, image, inversion).item() == pytest.approx(0, abs=1e-5)
    assert respond(model, image, caricature).item() == pytest.approx(1, abs=1e-5)
    assert respond(model, torch.rand_like(image), inversion).item() < -0.01


def test_objectives_are_an_algebra(model: HookedModel) -> None:
    x = images()
    a, b = objectives.channel(model, "relu:1"), objectives.channel(model, "relu:2")
    va, vb = respond(model, x, a), respond(model, x, b)
    torch.testing.assert_close(respond(model, x, 2 * a - b / 4 + 1), 2 * va - vb / 4 + 1)
    torch.testing.assert_close(respond(model, x, -(a * b)), -(va * vb))
    torch.testing.assert_close(respond(model, x, 3 - a), 3 - va)
    torch.testing.assert_close(respond(model, x, sum([a, b])), va + vb)
    torch.testing.assert_close(respond(model, x, objectives.mean([a, b])), (va + vb) / 2)
    assert (a - 1e2 * b).text == "(relu:1 - (relu:2 * 100))"
    both = objectives.side_by_side([(a, 2), (b, 1)])
    torch.testing.assert_close(respond(model, x, both), torch.cat([va[:2], vb[2:]]))


def test_text_becomes_an_objective(model: HookedModel) -> None:
    for target, text in (
        ("relu:3", "relu:3"),
        (Unit("relu", 3), "relu:3"),
        ("relu:3+0.5*relu:1", "direction in relu"),
        (Direction.parse("relu:3", 8), "direction in relu"),
        ("relu", "deepdream relu"),
    ):
        assert objectives.as_objective(model, target).text == text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: objectives.channel(m, "relu:8"), ValueError, "units 0 to 7"),
        (lambda m: objectives.channel(m, "relo:1"), KeyError, "did you mean relu"),
        (lambda m: objectives.neuron(m, "relu:1", (3,)), ValueError, "expected \\(y, x\\)"),
        (lambda m: objectives.logit(m, 7), ValueError, "units 0 to 2"),
        (lambda m: objectives.logit(m, "cat"), KeyError, "unknown class"),
        (lambda m: objectives.direction(m, "relu:1+fc:2"), ValueError, "exactly one"),
        (lambda m: objectives.direction(m, "relu:1", -1.0), ValueError, "cosine_power -1"),
        (lambda m: objectives.direction(m, Direction("relu", torch.ones(3))), ValueError, "expected 8"),
        (lambda m: objectives.spatial_direction(m, "relu", torch.ones(3, 2, 2)), ValueError, "do not fit"),
        (lambda m: objectives.alignment(m, "relu", 1.0), ValueError, "reach 1.0"),
        (lambda m: objectives.mean([]), ValueError, "are empty"),
        (lambda m: comparisons.caricature(m, "relu", torch.rand(5, 40, 56), -1), ValueError, "-1"),
        (lambda m: comparisons.inversion(m, "relu", torch.rand(3, 9, 9)), ValueError, "3 channels"),
        (lambda m: comparisons.attributed(m, "fc", torch.rand(5, 40, 56), "relu:1"), ValueError, "no gradient"),
    ],
)  # fmt: skip
def test_bad_objectives_are_named(model: HookedModel, make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make(model)


def test_a_position_outside_the_map_is_named(model: HookedModel) -> None:
    objective = objectives.neuron(model, "relu:1", (99, 0))
    with pytest.raises(ValueError, match="outside the map of relu, 18 x 26"):
        respond(model, images(), objective)


def test_a_caricature_keeps_the_layout() -> None:
    """Where the image's activations are large the caricature's are, more than chance would have it."""
    model = load_model("shapes")
    photos = Examples(model, "photos", None)
    correlations, controls = [], []
    for i in (3, 40, 80, 120):
        image = photos.load(i)
        made = visualize(model, comparisons.caricature(model, "mixed3a", image), steps=48).image
        x = torch.stack([image, made, photos.load((i + 31) % 160)])
        maps = (
            model.run(model.input.normalize(x), read=["mixed3a"])["mixed3a"].norm(dim=1).flatten(1)
        )
        found = torch.corrcoef(maps)
        correlations.append(found[0, 1].item())
        controls.append(found[0, 2].item())
    assert min(correlations) > 0.4
    assert sum(correlations) / 4 > sum(controls) / 4 + 0.3


# --- tokens ------------------------------------------------------------------------------------------


def test_embeddings_that_excite_a_neuron(bridge: HookedModel) -> None:
    found = dream(bridge, "blocks.1.mlp.hook_post:3", positions=5, steps=40)
    assert found.activation > found.start
    assert len(found.tokens) == 5
    tokens = torch.tensor([found.tokens])
    cache = bridge.run(tokens, read=["blocks.1.mlp.hook_post", "hook_embed"])
    value = cache["blocks.1.mlp.hook_post"][0, :, 3].mean().item()
    assert found.of_tokens == pytest.approx(value, rel=1e-3, abs=1e-4)
    again = dream(bridge, "blocks.1.mlp.hook_post:3", positions=5, steps=40)
    assert torch.equal(again.embeddings, found.embeddings)


def test_bad_dreams_are_named(bridge: HookedModel, model: HookedModel) -> None:
    with pytest.raises(ValueError, match="positions 99 must be from 1 to 12"):
        dream(bridge, "blocks.1.mlp.hook_post:3", positions=99)
    with pytest.raises(ValueError, match="takes images"):
        dream(model, "relu:1")
    with pytest.raises(ValueError, match="takes tokens"):
        visualize(bridge, "blocks.1.mlp.hook_post:3")


@pytest.mark.parametrize("names", [["a+b", "c: d*e", "f g@2"], ["1", "token:x", "0"]])
def test_a_class_is_a_target_whatever_is_in_its_name(names: list[str]) -> None:
    """As the channel of its output: the names have the characters that separate directions, units and positions."""
    model = HookedModel(seeded(OwnNet()), OwnNet.input_shape, classes=names)
    for i, name in enumerate(names):
        for made in (
            objectives.as_objective(model, f"class:{name}"),
            objectives.logit(model, f"class:{name}"),
            objectives.logit(model, name),
        ):
            assert made.text == f"fc:{i}", name
        target = UnitActivation.named(model, f"class:{name}").target
        assert (target.site, target.index, target.at) == ("fc", i, None)
    cold = visualize(model, f"class:{names[1]}", steps=2, negative=True)
    picture = visualize(model, f"class:{names[1]}", steps=2)
    assert cold.unit == picture.unit == Unit("fc", 1)
    torch.testing.assert_close(picture.image, visualize(model, "fc:1", steps=2).image)
    with pytest.raises(KeyError, match=r"unknown class of .* 'no such'"):
        visualize(model, "class:no such", steps=2)
