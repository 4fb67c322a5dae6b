"""Virtual weights of transformers, between units that are connected by the residual stream alone.

Row vectors stand on the left throughout, as in TransformerLens: x W_Q, so W_QK = W_Q W_K^T and W_OV = W_V W_O are
both d_model x d_model, and a path multiplies matrices from left to right in the order of execution.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.units import Site


def bridge_layers(bridge: Any, sites: Sequence[Site]) -> list[WeightLayer]:
    """Virtual weights of a TransformerLens bridge, between units connected by the residual stream.

    Head to later head: the composition scores ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV||
    over the product of the factors' norms, in the order Q, K, V (Elhage et al. 2021, "Virtual weights").
    Neuron to later neuron: W_out W_in; neuron to logit: W_out W_U. Normalisations count with their weights
    only, not with the division by the stream's norm. Each matrix is computed when it is asked for.
    """
    by_name = {site.name: site for site in sites}
    n = bridge.cfg.n_layers
    heads = [by_name.get(f"blocks.{layer}.attn.hook_z") for layer in range(n)]
    posts = [by_name.get(f"blocks.{layer}.mlp.hook_post") for layer in range(n)]
    logits = by_name.get("hook_unembed")
    layers = []
    for i, j in itertools.combinations(range(n), 2):
        if (source := heads[i]) and (target := heads[j]):
            layers.append(_composition_layer(bridge, i, j, source, target))
        if (source := posts[i]) and (target := posts[j]):
            layers.append(_neuron_layer(bridge, i, j, source, target))
    if logits is not None:
        layers += [_neuron_layer(bridge, i, None, p, logits) for i, p in enumerate(posts) if p]
    return layers


def _virtual_layer(
    name: str,
    rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    source: Site,
    target: Site,
) -> WeightLayer:
    """A layer whose input channels are the source's units and whose output channels are the target's."""
    read, written = torch.arange(source.n_units), torch.arange(target.n_units)
    reads = (SiteLink(source.name, read, torch.ones(source.n_units), 0, direct=True),)
    writes = (SiteLink(target.name, written, torch.ones(target.n_units), 0),)
    return WeightLayer(name, rows, columns, reads, writes)


def direction_layers(
    bridge: Any, sites: Sequence[Site], source: Site, directions: Tensor, written: Site
) -> list[WeightLayer]:
    """Virtual weights from units that write directions, such as latents, to later neurons and to logits.

    Args:
        bridge: the model.
        sites: its sites, in order of execution.
        source: the site of the units.
        directions: what each unit adds at the site `written`: unit x width of that site.
        written: a site of the residual stream, or the neurons of an MLP.
    """
    number = re.match(r"blocks\.(\d+)\.mlp\.hook_post$", written.name)
    if number is not None:  # what is added to neurons reaches the stream through W_out
        directions = directions @ bridge.W_out[int(number[1])].detach()
    elif written.kind != "residual":
        return []
    # Sites of kind "residual" include some of another width, such as the output of a key projection.
    if directions.shape[1] != bridge.cfg.d_model:
        return []
    order = {site.name: i for i, site in enumerate(sites)}
    found = []
    for layer in range(bridge.cfg.n_layers):
        target = next((s for s in sites if s.name == f"blocks.{layer}.mlp.hook_post"), None)
        if target is not None and order[target.name] > order[written.name]:
            found.append(_directed(bridge, layer, source, target, directions))
    logits = next((s for s in sites if s.name == "hook_unembed"), None)
    if logits is not None:
        found.append(_directed(bridge, None, source, logits, directions))
    return found


def _directed(
    bridge: Any, layer: int | None, source: Site, target: Site, directions: Tensor
) -> WeightLayer:
    return _virtual_layer(
        f"{source.name} to {'logits' if layer is None else layer}",
        lambda after: (directions @ read_weights(bridge, layer)[:, after]).T,
        lambda before: directions[before] @ read_weights(bridge, layer),
        source,
        target,
    )


def read_weights(bridge: Any, layer: int | None) -> Tensor:
    """The input weights of a layer's neurons (None: of the logits), with the weights of the normalisation before
    them folded in: d_model x neuron.
    """
    if layer is None:
        return norm_weight(bridge.ln_final) * bridge.W_U.detach()
    return norm_weight(bridge.blocks[layer].ln2) * bridge.W_in[layer].detach()


def norm_weight(norm: Any) -> Tensor | float:
    """The weights of a normalisation layer as a column, one for each residual dimension; 1 if it has none."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return 1.0
    offset = 1.0 if getattr(norm, "uses_weight_offset", False) else 0.0  # Gemma stores weight - 1
    return weight.detach()[:, None] + offset


def frozen_normalisation(
    norm: Any, stream: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"], bool]:
    """A normalisation with its scale frozen at some residual streams, which makes it affine in its input.

    Args:
        norm: a normalisation layer of a bridge.
        stream: the residual streams, in float64.

    Returns:
        Factor, bias and whether the input is centred: the frozen normalisation of x is (x - mean(x)) * factor +
        bias if it is centred (LayerNorm), and x * factor + bias if it is not (RMSNorm).
    """
    kind = next((p.dtype for p in norm.parameters()), torch.float32)
    probe = torch.linspace(-1, 1, stream.shape[1], dtype=torch.float64, device=stream.device)[None]

    def normed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return norm(x.to(kind)).double()

    # The kind of normalisation is found by probing the module, not by its class: bridges wrap each family's own.
    # A normalisation of zeros is its bias, and one that subtracts the mean does not see a shift of all entries.
    bias = normed(torch.zeros_like(probe))
    centred = bool(torch.allclose(normed(probe + 1), normed(probe), rtol=1e-3, atol=1e-4))
    inner = stream - stream.mean(1, keepdim=True) if centred else stream
    # A stream of zeros has no scale to measure, only that of the epsilon, which a tiny stream shows as well.
    inner = torch.where(inner.any(1, keepdim=True), inner, 1e-6 * probe)
    made = normed(inner) - bias
    # norm(x) - bias = x * weight / scale with one scale for a row. So the scale is read off at a single entry:
    # the largest whose weight is not zero, where the quotient loses the least precision.
    weight = norm_weight(norm)
    gains = weight[:, 0].double() if isinstance(weight, Tensor) else torch.ones_like(stream[0])
    at = (inner.abs() * (gains != 0)).argmax(1, keepdim=True)
    factor = (made / torch.where(gains == 0, 1.0, gains)).gather(1, at) / inner.gather(1, at)
    return factor * gains, bias.expand_as(stream), centred


def qk(bridge: Any, layer: int, head: int) -> Tensor:
    """W_QK = W_Q W_K^T of a head with the normalisation's weights folded in: d_model (query) x d_model (key)."""
    scale = norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_K[layer])  # grouped-query attention: heads a key
    w_q, w_k = bridge.W_Q[layer][head], bridge.W_K[layer][head // shared]
    return ((scale * w_q) @ (scale * w_k).mT).detach()


def ov(bridge: Any, layer: int, head: int) -> Tensor:
    """W_OV = W_V W_O of a head with the normalisation's weights folded in: d_model (read) x d_model (written)."""
    scale = norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_V[layer])
    return ((scale * bridge.W_V[layer][head // shared]) @ bridge.W_O[layer][head]).detach()


def _composition_layer(bridge: Any, i: int, j: int, source: Site, target: Site) -> WeightLayer:
    def scores(before: Sequence[int], after: Sequence[int]) -> Tensor:
        """Scores of every pair of heads: before x after x (Q, K, V)."""
        written = [ov(bridge, i, head) for head in before]
        found = []
        for head in after:
            attends, moves = qk(bridge, j, head), ov(bridge, j, head)
            for w in written:
                # The earlier head writes w = W_OV into the stream. It enters the later head's scores x W_QK y^T on the
                # side of the query (w W_QK) or of the key (W_QK w^T), and its values (w W_OV).
                products = ((w @ attends, attends), (attends @ w.mT, attends), (w @ moves, moves))
                found.append([_share(p, w, m) for p, m in products])
        return torch.tensor(found).reshape(len(after), len(before), 3).transpose(0, 1)

    def rows(after: Tensor) -> Tensor:
        return scores(range(source.n_units), after.tolist()).transpose(0, 1)

    def columns(before: Tensor) -> Tensor:
        return scores(before.tolist(), range(target.n_units))

    return _virtual_layer(f"composition {i} to {j}", rows, columns, source, target)


def _share(product: Tensor, a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of a product over the product of the factors' norms; 0 where a factor is zero."""
    return (product.norm() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny)).item()


def _neuron_layer(bridge: Any, i: int, j: int | None, source: Site, target: Site) -> WeightLayer:
    """Neurons of layer i to those of layer j, or to the logits."""

    def out_weights() -> Tensor:
        return bridge.W_out[i].detach()

    return _virtual_layer(
        f"neurons {i} to {'logits' if j is None else j}",
        lambda after: (out_weights() @ read_weights(bridge, j)[:, after]).T,
        lambda before: out_weights()[before] @ read_weights(bridge, j),
        source,
        target,
    )
