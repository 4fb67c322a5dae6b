"""Sites, axes, expanded weights and relevance of random modules, against what is known from how they are composed and
against finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits.attribution import relevance
from circuits.models.adapter.hooked_model import HookedModel
from circuits.weights import ExpandedWeights, expand_weights
from tests.conftest import examples
from tests.random_modules import Composed, composed_modules, is_rectified
from tests.test_expanded import Linearised

T = TypeVar("T")
FEW, MANY = examples(50), examples(400)
NOT_LINEAR = (
    "native_layer_norm", "native_group_norm", "native_batch_norm", "adaptive_max_pool2d", "glu",
    "mul of two maps", "mul with a tensor that depends on the input",
)  # fmt: skip
"""Operations that mode linear refuses: its definition replaces none of them."""


def wrapped(module: Composed) -> HookedModel:
    return HookedModel(module, module.size)


def images(model: HookedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *model.module.size, dtype=torch.float64, generator=generator)


def slopes(at: Callable[[float], Tensor], step: float) -> Tensor | None:
    """The central difference; None at a kink, where the slopes to both sides differ."""
    up, down = (at(step) - at(0.0)) / step, (at(0.0) - at(-step)) / step
    kink = (up - down).abs().max() > 1e-3 * up.abs().max() + 1e-6
    return None if kink else (up + down) / 2


def attempted(do: Callable[[], T]) -> tuple[T | None, str]:
    """What a call returns, or why it refuses."""
    try:
        return do(), ""
    except ValueError as error:
        return None, str(error)


def assert_near(ours: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(
        ours, oracle, rtol=1e-4, atol=1e-5 * float(oracle.abs().max()) + 1e-9
    )


# --- sites and axes ------------------------------------------------------------------------------


def check_axes(module: Composed) -> None:
    model = wrapped(module)
    assert model.unplaced == {}
    found = {site.name: site.unit_axis for site in model.sites}
    assert found == module.axes | {name: axis for name, axis in found.items() if ".gate." in name}
    x = images(model)
    names = [s.name for s in model.sites]
    for name, layer in module.named_modules():
        if name in names and isinstance(getattr(layer, "bias", None), Tensor):
            before = model.run(x, read=[name])[name]
            with torch.no_grad():
                layer.bias[1] += 1
            moved = (model.run(x, read=[name])[name] - before).abs().movedim(found[name], 0)
            changed = moved.flatten(1).amax(1) > 1e-6
            assert changed.nonzero().flatten().tolist() == [1], f"{name}: units are elsewhere"


@settings(max_examples=FEW)
@given(composed_modules())
def test_sites_and_their_axes(module: Composed) -> None:
    check_axes(module)


@pytest.mark.nightly
@settings(max_examples=MANY)
@given(composed_modules(6))
def test_sites_and_their_axes_of_many(module: Composed) -> None:
    check_axes(module)


# --- expanded weights ----------------------------------------------------------------------------


def check_weights(module: Composed, data: st.DataObject) -> None:
    """A push in a random direction shows all weights at once, also those that would be outside of the window."""
    model = wrapped(module)
    names = [site.name for site in model.sites]
    source = data.draw(st.sampled_from(["input", *names[:-1]]))
    later = names if source == "input" else names[names.index(source) + 1 :]
    target = data.draw(st.sampled_from(later))
    mode = data.draw(st.sampled_from(["example", "linear"]))
    x = images(model)
    given = x if source == "input" else model.run(x, read=[source])[source]
    push = torch.randn(given.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))

    def at(step: float, place: tuple[int, ...]) -> Tensor:
        site, by = model.site(target), step * push
        edits = {} if source == "input" else {source: lambda value: value + by}
        start = x + by if source == "input" else x
        # as torch composes it: `Linearised` must see the normalisation
        value = model.run(start, read=[target], edits=edits, until=target, reference=True)[target]
        return value.movedim(site.unit_axis, 1)[(slice(None), slice(None), *place)]

    ours, why = attempted(
        lambda: expand_weights(
            model, source, target, mode=mode, examples=x if mode == "example" else None
        )
    )
    if ours is None and "not connected" in why:
        middle = tuple(n // 2 for n in model.site(target).position_shape)
        torch.testing.assert_close(at(1.0, middle), at(0.0, middle))
        return
    if ours is None:
        assert mode == "linear", why
        assert any(f"operation {name}" in why for name in NOT_LINEAR), why
        return
    if mode == "linear":
        with Linearised():
            oracle = slopes(lambda step: at(step, ours.at), 1.0)
        assert oracle is not None
    else:
        oracle = slopes(lambda step: at(step, ours.at), 1e-6)
    if oracle is not None:
        axis = 1 if source == "input" else model.site(source).unit_axis
        assert_near(pushed(ours, push.movedim(axis, 1)), oracle)


def pushed(weights: ExpandedWeights, push: Tensor) -> Tensor:
    """What the weights say that a push (example x source x positions) does: example x target."""
    kernel = weights.weight.double()
    size = kernel.shape[kernel.ndim - len(weights.start) :]
    box = tuple(slice(a, a + n) for a, n in zip(weights.start, size, strict=True))
    inside = push[(slice(None), slice(None), *box)].flatten(1)
    kernel = kernel.flatten(kernel.ndim - 1 - len(weights.start))
    return torch.einsum("bts,bs->bt" if weights.mode == "example" else "ts,bs->bt", kernel, inside)


@settings(max_examples=2 * FEW)
@given(composed_modules(), st.data())
def test_weights_are_what_a_push_does(module: Composed, data: st.DataObject) -> None:
    check_weights(module, data)


@pytest.mark.nightly
@settings(max_examples=2 * MANY)
@given(composed_modules(6), st.data())
def test_weights_of_many(module: Composed, data: st.DataObject) -> None:
    check_weights(module, data)


# --- relevance -----------------------------------------------------------------------------------


def check_relevance(module: Composed, data: st.DataObject) -> None:
    """Relevance adds up to the target; by the rule `gradient` it is activation x slope, and so it is by the rule
    `epsilon` in a network of linear layers, rectifiers and maxima (Ancona et al. 2018, proposition 1)."""
    model = wrapped(module)
    site = data.draw(st.sampled_from(["input", *(s.name for s in model.sites if s.name != "head")]))
    rule = data.draw(st.sampled_from(["gradient", "epsilon", "gamma", "z_plus"]))
    x = images(model)
    made, why = attempted(lambda: relevance(model, x, "class:1", site, rule=rule))
    if made is None:
        # An activation function in place after another one: torch cannot differentiate it, the other rules can.
        assert rule == "gradient", why
        assert "overwrites the result of" in why, why
        return
    torch.testing.assert_close(made.target_values, model.logits(x)[:, 1])
    if rule != "gradient":
        assert made.residual is not None
        assert made.residual.abs().max() < 1e-6 * made.target_values.abs().max() + 1e-6
        if rule == "epsilon" and is_rectified(module):
            plain = relevance(model, x, "class:1", site, rule="gradient")
            assert_near(made.values, plain.values)
            for name, part in plain.parts.items():
                assert_near(made.parts[name], part)
        return
    weight = torch.randn(
        made.values.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)
    )

    def at(step: float) -> Tensor:
        factor = 1 + step * weight
        edits = {} if site == "input" else {site: lambda value: value * factor}
        start = x * factor if site == "input" else x
        return model.run(start, read=["head"], edits=edits)["head"][:, 1]

    oracle = slopes(at, 1e-6)
    if oracle is not None:
        assert_near((made.values * weight).flatten(1).sum(1), oracle)


@settings(max_examples=2 * FEW)
@given(composed_modules(), st.data())
def test_relevance_adds_up(module: Composed, data: st.DataObject) -> None:
    check_relevance(module, data)


@pytest.mark.nightly
@settings(max_examples=2 * MANY)
@given(composed_modules(6), st.data())
def test_relevance_of_many(module: Composed, data: st.DataObject) -> None:
    check_relevance(module, data)
