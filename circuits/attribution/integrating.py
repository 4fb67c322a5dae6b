"""Integrated gradients: the gradient averaged along the path from a baseline, times the difference from the baseline.

Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", equation 1. The integral is computed by the
Gauss-Legendre rule, as in captum.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.progress import Progress

_DOUBLINGS = 4


def integrate(
    passes: Passes,
    base: Tensor,
    steps: int = 50,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Float[Tensor, " example"], int]:
    """Integrated gradients at the site where passes start.

    Args:
        passes: passes from there to the target.
        base: the baseline of each example, with the shape of `passes.points`.
        steps: number of points on the path.
        tolerance: steps are doubled, at most four times, until an example's values sum to the target's difference
            within this share of it; None never doubles them.
        progress: called with the number of examples done and the total.

    Returns:
        The values; for each example the target's difference minus their sum; and the largest number of steps.
    """
    values, residuals, most = [], [], steps
    for example in range(len(passes)):
        way = passes.points[example] - base[example]
        difference = passes.values[example] - passes.value(base[example][None], example)[0]
        taken = steps
        limit = steps * 2**_DOUBLINGS if tolerance is not None else steps
        # Completeness: the exact integral sums to f(x) - f(baseline), so the residual measures the quadrature error.
        while True:
            found = way * _mean_gradient(passes, base[example], way, taken, example)
            residual = difference - found.sum()
            near = tolerance is None or residual.abs() <= tolerance * difference.abs() + 1e-6
            if near or taken >= limit:
                break
            taken *= 2
        most = max(most, taken)
        values.append(found)
        residuals.append(residual)
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.stack(values), torch.stack(residuals), most


def _mean_gradient(passes: Passes, start: Tensor, way: Tensor, steps: int, example: int) -> Tensor:
    # Gauss-Legendre nodes are on (-1, 1) and their weights sum to 2; the path parameter alpha runs from 0 to 1.
    places, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor((places + 1) / 2, dtype=way.dtype, device=way.device)
    shares = torch.tensor(weights / 2, dtype=way.dtype, device=way.device)
    total = torch.zeros_like(way)
    ahead = [1] * way.ndim
    for chunk in passes.chunks(steps):
        some = slice(chunk.start, chunk.stop)
        points = start + alphas[some].reshape(-1, *ahead) * way
        gradients = passes.gradient(points, example)[1]
        total += torch.tensordot(shares[some], gradients, dims=1)
    return total
