"""Virtual weights of transformers: between units that share the residual stream."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.topology import Link, WeightLayer
from circuits.units import Site


def bridge_layers(bridge: Any, sites: Sequence[Site]) -> list[WeightLayer]:
    """Virtual weights of a TransformerLens bridge, between units that share the residual stream.

    Head to later head: the composition scores ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV||
    over the product of norms, in the order Q, K, V (Elhage et al. 2021, "Virtual weights"; row
    vectors on the left, as TransformerLens has them). Neuron to later neuron W_out W_in, and neuron
    to logit W_out W_U. What normalisation does beyond its own weights is left out. Each is computed
    when it is asked for.
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


def _virtual(
    name: str,
    rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    source: Site,
    target: Site,
) -> WeightLayer:
    read, written = torch.arange(source.n_units), torch.arange(target.n_units)
    reads = (Link(source.name, read, torch.ones(source.n_units), 0, direct=True),)
    writes = (Link(target.name, written, torch.ones(target.n_units), 0),)
    return WeightLayer(name, rows, columns, reads, writes)


def direction_layers(
    bridge: Any, sites: Sequence[Site], source: Site, directions: Tensor, behind: Site
) -> list[WeightLayer]:
    """Virtual weights from units that write directions into the residual stream, to later neurons and logits.

    Args:
        bridge: the model.
        sites: its sites, in order of execution.
        source: the units.
        directions: what each writes at its site: unit x numbers of the site.
        behind: that site: of the residual stream, or neurons of an MLP.
    """
    number = re.match(r"blocks\.(\d+)\.mlp\.hook_post$", behind.name)
    if number is not None:
        directions = directions @ bridge.W_out[int(number[1])].detach()
    elif behind.kind != "residual":
        return []
    if directions.shape[1] != bridge.cfg.d_model:
        return []
    order = {site.name: i for i, site in enumerate(sites)}
    found = []
    for layer in range(bridge.cfg.n_layers):
        target = next((s for s in sites if s.name == f"blocks.{layer}.mlp.hook_post"), None)
        if target is not None and order[target.name] > order[behind.name]:
            found.append(_directed(bridge, layer, source, target, directions))
    logits = next((s for s in sites if s.name == "hook_unembed"), None)
    if logits is not None:
        found.append(_directed(bridge, None, source, logits, directions))
    return found


def _directed(
    bridge: Any, layer: int | None, source: Site, target: Site, directions: Tensor
) -> WeightLayer:
    return _virtual(
        f"{source.name} to {'logits' if layer is None else layer}",
        lambda after: (directions @ read_weights(bridge, layer)[:, after]).T,
        lambda before: directions[before] @ read_weights(bridge, layer),
        source,
        target,
    )


def read_weights(bridge: Any, layer: int | None) -> Tensor:
    """What the neurons of a layer (None: the logits) read of the residual stream: d_model x neuron."""
    if layer is None:
        return norm_weight(bridge.ln_final) * bridge.W_U.detach()
    return norm_weight(bridge.blocks[layer].ln2) * bridge.W_in[layer].detach()


def norm_weight(norm: Any) -> Tensor | float:
    """The weights of a normalisation layer, one a residual dimension; 1 if it has none."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return 1.0
    offset = 1.0 if getattr(norm, "uses_weight_offset", False) else 0.0  # Gemma stores w - 1
    return weight.detach()[:, None] + offset


def held_normalisation(
    norm: Any, stream: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"], bool]:
    """A normalisation as it is at some residual streams, held fixed: affine in what it reads.

    Args:
        norm: a normalisation layer of a bridge.
        stream: where, in float64.

    Returns:
        What a change is multiplied by, what is added, and whether the mean of a change is taken away first.
    """
    kind = next((p.dtype for p in norm.parameters()), torch.float32)
    probe = torch.linspace(-1, 1, stream.shape[1], dtype=torch.float64, device=stream.device)[None]

    def normed(x: Tensor) -> Tensor:
        with torch.no_grad():
            return norm(x.to(kind)).double()

    bias = normed(torch.zeros_like(probe))
    centred = bool(torch.allclose(normed(probe + 1), normed(probe), rtol=1e-3, atol=1e-4))
    inner = stream - stream.mean(1, keepdim=True) if centred else stream
    # where there is nothing to divide, the factor is that of next to nothing
    inner = torch.where(inner.any(1, keepdim=True), inner, 1e-6 * probe)
    made = normed(inner) - bias
    # the factor is the same for all but its weight: taken where the stream is largest, times the weight
    weight = norm_weight(norm)
    gains = weight[:, 0].double() if isinstance(weight, Tensor) else torch.ones_like(stream[0])
    at = (inner.abs() * (gains != 0)).argmax(1, keepdim=True)
    factor = (made / torch.where(gains == 0, 1.0, gains)).gather(1, at) / inner.gather(1, at)
    return factor * gains, bias.expand_as(stream), centred


def qk(bridge: Any, layer: int, head: int) -> Tensor:
    """W_QK of a head: d_model x d_model, queries in front."""
    scale = norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_K[layer])  # grouped queries share keys and values
    w_q, w_k = bridge.W_Q[layer][head], bridge.W_K[layer][head // shared]
    return ((scale * w_q) @ (scale * w_k).mT).detach()


def ov(bridge: Any, layer: int, head: int) -> Tensor:
    """W_OV of a head: d_model x d_model, what is read in front."""
    scale = norm_weight(bridge.blocks[layer].ln1)
    shared = bridge.cfg.n_heads // len(bridge.W_V[layer])
    return ((scale * bridge.W_V[layer][head // shared]) @ bridge.W_O[layer][head]).detach()


def _composition_layer(bridge: Any, i: int, j: int, source: Site, target: Site) -> WeightLayer:
    def scores(before: Sequence[int], after: Sequence[int]) -> Tensor:
        """Scores of every pair: before x after x (Q, K, V)."""
        written = [ov(bridge, i, head) for head in before]
        found = []
        for head in after:
            attends, moves = qk(bridge, j, head), ov(bridge, j, head)
            for w in written:
                products = ((w @ attends, attends), (attends @ w.mT, attends), (w @ moves, moves))
                found.append([_share(p, w, m) for p, m in products])
        return torch.tensor(found).reshape(len(after), len(before), 3).transpose(0, 1)

    def rows(after: Tensor) -> Tensor:
        return scores(range(source.n_units), after.tolist()).transpose(0, 1)

    def columns(before: Tensor) -> Tensor:
        return scores(before.tolist(), range(target.n_units))

    return _virtual(f"composition {i} to {j}", rows, columns, source, target)


def _share(product: Tensor, a: Tensor, b: Tensor) -> float:
    """The norm of a product over the product of norms; 0 where a factor is zero."""
    return (product.norm() / (a.norm() * b.norm()).clamp_min(torch.finfo(a.dtype).tiny)).item()


def _neuron_layer(bridge: Any, i: int, j: int | None, source: Site, target: Site) -> WeightLayer:
    """Neurons of layer i to those of layer j, or to the logits."""

    def out_weights() -> Tensor:
        return bridge.W_out[i].detach()

    return _virtual(
        f"neurons {i} to {'logits' if j is None else j}",
        lambda after: (out_weights() @ read_weights(bridge, j)[:, after]).T,
        lambda before: out_weights()[before] @ read_weights(bridge, j),
        source,
        target,
    )
