"""Edits whose numbers are estimated from data: means, other runs, concepts, another network's units."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.checks import clipped
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

    A warning is logged if a few positions dominate the mean.

    Args:
        model: the model.
        units: units of one site.
        examples: the examples to take means over.
        leave_out: positions of texts that do not count (see `site_mean`).
        origin: what the means are, for the record; by default the choice of examples in words.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, there are no examples, or every position is left out.
    """
    site, own = _checked_units(model, units)
    given = as_examples(model, examples)
    mean = site_mean(model, site, given, leave_out=leave_out)
    if mean.warning:
        log.warning("%s: %s", site.name, mean.warning)
    # float32 where that is exact: half the size in a recipe, and the same numbers.
    values = compact(mean.values[list(own.among(site))])
    return fitting(model, Set(own, values=values, origin=origin or f"mean over {given}"))


def patch(
    model: HookedModel,
    units: Which,
    example: Examples | Tensor,
    at: tuple[int, ...] | None = None,
    origin: str = "",
) -> Patch:
    """The edit that replaces units' activations by those on one example: activation patching.

    Args:
        model: the model.
        units: units of one site.
        example: the single example to take activations from.
        at: a position along the site's `position_axes`; all positions if None.
        origin: which run this is, for the record.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, or there is not exactly one example.
    """
    given = as_examples(model, example)
    if len(given) != 1:
        raise ValueError(f"example: {len(given)} examples, expected one to patch from")
    site, own = _checked_units(model, units)
    values = _recorded(model, site, own, given.inputs, at)
    return fitting(model, Patch(own, values=values, origin=origin or given.names[0], at=at))


def resample(
    model: HookedModel, units: Which, examples: Examples | Tensor, origin: str = ""
) -> Resample:
    """The edit that replaces units' activations by those on other examples, in turn.

    Args:
        model: the model.
        units: units of one site.
        examples: the donors, texts of equal length; the edit holds their activations.
        origin: which examples these are, for the record; by default their choice in words.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if a unit does not exist, or texts differ in length.
    """
    site, own = _checked_units(model, units)
    given = as_examples(model, examples)
    values = _recorded(model, site, own, given.inputs, None)
    return fitting(model, Resample(own, values=values, origin=origin or str(given)))


def steer(direction: Direction, amount: float, at: tuple[int, ...] | None = None) -> Steer:
    """The edit that adds a multiple of a direction."""
    return Steer(direction.site, compact(direction.vector), amount=amount, at=at)


def project_out(direction: Direction, at: tuple[int, ...] | None = None) -> Erase:
    """The edit that projects a direction out of its site's activations."""
    unit = direction.vector / direction.vector.norm()
    return Erase(direction.site, compact(unit[:, None]), origin=clipped(str(direction), 200), at=at)


def leace(
    model: HookedModel,
    site: str | Site,
    examples: Examples | Tensor | Iterable[Tensor],
    labels: Sequence[int] | None = None,
    origin: str = "",
) -> Erase:
    """The least change of a site's activations after which no linear classifier can predict labels from them (LEACE).

    x' = x - W^+ P W (x - mean), with W = Cov(x)^-1/2 and P the projection onto the columns of W Cov(x, z), where z are
    the labels as indicators (Belrose et al. 2023, theorem 4.3). Every position of an example has the example's label.

    Args:
        model: the model.
        site: the site.
        examples: the examples.
        labels: the class of each example, at least two classes; the examples' own labels if not given.
        origin: what the concept is, for the record.

    Raises:
        ValueError: if there are no labels, there is not one for each example, or they are all the same.
    """
    place, given = model.site(site), as_examples(model, examples, labels)
    if place.inner_axis is not None:
        raise ValueError(
            f"site {place.name}: its units are heads, whose activations are vectors; expected another site"
        )
    if given.labels is None:
        raise ValueError("labels: there are none, expected the class of each example")
    own = torch.tensor(given.labels)
    kinds = own.unique()
    if len(kinds) < 2:
        raise ValueError("labels are all the same: expected at least two classes")
    # One pass keeps only sums: Cov(x) = E[x x^T] - E[x] E[x]^T and Cov(x, z) = E[x z^T] - E[x] E[z]^T, in float64.
    n = 0
    x_sum, z_sum, xx, xz = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    for part in given.batches():
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        x = counted_rows(place, value, part.mask).cpu().double()
        # A site with positions gives several rows an example, all with the example's label. With a mask these are its
        # counted positions; a site with two position axes (query and key) has their square.
        each = torch.full((len(part),), len(x) // len(part))
        if part.mask is not None:
            each = part.mask.sum(1).cpu() ** len(place.position_axes)
        # One column for each class, 1 where the row is of it: the columns add up to 1, so that the last is redundant,
        # which the singular values below take care of.
        z = (own[list(part.which), None] == kinds).double().repeat_interleave(each, 0)
        n += len(x)
        x_sum, z_sum, xx, xz = x_sum + x.sum(0), z_sum + z.sum(0), xx + x.T @ x, xz + x.T @ z
    mean, shares = x_sum / n, z_sum / n
    cov, cross = xx / n - torch.outer(mean, mean), xz / n - torch.outer(mean, shares)
    return fitting(model, leace_projection(place.name, mean, cov, cross, shares, origin))


def leace_projection(
    site: str,
    mean: Float[Tensor, " unit"],
    cov: Float[Tensor, "unit unit"],
    cross: Float[Tensor, "unit label"],
    shares: Float[Tensor, " label"],
    origin: str = "",
) -> Erase:
    """`leace` from the moments of activations x and the labels' indicators z.

    Args:
        site: the site's name.
        mean: the mean of x.
        cov: Cov(x).
        cross: Cov(x, z).
        shares: the mean of z.
        origin: what the concept is, for the record.

    Raises:
        ValueError: if x and z are uncorrelated.
    """
    # Directions in which x does not vary have no inverse square root; W acts on the rest, and W^+ undoes it.
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values.max() * len(values) * 1e-10
    root = values[kept].sqrt()
    whiten = vectors[:, kept] / root @ vectors[:, kept].T
    unwhiten = vectors[:, kept] * root @ vectors[:, kept].T
    # Belrose et al. 2023: P = W^+ U U^T W with W = Cov(x)^(-1/2) and U a basis of the columns of W Cov(x, z). In
    # whitened coordinates the classes' mean differences span U and nothing else correlates with z; removing exactly
    # this span makes Cov(Px, z) = 0, and orthogonal in whitened coordinates means least in the sense of the data's own
    # spread.
    u, s, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)
    # The singular values of W Cov(x, z) are correlations times the spread of z, so they are compared with that spread.
    u = u[:, s > 1e-6 * (shares * (1 - shares)).sum().sqrt()]
    if not u.shape[1]:
        raise ValueError(
            f"labels are uncorrelated with the activations of {site}: there is nothing to erase"
        )
    # As basis W^+ U and dual W U, for which x - basis dual^T (x - mean) is the formula above (W is symmetric).
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
    """The edit that replaces units by another network's units, with a fitted gain and offset.

    Args:
        model: the host network.
        into: the host's units to replace, all of one site.
        donor: the other network.
        units: the donor's units, one for each replaced unit, in the same order.
        source: the inputs: for each unit that the host's layer reads, the matching unit that the donor's layer reads.
            Weights from any other units are left out.
        examples: gain and offset are chosen so that each new unit has the mean and standard deviation that the old one
            had on these examples, before its nonlinearity. Without examples the weights stay as they are in the donor.
        layer: the host's layer, if several write the units.
        donor_layer: the donor's layer.

    Raises:
        KeyError: if a site or layer is unknown.
        ValueError: if units do not exist or do not match, kernels differ in size, or a gain cannot be fitted, because a
            unit of either network is the same on all examples.
    """
    _, own = _checked_units(model, into)
    _, theirs = _checked_units(donor, units)
    hosts, donors = Units.of(list(source)), list(source.values())
    wanted = Units.of(list(dict.fromkeys(donors)))
    there = parts_of(donor.matrices, theirs, wanted, donor_layer)
    here = parts_of(model.matrices, own, hosts, layer)
    if len(there) != 1 or len(here) != 1:
        raise ValueError(
            f"units are written by {len(there)} layers of the donor and {len(here)} of the host: expected one each, "
            "named by layer and donor_layer"
        )
    _check_match(there[0], here[0])
    theirs_in, ours_in = there[0].matrix, here[0].matrix
    given = None if examples is None else as_examples(model, examples)
    parameters = donor.parameters
    # A row's effective weight is its parameter times its factor; the donor's factor over the host's turns the donor's
    # numbers into such as have the same effect here.
    between = there[0].row_factor / here[0].row_factor
    if not bool((between == 1).all()) and given is None:
        raise ValueError(
            "examples: a batch norm scales the units after the layer, so examples are needed to fit a gain"
        )
    weights = _donor_weights(
        there[0], parameters[theirs_in.weight].data, wanted, donors, here[0], hosts
    )
    biases = None
    if theirs_in.bias is not None:
        biases = parameters[theirs_in.bias].data
        biases = biases[theirs_in.bias_index(biases, there[0].rows)]
    # The bias is added where the row's sum is, so that it takes the same factor as the row.
    biases = None if biases is None else biases.cpu() * between
    if ours_in.bias is None and biases is not None and bool(biases.any()):
        raise ValueError(f"layer {ours_in.name} has no bias that could hold the donor's biases")
    made = fitting(model, Transplant(
        own, hosts, ours_in.name, weights=compact(weights),
        biases=None if biases is None or ours_in.bias is None else compact(biases),
        donor=f"{theirs} of {donor.name} ({donor.intact_hash[:16]})",
    ))  # fmt: skip
    return made if given is None else _with_gain(model, made, here[0], theirs, given)


def _check_match(there: Part, here: Part) -> None:
    """Raise ValueError if the donor's and the host's units cannot be exchanged."""
    theirs, ours = there.matrix, here.matrix
    if theirs.shape[2:] != ours.shape[2:]:
        raise ValueError(
            f"kernels differ: {theirs.name} has {theirs.shape[2:]}, {ours.name} has {ours.shape[2:]}"
        )
    if len(there.rows) != len(here.rows):
        raise ValueError(
            f"units: {len(there.rows)} of the donor for {len(here.rows)} of the host, expected one each"
        )


def _with_gain(
    model: HookedModel, made: Transplant, here: Part, theirs: Units, examples: Examples
) -> Transplant:
    """The transplant with the gain and offset that give each unit its old mean and standard deviation."""
    ours = here.matrix
    # depth 0: next to the layer, before any batch norm or nonlinearity, where gain and offset act as they are written.
    end = next((e for e in ours.writes if e.depth == 0 and e.site != INPUT), None)
    if end is None:
        raise ValueError(f"layer {ours.name}: no site holds its output, so no gain can be fitted")
    which = end.owner[here.rows].tolist()
    before = _mean_and_spread(model, end.site, which, examples)
    with edited(model, [made]):
        after = _mean_and_spread(model, end.site, which, examples)
    # A millionth of the old spread is rounding; a gain of a million would amplify nothing but that.
    dead = [i for i, spread in enumerate(after[1].tolist()) if spread <= 1e-6 * before[1][i].item()]
    if dead:
        raise ValueError(
            f"unit {_i_th(theirs, dead[0])} of the donor does not respond to the examples: no gain can be fitted"
        )
    still = [i for i, spread in enumerate(before[1].tolist()) if spread == 0]
    if still:
        raise ValueError(
            f"unit {end.site}:{which[still[0]]} is the same on all examples: no gain can be fitted to it"
        )
    # gain * after + offset has the old moments if gain = old std / new std and offset = old mean - gain * new mean.
    gain = before[1] / after[1]
    if ours.bias is None:  # no bias can hold an offset: the mean is then what the weights give
        return replace(made, gain=compact(gain))
    return replace(made, gain=compact(gain), offset=compact(before[0] - gain * after[0]))


def _i_th(units: Units, i: int) -> str:
    """The name of the i-th of some units."""
    return f"{units.site}:{i if units.indices is None else units.indices[i]}"


def _donor_weights(
    there: Part, parameter: Tensor, wanted: Units, donors: Sequence[Unit], here: Part, hosts: Units
) -> Tensor:
    """The donor's weights as they act between its sites, converted to the host's layer."""
    # Effective weight = weight x factors between layer and sites, in both networks: the donor's effective weights are
    # divided by the host's factors.
    block = there.effective(there.matrix.block(parameter, there.rows, there.columns)).cpu().double()
    read = there.matrix.end(wanted.site, "reads")
    assert read is not None
    owner = read.owner[there.columns].tolist()
    # Ordered by the donor's units as the host's inputs are ordered, so that column i reads the unit that takes the
    # place of the one that the host's column i read. A donor unit may be used for several.
    columns = [j for unit in donors for j, own in enumerate(owner) if own == unit.index]
    if len(columns) != len(here.columns):
        raise ValueError(
            f"source: {len(here.columns)} inputs of the host for {len(columns)} of the donor, expected one each"
        )
    factor = here.row_factor[:, None].double() * here.column_factor[None, :].double()
    if not bool(factor.all()):
        raise ValueError(f"units of {hosts.site} have no effect (a batch norm's weight is 0)")
    block = block[:, columns]
    return block / factor.reshape(*factor.shape, *(1,) * (block.ndim - 2))


def _mean_and_spread(
    model: HookedModel, site: str, which: list[int], examples: Examples
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of units over examples and positions."""
    place, rows = model.site(site), []
    for part in examples.batches():
        value = model.run(part.inputs, mask=part.mask, read=[place], until=place)[place]
        # In float64: spread is a small difference where a unit is nearly constant.
        rows.append(counted_rows(place, value, part.mask)[:, which].double())
    joined = torch.cat(rows)
    return joined.mean(0), joined.std(0)


def _checked_units(model: HookedModel, units: Which) -> tuple[Site, Units]:
    given = Units.of(units)
    site = model.site(given.site)
    given.among(site)
    return site, Units(site.name, given.indices)


def _recorded(
    model: HookedModel, site: Site, units: Units, x: Tensor, at: tuple[int, ...] | None
) -> Tensor:
    """Units' activations on examples: example x unit x the site's other axes."""
    value = model.run(x, read=[site], until=site)[site]
    view = site.by_unit(value) if at is None else site.at(value, at)
    return view[:, list(units.among(site))].detach().cpu()
