"""Where heads of a vision transformer look in an image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from circuits.checks import whole
from circuits.localization.attention import pattern_head, values_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.paths.patches import TokenMap, token_map
from circuits.tables import Table
from circuits.units import Site, Unit, unknown

_PATCH = re.compile(r"(?:patch )?([0-9]{1,9}),([0-9]{1,9})")
_LISTED = 10
"""How many keys a table lists."""


@dataclass(frozen=True, eq=False)
class Look:
    """What one query of a head attends to.

    Attributes:
        head: the head, as a unit of its attention pattern.
        query: the query: `class token`, `register 1`, `patch 3,4` (row and column) or `token 7`.
        at: the patches that the query holds, as (top, left, bottom, right), bottom and right excluded; None if it holds
            none.
        shares: the attention to each key, those of the query's window if there are windows; they sum to 1.
        names: what the keys are.
        patches: the attention to the token that holds each patch; NaN outside the query's window.
        others: the attention to each token that is known to be something else than a patch, by name.
        on_patches: the attention to all patches together.
    """

    head: Unit
    query: str
    at: tuple[int, int, int, int] | None
    shares: Float[Tensor, " key"]
    names: tuple[str, ...]
    patches: Float[Tensor, "y x"]
    others: Mapping[str, float]
    on_patches: float

    @property
    def n_seen(self) -> int:
        """How many keys the query may attend to: masks (of a shifted window) leave exactly zero at the others."""
        return int((self.shares > 0).sum())

    @property
    def uniform(self) -> float:
        """What each key would get if the head attended to all that it may attend to alike."""
        return 1 / max(1, self.n_seen)


@dataclass(frozen=True, eq=False)
class UnplacedPattern:
    """A head's whole pattern, where nothing tells which part of the image its tokens hold.

    Attributes:
        head: the head, as a unit of its attention pattern.
        raw: the attention of each query to each key; windows follow each other along the first axis.
        why: what could not be found.
    """

    head: Unit
    raw: Float[Tensor, "window query key"]
    why: str


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Where some heads look in one image.

    Attributes:
        image: the image as the model sees it, in 0..1.
        looks: one for each head and query.
        unplaced: the patterns of heads whose tokens have no known place in the image.
        model: the model's name.
        model_hash: the hash of the model.
    """

    image: Float[Tensor, "3 y x"]
    looks: tuple[Look, ...]
    unplaced: tuple[UnplacedPattern, ...]
    model: str
    model_hash: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; patches outside a query's window are missing (null)."""
        return {
            "model": self.model, "model_hash": self.model_hash,
            "looks": [
                {
                    "head": str(look.head), "query": look.query, "shares": look.shares.tolist(),
                    "names": list(look.names), "uniform": look.uniform, "others": dict(look.others),
                    "patches": [[None if v != v else v for v in row] for row in look.patches.tolist()],
                }
                for look in self.looks
            ],
            "unplaced": [
                {"head": str(p.head), "why": p.why, "raw": p.raw.tolist()} for p in self.unplaced
            ],
        }  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """For each head and query the keys with the largest share of attention."""
        for look in self.looks:
            best = look.shares.topk(min(_LISTED, len(look.shares)))
            rows = [
                (look.names[i], share, share / look.uniform)
                for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            note = (
                f"patches together: {look.on_patches:.4g}; if it attended to all {look.n_seen} keys alike, each "
                f"would get {look.uniform:.4g}"
            )
            title = f"{look.head} of {self.model}: what the {look.query} attends to"
            yield Table(("key", "share", "times uniform"), rows, title, note)
        for p in self.unplaced:
            rows = [
                (w, q, int(row.argmax()), float(row.max()))
                for w, window in enumerate(p.raw)
                for q, row in enumerate(window[:_LISTED])
            ]
            columns = ("window", "query", "attends most to", "share")
            yield Table(columns, rows[:_LISTED], f"{p.head} of {self.model}: {p.why}", "")


def image_attention(
    model: HookedModel,
    image: Image.Image,
    heads: Sequence[str | Unit],
    queries: Sequence[str] = (),
) -> ImageAttention:
    """Where some heads look in an image.

    Args:
        model: an image model that exposes attention patterns.
        image: a picture, which is fitted to the model's size.
        heads: written `LAYER.HEAD` (`0.3`), or units of any of their sites (`blocks.0.attn.hook_z:3`).
        queries: whose attention: `class token`, `register 1`, the row and column of a patch (`3,4`), or a token's
            number. By default the class token, or the patch in the middle if there is none.

    Raises:
        KeyError: if there is no such head or query.
        ValueError: if the model takes tokens or exposes no attention patterns, or no head is given.
    """
    if not isinstance(model.input, ImageInput):
        raise ValueError(f"model {model.name} takes tokens: expected an image model")
    if not heads:
        raise ValueError("heads are empty: expected at least one, for example 0.3")
    chosen = [pattern_head(model, head) for head in heads]
    sites = [model.site(unit.site) for unit in chosen]
    pixels = model.input.load(image)
    cache = model.run(
        model.fitted(model.input.normalize(pixels[None])), read=sites, until=model.last(sites)
    )
    looks: list[Look] = []
    unplaced: list[UnplacedPattern] = []
    for unit, site in zip(chosen, sites, strict=True):
        raw = site.by_unit(cache[site])[0, unit.index].double().cpu()
        try:
            keys = _tokens(model, site)
        except ValueError as error:
            unplaced.append(UnplacedPattern(unit, raw.reshape(-1, *raw.shape[-2:]), str(error)))
            continue
        for query in queries or (usual_query(keys),):
            looks.append(_look(unit, raw, keys, _token(model, keys, query)))
    shown = pixels.expand(3, -1, -1)
    return ImageAttention(shown, tuple(looks), tuple(unplaced), model.name, model.intact_hash)


def query_names(model: HookedModel, head: str | Unit) -> list[str]:
    """What may be a query of a head: first the usual one, then the tokens that hold no patch and the patches by row.

    Raises:
        KeyError: if there is no such head.
        ValueError: if its tokens have no known place in the image.
    """
    site = model.site(pattern_head(model, head).site)
    found = _tokens(model, site)
    height, width = found.places.shape
    patches = (f"{y},{x}" for y in range(height) for x in range(width))
    return list(dict.fromkeys([usual_query(found), *found.others.values(), *patches]))


def usual_query(tokens: TokenMap) -> str:
    """The query that is looked at if none is named: the class token, or the patch in the middle."""
    height, width = tokens.places.shape
    known = list(tokens.others.values())
    return "class token" if "class token" in known else f"{height // 2},{width // 2}"


def _tokens(model: HookedModel, pattern: Site) -> TokenMap:
    """What the queries and keys of a pattern stand for.

    Raises:
        ValueError: if that cannot be found.
    """
    queries, keys = pattern.position_shape[-2:]
    if queries != keys:
        raise ValueError(
            f"site {pattern.name} of {model.name}: its {queries} queries are other tokens than its {keys} keys"
        )
    return token_map(model, values_of(model, pattern))


def _look(unit: Unit, raw: Tensor, keys: TokenMap, token: int) -> Look:
    length = raw.shape[-1]
    window, inside = divmod(token, length)
    shares = raw.reshape(-1, length, length)[window, inside]
    where = keys.places // length == window
    patches = torch.where(where, shares[keys.places % length], torch.nan)
    first = window * length
    own = [first + i for i in range(length)]
    others = {keys.others[t]: float(shares[t - first]) for t in own if t in keys.others}
    held = (keys.places == token).nonzero()
    at = None
    if len(held):
        (top, left), (bottom, right) = held.min(0).values.tolist(), held.max(0).values.tolist()
        at = (top, left, bottom + 1, right + 1)
    names = tuple(keys.name(t) for t in own)
    on_patches = float(shares[keys.places[where].unique() % length].sum())
    return Look(unit, keys.name(token), at, shares, names, patches, others, on_patches)


def _token(model: HookedModel, tokens: TokenMap, query: str) -> int:
    """The number of the token that a query names."""
    by_name = {name: token for token, name in tokens.others.items()}
    if query in by_name:
        return by_name[query]
    number = whole(query)
    if number is not None and 0 <= number < tokens.n:
        return number
    match, (height, width) = _PATCH.fullmatch(query), tokens.places.shape
    if match is not None and int(match[1]) < height and int(match[2]) < width:
        return int(tokens.places[int(match[1]), int(match[2])])
    if match is not None:
        raise ValueError(
            f"query {query!r}: {model.name} has {height} x {width} patches: expected 0,0 to {height - 1},{width - 1}"
        )
    raise unknown(f"query of {model.name}", query, [*by_name, f"{height // 2},{width // 2}"])
