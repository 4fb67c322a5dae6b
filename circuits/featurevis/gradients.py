"""How operations behave while a picture is optimised: silent units, and a slow operation (layer 4).

Both hold in one thread, for operations of the model's own code, and leave the model itself alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


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
        # descent: a negative gradient raises x
        raising = torch.where((x > 0) | (grad < 0), grad, 0)
        dead = plain.flatten(1).norm(dim=1) == 0
        return torch.where(dead.reshape(-1, *[1] * (x.ndim - 1)), raising, plain)


def _channel_window(x: Tensor, size: int) -> Tensor:
    """Sums over `size` neighbouring channels, fewer at the ends."""
    total, channels = x.clone(), x.shape[1]
    for k in range(1, min(size // 2, channels - 1) + 1):
        total[:, k:] += x[:, : channels - k]
    for k in range(1, min((size - 1) // 2, channels - 1) + 1):
        total[:, : channels - k] += x[:, k:]
    return total


class _LocalResponseNorm(torch.autograd.Function):
    """x / (k + alpha / size * sum of squares of the channels around)^beta, with its derivative.

    Torch composes it of a five-dimensional pooling, which takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        base = _channel_window(x * x, size).mul_(alpha / size).add_(k)
        if beta == 0.75:
            root = base.rsqrt()
            scale = root * root.sqrt()
        else:
            scale = base.pow(-beta)
        ctx.save_for_backward(x, base, scale)
        ctx.constants = size, alpha, beta
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, scale = ctx.saved_tensors
        size, alpha, beta = ctx.constants
        (grad,) = grads
        # a channel is in the window of those on its other side: the window turned round
        inner = _channel_window((grad * x * scale / base).flip(1), size).flip(1)
        return grad * scale - inner * x * (2 * alpha * beta / size), None, None, None, None


def _redirected(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = args[0] if args else kwargs["input"]
    return _RedirectedReLU.apply(given)


def _normalised(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return _LocalResponseNorm.apply(input, size, alpha, beta, k)


_RELUS = frozenset({F.relu, torch.relu, Tensor.relu})


class Optimizing(TorchFunctionMode):
    """While it is entered, local response normalisation is fast and, if `waking`, ReLUs let gradients
    through to silent units. Operations that work in place without being asked for a result
    (`relu_`) are left as they are.
    """

    def __init__(self, waking: bool) -> None:
        super().__init__()
        self.waking = waking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waking and func in _RELUS:
            return _redirected(func, args, kwargs or {})
        if func is F.local_response_norm:
            return _normalised(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
