"""The direct paths between the channels of a convolutional network, read off the operations of a pass.

A path leads from what one nonlinearity puts out to what the next one is given: operations that keep channels apart
(pooling, batch norm, padding, concatenation, sums), and on the way at most one layer that mixes them. Weight layers
(`models.adapter.topology`) know which channels a layer connects, but not with which strides and at which places, and
they leave out the paths around layers (identity shortcuts); here each path can be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.call_points import writes_in_place
from circuits.models.adapter.flow import Flow, moves, short_name, substituted
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.program import Operation, Recorder, Value

# --- what paths consist of ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """An operation that keeps channels apart, without the constants that it adds.

    Attributes:
        given: the value that it reads.
        index: for each channel that it puts out the channel that it comes from; -1 for none.
        apply: what it does to a tensor, batch x channel x positions: linear, but for the maximum in max pooling.
    """

    given: Value
    index: Int[Tensor, " channel"]
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution in two dimensions, or a linear layer.

    Attributes:
        given: the value that it reads.
        weight: output channel x input channel of its group x kernel axes (none for a linear layer).
        settings: stride, padding, dilation.
        groups: groups of a convolution.
    """

    given: Value
    weight: Float[Tensor, "channel_out channel_in *kernel"]
    settings: Mapping[str, Any]
    groups: int = 1

    def apply(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The layer with other weights, without bias."""
        if weight.ndim == 4:
            return F.conv2d(x, weight, groups=groups, **self.settings)
        if groups == 1:
            return x @ weight.mT
        apart = torch.einsum(
            "ngi,goi->ngo", x.unflatten(1, (groups, -1)), weight.unflatten(0, (groups, -1))
        )
        return apart.flatten(1)

    def products(
        self,
        x: Float[Tensor, "example channels *place"],
        gradient: Float[Tensor, "example channel_out *pos"],
    ) -> Float[Tensor, "example channel_out channel_in"]:
        """For each weight the sum over positions of input times weight times gradient, summed over the kernel."""
        groups, (out, per_in), kernel = self.groups, self.weight.shape[:2], self.weight.shape[2:]
        size = math.prod(kernel)
        columns = self._unfolded(x).unflatten(1, (groups, -1)) if kernel else None
        if columns is None:
            return gradient[:, :, None] * x[:, None] * self.weight
        rows = gradient.flatten(2).unflatten(1, (groups, -1))
        weight = self.weight.reshape(groups, out // groups, per_in * size)
        made = (rows @ columns.mT) * weight
        return made.unflatten(-1, (per_in, size)).sum(-1).flatten(1, 2)

    def _unfolded(self, x: Tensor) -> Float[Tensor, "example row place"]:
        kernel, settings = self.weight.shape[2:], dict(self.settings)
        padding = settings.pop("padding")
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(settings["dilation"], kernel, strict=True)]
            (top, left) = (n // 2 for n in whole)
            x = F.pad(x, (left, whole[1] - left, top, whole[0] - top))
        own = (0, 0) if isinstance(padding, str) else padding
        return F.unfold(x, tuple(kernel), padding=own, **settings)


@dataclass(frozen=True, eq=False)
class ChannelPath:
    """A direct path to a value.

    Attributes:
        source: the value that it starts from.
        before: the operations before the layer, in order of execution; all of them if there is no layer.
        layer: the layer on the path, if there is one.
        after: the operations after it.
    """

    source: Value
    before: tuple[Step, ...]
    layer: Layer | None
    after: tuple[Step, ...]

    def pooled(self, x: Tensor) -> Tensor:
        """What the source puts out as it reaches the layer, or the end if there is none."""
        for step in self.before:
            x = step.apply(x)
        return x

    def ended(self, x: Tensor) -> Tensor:
        """What the layer puts out as it reaches the end; linear."""
        for step in self.after:
            x = step.apply(x)
        return x


def followed(steps: Sequence[Step], n: int) -> Int[Tensor, " channel"]:
    """For each channel at the end of some operations the one, of `n`, that it comes from; -1 for none."""
    index = torch.arange(n)
    for step in steps:
        index = torch.where(step.index >= 0, index[step.index.clamp_min(0)], -1)
    return index


# --- the channels of a model -------------------------------------------------------------------------


class ChannelFlow:
    """The values of a pass that nonlinearities are given and put out, with the direct paths between them.

    A source is what a nonlinearity puts out where it is not read by the next nonlinearity alone, or the image. A target
    is what a nonlinearity is given. What one layer puts out and another reads without a nonlinearity in between is
    both.

    Args:
        model: a model of images.

    Attributes:
        flow: the operations of a pass.
        shown: for each value the sites that show it and can change it for all that read it, in order of execution.
        constants: the tensors that no operation made.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        example = model.fitted(model.input.example(2))
        recorder = Recorder(model.module, [example])
        places: dict[str, tuple[Value, int]] = {}

        def looking(name: str) -> Callable[[Tensor], None]:
            def look(tensor: Tensor) -> None:
                if (value := recorder.value(tensor)) is not None:
                    places[name] = value, len(recorder.program.operations)

            return look

        looks = {s.name: looking(s.name) for s in model.sites}
        with recorder:
            model.observe(example, looks, model.sites[-1], reference=True)
        self.flow = Flow(recorder.program)
        self.constants = dict(recorder.constants)
        self.places = places
        self.shown: dict[Value, list[str]] = {}
        for name, (value, at) in places.items():
            # A module may go on with what it computes before it returns it: a change there would come too late.
            if all(reader >= at for reader in self.flow.taken_by.get(value, ())):
                self.shown.setdefault(value, []).append(name)
        self._links: dict[Value, list[Step] | Layer | None] = {}
        self._alone: dict[Value, bool] = {}
        self._paths: dict[Value, tuple[ChannelPath, ...]] = {}
        self._origins: dict[Value, dict[Value, Tensor]] = {}

    @cached_property
    def image(self) -> frozenset[Value]:
        """The values that are the model's input: itself, and copies made before the model is called."""
        found = {v for v, name in self.flow.program.sources.items() if name == "input"}
        for op in self.flow.program.operations:
            if not op.running and not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return frozenset(found)

    def shape(self, value: Value) -> tuple[int, ...]:
        """A value's shape for two images."""
        return self.flow.shape(value)

    def n_channels(self, value: Value) -> int:
        """The number of channels of a value."""
        return self.flow.shape(value)[1]

    def order(self, value: Value) -> int:
        """The number of the operation that made a value; -1 for the image."""
        return -1 if value in self.image else self.flow.made_by[value]

    # --- paths -----------------------------------------------------------------------------------

    def links(self, value: Value) -> list[Step] | Layer | None:
        """How a value is computed: by operations that keep channels apart, a layer, or a nonlinearity (None)."""
        if value not in self._links:
            op = None if value in self.image else self.flow.operation(value)
            self._links[value] = None if op is None else self._made(op, value)
        return self._links[value]

    def steps(self, value: Value) -> list[Step]:
        """The operations that keep channels apart and make a value; none if it is made otherwise."""
        links = self.links(value)
        return links if isinstance(links, list) else []

    def is_nonlinear(self, value: Value) -> bool:
        """Whether a value is what a nonlinearity puts out."""
        return value not in self.image and self.links(value) is None

    def alone(self, value: Value) -> bool:
        """Whether each channel of a value is one channel of one source, carried on: nothing is mixed or added."""
        if value not in self._alone:
            links = self.links(value)
            if links is None:
                self._alone[value] = True
            elif isinstance(links, Layer):
                self._alone[value] = False
            else:
                met = sum((step.index >= 0).long() for step in links)
                apart = isinstance(met, Tensor) and int(met.max()) <= 1
                self._alone[value] = apart and all(self.alone(step.given) for step in links)
        return self._alone[value]

    @cached_property
    def linear_parts(self) -> frozenset[Value]:
        """What a layer puts out and another one reads without a nonlinearity in between."""
        found: set[Value] = set()
        for op in self.flow.program.operations:
            for value in op.outputs if op.inputs and op.inputs[0] in self.flow.dependent else ():
                links = self.links(value)
                if isinstance(links, Layer):
                    ends = self._back(links.given)
                    found.update(v for v, _ in ends if isinstance(self.links(v), Layer))
        return frozenset(found)

    def _back(
        self, value: Value, stop: Callable[[Value], bool] = lambda _: False
    ) -> Iterator[tuple[Value, tuple[Step, ...]]]:
        """Ways back to what nonlinearities and layers put out, with the operations on each in order of execution."""
        waiting: list[tuple[Value, tuple[Step, ...]]] = [(value, ())]
        seen = 0
        while waiting:
            here, steps = waiting.pop(0)
            links = self.links(here)
            if links is None or isinstance(links, Layer) or stop(here):
                yield here, steps
                continue
            seen += 1
            if seen > _MOST_STEPS:
                raise ValueError(
                    f"model {self.model.name} adds up its channels in too many ways before one nonlinearity: paths "
                    f"longer than {_MOST_STEPS} operations are not listed"
                )
            waiting += [(step.given, (step, *steps)) for step in links]

    def paths(self, target: Value) -> tuple[ChannelPath, ...]:
        """The direct paths to a target."""
        if target not in self._paths:
            self._paths[target] = tuple(self._direct(target))
        return self._paths[target]

    def _direct(self, target: Value) -> Iterator[ChannelPath]:
        found: list[ChannelPath] = []
        for end, after in self._back(target):
            links = self.links(end)
            if not isinstance(links, Layer) or (end in self.linear_parts and end != target):
                found.append(ChannelPath(end, after, None, ()))
                continue
            found += [ChannelPath(s, before, links, after) for s, before in self._back(links.given)]
        yield from (p for p in found if p.source in self.flow.dependent)

    @cached_property
    def targets(self) -> tuple[Value, ...]:
        """What nonlinearities are given, what layers read of other layers, and the model's output; in order."""
        found = set(self.linear_parts)
        for op in self.flow.program.operations:
            for made in op.outputs:
                if made in self.image or self.links(made) is not None:
                    continue
                found.update(
                    v for v in op.inputs if v in self.flow.dependent and not self._passes(v)
                )
        output = self.places[self.output][0]
        if not self._passes(output):
            found.add(output)
        return tuple(sorted(found, key=self.order))

    def _passes(self, value: Value) -> bool:
        """Whether a value is what sources put out, one channel at a time: no target of its own."""
        return self.alone(value) or len(self.flow.shape(value)) < 2

    @property
    def output(self) -> str:
        """The site of the model's output."""
        logits = [s.name for s in self.model.sites if s.kind == "logit" and s.name in self.places]
        return logits[-1] if logits else list(self.places)[-1]

    def carried(self, value: Value) -> list[tuple[Value, Int[Tensor, " channel"]]]:
        """The sources that a value carries on, each with the channel that is there for each of its own, or -1."""
        ends = self._back(value, lambda v: v in self.linear_parts)
        return [(source, followed(steps, self.n_channels(source))) for source, steps in ends]

    # --- through nonlinearities ------------------------------------------------------------------

    def computed_from(self, value: Value) -> dict[Value, Bool[Tensor, "channel target"]]:
        """The targets from which a source, or what carries some on, is computed, with which channel depends on which.

        Raises:
            ValueError: if an operation moves or mixes channels in a way that is not followed.
        """
        if value not in self._origins:
            self._origins[value] = self._traced(value)
        return self._origins[value]

    def _traced(self, value: Value) -> dict[Value, Tensor]:
        found: dict[Value, Tensor] = {}
        for source, index in self.carried(value):
            for target, table in self._through(source).items():
                rows = table[index.clamp_min(0)] & (index >= 0)[:, None]
                found[target] = found[target] | rows if target in found else rows
        return found

    def _through(self, source: Value) -> dict[Value, Tensor]:
        n = self.n_channels(source)
        if source in self.linear_parts or isinstance(self.links(source), Layer):
            return {source: torch.eye(n, dtype=torch.bool)}
        if source in self.image or source not in self.flow.dependent:
            return {}
        op = self.flow.operation(source)
        assert op is not None, "no source of the program"
        found: dict[Value, Tensor] = {}
        for given in dict.fromkeys(v for v in op.inputs if v in self.flow.dependent):
            table = self._dependence(op, n, given)
            if self._passes(given):
                before = self.computed_from(given)
            else:
                before = {given: torch.eye(self.n_channels(given), dtype=torch.bool)}
            for target, rows in before.items():
                made = (table.float() @ rows.float()) > 0
                found[target] = found[target] | made if target in found else made
        return found

    def _dependence(self, op: Operation, n: int, given: Value) -> Bool[Tensor, "channel given"]:
        """Which channels that a nonlinearity puts out depend on which that it is given."""
        name, own = short_name(op), self.n_channels(given)
        if name in _ONE_BY_ONE and own == n:
            return torch.eye(n, dtype=torch.bool)
        if name in ("amax", "amin") and _over_positions(op, len(self.flow.shape(given))):
            return torch.eye(n, dtype=torch.bool)
        if name == "local_response_norm":
            size = int(op.argument(1, "size"))
            apart = torch.arange(n)[:, None] - torch.arange(n)
            # Torch pads size // 2 channels before and (size - 1) // 2 after.
            return (apart <= size // 2) & (-apart <= (size - 1) // 2)
        if name in _ONE_BY_ONE or name in _ALL_TOGETHER:
            return torch.ones(n, own, dtype=torch.bool)
        at = self.flow.made_by[op.outputs[0]]
        raise ValueError(
            f"operation {self.flow.called(at)} of model {self.model.name} is not followed: expected convolutions in "
            "two dimensions, linear layers, and operations that keep channels apart or normalise them"
        )

    # --- single operations -----------------------------------------------------------------------

    def constant(self, value: Value) -> Tensor:
        """The tensor of a value that does not depend on the image."""
        if value in self.constants:
            return self.constants[value].detach()
        op = self.flow.operation(value)
        assert op is not None, "constants are known"
        held = {v: self.constant(v).clone() for v in dict.fromkeys(op.inputs)}
        made = op.function(*substituted(op.args, held), **substituted(op.kwargs, held))
        return made if isinstance(made, Tensor) else made[op.outputs.index(value)]

    def _made(self, op: Operation, value: Value) -> list[Step] | Layer | None:
        given = [v for v in op.inputs if v in self.flow.dependent]
        name = short_name(op)
        if not given or len(self.flow.shape(value)) < 2 or len(self.flow.shape(given[0])) < 2:
            return None
        if name in ("conv2d", "linear"):
            return self._layer(op, name, given)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, op, given, value)
        if moves(op) and len(given) == 1:
            return _rearranged(self, op, given, value)
        return None

    def _layer(self, op: Operation, name: str, given: Sequence[Value]) -> Layer | None:
        x, weight = op.argument(0, "input"), op.argument(1, "weight")
        dimensions = 4 if name == "conv2d" else 2
        if list(given) != [x] or len(self.flow.shape(x)) != dimensions:
            return None
        if name == "linear":
            return Layer(x, self.constant(weight), {})
        padding = op.argument(4, "padding", 0)
        settings = {
            "stride": _pair(op.argument(3, "stride", 1)),
            "padding": padding if isinstance(padding, str) else _pair(padding),
            "dilation": _pair(op.argument(5, "dilation", 1)),
        }
        groups = int(op.argument(6, "groups", 1))
        return Layer(x, self.constant(weight), settings, groups)


_MOST_STEPS = 2000

_ONE_BY_ONE = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu",
    "gelu", "silu", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardsigmoid", "softplus", "clamp",
    "clamp_min", "clamp_", "prelu", "threshold", "abs", "square", "pow", "__pow__", "sqrt", "exp", "log", "softsign",
    "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "max_pool2d", "adaptive_max_pool2d", "maximum", "minimum",
    "mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "instance_norm", "add", "__add__", "sub",
    "__sub__", "lp_pool2d",
}  # fmt: skip
"""Nonlinear functions of each channel by itself, or of the same channel of several tensors."""

_ALL_TOGETHER = {"softmax", "log_softmax", "group_norm", "layer_norm", "normalize"}
"""Functions of all channels."""

Rule = Callable[[ChannelFlow, Operation, Sequence[Value], Value], list[Step] | None]


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else value
    return int(both[0]), int(both[-1])


def _whole(channels: ChannelFlow, given: Value, apply: Callable[[Tensor], Tensor]) -> list[Step]:
    return [Step(given, torch.arange(channels.n_channels(given)), apply)]


def _same(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    if len(given) != 1 or channels.flow.shape(given[0]) != channels.flow.shape(value):
        return None
    return _whole(channels, given[0], lambda x: x)


def _scaled(value: Tensor | float) -> Callable[[Tensor], Tensor]:
    if isinstance(value, Tensor):
        return lambda x: x * value.to(x)
    return (lambda x: x) if value == 1 else (lambda x: x * value)


def _batch_norm(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    if op.name == "torch.batch_norm":  # weight and bias come before the statistics
        weight, variance, eps = (op.argument(i, "") for i in (1, 4, 7))
    else:
        variance, weight = op.argument(2, "running_var"), op.argument(3, "weight")
        eps = op.argument(7, "eps", 1e-5)
    if len(given) != 1 or variance is None or op.argument(5, "training", False):
        return None
    scale = (channels.constant(variance) + eps).rsqrt()
    scale = scale if weight is None else scale * channels.constant(weight)
    across = scale.reshape(1, -1, *(1,) * (len(channels.flow.shape(value)) - 2))
    return _whole(channels, given[0], _scaled(across))


def _replayed(op: Operation, given: Value) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        own = x.clone() if writes_in_place(op.name) else x
        args, kwargs = (substituted(a, {given: own}) for a in (op.args, op.kwargs))
        return op.function(*args, **kwargs)

    return apply


def _average(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    if len(given) != 1 or channels.n_channels(given[0]) != channels.n_channels(value):
        return None
    return _whole(channels, given[0], _replayed(op, given[0]))


def _max_pool(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    # The maximum of a sum, or of what a layer puts out, is a nonlinearity like any other.
    if value != op.outputs[0] or not channels.alone(given[0]):
        return None
    return _average(channels, op, given, value)


def _over_positions(op: Operation, n: int) -> bool:
    """Whether an operation reduces axes after that of the channels, of `n`, and no other."""
    axes = op.argument(1, "dim")
    listed = [axes] if isinstance(axes, int) else [] if axes is None else list(axes)
    return bool(listed) and all(axis % n >= 2 for axis in listed)


def _mean(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    if not _over_positions(op, len(channels.flow.shape(given[0]))):
        return None
    return _average(channels, op, given, value)


def _sum(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    name, shape = short_name(op), channels.flow.shape
    weight = float(op.kwargs.get("alpha", 1))
    if "sub" in name:
        weight = -weight
    backwards = name == "__rsub__"
    found = []
    for place, term in enumerate(op.args[:2]):
        if not isinstance(term, Value) or term not in channels.flow.dependent:
            continue
        if shape(term) != shape(value):
            return None  # one number for each channel, say, from a gate
        factor = weight if place == (0 if backwards else 1) else 1.0
        found += _whole(channels, term, _scaled(factor))
    return found


def _product(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    left, right, shape = op.args[0], op.argument(1, "other"), channels.flow.shape
    divides = "div" in short_name(op)
    if len(given) != 1 or (divides and given[0] != left) or op.kwargs.get("rounding_mode"):
        return None
    if shape(given[0]) != shape(value):
        return None
    other = right if given[0] == left else left
    factor = channels.constant(other) if isinstance(other, Value) else float(other)
    if isinstance(factor, Tensor) and factor.ndim == len(shape(value)) and len(factor) > 1:
        return None  # a number of its own for each example
    return _whole(channels, given[0], _scaled(1 / factor if divides else factor))


def _negative(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    return _whole(channels, given[0], lambda x: -x)


def _padded(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    pad = [int(p) for p in op.argument(1, "pad")]
    mode = op.argument(2, "mode", "constant")
    n, dimensions = channels.n_channels(given[0]), len(channels.flow.shape(given[0]))
    after = 2 * (dimensions - 2)  # padding is listed from the last axis backwards
    if len(pad) > after + 2 or len(given) != 1:
        return None
    front, back = pad[after : after + 2] if len(pad) > after else (0, 0)
    index = torch.arange(-front, n + back)
    index = torch.where((index >= 0) & (index < n), index, -1)
    return [Step(given[0], index, lambda x: F.pad(x, pad, mode))]


def _concatenated(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    shape = channels.flow.shape(value)
    if int(op.argument(1, "dim", 0)) % len(shape) != 1:
        return None
    found, front = [], 0
    for part in op.argument(0, "tensors"):
        n = channels.n_channels(part)
        back = shape[1] - front - n
        if part in channels.flow.dependent:
            index = torch.full((shape[1],), -1)
            index[front : front + n] = torch.arange(n)
            pad = (*(0, 0) * (len(shape) - 2), front, back)
            found.append(Step(part, index, lambda x, pad=pad: F.pad(x, pad)))
        front += n
    return found


def _rearranged(
    channels: ChannelFlow, op: Operation, given: Sequence[Value], value: Value
) -> list[Step] | None:
    """Flattening a map, or what selects channels and places; None if channels leave their axis."""
    before, after = channels.flow.shape(given[0]), channels.flow.shape(value)
    if before == after and short_name(op) in ("contiguous", "clone", "view", "reshape", "flatten"):
        return _whole(channels, given[0], lambda x: x)
    if after == (before[0], math.prod(before[1:])) and short_name(op) in _FLATTENING:
        index = torch.arange(before[1]).repeat_interleave(math.prod(before[2:]))
        return [Step(given[0], index, lambda x: x.flatten(1))]
    if after[:2] == before[:2] and math.prod(after) == math.prod(before):  # positions alone move
        if short_name(op) in ("view", "reshape"):
            return _whole(channels, given[0], lambda x: x.reshape(*x.shape[:2], *after[2:]))
        if short_name(op) in ("squeeze", "unsqueeze", "flatten", "__getitem__"):
            return _whole(channels, given[0], _replayed(op, given[0]))
    if short_name(op) not in _SELECTING or len(after) != len(before) or after[0] != before[0]:
        return None
    lead = (1, -1, *(1,) * (len(before) - 2))
    places = torch.arange(before[1]).reshape(lead).expand(before)
    made = op.function(
        *substituted(op.args, {given[0]: places}), **substituted(op.kwargs, {given[0]: places})
    )
    number = op.outputs.index(value)
    index = (made if isinstance(made, Tensor) else made[number]).flatten(2)[0]
    if not bool((index == index[:, :1]).all()):
        return None
    replay = _replayed(op, given[0])

    def apply(x: Tensor) -> Tensor:
        found = replay(x)
        return found if isinstance(found, Tensor) else found[number]

    return [Step(given[0], index[:, 0], apply)]


_FLATTENING = {"flatten", "view", "reshape", "squeeze"}
_SELECTING = {
    "__getitem__",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "narrow",
    "flip",
    "roll",
}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("dropout", "dropout2d", "alpha_dropout", "feature_dropout", "to", "float", "double"), _same),
    "batch_norm": _batch_norm,
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d", "interpolate", "upsample"), _average),
    **dict.fromkeys(("max_pool2d", "adaptive_max_pool2d"), _max_pool),
    **dict.fromkeys(("mean", "sum"), _mean),
    **dict.fromkeys(
        ("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__"), _sum
    ),
    **dict.fromkeys(
        ("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__"), _product
    ),
    **dict.fromkeys(("neg", "__neg__"), _negative),
    "pad": _padded,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
}  # fmt: skip
"""How to pass each function that keeps channels apart."""
