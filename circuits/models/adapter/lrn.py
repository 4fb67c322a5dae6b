"""Local response normalisation as compiled loops over channels-last images.

Torch computes it as a five-dimensional average pooling; on GoogLeNet that takes more than a third of the forward
pass. Here each pixel is finished before the next, so that its channels stay in the first-level cache.
"""

# No annotations in this module: numba compiles functions as they are and infers the types from their arguments.
import inspect

import numba
import numpy as np


def compiled(**options):
    """Compile a function with numba, and keep the result on disk where that is possible."""

    def compile(function):
        plain = inspect.unwrap(
            function
        )  # under the tests a run-time type checker is wrapped around it
        try:
            return numba.njit(cache=True, **options)(plain)
        except RuntimeError:  # numba finds no folder that it may write its cache to
            return numba.njit(**options)(plain)

    return compile


# Sums may be reordered and fused, but not under "nnan" and "ninf": these make the result undefined where an activation
# is NaN or infinite.
_compiled = compiled(
    nogil=True, fastmath={"nsz", "contract", "arcp", "reassoc"}, error_model="numpy"
)


@_compiled
def _window(values, low, high, sums):
    """For each channel c, the sum of the channels c + low to c + high, both included, that exist."""
    # Shift by shift over all channels, not channel by channel over its window: the inner loop has no branch, so that
    # the compiler vectorises it.
    n = len(values)
    for c in range(n):
        sums[c] = 0
    for off in range(low, high + 1):
        for c in range(max(0, -off), min(n, n - off)):
            sums[c] += values[c + off]


@_compiled
def _scales(base, beta, scale):
    # base^-0.75 = base^-0.5 * sqrt(base^-0.5): two square roots instead of a power, for the exponent that AlexNet
    # and GoogLeNet use.
    if beta == 0.75:
        for c in range(len(base)):
            root = np.float32(1.0) / np.sqrt(base[c])
            scale[c] = root * np.sqrt(root)
    else:
        for c in range(len(base)):
            scale[c] = base[c] ** np.float32(-beta)


@_compiled
def forward(x, size, alpha, beta, k, out):
    """x / (k + alpha / size * sum of squares over the window of `size` channels)^beta; all arrays pixel x channel."""
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
    """The gradient by x, given the gradient by the output.

    With y_c = x_c b_c^-beta and b_c = k + alpha / size * sum of x_j^2 over the window of c:
    dx_j = g_j b_j^-beta - (2 alpha beta / size) x_j * sum over all c with j in their window of g_c x_c b_c^-beta-1.
    """
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
        # Channel j is in the windows of the channels on its other side: the window mirrored.
        _window(part, -((size - 1) // 2), size // 2, square)
        for c in range(channels):
            out[p, c] = grad[p, c] * scale[c] - twice * x[p, c] * square[c]
