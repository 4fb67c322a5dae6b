"""What each part of a transformer adds to the residual stream, on data.

The stream is a sum (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). What a layer adds is the
difference of the stream after and before it, so the parts add up to the last stream whatever the layers do inside.
Attention is split further into heads; a normalisation behind it is applied with its factor held at that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.transformer import LayerSites, LayerWrites, Transformer

Part = tuple[str, Float[Tensor, "example d_model"]]
"""A part's name, and what it adds to the stream at one position of each example, in float64."""


def sites_of_writes(transformer: Transformer) -> tuple[str, ...]:
    """The sites that `stream_parts` reads."""
    names = [transformer.embed, transformer.position]
    for layer in transformer.layers:
        names += [layer.before, layer.between, layer.after, layer.heads]
    return tuple(dict.fromkeys(name for name in names if name is not None))


def stream_parts(transformer: Transformer, at: Callable[[str], Tensor]) -> Iterator[Part]:
    """What adds up to the last residual stream, in the order in which it is written.

    `embed` and `pos_embed` (one `embed` for all that enters the first layer, where the two do not add up to that),
    heads as units of their site, `blocks.N.attn bias`, `blocks.N.mlp` (`blocks.N.rest` where a layer adds something
    else as well, or changes the stream). Where a layer's heads do not add up to what attention adds, `blocks.N.attn`
    stands for all of them, and `blocks.N` for a layer that cannot be split at all.

    Args:
        transformer: the model.
        at: the tensor of a site at the positions that are asked for: example first, units last.
    """
    yield from _entering(transformer, at)
    for layer, writes in zip(transformer.layers, transformer.writes, strict=True):
        before, after = at(layer.before).double(), at(layer.after).double()
        if not writes.split:
            yield layer.name, after - before
        elif writes.between is not None:
            middle = at(writes.between).double()
            yield from _attention_parts(transformer, layer, writes, at, middle - before)
            yield _rest(layer, writes), after - middle
        else:
            heads = list(_attention_parts(transformer, layer, writes, at, None))
            yield from heads
            yield (
                _rest(layer, writes),
                after - before - torch.stack([value for _, value in heads]).sum(0),
            )


def _rest(layer: LayerSites, writes: LayerWrites) -> str:
    """The name of what a layer adds besides its heads: the MLP's output, if it is that and is shown."""
    other = layer.mlp is not None and writes.mlp is None
    return f"{layer.name}.{'rest' if other else 'mlp'}"


def _entering(transformer: Transformer, at: Callable[[str], Tensor]) -> Iterator[Part]:
    whole = at(transformer.layers[0].before)
    if transformer.embed is not None and transformer.position is not None:
        token, position = at(transformer.embed), at(transformer.position)
        off = token.double() + position.double() - whole.double()
        if float(off.detach().norm()) <= 1e-2 * float(whole.detach().double().norm()):
            yield "embed", whole.double() - position.double()
            yield "pos_embed", position.double()
            return
    if transformer.embed is not None and transformer.adds_positions:
        token = at(transformer.embed).double()
        yield "embed", token
        yield "pos_embed", whole.double() - token
        return
    yield "embed", whole.double()


def _attention_parts(
    transformer: Transformer,
    layer: LayerSites,
    writes: LayerWrites,
    at: Callable[[str], Tensor],
    added: Tensor | None,
) -> Iterator[Part]:
    """Heads and bias of a layer, or `added` as a whole where they do not make it up."""
    if writes.attention is None or layer.heads is None:
        assert added is not None, "a layer without a stream between is split by its heads"
        yield f"{layer.name}.attn", added
        return
    out, bias = transformer.writes_of(layer.number)
    parts = torch.einsum("ehd,hdm->ehm", at(layer.heads).double(), out)
    whole = parts.sum(1) + bias
    made = writes.attention.held(parts, whole[:, None])
    for head in range(made.shape[1]):
        yield f"{layer.heads}:{head}", made[:, head]
    constant = writes.attention.held(bias.expand_as(whole), whole) + writes.attention.bias(whole)
    if constant.any():
        yield f"{layer.name}.attn bias", constant
