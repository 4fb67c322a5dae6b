"""Texts of different lengths in one padded batch: how a model takes them, found by experiment.

Padding must not change what the model computes for a text. A causal model sees earlier tokens only and can simply
be padded on the right. A model with bidirectional attention needs an attention mask. Which is the case is not read
off a model's name or configuration: a few short texts are run alone and in a padded batch, and every site is
compared.
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
"""Where a shorter text is padded: after its end or before its start."""

Tokens = Int[Tensor, "text position"]
Mask = Bool[Tensor, "text position"]
"""True where a position holds a real token, False where it is padding."""

SiteTensors = Mapping[str, Tensor]
"""The tensors of all sites in one pass, by name, with the texts along the first axis."""

RunSites = Callable[[Tokens, Mapping[str, Tensor]], SiteTensors]
"""Runs a model on tokens and keyword arguments; returns the tensors of its sites."""

MASK = "attention_mask"
"""The keyword argument of Hugging Face's modules and TransformerLens bridges that marks the real tokens."""

_WIDTH = 16
"""Length of the longest text that is tried, in tokens."""

_EQUAL = 1e-5
"""The relative difference up to which two passes agree."""

_NOISE = 16
"""The rounding that padding may cause, in multiples of what batching a text with copies of itself causes."""

_MINUS_INFINITY = 1e30
"""Attention scores beyond this size stand for a masked position (float32's minimum, or -inf)."""

_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AssertionError)


@dataclass(frozen=True)
class Padding:
    """How a model takes texts of different lengths in one batch.

    Attributes:
        side: where shorter texts are padded; None if the model cannot be padded.
        needs_mask: whether the model must be given `attention_mask=`.
        why: what went wrong in each way that was tried, if there is no side.
    """

    side: Side | None
    needs_mask: bool = False
    why: str = ""

    @property
    def looks_ahead(self) -> bool:
        """Whether a position's result depends on later tokens unless a mask hides them: the model is not causal.

        Only then is a mask needed although the padding comes after the text.
        """
        return self.side == "right" and self.needs_mask

    def __str__(self) -> str:
        return f"padding on the {self.side}" + (f" with {MASK}=" if self.needs_mask else "")


# Tried in this order: without a mask before with one, and on the right before on the left.
_WAYS = (Padding("right"), Padding("right", needs_mask=True), Padding("left", needs_mask=True))


# --- batches -------------------------------------------------------------------------------------


def padded(
    rows: Sequence[Sequence[int]], side: Side = "right", filler: int = 0
) -> tuple[Tokens, Mask]:
    """Pad texts of different lengths into one batch; returns tokens and mask.

    Raises:
        ValueError: if there is no text, or one of them is empty.

    >>> tokens, mask = padded([[5, 6, 7], [8]])
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[True, True, True], [True, False, False]])
    """
    if not rows:
        raise ValueError("rows are empty: expected at least one text")
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


def group_by_length(lengths: Sequence[int], rows: int, most: int = 1024) -> list[list[int]]:
    """Group texts of similar length into batches, the shortest first; inside a batch they keep their order.

    A batch of very different lengths computes more padding than text; and on a CPU a batch of about 1024 tokens
    still stays in the cache (`benchmarks/padding.py`). No text is alone in a batch where that can be avoided, since
    resampling draws from the other texts of the batch.

    Args:
        lengths: the lengths of the texts, in tokens.
        rows: the most texts in a batch.
        most: the most tokens in a batch, padding included; exceeded where texts would be alone.

    Raises:
        ValueError: if `rows` or `most` is not positive.

    >>> group_by_length([3, 100, 4, 90], rows=32, most=200)
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
    # The last group may hold one text: it gets the longest of the group before, or joins it.
    if len(groups) > 1 and len(groups[-1]) == 1:
        if len(groups[-2]) > 2:
            groups[-1].insert(0, groups[-2].pop())
        elif rows > 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [sorted(group) for group in groups]


def unpadded(tokens: Tokens, mask: Mask | None = None) -> list[list[int]]:
    """The texts of a batch without their padding.

    >>> unpadded(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]]))
    [[1, 2], [3]]
    """
    if mask is None:
        return tokens.tolist()
    return [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]


def last_positions(mask: Mask) -> Int[Tensor, " text"]:
    """The position of each text's last real token.

    >>> last_positions(torch.tensor([[True, False], [True, True]])).tolist()
    [0, 1]
    """
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)


def check_mask(mask: Tensor, tokens: Tensor) -> None:
    """Raise TypeError or ValueError if a mask does not fit the tokens, or hides all of a text."""
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
    """Raise ValueError if a model does not take texts that are padded where a mask says."""
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


def find_padding(run: RunSites, spec: TokenInput) -> Padding:
    """Find how a model takes texts of different lengths, by running some alone and in a padded batch.

    A way of padding is right if two batches that differ only in the padding token agree at every site and every
    real token to 1e-5, and agree with the texts alone to 1e-5 or as closely as a text alone agrees with itself
    among copies (times 16). Differences are relative to the largest number of a row of units, where that is above 1.
    Texts of up to 16 tokens are tried: behaviour that only longer texts show is not seen.

    Args:
        run: runs the model and returns the tensors of all sites.
        spec: the model's input.
    """
    width = min(spec.n_ctx, _WIDTH)
    lengths = sorted({width, (width + 2) // 3, 1}, reverse=True)
    rows = [spec.example(1, seed=i)[0, :n] for i, n in enumerate(lengths)]
    try:
        alone = [run(row[None], {}) for row in rows]
        among = run(rows[0].expand(3, -1), {})
    except _FAILURES as error:
        return Padding(None, why=f"it does not run on texts of every length ({_first_line(error)})")
    # Matrix products of another batch size round differently: a text among two copies of itself shows by how much,
    # without any padding.
    noise = max(_deviation(among[name][1], alone[0][name][0]) for name in among)
    enough = max(_EQUAL, _NOISE * noise)
    trouble = []
    for way in _WAYS:
        try:
            why = _mismatch(run, way, rows, alone, spec, enough)
        except _FAILURES as error:
            why = _first_line(error)
        if not why:
            return way
        trouble.append(f"{way}: {why}")
    return Padding(None, why="; ".join(trouble))


def _mismatch(
    run: RunSites,
    way: Padding,
    rows: Sequence[Tensor],
    alone: Sequence[SiteTensors],
    spec: TokenInput,
    enough: float,
) -> str:
    """In words, the first site at which a way of padding changes a text; empty if there is none."""
    assert way.side is not None, "only ways that have a side are tried"
    found = []
    # Two padding tokens: a model that let padding through would give different numbers for them, even where the
    # tolerance against the texts alone has to be wide.
    for filler in (0, spec.n_vocab - 1):
        tokens, mask = padded([row.tolist() for row in rows], way.side, filler)
        found.append(run(tokens, {MASK: mask.to(tokens)} if way.needs_mask else {}))
    one, other = found
    for name in alone[0]:
        if any(name not in seen for seen in (*alone, *found)):
            return f"{name} is not computed for every text"
        if torch.isnan(one[name]).any() or torch.isnan(other[name]).any():
            return f"{name} has NaN"
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
    """Cut the padding off a text's tensor, along every axis of positions; None if the shapes differ in another way.

    Args:
        value: the site's tensor for one text in a padded batch.
        own: the site's tensor for the text alone.
        sizes: the number of positions of the batch and of the text.
        side: where the text is padded.
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
    """The largest difference, relative to the largest number of its row or to 1; NaN where one is NaN."""
    if found.numel() == 0:
        return 0.0
    a, b = found.double(), expected.double()
    # A masked attention score must be equal, but its size must not hide the differences of its row.
    usual = torch.where(b.abs() < _MINUS_INFINITY, b, 0.0)
    gap = (a - b).abs() / usual.abs().amax(-1, keepdim=True).clamp_min(1.0)
    return float(torch.where(a == b, 0.0, gap).max())


def _first_line(error: Exception) -> str:
    return (str(error.args[0] if error.args else "") or type(error).__name__).splitlines()[0]
