"""The numbers of tensors of any type, and files of them. In a low layer: whoever computes with model output uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from circuits.files import replacing

_asked: ContextVar[bool] = ContextVar("_asked", default=False)


@contextmanager
def in_fewer_digits(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Let torch cast to a shorter type inside the block (`torch.autocast`), since a person asked this library to.

    A caller's own `torch.autocast` has no effect on models (`circuits.models.adapter.sites.evaluating`).
    """
    before = _asked.set(True)
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        _asked.reset(before)


def is_in_fewer_digits() -> bool:
    """Whether a block of `in_fewer_digits` is open, in this thread."""
    return _asked.get()


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in float32 if its numbers are shorter than that (float16, bfloat16), otherwise as it is.

    What is computed from a model's tensors needs more digits than the model does: sums over many numbers lose theirs,
    squares leave the range of float16, and numpy has no bfloat16.

    >>> at_least_single(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    short = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if short else tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in order.

    Raises:
        ValueError: if it has none, because it is on the meta device.
    """
    if tensor.is_meta:
        raise ValueError("the model is on torch's meta device, without numbers: expected weights")
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    # An empty tensor cannot be viewed as bytes.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, all or nothing; the same tensors and metadata make the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file(_apart(tensors), temporary, dict(metadata or {}) or None)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"file {str(path)!r} cannot be written: {error}") from error
        if metadata:
            _sort_metadata(temporary)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, contiguous, each in memory of its own, unlike tied weights."""
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        made[name] = own.clone() if place in taken else own
        taken.add(place)
    return made


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into the order of its keys: its library has them in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "another order of the same entries is not longer"
        file.seek(8)
        file.write(text.ljust(size))


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is inside a transform of `torch.func` (vmap, grad, vjp, jvp), and nothing outside of it."""
    return is_functorch_wrapped_tensor(tensor)


def random_frame(size: int, n: int, generator: torch.Generator) -> Float[Tensor, "size n"]:
    """Random orthonormal columns, uniformly distributed: by QR of Gaussian numbers, with R's diagonal made positive
    (Mezzadri 2007, "How to generate random matrices from the classical compact groups").
    """
    q, r = torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
