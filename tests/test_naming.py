"""Names of units, what masks they find, and what labels can be read from them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, rankdata
from torch import Tensor

from circuits.concepts import (
    dissect,
    name_by_attributes,
    name_by_text,
    name_unit,
    names_of,
    probe,
    save_names,
)
from circuits.concepts.naming import auroc_table, rank_test
from circuits.database import Database
from circuits.experiments.statistics import corrected
from circuits.units import Unit


def planted(n: int = 300, seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Units 0 and 1 tell attributes; 2 to 9 tell nothing; 10 is never active."""
    g = np.random.default_rng(seed)
    attributes = [
        [w for w, p in (("dog", 0.3), ("red", 0.4), ("old", 0.5)) if g.random() < p]
        for _ in range(n)
    ]
    strengths = g.random((n, 11))
    strengths[:, 0] += [1.0 * ("dog" in a) for a in attributes]
    strengths[:, 1] += [0.6 * ("red" in a) for a in attributes]
    strengths[:, 10] = 0
    return strengths, attributes


def test_the_rank_test_is_that_of_mann_and_whitney_with_ties() -> None:
    g = np.random.default_rng(0)
    strengths = g.integers(0, 6, (80, 4)).astype(float)
    members = g.random((80, 3)) < 0.4
    auroc, p = auroc_table(strengths, members)
    for u in range(4):
        for a in range(3):
            inside, outside = strengths[members[:, a], u], strengths[~members[:, a], u]
            wanted = mannwhitneyu(inside, outside, alternative="greater", method="asymptotic")
            assert p[u, a] == pytest.approx(wanted.pvalue, rel=0.05)
            slow = np.mean([(i > o) + 0.5 * (i == o) for i in inside for o in outside])
            assert auroc[u, a] == pytest.approx(slow)


def test_the_rank_test_holds_where_most_examples_are_silent() -> None:
    g = np.random.default_rng(0)
    for share in (0.2, 0.4, 0.8, 1.0):
        for _ in range(10):
            strengths = np.where(g.random(12) < share, g.random(12).round(1), 0)
            members = np.arange(12) < 4
            ranks = rankdata(strengths)
            sums = [ranks[list(four)].sum() for four in combinations(range(12), 4)]
            exact = np.mean(np.array(sums) >= ranks[members].sum() - 1e-9)
            _, p = rank_test(ranks[:, None], members[:, None])
            assert p[0] == pytest.approx(exact, abs=0.1)
    # three active of 250, all three in a group of 25: by chance once in 1119 times, not once in 10^7
    strengths, members = np.zeros((250, 1)), np.zeros((250, 1), bool)
    strengths[:3], members[:25] = [[1.0], [2.0], [3.0]], True
    _, p = auroc_table(strengths, members)
    assert p[0, 0] == pytest.approx(25 * 24 * 23 / (250 * 249 * 248), rel=1e-6)
    strengths = np.where(g.random((250, 1000)) < 0.1, g.exponential(size=(250, 1000)), 0)
    _, p = auroc_table(strengths, g.random((250, 10)) < 0.1)
    assert 0.2e-3 < np.mean(p <= 1e-3) < 1.7e-3


def test_correction_for_many_tests_is_that_of_benjamini_and_hochberg() -> None:
    p = np.random.default_rng(0).random(50) ** 2
    wanted = [
        min(
            1.0,
            min(
                p[p >= q].size
                and min(p[j] * 50 / (p <= p[j]).sum() for j in np.flatnonzero(p >= q)),
                1.0,
            ),
        )
        for q in p
    ]
    np.testing.assert_allclose(corrected(p.tolist(), "benjamini-hochberg"), wanted, rtol=1e-9)


def test_units_are_named_after_what_they_tell_and_others_are_not_named() -> None:
    strengths, attributes = planted()
    found = name_by_attributes("s", strengths, attributes)
    assert {(str(n.unit), n.text) for n in found.holding} == {("s:0", "dog"), ("s:1", "red")}
    assert found.holding[0].score > 0.95
    assert found.by_chance < 0.5
    assert (found.n_units, found.n_attributes) == (10, 3)


def test_names_rarely_hold_where_there_is_nothing_to_tell() -> None:
    """At a level of 0.05 few of many runs on pure chance give a name that holds."""
    held = 0
    for seed in range(40):
        g = np.random.default_rng(seed)
        attributes = [[w for w in "abcdef" if g.random() < 0.3] for _ in range(120)]
        held += bool(
            name_by_attributes("s", g.random((120, 30)), attributes, shuffles=0, seed=seed).holding
        )
    assert held <= 2


def test_texts_near_what_excites_a_unit_become_its_name() -> None:
    """A pair of models that agree: images and words in one space."""
    g = np.random.default_rng(0)
    words = ["dog", "car", "tree", "sky"]
    place = np.linalg.qr(g.standard_normal((8, 4)))[0].T
    kinds = g.integers(4, size=200)
    images = [(k, g.standard_normal(8) * 0.3) for k in kinds]
    strengths = g.random((200, 5))
    for unit in range(4):
        strengths[:, unit] += 2.0 * (kinds == unit)

    def seen(items: object) -> np.ndarray:
        return np.stack([place[k] + noise for k, noise in items])  # type: ignore[union-attr]

    def said(items: object) -> np.ndarray:
        return np.stack([place[words.index(w)] for w in items])  # type: ignore[union-attr]

    found = name_by_text("s", strengths, images, words, seen, said)
    assert {(n.unit.index, n.text) for n in found.holding} == {(i, w) for i, w in enumerate(words)}
    assert found.by_chance <= 1
    with pytest.raises(ValueError, match="expected item x width, of one width for both"):
        name_by_text("s", strengths, images, words, seen, lambda texts: np.zeros((len(texts), 3)))


def test_names_are_kept_with_their_history(tmp_path: Path) -> None:
    database = Database(tmp_path / "w.db")
    found = name_by_attributes("s", *planted())
    save_names(database, "0" * 64, found.holding)
    name_unit(database, "0" * 64, Unit("s", 0), "dog faces", note="looked at twenty", author="ada")
    names = names_of(database, "0" * 64)
    assert {n: (r.body["text"], r.author) for n, r in names.items()} == {
        "s:0": ("dog faces", "ada"), "s:1": ("red", "attributes")
    }  # fmt: skip
    history = database.history("unit name", "0" * 64, "s:0")
    assert [r.body["text"] for r in history] == ["dog", "dog faces"]
    assert history[0].body["score"] > 0.9
    with pytest.raises(ValueError, match="must have 1 to 200 characters"):
        name_unit(database, "0" * 64, Unit("s", 0), " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, a: (s[:5], a), "strengths of 5 examples"),
        (lambda s, a: (np.where(s > 0.9, np.nan, s), a), "not finite"),
        (lambda s, a: (s, [["x"]] + [[]] * 299), "none of the 1 has 3 examples in each half"),
    ],
)
def test_what_cannot_be_named_with_is_refused(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        name_by_attributes("s", *change(*planted()))  # type: ignore[operator]


def squares(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masks of two concepts; unit 0 finds one; units 1 and 2 each find half of the other; 3 is noise."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(n, 2, 32, 32, dtype=torch.bool)
    maps = torch.rand(n, 5, 8, 8, generator=g) * 0.3
    for i in range(n):
        for c in range(2):
            y, x = torch.randint(0, 5, (2,), generator=g).tolist()
            masks[i, c, 4 * y : 4 * y + 12, 4 * x : 4 * x + 12] = True
            if c == 0:
                maps[i, 0, y : y + 3, x : x + 3] += 1
            else:
                maps[i, 1, y : y + 3, x : x + 2] += 1
                maps[i, 2, y : y + 3, x + 2 : x + 3] += 1
    return maps, masks


def test_masks_are_found_by_single_units_and_better_by_combinations() -> None:
    maps, masks = squares()
    found = dissect("s", maps, masks, ["square", "pair"], quantile=0.14)
    square, pair = found.segments
    assert (square.unit.index, pair.unit.index) == (0, 1)
    assert square.iou > 0.8 > square.random_iou + 0.3
    assert pair.combined > pair.iou + 0.05
    assert {u.index for u, _ in pair.units[:2]} == {1, 2}
    assert pair.combined > pair.random_combined + 0.15
    # intersection over union by hand, for the first unit
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[30:]
    level = maps[:, 0].flatten().topk(round(0.14 * 60 * 64)).values[-1]
    on = (
        torch.nn.functional.interpolate(
            (maps[order, :1] > level).float(), (32, 32), mode="bilinear"
        )[:, 0]
        > 0.5
    )
    wanted = masks[order, 0]
    assert square.iou == pytest.approx(float((on & wanted).sum() / (on | wanted).sum()), abs=1e-6)
    with pytest.raises(ValueError, match="'none' is on no example of one half"):
        dissect(
            "s",
            maps,
            torch.cat([masks, torch.zeros(60, 1, 32, 32, dtype=torch.bool)], 1),
            ["a", "b", "none"],
        )


@pytest.mark.parametrize(("quantile", "message"), [(0.01, "less than one"), (0.99, "all of them")])
def test_a_share_of_positions_that_is_none_or_all_is_refused(quantile: float, message: str) -> None:
    masks = torch.ones(4, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"quantile {quantile} of 18 positions is {message}"):
        dissect("s", torch.rand(4, 5, 3, 3), masks, ["a"], quantile=quantile)


def test_labels_are_probed_and_absorption_is_seen() -> None:
    """Latent 0 tells the label but for its special cases, which latent 1 takes over."""
    g = np.random.default_rng(0)
    own = g.random(800) < 0.4
    special = own & (g.random(800) < 0.3)
    W_dec = np.eye(6)
    W_dec[1] = [0.8, 0.6, 0, 0, 0, 0]
    codes = g.random((800, 6)) * (g.random((800, 6)) < 0.2)
    codes[:, :2] = 0
    codes[own & ~special, 0] = 1
    codes[special, 1] = 1
    units = codes @ W_dec + 0.05 * g.standard_normal((800, 6))
    (found,) = probe(codes, units, W_dec, own[:, None], ["label"], k=1)
    assert found.best == 0
    assert found.auroc == pytest.approx(0.85, abs=0.05)
    assert found.dense > 0.97
    assert found.absorbed == pytest.approx(0.3, abs=0.08)
    assert abs(found.random - 0.5) < 0.15
    (whole,) = probe(codes, units, W_dec, own[:, None], ["label"], k=2)
    assert whole.absorbed == 0
    assert whole.few > 0.97
    with pytest.raises(ValueError, match="expected at least 4 with and without"):
        probe(codes, units, W_dec, np.arange(800)[:, None] < 2, ["label"])
    both = np.stack([own, np.arange(800) < 2], 1)
    with pytest.raises(ValueError, match="'rare' has 2 of 800 examples"):
        probe(codes, units, W_dec, both, ["label", "rare"])
