"""Direct logit attribution: what each part of a transformer adds directly to a logit.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020. The residual stream is a
sum, the final normalisation's scale is held fixed, and the unembedding is linear, so the logit is a sum over parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples, as_examples
from circuits.models.adapter.composition import frozen_normalisation
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import is_bridge
from circuits.tables import Table
from circuits.tasks.targets import Aim, Target, as_target, output_site
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class LogitParts:
    """The parts of a logit.

    Attributes:
        names: the names of the parts: `embed`, `pos_embed`, heads (as units of `hook_z`), `blocks.N.attn bias`, MLPs
            (`blocks.N.mlp`), `norm bias`, `unembed bias`.
        values: the contribution of each part, for each example.
        logits: the target's value.
        residual: the logits minus the sum of parts, which is rounding error.
        target: what was explained.
        model_hash: the hash of the model's weights.
        examples: which examples, and how they were chosen.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "example part"]
    logits: Float[Tensor, " example"]
    residual: Float[Tensor, " example"]
    target: str
    model_hash: str
    examples: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; examples by number."""
        by_example = [
            {"logit": float(logit), "values": values.tolist(), "residual": float(residual)}
            for logit, values, residual in zip(self.logits, self.values, self.residual, strict=True)
        ]
        return {
            "target": self.target, "model_hash": self.model_hash, "examples": dict(self.examples),
            "parts": list(self.names), "by_example": by_example,
        }  # fmt: skip

    def table(self, example: int, name: str, top: int) -> Table:
        """The parts that add most to an example's logit, or take most away from it."""
        values = self.values[example]
        order = values.abs().argsort(descending=True)[:top].tolist()
        rows = [(self.names[k], float(values[k])) for k in order]
        note = f"  {len(self.names)} parts {float(values.sum()):.4g}; residual {float(self.residual[example]):.2g}"
        title = f"{name}: logit {float(self.logits[example]):.4g}"
        return Table(("part", "adds to the logit"), rows, title, note)


def direct_logit_attribution(
    model: HookedModel, examples: Examples | Tensor, target: str | Unit | Target = "top"
) -> LogitParts:
    """Split a logit (or a difference of two, with `against`) into the contributions of the model's parts.

    Args:
        model: a TransformerLens bridge.
        examples: texts of equal length.
        target: a token's logit, at the last position unless it names another.

    Raises:
        ValueError: if the model is not a bridge, or the target is not a logit.
    """
    if not is_bridge(model.module):
        raise ValueError(
            f"model {model.name} has no residual stream to split: expected a TransformerLens bridge"
        )
    goal, end = as_target(model, target), output_site(model)
    if goal.site != end.name or goal.quantity != "activation":
        raise ValueError(f"target {goal} is not a logit: expected token:WORD or top")
    bridge: Any = model.module
    given = as_examples(model, examples)
    tokens = given.inputs
    names = [name for name, _ in _written(model)]
    cache = model.run(tokens, read=[*names, _last_residual(model), end])
    aim = Aim.at(end, goal, cache[end])
    rows = torch.arange(len(tokens), device=model.device)
    wanted = aim.value(cache[end].double(), rows)
    # In float64, so that the residual is only the model's own float32 rounding.
    unembed = bridge.W_U.detach().double()
    direction = unembed[:, aim.indices].T
    shift = bridge.b_U.detach().double()[aim.indices]
    if goal.against is not None:
        direction = direction - unembed[:, goal.against]
        shift = shift - bridge.b_U.detach().double()[goal.against]
    stream = cache[_last_residual(model)].double()[rows, aim.places]
    with model.lock:
        scale, offset, centred = frozen_normalisation(bridge.ln_final, stream)
    # logit = direction . (scale * (x - mean(x)) + offset) + bias. The gradient by the stream x is direction * scale,
    # and subtracting the mean of x is the same as subtracting the mean of that gradient.
    read = direction * scale
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
        model.hash, given.describe(),
    )  # fmt: skip


def _written(model: HookedModel) -> Iterator[tuple[str, str]]:
    """The sites that write to the residual stream, and the names of their parts."""
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
