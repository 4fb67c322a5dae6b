"""Scores heads as previous-token, duplicate-token or induction heads, by what they attend to.

Elhage et al. 2021; Olsson et al. 2022, "In-context Learning and Induction Heads". Texts are random tokens in which a
pattern repeats at a different distance in each text, so that a head which looks back a fixed number of positions does
not score. Where a head of each kind should attend follows TransformerLens' convention (`detect_head`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.examples import BATCH, Examples
from circuits.experiments import Record
from circuits.experiments.statistics import corrected, interval, paired_ps
from circuits.files import finite
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.progress import Progress
from circuits.stimuli.repeats import draw_patterns
from circuits.tables import Table, between
from circuits.tasks.task import of_examples
from circuits.units import Site, Unit

HeadKind = Literal["previous_token", "duplicate_token", "induction"]
"""A head that attends to the previous token; to earlier copies of the current token; or to the tokens after those."""

KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

CHANCE: Mapping[HeadKind, str] = {
    "previous_token": "another earlier token, drawn at random",
    "duplicate_token": "the same positions with the tokens in random order",
    "induction": "the same positions with the tokens in random order",
}
"""What a head's score is compared with. In a shuffled text there is still a previous token, so that kind is compared
with another key; the other kinds depend on which tokens stand where, which shuffling destroys."""

LENGTH = 64
"""The default length of a text in tokens, if the model's context is long enough."""

_RESAMPLES = 100
"""Sign flips for each p-value that is corrected for: Holm multiplies the smallest p-value by their number."""


@dataclass(frozen=True)
class HeadScore:
    """How much a head behaves like a kind of head.

    Attributes:
        head: the head, as a unit of its attention pattern.
        kind: previous token, duplicate token or induction.
        score: the share of attention that goes where such a head should attend, averaged over the queries that have
            such a key and then over texts (for induction, the prefix matching score of Olsson et al.).
        low: lower end of its 95 % interval: bootstrap over texts.
        high: upper end of the interval.
        chance: the same share for a control (see `CHANCE`).
        p_value: a paired test over texts of whether score and chance differ, corrected for all heads and kinds.
        overall: the share of all attention, queries without such a key included (TransformerLens' score `mul`).
    """

    head: Unit
    kind: HeadKind
    score: float
    low: float
    high: float
    chance: float
    p_value: float
    overall: float

    @property
    def is_one(self) -> bool:
        """Whether the head is of this kind: it attends there more than chance (p below 0.05)."""
        return self.score > self.chance and self.p_value < 0.05


@dataclass(frozen=True, eq=False)
class HeadScores:
    """The scores of all heads.

    Attributes:
        heads: the heads layer by layer, as units of their attention patterns.
        kinds: the kinds that they were scored for.
        scores: the scores, kind x head x text.
        chance: the controls' scores, kind x head x text.
        overall: the share of all attention, kind x head.
        record: where the numbers come from.
    """

    heads: tuple[Unit, ...]
    kinds: tuple[HeadKind, ...]
    scores: Float[np.ndarray, "kind head text"]
    chance: Float[np.ndarray, "kind head text"]
    overall: Float[np.ndarray, "kind head"]
    record: Record

    @cached_property
    def found(self) -> tuple[HeadScore, ...]:
        """Every head's score for every kind, the highest of each kind first."""
        rows, chance = (v.reshape(-1, v.shape[2]) for v in (self.scores, self.chance))
        seed = self.record.seed
        raw = paired_ps(rows - chance, seed=seed, resamples=max(9999, _RESAMPLES * len(rows)))
        p = corrected(raw.tolist())
        made, n = [], len(self.heads)
        for k, kind in enumerate(self.kinds):
            order = np.argsort(-self.scores[k].mean(1), kind="stable").tolist()
            for h in order:
                i = k * n + h
                ends = interval(rows[i], seed=seed)
                made.append(
                    HeadScore(
                        self.heads[h], kind, float(rows[i].mean()), *ends, float(chance[i].mean()), p[i],
                        float(self.overall[k, h]),
                    )
                )  # fmt: skip
        return tuple(made)

    def of(self, kind: HeadKind) -> tuple[HeadScore, ...]:
        """The scores of one kind, highest first.

        Raises:
            KeyError: if heads were not scored for it.
        """
        if kind not in self.kinds:
            raise KeyError(f"kind {kind!r}: expected one of {', '.join(self.kinds)}")
        return tuple(s for s in self.found if s.kind == kind)

    def matrix(self, kind: HeadKind) -> Float[np.ndarray, "layer head"]:
        """Mean scores by layer and head."""
        mean = self.scores[self.kinds.index(kind)].mean(1)
        sites = list(dict.fromkeys(u.site for u in self.heads))
        made = np.full((len(sites), 1 + max(u.index for u in self.heads)), np.nan)
        for unit, value in zip(self.heads, mean, strict=True):
            made[sites.index(unit.site), unit.index] = value
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite({
            "heads": [asdict(s) | {"head": str(s.head)} for s in self.found],
            "chance_is": {k: CHANCE[k] for k in self.kinds}, "record": asdict(self.record),
        })  # fmt: skip

    def tables(self, top: int) -> Iterator[Table]:
        """The heads with the highest scores, a table for each kind."""
        columns = ("head", "attention there", "95 % interval", "by chance", "p", "more than chance")
        n, record = self.scores.shape[2], self.record
        for kind in self.kinds:
            rows = [
                (
                    s.head,
                    s.score,
                    between(s.low, s.high),
                    s.chance,
                    s.p_value,
                    "yes" if s.is_one else "no",
                )
                for s in self.of(kind)[:top]
            ]
            title = (
                f"{kind.replace('_', ' ')} heads of {record.model}: {n} texts, seed {record.seed}"
            )
            yield Table(columns, rows, f"{title}; chance: {CHANCE[kind]}")


def score_heads(
    model: HookedModel,
    kinds: Sequence[HeadKind] = KINDS,
    *,
    n: int = 32,
    length: int | None = None,
    examples: Examples | None = None,
    first: bool = True,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadScores:
    """Score every head of a model for some kinds.

    Args:
        model: a token model that exposes its attention patterns.
        kinds: the kinds of heads.
        n: the number of random texts.
        length: their length in tokens; 64, or the model's context if that is shorter, if None.
        examples: texts to use instead of random ones.
        first: whether attention to the first token counts. In many models it is a sink, where heads attend that have
            nothing to do; without it scores are shares of the attention to all other tokens, summed over the queries of
            a text, so that queries which attend to hardly anything else hardly count.
        batch: texts per batch.
        seed: seed of texts, controls, intervals and p-values.
        progress: called with the number of texts done and the total.

    Raises:
        ValueError: if the model takes images or exposes no attention patterns, a kind is unknown, there are fewer than
            two texts, or they are too long for the model or too short to repeat anything.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds {list(unknown or kinds)}: expected some of {', '.join(KINDS)}")
    sites, spec = _patterns(model)
    texts = examples
    if texts is None:
        drawn = repeated_tokens(spec, n, length, seed)
        texts = Examples.given(model, drawn, data="random repeated tokens")
    if len(texts) < 2:
        raise ValueError(f"n {len(texts)} must be at least 2: scores are compared text by text")
    heads = tuple(site.unit(i) for site in sites for i in range(site.n_units))
    scores, chance = (np.full((len(kinds), len(heads), len(texts)), np.nan) for _ in range(2))
    on, total = np.zeros((len(kinds), len(heads))), np.zeros(len(heads))
    generator = torch.Generator().manual_seed(seed)
    for part in texts.batches(batch):
        real, which = part.counted().cpu(), list(part.which)
        other = shuffled(part.inputs.cpu(), real, generator).to(part.inputs)
        own, mixed = (
            _attention(model, sites, tokens, part.mask) for tokens in (part.inputs, other)
        )
        if not first:
            own[..., 0], mixed[..., 0] = 0, 0
        share = _attention_share if first else _share_of_the_rest
        total += (own * real[:, None, :, None]).sum((0, 2, 3)).numpy()
        for k, kind in enumerate(kinds):
            places = detection_pattern(kind, part.inputs.cpu(), real)
            places[:, :, 0] &= first
            taken = places.clone()
            taken[:, :, 0] |= not first
            elsewhere = _random_other_key(taken, real, generator)
            if kind == "previous_token":
                # Only queries that could attend to another earlier key count. The control is that other key in the
                # same text; for the other kinds it is the same keys in the shuffled text.
                places = places & elsewhere.any(2, keepdim=True)
                control = share(own, elsewhere)
            else:
                control = share(mixed, places)
            scores[k][:, which] = share(own, places).T.numpy()
            chance[k][:, which] = control.T.numpy()
            on[k] += (own * places[:, None]).sum((0, 2, 3)).numpy()
        if progress is not None:
            progress(int(np.isfinite(scores[0, 0]).sum()), len(texts))
    _check_scored(scores, kinds)
    return HeadScores(
        heads, tuple(kinds), scores, np.nan_to_num(chance), on / total, Record.of(model, of_examples(texts), seed)
    )  # fmt: skip


def _check_scored(scores: Float[np.ndarray, "kind head text"], kinds: Sequence[HeadKind]) -> None:
    bad = np.isnan(scores).any((1, 2))
    if bad.any():
        kind = kinds[int(bad.argmax())]
        raise ValueError(
            f"texts: one of them has no position where a head of kind {kind} could attend, expected one in each"
        )


def repeated_tokens(
    spec: TokenInput, n: int, length: int | None = None, seed: int = 0
) -> Int[Tensor, "text position"]:
    """Random tokens in which a pattern repeats, at a different distance in each text, after the starting token.

    Raises:
        ValueError: if the length is more than the model takes, or too short for a pattern and its repeat.
    """
    size = min(LENGTH, spec.n_ctx) if length is None else length
    if not 6 <= size <= spec.n_ctx:
        raise ValueError(
            f"length {size}: expected 6 (the shortest that repeats anything) to {spec.n_ctx} (the model's context)"
        )
    longest = (size - 3) // 2
    generator = torch.Generator().manual_seed(seed)
    periods = (min(6, longest), min(24, longest))
    tokens = draw_patterns(n, generator, size, spec.n_vocab, periods).tokens
    if spec.bos is None:
        tokens[:, 0] = torch.randint(spec.n_vocab, (n,), generator=generator)
        return tokens
    tokens[tokens == spec.bos] = (
        0 if spec.bos else 1
    )  # the starting token must occur only at the start
    tokens[:, 0] = spec.bos
    return tokens


def detection_pattern(
    kind: HeadKind, tokens: Int[Tensor, "text position"], real: Bool[Tensor, "text position"]
) -> Bool[Tensor, "text query key"]:
    """Where a head of a kind should attend, by TransformerLens' convention.

    Args:
        kind: the kind of head.
        tokens: the texts.
        real: True at tokens, False at padding.

    >>> tokens = torch.tensor([[7, 8, 9, 7]])
    >>> detection_pattern("induction", tokens, tokens > 0)[0].nonzero().tolist()
    [[3, 1]]
    """
    both = real[:, :, None] & real[:, None, :]
    if kind == "previous_token":
        n = tokens.shape[1]
        return torch.ones(n, n, dtype=torch.bool).tril(-1).triu(-1) & both
    same = ((tokens[:, :, None] == tokens[:, None, :]) & both).tril(-1)
    if kind == "duplicate_token":
        return same
    # Induction: query q attends to key k if the token at k - 1 equals the one at q. Shifting the duplicates' keys by
    # one does that; the roll brings the last key round to key 0, where nothing precedes it.
    after = same.roll(1, 2)
    after[:, :, 0] = False
    return after.tril() & both


def shuffled(
    tokens: Int[Tensor, "text position"],
    real: Bool[Tensor, "text position"],
    generator: torch.Generator,
) -> Int[Tensor, "text position"]:
    """The tokens of each text in random order; the first one stays, since it may be an attention sink."""
    made = tokens.clone()
    for row, own in zip(made, real, strict=True):
        at = own.nonzero()[1:, 0]
        row[at] = row[at[torch.randperm(len(at), generator=generator)]]
    return made


def _patterns(model: HookedModel) -> tuple[list[Site], TokenInput]:
    if not isinstance(model.input, TokenInput):
        raise ValueError(
            f"model {model.name} takes images: heads are scored by what they attend to among tokens"
        )
    try:
        found = select_sites(model, "pattern")
    except KeyError:
        raise ValueError(f"model {model.name} shows no attention patterns") from None
    # Where queries are other positions than keys (a resampler's), no token is the one before another.
    same = [s for s in found if len(set(s.position_shape)) == 1 and len(s.position_shape) == 2]
    if not same:
        raise ValueError(
            f"model {model.name}: the queries of {found[0].name} are other positions than its keys"
        )
    return same, model.input


def _attention(
    model: HookedModel, sites: Sequence[Site], tokens: Tensor, mask: Tensor | None
) -> Float[Tensor, "text head query key"]:
    cache = model.run(tokens, mask=mask, read=sites, until=model.last(sites))
    return torch.cat([site.by_unit(cache[site]).double().cpu() for site in sites], 1)


def _attention_share(
    attention: Float[Tensor, "text head query key"], places: Bool[Tensor, "text query key"]
) -> Float[Tensor, "text head"]:
    """The attention that goes to certain keys, averaged over the queries that have such a key."""
    queries = places.any(2)
    on = (attention * places[:, None]).sum(3)
    return (on * queries[:, None]).sum(2) / queries.sum(1, keepdim=True)


def _share_of_the_rest(
    attention: Float[Tensor, "text head query key"], places: Bool[Tensor, "text query key"]
) -> Float[Tensor, "text head"]:
    """The attention that goes to certain keys over all attention, of the queries that have such a key."""
    queries = places.any(2)
    on, all_of_it = (
        (attention * some[:, None]).sum((2, 3))
        for some in (places, queries[:, :, None].expand_as(places))
    )
    # A text without such a query has no score; a head that attends to the first token alone has none of this attention.
    return on / all_of_it.clamp_min(1e-12).masked_fill(~queries.any(1)[:, None], float("nan"))


def _random_other_key(
    taken: Bool[Tensor, "text query key"],
    real: Bool[Tensor, "text position"],
    generator: torch.Generator,
) -> Bool[Tensor, "text query key"]:
    """For each query an earlier key that is not taken, drawn at random; none if there is no other."""
    # Random numbers times the mask: the largest is a uniform draw among the free keys. Where none is free argmax gives
    # key 0, which `& free` removes again.
    free = (real[:, :, None] & real[:, None, :]).tril(-1) & ~taken
    drawn = (torch.rand(free.shape, generator=generator) * free).argmax(2, keepdim=True)
    return torch.zeros_like(free).scatter(2, drawn, True) & free
