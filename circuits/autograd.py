"""Gradients, whatever mode the caller works in. In the lowest layer: whoever takes a gradient imports it.

Inside `torch.no_grad()` or `torch.inference_mode()`, where people keep their evaluation code, torch records nothing,
and a gradient would seem not to exist. What needs one turns both off for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Let torch record gradients inside the block, also within `torch.no_grad()` and `torch.inference_mode()`.

    Also a decorator of functions; not of generators and context managers, whose bodies run after the call.

    >>> with torch.inference_mode(), recording_gradients():
    ...     (torch.ones(1, requires_grad=True) * 2).requires_grad
    True
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy if it was made inside `torch.inference_mode()`, since autograd takes none of these."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
