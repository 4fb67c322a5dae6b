"""A source's examples as a model takes them (layer 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.stimuli.images import ImageSource, to_image
from circuits.stimuli.sources import Source, batches
from circuits.stimuli.texts import TextSource
from circuits.units import Site


class Inputs:
    """A source's examples as a model takes them.

    Args:
        model: the model.
        source: the examples.
        skip_bad: whether texts that the model cannot take are an error only when they are loaded.

    Raises:
        ValueError: if the model takes images and the source holds text, or the other way round; or a
            token is not in the model's vocabulary.
    """

    def __init__(self, model: HookedModel, source: Source, skip_bad: bool = False) -> None:
        self.model, self.source = model, source
        self._bad: dict[int, ValueError] = {}
        wants = "images" if isinstance(model.input, ImageInput) else "tokens"
        if isinstance(model.input, ImageInput) != isinstance(source, ImageSource):
            raise ValueError(f"data {source.spec!r} does not fit: model {model.name} takes {wants}")
        self._length = 0
        if isinstance(source, TextSource):
            assert isinstance(model.input, TokenInput), "checked above"
            self._tokens = [
                self._encoded(i, text, model.input) for i, text in enumerate(source.texts)
            ]
            if self._bad and not (skip_bad and len(self._bad) < len(source)):
                raise next(iter(self._bad.values()))
            self._length = max(map(len, self._tokens))

    def _encoded(self, example: int, text: str | Sequence[int], spec: TokenInput) -> Tensor:
        """A text's tokens; none, and a note of the error, if the model cannot take it."""
        try:
            return self._encode(text, spec)
        except ValueError as error:
            name = self.source.names[example]
            self._bad[example] = ValueError(f"{name} of {self.source.spec}: {error}")
            return torch.zeros(0, dtype=torch.int64)

    @staticmethod
    def _encode(text: str | Sequence[int], spec: TokenInput) -> Tensor:
        if not isinstance(text, str):  # tokens as they are: what starts them is the data's affair
            return spec.check(torch.tensor([list(text)[: spec.n_ctx]], dtype=torch.int64))[0]
        tokens = spec.encode(text)
        if spec.bos is not None and tokens[:1] != [spec.bos]:
            tokens = [spec.bos, *tokens]
        return spec.check(torch.tensor([tokens[: spec.n_ctx]], dtype=torch.int64))[0]

    def fitted(self, site: Site) -> Site:
        """The site with the number of positions that the longest text has."""
        if not self._length:
            return site
        shape = tuple(
            self._length if axis in ("position", "query", "key") else n
            for axis, n in zip(site.axes[1:], site.shape, strict=True)
        )
        return Site(**{**vars(site), "shape": shape})

    def first(self, n: int) -> Tensor:
        """The first `n` examples, or all if there are fewer, as one input.

        Raises:
            ValueError: if `n` is not positive, or texts differ in length (see `upto`).
        """
        found = self.upto(n, size=n)
        if len(found) > 1:
            raise ValueError(f"the first {n} texts of {self.source.spec} differ in length")
        return found[0]

    def upto(self, n: int, size: int = 32) -> list[Tensor]:
        """The first `n` examples, or all if there are fewer, in batches of one length each.

        Raises:
            ValueError: if `n` is not positive.
        """
        if n < 1:
            raise ValueError(f"limit {n} must be at least 1")
        return [self.batch(r) for r in self.passes(range(min(n, len(self.source))), size)]

    def passes(self, examples: range, size: int) -> Iterator[range]:
        """Cut a range of examples into batches of at most `size`, of texts of one length each."""
        for batch in batches(len(examples), size):
            start = examples[batch.start]
            stop = examples[batch.stop - 1] + 1
            if isinstance(self.source, TextSource):
                for i in range(start, stop):
                    if len(self._tokens[i]) != len(self._tokens[start]):
                        yield range(start, i)
                        start = i
            yield range(start, stop)

    def batch(self, examples: Sequence[int]) -> Tensor:
        """The examples as one input of the model; texts must be of one length.

        Raises:
            ValueError: if an example cannot be read.
        """
        loaded = [self.load(i) for i in examples]
        return self.joined(loaded)

    def load(self, example: int) -> Tensor:
        """One example, as `joined` takes it: an image in 0..1, or the tokens of a text.

        Raises:
            ValueError: if it cannot be read.
        """
        if isinstance(self.source, ImageSource):
            return self._image(example)
        if example in self._bad:
            raise self._bad[example]
        return self._tokens[example]

    def joined(self, loaded: Sequence[Tensor]) -> Tensor:
        """Examples that `load` gave, as one input of the model."""
        stacked = torch.stack(list(loaded))
        spec = self.model.input
        return spec.normalize(stacked) if isinstance(spec, ImageInput) else stacked

    def _image(self, example: int) -> Float[Tensor, "channel h w"]:
        spec, source = self.model.input, self.source
        assert isinstance(spec, ImageInput), "checked when built"
        assert isinstance(source, ImageSource), "checked when built"
        image = source.image(example)
        if not isinstance(image, Tensor):
            return spec.load(image)
        if image.shape == (spec.channels, spec.height, spec.width):
            return image
        if len(image) == 1:
            image = image.expand(3, -1, -1)
        if len(image) != 3 or spec.channels not in (1, 3):
            raise ValueError(
                f"{source.names[example]!r} has shape {tuple(image.shape)}: the model takes "
                f"{(spec.channels, spec.height, spec.width)}, other sizes only of 1 or 3 channels"
            )
        return spec.load(to_image(image))

    def picture(self, example: int) -> Image.Image:
        """An example of a source of images, for people."""
        assert isinstance(self.source, ImageSource), "text has no picture"
        image = self.source.image(example)
        if isinstance(image, Tensor):
            return to_image(image.expand(3, -1, -1) if len(image) == 1 else image[:3])
        return image.convert("RGB")

    def tokens(self, example: int) -> list[int]:
        """The tokens of a text, as the model sees them."""
        return self._tokens[example].tolist()


class Sample(Sequence[Tensor]):
    """Examples spread evenly over a source, as a model takes them; each batch is read when it is asked for.

    Args:
        model: the model.
        source: the examples.
        limit: at most so many.
        among: the numbers of those to choose among; all if None.

    Attributes:
        which: the numbers of those chosen, in the order of the batches.

    Raises:
        ValueError: if `limit` is not positive, or the model does not take what the source holds.
    """

    def __init__(
        self, model: HookedModel, source: Source, limit: int, among: Sequence[int] | None = None
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit {limit} must be at least 1")
        among = range(len(source)) if among is None else among
        n = min(limit, len(among))
        self.which = [among[i * len(among) // n] for i in range(n)]
        self._inputs = Inputs(model, source)
        self._groups: list[list[int]] = []
        last = -1
        for i in self.which:
            # images have one size; texts of one length go together
            size = 0 if isinstance(model.input, ImageInput) else len(self._inputs.load(i))
            if self._groups and len(self._groups[-1]) < 32 and last == size:
                self._groups[-1].append(i)
            else:
                self._groups.append([i])
            last = size

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self._inputs.batch(group) for group in self._groups[index]]
        return self._inputs.batch(self._groups[index])
