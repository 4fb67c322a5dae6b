"""A model's output at the positions that a task counts: what metrics are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where a batch of a task is read, and which answers are looked up there.

    A place is one counted position of one row of the batch. An answer of one token is looked up at each place of its
    example. An answer of several tokens has a row of its own, into which all of its tokens but the last are fed, and
    one place for each of its tokens.

    Attributes:
        row: the row of the batch that each place belongs to.
        position: the position in that row.
        example: the example that each place belongs to, as an index into the batch.
        wanted: the answers at each place, filled up with -1; no columns if there are none.
        against: the wrong answers at each place, in the same form.
        side: for answers of several tokens, 1 for each row that holds an answer and 0 for each that holds a wrong
            one; empty if all answers have one token.
        n_examples: the number of examples in the batch.
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
        """Whether answers have several tokens, which are fed in as rows of their own."""
        return len(self.side) > 0


@dataclass(frozen=True, eq=False)
class Reading:
    """A model's output at the places of a batch.

    Attributes:
        places: where the output was read.
        logits: the output at those places, in float64.
        tensors: the whole tensors of other sites that were asked for.
        mask: True at tokens, False at padding, for texts that were padded.
        output: the model's whole output, for metrics that users write themselves.
    """

    places: Places
    logits: Float[Tensor, "place output"]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Bool[Tensor, "row position"] | None = None
    output: Tensor | None = None

    @cached_property
    def log_p(self) -> Float[Tensor, "place output"]:
        """Log-probabilities at the places (a log-softmax over the model's outputs), in nats."""
        return self.logits.log_softmax(-1)

    def by_example(self, values: Float[Tensor, " place"]) -> Float[Tensor, " example"]:
        """The mean over each example's places; rows that feed in a wrong answer are left out."""
        where, n = self.places.example, self.places.n_examples
        counts = torch.ones_like(values)
        if self.places.fed:
            counts = (self.places.side[self.places.row] == 1).to(values)
        total = values.new_zeros(n).index_add(0, where, values * counts)
        return total / values.new_zeros(n).index_add(0, where, counts)

    def log_p_of(self, which: str) -> Float[Tensor, " example"]:
        """Log-probability that any answer of a set (`wanted` or `against`) comes, averaged over counted positions.

        That of an answer of several tokens is the sum over its tokens, each given those before it.
        """
        # Answers of one set exclude each other, so log p(any) is the log of the summed probabilities: logsumexp.
        ids: Tensor = getattr(self.places, which)
        if not self.places.fed:
            return self.by_example(_gathered(self.log_p, ids).logsumexp(-1))
        # Chain rule: the log-probability of a row is the sum over its places, one for each token.
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
        """Probability of a set (see `log_p_of`), averaged over counted positions."""
        if self.places.fed:
            return self.log_p_of(which).exp()
        ids: Tensor = getattr(self.places, which)
        return self.by_example(_gathered(self.log_p, ids).logsumexp(-1).exp())

    def logit_of(self, which: str) -> Float[Tensor, " example"]:
        """The logit of a set (`wanted` or `against`), averaged over its members and then over counted positions."""
        # -1 marks an empty column: it is read at output 0, which gather accepts, and multiplied by zero.
        ids: Tensor = getattr(self.places, which)
        there = (ids >= 0).to(self.logits)
        own = self.logits.gather(1, ids.clamp_min(0)) * there
        return self.by_example(own.sum(-1) / there.sum(-1))


def _gathered(values: Tensor, ids: Tensor) -> Tensor:
    """Values at some outputs; minus infinity, which adds nothing to a logsumexp, where the index is -1."""
    return values.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
