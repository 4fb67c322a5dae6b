"""Heads of models in which no single residual stream is known, by their own weights.

In models with an encoder and a decoder, and where the stream changes its width or layout (Swin, PVT), nothing is folded
into weights: what they act on is what each projection is given, normalised as the model does it, and what they make is
what attention's output projection returns. Queries and keys of cross-attention are made of different tensors, which may
differ in width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.calling import check_weights_finite
from circuits.models.adapter.composition import HeadRead
from circuits.models.adapter.head_weights import (
    BIASES,
    WEIGHTS,
    WORDS,
    HeadWeights,
    Letter,
    check_same,
    recomputed,
)
from circuits.models.adapter.rotation import check_bilinear
from circuits.models.adapter.sites import TRACE_BATCHES, evaluating
from circuits.units import Unit


@dataclass(frozen=True, eq=False)
class LoneHead:
    """A head by its own weights, which have been compared with what the model computes.

    Attributes:
        model: a `HookedModel`.
        weights: those of all heads of its attention.
        index: its number among them.
    """

    model: Any
    weights: HeadWeights
    index: int

    @property
    def name(self) -> str:
        """That of its attention, e.g. `decoder_blocks.0.cross_attn`."""
        return self.weights.head.name

    def read(self, letter: Letter) -> HeadRead:
        """What it reads as queries, keys or values from what their projection is given; nothing is folded in.

        Raises:
            ValueError: if it has no such weights.
        """
        weight, bias = self.weights.matrix(WEIGHTS[letter]), self.weights.matrix(BIASES[letter])
        if weight is None:
            raise ValueError(
                f"{self.name} of {self.model.name} has no matrix W_{letter}: its heads have no weights of their own "
                f"for {WORDS[letter]}"
            )
        at = self.weights.group(letter, self.index)
        own = weight[at].detach().double()
        none = own.new_zeros(own.shape[1])
        return HeadRead(own, none if bias is None else bias[at].detach().double().reshape(-1))

    def write(self) -> Float[Tensor, "d_head d_out"]:
        """What it adds to what attention's output projection returns, in float64.

        Raises:
            ValueError: if it has no output weights.
        """
        weight = self.weights.matrix("W_O")
        if weight is None:
            raise ValueError(
                f"{self.name} of {self.model.name} has no matrix W_O: {self.weights.output}"
            )
        return weight[self.index].detach().double()

    def check_scores(self) -> None:
        """Raise ValueError unless its scores are products of its queries and keys, but for what positions add."""
        query, key, pattern = (f"{self.name}.hook_{part}" for part in ("q", "k", "pattern"))
        heads = range(self.weights.head.attention.n_heads)
        of_query, of_key = (
            [self.weights.group(letter, head) for head in heads] for letter in ("Q", "K")
        )
        where = f"{self.name} of {self.model.name}"
        check_bilinear(self.model, where, query, key, pattern, (of_query, of_key))


def lone_head(model: Any, unit: str | Unit) -> LoneHead:
    """A head of a model in which no single residual stream is known.

    Args:
        model: a `HookedModel`.
        unit: a unit of `ATTENTION.hook_z`.

    Raises:
        ValueError: if the model has no heads that were found, weights that are not finite or are not those of its
            heads, or the unit is no head.
    """
    if not model.head_weights:
        raise ValueError(f"model {model.name} has no residual stream: {model.transformer}")
    check_weights_finite(model.module, model.name)
    found = model.unit(unit)
    weights = model.head_weights.get(found.site.removesuffix(".hook_z"))
    if weights is None or not found.site.endswith(".hook_z"):
        raise ValueError(f"unit {found} is not a head, ATTENTION.hook_z:INDEX")
    _verify(model, weights)
    return LoneHead(model, weights, found.index)


def _verify(model: Any, weights: HeadWeights) -> None:
    """Raise ValueError unless the weights of an attention give what its heads read and write."""
    inputs = model.fitted(model.input.example(TRACE_BATCHES[0]))
    where = f"{weights.head.name} of {model.name}"
    with model.lock, model.outside(), evaluating(model.module), torch.no_grad():
        seen = weights.seen(model.module, inputs)
        for name, made, found in recomputed(where, weights.matrix, weights.group, seen):
            what = f"{weights.head.name}.hook_{name} of {model.name}"
            check_same(what, "what its projections are given", made, found)
