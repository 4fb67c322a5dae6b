"""Pairs of tokens that heads join, and what units write to logits, against the whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits.models.adapter import composition
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.transformer import Transformer
from circuits.models.zoo.loading import load_model
from circuits.units import Unit
from circuits.weights import (
    TokenPairs,
    direct_logits,
    joined_tokens,
    ov_circuit,
    qk_circuit,
    token_pairs,
    written_logits,
)
from tests.random_models import booted

HEAD = "blocks.1.attn.hook_z:1"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return booted(tmp_path_factory.mktemp("model"), request.param)


def holds(found: TokenPairs, matrix: Tensor, top: int) -> None:
    """Whether pairs and moments are those of the matrix."""
    values, places = matrix.flatten().topk(top)
    n = matrix.shape[1]
    assert [(p.source, p.target) for p in found.pairs] == [
        (int(i) // n, int(i) % n) for i in places
    ]
    torch.testing.assert_close(
        torch.tensor([p.value for p in found.pairs]), values, rtol=1e-4, atol=1e-5
    )
    itself = (matrix.argmax(1) == torch.arange(n)).double().mean().item()
    assert found.to_itself == pytest.approx(itself)
    assert found.mean == pytest.approx(matrix.double().mean().item(), abs=1e-6)
    assert found.std == pytest.approx(matrix.double().std(correction=0).item(), rel=1e-4)
    assert found.n_tokens == n


def test_pairs_are_the_largest_of_the_whole_matrix(model: HookedModel, monkeypatch) -> None:
    monkeypatch.setattr(token_pairs, "_NUMBERS_AT_ONCE", 1000)  # in many blocks
    holds(joined_tokens(model, HEAD, "OV", 7), ov_circuit(model, HEAD, tokens=True).matrix, 7)
    for offset in (-2, 0):
        whole = qk_circuit(model, HEAD, tokens=True, offset=offset).at(offset)
        holds(joined_tokens(model, HEAD, "QK", 7, offset), whole, 7)


def test_an_induction_head_raises_the_token_that_it_attends_to() -> None:
    model = load_model("induction")
    found = joined_tokens(model, "blocks.1.attn.hook_z:0", "OV", 3)
    assert found.to_itself > 0.9 > 10 / found.n_tokens, "far beyond chance"
    assert all(p.source == p.target for p in found.pairs)
    assert found.pairs[0].value > found.mean + 3 * found.std


def test_what_units_write_is_their_direction_through_the_unembedding(model: HookedModel) -> None:
    transformer = Transformer(model)
    read = composition.read_weights(transformer, None)
    neuron = Unit(transformer.layers[0].neurons or "", 3)
    written = composition.written_weights(transformer, 0)[3]
    for found in (direct_logits(model, neuron), written_logits(model, neuron)):
        torch.testing.assert_close(found, written @ read, rtol=1e-4, atol=1e-5)
    stream = written_logits(model, Unit(transformer.layers[0].after, 5))
    torch.testing.assert_close(stream, read[5], rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_said(model: HookedModel) -> None:
    with pytest.raises(ValueError, match="way 'VO': expected one of OV, QK"):
        joined_tokens(model, HEAD, "VO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top 0 must be at least 1"):
        joined_tokens(model, HEAD, "OV", 0)
    with pytest.raises(ValueError, match="is not a head"):
        joined_tokens(model, "blocks.1.mlp.hook_post:0", "OV")
    with pytest.raises(ValueError, match="is not a neuron"):
        written_logits(model, HEAD)
    with pytest.raises(ValueError, match="offset 1 must be"):
        joined_tokens(model, HEAD, "QK", offset=1)
