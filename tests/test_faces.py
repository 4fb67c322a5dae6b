"""Faces: a bright square at a known place is what a unit that looks for brightness is shown by."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from circuits import Examples, HookedModel, Unit, Workspace, load_model
from circuits.cli.main import run
from circuits.faces import LEAST, SIDE, faces_of, make_faces
from circuits.harvesting import harvest
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.sources import Source, open_source
from circuits.store import ActivationStore
from circuits.workspace import ModelRecord

PLACE = (28, 8)
"""Top and left of the square in the second image."""


class Bright(nn.Module):
    """Unit 0 is the mean of red over 4 x 4 pixels, unit 1 of blue; unit 2 is never active."""

    def __init__(self) -> None:
        super().__init__()
        self.sees = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        weight = torch.zeros(3, 3, 4, 4)
        weight[0, 0], weight[1, 2] = 1 / 16, 1 / 16
        self.sees.weight = nn.Parameter(weight)
        self.relu = nn.ReLU()
        self.out = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.relu(self.sees(x)).mean((2, 3)))


@pytest.fixture
def eyes() -> HookedModel:
    return HookedModel(Bright(), ImageInput(3, 48, 48), "bright")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.full((3, 48, 48, 3), 20, np.uint8)
    top, left = PLACE
    pixels[1, top : top + 4, left : left + 4, 0] = 250
    pixels[2, :4, :4, 2] = 250
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


def _harvested(model: HookedModel, folder: Path, place: Workspace) -> ActivationStore:
    return harvest(
        model, open_source(f"folder:{folder}"), ["relu"], place, ModelRecord("bright", model.hash)
    )


def _source(folder: Path) -> Source:
    return open_source(f"folder:{folder}")


def test_a_face_is_cut_where_the_unit_peaks(
    eyes: HookedModel, images: Path, place: Workspace
) -> None:
    store = _harvested(eyes, images, place)
    told: list[tuple[int, int]] = []
    n = make_faces(place, eyes, store, _source(images), progress=lambda *a: told.append(a))
    found = faces_of(place, eyes.hash)
    assert n == len(found) == 2, "a unit that is never active has no face"
    assert told == [(1, 2), (2, 2)], "the first image is nobody's best"
    red = found[Unit("relu", 0)]
    assert red.kind == "example"
    assert "at (7, 2) of 1.png" in red.about
    picture = np.asarray(red.picture(), float)
    assert picture.shape == (SIDE, SIDE, 3)
    # The box of 4 pixels is widened to 16: its square lies 6 pixels from the top and left.
    across = SIDE / LEAST
    bright = picture[..., 0] > 200
    rows, columns = np.nonzero(bright)
    assert rows.mean() == pytest.approx(across * 8, abs=1.5)
    assert columns.mean() == pytest.approx(across * 8, abs=1.5)
    blue = np.asarray(found[Unit("relu", 1)].picture(), float)
    rows, columns = np.nonzero(blue[..., 2] > 200)
    assert rows.mean() < across * 4, "at the corner the widened box stays inside the image"


def test_the_best_examples_of_all_units_are_the_top_ones(
    eyes: HookedModel, images: Path, place: Workspace
) -> None:
    lite = load_model("efficientnet-lite0")  # its sites have ceilings
    source = open_source(f"folder:{images}")
    stores = [_harvested(eyes, images, place)]
    stores.append(
        harvest(lite, source, ["stem"], place, ModelRecord("efficientnet-lite0", lite.hash))
    )
    for store in stores:
        for name, site in store.sites.items():
            tops = [store.top_examples(Unit(name, i), 1) for i in range(site.n_units)]
            assert store.best_examples(name) == [top[0] if top else None for top in tops]


def test_faces_are_made_once_and_again_where_they_are_damaged(
    eyes: HookedModel, images: Path, place: Workspace
) -> None:
    store, source = _harvested(eyes, images, place), _source(images)
    make_faces(place, eyes, store, source)
    path = place.faces_path(eyes.hash, "relu")
    before = path.stat().st_mtime_ns
    assert make_faces(place, eyes, store, source) == 2
    assert path.stat().st_mtime_ns == before
    for broken in (path.read_bytes()[:40], b"", b"PK" + bytes(100)):
        path.write_bytes(broken)
        assert faces_of(place, eyes.hash) == {}
        assert make_faces(place, eyes, store, source) == 2
        assert len(faces_of(place, eyes.hash)) == 2
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("faces.json", '{"site": "relu", "units": {"0": 5}}')
    assert faces_of(place, eyes.hash) == {}


def test_a_visualization_comes_before_an_example(
    eyes: HookedModel, images: Path, place: Workspace
) -> None:
    make_faces(place, eyes, _harvested(eyes, images, place), _source(images))
    own = place.picture_path(eyes.hash, "relu:0", "3steps-64px-seed0")
    own.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (0, 200, 0)).save(own)
    found = faces_of(place, eyes.hash)
    assert found[Unit("relu", 0)].kind == "visualization"
    assert found[Unit("relu", 0)].picture().getpixel((0, 0)) == (0, 200, 0)
    assert found[Unit("relu", 1)].kind == "example"


def test_what_is_gone_is_said(eyes: HookedModel, images: Path, place: Workspace) -> None:
    make_faces(place, eyes, _harvested(eyes, images, place), _source(images))
    face = faces_of(place, eyes.hash)[Unit("relu", 0)]
    with zipfile.ZipFile(face.path, "w") as archive:
        archive.writestr("faces.json", "{}")
    with pytest.raises(OSError, match=r"has no picture '00000\.jpg'"):
        face.picture()


def test_tokens_have_words(place: Workspace) -> None:
    model, source = load_model("induction"), open_source("repeats")
    store = harvest(
        model, source, ["blocks.1.attn.hook_z"], place, ModelRecord("induction", model.hash)
    )
    examples = Examples(model, source, None)
    make_faces(place, model, store, source)
    unit = Unit("blocks.1.attn.hook_z", 1)
    face, best = faces_of(place, model.hash)[unit], store.top_examples(unit, 1)[0]
    assert face.text == str(examples.tokens(best.index)[best.position[0]])
    with pytest.raises(ValueError, match="is a token and has no picture"):
        face.picture()


def test_harvest_makes_faces_unless_asked_not_to(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "a.png"
    )
    for more, n in ((["--no-faces"], 0), ([], 64)):
        at = ["--workspace", str(tmp_path / "ws"), "--workers", "1"]
        command = ["harvest", "shapes", "--data", f"folder:{folder}", "--sites", "conv2d0"]
        assert run([*command, *at, *more]) == 0
        found = faces_of(Workspace(tmp_path / "ws"), load_model("shapes").hash)
        assert bool(found) == bool(n)
        assert len(found) <= n
