"""Compiled loops over activations on a CPU: every number is read once.

Summaries of every site of a network touch as many numbers as its forward pass writes, so each extra
pass over memory shows. These loops are compiled by numba, for the processor they run on, and cached.
They may be compiled as if all activations were finite: `summarize` in `observing` looks at what came
out, and does the rest with care where it was not so.
"""

# no `from __future__ import annotations`, no annotations: numba compiles what it is given
import inspect

import numba
import numpy as np

BLOCK = 1024  # numbers that are summed in float32 before they go on in float64
PIECE = 64  # numbers that are searched at once
UNITS = 256  # units whose sums stay in the first-level cache
FLIP = np.int32(0x7FFFFFFF)
SIGN = np.int32(31)


def compiled(**options):
    """Compile a function with numba; what a type checker has wrapped around it is taken off first."""

    def compile(function):
        plain = inspect.unwrap(function)
        try:
            return numba.njit(cache=True, **options)(plain)
        except RuntimeError:  # no folder can be written to keep what was compiled
            return numba.njit(**options)(plain)

    return compile


def ordered(bits):
    """Float32 as int32 in the same order, and back: vector units compare those without a care for NaN.

    >>> key = ordered(np.array([-2.0, -1.0, 0.5, 3.0], np.float32).view(np.int32))
    >>> bool((np.diff(key) > 0).all()), ordered(key).view(np.float32).tolist()
    (True, [-2.0, -1.0, 0.5, 3.0])
    """
    return bits ^ ((bits >> SIGN) & FLIP)


_ordered = compiled(inline="always")(ordered)


@compiled(nogil=True)
def _first(bits, start, key):
    """Where `key` is first found, from `start` on."""
    while True:  # whole pieces are compared at once
        high = np.int32(-0x80000000)
        piece = bits[start : start + PIECE]
        for i in range(len(piece)):
            high = max(high, _ordered(piece[i]))
        if high == key:
            break
        start += PIECE
    while _ordered(bits[start]) != key:
        start += 1
    return start


@compiled(fastmath=True, nogil=True)
def units_first(x, bits, center, argmax, total, square, least, positive):
    """Statistics of activations, example x unit x position, positions side by side.

    Args:
        x: the activations, float32.
        bits: the same memory as int32.
        center: per unit, float32.
        argmax: written: the first position of the largest, example x unit.
        total: written: the sum of activation - center, example x unit.
        square: per unit: the sum of its square is added.
        least: per unit: lowered to the smallest `ordered` activation.
        positive: per unit: how many are above zero is added.
    """
    for e in range(x.shape[0]):
        for u in range(x.shape[1]):
            row, row_bits, c = x[e, u], bits[e, u], center[u]
            best, low = np.int32(-0x80000000), least[u]
            block, s1, s2, above = 0, 0.0, 0.0, 0
            for start in range(0, len(row), BLOCK):
                part, part_bits = row[start : start + BLOCK], row_bits[start : start + BLOCK]
                high = np.int32(-0x80000000)
                f1, f2, more = np.float32(0), np.float32(0), np.int32(0)
                for i in range(len(part)):
                    v, key = part[i], _ordered(part_bits[i])
                    high, low = max(high, key), min(low, key)
                    d = v - c
                    f1 += d
                    f2 += d * d
                    more += np.int32(v > 0)
                if high > best:
                    best, block = high, start
                s1 += f1
                s2 += f2
                above += more
            argmax[e, u], total[e, u] = _first(row_bits, block, best), s1
            square[u] += s2
            least[u] = low
            positive[u] += above


@compiled(fastmath=True, nogil=True)
def units_last(x, bits, center, argmax, total, square, least, positive):
    """The same of activations that lie example x position x unit."""
    n_places, n_units = x.shape[1], x.shape[2]
    f1, f2 = np.empty(UNITS, np.float32), np.empty(UNITS, np.float32)
    best, low = np.empty(UNITS, np.int32), np.empty(UNITS, np.int32)
    at, above = np.empty(UNITS, np.int32), np.empty(UNITS, np.int32)
    for e in range(x.shape[0]):
        for first in range(0, n_units, UNITS):
            n = min(UNITS, n_units - first)
            c = center[first : first + n]
            best[:] = np.int32(-0x80000000)
            low[:n] = least[first : first + n]
            at[:] = 0
            above[:] = 0
            total[e, first : first + n] = 0.0
            for start in range(0, n_places, BLOCK):
                f1[:] = 0
                f2[:] = 0
                for p in range(start, min(start + BLOCK, n_places)):
                    row, row_bits = x[e, p, first : first + n], bits[e, p, first : first + n]
                    where = np.int32(p)
                    for u in range(n):
                        v, key = row[u], _ordered(row_bits[u])
                        d = v - c[u]
                        at[u] = where if key > best[u] else at[u]
                        best[u] = max(best[u], key)
                        low[u] = min(low[u], key)
                        f1[u] += d
                        f2[u] += d * d
                        above[u] += np.int32(v > 0)
                for u in range(n):
                    total[e, first + u] += f1[u]
                    square[first + u] += f2[u]
            for u in range(n):
                argmax[e, first + u] = at[u]
                least[first + u] = low[u]
                positive[first + u] += above[u]


@compiled(nogil=True)
def look(x, places, center, low, scale, histogram, powers):
    """Count activations at some positions (example x place, numbers of positions) by their size.

    Args:
        x: example x unit x position, in any layout in memory.
        places: which positions of each example.
        center: about which powers are summed.
        low: first edge of each unit's histogram.
        scale: bins a unit of activation.
        histogram: unit x bin; added to.
        powers: power x unit; added to.
    """
    last = histogram.shape[1] - 1
    for u in range(x.shape[1]):
        counts, s1, s2, s3, s4 = histogram[u], 0.0, 0.0, 0.0, 0.0
        for e in range(x.shape[0]):
            for k in range(places.shape[1]):
                v = x[e, u, places[e, k]]
                if not np.isfinite(v):
                    continue
                place = np.floor((v - low[u]) * scale[u]) + np.float32(1)
                counts[int(place) if 0 <= place <= last else 0 if place < 0 else last] += 1
                d = np.float64(v) - np.float64(center[u])
                s1 += d
                s2 += d * d
                s3 += d * d * d
                s4 += d * d * d * d
        powers[0, u] += s1
        powers[1, u] += s2
        powers[2, u] += s3
        powers[3, u] += s4


def prepare():
    """Compile, or read from the cache, all loops: before processes are forked that need them."""
    x, center = np.zeros((2, 2, 3), np.float32), np.zeros(2, np.float32)
    square, least, positive = np.zeros(2), np.zeros(2, np.int32), np.zeros(2, np.int64)
    found = (np.zeros((2, 2), np.int32), np.zeros((2, 2)), square, least, positive)
    units_first(x, x.view(np.int32), center, *found)
    y = np.ascontiguousarray(x.transpose(0, 2, 1))
    units_last(y, y.view(np.int32), center, *found)
    histogram, powers = np.zeros((2, 3), np.int64), np.zeros((4, 2))
    places = np.zeros((2, 1), np.int64)
    for activations in (x, y.transpose(0, 2, 1), y[:1].transpose(0, 2, 1)):
        look(activations, places, center, center, center, histogram, powers)
