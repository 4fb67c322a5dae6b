"""What transformer units read and write in the residual stream.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits": row vectors on the left, as
TransformerLens has them. The weights of normalisation layers are multiplied in; what they do besides is
left out.
"""

from __future__ import annotations

import re
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import composition
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import is_bridge
from circuits.units import Unit

_HEAD = re.compile(r"blocks\.(?P<layer>[0-9]+)\.attn\.hook_z")
_NEURON = re.compile(r"blocks\.(?P<layer>[0-9]+)\.mlp\.hook_post")


def qk_circuit(
    model: HookedModel, head: str | Unit, tokens: bool = False
) -> Float[Tensor, "query key"]:
    """W_QK of a head: what a position that attends (rows) looks for at others (columns).

    Args:
        model: a TransformerLens bridge.
        head: a unit of `blocks.N.attn.hook_z`.
        tokens: by tokens, W_E W_QK W_E^T, instead of by residual dimensions.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no head.
    """
    bridge, layer, index = _place(model, head, _HEAD, "a head, blocks.N.attn.hook_z:INDEX")
    matrix = composition.qk(bridge, layer, index)
    if not tokens:
        return matrix
    embed = bridge.W_E.detach()
    return embed @ matrix @ embed.mT


def ov_circuit(
    model: HookedModel, head: str | Unit, tokens: bool = False
) -> Float[Tensor, "source target"]:
    """W_OV of a head: what is read at an attended position (rows) and written (columns).

    Args:
        model: a TransformerLens bridge.
        head: a unit of `blocks.N.attn.hook_z`.
        tokens: from tokens to logits, W_E W_OV W_U, instead of by residual dimensions.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no head.
    """
    bridge, layer, index = _place(model, head, _HEAD, "a head, blocks.N.attn.hook_z:INDEX")
    matrix = composition.ov(bridge, layer, index)
    return bridge.W_E.detach() @ matrix @ _unembedding(bridge) if tokens else matrix


def neuron_directions(
    model: HookedModel, neuron: str | Unit
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The directions of the residual stream that a neuron reads and writes.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no neuron, `blocks.N.mlp.hook_post:INDEX`.
    """
    bridge, layer, index = _place(model, neuron, _NEURON, "a neuron, blocks.N.mlp.hook_post:INDEX")
    scale = composition.norm_weight(bridge.blocks[layer].ln2)
    read = (scale * bridge.W_in[layer].detach())[:, index]
    return read, bridge.W_out[layer].detach()[index]


def direct_logits(model: HookedModel, neuron: str | Unit) -> Float[Tensor, " token"]:
    """What one more unit of a neuron's activation adds to each logit directly: W_out W_U.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no neuron.
    """
    bridge, layer, index = _place(model, neuron, _NEURON, "a neuron, blocks.N.mlp.hook_post:INDEX")
    return bridge.W_out[layer].detach()[index] @ _unembedding(bridge)


def _unembedding(bridge: Any) -> Tensor:
    return composition.norm_weight(bridge.ln_final) * bridge.W_U.detach()


def _place(
    model: HookedModel, unit: str | Unit, pattern: re.Pattern[str], expected: str
) -> tuple[Any, int, int]:
    """The bridge, and the layer and index of a unit."""
    if not is_bridge(model.module):
        raise ValueError(
            f"model {model.name} is not a TransformerLens bridge: it has no heads or neurons"
        )
    found = model.unit(unit)
    match = pattern.fullmatch(found.site)
    if match is None:
        raise ValueError(f"unit {found} is not {expected}")
    return model.module, int(match["layer"]), found.index
