"""Where NaN and infinity come from, so that no number made of them is shown as a result.

Results are checked, which costs next to nothing; only where they are bad the model is run again to find the place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from circuits.hooks import Look
from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Site


def check_finite(
    model: HookedModel,
    computed: Tensor,
    inputs: Tensor,
    mask: Tensor | None = None,
    names: Sequence[str | int] | None = None,
) -> None:
    """Raise ValueError if what a model computed from inputs holds NaN or infinity, naming where they first appear.

    Args:
        model: the model.
        computed: what is to be shown.
        inputs: what it was computed from, as the model takes them.
        mask: True where a token is real.
        names: what the examples are called; by default their places among the inputs.
    """
    if not bool(torch.isfinite(computed).all()):
        where = where_nonfinite(model, inputs, mask, names) or "no site has such numbers"
        raise ValueError(f"model {model.name} gives NaN or infinity: {where}")


def where_nonfinite(
    model: HookedModel,
    inputs: Tensor,
    mask: Tensor | None = None,
    names: Sequence[str | int] | None = None,
    until: Site | None = None,
) -> str:
    """Where NaN or infinity first appear, in words: in the input or at a site, on which example, and in which weights.

    It is empty if they appear nowhere up to the last site.
    """
    weights = (*model.module.named_parameters(), *model.module.named_buffers())
    bad = next(((n, t) for n, t in weights if _count(t)), None)
    because = "" if bad is None else f" ({_counted(bad[1])} of {bad[0]} are so)"
    for i in range(len(inputs)):
        name = i if names is None else names[i]
        which = name if isinstance(name, str) else f"example {name}"
        if _count(inputs[i]):
            return f"{_counted(inputs[i])} in the input of {which} are so"
        own = None if mask is None else mask[i : i + 1]
        found = first_nonfinite(model, inputs[i : i + 1], own, until)
        if found is not None:
            return f"the first site with NaN or infinity is {found}, on {which}{because}"
    return ""


def first_nonfinite(
    model: HookedModel, inputs: Tensor, mask: Tensor | None = None, until: Site | None = None
) -> str | None:
    """The first site, of those up to `until`, whose tensor holds NaN or infinity in a pass; None if there is none."""
    last = until or model.sites[-1]
    bad: list[str] = []

    def looking(site: Site) -> Look:
        def look(value: Tensor) -> None:
            # Scores of attention that are masked are minus infinity in a healthy model.
            scores = site.kind == "pattern"
            if bool(value.isnan().any()) or (not scores and _count(value)):
                bad.append(site.name)

        return look

    names = [site.name for site in model.sites]
    before = model.sites[: names.index(last.name) + 1]
    with suppress(KeyError):  # a site that this pass does not reach
        model.observe(inputs, {s.name: looking(s) for s in before}, last, mask=mask)
    return bad[0] if bad else None


def _count(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum()) if values.is_floating_point() else 0


def _counted(values: Tensor) -> str:
    return f"{_count(values)} of {values.numel()} numbers"
