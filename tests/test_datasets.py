"""Data from arrays, Hugging Face datasets, map-style datasets and a person's own code."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from circuits.examples import Examples
from circuits.harvesting import harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.datasets import from_dataset
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource
from circuits.workspace import Workspace

BYTES = np.random.default_rng(0).integers(0, 256, (5, 40, 48, 3), dtype=np.uint8)


def pixels(source: object, i: int) -> np.ndarray:
    """An image of a source as bytes, y x x x channel."""
    assert isinstance(source, ImageSource)
    image = source.image(i)
    if isinstance(image, torch.Tensor):
        return (image.movedim(0, 2) * 255).round().to(torch.uint8).numpy()
    return np.asarray(image)


def test_arrays_of_images_come_in_any_usual_layout(tmp_path: Path) -> None:
    layouts = {
        "channels_last": BYTES,
        "channels_first": BYTES.transpose(0, 3, 1, 2),
        "floats": BYTES.astype(np.float32) / 255,
    }
    for name, array in layouts.items():
        np.savez(tmp_path / f"{name}.npz", images=array, labels=np.arange(5))
        source = open_source(f"npz:{tmp_path / name}.npz")
        assert len(source) == 5
        np.testing.assert_array_equal(pixels(source, 3), BYTES[3])
    np.save(tmp_path / "grey.npy", BYTES[..., 0])
    grey = open_source(f"npz:{tmp_path / 'grey.npy'}")
    np.testing.assert_array_equal(pixels(grey, 2)[..., 0], BYTES[2, ..., 0])


def test_a_layout_that_is_not_clear_is_asked_for() -> None:
    for shape in ((3, 20, 3), (16, 4, 4), (1, 9, 2)):
        arrays = [np.random.default_rng(0).random(shape, np.float32)]
        with pytest.raises(
            ValueError, match=r"example 0 of it: it has shape .* layout='channels_first'"
        ):
            from_dataset(arrays, "it")
        for layout, expected in (
            ("channels_first", arrays[0]),
            ("channels_last", arrays[0].transpose(2, 0, 1)),
        ):
            source = from_dataset(arrays, "it", layout=layout)
            assert isinstance(source, ImageSource)
            np.testing.assert_array_equal(np.asarray(source.image(0)), expected)
    with pytest.raises(
        ValueError, match="layout 'hwc' is not one of channels_first, channels_last"
    ):
        from_dataset([BYTES[0]], "it", layout="hwc")  # type: ignore[arg-type]


def test_opacity_of_arrays_is_that_of_files(tmp_path: Path) -> None:
    opacity = np.random.default_rng(1).integers(0, 256, (5, 40, 48, 1), dtype=np.uint8)
    rgba = np.concatenate([BYTES, opacity], -1)
    Image.fromarray(rgba[2]).save(tmp_path / "2.png")
    model = HookedModel(torch.nn.Conv2d(3, 2, 3), ImageInput(3, 40, 48))
    file = Examples(model, f"folder:{tmp_path}")
    array = Examples(model, from_dataset(rgba, "rgba"), None)
    # Pillow rounds each step to whole numbers.
    torch.testing.assert_close(array.load(2), file.load(0), atol=1.5 / 255, rtol=0)
    np.testing.assert_allclose(np.asarray(array.picture(2)), np.asarray(file.picture(0)), atol=2)
    by_hand = (rgba[2, 5, 7, :3] / 255.0) * (rgba[2, 5, 7, 3] / 255) + 1 - rgba[2, 5, 7, 3] / 255
    np.testing.assert_allclose(array.load(2)[:, 5, 7].numpy(), by_hand, atol=1e-6)
    four = HookedModel(torch.nn.Conv2d(4, 2, 3), ImageInput(4, 40, 48))
    whole = Examples(four, from_dataset(rgba, "rgba"), None).load(2)
    np.testing.assert_array_equal((whole * 255).round().numpy(), rgba[2].transpose(2, 0, 1))


def test_the_example_with_bad_pixels_is_named() -> None:
    arrays = BYTES.astype(np.float32) / 255
    arrays[3, 0, 0, 0], arrays[3, 1, 1, 1] = np.nan, np.inf
    source = from_dataset(arrays, "mine")
    assert isinstance(source, ImageSource)
    with pytest.raises(
        ValueError, match="example 3 of mine: it has 2 NaN or infinite values of 5760"
    ):
        source.image(3)
    deep = from_dataset([BYTES[0].astype(np.uint16) * 257], "deep")
    np.testing.assert_array_equal(pixels(deep, 0), BYTES[0])


def test_arrays_of_tokens_are_taken_as_they_are(tmp_path: Path, bridge: HookedModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 20, (9, 7))
    np.savez(tmp_path / "t.npz", a=tokens, b=tokens[:4])
    source = open_source(f"npz:{tmp_path / 't.npz'}:b")
    assert Examples(bridge, source).tokens(2) == tokens[2].tolist()
    store = harvest(bridge, source, ["hook_unembed"], Workspace(tmp_path / "ws"))
    assert len(store.provenance.examples) == 4
    model = HookedModel(bridge.module, TokenInput(20, 12, bos=3))
    assert Examples(model, source).tokens(2) == tokens[2].tolist(), "nothing is put in front"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4), np.float32), "tokens are whole numbers, not float32"),
        (np.zeros(5), "is neither images"),
        (np.zeros((0, 3, 4, 4), np.uint8), "is neither images"),
        (np.full((2, 8, 8, 3), 3.0), "has values 3 to 3: expected 0 to 1"),
        (np.full((2, 8, 8, 3), np.nan), "expected 0 to 1"),
        (np.zeros((2, 8, 8, 3), np.int32), "expected bytes, or floats"),
    ],
)
def test_bad_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        open_source(f"npz:{tmp_path / 'a.npy'}")


def test_bad_array_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(ValueError, match=r"broken\.npz' cannot be read"):
        open_source(f"npz:{tmp_path / 'broken.npz'}")
    np.savez(tmp_path / "two.npz", a=BYTES, b=BYTES)
    with pytest.raises(ValueError, match="it has arrays a, b: name one"):
        open_source(f"npz:{tmp_path / 'two.npz'}")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(f"npz:{tmp_path / 'none.npz'}")
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(f"npz:{tmp_path / 'pickle.npy'}")


def test_any_map_style_dataset_is_data(tmp_path: Path) -> None:
    images = torch.from_numpy(BYTES).movedim(3, 1).float() / 255
    source = from_dataset(TensorDataset(images, torch.arange(5)), "mine")
    np.testing.assert_array_equal(pixels(source, 4), BYTES[4])
    same = from_dataset([{"img": image, "y": 1} for image in images], "mappings")
    assert same.hash == source.hash, "content makes the hash"
    other = from_dataset(TensorDataset(1 - images), "mine")
    assert other.hash != source.hash
    named = from_dataset(TensorDataset(images), "mine", identity="version 1")
    assert named.hash != source.hash
    pictures = [Image.fromarray(array) for array in BYTES]
    store = harvest(
        load_model("cleanroom"), from_dataset(pictures, "pictures"), ["line"], Workspace(tmp_path)
    )
    assert store.provenance.examples[1] == "example 1"
    words = from_dataset([{"text": "a b"}, {"text": "b"}], "words")
    assert isinstance(words, TextSource)
    assert words.texts == ("a b", "b")
    tokens = from_dataset([{"input_ids": [1, 2, 3]}], "ids")
    assert isinstance(tokens, TextSource)
    assert tokens.texts == ((1, 2, 3),)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "is empty"),
        (iter([1]), TypeError, "is not map-style"),
        ([{"label": 1}], ValueError, "has columns label: name the one to use"),
        ([{1, 2}], ValueError, "of type set"),
        ([torch.zeros(2, 3, 4, 5)], ValueError, "has shape"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset, error, message) -> None:
    with pytest.raises(error, match=message):
        from_dataset(dataset, "it")


def test_images_of_another_size_are_fitted_and_grey_ones_refused_by_colour_models() -> None:
    images = torch.rand((2, 3, 20, 30), generator=torch.Generator().manual_seed(0))
    model = HookedModel(torch.nn.Conv2d(3, 2, 3), ImageInput(3, 12, 12))
    wide = Examples(model, from_dataset(TensorDataset(images), "wide"))
    assert wide.inputs.shape == (2, 3, 12, 12)
    five = from_dataset(TensorDataset(torch.zeros((2, 5, 12, 12))), "five")
    with pytest.raises(ValueError, match=r"has shape \(5, 12, 12\): the model takes \(3, 12, 12\)"):
        Examples(model, five).batch([0])


def test_hugging_face_datasets_on_disk(tmp_path: Path, recwarn) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["1 2 3", "4 5"], "n": [1, 2]})
    made.save_to_disk(str(tmp_path / "set"))
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert isinstance(source, TextSource)
    assert source.texts == ("1 2 3", "4 5")
    with pytest.raises(ValueError, match=r"no column 'words': expected one of text, n"):
        open_source(f"hf:{tmp_path / 'set'}:words")
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="has splits: name one"):
        open_source(f"hf:{tmp_path / 'splits'}")
    assert len(open_source(f"hf:{tmp_path / 'splits' / 'train'}")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(f"hf:{tmp_path / 'empty'}")


def test_hugging_face_columns_are_not_decoded_by_datasets(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    png = io.BytesIO()
    Image.new("RGB", (6, 5), "red").save(png, "PNG")
    good = {"bytes": png.getvalue(), "path": None}
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "more": datasets.List(datasets.Image()),
            "parts": {"a": datasets.Image()},
        }
    )
    rows = {"image": [good] * 2, "more": [[good]] * 2, "parts": [{"a": good}] * 2}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "set"))
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *a, **k: pytest.fail("`datasets` decoded it")
    )
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert isinstance(source, ImageSource)
    picture = source.image(1)
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    for column in ("more", "parts"):
        with pytest.raises(
            ValueError, match=rf"column '{column}' holds .*Image\(.*: expected images"
        ):
            open_source(f"hf:{tmp_path / 'set'}:{column}")


def test_a_persons_own_dataset(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def words():\n    return ['1 2', '3']\n\ndef broken():\n    return 1 / 0\n")
    assert len(open_source(f"python:{file}:words")) == 2
    with pytest.raises(ValueError, match=r"broken\(\) raised ZeroDivisionError"):
        open_source(f"python:{file}:broken")
    with pytest.raises(KeyError, match="did you mean words"):
        open_source(f"python:{file}:word")
