"""Data from arrays, from Hugging Face datasets and from any other map-style dataset."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image

from circuits.errors import UNREADABLE, line, their_code
from circuits.specs import IMAGE_COLUMNS, TEXT_COLUMNS, normal_data, split_key, usual_column
from circuits.stimuli.arrays import StoredArray, stored_arrays
from circuits.stimuli.images import MAX_PIXELS, ImageSource, check_range, decode, read_image, to_rgb
from circuits.stimuli.texts import TextSource
from circuits.tensors import tensor_bytes

Layout = Literal["channels_first", "channels_last"]
"""Where arrays have their channels: channel x y x x, or y x x x channel."""

MOST_CHANNELS = 4
"""The longest last axis that may be one of channels."""


def from_dataset(
    dataset: Any,
    name: str,
    column: str | int | None = None,
    identity: str | None = None,
    layout: Layout | str | None = None,
) -> ImageSource | TextSource:
    """Take any map-style dataset (with `len` and indexing) as data: of torch, torchvision, Hugging Face, or a list.

    Args:
        dataset: a dataset whose examples are pictures, arrays or tensors (see `as_image`), texts or sequences of
            tokens; or tuples or mappings that hold one of these.
        name: its name in provenance.
        column: the part of an example to use; by default the first of a tuple, or a column with a usual name.
        identity: what stands for the content in the hash, such as a version; by default all examples are read once to
            hash them.
        layout: whether arrays have their channels first or last; needed only where both are possible.

    Raises:
        ValueError: if it is empty, an example is none of the above, or its layout is not clear.
        TypeError: if it has no length or no indexing.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r} is not one of {', '.join(get_args(Layout))}")
    known = cast("Layout | None", layout)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset {name} of type {type(dataset).__name__} is not map-style: it needs a length and "
            "indexing (take a part of a stream first)"
        )
    with their_code(f"the length of dataset {name}"):
        n = len(dataset)
    if n == 0:
        raise ValueError(f"dataset {name} is empty")
    with their_code(f"example 0 of {name}"):
        item = dataset[0]
    first = _part(item, column, name)
    names = tuple(f"example {i}" for i in range(n))

    def example(i: int) -> Any:
        with their_code(f"{names[i]} of {name} cannot be read: it"):
            return _part(dataset[i], column, name)

    if _is_text(first):
        texts = tuple(_tokens(example(i)) for i in range(n))
        digest = _digest(identity, column, lambda i: repr(texts[i]).encode(), n)
        return TextSource(name, names, digest, texts)

    def image(i: int) -> Image.Image | torch.Tensor:
        return as_image(example(i), f"{names[i]} of {name}", known)

    # Raises now, and not at the first use, if it is not an image.
    as_image(first, f"{names[0]} of {name}", known)
    digest = _digest(identity, column, lambda i: _bytes_or_error(image, i), n)
    return ImageSource(name, names, digest, image)


def _digest(
    identity: str | None, column: str | int | None, content: Callable[[int], bytes], n: int
) -> str:
    digest = hashlib.sha256(b"dataset\0")
    if identity is not None:
        digest.update(f"{n}\0{column}\0{identity}".encode())
        return digest.hexdigest()
    for i in range(n):
        digest.update(hashlib.sha256(content(i)).digest())
    return digest.hexdigest()


def _bytes_or_error(image: Callable[[int], Any], i: int) -> bytes:
    """The bytes of an example to hash; for one that cannot be read, those of its error, so that data can be opened
    and a harvest may skip it.
    """
    try:
        return _bytes(image(i))
    except ValueError as error:
        return str(error).encode()


def _bytes(image: Image.Image | torch.Tensor) -> bytes:
    if isinstance(image, torch.Tensor):
        return repr(tuple(image.shape)).encode() + tensor_bytes(image).tobytes()
    return repr((image.size, image.mode)).encode() + image.tobytes()


def _part(item: Any, column: str | int | None, name: str) -> Any:
    """The image or text in an example."""
    if isinstance(item, Mapping):
        return item[_column(list(item), column, name)]
    if isinstance(item, tuple):
        return item[int(column or 0)]
    return item


def _column(names: Sequence[Any], column: Any, name: str) -> Any:
    """The column to use: the one that is named, or the first with a usual name."""
    said = ", ".join(map(str, names))
    if column is None:
        column = next((c for c in (*IMAGE_COLUMNS, *TEXT_COLUMNS) if c in names), None)
        if column is None:
            raise ValueError(f"dataset {name} has columns {said}: name the one to use")
    if column not in names:
        raise ValueError(f"dataset {name} has no column {column!r}: expected one of {said}")
    return column


def _is_text(item: Any) -> bool:
    """Whether an example is a text or a sequence of tokens."""
    if isinstance(item, str):
        return True
    if isinstance(item, torch.Tensor | np.ndarray):
        whole = np.issubdtype(np.asarray(item).dtype, np.integer)
        return item.ndim == 1 and whole
    return isinstance(item, Sequence) and len(item) > 0 and isinstance(item[0], int)


def _tokens(item: Any) -> str | tuple[int, ...]:
    return item if isinstance(item, str) else tuple(int(t) for t in item)


def as_image(item: Any, name: str, layout: Layout | None = None) -> Image.Image | torch.Tensor:
    """Convert a picture, array or tensor to what `ImageSource` gives.

    Arrays are y x x (grey), y x x x channel, or channel x y x x; bytes are in 0..255, whole numbers of 16 bits in
    0..65535, floats in 0..1.

    Args:
        item: the picture, array or tensor.
        name: what it is, for messages.
        layout: where an array of three axes has its channels. By default last if the last axis is at most 4 long, and
            first otherwise.

    Raises:
        ValueError: if it is none of these; if a value is not finite or outside its range; or if no `layout` is given
            and the channels may be at either end.
    """
    try:
        if isinstance(item, Image.Image):
            return to_rgb(item)
        if not isinstance(item, np.ndarray | torch.Tensor):
            raise ValueError(
                f"it is of type {type(item).__name__}: expected a picture, a tensor, a text or tokens"
            )
        values = _channels_first(np.ascontiguousarray(np.asarray(item)), layout)
        if values.dtype in (np.uint8, np.uint16):
            return torch.from_numpy(values.astype(np.float32) / np.iinfo(values.dtype).max)
        if not np.issubdtype(values.dtype, np.floating):
            raise ValueError(
                f"it has type {values.dtype}: expected bytes, or floats in 0..1 (or 16 bits without sign)"
            )
        check_range(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return torch.from_numpy(values.astype(np.float32))


def _channels_first(values: np.ndarray, layout: Layout | None) -> np.ndarray:
    """An image as channel x y x x."""
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3:
        raise ValueError(f"it has shape {values.shape}: expected an image, channel x y x x")
    first, middle, last = values.shape
    if layout is None and last <= MOST_CHANNELS:
        # An image is hardly ever so narrow, so these are channels, unless the first axis is as short, or so is the
        # middle one, of an image of a few pixels with many channels.
        if min(first, middle) <= MOST_CHANNELS:
            raise ValueError(
                f"it has shape {values.shape}, whose channels may be the first axis or the last: say which to "
                "`from_dataset`, layout='channels_first' or layout='channels_last'"
            )
        layout = "channels_last"
    return np.ascontiguousarray(np.moveaxis(values, 2, 0)) if layout == "channels_last" else values


def open_array(path: str) -> ImageSource | TextSource:
    """Open `PATH[:KEY]`, an array of images or of tokens in an `.npz` or `.npy` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, has no such array, or the array holds neither images nor tokens.
    """
    file, key = split_key(path)
    place = Path(file).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"array file {file!r} does not exist or is not a file")
    array = _array(place, key)
    if array.ndim not in (2, 3, 4) or len(array) == 0:
        raise ValueError(
            f"array file {file!r}: an array of type {array.dtype} and shape {array.shape} is neither "
            "images (example x y x x [x channel], bytes or floats) nor tokens (example x position)"
        )
    if array.ndim == 2 and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"array file {file!r}: tokens are whole numbers, not {array.dtype}")
    try:
        identity = f"{array.digest()}{array.shape}{array.dtype}"
    except (OSError, ValueError) as error:
        raise ValueError(f"array file {file!r} cannot be read: {error}") from error
    return from_dataset(array, normal_data(f"npz:{path}"), identity=identity)


def _array(place: Path, key: str) -> StoredArray:
    try:
        arrays = stored_arrays(place)
        if "" in arrays:
            return arrays[""]
        wanted = key or usual_column(list(arrays))
        if wanted not in arrays:
            raise ValueError(f"it has arrays {', '.join(arrays)}: name one, npz:PATH:KEY")
        return arrays[wanted]
    except UNREADABLE as error:
        raise ValueError(f"array file {str(place)!r} cannot be read: {line(error)}") from error


def open_hugging_face(path: str) -> ImageSource | TextSource:
    """Open `PATH[:COLUMN]`, a folder that Hugging Face `datasets` wrote with `save_to_disk`.

    Raises:
        ImportError: if the package `datasets` is not installed.
        FileNotFoundError: if there is no such folder.
        ValueError: if it is not such a folder, or its split or column is not clear.
    """
    folder, column = split_key(path)
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"dataset folder {folder!r} does not exist or is not a folder")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"data 'hf:{path}' needs the package datasets: pip install datasets")
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(place))
    except UNREADABLE as error:
        raise ValueError(f"dataset folder {folder!r} cannot be read: {line(error)}") from error
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset folder {folder!r} has splits: name one, hf:{folder}/SPLIT with SPLIT one of "
            f"{', '.join(map(str, dataset))}"
        )
    name = normal_data(f"hf:{path}")
    dataset = _Undecoded(dataset, column or None, name)
    # The files identify the content: reading all examples to hash them would be slow.
    fingerprint = "".join(_file_digest(p) for p in sorted(place.glob("*.arrow")))
    return from_dataset(dataset, name, column or None, identity=fingerprint)


class _Undecoded:
    """One column of a Hugging Face dataset, of which `datasets` itself decodes nothing.

    It would take any format that Pillow knows, and fetch what a path names as an address, also for columns that nobody
    asked for and for pictures inside lists. So only the wanted column is read, and its images are decoded here.

    Args:
        dataset: the dataset.
        column: the column to use; by default one with a usual name.
        name: the dataset's name, for messages.

    Raises:
        ValueError: if there is no such column, or it holds neither images nor plain texts or numbers.
    """

    def __init__(self, dataset: Any, column: str | None, name: str) -> None:
        from datasets import Image as Stored

        self.column = _column(dataset.format["columns"], column, name)
        kind = dataset.features[self.column]
        self.images = isinstance(kind, Stored)
        if not self.images and not _plain(kind):
            raise ValueError(
                f"dataset {name}: column {self.column!r} holds {kind}: expected images, texts, tokens "
                "or arrays"
            )
        dataset = dataset.select_columns([self.column])
        self.dataset = (
            dataset.cast_column(self.column, Stored(decode=False)) if self.images else dataset
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.dataset[i][self.column]
        return {self.column: self._decoded(item) if self.images and item else item}

    def _decoded(self, stored: Mapping[str, Any]) -> Image.Image:
        content = stored["bytes"]
        if content is None:
            return read_image(Path(stored["path"]))
        return decode(BytesIO(content), stored["path"] or "without a name", MAX_PIXELS)


def _plain(kind: Any) -> bool:
    """Whether a column's type is texts, numbers, or lists or arrays of them, which nothing has to decode."""
    from datasets import Array2D, Array3D, Array4D, Array5D, ClassLabel, Value

    if isinstance(kind, list):  # how older files write a list
        return all(map(_plain, kind))
    inner = getattr(kind, "feature", None)
    if inner is not None:
        return _plain(inner)
    return isinstance(kind, Value | ClassLabel | Array2D | Array3D | Array4D | Array5D)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
