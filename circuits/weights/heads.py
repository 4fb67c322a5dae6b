"""What the units of a transformer read from and write to the residual stream.

After Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; row vectors are on the left, as in
TransformerLens. Normalisations are folded in with their linear part, gain * (x - centre(x)), as it is measured; their
division by the norm is left out, which is one positive factor for each position.

Heads of models in which no single residual stream is known (with an encoder and a decoder, or with a stream that
changes its width or layout) have QK and OV circuits between what their projections are given and what attention's
output projection returns, with no normalisation folded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter import composition
from circuits.models.adapter.composition import HeadRead, head_read, head_write
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.lone_heads import LoneHead, lone_head
from circuits.models.adapter.rotation import rotations
from circuits.models.adapter.transformer import Transformer
from circuits.tensors import at_least_single, random_frame
from circuits.units import Unit

OFFSETS = (-1, 0)
"""Offsets at which QK circuits are given by default: a head that looks one back, and one that looks at itself."""


@dataclass(frozen=True, eq=False)
class QKCircuit:
    """What a head's queries look for in keys, at some offsets.

    The score of a query at x with a key at y is x matrix y^T + x . key_bias + query_bias . y + constant, where x and y
    are residual streams, each divided by its norm, up to the constant factor that the model multiplies scores by (one
    over the square root of d_head; one in T5). A part that does not depend on the key changes no pattern. What is added
    to scores for positions alone (ALiBi, the relative positions of T5 and Swin) is no part of it.

    Where no residual stream is known, x and y are what the projections of queries and keys are given, as they are, and
    no normalisation is folded in: `spaces` says which it is.

    Attributes:
        head: the head.
        offsets: the key's position minus the query's, for each matrix. Rotary embeddings turn queries and keys by their
            positions, so that there is no W_QK without one; otherwise all are equal.
        matrix: query x key: residual dimensions, or tokens; else dimensions of what each projection is given, which are
            as many for both unless queries and keys of cross-attention read tensors of different widths.
        query_bias: what the biases of queries look for in keys.
        key_bias: what queries look for, met by the biases of keys alone.
        constant: of the biases of both.
        held_norms: whether the model normalises queries and keys, of which only the gains are in here: scores are
            divided by the norms of query and key once more.
        spaces: what rows and columns are, in a sentence.
    """

    head: Unit
    offsets: tuple[int, ...]
    matrix: Float[Tensor, "offset query key"]
    query_bias: Float[Tensor, "offset key"]
    key_bias: Float[Tensor, "offset query"]
    constant: Float[Tensor, " offset"]
    held_norms: bool
    spaces: str

    def at(self, offset: int) -> Float[Tensor, "query key"]:
        """The matrix at an offset.

        Raises:
            ValueError: if it was not asked for.
        """
        if offset not in self.offsets:
            known = ", ".join(map(str, self.offsets))
            raise ValueError(
                f"offset {offset} of {self.head} was not computed: expected one of {known}"
            )
        return self.matrix[self.offsets.index(offset)]


@dataclass(frozen=True, eq=False)
class OVCircuit:
    """What a head writes for what it attends to.

    Attributes:
        head: the head.
        matrix: source x target: what it reads at a position that it attends to, and what it writes for that. Residual
            dimensions; or tokens and logits. Where no residual stream is known, what the projection of values is given,
            as it is, and what attention's output projection returns: no normalisation is folded in.
        bias: what it writes wherever it attends: by the biases of its values and of the normalisation before. The
            output bias of attention belongs to no head.
        held_norm: whether the output of all heads together is normalised before it is added to the stream, of which
            only the gain is in here.
        spaces: what rows and columns are, in a sentence.
    """

    head: Unit
    matrix: Float[Tensor, "source target"]
    bias: Float[Tensor, " target"]
    held_norm: bool
    spaces: str


def qk_circuit(
    model: HookedModel,
    head: str | Unit,
    tokens: bool = False,
    offset: int | Sequence[int] = OFFSETS,
    hold_norms: bool = False,
) -> QKCircuit:
    """W_Q R(offset) W_K^T of a head: what a query looks for in a key at that offset, and what biases add.

    Args:
        model: a transformer.
        head: a unit of `blocks.N.attn.hook_z`; of `decoder_blocks.N.cross_attn.hook_z` and the like in models with an
            encoder and a decoder.
        tokens: whether rows and columns are tokens, W_E W_QK W_E^T, instead of residual dimensions.
        offset: the key's position minus the query's: 0 is its own, -1 the one before. One or several. In images, and
            where no residual stream is known, they make no difference: heads that turn queries and keys are refused.
        hold_norms: take normalised queries and keys (Qwen 3, Gemma 3) with their gains, as if their norms were held
            fixed; by default such models are refused, since their scores are no bilinear form. Where no residual
            stream is known they are refused always.

    Raises:
        ValueError: if the unit is no head, its weights are not known or not those with which the model computes queries
            and keys, an offset along a stream of tokens is above 0 or outside the context, scores are no bilinear form
            of the head's own queries and keys or a negative multiple of it, or `tokens` is asked for and no residual
            stream is known.
    """
    if model.has_stream:
        attends = _along_stream(model, head, tokens, offset, hold_norms)
    else:
        attends = _alone(_lone(model, head, tokens), _as_tuple(offset))
    query, key, turns = attends.query, attends.key, attends.turns
    turned = torch.einsum("ka,oba->obk", key.weight, turns)  # R W_K^T
    bias = torch.einsum("a,oba->ob", key.bias, turns)
    # One offset at a time: with tokens for rows and columns each is the square of the vocabulary in float64.
    matrix = torch.stack([(query.weight @ turn).float() for turn in turned])
    return QKCircuit(
        model.unit(head), attends.offsets, matrix, (query.bias @ turned).float(),
        (bias @ query.weight.T).float(), (bias @ query.bias).float(), attends.held_norms, attends.spaces,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Attends:
    """What the scores of a head are made of: its queries and keys, turned at some offsets."""

    query: HeadRead
    key: HeadRead
    offsets: tuple[int, ...]
    turns: Tensor
    held_norms: bool
    spaces: str


def _along_stream(
    model: HookedModel,
    head: str | Unit,
    tokens: bool,
    offset: int | Sequence[int],
    hold_norms: bool,
) -> _Attends:
    """The queries and keys of a head of a residual stream."""
    transformer = Transformer(model)
    layer, index = transformer.head(head)
    offsets = _offsets(transformer, layer, offset, hold_norms)
    turns = rotations(transformer, layer, offsets)
    query, key = (head_read(transformer, letter, layer, index) for letter in ("Q", "K"))
    if tokens:
        query, key = (_of_tokens(transformer, read) for read in (query, key))
    spaces = f"rows and columns are {'tokens' if tokens else _STREAM}"
    return _Attends(query, key, offsets, turns, transformer.normalises_qk(layer), spaces)


def _alone(head: LoneHead, offsets: tuple[int, ...]) -> _Attends:
    """The queries and keys of a head by its own weights; nothing turns them."""
    query, key = head.read("Q"), head.read("K")
    head.check_scores()
    turns = torch.eye(query.weight.shape[1]).to(query.weight).expand(len(offsets), -1, -1)
    rows, columns = len(query.weight), len(key.weight)
    spaces = (
        f"rows are the {rows} dimensions that the projection of queries of {head.name} is given, columns the {columns} "
        f"that the one of keys is given: {_NO_STREAM}"
    )
    return _Attends(query, key, offsets, turns, False, spaces)


_STREAM = "dimensions of the residual stream, with the normalisations on the way folded in"
_NO_STREAM = "no single residual stream is known, so no normalisation is folded in"


def _lone(model: HookedModel, head: str | Unit, tokens: bool) -> LoneHead:
    """A head of a model without a residual stream, where tokens lead to no head."""
    if tokens:
        raise ValueError(
            f"model {model.name} has no residual stream: {model.transformer}; tokens=True needs one, which leads from "
            "the embedding to the head and on to the logits"
        )
    return lone_head(model, head)


def _as_tuple(offset: int | Sequence[int]) -> tuple[int, ...]:
    offsets = (offset,) if isinstance(offset, int) else tuple(offset)
    if not offsets:
        raise ValueError("offset is empty: expected at least one, 0 or below")
    return offsets


def _offsets(
    transformer: Transformer, layer: int, offset: int | Sequence[int], hold_norms: bool
) -> tuple[int, ...]:
    """The offsets that are asked for, of a layer whose scores are a bilinear form."""
    if transformer.normalises_qk(layer) and not hold_norms:
        raise ValueError(
            f"layer {layer} of {transformer.model.name} normalises queries and keys, so its scores are no bilinear "
            "form: hold_norms=True takes them with their gains, as if their norms were fixed"
        )
    return _as_tuple(offset)


def ov_circuit(model: HookedModel, head: str | Unit, tokens: bool = False) -> OVCircuit:
    """W_OV of a head: what it writes for what it reads at a position that it attends to, and what biases add.

    Args:
        model: a transformer.
        head: as in `qk_circuit`.
        tokens: whether rows are tokens and columns logits, W_E W_OV W_U, instead of residual dimensions.

    Raises:
        ValueError: if the unit is no head, its weights are not known or not those with which the model computes values
            and outputs, what attention adds to the residual stream is not the sum of its heads' outputs, normalised or
            scaled, or `tokens` is asked for and no residual stream is known.
    """
    if not model.has_stream:
        lone = _lone(model, head, tokens)
        read, write = lone.read("V"), lone.write()
        spaces = (
            f"rows are the {len(read.weight)} dimensions that the projection of values of {lone.name} is given, "
            f"columns the {write.shape[1]} that its output projection returns: {_NO_STREAM}"
        )
        return OVCircuit(
            model.unit(head),
            (read.weight @ write).float(),
            (read.bias @ write).float(),
            False,
            spaces,
        )
    transformer = Transformer(model)
    layer, index = transformer.head(head)
    read, write = head_read(transformer, "V", layer, index), head_write(transformer, layer, index)
    if tokens:
        read = _of_tokens(transformer, read)
        write = write @ composition.read_weights(transformer, None).double()
    after = transformer.writes[layer].attention
    held = after is not None and after.norm is not None
    spaces = "rows are tokens, columns logits" if tokens else f"rows and columns are {_STREAM}"
    return OVCircuit(
        model.unit(head), (read.weight @ write).float(), (read.bias @ write).float(), held, spaces
    )


def _of_tokens(transformer: Transformer, read: HeadRead) -> HeadRead:
    return HeadRead(transformer.embedding().double() @ read.weight, read.bias)


@dataclass(frozen=True, eq=False)
class Composition:
    """How much of what a head writes a later head reads, compared with random matrices.

    Attributes:
        source: the earlier head.
        target: the later head.
        offsets: the key's position minus the query's in the later head.
        scores: ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV|| over the product of the factors' norms (Q-, K- and
            V-composition), from 0 to 1. V does not depend on the offset.
        random: the same of matrices with the same singular values, turned at random: draw x offset x (Q, K, V).
        seed: the seed of the draws.
        held_norms: as in `QKCircuit`.
    """

    source: Unit
    target: Unit
    offsets: tuple[int, ...]
    scores: Float[Tensor, "offset part"]
    random: Float[Tensor, "draw offset part"]
    seed: int
    held_norms: bool


def head_composition(
    model: HookedModel,
    source: str | Unit,
    target: str | Unit,
    offset: int | Sequence[int] = OFFSETS,
    draws: int = 20,
    seed: int = 0,
    hold_norms: bool = False,
) -> Composition:
    """Q-, K- and V-composition of two heads (Elhage et al. 2021, "Composition"), compared with random matrices.

    Products of matrices of low rank are small by chance, the smaller the fewer dimensions they share, so a score says
    something only in comparison with matrices of equal spectrum: singular values are kept, and the earlier head's
    output is turned by a random rotation of the residual stream.

    Args:
        model: a transformer.
        source: the earlier head, a unit of `blocks.N.attn.hook_z`.
        target: the later head.
        offset: as in `qk_circuit`.
        draws: how many random rotations.
        seed: their seed.
        hold_norms: as in `qk_circuit`.

    Raises:
        ValueError: as `qk_circuit` and `ov_circuit` do; also if the source is not in an earlier layer, or `draws` is
            below 1.
    """
    transformer = Transformer(model)
    (i, earlier), (j, later) = transformer.head(source), transformer.head(target)
    if i >= j:
        raise ValueError(
            f"source {source} must be in an earlier layer than target {target}: it reads nothing of what that writes"
        )
    if draws < 1:
        raise ValueError(f"draws {draws} must be at least 1")
    offsets = _offsets(transformer, j, offset, hold_norms)
    turns = rotations(transformer, j, offsets)
    attends = [composition.qk(transformer, j, later, turn) for turn in turns]
    moved, moves = composition.ov(transformer, i, earlier), composition.ov(transformer, j, later)

    def scores(written: composition.LowRank) -> Tensor:
        return torch.tensor(
            [composition.composition_scores(written, one, moves) for one in attends]
        )

    # W_O = S F^T with an orthonormal F: another F leaves the singular values of W_V W_O as they are.
    generator = torch.Generator().manual_seed(seed)
    triangle = torch.linalg.qr(moved.right.mT).R
    size, n = moved.left.shape
    turned = [
        composition.LowRank(
            moved.left, triangle.mT @ random_frame(size, n, generator).to(triangle).mT
        )
        for _ in range(draws)
    ]
    return Composition(
        model.unit(source), model.unit(target), offsets, scores(moved), torch.stack([scores(one) for one in turned]),
        seed, transformer.normalises_qk(j),
    )  # fmt: skip


def neuron_directions(
    model: HookedModel, neuron: str | Unit
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The directions in the residual stream that a neuron reads and writes.

    Raises:
        ValueError: if the model has no residual stream or the unit no neuron, `blocks.N.mlp.hook_post:INDEX`.
    """
    transformer = Transformer(model)
    layer, index = transformer.neuron(neuron)
    read = composition.read_weights(transformer, layer, torch.tensor([index]))[:, 0]
    return read, composition.written_weights(transformer, layer)[index]


def direct_logits(model: HookedModel, neuron: str | Unit) -> Float[Tensor, " token"]:
    """The direct effect of a neuron on the logits, for one unit of its activation: W_out W_U.

    Raises:
        ValueError: if the model has no residual stream or the unit no neuron.
    """
    transformer = Transformer(model)
    layer, index = transformer.neuron(neuron)
    written = composition.written_weights(transformer, layer)[index]
    weight = at_least_single(transformer.unembedding()[0])
    # The vector through the normalisation, and not all of W_U through its adjoint: the vocabulary may be large.
    return transformer.norm("final").linear(written).to(weight) @ weight
