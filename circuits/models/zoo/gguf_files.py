"""The header of GGUF files, the format of llama.cpp: what is in one, checked before any other code opens it.

The layout is that of ggml's `docs/gguf.md`: a magic word, a version, two counts, pairs of keys and values, the names,
shapes, types and offsets of tensors, and then their data. Every length is compared with the size of the file before it
is believed, so that a damaged file costs neither time nor memory.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

INSTALL = "pip install 'circuits-workbench[gguf]'"
"""How to install what reads GGUF files."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_AXES = 4  # ggml has no more

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

Fact = str | int | float | bool


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: as the file has it, such as `blk.0.attn_q.weight`.
        shape: sizes of its axes, the outermost first, as torch has them (the file has them the other way round).
        kind: how its numbers are stored, by the name that ggml has for it: `F32`, `Q4_1`, …
    """

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    Attributes:
        architecture: such as `llama`.
        facts: its values by key, without arrays.
        tensors: its tensors, in the file's order.
        size: of the file, in bytes.
    """

    architecture: str
    facts: Mapping[str, Fact] = field(repr=False)
    tensors: tuple[GGUFTensor, ...] = field(repr=False)
    size: int

    @property
    def n_numbers(self) -> int:
        """How many numbers its tensors have, all together."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors there are of each kind, by its name."""
        return dict(sorted(Counter(t.kind for t in self.tensors).items()))

    @property
    def begins_texts(self) -> bool:
        """Whether the token that begins a text is put in front of each, as llama.cpp would do it.

        The key `tokenizer.ggml.add_bos_token` says so. Without that key, tokenizers of SentencePiece (`llama`) and
        those of Llama 3 put it there, and other byte-pair tokenizers (`gpt2`) do not.
        """
        said = self.facts.get("tokenizer.ggml.add_bos_token")
        if said is not None:
            return bool(said)
        before = self.facts.get("tokenizer.ggml.pre")
        return self.facts.get("tokenizer.ggml.model") == "llama" or before in (
            "llama-bpe", "llama3", "llama-v3",
        )  # fmt: skip


def read_header(path: Path, what: str) -> GGUFHeader:
    """Read the header of a GGUF file, and check that all of its tensors are in the file and can be unpacked.

    Args:
        path: the file.
        what: its name in error messages, such as `model 'gguf:a.gguf'`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the package gguf is not installed.
        ValueError: if it is no GGUF file, of another version, cut off or damaged, or has tensors that the package gguf
            cannot unpack.
    """
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{what}: {str(path)!r} {why}: expected a GGUF file")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first[:4] != _MAGIC or len(first) < 8:
            raise ValueError(
                f"{what}: {str(path)!r} is no GGUF file: it begins with {first[:4]!r}, expected {_MAGIC!r}"
            )
        (version,) = struct.unpack("<I", first[4:])
        if version not in _VERSIONS:
            raise ValueError(
                f"{what}: {str(path)!r} is of version {version} of GGUF in the byte order of this machine: expected "
                f"one of {', '.join(map(str, _VERSIONS))}"
            )
        gguf = gguf_package(what)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parsed(_Cursor(data, 8), size, gguf)
            except EOFError as error:
                raise ValueError(f"{what}: {str(path)!r} is cut off: {error}") from error
            except (ValueError, UnicodeDecodeError) as error:
                raise ValueError(f"{what}: {str(path)!r} {error}") from error


@dataclass
class _Cursor:
    """Reads values of a file one after the other, and none beyond its end."""

    data: mmap.mmap
    at: int

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        self.check(n)
        self.at += n
        return self.data[self.at - n : self.at]

    def check(self, n: int) -> None:
        """Raise EOFError unless there are n more bytes."""
        if n > len(self.data) - self.at:
            raise EOFError(
                f"its header needs {n} bytes at byte {self.at}, and the file ends at byte {len(self.data)}"
            )

    def scalar(self, code: str) -> Any:
        """The next number, in the code of `struct`."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        """The next text: its length, and then its bytes."""
        return self.take(self.scalar("<Q")).decode()

    def value(self, kind: int) -> Fact | None:
        """The next value of a kind; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            # A value that is no text is nothing that is asked for here.
            return self.take(self.scalar("<Q")).decode(errors="replace")
        if kind == _ARRAY:
            return self._pass()
        raise ValueError(f"is damaged: it has a value of type {kind}, which GGUF does not have")

    def _pass(self) -> None:
        inner, n = self.scalar("<I"), self.scalar("<Q")
        if inner in _SCALARS:
            n *= struct.calcsize(_SCALARS[inner])
            self.check(n)
            self.at += n
            return
        if inner != _STRING:
            raise ValueError(
                f"is damaged: it has an array of type {inner}, expected numbers or texts"
            )
        self.check(8 * n)
        for _ in range(n):
            length = self.scalar("<Q")
            self.check(length)
            self.at += length


def _parsed(cursor: _Cursor, size: int, gguf: Any) -> GGUFHeader:
    n_tensors, n_facts = cursor.scalar("<Q"), cursor.scalar("<Q")
    facts: dict[str, Fact] = {}
    for _ in range(n_facts):
        key = cursor.text()
        value = cursor.value(cursor.scalar("<I"))
        if value is not None:
            facts[key] = value
    cursor.check(24 * n_tensors)  # the least that a tensor's entry takes
    places = [_tensor(cursor, gguf) for _ in range(n_tensors)]
    if not places:
        raise ValueError("has no tensors: expected a file with the weights of a model")
    architecture = facts.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("does not say of which architecture it is (general.architecture)")
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"has an alignment of {alignment!r}: expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    for tensor, offset, n_bytes in places:
        if (end := start + offset + n_bytes) > size:
            raise EOFError(
                f"tensor {tensor.name!r} would end at byte {end}, and the file ends at byte {size}"
            )
    return GGUFHeader(architecture, facts, tuple(t for t, _, _ in places), size)


def _tensor(cursor: _Cursor, gguf: Any) -> tuple[GGUFTensor, int, int]:
    """A tensor, where its data begins after the header, and how many bytes it has."""
    name, n_axes = cursor.text(), cursor.scalar("<I")
    if n_axes > _MOST_AXES:
        raise ValueError(
            f"is damaged: its tensor {name!r} has {n_axes} axes, expected at most {_MOST_AXES}"
        )
    shape = tuple(cursor.scalar("<Q") for _ in range(n_axes))[::-1]
    number, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    kind, block, n_bytes = _layout(number, name, gguf)
    if prod(shape) == 0 or (shape and shape[-1] % block):
        raise ValueError(
            f"is damaged: its tensor {name!r} has shape {shape}, expected rows of a multiple of {block} numbers"
        )
    return GGUFTensor(name, shape, kind), offset, prod(shape) // block * n_bytes


def _layout(number: int, name: str, gguf: Any) -> tuple[str, int, int]:
    """How numbers of a type of ggml are stored: the type's name, numbers in a block, and bytes that a block takes."""
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(number)
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ValueError(
            f"has a tensor {name!r} of type {number}, which the package gguf does not know: {INSTALL} --upgrade"
        ) from None
    try:
        gguf.quants.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(
            f"has a tensor {name!r} in {kind.name}, which the package gguf cannot unpack: expected F32, F16, BF16 or a "
            "quantisation such as Q8_0, Q4_1 or Q4_K"
        ) from None
    return kind.name, block, n_bytes


def gguf_package(what: str) -> Any:
    """The package gguf, which unpacks quantised numbers.

    Args:
        what: what needs it, for the message.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package gguf, which is not installed: {INSTALL}"
        ) from error
    return gguf
