"""Expanded weights: the linear effect of one unit on another through everything between them.

It is the gradient of a target unit by a source unit, at each offset in space (Voss et al. 2021, "Visualizing Weights",
Distill).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.calling import check_weights_finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.adapter.topology import INPUT
from circuits.models.paths.tape import Tape, Window, one_hot
from circuits.tensors import write_tensors
from circuits.units import Site, Unit
from circuits.weights.connections import Connection

Mode = Literal["linear", "mean", "example"]
"""How nonlinearities are treated.

`linear`: activation functions are replaced by the identity, max pooling by average pooling (over the places inside the
map), local response normalisation by its derivative at zero; no data is needed.
`mean`: the gradient, averaged over examples. `example`: the gradient for each example.
"""

_UNITS_AT_ONCE = 32
"""Target units whose gradients are pulled back together."""

_EXAMPLES_AT_ONCE = 2
"""Examples in a pass; more leave the processor's cache (8 take three times as long)."""


@dataclass(frozen=True, eq=False)
class ExpandedWeights:
    """The weights of source units on target units at one position, through everything between them.

    `weight[t, s, y, x]` is what one more unit of activation of `sources[s]` at the source's position `start + (y, x)`
    adds to `units[t]` of the target at the position `at`. In mode `example` an axis of examples comes first. Outside
    of the window the weights are zero.

    Attributes:
        source: the earlier site, or `input`.
        target: the later site.
        units: the units of the target.
        sources: the units of the source.
        weight: the weights.
        positive: the sum over paths with a positive weight, if positive and negative paths were kept apart.
        negative: the sum over paths with a negative weight; `positive + negative` is `weight`.
        at: the target's position (empty if it has none).
        start: the source's position for the first offset.
        source_shape: the lengths of the source's position axes.
        target_shape: the lengths of the target's position axes.
        mode: how nonlinearities were treated.
        model: the model's name.
        model_hash: the hash of the model.
        examples: the examples and how they were chosen, if there were any.
    """

    source: str
    target: str
    units: tuple[int, ...]
    sources: tuple[int, ...]
    weight: Float[Tensor, "..."]
    positive: Float[Tensor, "..."] | None
    negative: Float[Tensor, "..."] | None
    at: tuple[int, ...]
    start: tuple[int, ...]
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    mode: Mode
    model: str
    model_hash: str
    examples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sums(self) -> Float[Tensor, "*example target source"]:
        """The sum of each kernel: positive if the source excites the target on the whole, negative if it inhibits."""
        return self._flat.sum(-1)

    @property
    def norms(self) -> Float[Tensor, "*example target source"]:
        """The Euclidean norm of each kernel."""
        return self._flat.norm(dim=-1)

    @property
    def _flat(self) -> Tensor:
        return self.weight.reshape(*self.weight.shape[: self.weight.ndim - len(self.start)], -1)

    @property
    def cut(self) -> bool:
        """Whether the window touches the border of the source's map, which then may have cut off some weights."""
        size = self.weight.shape[self.weight.ndim - len(self.start) :]
        return any(
            a == 0 or a + n == whole
            for a, n, whole in zip(self.start, size, self.source_shape, strict=True)
        )

    def connections(self, unit: int, top: int = 10) -> list[Connection]:
        """The strongest connections into one unit of the target, by the norm of the kernel.

        Raises:
            ValueError: if the unit was not expanded, or there is a result for each example.
        """
        if unit not in self.units:
            raise ValueError(f"unit {self.target}:{unit} is not among those that were expanded")
        if self.mode == "example":
            raise ValueError(
                "mode 'example' gives weights for each example: expected mode 'linear' or 'mean' for connections"
            )
        row = self.weight[self.units.index(unit)]
        norms = self.norms[self.units.index(unit)]
        typical = norms[norms > 0].median().item() if (norms > 0).any() else 0.0
        return [
            Connection(
                Unit(self.source, self.sources[i]),
                Unit(self.target, unit),
                row[i].clone(),
                f"{self.source} to {self.target}, {self.mode}",
                (),
                typical,
            )
            for i in norms.argsort(descending=True, stable=True)[:top].tolist()
            if norms[i] > 0
        ]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with everything but the weights as metadata."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        kept = {name: value for name, value in tensors.items() if value is not None}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        write_tensors(Path(path), kept, {"expanded_weights": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | Path) -> ExpandedWeights:
        """Read a file that `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                rest = json.loads((file.metadata() or {})["expanded_weights"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        # Safetensors, JSON and the keys may fail in many ways; each of them means that this is another file.
        except Exception as error:
            raise ValueError(f"file {str(path)!r} holds no expanded weights") from error
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()}
        values: dict[str, Any] = {**lists, **{name: tensors.get(name) for name in _TENSORS}}
        return cls(**values)


_TENSORS = ("weight", "positive", "negative")


@recording_gradients()
def expand_weights(
    model: HookedModel,
    source: str,
    target: str,
    *,
    mode: Mode = "linear",
    units: Sequence[int] | None = None,
    sources: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
    examples: Examples | Tensor | None = None,
    size: tuple[int, int] | None = None,
    apart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExpandedWeights:
    """Expand the weights from the units of one site to those of a later one, for each offset in space.

    The target site counts as it is: after a ReLU, an inactive unit has no gradient in the modes `mean` and `example`;
    choose the site before the ReLU to see what would activate it. All paths from the source to the target count. The
    result is exact at borders, where padding cuts paths off.

    Args:
        model: the model, without edits in force.
        source: the earlier site, or `input`.
        target: the later site.
        mode: how nonlinearities are treated.
        units: units of the target; by default all.
        sources: units of the source; by default all.
        at: the target's position; by default the middle of a map, or the end of a sequence.
        examples: the examples for the modes `mean` and `example`; texts must have one length.
        size: the height and width of the image in mode `linear`, if the model's own cuts kernels off.
        apart: also compute the sums over positive and over negative paths. A path's weight is the product of the
            weights (and gates) along it; where paths of both signs nearly cancel, `weight` hides them.
        progress: called with the steps done and all steps.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the sites are not connected, or the source comes after the target; if units, position or
            examples do not fit; if an operation between the sites has no rule for the mode.
    """
    given = None if examples is None else as_examples(model, examples)
    _check_modes(model, mode, given, size)
    check_weights_finite(model.module, model.name)
    here = _input_site(model) if source == INPUT else model.site(source)
    there = model.site(target)
    _check_order(model, here, there)
    rows = _indices("units", units, there)
    columns = _indices("sources", sources, here)
    groups = [rows[i : i + _UNITS_AT_ONCE] for i in range(0, len(rows), _UNITS_AT_ONCE)]
    batches = _batches(model, given, size)
    pulled = _pulled(model, here, there, mode, batches, groups, at, apart, progress)
    n = 1 if given is None else len(given)
    found = [w for w in pulled.totals if w is not None]
    box = _box(found, here, pulled.source_shape, n if mode == "example" else 1)

    def weights(windows: Sequence[Window | None]) -> Tensor:
        return _as_weights(windows, [len(g) for g in groups], here, box, columns, mode, n)

    # The sum over all paths is p + q with positive sum p and negative sum q, that of absolute weights is p - q.
    total = weights(pulled.totals)
    absolute = weights(pulled.absolutes) if apart else None
    return ExpandedWeights(
        source=here.name,
        target=there.name,
        units=rows,
        sources=columns,
        weight=total.float(),
        positive=None if absolute is None else ((absolute + total) / 2).float(),
        negative=None if absolute is None else ((total - absolute) / 2).float(),
        at=pulled.at,
        start=_positions(here, box[0]),
        source_shape=_positions(here, pulled.source_shape),
        target_shape=_positions(there, pulled.target_shape),
        mode=mode,
        model=model.name,
        model_hash=model.hash,
        examples={} if given is None else given.describe(),
    )


# --- arguments ---------------------------------------------------------------------------------


def _check_modes(
    model: HookedModel, mode: Mode, examples: Examples | None, size: tuple[int, int] | None
) -> None:
    """Raise ValueError if mode, examples and size do not go together for a model."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
    if model.edited:
        raise ValueError(f"model {model.name} is edited: expand its weights outside the edit")
    if mode == "linear" and not isinstance(model.input, ImageInput) and examples is None:
        raise ValueError(
            f"mode 'linear' needs examples for {model.name}, which takes tokens: expected at least one"
        )
    if mode != "linear" and examples is None:
        raise ValueError(f"mode {mode!r} needs examples: at least one")
    if mode == "linear" and examples is not None and isinstance(model.input, ImageInput):
        raise ValueError(
            "examples are not used in mode 'linear': expected mode 'mean' or 'example'"
        )
    if size is not None and (mode != "linear" or min(size) < 1):
        raise ValueError(f"size {size} must be a height and width, in mode 'linear'")


def _input_site(model: HookedModel) -> Site:
    """The model's input as a site, which it is not for other purposes."""
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"source 'input' of {model.name} is tokens, which have no gradient: expected a site"
        )
    shape = (spec.channels, spec.height, spec.width)
    return Site(INPUT, "channel", ("batch", "channel", "y", "x"), 1, shape)


def _check_order(model: HookedModel, source: Site, target: Site) -> None:
    """Raise ValueError unless the source comes before the target and both have numbers as units."""
    if source.name == target.name:
        raise ValueError(f"source and target are the same site, {source.name}")
    order = [INPUT, *(site.name for site in model.sites)]
    if order.index(source.name) > order.index(target.name):
        raise ValueError(
            f"source {source.name} comes after target {target.name} in {model.name}: "
            "expected the earlier site as source"
        )
    for site in (source, target):
        if site.inner_axis is not None:
            raise ValueError(
                f"units of {site.name} are heads, each a vector at a position: expected a site "
                "whose units are numbers (composition scores connect heads)"
            )


def _indices(name: str, wanted: Sequence[int] | None, site: Site) -> tuple[int, ...]:
    """The indices of the units asked for, all of them by default."""
    if wanted is None:
        return tuple(range(site.n_units))
    if not len(wanted):
        raise ValueError(f"{name} is empty: expected units of {site.name}")
    wrong = next((u for u in wanted if not 0 <= u < site.n_units), None)
    if wrong is not None:
        raise ValueError(
            f"{name}: {site.name}:{wrong} does not exist: {site.name} has units "
            f"0 to {site.n_units - 1}"
        )
    return tuple(int(u) for u in wanted)


def _batches(
    model: HookedModel, examples: Examples | None, size: tuple[int, int] | None
) -> Sequence[Tensor]:
    """The inputs, in batches; in mode `linear` any image will do, since gates do not depend on it."""
    if examples is not None:
        return examples.inputs.split(_EXAMPLES_AT_ONCE)
    example = model.input.example(1)
    return [example if size is None else example.new_zeros(1, example.shape[1], *size)]


def _position(site: Site, shape: tuple[int, ...], at: Sequence[int] | None) -> tuple[int, ...]:
    """The target's position: as given, or by default the middle of a map or the end of a sequence."""
    lengths = _positions(site, shape)
    if at is None:
        named = zip(site.position_axes, lengths, strict=True)
        return tuple(n - 1 if axis == "position" else n // 2 for axis, n in named)
    if len(at) != len(lengths) or any(not 0 <= p < n for p, n in zip(at, lengths, strict=True)):
        expected = f"one of {' x '.join(map(str, lengths))}" if lengths else "no position: ()"
        raise ValueError(f"at {tuple(at)} is not a position of {site.name}: expected {expected}")
    return tuple(int(p) for p in at)


def _positions(site: Site, of: Sequence[int]) -> tuple[int, ...]:
    """Of numbers with one for each axis, those of the position axes."""
    return tuple(n for axis, n in enumerate(of) if axis not in (0, site.unit_axis))


# --- gradients ---------------------------------------------------------------------------------


@dataclass
class _Pulled:
    """Gradients pulled back from a target to a source, for each group of target units.

    Attributes:
        totals: the gradients, summed over paths.
        absolutes: the same with the absolute weights of paths.
        at: the target's position.
        source_shape: the shape of the source's tensor.
        target_shape: the shape of the target's tensor.
    """

    totals: list[Window | None]
    absolutes: list[Window | None]
    at: tuple[int, ...] = ()
    source_shape: tuple[int, ...] = (0,)
    target_shape: tuple[int, ...] = (0,)


def _pulled(
    model: HookedModel, source: Site, target: Site, mode: Mode, batches: Sequence[Tensor],
    groups: Sequence[Sequence[int]], at: Sequence[int] | None, apart: bool,
    progress: Callable[[int, int], None] | None,
) -> _Pulled:  # fmt: skip
    """Run each batch once under a tape, and pull the gradients of all groups of units back through it."""
    made = _Pulled([None] * len(groups), [None] * len(groups))
    for done, batch in enumerate(batches):
        tape, made.source_shape = _taped(model, source, target, mode, batch)
        made.target_shape = tape.shape
        made.at = _position(target, tape.shape, at)
        first = done * _EXAMPLES_AT_ONCE if mode == "example" else None
        for i, group in enumerate(groups):
            begin = one_hot(tape.shape, target.unit_axis, group, made.at, model.device)
            made.totals[i] = _accumulated(made.totals[i], tape.pull(begin), first)
            if apart:
                pulled = tape.pull(begin, "absolute")
                made.absolutes[i] = _accumulated(made.absolutes[i], pulled, first)
            if progress is not None:
                progress(done * len(groups) + i + 1, len(batches) * len(groups))
    return made


def _taped(
    model: HookedModel, source: Site, target: Site, mode: Mode, batch: Tensor
) -> tuple[Tape, tuple[int, ...]]:
    """A tape of what the model does between two sites, and the shape of the source's tensor."""
    tape = Tape("linear" if mode == "linear" else "gradient")
    shape: list[tuple[int, ...]] = []

    def start(value: Tensor) -> Tensor:
        shape.append(tuple(value.shape))
        return tape.start(value)

    # Edits are the hooks by which a pass tells the tape that it has reached the two sites.
    edits: dict[str, Callable[[Tensor], Tensor]] = {target.name: tape.end}
    if source.name != INPUT:
        edits[source.name] = start
    # In mode linear on images no number of the image may count; tokens, whose gates are those of the examples, may.
    image = mode == "linear" and isinstance(model.input, ImageInput)
    change = start if source.name == INPUT else tape.given if image else None
    with model.lock, tape, _changing_input(model, change):
        # `reference`: the tape knows local response normalisation as torch's function, not as the fast one.
        model.run(batch, edits=edits, until=target, reference=True)
    if not tape.connected:
        raise ValueError(
            f"{source.name} and {target.name} are not connected: nothing that {model.name} computes "
            f"from {source.name} reaches {target.name}"
        )
    return tape, shape[0]


@contextmanager
def _changing_input(
    model: HookedModel, change: Callable[[Tensor], Tensor] | None
) -> Iterator[None]:
    """Change the model's input before each forward pass inside the block; there is no site to edit."""
    if change is None:
        yield
        return
    handle = model.module.register_forward_pre_hook(
        lambda module, args: (change(args[0]), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def _accumulated(so_far: Window | None, more: Window | None, first: int | None) -> Window | None:
    """Add the window of a batch to those of earlier batches: as examples from `first` on, or summed over examples."""
    if more is None:
        return so_far
    summed = Window(more.value.sum(1, keepdim=True), (0, *more.start[1:]))
    more = summed if first is None else more.moved(0, first)
    return more if so_far is None else so_far.plus(more)


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _box(windows: Sequence[Window], source: Site, shape: tuple[int, ...], examples: int) -> Box:
    """The smallest box that holds all windows, extended to all examples and all units."""
    if not windows:
        return (0,) * len(shape), (examples, *shape[1:])
    start = [min(s) for s in zip(*(w.start for w in windows), strict=True)]
    stop = [max(s) for s in zip(*(w.stop for w in windows), strict=True)]
    # Windows are cut to where gradients are not zero, but examples and units are later selected by their index.
    start[0], stop[0] = 0, examples
    start[source.unit_axis], stop[source.unit_axis] = 0, source.n_units
    return tuple(start), tuple(stop)


def _as_weights(
    windows: Sequence[Window | None],
    rows: Sequence[int],
    source: Site,
    box: Box,
    columns: tuple[int, ...],
    mode: Mode,
    n: int,
) -> Tensor:
    """The windows of groups of units as one tensor of weights: (example x) target x source x offset axes."""
    size = [b - a for a, b in zip(*box, strict=True)]
    values = torch.cat(
        [
            torch.zeros(count, *size, dtype=torch.float64) if w is None else w.within(*box).cpu()
            for w, count in zip(windows, rows, strict=True)
        ]
    )
    # Here: target x example x axes of the source. After it: target x example x source x offset axes.
    values = values.movedim(source.unit_axis + 1, 2)[:, :, list(columns)]
    return values.transpose(0, 1) if mode == "example" else values[:, 0] / n
