"""Attention knocked out between spans of positions, as an edit of attention patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.edits.activations import UnitsEdit
from circuits.edits.records import Edit, Others
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
    """Take away the attention that heads pay from some positions to others.

    Geva et al. 2023, "Dissecting Recall of Factual Associations": attention knockout.

    Renormalised, the attention that is left of a row is scaled to the row's former sum, which equals scores of minus
    infinity before the softmax; otherwise it stays as it is, and the head reads that much less.

    Attributes:
        units: heads, as units of `blocks.N.attn.hook_pattern`.
        queries: the positions that attend, negative from the end; all if None.
        keys: the positions that are no longer attended to, likewise.
        renormalise: whether the rest of each row is scaled up. A row that has nothing left is then an error.
        at: not used.
    """

    queries: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    renormalise: bool = False

    def _check_values(self) -> None:
        if self.at is not None:
            raise ValueError(
                "at of edit 'knock_out' has no meaning: expected queries, keys or both"
            )
        for name in ("queries", "keys"):
            if getattr(self, name) == ():
                raise ValueError(
                    f"{name} of edit 'knock_out' name no position: expected at least one"
                )
        if self.keys is None and self.renormalise:
            raise ValueError("edit 'knock_out' leaves no key to renormalise: expected keys")

    def checked(self, model: HookedModel) -> KnockOut:
        site, known = model.site(self.units.site), attention_patterns(model.sites)
        if site not in known:
            names = ", ".join(s.name for s in known[:3]) or "none in this model"
            raise ValueError(
                f"site {site.name} of edit 'knock_out' holds no attention pattern that is read behind it: expected one "
                f"of {names}"
            )
        longest = model.input.n_ctx if isinstance(model.input, TokenInput) else site.shape[-1]
        for name in ("queries", "keys"):
            for index in getattr(self, name) or ():
                if not -longest <= index < longest:
                    raise ValueError(
                        f"position {index} among {name} of edit 'knock_out' must be from {-longest} to {longest - 1}"
                    )
        made = super().checked(model)
        assert isinstance(made, KnockOut)
        return made

    def twin(self, model: HookedModel, others: Others) -> Edit | None:
        """The same of other heads; where there are too few, of the same heads with other keys."""
        made = super().twin(model, others)
        if made is not None or self.keys is None:
            return made
        free = _between(self.keys, self.queries or ())
        if len(free) < len(self.keys):
            return None
        drawn = torch.randperm(len(free), generator=others.generator)[: len(self.keys)]
        return replace(self, keys=tuple(sorted(free[i] for i in drawn.tolist())))

    @property
    def placed(self) -> bool:
        return self.queries is not None or self.keys is not None

    def new(self, site: Site, own: Tensor) -> Tensor:
        queries = self._places("queries", own.shape[2])
        keys = self._places("keys", own.shape[3])
        made = own.clone()
        rows = made[:, :, queries]
        before = rows.sum(-1, keepdim=True)
        gone = rows[..., keys].any(-1, keepdim=True)
        rows[..., keys] = 0
        if self.renormalise:
            left = rows.sum(-1, keepdim=True)
            self._check_left(gone & (left == 0), queries)
            # rows that lose nothing keep their bits
            rows = torch.where(gone, rows * (before / left.where(gone, left.new_ones(()))), rows)
        made[:, :, queries] = rows
        return made

    def _places(self, name: str, length: int) -> Tensor:
        """Positions of a sequence of this length."""
        given = getattr(self, name)
        for index in given or ():
            if not -length <= index < length:
                raise ValueError(
                    f"position {index} among {name} of edit '{self}' must be from {-length} to {length - 1}"
                )
        return torch.tensor([i % length for i in given]) if given else torch.arange(length)

    def _check_left(self, empty: Tensor, queries: Tensor) -> None:
        if empty.any():
            _, head, query, _ = empty.nonzero()[0].tolist()
            heads = range(empty.shape[1]) if self.units.indices is None else self.units.indices
            raise ValueError(
                f"edit '{self}': position {int(queries[query])} of head {heads[head]} has no attention left to "
                "renormalise: expected queries that keep a key"
            )


def _between(keys: Sequence[int], queries: Sequence[int]) -> list[int]:
    """Other positions between those that are named and the end that they are counted from."""
    named = [*keys, *queries]
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
    """The edit that takes away heads' attention from some positions to others.

    Args:
        heads: units of one layer's `blocks.N.attn.hook_pattern`; `SITE:*` for all of them.
        queries: the positions that attend, negative from the end; all if None.
        keys: the positions that are no longer attended to, likewise.
        renormalise: whether the rest of each row is scaled up to what the row was.

    Raises:
        ValueError: if units are of several sites, or no position is named.

    >>> str(knock_out("blocks.1.attn.hook_pattern:0", queries=[5], keys=range(3)))
    'knock_out units=blocks.1.attn.hook_pattern:0 queries=5 keys=0,1,2'
    """
    spans = {
        name: None if given is None else tuple(given)
        for name, given in (("queries", queries), ("keys", keys))
    }
    return KnockOut(Units.of(heads), **spans, renormalise=renormalise)
