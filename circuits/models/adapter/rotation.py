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

Groups = tuple[Sequence[int], Sequence[int]]
"""Which queries and which keys each head has, among those that are shown: groups of heads may share them."""

Known = tuple[float, float]
"""By which number a head's scores are q . k, and how large they were when that was found."""


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
        groups = _groups(transformer, sites)
        check_bilinear(transformer.model, where, query, key, sites.patterns, groups)
        size = torch.eye(_size(transformer, sites), dtype=torch.float64)
        return size.expand(len(offsets), -1, -1).to(transformer.model.device)
    with transformer.model.lock:
        _check_positions(transformer, sites)
        found = _shown(transformer, sites, offsets) if sites.rotated else None
        if found is None:
            found = _from_patterns(transformer, sites, offsets)
        _check(transformer, sites, offsets, found)
    return found.to(transformer.model.device)


def _groups(transformer: Transformer, sites: LayerSites) -> Groups:
    """Which of the queries and which of the keys that are shown each head has."""
    heads = range(transformer.model.site(sites.patterns).n_units)
    query, key = (
        [transformer.parts.group(letter, sites.number, head) for head in heads]
        for letter in ("Q", "K")
    )
    return query, key


# --- without offsets ---------------------------------------------------------------------------


def check_bilinear(
    model: Any, where: str, query: str, key: str, pattern: str, groups: Groups
) -> None:
    """Raise ValueError unless the scores of heads are q k^T times a positive number, whatever their positions.

    Queries and keys are tried that are random, and the model's own, made small. They differ by head and by position, so
    that scores of one head that are made of another's do not pass. Of the logarithm of their pattern that of queries
    and keys of zeros is taken off: what is added for positions, and masks. A constant of each query changes no pattern.

    Args:
        model: a `HookedModel`.
        where: what the attention is called in errors.
        query: the site of its queries.
        key: that of its keys.
        pattern: that of its patterns.
        groups: which of the queries and which of the keys each head has.
    """
    inputs = model.input.example(2)
    with model.lock:
        cache = model.run(inputs, read=[query, key, pattern])
        _check_pattern(where, cache[query], cache[key], cache[pattern])
        known: list[Known] = []
        for q, k in _tried(cache[query], cache[key]):
            patterns = [
                _pattern(model, inputs, {query: own[0], key: own[1]}, pattern)
                for own in ((q, k), (q * 0, k), (q * 0, k * 0))
            ]
            made = torch.einsum(
                "...qhd,...khd->...hqk",
                q[..., groups[0], :].double(),
                k[..., groups[1], :].double(),
            )
            known = _check_scores(model, where, made, patterns, known)


def _check_pattern(where: str, query: Tensor, key: Tensor, pattern: Tensor) -> None:
    """Raise ValueError if a pattern has other positions than queries and keys."""
    made, found = (query.shape[-3], key.shape[-3]), tuple(pattern.shape[-2:])
    if made != found or query.shape[:-3] != pattern.shape[:-3]:
        raise ValueError(
            f"{where}: its patterns are of {found[0]} queries and {found[1]} keys, and its projections make {made[0]} "
            f"and {made[1]}: positions are merged or added on the way, so it has no QK circuit"
        )


def _tried(query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys for which scores are compared: random, and those that are given, made small."""
    generator = torch.Generator().manual_seed(0)
    # Small enough that a cap on scores does not show.
    drawn = [torch.randn(own.shape, generator=generator) / 2 for own in (query, key)]
    return [(drawn[0], drawn[1]), (_small(query), _small(key))]


def _small(value: Tensor) -> Tensor:
    """Queries or keys, those of each head scaled to the size of the random ones."""
    held = value.detach().cpu().float()
    others = [axis for axis in range(held.ndim) if axis != held.ndim - 2]
    return held / (2 * held.square().mean(others, keepdim=True).sqrt().clamp_min(1e-30))


def _pattern(
    model: Any, inputs: Tensor, values: Mapping[str, Tensor], pattern: str
) -> Float[Tensor, "*batch head query key"]:
    edits = {site: partial(_in_place_of, value) for site, value in values.items()}
    run = model.run(inputs, read=[pattern], edits=edits, until=pattern)
    return run[pattern].double().cpu()


def _in_place_of(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like)


def _check_scores(
    model: Any,
    where: str,
    made: Float[Tensor, "*batch head query key"],
    patterns: Sequence[Float[Tensor, "*batch head query key"]],
    known: Sequence[Known],
) -> list[Known]:
    """Raise ValueError unless scores are those that were made, times a positive number; by which number they are.

    Args:
        model: a `HookedModel`.
        where: what the attention is called in errors.
        made: q k^T.
        patterns: with those queries and keys, with queries of zeros, and with keys of zeros, too.
        known: the number of each head, if it was found with other queries and keys; else empty.
    """
    # What is as good as hidden by a mask has no logarithm to compare.
    kept = torch.stack([own > 1e-12 for own in patterns]).all(0)
    logs = [torch.where(kept, own.log(), 0.0) for own in patterns]
    scores, added, made = (
        _centred(own, kept) for own in (logs[0] - logs[2], logs[1] - logs[2], made)
    )
    if not known and not made.any():
        raise ValueError(
            f"{where}: each query sees one key alone in the model's own example, so its scores cannot be measured"
        )
    found = []
    for head in range(scores.shape[-3]):
        own = [x[..., head, :, :] for x in (scores, made, added)]
        found.append(_fit(own[0], own[1], known[head] if known else None))
        scale, size = found[-1]
        if _off(own[2], size) > _tolerance(model):
            raise _added_to_queries(f"{where}: head {head}")
        off = _off(own[0] - scale * own[1], size)
        if not off <= _tolerance(model):
            raise ValueError(
                f"{where}: the scores of head {head} are not q . k times a constant (off by {off:.2g} of the largest): "
                "queries and keys are normalised, or turned by their positions, or heads are mixed, so it has no QK "
                "circuit"
            )
        if not scale > 0:
            raise _not_positive(f"{where}: the scores of head {head}", scale)
    return found


def _fit(measured: Tensor, wanted: Tensor, known: Known | None) -> Known:
    """The number by which one tensor is the other, unless it is known, and the size of the first."""
    if known is not None:
        return known
    scale = float((wanted * measured).sum() / wanted.square().sum().clamp_min(1e-30))
    return scale, float(measured.abs().max())


def _off(rest: Tensor, size: float) -> float:
    return float(rest.abs().max()) / max(size, 1e-30)


def _added_to_queries(what: str) -> ValueError:
    return ValueError(
        f"{what} scores keys even with queries of zeros: something is added to queries after their projection (a bias "
        "for all positions, or what the projection was given), which is no part of its weights, so it has no QK circuit"
    )


def _not_positive(what: str, scale: float) -> ValueError:
    return ValueError(
        f"{what} are q . k times {scale:.2g}, which is not above 0: a QK circuit is known up to a positive factor, and "
        "this one would have the wrong sign"
    )


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


def _check_positions(transformer: Transformer, sites: LayerSites) -> None:
    """Raise ValueError unless each token has one query and one key, so that offsets say which keys are meant."""
    model = transformer.model
    assert sites.queries is not None, "asked before"
    assert sites.keys is not None, "asked before"
    assert sites.patterns is not None, "asked before"
    # One less than there can be: queries of a number that is learned are often as many as tokens can be.
    tokens = model.input.example(1)[:, : max(1, model.input.n_ctx - 1)]
    names = (sites.queries, sites.keys)
    cache = model.run(
        tokens, read=[*names, sites.patterns], until=model.last([*names, sites.patterns])
    )
    n, pattern = tokens.shape[1], tuple(cache[sites.patterns].shape[-2:])
    places = [cache[name].shape[model.site(name).axes.index("position")] for name in names]
    if (*places, *pattern) != (n,) * 4:
        raise ValueError(
            f"layer {sites.number} of {model.name} makes {places[0]} queries and {places[1]} keys of {n} tokens, and "
            f"its patterns are of {pattern[0]} queries and {pattern[1]} keys: they are not one for each token, so its "
            "scores have no offsets"
        )


def _check(
    transformer: Transformer, sites: LayerSites, offsets: Sequence[int], found: Tensor
) -> None:
    """Raise ValueError unless scores of queries and keys are what the rotations say, up to one constant.

    Both random queries and keys and the model's own, made small, differ by head and by position.
    """
    far = -min(offsets)
    # The key of zeros is as near as it can be, since some layers look back over a window only.
    free = next(back for back in range(far + 2) if -back not in offsets)
    at = max(far, free)
    if at >= transformer.model.input.n_ctx:
        raise ValueError(
            f"offset {-far} leaves no room for a key to compare with in a context of {at} tokens"
        )
    tokens = transformer.model.input.example(_CHECKS)[:, : 1 + at]
    known: list[Known] = []
    for query, key in _tried(*_own(transformer, sites, tokens)):
        key[:, at - free] = 0
        made, given, added = _measured(
            transformer, sites, offsets, found, query, key, at - free, tokens
        )
        turned = float((found @ found.mT - torch.eye(found.shape[-1])).abs().max())
        known = [
            _check_head(
                transformer, sites, offsets, head, made[head], given[head], added[head], turned,
                known[head] if known else None,
            )
            for head in range(len(made))
        ]  # fmt: skip


def _own(transformer: Transformer, sites: LayerSites, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own queries and keys, behind their normalisation if they have one, by position and head."""
    model = transformer.model
    own = (sites.queries, sites.keys)
    read = transformer.normed_sites(sites.number) or own
    heads, n = [model.site(name).n_units for name in own], tokens.shape[1]
    if n in heads:
        tokens = _with_another(tokens)
    cache = model.run(tokens, read=read, until=model.last(read))
    query, key = (
        _by_position(cache[name], tokens.shape[1], size)[:, :n]
        for name, size in zip(read, heads, strict=True)
    )
    return query, key


def _with_another(tokens: Tensor) -> Tensor:
    """Texts of one token more, where heads and positions could not be told apart else."""
    return torch.cat([tokens, tokens[:, :1]], 1)


def _by_position(value: Tensor, positions: int, heads: int) -> Tensor:
    """Queries or keys as example x position x head x d_head; heads may lie before positions, or be joined."""
    if value.ndim == 3:
        return value.unflatten(-1, (heads, -1))
    behind = value.shape[1:3] == (positions, heads)
    return value if behind else value.transpose(1, 2)


def _measured(
    transformer: Transformer,
    sites: LayerSites,
    offsets: Sequence[int],
    found: Tensor,
    query: Float[Tensor, "example position head d_head"],
    key: Float[Tensor, "example position kv_head d_head"],
    zero: int,
    tokens: Tensor,
) -> tuple[Float[Tensor, "head offset example"], ...]:
    """Scores of the last query with keys: as rotations make them, as they are, and as they are of queries of zeros.

    Args:
        transformer: the model.
        sites: those of the layer.
        offsets: of the keys.
        found: the rotations.
        query: the queries.
        key: the keys.
        zero: the position of the key of zeros.
        tokens: what the model is given.
    """
    at = query.shape[1] - 1
    places = [at + offset for offset in offsets]
    none = _logs(transformer, sites, query * 0, key * 0, zero, tokens)
    given, added = (
        (_logs(transformer, sites, own, key, zero, tokens) - none)[:, :, at, places].movedim(0, -1)
        for own in (query, query * 0)
    )
    of_query, of_key = _groups(transformer, sites)
    made = torch.einsum(
        "bha,oac,bohc->hob",
        query[:, at, of_query].double(), found, key[:, places][:, :, of_key].double(),
    )  # fmt: skip
    return made, given, added


def _check_head(
    transformer: Transformer,
    sites: LayerSites,
    offsets: Sequence[int],
    head: int,
    made: Float[Tensor, "offset example"],
    given: Float[Tensor, "offset example"],
    added: Float[Tensor, "offset example"],
    turned: float,
    known: Known | None,
) -> Known:
    """Raise ValueError unless the scores of a head are what was made of the rotations, times a positive number."""
    where, most = f"layer {sites.number} of {transformer.model.name}", _tolerance(transformer.model)
    if not bool(given.isfinite().all()):
        raise ValueError(f"{where} does not look as far back as offset {min(offsets)}")
    scale, size = _fit(given, made, known)
    if _off(added, size) > 10 * most:
        raise _added_to_queries(f"{where}: head {head}")
    if not max(_off(given - scale * made, size), turned) <= 10 * most:
        raise _not_bilinear(transformer, sites)
    if not scale > 0:
        raise _not_positive(f"{where}: the scores of head {head}", scale)
    return scale, size


def _not_bilinear(transformer: Transformer, sites: LayerSites) -> ValueError:
    return ValueError(
        f"layer {sites.number} of {transformer.model.name}: what attention computes from queries and keys is no "
        "bilinear form q R(offset) k^T of a head's own queries and keys, so it has no QK circuit"
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
    scores, none = (_logs(transformer, sites, own, key, zero) for own in (query, query * 0))
    return scores - none


def _logs(
    transformer: Transformer,
    sites: LayerSites,
    query: Tensor,
    key: Tensor,
    zero: int,
    tokens: Tensor | None = None,
) -> Float[Tensor, "example head query key"]:
    """Logarithms of patterns, less those of the key at a position."""
    assert sites.patterns is not None, "asked before"
    cache = _run(transformer, sites, query, key, (sites.patterns,), tokens)
    logs = cache[sites.patterns].log()
    return logs - logs[..., zero : zero + 1]


def _run(
    transformer: Transformer,
    sites: LayerSites,
    query: Float[Tensor, "example position *head d_head"],
    key: Float[Tensor, "example position *kv_head d_head"],
    read: Sequence[str],
    tokens: Tensor | None = None,
) -> Mapping[str, Tensor]:
    """Run with queries and keys replaced, behind their normalisation if they have one; in float64.

    Args:
        transformer: the model.
        sites: those of the layer.
        query: the queries, of each head or of all heads alike.
        key: the keys.
        read: the sites to read.
        tokens: what the model is given; one token throughout if it is not said.
    """
    model = transformer.model
    own = (sites.queries, sites.keys)
    heads = [model.site(name).n_units for name in own]
    if query.shape[1] in heads:
        # One position more, which nothing before it sees: else heads and positions could not be told apart.
        query, key = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (query, key))
    if tokens is None:
        tokens = model.input.example(1)[:, :1].expand(len(query), query.shape[1])
    elif tokens.shape[1] < query.shape[1]:
        tokens = _with_another(tokens)
    edits = {
        site: partial(_laid_out, _of_each(value, n))
        for site, n, value in zip(
            transformer.normed_sites(sites.number) or own, heads, (query, key), strict=True
        )
    }
    cache = model.run(tokens, read=read, edits=edits, until=model.last(read))
    return {name: cache[name].double().cpu() for name in read}


def _of_each(value: Tensor, heads: int) -> Float[Tensor, "example position head d_head"]:
    """Queries or keys of each head: those that are given, or one head's for all."""
    return value if value.ndim == 4 else value[:, :, None].expand(-1, -1, heads, -1)


def _laid_out(value: Float[Tensor, "example position head d_head"], like: Tensor) -> Tensor:
    """Queries or keys in a tensor's layout: heads behind positions, in front of them, or joined."""
    value = value.to(like)
    if like.ndim == 3:
        return value.flatten(2)
    return (value if like.shape[1] == value.shape[1] else value.transpose(1, 2)).clone()
