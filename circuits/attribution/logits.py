"""Direct logit attribution: what each part of a transformer adds to a logit by itself (layer 4).

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020. The residual stream
is a sum, the last normalisation is held fixed, and the unembedding is linear: so is the logit in the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.targets import Aim, Target, as_target, output_site
from circuits.models.adapter import HookedModel
from circuits.models.sites import is_bridge
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class LogitParts:
    """The parts of a logit.

    Attributes:
        names: of the parts: `embed`, `pos_embed`, heads (as units of `hook_z`), `blocks.N.attn bias`, MLPs
            (`blocks.N.mlp`), `norm bias`, `unembed bias`.
        values: of each part, for each example.
        logits: the target's value.
        residual: logits less the sum of parts: rounding.
        target: what was explained.
        model_hash: of the weights.
        data: where the examples come from.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "example part"]
    logits: Float[Tensor, " example"]
    residual: Float[Tensor, " example"]
    target: str
    model_hash: str
    data: str


def direct_logit_attribution(
    model: HookedModel, tokens: Tensor, target: str | Unit | Target = "top", data: str = ""
) -> LogitParts:
    """Split a logit (or a difference of two, with `against`) into what each part of the model writes.

    Args:
        model: a TransformerLens bridge.
        tokens: examples, batch x position.
        target: a token's logit, at the last position if no other is given.
        data: where the examples come from, for the record.

    Raises:
        ValueError: if the model is no bridge, or the target no logit.
    """
    if not is_bridge(model.module):
        raise ValueError(
            f"model {model.name} is no TransformerLens bridge: it has no residual stream to split"
        )
    goal, end = as_target(model, target), output_site(model)
    if goal.site != end.name or goal.quantity != "activation":
        raise ValueError(f"target {goal} is no logit: expected token:WORD or top")
    bridge: Any = model.module
    names = [name for name, _ in _written(model)]
    cache = model.run(tokens, read=[*names, _last_residual(model), end])
    aim = Aim.at(model, goal, cache[end])
    rows = torch.arange(len(tokens), device=model.device)
    wanted = aim.value(cache[end].double(), rows)
    # in float64, so that what is left over is the model's own rounding
    unembed = bridge.W_U.detach().double()
    direction = unembed[:, aim.indices].T
    shift = bridge.b_U.detach().double()[aim.indices]
    if goal.against is not None:
        direction = direction - unembed[:, goal.against]
        shift = shift - bridge.b_U.detach().double()[goal.against]
    stream = cache[_last_residual(model)].double()[rows, aim.places]
    with model.lock:
        scale, offset, centred = _normalisation(bridge.ln_final, stream)
    read = direction * scale  # what one unit of the stream is worth
    if centred:
        read = read - read.mean(1, keepdim=True)
    found: dict[str, Tensor] = {}
    for name, site in _written(model):
        value = cache[name].double()[rows, aim.places]
        if name.endswith("hook_z"):
            layer = int(name.split(".")[1])
            out = bridge.W_O[layer].detach().double()
            parts = torch.einsum("eha,had->ehd", value, out)
            for head in range(parts.shape[1]):
                found[f"{name}:{head}"] = (parts[:, head] * read).sum(1)
            bias = bridge.blocks[layer].attn.b_O
            if bias is not None:
                found[f"blocks.{layer}.attn bias"] = read @ bias.detach().double()
        else:
            found[site] = (value * read).sum(1)
    found["norm bias"] = (direction * offset).sum(1)
    found["unembed bias"] = shift
    values = torch.stack(list(found.values()), 1)
    return LogitParts(
        tuple(found), values.float(), wanted.float(), (wanted - values.sum(1)).float(), str(goal),
        model.hash, data,
    )  # fmt: skip


def _written(model: HookedModel) -> Iterator[tuple[str, str]]:
    """Sites that add to the residual stream, and the names of the parts."""
    known = {s.name for s in model.sites}
    for name, part in (("hook_embed", "embed"), ("hook_pos_embed", "pos_embed")):
        if name in known:
            yield name, part
    for layer in range(model.module.cfg.n_layers):  # type: ignore[union-attr]
        yield f"blocks.{layer}.attn.hook_z", ""
        if f"blocks.{layer}.hook_mlp_out" in known:
            yield f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.mlp"


def _last_residual(model: HookedModel) -> str:
    return f"blocks.{model.module.cfg.n_layers - 1}.hook_resid_post"  # type: ignore[union-attr, operator]


def _normalisation(norm: Any, stream: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The last normalisation on some residual streams: factor, offset, and whether it takes the mean away."""
    with torch.no_grad():
        x = stream.to(next((p.dtype for p in norm.parameters()), torch.float32))
        zero = norm(torch.zeros_like(x)).double()  # its bias
        made = norm(x).double() - zero
        moved = norm(x + x.abs().amax(1, keepdim=True)).double() - zero
    centred = bool(torch.allclose(moved, made, rtol=1e-3, atol=1e-4))
    inner = stream - stream.mean(1, keepdim=True) if centred else stream
    # the factor is the same for all but its weight: taken where the stream is largest, times the weight
    weight = getattr(norm, "weight", None)
    gains = torch.ones_like(stream[0]) if weight is None else weight.detach().double()
    base = made / torch.where(gains == 0, 1.0, gains)
    at = inner.abs().argmax(1, keepdim=True)
    factor = base.gather(1, at) / inner.gather(1, at)
    return factor * gains, zero, centred
