"""Redirected gradients: how an optimisation gets past inactive ReLUs.

They act in one thread only, on the operations of the model's own code, and do not change the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _RedirectedReLU(torch.autograd.Function):
    """ReLU whose gradient raises inactive units if it would otherwise be zero for a whole example.

    As in lucid (`redirected_relu_grad`): in an example without any gradient, the gradients that would raise a negative
    pre-activation pass.
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
        # The optimiser minimises minus the objective, so a negative gradient raises x.
        raising = torch.where((x > 0) | (grad < 0), grad, 0)
        # By example: redirecting a gradient in images that have one would lead them away from what the network
        # computes.
        dead = plain.flatten(1).norm(dim=1) == 0
        return torch.where(dead.reshape(-1, *[1] * (x.ndim - 1)), raising, plain)


def _redirected(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = args[0] if args else kwargs["input"]
    return _RedirectedReLU.apply(given)


# torch.nn.ReLU ends in F.relu, hence this covers modules too.
_RELUS = frozenset({F.relu, torch.relu, Tensor.relu})


class RedirectedGradients(TorchFunctionMode):
    """Inside this mode ReLUs pass gradients to inactive units.

    In-place ReLUs (`relu_`) are left as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS:
            return _redirected(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
