"""Direct logit attribution: what each part of a transformer adds directly to a logit.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist 2020. The residual stream is a
sum of what is really added to it (`circuits.models.paths.writes`), the final normalisation's factor is held fixed, and
the unembedding is linear, so the logit is a sum over parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.transformer import Transformer
from circuits.models.paths.writes import sites_of_writes, stream_parts
from circuits.tables import Table
from circuits.tasks.targets import Aim, Target, as_target, output_site
from circuits.units import Unit

MISSING = "missing"
"""The part that stands for the difference between a logit and the sum of all other parts."""

_UNSEEN = 1e-3
"""The share of a logit that may be missing before it is shown as a part."""


@dataclass(frozen=True, eq=False)
class LogitParts:
    """The parts of a logit.

    Attributes:
        names: the names of the parts: `embed`, `pos_embed`, heads (as units of `hook_z`), `blocks.N.attn bias`, MLPs
            (`blocks.N.mlp`), `norm bias`, `unembed bias`; `blocks.N.attn` or `blocks.N` where attention or a layer
            cannot be split (see `circuits.models.paths.writes.stream_parts`); `missing` where the others do not add up.
        values: the contribution of each part, for each example.
        logits: the target's value.
        residual: the logits minus the sum of parts, which is rounding error. If it was above a thousandth of a logit it
            is a part of its own, `missing`: rounding in half precision, or something that the model does to the stream
            and that is not known.
        target: what was explained.
        attributed: what the parts add up to, in words: `logit`, or that before the model caps or scales its logits.
        model_hash: the hash of the model.
        examples: which examples, and how they were chosen.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "example part"]
    logits: Float[Tensor, " example"]
    residual: Float[Tensor, " example"]
    target: str
    attributed: str
    model_hash: str
    examples: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; examples by number."""
        by_example = [
            {"logit": float(logit), "values": values.tolist(), "residual": float(residual)}
            for logit, values, residual in zip(self.logits, self.values, self.residual, strict=True)
        ]
        return {
            "target": self.target, "attributed": self.attributed, "model_hash": self.model_hash,
            "examples": dict(self.examples), "parts": list(self.names), "by_example": by_example,
        }  # fmt: skip

    def table(self, example: int, name: str, top: int) -> Table:
        """The parts that add most to an example's logit, or take most away from it; always what is missing."""
        values = self.values[example]
        order = values.abs().argsort(descending=True)[:top].tolist()
        if MISSING in self.names and (at := self.names.index(MISSING)) not in order:
            order.append(at)
        rows = [(self.names[k], float(values[k])) for k in order]
        note = f"  {len(self.names)} parts {float(values.sum()):.4g}; residual {float(self.residual[example]):.2g}"
        title = f"{name}: {self.attributed} {float(self.logits[example]):.4g}"
        return Table(("part", "adds to the logit"), rows, title, note)


def direct_logit_attribution(
    model: HookedModel, examples: Examples | Tensor, target: str | Unit | Target = "top"
) -> LogitParts:
    """Split a logit (or a difference of two, with `against`) into the contributions of the model's parts.

    Where a model caps its logits (Gemma 2) or scales them (Cohere, Granite), what is split is the logit before that,
    and `attributed` says so. Parts are computed in float64 from what the model computed in its own precision.

    Args:
        model: a transformer.
        examples: texts of equal length.
        target: a token's logit, at the last position unless it names another.

    Raises:
        ValueError: if the model is not a bridge, or the target is not a logit.
    """
    transformer = Transformer(model)
    goal, end, before = as_target(model, target), output_site(model), model.site(transformer.logits)
    if goal.site not in (end.name, before.name) or goal.quantity != "activation":
        raise ValueError(f"target {goal} is not a logit: expected token:WORD or top")
    goal = replace(goal, site=before.name)
    given = as_examples(model, examples)
    tokens = given.inputs
    cache = model.run(tokens, read=[*sites_of_writes(transformer), before, end])
    aim = Aim.at(before, goal, cache[before])
    rows = torch.arange(len(tokens), device=model.device)
    wanted = aim.value(cache[before].double(), rows)

    def at(site: str) -> Tensor:
        return cache[site][rows, aim.places]

    # logit = direction . (factor * gain * (x - centre(x)) + bias) + unembedding bias, for x the last stream
    unembed, shifts = transformer.unembedding()
    direction, shift = unembed[:, aim.indices].T.double(), shifts[aim.indices].double()
    if goal.against is not None:
        other = torch.as_tensor(goal.against, device=unembed.device).expand(len(tokens))
        direction, shift = direction - unembed[:, other].T, shift - shifts[other]
    norm = transformer.norm("final")
    with model.lock:
        read = norm.adjoint(direction) * norm.factor(at(transformer.last))
    found = {name: (value * read).sum(1) for name, value in stream_parts(transformer, at)}
    found["norm bias"] = direction @ norm.bias
    found["unembed bias"] = shift
    left = wanted - torch.stack(list(found.values()), 1).sum(1)
    # Parts that cancel leave a small logit with the rounding of large ones.
    rounding = 1e-6 * torch.stack(list(found.values()), 1).abs().sum(1)
    if bool((left.abs() > _UNSEEN * wanted.abs() + rounding).any()):
        found[MISSING] = left
    values = torch.stack(list(found.values()), 1)
    return LogitParts(
        tuple(found), values.float(), wanted.float(), (wanted - values.sum(1)).float(), str(goal),
        _attributed(at(before.name), at(end.name)), model.hash, given.describe(),
    )  # fmt: skip


def _attributed(before: Tensor, after: Tensor) -> str:
    """What a logit is called that the model changes once more before it puts it out."""
    if before.shape == after.shape and torch.equal(before, after):
        return "logit"
    scale = float((before.double() * after.double()).sum() / before.double().square().sum())
    if torch.allclose(scale * before.double(), after.double(), rtol=1e-2, atol=1e-3):
        return f"logit before the model multiplies it by {scale:.4g}"
    return "logit before the model's cap"
