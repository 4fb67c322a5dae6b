"""Splitting a task in two, so that nothing which searches can see what judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import networkx as nx
import numpy as np

LEAST = 2
"""A half needs at least this many examples."""


def halves(
    keys: Sequence[Sequence[str]], seed: int
) -> dict[Literal["find", "test"], tuple[int, ...]]:
    """Which examples are in which half; examples that share a key (a template instance, a name) are never apart.

    Where keys tie nearly all examples together, each key after the first (a filler) is given to one half, and examples
    that mix fillers of both are left out.

    Args:
        keys: of each example: its group first, then its fillers.
        seed: of the split.

    Raises:
        ValueError: if there are too few independent examples for two halves.
    """
    generator = np.random.default_rng(seed)
    parts = _tied(keys)
    if len(parts) > 1 and max(map(len, parts)) <= 0.75 * len(keys):
        find: list[int] = []
        for i in generator.permutation(len(parts)):
            # the half that is behind takes the next part
            if len(find) + len(parts[i]) / 2 <= len(keys) / 2:
                find += parts[i]
        chosen = set(find)
        made = sorted(chosen), [i for i in range(len(keys)) if i not in chosen]
    else:
        made = _by_filler(keys, generator)
    if min(map(len, made)) < LEAST:
        raise ValueError(
            f"{len(keys)} examples cannot be split into two halves that share no template instance and no filler: "
            f"expected at least {LEAST} in each (draw more examples, with more names)"
        )
    return {"find": tuple(made[0]), "test": tuple(made[1])}


def _tied(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Examples that are tied to each other by keys they share, directly or through others."""
    graph: nx.Graph = nx.Graph()
    for i, own in enumerate(keys):
        graph.add_node(i)
        graph.add_edges_from((i, ("key", key)) for key in own)
    parts = (
        sorted(n for n in part if isinstance(n, int)) for part in nx.connected_components(graph)
    )
    return sorted(part for part in parts if part)


def _by_filler(
    keys: Sequence[Sequence[str]], generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Fillers are shared out; examples go with their fillers, or are left out if these are apart."""
    names = sorted({key for own in keys for key in own[1:]})
    mine = set(np.array(names)[generator.permutation(len(names))[: len(names) // 2]].tolist())
    sides: list[list[int]] = [[], []]
    groups: dict[str, int] = {}
    for i, own in enumerate(keys):
        there = {0 if key in mine else 1 for key in own[1:]}
        if len(there) != 1:
            continue
        side = there.pop()
        if groups.setdefault(own[0], side) == side:
            sides[side].append(i)
    return sides[0], sides[1]
