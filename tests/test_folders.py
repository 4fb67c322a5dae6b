"""A folder as people have it, through the verbs of the command line: what is taken, what is not, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from circuits.cli.main import run
from circuits.examples import Examples
from circuits.models.zoo.loading import load_model
from circuits.stimuli.labels import read_labels
from circuits.stimuli.shapes import CLASSES
from circuits.stimuli.sources import open_source
from tests.commands import given, output, refused

GOOD = {
    "a/1.png": 0, "a/deep.png": 0, "a/scan.tif": 0, "b/1.png": 1, "b/clear.png": 1, "b/turned.jfif": 1,
    "c/1.webp": 2, "c/2.avif": 2,
}  # fmt: skip
"""The good files, by the number of their class; the folder c is a link."""
BAD = {"b/cut.png": 1, "c/empty.jpg": 2}
ACCOUNT = (
    "of 10 images taken ({}); skipped 1 × image cannot be read: image file is truncated (b/cut.png), "
    "1 × image cannot be read: the file is empty (c/empty.jpg)"
)
OTHERS = (
    "not among the images: 4 × hidden or of the system (Thumbs.db, __MACOSX, a/._1.png, …), "
    "1 × of kind .txt (notes.txt), 1 × a link to a folder that it is in (round)"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of three classes in `val`, with what gets in between."""
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path / "ws"))
    root, far = tmp_path / "val", tmp_path / "far"
    a, b, c = (root / CLASSES[0], root / CLASSES[1], far / "third")
    for place in (a, b, c, root / "__MACOSX"):
        place.mkdir(parents=True)
    (root / CLASSES[2]).symlink_to(c)
    (root / "round").symlink_to(root)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels[..., :3])
    for place in (a / "1.png", c / "1.webp", c / "2.avif"):
        picture.save(place)
    Image.fromarray(255 - pixels[..., :3]).save(b / "1.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(a / "deep.png")
    Image.fromarray(pixels[..., 0].astype(np.float32) / 255).save(a / "scan.tif")
    Image.fromarray(pixels).save(b / "clear.png")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(b / "turned.jfif", format="JPEG", exif=exif, quality=100, subsampling=0)
    (b / "cut.png").write_bytes((a / "1.png").read_bytes()[:4000])
    (c / "empty.jpg").touch()
    for side in (a / "._1.png", b / ".DS_Store", root / "Thumbs.db"):
        side.write_bytes(b"\0\5\x16\7")
    (root / "notes.txt").write_text("on the pictures")
    return root


def named(short: dict[str, int]) -> dict[str, int]:
    """The files' whole names, by their class."""
    return {f"{CLASSES[c]}/{name.partition('/')[2]}": c for name, c in short.items()}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The account, with folders as in `GOOD`."""
    (text,) = [line for line in capsys.readouterr().err.splitlines() if " images taken" in line]
    for c, short in enumerate("abc"):
        text = text.replace(f"{CLASSES[c]}/", f"{short}/")
    return text


def test_every_file_is_the_picture_that_it_shows(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    assert sorted(source.names) == sorted(named(GOOD | BAD))
    assert dict(zip(source.names, read_labels(source, CLASSES), strict=True)) == named(GOOD | BAD)
    taken = Examples(load_model("shapes"), source, None).readable()
    assert list(taken.names) == [n for n in source.names if n in named(GOOD)]
    rows = {CLASSES.index(n.split("/")[0]): n for n in taken.names}
    assert set(rows) == {0, 1, 2}
    image = {n: taken.load(i) for i, n in enumerate(taken.names)}
    rgba = (
        np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8).astype(float) / 255
    )
    first = image[f"{CLASSES[0]}/1.png"].movedim(0, -1).numpy()
    np.testing.assert_allclose(first, rgba[..., :3], atol=1e-6)
    for name in ("deep.png", "scan.tif"):
        grey = image[f"{CLASSES[0]}/{name}"].movedim(0, -1).numpy()
        np.testing.assert_allclose(grey, np.repeat(rgba[..., :1], 3, -1), atol=1e-6)
    clear = image[f"{CLASSES[1]}/clear.png"].movedim(0, -1).numpy()
    np.testing.assert_allclose(clear, rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:], atol=0.006)
    turned = image[f"{CLASSES[1]}/turned.jfif"].movedim(0, -1).numpy()
    assert np.abs(turned - np.rot90(rgba[..., :3], -1)).mean() < 0.02


def test_harvest_takes_what_can_be_read_and_lists_the_rest(
    capsys, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest = ("harvest", "shapes", "--data", f"folder:{folder}", "--sites", "mixed3a", "--full", "mixed3a",
               "--workers", "1")  # fmt: skip
    facts = output(capsys, *harvest)
    assert sorted(facts["skipped"]) == sorted(named(BAD))
    assert facts["left_out"] == {
        "hidden or of the system": 4, "of kind .txt": 1, "a link to a folder that it is in": 1,
    }  # fmt: skip
    assert run(harvest) == 0
    told = capsys.readouterr().err
    assert "8 of 10 images taken (all that can be read); not among the images: 4 × hidden" in told
    assert "skipped 1 × image cannot be read: " in told
    assert told.count("\n") == 2
    # The same data, typed otherwise.
    monkeypatch.chdir(folder.parent)
    found = output(capsys, "examples", "shapes", "mixed3a:0", "--data", "folder:./far/../val/")
    assert found["data"] == f"folder:{folder}"
    refused(capsys, "image file is truncated", *harvest, "--overwrite", "--stop-at-bad")


def test_verbs_skip_and_say_the_same(capsys, folder: Path, tmp_path: Path) -> None:
    data, labels, chosen = (
        f"folder:{folder}",
        tmp_path / "labels.json",
        "10, all there are, less 2 unreadable",
    )
    labels.write_text(json.dumps({f"val/{n}": CLASSES[c] for n, c in named(GOOD | BAD).items()}))
    for how in ("names", str(labels)):
        task = given(
            "ablating.ablation.ablate", "ablate", "shapes", "mixed3a:0", "--data", data, "--labels", how
        )["task"]  # fmt: skip
        told = task.describe()["examples"]
        assert (told["n"], told["chosen"]) == (8, chosen)
        assert sorted(told["skipped"]) == sorted(named(BAD))
        assert dict(zip(task.examples.names, task.examples.labels, strict=True)) == named(GOOD)
        account = said(capsys)
        assert ACCOUNT.format(chosen) in account
        assert OTHERS in account
    credited = output(capsys, "attribute", "shapes", "mixed3a", "--data", data, "--check", "0")
    assert credited["examples"] == told


def test_autoencoders_are_trained_on_what_can_be_read(capsys, folder: Path) -> None:
    facts = output(
        capsys, "sae", "train", "shapes", "mixed3a", "--name", "one", "--data", f"folder:{folder}", "--latents", "4",
        "--k", "2", "--steps", "2", "--batch", "64", "--hold-out", "0",
    )  # fmt: skip
    (made,) = facts.values()
    assert sorted(made["skipped"]) == sorted(named(BAD))
    assert (
        run(["sae", "eval", "one", "--rows", "64", "--examples", "all", "--labels", "names"]) == 0
    )
    assert ACCOUNT.format("10, all there are, less 2 unreadable") in said(capsys)
