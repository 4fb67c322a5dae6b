"""Gradients through units that start silent (layer 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _RedirectedReLU(torch.autograd.Function):
    """ReLU whose gradient, where it would be zero for a whole example, pushes silent units up.

    As in lucid (`redirected_relu_grad`): of an example without any gradient, what would raise a
    negative pre-activation passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        plain = torch.where(x > 0, grad, 0)
        raising = torch.where(
            (x > 0) | (grad < 0), grad, 0
        )  # descent: a negative gradient raises x
        dead = plain.flatten(1).norm(dim=1) == 0
        return torch.where(dead.reshape(-1, *[1] * (x.ndim - 1)), raising, plain)


def _redirect(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return _RedirectedReLU.apply(next(iter((*args, *kwargs.values()))))


@contextmanager
def redirected_relus(module: nn.Module) -> Iterator[None]:
    """Let gradients through silent `nn.ReLU` modules inside the block; as before after it."""
    relus = [m for m in module.modules() if isinstance(m, nn.ReLU)]
    inplace = [m for m in relus if m.inplace]
    handles = []
    try:
        for m in inplace:
            m.inplace = False
        handles = [
            # in front of all other hooks, so that edits and the user's own hooks have their say
            m.register_forward_hook(_redirect, prepend=True, with_kwargs=True)
            for m in relus
        ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m in inplace:
            m.inplace = True
