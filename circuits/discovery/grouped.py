"""Query heads that share keys or values, each with targets of its own: which heads share, and how one pass, or one
gradient, tells them apart.

Keys and values of a group of heads (grouped-query attention) are one tensor. To give the keys that one head reads
another input than those that its neighbours read, a pass has several rows for each set of edges, as many as heads
share: in the row of a head its keys and values are in the group's place. What heads read is then put together from
their rows, so that all rows of a set go on alike. This needs no more of a model than the sites of its keys, its values
and what its heads read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.hooks import Change
from circuits.models.paths.residual import Stream


@dataclass(frozen=True)
class SharedHeads:
    """The query heads of a layer in which some share keys or values.

    Attributes:
        keys: the group of each head's keys.
        values: that of its values.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]

    @classmethod
    def of(cls, stream: Stream, layer: int) -> SharedHeads | None:
        """The heads of a layer; None if none share anything.

        Raises:
            ValueError: if the layer's weights mix heads, so that what a head reads depends on other heads' keys.
        """
        heads = stream.heads_of(layer)
        keys, values = (
            tuple(stream.parts.group(letter, layer, h) for h in range(heads.stop - heads.start))
            for letter in ("K", "V")
        )
        made = cls(keys, values)
        if not made.letters:
            return None
        if stream.parts.mixes(layer):
            raise ValueError(
                f"kv head: layer {layer} of {stream.model.name} mixes the patterns of its heads by weights; expected "
                "kv group"
            )
        return made

    @property
    def letters(self) -> tuple[str, ...]:
        """Which of keys (`k`) and values (`v`) are shared."""
        both = {"k": self.keys, "v": self.values}
        return tuple(letter for letter, of in both.items() if len(set(of)) < len(of))

    def group(self, letter: str, head: int) -> int:
        """The place of a head's keys or values at their site."""
        return (self.keys if letter == "k" else self.values)[head]

    @cached_property
    def row(self) -> tuple[int, ...]:
        """The row of a set in which each head's keys and values are in the group's place.

        Heads that share are in different rows. Where other heads share keys than values, each head has its own row.

        >>> SharedHeads((0, 0, 1, 1), (0, 0, 1, 1)).row
        (0, 1, 0, 1)
        """
        if len(self.letters) == 2 and self.keys != self.values:
            return tuple(range(len(self.keys)))
        shared = self.keys if "k" in self.letters else self.values
        return tuple(shared[:h].count(group) for h, group in enumerate(shared))

    @property
    def rows(self) -> int:
        """How many rows a set needs."""
        return 1 + max(self.row)

    def joined(self, n_sets: int, rows: int) -> Change:
        """The change at what heads read that takes each head from its row, and gives it to all rows of its set.

        Args:
            n_sets: how many sets a pass has.
            rows: how many rows each of them has.
        """
        row, heads = torch.tensor(self.row), torch.arange(len(self.row))

        def change(value: Tensor) -> Tensor:
            sets = value.unflatten(
                0, (n_sets, rows, -1)
            )  # set, row, example, position, head, d_head
            one = sets.movedim(-2, 2)[:, row, heads].movedim(1, -2)
            return one[:, None].expand_as(sets).flatten(0, 2)

        return change

    def separated(
        self,
        read: Float[Tensor, "example position head d_head"],
        gradient: Float[Tensor, "example position head d_head"],
        shared: Mapping[str, Tensor],
    ) -> dict[str, Float[Tensor, "example position head d_head"]]:
        """The gradient at keys and values through each head alone.

        Args:
            read: what heads read, with its autograd history.
            gradient: the gradient there.
            shared: keys and values, by letter, as leaves of that history.
        """
        row = torch.tensor(self.row, device=read.device)
        found: dict[str, list[Tensor]] = {letter: [] for letter in shared}
        for number in range(self.rows):
            own = gradient * (row == number)[:, None]
            made = torch.autograd.grad(
                read, list(shared.values()), own, retain_graph=True, allow_unused=True
            )
            for (letter, value), slope in zip(shared.items(), made, strict=True):
                found[letter].append(torch.zeros_like(value) if slope is None else slope)
        return {
            letter: torch.stack(
                [slopes[self.row[h]][..., self.group(letter, h), :] for h in range(len(self.row))],
                -2,
            )
            for letter, slopes in found.items()
        }
