"""What a model put out where a task counts: the numbers that metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where a batch of a task is read, and what is wanted there.

    A place is one counted position of one row of the batch. An answer of one token is looked up at each place of its
    example. Answers of several tokens have a row each, into which all tokens of the answer but the last are fed, and
    a place for each of their tokens.

    Attributes:
        row: the row of the batch that a place belongs to.
        position: where in that row.
        example: the example, counted within the batch, that a place belongs to.
        wanted: the answers at each place, -1 where there are fewer than the most; no column if there are none.
        against: what they are compared with, likewise.
        side: for answers of several tokens: which row is an answer (1) and which is compared with (0), by row; empty
            where answers have one token.
        n_examples: how many examples the batch has.
    """

    row: Int[Tensor, " place"]
    position: Int[Tensor, " place"]
    example: Int[Tensor, " place"]
    wanted: Int[Tensor, "place answer"]
    against: Int[Tensor, "place other"]
    side: Int[Tensor, " row"]
    n_examples: int

    @property
    def fed(self) -> bool:
        """Whether answers have several tokens, which are fed in."""
        return len(self.side) > 0


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's output at the places of a batch.

    Attributes:
        places: where.
        logits: what was put out there, in float64.
        tensors: the tensors of other sites that were asked for, whole.
        mask: True where a token is, for texts that were padded.
        output: the model's own output, whole, for metrics that a person writes.
    """

    places: Places
    logits: Float[Tensor, "place output"]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Bool[Tensor, "row position"] | None = None
    output: Tensor | None = None

    @cached_property
    def log_p(self) -> Float[Tensor, "place output"]:
        """Log-probabilities at the places, in nats."""
        return self.logits.log_softmax(-1)

    def by_example(self, values: Float[Tensor, " place"]) -> Float[Tensor, " example"]:
        """The mean over each example's places; of answers that are fed in, those of the answers that are right."""
        where, n = self.places.example, self.places.n_examples
        counts = torch.ones_like(values)
        if self.places.fed:
            counts = (self.places.side[self.places.row] == 1).to(values)
        total = values.new_zeros(n).index_add(0, where, values * counts)
        return total / values.new_zeros(n).index_add(0, where, counts)

    def log_p_of(self, which: str) -> Float[Tensor, " example"]:
        """Log-probability of a set (`wanted` or `against`): of any of its members, the mean over counted positions.

        Of answers of several tokens: the sum over their tokens, each given those before it.
        """
        ids: Tensor = getattr(self.places, which)
        if not self.places.fed:
            return self.by_example(_masked(self.log_p, ids).logsumexp(-1))
        own = self.log_p.gather(1, ids.clamp_min(0))[:, 0]
        n_rows = len(self.places.side)
        rows = own.new_zeros(n_rows).index_add(0, self.places.row, own)
        of_row = self.places.row.new_zeros(n_rows).index_put(
            (self.places.row,), self.places.example
        )
        mine = self.places.side == (1 if which == "wanted" else 0)
        found = []
        for example in range(self.places.n_examples):
            found.append(rows[mine & (of_row == example)].logsumexp(0))
        return torch.stack(found)

    def p_of(self, which: str) -> Float[Tensor, " example"]:
        """Probability of a set, the mean over counted positions; see `log_p_of`."""
        if self.places.fed:
            return self.log_p_of(which).exp()
        ids: Tensor = getattr(self.places, which)
        return self.by_example(_masked(self.log_p, ids).logsumexp(-1).exp())

    def logit_of(self, which: str) -> Float[Tensor, " example"]:
        """The mean logit of a set (`wanted` or `against`), then over counted positions."""
        ids: Tensor = getattr(self.places, which)
        there = (ids >= 0).to(self.logits)
        own = self.logits.gather(1, ids.clamp_min(0)) * there
        return self.by_example(own.sum(-1) / there.sum(-1))


def _masked(values: Tensor, ids: Tensor) -> Tensor:
    """The values at some outputs; minus infinity where there is no output (-1)."""
    return values.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
