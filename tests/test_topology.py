"""Connections of odd architectures against what an impulse really does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.edits.activations import zero
from circuits.edits.recipes import edited
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Unit
from circuits.weights import incoming, outgoing, raw_weights
from tests.conftest import seeded


class Odd(nn.Module):
    """Two feature maps `r` and `s` (4 channels), a join, and a convolution `h` that reads it."""

    def __init__(self, join: Callable[[Odd, Tensor, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.r, self.s = nn.ReLU(), nn.ReLU()
        self.bn, self.bn8 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.join = join
        self.h = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.join(self, self.r(self.a(x)), self.s(self.b(x))))


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


JOINS = {
    "constant channels in front": (lambda n, r, s: cat(torch.ones(len(r), 2, 9, 9), r), 6),
    "the same map twice": (lambda n, r, s: cat(r, r), 8),
    "halves of two maps": (lambda n, r, s: cat(r[:, :2], s[:, 1:3]), 4),
    "every second channel": (lambda n, r, s: r[:, ::2], 2),
    "difference": (lambda n, r, s: r - s, 4),
    "weighted sum": (lambda n, r, s: torch.add(r, s, alpha=0.25), 4),
    "batch norm before the layer": (lambda n, r, s: n.bn(r), 4),
    "a map and its batch norm": (lambda n, r, s: r + n.bn(r), 4),
    "two batch norms": (lambda n, r, s: n.bn8(cat(n.bn(r), s)), 8),
    "constant factor": (lambda n, r, s: 0.5 * (r * 2.5) / 2, 4),
    "padded channels": (lambda n, r, s: F.pad(r, (0, 0, 0, 0, 1, 2)), 7),
    "sum of two": (lambda n, r, s: r + s, 4),
}


@pytest.mark.parametrize("name", JOINS)
def test_an_impulse_does_what_the_connections_say(name: str) -> None:
    join, channels = JOINS[name]
    module = seeded(Odd(join, channels))
    with torch.no_grad():  # all active, so that an impulse of one passes every ReLU whole
        module.a.bias.fill_(9)
        module.b.bias.fill_(9)
    model = HookedModel(module, (3, 9, 9))
    x = model.input.example(1)
    base = model.run(x, read=["h"])["h"]
    seen = {c: k for t in range(3) for k, c in _kernels(incoming(model, Unit("h", t), 99), t)}
    for site in ("r", "s"):
        for index in range(4):

            def nudged(value: Tensor, index: int = index) -> Tensor:
                value = value.clone()
                value[0, index, 4, 4] += 1
                return value

            response = (model.run(x, read=["h"], edits={site: nudged})["h"] - base)[0]
            there = {c.target.index: c.kernel for c in outgoing(model, Unit(site, index), 99)}
            for target in range(3):
                kernel = response[target, 3:6, 3:6].flip(0, 1)  # a convolution mirrors
                expected = torch.zeros(3, 3)
                for found in (
                    there.get(target, expected),
                    seen.get((f"{site}:{index}", target), expected),
                ):
                    torch.testing.assert_close(found, kernel, rtol=1e-3, atol=2e-4)


def _kernels(connections, target: int):
    return [(c.kernel, (str(c.source), target)) for c in connections]


def test_both_arms_of_a_u_are_read() -> None:
    class U(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
            self.b, self.s = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()
            self.up = nn.Upsample(scale_factor=2)
            self.h = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            r = self.r(self.a(x))
            return self.h(torch.cat([self.up(self.s(self.b(r))), r], dim=1))

    model = HookedModel(seeded(U()), (3, 8, 8))
    sources = {str(c.source): c.kernel for c in incoming(model, "h:1", top=99)}
    assert set(sources) == {f"{site}:{i}" for site in "rs" for i in range(4)}
    weight = model.module.h.weight
    assert torch.equal(sources["s:2"], weight[1, 2])
    assert torch.equal(sources["r:2"], weight[1, 6])


def test_a_gate_is_not_taken_for_what_it_gates() -> None:
    gated = Odd(lambda n, r, s: s.mean((2, 3), keepdim=True).sigmoid() * r, 4)
    model = HookedModel(seeded(gated), (3, 9, 9))
    assert {c.source.site for c in incoming(model, "h:1", top=99)} == {"r"}
    two = HookedModel(seeded(Odd(lambda n, r, s: r * s, 4)), (3, 9, 9))
    assert incoming(two, "h:1") == [], "a product of equals is a unit of its own"


def test_a_mean_over_channels_connects_nothing() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
            self.h = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.r(self.a(x)).mean((1, 2)))

    assert incoming(HookedModel(seeded(Mean()), (3, 8, 8)), "h:1") == []


def test_connections_follow_the_weights(branches: HookedModel) -> None:
    def norms() -> list[float]:
        return [c.norm for c in incoming(branches, "bn:1", top=99)]

    before = norms()
    with torch.no_grad():
        branches.module.bn.weight.mul_(10)
    assert norms() == pytest.approx([10 * n for n in before], rel=1e-4)
    with torch.no_grad():
        branches.module.inner.weight.mul_(2)
    assert norms() == pytest.approx([20 * n for n in before], rel=1e-4)


def test_weights_are_not_asked_for_inside_an_edit(branches: HookedModel) -> None:
    with (
        edited(branches, [zero("cat:1")]),
        pytest.raises(ValueError, match="outside the edit"),
    ):
        incoming(branches, "bn:1")
    assert incoming(branches, "bn:1")


def test_what_cannot_be_followed_is_named() -> None:
    """A summand through an operation that mixes channels is missing from the raw weights, which say so."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + x.flip(1))

    (weights,) = raw_weights(HookedModel(seeded(Half()), (3, 5, 5)), "a", "c")
    assert weights.lost == ("Flip",)
