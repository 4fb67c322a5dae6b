"""The clean room: what hand-written units look for is what they respond to."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.cleanroom import network
from circuits.cleanroom.families import Feature, angles_of, rotations
from circuits.cleanroom.network import CURVES, FAMILIES, RADII, UNIT_NAMES, CleanRoom, provenance
from circuits.cleanroom.paths import Path as Stroke
from circuits.cleanroom.paths import arc, circle, s_shape, straight
from circuits.cleanroom.tiling import Affinity, differences, tile
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli import drawing
from circuits.stimuli.patterns import STRAIGHT, arcs, circles
from circuits.tuning.radial import RadialTuning, radial_tuning
from tests.forked import Forked

PUBLISHED = Path(__file__).parents[1] / "cases/curve_detector/published_curves.json"


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("cleanroom")


@pytest.fixture(scope="module")
def curves(model: HookedModel) -> list[RadialTuning]:
    return radial_tuning(model, [f"curve:{k}" for k in range(72)], step=5.0, radii=RADII)


# --- the craft ---------------------------------------------------------------------------------


def test_paths_by_hand() -> None:
    arch = arc(90.0, 10.0, 5 * np.pi)  # half a circle, its top at the unit's place
    torch.testing.assert_close(arch.points[0], torch.tensor([10.0, 10.0]).double())
    torch.testing.assert_close(arch.points[20], torch.zeros(2).double())
    torch.testing.assert_close(arch.points[40], torch.tensor([-10.0, 10.0]).double())
    torch.testing.assert_close(arch.normals[[0, 20, 40]], torch.tensor([0.0, 90, 180]).double())
    line = straight(45.0, 8.0)  # up and to the right, and y grows downwards
    torch.testing.assert_close(line.points[40], torch.tensor([1.0, -1.0]).double() * 8 / 2**0.5)
    assert torch.allclose(circle(7.0).points.norm(dim=1), torch.tensor(7.0).double())
    s = s_shape(0.0, 10.0, 5 * np.pi)  # a quarter of a circle each way
    ahead, behind = s.points[:20], s.points[20:]
    torch.testing.assert_close(behind, -ahead, msg="turned by half a turn it is itself")
    assert (ahead[:, 0] > 0).all()
    assert (ahead[:, 1] > 0).all()
    mirrored = s_shape(0.0, 10.0, 5 * np.pi, mirrored=True)
    torch.testing.assert_close(mirrored.points[:20] * torch.tensor([1.0, -1.0]).double(), ahead)


def test_affinity_by_hand() -> None:
    wanted = Affinity(10.0, around=(0.2, 30.0), opposed=(0.5, 40.0), every=0.1)
    d = torch.tensor([0.0, 90.0, 180.0]).double()
    by_hand = [
        1 - 0.2 - 0.5 * np.exp(-(180**2) / 3200) - 0.1,
        np.exp(-(90**2) / 200) - 0.2 * np.exp(-(90**2) / 1800) - 0.5 * np.exp(-(90**2) / 3200) - 0.1,
        np.exp(-(180**2) / 200) - 0.2 * np.exp(-(180**2) / 1800) - 0.5 - 0.1,
    ]  # fmt: skip
    torch.testing.assert_close(wanted(d, 360.0), torch.tensor(by_hand).double())


def test_a_tile_against_its_definition() -> None:
    path, angles = arc(30.0, 12.0, 9.0), torch.tensor([0.0, 100.0, 200.0]).double()
    wanted = Affinity(25.0, opposed=(0.5, 60.0))
    made = tile(path, angles, 360.0, wanted, size=3, step=8.0, width=5.0)
    for s in range(3):
        for row in range(3):
            for column in range(3):
                total = 0.0
                for point, normal in zip(path.points.tolist(), path.normals.tolist(), strict=True):
                    away = (angles[s].item() - normal + 180) % 360 - 180
                    x, y = (column - 1) * 8 - point[0], (row - 1) * 8 - point[1]
                    blob = 64 * np.exp(-(x * x + y * y) / 50) / (2 * np.pi * 25)
                    total += wanted(torch.tensor(away, dtype=torch.float64), 360.0).item() * blob
                assert made[s, row, column].item() == pytest.approx(total / 41, rel=1e-9)


def test_families_are_orbits() -> None:
    family = rotations(Feature("curve", 10.0, 360.0, 20.0), 4)
    assert [f.angle for f in family] == [10, 100, 190, 280]
    assert angles_of(rotations(Feature("line", period=180.0), 2)).tolist() == [90, 180]
    apart = differences(torch.tensor([170.0]).double(), torch.tensor([-10.0]).double(), 180.0)
    assert apart.item() == 0


def test_over_200_units_are_named_once_and_in_the_order_of_families() -> None:
    assert sum(len(UNIT_NAMES[layer]) for layer in list(UNIT_NAMES)[:5]) >= 200
    assert len(RADII) == 3
    assert all(len(family) == 24 for family in CURVES.values())
    for layer, names in UNIT_NAMES.items():
        assert len(names) == len(set(names)), layer
    assert UNIT_NAMES["curve"][25] == "curve 15°, radius 26"


def test_nothing_is_learned_and_no_file_is_read(tmp_path: Path) -> None:
    """The package imports torch and itself alone, and the weights are the same where nothing can be opened."""
    folder = Path(network.__file__).parent
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "hashlib",
        "jaxtyping",
        "math",
        "pathlib",
        "torch",
        "typing",
    }
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("circuits.cleanroom") or name.split(".")[0] in allowed, file
    script = (
        "import builtins, hashlib, torch\n"
        "from circuits.cleanroom.network import CleanRoom\n"
        "def refuse(*a, **k): raise AssertionError('opened a file')\n"
        "builtins.open = refuse\n"
        "torch.load = refuse\n"
        "state = CleanRoom().state_dict()\n"
        "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in state.values())).hexdigest())\n"
    )
    log = tmp_path / "log"
    assert Forked(script, out=log).wait() == 0, log.read_text()
    own = b"".join(v.numpy().tobytes() for v in network.CleanRoom().state_dict().values())
    assert log.read_text().strip() == hashlib.sha256(own).hexdigest()
    assert set(provenance()["sources"]) >= {"network.py", "tiling.py", "paths.py"}


# --- lines -------------------------------------------------------------------------------------


def test_lines_prefer_their_own_orientation(model: HookedModel) -> None:
    angles = torch.arange(180.0)
    reach = 30 * drawing.heading(angles)
    distance = drawing.segment_distance(drawing.grid(64, 64), -reach, reach)
    for foreground in (0.0, 1.0):  # both polarities
        images = drawing.paint(
            torch.full((180, 3, 64, 64), 1 - foreground),
            drawing.stroke(distance, torch.full((180,), 4.0)),
            torch.full((180, 3), foreground),
        )
        lines = model.run(images, read=["line"])["line"][:, :, 6:10, 6:10].amax((2, 3))
        for unit, feature in enumerate(FAMILIES["line"][0]):
            preferred = angles[lines[:, unit].argmax()].item()
            assert abs((preferred - feature.angle + 90) % 180 - 90) <= 5
            assert lines[:, unit].max() > 0.5
            assert lines[int(feature.angle + 90) % 180, unit] < 0.1 * lines[:, unit].max()


def test_uniform_images_do_nothing(model: HookedModel) -> None:
    for shape in ((40, 56), (200, 120)):
        cache = model.run(torch.full((1, 3, *shape), 0.7), read=["gabor", "line", "curve"])
        assert cache["line"].max() == 0
        assert cache["curve"].max() == 0
        assert cache["gabor"][:, :48].max() < 1e-5


# --- curves ------------------------------------------------------------------------------------


def test_every_curve_is_tuned_as_it_is_written(
    model: HookedModel, curves: list[RadialTuning]
) -> None:
    straight = radial_tuning(model, [f"curve:{k}" for k in range(72)], "line", step=15.0)
    features = [f for family in FAMILIES["curve"] for f in family]
    for tuning, line, feature in zip(curves, straight, features, strict=True):
        m = tuning.measures
        assert abs((m.direction.value - feature.angle + 180) % 360 - 180) < 5
        assert 28 <= m.fwhm.value <= 68
        assert m.echo.value <= 0.03
        assert line.measures.peak.value < 0.35 * m.peak.value


@pytest.mark.parametrize("radius", [28.0, 41.0, 59.0])
def test_no_echo_at_any_radius_of_the_range(model: HookedModel, radius: float) -> None:
    found = radial_tuning(model, [f"curve:{k}" for k in range(72)], step=15.0, radii=[radius])
    assert max(t.measures.echo.value for t in found) <= 0.03


def test_echo_falls_layer_by_layer(model: HookedModel) -> None:
    def tuned(units: list[str], step: float, size: int | None = None) -> list[RadialTuning]:
        return radial_tuning(model, units, step=step, radii=RADII, size=size)

    # what early curves see is smaller than what curves see: both are shown the same
    def echoes(site: str, n: int) -> list[float]:
        units = [f"{site}:{k}" for k in range(n)]
        return [t.measures.echo.value for t in tuned(units, 30.0, 128)]

    lines, early, late = echoes("line", 12), echoes("early", 72), echoes("curve", 72)
    assert min(lines) > 0.7 > 0.4 > np.median(early) > 0.05 > 0.03 > max(late)
    own = tuned([f"early:{k}" for k in range(72)], step=15.0)
    assert all(0.05 <= t.measures.echo.value <= 0.4 for t in own)


def test_without_negative_weights_echoes_grow(model: HookedModel) -> None:
    units, radii = [f"curve:{k}" for k in range(24)], RADII[:1]
    with_negative = radial_tuning(model, units, step=15.0, radii=radii)
    weights = model.parameters
    positive = {
        name: weights[name].clamp_min(0)
        for name in ("early_pre_relu.weight", "curve_pre_relu.weight")
    }
    with model.rewriting(positive):
        without = radial_tuning(model, units, step=15.0, radii=radii)
    before = np.mean([t.measures.echo.value for t in with_negative])
    after = np.mean([t.measures.echo.value for t in without])
    assert after > max(5 * before, 0.2)


def test_curve_to_curve_weights_are_circulant(model: HookedModel) -> None:
    weight = model.parameters["curve_pre_relu.weight"].double().numpy().sum((2, 3))
    for k in range(3):
        block = weight[24 * k : 24 * k + 24, 24 * k : 24 * k + 24]
        aligned = np.stack([np.roll(row, -i) for i, row in enumerate(block)])
        rest = ((aligned - aligned.mean(0)) ** 2).sum()
        assert 1 - rest / ((block - block.mean()) ** 2).sum() >= 0.98
        mean = aligned.mean(0)
        assert mean[0] > 0 > mean[12], "excited by its own angle, inhibited by the opposed"


def test_turning_the_curve_turns_the_family(model: HookedModel) -> None:
    angles = torch.arange(24) * 15.0

    def family(degrees: float) -> np.ndarray:
        images = arcs(angles + degrees, 41.0, 120, thickness=5.0)
        maps = model.run(images, read=["curve"])["curve"][:, 24:48, 6:9, 6:9]
        return maps.amax((2, 3)).double().numpy()

    before, after = family(0.0), family(15.0)
    shifted = np.roll(before, 1, axis=1)
    assert np.corrcoef(shifted.ravel(), after.ravel())[0, 1] >= 0.99


def test_published_curves_are_alike(curves: list[RadialTuning]) -> None:
    published = json.loads(PUBLISHED.read_text())
    ours = np.stack([t.mean for t in curves])
    best = []
    for curve in published["mixed3b"].values():
        theirs = np.array(curve)[::5]
        turned = np.stack([np.roll(theirs, k) for k in range(len(theirs))])
        best.append(np.corrcoef(turned, ours)[: len(turned), len(turned) :].max())
    assert len(best) == 10
    assert min(best) >= 0.94
    assert np.median(best) >= 0.98


# --- circles and S-shapes ----------------------------------------------------------------------


def strongest(model: HookedModel, images: Tensor) -> Tensor:
    maps = model.run(images, read=["shape"])["shape"]
    middle = maps.shape[2] // 2
    return maps[:, :, middle - 2 : middle + 2, middle - 2 : middle + 2].amax((2, 3))


def drawn(path: Stroke, size: int = 160) -> Tensor:
    places = drawing.grid(size, size).reshape(size, size, 1, 2)
    distance = (places - path.points.float()).norm(dim=-1).amin(-1)
    return (1 - drawing.stroke(distance[None], torch.tensor([6.0])))[:, None].repeat(1, 3, 1, 1)


def test_circles_want_all_of_a_circle(model: HookedModel) -> None:
    for k, radius in enumerate(RADII):
        whole = strongest(model, circles(torch.tensor([radius]), 160, thickness=6.0))[0, k]
        half = arcs(torch.arange(8) * 45.0, radius, 160, length=np.pi * radius, thickness=6.0)
        assert whole > 0
        assert strongest(model, half)[:, k].max() < 0.5 * whole
    lines = arcs(torch.arange(8) * 22.5, STRAIGHT, 160, thickness=6.0)
    assert strongest(model, lines).max() == 0


def test_s_shapes_want_both_halves(model: HookedModel) -> None:
    features = [f for family in FAMILIES["shape"][1:] for f in family]
    images = torch.cat(
        [drawn(s_shape(f.angle, f.radius, 2 * f.radius, f.mirrored)) for f in features]
    )
    found = strongest(model, images)[:, 3:]
    assert (found.argmax(1) == torch.arange(24)).all(), "each shape excites its own unit most"
    radius = features[0].radius
    curve = arcs(torch.arange(24) * 15.0, radius, 160, length=4 * radius, thickness=6.0)
    assert strongest(model, curve)[:, 3:].max() < 0.5 * found.diag().min()


def test_any_size_and_colours_by_their_mean() -> None:
    net = CleanRoom()
    colour = torch.rand(1, 3, 37, 91, generator=torch.Generator().manual_seed(0))
    grey = colour.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(net(colour), net(grey), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        net(torch.rand(1, 1, 64, 64))
