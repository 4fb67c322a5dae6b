"""Weights of the latents of attached autoencoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from circuits.models.adapter.attaching import Attached, autoencoders
from circuits.models.adapter.composition import direction_layers
from circuits.models.adapter.sites import is_bridge
from circuits.models.adapter.topology import Link, WeightLayer
from circuits.units import Site


def latent_layers(
    module: nn.Module, layers: Sequence[WeightLayer], sites: Mapping[str, Site]
) -> list[WeightLayer]:
    """Weights of the latents of attached autoencoders.

    Into a latent: its row of the encoder. From a latent: its row of the decoder times the weights of every
    layer that reads the site which the decoder writes.
    """
    found: list[WeightLayer] = []
    for name, attached in autoencoders(module).items():
        encoder, decoder = (
            getattr(attached.code, "W_enc", None),
            getattr(attached.code, "W_dec", None),
        )
        if not isinstance(encoder, Tensor) or not isinstance(decoder, Tensor) or name not in sites:
            continue
        if attached.source.site.inner_axis is None:
            found.append(_encoder_layer(name, attached, encoder.detach()))
        if attached.target.site.inner_axis is None:
            target = attached.target.site.name
            if is_bridge(module):
                own, behind = sites[name], sites[target]
                found += direction_layers(module, [*sites.values()], own, decoder.detach(), behind)
            found += [
                _through_decoder(layer, name, decoder.detach(), target)
                for layer in layers
                if any(r.site == target and r.direct and not r.flattened for r in layer.reads)
            ]
    return found


def _encoder_layer(name: str, attached: Attached, encoder: Tensor) -> WeightLayer:
    n, width = encoder.shape
    axes = (
        (1,) * len(attached.source.site.position_axes)
        if not attached.source.site.units_last
        else ()
    )
    shaped = encoder.reshape(n, width, *axes)
    read = Link(attached.source.site.name, torch.arange(width), torch.ones(width), 0, direct=True)
    write = Link(name, torch.arange(n), torch.ones(n), 0, direct=True)
    bias = getattr(attached.code, "b_enc", None)
    return WeightLayer(
        f"{name}.encoder", lambda outs: shaped[outs], lambda ins: shaped[:, ins].transpose(0, 1),
        (read,), (write,), None if bias is None else bias.detach(),
    )  # fmt: skip


def _through_decoder(layer: WeightLayer, name: str, decoder: Tensor, target: str) -> WeightLayer:
    links = [r for r in layer.reads if r.site == target and r.direct and not r.flattened]

    def from_units(weights: Tensor) -> Tensor:
        """Weights by input channel (axis 1) as weights by latent."""
        total = weights.new_zeros(len(weights), decoder.shape[1], *weights.shape[2:])
        for link in links:
            used = link.index >= 0
            factor = link.factor[used].to(weights).reshape(-1, *(1,) * (weights.ndim - 2))
            total.index_add_(1, link.index[used].to(weights.device), weights[:, used] * factor)
        return torch.einsum("o u ..., l u -> o l ...", total, decoder.to(weights))

    def all_rows() -> Tensor:
        outs = layer.columns(torch.tensor([0])).shape[1]
        return from_units(layer.rows(torch.arange(outs)))

    n = len(decoder)
    read = Link(name, torch.arange(n), torch.ones(n), links[0].depth, direct=True)
    return WeightLayer(
        f"{layer.name} after {name}", lambda outs: from_units(layer.rows(outs)),
        lambda ins: all_rows()[:, ins].transpose(0, 1), (read,), layer.writes, None,
    )  # fmt: skip
