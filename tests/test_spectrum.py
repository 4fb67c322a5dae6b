from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from circuits.harvesting import harvest
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, spectrum
from circuits.units import Unit
from circuits.workspace import Workspace


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    place = Workspace(tmp_path_factory.mktemp("ws"))
    return harvest(
        load_model("cleanroom"), open_source("curves"), ["line"], place, full=["line"], positions=0
    )


def test_a_spectrum_is_the_histogram_of_all_activations(store: ActivationStore) -> None:
    unit = Unit("line", 3)
    found = spectrum(store, unit, bins=8, k=3, seed=1)
    rows = store.rows("line")
    values = rows.range(0, len(rows))[:, 3].astype(np.float64)
    widths = np.array([b.high - b.low for b in found.bins])
    total = sum(b.density * w for b, w in zip(found.bins, widths, strict=True))
    assert total == pytest.approx(1)
    mean_of_positive = values.clip(min=0).sum() / len(values)
    assert sum(b.contribution for b in found.bins) == pytest.approx(mean_of_positive, rel=0.03)
    cut = found.statistics.mean + 2 * found.statistics.std
    share = values[values > cut].sum() / values.clip(min=0).sum()
    assert found.above_two == pytest.approx(share, abs=0.05)
    assert sum(b.n_examples for b in found.bins) == 192
    for b in found.bins:
        assert len(b.examples) == min(3, b.n_examples)
        for e in b.examples:
            inside = b.low - 1e-3 <= e.value <= b.high + 1e-3
            assert inside or b in (found.bins[0], found.bins[-1])
    assert spectrum(store, unit, bins=8, k=3, seed=1).to_dict() == found.to_dict()
    json.dumps(found.to_dict())


def test_ranges_of_all_positions_are_counted_exactly(store: ActivationStore) -> None:
    rows = store.rows("line")
    values = rows.range(0, len(rows))[:, 3].astype(np.float64)
    found = spectrum(store, Unit("line", 3), bins=8)
    borders = [found.bins[0].low, *(b.high for b in found.bins)]
    assert (borders[0], borders[-1]) == (found.statistics.minimum, found.statistics.maximum)
    counts = np.histogram(values, borders)[0]
    # Whole activations are kept in half precision: a few are on the other side of a border.
    assert np.abs(np.array([b.seen for b in found.bins]) - counts).sum() <= 1e-3 * len(values)
    for b in found.bins:
        assert b.density * (b.high - b.low) == pytest.approx(b.seen / len(values))
        assert found.density_below(b) == b.density
    assert "p(x) of all " in next(found.tables({})).title


def test_a_sample_is_not_taken_for_everything(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit's strongest activations are rare, and none of them may be among the positions looked at."""
    unit, n = Unit("line", 3), 500
    whole = store.statistics(unit)
    few = np.zeros_like(whole.histogram)
    few[1] = n  # all of them in the lowest bin
    monkeypatch.setattr(store, "statistics", lambda _: replace(whole, histogram=few))
    found = spectrum(store, unit, bins=64)
    assert found.sampled
    mass = np.array([b.density * (b.high - b.low) for b in found.bins])
    assert mass.sum() == pytest.approx(1)
    largest = np.array([e.value for e in store.top_examples(unit, 192)])
    for i, b in enumerate(found.bins[1:], 1):
        # At least one position of each of these examples is above: its largest.
        assert mass[i:].sum() == pytest.approx((largest >= b.low).sum() / whole.count)
        assert (b.density > 0) is (b.n_examples > 0)
        # With this share, 500 draws would have missed the range in one case of twenty.
        share = found.density_below(b) * (b.high - b.low)
        assert (1 - share) ** n == pytest.approx(0.05, abs=0.001)
    assert found.bins[-1].high == whole.maximum == largest[0]
    empty = [b for b in found.bins if not b.density]
    assert empty
    (table,) = found.tables({})
    assert f"500 of {whole.count:,} positions, drawn at random" in table.title
    assert [row[1] for row in table.rows].count(0.0) == 0
    assert sum(str(row[1]).startswith("< ") for row in table.rows) == len(empty)


def test_bad_input_is_named(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match=r"^bins 10 must divide 64"):
        spectrum(store, Unit("line", 0), bins=10)
    with pytest.raises(ValueError, match=r"^k -1"):
        spectrum(store, Unit("line", 0), k=-1)
    with pytest.raises(KeyError, match="unknown site"):
        spectrum(store, Unit("nowhere", 0))
