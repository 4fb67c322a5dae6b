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
    """What a site's units do for a unit, the mean over examples, as a block for `add_edges`.

    Edges are of kind `effect` where units were removed in truth (method `ablation`), else `attribution`.

    Args:
        made: to one unit, the same in all examples.

    Raises:
        ValueError: if it is of the input, or to several units.
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
