"""Attention patterns over a text, raw and weighted by the norms of the values that they move.

Elhage et al. 2021 (value-weighted patterns); Kobayashi et al. 2020, "Attention is Not Only a Weight". Attention to a
sink, such as the starting token, moves almost nothing, and disappears when it is weighted by values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.examples import encoded
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.stimuli.spelling import words_of
from circuits.tables import Table, visible
from circuits.units import Site, Unit, unknown

SINK = 0.5
"""A key in the first half of a text is a sink if it gets on average at least this share of the attention of the queries
after it, not counting the very next one."""

_HEAD = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")
_ATTENTION = re.compile(r"blocks\.([0-9]+)\.attn")


@dataclass(frozen=True, eq=False)
class HeadPattern:
    """One head's attention over a text.

    Attributes:
        head: the head, as a unit of its attention pattern.
        raw: the attention of each query to each key; each row sums to 1.
        weighted: the attention times the norm of the key's value, scaled so that each row sums to 1.
        sink: the key that is an attention sink (see `SINK`); None if there is none.
        sink_share: the share of attention that the sink gets, on average; 0 without a sink.
    """

    head: Unit
    raw: Float[Tensor, "query key"]
    weighted: Float[Tensor, "query key"]
    sink: int | None
    sink_share: float

    def first(self, n: int) -> HeadPattern:
        """The attention among the first n tokens; the sink and its share are those of the whole text."""
        sink = (
            (self.sink, self.sink_share) if self.sink is not None and self.sink < n else (None, 0.0)
        )
        return HeadPattern(self.head, self.raw[:n, :n], self.weighted[:n, :n], *sink)


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """The attention of some heads over a text.

    Attributes:
        tokens: the text's tokens.
        patterns: the heads' patterns.
        model: the model's name.
        model_hash: the hash of the model.
    """

    tokens: tuple[str, ...]
    patterns: tuple[HeadPattern, ...]
    model: str
    model_hash: str

    def first(self, n: int) -> AttentionPatterns:
        """The first n tokens; no query attends to a later one, so that rows still add up to 1 in causal models."""
        return replace(
            self, tokens=self.tokens[:n], patterns=tuple(p.first(n) for p in self.patterns)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.model, "model_hash": self.model_hash, "tokens": list(self.tokens),
            "heads": [
                {
                    "head": str(p.head), "raw": p.raw.tolist(), "weighted": p.weighted.tolist(), "sink": p.sink,
                    "sink_share": p.sink_share,
                }
                for p in self.patterns
            ],
        }  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """For each head and token where it attends most, raw and weighted by values; and the head's sink."""
        words = [visible(token) for token in self.tokens]
        columns = ("token", "attends most to", "share", "fetches most from", "share, by values")
        for p in self.patterns:
            best, fetched = (found.argmax(1).tolist() for found in (p.raw, p.weighted))
            rows = [
                (
                    f"{q} {token}", f"{best[q]} {words[best[q]]}", float(p.raw[q, best[q]]),
                    f"{fetched[q]} {words[fetched[q]]}", float(p.weighted[q, fetched[q]]),
                )
                for q, token in enumerate(words)
            ]  # fmt: skip
            sink = ""
            if p.sink is not None:
                word, share = self.tokens[p.sink], f"{p.sink_share:.0%}"
                sink = f"sink of {p.head}: {word!r} at {p.sink} gets {share} of the attention of later tokens"
            yield Table(columns, rows, f"{p.head} of {self.model}", sink)


def attention_patterns(
    model: HookedModel, text: str | Sequence[int], heads: Sequence[str | Unit]
) -> AttentionPatterns:
    """The attention of some heads over a text, raw and weighted by values.

    Args:
        model: a token model that exposes attention patterns and values.
        text: a text, or its tokens.
        heads: written `LAYER.HEAD` (`0.3`), or units of any of their sites (`blocks.0.attn.hook_z:3`).

    Raises:
        KeyError: if there is no such head.
        ValueError: if the model takes images or exposes no attention patterns, no head is given, its queries are other
            tokens than its keys, or the model cannot take the text.
    """
    if not isinstance(model.input, TokenInput):
        raise ValueError(
            f"model {model.name} takes images: expected a token model (image_attention shows where its heads look)"
        )
    if not heads:
        raise ValueError("heads are empty: expected at least one, for example 0.3")
    chosen = [pattern_head(model, head) for head in heads]
    for site in (model.site(unit.site) for unit in chosen):
        if site.position_axes != ("query", "key") or len(set(site.position_shape)) != 1:
            raise ValueError(
                f"site {site.name} of {model.name} has the shape {site.shape}: expected the same tokens as queries and "
                "keys"
            )
    values = {u.site: values_of(model, model.site(u.site)) for u in chosen}
    tokens = encoded(model.input, text)[None]
    read = [*(model.site(u.site) for u in chosen), *values.values()]
    cache = model.run(tokens, read=read, until=model.last(read))
    found = []
    for unit in chosen:
        site, value = model.site(unit.site), values[unit.site]
        raw = site.by_unit(cache[site])[0, unit.index].double().cpu()
        shared = site.n_units // value.n_units  # grouped queries share keys and values
        length = value.activations(cache[value])[0, unit.index // shared].double().cpu()
        found.append(_pattern(unit, raw, length))
    words = tuple(words_of(model.input.vocabulary, tokens[0].tolist()))
    return AttentionPatterns(words, tuple(found), model.name, model.intact_hash)


def pattern_head(model: HookedModel, head: str | Unit) -> Unit:
    """A head as a unit of its attention pattern.

    Args:
        model: a model that exposes attention patterns.
        head: written `LAYER.HEAD`, or a unit of any of its sites, as is needed where a layer has several attentions
            (`decoder_blocks.0.cross_attn.hook_z:3`).

    Raises:
        KeyError: if there is no such head.
        ValueError: if it is not a head, or the model exposes no attention patterns.
    """
    try:
        known = {attention_of(s): s for s in select_sites(model, "pattern")}
    except KeyError:
        raise ValueError(f"model {model.name} shows no attention patterns") from None
    match = _HEAD.fullmatch(head) if isinstance(head, str) else None
    if match is not None:
        own, index = f"blocks.{int(match[1])}.attn", int(match[2])
    else:
        unit = model.unit(head)
        site = model.site(unit.site)
        own, index = attention_of(site), unit.index
        if site.kind not in ("head", "pattern"):
            raise ValueError(
                f"head {str(head)!r}: the units of {unit.site} are not heads, expected LAYER.HEAD"
            )
    if own not in known or index >= known[own].n_units:
        raise unknown(f"head of {model.name}", str(head), list(_heads(known)))
    return known[own].unit(index)


def shown_pattern(model: HookedModel, unit: Unit) -> Unit | None:
    """The attention pattern of the head that a unit stands for; None if it is no head, or keys that heads share."""
    site = model.site(unit.site)
    if site.kind not in ("head", "pattern"):
        return None
    try:
        found = pattern_head(model, unit)
    except (KeyError, ValueError):
        return None
    return found if model.site(found.site).n_units == site.n_units else None


def attention_of(site: Site) -> str:
    """The name of the attention that a site of heads belongs to: `blocks.0.attn`."""
    return site.name.rpartition(".hook_")[0]


def values_of(model: HookedModel, pattern: Site) -> Site:
    """The site of the values that an attention pattern weighs."""
    return model.site(f"{attention_of(pattern)}.hook_v")


def _heads(known: Mapping[str, Site]) -> Iterator[str]:
    """The heads of some attentions, as short as they can be named."""
    for name, site in known.items():
        match = _ATTENTION.fullmatch(name)
        for i in range(site.n_units):
            yield f"{match[1]}.{i}" if match else f"{name}.hook_pattern:{i}"


def _pattern(
    unit: Unit, raw: Float[Tensor, "query key"], length: Float[Tensor, " key"]
) -> HeadPattern:
    product = raw * length
    weighted = product / product.sum(1, keepdim=True).clamp_min(1e-12)
    n = len(raw)
    # Queries at least two positions after a key: the very next query may attend to it as its previous token, which
    # would make a previous-token head's every key a sink. Keys of the second half have too few later queries to judge.
    later = torch.ones(n, n).tril(-2).double()
    received = (raw * later).sum(0) / later.sum(0).clamp_min(1)
    received[(n + 1) // 2 :] = 0
    sink = int(received.argmax())
    share = float(received[sink])
    return HeadPattern(unit, raw, weighted, *((sink, share) if share >= SINK else (None, 0.0)))
