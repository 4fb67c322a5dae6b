"""Names for units, from labels, from texts or from people; each is kept with its evidence."""

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
"""The correction for the number of names that are tested."""

_LEAST = 3
"""The least number of examples of an attribute in each half."""

_AT_ONCE = 512
"""Units that are tested together; a table of example x unit x attribute for all would be large."""


@dataclass(frozen=True)
class Name:
    """A name for a unit, with its evidence.

    Attributes:
        unit: the unit.
        text: the name.
        score: how well the unit tells the attribute, on examples that did not choose the name: the probability that
            an example with the attribute activates the unit more than one without (AUROC); for texts, the rank
            correlation.
        p_value: the score's p-value on those examples, corrected for all names given (Benjamini-Hochberg).
        holds: whether the p-value is at most the level asked for.
        chosen: the score on the examples that chose the name.
        by: who or what gave the name.
        evidence: further numbers, as a dictionary for JSON.
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
        """As a dictionary for JSON."""
        return asdict(self) | {"unit": str(self.unit)}

    @classmethod
    def from_dict(cls, raw: Any) -> Name:
        """What `to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        if not isinstance(raw, dict) or set(raw) != set(cls.__dataclass_fields__):
            raise ValueError(f"a name must have the fields {', '.join(cls.__dataclass_fields__)}")
        numbers = [
            float("nan") if raw[k] is None else raw[k] for k in ("score", "p_value", "chosen")
        ]
        right = (
            all(isinstance(n, int | float) for n in numbers)
            and all(isinstance(raw[k], str) for k in ("unit", "text", "by"))
            and isinstance(raw["holds"], bool)
            and isinstance(raw["evidence"], dict)
        )
        if not right:
            raise ValueError(f"name {str(raw['text'])[:80]!r} has a field of another type")
        score, p_value, chosen = numbers
        if p_value < 0 or p_value > 1 or not raw["text"].strip():
            raise ValueError(
                f"name {raw['text'][:80]!r} has p_value {p_value}: expected a text, and a p_value from 0 to 1"
            )
        return cls(
            Unit.parse(raw["unit"]), raw["text"], score, p_value, raw["holds"], chosen, raw["by"], raw["evidence"]
        )  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """Names of a site's units.

    Attributes:
        names: at most one for each unit, the best first.
        n_units: the number of units tested: those that are active on enough examples.
        n_attributes: the number of names to choose from.
        by_chance: the number of names that hold if attributes are shuffled among examples, on average.
        level: the level of the test.
        n_examples: the number of examples.
        data: the name of the data.
        seed: the seed of the halves and shuffles.
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
        """As a dictionary for JSON."""
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
    """The attributes of all examples, and which example has which."""
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
    """Name each unit after the attribute that its activation predicts best.

    One half of the examples chooses: among the attributes that pass a rank test (see `rank_test`; Benjamini-Hochberg
    over all pairs of a unit and an attribute), the one with the highest AUROC is the unit's name. The other half
    checks: a name holds if it passes the test there too, corrected over all names given.

    Args:
        site: the site of the units.
        strengths: how much each example activates each unit, such as the largest activation.
        attributes: the attributes of each example: its class, or any texts.
        level: the level of both tests.
        data: where examples come from, for the record.
        by: what gives the names, for the record.
        seed: the seed of the halves and of the shuffles.
        shuffles: how often attributes are shuffled among examples, to see how many names hold by chance.

    Raises:
        ValueError: if there is not one list of attributes for each example, numbers are not finite, or no attribute
            has enough examples.
    """
    _check(strengths, len(attributes), level)
    known, table = attribute_table(attributes)
    generator = np.random.default_rng(seed)
    first = _half(table, generator)
    enough = (table[first].sum(0) >= _LEAST) & (table[~first].sum(0) >= _LEAST)
    # Nor can an attribute be told apart if nearly all examples have it.
    enough &= (~table[first]).sum(0) >= _LEAST
    if not enough.any():
        raise ValueError(
            f"attributes: none of the {len(known)} has {_LEAST} examples in each half of {len(attributes)}"
        )
    kept, members = [n for n, ok in zip(known, enough, strict=True) if ok], table[:, enough]
    # A unit that is silent on one half has only ties there.
    alive = (strengths[first] > 0).sum(0) >= _LEAST
    alive &= (strengths[~first] > 0).sum(0) >= 1
    found = _named(site, strengths, members, kept, first, alive, level, by)
    chance = []
    for _ in range(shuffles):
        # Whole rows, so that attributes stay correlated with each other as they are.
        mixed = members[generator.permutation(len(members))]
        chance.append(
            sum(n.holds for n in _named(site, strengths, mixed, kept, first, alive, level, by))
        )
    by_chance = float(np.mean(chance)) if chance else float("nan")
    return Naming(
        tuple(found), int(alive.sum()), len(kept), by_chance, level, len(attributes), data, seed
    )


def _check(strengths: np.ndarray, n: int, level: float) -> None:
    """Raise ValueError if strengths do not fit the examples, or the level is out of range."""
    if len(strengths) != n:
        raise ValueError(f"strengths of {len(strengths)} examples, attributes of {n}")
    if not np.isfinite(strengths).all():
        raise ValueError("strengths hold numbers that are not finite")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1")


def _half(table: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Choose half of the examples, with about half of each combination of attributes (stratified)."""
    # Sorted by combination, at random inside each, every second example is taken.
    _, group = np.unique(table, axis=0, return_inverse=True)
    order = np.lexsort((generator.random(len(table)), group.reshape(-1)))
    first = np.zeros(len(table), bool)
    first[order[generator.integers(2) :: 2]] = True
    return first


def _named(
    site: str, strengths: np.ndarray, members: np.ndarray, known: Sequence[str], first: np.ndarray,
    alive: np.ndarray, level: float, by: str,
) -> list[Name]:  # fmt: skip
    """The names of units, chosen on the first half and checked on the other; those that hold come first."""
    units = np.flatnonzero(alive)
    if not len(units):
        return []
    auroc, p = auroc_table(strengths[np.ix_(first, units)], members[first])
    stands = np.reshape(corrected(p.reshape(-1), CORRECTION), p.shape) <= level
    # Below any AUROC, so that an attribute that failed the test is never the best one.
    auroc = np.where(stands, auroc, -1)
    best = auroc.argmax(1)
    # Units for which no attribute passed the test get no name.
    given = np.flatnonzero(auroc[np.arange(len(units)), best] >= 0)
    if not len(given):
        return []
    held = strengths[np.ix_(~first, units[given])]
    scores, p_held = auroc_pairs(held, members[~first][:, best[given]])
    # One test a unit is left, since its attribute was chosen on the other half: the correction is for these alone.
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
    """The AUROC of every unit for every attribute, and the one-sided p-value (see `rank_test`)."""
    parts = []
    for start in range(0, strengths.shape[1], _AT_ONCE):
        # Once for all attributes: ranks depend on the unit only.
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
    """The AUROC and p-value of given pairs of a unit and an attribute, one for each column."""
    starts = range(0, strengths.shape[1], _AT_ONCE)
    cut = [slice(start, start + _AT_ONCE) for start in starts]
    parts = [rank_test(rankdata(strengths[:, c], axis=0), members[:, c]) for c in cut]
    auroc, p = np.concatenate(parts, 1)
    return auroc, p


def rank_test(
    ranks: Float[np.ndarray, "example pair"], members: Bool[np.ndarray, "example pair"]
) -> Float[np.ndarray, "two pair"]:
    """AUROC and p-value of a one-sided rank-sum test that is valid where units are zero on most examples.

    Most latents are zero on most examples, and there the usual normal approximation (Mann and Whitney) gives
    p-values that are far too small. Let K be how many of the attribute's examples are active (above the lowest
    value). By chance K is hypergeometric; and given K, the sum of the ranks of these K examples is close to normal,
    with mean and variance of a draw without replacement from the ranks of the active ones. Hence
    p = sum over k of P(K = k) P(rank sum >= observed | K = k).

    Args:
        ranks: the ranks of the examples in each column; ties have their mean rank.
        members: which examples have the attribute of the column's pair.
    """
    n = len(ranks)
    inside = members.sum(0)
    total = (ranks * members).sum(0)
    lowest = ranks.min(0)
    silent = 2 * lowest - 1  # m examples tied for the lowest value have the mean rank (m + 1) / 2
    # K counts the marked ones among `inside` examples drawn from n, of which A = `active` are marked. Given K, the rank
    # sum is that of K of the A active ranks drawn without replacement: mean K m, variance K (A - K) / (A - 1) v, with m
    # and v the mean and variance of those ranks.
    active = n - silent
    above = np.where(ranks > lowest, ranks, 0)
    mean = above.sum(0) / active.clip(1)
    variance = (above**2).sum(0) / active.clip(1) - mean**2
    k = np.arange(int(inside.max()) + 1)[:, None]  # all possible K, as rows; pairs are columns
    possible = (k <= active) & (k <= inside) & (inside - k <= silent)
    rest = (inside - k) * lowest  # the rank sum of the attribute's silent examples
    # The largest possible rank sum of k active examples: a K with which the observed sum is out of reach adds nothing,
    # where the normal tail would.
    most = np.concatenate([np.zeros((1, ranks.shape[1])), np.sort(above, 0)[::-1].cumsum(0)])
    within = total <= most[k[:, 0]] + rest + 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.exp(_choose(active, k) + _choose(silent, inside - k) - _choose(n, inside))
        spread = np.sqrt(k * (active - k) / (active - 1).clip(1) * variance)
        z = (total - 0.5 - k * mean - rest) / spread  # 0.5: correction for continuity
    # Without spread (none or all of the active ones are the attribute's) the rank sum is certain.
    certain = (total <= k * mean + rest + 1e-6).astype(float)
    tail = np.where(spread > 1e-9, norm.sf(np.nan_to_num(z)), certain)
    p = np.where(possible & within, chance * tail, 0).sum(0)
    pairs = np.maximum(inside * (n - inside), 1)
    # AUROC = (rank sum - k (k + 1) / 2) / (k (n - k)): the rank sum less its smallest value, over how far it can rise.
    return np.stack([(total - inside * (inside + 1) / 2) / pairs, p.clip(0, 1)])


def _choose(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    """The logarithm of the number of ways to choose k of n; NaN where there is none."""
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


Embed = Callable[[Sequence[Any]], Float[np.ndarray, "item width"]]
"""Maps images or texts to vectors of a common space."""


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
    """Name each unit after the text nearest to what activates it, in a common space of images and texts (as CLIP's).

    On one half of the examples a unit's vector is the mean of the images' vectors weighted by its activation, minus
    the mean of all; its name is the text with the largest cosine. On the other half the name holds if images nearer
    to the text activate the unit more (Spearman's rank correlation, Benjamini-Hochberg over all names given).

    Args:
        site: the site of the units.
        strengths: how much each example activates each unit.
        images: the examples.
        texts: the texts to choose from.
        embed_image: maps images to vectors.
        embed_text: maps texts to vectors of the same space.
        level: the level of the test.
        data: where examples come from, for the record.
        by: what gives the names (the pair of models), for the record.
        seed: the seed of the halves and of the shuffle.

    Raises:
        ValueError: if shapes do not fit each other, or there is no text.
    """
    _check(strengths, len(images), level)
    if not texts:
        raise ValueError("texts are empty: expected at least one to choose from")
    seen, said = _embedded(images, texts, embed_image, embed_text)
    first = _half(np.zeros((len(images), 1), bool), np.random.default_rng(seed))
    alive = np.flatnonzero(
        ((strengths[first] > 0).sum(0) >= _LEAST) & (strengths[~first].std(0) > 0)
    )
    near = seen @ said.T

    def named(order: np.ndarray) -> list[Name]:
        weights = strengths[np.ix_(first, alive)]
        # The mean of the images weighted by how active the unit is on them, in the space of the texts.
        place = _normalised((weights / weights.sum(0).clip(1e-12)).T @ seen[order][first])
        # Centred vectors: what all images or all texts have in common would make one text the nearest to every unit.
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


def _embedded(
    images: Sequence[Any], texts: Sequence[str], embed_image: Embed, embed_text: Embed
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of images and of texts, each centred and of length 1.

    Images and texts lie in two separate cones of such a space: without centring, all cosines would be nearly alike.
    """
    seen, said = np.asarray(embed_image(images), float), np.asarray(embed_text(texts), float)
    if not (seen.ndim == said.ndim == 2 and seen.shape[1] == said.shape[1]) or len(seen) != len(
        images
    ):
        raise ValueError(
            f"embeddings have shapes {seen.shape} and {said.shape}: expected item x width, of one width for both"
        )
    texts_centred = (
        said - said.mean(0) if len(said) > 1 else said
    )  # a single text centred would be zero
    return _normalised(seen - seen.mean(0)), _normalised(texts_centred)


def _rank_test(strengths: np.ndarray, near: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation and its one-sided p-value; 0 and 1 where one of them does not vary."""
    if strengths.std() == 0 or near.std() == 0:
        return 0.0, 1.0
    found: Any = spearmanr(strengths, near, alternative="greater")
    return float(found.statistic), float(found.pvalue)


def _normalised(rows: np.ndarray) -> np.ndarray:
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
            finite(name.to_dict()),
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
    """What units are called now, by unit; without damaged names (`damaged_names`)."""
    return {r.name: r for r in database.latest(KIND, model_hash, _check_body) if not r.fault}


def damaged_names(database: Database, model_hash: str) -> list[str]:
    """What is wrong with each of the units' names that cannot be read."""
    return [r.fault for r in database.latest(KIND, model_hash, _check_body) if r.fault]


def _check_body(body: Any) -> None:
    numbers = all(isinstance(body.get(k), int | float | None) for k in ("score", "p_value"))
    if not isinstance(body["text"], str) or not numbers or not isinstance(body["evidence"], dict):
        raise ValueError("it is no name with its evidence")


def history(database: Database, model_hash: str, unit: Unit) -> list[Record]:
    """All that a unit was called, oldest first."""
    return database.history(KIND, model_hash, str(unit), _check_body)
