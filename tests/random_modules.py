"""Small random modules, composed of the operations that convolutional networks, mixers and classifiers are made of.

What a module does is known from how it was composed: where the units of each of its parts are. Nothing here uses the
library, so that tests can hold the library to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.conftest import seeded

T = TypeVar("T")
Pick = Callable[[Sequence[T]], T]
"""Draws one of several values; the first is the simplest."""


@dataclass(frozen=True)
class Layout:
    """What the axes of a tensor are: units second (a map or a row of positions) or last, or nothing but units."""

    units: int
    places: tuple[int, ...] = ()
    order: Literal["second", "last"] = "second"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape for one example."""
        return (self.units, *self.places) if self.order == "second" else (*self.places, self.units)

    @property
    def axis(self) -> int:
        """The axis of the units, with the batch's first."""
        return 1 if self.order == "second" else 1 + len(self.places)


class Step(nn.Module):
    """A function of its own modules and parameters.

    Attributes:
        axes: where the units of the output of each module inside are, by name; `""` is the step itself.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Any, Tensor], Tensor],
        modules: Mapping[str, nn.Module] | None = None,
        axes: Mapping[str, int] | None = None,
        parameters: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.title = name
        self.axes = dict(axes or {})
        self.step = forward
        for key, module in (modules or {}).items():
            self.add_module(key, module)
        for key, shape in (parameters or {}).items():
            setattr(self, key, nn.Parameter(torch.zeros(*shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)

    def extra_repr(self) -> str:
        return self.title


Made = tuple[Step, Layout]
Maker = Callable[[Pick, Layout], "Made | None"]
"""Makes a step for a layout and says the layout of its output; None if there is none for it."""


# --- layers --------------------------------------------------------------------------------------


def _conv(
    pick: Pick, at: Layout, keep: bool = False, out: int | None = None
) -> tuple[nn.Module, Layout] | None:
    """A convolution over the places; `keep` leaves their number as it is."""
    if at.order != "second" or not at.places:
        return None
    rank = len(at.places)
    kernel = pick([1, 3, 2]) if not keep else pick([1, 3])
    dilation = pick([1, 2])
    reach = dilation * (kernel - 1)
    stride = 1 if keep else pick([1, 2])
    padding = reach // 2 if keep else pick([0, 1])
    groups = pick([g for g in (1, 2, at.units) if at.units % g == 0])
    wanted = out or pick([at.units, 2 * at.units, 4]) if not keep else out or at.units
    if wanted % groups:
        groups = 1
    mode = pick(["zeros", "circular", "reflect", "replicate"])
    if any(n + 2 * padding <= reach or n <= padding for n in at.places):
        return None
    kind = (nn.Conv1d, nn.Conv2d)[rank - 1]
    layer = kind(
        at.units, wanted, kernel, stride, padding, dilation, groups, pick([True, False]), mode
    )
    places = tuple((n + 2 * padding - reach - 1) // stride + 1 for n in at.places)
    return layer, Layout(wanted, places)


def conv(pick: Pick, at: Layout) -> Made | None:
    made = _conv(pick, at)
    if made is None:
        return None
    layer, to = made
    return Step("conv", lambda m, x: m.layer(x), {"layer": layer}, {"layer": 1}), to


def transposed(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or not at.places or max(at.places) > 8:
        return None
    kernel, stride, padding = pick([2, 3]), pick([1, 2]), pick([0, 1])
    extra = pick([0, 1]) if stride == 2 else 0
    groups = pick([g for g in (1, 2) if at.units % g == 0])
    wanted = pick([at.units, 4])
    groups = 1 if wanted % groups else groups
    places = tuple((n - 1) * stride - 2 * padding + kernel + extra for n in at.places)
    if min(places) < 1:
        return None
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[len(at.places) - 1]
    layer = kind(at.units, wanted, kernel, stride, padding, extra, groups)
    return Step("transposed", lambda m, x: m.layer(x), {"layer": layer}, {"layer": 1}), Layout(
        wanted, places
    )


def functional_conv(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or len(at.places) != 2 or min(at.places) < 3:
        return None
    groups = pick([g for g in (1, 2) if at.units % g == 0])
    stride, padding = pick([1, 2]), pick([0, 1])
    places = tuple((n + 2 * padding - 3) // stride + 1 for n in at.places)

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, m.weight, m.bias, stride, padding, 1, groups)

    shapes = {"weight": (at.units, at.units // groups, 3, 3), "bias": (at.units,)}
    return Step("F.conv2d", forward, parameters=shapes), Layout(at.units, places)


def linear(pick: Pick, at: Layout) -> Made | None:
    if at.order == "second" and at.places:
        return None
    out = pick([at.units, 4, 6])
    to = Layout(out, at.places, at.order)
    if pick([False, True]):
        shapes = {"weight": (out, at.units)}
        return Step("F.linear", lambda m, x: F.linear(x, m.weight), parameters=shapes), to
    layer = nn.Linear(at.units, out)
    return Step("linear", lambda m, x: m.layer(x), {"layer": layer}, {"layer": at.axis}), to


def mixing(pick: Pick, at: Layout) -> Made | None:
    """A linear layer over positions, as in an MLP mixer."""
    if at.order != "last" or len(at.places) != 1:
        return None
    n = at.places[0]
    layer = nn.Linear(n, n)

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.layer(x.transpose(1, 2)).transpose(1, 2)

    return Step("mixing", forward, {"layer": layer}, {"layer": 2}), at  # the layer's own units


# --- normalisations and nonlinearities -----------------------------------------------------------


def norm(pick: Pick, at: Layout) -> Made | None:
    n, rank = at.units, len(at.places)
    halves = 2 if n % 2 == 0 else 1
    if at.order == "last" or not rank:
        kinds = ["layer", "functional layer", *(["batch"] if not rank else [])]
        kind = pick(kinds)
        if kind == "functional layer":
            return Step("F.layer_norm", lambda m, x: F.layer_norm(x, (n,))), at
        layer = nn.LayerNorm(n) if kind == "layer" else nn.BatchNorm1d(n)
    else:
        kind = pick(["batch", "group", "instance", "functional batch", "functional group"])
        if kind == "functional group":
            return Step("F.group_norm", lambda m, x: F.group_norm(x, halves)), at
        if kind == "functional batch":
            step = Step(
                "F.batch_norm",
                lambda m, x: F.batch_norm(x, m.mean, m.running_var, m.weight, m.shift),
                parameters={"mean": (n,), "running_var": (n,), "weight": (n,), "shift": (n,)},
            )
            return step, at
        batch = (nn.BatchNorm1d, nn.BatchNorm2d)[rank - 1]
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d)[rank - 1]
        if kind == "instance" and math.prod(at.places) < 2:
            return None
        layer = {
            "batch": lambda: batch(n),
            "group": lambda: nn.GroupNorm(halves, n),
            "instance": lambda: instance(n, affine=True, track_running_stats=pick([False, True])),
        }[kind]()
    return Step(kind, lambda m, x: m.layer(x), {"layer": layer}, {"layer": at.axis}), at


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "prelu": lambda: nn.PReLU(init=0.3),
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "relu6": nn.ReLU6,
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "tanh()": torch.tanh,
    "F.gelu": F.gelu,
    "clamp": lambda x: x.clamp(min=-0.4),
    "relu_": lambda x: (x + 0.1).relu_(),
}


def activation(pick: Pick, at: Layout) -> Made | None:
    name = pick([*_ACTIVATIONS, *_FUNCTIONS])
    if name in _FUNCTIONS:
        return Step(name, lambda m, x: _FUNCTIONS[name](x)), at
    return Step(name, lambda m, x: m.act(x), {"act": _ACTIVATIONS[name]()}, {"act": at.axis}), at


def dropout(pick: Pick, at: Layout) -> Made | None:
    return Step("dropout", lambda m, x: m.drop(x), {"drop": nn.Dropout(0.5)}, {"drop": at.axis}), at


# --- pooling and other changes of places ---------------------------------------------------------


def pooling(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or not at.places or min(at.places) < 3:
        return None
    rank = len(at.places)
    kind = pick(["max", "average", "adaptive average", "adaptive max"])
    kernel, stride, padding, ceil = pick([2, 3]), pick([2, 1]), pick([0, 1]), pick([False, True])
    if kind == "max":
        pool = (nn.MaxPool1d, nn.MaxPool2d)[rank - 1](
            kernel, stride, padding, pick([1, 2]) if min(at.places) > 4 else 1, ceil_mode=ceil
        )
    elif kind == "average":
        inside = pick([True, False])
        pool = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1](kernel, stride, padding, ceil, inside)
    else:
        adaptive = {
            "adaptive average": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
            "adaptive max": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
        }[kind][rank - 1]
        pool = adaptive(pick([3, 2]))
    places = tuple(pool(torch.zeros(1, 1, *at.places)).shape[2:])
    return Step(kind, lambda m, x: m.pool(x), {"pool": pool}, {"pool": 1}), Layout(at.units, places)


def enlarged(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or len(at.places) != 2 or max(at.places) > 6:
        return None
    mode = pick(["nearest", "bilinear"])
    places = tuple(2 * n for n in at.places)
    if pick([False, True]):
        layer = nn.Upsample(scale_factor=2, mode=mode)
        return Step(mode, lambda m, x: m.up(x), {"up": layer}, {"up": 1}), Layout(at.units, places)
    return Step(
        f"F.interpolate {mode}", lambda m, x: F.interpolate(x, scale_factor=2, mode=mode)
    ), Layout(at.units, places)


def padded(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or len(at.places) != 2 or max(at.places) > 10 or min(at.places) < 3:
        return None
    mode = pick(["constant", "circular", "reflect", "replicate"])
    places = (at.places[0] + 3, at.places[1] + 1)
    return Step(f"F.pad {mode}", lambda m, x: F.pad(x, (0, 1, 2, 1), mode=mode)), Layout(
        at.units, places
    )


def pixels(pick: Pick, at: Layout) -> Made | None:
    if at.order != "second" or len(at.places) != 2:
        return None
    high, wide = at.places
    if at.units % 4 == 0 and max(at.places) < 6 and pick([True, False]):
        layer = nn.PixelShuffle(2)
        return Step("pixel shuffle", lambda m, x: m.up(x), {"up": layer}, {"up": 1}), Layout(
            at.units // 4, (2 * high, 2 * wide)
        )
    if at.units > 4 or high % 2 or wide % 2:
        return None
    layer = nn.PixelUnshuffle(2)
    return Step("pixel unshuffle", lambda m, x: m.down(x), {"down": layer}, {"down": 1}), Layout(
        4 * at.units, (high // 2, wide // 2)
    )


# --- several paths -------------------------------------------------------------------------------


def residual(pick: Pick, at: Layout) -> Made | None:
    if at.order == "last" or not at.places:
        layer = nn.Linear(at.units, at.units)
        norm = nn.LayerNorm(at.units)
        modules, axes = {"norm": norm, "layer": layer}, {"norm": at.axis, "layer": at.axis}
        return Step("residual", lambda m, x: x + m.layer(F.gelu(m.norm(x))), modules, axes), at
    made = _conv(pick, at, keep=True)
    if made is None:
        return None
    act = pick([nn.ReLU(), nn.Tanh()])
    minus = pick([False, True])

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.act(m.layer(x))
        return x - 0.5 * y if minus else x + y

    return Step("residual", forward, {"layer": made[0], "act": act}, {"layer": 1, "act": 1}), at


def concatenated(pick: Pick, at: Layout) -> Made | None:
    made = _conv(pick, at, keep=True, out=4)
    if made is None or at.units > 8:
        return None
    made_too = pick([False, True])
    if not made_too:
        step = Step(
            "cat with itself",
            lambda m, x: torch.cat([x, m.layer(x)], 1),
            {"layer": made[0]},
            {"layer": 1},
        )
        return step, Layout(at.units + 4, at.places)
    other = (nn.Conv1d, nn.Conv2d)[len(at.places) - 1](at.units, 2, 1)
    step = Step(
        "cat",
        lambda m, x: torch.cat([m.layer(x), F.relu(m.other(x))], dim=1),
        {"layer": made[0], "other": other},
        {"layer": 1, "other": 1},
    )
    return step, Layout(6, at.places)


def excitation(pick: Pick, at: Layout) -> Made | None:
    """Squeeze and excitation."""
    if at.order != "second" or len(at.places) != 2:
        return None
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(at.units, at.units, 1), nn.Sigmoid())
    return Step("excitation", lambda m, x: x * m.gate(x), {"gate": gate}, {"gate": 1}), at


def parts(pick: Pick, at: Layout) -> Made | None:
    if at.units % 2:
        return None
    half = Layout(at.units // 2, at.places, at.order)
    axis, n = at.axis, at.units // 2
    options: dict[str, tuple[Callable[[Any, Tensor], Tensor], Layout]] = {
        "sum of halves": (lambda m, x: x.chunk(2, axis)[0] + 2 * x.chunk(2, axis)[1], half),
        "halves swapped": (lambda m, x: torch.cat(x.split([n, n], axis)[::-1], axis), at),
        "one half": (lambda m, x: x.narrow(axis, n, n), half),
        "glu": (lambda m, x: F.glu(x, axis), half),
        "every second": (lambda m, x: x.movedim(axis, -1)[..., ::2].movedim(-1, axis), half),
        "flipped": (lambda m, x: x.flip(axis), at),
    }
    name = pick(list(options))
    return Step(name, options[name][0]), options[name][1]


def shared(pick: Pick, at: Layout) -> Made | None:
    if at.order == "last" or not at.places:
        layer: nn.Module = nn.Linear(at.units, at.units)
    else:
        made = _conv(pick, at, keep=True)
        if made is None:
            return None
        layer = made[0]
    axes = {"layer@0": at.axis, "layer@1": at.axis}
    return Step("shared", lambda m, x: m.layer(F.relu(m.layer(x))), {"layer": layer}, axes), at


# --- changes of layout ---------------------------------------------------------------------------


def channels_last(pick: Pick, at: Layout) -> Made | None:
    """ConvNeXt's block: norm and layers with the channels last."""
    if at.order != "second" or len(at.places) != 2:
        return None
    modules = {
        "norm": nn.LayerNorm(at.units),
        "hidden": nn.Linear(at.units, 6),
        "out": nn.Linear(6, at.units),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.out(F.gelu(m.hidden(m.norm(x.permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)

    return Step("channels last", forward, modules, dict.fromkeys(modules, 3)), at


def rearranged(pick: Pick, at: Layout) -> Made | None:
    n, places = at.units, at.places
    whole = math.prod(places)
    if not places:
        return None
    if at.order == "last":
        options: dict[str, tuple[Callable[[Any, Tensor], Tensor], Layout]] = {
            "units second": (lambda m, x: x.movedim(-1, 1), Layout(n, places)),
            "mean of tokens": (lambda m, x: x.mean(list(range(1, x.ndim - 1))), Layout(n)),
        }
    else:
        options = {
            "flat": (lambda m, x: x.flatten(1), Layout(n * whole)),
            "mean": (lambda m, x: x.flatten(2).mean(-1), Layout(n)),
            "units last": (lambda m, x: x.movedim(1, -1), Layout(n, places, "last")),
        }
        if len(places) == 2:
            options |= {
                "row": (lambda m, x: x.flatten(2), Layout(n, (whole,))),
                "tokens": (lambda m, x: x.flatten(2).transpose(1, 2), Layout(n, (whole,), "last")),
                "mean of rows": (lambda m, x: x.mean(2), Layout(n, places[1:])),
            }
    options = {k: v for k, v in options.items() if k != "flat" or n * whole <= 100}
    name = pick(list(options))
    return Step(name, options[name][0]), options[name][1]


MAKERS: tuple[Maker, ...] = (
    conv, activation, linear, norm, pooling, residual, concatenated, shared, parts, channels_last, rearranged,
    transposed, functional_conv, mixing, enlarged, padded, pixels, excitation, dropout,
)  # fmt: skip


class Composed(nn.Module):
    """Steps one after the other, `stem` first and `head` last."""

    def __init__(self, steps: Sequence[Made], at: Layout) -> None:
        super().__init__()
        self.size = at.shape
        self.stem = nn.Conv2d(at.units, steps[0][1].units, 3, padding=1)
        self.steps = nn.ModuleList(step for step, _ in steps[1:])
        last = steps[-1][1]
        self.head = nn.Linear(last.units, 3)
        self.last = last
        self.axes = {"stem": 1, "head": 1}
        for i, (step, layout) in enumerate(steps[1:]):
            self.axes[f"steps.{i}"] = layout.axis
            self.axes |= {f"steps.{i}.{name}": axis for name, axis in step.axes.items()}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        if self.last.places:
            places = [axis for axis in range(1, x.ndim) if axis != self.last.axis]
            x = x.mean(places)
        return self.head(x)


CURVED = {
    "gelu", "tanh", "silu", "hardswish", "softplus", "elu", "selu", "relu6", "tanh()", "F.gelu", "clamp", "layer",
    "F.layer_norm", "group", "instance", "F.group_norm", "excitation", "glu", "channels last",
}  # fmt: skip
"""Steps that are more than linear layers, rectifiers (leaky ones, too) and maxima."""


def is_rectified(module: Composed) -> bool:
    """Whether a module is made of linear layers, rectifiers and maxima only."""
    curved = any(isinstance(part, nn.Tanh | nn.LayerNorm) for part in module.modules())
    return not curved and not any(getattr(step, "title", "") in CURVED for step in module.steps)


@st.composite
def composed_modules(draw: Any, most: int = 4) -> Composed:
    """Random modules of up to `most` steps between a convolution and a classifier, in double precision."""

    def pick(values: Sequence[T]) -> T:
        return draw(st.sampled_from(list(values)))

    begin = Layout(2, (pick([6, 5, 8]), pick([6, 7])))
    at = Layout(pick([4, 6]), begin.places)
    steps: list[Made] = [(Step("stem", lambda m, x: x), at)]
    for _ in range(draw(st.integers(1, most))):
        made = pick(MAKERS)(pick, at)
        if made is not None and math.prod(made[1].shape) <= 400:
            steps.append(made)
            at = made[1]
    module = seeded(Composed(steps, begin), draw(st.integers(0, 3))).double()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
