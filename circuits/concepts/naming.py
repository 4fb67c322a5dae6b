"""Names for units: from labels, from texts, from people; each keeps its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import gammaln
from scipy.stats import norm, rankdata, spearmanr

from circuits.database import Database, Record
from circuits.experiments.statistics import Correction, corrected
from circuits.files import finite
from circuits.tables import Table
from circuits.units import Unit

KIND = "unit name"
"""The kind of record that a name is in the workspace's database."""

CORRECTION: Correction = "benjamini-hochberg"
"""For the number of names that are tested."""

_LEAST = 3
"""Examples of an attribute that each half must have."""

_AT_ONCE = 512
"""Units that are tested at once: what is needed at a time stays small."""


@dataclass(frozen=True)
class Name:
    """What a unit may be called, and why.

    Attributes:
        unit: which.
        text: the name.
        score: how well it tells, on examples that it was not chosen on: the chance that an example with the attribute
            excites the unit more than one without (AUROC); of texts, the rank correlation.
        p_value: of the score, on those examples, corrected for all names that are given (Benjamini-Hochberg).
        holds: whether that is below the level asked for.
        chosen: the score on the examples that it was chosen on.
        by: who or what gave it.
        evidence: more numbers, as JSON has it.
    """

    unit: Unit
    text: str
    score: float
    p_value: float
    holds: bool
    chosen: float
    by: str
    evidence: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"unit": str(self.unit)}


@dataclass(frozen=True)
class Naming:
    """Names of a site's units.

    Attributes:
        names: at most one a unit, the best first.
        n_units: how many units were looked at: those that are active on enough examples.
        n_attributes: how many names there were to choose from.
        by_chance: how many names hold if attributes are shuffled among examples, the mean of a few shuffles.
        level: of the test.
        n_examples: how many examples.
        data: on what.
        seed: of the halves and shuffles.
    """

    names: tuple[Name, ...]
    n_units: int
    n_attributes: int
    by_chance: float
    level: float
    n_examples: int
    data: str
    seed: int

    @property
    def holding(self) -> tuple[Name, ...]:
        """The names that hold on the other half of the examples."""
        return tuple(n for n in self.names if n.holds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"names": [n.to_dict() for n in self.names]}

    def tables(self, top: int) -> Iterator[Table]:
        """The best names, and how many hold."""
        rows = [
            (
                n.unit, n.text, "yes" if n.holds else "no", n.score, n.p_value, n.evidence["top_held_out"],
                n.evidence["base_rate"],
            )
            for n in self.names[:top]
        ]  # fmt: skip
        columns = ("latent", "name", "holds", "AUROC held out", "p", "of its top ten", "of all")
        note = (
            f"{len(self.holding)} of {len(self.names)} names hold on the other half of {self.n_examples} examples "
            f"({self.data}); with attributes shuffled {self.by_chance:g}"
        )
        yield Table(columns, rows, note=note)


def attribute_table(
    attributes: Sequence[Sequence[str]],
) -> tuple[list[str], Bool[np.ndarray, "example attribute"]]:
    """All attributes of some examples, and which example has which."""
    names = sorted({a for each in attributes for a in each})
    place = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(attributes), len(names)), bool)
    for row, each in enumerate(attributes):
        for a in each:
            table[row, place[a]] = True
    return names, table


def name_by_attributes(
    site: str,
    strengths: Float[np.ndarray, "example unit"],
    attributes: Sequence[Sequence[str]],
    *,
    level: float = 0.05,
    data: str = "",
    by: str = "attributes",
    seed: int = 0,
    shuffles: int = 5,
) -> Naming:
    """Name each unit after the attribute that its activation tells best.

    Half of the examples choose: of all pairs of a unit and an attribute, those that a rank test (see `rank_test`;
    Benjamini-Hochberg over all pairs) lets stand; of a unit's, the one with the highest AUROC. The other half
    checks: a name holds if the test, corrected over all names given, lets it stand there too.

    Args:
        site: of the units.
        strengths: how much each example excites each unit, such as its largest activation.
        attributes: of each example: its class, or any texts.
        level: of both tests.
        data: where examples come from, for the record.
        by: what gives the names, for the record.
        seed: of the halves and of the shuffles.
        shuffles: how often attributes are shuffled among examples, to see how many names hold by chance.

    Raises:
        ValueError: if numbers do not fit, or no attribute has enough examples.
    """
    _check(strengths, len(attributes), level)
    known, table = attribute_table(attributes)
    generator = np.random.default_rng(seed)
    first = _half(table, generator)
    enough = (table[first].sum(0) >= _LEAST) & (table[~first].sum(0) >= _LEAST)
    enough &= (~table[first]).sum(0) >= _LEAST
    if not enough.any():
        raise ValueError(
            f"attributes: none of the {len(known)} has {_LEAST} examples in each half of {len(attributes)}"
        )
    kept, members = [n for n, ok in zip(known, enough, strict=True) if ok], table[:, enough]
    alive = (strengths[first] > 0).sum(0) >= _LEAST
    alive &= (strengths[~first] > 0).sum(0) >= 1
    found = _named(site, strengths, members, kept, first, alive, level, by)
    chance = []
    for _ in range(shuffles):
        mixed = members[generator.permutation(len(members))]
        chance.append(
            sum(n.holds for n in _named(site, strengths, mixed, kept, first, alive, level, by))
        )
    by_chance = float(np.mean(chance)) if chance else float("nan")
    return Naming(
        tuple(found), int(alive.sum()), len(kept), by_chance, level, len(attributes), data, seed
    )


def _check(strengths: np.ndarray, n: int, level: float) -> None:
    if len(strengths) != n:
        raise ValueError(f"strengths of {len(strengths)} examples, attributes of {n}")
    if not np.isfinite(strengths).all():
        raise ValueError("strengths hold numbers that are not finite")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")


def _half(table: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Half of the examples; the same share of each combination of attributes, as far as that goes."""
    _, group = np.unique(table, axis=0, return_inverse=True)
    order = np.lexsort((generator.random(len(table)), group.reshape(-1)))
    first = np.zeros(len(table), bool)
    first[order[generator.integers(2) :: 2]] = True
    return first


def _named(
    site: str, strengths: np.ndarray, members: np.ndarray, known: Sequence[str], first: np.ndarray,
    alive: np.ndarray, level: float, by: str,
) -> list[Name]:  # fmt: skip
    units = np.flatnonzero(alive)
    if not len(units):
        return []
    auroc, p = auroc_table(strengths[np.ix_(first, units)], members[first])
    stands = np.reshape(corrected(p.reshape(-1), CORRECTION), p.shape) <= level
    auroc = np.where(stands, auroc, -1)
    best = auroc.argmax(1)
    given = np.flatnonzero(auroc[np.arange(len(units)), best] >= 0)
    if not len(given):
        return []
    held = strengths[np.ix_(~first, units[given])]
    scores, p_held = auroc_pairs(held, members[~first][:, best[given]])
    p_all = corrected(p_held, CORRECTION)
    found = []
    for i, (u, score) in enumerate(zip(given, scores, strict=True)):
        inside = members[~first][:, best[u]]
        top = np.argsort(-held[:, i], kind="stable")[:10]
        evidence = {
            "top_held_out": float(inside[top].mean()), "base_rate": float(inside.mean()),
            "examples": int(members[:, best[u]].sum()),
        }  # fmt: skip
        found.append(
            Name(
                Unit(site, int(units[u])), known[int(best[u])], float(score), p_all[i],
                p_all[i] <= level, float(auroc[u, best[u]]), by, evidence,
            )
        )  # fmt: skip
    return sorted(found, key=lambda n: (not n.holds, -n.score))


def auroc_table(
    strengths: Float[np.ndarray, "example unit"], members: Bool[np.ndarray, "example attribute"]
) -> tuple[Float[np.ndarray, "unit attribute"], Float[np.ndarray, "unit attribute"]]:
    """AUROC of every unit for every attribute, and the one-sided p-value of the rank test (see `rank_test`)."""
    parts = []
    for start in range(0, strengths.shape[1], _AT_ONCE):
        ranks = rankdata(strengths[:, start : start + _AT_ONCE], axis=0)
        columns = [
            rank_test(ranks, np.repeat(own[:, None], ranks.shape[1], 1)) for own in members.T
        ]
        parts.append(np.stack(columns, 2))
    auroc, p = np.concatenate(parts, 1)
    return auroc, p


def auroc_pairs(
    strengths: Float[np.ndarray, "example pair"], members: Bool[np.ndarray, "example pair"]
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """The same for pairs of a unit and an attribute."""
    starts = range(0, strengths.shape[1], _AT_ONCE)
    cut = [slice(start, start + _AT_ONCE) for start in starts]
    parts = [rank_test(rankdata(strengths[:, c], axis=0), members[:, c]) for c in cut]
    auroc, p = np.concatenate(parts, 1)
    return auroc, p


def rank_test(
    ranks: Float[np.ndarray, "example pair"], members: Bool[np.ndarray, "example pair"]
) -> Float[np.ndarray, "two pair"]:
    """AUROC and p-value of a rank-sum test, one-sided, that holds where most examples are silent.

    Most latents are zero on most examples, and there the normal approximation of Mann and Whitney gives p-values
    far too small. How many of an attribute's examples are among the active ones (those above the lowest value) is
    hypergeometric; given that number, the sum of their ranks is close to normal, with the moments of draws without
    replacement. The p-value adds up over that number.

    Args:
        ranks: of the examples, each column by itself, ties with their mean.
        members: which examples have the attribute of the column's pair.
    """
    n = len(ranks)
    inside = members.sum(0)
    total = (ranks * members).sum(0)
    lowest = ranks.min(0)
    silent = 2 * lowest - 1  # as many are tied for the lowest rank
    active = n - silent
    above = np.where(ranks > lowest, ranks, 0)
    mean = above.sum(0) / active.clip(1)
    variance = (above**2).sum(0) / active.clip(1) - mean**2
    k = np.arange(int(inside.max()) + 1)[:, None]
    possible = (k <= active) & (k <= inside) & (inside - k <= silent)
    rest = (inside - k) * lowest
    most = np.concatenate([np.zeros((1, ranks.shape[1])), np.sort(above, 0)[::-1].cumsum(0)])
    within = total <= most[k[:, 0]] + rest + 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.exp(_choose(active, k) + _choose(silent, inside - k) - _choose(n, inside))
        spread = np.sqrt(k * (active - k) / (active - 1).clip(1) * variance)
        z = (total - 0.5 - k * mean - rest) / spread
    certain = (total <= k * mean + rest + 1e-6).astype(float)
    tail = np.where(spread > 1e-9, norm.sf(np.nan_to_num(z)), certain)
    p = np.where(possible & within, chance * tail, 0).sum(0)
    pairs = np.maximum(inside * (n - inside), 1)
    return np.stack([(total - inside * (inside + 1) / 2) / pairs, p.clip(0, 1)])


def _choose(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    """The logarithm of the number of ways to choose k of n; NaN where there is none."""
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


Embed = Callable[[Sequence[Any]], Float[np.ndarray, "item width"]]
"""From images or texts to vectors of one space."""


def name_by_text(
    site: str,
    strengths: Float[np.ndarray, "example unit"],
    images: Sequence[Any],
    texts: Sequence[str],
    embed_image: Embed,
    embed_text: Embed,
    *,
    level: float = 0.05,
    data: str = "",
    by: str = "text embedding",
    seed: int = 0,
) -> Naming:
    """Name each unit after the text nearest to what excites it, in a space of images and texts (CLIP-like).

    On half of the examples a unit's place in the space is the mean of their vectors weighted by its activation,
    less the mean of all; its name is the text with the largest cosine. On the other half the name holds if the
    examples nearer to the text excite the unit more (Spearman, Benjamini-Hochberg over all names given).

    Args:
        site: of the units.
        strengths: how much each example excites each unit.
        images: the examples.
        texts: what there is to choose from.
        embed_image: from images to vectors.
        embed_text: from texts to vectors of the same space.
        level: of the test.
        data: where examples come from.
        by: what gives the names: the pair of models.
        seed: of the halves and of the shuffle.

    Raises:
        ValueError: if numbers do not fit, or the two spaces have not one width.
    """
    _check(strengths, len(images), level)
    if not texts:
        raise ValueError("texts: expected at least one to choose from")
    seen, said = np.asarray(embed_image(images), float), np.asarray(embed_text(texts), float)
    if (
        seen.ndim != 2
        or said.ndim != 2
        or seen.shape[1] != said.shape[1]
        or len(seen) != len(images)
    ):
        raise ValueError(
            f"embeddings of shape {seen.shape} and {said.shape}: expected item x one width for both"
        )
    seen, said = _unit(seen - seen.mean(0)), _unit(said - said.mean(0) if len(said) > 1 else said)
    first = _half(np.zeros((len(images), 1), bool), np.random.default_rng(seed))
    alive = np.flatnonzero(
        ((strengths[first] > 0).sum(0) >= _LEAST) & (strengths[~first].std(0) > 0)
    )
    near = seen @ said.T

    def named(order: np.ndarray) -> list[Name]:
        weights = strengths[np.ix_(first, alive)]
        place = _unit((weights / weights.sum(0).clip(1e-12)).T @ seen[order][first])
        best = (place @ said.T).argmax(1)
        tests = np.array(
            [
                _rank_test(strengths[~first, u], near[order][~first, b])
                for u, b in zip(alive, best, strict=True)
            ]
        )
        p = corrected(tests[:, 1], CORRECTION) if len(tests) else ()
        return [
            Name(
                Unit(site, int(u)), texts[int(b)], float(rho), q, q <= level,
                float(place[i] @ said[b]), by, {"cosine": float(place[i] @ said[b])},
            )
            for i, (u, b, (rho, _), q) in enumerate(zip(alive, best, tests, p, strict=True))
        ]  # fmt: skip

    found = named(np.arange(len(images)))
    chance = sum(n.holds for n in named(np.random.default_rng([seed, 1]).permutation(len(images))))
    ordered = tuple(sorted(found, key=lambda n: (not n.holds, -n.score)))
    return Naming(ordered, len(alive), len(texts), float(chance), level, len(images), data, seed)


def _rank_test(strengths: np.ndarray, near: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation and its one-sided p-value; 0 and 1 where one of them does not vary."""
    if strengths.std() == 0 or near.std() == 0:
        return 0.0, 1.0
    found: Any = spearmanr(strengths, near, alternative="greater")
    return float(found.statistic), float(found.pvalue)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# --- kept ----------------------------------------------------------------------------------------


def save_names(
    database: Database, model_hash: str, names: Sequence[Name], note: str = ""
) -> list[Record]:
    """Keep names in the workspace; what units were called before stays in the history."""
    return [
        database.save(
            KIND,
            model_hash,
            str(name.unit),
            name.to_dict(),
            note,
            None if name.by == "person" else name.by,
        )
        for name in names
    ]


def name_unit(
    database: Database,
    model_hash: str,
    unit: Unit,
    text: str,
    note: str = "",
    author: str | None = None,
) -> Record:
    """A person names a unit.

    Raises:
        ValueError: if the name is empty or too long.
    """
    if not text.strip() or len(text) > 200:
        raise ValueError(f"name {text!r} of {unit} must have 1 to 200 characters")
    unknown = float("nan")
    name = Name(unit, text.strip(), unknown, unknown, False, unknown, "person", {})
    return database.save(KIND, model_hash, str(unit), finite(name.to_dict()), note, author)


def names_of(database: Database, model_hash: str) -> dict[str, Record]:
    """What units are called now, by unit."""
    return {record.name: record for record in database.latest(KIND, model_hash)}


def history(database: Database, model_hash: str, unit: Unit) -> list[Record]:
    """All that a unit was called, oldest first."""
    return database.history(KIND, model_hash, str(unit))
