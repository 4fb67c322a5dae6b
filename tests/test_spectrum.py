from __future__ import annotations

import json

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


def test_bad_input_is_named(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match=r"^bins 10 must divide 64"):
        spectrum(store, Unit("line", 0), bins=10)
    with pytest.raises(ValueError, match=r"^k -1"):
        spectrum(store, Unit("line", 0), k=-1)
    with pytest.raises(KeyError, match="unknown site"):
        spectrum(store, Unit("nowhere", 0))
