"""The same input makes the same files, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import altair as alt
import pytest
import torch
from PIL import Image

from circuits.autoencoders.layouts import export_autoencoder
from circuits.edits.recipes import Recipe, bake, save_baked
from circuits.featurevis.natural import NaturalImages
from circuits.featurevis.pictures import write_image
from circuits.figures.saving import save_figure
from circuits.files import write_json
from circuits.graph.circuit import CircuitGraph
from circuits.graph.formats import write_circuit
from circuits.hdf5 import created
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tensors import write_tensors
from circuits.units import Unit
from tests.test_autoencoders import made as autoencoder

_MANY = {f"circuits.{name}": "é\t" * 3 for name in "cabdfe"}


def _tensors(path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    tensors = {"b": tied, "a": tied.T, "half": torch.zeros(1, dtype=torch.bfloat16)}
    write_tensors(path, tensors, _MANY)


def _natural(path: Path) -> None:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    NaturalImages.fit(images, "noise", "00").save(path)


def _figure(path: Path) -> None:
    points = alt.Data(values=[{"x": 1, "y": 2}, {"x": 2, "y": 3}])
    save_figure(alt.Chart(points).mark_line(clip=True).encode(x="x:Q", y="y:Q", color="x:Q"), path)


def _picture(path: Path) -> None:
    write_image(Image.new("RGB", (8, 8), "red"), path, {"b": 1, "a": "é"})


def _hdf5(path: Path) -> None:
    with created(path) as file:
        file["group/numbers"] = list(range(9))
        file.create_dataset("packed", data=[[1.0] * 64] * 64, compression="lzf")


def _circuit(path: Path) -> None:
    graph = CircuitGraph(model="m", model_hash="h")
    graph.connect(Unit("a", 1), Unit("b", 2), "weight", sum=1.0)
    with patch("time.strftime", lambda *_: str(path)):  # of another day
        write_circuit(graph, path)


def _dictionary(path: Path) -> None:
    export_autoencoder(autoencoder("relu"), path, "dictionary_learning")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_tensors, "a.safetensors"), (_natural, "a.safetensors"), (_figure, "a.svg"), (_figure, "a.png"),
        (_picture, "a.png"), (_picture, "a.webp"), (_circuit, "a.gexf"), (_circuit, "a.graphml"),
        (_circuit, "a.json"), (_hdf5, "a.h5"), (_dictionary, "code"),
        (lambda path: write_json(path, {"b": 1, "a": [2.5]}), "a.json"),
    ],
)  # fmt: skip
def test_six_times_the_same_bytes(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    made = set()
    for i in range(6):
        place = tmp_path / str(i)
        place.mkdir()
        make(place / name)
        files = sorted(p for p in place.rglob("*") if p.is_file())
        assert files
        made.add(tuple((str(p.relative_to(place)), p.read_bytes()) for p in files))
    assert len(made) == 1


def test_baked_weights_are_the_same_bytes(own_net: HookedModel, tmp_path: Path) -> None:
    recipe = Recipe(())
    for i in range(6):
        save_baked(bake(own_net, recipe), tmp_path / f"{i}.safetensors", own_net, recipe)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
