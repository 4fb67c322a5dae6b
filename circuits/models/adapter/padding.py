"""Texts of different lengths in one batch: how a model takes them, found by trying.

A batch has one width, so that shorter texts are filled up; what fills them must not change what the model
computes for them. A causal model looks only back and needs nothing but the filling at the end. One that looks
both ways must be told what to leave out. Which is the case is not read off a model's name or configuration: a few
short texts are run alone and in a padded batch, and every site is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from circuits.models.adapter.inputs import TokenInput

Side = Literal["right", "left"]
"""Where a shorter text is filled up: behind its end or before its start."""

Tokens = Int[Tensor, "text position"]
Mask = Bool[Tensor, "text position"]
"""True where a real token is, False where a text was filled up."""

Seen = Mapping[str, Tensor]
"""What every site holds in one pass, by name, with the texts along the first axis."""

See = Callable[[Tokens, Mapping[str, Tensor]], Seen]
"""Runs a model on tokens and further keyword arguments."""

MASK = "attention_mask"
"""The keyword by which Hugging Face's modules and TransformerLens bridges are told which tokens are real."""

_WIDTH = 16
"""Tokens of the longest text that is tried."""

_EQUAL = 1e-5
_NOISE = 16
"""How many times the difference between a text alone and among copies of itself is still rounding."""

_MINUS_INFINITY = 1e30
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AssertionError)


@dataclass(frozen=True)
class Padding:
    """How a model takes texts of different lengths in one batch.

    Attributes:
        side: where shorter texts are filled up; None if the model does not take them at all.
        told: whether the model must be told which tokens are real, by `attention_mask=`.
        why: what went wrong in each way that was tried, if there is no side.
    """

    side: Side | None
    told: bool = False
    why: str = ""

    @property
    def looks_ahead(self) -> bool:
        """Whether what comes later in a text changes what comes before, unless the model is told to hide it."""
        return self.side == "right" and self.told

    def __str__(self) -> str:
        return f"padding on the {self.side}" + (f" with {MASK}=" if self.told else "")


_WAYS = (Padding("right"), Padding("right", told=True), Padding("left", told=True))


# --- batches -------------------------------------------------------------------------------------


def padded(
    rows: Sequence[Sequence[int]], side: Side = "right", filler: int = 0
) -> tuple[Tokens, Mask]:
    """Texts of different lengths as one batch, and where its real tokens are.

    Raises:
        ValueError: if there is no text, or one of them is empty.

    >>> tokens, mask = padded([[5, 6, 7], [8]])
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[True, True, True], [True, False, False]])
    """
    if not rows:
        raise ValueError("rows name no text: expected at least one")
    empty = next((i for i, row in enumerate(rows) if len(row) == 0), None)
    if empty is not None:
        raise ValueError(f"text {empty} of rows is empty: expected at least one token")
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, real] = torch.as_tensor(row, dtype=torch.int64, device="cpu")
        mask[i, real] = True
    return tokens, mask


def grouped(lengths: Sequence[int], rows: int, most: int = 1024) -> list[list[int]]:
    """Which texts to run together: those of similar length, the shortest first; in a batch, in their order.

    A batch of very different lengths computes more padding than text; on a processor one of about 1024 tokens also
    stays in its cache (`benchmarks/padding.py`). No text is alone if it can have company, which is what resampling
    needs.

    Args:
        lengths: of the texts, in tokens.
        rows: the most texts in a batch.
        most: the most tokens in a batch, filling counted; more where texts would be alone.

    Raises:
        ValueError: if `rows` or `most` is not positive.

    >>> grouped([3, 100, 4, 90], rows=32, most=200)
    [[0, 2], [1, 3]]
    """
    if min(rows, most) < 1:
        raise ValueError(f"rows {rows} and most {most} must be at least 1")
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        size = len(groups[-1]) + 1 if groups else 0
        if not groups or size > rows or (size > 2 and lengths[i] * size > most):
            groups.append([])
        groups[-1].append(i)
    if len(groups) > 1 and len(groups[-1]) == 1:
        if len(groups[-2]) > 2:
            groups[-1].insert(0, groups[-2].pop())
        elif rows > 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [sorted(group) for group in groups]


def unpadded(tokens: Tokens, mask: Mask | None = None) -> list[list[int]]:
    """The texts of a batch without what fills them up.

    >>> unpadded(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]]))
    [[1, 2], [3]]
    """
    if mask is None:
        return tokens.tolist()
    return [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]


def last_positions(mask: Mask) -> Int[Tensor, " text"]:
    """Where each text's last real token is.

    >>> last_positions(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 1]
    """
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def check_mask(mask: Tensor, tokens: Tensor) -> None:
    """Raise TypeError or ValueError if a mask does not say of each token whether it is real."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask of type {mask.dtype} must be torch.bool: True where a real token is")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit inputs of shape {tuple(tokens.shape)}"
        )
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask hides all of text {empty[0]}: expected at least one real token")


def check_side(mask: Mask, padding: Padding, name: str) -> None:
    """Raise ValueError if a model does not take texts that are filled up where a mask says."""
    if padding.side is None:
        raise ValueError(
            f"texts differ in length, but {name} takes only texts of one length in a batch ({padding.why})"
        )
    places = torch.arange(mask.shape[1], device=mask.device)
    first = 0 if padding.side == "right" else mask.shape[1] - mask.sum(1, keepdim=True)
    real = (places >= first) & (places < first + mask.sum(1, keepdim=True))
    wrong = (real != mask).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"mask of text {wrong[0]} hides tokens elsewhere than on the {padding.side}, where {name} is padded"
        )


# --- trying --------------------------------------------------------------------------------------


def find_padding(see: See, spec: TokenInput) -> Padding:
    """How a model takes texts of different lengths, found by running some alone and in a padded batch.

    A way is right if two batches that differ only in the token that fills them agree at every site to 1e-5
    wherever a real token is, and agree with the texts alone as closely as a text alone agrees with itself among
    copies, or to 1e-5. Differences are relative to the largest number of a row of units, where that is above 1.
    Texts of up to 16 tokens are tried: what a model does only with longer ones is not seen.

    Args:
        see: runs the model and returns what all of its sites hold.
        spec: what it takes.
    """
    width = min(spec.n_ctx, _WIDTH)
    lengths = sorted({width, (width + 2) // 3, 1}, reverse=True)
    rows = [spec.example(1, seed=i)[0, :n] for i, n in enumerate(lengths)]
    try:
        alone = [see(row[None], {}) for row in rows]
        among = see(rows[0].expand(3, -1), {})
    except _FAILURES as error:
        return Padding(None, why=f"it does not run on texts of every length ({_first_line(error)})")
    noise = max(_deviation(among[name][1], alone[0][name][0]) for name in among)
    enough = max(_EQUAL, _NOISE * noise)
    trouble = []
    for way in _WAYS:
        try:
            why = _trouble(see, way, rows, alone, spec, enough)
        except _FAILURES as error:
            why = _first_line(error)
        if not why:
            return way
        trouble.append(f"{way}: {why}")
    return Padding(None, why="; ".join(trouble))


def _trouble(
    see: See,
    way: Padding,
    rows: Sequence[Tensor],
    alone: Sequence[Seen],
    spec: TokenInput,
    enough: float,
) -> str:
    """What is wrong with a way of padding; nothing if the numbers are those of the texts alone."""
    assert way.side is not None, "only ways that have a side are tried"
    found = []
    for filler in (0, spec.n_vocab - 1):
        tokens, mask = padded([row.tolist() for row in rows], way.side, filler)
        found.append(see(tokens, {MASK: mask.to(tokens)} if way.told else {}))
    one, other = found
    for name in alone[0]:
        if any(name not in seen for seen in (*alone, *found)):
            return f"{name} is not reached by every text"
        if torch.isnan(one[name]).any() or torch.isnan(other[name]).any():
            return f"{name} is not a number somewhere"
        for i, row in enumerate(rows):
            own = alone[i][name][0]
            sizes = tokens.shape[1], len(row)
            real = _real(one[name][i], own, sizes, way.side)
            again = _real(other[name][i], own, sizes, way.side)
            if real is None or again is None:
                return f"{name} has another shape"
            if not (_deviation(again, real) <= _EQUAL and _deviation(real, own) <= enough):
                return f"{name} changes"
    return ""


def _real(value: Tensor, own: Tensor, sizes: tuple[int, int], side: Side) -> Tensor | None:
    """Of a padded text's tensor the part that the text alone has; None if other axes than positions differ.

    Args:
        value: of one text in a padded batch.
        own: of the text alone.
        sizes: how many positions the batch and the text have.
        side: where the text is filled up.
    """
    if value.ndim != own.ndim:
        return None
    for axis, both in enumerate(zip(value.shape, own.shape, strict=True)):
        if both == sizes:
            start = 0 if side == "right" else sizes[0] - sizes[1]
            value = value.narrow(axis, start, sizes[1])
        elif both[0] != both[1]:
            return None
    return value


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number of its row or 1; NaN where one is NaN."""
    if found.numel() == 0:
        return 0.0
    a, b = found.double(), expected.double()
    # what stands for minus infinity in attention scores is equal or not, but has no scale
    usual = torch.where(b.abs() < _MINUS_INFINITY, b, 0.0)
    gap = (a - b).abs() / usual.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return float(torch.where(a == b, 0.0, gap).max())


def _first_line(error: Exception) -> str:
    return (str(error.args[0] if error.args else "") or type(error).__name__).splitlines()[0]
