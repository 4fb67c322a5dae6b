"""What a model takes: images with their preprocessing, or tokens with their vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from circuits.models.adapter.tokenizing import Encoder, by_numbers, by_words


@dataclass(frozen=True)
class ImageInput:
    """Images as a model takes them.

    The library holds images as values in 0..1; `normalize` maps them to what the network was trained on,
    `(scale * x - mean) / std`, with the channels reversed first if it wants BGR.

    Attributes:
        channels: number of channels: 3 is RGB, 1 is grey, anything else has no colour.
        height: in pixels.
        width: in pixels.
        mean: one number a channel, or a single one for all, in the model's channel order.
        std: one number a channel, or a single one for all, in the model's channel order.
        scale: the top of the model's value range, 1 or 255.
        bgr: the model's channels are blue, green, red.
        resize: how a photograph is fitted: `stretch` it to the size; `crop` the middle after scaling its shorter
            side to the size; or `margin-crop`, as is usual for ImageNet: the shorter side is scaled to 256/224
            of the size before the middle is cropped, so that a margin is lost on every side. `margin-32` is the same
            with a shorter side of 32 pixels more than the size, resampled bicubically, as for EfficientNet.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0
    bgr: bool = False
    resize: Literal["stretch", "crop", "margin-crop", "margin-32"] = "crop"

    axes: ClassVar[tuple[str, ...]] = ("batch", "unit", "y", "x")
    """The labels of its axes (`circuits.models.adapter.axes`)."""

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1 or self.height * self.width > 2**26:
            raise ValueError(
                f"input shape {(self.channels, self.height, self.width)} must be positive (and at most 2^26 "
                "pixels): expected (channels, height, width)"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(values)} values: expected 1 or {self.channels}, one a channel"
                )

    def normalize(
        self, images: Float[Tensor, "batch channel h w"]
    ) -> Float[Tensor, "batch channel h w"]:
        """Map images in 0..1 (RGB order) to the model's input range; differentiable.

        Raises:
            ValueError: if the number of channels is not the model's.
        """
        if images.shape[1] != self.channels:
            raise ValueError(
                f"images have {images.shape[1]} channels: the model takes {self.channels}"
            )
        if self.bgr:
            images = images.flip(1)
        mean, std = self._statistics(images)
        return (images * self.scale - mean) / std

    def restore(
        self, inputs: Float[Tensor, "batch channel h w"]
    ) -> Float[Tensor, "batch channel h w"]:
        """Undo `normalize`: images in 0..1 (RGB order) from what the model takes.

        Raises:
            ValueError: if the number of channels is not the model's.
        """
        if inputs.shape[1] != self.channels:
            raise ValueError(
                f"inputs have {inputs.shape[1]} channels: the model takes {self.channels}"
            )
        mean, std = self._statistics(inputs)
        images = (inputs * std + mean) / self.scale
        return images.flip(1) if self.bgr else images

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, in the model's order, shaped to broadcast over a batch."""
        mean, std = like.new_tensor(self.mean), like.new_tensor(self.std)
        return mean[None, :, None, None], std[None, :, None, None]

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop a picture to the model's height and width."""
        size = (self.width, self.height)
        if self.resize in ("margin-crop", "margin-32"):
            # Two steps, as in the usual evaluation transform of ImageNet: resize to whole pixels, then crop.
            wanted, how = (
                (256 / 224 * self.width, 256 / 224 * self.height),
                Image.Resampling.BILINEAR,
            )
            if self.resize == "margin-32":
                wanted, how = (self.width + 32, self.height + 32), Image.Resampling.BICUBIC
            ratio = max(wanted[0] / image.width, wanted[1] / image.height)
            large = (round(image.width * ratio), round(image.height * ratio))
            image = image.resize(large, how)
            left, top = (large[0] - self.width) // 2, (large[1] - self.height) // 2
            return image.crop((left, top, left + self.width, top + self.height))
        if self.resize == "crop":
            ratio = min(image.width / self.width, image.height / self.height)
            w, h = self.width * ratio, self.height * ratio
            left, top = (image.width - w) / 2, (image.height - h) / 2
            # Pillow resamples the box at sub-pixel accuracy: no rounding of its borders, and one filter only.
            return image.resize(size, Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        return image.resize(size, Image.Resampling.BICUBIC)

    def check_channels(self) -> None:
        """Raise ValueError if the model takes neither 3 nor 1 channels, as pictures have."""
        if self.channels not in (1, 3):
            raise ValueError(
                f"a photograph has 3 channels (or 1, grey): the model takes {self.channels}"
            )

    def load(self, image: Image.Image) -> Float[Tensor, "channel h w"]:
        """Turn a picture into the values in 0..1 that `normalize` takes.

        Raises:
            ValueError: if the model takes neither 3 nor 1 channels.
        """
        self.check_channels()
        fitted = self.fit(image.convert("RGB" if self.channels == 3 else "L"))
        pixels = torch.tensor(np.asarray(fitted), dtype=torch.float32) / 255
        return rearrange(pixels, "h w ... -> (...) h w") if pixels.ndim == 3 else pixels[None]

    def example(self, batch: int = 1, seed: int = 0) -> Float[Tensor, "batch channel h w"]:
        """Random normalised images, for tracing the model."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.channels, self.height, self.width)
        return self.normalize(torch.rand(shape, generator=generator))

    def describe(self) -> dict[str, Any]:
        """As a plain dictionary, for provenance."""
        return {"kind": "image", **asdict(self)}


@dataclass(frozen=True)
class TokenInput:
    """Tokens as a model takes them.

    Attributes:
        n_vocab: number of tokens in the vocabulary.
        n_ctx: the longest sequence, in tokens.
        vocabulary: how each token is written; empty if unknown.
        bos: the token that starts every sequence, if there is one.
        encoder: the model's own tokenizer, from text to tokens without `bos`.
        filler: the token that pads shorter texts of a batch; it has no effect on results.
    """

    n_vocab: int
    n_ctx: int
    vocabulary: tuple[str, ...] = ()
    bos: int | None = None
    encoder: Encoder | None = field(default=None, repr=False, compare=False)
    filler: int = field(default=0, repr=False, compare=False)

    axes: ClassVar[tuple[str, ...]] = ("batch", "position")
    """The labels of its axes."""

    def __post_init__(self) -> None:
        if self.vocabulary and len(self.vocabulary) != self.n_vocab:
            raise ValueError(
                f"vocabulary has {len(self.vocabulary)} entries: expected n_vocab {self.n_vocab}"
            )
        if not 0 <= self.filler < self.n_vocab:
            raise ValueError(
                f"filler {self.filler} is not in the vocabulary: expected 0 to {self.n_vocab - 1}"
            )

    def example(self, batch: int = 1, seed: int = 0) -> Int[Tensor, "batch position"]:
        """Random tokens, for tracing the model; at most 16 a text."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, min(self.n_ctx, 16))
        tokens = torch.randint(self.n_vocab, shape, generator=generator)
        if self.bos is not None:
            tokens[:, 0] = self.bos
        return tokens

    def check(self, tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
        """Return `tokens` if the model can take them.

        Raises:
            ValueError: if a token is outside the vocabulary or the sequence is too long.
        """
        if tokens.numel() == 0 or tokens.shape[1] > self.n_ctx:
            raise ValueError(f"sequences have {tokens.shape[1]} tokens: expected 1 to {self.n_ctx}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.n_vocab:
            raise ValueError(
                f"token {low if low < 0 else high} is not in the vocabulary: "
                f"expected 0 to {self.n_vocab - 1}"
            )
        return tokens

    def word(self, token: int) -> str:
        """How a token is written.

        >>> TokenInput(3, 8, ("a", "b", "c")).word(1)
        'b'
        """
        return self.vocabulary[token] if self.vocabulary else str(token)

    def excerpt(self, tokens: Sequence[int], at: int, around: int = 8) -> str:
        """Quote a stretch of a text, with one token marked.

        Args:
            tokens: the tokens of the whole text.
            at: the position of the token to mark.
            around: how many tokens to show on either side.

        >>> TokenInput(9, 8).excerpt([3, 1, 4, 1, 5], 2, around=1)
        '… 1 «4» 1 …'
        """
        first, gap = max(0, at - around), "" if self.vocabulary else " "
        words = [self.word(t).replace("\n", "⏎") for t in tokens[first : at + around + 1]]
        bare = words[at - first].strip()
        words[at - first] = words[at - first].replace(bare, f"«{bare}»") if bare else "« »"
        before, after = ["…"] * (first > 0), ["…"] * (at + around + 1 < len(tokens))
        return gap.join([*before, *words, *after])

    def encode(self, text: str) -> list[int]:
        """Tokenize a text, without `bos`, by the model's own tokenizer.

        A model without a tokenizer takes words of its vocabulary or, without a vocabulary, whole numbers, in
        both cases separated by white space.

        Raises:
            ValueError: if a part of the text is not a token.

        >>> TokenInput(3, 8).encode("0 2 1")
        [0, 2, 1]
        """
        if self.encoder is not None:
            return self.encoder(text)
        return by_words(self.vocabulary)(text) if self.vocabulary else by_numbers(text)

    def describe(self) -> dict[str, Any]:
        """As a plain dictionary, for provenance."""
        return {"kind": "tokens", "n_vocab": self.n_vocab, "n_ctx": self.n_ctx, "bos": self.bos}


ModelInput = ImageInput | TokenInput
