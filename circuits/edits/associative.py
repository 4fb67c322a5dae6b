"""Rank-one edits: a layer as a linear associative memory, one key and value stored in it.

The key is what the layer reads at a place, the value what it should put out there, found by optimisation so
that the model answers as wanted (Meng et al. 2022; for convolutions Bau et al. 2020). The record holds the
numbers, so that replaying it needs no optimisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
from circuits.units import Site


def second_moment(
    model: HookedModel, layer: str, data: ActivationStore | Examples | Tensor | Iterable[Tensor]
) -> Float[Tensor, "column column"]:
    """C, the mean of k k^T over everything that a layer reads.

    Args:
        model: the model.
        layer: which.
        data: a store that keeps the covariance of the site that the layer reads, or examples.

    Raises:
        KeyError: if there is no such layer, or the store does not keep that covariance.
        ValueError: if there is no example.
    """
    read = read_site(model, layer)
    if isinstance(data, ActivationStore):
        theirs = data.provenance.model_hash
        if theirs != model.intact_hash:
            raise ValueError(f"data: a store of model {theirs[:16]}, not {model.intact_hash[:16]}")
        kept = data.covariance(read.name)
        mean = torch.from_numpy(kept.mean).double().reshape(-1)
        return torch.from_numpy(kept.covariance).double() + mean[:, None] * mean[None, :]
    total, n = torch.zeros(()), 0
    for part in as_examples(model, data).batches():
        value = model.run(part.inputs, mask=part.mask, read=[read], until=read)[read]
        rows = counted_rows(read, value, part.mask).flatten(1).cpu().double()
        total = total + rows.T @ rows
        n += len(rows)
    return total / n


def read_site(model: HookedModel, layer: str) -> Site:
    """The site that holds just what a layer reads.

    Raises:
        KeyError: if there is no such layer.
        ValueError: if there is no such site.
    """
    return _site_of(model, layer_named(model.matrices, layer), "reads")


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
    """The rank-one edit after which a model answers examples with a target.

    Of a linear layer the closed form of `Associate`. A convolution is changed along one direction of its channels,
    C^-1 k for the key k at `at`, by kernels that are optimised for all places of the examples together (Bau et
    al. 2020, section 3.3): a `LowRank` edit. The record's `origin` says what probability the target then has.

    Args:
        model: the model.
        layer: where to store it.
        examples: those whose answer is to change: prompts that say one thing, or images; the key is the mean over
            them.
        target: the token (after the last) or class that they shall get.
        moment: C of the layer's inputs, see `second_moment`.
        at: where the layer is read: the position of a token (the last if None), or (y, x) of a map (the place
            where the layer puts out most if None).
        steps: of the optimisation, at most.
        learning_rate: of Adam, in units of the value's norm over the root of its length.
        decay: weighs the squared change, over the squared norm of the value.
        enough: the probability at which to stop.
        damping: added to C's diagonal, as a share of its mean.
        origin: for the record.

    Raises:
        KeyError: if the layer is unknown.
        ValueError: if something does not fit.
    """
    matrix = layer_named(model.matrices, layer)
    read, written = _site_of(model, matrix, "reads"), _site_of(model, matrix, "writes")
    if moment.shape != (matrix.shape[1], matrix.shape[1]):
        raise ValueError(
            f"moment of shape {tuple(moment.shape)} does not fit {layer}: expected "
            f"{matrix.shape[1]} x {matrix.shape[1]}"
        )
    check_answer(model, target)
    if steps < 1 or not 0 < enough <= 1 or learning_rate <= 0 or decay < 0 or damping < 0:
        raise ValueError(
            f"steps {steps}, enough {enough}, learning_rate {learning_rate}, decay {decay}, damping {damping}: "
            "expected steps of at least 1, enough in (0, 1], a positive rate, and the others 0 or more"
        )
    x = as_examples(model, examples).inputs
    cache = model.run(x, read=[read, written])
    c = moment.cpu().double()
    c = c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    words = origin or f"{len(x)} examples answer {answer_name(model, target)}"
    place = _place(read, written, cache[written], at)
    key, center = _key(model, matrix, read, cache[read], place)
    dual = torch.linalg.solve(c, center)
    dual = dual / dual.norm()
    if len(matrix.shape) == 4:
        rule = _rule(
            model, matrix, read, written, x, target, dual, steps, learning_rate, decay, enough
        )
        reached = _reached(model, rule, x, target)
        return replace(rule, origin=f"{words}: probability {reached:.3g}")
    start = _at(written, cache[written], place).mean(0)
    value, wanted = _value(
        model, written, place, x, target, start, steps, learning_rate, decay, enough
    )
    made = fitting(model, Associate(layer, key, value.cpu().double(), dual, words))
    reached = _reached(model, made, x, target)
    if len(x) == 1 and abs(reached - wanted) > 0.05:
        raise ValueError(
            f"layer {layer} does not answer the key alone: the edit gives the target probability {reached:.3g}, "
            f"the value in its place {wanted:.3g} (other places of the input have much of the key)"
        )
    return replace(made, origin=f"{words}: probability {reached:.3g}")


def _site_of(model: HookedModel, matrix: WeightMatrix, side: str) -> Site:
    """The site whose units are, one by one and with nothing between, a matrix's columns or rows."""
    ends = matrix.reads if side == "reads" else matrix.writes
    n = matrix.shape[1 if side == "reads" else 0]
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
        f"layer {matrix.name}: no site holds just what it {what}, unit by unit ({', '.join(heads) or 'none'})"
    )


def _place(
    read: Site, written: Site, output: Tensor, at: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Where a layer is read and written, counted from the front."""
    axes = read.position_axes
    if axes != written.position_axes:
        raise ValueError(f"sites {read.name} and {written.name} have other positions")
    lengths = written.positions_of(output)
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


def _key(
    model: HookedModel, matrix: WeightMatrix, read: Site, value: Tensor, place: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The mean key, as the layer sees it, and what it is in the channels at its middle."""
    if len(matrix.shape) == 2:
        key = _at(read, value, place).mean(0).cpu().double()
        return key, key
    layer = model.module.get_submodule(matrix.name)
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"layer {matrix.name} pads in a way that is not built: expected zeros")
    height, width = matrix.shape[2:]
    patches = F.unfold(
        value.detach(), (height, width), layer.dilation, layer.padding, layer.stride
    )  # example x (column kernel) x place
    across = (
        value.shape[3] + 2 * layer.padding[1] - layer.dilation[1] * (width - 1) - 1
    ) // layer.stride[1] + 1
    y, x = place
    mean = patches[:, :, y * across + x].mean(0).cpu().double().reshape(matrix.shape[1:])
    return mean, mean[:, height // 2, width // 2]


def _reached(model: HookedModel, edit: Associate | LowRank, x: Tensor, target: int) -> float:
    """The least probability of the target over the examples, with an edit."""
    with edited(model, [edit]):
        return answers(model, model.logits(x)).softmax(-1)[:, target].min().item()


def _rule(
    model: HookedModel,
    matrix: WeightMatrix,
    read: Site,
    written: Site,
    x: Tensor,
    target: int,
    dual: Tensor,
    steps: int,
    learning_rate: float,
    decay: float,
    enough: float,
) -> LowRank:
    """Bau et al. 2020, section 3.3: the change Lambda of a convolution along one direction of its channels, at
    every place of the kernel, for which the model answers with the target; all places of the map count.
    """
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
    scale = float(seen["value"].std() / seen["along"].std().clamp_min(1e-12)) / math.prod(kernel)
    adam = torch.optim.Adam([change], lr=learning_rate * scale)
    best, found = -1.0, change.detach().clone()
    for _ in range(steps):
        output = model.run(x, edits={read.name: look, written.name: add}, grad=True).output
        log_p = answers(model, main_output(output)).log_softmax(-1)[:, target]
        reached = log_p.exp().min().item()
        if reached > best:
            best, found = reached, change.detach().clone()
        if reached >= enough:
            break
        loss = -log_p.mean() + decay * (change / scale).square().mean()
        (change.grad,) = torch.autograd.grad(loss, [change])
        adam.step()
    left = found.flatten(1).cpu()
    places = torch.eye(left.shape[1], dtype=torch.float64)
    right = torch.einsum("i,pq->ipq", dual, places).flatten(0, 1)
    return fitting(model, LowRank(matrix.name, left, right))


def _value(
    model: HookedModel,
    site: Site,
    place: tuple[int, ...],
    x: Tensor,
    target: int,
    start: Tensor,
    steps: int,
    learning_rate: float,
    decay: float,
    enough: float,
) -> tuple[Tensor, float]:
    """What the site should hold at the place so that the model answers with the target, and its probability then."""
    scale = start.norm().clamp_min(1e-6)
    delta = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=learning_rate * float(scale) / len(start) ** 0.5)

    def put(value: Tensor) -> Tensor:
        made = value.clone()
        view = site.at(made, place)
        view.copy_((start + delta).to(view)[None].expand_as(view))
        return made

    best, found = -1.0, start
    for _ in range(steps):
        logits = answers(model, main_output(model.run(x, edits={site.name: put}, grad=True).output))
        log_p = logits.log_softmax(-1)[:, target]
        reached = log_p.exp().min().item()
        if reached > best:
            best, found = reached, (start + delta).detach().clone()
        if reached >= enough:
            break
        loss = -log_p.mean() + decay * (delta / scale).square().sum()
        (gradient,) = torch.autograd.grad(loss, [delta])
        delta.grad = gradient
        adam.step()
    return found, best
