"""Local response normalisation as compiled loops over channels-last images.

Torch composes it of a five-dimensional pooling; on GoogLeNet that is more than a third of the forward pass.
Every pixel's channels stay in the first-level cache.
"""

# no `from __future__ import annotations`, no annotations: numba compiles what it is given
import inspect

import numba
import numpy as np


def _compiled(function):
    plain = inspect.unwrap(function)  # what a type checker has wrapped around it
    options = {
        "nogil": True,
        "fastmath": {"nsz", "contract", "arcp", "reassoc"},
        "error_model": "numpy",
    }
    try:
        return numba.njit(cache=True, **options)(plain)
    except RuntimeError:  # no folder can be written to keep what was compiled
        return numba.njit(**options)(plain)


@_compiled
def _window(values, low, high, sums):
    """Sums over neighbours from `low` to `high`, both counted."""
    n = len(values)
    for c in range(n):
        sums[c] = 0
    for off in range(low, high + 1):
        for c in range(max(0, -off), min(n, n - off)):
            sums[c] += values[c + off]


@_compiled
def _scales(base, beta, scale):
    if beta == 0.75:
        for c in range(len(base)):
            root = np.float32(1.0) / np.sqrt(base[c])
            scale[c] = root * np.sqrt(root)
    else:
        for c in range(len(base)):
            scale[c] = base[c] ** np.float32(-beta)


@_compiled
def forward(x, size, alpha, beta, k, out):
    """x / (k + alpha / size * sum of squares of the channels around)^beta; pixel x channel."""
    pixels, channels = x.shape
    per, add = np.float32(alpha / size), np.float32(k)
    square, base = np.empty(channels, np.float32), np.empty(channels, np.float32)
    scale = np.empty(channels, np.float32)
    for p in range(pixels):
        for c in range(channels):
            square[c] = x[p, c] * x[p, c]
        _window(square, -(size // 2), (size - 1) // 2, base)
        for c in range(channels):
            base[c] = add + per * base[c]
        _scales(base, beta, scale)
        for c in range(channels):
            out[p, c] = x[p, c] * scale[c]


@_compiled
def backward(x, grad, size, alpha, beta, k, out):
    """The derivative of `forward`, times `grad`."""
    pixels, channels = x.shape
    per, add = np.float32(alpha / size), np.float32(k)
    twice = np.float32(2 * alpha * beta / size)
    square, base = np.empty(channels, np.float32), np.empty(channels, np.float32)
    scale, part = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for p in range(pixels):
        for c in range(channels):
            square[c] = x[p, c] * x[p, c]
        _window(square, -(size // 2), (size - 1) // 2, base)
        for c in range(channels):
            base[c] = add + per * base[c]
        _scales(base, beta, scale)
        for c in range(channels):
            part[c] = grad[p, c] * x[p, c] * scale[c] / base[c]
        # a channel is in the window of those on its other side
        _window(part, -((size - 1) // 2), size // 2, square)
        for c in range(channels):
            out[p, c] = grad[p, c] * scale[c] - twice * x[p, c] * square[c]
