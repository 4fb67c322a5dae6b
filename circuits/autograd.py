"""Gradients, whatever mode the caller works in. In the lowest layer: whoever takes a gradient imports it.

Inside `torch.no_grad()` or `torch.inference_mode()`, where people keep their evaluation code, torch records nothing,
and a gradient would seem not to exist. What needs one turns both off for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Let torch record gradients inside the block, also within `torch.no_grad()` and `torch.inference_mode()`.

    Also a decorator of functions; not of generators and context managers, whose bodies run after the call.

    Raises:
        ValueError: if torch cannot compute a gradient, since the model has overwritten in place what it needs.

    >>> with torch.inference_mode(), recording_gradients():
    ...     (torch.ones(1, requires_grad=True) * 2).requires_grad
    True
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            operation = re.search(r"output \d+ of (\w+)", str(error))
            raise ValueError(
                f"the model overwrites the result of {operation[1] if operation else 'an operation'} in place, and "
                "torch needs it for the gradient: expected a model that torch can train, such as one with inplace=False"
            ) from error


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy if it was made inside `torch.inference_mode()`, since autograd takes none of these."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
