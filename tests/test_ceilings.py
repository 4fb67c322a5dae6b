"""Sites whose activations have a ceiling, as after ReLU6: nothing is cut off that people look at."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.attribution import attribute
from circuits.edits import edited, zero
from circuits.examples import Examples
from circuits.featurevis.objectives import as_objective, channel
from circuits.featurevis.optimizing import values_of
from circuits.harvesting import harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.saliency import saliency_map
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, reading
from circuits.tuning.responding import responses
from circuits.workspace import Workspace


class Clipped(nn.Module):
    """Brightness times 40 through four functions with a ceiling, one in place, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.relu6 = nn.ReLU6()
        self.again = nn.Conv2d(2, 2, 1)
        self.inside = nn.ReLU6(inplace=True)
        self.tanh = nn.Hardtanh(-2.0, 3.0)
        self.bound = Clamp()
        self.relu = nn.ReLU()
        self.sums = nn.Linear(2, 3)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[0, :, 1, 1] = 40 / 3
            self.conv.weight[1, :, 1, 1] = -40 / 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.conv(x))
        x = self.tanh(self.inside(self.again(x)))
        return self.sums(self.relu(self.bound(x)).mean((2, 3)))


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=2.5)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    torch.manual_seed(0)
    return HookedModel(Clipped(), (3, 16, 16), "clipped")


@pytest.fixture(scope="module")
def store(model: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    place = Workspace(tmp_path_factory.mktemp("workspace"))
    return harvest(model, open_source("photos"), ["relu6", "inside", "relu"], place)


def test_a_function_with_a_ceiling_is_found_by_what_it_does(model: HookedModel) -> None:
    found = {s.name: (s.floor, s.ceiling, s.before) for s in model.sites}
    assert found["relu6"] == (0.0, 6.0, "conv")
    assert found["inside"] == (0.0, 6.0, "again")
    # One behind another: the lowest ceiling, the highest floor, and what the first was given.
    assert found["tanh"] == (0.0, 3.0, "again")
    assert found["bound"] == (0.0, 2.5, "again")
    assert found["relu"] == (0.0, 2.5, "again")
    assert found["conv"] == found["sums"] == (None, None, "")
    assert model.before_ceiling("relu6") == model.site("conv")
    assert model.before_ceiling("conv") == model.site("conv")


def test_the_input_of_an_in_place_function_is_what_it_was_given(model: HookedModel) -> None:
    x = torch.rand(2, 3, 16, 16)
    seen = model.run(x, read=["again", "inside"])
    torch.testing.assert_close(seen["inside"], F.relu6(seen["again"]))
    assert float(seen["again"].min()) < 0


def test_examples_at_the_ceiling_are_in_the_order_of_what_was_given(
    model: HookedModel, store: ActivationStore
) -> None:
    unit = model.unit("relu6:0")
    shown = Examples(model, open_source("photos"), None)
    brightest = np.array([float(40 * shown.load(i).mean(0).max()) for i in range(len(shown))])
    assert (brightest > 6).sum() >= 10  # all of them tie after the ReLU6
    top = store.top_examples(unit, 10)
    best = np.sort(brightest)[::-1][:10]
    np.testing.assert_allclose(brightest[[e.index for e in top]], best, rtol=1e-5)
    assert [e.value for e in top] == [6.0] * 10
    np.testing.assert_allclose([e.before for e in top], best, rtol=1e-5)  # pyright: ignore
    assert str(top[0]) == f"{top[0].before:.3g}, cut off at 6"
    assert float(store.largest(unit).max()) == 6.0
    tenths = store.quantile_examples(unit, 5, 2)
    order = [e.before for group in tenths for e in group]
    assert order == sorted(order, reverse=True)  # pyright: ignore
    # Without a ceiling nothing is said of it.
    assert store.top_examples(model.unit("conv:0"), 1)[0].before is None


def test_the_share_at_the_ceiling_is_counted_over_all_positions(
    model: HookedModel, store: ActivationStore
) -> None:
    shown = Examples(model, open_source("photos"), None)
    at = total = 0
    for batch in shown.batches(8):
        full = model.run(batch.inputs, read=["relu6"])["relu6"][:, 0]
        at, total = at + int((full >= 6).sum()), total + full.numel()
    found = store.statistics(model.unit("relu6:0"))
    assert found.saturated == pytest.approx(at / total)
    assert 0 < at < total
    assert store.statistics(model.unit("relu6:1")).saturated == 0.0
    assert store.statistics(model.unit("conv:0")).saturated is None
    # A tail that is cut off is no exponential: it is fitted to what was given.
    assert found.tail == store.statistics(model.unit("conv:0")).tail


def test_objectives_go_on_above_the_ceiling(model: HookedModel) -> None:
    bright = torch.full((1, 3, 16, 16), 0.9)
    for target in ("relu6:0", "1*relu6:0"):
        objective = as_objective(model, target)
        assert objective.sites == ("conv",)
        assert float(values_of(model, [(objective, 1)], bright)[0]) == pytest.approx(36.0, rel=1e-5)
    assert channel(model, "relu6:0").text == "relu6:0"
    dream = as_objective(model, "relu6")
    # The other unit is at the floor, where it stays.
    assert float(values_of(model, [(dream, 1)], bright)[0]) == pytest.approx(36.0**2 / 2, rel=1e-5)


def test_responses_to_drawings_are_not_cut_off(model: HookedModel) -> None:
    images = torch.stack([torch.full((3, 16, 16), v) for v in (0.1, 0.5, 0.8)])
    found = responses(model, "relu6", [images])
    torch.testing.assert_close(found[:, 0], torch.tensor([4.0, 20.0, 32.0]))
    assert found[:, 1].tolist() == [0.0, 0.0, 0.0]


def test_attribution_says_on_how_many_examples_gradients_vanish(model: HookedModel) -> None:
    x = torch.stack([torch.full((3, 16, 16), v) for v in (0.1, 0.5, 0.8)])
    found = attribute(model, x, "relu6:0", "conv", check=0)
    assert found.saturated == 2
    assert found.units()[1:, 0].tolist() == [0.0, 0.0]
    (line,) = found.problems()
    assert line.startswith("target relu6:0 is at its ceiling of 6 on 2 of 3 examples")
    assert list(attribute(model, x, "conv:0", "conv", check=0).problems()) == []
    pixels = saliency_map(model, x, "relu6:0", "gradient_x_input")
    assert [pixels.facts(i)["target at its ceiling"] for i in range(3)] == ["no", "yes", "yes"]


def test_a_store_opens_without_the_share_at_ceilings(
    model: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that were made when sites had no ceilings."""
    found = harvest(model, open_source("photos"), ["conv"], Workspace(tmp_path))
    with h5py.File(found.folder / "statistics.h5", "a") as file:
        del file["summary/saturated"]
    monkeypatch.setattr(reading, "check_unchanged", lambda *_: None)  # its checksum is another now
    again = ActivationStore.open(found.folder)
    assert again.summary("conv").saturated.tolist() == [0, 0]


def test_edits_at_the_site_are_seen(model: HookedModel) -> None:
    image = torch.full((1, 3, 16, 16), 0.8)
    with edited(model, [zero("relu6:0")]):
        assert model.before_ceiling("relu6") == model.site("relu6")
        assert responses(model, "relu6", [image])[0, 0] == 0.0
    assert responses(model, "relu6", [image])[0, 0] == pytest.approx(32.0)


def test_the_position_of_a_target_is_the_one_with_the_most_below_the_ceiling(
    model: HookedModel,
) -> None:
    x = torch.full((1, 3, 16, 16), 0.5)
    x[0, :, 7, 9] = 0.9
    pixels = saliency_map(model, x, "relu6:0", "gradient_x_input")
    units = attribute(model, x, "relu6:0", "conv", check=0)
    assert pixels.aims[0].endswith("7,9")
    assert units.aims[0].endswith("7,9")


def test_ceilings_of_other_forms_are_found_or_have_no_site_before() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.inner = nn.Conv2d(3, 4, 1), nn.Dropout(), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.drop(F.relu6(self.conv(x))))

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 3).clamp(max=5)

    sites = {s.name: (s.floor, s.ceiling, s.before) for s in HookedModel(Net(), (3, 8, 8)).sites}
    assert sites["drop"] == (0.0, 6.0, "conv")
    assert sites["inner"] == (None, 5.0, "")  # what is clamped is no module's output
