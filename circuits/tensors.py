"""The numbers of tensors of any type. In the lowest layer: whoever computes with what a model puts out imports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

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


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is inside a transform of `torch.func` (vmap, grad, vjp, jvp), and nothing outside of it."""
    return is_functorch_wrapped_tensor(tensor)
