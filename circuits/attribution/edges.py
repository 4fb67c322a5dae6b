"""Attributions as edges of the graph store."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float

from circuits.attribution.results import Attribution
from circuits.graph.blocks import BlockInfo
from circuits.units import Unit


def attribution_block(
    made: Attribution,
) -> tuple[BlockInfo, Float[np.ndarray, "target source"]]:
    """An attribution to one unit, averaged over examples, as a block of edges for `add_edges`.

    Edges have the kind `effect` if units were ablated (method `ablation`), else `attribution`.

    Args:
        made: an attribution to one unit, the same in all examples.

    Raises:
        ValueError: if it is an attribution to the input, or has several targets.
    """
    targets = {re.sub(r"@[0-9,]+$", "", aim) for aim in made.aims}
    if len(targets) != 1 or made.site == "input":
        raise ValueError(
            f"attribution at {made.site} to {len(targets)} units: edges lead from a site to one unit"
        )
    unit = Unit.parse(targets.pop())
    values = made.units().double().mean(0)[None].cpu().numpy()
    provenance = {
        "method": made.method, "examples": dict(made.examples), "seed": made.seed,
        "baseline": made.baseline, "target": made.target, "settings": dict(made.settings),
        "rank_correlation_with_ablation": None if made.check is None else made.check.correlation,
    }  # fmt: skip
    kind = "effect" if made.method == "ablation" else "attribution"
    info = BlockInfo(
        made.site, unit.site, kind, made.method, (), (unit.index,), (), values.shape, (), provenance
    )
    return info, values
