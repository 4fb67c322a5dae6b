"""What the senders of a transformer write in another run less what they write in this one, and weighted sums of it.

A receiver reads the sum of all that was written before it. If w is 1 for senders that are patched and 0 for the others,
the change of what it reads is the sum of w times each sender's change c; with the sum C of all changes it is also
C - sum (1 - w) c. Of the two the one with fewer terms is computed, so that a circuit of a few edges among a hundred
thousand costs little more than a pass. The changes lie in one block of memory: a sum over hundreds of senders, for all
receivers at a site, is one product of matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.models.paths.parts import PartsChange
from circuits.models.paths.residual import Stream


class Written:
    """The changes of one pass, by site, each for all sets of senders that are patched in that pass.

    Args:
        stream: the model's residual stream.
        sites: the sites of all senders that are replaced in the pass.
    """

    def __init__(self, stream: Stream, sites: Collection[str]) -> None:
        self._columns: dict[str, list[int]] = {}
        for i, sender in enumerate(stream.senders):
            if sender.kind not in ("bias", "part", "rest"):
                site = stream.output_site(sender)
                if site in sites:
                    self._columns.setdefault(site, []).append(i)
        # The row of each sender in a block.
        self._row = torch.full((len(stream.senders),), -1)
        known = [i for columns in self._columns.values() for i in columns]
        self._row[known] = torch.arange(len(known))
        self._changes: dict[str, Tensor | PartsChange] = {}
        self._blocks: dict[int, _Block] = {}

    def __contains__(self, site: str) -> bool:
        return site in self._changes

    def put(self, site: str, change: Tensor | PartsChange) -> None:
        """Note the change of the senders at a site: of parts, or set x sender x example x position x d_model.

        The first axis has length 1 where all sets have the same.
        """
        if isinstance(change, Tensor) and not change.requires_grad:
            n_sets = len(change)
            if n_sets not in self._blocks:
                self._blocks[n_sets] = _Block(change, int(self._row.max()) + 1)
            change = self._blocks[n_sets].put(self._rows(site), change)
        self._changes[site] = change

    def drop(self, site: str) -> None:
        """Forget a site's change."""
        change = self._changes.pop(site, None)
        if isinstance(change, Tensor) and not change.requires_grad:
            self._blocks[len(change)].drop(self._rows(site))

    def _rows(self, site: str) -> Int[Tensor, " sender"]:
        """The rows of a site's senders, which follow one another."""
        return self._row[self._columns[site]]

    def of(self, site: str, index: Int[Tensor, " set"]) -> Tensor | PartsChange:
        """The change at a site, of some sets."""
        change = self._changes[site]
        if isinstance(change, Tensor):
            return rows_of(change, index)
        rest = None if change.rest is None else rows_of(change.rest, index)
        return PartsChange(rows_of(change.activations, index), change.directions, rest)

    def mixed(
        self,
        sites: Sequence[str],
        off: Float[Tensor, "set sender receiver"],
        index: Int[Tensor, " set"],
    ) -> Float[Tensor, "set receiver example position d_model"] | None:
        """The change that the senders at some sites make together, for each receiver; None if they make none.

        Args:
            sites: sites whose changes are tensors.
            off: how much of each of the stream's senders is replaced, in each set.
            index: the numbers of these sets in the pass.
        """
        changes = {site: self._changes[site] for site in sites if site in self._changes}
        columns = [i for site in changes for i in self._columns[site]]
        if off.requires_grad or any(
            isinstance(c, Tensor) and c.requires_grad for c in changes.values()
        ):
            return self._summed(changes, off, index)
        weights = off[:, columns]
        if not weights.any():
            return None
        # Where most senders are replaced, the sum of all less that of the others has fewer terms.
        most = weights.sum(1) * 2 > len(columns)
        signed = off - most[:, None].to(off)
        made = None
        for n_sets, block in self._blocks.items():
            here = [s for s, change in changes.items() if len(change) == n_sets]  # type: ignore[arg-type]
            own = sorted(i for site in here for i in self._columns[site])
            if own:
                part = block.mixed(self._row[own], signed[:, own], most, index)
                made = part if made is None else made.add_(part)
        return made

    def _summed(
        self,
        changes: dict[str, Tensor | PartsChange],
        off: Float[Tensor, "set sender receiver"],
        index: Int[Tensor, " set"],
    ) -> Tensor | None:
        """The same, site by site, so that gradients lead back to `off` and to the changes."""
        made: Tensor | None = None
        for site in changes:
            change = self.of(site, index)
            assert isinstance(change, Tensor), "sites of tensors"
            own = torch.einsum("suepm,suk->skepm", change, off[:, self._columns[site]].to(change))
            made = own if made is None else made + own
        return made


class _Block:
    """The changes of senders as one tensor, set x sender x example x position x d_model; rows are filled as they come.

    Args:
        like: a change, for its shape and type.
        n: the number of senders.
    """

    def __init__(self, like: Tensor, n: int) -> None:
        # Not set to zero: memory that is never written costs nothing.
        self.values = like.new_empty(len(like), n, *like.shape[2:])
        self._total: Tensor | None = None
        self._summed = torch.zeros(n, dtype=torch.bool)

    def put(self, rows: Int[Tensor, " sender"], change: Tensor) -> Tensor:
        """Fill the rows of some senders, which follow one another; returns them."""
        own = self.values[:, int(rows[0]) : int(rows[-1]) + 1]
        own.copy_(change)
        return own

    def drop(self, rows: Int[Tensor, " sender"]) -> None:
        """Note that rows will be filled again."""
        if self._summed[rows].any():
            self._total, self._summed = None, torch.zeros_like(self._summed)

    def mixed(
        self,
        rows: Int[Tensor, " sender"],
        signed: Float[Tensor, "set sender receiver"],
        most: Bool[Tensor, "set receiver"],
        index: Int[Tensor, " set"],
    ) -> Float[Tensor, "set receiver example position d_model"]:
        """The weighted sum of some senders' changes, and of all of them where `most` says so."""
        own = signed.to(self.values)
        made = self.values.new_zeros(len(own), own.shape[2], *self.values.shape[2:])
        flat, used = made.flatten(2), (signed != 0).any(2)
        if len(self.values) == 1:
            if used.any():
                some = self._chosen(rows, used.any(0))
                weights = own[:, some].transpose(1, 2).flatten(0, 1)
                torch.mm(weights, self._of(0, rows[some]), out=flat.view(len(weights), -1))
        else:
            for i, one in enumerate(index.tolist()):
                if used[i].any():
                    some = self._chosen(rows, used[i])
                    torch.mm(own[i, some].T, self._of(one, rows[some]), out=flat[i])
        if most.any():
            total = self._sum(rows)
            for i, k in most.nonzero().tolist():
                made[i, k] += total[0 if len(total) == 1 else int(index[i])]
        return made

    @staticmethod
    def _chosen(
        rows: Int[Tensor, " sender"], used: Bool[Tensor, " sender"]
    ) -> Bool[Tensor, " sender"]:
        """The rows that are read: those that are used or, if they are many, all, so that none has to be copied."""
        together = int(rows[-1] - rows[0]) + 1 == len(rows)
        return torch.ones_like(used) if together and 4 * int(used.sum()) > len(used) else used

    def _of(self, number: int, rows: Int[Tensor, " sender"]) -> Float[Tensor, "sender number"]:
        """The changes of some senders in a set; copied only if they do not follow one another."""
        first, last = int(rows[0]), int(rows[-1])
        own = self.values[number]
        if last - first + 1 == len(rows):
            return own[first : last + 1].flatten(1)
        return own[rows].flatten(1)

    def _sum(self, rows: Int[Tensor, " sender"]) -> Float[Tensor, "set example position d_model"]:
        """The sum over some senders; what was summed for an earlier receiver is not summed again."""
        wanted = torch.zeros_like(self._summed)
        wanted[rows] = True
        if self._total is None or (self._summed & ~wanted).any():
            self._total, self._summed = None, torch.zeros_like(self._summed)
        for i in (wanted & ~self._summed).nonzero()[:, 0].tolist():
            row = self.values[:, i]
            self._total = row.clone() if self._total is None else self._total.add_(row)
        self._summed |= wanted
        assert self._total is not None, "there are senders"
        return self._total


def rows_of(value: Tensor, index: Int[Tensor, " set"]) -> Tensor:
    """Some sets of a tensor; a tensor that is the same for all of them stays one."""
    if len(value) == 1 or torch.equal(index, torch.arange(len(value))):
        return value
    return value[index]
