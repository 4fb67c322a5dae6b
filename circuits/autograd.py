"""Gradients, whatever mode the caller works in. In the lowest layer: whoever takes a gradient imports it.

Inside `torch.no_grad()` or `torch.inference_mode()`, where people keep their evaluation code, torch records nothing,
and a gradient would seem not to exist. What needs one turns both off for itself.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


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
    with torch.inference_mode(False), torch.enable_grad(), _keeping_activations():
        try:
            yield
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            operation = re.search(r"output [0-9]+ of (\w+)", str(error))
            raise ValueError(
                f"the model overwrites the result of {operation[1] if operation else 'an operation'} in place, and "
                "torch needs it for the gradient: expected a model that torch can train, such as one with inplace=False"
            ) from error


class _Kept:
    """In the place of `torch.utils.checkpoint`'s function of autograd: calls without it."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _kept(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what `torch.utils.checkpoint` does before and after a call: nothing."""
    yield


_REPLACED = {"CheckpointFunction": _Kept, "_checkpoint_without_reentrant_generator": _kept}
_own: dict[str, Any] = {}
_inside = 0
_lock = threading.Lock()


@contextmanager
def _keeping_activations() -> Iterator[None]:
    """Let `torch.utils.checkpoint` keep activations inside the block.

    It would compute them again during the backward pass, when the changes of the forward pass are over and a gradient
    can lead to none of its tensors. Two functions of that module are replaced while any thread is inside, and so for
    every thread of the process: the results of other threads are the same, but their checkpoints save no memory.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _own.update({n: getattr(checkpoint, n) for n in _REPLACED if hasattr(checkpoint, n)})
            for name in _own:
                setattr(checkpoint, name, _REPLACED[name])
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for name, own in _own.items():
                    setattr(checkpoint, name, own)


def differentiable(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy if it was made inside `torch.inference_mode()`, since autograd takes none of these."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
