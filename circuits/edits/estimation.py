"""Edits whose numbers come from data: means, other runs, concepts, another network's units."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.edits.activations import Erase, Patch, Resample, Set, Steer
from circuits.edits.connections import Part, Transplant, parts_of
from circuits.edits.recipes import edited
from circuits.edits.records import compact, fitting
from circuits.examples import Examples, as_examples
from circuits.means import counted_rows, site_mean
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.units import Direction, Site, Unit, Units

log = logging.getLogger(__name__)

Which = Units | Unit | str | Iterable[Unit | str]


def means(
    model: HookedModel,
    units: Which,
    examples: Examples | Tensor | Iterable[Tensor],
    *,
    leave_out: Sequence[int] = (),
    origin: str = "",
) -> Set:
    """The edit that sets units to their means over examples and positions: mean ablation.

    A warning is logged where a few positions dominate the mean.

    Args:
        model: the model.
        units: of one site.
        examples: over what.
        leave_out: positions of texts that do not count (see `site_mean`).
        origin: what the means are, for the record; the examples, and how they were chosen, if not given.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, there is no example, or every position is left out.
    """
    site, own = _own(model, units)
    given = as_examples(model, examples)
    mean = site_mean(model, site, given, leave_out=leave_out)
    if mean.warning:
        log.warning("%s: %s", site.name, mean.warning)
    values = compact(mean.values[list(own.among(site))])
    return fitting(model, Set(own, values=values, origin=origin or f"mean over {given}"))


def patch(
    model: HookedModel,
    units: Which,
    example: Examples | Tensor,
    at: tuple[int, ...] | None = None,
    origin: str = "",
) -> Patch:
    """The edit that puts in what units are on one example: activation patching.

    Args:
        model: the model.
        units: of one site.
        example: one alone: the run to take from.
        at: a position along the site's `position_axes`; the whole map if None.
        origin: which run, for the record.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, or `example` is not one.
    """
    given = as_examples(model, example)
    if len(given) != 1:
        raise ValueError(f"example: {len(given)} examples, expected one to patch from")
    site, own = _own(model, units)
    values = _values(model, site, own, given.inputs, at)
    return fitting(model, Patch(own, values=values, origin=origin or given.names[0], at=at))


def resample(
    model: HookedModel, units: Which, examples: Examples | Tensor, origin: str = ""
) -> Resample:
    """The edit that puts in what units are on other examples, one after the other.

    Args:
        model: the model.
        units: of one site.
        examples: the donors, texts of one length; the edit holds their activations.
        origin: which examples, for the record; these, and how they were chosen, if not given.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, or texts differ in length.
    """
    site, own = _own(model, units)
    given = as_examples(model, examples)
    values = _values(model, site, own, given.inputs, None)
    return fitting(model, Resample(own, values=values, origin=origin or str(given)))


def steer(direction: Direction, amount: float, at: tuple[int, ...] | None = None) -> Steer:
    """The edit that adds a direction times an amount."""
    return Steer(direction.site, compact(direction.vector), amount=amount, at=at)


def project_out(direction: Direction, at: tuple[int, ...] | None = None) -> Erase:
    """The edit that projects a direction out of what its site holds."""
    unit = direction.vector / direction.vector.norm()
    return Erase(direction.site, compact(unit[:, None]), origin=_clipped(str(direction)), at=at)


def leace(
    model: HookedModel,
    site: str | Site,
    examples: Examples | Tensor | Iterable[Tensor],
    labels: Sequence[int] | None = None,
    origin: str = "",
) -> Erase:
    """The edit after which no linear classifier can tell labels apart, and which changes least (LEACE).

    x' = x - W^+ P W (x - mean), with W = Cov(x)^-1/2 and P the projection on the columns of W Cov(x, z), z the
    labels as indicators (Belrose et al. 2023, theorem 4.3). Every position of an example has its label.

    Args:
        model: the model.
        site: where.
        examples: as a source has them, or as the model takes them.
        labels: the class of each, at least two of them; the examples' own if not given.
        origin: what the concept is.

    Raises:
        ValueError: if there are no labels, their number is not that of the examples, or they are all the same.
    """
    place, given = model.site(site), as_examples(model, examples, labels)
    if place.inner_axis is not None:
        raise ValueError(f"site {place.name}: heads hold vectors, expected another site")
    if given.labels is None:
        raise ValueError("labels: there are none, expected the class of each example")
    own = torch.tensor(given.labels)
    kinds = own.unique()
    if len(kinds) < 2:
        raise ValueError("labels are all the same: expected at least two classes")
    n = 0
    x_sum, z_sum, xx, xz = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for part in given.batches():
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        x = counted_rows(place, value, part.mask).cpu().double()
        each = torch.full((len(part),), len(x) // len(part))
        if part.mask is not None:
            each = part.mask.sum(1).cpu() ** len(place.position_axes)
        z = (own[list(part.which), None] == kinds).double().repeat_interleave(each, 0)
        n += len(x)
        x_sum, z_sum, xx, xz = x_sum + x.sum(0), z_sum + z.sum(0), xx + x.T @ x, xz + x.T @ z
    mean, shares = x_sum / n, z_sum / n
    cov, cross = xx / n - torch.outer(mean, mean), xz / n - torch.outer(mean, shares)
    return fitting(model, _leace(place.name, mean, cov, cross, shares, origin))


def leace_of(
    site: str, x: Float[Tensor, "row unit"], labels: Int[Tensor, " row"], origin: str = ""
) -> Erase:
    """`leace` from activations and their labels."""
    x = x.double()
    mean = x.mean(0)
    z = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    shares = z.mean(0)
    cov, cross = (
        (x - mean).T @ (x - mean) / len(x),
        (x - mean).T @ (z - shares) / len(x),
    )
    return _leace(site, mean, cov, cross, shares, origin)


def _leace(
    site: str, mean: Tensor, cov: Tensor, cross: Tensor, shares: Tensor, origin: str
) -> Erase:
    """From the covariance of activations, and theirs with the labels' indicators."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values.max() * len(values) * 1e-10
    root = values[kept].sqrt()
    whiten = vectors[:, kept] / root @ vectors[:, kept].T
    unwhiten = vectors[:, kept] * root @ vectors[:, kept].T
    u, s, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)
    # as large as correlations are: against the spread of the indicators
    u = u[:, s > 1e-6 * (shares * (1 - shares)).sum().sqrt()]
    if not u.shape[1]:
        raise ValueError(f"labels do not go with what {site} holds: there is nothing to erase")
    return Erase(site, unwhiten @ u, whiten @ u, mean, origin or "LEACE")


def transplant(
    model: HookedModel,
    into: Which,
    donor: HookedModel,
    units: Which,
    source: Mapping[Unit, Unit],
    examples: Examples | Tensor | Iterable[Tensor] | None = None,
    layer: str = "",
    donor_layer: str = "",
) -> Transplant:
    """The edit that replaces units by another network's, with a gain and an offset that are fitted.

    Args:
        model: the host.
        into: the units to be replaced, of one site.
        donor: the other network.
        units: its units, one for each, in the same order.
        source: which unit of the donor each unit of the host stands for, host -> donor: what the host's layer
            reads to what the donor's reads. Weights from others are left out.
        examples: gain and offset give each new unit the mean and the standard deviation, over these and their
            positions, that the old one had before its nonlinearity. As they are in the donor without any.
        layer: the host's, where there are several.
        donor_layer: the donor's.

    Raises:
        KeyError, ValueError: if units do not exist or do not match, or kernels differ in size.
    """
    _, own = _own(model, into)
    _, theirs = _own(donor, units)
    hosts, donors = Units.of(list(source)), list(source.values())
    wanted = Units.of(list(dict.fromkeys(donors)))
    there = parts_of(donor.matrices, theirs, wanted, donor_layer)
    here = parts_of(model.matrices, own, hosts, layer)
    if len(there) != 1 or len(here) != 1:
        raise ValueError("units to be transplanted must be of one layer each: name it")
    theirs_in, ours_in = there[0].matrix, here[0].matrix
    if theirs_in.shape[2:] != ours_in.shape[2:]:
        raise ValueError(
            f"kernels differ: {theirs_in.name} has {theirs_in.shape[2:]}, {ours_in.name} has {ours_in.shape[2:]}"
        )
    if len(there[0].rows) != len(here[0].rows):
        raise ValueError(
            f"units: {len(there[0].rows)} of the donor for {len(here[0].rows)} of the host"
        )
    given = None if examples is None else as_examples(model, examples)
    parameters = donor.parameters
    between = there[0].row_factor / here[0].row_factor
    if not bool((between == 1).all()) and given is None:
        raise ValueError(
            "examples: something scales the units behind the layer (batch norm): give some to fit a gain on"
        )
    weights = _acting(there[0], parameters[theirs_in.weight].data, wanted, donors, here[0], hosts)
    biases = None if theirs_in.bias is None else parameters[theirs_in.bias].data[there[0].rows]
    biases = None if biases is None else biases.cpu() * between
    if ours_in.bias is None and biases is not None and bool(biases.any()):
        raise ValueError(f"layer {ours_in.name} has no bias to hold the donor's")
    made = fitting(model, Transplant(
        own, hosts, ours_in.name, weights=compact(weights),
        biases=None if biases is None or ours_in.bias is None else compact(biases),
        donor=f"{theirs} of {donor.name} ({donor.intact_hash[:16]})",
    ))  # fmt: skip
    if given is None:
        return made
    end = next((e for e in ours_in.writes if e.depth == 0 and e.site != INPUT), None)
    if end is None:
        raise ValueError(
            f"layer {ours_in.name}: no site holds what it puts out, so no gain can be fitted"
        )
    which = end.owner[here[0].rows].tolist()
    before = _moments(model, end.site, which, given)
    with edited(model, [made]):
        after = _moments(model, end.site, which, given)
    dead = [i for i, spread in enumerate(after[1].tolist()) if spread <= 1e-6 * before[1][i].item()]
    if dead:
        raise ValueError(
            f"unit {_i_th(theirs, dead[0])} of the donor does not respond to the examples: no gain can be fitted"
        )
    gain = before[1] / after[1]
    if ours_in.bias is None:  # the mean stays what the weights make it
        return replace(made, gain=compact(gain))
    return replace(made, gain=compact(gain), offset=compact(before[0] - gain * after[0]))


def _i_th(units: Units, i: int) -> str:
    """The name of the i-th of some units."""
    return f"{units.site}:{i if units.indices is None else units.indices[i]}"


def _acting(
    there: Part, parameter: Tensor, wanted: Units, donors: Sequence[Unit], here: Part, hosts: Units
) -> Tensor:
    """The donor's weights as they act between its sites, in terms of the host's layer."""
    block = there.effective(there.matrix.block(parameter, there.rows, there.columns)).cpu().double()
    read = there.matrix.end(wanted.site, "reads")
    assert read is not None
    owner = read.owner[there.columns].tolist()
    columns = [j for unit in donors for j, own in enumerate(owner) if own == unit.index]
    if len(columns) != len(here.columns):
        raise ValueError(
            f"source: {len(here.columns)} inputs of the host for {len(columns)} of the donor"
        )
    factor = here.row_factor[:, None].double() * here.column_factor[None, :].double()
    if not bool(factor.all()):
        raise ValueError(f"units of {hosts.site} have no effect (a batch norm's weight is 0)")
    block = block[:, columns]
    return block / factor.reshape(*factor.shape, *(1,) * (block.ndim - 2))


def _moments(
    model: HookedModel, site: str, which: list[int], examples: Examples
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of units over examples and positions."""
    place, rows = model.site(site), []
    for part in examples.batches():
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        rows.append(counted_rows(place, value, part.mask)[:, which].double())
    joined = torch.cat(rows)
    return joined.mean(0), joined.std(0)


def _own(model: HookedModel, units: Which) -> tuple[Site, Units]:
    given = Units.of(units)
    site = model.site(given.site)
    given.among(site)
    return site, Units(site.name, given.indices)


def _values(
    model: HookedModel, site: Site, units: Units, x: Tensor, at: tuple[int, ...] | None
) -> Tensor:
    """What units are on examples: example x unit x the site's other axes."""
    value = model.run(x, read=[site], until=site)[site]
    view = site.by_unit(value) if at is None else site.at(value, at)
    return view[:, list(units.among(site))].detach().cpu()


def _clipped(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}…"
