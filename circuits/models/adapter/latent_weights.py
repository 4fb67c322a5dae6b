"""Weights between the latents of attached autoencoders and other units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.models.adapter.attaching import Attached, autoencoders
from circuits.models.adapter.composition import direction_layers
from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.units import Site


def latent_layers(
    model: Any, layers: Sequence[WeightLayer], sites: Mapping[str, Site]
) -> list[WeightLayer]:
    """Weights into and out of the latents of attached autoencoders.

    Into a latent leads its row of the encoder. Out of a latent leads its row of the decoder times the weights of
    every layer that reads the site which the decoder writes.

    Args:
        model: a `HookedModel`.
        layers: the model's own layers.
        sites: its sites by name.
    """
    found: list[WeightLayer] = []
    for name, attached in autoencoders(model.module).items():
        encoder, decoder = (
            getattr(attached.code, "W_enc", None),
            getattr(attached.code, "W_dec", None),
        )
        if not isinstance(encoder, Tensor) or not isinstance(decoder, Tensor) or name not in sites:
            continue
        # Of attention output the autoencoder reads all dimensions of all heads, while a head is one unit: there is
        # no single weight between a head and a latent.
        if attached.source.site.inner_axis is None:
            found.append(_encoder_layer(name, attached, encoder.detach()))
        if attached.target.site.inner_axis is None:
            target = attached.target.site.name
            if model.has_stream:
                found += direction_layers(model, sites[name], decoder.detach(), sites[target])
            found += [
                _through_decoder(layer, name, decoder.detach(), target)
                for layer in layers
                if any(r.site == target and r.direct and not r.flattened for r in layer.reads)
            ]
    return found


def _encoder_layer(name: str, attached: Attached, encoder: Tensor) -> WeightLayer:
    n, width = encoder.shape
    # On a map (channels first) the encoder acts like a convolution with a 1x1 kernel.
    source = attached.source.site
    kernel = () if source.units_last else (1,) * len(source.position_axes)
    shaped = encoder.reshape(n, width, *kernel)
    read = SiteLink(source.name, torch.arange(width), torch.ones(width), 0, direct=True)
    write = SiteLink(name, torch.arange(n), torch.ones(n), 0, direct=True)
    bias = getattr(attached.code, "b_enc", None)
    return WeightLayer(
        f"{name}.encoder", lambda outs: shaped[outs], lambda ins: shaped[:, ins].transpose(0, 1),
        (read,), (write,), None if bias is None else bias.detach(),
    )  # fmt: skip


def _through_decoder(layer: WeightLayer, name: str, decoder: Tensor, target: str) -> WeightLayer:
    """A layer that reads a site, as a layer that reads the latents whose decoder writes that site."""
    links = [r for r in layer.reads if r.site == target and r.direct and not r.flattened]

    def from_units(weights: Tensor) -> Tensor:
        """Turn weights by input channel (axis 1) into weights by latent.

        latent l -> output o: sum over units u of W_dec[l, u] * (sum of W[o, c] over the input channels c that
        come from u, each times the factor on the way).
        """
        total = weights.new_zeros(len(weights), decoder.shape[1], *weights.shape[2:])
        for link in links:
            used = link.index >= 0
            factor = link.factor[used].to(weights).reshape(-1, *(1,) * (weights.ndim - 2))
            total.index_add_(1, link.index[used].to(weights.device), weights[:, used] * factor)
        return torch.einsum("o u ..., l u -> o l ...", total, decoder.to(weights))

    def all_rows() -> Tensor:
        # A layer does not say how many output channels it has, but a column of its weights shows it.
        outs = layer.columns(torch.tensor([0])).shape[1]
        return from_units(layer.rows(torch.arange(outs)))

    n = len(decoder)
    read = SiteLink(name, torch.arange(n), torch.ones(n), links[0].depth, direct=True)
    return WeightLayer(
        f"{layer.name} after {name}", lambda outs: from_units(layer.rows(outs)),
        lambda ins: all_rows()[:, ins].transpose(0, 1), (read,), layer.writes, None,
    )  # fmt: skip
