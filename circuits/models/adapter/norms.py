"""What a normalisation does, measured by feeding it vectors.

A normalisation of a residual stream is x -> factor(x) * gain * (x - centre(x)) + bias, where the factor is one number
for each vector and the centre is its mean (LayerNorm) or nothing (RMSNorm). How its weights are stored differs between
families (Gemma stores the gain less one), so gain and bias are found by experiment and checked on random vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

_TOLERANCE = 1e-3
"""How far a normalisation may be from the form that is assumed, relative to its largest output."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation: x -> factor(x) * gain * (x - centre(x)) + bias. All numbers are float64.

    Attributes:
        module: what was measured.
        gain: what each dimension is multiplied by, for a factor of one over the root mean square of x - centre(x).
        bias: what is added to each dimension.
        centred: whether the centre is the mean of x (LayerNorm) or zero (RMSNorm).
        divides: whether there is a factor at all; without it the factor is 1.
    """

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    divides: bool

    def linear(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """The linear part, gain * (x - centre(x)), without factor and bias."""
        return self._centre(x.double()) * self.gain

    def adjoint(self, read: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What reads from x as `read` does from the linear part: adjoint(r) . x = r . linear(x).

        Subtracting the mean of x is the same as subtracting that of what reads it.
        """
        return self._centre(read.double() * self.gain)

    def factor(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes 1"]:
        """The factor at some vectors."""
        rows = x.double().reshape(-1, len(self.gain))
        if not self.divides:
            return rows.new_ones(*x.shape[:-1], 1)
        # A vector of zeros has no factor to measure, only that of the epsilon, which a tiny vector shows as well.
        zero = ~self.linear(rows).any(1, keepdim=True)
        rows = torch.where(zero, 1e-6 * _probe(rows), rows)
        linear = self.linear(rows)
        made = _called(self.module, rows) - self.bias
        size = linear.square().sum(1, keepdim=True)
        factor = (made * linear).sum(1, keepdim=True) / torch.where(size == 0, 1.0, size)
        return factor.reshape(*x.shape[:-1], 1)

    def held(
        self, x: Float[Tensor, "*axes d_model"], at: Float[Tensor, "*#axes d_model"]
    ) -> Float[Tensor, "*axes d_model"]:
        """The normalisation of x without its bias, with the factor held at that of other vectors."""
        return self.linear(x) * self.factor(at)

    def tangent(self, at: Float[Tensor, "*axes d_model"]) -> Tangent:
        """How the output changes with what is normalised, to first order, at some vectors."""
        if not self.divides:
            return Tangent(self, self.factor(at).to(at), None)
        z, eps = self._centre(at), self._epsilon
        factor = (
            self.factor(at) if eps is None else (z.square().mean(-1, keepdim=True) + eps).rsqrt()
        )
        return Tangent(self, factor.to(at), z)

    @cached_property
    def _epsilon(self) -> float | None:
        """What is added to the mean square; None if the factor is not (mean(z^2) + eps)^(-1/2) at any size."""
        rows = self._centre(_probe(self.gain.new_zeros(7, len(self.gain))))
        rows = rows * torch.logspace(-4, 2, 7, dtype=rows.dtype, device=rows.device)[:, None]
        squares, factors = rows.square().mean(-1), self.factor(rows)[:, 0]
        eps = float(1 / factors[0] ** 2 - squares[0])
        off = (factors * (squares + eps).sqrt() - 1).abs().max()
        return eps if eps >= 0 and off < 1e-4 else None

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True, eq=False)
class Tangent:
    """A normalisation's derivative at some vectors x, in their precision.

    With z = x - centre(x), the factor f = (mean(z^2) + eps)^(-1/2) has the derivative -f^3 z / d_model, whatever eps
    is; so a change d, centred, becomes gain * (f d - f^3 z (z . d) / d_model).

    Attributes:
        norm: the normalisation.
        factor: f.
        z: x - centre(x); None if there is no factor.
    """

    norm: Norm
    factor: Float[Tensor, "*axes 1"]
    z: Float[Tensor, "*axes d_model"] | None

    def pulled(
        self, gradient: Float[Tensor, "*more d_model"], held: bool = False
    ) -> Float[Tensor, "*more d_model"]:
        """The gradient at what is normalised, from that at the output.

        Args:
            gradient: at the output; axes of the vectors may have length 1 where it has more.
            held: leave out that the factor depends on x.
        """
        return self.norm._centre(self._symmetric(gradient * self.norm.gain.to(gradient), held))

    def pulled_through(
        self,
        gradient: Float[Tensor, "example position part inner"],
        matrices: Float[Tensor, "part d_model inner"],
        held: bool = False,
    ) -> Float[Tensor, "example part position d_model"]:
        """`pulled` of the gradients at products of what is normalised with several matrices.

        The same as pulling `gradient @ matrices^T`, at less than half of the cost: z . d is taken where d has only
        `inner` numbers.

        Args:
            gradient: at each product.
            matrices: what the normalised vectors are multiplied with.
            held: see `pulled`.
        """
        gain = self.norm.gain.to(matrices)
        # Centring is its own transpose.
        read = self.norm._centre((matrices * gain[:, None]).mT).mT
        factor = self.factor[:, 0, :, None]  # of vectors with an axis of length 1 for the parts
        made = torch.einsum("epkd,kmd->ekpm", gradient * factor, read)
        if held or self.z is None:
            return made
        products = torch.einsum("epm,kmd->epkd", self.z[:, 0], read)
        along = (products * gradient).sum(-1, keepdim=True) * (factor**3 / self.z.shape[-1])
        return made.addcmul_(along.transpose(1, 2), self.z, value=-1)

    def pushed(
        self, change: Float[Tensor, "*more d_model"], held: bool = False
    ) -> Float[Tensor, "*more d_model"]:
        """The change of the output that a small change of what is normalised makes; see `pulled`."""
        return self._symmetric(self.norm._centre(change), held) * self.norm.gain.to(change)

    def _symmetric(self, d: Tensor, held: bool = False) -> Tensor:
        if held or self.z is None:
            return self.factor * d
        along = (d * self.z).sum(-1, keepdim=True) * (self.factor**3 / self.z.shape[-1])
        return torch.addcmul(self.factor * d, along, self.z, value=-1)


def measure_norm(
    module: nn.Module, width: int, name: str = "", device: torch.device | str = "cpu"
) -> Norm:
    """Find out what a normalisation does.

    Args:
        module: takes and returns vectors along the last axis, independently of each other.
        width: the length of the vectors.
        name: what it is called in errors.
        device: where it is, if it has no tensors of its own to tell.

    Raises:
        ValueError: if it is no map of the form x -> factor(x) * gain * (x - centre(x)) + bias.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device(device)
    # Large, so that the epsilon does not show. The probe's mean is zero, so that it is its own centred vector.
    probe = 1e3 * _probe(torch.zeros(1, width, dtype=torch.float64, device=device))
    size = probe.square().mean().sqrt()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(6, width, generator=generator, dtype=torch.float64).to(device)
    scales = torch.logspace(-1, 2, 6, dtype=torch.float64, device=device)[:, None]
    rows = drawn * scales + scales * drawn[:, :1]
    returned = _called(module, torch.cat([probe, -probe, 2 * probe, rows]))
    if returned.shape[-1] != width:
        raise ValueError(
            f"{name or type(module).__name__} returns {returned.shape[-1]} numbers for a vector of {width}: it is no "
            "normalisation (where ones are joined to vectors, as for a bias, they are no part of the stream)"
        )
    more, less, twice, *made = returned
    # Everything but the bias changes its sign with x.
    bias = (more + less) / 2
    response = more - bias
    divides = bool((twice - bias - 2 * response).abs().max() > 1e-3 * response.abs().max())
    gain = response * (size if divides else 1.0) / probe[0]
    found = [Norm(module, gain, bias, centred, divides) for centred in (False, True)]
    wanted = torch.stack(made)
    errors = [_error(norm, rows, wanted) for norm in found]
    best = found[errors[1] < errors[0]]  # a bool is the index: centred or not
    if not min(errors) <= _TOLERANCE:  # written so that NaN is refused too
        raise ValueError(
            f"normalisation {name or type(module).__name__} ({type(module).__name__}) is not of the form "
            "factor(x) * gain * (x - centre(x)) + bias: its scale cannot be held fixed"
        )
    return best


def _error(norm: Norm, rows: Tensor, wanted: Tensor) -> float:
    """How far a normalisation is from what was measured, relative to the largest output of each vector."""
    off = (norm.linear(rows) * norm.factor(rows) + norm.bias - wanted).abs().amax(1)
    return float((off / wanted.abs().amax(1).clamp_min(1e-30)).max())


def _probe(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """A vector of mean zero without zeros, of entries about one, for each row."""
    n = rows.shape[1]
    signs = torch.ones(n, dtype=torch.float64, device=rows.device)
    signs[1::2] = -1
    if n % 2 and n > 1:  # the last three are 1, -1, 1: made 1, 1, -2 their sum is zero
        signs[-2], signs[-1] = 1, -2
    return signs.expand_as(rows)


def _called(module: Any, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d_out"]:
    """A module's output, computed with its weights in float64 whatever the model's own precision."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    exact = {n: t.detach().double() for n, t in tensors.items() if t.is_floating_point()}
    with torch.no_grad():
        # With a batch axis and one of positions, as bridges expect.
        return functional_call(module, exact, (rows[None],))[0].double()
