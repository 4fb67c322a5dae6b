"""Input attribution by linear models of the effects of superpixels: LIME and KernelSHAP."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from skimage.segmentation import slic
from torch import Tensor

from circuits.attribution.passes import Passes
from circuits.checks import check_range
from circuits.progress import Progress
from circuits.saliency.gradients import Blank, blanks

Segments = Int[Tensor, "example h w"]
Coalitions = Float[np.ndarray, "sample segment"]


def superpixels(inputs: Float[Tensor, "example channel h w"], n: int = 50) -> Segments:
    """Each image cut into about `n` segments of similar colour (SLIC, Achanta et al. 2012), numbered from 0.

    Raises:
        ValueError: if `n` is not from 2 to the number of pixels.
    """
    check_range("segments", n, 2, inputs.shape[-2] * inputs.shape[-1])
    found = []
    for image in inputs.detach().cpu():
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low).clamp_min(1e-12)).movedim(0, -1).double().numpy()
        cut = slic(
            pixels,
            n,
            compactness=10,
            start_label=0,
            channel_axis=-1,
            convert2lab=image.shape[0] == 3,
        )
        # SLIC may skip numbers; `unique` renumbers without gaps.
        found.append(torch.tensor(np.unique(cut, return_inverse=True)[1].reshape(cut.shape)))
    return torch.stack(found)


def lime(
    passes: Passes,
    segments: Segments | int = 50,
    samples: int = 1000,
    width: float = 0.25,
    penalty: float = 1.0,
    blank: Blank | Tensor = "zero",
    seed: int = 0,
    progress: Progress | None = None,
) -> Float[Tensor, "example 1 h w"]:
    """LIME: coefficients of a ridge regression of the target on which superpixels are shown (Ribeiro et al. 2016).

    Args:
        passes: passes from the input to the target.
        segments: the superpixels of each image, or roughly how many to make.
        samples: random subsets, each superpixel shown with probability 1/2; the first subset is the whole image.
        width: width of the kernel sqrt(exp(-d^2 / width^2)) in the cosine distance to the image, as in the authors'
            code.
        penalty: weight of the squared coefficients.
        blank: what hides a superpixel.
        seed: seed of the subsets.
        progress: called with the number of examples done and the total.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("samples", samples, 2)
    check_range("width", width, 1e-6)
    check_range("penalty", penalty, 0)

    def fit(passes: Passes, example: int, pieces: Tensor, n: int, base: Tensor) -> np.ndarray:
        z = np.random.default_rng(seed).integers(0, 2, (samples, n)).astype(np.float64)
        # The image itself is always among the samples, and has the largest weight.
        z[0] = 1
        values = _values_of_subsets(passes, example, pieces, z, base)
        # For z of 0 and 1, cos(z, 1) = sum(z) / (sqrt(sum(z)) sqrt(n)) = sqrt(mean(z)).
        distance = 1 - np.sqrt(z.mean(1))
        # The kernel of the authors' code, which takes the root of the exponential.
        weights = np.sqrt(np.exp(-(distance**2) / width**2))
        # Weighted centring takes the place of an unpenalised intercept.
        x = z - np.average(z, axis=0, weights=weights)
        y = values - np.average(values, weights=weights)
        return np.linalg.solve(
            x.T @ (weights[:, None] * x) + penalty * np.eye(n), x.T @ (weights * y)
        )

    return _superpixel_shares(passes, segments, blank, fit, progress)


def kernel_shap(
    passes: Passes,
    segments: Segments | int = 50,
    samples: int = 1000,
    blank: Blank | Tensor = "zero",
    seed: int = 0,
    progress: Progress | None = None,
) -> Float[Tensor, "example 1 h w"]:
    """Shapley values of superpixels by weighted regression (Lundberg and Lee 2017, theorem 2).

    They sum to the target's value minus that of the blank image. If there are no more subsets than samples, all subsets
    are used and the values are exact; otherwise sizes are drawn by the kernel's weight, each subset with its
    complement.

    Args:
        passes: passes from the input to the target.
        segments: the superpixels of each image, or roughly how many to make.
        samples: number of subsets.
        blank: what hides a superpixel.
        seed: seed of the subsets.
        progress: called with the number of examples done and the total.

    Raises:
        ValueError: if an option is out of range.
    """
    check_range("samples", samples, 2)

    def fit(passes: Passes, example: int, pieces: Tensor, n: int, base: Tensor) -> np.ndarray:
        z, weights = coalitions(n, samples, seed)
        ends = _values_of_subsets(
            passes, example, pieces, np.stack([np.zeros(n), np.ones(n)]), base
        )
        total = ends[1] - ends[0]
        if n == 1:
            return np.array([total])
        y = _values_of_subsets(passes, example, pieces, z, base) - ends[0]
        # The constraint sum(phi) = total is built in by eliminating the last value, phi_n = total - sum of the others:
        # y - z_n total = sum_i (z_i - z_n) phi_i.
        x = z[:, :-1] - z[:, -1:]
        y = y - z[:, -1] * total
        gram = x.T @ (weights[:, None] * x)
        first = np.linalg.lstsq(gram, x.T @ (weights * y), rcond=None)[0]
        return np.append(first, total - first.sum())

    return _superpixel_shares(passes, segments, blank, fit, progress)


def coalitions(n: int, samples: int, seed: int) -> tuple[Coalitions, Float[np.ndarray, " sample"]]:
    """Proper non-empty subsets of `n` superpixels for KernelSHAP, and their weights."""
    # The kernel is (n - 1) / (C(n, k) k (n - k)) for a subset of size k. Drawing the size with probability proportional
    # to 1 / (k (n - k)), and then a subset of that size uniformly, samples by the kernel, so that weights are equal.
    if n < 2:
        return np.zeros((0, n)), np.zeros(0)
    # All subsets, where there are few enough: their weighted regression gives exact Shapley values. The first test
    # keeps 2**n from growing without use.
    if n < 31 and 2**n - 2 <= samples:
        numbers = np.arange(1, 2**n - 1)[:, None]
        # Bits as members: number 5 = 101 in binary is the subset of superpixels 0 and 2.
        z = ((numbers >> np.arange(n)) & 1).astype(np.float64)
        sizes = z.sum(1)
        ways = np.array([math.comb(n, int(k)) for k in sizes])
        return z, (n - 1) / (ways * sizes * (n - sizes))
    generator = np.random.default_rng(seed)
    sizes = np.arange(1, n)
    weight = 1 / (sizes * (n - sizes))
    drawn = generator.choice(sizes, -(-samples // 2), p=weight / weight.sum())
    z = np.zeros((len(drawn), n))
    for row, k in zip(z, drawn, strict=True):
        row[generator.permutation(n)[:k]] = 1
    # A subset and its complement have the same weight; taken together, the errors of both partly cancel (Covert and Lee
    # 2021).
    both = np.stack([z, 1 - z], 1).reshape(-1, n)[:samples]
    return both, np.ones(len(both))


def _values_of_subsets(
    passes: Passes, example: int, pieces: Tensor, z: np.ndarray, base: Tensor
) -> np.ndarray:
    """The target's value with only some superpixels shown, for each subset."""
    shown = torch.tensor(z, dtype=torch.float32, device=pieces.device)
    found = []
    for chunk in passes.chunks(len(z)):
        # Indexing each subset's row with the image of numbers: every pixel gets its superpixel's 0 or 1.
        masks = shown[chunk.start : chunk.stop][:, pieces][:, None]
        mixed = masks * passes.inputs[example] + (1 - masks) * base[example]
        found.append(passes.value(mixed, example).double().cpu())
    return torch.cat(found).numpy()


Fit = Callable[[Passes, int, Tensor, int, Tensor], np.ndarray]
"""Takes passes, an example, its superpixels, their number and its blank; returns a share for each superpixel."""


def _superpixel_shares(
    passes: Passes,
    segments: Segments | int,
    blank: Blank | Tensor,
    fit: Fit,
    progress: Progress | None,
) -> Float[Tensor, "example 1 h w"]:
    pieces = superpixels(passes.inputs, segments) if isinstance(segments, int) else segments
    if pieces.shape != (len(passes), *passes.inputs.shape[-2:]):
        raise ValueError(
            f"segments of shape {tuple(pieces.shape)}: expected {(len(passes), *passes.inputs.shape[-2:])}"
        )
    base = blanks(passes, blank)
    found = []
    for example, own in enumerate(pieces.to(passes.inputs.device)):
        shares = torch.tensor(
            fit(passes, example, own, int(own.max()) + 1, base),
            dtype=torch.float32,
            device=own.device,
        )
        found.append(shares[own][None])
        if progress is not None:
            progress(example + 1, len(passes))
    return torch.stack(found)
