"""Images from a browser: what is decoded, what is refused, and before what."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin

from circuits.stimuli.uploads import FORMATS, MAX_BYTES, decode_image, shown_name
from tests.conftest import examples

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def black_png(width: int, height: int, more: bytes = b"") -> bytes:
    """A whole and valid PNG with 1 bit a pixel."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF whose only tile, compressed, is of another size than the image."""
    data = zlib.compress(bytes(tile * tile), 1)
    tags = [
        (256, side),
        (257, side),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, tile),
        (323, tile),
    ]
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(324, start), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def refusal(data: bytes, name: str = "") -> str:
    """The message with which an image is refused: one line that can be printed."""
    with pytest.raises(ValueError) as error:
        decode_image(data, name)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


# --- what is decoded ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_known_by_its_contents(form: str) -> None:
    options = {"lossless": True} if form == "WebP" else {}
    image = decode_image(encoded(PICTURE, form, **options), "notes.txt")
    assert (image.mode, image.size) == ("RGB", (30, 20))
    if form in ("PNG", "WebP", "BMP", "TIFF"):  # the others lose something
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_refused_under_any_name(form: str) -> None:
    assert "expected a whole image in PNG, JPEG" in refusal(encoded(PICTURE, form), "picture.png")


def test_sixteen_bits_are_scaled_down() -> None:
    grey = PIXELS[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for form in ("PNG", "TIFF"):
        image = np.asarray(decode_image(encoded(deep, form)))
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))


def test_ink_becomes_light() -> None:
    for ink, light in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))):
        data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG")
        found = np.asarray(decode_image(data)).astype(int)
        assert np.abs(found - light).max() <= 3, "JPEG rounds"


def test_transparency_is_white() -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.paste(0, (0, 0, 2, 2))  # the left half
    half = np.asarray(decode_image(encoded(palette, "PNG", transparency=0)))
    assert (half[:, :2] == 255).all()
    assert (half[:, 2:] == (200, 10, 20)).all()

    veil = Image.new("LA", (2, 2), (0, 51))  # black, a fifth opaque
    assert (np.asarray(decode_image(encoded(veil, "PNG"))) == 204).all()


def test_of_several_pictures_the_first_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for form, options in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WebP", {"lossless": True})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (np.asarray(decode_image(data)) == (255, 0, 0)).all(), form


UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS[::-1].transpose(1, 0, 2),  # the camera's left is the top: a quarter to the right
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: PIXELS[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(orientation: int) -> None:
    exif = PICTURE.getexif()
    exif[0x0112] = orientation
    image = decode_image(encoded(PICTURE, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation])


def test_the_smallest_image_is_one() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    assert "expected a whole image" in refusal(black_png(0, 1))


# --- what is refused ---------------------------------------------------------------------------


def test_large_files_and_none_are_refused() -> None:
    assert "'big.png' has 95.4 MB: expected at most 20 MB" in refusal(bytes(100_000_000), "big.png")
    assert refusal(b"", "a.png").startswith("image 'a.png' is empty: expected a file in PNG, JPEG")
    whole = encoded(PICTURE, "PNG")
    assert decode_image(whole + bytes(MAX_BYTES - len(whole))).size == (30, 20)


BOMBS = {
    "20000x20000.png": (
        lambda: black_png(20_000, 20_000),
        "too many pixels: expected at most 50000000",
    ),
    "10000x6000.png": (
        lambda: black_png(10_000, 6_000),
        "has 10000 x 6000 pixels: expected at most 5",
    ),
    "tile.tif": (
        lambda: tiled_tiff(16, 10_000),
        "has 10000 x 10000 pixels: expected at most 50000000",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_large_images_are_refused_before_a_pixel_is_decoded(name: str, monkeypatch) -> None:
    def decoded(self) -> None:
        raise AssertionError("a pixel was decoded")

    make, message = BOMBS[name]
    data = make()
    assert len(data) < 500_000, "the file is small, what it becomes is not"
    for kind in (ImageFile.ImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(kind, "load", decoded)
    for small in (black_png(8, 8), tiled_tiff(16, 16)):
        with pytest.raises(AssertionError, match="was decoded"):
            decode_image(small)
    assert message in refusal(data, name)


def test_tiles_of_an_ordinary_size_are_read() -> None:
    assert decode_image(tiled_tiff(16, 16)).size == (16, 16)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_explodes_is_refused(kind: bytes) -> None:
    text = zlib.compress(bytes(100_000_000), 1)
    between = b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0"
    data = black_png(8, 8, chunk(kind, b"key" + between + text))
    tracemalloc.start()
    message = refusal(data, "text.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "'text.png' cannot be read: Decompressed data too large" in message
    assert peak < 20_000_000


def test_what_is_no_image_is_refused() -> None:
    for data in (
        b"not a picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"BM",
        b"GIF89a",
        b"\0",
    ):
        assert "'a.png' cannot be read" in refusal(data, "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged metadata
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_cut_off_is_refused(form: str) -> None:
    data = encoded(PICTURE, form)
    for share in (0.1, 0.5, 0.8):
        assert "'cut.jpg' cannot be read" in refusal(data[: int(share * len(data))], "cut.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=examples(200), suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
)
def test_damage_gives_an_image_or_one_line(form: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(Image.fromarray(PIXELS[:8, :8]), form))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        image = decode_image(bytes(data))
    except ValueError as error:
        message = str(error)
    else:
        assert image.mode == "RGB"
        return
    assert message.isprintable()


# --- names -------------------------------------------------------------------------------------

ODD = " ._=…/<aeK\u00a0\u200d\u0085\u0301\u0308\u0328\u0338\u0344\u0958\u1100\u1161\u11a8\u212b\u2028\U0001d15e"
"""Letters that compose and those that never do, marks, what is removed, what is replaced, spaces."""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\cat (2).jpg", "cat (2).jpg"),
        ("<script>", "_script_"),
        ("<script>alert(1)</script>", "script_"),
        ("a\0b\n\u202ec\x1b[31m.png", "abc_31m.png"),
        ("[x](javascript:1) `$y$`", "_x_(javascript_1) __y__"),
        ("Ka\u0308fer \u732b.png", "K\u00e4fer \u732b.png"),
        ("", "without a name"),
        ("pictures/", "without a name"),
        ("x" * 300 + ".jpeg", "x" * 44 + "…" + "x" * 10 + ".jpeg"),
    ],
)
def test_names_are_shown_harmlessly(name: str, shown: str) -> None:
    assert shown_name(name) == shown
    assert refusal(b"text", name).startswith(f"image {shown!r} cannot be read")


@given(st.text() | st.text(ODD, min_size=55, max_size=70))
@example("x" * 61)  # the mark of what was cut out stays
@example("x" * 44 + "…" + "x" * 15)
@example("x" * 43 + "   " + "y" * 15 + " ")  # spaces around the cut
@example("a\u200d\u0308.png")  # a letter and its mark meet when what was between them is gone
@example("=\u200d\u0338.png")  # and may become a character that is not kept
@example("\u1100\u200d\u1161\u200d\u11a8")
@example("x" * 45 + "a" + "\u0308" * 15)  # a mark without its letter behind the cut
@example("a\u0328\u0301" * 20 + "\u0344")
@example("\u0958" * 31)  # a letter that is always written as two
def test_any_name_is_short_and_printable(name: str) -> None:
    shown = shown_name(name)
    assert 1 <= len(shown) <= 60
    assert shown.isprintable()
    assert not set(shown) & set("/\\<>&'\"`*[]$:|~#\n")
    assert shown_name(shown) == shown


def test_names_are_no_paths(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(PICTURE, "PNG"))
    refusal(b"text", "secret.png")
    decode_image(encoded(PICTURE, "PNG"), "new.png")
    assert [path.name for path in tmp_path.iterdir()] == ["secret.png"]
