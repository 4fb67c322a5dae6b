"""Rank-one edits: a layer as a linear associative memory in which one key and value are stored.

The key is the layer's input at a position; the value is the output that makes the model give the wanted answer, found
by optimisation (ROME, Meng et al. 2022; for convolutions Bau et al. 2020). The edit holds the numbers, so that
replaying it needs no optimisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from circuits.autograd import recording_gradients
from circuits.edits.layers import Associate, LowRank
from circuits.edits.recipes import edited
from circuits.edits.records import fitting
from circuits.edits.weights import layer_named
from circuits.examples import Examples, as_examples
from circuits.means import counted_rows
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import WeightMatrix
from circuits.models.adapter.sites import main_output
from circuits.models.paths.logits import answer_name, answers, check_answer
from circuits.store import ActivationStore
from circuits.tensors import at_least_single
from circuits.units import Site


def second_moment(
    model: HookedModel, layer: str, data: ActivationStore | Examples | Tensor | Iterable[Tensor]
) -> Float[Tensor, "column column"]:
    """C, the mean of k k^T over a layer's inputs.

    Args:
        model: the model.
        layer: the layer's name.
        data: a store with the covariance of the site that the layer reads, or examples.

    Raises:
        KeyError: if there is no such layer, or the store lacks that covariance.
        ValueError: if there are no examples.
    """
    read = read_site(model, layer)
    if isinstance(data, ActivationStore):
        theirs = data.provenance.model_hash
        if theirs != model.intact_hash:
            raise ValueError(
                f"data: the store belongs to model {theirs[:16]}, expected {model.intact_hash[:16]}"
            )
        # The store keeps the centered covariance: E[k k^T] = Cov(k) + E[k] E[k]^T.
        kept = data.covariance(read.name)
        mean = torch.from_numpy(kept.mean).double().reshape(-1)
        # For a convolution the unit axis is one number a channel, so that k here is a column of channels and not a
        # patch.
        return torch.from_numpy(kept.covariance).double() + mean[:, None] * mean[None, :]
    total, n = torch.zeros(()), 0
    for part in as_examples(model, data).batches():
        value = model.run(part.inputs, mask=part.mask, read=[read], until=read)[read]
        rows = counted_rows(read, value, part.mask).flatten(1).cpu().double()
        total = total + rows.T @ rows
        n += len(rows)
    # Not centered: the edit is to change as little as possible what the layer gives on other keys, E|Lambda d^T k|^2 =
    # |Lambda|^2 d^T C d, and that counts the mean of k too.
    return total / n


def read_site(model: HookedModel, layer: str) -> Site:
    """The site that holds exactly what a layer reads.

    Raises:
        KeyError: if there is no such layer.
        ValueError: if there is no such site.
    """
    return _site_of(model, layer_named(model.matrices, layer), "reads")


@recording_gradients()
def associate(
    model: HookedModel,
    layer: str,
    examples: Examples | Tensor,
    target: int,
    moment: Float[Tensor, "column column"],
    *,
    at: tuple[int, ...] | None = None,
    steps: int = 50,
    learning_rate: float = 0.5,
    decay: float = 0.05,
    enough: float = 0.99,
    damping: float = 1e-6,
    origin: str = "",
) -> Associate | LowRank:
    """The rank-one edit after which a model answers some examples with a target.

    For a linear layer this is the closed form of `Associate`. A convolution is changed along one direction of its
    channels, C^-1 k for the key k at `at`, by kernels that are optimised for all positions of the examples together
    (Bau et al. 2020, section 3.3); the result is a `LowRank` edit. Its `origin` records the target's new probability.

    Args:
        model: the model.
        layer: the layer that the association is stored in.
        examples: the examples whose answer should change; the key is the mean over them.
        target: the token (after the last position) or class that they should get.
        moment: C of the layer's inputs; see `second_moment`.
        at: where the key is read: a token position (the last if None), or (y, x) on a map (the position of the largest
            output norm if None).
        steps: the largest number of optimisation steps.
        learning_rate: the learning rate of Adam, in units of the value's norm over the square root of its length.
        decay: the weight of the squared change relative to the squared norm of the value.
        enough: the probability at which the optimisation stops.
        damping: added to C's diagonal, as a share of its mean.
        origin: what the edit is for, for the record.

    Raises:
        KeyError: if the layer is unknown.
        ValueError: if an argument does not fit the model or is out of range.
    """
    matrix = layer_named(model.matrices, layer)
    read, written = _site_of(model, matrix, "reads"), _site_of(model, matrix, "writes")
    _check_moment(matrix, moment)
    check_answer(model, target)
    if damping < 0:
        raise ValueError(f"damping {damping} must be 0 or more")
    search = _Search(steps, learning_rate, decay, enough)
    # Key and value come from one pass, so that both are of the same state of the model.
    x = as_examples(model, examples).inputs
    cache = model.run(x, read=[read, written])
    # Without damping C is singular if the layer's inputs span fewer dimensions than it has columns.
    c = moment.cpu().double()
    # Relative to the mean diagonal element, so that one damping fits layers of every scale.
    c = c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    words = origin or f"{len(x)} examples answer {answer_name(model, target)}"
    place = _place(read, written, cache[written], at)
    key, center = _mean_key(model, matrix, read, cache[read], place)
    # The least change that maps k* to v*: minimise E|(W' - W) k|^2 subject to W' k* = v*. With a multiplier for the
    # constraint, (W' - W) C = L k*^T, hence W' - W = L (C^-1 k*)^T: of rank one, along the dual C^-1 k* (Meng et al.
    # 2022, equation 2). Only the dual's direction matters, since L is scaled to fit the constraint; at length 1 its
    # numbers say nothing of the units of C.
    dual = torch.linalg.solve(c, center)
    dual = dual / dual.norm()
    made: Associate | LowRank
    if len(matrix.shape) == 4:
        made = _optimised_kernels(model, matrix, read, written, x, target, dual, search)
        reached = _least_probability(model, made, x, target)
    else:
        start = at_least_single(_at(written, cache[written], place)).mean(0)
        value, wanted = _optimised_value(model, written, place, x, target, start, search)
        made = fitting(model, Associate(layer, key, value.cpu().double(), dual, words))
        reached = _least_probability(model, made, x, target)
        # The value was found by replacing the output at one position; the edited weights act at every position.
        if len(x) == 1 and abs(reached - wanted) > 0.05:
            raise ValueError(
                f"layer {layer} does not respond to the key only: the edit gives the target probability {reached:.3g}, "
                f"the value at its position {wanted:.3g} (other positions of the input resemble the key)"
            )
    return replace(made, origin=f"{words}: probability {reached:.3g}")


@dataclass(frozen=True)
class _Search:
    """How the value or the kernels are optimised; see `associate`."""

    steps: int
    learning_rate: float
    decay: float
    enough: float

    def __post_init__(self) -> None:
        for name, fits, valid in (
            ("steps", self.steps >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("decay", self.decay >= 0, "0 or more"),
            ("enough", 0 < self.enough <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)} must be {valid}")


def _check_moment(matrix: WeightMatrix, moment: Tensor) -> None:
    n = matrix.shape[1]
    if moment.shape != (n, n):
        raise ValueError(
            f"moment of shape {tuple(moment.shape)} does not fit {matrix.name}: expected {n} x {n}"
        )


def _site_of(model: HookedModel, matrix: WeightMatrix, side: str) -> Site:
    """The site whose units are exactly a matrix's columns or rows, with nothing in between."""
    ends = matrix.reads if side == "reads" else matrix.writes
    n = matrix.shape[1 if side == "reads" else 0]
    # Nearest to the layer first. A factor other than 1 (batch norm, a sign) means that the site holds something else
    # than what the layer reads or writes.
    for end in sorted(ends, key=lambda e: e.depth):
        if end.site == "input" or not bool((end.factor == 1).all()):
            continue
        site = model.site(end.site)
        next_to = end.depth == 0 and (side == "reads" or site.inner_axis is None)
        if next_to and site.width == n and torch.equal(end.owner, site.row_units):
            return site
    heads = [e.site for e in ends if e.site != "input"]
    what = "reads" if side == "reads" else "writes"
    raise ValueError(
        f"layer {matrix.name}: no site holds exactly what it {what}, unit by unit ({', '.join(heads) or 'none'})"
    )


def _place(
    read: Site, written: Site, output: Tensor, at: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The position at which a layer is read and written, counted from the start."""
    axes = read.position_axes
    if axes != written.position_axes:
        raise ValueError(
            f"sites {read.name} and {written.name} have different position axes, expected the same"
        )
    lengths = written.positions_of(output)
    # The last token is where a model predicts from. In an image it is where the layer is most active, summed over
    # examples and units: an edit where nothing happens could not act.
    if at is None:
        if axes == ("position",):
            at = (-1,)
        elif axes:
            norms = written.by_unit(output).double().square().sum((0, 1))
            index = int(norms.flatten().argmax())
            at = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), norms.shape))
        else:
            at = ()
    if len(at) != len(axes) or any(not -n <= i < n for i, n in zip(at, lengths, strict=True)):
        raise ValueError(
            f"at {at} is not a position of {written.name} ({' x '.join(map(str, lengths))})"
        )
    return tuple(i % n for i, n in zip(at, lengths, strict=True))


def _at(site: Site, value: Tensor, place: tuple[int, ...]) -> Float[Tensor, "example column"]:
    return site.at(value, place).flatten(1).detach()


def _mean_key(
    model: HookedModel, matrix: WeightMatrix, read: Site, value: Tensor, place: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The mean key as the layer sees it, and its channels at the kernel's centre."""
    # A linear layer's key is the input itself, and is its own centre.
    if len(matrix.shape) == 2:
        key = _at(read, value, place).mean(0).cpu().double()
        return key, key
    layer = model.module.get_submodule(matrix.name)
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(
            f"layer {matrix.name} has padding {layer.padding!r} ({layer.padding_mode}): expected zeros of a given width"
        )
    height, width = matrix.shape[2:]
    patches = F.unfold(
        value.detach(), (height, width), layer.dilation, layer.padding, layer.stride
    )  # example x (column kernel) x place
    # `unfold` flattens the output positions row by row: position (y, x) is patch y * (output width) + x.
    across = (
        value.shape[3] + 2 * layer.padding[1] - layer.dilation[1] * (width - 1) - 1
    ) // layer.stride[1] + 1
    y, x = place
    # `unfold` orders a patch's numbers as channel, then row, then column of the kernel, that is as the weights are.
    mean = patches[:, :, y * across + x].mean(0).cpu().double().reshape(matrix.shape[1:])
    return mean, mean[:, height // 2, width // 2]


def _least_probability(
    model: HookedModel, edit: Associate | LowRank, x: Tensor, target: int
) -> float:
    """The lowest probability of the target over the examples, with an edit."""
    with edited(model, [edit]):
        return answers(model, model.logits(x)).softmax(-1)[:, target].min().item()


def _optimised_kernels(
    model: HookedModel,
    matrix: WeightMatrix,
    read: Site,
    written: Site,
    x: Tensor,
    target: int,
    dual: Tensor,
    search: _Search,
) -> LowRank:
    """The change Lambda of a convolution along one direction of its channels that makes the model answer the target.

    Bau et al. 2020, section 3.3. Lambda has one kernel for each output channel, and acts at all positions of the map.
    """
    # W'[o, i, y, x] = W + Lambda[o, y, x] dual[i]. By linearity the change of the output is the convolution of the
    # input's component along `dual` (one channel, recorded by `look`) with Lambda (added by `add`), so that the
    # optimisation never touches the weights.
    layer = model.module.get_submodule(matrix.name)
    assert isinstance(layer, nn.Conv2d)
    padding = layer.padding
    assert isinstance(padding, tuple), "checked with the key"
    n, kernel = matrix.shape[0], matrix.shape[2:]
    seen: dict[str, Tensor] = {}
    direction = dual.float().to(model.device)
    change = torch.zeros(n, 1, *kernel, device=model.device, requires_grad=True)

    def look(value: Tensor) -> Tensor:
        seen["along"] = torch.einsum("bcyx,c->byx", value, direction.to(value))[:, None]
        return value

    def add(value: Tensor) -> Tensor:
        seen["value"] = value.detach()
        along = F.conv2d(
            seen["along"], change.to(value), None, layer.stride, padding, layer.dilation
        )
        return value + along

    model.run(x, edits={read.name: look, written.name: add})
    # The size at which Lambda changes the output by about its own standard deviation.
    scale = float(seen["value"].std() / seen["along"].std().clamp_min(1e-12)) / math.prod(kernel)
    adam = torch.optim.Adam([change], lr=search.learning_rate * scale)
    best, found = -1.0, change.detach().clone()
    for _ in range(search.steps):
        output = model.run(x, edits={read.name: look, written.name: add}, grad=True).output
        log_p = answers(model, main_output(output)).log_softmax(-1)[:, target]
        reached = log_p.exp().min().item()
        if reached > best:
            best, found = reached, change.detach().clone()
        if reached >= search.enough:
            break
        loss = -log_p.mean() + search.decay * (change / scale).square().mean()
        (change.grad,) = torch.autograd.grad(loss, [change])
        adam.step()
    # As left right^T with rank = number of kernel positions: left holds Lambda, and right has `dual` at one kernel
    # position in each column.
    left = found.flatten(1).cpu()
    places = torch.eye(left.shape[1], dtype=torch.float64)
    right = torch.einsum("i,pq->ipq", dual, places).flatten(0, 1)
    return fitting(model, LowRank(matrix.name, left, right))


def _optimised_value(
    model: HookedModel,
    site: Site,
    place: tuple[int, ...],
    x: Tensor,
    target: int,
    start: Tensor,
    search: _Search,
) -> tuple[Tensor, float]:
    """The output at a position with which the model answers the target, and the target's probability with it."""
    # Adam moves each of d entries by about its learning rate, and all together by about sqrt(d) times that: divided by
    # sqrt(d), a step is `learning_rate` times the value's norm.
    scale = start.norm().clamp_min(1e-6)
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.learning_rate * float(scale) / len(start) ** 0.5)

    def put(value: Tensor) -> Tensor:
        made = value.clone()
        view = site.at(made, place)
        view.copy_((start + delta).to(view)[None].expand_as(view))
        return made

    best, found = -1.0, start
    for _ in range(search.steps):
        logits = answers(model, main_output(model.run(x, edits={site.name: put}, grad=True).output))
        log_p = logits.log_softmax(-1)[:, target]
        reached = log_p.exp().min().item()
        if reached > best:
            best, found = reached, (start + delta).detach().clone()
        if reached >= search.enough:
            break
        loss = -log_p.mean() + search.decay * (delta / scale).square().sum()
        (gradient,) = torch.autograd.grad(loss, [delta])
        delta.grad = gradient
        adam.step()
    return found, best
