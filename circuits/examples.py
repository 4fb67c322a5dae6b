"""Examples: which inputs of a source are taken, how they are chosen, and how they become batches for a model.

Every verb takes its inputs this way, so that "twenty examples of this folder" means the same twenty everywhere.
Images are normalised and stacked. Texts of different lengths are padded into one batch with a mask if the model
then computes the same as for each text alone (see `HookedModel.padding`); if not, texts of equal length are run
together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.adapter.padding import group_by_length
from circuits.stimuli.accounts import account, left_out
from circuits.stimuli.images import ImageSource, on_white, to_image
from circuits.stimuli.sources import Source, open_source
from circuits.stimuli.texts import TextSource
from circuits.tensors import tensor_bytes
from circuits.units import Site

LIMIT = 32
"""The default number of examples that a verb takes."""

BATCH = 32
"""The default number of examples in a batch."""

How = Literal["spread", "first", "random", "given"]
"""How examples are chosen: `spread` cuts the source into stretches of equal length and draws one from each; `first`
takes the first ones; `random` draws without replacement; `given` means that the caller provided them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as one input of the model.

    Attributes:
        inputs: normalised images, batch x channel x y x x, or tokens, batch x position.
        mask: True where a position holds a token, False where it is padding; None where there is no padding.
        which: the indices of the batch's examples among all `Examples`.
    """

    inputs: Tensor
    mask: Bool[Tensor, "batch position"] | None
    which: Sequence[int]

    def __len__(self) -> int:
        return len(self.which)

    def counted(self) -> Bool[Tensor, "batch position"]:
        """Which positions hold tokens, not padding; only for batches of texts."""
        return counted(self.inputs, self.mask)


def counted(
    tokens: Int[Tensor, "batch position"],
    mask: Bool[Tensor, "batch position"] | None,
    leave_first: int = 0,
) -> Bool[Tensor, "batch position"]:
    """Which positions hold tokens, leaving out the first `leave_first` of each text.

    >>> padded = torch.tensor([[False, True, True], [True, True, True]])
    >>> counted(torch.zeros(2, 3, dtype=torch.int64), padded, 1).tolist()
    [[False, False, True], [False, True, True]]
    """
    there = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    # The cumulative sum numbers the tokens of a text from 1, on whichever side it is padded.
    return there & (there.cumsum(1) > leave_first)


class Examples:
    """Examples of a source, in the source's order, as a model takes them.

    Args:
        model: the model that they are for.
        source: where they come from: data by name (see `open_source`), or an opened source.
        n: the most examples to take; None takes all.
        how: `spread`, `first` or `random`.
        seed: the seed of `spread` and `random`.
        labels: the class of each example of the *source*, for images.
        among: indices of the source's examples to choose from; all of them if None.
        skip_bad: leave out texts that the model cannot take, instead of raising an error.

    Attributes:
        model: as given.
        source: the opened source.
        numbers: the index of each example in the source.
        names: the name of each example.
        labels: the class of each example; None without labels.
        how: how they were chosen.
        seed: the seed of the choice.
        skipped: the chosen ones that cannot be read and were left out, by name, with the reasons (see `readable`).

    Raises:
        ValueError: if `n` is not positive, there is nothing to choose from, the source is of images and the model
            takes tokens (or the reverse), or a text cannot be encoded.
    """

    def __init__(
        self,
        model: HookedModel,
        source: Source | str,
        n: int | None = LIMIT,
        *,
        how: How = "spread",
        seed: int = 0,
        labels: Sequence[int] | None = None,
        among: Sequence[int] | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.model = model
        self.source: Source = open_source(source) if isinstance(source, str) else source
        _check_kind(model, self.source)
        if labels is not None and len(labels) != len(self.source):
            raise ValueError(
                f"labels have {len(labels)} entries: expected one for each of the {len(self.source)} examples of "
                f"{self.source.spec}"
            )
        pool = range(len(self.source)) if among is None else list(among)
        self.how: How = how
        self.seed = seed
        self.numbers = choose(pool, n, how, seed)
        self.names = tuple(self.source.names[i] for i in self.numbers)
        self.labels = None if labels is None else tuple(int(labels[i]) for i in self.numbers)
        self._of = "all" if n is None or n >= len(pool) else f"{len(self.numbers)} of {len(pool)}"
        self.skipped: dict[str, str] = {}
        self._ready: Callable[[int], Tensor] | None = (
            None  # set where examples are given as the model takes them
        )
        # By number in the source. Texts are encoded at once, so that a bad one is refused before anything runs.
        self._tokens: dict[int, Tensor] = {}
        self._bad: dict[int, ValueError] = {}
        if isinstance(self.source, TextSource):
            self._encode(skip_bad)

    # --- other ways to make them -----------------------------------------------------------------

    @classmethod
    def given(
        cls,
        model: HookedModel,
        inputs: Tensor | Iterable[Tensor],
        *,
        names: Sequence[str] = (),
        labels: Sequence[int] | None = None,
        data: str = "given",
    ) -> Examples:
        """Make examples of tensors that are already what the model takes.

        Args:
            model: the model.
            inputs: one batch, or several; texts may differ in length from batch to batch.
            names: the name of each example.
            labels: the class of each example, for images.
            data: what they are, for records.

        Raises:
            ValueError: if there are none, they do not fit the model, or there are more or fewer names or labels.
        """
        parts = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        for part in parts:
            if len(part):
                model.check(part)
        rows = [row for part in parts for row in part]
        if not rows:
            raise ValueError("examples are empty: expected at least one")
        named = tuple(names) or tuple(f"example {i}" for i in range(len(rows)))
        _check_names(named, len(rows))
        source: Source
        if isinstance(model.input, TokenInput):
            source = TextSource(data, named, "", tuple(tuple(row.tolist()) for row in rows))
        else:  # the source shows people the images; the model is given the tensors as they are
            source = ImageSource(data, named, "", lambda i: model.input.restore(rows[i][None])[0])  # type: ignore[union-attr]
        made = cls(model, source, None, how="given", labels=labels)
        if not isinstance(model.input, TokenInput):
            made._ready = rows.__getitem__
        return made

    @classmethod
    def pictures(
        cls, model: HookedModel, pictures: Sequence[Image.Image], names: Sequence[str] = ()
    ) -> Examples:
        """Make examples of pictures, fitted to the model's size."""
        named = tuple(names) or tuple(f"picture {i}" for i in range(len(pictures)))
        _check_names(named, len(pictures))
        source = ImageSource("pictures", named, "", lambda i: pictures[i])
        return cls(model, source, None, how="given")

    @classmethod
    def texts(
        cls, model: HookedModel, texts: Sequence[str | Sequence[int]], names: Sequence[str] = ()
    ) -> Examples:
        """Make examples of texts, as strings or as tokens.

        Raises:
            ValueError: if one is empty or cannot be encoded.
        """
        named = tuple(names) or tuple(
            t if isinstance(t, str) else f"text {i}" for i, t in enumerate(texts)
        )
        _check_names(named, len(texts))
        made = tuple(t if isinstance(t, str) else tuple(t) for t in texts)
        return cls(model, TextSource("texts", named, "", made), None, how="given")

    def subset(self, which: Sequence[int]) -> Examples:
        """The examples at some indices, in that order."""
        # Not through the constructor, which would open, choose and encode again; tokens are shared.
        made = object.__new__(Examples)
        made.__dict__ = dict(self.__dict__)
        made.numbers = tuple(self.numbers[i] for i in which)
        made.names = tuple(self.names[i] for i in which)
        made.labels = None if self.labels is None else tuple(self.labels[i] for i in which)
        made._of = f"{len(made.numbers)} of {len(self)}"
        made.skipped = {}
        return made

    def readable(self) -> Examples:
        """These examples without the files of a folder that cannot be read, which become `skipped`.

        Each file is decoded for this. Examples of anything else are returned as they are: one that cannot be read
        stops what reads it.

        Raises:
            ValueError: if none can be read.
        """
        bad = self.unreadable(range(len(self)))
        if not bad:
            return self
        if len(bad) == len(self):
            raise ValueError(f"data {self.data!r}: none of {len(bad)} images can be read: {bad[0]}")
        made = self.subset([i for i in range(len(self)) if i not in bad])
        made.skipped = self.skipped | {self.names[i]: reason for i, reason in bad.items()}
        made._of = self._of
        return made

    def unreadable(self, places: Iterable[int]) -> dict[int, str]:
        """Those of some examples, by index, that are files of a folder which cannot be read, and why."""
        bad: dict[int, str] = {}
        if isinstance(self.source, ImageSource) and self.source.folder is not None:
            for place in places:
                try:
                    self.load(place)
                except (OSError, ValueError) as error:
                    bad[place] = str(error)
        return bad

    # --- what they are ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        """The source, which examples were taken and how, for titles."""
        return f"{self.data}: {self.chosen}"

    @property
    def data(self) -> str:
        """The source's name."""
        return self.source.spec

    @property
    def chosen(self) -> str:
        """Which examples were taken and how, for titles and reports: `32 of 500, spread evenly (seed 0)`."""
        bad = f", less {len(self.skipped)} unreadable" if self.skipped else ""
        if self._of == "all" or self.how == "given":
            n = len(self) + len(self.skipped)
            return f"{n}, {'as given' if self.how == 'given' else 'all there are'}{bad}"
        ways = {
            "spread": f"spread evenly (seed {self.seed})",
            "first": "the first",
            "random": f"drawn at random (seed {self.seed})",
        }
        return f"{self._of}, {ways[self.how]}{bad}"

    @property
    def account(self) -> str:
        """What of a folder was taken, and what was not and why, in one line; empty if it is no folder."""
        return account(self.source, len(self), self.chosen, self.skipped)

    @property
    def identities(self) -> list[str]:
        """The `identity` of each example."""
        return [self.identity(i) for i in range(len(self))]

    def identity(self, place: int) -> str:
        """A text that is the same for equal examples of any source: the tokens, or the source's hash and the index.

        Images of a source without a hash, which a caller provided, are identified by the hash of their pixels.
        """
        if self._tokens:
            return " ".join(map(str, self.tokens(place)))
        if self._ready is not None or not self.source.hash:
            return hashlib.sha256(tensor_bytes(self.load(place))).hexdigest()
        return f"{self.source.hash} {self.numbers[place]}"

    def group(self, place: int) -> str:
        """What an example is a part of, such as the photograph that it is a crop of; empty if it is independent."""
        groups = getattr(self.source, "groups", ())
        return groups[self.numbers[place]] if groups and self._ready is None else ""

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "data": self.data, "data_hash": self.source.hash, "n": len(self), "chosen": self.chosen,
            "how": self.how, "seed": self.seed, "skipped": self.skipped, "left_out": left_out(self.source),
        }  # fmt: skip

    def fitted(self, site: Site) -> Site:
        """A copy of a site with as many positions as the longest text has."""
        if not self._tokens:
            return site
        length = max(len(self._tokens[i]) for i in self.numbers if i in self._tokens)
        shape = tuple(
            length if axis in ("position", "query", "key") else n
            for axis, n in zip(site.axes[1:], site.shape, strict=True)
        )
        return replace(site, shape=shape)

    # --- one by one ------------------------------------------------------------------------------

    def load(self, place: int) -> Tensor:
        """Load one example: an image in 0..1 (or as the model takes it, if it was given so), or a text's tokens.

        Raises:
            ValueError: if it cannot be read.
        """
        number = self.numbers[place]
        if self._ready is not None:
            return self._ready(number)
        if isinstance(self.source, ImageSource):
            return self._image(number)
        if number in self._bad:
            raise self._bad[number]
        return self._tokens[number]

    def tokens(self, place: int) -> list[int]:
        """The tokens of a text, as the model sees them."""
        return self.load(place).tolist()

    def picture(self, place: int) -> Image.Image:
        """An image as a picture to show, in its original size."""
        assert isinstance(self.source, ImageSource), "text has no picture"
        image = self.source.image(self.numbers[place])
        if isinstance(image, Tensor):
            if len(image) == 4:
                image = on_white(image)
            return to_image(image.expand(3, -1, -1) if len(image) == 1 else image[:3])
        return image.convert("RGB")

    def images(self) -> Float[Tensor, "example 3 y x"] | None:
        """All images in 0..1 with three channels, for figures; None for tokens and other channels."""
        spec = self.model.input
        if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
            return None
        rows = torch.stack([self.load(i) for i in range(len(self))])
        shown = spec.restore(rows) if self._ready is not None else rows
        return shown.expand(-1, 3, -1, -1) if spec.channels == 1 else shown

    # --- together --------------------------------------------------------------------------------

    def passes(self, places: range, size: int) -> Iterator[range]:
        """Cut a range of indices into runs of at most `size`, each of images of one size or texts of one length."""
        start = places.start
        while start < places.stop:
            stop = min(start + size, places.stop)
            own = self._size(start)
            # Consecutive ones only, so that results stay in order.
            stop = next((i for i in range(start, stop) if self._size(i) != own), stop)
            yield range(start, stop)
            start = stop

    def batches(self, size: int = BATCH, one_length: bool = False) -> Iterator[Batch]:
        """All examples in batches of at most `size`, grouped by length, so not in order (see `Batch.which`).

        Args:
            size: the most examples in a batch.
            one_length: put only texts of one length into a batch, as is always done if the model cannot be padded.

        Raises:
            ValueError: if an example cannot be read, or `size` is not positive.
        """
        if size < 1:
            raise ValueError(f"batch {size} must be at least 1")
        for places in self._together(size, one_length):
            yield self.batch(places)

    def _together(self, size: int, one_length: bool) -> list[Sequence[int]]:
        """The indices of the examples in each batch."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for place in range(len(self)):
            alike.setdefault(self._size(place), []).append(place)
        texts = isinstance(self.source, TextSource)
        if len(alike) > 1 and texts and not one_length and self.model.padding is not None:
            return [*group_by_length([len(self.load(i)) for i in range(len(self))], size)]
        return [part for places in alike.values() for part in _evenly(places, size)]

    def batch(self, places: Sequence[int]) -> Batch:
        """The examples at some indices, as one input of the model."""
        loaded = [self.load(i) for i in places]
        if isinstance(self.source, TextSource) and len({len(row) for row in loaded}) > 1:
            tokens, mask = self.model.pad(loaded)
            return Batch(tokens, mask, places)
        return Batch(self.joined(loaded), None, places)

    @property
    def inputs(self) -> Tensor:
        """All examples as one tensor, as the model takes them.

        Raises:
            ValueError: if texts differ in length.
        """
        lengths = {len(self.load(i)) for i in range(len(self))} if self._tokens else {0}
        if len(lengths) > 1:
            raise ValueError(
                f"texts of {self.data} have from {min(lengths)} to {max(lengths)} tokens: one tensor holds texts "
                "of one length (`batches` pads them)"
            )
        return self.joined([self.load(i) for i in range(len(self))])

    def joined(self, loaded: Sequence[Tensor]) -> Tensor:
        """Join examples that `load` returned, all of one size, into one input of the model."""
        stacked = torch.stack(list(loaded))
        spec = self.model.input
        if isinstance(spec, ImageInput) and self._ready is None:
            return spec.normalize(stacked)
        return stacked

    # --- reading ---------------------------------------------------------------------------------

    def _size(self, place: int) -> tuple[int, ...]:
        """What has to be equal for examples to be stacked into one tensor."""
        number = self.numbers[place]
        if self._ready is not None:
            return tuple(self._ready(number).shape)
        tokens = self._tokens.get(number)
        return () if tokens is None else tuple(tokens.shape)

    def _encode(self, skip_bad: bool) -> None:
        spec, source = self.model.input, self.source
        assert isinstance(spec, TokenInput), "checked when built"
        assert isinstance(source, TextSource), "called for text"
        for number in self.numbers:
            try:
                self._tokens[number] = encoded(spec, source.texts[number])
            except ValueError as error:
                name = source.names[number]
                self._bad[number] = ValueError(f"{name} of {source.spec}: {error}")
        if self._bad and not (skip_bad and len(self._bad) < len(self.numbers)):
            raise next(iter(self._bad.values()))

    def _image(self, number: int) -> Float[Tensor, "channel h w"]:
        spec, source = self.model.input, self.source
        assert isinstance(spec, ImageInput), "checked when built"
        assert isinstance(source, ImageSource), "called for images"
        image = source.image(number)
        if not isinstance(image, Tensor):
            return spec.load(image)
        if len(image) == 4 != spec.channels:  # opacity, as of a file, unless the model takes it
            image = on_white(image)
        if image.shape == (spec.channels, spec.height, spec.width):
            return image  # already of the model's size: it is not rounded to the 256 values of a picture
        if len(image) == 1:
            image = image.expand(3, -1, -1)
        if len(image) != 3 or spec.channels not in (1, 3):
            raise ValueError(
                f"{source.names[number]!r} has shape {tuple(image.shape)}: the model takes "
                f"{(spec.channels, spec.height, spec.width)}, other sizes only of 1 or 3 channels"
            )
        return spec.load(to_image(image))


def _evenly(places: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut into the fewest parts of at most `size`, all of about the same length."""
    n = -(-len(places) // size)
    edges = [len(places) * i // n for i in range(n + 1)]
    return [places[a:b] for a, b in itertools.pairwise(edges)]


def choose(pool: Sequence[int], n: int | None, how: How, seed: int) -> tuple[int, ...]:
    """Choose `n` numbers from a pool; they keep the pool's order.

    Raises:
        ValueError: if `n` is not positive, `how` is unknown, or the pool is empty.

    >>> choose(range(100), 4, "first", 0)
    (0, 1, 2, 3)
    >>> [n // 25 for n in choose(range(100), 4, "spread", 0)]
    [0, 1, 2, 3]
    """
    if how not in get_args(How):
        raise ValueError(f"how {how!r} is not one of {', '.join(get_args(How))}")
    if n is not None and n < 1:
        raise ValueError(f"limit {n} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    if not len(pool):
        raise ValueError("examples are empty: expected at least one to choose from")
    if n is None or n >= len(pool) or how == "given":
        return tuple(pool)
    if how == "first":
        return tuple(pool[:n])
    generator = np.random.default_rng(seed)
    if how == "random":
        return tuple(pool[i] for i in sorted(generator.choice(len(pool), n, replace=False)))
    # One at random from each stretch: a fixed stride would meet a single class in data whose classes alternate.
    edges = [len(pool) * i // n for i in range(n + 1)]
    return tuple(pool[int(generator.integers(a, b))] for a, b in itertools.pairwise(edges))


def encoded(spec: TokenInput, text: str | Sequence[int]) -> Int[Tensor, " position"]:
    """Encode a text as the model takes it: with `bos` in front, cut off at the model's context length.

    Texts that are given as tokens are taken as they are: whether they begin with `bos` is for the data to say.

    Raises:
        ValueError: if there is no token, or one is not in the vocabulary.
    """
    return spec.check(torch.tensor([whole(spec, text)[: spec.n_ctx]], dtype=torch.int64))[0]


def whole(spec: TokenInput, text: str | Sequence[int]) -> list[int]:
    """All tokens of a text, with `bos` in front and not cut off; see `encoded`."""
    tokens = list(text) if not isinstance(text, str) else spec.encode(text)
    if isinstance(text, str) and spec.bos is not None and tokens[:1] != [spec.bos]:
        return [spec.bos, *tokens]
    return tokens


def _check_names(names: Sequence[str], n: int) -> None:
    if len(names) != n:
        raise ValueError(f"names have {len(names)} entries: expected one for each of {n} examples")


def _check_kind(model: HookedModel, source: Source) -> None:
    wants = "images" if isinstance(model.input, ImageInput) else "tokens"
    if isinstance(model.input, ImageInput) != isinstance(source, ImageSource):
        raise ValueError(f"data {source.spec!r} does not fit: model {model.name} takes {wants}")
    if isinstance(model.input, ImageInput) and isinstance(source, ImageSource) and source.folder:
        model.input.check_channels()  # now: of each file it would look as if the file could not be read


def as_examples(
    model: HookedModel,
    examples: Examples | Tensor | Iterable[Tensor] | str,
    labels: Sequence[int] | None = None,
) -> Examples:
    """Make `Examples` of whatever a caller has: examples, tensors as the model takes them, or data by name.

    Raises:
        ValueError: if they do not fit the model, or there are more or fewer labels than examples.
    """
    if isinstance(examples, str):
        return Examples(model, examples, labels=labels)
    if not isinstance(examples, Examples):
        return Examples.given(model, examples, labels=labels)
    if labels is not None:
        if len(labels) != len(examples):
            raise ValueError(
                f"labels have {len(labels)} entries: expected one for each of {len(examples)} examples"
            )
        examples = copy(examples)  # the caller's examples keep their labels
        examples.labels = tuple(int(i) for i in labels)
    return examples
