"""What natural images look like on average: their colours and their spectrum.

Decorrelated colour needs the first, MACO both. They are fitted from a person's own images, never
downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuits.tensors import write_tensors

COLOR_CORRELATION = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
"""Square root of the covariance of colours in ImageNet, as lucid has it (Olah et al. 2017)."""


def normalised_colors(root: Float[Tensor, "channel channel"]) -> Float[Tensor, "channel channel"]:
    """A square root of a covariance of colours, divided by its largest column norm, as lucid does.

    >>> normalised_colors(torch.diag(torch.tensor([2.0, 1.0]))).tolist()
    [[1.0, 0.0], [0.0, 0.5]]
    """
    return root / root.norm(dim=0).max()


@dataclass(frozen=True, eq=False)
class NaturalImages:
    """Statistics of a set of images with values in 0..1.

    Attributes:
        mean: of each channel.
        root: a square root of the covariance of channels: `root @ root.T` is that covariance.
        magnitude: root mean square of |FFT| (orthonormal) of the channels without their mean, in the
            basis where they are uncorrelated (`root`), at the frequencies of `rfft2`. Fel et al. 2023
            average magnitudes; the average of squares needs one pass only.
        width: of the images in pixels, which `magnitude` does not tell: 6 and 7 both have four columns.
        data: the name of the images.
        data_hash: their hash.
        n: how many there were.
    """

    mean: Float[Tensor, " channel"]
    root: Float[Tensor, "channel channel"]
    magnitude: Float[Tensor, "channel h half"]
    width: int
    data: str
    data_hash: str
    n: int

    @classmethod
    def fit(
        cls, images: Iterable[Float[Tensor, "channel h w"]], data: str, data_hash: str
    ) -> NaturalImages:
        """Fit to images of one size, in one pass.

        Raises:
            ValueError: if there are fewer than two images, they differ in shape, or none has contrast.
        """
        n, shape = 0, None
        # Double precision from here on: the covariance is a difference of two nearly equal averages (E[xx'] -
        # E[x]E[x]'), which would lose most digits of a float32.
        total = product = spectrum = torch.zeros(())
        for image in images:
            if shape is not None and image.shape != shape:
                raise ValueError(
                    f"images of {data} differ in shape: {tuple(shape)}, {tuple(image.shape)}"
                )
            shape = image.shape
            x = image.double()
            flat = x.flatten(1)
            total = total + flat.mean(1)
            product = product + flat @ flat.T / flat.shape[1]
            # Cross spectra of all pairs of channels are kept, since the basis in which channels are uncorrelated
            # (`root`) is only known after the last image. For y = A x (A the inverse of root) the power of y_i at a
            # frequency is sum over c, d of A_ic S_cd A_id, with S_cd the mean of x_c conj(x_d): the einsum below.
            waves = torch.fft.rfft2(x, norm="ortho")
            spectrum = spectrum + torch.einsum("chw,dhw->cdhw", waves, waves.conj())
            n += 1
        if n < 2:
            raise ValueError(f"images of {data}: {n} found, at least 2 are needed for statistics")
        mean = total / n
        values, vectors = torch.linalg.eigh(product / n - torch.outer(mean, mean))
        if float(values.max()) <= 0:
            raise ValueError(f"images of {data} have no contrast: all pixels are alike")
        values = values.clamp_min(1e-6 * float(values.max()))  # grey images in three channels
        # C = V diag(l) V', hence V diag(sqrt l) is a square root of C: root root' = C.
        root = (vectors * values.sqrt()).flip(1)  # largest first
        inverse = torch.linalg.inv(root).to(spectrum.dtype)
        power = torch.einsum("ic,cdhw,id->ihw", inverse, spectrum / n, inverse).real
        power[:, 0, 0] = 0  # the mean is kept by itself
        magnitude = power.clamp_min(0).sqrt().float()
        assert shape is not None, "there were images"
        return cls(mean.float(), root.float(), magnitude, shape[-1], data, data_hash, n)

    def magnitude_at(self, height: int, width: int) -> Float[Tensor, "channel {height} half"]:
        """The magnitudes for another size, at the same frequencies in cycles a pixel.

        An orthonormal spectrum does not depend on the size of what has the same power everywhere.
        """
        own_h, columns = self.magnitude.shape[1:]
        if (height, width) == (own_h, self.width):
            return self.magnitude
        # as a map from -1/2 to 1/2 and 0 to 1/2 cycles a pixel, sampled bilinearly
        # rfft2 has rows in the order 0, 1, .., -2, -1 cycles; rolled, they rise through 0, so that bilinear sampling
        # between neighbouring rows never mixes the highest positive with the lowest negative frequency.
        centered = torch.roll(self.magnitude, own_h // 2, dims=1)
        # Rows have the period of one cycle a pixel: beyond the highest positive frequency lies the lowest negative one.
        centered = torch.cat([centered[:, -1:], centered, centered[:, :1]], 1)
        fy = torch.fft.fftfreq(height)
        fx = torch.fft.rfftfreq(width)
        # grid_sample with corners aligned has -1 at the first row's centre and 1 at the last one's: row r of n is 2 r /
        # (n - 1) - 1. Frequency fy is row fy h + h // 2 of the h that were rolled, and one row further down behind the
        # row put before them. Frequency fx is column fx w of w // 2 + 1: the last one is 1/2 of an even width only.
        y = (fy * own_h + own_h // 2 + 1) / (own_h + 1) * 2 - 1
        x = fx * self.width / max(1, columns - 1) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1)[None]
        found = F.grid_sample(
            centered[None], grid.to(centered), padding_mode="border", align_corners=True
        )[0]
        found[:, 0, 0] = 0
        return found

    def save(self, path: Path) -> None:
        """Write as safetensors, with what it was fitted to as metadata."""
        tensors = {"mean": self.mean, "root": self.root, "magnitude": self.magnitude}
        facts = {
            "data": self.data, "data_hash": self.data_hash, "n": str(self.n), "width": str(self.width),
        }  # fmt: skip
        write_tensors(path, tensors, facts)

    @classmethod
    def kept(
        cls,
        path: Path,
        images: Iterable[Float[Tensor, "channel h w"]],
        data: str,
        data_hash: str,
    ) -> NaturalImages:
        """What was fitted before and saved at `path`, if it is of the same data; else fitted, and saved.

        Raises:
            ValueError: as `fit`.
        """
        try:
            known = cls.load(path)
        except (ValueError, OSError):
            known = None
        if known is None or known.data_hash != data_hash:
            known = cls.fit(images, data, data_hash)
            known.save(path)
        return known

    @classmethod
    def load(cls, path: Path) -> NaturalImages:
        """Read what `save` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                mean, root, magnitude = (file.get_tensor(k) for k in ("mean", "root", "magnitude"))
            numbers = int(facts["width"]), int(facts["n"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"image statistics {str(path)!r} cannot be read: {error}") from error
        return cls(mean, root, magnitude, numbers[0], facts["data"], facts["data_hash"], numbers[1])
