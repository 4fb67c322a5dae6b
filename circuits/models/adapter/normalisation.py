"""Local response normalisation, several times as fast as torch's own, and sound derivatives of other normalisations.

`HookedModel.run` uses it by default; a few functions that call a model's module themselves enter it directly.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _channel_window(x: Tensor, size: int) -> Tensor:
    """For each channel, the sum over the window of `size` channels about it, cut off at the ends."""
    total, channels = x.clone(), x.shape[1]
    for k in range(1, min(size // 2, channels - 1) + 1):
        total[:, k:] += x[:, : channels - k]
    for k in range(1, min((size - 1) // 2, channels - 1) + 1):
        total[:, : channels - k] += x[:, k:]
    return total


class _LocalResponseNorm(torch.autograd.Function):
    """x / (k + alpha / size * sum of squares over a window of channels)^beta, with its derivative.

    The derivative is derived in `circuits.models.adapter.lrn.backward`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.constants = size, alpha, beta, k
        if _compilable(x):
            # No base and scale to save: the compiled backward pass computes them again from x.
            ctx.save_for_backward(x)
            return _over_pixels("forward", (x,), ctx.constants)
        base, scale = _base_and_scale(x, size, alpha, beta, k)
        ctx.save_for_backward(x, base, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, *rest = ctx.saved_tensors
        # With `create_graph`, gradients are on in here: the derivative must then be made of torch operations, with
        # base and scale computed from x again, since the saved ones carry no history.
        wanted_again = torch.is_grad_enabled()
        if not rest and _compilable(grad) and not wanted_again:
            return _over_pixels("backward", (x, grad), ctx.constants), None, None, None, None
        size, alpha, beta, k = ctx.constants
        if not rest or wanted_again:
            rest = _base_and_scale(x, size, alpha, beta, k)
        base, scale = rest
        # Channel j is in the windows of the channels on its other side: the window mirrored, which for an even size
        # is not the same.
        inner = _channel_window((grad * x * scale / base).flip(1), size).flip(1)
        return grad * scale - inner * x * (2 * alpha * beta / size), None, None, None, None


def _base_and_scale(
    x: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    base = _channel_window(x * x, size).mul_(alpha / size).add_(k)
    return base, base.pow(-beta)


def _compilable(x: Tensor) -> bool:
    return x.ndim == 4 and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def _over_pixels(
    what: str, given: tuple[Tensor, ...], constants: tuple[int, float, float, float]
) -> Tensor:
    """Run a compiled loop over all pixels, in as many threads as torch has."""
    # Imported here, since importing numba is slow and most models do without.
    from circuits.models.adapter import lrn

    arrays = [_pixels(x.contiguous(memory_format=torch.channels_last)) for x in given]
    out = torch.empty_like(given[0], memory_format=torch.channels_last)
    rows = _pixels(out)
    loop = getattr(lrn, what)
    n = len(rows)
    # Starting a thread does not pay for less than some 1000 pixels. The loops release Python's lock (`nogil`).
    threads = max(1, min(torch.get_num_threads(), n // 1024))
    cuts = [range(n * i // threads, n * (i + 1) // threads) for i in range(threads)]

    def part(cut: range) -> None:
        some = slice(cut.start, cut.stop)
        loop(*(a[some] for a in arrays), *constants, rows[some])

    if threads == 1:
        part(cuts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, cuts))
    return out


def _pixels(x: Tensor) -> np.ndarray:
    """A channels-last batch as pixel x channel, without a copy."""
    return x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy()


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """What `torch.nn.functional.local_response_norm` computes, with the same derivative."""
    return _LocalResponseNorm.apply(input, size, alpha, beta, k)


def response_scale(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """What local response normalisation multiplies each number with."""
    return _base_and_scale(x, size, alpha, beta, k)[1]


class FastNormalisation(TorchFunctionMode):
    """While it is entered, in one thread, models compute local response normalisation the fast way.

    A torch function mode, so that the model's modules stay as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.local_response_norm:
            return local_response_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class SoundNormalisation(TorchFunctionMode):
    """While it is entered, in one thread, gradients reach batch and instance normalisation laid out as their input is.

    With a batch of one, the strides of a slice of a transposed map fit both the order of channels first and that of
    channels last. Torch 2.13's derivative on CPUs (`batch_norm_backward_cpu`, its way for contiguous tensors) then
    reads the gradient in one order and the input in the other: wrong numbers without a word, in LeViT and CvT. Instance
    normalisation is batch normalisation of a batch of one, whatever the number of examples.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        one = name == "instance_norm" or (name == "batch_norm" and len(made) == 1)
        if one and made.requires_grad:
            made.register_hook(_copied)
        return made


NORMALISATIONS = ("batch_norm", "instance_norm")
"""The functions of torch, by their names in `torch` and in `torch.nn.functional`."""


def _copied(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)
