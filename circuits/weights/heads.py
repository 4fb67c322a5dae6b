"""What the units of a transformer read from and write to the residual stream.

After Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; row vectors are on the left, as in
TransformerLens. The weights of normalisation layers are folded in, their division by the norm is left out.
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
    """W_QK of a head: what a query (rows) looks for in the keys (columns).

    Args:
        model: a TransformerLens bridge.
        head: a unit of `blocks.N.attn.hook_z`.
        tokens: whether rows and columns are tokens, W_E W_QK W_E^T, instead of residual dimensions.

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
    """W_OV of a head: what it reads at a position that it attends to (rows), and what it writes for that (columns).

    Args:
        model: a TransformerLens bridge.
        head: a unit of `blocks.N.attn.hook_z`.
        tokens: whether rows are tokens and columns logits, W_E W_OV W_U, instead of residual dimensions.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no head.
    """
    bridge, layer, index = _place(model, head, _HEAD, "a head, blocks.N.attn.hook_z:INDEX")
    matrix = composition.ov(bridge, layer, index)
    if not tokens:
        return matrix
    return bridge.W_E.detach() @ matrix @ composition.read_weights(bridge, None)


def neuron_directions(
    model: HookedModel, neuron: str | Unit
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The directions in the residual stream that a neuron reads and writes.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no neuron, `blocks.N.mlp.hook_post:INDEX`.
    """
    bridge, layer, index = _place(model, neuron, _NEURON, "a neuron, blocks.N.mlp.hook_post:INDEX")
    read = composition.read_weights(bridge, layer)[:, index]
    return read, bridge.W_out[layer].detach()[index]


def direct_logits(model: HookedModel, neuron: str | Unit) -> Float[Tensor, " token"]:
    """The direct effect of a neuron on the logits, for one unit of its activation: W_out W_U.

    Raises:
        ValueError: if the model is not a TransformerLens bridge or the unit no neuron.
    """
    bridge, layer, index = _place(model, neuron, _NEURON, "a neuron, blocks.N.mlp.hook_post:INDEX")
    return bridge.W_out[layer].detach()[index] @ composition.read_weights(bridge, None)


def _place(
    model: HookedModel, unit: str | Unit, pattern: re.Pattern[str], expected: str
) -> tuple[Any, int, int]:
    """The bridge, and a unit's layer and index."""
    if not is_bridge(model.module):
        raise ValueError(
            f"model {model.name} is not a TransformerLens bridge: it has no heads or neurons"
        )
    found = model.unit(unit)
    match = pattern.fullmatch(found.site)
    if match is None:
        raise ValueError(f"unit {found} is not {expected}")
    return model.module, int(match["layer"]), found.index
