"""Attention knockout between positions, as an edit of attention patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.edits.activations import UnitsEdit
from circuits.edits.records import Edit, Substitutes
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import attention_patterns
from circuits.units import Site, Unit, Units


@dataclass(frozen=True, eq=False)
class KnockOut(
    UnitsEdit,
    operator="knock_out",
    about="Take heads' attention from some positions to some others away.",
):
    """Remove the attention of heads from some positions to other positions.

    Geva et al. 2023, "Dissecting Recall of Factual Associations": attention knockout.

    With `renormalise` the remaining attention of a row is scaled up to the row's former sum, which is the same as
    setting the removed scores to minus infinity before the softmax. Without it the head reads that much less.

    Attributes:
        units: heads, as units of `blocks.N.attn.hook_pattern`.
        queries: the positions that attend, negative from the end; all if None. With attention in windows, those of
            each window.
        keys: the positions that are no longer attended to, counted likewise; all if None.
        renormalise: whether the rest of each row is scaled up; it is then an error if nothing is left of a row.
        at: not used.
    """

    queries: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    renormalise: bool = False

    def _check_values(self) -> None:
        if self.at is not None:
            raise ValueError(
                f"at {self.at} does not apply to edit 'knock_out': expected queries, keys or both"
            )
        for name in ("queries", "keys"):
            if getattr(self, name) == ():
                raise ValueError(
                    f"{name} of edit 'knock_out' are empty: expected at least one position"
                )
        if self.keys is None and self.renormalise:
            raise ValueError("edit 'knock_out' leaves no key to renormalise: expected keys")

    def checked(self, model: HookedModel) -> KnockOut:
        site, known = model.site(self.units.site), attention_patterns(model.sites)
        if site not in known:
            # Some bridges show a pattern only after attention is done, where editing it changes nothing.
            names = ", ".join(s.name for s in known[:3]) or "none in this model"
            raise ValueError(
                f"site {site.name} of edit 'knock_out' is not an attention pattern that the model reads: expected one "
                f"of {names}"
            )
        longest = model.input.n_ctx if isinstance(model.input, TokenInput) else site.shape[-1]
        for name in ("queries", "keys"):
            for index in getattr(self, name) or ():
                if not -longest <= index < longest:
                    raise ValueError(
                        f"position {index} in {name} of edit 'knock_out' is out of range: expected {-longest} to "
                        f"{longest - 1}"
                    )
        made = super().checked(model)
        assert isinstance(made, KnockOut)
        return made

    def twin(self, model: HookedModel, substitutes: Substitutes) -> Edit | None:
        """The same edit of other heads, or of the same heads with other keys if there are too few heads."""
        made = super().twin(model, substitutes)
        if made is not None or self.keys is None:
            return made
        free = _other_positions(self.keys, self.queries or ())
        if len(free) < len(self.keys):
            return None
        drawn = torch.randperm(len(free), generator=substitutes.generator)[: len(self.keys)]
        return replace(self, keys=tuple(sorted(free[i] for i in drawn.tolist())))

    @property
    def placed(self) -> bool:
        return self.queries is not None or self.keys is not None

    def new(self, site: Site, own: Tensor) -> Tensor:
        # Windows, where there are some, come between heads and queries: each loses the same.
        queries = self._places("queries", own.shape[-2])
        keys = self._places("keys", own.shape[-1])
        made = own.clone()
        rows = made[..., queries, :]
        # The sum of a row is 1 after a softmax, but another edit of the pattern may have changed it: what there was is
        # given back.
        before = rows.sum(-1, keepdim=True)
        gone = rows[..., keys].any(-1, keepdim=True)
        rows[..., keys] = 0
        if self.renormalise:
            left = rows.sum(-1, keepdim=True)
            self._check_left(gone & (left == 0), queries)
            # Rows that lose nothing stay as they are, bit for bit: scaling them by 1 might round.
            rows = torch.where(gone, rows * (before / left.where(gone, left.new_ones(()))), rows)
        # Indexing with a tensor copied the rows, so that they have to be put back.
        made[..., queries, :] = rows
        return made

    def _places(self, name: str, length: int) -> Tensor:
        """The queries or keys as positions of a sequence of this length."""
        given = getattr(self, name)
        for index in given or ():
            if not -length <= index < length:
                raise ValueError(
                    f"position {index} in {name} of edit '{self}' is out of range: expected {-length} to {length - 1}"
                )
        # Modulo the length: -1 is the last position of this text, whatever its length.
        return torch.tensor([i % length for i in given]) if given else torch.arange(length)

    def _check_left(self, empty: Tensor, queries: Tensor) -> None:
        if empty.any():
            _, head, *_, query, _ = empty.nonzero()[0].tolist()
            # `empty` counts among the edited heads; the message names the head as it is numbered in the model.
            heads = range(empty.shape[1]) if self.units.indices is None else self.units.indices
            raise ValueError(
                f"queries of edit '{self}': position {int(queries[query])} of head {heads[head]} keeps no key, so that "
                "nothing is left to renormalise"
            )


def _other_positions(keys: Sequence[int], queries: Sequence[int]) -> list[int]:
    """The positions that a twin may use as keys: those between the named ones and the end they count from."""
    # Texts have different lengths, so a position is known to exist only between the named ones and that end.
    named = [*keys, *queries]
    # Keys 0 and 3 with query 5 show that positions 0 to 5 exist, and leave 1, 2, 4 and 5 to a twin; keys -1 and -2
    # leave nothing. Where some count from the start and others from the end, nothing is known of what lies between.
    if min(named) >= 0:
        reach: Iterable[int] = range(max(named) + 1)
    elif max(named) < 0:
        reach = range(min(named), 0)
    else:
        return []
    return [i for i in reach if i not in keys]


def knock_out(
    heads: Units | Unit | str | Iterable[Unit | str],
    queries: Iterable[int] | None = None,
    keys: Iterable[int] | None = None,
    renormalise: bool = False,
) -> KnockOut:
    """The edit that removes heads' attention from some positions to other positions.

    Args:
        heads: units of one layer's `blocks.N.attn.hook_pattern`; `SITE:*` for all of them.
        queries: the positions that attend, negative from the end; all if None.
        keys: the positions that are no longer attended to, negative from the end; all if None.
        renormalise: whether the rest of each row is scaled up to the row's former sum.

    Raises:
        ValueError: if units are of several sites, or a list of positions is empty.

    >>> str(knock_out("blocks.1.attn.hook_pattern:0", queries=[5], keys=range(3)))
    'knock_out units=blocks.1.attn.hook_pattern:0 queries=5 keys=0,1,2'
    """
    spans = {
        name: None if given is None else tuple(given)
        for name, given in (("queries", queries), ("keys", keys))
    }
    return KnockOut(Units.of(heads), **spans, renormalise=renormalise)
