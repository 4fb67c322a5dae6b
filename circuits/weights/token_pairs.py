"""Which pairs of tokens a head's weights join most: what it looks for, and what it makes of what it finds.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits": W_E W_QK W_E^T and W_E W_OV W_U. Both are as
large as the square of the vocabulary (for 49,152 tokens 19 GB in double precision), but of rank d_head, so that they
are gone through in blocks of rows and never held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import composition
from circuits.models.adapter.composition import HeadRead, head_read, head_write
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.rotation import rotations
from circuits.models.adapter.transformer import Transformer
from circuits.units import Unit

Way = Literal["OV", "QK"]
"""From a token that is attended to, to the logits (OV); from a query's token to a key's (QK)."""

_NUMBERS_AT_ONCE = 2**24
"""Numbers of the matrix that are held together."""


@dataclass(frozen=True)
class TokenPair:
    """A row and a column of a head's matrix over tokens.

    Attributes:
        source: of OV the token that is attended to, of QK the query's.
        target: of OV the token whose logit is raised, of QK the key's.
        value: what the matrix holds there.
    """

    source: int
    target: int
    value: float


@dataclass(frozen=True)
class TokenPairs:
    """The largest numbers of a head's matrix over tokens, with what is usual in it.

    Attributes:
        head: the head.
        way: which matrix.
        offset: of QK the key's position minus the query's; None of OV.
        pairs: the largest numbers, the largest first.
        to_itself: the share of rows whose largest number is in the same token's column, from 0 to 1. By chance it is
            one over the number of tokens.
        mean: of all numbers.
        std: of all numbers.
        n_tokens: how many rows and columns there are.
    """

    head: Unit
    way: Way
    offset: int | None
    pairs: tuple[TokenPair, ...]
    to_itself: float
    mean: float
    std: float
    n_tokens: int


def joined_tokens(
    model: HookedModel, head: str | Unit, way: Way, top: int = 10, offset: int = -1
) -> TokenPairs:
    """The pairs of tokens that a head's weights join most.

    The numbers are those of `ov_circuit(model, head, tokens=True)` and `qk_circuit(…).at(offset)`, in the precision of
    single floats: no biases, and no division by the norm of the residual stream.

    Args:
        model: a token model with a residual stream.
        head: a unit of `blocks.N.attn.hook_z`.
        way: `OV` or `QK`.
        top: how many pairs.
        offset: of QK the key's position minus the query's, 0 or below; it matters where rotary embeddings turn queries
            and keys by their positions.

    Raises:
        ValueError: if `way` is none, `top` is below 1, the unit is no head, its weights are not known, or its scores
            are no bilinear form of the stream (queries and keys are normalised).
    """
    if way not in get_args(Way):
        raise ValueError(f"way {way!r}: expected one of {', '.join(get_args(Way))}")
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")
    if not model.has_stream:
        raise ValueError(
            f"model {model.name} has no residual stream, along which tokens lead to heads: {model.transformer}"
        )
    transformer = Transformer(model)
    layer, index = transformer.head(head)
    if way == "OV":
        left, right = _moved(transformer, layer, index)
    else:
        left, right = _matched(transformer, layer, index, offset)
    best, own = _row_maxima(left, right)
    rows = best.topk(
        min(top, len(best))
    ).indices  # the largest numbers lie in the rows with the largest maxima
    flat = (left[rows] @ right).flatten().topk(min(top, len(rows) * right.shape[1]))
    pairs = [
        TokenPair(int(rows[i // right.shape[1]]), i % right.shape[1], value)
        for i, value in zip(flat.indices.tolist(), flat.values.tolist(), strict=True)
    ]
    mean, std = _moments(left, right)
    at = offset if way == "QK" else None
    return TokenPairs(model.unit(head), way, at, tuple(pairs), own, mean, std, right.shape[1])


def _moved(transformer: Transformer, layer: int, index: int) -> tuple[Tensor, Tensor]:
    """W_E W_V and W_O W_U."""
    read, write = head_read(transformer, "V", layer, index), head_write(transformer, layer, index)
    weight = transformer.unembedding()[0]
    through = transformer.norm("final").linear(write)
    return _of_tokens(transformer, read), through.to(weight).float() @ weight.float()


def _matched(
    transformer: Transformer, layer: int, index: int, offset: int
) -> tuple[Tensor, Tensor]:
    """W_E W_Q R(offset) and (W_E W_K)^T."""
    if transformer.normalises_qk(layer):
        raise ValueError(
            f"layer {layer} of {transformer.model.name} normalises queries and keys, so its scores are no bilinear form"
        )
    turn = rotations(transformer, layer, (offset,))[0]
    query, key = (head_read(transformer, letter, layer, index) for letter in ("Q", "K"))
    turned = HeadRead(query.weight @ turn, query.bias)
    return _of_tokens(transformer, turned), _of_tokens(transformer, key).T


def _of_tokens(transformer: Transformer, read: HeadRead) -> Float[Tensor, "token d_head"]:
    embedding = transformer.embedding()
    return embedding.float() @ read.weight.to(embedding).float()


def _row_maxima(
    left: Float[Tensor, "source d_head"], right: Float[Tensor, "d_head target"]
) -> tuple[Float[Tensor, " source"], float]:
    """The largest number of each row, and the share of rows that have it in the column of the same number."""
    step = max(1, _NUMBERS_AT_ONCE // right.shape[1])
    found = [(left[i : i + step] @ right).max(1) for i in range(0, len(left), step)]
    best, where = (torch.cat(parts) for parts in zip(*found, strict=True))
    return best, (where == torch.arange(len(left)).to(where)).double().mean().item()


def _moments(
    left: Float[Tensor, "source d_head"], right: Float[Tensor, "d_head target"]
) -> tuple[float, float]:
    """Mean and standard deviation of all numbers of the product, from those of its factors.

    The sum of the squares of L R is that of the elements of (L^T L) * (R R^T).
    """
    left, right = left.double(), right.double()
    n = left.shape[0] * right.shape[1]
    mean = (left.sum(0) @ right.sum(1)).item() / n
    square = ((left.T @ left) * (right @ right.T)).sum().item() / n
    return mean, max(0.0, square - mean**2) ** 0.5


def written_logits(model: HookedModel, unit: str | Unit) -> Float[Tensor, " token"]:
    """What a unit's activation of one adds to the logits directly, by the weights alone.

    Of a neuron that is W_out W_U; of a dimension of the residual stream its row of W_U. The linear part of the last
    normalisation is folded in, its division by the norm is left out.

    Raises:
        ValueError: if the model has no residual stream, or the unit is neither a neuron (`blocks.N.mlp.hook_post`) nor
            a dimension of the stream (`blocks.N.hook_resid_post` and the like).
    """
    transformer = Transformer(model)
    found = model.unit(unit)
    weight = transformer.unembedding()[0].float()
    if found.site in _stream(transformer):
        written = torch.zeros(len(weight)).to(weight)
        written[found.index] = 1.0
    else:
        layer, index = transformer.neuron(found)
        written = composition.written_weights(transformer, layer)[index]
    return transformer.norm("final").linear(written).to(weight) @ weight


def writing_logits(model: HookedModel) -> tuple[str, ...]:
    """The sites whose units `written_logits` takes, in the order of the model.

    Raises:
        ValueError: if the model has no residual stream.
    """
    transformer = Transformer(model)
    neurons = {x.neurons for x in transformer.layers}
    return tuple(s.name for s in model.sites if s.name in neurons | _stream(transformer))


def _stream(transformer: Transformer) -> set[str | None]:
    found = {s for x in transformer.layers for s in (x.before, x.between, x.after)}
    return found | {transformer.embed}
