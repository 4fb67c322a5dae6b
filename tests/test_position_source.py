"""Positions that a module of one's own adds to its tokens, as a source: by its own code, and next to a bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.discovery import Runs, edge_graph, score_edges
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from tests.conftest import seeded
from tests.person_models import CONTEXT, N_VOCAB, WIDTH, NanoGPT
from tests.test_discovery import weighed
from tests.test_paths import drawn, pairs
from tests.transformer_families import bridged


class Rolled(nn.Module):
    """A table of positions that are moved by one within the length of a text, where that is asked for."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.shift = table, 0

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).roll(self.shift, -2)


def nano() -> NanoGPT:
    module = seeded(NanoGPT(False)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5, generator=torch.Generator().manual_seed(p.numel()))
    return module  # type: ignore[return-value]


def test_rolled_positions_are_edges_of_a_module_of_ones_own() -> None:
    module = nano()
    model = HookedModel(module, TokenInput(N_VOCAB, CONTEXT), "nano")
    graph, (clean, corrupted) = edge_graph(model), drawn()
    assert graph.sources[:2] == ("token", "position")
    (pair,) = (runs := Runs(graph, pairs(model, clean, corrupted, weighed), shift=1)).pairs()
    n, edges = len(graph), list(graph.edges)
    some = torch.zeros(3, n)
    some[0] = 1
    some[1, edges.index(("position", "logits"))] = 1
    some[2, edges.index(("position", "mlp:0"))] = 1
    found = runs.patched(pair, some)
    inside: Any = module.transformer
    with torch.no_grad():
        ids = torch.arange(clean.shape[1])
        moved = inside.wpe(ids).roll(1, 0) - inside.wpe(ids)
        hook = inside.ln_f.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        to_logits = module(clean)
        hook.remove()
        hook = inside.h[0].ln_2.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        to_mlp = module(clean)
        hook.remove()
        inside.wpe = Rolled(inside.wpe)
        inside.wpe.shift = 1
        rolled = module(corrupted)
    made = [
        weighed(one if isinstance(one, Tensor) else one[0]) for one in (rolled, to_logits, to_mlp)
    ]
    torch.testing.assert_close(found, torch.stack(made).double(), rtol=1e-4, atol=1e-4)


def test_edges_of_positions_count_even_where_nothing_rolls() -> None:
    model = HookedModel(nano(), TokenInput(N_VOCAB, CONTEXT), "nano")
    graph, (clean, corrupted) = edge_graph(model), drawn()
    scores = score_edges(graph, pairs(model, clean, corrupted, weighed), "exact").values
    from_positions = np.array([source == "position" for source, _ in graph.edges])
    assert from_positions.sum() > WIDTH // 2
    assert not scores[:, from_positions].any()
    assert scores[:, ~from_positions].any()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_module_has_the_edges_of_positions_that_its_bridge_has(
    family: str, tmp_path: Path
) -> None:
    bridge, inner = bridged(family, tmp_path)
    traced = HookedModel(inner, bridge.input, family)
    found = []
    for model in (bridge, traced):
        clean, corrupted = drawn()
        graph = edge_graph(model)
        task = pairs(model, clean, corrupted, weighed)
        (pair,) = (runs := Runs(graph, task, shift=1)).pairs()
        found.append((graph.edges, runs.patched(pair, torch.eye(len(graph)))))
    assert list(found[0][0]) == list(found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-4)
