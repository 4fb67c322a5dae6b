"""Compiled loops over activations on a CPU that read every number once.

Summaries of all sites of a network read as many numbers as the forward pass writes, so that each extra pass over
memory would show. The loops are compiled by numba for the processor that they run on, and cached. They are compiled
as if all activations were finite: `Observer.see` in `observing` checks the sums, and recomputes the statistics in
another way where they are not finite.
"""

# No annotations in this module: numba compiles functions as they are and infers the types from their arguments.
import numpy as np

from circuits.models.adapter.lrn import compiled

BLOCK = 1024  # numbers that are summed in float32 before the sum is added up in float64
PIECE = 64  # numbers that are searched together
UNITS = 256  # units whose sums stay in the first-level cache
FLIP = np.int32(0x7FFFFFFF)
SIGN = np.int32(31)


def ordered(bits):
    """Map float32 numbers, given as int32 bits, to integers of the same order; the same function maps them back.

    Positive floats are ordered like their bits as integers, negative ones in reverse: flipping all bits but the sign
    of the negative ones puts both in order. Unlike the maximum of floats, that of integers needs no care for NaN, so
    it is vectorised.

    >>> key = ordered(np.array([-2.0, -1.0, 0.5, 3.0], np.float32).view(np.int32))
    >>> bool((np.diff(key) > 0).all()), ordered(key).view(np.float32).tolist()
    (True, [-2.0, -1.0, 0.5, 3.0])
    """
    # bits >> 31 is 0 for positive numbers and -1, all ones, for negative ones: the flip needs no branch.
    return bits ^ ((bits >> SIGN) & FLIP)


_ordered = compiled(inline="always")(ordered)


@compiled(nogil=True)
def _first(bits, start, key):
    """The first index from `start` on with the ordered value `key`."""
    while True:  # the maximum of a whole piece is vectorised, a search for the first match is not
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
def units_first(x, bits, center, ceiling, argmax, total, square, least, positive, saturated):
    """Statistics of activations laid out example x unit x position.

    Args:
        x: the activations, float32.
        bits: the same memory as int32.
        center: the value about which sums are taken, for each unit, float32.
        ceiling: the largest number that activations can have, float32; infinity without such a limit.
        argmax: overwritten by the first position of the largest activation, example x unit.
        total: overwritten by the sum of activation - center, example x unit.
        square: for each unit, the sum of (activation - center)^2 is added to it.
        least: for each unit, lowered to the smallest `ordered` activation.
        positive: for each unit, the number of activations above zero is added to it.
        saturated: for each unit, the number of activations at the ceiling is added to it.
    """
    # The maximum is found block by block and its position only afterwards, in the block where it was: keeping the
    # position in the inner loop would cost a branch for each number.
    for e in range(x.shape[0]):
        for u in range(x.shape[1]):
            row, row_bits, c = x[e, u], bits[e, u], center[u]
            best, low = np.int32(-0x80000000), least[u]
            block, s1, s2, above, full = 0, 0.0, 0.0, 0, 0
            for start in range(0, len(row), BLOCK):
                part, part_bits = row[start : start + BLOCK], row_bits[start : start + BLOCK]
                high = np.int32(-0x80000000)
                f1, f2, more, top = np.float32(0), np.float32(0), np.int32(0), np.int32(0)
                for i in range(len(part)):
                    v, key = part[i], _ordered(part_bits[i])
                    high, low = max(high, key), min(low, key)
                    d = v - c
                    f1 += d
                    f2 += d * d
                    more += np.int32(v > 0)
                    top += np.int32(v >= ceiling)
                if high > best:
                    best, block = high, start
                s1 += f1
                s2 += f2
                above += more
                full += top
            argmax[e, u], total[e, u] = _first(row_bits, block, best), s1
            square[u] += s2
            least[u] = low
            positive[u] += above
            saturated[u] += full


@compiled(fastmath=True, nogil=True)
def units_last(x, bits, center, ceiling, argmax, total, square, least, positive, saturated):
    """The same as `units_first` for activations laid out example x position x unit."""
    # The inner loop runs over units, which are adjacent in memory; the sums of `UNITS` of them stay in the cache.
    n_places, n_units = x.shape[1], x.shape[2]
    f1, f2 = np.empty(UNITS, np.float32), np.empty(UNITS, np.float32)
    best, low = np.empty(UNITS, np.int32), np.empty(UNITS, np.int32)
    at, above, full = (
        np.empty(UNITS, np.int32),
        np.empty(UNITS, np.int32),
        np.empty(UNITS, np.int32),
    )
    for e in range(x.shape[0]):
        for first in range(0, n_units, UNITS):
            n = min(UNITS, n_units - first)
            c = center[first : first + n]
            best[:] = np.int32(-0x80000000)
            low[:n] = least[first : first + n]
            at[:] = 0
            above[:] = 0
            full[:] = 0
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
                        full[u] += np.int32(v >= ceiling)
                for u in range(n):
                    total[e, first + u] += f1[u]
                    square[first + u] += f2[u]
            for u in range(n):
                argmax[e, first + u] = at[u]
                least[first + u] = low[u]
                positive[first + u] += above[u]
                saturated[first + u] += full[u]


@compiled(nogil=True)
def look(x, places, center, low, scale, histogram, powers):
    """Add activations at some positions to histograms and to sums of powers.

    Args:
        x: the activations, example x unit x position, in any memory layout.
        places: the positions of each example, example x sample.
        center: the value about which powers are summed, for each unit.
        low: the first edge of each unit's histogram.
        scale: for each unit, the number of bins for an interval of length 1.
        histogram: unit x bin; counts are added to it.
        powers: power x unit; sums are added to it.
    """
    last = histogram.shape[1] - 1
    for u in range(x.shape[1]):
        counts, s1, s2, s3, s4 = histogram[u], 0.0, 0.0, 0.0, 0.0
        for e in range(x.shape[0]):
            for k in range(places.shape[1]):
                v = x[e, u, places[e, k]]
                if not np.isfinite(v):
                    continue
                # Bin 0 is what lies below the first edge, hence + 1. As a float until it is known to be in range: a
                # large one would overflow an integer.
                place = np.floor((v - low[u]) * scale[u]) + np.float32(1)
                counts[int(place) if 0 <= place <= last else 0 if place < 0 else last] += 1
                # Fourth powers of float32 would lose what skewness and kurtosis are differences of.
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
    """Compile all loops, or load them from the cache, before processes are forked that would each do so."""
    x, center = np.zeros((2, 2, 3), np.float32), np.zeros(2, np.float32)
    square, least, positive = np.zeros(2), np.zeros(2, np.int32), np.zeros(2, np.int64)
    found = (
        np.zeros((2, 2), np.int32),
        np.zeros((2, 2)),
        square,
        least,
        positive,
        np.zeros(2, np.int64),
    )
    ceiling = np.float32(np.inf)
    units_first(x, x.view(np.int32), center, ceiling, *found)
    y = np.ascontiguousarray(x.transpose(0, 2, 1))
    units_last(y, y.view(np.int32), center, ceiling, *found)
    histogram, powers = np.zeros((2, 3), np.int64), np.zeros((4, 2))
    places = np.zeros((2, 1), np.int64)
    # Three kinds of memory layout, for each of which numba compiles a version of its own.
    for activations in (x, y.transpose(0, 2, 1), y[:1].transpose(0, 2, 1)):
        look(activations, places, center, center, center, histogram, powers)
