"""How attention turns queries and keys by their positions, found by experiment.

With rotary embeddings (Su et al. 2021, "RoFormer") a query q at position i and a key k at position j have the score
q R_i (k R_j)^T = q R(j - i) k^T, so there is no W_QK without an offset. The rotations are read off where a bridge shows
rotated queries and keys, else found from attention patterns: log p(i, j) - log p(i, 0) is the score of a key against
that of a key of zeros. Either way they are checked against patterns on random queries and keys. In images positions
follow each other in no order of which there are offsets: there nothing may turn queries and keys, which is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.transformer import LayerSites, Transformer

_CHECKS = 8
"""Texts with random queries and keys on which rotations are checked."""


def rotations(
    transformer: Transformer, layer: int, offsets: Sequence[int]
) -> Float[Tensor, "offset d_head d_head"]:
    """R(offset) of a layer, for offsets from a query's position to a key's: 0 is its own, -1 the one before.

    Without rotary embeddings each is the identity. Biases of positions alone (ALiBi) are no part of them.

    Args:
        transformer: the model.
        layer: a layer.
        offsets: of texts, none above 0, since no query sees a later key. Of images they make no difference.

    Raises:
        ValueError: if an offset is above 0 or outside the model's context, or what attention computes from queries and
            keys is no bilinear form.
    """
    sites, spec = transformer.layers[layer], transformer.model.input
    for offset in offsets if isinstance(spec, TokenInput) else ():
        if not -spec.n_ctx < offset <= 0:
            raise ValueError(
                f"offset {offset} must be from {1 - spec.n_ctx} to 0: the key's position minus the query's"
            )
    if sites.queries is None or sites.keys is None or sites.patterns is None:
        raise ValueError(
            f"layer {layer} of {transformer.model.name} shows no queries, keys and patterns: its scores cannot be "
            "measured"
        )
    if not isinstance(spec, TokenInput):
        where = f"layer {layer} of {transformer.model.name}"
        query, key = transformer.normed_sites(layer) or (sites.queries, sites.keys)
        check_bilinear(transformer.model, where, query, key, sites.patterns)
        size = torch.eye(_size(transformer, sites), dtype=torch.float64)
        return size.expand(len(offsets), -1, -1).to(transformer.model.device)
    with transformer.model.lock:
        found = _shown(transformer, sites, offsets) if sites.rotated else None
        if found is None:
            found = _from_patterns(transformer, sites, offsets)
        _check(transformer, sites, offsets, found)
    return found.to(transformer.model.device)


def check_bilinear(model: Any, where: str, query: str, key: str, pattern: str) -> None:
    """Raise ValueError unless the scores of heads are q k^T times a positive number, whatever their positions.

    Queries and keys are made random, equal for all heads. Of the logarithm of their pattern that of queries of zeros is
    taken off: what is added for positions, and masks. A constant of each query changes no pattern.

    Args:
        model: a `HookedModel`.
        where: what the attention is called in errors.
        query: the site of its queries.
        key: that of its keys.
        pattern: that of its patterns.
    """
    scores, made = _random_scores(model, where, query, key, pattern)
    if not made.any():
        raise ValueError(
            f"{where}: each query sees one key alone in the model's own example, so its scores cannot be measured"
        )
    for head in range(scores.shape[-3]):
        measured, wanted = scores[..., head, :, :], made[..., head, :, :]
        scale = (wanted * measured).sum() / wanted.square().sum().clamp_min(1e-30)
        off = float((measured - scale * wanted).abs().max() / measured.abs().max().clamp_min(1e-30))
        if not off <= _tolerance(model) or not scale > 0:
            raise ValueError(
                f"{where}: the scores of head {head} are not q . k times a constant (off by {off:.2g} of the largest): "
                "queries and keys are normalised, or turned by their positions, so it has no QK circuit"
            )


def _random_scores(
    model: Any, where: str, query: str, key: str, pattern: str
) -> tuple[Float[Tensor, "*batch head query key"], Float[Tensor, "*batch head query key"]]:
    """Scores of random queries and keys, and q k^T; both less their mean over the keys that a query sees."""
    inputs = model.input.example(2)
    generator = torch.Generator().manual_seed(0)
    with model.lock:
        cache = model.run(inputs, read=[query, key])
        # Small enough that a cap on scores does not show; one head, for all of them.
        shapes = [cache[site][..., :1, :].shape for site in (query, key)]
        q, k = (torch.randn(shape, generator=generator) / 2 for shape in shapes)
        given = []
        for queries in (q, torch.zeros_like(q)):
            edits = {query: partial(_for_all_heads, queries), key: partial(_for_all_heads, k)}
            run = model.run(inputs, read=[pattern], edits=edits, until=pattern)
            given.append(run[pattern].double().cpu())
    made = torch.einsum("...qhd,...khd->...hqk", q.double(), k.double())
    if made.shape[-2:] != given[0].shape[-2:]:
        raise ValueError(
            f"{where}: its patterns are of {given[0].shape[-2]} queries and {given[0].shape[-1]} keys, and its "
            f"projections make {made.shape[-2]} and {made.shape[-1]}: positions are merged on the way, so it has no QK "
            "circuit"
        )
    # What is as good as hidden by a mask has no logarithm to compare.
    kept = (given[0] > 1e-12) & (given[1] > 1e-12)
    scores = torch.where(kept, given[0].log() - given[1].log(), 0.0)
    return _centred(scores, kept), _centred(made.expand_as(scores), kept)


def _for_all_heads(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like).expand_as(like)


def _centred(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores less their mean over the keys that are kept; zero at others."""
    mean = (scores * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
    return (scores - mean) * kept


def _shown(
    transformer: Transformer, sites: LayerSites, offsets: Sequence[int]
) -> Float[Tensor, "offset d_head d_head"] | None:
    """The rotations, from what the model makes of unit vectors; None if its rotations are not shown."""
    assert sites.rotated is not None, "asked before"
    size, length = _size(transformer, sites), 1 - min(offsets)
    units = torch.eye(size)[:, None].expand(size, length, size)
    cache = _run(transformer, sites, units, units, sites.rotated)
    query, key = (
        cache[name][:, :, 0].double() for name in sites.rotated
    )  # unit x position x d_head
    if query.shape[-1] != size:
        return None
    last = length - 1
    found = torch.stack([query[:, last] @ key[:, last + offset].T for offset in (*offsets, 0)])
    # Some models lengthen queries and keys as they turn them (YaRN), which is a constant of all scores.
    return found[:-1] / (found[-1].trace() / size)


def _from_patterns(
    transformer: Transformer, sites: LayerSites, offsets: Sequence[int]
) -> Float[Tensor, "offset d_head d_head"]:
    """The rotations, from scores of unit vectors as queries with unit vectors as keys.

    Query a is at every position, keys follow each other from position 1 on, and the key at position 0 is zero.
    """
    size, far = _size(transformer, sites), -min(offsets)
    room = min(size, transformer.model.input.n_ctx - 1 - far)
    while room >= 1:
        scores = _unit_scores(transformer, sites, [*offsets, 0], room)
        if bool(scores.isfinite().all()):
            scale = float(scores[-1].diagonal().mean())
            # At its own position nothing is turned: the score is q . k times a constant, or it is no such form.
            off = float((scores[-1] - scale * torch.eye(size)).abs().max())
            if not off <= _tolerance(transformer.model) * abs(scale):
                raise _not_bilinear(transformer, sites)
            return scores[:-1] / scale
        room //= 2  # the layer looks back over a window only
    raise ValueError(
        f"layer {sites.number} of {transformer.model.name} does not look as far back as offset {-far} and a key to "
        "compare with"
    )


def _unit_scores(
    transformer: Transformer, sites: LayerSites, offsets: Sequence[int], room: int
) -> Float[Tensor, "offset d_head d_head"]:
    """Scores of unit vectors with unit vectors at some offsets, `room` keys at a time."""
    size, far = _size(transformer, sites), -min(offsets)
    scores = torch.zeros(len(offsets), size, size, dtype=torch.float64)
    # As large as keeps differences well above rounding, without making any probability vanish.
    unit = torch.eye(size) * 2 * size**0.25
    for first in range(0, size, room):
        some = unit[first : first + room]
        keys = torch.zeros(size, 1 + len(some) + far, size)
        keys[:, 1 : 1 + len(some)] = some
        measured = _scores(transformer, sites, unit[:, None].expand_as(keys), keys, 0)[:, 0]
        places = torch.arange(1, 1 + len(some))
        for n, offset in enumerate(offsets):
            scores[n, :, first : first + len(some)] = measured[:, places - offset, places]
    return scores


def _check(
    transformer: Transformer, sites: LayerSites, offsets: Sequence[int], found: Tensor
) -> None:
    """Raise ValueError unless scores of random queries and keys are what the rotations say, up to one constant."""
    size, far = _size(transformer, sites), -min(offsets)
    # The key of zeros is as near as it can be, since some layers look back over a window only.
    free = next(back for back in range(far + 2) if -back not in offsets)
    at = max(far, free)
    if at >= transformer.model.input.n_ctx:
        raise ValueError(
            f"offset {-far} leaves no room for a key to compare with in a context of {at} tokens"
        )
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, _CHECKS, 1 + at, size, generator=generator)
    key[:, at - free] = 0
    small = 0.5  # small enough that a cap on scores does not show
    every = _scores(transformer, sites, query * small, key * small, at - free)[:, :, at]
    made = torch.stack(
        [
            torch.einsum("ba,ac,bc->b", query[:, at].double(), turn, key[:, at + offset].double())
            for offset, turn in zip(offsets, found, strict=True)
        ]
    )
    turned = float((found @ found.mT - torch.eye(size)).abs().max())
    for measured in every.unbind(1):  # heads differ in what is done to their queries and keys
        given = torch.stack([measured[:, at + offset] for offset in offsets])
        _check_head(transformer, sites, far, made, given, turned)


def _check_head(
    transformer: Transformer,
    sites: LayerSites,
    far: int,
    made: Float[Tensor, "offset example"],
    given: Float[Tensor, "offset example"],
    turned: float,
) -> None:
    """Raise ValueError unless the scores of a head are what was made of the rotations, times a positive number."""
    if not bool(given.isfinite().all()):
        raise ValueError(
            f"layer {sites.number} of {transformer.model.name} does not look as far back as offset {-far}"
        )
    scale = (made * given).sum() / made.square().sum()
    off = float((given - scale * made).abs().max() / given.abs().max().clamp_min(1e-30))
    if not max(off, turned) <= 10 * _tolerance(transformer.model) or not scale > 0:
        raise _not_bilinear(transformer, sites)


def _not_bilinear(transformer: Transformer, sites: LayerSites) -> ValueError:
    return ValueError(
        f"layer {sites.number} of {transformer.model.name}: what attention computes from queries and keys is no "
        "bilinear form q R(offset) k^T, so it has no QK circuit"
    )


def _tolerance(model: Any) -> float:
    kinds = [p.dtype for p in model.module.parameters() if p.is_floating_point()]
    return max([1e-3, *(4 * torch.finfo(kind).eps for kind in kinds)])


def _size(transformer: Transformer, sites: LayerSites) -> int:
    return transformer.model.site(sites.queries).shape[-1]


def _scores(
    transformer: Transformer, sites: LayerSites, query: Tensor, key: Tensor, zero: int
) -> Float[Tensor, "example head query key"]:
    """Scores of queries with keys, those with the key of zeros at a position and biases of positions taken off."""
    assert sites.patterns is not None, "asked before"
    patterns = []
    for queries in (query, torch.zeros_like(query)):
        cache = _run(transformer, sites, queries, key, (sites.patterns,))
        patterns.append(cache[sites.patterns].log())
    scores, none = (p - p[..., zero : zero + 1] for p in patterns)
    return scores - none


def _run(
    transformer: Transformer,
    sites: LayerSites,
    query: Float[Tensor, "example position d_head"],
    key: Float[Tensor, "example position d_head"],
    read: Sequence[str],
) -> Mapping[str, Tensor]:
    """Run with every head's queries and keys replaced, behind their normalisation if they have one; in float64."""
    model = transformer.model
    own = (sites.queries, sites.keys)
    if query.shape[1] in [model.site(name).n_units for name in own]:
        # One position more, which nothing before it sees: else heads and positions could not be told apart.
        query, key = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (query, key))
    edits = {
        site: partial(_laid_out, value, model.site(before).n_units)
        for site, before, value in zip(
            transformer.normed_sites(sites.number) or own, own, (query, key), strict=True
        )
    }
    tokens = model.input.example(1)[:, :1].expand(len(query), query.shape[1])
    cache = model.run(tokens, read=read, edits=edits, until=model.last(read))
    return {name: cache[name].double().cpu() for name in read}


def _laid_out(value: Float[Tensor, "example position d_head"], heads: int, like: Tensor) -> Tensor:
    """Numbers of one head for all heads, in a tensor's layout: heads behind positions, in front of them, or joined."""
    value = value.to(like)
    if like.ndim == 3:
        return value.repeat(1, 1, heads)
    behind = like.shape[1] == value.shape[1]
    return (value[:, :, None] if behind else value[:, None]).expand_as(like).clone()
