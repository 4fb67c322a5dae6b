"""Splitting a task into a half for searching and a half for evaluation that have nothing in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import networkx as nx
import numpy as np

LEAST = 2
"""The fewest examples that a half may have."""


def halves(
    keys: Sequence[Sequence[str]], seed: int
) -> dict[Literal["find", "test"], tuple[int, ...]]:
    """Which examples are in which half. Examples that share a key (a template instance, a name) are in the same half.

    If shared keys connect nearly all examples, each filler is assigned to one half instead, and examples that mix
    fillers of both halves are left out.

    Args:
        keys: for each example, its group first and then its fillers.
        seed: seed of the split.

    Raises:
        ValueError: if there are too few independent examples for two halves.
    """
    generator = np.random.default_rng(seed)
    parts = _connected_parts(keys)
    # One part with more than three quarters of the examples would leave too little for the other half.
    if len(parts) > 1 and max(map(len, parts)) <= 0.75 * len(keys):
        find: list[int] = []
        for i in generator.permutation(len(parts)):
            # A part goes to `find` if that brings the half's size closer to half of the examples.
            if len(find) + len(parts[i]) / 2 <= len(keys) / 2:
                find += parts[i]
        chosen = set(find)
        made = sorted(chosen), [i for i in range(len(keys)) if i not in chosen]
    else:
        made = _split_by_filler(keys, generator)
    if min(map(len, made)) < LEAST:
        raise ValueError(
            f"{len(keys)} examples cannot be split into two halves of at least {LEAST} that share no template instance "
            "and no filler: draw more examples, with more names"
        )
    return {"find": tuple(made[0]), "test": tuple(made[1])}


def _connected_parts(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Groups of examples that are connected by shared keys, directly or through other examples."""
    # A bipartite graph of examples (whole numbers) and keys (pairs, so that no key is taken for an example): its
    # connected components are the parts.
    graph: nx.Graph = nx.Graph()
    for i, own in enumerate(keys):
        graph.add_node(i)
        graph.add_edges_from((i, ("key", key)) for key in own)
    parts = (
        sorted(n for n in part if isinstance(n, int)) for part in nx.connected_components(graph)
    )
    return sorted(part for part in parts if part)


def _split_by_filler(
    keys: Sequence[Sequence[str]], generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Assign each filler to a half; examples follow their fillers, and are left out if those are in both halves."""
    names = sorted({key for own in keys for key in own[1:]})
    mine = set(np.array(names)[generator.permutation(len(names))[: len(names) // 2]].tolist())
    sides: list[list[int]] = [[], []]
    groups: dict[str, int] = {}
    for i, own in enumerate(keys):
        there = {0 if key in mine else 1 for key in own[1:]}
        if len(there) != 1:
            continue
        side = there.pop()
        # Two items of one template instance can have different fillers: the first one that is placed decides.
        if groups.setdefault(own[0], side) == side:
            sides[side].append(i)
    return sides[0], sides[1]
