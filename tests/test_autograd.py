"""What needs gradients gives the same inside `torch.no_grad()` and `torch.inference_mode()` as outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from circuits.attribution import Passes, attribute, channel_groups, relevance
from circuits.concepts import dissect
from circuits.edits import associate, bake, edited, read_edit, scale
from circuits.edits.associative import second_moment
from circuits.effects import fine_tune
from circuits.featurevis import dream, natural_responses, reliability, visualize_units
from circuits.featurevis.comparisons import attributed, caricature
from circuits.featurevis.optimizing import optimize
from circuits.featurevis.parameterizations import MAKERS, squashed
from circuits.featurevis.render import Settings
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge
from circuits.sae import ArrayRows, Hyperparameters, Schedule, train
from circuits.saliency import (
    METHODS,
    card,
    extremal,
    extremal_channels,
    label_test,
    meaningful,
    randomization_test,
    saliency_map,
)
from circuits.units import Unit
from circuits.weights import (
    build_graph,
    expand_weights,
    gate_on,
    incoming,
    outgoing,
    raw_weights,
)
from tests.conftest import Branches, seeded

FEW = Settings(steps=2, size=8)


@cache
def net() -> HookedModel:
    return HookedModel(seeded(Branches()), (3, 8, 10))


@cache
def bridge() -> HookedModel:
    made = native_bridge(
        d_model=8, d_head=4, n_heads=2, n_layers=2, n_ctx=8, d_vocab=20, d_mlp=12, act_fn="gelu"
    )
    return HookedModel(seeded(made), TokenInput(20, 8), "tiny-bridge")


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 8, 10, generator=torch.Generator().manual_seed(0))


def prompts() -> Tensor:
    return torch.arange(12).reshape(2, 6)


def slopes(model: HookedModel, x: Tensor) -> Any:
    return saliency_map(model, x, "class:0", "gradient")


def mapped(method: Any) -> Any:
    few: dict[str, Any] = (
        {"samples": 4} if "smooth" in method or method in ("vargrad", "rise", "lime") else {}
    )
    return saliency_map(net(), images(), "class:0", method, **few)


def optimized(name: str) -> Any:
    # The parameters and the objective are made in the caller's mode as well.
    made = squashed(MAKERS[name]((2, 3, 8, 10), 0, [0, 1], "cpu"), None)
    objective = caricature(net(), "left", images()[0]) + attributed(
        net(), "left", images()[0], "inner:0"
    )
    return optimize(net(), [(objective, 2)], made, steps=2, seed=0)


def judged() -> Any:
    natural = natural_responses(net(), "out_relu", images(12))
    pictures = visualize_units(net(), ["out_relu:1"], **FEW.options())
    return pictures, reliability(net(), pictures, natural, FEW)


def associated() -> Any:
    layer = "blocks.1.mlp.out"
    return associate(
        bridge(), layer, prompts()[:1], 7, second_moment(bridge(), layer, [prompts()]), steps=2
    )


def dissected() -> Any:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 3, 4, 4, generator=generator)
    masks = torch.rand(6, 1, 8, 8, generator=generator) > 0.5
    return dissect("s", maps, masks, ["a"], quantile=0.2)


def autoencoder() -> Any:
    rows = torch.rand(64, 6, generator=torch.Generator().manual_seed(0)).numpy()
    return train(ArrayRows(rows), Hyperparameters("topk", 8, k=2), Schedule(3, batch=16))


def in_an_edit() -> Any:
    change = read_edit(net(), "scale_weights into=cat:1 from=pool:0,1,2 factor=0.5")
    with edited(net(), [change, scale(Unit("right", 0), 0.5)]):
        inside = attribute(net(), images(), "class:0", "stem", check=0)
    return inside, slopes(bake(net(), [change]), images())


VERBS: dict[str, Callable[[Path], Any]] = {
    **{f"saliency_map {m}": lambda _, m=m: mapped(m) for m in METHODS},
    **{f"optimize {n}": lambda _, n=n: optimized(n) for n in MAKERS},
    "attribute": lambda _: attribute(net(), images(), "class:0", "stem"),
    "integrated gradients": lambda _: attribute(
        net(), images(), "class:0", "stem", "integrated_gradients", steps=4, tolerance=None
    ),
    "tokens": lambda _: attribute(bridge(), prompts(), "top", "blocks.0.mlp.hook_post"),
    "relevance": lambda _: relevance(net(), images(), "class:0", "stem"),
    "channel_groups": lambda _: channel_groups(Passes(net(), images(), "class:0", "left_relu"), 2),
    "extremal": lambda _: extremal(net(), images(), "class:0", steps=2, tries=2, sigma=1.0),
    "meaningful": lambda _: meaningful(net(), images(), "class:0", steps=2, cells=4),
    "extremal_channels": lambda _: extremal_channels(net(), images(), "class:0", "left", 0.5, steps=2),
    "card": lambda _: card(net(), images(), "gradient", "class:0", stages=2, steps=2, faithful=1),
    "randomization_test": lambda _: randomization_test(net(), images(), slopes, stages=2),
    "label_test": lambda _: label_test(net(), images(), [0, 1], slopes, steps=2),
    "reliability": lambda _: judged(),
    "dream": lambda _: dream(bridge(), "blocks.1.mlp.hook_post:3", positions=3, steps=2),
    "connections": lambda _: (
        incoming(unseen(), "right:0"), outgoing(net(), "stem:0"), raw_weights(net(), "input", "stem"),
    ),
    "build_graph": lambda folder: build_graph(unseen(), folder).subgraph(["fc:0", "out_relu:1"]).adj,
    "gate_on": lambda _: gate_on(net(), "stem_relu:1", images()),
    "expand_weights": lambda _: [
        expand_weights(net(), "stem", "inner"),
        expand_weights(net(), "stem", "inner", mode="example", examples=images()),
    ],
    "dissect": lambda _: dissected(),
    "train": lambda _: autoencoder(),
    "fine_tune": lambda _: fine_tune(bridge(), prompts()[:1], 5, steps=2),
    "associate": lambda _: associated(),
    "edited": lambda _: in_an_edit(),
    "load_model": lambda _: slopes(load_model("shapes"), torch.full((1, 3, 64, 64), 0.5)),
}  # fmt: skip


def unseen() -> HookedModel:
    """The small network as if nobody had asked for its weights yet, which it remembers."""
    net()._layers = None
    return net()


def numbers(made: Any) -> Iterator[Any]:
    """All numbers in a result."""
    if isinstance(made, Tensor | np.ndarray):
        yield torch.as_tensor(made).detach().clone()
    elif isinstance(made, bool | int | float):
        yield torch.tensor(float(made))
    elif isinstance(made, nn.Module):
        yield from numbers(made.state_dict())
    elif isinstance(made, Mapping):
        yield from (n for value in made.values() for n in numbers(value))
    elif isinstance(made, Sequence) and not isinstance(made, str):
        yield from (n for value in made for n in numbers(value))
    elif is_dataclass(made):
        yield from numbers(vars(made))


@cache
def outside(verb: str, folder: Path) -> list[Tensor]:
    return list(numbers(VERBS[verb](folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graph")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("verb", VERBS)
def test_a_mode_without_gradients_changes_nothing(
    verb: str, mode: Callable[[], AbstractContextManager[Any]], folder: Path
) -> None:
    expected = outside(verb, folder)
    with mode():
        found = list(numbers(VERBS[verb](folder)))
        assert torch.is_grad_enabled() is False
        assert torch.is_inference_mode_enabled() is (mode is torch.inference_mode)
    assert expected
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_run_with_gradients_goes_back_to_its_input() -> None:
    x = images().requires_grad_(True)
    with torch.no_grad():
        cache = net().run(x, read=["fc"], grad=True)
        assert cache["fc"].requires_grad
    cache["fc"].sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).any()


def test_a_module_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = HookedModel(seeded(Branches()), (3, 8, 10), "mine")
    for verb in (lambda: slopes(model, images()), lambda: incoming(model, "fc:0")):
        with pytest.raises(
            ValueError, match=r"tensor stem.weight of model mine was made inside torch"
        ):
            verb()
    assert model.logits(images()).shape == (2, 3), "without gradients it runs"


class Tokens(nn.Module):
    """A norm whose output is read as tokens without the first: its gradient lies in another order than its input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), norm, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.head(self.norm(self.conv(x)).flatten(2).mT[:, 1:])).mean(1)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)])
def test_norms_have_the_gradient_of_finite_differences(norm: nn.Module) -> None:
    """Torch's derivative is wrong for one example (`SoundNormalisation`)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            tensor.add_(torch.rand(tensor.shape, generator=generator) if tensor.ndim else 0)
    model = HookedModel(Tokens(norm).eval().double(), (3, 8, 8))
    x, step = torch.randn(2, 1, 3, 8, 8, generator=generator).double()
    start = x.clone().requires_grad_()
    model.run(start, grad=True).output[:, 0].sum().backward()
    assert start.grad is not None
    up, down = (model.logits(x + sign * 1e-6 * step)[:, 0].sum() for sign in (1, -1))
    torch.testing.assert_close((start.grad * step).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-9)


class Recomputed(nn.Module):
    """A part whose activations torch is told to compute again during the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        again = self.reentrant
        x = self.part(x) if again is None else checkpoint(self.part, x, use_reentrant=again)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_parts_that_would_be_computed_again_are_kept(reentrant: bool) -> None:
    plain = HookedModel(seeded(Recomputed(None)), (3, 5, 6))
    model = HookedModel(seeded(Recomputed(reentrant)), (3, 5, 6))
    x = plain.input.example(2)
    verbs: list[Callable[[HookedModel], object]] = [
        lambda m: attribute(m, x, "class:1", "c", check=0).values,
        lambda m: relevance(m, x, "class:1", "input", rule="epsilon").values,
        lambda m: saliency_map(m, x, "class:1", "gradient").values,
        lambda m: expand_weights(m, "a", "head", mode="example", examples=x).weight,
        lambda m: [c.kernel for c in incoming(m, "c:1")],
    ]
    for verb in verbs:
        torch.testing.assert_close(verb(model), verb(plain))
    # Outside, torch's own function works as ever: the part runs again in the backward pass.
    calls: list[Tensor] = []
    model.module.c.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    model.module(x.requires_grad_(True)).sum().backward()
    assert len(calls) == 2
