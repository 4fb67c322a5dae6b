"""Virtual weights of transformers, between units that are connected by the residual stream alone.

Row vectors stand on the left throughout, as in TransformerLens: x W_Q, so W_QK = W_Q W_K^T and W_OV = W_V W_O are
both d_model x d_model, and a path multiplies matrices from left to right in the order of execution.

Normalisations count with their linear part, gain * (x - centre(x)), as it is measured
(`circuits.models.adapter.norms`), not with the division by the norm of what they are given: those before attention,
before an MLP and before the unembedding, those of queries and keys, and those behind attention and MLP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.topology import SiteLink, WeightLayer
from circuits.models.adapter.transformer import Letter, Transformer
from circuits.tensors import at_least_single
from circuits.units import Site

PARTS = ("Q", "K", "V")
"""By which of its inputs a head reads what another wrote, in the order of composition scores."""


def transformer_layers(model: Any) -> list[WeightLayer]:
    """Virtual weights of a transformer, between units connected by the residual stream.

    Head to later head: the composition scores ||W_OV W_QK||, ||W_QK W_OV^T|| and ||W_OV W_OV||
    over the product of the factors' norms, in the order Q, K, V (Elhage et al. 2021, "Virtual weights"). W_QK is
    that at offset 0, where a query attends to its own position: rotary embeddings turn it at every other offset.
    Neuron to later neuron: W_out W_in; neuron to logit: W_out W_U. Each matrix is computed when it is asked for.
    """
    transformer = Transformer(model)
    heads = [model.site(at.heads) if at.heads else None for at in transformer.layers]
    posts = [model.site(at.neurons) if at.neurons else None for at in transformer.layers]
    logits = model.site(transformer.logits)
    layers = []
    for i, j in itertools.combinations(range(len(transformer.layers)), 2):
        if (source := heads[i]) and (target := heads[j]):
            layers.append(_composition_layer(transformer, i, j, source, target))
        if (source := posts[i]) and (target := posts[j]):
            layers.append(_neuron_layer(transformer, i, j, source, target))
    try:
        transformer.norm("final")
        transformer.unembedding()
    except ValueError:  # positions are pooled before the classes, for example
        return layers
    return layers + [
        _neuron_layer(transformer, i, None, p, logits) for i, p in enumerate(posts) if p
    ]


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
    model: Any, source: Site, directions: Tensor, written: Site
) -> list[WeightLayer]:
    """Virtual weights from units that write directions, such as latents, to later neurons and to logits.

    Args:
        model: a `HookedModel` with a residual stream.
        source: the site of the units.
        directions: what each unit adds at the site `written`: unit x width of that site.
        written: a site of the residual stream, or the neurons or the output of an MLP.
    """
    transformer = Transformer(model)
    number = next(
        (at.number for at in transformer.layers if written.name in (at.neurons, at.mlp)), None
    )
    if number is None and written.kind != "residual":
        return []

    def added() -> Tensor:
        """The directions as they reach the stream."""
        if number is None:
            return directions
        out = (
            transformer.neuron_weights(number)[1]
            if written.name == transformer.layers[number].neurons
            else None
        )
        made = directions if out is None else directions.to(out) @ out
        return _written(transformer, number, made).to(directions)

    # Sites of kind "residual" include some of another width, such as the output of a key projection.
    if number is None and directions.shape[1] != transformer.width:
        return []
    order = {site.name: i for i, site in enumerate(model.sites)}
    targets = [(at.number, model.site(at.neurons)) for at in transformer.layers if at.neurons]
    targets = [(layer, site) for layer, site in targets if order[site.name] > order[written.name]]
    return [
        _directed(transformer, source.name, layer, source, site, added)
        for layer, site in (*targets, (None, model.site(transformer.logits)))
    ]


def _directed(
    transformer: Transformer,
    name: str,
    layer: int | None,
    source: Site,
    target: Site,
    added: Callable[[], Tensor],
) -> WeightLayer:
    """From units that add directions to the stream, to the neurons of a layer or to the logits (None)."""

    def onto(directions: Tensor, columns: Tensor | None = None) -> Tensor:
        directions = at_least_single(directions)
        return directions @ read_weights(transformer, layer, columns).to(directions)

    return _virtual_layer(
        f"{name} to {'logits' if layer is None else layer}",
        lambda after: onto(added(), after).T,
        lambda before: onto(added()[before]),
        source,
        target,
    )


def read_weights(
    transformer: Transformer, layer: int | None, columns: Tensor | None = None
) -> Float[Tensor, "d_model column"]:
    """What a layer's neurons (None: the logits) read from the stream, through the normalisation before them."""
    weight = transformer.unembedding()[0] if layer is None else transformer.neuron_weights(layer)[0]
    own = weight if columns is None else weight[:, columns]
    norm = transformer.norm("final") if layer is None else transformer.norm("mlp", layer)
    return norm.adjoint(own.T).T.to(at_least_single(weight))


def written_weights(transformer: Transformer, layer: int) -> Float[Tensor, "neuron d_model"]:
    """What a layer's neurons add to the stream, through what is done to the MLP's output on its way there."""
    out = transformer.neuron_weights(layer)[1]
    return _written(transformer, layer, out).to(at_least_single(out))


def _written(transformer: Transformer, layer: int, made: Tensor) -> Tensor:
    write = transformer.writes[layer].mlp
    if write is None:
        raise ValueError(
            f"layer {layer} of {transformer.model.name}: what its MLP adds to the stream is not its output, normalised "
            "or scaled"
        )
    return write.linear(made)


@dataclass(frozen=True, eq=False)
class HeadRead:
    """What a head reads from x as queries, keys or values: linear(x) @ weight + bias, in float64.

    Attributes:
        weight: acts on the stream itself, with the normalisation before it folded in; where no stream is known, on what
            the projection is given.
        bias: with what the normalisation's own bias adds. It is not divided by the norm of the stream.
    """

    weight: Float[Tensor, "d_in d_head"]
    bias: Float[Tensor, " d_head"]


def head_read(transformer: Transformer, letter: Letter, layer: int, head: int) -> HeadRead:
    """What a head reads, with the linear parts of the normalisations before and behind its weights.

    Raises:
        ValueError: if the model has no such matrices, or normalises queries and keys of all heads together after
            subtracting their mean.
    """
    weight, bias = transformer.reads(letter, layer, head)
    norm = transformer.norm("attention", layer)
    made = HeadRead(norm.adjoint(weight.T).T, norm.bias @ weight + bias)
    own = None if letter == "V" else transformer.qk_norm(letter, layer, head)
    return made if own is None else HeadRead(own.linear(made.weight), own.linear(made.bias))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix left @ right of residual dimensions, kept as its factors: d_head is much smaller than d_model."""

    left: Float[Tensor, "d_model d_head"]
    right: Float[Tensor, "d_head d_model"]

    @property
    def transposed(self) -> LowRank:
        """The transposed matrix."""
        return LowRank(self.right.mT, self.left.mT)

    def norm_with(self, other: LowRank | None = None) -> float:
        """The Frobenius norm of the matrix, or of its product with another: ||L M R||^2 = tr(M^T L^T L M R R^T)."""
        gram, right = self.left.mT @ self.left, self.right
        if other is not None:
            middle, right = self.right @ other.left, other.right
            gram = middle.mT @ gram @ middle
        square = (gram @ (right @ right.mT)).trace()
        return float(square.clamp_min(0).sqrt())


def qk(transformer: Transformer, layer: int, head: int, turn: Tensor | None = None) -> LowRank:
    """W_QK = W_Q R W_K^T of a head, d_model (query) x d_model (key), at offset 0 or turned by R."""
    query, key = (head_read(transformer, letter, layer, head) for letter in ("Q", "K"))
    return LowRank(query.weight if turn is None else query.weight @ turn, key.weight.mT)


def ov(transformer: Transformer, layer: int, head: int) -> LowRank:
    """W_OV = W_V W_O of a head: d_model (read) x d_model (written)."""
    return LowRank(
        head_read(transformer, "V", layer, head).weight, head_write(transformer, layer, head)
    )


def head_write(transformer: Transformer, layer: int, head: int) -> Float[Tensor, "d_head d_model"]:
    """What a head adds to the stream, through what is done to the output of attention on its way there.

    Raises:
        ValueError: if the heads' outputs, normalised or scaled, are not what attention adds.
    """
    write = transformer.writes[layer].attention
    if write is None:
        raise ValueError(
            f"layer {layer} of {transformer.model.name}: what attention adds to the stream is not the sum of its "
            "heads' outputs, normalised or scaled"
        )
    return write.linear(transformer.writes_of(layer)[0][head])


def composition_scores(
    moved: LowRank, attends: LowRank, moves: LowRank
) -> tuple[float, float, float]:
    """Q-, K- and V-composition of a head that writes `moved` (its W_OV) with a later one of W_QK and W_OV, in float64.

    The earlier head's output enters the later head's scores x W_QK y^T on the side of the query (W_OV W_QK) or of the
    key (W_QK W_OV^T), and its values (W_OV W_OV).
    """
    own, query, value = moved.norm_with(), attends.norm_with(), moves.norm_with()
    return (
        _share(moved.norm_with(attends), own, query),
        _share(attends.norm_with(moved.transposed), own, query),
        _share(moved.norm_with(moves), own, value),
    )


def _composition_layer(
    transformer: Transformer, i: int, j: int, source: Site, target: Site
) -> WeightLayer:
    def scores(before: Sequence[int], after: Sequence[int]) -> Tensor:
        """Scores of every pair of heads: before x after x (Q, K, V)."""
        written = [ov(transformer, i, head) for head in before]
        found = []
        for head in after:
            attends, moves = qk(transformer, j, head), ov(transformer, j, head)
            found.append([composition_scores(w, attends, moves) for w in written])
        return torch.tensor(found).reshape(len(after), len(before), 3).transpose(0, 1)

    def rows(after: Tensor) -> Tensor:
        return scores(range(source.n_units), after.tolist()).transpose(0, 1)

    def columns(before: Tensor) -> Tensor:
        return scores(before.tolist(), range(target.n_units))

    return _virtual_layer(f"composition {i} to {j}", rows, columns, source, target)


def _share(product: float, a: float, b: float) -> float:
    """The norm of a product over the product of the factors' norms; 0 where a factor is zero."""
    return product / (a * b) if a * b else 0.0


def _neuron_layer(
    transformer: Transformer, i: int, j: int | None, source: Site, target: Site
) -> WeightLayer:
    """Neurons of layer i to those of layer j, or to the logits."""
    return _directed(
        transformer, f"neurons {i}", j, source, target, lambda: written_weights(transformer, i)
    )
