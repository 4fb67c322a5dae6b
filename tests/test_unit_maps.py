"""Maps of units: constructed cases, a slow oracle, silent units, and what hand-written curves look like."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from circuits.cleanroom.network import FAMILIES
from circuits.harvesting import harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.inception import Concatenate
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.store import ActivationStore, Provenance, Summary
from circuits.store.provenance import Depth
from circuits.unit_maps import UnitMap, _comparable, neighbours_kept, response_map, weight_map
from circuits.units import Site
from circuits.workspace import Workspace
from tests.conftest import Branches, seeded


class Given(ActivationStore):
    """A store whose largest activations, unit x example, are given."""

    def __init__(self, maximum: np.ndarray) -> None:
        units, examples = maximum.shape
        super().__init__(
            Path("nowhere"),
            Provenance(
                model="m", model_hash="m" * 64, data="d", data_hash="d" * 64,
                sites=(Site("s", "channel", ("batch", "unit"), 1, (units,), ("also",)),),
                examples=tuple(map(str, range(examples))), input={}, version="0", depth=Depth(),
                batch=1, shard=1, same={},
            ),
        )  # fmt: skip
        fixed = {"center": np.zeros(units), "low": np.zeros(units), "high": np.ones(units)}
        empty = Summary.empty(examples, fixed)
        self._given = dataclasses.replace(empty, maximum=maximum.T.astype(np.float32))

    def summary(self, site: str) -> Summary:
        self._site(site)
        return self._given


GROUPS = np.repeat(np.arange(12), 12)


def grouped(groups: np.ndarray = GROUPS, noise: float = 0.5) -> np.ndarray:
    """Units that answer to 100 examples as others of their group do, each with its own strength and bias."""
    rng = np.random.default_rng(0)
    answers = rng.normal(size=(groups.max() + 1, 100))[groups]
    answers += noise * rng.normal(size=answers.shape)
    return answers * rng.uniform(0.1, 10, (len(groups), 1)) + rng.uniform(-5, 5, (len(groups), 1))


def nearest(xy: np.ndarray, k: int) -> np.ndarray:
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1)[:, :k]


def kept_slowly(vectors: np.ndarray, xy: np.ndarray, k: int) -> float:
    """The definition, a pair at a time."""

    def cosine(i: int, j: int) -> float:
        return vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])

    shares = []
    for i in range(len(xy)):
        others = [j for j in range(len(xy)) if j != i]
        near = sorted(others, key=lambda j: np.linalg.norm(xy[i] - xy[j]))[:k]
        alike = sorted(others, key=lambda j: -cosine(i, j))[:k]
        shares.append(len(set(near) & set(alike)) / k)
    return float(np.mean(shares))


# --- kept --------------------------------------------------------------------------------------


def test_kept_worked_out_by_hand() -> None:
    angles = np.deg2rad([0.0, 10.0, 21.0, 90.0, 100.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [7], [2], [0.1], [1]]
    xy = np.array([[0.0, 0], [1.1, 0], [2.0, 0], [3.3, 0], [-1.5, 0]])
    # two nearest (half of four others):  0: 1 2 | 1 4   1: 0 2 | 2 0   2: 1 0 | 1 3   3: 4 2 | 2 1   4: 3 2 | 0 1
    assert neighbours_kept(vectors, xy) == (1 + 2 + 1 + 1 + 0) / 10
    assert neighbours_kept(vectors, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) == 1
    assert np.isnan(neighbours_kept(vectors[:2], xy[:2]))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (12, 5), (21, 10), (60, 10)])
def test_kept_against_a_slow_oracle(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    vectors, xy = rng.normal(size=(n, 5)), rng.normal(size=(n, 2))
    assert neighbours_kept(vectors, xy) == pytest.approx(kept_slowly(vectors, xy, k), abs=1e-12)


def test_equals_count_as_kept() -> None:
    vectors = np.repeat(np.eye(2), 30, axis=0)  # 29 equals of each: any ten of them will do
    xy = vectors + np.random.default_rng(0).normal(size=(60, 2)) * 1e-3
    assert neighbours_kept(vectors, xy) == 1


# --- responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "n", "times"), [("tsne", 12, 2.5), ("pca", 3, 1.5)])
def test_groups_come_out_as_groups(method, n: int, times: float) -> None:
    groups = GROUPS[: 12 * n]
    found = response_map(Given(grouped(groups)), "s", method)
    inside = groups[:, None] == groups[None]
    distance = np.linalg.norm(found.xy[:, None] - found.xy[None], axis=-1)
    assert distance[inside].max() < distance[~inside].min(), "no group touches another"
    assert found.kept > 0.8
    assert found.kept > times * found.shuffled, "shuffled, fewer groups have more in common"


def test_unrelated_units_are_no_better_than_shuffled_ones() -> None:
    vectors = np.random.default_rng(1).normal(size=(150, 300))
    found = response_map(Given(vectors), "s")
    assert 10 / 149 < found.kept < 0.35, "t-SNE keeps some of anything"
    assert abs(found.kept - found.shuffled) < 0.05


def test_kept_is_that_of_correlations() -> None:
    given = grouped(noise=2.0)
    found = response_map(Given(given), "s")
    assert found.kept == pytest.approx(
        kept_slowly(given - given.mean(1, keepdims=True), found.xy, 10), abs=2e-3
    )


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    store = Given(grouped())
    for method in ("tsne", "pca"):
        first, again = (response_map(store, "s", method, seed=3) for _ in range(2))
        with threadpool_limits(2):
            threaded = response_map(store, "s", method, seed=3)
        assert first.xy.tobytes() == again.xy.tobytes() == threaded.xy.tobytes()
        assert (first.kept, first.shuffled) == (again.kept, again.shuffled)
    other = response_map(store, "s", seed=4)
    assert other.shuffled != response_map(store, "s", seed=3).shuffled


def test_silent_units_lie_below_and_count_for_nothing() -> None:
    loud = grouped()
    given = np.insert(loud, [0, 20, 144], [[0.0], [0.3], [np.nan]], axis=0)
    whole, found = response_map(Given(loud), "s"), response_map(Given(given), "s")
    assert found.silent == (0, 21, 146)
    np.testing.assert_array_equal(np.delete(found.xy, found.silent, axis=0), whole.xy)
    assert (found.kept, found.shuffled) == (whole.kept, whole.shuffled)
    row = found.xy[list(found.silent)]
    assert row[:, 1].max() < whole.xy[:, 1].min()
    assert (np.diff(row[:, 0]) > 0).all()


def test_missing_responses_count_for_nothing() -> None:
    given = grouped()
    gaps = np.insert(given, 50, np.nan, axis=1)  # an example that could not be read
    whole, found = (response_map(Given(g), "s", "pca") for g in (given, gaps))
    np.testing.assert_allclose(found.xy, whole.xy, atol=1e-4)  # components are approximate
    assert (found.n, whole.n) == (101, 100)
    given[np.random.default_rng(0).random(given.shape) < 0.1] = np.nan
    found = response_map(Given(given), "s")
    assert (GROUPS[nearest(found.xy, 5)] == GROUPS[:, None]).all()


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("loud", [0, 1, 2, 3])
def test_hardly_any_unit_that_is_not_silent(loud: int, method) -> None:
    given = np.zeros((6, 8))
    given[:loud] = np.random.default_rng(0).normal(size=(loud, 8))
    found = response_map(Given(given), "s", method)
    assert len(found.silent) == 6 - loud
    assert np.isfinite(found.xy).all()
    assert np.isnan(found.kept) == (loud < 3)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["kept"] in (None, found.kept)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_units_that_are_all_alike(method) -> None:
    found = response_map(Given(np.tile([1.0, 2.0, 4.0], (12, 1))), "s", method)
    assert np.isfinite(found.xy).all()
    assert (found.kept, found.silent) == (1, ())
    assert response_map(Given(np.ones((12, 1))), "s", method).silent == tuple(range(12))


def test_a_map_says_what_it_is_of() -> None:
    found = response_map(Given(grouped()), "also", seed=2)
    raw = json.loads(json.dumps(found.to_dict()))
    assert raw.pop("xy") == found.xy.tolist()
    assert raw == {
        "site": "s", "method": "tsne", "of": "responses", "kept": found.kept, "shuffled": found.shuffled,
        "silent": [], "seed": 2, "model_hash": "m" * 64, "data": "d", "n": 100, "same_branch": None,
        "same_branch_by_chance": None,
    }  # fmt: skip


# --- weights -----------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two branches whose units are the same, one written directly, one through a layer that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stem_relu = nn.ReLU()
        self.direct = nn.Conv2d(6, 8, 1)
        self.same = nn.Conv2d(6, 6, 1)
        self.same_relu = nn.ReLU()
        self.through = nn.Conv2d(6, 8, 3, padding=1)
        self.cat = Concatenate()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_relu(self.stem(x))
        return self.cat(self.direct(x), self.through(self.same_relu(self.same(x))))


def test_twins_in_two_branches_are_neighbours() -> None:
    module = seeded(Twins())
    assert isinstance(module, Twins)
    with torch.no_grad():
        module.same.weight.copy_(torch.eye(6)[:, :, None, None])
        module.through.weight.zero_()[:, :, 1, 1] = module.direct.weight[:, :, 0, 0]
    model = HookedModel(module, (3, 12, 12))
    found = weight_map(
        model, "cat", "pca"
    )  # t-SNE of 16 points does not always keep equal ones together
    assert found.data.startswith("expanded weights from stem_relu, blurred")
    twin = (np.arange(16) + 8) % 16
    assert (nearest(found.xy, 1)[:, 0] == twin).all()


def test_kernels_of_one_source_stand_as_they_are() -> None:
    module = seeded(Branches())
    assert isinstance(module, Branches)
    with torch.no_grad():
        module.inner.weight[2] = 0
    model = HookedModel(module, (3, 8, 10))
    found = weight_map(model, "inner")
    kernels = module.inner.weight.detach().flatten(1).numpy()[[0, 1, 3, 4, 5]]
    assert (found.data, found.n, found.silent) == ("weights from cat", 54, (2,))
    assert found.model_hash == model.hash
    assert found.kept == pytest.approx(kept_slowly(kernels, np.delete(found.xy, 2, axis=0), 2))


def test_a_trained_inception_module() -> None:
    found = weight_map(load_model("shapes"), "mixed3b")
    assert found.data.startswith("expanded weights from mixed3a, blurred")
    assert found.kept > 2 * found.shuffled
    # 64 + 96 + 64 + 32 units: of 255 others so many are in a unit's branch.
    sizes = np.array([64, 96, 64, 32])
    chance = (sizes * (sizes - 1)).sum() / 256 / 255
    assert found.same_branch_by_chance == pytest.approx(chance)
    branch = np.repeat(range(4), sizes)
    counted = np.mean([branch[near] == branch[k] for k, near in enumerate(nearest(found.xy, 10))])
    assert found.same_branch == pytest.approx(counted)
    assert found.same_branch < 0.8, "it is 1.00 with the weights as they come"


def test_units_of_branches_that_read_alike_lie_together_wherever_they_sit() -> None:
    """Twelve patterns, each in a branch of 1 x 1 and in one of 5 x 5 that spreads it, with a mean of each branch's."""
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(12, 20)).repeat(4, axis=0) + 0.3 * rng.normal(size=(48, 20))
    branches = np.arange(48) % 2
    weight = np.zeros((48, 20, 5, 5), np.float32)
    weight[:, :, 2, 2] = patterns + 2 * rng.normal(size=(2, 20))[branches]
    spread = weight[branches == 1, :, 2, 2]
    weight[branches == 1] = spread[..., None, None] * rng.uniform(0.5, 1.5, (24, 20, 5, 5))
    group = np.arange(48) // 4

    def found_by(vectors: np.ndarray) -> float:
        """The share of a unit's three nearest by cosine that have its pattern."""
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosine = unit @ unit.T - 9 * np.eye(48)
        return float(np.mean(group[np.argsort(-cosine, axis=1)[:, :3]] == group[:, None]))

    silent = np.zeros((1, 20, 5, 5), np.float32)
    made = _comparable(np.concatenate([weight, silent]), np.append(branches, 0))
    assert not made[-1].any(), "a unit without weights stays silent"
    assert found_by(made[:-1]) > 0.9 > 0.5 > found_by(weight.reshape(48, -1))


# --- what hand-written curves look like ----------------------------------------------------------

CURVES = [feature for family in FAMILIES["curve"] for feature in family]
ANGLES = np.array([feature.angle for feature in CURVES])
RADII = np.array([feature.radius for feature in CURVES])


def apart(xy: np.ndarray) -> float:
    """Degrees between a curve and its four nearest on a map, the mean; 90 by chance.

    Curves of one radius are 15 degrees apart: 22.5 where they come in order.
    """
    turned = ANGLES[nearest(xy, 4)] - ANGLES[:, None]
    return float(np.abs((turned + 180) % 360 - 180).mean())


def assert_angles_are_close(found: UnitMap) -> None:
    permuted = np.random.default_rng(0).permutation(found.xy)
    assert apart(found.xy) < 24
    assert apart(permuted) > 70


def test_curves_lie_beside_curves_of_their_angle(tmp_path: Path) -> None:
    model, curves = load_model("cleanroom"), open_source("curves")
    store = harvest(model, curves, ["curve"], Workspace(tmp_path), workers=1)
    found = response_map(store, "curve")
    assert (found.model_hash, found.data, found.n) == (model.hash, "curves", len(curves))
    assert_angles_are_close(found)
    assert found.kept > 0.9 > 2 * found.shuffled


def test_curves_are_built_like_those_of_their_angle_and_radius() -> None:
    found = weight_map(load_model("cleanroom"), "curve")
    assert_angles_are_close(found)
    same = RADII[nearest(found.xy, 4)] == RADII[:, None]
    assert same.mean() > 0.95, "a curve reads early curves of its own radius alone"
    assert found.kept > 2 * found.shuffled


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    store, model = Given(grouped()), HookedModel(seeded(Branches()), (3, 8, 10))
    with pytest.raises(ValueError, match="site 's' has 2 units: a map takes at least 3"):
        response_map(Given(np.eye(2)), "s")
    with pytest.raises(ValueError, match="site 'right' has 2 units: a map takes at least 3"):
        weight_map(model, "right")
    with pytest.raises(ValueError, match="seed -1 must be 0 to 4294967295"):
        response_map(store, "s", seed=-1)
    with pytest.raises(KeyError, match="unknown site of the activation store 'z'"):
        response_map(store, "z")
    with pytest.raises(KeyError, match="did you mean inner"):
        weight_map(model, "iner")


def test_sites_without_weights_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"'hook_embed' .* by no layer .* expected blocks\.1\.attn\.hook_z"
    ):
        weight_map(load_model("induction"), "hook_embed")
    spoilt = HookedModel(seeded(Branches()), (3, 8, 10))
    with torch.no_grad():
        spoilt.module.get_submodule("inner").get_parameter("weight")[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"weight inner\.weight of .* 54 of its 324 numbers are NaN"
    ):
        weight_map(spoilt, "inner")
