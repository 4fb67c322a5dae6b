from __future__ import annotations

import hashlib
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from circuits.stimuli import arrays
from circuits.stimuli.arrays import read_array, stored_arrays
from circuits.stimuli.sources import open_source

NUMBERS = np.random.default_rng(0).integers(0, 255, (6, 4, 5, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        np.asfortranarray(NUMBERS),
        NUMBERS.astype(">f4"),
        NUMBERS[:0],
        np.array(["a", "bcd"]),
        np.float64(3.0),
    ],
    ids=["rows", "columns", "other order", "empty", "texts", "number"],
)
def test_arrays_are_those_of_numpy(save, array: np.ndarray, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", first=[1, 2], second=array)
    np.save(tmp_path / "a.npy", array)
    found = stored_arrays(tmp_path / "a.npz")
    assert list(found) == ["first", "second"]
    for made in (found["second"], stored_arrays(tmp_path / "a.npy")[""]):
        assert (made.shape, made.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(made.whole, array)
        assert made.digest() == hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        if array.ndim:
            for i in range(len(array)):
                np.testing.assert_array_equal(made[i], array[i])
            with pytest.raises(IndexError):
                made[len(array)]
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), array)


def test_memory_does_not_follow_the_number_of_images(tmp_path: Path) -> None:
    images = np.zeros((2000, 32, 32, 3), np.uint8)  # 6 MB
    np.savez(tmp_path / "a.npz", images=images)
    before = arrays._BLOCK
    try:
        arrays._BLOCK = 1 << 16
        tracemalloc.start()
        source = open_source(f"npz:{tmp_path / 'a.npz'}")
        for i in range(0, len(source), 50):
            source.image(i)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        arrays._BLOCK = before
    assert peak < 2e6


def _npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    """An `.npy` file whose header says what it likes."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


@pytest.mark.parametrize("shape", [(10**6, 10**6, 3), (2**62, 8, 8), (-1, 8, 8), (2, 8, 9)])
@pytest.mark.parametrize("name", ["a.npy", "stored.npz", "deflated.npz"])
def test_a_header_that_promises_more_than_there_is_costs_nothing(
    shape: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    content, place = _npy(shape, bytes(100)), tmp_path / name
    if name == "a.npy":
        place.write_bytes(content)
    else:
        kind = zipfile.ZIP_STORED if name == "stored.npz" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(place, "w", kind) as archive:
            archive.writestr("images.npy", content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"cannot be read: .* is damaged: .* 100 are there"):
            open_source(f"npz:{place}")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_small_file_of_very_many_numbers_is_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(arrays, "MOST", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2000, 32, 32, 3), np.uint8))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"is compressed and takes .* save it with numpy.savez"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_damaged_archives_are_said_in_a_line(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=NUMBERS)
    whole = (tmp_path / "a.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        (tmp_path / "b.npz").write_bytes(data[: rng.integers(20, len(data) + 1)])
        try:
            open_source(f"npz:{tmp_path / 'b.npz'}")
        except ValueError as error:
            assert "b.npz" in str(error)  # noqa: PT017
