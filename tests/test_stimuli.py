from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import circuits
from circuits.stimuli import drawing
from circuits.stimuli.images import ImageSource, read_image, to_image
from circuits.stimuli.repeats import BOS, draw_repeats
from circuits.stimuli.shapes import CLASSES, draw_shapes
from circuits.stimuli.sources import open_source
from circuits.stimuli.texts import TextSource


def polyline_distance(points: torch.Tensor, path: np.ndarray) -> np.ndarray:
    """Distance to a densely sampled path: the slow way."""
    flat = points.reshape(-1, 1, 2).numpy()
    return np.linalg.norm(flat - path[None], axis=-1).min(axis=1)


@pytest.mark.parametrize("orientation", [0.0, 37.0, 90.0, 200.0, 315.0])
@pytest.mark.parametrize("half_span", [30.0, 100.0, 180.0])
def test_arc_distance_against_sampled_points(orientation: float, half_span: float) -> None:
    points = drawing.grid(21, 27)
    one = torch.ones(1)
    center = torch.tensor([[2.0, -3.0]])
    ours = drawing.arc_distance(points, center, 7 * one, orientation * one, half_span * one)
    angles = np.deg2rad(np.linspace(orientation - half_span, orientation + half_span, 4000))
    # counter-clockwise on a screen whose y points down
    path = np.stack([2 + 7 * np.cos(angles), -3 - 7 * np.sin(angles)], axis=1)
    np.testing.assert_allclose(ours.numpy().ravel(), polyline_distance(points, path), atol=0.02)


def test_segment_and_polygon_distance_against_sampled_points() -> None:
    points = drawing.grid(21, 21)
    a, b = torch.tensor([[-5.0, 2.0]]), torch.tensor([[6.0, -4.0]])
    t = np.linspace(0, 1, 3000)[:, None]
    path = a.numpy() * (1 - t) + b.numpy() * t
    ours = drawing.segment_distance(points, a, b).numpy().ravel()
    np.testing.assert_allclose(ours, polyline_distance(points, path), atol=0.01)

    one, center = torch.ones(1), torch.tensor([[1.0, -2.0]])
    for sides in (3, 4, 6):
        corners = np.deg2rad(20 + 360 / sides * np.arange(sides + 1))
        x, y = 1 + 7 * np.cos(corners), -2 - 7 * np.sin(corners)
        path = np.concatenate(
            [np.linspace((x[i], y[i]), (x[i + 1], y[i + 1]), 2000) for i in range(sides)]
        )
        ours = drawing.polygon_distance(points, center, 7 * one, sides, 20 * one).abs().numpy()
        np.testing.assert_allclose(ours.ravel(), polyline_distance(points, path), atol=0.01)


def test_a_curve_bulges_where_it_says() -> None:
    for orientation, side in ((0.0, "right"), (90.0, "top"), (180.0, "left"), (270.0, "bottom")):
        image = drawing.curves(torch.tensor([orientation]), torch.tensor([12.0]), size=41)
        ink = 1 - image[0, 0]
        assert ink[20, 20] == 1, "the middle of the curve is the middle of the image"
        # the ends lie on the other side of the middle
        rows, columns = torch.meshgrid(
            torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij"
        )
        center_y, center_x = (ink * rows).sum() / ink.sum(), (ink * columns).sum() / ink.sum()
        where = {"right": -center_x, "left": center_x, "top": center_y, "bottom": -center_y}
        assert where[side] > 1


def test_stroke_is_anti_aliased() -> None:
    distance = torch.tensor([[[0.0, 1.0, 1.5, 2.0, 3.0]]])
    assert drawing.stroke(distance, torch.tensor([3.0])).tolist() == [[[1.0, 1.0, 0.5, 0.0, 0.0]]]


def test_drawings_depend_on_the_seed_alone() -> None:
    labels = torch.arange(len(CLASSES))
    first = draw_shapes(labels, torch.Generator().manual_seed(4))
    again = draw_shapes(labels, torch.Generator().manual_seed(4))
    other = draw_shapes(labels, torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_repeats_repeat_where_they_say() -> None:
    tokens, predictable = draw_repeats(50, torch.Generator().manual_seed(1))
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1:] != BOS).all()
    for row, marked in zip(tokens.tolist(), predictable.tolist(), strict=True):
        start = marked.index(True) - 1  # first token of the second round
        periods = [p for p in range(6, 25) if row[start:] == row[start - p : len(row) - p]]
        assert periods, "a marked token repeats what stood one period earlier"
        assert all(marked[start + 1 :])
    with pytest.raises(ValueError, match="do not fit"):
        draw_repeats(1, torch.Generator(), length=10)


def test_photos_are_there_without_a_download() -> None:
    source = open_source("photos")
    assert len(source) > 100
    sizes = {source.image(i).size for i in (0, 50, len(source) - 1)}
    assert sizes == {(160, 160)}
    assert open_source("photos").hash == source.hash
    assert len({np.asarray(source.image(i)).tobytes() for i in range(len(source))}) == len(source)


def test_folder_reads_every_kind_of_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (tmp_path / "sub").mkdir()
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "sub" / "grey.JPG", format="JPEG")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.gif")
    clear = Image.fromarray(np.dstack([pixels, np.zeros((20, 30), np.uint8)]))
    clear.save(tmp_path / "clear.png")
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("not an image, and not counted as one")

    source = open_source(f"folder:{tmp_path}")
    images = {name: source.image(i) for i, name in enumerate(source.names)}
    assert set(images) == {
        "clear.png", "cmyk.jpg", "deep.png", "palette.gif", "rgb.png", "sub/grey.JPG", "turned.jpg",
    }  # fmt: skip
    assert all(image.mode == "RGB" for image in images.values())
    assert np.array_equal(np.asarray(images["rgb.png"]), pixels)
    assert np.array_equal(np.asarray(images["deep.png"])[..., 0], pixels[..., 0])
    assert (np.asarray(images["clear.png"]) == 255).all()
    assert images["turned.jpg"].size == (20, 30)
    before = source.hash
    Image.fromarray(255 - pixels).save(tmp_path / "rgb.png")
    assert open_source(f"folder:{tmp_path}").hash != before


def test_links_are_followed_and_end(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "far" / "deep" / "a.png")
    here = tmp_path / "here"
    here.mkdir()
    (here / "cat").symlink_to(tmp_path / "far")
    (here / "b.png").symlink_to(tmp_path / "far" / "deep" / "a.png")
    (here / "gone.png").symlink_to(tmp_path / "nothing")
    (here / "round").symlink_to(here)
    (tmp_path / "far" / "deep" / "up").symlink_to(tmp_path / "far")
    source = open_source(f"folder:{here}")
    assert source.names == ("b.png", "cat/deep/a.png")
    assert isinstance(source, ImageSource)
    assert source.left_out == {
        "gone.png": "a link to nothing", "round": "a link to a folder that it is in",
        "cat/deep/up": "a link to a folder that it is in",
    }  # fmt: skip


def grey(value: float, dtype: type, path: Path) -> int:
    """What a picture of one value in a file is, as 8 bits."""
    Image.fromarray(np.full((4, 5), value, dtype)).save(path)
    pixels = np.asarray(read_image(path))
    assert pixels.shape == (4, 5, 3)
    assert (pixels == pixels[0, 0, 0]).all()
    return int(pixels[0, 0, 0])


def test_values_of_files_are_scaled_by_their_kind(tmp_path: Path) -> None:
    assert grey(0.5, np.float32, tmp_path / "a.tif") == 128  # 127.5, rounded to even
    assert grey(1.0, np.float32, tmp_path / "a.tif") == 255
    for name in ("a.tif", "a.png", "a.pgm"):
        assert grey(200 * 257, np.uint16, tmp_path / name) == 200
        assert grey(100, np.uint16, tmp_path / name) == 0, "dark, but still of 16 bits"
    for value, kind, message in (
        (200.0, np.float32, "has values 200 to 200: expected 0 to 1"),
        (np.nan, np.float32, "has 20 NaN or infinite values of 20"),
        (200, np.int32, "has whole numbers of 32 bits, and nothing says which is white"),
    ):
        with pytest.raises(ValueError, match=rf"a\.tif' cannot be read: it {message}"):
            grey(value, kind, tmp_path / "a.tif")


def test_texts_are_cut_at_the_ends_of_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    kept = ("a\u2028b\x85c\x0bd\x0ce", "f <s> g", "h", "i")
    path.write_bytes(
        ("\ufeff" + kept[0] + "\r\n" + kept[1] + "\n\n" + kept[2] + "\r" + kept[3]).encode()
    )
    source = open_source(f"tokens:{path}")
    assert isinstance(source, TextSource)
    assert source.texts == kept
    assert source.names == ("line 1", "line 2", "line 4", "line 5")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("fotos", KeyError, "did you mean photos"),
        ("folder:", ValueError, "names nothing"),
        ("folder:/no/such", FileNotFoundError, "does not exist"),
        ("folder:{tmp}", ValueError, "holds no images"),
        ("tokens:{tmp}/none.txt", FileNotFoundError, "does not exist"),
        ("tokens:{tmp}/empty.txt", ValueError, "is empty"),
        ("tokens:{tmp}/bytes.txt", ValueError, "not text in UTF-8"),
    ],
)
def test_bad_sources_are_named(spec, error, message, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(error, match=message):
        open_source(spec.replace("{tmp}", str(tmp_path)))


def test_bad_images_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png' cannot be read"):
        read_image(text)
    whole = tmp_path / "whole.png"
    to_image(torch.rand(3, 64, 64)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png' cannot be read"):
        read_image(cut)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image(tmp_path / "none.png")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) show\n%%EOF\n"


def test_no_picture_is_handed_to_a_program(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it was run"))
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_bytes(EPS)
        with pytest.raises(ValueError, match=r"expected a whole image in JPEG, PNG, "):
            read_image(tmp_path / name)
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image()})
    whole = io.BytesIO()
    Image.new("RGB", (6, 5), "red").save(whole, "PNG")
    for content in (EPS, whole.getvalue()):
        images = [{"bytes": content, "path": None}] * 2
        made = datasets.Dataset.from_dict({"image": images}, features=kinds)
        made.save_to_disk(str(tmp_path / "set"))
        if content == EPS:
            with pytest.raises(ValueError, match=r"expected a whole image in JPEG, PNG, "):
                open_source(f"hf:{tmp_path / 'set'}")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source.image(1).getpixel((0, 0)) == (255, 0, 0)


def test_pictures_are_opened_in_one_place() -> None:
    root = Path(circuits.__file__).parents[1]
    files = [p for part in ("circuits", "apps", "cases") for p in (root / part).rglob("*.py")]
    found = {p.name for p in files if re.search(r"(?<!PIL\.)Image\.open\(", p.read_text())}
    assert found == {"images.py"}


def test_large_images_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("circuits.stimuli.images.MAX_PIXELS", 1000)
    path = tmp_path / "large.png"
    Image.new("RGB", (50, 50)).save(path)
    with pytest.raises(ValueError, match="50 x 50 pixels: expected at most 1000"):
        read_image(path)
